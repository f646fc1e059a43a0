"""The paged optimizer is torch's AdamW to the bit, whatever lies where and whenever it is saved.

Protects: the page table's bookkeeping, the order of visits, the cut of parameters into pages, the update itself, both formats of the
state, the bytes that are moved and those that stay on the device, what is refused, and on a GPU every wait between copies and computation.
"""
import json
from copy import deepcopy
from itertools import permutations

import bitsandbytes.functional as bnb
import pytest
import safetensors.torch
import torch
from conftest import devices
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lab import paged as module
from qlora_lab.blockwise import dequantize_blockwise, quantize_blockwise
from qlora_lab.double_quant import DYNAMIC8, dynamic_map
from qlora_lab.paged import BLOCK, FORMATS, UDYNAMIC8, PagedAdamW, Pager, PageTable, lay_out, page_parameters, read_moments, state_bytes, write_moments
from qlora_lab.records import LabError

quick = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
AdamW = torch.optim.AdamW


pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(shape, *seed): return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seed) & 0xFFFFFF))


def same_bits(a, b):
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(whole), b.view(whole))


# ---------------------------------------------------------------- the page table

def optimum(visits, frames):
    "Fewest faults of any policy whatever: all choices are tried. `visits` are distinct pages within a step, so nothing is gained by fetching early."
    reached = {frozenset(): 0}
    for page in visits:
        following = {}
        for resident, faults in reached.items():
            stay = [resident] if page in resident else [resident - {p} | {page} for p in resident] if len(resident) == frames else [resident | {page}]
            for after in stay: following[after] = min(following.get(after, 10 ** 9), faults + (page not in resident))
        reached = following
    return min(reached.values())


def sweep(pages, steps, back): return [p for s in range(steps) for p in (range(pages)[::-1] if back and s % 2 else range(pages))]


def faults(visits, frames, policy="lru"):
    table = PageTable(frames, policy)
    for page in visits: table.touch(page)
    return table.faults


@settings(quick, max_examples=200)
@given(visits=st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.booleans(), st.integers(0, 9)), min_size=20, max_size=60), frames=st.integers(2, 9), policy=st.sampled_from(["lru", "mru", "fifo"]))
def test_page_table_against_a_plain_model(visits, frames, policy):
    "Who leaves, what is counted, and that no change is ever lost: each write makes a new version, which must be found at the next visit."
    table, came, used, dirty = PageTable(frames, policy), {}, {}, set()
    host, device, current, last = [0] * 8, {}, [0] * 8, None
    counts = {"hits": 0, "faults": 0, "writebacks": 0}
    for now, (page, write, protect, checkpoint) in enumerate(visits):
        if checkpoint == 0:
            for p in list(dirty): assert table.clean(p) and not table.clean(p); host[p] = device[table.frame_of[p]]; counts["writebacks"] += 1
            dirty.clear()
        keep, leaves = (last,) if protect and last is not None else (), None
        if page in came: counts["hits"] += 1
        else:
            counts["faults"] += 1
            if len(came) == frames:
                order = sorted((p for p in came if p not in keep), key=(came if policy == "fifo" else used).get)
                leaves = order[-1 if policy == "mru" else 0]
                del came[leaves]
            came[page] = now
        used[page], last = now, page
        frame, out = table.touch(page, write=write, keep=keep)
        assert out == (leaves if leaves in dirty else None)
        if out is not None: host[out] = device[frame]; dirty.discard(out); counts["writebacks"] += 1
        if came[page] == now: device[frame] = host[page]
        assert device[frame] == current[page]
        if write: current[page] += 1; device[frame] = current[page]; dirty.add(page)
        assert set(table.frame_of) == set(came) and len(set(table.frame_of.values())) == len(came) <= frames and table.dirty == dirty
    assert counts == {k: getattr(table, k) for k in counts}


