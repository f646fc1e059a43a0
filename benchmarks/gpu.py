"""The lab beside its peers on a GPU: decoding, quantizing, one layer, the optimizer's update, training steps.

    make bench-gpu                      # or python -m benchmarks.gpu; on an H100 about half an hour
    make bench-gpu ARGS="--only steps"  # or kernels: about six minutes both; or fast, with benchmarks.fast's options

Prints a table for each and writes results/gpu.json (kernels and layers), results/gpu_steps.json (training steps),
which lessons 14, 14b and 14c and the engine's pages show, and results/gpu_fast.json (models as people bring them).
Peers, plain path, 16-bit layers and torch's own copy in one run; torchao where it is installed. Steps run in processes
of their own, random weights in real shapes.
"""
import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pandas as pd
import torch
from torch import nn

from benchmarks import fast
from benchmarks.common import peer_step, random_batch, random_model, random_peer, save_result, spread_of
from benchmarks.memory import PAPER, peer_optimizer
from qlora_lab.blockwise import dequantize_blockwise
from qlora_lab.checkpointing import decoder_layers
from qlora_lab.double_quant import DYNAMIC8, quantize_4bit
from qlora_lab.engine.dispatch import AT_WORK, use_kernels
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.piecewise_loss import slopes_triton
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.engine.triton_dequantize import dequantize_triton
from qlora_lab.head_loss import slopes
from qlora_lab.linear4bit import Linear4bit
from qlora_lab.lora import trainable
from qlora_lab.train import train_step

SHAPES = (4096, 4096), (11008, 4096), (22016, 8192)
STEPS = [("llama-7b", 16, "lab"), ("llama-7b", 16, "peer"), ("llama-7b", 16, "peer, compiled"),
         ("llama-7b", 1, "lab"), ("llama-7b", 1, "lab, not recorded"), ("llama-7b", 1, "lab, plain torch"),
         ("llama-7b", 1, "peer"), ("llama-65b", 1, "lab"), ("llama-65b", 1, "peer"),
         ("llama-7b", 1, "peer, compiled")]  # model, sequences of 512 tokens, who
GROUPS = {"attention": ("flash", "fmha"), "decoding": ("_dequantize", "kDequantize"),
          "products": ("nvjet", "gemm", "cutlass", "splitKreduce"),
          "between the products": ("",)}  # kinds of kernels, by parts of their names, the first that fits


def timed(work, repeat: int = 200) -> tuple[float, float, float]:
    "Median and quartiles in ms of one call, the cache emptied before each."
    from triton.testing import do_bench
    return do_bench(work, warmup=25, rep=repeat, quantiles=[0.5, 0.25, 0.75])


def in_a_graph(works: list, rounds: int = 15) -> tuple[float, float, float]:
    """Median and quartiles in ms of one call, without the cost of its launch: calls on different data, recorded in
    turns as one graph and replayed."""
    for work in works: work()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for work in works * 4: work()
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (4e3 * len(works)))
    spread = spread_of(times[3:])
    return spread["median_ms"], *spread["quartiles_ms"]


def entry(who: str, ms: tuple, moved: float = 0, weights: float = 0) -> dict:
    "A column of a row."
    row = {f"{who}_ms": ms[0], f"{who}_quartiles_ms": ms[1:]}
    if moved: row[f"{who}_tbs"] = moved / ms[0] / 1e9
    if weights: row[f"{who}_gweights"] = weights / ms[0] / 1e6
    return row


