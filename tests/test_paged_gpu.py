"""Pages that travel beside the computation on a GPU: every wait between the two, and the memory that they take.

A wait that is missing shows in the bits once a queue is held up by milliseconds. Where there is no GPU, stand-ins for
CUDA's streams write down what must have happened; and a used optimizer takes a state on either device.
"""
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from paged_cases import AdamW, as_made, case_of, numbers, same_bits, train
from torch.nn import Parameter

from conftest import devices
from qlora_lab.engine.copy_lanes import LaneMover
from qlora_lab.engine.dispatch import standing_in
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.state_formats import BLOCK
from qlora_lab.paged import Mover, Pager

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NINE_PAGES = [(9 * BLOCK - 50,)]


def hold_up(monkeypatch, late, device=None):
    "Milliseconds of idling before every copy in, every copy out, or every computation."
    def sleep(): torch.cuda._sleep(10_000_000)
    lane, update = LaneMover.lane, PagedAdamW._update
    @contextmanager
    def held(self, name, *after):
        with lane(self, name, *after):
            if name == late: sleep()
            yield
    def updated(self, page, items):
        with torch.cuda.device(device): sleep()
        update(self, page, items)
    monkeypatch.setattr(LaneMover, "lane", held)
    if late == "compute": monkeypatch.setattr(PagedAdamW, "_update", updated)


# ---------------------------------------------------------------- without a GPU

class Told(LaneMover):
    "A mover whose queues know what has surely happened before their next entry, and whose events are that knowledge."
    def __init__(self, host, frames, device):
        self.known, self.running = {k: set() for k in ("compute", "in", "out")}, ["compute"]
        self.latest, self.count = {}, 0
        with pytest.MonkeyPatch.context() as patch:
            made = iter(("in", "out"))
            patch.setattr(torch.cuda, "Stream", lambda device: self.stream(next(made)))
            patch.setattr(torch.cuda, "current_stream", lambda device: None)
            patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
            super().__init__(host, frames, device)

    def stream(self, name):
        def wait(event): self.known[name] |= event
        def nothing(*other): return None
        return SimpleNamespace(name=name, wait_event=wait, wait_stream=nothing, synchronize=nothing)

    @contextmanager
    def entered(self, stream):
        self.running.append(stream.name)
        yield
        self.running.pop()

    def note(self, *key): self.events[key] = frozenset(self.known[self.running[-1]])

    def happens(self, what, page, *after):
        "An entry of the running queue, and what must have happened before it, where it ever did."
        known = self.known[self.running[-1]]
        assert {self.latest[w] for w in after if w in self.latest} <= known, (what, page)
        self.count += 1
        self.latest[what, page] = self.count
        known.add(self.count)


def test_nothing_is_done_before_its_time(monkeypatch):
    """Each copy and each computation comes after what it needs, by the events alone.

    A page arrives after its frame's last page was worked on and had landed, and after it had landed itself; it is
    worked on after it arrived; it goes home after that work.
    """
    with standing_in({("move_pages", "cpu"): Told}): pager = Pager({"x": torch.zeros(5, 4)}, 2, torch.device("cpu"))
    mover, lies_in, log = pager.mover, {}, []
    def brought(self, page, frame):
        last = lies_in.get(frame)
        self.happens("in", page, ("work", last), ("out", last), ("out", page), ("work", page))
        lies_in[frame] = page
        log.append("in")
    def taken(self, page, frame):
        self.happens("out", page, ("in", page), ("work", page))
        log.append("out")
    def work(page, items):
        mover.happens("work", page, ("in", page))
        log.append("work")
    monkeypatch.setattr(Mover, "bring", brought)
    monkeypatch.setattr(Mover, "take_home", taken)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mover.stream(mover.running[-1]))
    monkeypatch.setattr(torch.cuda, "stream", mover.entered)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 2, 4]): pager.sweep(order, work)
    pager.flush()
    assert log.count("work") == 13 and log.count("in") > 8 and log.count("out") > 8


# ---------------------------------------------------------------- on a GPU