@pytest.mark.parametrize("pages", range(2, 7))
def test_there_and_back_cannot_be_beaten(pages):
    "N - F fetches a step after the first; one way, LRU fetches everything and the best policy is MRU. All policies are tried, all choices."
    for frames in range(1, pages):
        steps = pages + 1
        assert faults(sweep(pages, steps, True), frames) == optimum(sweep(pages, steps, True), frames) == pages + (steps - 1) * (pages - frames)
        assert faults(sweep(pages, steps, False), frames) == pages * steps
        assert faults(sweep(pages, steps, False), frames, "mru") == optimum(sweep(pages, steps, False), frames)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_no_order_of_visits_does_better(frames):
    "All orders of four pages in three steps, each under its best policy: none gets below 4 + 2 (4 - F)."
    orders = list(permutations(range(4)))
    best = min(optimum((*orders[0], *second, *third), frames) for second in orders for third in orders)
    assert best == 4 + 2 * (4 - frames) == faults(sweep(4, 3, True), frames)


def test_page_table_refuses():
    with pytest.raises(ValueError, match="policy 'lfu'"): PageTable(2, "lfu")
    with pytest.raises(ValueError, match="at least one frame"): PageTable(0)


# ---------------------------------------------------------------- what a page holds

@quick
@given(sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=8), blocks=st.integers(1, 5))
def test_layout(sizes, blocks):
    "Every item lies in exactly one page, at a place of its own; parameters begin at multiples of 256, and groups are kept apart."
    items = blocks * BLOCK
    groups = [{"params": [torch.arange(n) for n in sizes[::2]]}, {"params": [torch.arange(n) for n in sizes[1::2]]}]
    pages, starts = lay_out(groups, items)
    places, owners = set(), {}
    for number, page in enumerate(pages):
        for piece in page:
            assert 0 <= piece.at and piece.at + piece.b - piece.a <= items and (number * items + piece.at) % BLOCK == 0
            assert any(p is piece.param for p in piece.group["params"])
            for item in range(piece.a, piece.b):
                owners[id(piece.param), item] = owners.get((id(piece.param), item), 0) + 1
                places.add((number, piece.at + item - piece.a))
    assert len(places) == len(owners) == sum(sizes) and set(owners.values()) <= {1}
    assert all(s % BLOCK == 0 for s in starts) and len(starts) == len(sizes)


