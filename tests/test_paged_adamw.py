"""`qlora_lab.PagedAdamW` is torch's AdamW to the bit, whatever lies where and whenever it is saved.

Protects: the update itself in both formats of the state, the bytes that are moved and those that stay on the device,
what is refused, and what is saved and taken up elsewhere.
"""
import json
from copy import deepcopy

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from paged_cases import AdamW, as_made, case_of, cases, idle, moments, numbers, quick, same_bits, train
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_lab
from conftest import devices, searched
from qlora_lab.blockwise import dequantize_blockwise, quantize_blockwise
from qlora_lab.double_quant import DYNAMIC8
from qlora_lab.engine import paged_adamw as module
from qlora_lab.engine.copy_lanes import LaneMover
from qlora_lab.engine.dispatch import faster, use_kernels
from qlora_lab.engine.host_memory import HostMemory
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.state_formats import BLOCK, UDYNAMIC8, state_bytes
from qlora_lab.paged import Mover, Pager
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- results

@quick
@given(case=cases())
def test_results_are_torchs(case):
    "Parameters after every step and the state at the end, bit for bit, whatever the budget."
    expected, reference = train(case, AdamW)
    got, optimizer = train(case, as_made(case))
    assert all(map(same_bits, got, expected))
    names, saved, theirs = ("step", "exp_avg", "exp_avg_sq"), *(o.state_dict()["state"] for o in (optimizer, reference))
    stepped = [s[k] for s in saved.values() if s["step"] > 0 for k in names]
    expected = [theirs[i][k] for i in sorted(theirs) for k in names]
    assert len(stepped) == len(expected) and all(map(same_bits, stepped, expected))
    assert optimizer.device_bytes <= case["device_budget"]


@quick
@given(case=cases(), order=st.sampled_from(["paged to paged", "paged to torch", "torch to paged", "paged to unpaged"]))
def test_resumed_anywhere(case, order):
    """Saved after any step, and taken up elsewhere: the bits of an uninterrupted run.

    Elsewhere is a paged optimizer of another page and budget, torch's, or one without a budget.
    """
    make = {"paged": as_made(case), "torch": AdamW, "unpaged": as_made(case, device_budget=None)}
    first, then = order.split(" to ")
    other = as_made(case, page_bytes=case["page_after"], device_budget=2 * case["page_after"])
    after = other if then == first else make[then]
    assert all(map(same_bits, train(case, make[first], after)[0], train(case, AdamW)[0]))


TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@quick
@given(case=cases(bits=(8, 32)), dtype=TYPES, resume=st.booleans())
def test_paged_is_unpaged(case, dtype, resume):
    """In 8 bits, and for 16-bit parameters, the twin is the same optimizer without a budget.

    Its state is float32 where torch's would be 16-bit.
    """
    then = as_made(case, page_bytes=case["page_after"], device_budget=2 * case["page_after"]) if resume else None
    got, optimizer = train(case, as_made(case), then, dtype)
    expected, unpaged = train(case, as_made(case, device_budget=None), dtype=dtype)
    assert unpaged.pager is None and all(map(same_bits, got, expected))
    states = (o.state_dict()["state"].values() for o in (optimizer, unpaged))
    types = {torch.float32} if case["bits"] == 32 else {torch.float32, torch.uint8}
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
        assert {t.dtype for t in a.values()} == types


@searched(30, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(bits=(8,)))
def test_8_bit_state_is_rounded_after_each_step(case):
    "The oracle: torch's AdamW, whose moments are put through the codes, block by block, after each step."
    codes = {"exp_avg": DYNAMIC8, "exp_avg_sq": UDYNAMIC8}
    def rounded(x, code): return dequantize_blockwise(*quantize_blockwise(x, code, BLOCK), code, BLOCK).view(x.shape)
    class Rounded(AdamW):
        def step(self):
            super().step()
            for p, s in self.state.items():
                if p.grad is not None: s.update({k: rounded(s[k], code) for k, code in codes.items()})
    assert all(map(same_bits, train(case, as_made(case))[0], train(case, Rounded)[0]))


