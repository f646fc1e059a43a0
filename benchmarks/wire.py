"""What travels between cards and what a card holds: counted in a real step, and timed."""
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
from torch.profiler import ProfilerActivity, profile, record_function

from qlora_lab.engine.gathered import bytes_held
from qlora_lab.lora import trainable
from qlora_lab.processes import sum_gradients, world
from qlora_lab.scale import Wire
from qlora_lab.train import summed_loss

SIZES = [1 << n for n in range(20, 31, 2)]  # bytes that a card has after a collective


class Received(Wire):
    "Bytes that collectives bring to this process, by kind."
    KINDS = {"allgather": "gathers", "allreduce": "sums"}

    @property
    def bytes(self): return {kind: sum(n for k, n in self.events if k == kind) for kind in self.KINDS.values()}


def held(model):
    "What this process holds of a model by component, as a plan counts it: tables of positions aside."
    found = bytes_held(model).sum(axis=1).drop("tables and buffers", errors="ignore")
    return {name: int(size) for name, size in found.items()}


def passes(model, batches):
    "Forward and backward passes, then the sum of all gradients."
    for batch in batches: summed_loss(model, batch).backward()
    sum_gradients(trainable(model))


class LendsCopies(AllGather):
    "Gathers by way of copies: gloo's threads hold on for a while to what they are given, and let go unseen."
    def allocate(self, size, *, dtype, device): return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        with record_function("for gloo"):
            whole, part = torch.empty_like(output_tensor), input_tensor.clone()
            dist.all_gather_into_tensor(whole, part, group=group)
            output_tensor.copy_(whole)


def lend_copies(model):
    "Have every group of a sharded model gather so."
    for m in model.modules():
        if isinstance(m, FSDPModule): m.set_custom_all_gather(LendsCopies())


def _allocations(events, inside=False):
    "(time, address, bytes, thread; 0 within a collective) of what tensors took and gave back, from a tree of events."
    for e in events:
        gloo, what = inside or "c10d" in e.name or "gloo" in e.name, e.extra_fields
        if e.tag == _EventType.Allocation: yield e.start_time_ns, what.ptr, what.alloc_size, 0 if gloo else e.start_tid
        yield from _allocations(e.children, gloo)


def risen(work):
    "The most bytes that tensors on the CPU took beside what was there; the copies that gloo makes aside."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with record_function("this thread"): work()
    events = seen.profiler.kineto_results.experimental_event_tree()
    here = next(e.start_tid for e in events if e.name == "this thread")
    live, now, most = {}, 0, 0  # a place that is given twice was let go by a thread that nobody watched
    for _, place, size, thread in sorted(_allocations(events)):
        now -= live.pop(place, 0)
        if size > 0 and thread == here: live[place] = size
        now += live.get(place, 0)
        most = max(most, now)
    return most


def timed(work, rounds=7):
    "Seconds of a call that all processes make, the median; two calls are not counted."
    wait, seconds = torch.cuda.synchronize if torch.cuda.is_available() else int, []
    for n in range(rounds + 2):
        wait()
        if world() > 1: dist.barrier()
        start = time.perf_counter()
        work()
        wait()
        if n >= 2: seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def memory() -> dict:
    "Of this card, GiB."
    if not torch.cuda.is_available(): return {}
    free, total = torch.cuda.mem_get_info()
    return {"measured_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2 ** 30,
            "outside_gib": (total - free - torch.cuda.memory_reserved()) / 2 ** 30}


def bandwidths(tiny=False):
    "GB a second that a card receives, for two collectives and growing sizes; a ring's bytes, as nccl-tests counts."
    rows, cards, device = [], world(), "cpu" if tiny else "cuda"
    for size in SIZES[:2] if tiny else SIZES:
        whole = torch.zeros(size // 4, device=device)
        part = torch.zeros(size // 4 // cards, device=device)
        both = {"all_gather": (dist.all_gather_into_tensor, (whole[:cards * part.numel()], part), 1),
                "all_reduce": (dist.all_reduce, (whole,), 2)}
        for what, (call, tensors, factor) in both.items():
            seconds = timed(partial(call, *tensors))
            received = factor * tensors[0].nbytes * (cards - 1) / cards
            rows.append({"cards": cards, "what": what, "bytes": size, "s": seconds, "gbs": received / seconds / 1e9})
    return rows