@pytest.mark.parametrize("bits", [8, 32])
def test_pages_by_default(bits):
    "A quarter of the budget, 64 MiB at most; without a budget even parts of at most 8 Mi parameters; never more than there are; as asked, if it is said."
    block = state_bytes(BLOCK, bits)
    for budget in (block, 4 * block, 100_000, 10 ** 7, 10 ** 9, 10 ** 12):
        page = page_parameters(1 << 40, bits, budget)
        assert page % BLOCK == 0 and page // BLOCK == max(1, min(budget // 4, 64 << 20) // block)
    for parameters in (256, 8 << 20, (8 << 20) + BLOCK, 100 * 10 ** 6 // BLOCK * BLOCK):
        page = page_parameters(parameters, bits)
        assert page % BLOCK == 0 and page <= 8 << 20 and 0 <= -(-parameters // page) * page - parameters < BLOCK * -(-parameters // page)
    assert page_parameters(1024, bits, 10 ** 9) == 1024 and page_parameters(10 ** 6 // BLOCK * BLOCK, bits, page_bytes=3 * block + 7) == 3 * BLOCK


def test_8_bit_moments_are_lesson_01s_codes():
    "Scaled by the reciprocal, as everywhere in the lab: two of these numbers would get another code by a division."
    n = 1 << 18
    items = {k: torch.zeros(n // per, dtype=dtype) for k, (dtype, per) in FORMATS[8].items()}
    pair = numbers((n,), 1), numbers((n,), 7).square()
    write_moments(items, 0, n, *pair)
    for i, x, code in ((1, pair[0], DYNAMIC8), (2, pair[1], UDYNAMIC8)):
        codes, absmax = quantize_blockwise(x, code, BLOCK)
        assert torch.equal(items[f"state{i}"], codes) and same_bits(items[f"absmax{i}"], absmax)
        assert same_bits(read_moments(items, 512, 1100, 8)[i - 1], dequantize_blockwise(codes[512:1100], absmax[2:5], code, BLOCK))


def test_codes_and_bytes_are_bitsandbytes():
    assert same_bits(dynamic_map(signed=False), bnb.create_dynamic_map(signed=False)) and same_bits(UDYNAMIC8, dynamic_map(signed=False))
    assert same_bits(DYNAMIC8, bnb.create_dynamic_map(signed=True))
    assert [state_bytes(n) for n in (1, 256, 1000)] == [8, 2048, 8000] and [state_bytes(n, 8) for n in (1, 256, 257)] == [10, 520, 530]


# ---------------------------------------------------------------- results

SIZES = st.one_of(st.sampled_from([(1,), (255,), (256,), (257,), (512,), (16, 33), (5, 1, 7), (3, 300), ()]), st.integers(1, 900).map(lambda n: (n,)))


@st.composite
def cases(draw, bits=(32,)):
    "Parameters in two groups, a budget, missing gradients, a schedule, and a step after which everything is saved and taken up elsewhere."
    shapes, bits = draw(st.lists(SIZES, min_size=1, max_size=5)), draw(st.sampled_from(bits))
    page = draw(st.integers(state_bytes(BLOCK, bits), 3 * state_bytes(BLOCK, bits)))
    steps = draw(st.integers(2, 5))
    return {"shapes": shapes, "bits": bits, "page_bytes": page, "device_budget": draw(st.integers(page, 12 * page)), "steps": steps,
            "second": draw(st.sets(st.integers(0, 4))), "missing": draw(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)))),
            "schedule": draw(st.booleans()), "resume": draw(st.integers(0, steps)), "page_after": draw(st.integers(2048, 5000))}


def groups_of(params, second):
    groups = [{"params": [p for n, p in enumerate(params) if n not in second]},
              {"params": [p for n, p in enumerate(params) if n in second], "lr": 3e-2, "weight_decay": 0., "betas": (0.8, 0.99), "eps": 1e-6}]
    return [g for g in groups if g["params"]]


def train(case, make, then=None, dtype=torch.float32, device="cpu"):
    "Parameters after each step; `then` makes the optimizer that goes on with the saved state after step `resume`. Returns them and the last state dict."
    params = [Parameter(numbers(s, n).to(device, dtype)) for n, s in enumerate(case["shapes"])]
    def ready(make):
        optimizer = make(groups_of(params, case["second"]))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)) if case["schedule"] else None
    (optimizer, schedule), seen = ready(make), []
    for t in range(case["steps"]):
        if then is not None and t == case["resume"]:
            saved = deepcopy((optimizer.state_dict(), schedule and schedule.state_dict()))
            optimizer, schedule = ready(then)
            optimizer.load_state_dict(saved[0])
            if schedule: schedule.load_state_dict(saved[1])
        for n, p in enumerate(params): p.grad = None if (t, n) in case["missing"] else numbers(p.shape, t, n).to(device, dtype)
        optimizer.step()
        if schedule: schedule.step()
        seen += [p.detach().clone() for p in params]
    return seen, optimizer


def moments(optimizer): return [s[k] for s in optimizer.state_dict()["state"].values() for k in ("exp_avg", "exp_avg_sq")]


def as_made(case, **other): return lambda params: PagedAdamW(params, **{k: case[k] for k in ("bits", "page_bytes", "device_budget")} | other)


@quick
@given(case=cases())
def test_results_are_torchs(case):
    "Parameters after every step and the state at the end, bit for bit, whatever the budget."
    expected, reference = train(case, AdamW)
    got, optimizer = train(case, as_made(case))
    assert all(map(same_bits, got, expected))
    stepped = [t for s in optimizer.state_dict()["state"].values() if s["step"] > 0 for t in (s["step"], s["exp_avg"], s["exp_avg_sq"])]
    theirs = [t for k in sorted(reference.state_dict()["state"]) for t in [reference.state_dict()["state"][k][n] for n in ("step", "exp_avg", "exp_avg_sq")]]
    assert len(stepped) == len(theirs) and all(map(same_bits, stepped, theirs))
    assert optimizer.device_bytes <= case["device_budget"]