@pytest.mark.parametrize("device", devices())
def test_a_used_optimizer_takes_a_state(device, monkeypatch):
    """Nothing is left of what it had.

    Not even of parameters that the state leaves out, or of pages that are on their way home.
    """
    if device == "cuda": hold_up(monkeypatch, "out")
    def trained(make, steps, some):
        params = [Parameter(numbers((9 * BLOCK - 7,), n).to(device)) for n in range(2)]
        optimizer = make(params)
        for t in range(steps):
            for n, p in enumerate(params): p.grad = numbers(p.shape, t, n).to(device) if n in some else None
            optimizer.step()
        return params, optimizer
    expected, reference = trained(AdamW, 3, {0})
    saved = deepcopy(reference.state_dict())  # on the CPU, since a copy from the GPU would wait for it
    saved["state"] = {i: {k: v.cpu() for k, v in s.items()} for i, s in saved["state"].items()}
    def paged(params): return PagedAdamW(params, lr=0.1, device_budget=5 * 2048, page_bytes=2048)
    params, optimizer = trained(paged, 4, {0, 1})
    optimizer.load_state_dict(saved)
    for p, q in zip(params, expected): p.data.copy_(q.data)
    for t in range(3):
        for n, (p, q) in enumerate(zip(params, expected)): p.grad = q.grad = numbers(p.shape, 9, t, n).to(device)
        optimizer.step()
        reference.step()
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, expected))


@needs_gpu
@pytest.mark.parametrize("budget", [2048, 5000, 20_000, 10 ** 6])
def test_gpu_results_are_torchs(budget):
    """Float32 parameters against torch's AdamW on the same GPU; others against the unpaged twin.

    The state is pinned on the host.
    """
    shapes = [(300, 41), (16, 256), (1,), (128,), (5, 777)]
    case = case_of(shapes, second={1, 3}, missing={(1, 0), (2, 3)}, steps=6, schedule=True, device_budget=budget)
    got, optimizer = train(case, as_made(case), as_made(case, page_bytes=4096, device_budget=12_000), device="cuda")
    assert all(map(same_bits, got, train(case, AdamW, device="cuda")[0]))
    mover = optimizer.pager.mover
    assert mover.host["exp_avg"].is_pinned() and mover.frames["exp_avg"].is_cuda and optimizer.device_bytes <= 12_000
    for bits, dtype in ((8, torch.float32), (32, torch.bfloat16), (8, torch.bfloat16), (32, torch.float16)):
        makers = [as_made(case, bits=bits, device_budget=b) for b in (budget, None)]
        assert all(map(same_bits, *(train(case, make, dtype=dtype, device="cuda")[0] for make in makers)))


@needs_gpu
@pytest.mark.parametrize("late", ["in", "out", "compute", "nothing"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_gpu_waits(frames, late, monkeypatch):
    "Copies in, copies out or the computation are held up by milliseconds: a missing wait would show in the bits."
    hold_up(monkeypatch, late)
    case = case_of(NINE_PAGES, device_budget=2048 * frames)
    got, _ = train(case, as_made(case), as_made(case), device="cuda")
    assert all(map(same_bits, got, train(case, AdamW, device="cuda")[0]))


@needs_gpu
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_gpu_with_the_plain_mover(frames):
    "The lesson's mover, which waits for each copy, moves pages on a GPU too."
    case = case_of(NINE_PAGES, device_budget=2048 * frames)
    with standing_in({("move_pages", "cuda"): None}): got, _ = train(case, as_made(case), as_made(case), device="cuda")
    assert all(map(same_bits, got, train(case, AdamW, device="cuda")[0]))


@needs_gpu
def test_gpu_memory_is_the_budget():
    "What the optimizer takes on the device: its frames, and during a step no more than scratch space for a few pages."
    p = Parameter(torch.zeros(1 << 24, device="cuda"))
    p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    optimizer = PagedAdamW([p], device_budget=8 << 20, page_bytes=1 << 20)
    assert torch.cuda.memory_allocated() - before <= 8 << 20
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3): optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 11 << 20
    del optimizer
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@needs_gpu
def test_gpu_frames_wait_for_their_memorys_last_owner():
    """The allocator hands over memory on which the computing stream still has work queued.

    The copy streams must not be quicker.
    """
    def final(busy):
        p = Parameter(numbers((8 * BLOCK,), 1).cuda())
        p.grad = numbers(p.shape, 2).cuda()
        torch.cuda.synchronize()
        if busy:
            junk = [torch.empty(1024, device="cuda") for _ in range(64)]
            torch.cuda._sleep(50_000_000)
            for t in junk: t.fill_(1e6)
            del junk, t
        optimizer = PagedAdamW([p], device_budget=4 * 2048, page_bytes=2048)
        optimizer.step()
        return p.detach().cpu()
    assert same_bits(final(True), final(False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("late", ["compute", "nothing"])
def test_gpu_that_is_not_the_current_one(late, monkeypatch):
    "Streams and events are those of the parameters' device."
    hold_up(monkeypatch, late, device=1)
    case = case_of(NINE_PAGES, device_budget=4096)
    got, _ = train(case, as_made(case), as_made(case), device="cuda:1")
    assert all(map(same_bits, got, train(case, AdamW, device="cuda:1")[0]))
