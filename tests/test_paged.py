"""Lesson 04 and what its pages hold: who leaves and what is written back, where state lies, and its two formats.

Protects: the page table's bookkeeping, the order of visits, the lesson's own optimizer, the cut of parameters into
pages, the size of a page, and the codes and bytes of the 8-bit state.
"""
from functools import partial
from itertools import permutations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from paged_cases import AdamW, cases, numbers, quick, same_bits, train

from conftest import searched
from qlora_lab import paged
from qlora_lab.blockwise import dequantize_blockwise, quantize_blockwise
from qlora_lab.double_quant import DYNAMIC8, dynamic_map
from qlora_lab.engine.paged_adamw import lay_out
from qlora_lab.engine.state_formats import (
    BLOCK,
    FORMATS,
    UDYNAMIC8,
    page_parameters,
    read_moments,
    state_bytes,
    write_moments,
)
from qlora_lab.paged import PageTable

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the page table

def optimum(visits, frames):
    """Fewest faults of any policy whatever: all choices are tried.

    `visits` are distinct pages within a step, so nothing is gained by fetching early.
    """
    reached = {frozenset(): 0}
    for page in visits:
        following = {}
        for resident, faults in reached.items():
            if page in resident: stay = [resident]
            elif len(resident) == frames: stay = [resident - {p} | {page} for p in resident]
            else: stay = [resident | {page}]
            for after in stay:
                following[after] = min(following.get(after, 10 ** 9), faults + (page not in resident))
        reached = following
    return min(reached.values())


def sweep(pages, steps, back):
    return [p for s in range(steps) for p in (range(pages)[::-1] if back and s % 2 else range(pages))]


def faults(visits, frames, policy="lru"):
    table = PageTable(frames, policy)
    for page in visits: table.touch(page)
    return table.faults


class PlainTable:
    "What a page table should do, in long hand: who leaves, what is counted, and each page's version in either memory."
    def __init__(self, frames, policy):
        self.frames, self.policy, self.came, self.used, self.dirty = frames, policy, {}, {}, set()
        self.host, self.device, self.current = [0] * 8, {}, [0] * 8
        self.counts = {"hits": 0, "faults": 0, "writebacks": 0}

    def checkpoint(self, table):
        for p in list(self.dirty):
            assert table.clean(p) and not table.clean(p)
            self.host[p] = self.device[table.frame_of[p]]
            self.counts["writebacks"] += 1
        self.dirty.clear()

    def leaves(self, now, page, keep):
        "Who has to leave at this visit, if anybody."
        leaving = None
        if page in self.came: self.counts["hits"] += 1
        else:
            self.counts["faults"] += 1
            if len(self.came) == self.frames:
                by = self.came if self.policy == "fifo" else self.used
                leaving = sorted((p for p in self.came if p not in keep), key=by.get)[-1 if self.policy == "mru" else 0]
                del self.came[leaving]
            self.came[page] = now
        self.used[page] = now
        return leaving

    def written_back(self, page, frame):
        self.host[page] = self.device[frame]
        self.dirty.discard(page)
        self.counts["writebacks"] += 1


A_VISIT = st.tuples(st.integers(0, 7), st.booleans(), st.booleans(), st.integers(0, 9))
VISITS = st.lists(A_VISIT, min_size=20, max_size=60)


@searched(200, suppress_health_check=[HealthCheck.too_slow])
@given(visits=VISITS, frames=st.integers(2, 9), policy=st.sampled_from(["lru", "mru", "fifo"]))
def test_page_table_against_a_plain_model(visits, frames, policy):
    "No change is ever lost: each write makes a new version, which must be found at the next visit."
    table, plain, last = PageTable(frames, policy), PlainTable(frames, policy), None
    for now, (page, write, protect, checkpoint) in enumerate(visits):
        if checkpoint == 0: plain.checkpoint(table)
        keep = (last,) if protect and last is not None else ()
        leaves, last = plain.leaves(now, page, keep), page
        frame, out = table.touch(page, write=write, keep=keep)
        assert out == (leaves if leaves in plain.dirty else None)
        if out is not None: plain.written_back(out, frame)
        if plain.came[page] == now: plain.device[frame] = plain.host[page]
        assert plain.device[frame] == plain.current[page]
        if write:
            plain.current[page] += 1
            plain.device[frame] = plain.current[page]
            plain.dirty.add(page)
        assert set(table.frame_of) == set(plain.came) and table.dirty == plain.dirty
        assert len(set(table.frame_of.values())) == len(plain.came) <= frames
    assert plain.counts == {k: getattr(table, k) for k in plain.counts}


@pytest.mark.parametrize("pages", range(2, 7))
def test_there_and_back_cannot_be_beaten(pages):
    """N - F fetches a step after the first; one way, LRU fetches everything and the best policy is MRU.

    All policies are tried, all choices.
    """
    steps = pages + 1
    back, one_way = sweep(pages, steps, True), sweep(pages, steps, False)
    for frames in range(1, pages):
        assert faults(back, frames) == optimum(back, frames) == pages + (steps - 1) * (pages - frames)
        assert faults(one_way, frames) == pages * steps
        assert faults(one_way, frames, "mru") == optimum(one_way, frames)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_no_order_of_visits_does_better(frames):
    "All orders of four pages in three steps, each under its best policy: none gets below 4 + 2 (4 - F)."
    orders = list(permutations(range(4)))
    best = min(optimum((*orders[0], *second, *third), frames) for second in orders for third in orders)
    assert best == 4 + 2 * (4 - frames) == faults(sweep(4, 3, True), frames)