@quick
@given(case=cases(), order=st.sampled_from(["paged to paged", "paged to torch", "torch to paged", "paged to unpaged"]))
def test_resumed_anywhere(case, order):
    "Saved after any step, and taken up by a paged optimizer of another page and budget, by torch's, or by one without a budget: the bits of an uninterrupted run."
    make = {"paged": as_made(case), "torch": AdamW, "unpaged": as_made(case, device_budget=None)}
    first, then = order.split(" to ")
    after = as_made(case, page_bytes=case["page_after"], device_budget=2 * case["page_after"]) if then == first else make[then]
    assert all(map(same_bits, train(case, make[first], after)[0], train(case, AdamW)[0]))


@quick
@given(case=cases(bits=(8, 32)), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), resume=st.booleans())
def test_paged_is_unpaged(case, dtype, resume):
    "In 8 bits, and for 16-bit parameters, the twin is the same optimizer without a budget. Its state is float32 where torch's would be 16-bit."
    then = as_made(case, page_bytes=case["page_after"], device_budget=2 * case["page_after"]) if resume else None
    got, optimizer = train(case, as_made(case), then, dtype)
    expected, unpaged = train(case, as_made(case, device_budget=None), dtype=dtype)
    assert unpaged.pager is None and all(map(same_bits, got, expected))
    for a, b in zip(optimizer.state_dict()["state"].values(), unpaged.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
        assert {t.dtype for t in a.values()} == ({torch.float32} if case["bits"] == 32 else {torch.float32, torch.uint8})


@settings(quick, max_examples=30)
@given(case=cases(bits=(8,)))
def test_8_bit_state_is_rounded_after_each_step(case):
    "The oracle: torch's AdamW, whose moments are put through the codes, block by block, after each step."
    def rounded(x, code): return dequantize_blockwise(*quantize_blockwise(x, code, BLOCK), code, BLOCK).view(x.shape)
    class Rounded(AdamW):
        def step(self):
            super().step()
            for p, s in self.state.items():
                if p.grad is not None: s["exp_avg"], s["exp_avg_sq"] = rounded(s["exp_avg"], DYNAMIC8), rounded(s["exp_avg_sq"], UDYNAMIC8)
    assert all(map(same_bits, train(case, as_made(case))[0], train(case, Rounded)[0]))


@quick
@given(case=cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_16_bit_parameters_are_updated_in_float32(case, dtype):
    "The oracle: torch's AdamW on float32 copies, rounded to 16 bits after each step."
    class Wide(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {})
            self.wide = AdamW([{**g, "params": [Parameter(p.detach().float()) for p in g["params"]]} for g in groups])
        def step(self):
            for own, g in zip(self.param_groups, self.wide.param_groups):
                for p, w in zip(own["params"], g["params"]): w.data, w.grad = p.detach().float(), None if p.grad is None else p.grad.float()
            self.wide.step()
            for own, g in zip(self.param_groups, self.wide.param_groups):
                for p, w in zip(own["params"], g["params"]): p.data.copy_(w.data)
    assert all(map(same_bits, train(case | {"schedule": False}, as_made(case), dtype=dtype)[0], train(case | {"schedule": False}, Wide, dtype=dtype)[0]))


def test_16_bit_parameters_keep_a_state_that_can_shrink():
    "torch's own bfloat16 state cannot: 0.999 times a number is rounded back to it."
    def second(make):
        p = Parameter(torch.zeros(4, dtype=torch.bfloat16))
        optimizer = make([p])
        for t in range(300):
            p.grad = torch.full_like(p, float(t == 0))
            optimizer.step()
        return optimizer.state[p]["exp_avg_sq"][0].item()
    assert abs(second(PagedAdamW) / (0.001 * 0.999 ** 299) - 1) < 1e-4 and abs(second(AdamW) / 0.001 - 1) < 0.004


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_make_no_difference(threads):
    "Large parameters are shared out among threads, and pages cut elsewhere than threads do; the bits are those of torch with one."
    case = {"shapes": [(200_003,), (301, 333)], "second": {1}, "missing": set(), "steps": 3, "schedule": False, "resume": 1, "bits": 32, "page_bytes": 300_000, "device_budget": 10 ** 6}
    expected = train(case, AdamW)[0]
    torch.set_num_threads(threads)
    try: assert all(map(same_bits, train(case, as_made(case))[0], expected))
    finally: torch.set_num_threads(1)


def test_an_optimizer_like_any_other():
    "A closure is called with gradients on and its loss returned, hooks are called, gradients of zero, or that lie in columns, are taken."
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 30) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, called = torch.randn(8, 40), []
    optimizers = [AdamW(layers[0].parameters()), PagedAdamW(layers[1].parameters(), device_budget=2048)]
    optimizers[1].register_step_post_hook(lambda *a: called.append(1))
    for layer, optimizer in zip(layers, optimizers):
        def closure():
            optimizer.zero_grad()
            loss = (x @ layer.weight.t()).square().mean() + 0 * layer.bias.sum()
            loss.backward()
            layer.weight.grad = layer.weight.grad.t().contiguous().t()  # the same numbers in columns
            return loss
        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses[0] > losses[-1]
    assert len(called) == 3 and all(map(same_bits, layers[0].state_dict().values(), layers[1].state_dict().values()))


# ---------------------------------------------------------------- bytes

class Copies(TorchDispatchMode):
    "Counts what is really copied between two sets of memory."
    def __init__(self, pager):
        super().__init__()
        self.host, self.device = ({t.untyped_storage().data_ptr() for t in a.values()} for a in (pager.host, pager.frames))
        self.bytes_in = self.bytes_out = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.copy_.default:
            to, of = (t.untyped_storage().data_ptr() for t in args[:2])
            self.bytes_in += args[0].nbytes * (to in self.device and of in self.host)
            self.bytes_out += args[0].nbytes * (to in self.host and of in self.device)
        return op(*args, **(kwargs or {}))


def idle(sizes, **how):
    "An optimizer with gradients."
    params = [Parameter(numbers((n,), n)) for n in sizes]
    for p in params: p.grad = numbers(p.shape, 1)
    return PagedAdamW(params, **how)


@settings(quick, max_examples=30)
@given(pages=st.integers(2, 9), frames=st.integers(1, 8), steps=st.integers(1, 3), bits=st.sampled_from([8, 32]), spare=st.integers(0, 500))
def test_bytes_are_the_arithmetics(pages, frames, steps, bits, spare):
    "N - F pages in and out a step, none in during the first, and F more out when the state is saved; the optimizer's own counts, and what was really copied."
    frames, page = min(frames, pages - 1), state_bytes(2 * BLOCK, bits)
    optimizer = idle([pages * 2 * BLOCK - 100], bits=bits, page_bytes=page, device_budget=frames * page + spare)
    assert len(optimizer.pages) == pages and optimizer.device_bytes == frames * page
    assert sum(t.untyped_storage().nbytes() for t in optimizer.pager.frames.values()) == frames * page <= frames * page + spare
    with Copies(optimizer.pager) as copies:
        for _ in range(steps): optimizer.step()
        assert copies.bytes_in == optimizer.pager.bytes_in == (steps - 1) * (pages - frames) * page
        assert copies.bytes_out == optimizer.pager.bytes_out == steps * (pages - frames) * page
        optimizer.state_dict()
        optimizer.state_dict()
        assert copies.bytes_out == optimizer.pager.bytes_out == (steps * (pages - frames) + frames) * page


def test_pages_are_visited_there_and_back_and_fetched_ahead(monkeypatch):
    "The next page is asked for before the present one is worked on, and the page in work stays."
    log, optimizer = [], idle([5 * BLOCK], page_bytes=2048, device_budget=2 * 2048)
    fetch, update = Pager.fetch, PagedAdamW._update
    monkeypatch.setattr(Pager, "fetch", lambda self, page, keep=(): (log.append(("fetch", page, *keep)), fetch(self, page, keep))[1])
    monkeypatch.setattr(PagedAdamW, "_update", lambda self, page, items: (log.append(("update", page)), update(self, page, items))[1])
    optimizer.step()
    assert log == [("fetch", 0), ("fetch", 1, 0), ("update", 0), ("fetch", 2, 1), ("update", 1), ("fetch", 3, 2), ("update", 2), ("fetch", 4, 3), ("update", 3), ("update", 4)]
    log.clear()
    optimizer.step()
    assert [entry[1] for entry in log if entry[0] == "update"] == [4, 3, 2, 1, 0]


def test_pages_without_gradients_stay_where_they_are():
    optimizer = idle([2 * BLOCK] * 4, page_bytes=4096, device_budget=4096)
    params = optimizer.param_groups[0]["params"]
    for p in params[1:]: p.grad = None
    for _ in range(3): optimizer.step()
    assert optimizer.pager.bytes_in == optimizer.pager.bytes_out == 0 and optimizer.pager.table.faults == 1
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert same_bits(before, params[0].detach()) and optimizer.pager.table.faults == 1
    assert [int(s["step"]) for s in optimizer.state_dict()["state"].values()] == [3, 0, 0, 0]


def test_a_budget_for_everything_is_no_paging():
    whole = idle([1000]).device_bytes
    assert idle([1000], device_budget=whole).pager is None and idle([1000], device_budget=whole - 1, page_bytes=2048).pager is not None
    assert idle([1000], bits=8).device_bytes < whole / 3.9


# ---------------------------------------------------------------- refusals

def test_arguments_are_checked_before_anything_is_allocated(monkeypatch):
    def params(n=1000, **how): return [Parameter(torch.empty(n, **how))]
    cases = [("smaller than one page of 2,048", params(), {"device_budget": 2047}), ("smaller than one page of 4,096", params(), {"device_budget": 4000, "page_bytes": 4096}),
             ("of free host memory; leave it out", params(), {"device_budget": 10 ** 15}), ("smaller than one page", params(), {"device_budget": 0}),
             ("expected 32 or 8", params(), {"bits": 4}), ("expected at least 2048", params(), {"page_bytes": 100}), ("expected at least 520", params(), {"page_bytes": 100, "bits": 8}),
             ("cpu and meta: use one PagedAdamW for each", [*params(), *params(device="meta")], {}), ("no device", [{"params": []}], {}),
             ("expected contiguous float32", params(dtype=torch.float64), {}), ("expected contiguous", [Parameter(torch.empty(4, 5).t())], {}),
             ("lr=-1", params(), {"lr": -1}), ("betas below 1", params(), {"betas": (0.9, 1.)}), ("weight_decay=-0.1", params(), {"weight_decay": -0.1})]
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: pytest.fail("allocated"))
    for message, given_params, how in cases:
        with pytest.raises(LabError) as e: PagedAdamW(given_params, **how)
        assert message in str(e.value)


