"What the tests of the paged optimizers share: numbers, bits, and training runs of every kind."
from copy import deepcopy

import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from torch.nn import Parameter

from conftest import searched
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.state_formats import BLOCK, state_bytes

quick = searched(50, suppress_health_check=[HealthCheck.too_slow])
AdamW = torch.optim.AdamW
SIZES = st.one_of(st.sampled_from([(1,), (255,), (256,), (257,), (512,), (16, 33), (5, 1, 7), (3, 300), ()]),
                  st.integers(1, 900).map(lambda n: (n,)))


def numbers(shape, *seed): return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seed) & 0xFFFFFF))


def same_bits(a, b):
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(whole), b.view(whole))


def case_of(shapes, **other):
    "A plain case: one group, no gradient missing, 32 bits."
    plain = {"second": set(), "missing": set(), "steps": 5, "schedule": False, "resume": 3}
    return {"shapes": shapes, "bits": 32, "page_bytes": 2048} | plain | other


@st.composite
def cases(draw, bits=(32,)):
    "Two groups, a budget, missing gradients, a schedule, and a step after which all is taken up elsewhere."
    shapes, bits = draw(st.lists(SIZES, min_size=1, max_size=5)), draw(st.sampled_from(bits))
    page = draw(st.integers(state_bytes(BLOCK, bits), 3 * state_bytes(BLOCK, bits)))
    steps, some = draw(st.integers(2, 5)), st.integers(0, 4)
    return {"shapes": shapes, "bits": bits, "page_bytes": page, "steps": steps,
            "device_budget": draw(st.integers(page, 12 * page)), "second": draw(st.sets(some)),
            "missing": draw(st.sets(st.tuples(some, some))), "schedule": draw(st.booleans()),
            "resume": draw(st.integers(0, steps)), "page_after": draw(st.integers(2048, 5000))}


def groups_of(params, second):
    other = {"lr": 3e-2, "weight_decay": 0., "betas": (0.8, 0.99), "eps": 1e-6}
    groups = [{"params": [p for n, p in enumerate(params) if n not in second]},
              {"params": [p for n, p in enumerate(params) if n in second]} | other]
    return [g for g in groups if g["params"]]


def train(case, make, then=None, dtype=torch.float32, device="cpu"):
    """Parameters after each step, and the last optimizer.

    `then` makes the optimizer that goes on with the saved state after step `resume`.
    """
    params = [Parameter(numbers(s, n).to(device, dtype)) for n, s in enumerate(case["shapes"])]
    def ready(make):
        optimizer = make(groups_of(params, case["second"]))
        slower = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)) if case["schedule"] else None
        return optimizer, slower
    (optimizer, schedule), seen = ready(make), []
    for t in range(case["steps"]):
        if then is not None and t == case["resume"]:
            saved = deepcopy((optimizer.state_dict(), schedule and schedule.state_dict()))
            optimizer, schedule = ready(then)
            optimizer.load_state_dict(saved[0])
            if schedule: schedule.load_state_dict(saved[1])
        for n, p in enumerate(params):
            p.grad = None if (t, n) in case["missing"] else numbers(p.shape, t, n).to(device, dtype)
        optimizer.step()
        if schedule: schedule.step()
        seen += [p.detach().clone() for p in params]
    return seen, optimizer


def moments(optimizer):
    return [s[k] for s in optimizer.state_dict()["state"].values() for k in ("exp_avg", "exp_avg_sq")]


def as_made(case, **other):
    return lambda params: PagedAdamW(params, **{k: case[k] for k in ("bits", "page_bytes", "device_budget")} | other)


def idle(sizes, **how):
    "An optimizer with gradients."
    params = [Parameter(numbers((n,), n)) for n in sizes]
    for p in params: p.grad = numbers(p.shape, 1)
    return PagedAdamW(params, **how)