def test_page_table_refuses():
    with pytest.raises(ValueError, match="policy 'lfu'"): PageTable(2, "lfu")
    with pytest.raises(ValueError, match="at least one frame"): PageTable(0)


# ---------------------------------------------------------------- the lesson's optimizer

@quick
@given(case=cases(), frames=st.integers(1, 12))
def test_the_plain_optimizer_is_torchs(case, frames):
    "Parameters after every step, whatever the budget; and with everything on the device."
    size = case["page_bytes"] // 8 * 8
    expected = train(case, AdamW)[0]
    for budget in (frames * size, None):
        got, optimizer = train(case, partial(paged.PagedAdamW, device_budget=budget, page_bytes=size))
        assert all(map(same_bits, got, expected)) and (budget is None or optimizer.device_bytes <= budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adamw_widens_what_is_narrow(dtype):
    "Parameters of both types in one call: each is updated in float32 and rounded once."
    wide, narrow = numbers((300,), 1), numbers((200,), 2).to(dtype)
    grads = [numbers((300,), 3), numbers((200,), 4).to(dtype)]
    state = [[torch.zeros(n) for n in (300, 200)] for _ in range(2)]
    expected = [torch.nn.Parameter(t.float()) for t in (wide, narrow)]
    for p, g in zip(expected, grads): p.grad = g.float()
    AdamW(expected, lr=1e-2).step()
    paged.adamw([wide, narrow], grads, *state, [1, 1], 1e-2, (0.9, 0.999), 1e-8, 1e-2)
    assert same_bits(wide, expected[0].detach()) and same_bits(narrow, expected[1].detach().to(dtype))


# ---------------------------------------------------------------- what a page holds

@quick
@given(sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=8), blocks=st.integers(1, 5))
def test_layout(sizes, blocks):
    """Every item lies in exactly one page, at a place of its own.

    Parameters begin at multiples of 256, and groups are kept apart.
    """
    items = blocks * BLOCK
    groups = [{"params": [torch.arange(n) for n in some]} for some in (sizes[::2], sizes[1::2])]
    pages, starts = lay_out(groups, items)
    places, owners = set(), {}
    for number, piece in ((number, piece) for number, page in enumerate(pages) for piece in page):
        assert 0 <= piece.at and piece.at + piece.b - piece.a <= items and (number * items + piece.at) % BLOCK == 0
        assert any(p is piece.param for p in piece.group["params"])
        for item in range(piece.a, piece.b):
            owners[id(piece.param), item] = owners.get((id(piece.param), item), 0) + 1
            places.add((number, piece.at + item - piece.a))
    assert len(places) == len(owners) == sum(sizes) and set(owners.values()) <= {1}
    assert all(s % BLOCK == 0 for s in starts) and len(starts) == len(sizes)


@pytest.mark.parametrize("bits", [8, 32])
def test_pages_by_default(bits):
    """A quarter of the budget, 64 MiB at most; without a budget even parts of at most 8 Mi parameters.

    Never more than there are; as asked, if it is said.
    """
    block = state_bytes(BLOCK, bits)
    for budget in (block, 4 * block, 100_000, 10 ** 7, 10 ** 9, 10 ** 12):
        page = page_parameters(1 << 40, bits, budget)
        assert page % BLOCK == 0 and page // BLOCK == max(1, min(budget // 4, 64 << 20) // block)
    for parameters in (256, 8 << 20, (8 << 20) + BLOCK, 100 * 10 ** 6 // BLOCK * BLOCK):
        page = page_parameters(parameters, bits)
        count = -(-parameters // page)
        assert page % BLOCK == 0 and page <= 8 << 20 and 0 <= count * page - parameters < BLOCK * count
    assert page_parameters(1024, bits, 10 ** 9) == 1024
    assert page_parameters(10 ** 6 // BLOCK * BLOCK, bits, page_bytes=3 * block + 7) == 3 * BLOCK


def test_8_bit_moments_are_lesson_01s_codes():
    "Scaled by the reciprocal, as everywhere in the lab: two of these numbers would get another code by a division."
    n = 1 << 18
    items = {k: torch.zeros(n // per, dtype=dtype) for k, (dtype, per) in FORMATS[8].items()}
    pair = numbers((n,), 1), numbers((n,), 7).square()
    write_moments(items, 0, n, *pair)
    for i, x, code in ((1, pair[0], DYNAMIC8), (2, pair[1], UDYNAMIC8)):
        codes, absmax = quantize_blockwise(x, code, BLOCK)
        assert torch.equal(items[f"state{i}"], codes) and same_bits(items[f"absmax{i}"], absmax)
        part = dequantize_blockwise(codes[512:1100], absmax[2:5], code, BLOCK)
        assert same_bits(read_moments(items, 512, 1100, 8)[i - 1], part)


def test_codes_and_bytes_are_bitsandbytes():
    assert same_bits(dynamic_map(signed=False), bnb.create_dynamic_map(signed=False))
    assert same_bits(UDYNAMIC8, dynamic_map(signed=False)) and same_bits(DYNAMIC8, bnb.create_dynamic_map(signed=True))
    assert [state_bytes(n) for n in (1, 256, 1000)] == [8, 2048, 8000]
    assert [state_bytes(n, 8) for n in (1, 256, 257)] == [10, 520, 530]
