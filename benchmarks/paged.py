"""Paged optimizer state on a GPU: equal bits, the spike, what bitsandbytes does, and what paging costs.

    python -m benchmarks.paged

Writes results/paged_cuda.json, which lesson 04 and its engine pages show. No managed memory beyond what the card has
free is ever asked for: memory pressure is a cap on plain allocations.
"""
import gc
import hashlib
import statistics
import time
from functools import partial

import torch
from torch import nn

from benchmarks.common import interleaved, random_batch, random_model, save_result, spread_of
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.engine.state_formats import state_bytes
from qlora_lab.lora import trainable
from qlora_lab.train import train_step

SHAPES = [(64, 4096), (11008, 64), (64, 11008), (37, 91), (5,), (256,), (1000, 333)]


def parameters(shapes, dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [nn.Parameter(torch.randn(s, device="cuda", generator=generator).to(dtype)) for s in shapes]


def steps(optimizer, params, count: int, seed: int = 1) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(count):
        for p in params: p.grad = torch.randn(p.shape, device="cuda", generator=generator).to(p.dtype)
        optimizer.step()


CASES = [  # type of the parameters, bits of the state, budget, bytes a page
    (torch.float32, 32, None, None), (torch.float32, 32, 8 << 20, None), (torch.float32, 32, 1 << 20, 1 << 16),
    (torch.float32, 32, 1 << 16, 1 << 16), (torch.bfloat16, 32, 1 << 20, 1 << 16), (torch.float32, 8, 1 << 18, 1 << 15),
    (torch.bfloat16, 8, 1 << 18, 1 << 15)]


def equal() -> list[dict]:
    "The same gradients by the paged optimizer and by one that is not."
    rows, total = [], sum(int(torch.tensor(s).prod()) for s in SHAPES)
    numbers = {"lr": 1e-2, "weight_decay": 0.1}
    for dtype, bits, budget, page in CASES:
        ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
        torch_too = bits == 32 and dtype == torch.float32
        paged = PagedAdamW(ours, **numbers, bits=bits, device_budget=budget, page_bytes=page)
        other = torch.optim.AdamW(theirs, **numbers) if torch_too else PagedAdamW(theirs, **numbers, bits=bits)
        steps(paged, ours, 5)
        steps(other, theirs, 5)
        again = parameters(SHAPES, dtype)
        for p, q in zip(again, ours): p.data.copy_(q)
        resumed = PagedAdamW(again, **numbers, bits=bits, device_budget=budget, page_bytes=page)
        resumed.load_state_dict(paged.state_dict())
        for optimizer, params in ((paged, ours), (other, theirs), (resumed, again)): steps(optimizer, params, 3, seed=2)
        rows.append({"bits": bits, "dtype": str(dtype)[6:], "parameters": total, "budget": budget,
                     "page_bytes": paged.page_bytes, "steps": 8,
                     "equal_to": "torch.optim.AdamW" if torch_too else "unpaged",
                     "equal": all(torch.equal(a, b) for a, b in zip(ours, theirs)),
                     "equal_resumed": all(torch.equal(a, b) for a, b in zip(ours, again))})
        print(rows[-1], flush=True)
    return rows


def digest(params) -> str:
    h = hashlib.sha256()
    for p in params: h.update(p.detach().cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def train(make, sequences: tuple, cap_gib: float | None) -> dict:
    "Steps on sequences of these lengths, perhaps with the device's memory capped."
    settings = Settings(rank=64, checkpointing=False)
    gc.collect()
    torch.cuda.empty_cache()
    model = random_model(model_config("smollm2-1.7b"), settings)
    optimizer = make(trainable(model))
    torch.cuda.reset_peak_memory_stats()
    whole = torch.cuda.mem_get_info()[1]
    if cap_gib: torch.cuda.set_per_process_memory_fraction(cap_gib * 2 ** 30 / whole)
    losses, peaks = [], []
    try:
        for sequence in sequences:
            torch.cuda.reset_peak_memory_stats()
            losses.append(train_step(model, optimizer, [random_batch(1, sequence)], 1e-4, 0.3)[0])
            peaks.append(torch.cuda.max_memory_allocated() / 2 ** 30)
            torch.cuda.empty_cache()
        return {"outcome": "finished", "losses": losses, "peak_gib": max(peaks), "peaks_gib": peaks,
                "sha256": digest(trainable(model))}
    except torch.OutOfMemoryError:
        return {"outcome": "out of memory", "at_step": len(losses) + 1, "losses": losses, "peaks_gib": peaks}
    finally: torch.cuda.set_per_process_memory_fraction(1.)


MODEL = "the shape of SmolLM2-1.7B, random weights in NF4, rank 64 on all linear layers, adapters in float32"


def ordinary(params): return torch.optim.AdamW(params, lr=1e-4)


def spike() -> dict:
    "One long sequence among short ones: the cap lies between what the paged and the ordinary optimizer need."
    sequences, budget, torchs = (512, 512, 4096), 16 << 20, {"optimizer": "torch.optim.AdamW"}
    def paged(params): return PagedAdamW(params, lr=1e-4, device_budget=budget)
    torch.use_deterministic_algorithms(True)
    try:
        free, small = train(ordinary, sequences, None), train(paged, sequences, None)
        cap = (free["peak_gib"] + small["peak_gib"]) / 2
        runs = [torchs | {"capped": False} | free, torchs | {"capped": True} | train(ordinary, sequences, cap),
                {"optimizer": "PagedAdamW", "device_budget_mib": budget >> 20, "capped": True}
                | train(paged, sequences, cap)]
    finally: torch.use_deterministic_algorithms(False)
    for r in runs: print(r, flush=True)
    return {"model": MODEL, "sequences": list(sequences), "cap_gib": cap, "runs": runs}


def bitsandbytes_facts() -> dict:
    "Which states bitsandbytes pages, who counts them, and what it asks of CUDA in a step."
    import bitsandbytes as bnb
    from torch.profiler import ProfilerActivity, profile

    threshold = []
    for n in (99_999, 100_000, 50_000_000):
        gc.collect()
        torch.cuda.synchronize()
        p = nn.Parameter(torch.zeros(n, device="cuda"))
        p.grad = torch.ones_like(p)
        free, counted = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        optimizer = bnb.optim.PagedAdamW32bit([p], lr=1e-3)
        optimizer.step()
        torch.cuda.synchronize()
        state = optimizer.state[p]["state1"]
        threshold.append({"elements": n, "paged": bool(getattr(state, "is_paged", False)), "device": str(state.device),
                          "torch_bytes": torch.cuda.memory_allocated() - counted,
                          "card_bytes": free - torch.cuda.mem_get_info()[0], "state_bytes": 8 * n})
        print(threshold[-1], flush=True)
        del optimizer, p, state
    params = parameters([(64, 4096)] * 6 + [(16, 4096)] * 4)
    optimizer = bnb.optim.PagedAdamW32bit(params, lr=1e-3)
    steps(optimizer, params, 2)
    for p in params: p.grad = torch.randn_like(p)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        optimizer.step()
        torch.cuda.synchronize()
    calls = {e.key: e.count for e in seen.key_averages() if e.key.startswith("cu")}
    print(calls, flush=True)
    counts = {"parameters": len(params), "paged_parameters": sum(p.numel() >= 1e5 for p in params)}
    return {"threshold": threshold, "calls_a_step": counts | calls}


def bus(size: int = 1 << 28) -> dict:
    "Bytes a second between pinned host memory and the device, one way and both ways at once."
    host, host2 = (torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    device, device2 = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    def both():
        for stream, (to, of) in zip(streams, ((device, host), (host2, device2))):
            with torch.cuda.stream(stream): to.copy_(of, non_blocking=True)
    def rate(work, moved):
        seconds = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return moved / statistics.median(seconds[2:]) / 1e9
    return {"to_device_gbs": rate(lambda: device.copy_(host, non_blocking=True), size),
            "to_host_gbs": rate(lambda: host2.copy_(device2, non_blocking=True), size),
            "both_gbs": rate(both, 2 * size)}


def sides() -> dict:
    "Name to what makes the optimizer, its budget, and the bits of its state."
    import bitsandbytes as bnb
    made = {"torch.optim.AdamW": (ordinary, None, 32),
            "bitsandbytes AdamW32bit": (partial(bnb.optim.AdamW32bit, lr=1e-4), None, 32),
            "bitsandbytes PagedAdamW32bit": (partial(bnb.optim.PagedAdamW32bit, lr=1e-4), None, 32),
            "lab PagedAdamW, unpaged": (partial(PagedAdamW, lr=1e-4), None, 32)}
    for mib in (64, 256, 1024, 4096):
        made[f"lab PagedAdamW, {mib} MiB"] = partial(PagedAdamW, lr=1e-4, device_budget=mib << 20), mib << 20, 32
    eight = partial(PagedAdamW, lr=1e-4, bits=8, device_budget=256 << 20)
    return made | {"lab PagedAdamW, 8 bits, 256 MiB": (eight, 256 << 20, 8)}


def moved(optimizer) -> tuple[int, int]:
    "Bytes in and out so far."
    pager = getattr(optimizer, "pager", None)
    return (pager.mover.bytes_in, pager.mover.bytes_out) if pager else (0, 0)


def cost(rates: dict) -> list[dict]:
    "An update of the adapters of a 65B model, rank 64 on all linear layers in bfloat16: 800 million parameters."
    h, f, layers = 8192, 22016, 80
    widths = ((h, h),) * 4 + ((h, f),) * 2 + ((f, h),)
    shapes = [s for _ in range(layers) for i, o in widths for s in ((64, i), (o, 64))]
    rows = []
    for name, (make, budget, bits) in sides().items():
        gc.collect()
        torch.cuda.empty_cache()
        params = parameters(shapes, torch.bfloat16)
        for p in params: p.grad = torch.randn_like(p)
        optimizer = make(params)
        for _ in range(2): optimizer.step()
        before, count = moved(optimizer), sum(p.numel() for p in params)
        def call(optimizer=optimizer):
            optimizer.step()
            torch.cuda.synchronize()
        seconds = interleaved({name: call}, rounds=6, warmup=0)[name]
        came, left = ((now - then) / 6 for now, then in zip(moved(optimizer), before))
        floor = max(came / rates["to_device_gbs"], left / rates["to_host_gbs"], (came + left) / rates["both_gbs"]) / 1e6
        rows.append({"optimizer": name, "parameters": count, "state_bytes": state_bytes(count, bits), "budget": budget,
                     "bits": bits, "bytes_in": came, "bytes_out": left, "floor_ms": floor,
                     "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30, **spread_of(seconds)})
        torch.cuda.reset_peak_memory_stats()
        print(rows[-1], flush=True)
        del optimizer, params, call
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; its recorded run is in benchmarks/results/paged_cuda.json")
    result = {"equal": equal()}
    result["bus"] = bus()
    for part in (spike, bitsandbytes_facts): result[part.__name__.partition("_")[0]] = part()
    result["cost"] = cost(result["bus"])
    print(save_result("paged_cuda", result))


if __name__ == "__main__": main()