def test_a_state_larger_than_the_hosts_memory_is_refused(monkeypatch):
    class Little: available = 50_000
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: Little)
    with pytest.raises(LabError, match="the state takes 69,632 bytes of host memory and 50,000 are free"): idle([8192], device_budget=4096, page_bytes=2048)
    assert idle([5000], device_budget=42_000).pager is None  # all of it stays on the device, once
    with pytest.raises(LabError, match="more than the 50,000"): idle([5000], device_budget=50_001)


def test_no_parameters_later():
    optimizer = idle([1000])
    with pytest.raises(LabError, match="give it all parameters at the start"): optimizer.add_param_group({"params": [Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def misfits():
    "State dicts that do not fit an optimizer of parameters [700] and [5, 60] with 32 bits."
    def of(make, shapes=((700,), (5, 60)), **how):
        params = [Parameter(numbers(s, 7)) for s in shapes]
        for p in params: p.grad = numbers(p.shape, 8)
        optimizer = make(params, **how)
        optimizer.step()
        return deepcopy(optimizer.state_dict())
    import bitsandbytes
    cut, parted = of(AdamW), of(AdamW)
    del cut["state"][1]["exp_avg_sq"]
    parted["param_groups"] = [{**parted["param_groups"][0], "params": [0]}, {**parted["param_groups"][0], "params": [1]}]
    return {"8 bits": of(PagedAdamW, bits=8), "fewer": of(AdamW, [(700,)]), "other shapes": of(AdamW, [(700,), (60, 5)]), "swapped": of(AdamW, [(5, 60), (700,)]),
            "amsgrad": of(AdamW, amsgrad=True), "maximize": of(AdamW, maximize=True), "cut": cut, "groups": parted, "SGD": of(torch.optim.SGD, momentum=0.9),
            "bitsandbytes": of(bitsandbytes.optim.AdamW8bit), "bitsandbytes 32": of(bitsandbytes.optim.AdamW32bit)}


@pytest.mark.parametrize("name", list(misfits()))
@pytest.mark.parametrize("budget", [None, 4096])
def test_a_state_that_does_not_fit_changes_nothing(name, budget):
    "The message says what came and what was expected; training goes on as if nothing had been tried."
    saved, after = misfits()[name], []
    for tried in (False, True):
        params = [Parameter(numbers(s, n)) for n, s in enumerate(((700,), (5, 60)))]
        optimizer = PagedAdamW(params, lr=0.01, device_budget=budget, page_bytes=2048)
        for t in range(4):
            for n, p in enumerate(params): p.grad = numbers(p.shape, t, n)
            optimizer.step()
            if tried and t == 1:
                with pytest.raises(LabError, match="^the state "): optimizer.load_state_dict(saved)
                assert optimizer.param_groups[0]["lr"] == 0.01
        after.append([p.detach() for p in params] + moments(optimizer))
    assert all(map(same_bits, *after))


# ---------------------------------------------------------------- what is saved

@pytest.mark.parametrize("budget", [None, 4096])
def test_the_state_dict_is_a_plain_one(budget):
    "torch.optim.AdamW's names and shapes, through safetensors and JSON and back, and torch's AdamW goes on with it."
    optimizer = idle([700, 300], device_budget=budget, page_bytes=2048, lr=0.01)
    for _ in range(3): optimizer.step()
    saved = optimizer.state_dict()
    reference = AdamW([Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]])
    assert saved.keys() == reference.state_dict().keys() and all(t.device.type == "cpu" for s in saved["state"].values() for t in s.values())
    flat = safetensors.torch.load(safetensors.torch.save({f"{i}.{k}": t for i, s in saved["state"].items() for k, t in s.items()}))
    back = {"state": {i: {k: flat[f"{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")} for i in (0, 1)}, "param_groups": json.loads(json.dumps(saved["param_groups"]))}
    reference.load_state_dict(deepcopy(back))
    resumed = PagedAdamW([Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], device_budget=2048)
    resumed.load_state_dict(back)
    for o in (reference, resumed):
        assert o.param_groups[0]["lr"] == 0.01
        for p, q in zip(o.param_groups[0]["params"], optimizer.param_groups[0]["params"]): p.grad = q.grad
        o.step()
    optimizer.step()
    for p, q, r in zip(*(o.param_groups[0]["params"] for o in (optimizer, reference, resumed))): assert same_bits(p.detach(), q.detach()) and same_bits(p.detach(), r.detach())


@pytest.mark.parametrize("device", devices())
def test_a_used_optimizer_takes_a_state(device, monkeypatch):
    "Nothing is left of what it had, not even of parameters that the state leaves out, or of pages that are on their way home."
    if device == "cuda": hold_up(monkeypatch, "out")
    def trained(make, steps, some):
        params = [Parameter(numbers((9 * BLOCK - 7,), n).to(device)) for n in range(2)]
        optimizer = make(params)
        for t in range(steps):
            for n, p in enumerate(params): p.grad = numbers(p.shape, t, n).to(device) if n in some else None
            optimizer.step()
        return params, optimizer
    expected, reference = trained(AdamW, 3, {0})
    saved = deepcopy(reference.state_dict())
    saved["state"] = {i: {k: v.cpu() for k, v in s.items()} for i, s in saved["state"].items()}  # a copy from the GPU would wait for it
    params, optimizer = trained(lambda p: PagedAdamW(p, lr=0.1, device_budget=5 * 2048, page_bytes=2048), 4, {0, 1})
    optimizer.load_state_dict(saved)
    for p, q in zip(params, expected): p.data.copy_(q.data)
    for t in range(3):
        for n, (p, q) in enumerate(zip(params, expected)): p.grad = q.grad = numbers(p.shape, 9, t, n).to(device)
        optimizer.step()
        reference.step()
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, expected))