class Wide(torch.optim.Optimizer):
    "torch's AdamW on float32 copies, rounded to the parameters' type after each step."
    def __init__(self, groups):
        super().__init__(groups, {})
        self.wide = AdamW([g | {"params": [Parameter(p.detach().float()) for p in g["params"]]} for g in groups])

    def pairs(self):
        groups = zip(self.param_groups, self.wide.param_groups)
        return [(p, w) for own, g in groups for p, w in zip(own["params"], g["params"])]

    def step(self):
        for p, w in self.pairs(): w.data, w.grad = p.detach().float(), None if p.grad is None else p.grad.float()
        self.wide.step()
        for p, w in self.pairs(): p.data.copy_(w.data)


@quick
@given(case=cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_16_bit_parameters_are_updated_in_float32(case, dtype):
    case = case | {"schedule": False}
    assert all(map(same_bits, train(case, as_made(case), dtype=dtype)[0], train(case, Wide, dtype=dtype)[0]))


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
    "Large parameters are shared out among threads, and pages cut elsewhere than threads do; bits are torch's with one."
    case = case_of([(200_003,), (301, 333)], second={1}, steps=3, page_bytes=300_000, device_budget=10 ** 6)
    expected = train(case, AdamW)[0]
    torch.set_num_threads(threads)
    try: assert all(map(same_bits, train(case, as_made(case))[0], expected))
    finally: torch.set_num_threads(1)


def test_an_optimizer_like_any_other():
    """A closure is called with gradients on and its loss returned, and hooks are called.

    Gradients of zero, or that lie in columns, are taken.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(40, 30) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x, called = torch.randn(8, 40), []
    optimizers = [AdamW(layers[0].parameters()), PagedAdamW(layers[1].parameters(), device_budget=2048)]
    optimizers[1].register_step_post_hook(lambda *a: called.append(1))
    def closure(layer, optimizer):
        optimizer.zero_grad()
        loss = (x @ layer.weight.t()).square().mean() + 0 * layer.bias.sum()
        loss.backward()
        layer.weight.grad = layer.weight.grad.t().contiguous().t()  # the same numbers in columns
        return loss
    for pair in zip(layers, optimizers):
        losses = [pair[1].step(lambda pair=pair: closure(*pair)).item() for _ in range(3)]
        assert losses[0] > losses[-1]
    assert len(called) == 3 and all(map(same_bits, layers[0].state_dict().values(), layers[1].state_dict().values()))


@pytest.mark.parametrize("device", devices())
def test_who_answers(device):
    "The public name is this class; `train`'s optimizer and the lanes answer whether kernels are switched on or not."
    assert qlora_lab.PagedAdamW is PagedAdamW
    for on in (False, True):
        use_kernels(on)
        p = Parameter(torch.zeros(1000, device=device))
        optimizer = faster("optimizer", p.device, [p], 0.1, 0.2, 8, 600)
        group = optimizer.param_groups[0]
        assert type(optimizer) is PagedAdamW and (optimizer.bits, group["lr"], group["weight_decay"]) == (8, 0.1, 0.2)
        assert type(optimizer.pager.mover) is (LaneMover if device == "cuda" else Mover)


# ---------------------------------------------------------------- bytes

class Copies(TorchDispatchMode):
    "Counts what is really copied between two sets of memory."
    def __init__(self, mover):
        super().__init__()
        places = ({t.untyped_storage().data_ptr() for t in a.values()} for a in (mover.host, mover.frames))
        self.host, self.device = places
        self.bytes_in = self.bytes_out = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.copy_.default:
            to, of = (t.untyped_storage().data_ptr() for t in args[:2])
            self.bytes_in += args[0].nbytes * (to in self.device and of in self.host)
            self.bytes_out += args[0].nbytes * (to in self.host and of in self.device)
        return op(*args, **(kwargs or {}))


@searched(30, suppress_health_check=[HealthCheck.too_slow])
@given(pages=st.integers(2, 9), frames=st.integers(1, 8), steps=st.integers(1, 3), bits=st.sampled_from([8, 32]),
       spare=st.integers(0, 500))
def test_bytes_are_the_arithmetics(pages, frames, steps, bits, spare):
    """N - F pages in and out a step, none in during the first, and F more out when the state is saved.

    By the mover's own counts, and by what was really copied.
    """
    frames, page = min(frames, pages - 1), state_bytes(2 * BLOCK, bits)
    budget = frames * page + spare
    optimizer = idle([pages * 2 * BLOCK - 100], bits=bits, page_bytes=page, device_budget=budget)
    mover = optimizer.pager.mover
    assert len(optimizer.pages) == pages and optimizer.device_bytes == frames * page
    assert sum(t.untyped_storage().nbytes() for t in mover.frames.values()) == frames * page <= budget
    with Copies(mover) as copies:
        for _ in range(steps): optimizer.step()
        assert copies.bytes_in == mover.bytes_in == (steps - 1) * (pages - frames) * page
        assert copies.bytes_out == mover.bytes_out == steps * (pages - frames) * page
        optimizer.state_dict()
        optimizer.state_dict()
        assert copies.bytes_out == mover.bytes_out == (steps * (pages - frames) + frames) * page


def test_pages_are_visited_there_and_back_and_fetched_ahead(monkeypatch):
    "The next page is asked for before the present one is worked on, and the page in work stays."
    log, optimizer = [], idle([5 * BLOCK], page_bytes=2048, device_budget=2 * 2048)
    fetch, update = Pager.fetch, PagedAdamW._update
    def fetched(self, page, keep=()):
        log.append(("fetch", page, *keep))
        fetch(self, page, keep)
    def updated(self, page, items):
        log.append(("update", page))
        update(self, page, items)
    monkeypatch.setattr(Pager, "fetch", fetched)
    monkeypatch.setattr(PagedAdamW, "_update", updated)
    optimizer.step()
    assert log == [("fetch", 0), ("fetch", 1, 0), ("update", 0), ("fetch", 2, 1), ("update", 1), ("fetch", 3, 2),
                   ("update", 2), ("fetch", 4, 3), ("update", 3), ("update", 4)]
    log.clear()
    optimizer.step()
    assert [entry[1] for entry in log if entry[0] == "update"] == [4, 3, 2, 1, 0]


def test_pages_without_gradients_stay_where_they_are():
    optimizer = idle([2 * BLOCK] * 4, page_bytes=4096, device_budget=4096)
    params, pager = optimizer.param_groups[0]["params"], optimizer.pager
    for p in params[1:]: p.grad = None
    for _ in range(3): optimizer.step()
    assert pager.mover.bytes_in == pager.mover.bytes_out == 0 and pager.table.faults == 1
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert same_bits(before, params[0].detach()) and pager.table.faults == 1
    assert [int(s["step"]) for s in optimizer.state_dict()["state"].values()] == [3, 0, 0, 0]


def test_a_budget_for_everything_is_no_paging():
    whole = idle([1000]).device_bytes
    assert idle([1000], device_budget=whole).pager is None
    assert idle([1000], device_budget=whole - 1, page_bytes=2048).pager is not None
    assert idle([1000], bits=8).device_bytes < whole / 3.9


# ---------------------------------------------------------------- refusals

def params(n=1000, **how): return [Parameter(torch.empty(n, **how))]


REFUSED = [
    ("smaller than one page of 2,048", params(), {"device_budget": 2047}),
    ("smaller than one page of 4,096", params(), {"device_budget": 4000, "page_bytes": 4096}),
    ("of free host memory; leave it out", params(), {"device_budget": 10 ** 15}),
    ("smaller than one page", params(), {"device_budget": 0}),
    ("expected 32 or 8", params(), {"bits": 4}),
    ("expected at least 2048", params(), {"page_bytes": 100}),
    ("expected at least 520", params(), {"page_bytes": 100, "bits": 8}),
    ("cpu and meta: use one PagedAdamW for each", [*params(), *params(device="meta")], {}),
    ("no device", [{"params": []}], {}),
    ("expected contiguous float32", params(dtype=torch.float64), {}),
    ("expected contiguous", [Parameter(torch.empty(4, 5).t())], {}),
    ("lr=-1", params(), {"lr": -1}),
    ("betas below 1", params(), {"betas": (0.9, 1.)}),
    ("weight_decay=-0.1", params(), {"weight_decay": -0.1}),
]


@pytest.mark.parametrize(("message", "given_params", "how"), REFUSED, ids=[f"{m} {h}" for m, _, h in REFUSED])
def test_arguments_are_checked_before_anything_is_allocated(message, given_params, how, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(LabError) as e: PagedAdamW(given_params, **how)
    assert message in str(e.value)


def test_a_state_larger_than_the_hosts_memory_is_refused(monkeypatch):
    monkeypatch.setattr(module, "host_memory", lambda: HostMemory(100_000, 50_000))
    needs = "the state takes 69,632 bytes of host memory and 50,000 are free"
    with pytest.raises(LabError, match=needs): idle([8192], device_budget=4096, page_bytes=2048)
    assert idle([5000], device_budget=42_000).pager is None  # all of it stays on the device, once
    with pytest.raises(LabError, match="more than the 50,000"): idle([5000], device_budget=50_001)


def test_no_parameters_later():
    optimizer = idle([1000])
    with pytest.raises(LabError, match="give it all parameters at the start"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3))]})
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
    parted["param_groups"] = [parted["param_groups"][0] | {"params": [i]} for i in (0, 1)]
    return {"8 bits": of(PagedAdamW, bits=8), "fewer": of(AdamW, [(700,)]),
            "other shapes": of(AdamW, [(700,), (60, 5)]), "swapped": of(AdamW, [(5, 60), (700,)]),
            "amsgrad": of(AdamW, amsgrad=True), "maximize": of(AdamW, maximize=True),
            "cut": cut, "groups": parted, "SGD": of(torch.optim.SGD, momentum=0.9),
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

def copies_of(optimizer): return [Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize("budget", [None, 4096])
def test_the_state_dict_is_a_plain_one(budget):
    "torch.optim.AdamW's names and shapes, through safetensors and JSON and back, and torch's AdamW goes on with it."
    optimizer = idle([700, 300], device_budget=budget, page_bytes=2048, lr=0.01)
    for _ in range(3): optimizer.step()
    saved, reference = optimizer.state_dict(), AdamW(copies_of(optimizer))
    assert saved.keys() == reference.state_dict().keys()
    assert all(t.device.type == "cpu" for s in saved["state"].values() for t in s.values())
    flat = {f"{i}.{k}": t for i, s in saved["state"].items() for k, t in s.items()}
    flat, groups = safetensors.torch.load(safetensors.torch.save(flat)), json.loads(json.dumps(saved["param_groups"]))
    state = {i: {k: flat[f"{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")} for i in (0, 1)}
    reference.load_state_dict(deepcopy({"state": state, "param_groups": groups}))
    resumed = PagedAdamW(copies_of(optimizer), device_budget=2048)
    resumed.load_state_dict({"state": state, "param_groups": groups})
    for o in (reference, resumed):
        assert o.param_groups[0]["lr"] == 0.01
        for p, q in zip(o.param_groups[0]["params"], optimizer.param_groups[0]["params"]): p.grad = q.grad
        o.step()
    optimizer.step()
    for p, *others in zip(*(o.param_groups[0]["params"] for o in (optimizer, reference, resumed))):
        assert all(same_bits(p.detach(), q.detach()) for q in others)


def test_saving_in_the_middle_changes_nothing():
    "A state dict taken after any step: complete, and the run goes on with the same bits and no page lost."
    optimizers = [idle([3000], device_budget=3 * 2048, page_bytes=2048) for _ in range(2)]
    for _ in range(5):
        for o in optimizers: o.step()
        saved = [m.clone() for m in moments(optimizers[0])]
    assert all(map(same_bits, saved, moments(optimizers[1])))
    assert same_bits(*(o.param_groups[0]["params"][0].detach() for o in optimizers))