def ceilings() -> dict:
    "What the card can do at all: bytes copied, and bfloat16 products."
    here, there = (torch.empty(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = 2 * here.numel() / timed(lambda: there.copy_(here))[0] / 1e9
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"copy_tbs": copy, "product_tflops": 2 * 8192 ** 3 / timed(lambda: a @ a)[0] / 1e9}


def quantized(shape: tuple, number: int) -> list:
    "So many random weights of a shape in nested NF4, enough that a cache does not hold them."
    def random(): return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    return [quantize_4bit(random()) for _ in range(number)]


def decoding() -> list[dict]:
    "Nested NF4 to bfloat16, in a graph and called one at a time."
    import bitsandbytes.functional as bnb
    rows = []
    for shape in SHAPES:
        some = quantized(shape, 4 if shape[0] > 20000 else 8)
        theirs = [q.to_bitsandbytes() for q in some]
        n = some[0].packed.numel() * 2
        moved = n * 2 + some[0].nbytes
        use_kernels(False)
        plain = some[0].dequantize()
        row = {"shape": shape, "moved_bytes": moved, **entry("plain", timed(some[0].dequantize), moved)}
        use_kernels()
        peers = [partial(bnb.dequantize_4bit, *t) for t in theirs]
        row["equal"] = torch.equal(some[0].dequantize(), plain) and torch.equal(plain, peers[0]())
        row |= entry("lab", in_a_graph([q.dequantize for q in some]), moved)
        row |= entry("lab_called", timed(some[0].dequantize), moved)
        row |= entry("bitsandbytes", in_a_graph(peers), moved) | entry("bitsandbytes_called", timed(peers[0]), moved)
        rows.append(row)
    return rows


def grown(shape: tuple = (11008, 4096)) -> list[dict]:
    "The kernel on its way: how many weights a lane, and nested statistics in a pass of their own or in the same."
    some = quantized(shape, 4)
    code = DYNAMIC8.cuda()
    def apart(q, wide):
        absmax = dequantize_blockwise(q.stats, q.absmax2, code, 256) + q.offset
        return dequantize_triton(replace(q, stats=absmax, absmax2=None, offset=None), torch.bfloat16, None, wide)
    moved = some[0].packed.numel() * 4 + some[0].nbytes
    assert all(torch.equal(apart(some[0], wide), some[0].dequantize()) for wide in (1, 2, 8))
    def row(wide, statistics, works):
        return {"weights a lane": wide, "statistics": statistics, **entry("lab", in_a_graph(works), moved)}
    rows = [row(wide, "apart", [partial(apart, q, wide) for q in some]) for wide in (1, 2, 8)]
    return [*rows, row(8, "same pass", [q.dequantize for q in some])]


def torchao(shape: tuple = (11008, 4096)) -> dict:
    "The way back in torchao's NF4 tensor, as it comes and compiled by torch; empty without torchao."
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError: return {}
    weight = to_nf4(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02)
    compiled = torch.compile(lambda w: w.get_original_weight())
    moved = weight.numel() * (2 + 4.127 / 8)
    return {"shape": shape, "version": version("torchao"), **entry("eager", timed(weight.get_original_weight), moved),
            **entry("compiled", timed(lambda: compiled(weight)), moved)}


def quantizing() -> list[dict]:
    "To nested NF4: the whole call, its check for NaN included."
    import bitsandbytes.functional as bnb
    rows = []
    for shape in SHAPES:
        w = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        theirs = partial(bnb.quantize_4bit, w, quant_type="nf4", compress_statistics=True)
        q, (packed, state) = quantize_4bit(w), theirs()
        held = packed.view(-1, 1), state.absmax, state.state2.absmax, state.offset
        equal = all(map(torch.equal, (q.packed, q.stats, q.absmax2, q.offset), held))
        sides = {"lab": partial(quantize_4bit, w), "bitsandbytes": theirs}
        row = {"shape": shape, "equal": equal}
        for who, work in sides.items(): row |= entry(who, timed(work), weights=w.numel())
        rows.append(row)
    return rows


def both_passes(forward, x, g) -> None:
    "Forward and backward to the input."
    x.grad = None
    forward(x).backward(g)


def layer() -> list[dict]:
    "4096 to 11008, forward and backward to the input: called, and recorded by torch's own `make_graphed_callables`."
    import bitsandbytes as bnb
    linear = nn.Linear(4096, 11008, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    peer = bnb.nn.Linear4bit(4096, 11008, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    peer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    sides, rows = {"bf16": linear, "lab": Linear4bit.from_linear(linear), "bitsandbytes": peer.cuda()}, []
    for tokens in (512, 2048, 8192):
        def random(width): return torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16)  # noqa: B023
        x, g = random(4096).requires_grad_(), random(11008)
        row = {"tokens": tokens}
        for who, m in sides.items():
            row |= entry(who, timed(partial(both_passes, m, x, g)))
            if who != "bitsandbytes":
                recorded = torch.cuda.make_graphed_callables(m.forward, (x,))
                row |= entry(f"{who}_recorded", timed(partial(both_passes, recorded, x, g)))
        rows.append(row)
    return rows


def shares(work, wall_ms: float) -> tuple[dict[str, float], int]:
    "Milliseconds of the GPU by kind of kernel, and what it waited; and how many kernels ran."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    spent, count = dict.fromkeys(GROUPS, 0.), 0
    for event in profile.key_averages():
        kind = next(k for k, parts in GROUPS.items() if any(part in event.key for part in parts))
        spent[kind] += event.self_device_time_total / 1e3
        count += event.count if event.self_device_time_total else 0
    return spent | {"waiting": max(0., wall_ms - sum(spent.values()))}, count


def updating(rank: int = 64) -> dict:
    "AdamW on the 7B shape's adapters, bfloat16, state in float32: milliseconds of the GPU, and whether bits are equal."
    import bitsandbytes as bnb
    config = model_config("llama-7b")
    h, i = config.hidden_size, config.intermediate_size
    sizes = [rank * n for n in (*[h] * 8, *[h, i] * 3)] * config.num_hidden_layers
    def params():
        generator = torch.Generator("cuda").manual_seed(0)
        def random(n, scale): return (torch.randn(n, device="cuda", generator=generator) * scale).to(torch.bfloat16)
        found = [nn.Parameter(random(n, 0.02)) for n in sizes]
        for p in found: p.grad = random(p.numel(), 1e-3)
        return found
    sides, row = {}, {"parameters": sum(sizes)}
    for who, make in (("plain", PagedAdamW), ("lab", PagedAdamW), ("bitsandbytes", bnb.optim.AdamW32bit)):
        use_kernels(who == "lab")
        mine = params()
        optimizer = make(mine, lr=2e-4)
        for _ in range(3): optimizer.step()
        state = [t for p in mine for t in optimizer.state[p].values() if torch.is_tensor(t)]
        sides[who] = [[p.detach().clone() for p in mine], [t.clone() for t in state]]
        row[f"{who}_ms"] = sum(shares(optimizer.step, 0.)[0].values())
        row |= entry(f"{who}_called", timed(optimizer.step))
        del mine, optimizer, state
    use_kernels()
    both = zip(sides["plain"], sides["lab"])
    return row | {"equal": all(torch.equal(*pair) for plain, lab in both for pair in zip(plain, lab, strict=True))}


def losses(places: int = 1024) -> list[dict]:
    "Loss and slope of 1,024 places from their logits in bfloat16: plain torch, and the kernel in place."
    rows = []
    for vocabulary in (32_000, 151_936, 262_208):
        logits = torch.randn(places, vocabulary, device="cuda", dtype=torch.bfloat16) * 4
        targets = torch.randint(vocabulary, (places,), device="cuda")
        (nats, slope), own = slopes(logits, targets), logits.clone()
        off = (slopes_triton(own, targets) - nats).abs().max().item(), (own.float() - slope).abs().max().item()
        row = {"vocabulary": vocabulary, "loss_off": off[0], "slope_off": off[1]}
        row |= entry("plain", timed(partial(slopes, logits, targets)), 36 * logits.numel())  # 2 + 4 + 3 (4 + 4) + 4 + 2
        rows.append(row | entry("lab", timed(partial(slopes_triton, own, targets)), 4 * logits.numel()))
    return rows


def step(name: str, batch_size: int, who: str, rounds: int = 7) -> dict:
    """A training step, forward to optimizer: r = 64 on all linear layers, adapters in bfloat16, checkpointed, 512
    tokens a sequence, all of them learned."""
    settings = Settings(**PAPER, batch_size=batch_size)
    use_kernels(who != "lab, plain torch")
    if who.startswith("lab"):
        model = random_model(model_config(name), settings)
        if who == "lab, not recorded": del AT_WORK["forward_backward", "cuda"]
        optimizer = PagedAdamW(trainable(model), lr=1e-4)
    else:
        model = random_peer(model_config(name), settings)
        if who == "peer, compiled":
            for part in decoder_layers(model): part.compile()
        optimizer = peer_optimizer(trainable(model), settings)
    batch = random_batch(batch_size, 512)
    def work():
        lab = who.startswith("lab")
        return train_step(model, optimizer, [batch], 1e-4, 0.3) if lab else peer_step(model, optimizer, batch)
    first = work()[0]
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    middle, quartiles = spread_of(times[2:]).values()
    peak, reserved = torch.cuda.max_memory_allocated() / 2 ** 30, torch.cuda.max_memory_reserved() / 2 ** 30
    kinds, launches = shares(work, middle)
    return {"model": name, "sequences": batch_size, "who": who, "ms": middle, "quartiles_ms": quartiles,
            "tokens_per_s": 512e3 * batch_size / middle, "peak_gib": peak, "reserved_gib": reserved,
            "kernels": launches, "shares_ms": kinds, "first_loss": first}


def steps() -> list[dict]:
    "Training steps."
    rows = []
    for asked in STEPS:
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", json.dumps(asked)]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode: raise SystemExit(out.stderr)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        save_result("gpu_steps", {"steps": rows})  # what is done stays done
        row = rows[-1]
        speed = f"{row['ms']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s"
        print(f"{asked}: {speed}, {row['peak_gib']:.2f} GiB", flush=True)
    return rows


def show(part) -> list[dict]:
    "Run a part and print its table."
    found = part()
    rows = found if isinstance(found, list) else [found]
    shown = [{k: v for k, v in r.items() if "quartiles" not in k and k != "shares_ms"} for r in rows]
    print(f"\n{part.__doc__}\n{pd.DataFrame(shown).round(4).to_string(index=False)}", flush=True)
    torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "steps", "fast"))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    if args.only == "fast": return fast.main(more)
    if more: parser.error(f"unknown: {' '.join(more)}")
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; its recorded runs are benchmarks/results/gpu.json and "
                         "gpu_steps.json")
    if args.step: return print(json.dumps(step(*json.loads(args.step))))
    parts = ceilings, decoding, grown, torchao, quantizing, layer, updating, losses
    if args.only != "steps": print(save_result("gpu", {part.__name__: show(part) for part in parts}))
    if args.only != "kernels": show(steps)
    if args.only is None: fast.main([])


if __name__ == "__main__": main()