def test_saving_in_the_middle_changes_nothing():
    "A state dict taken after any step: complete, and the run goes on with the same bits and no page lost."
    optimizers = [idle([3000], device_budget=3 * 2048, page_bytes=2048) for _ in range(2)]
    for t in range(5):
        for o in optimizers: o.step()
        saved = [m.clone() for m in moments(optimizers[0])]
    assert all(map(same_bits, saved, moments(optimizers[1])))
    assert same_bits(*(o.param_groups[0]["params"][0].detach() for o in optimizers))


# ---------------------------------------------------------------- on a GPU

@needs_gpu
@pytest.mark.parametrize("budget", [2048, 5000, 20_000, 10 ** 6])
def test_gpu_results_are_torchs(budget):
    "Float32 parameters against torch's AdamW on the same GPU; others against the unpaged twin; the state is pinned on the host."
    case = {"shapes": [(300, 41), (16, 256), (1,), (128,), (5, 777)], "second": {1, 3}, "missing": {(1, 0), (2, 3)}, "steps": 6, "schedule": True, "resume": 3, "bits": 32,
            "page_bytes": 2048, "device_budget": budget}
    got, optimizer = train(case, as_made(case), as_made(case, page_bytes=4096, device_budget=12_000), device="cuda")
    assert all(map(same_bits, got, train(case, AdamW, device="cuda")[0]))
    assert optimizer.pager.host["exp_avg"].is_pinned() and optimizer.pager.frames["exp_avg"].is_cuda and optimizer.device_bytes <= 12_000
    for bits, dtype in ((8, torch.float32), (32, torch.bfloat16), (8, torch.bfloat16), (32, torch.float16)):
        twins = [train(case, as_made(case, bits=bits, device_budget=b), dtype=dtype, device="cuda")[0] for b in (budget, None)]
        assert all(map(same_bits, *twins))


def hold_up(monkeypatch, late):
    "Milliseconds of idling before every copy in, every copy out, or every computation."
    def sleep(): torch.cuda._sleep(10_000_000)
    lane, update = module._Lanes.lane, PagedAdamW._update
    class Held:
        def __init__(self, inner): self.inner = inner
        def __enter__(self): self.inner.__enter__(); sleep()
        def __exit__(self, *a): return self.inner.__exit__(*a)
    monkeypatch.setattr(module._Lanes, "lane", lambda self, name, *after: Held(lane(self, name, *after)) if name == late else lane(self, name, *after))
    if late == "compute": monkeypatch.setattr(PagedAdamW, "_update", lambda self, page, items: (sleep(), update(self, page, items))[1])


@needs_gpu
@pytest.mark.parametrize("late", ["in", "out", "compute", "nothing"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_gpu_waits(frames, late, monkeypatch):
    "Copies in, copies out or the computation are held up by milliseconds: a wait that is missing would show in the bits."
    hold_up(monkeypatch, late)
    case = {"shapes": [(9 * BLOCK - 50,)], "second": set(), "missing": set(), "steps": 5, "schedule": False, "resume": 3, "bits": 32, "page_bytes": 2048, "device_budget": 2048 * frames}
    got, optimizer = train(case, as_made(case), as_made(case), device="cuda")
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
    "The allocator hands over memory on which the computing stream still has work queued; the copy streams must not be quicker."
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
@pytest.mark.parametrize("late", [False, True])
def test_gpu_that_is_not_the_current_one(late, monkeypatch):
    "Streams and events are those of the parameters' device."
    update = PagedAdamW._update
    def slow(self, page, items):
        with torch.cuda.device(1): torch.cuda._sleep(10_000_000)
        update(self, page, items)
    if late: monkeypatch.setattr(PagedAdamW, "_update", slow)
    case = {"shapes": [(9 * BLOCK - 50,)], "second": set(), "missing": set(), "steps": 5, "schedule": False, "resume": 3, "bits": 32, "page_bytes": 2048, "device_budget": 4096}
    assert all(map(same_bits, train(case, as_made(case), as_made(case), device="cuda:1")[0], train(case, AdamW, device="cuda:1")[0]))
