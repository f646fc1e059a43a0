"""The lab beside peft + bitsandbytes on a CPU: quantize, dequantize, one layer, one training step.

    make bench            # or python -m benchmarks.cpu

Prints a table of medians and ratios (above 1: the lab is faster) and writes results/cpu.json. Timed work takes turns in one
process; peak memory of a training step is that of a process of its own.
"""
import argparse
import json
import subprocess
import sys

import pandas as pd
import torch

from benchmarks.common import interleaved, save_result, spread_of
from qlora_lab.records import peak_memory_gib


def quantize_and_back(n: int = 4096) -> dict[str, dict]:
    "16.8 M weights to nested NF4 and back, in float32 and bfloat16."
    import bitsandbytes.functional as bnb
    from qlora_lab.double_quant import quantize_4bit
    weight = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) * 0.02
    ours, (packed, state) = quantize_4bit(weight), bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed, packed)
    rows = {"quantize 16.8 M weights": {"lab": lambda: quantize_4bit(weight), "bnb": lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)}}
    for dtype in (torch.float32, torch.bfloat16):
        def theirs(dtype=dtype):
            state.dtype = dtype
            return bnb.dequantize_4bit(packed, state)
        assert torch.equal(ours.dequantize(dtype), theirs())
        rows[f"dequantize 16.8 M weights to {str(dtype)[6:]}"] = {"lab": lambda dtype=dtype: ours.dequantize(dtype), "bnb": theirs}
    return rows


def one_layer(tokens: int = 512) -> dict[str, dict]:
    "A 576 x 1536 layer of SmolLM2, forward and backward to the input."
    import bitsandbytes as bnb
    from qlora_lab.linear4bit import Linear4bit
    linear = torch.nn.Linear(576, 1536, bias=False)
    lab = Linear4bit.from_linear(linear)
    peer = bnb.nn.Linear4bit(576, 1536, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    peer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    peer = peer.to("cpu").train()
    x, g = torch.randn(tokens, 576, requires_grad=True), torch.randn(tokens, 1536)
    assert torch.equal(lab(x), peer(x))
    return {"one layer 576 to 1536, 512 tokens, both passes": {"lab": lambda: lab(x).backward(g), "bnb": lambda: peer(x).backward(g)}}


def training_step(backend: str, dtype: torch.dtype):
    "A callable that takes one QLoRA step of SmolLM2 on 4 x 128 tokens."
    from qlora_lab.lora import trainable
    from qlora_lab.model import load_model
    from qlora_lab.train import TrainConfig, attach_adapters, train_step
    model, _ = load_model(backend=backend, compute_dtype=dtype)
    model = attach_adapters(model, TrainConfig()).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)
    ids = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(128) >= 112, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return lambda: train_step(model, optimizer, [batch], 1e-4, 0.3)


def peak_of_a_step(backend: str, dtype: str) -> float:
    "Peak resident memory in GiB of a process that loads the model and takes three steps."
    out = subprocess.run([sys.executable, "-m", "benchmarks.cpu", "--peak", backend, dtype], check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.peak:
        step = training_step(args.peak[0], getattr(torch, args.peak[1]))
        for _ in range(3): step()
        return print(peak_memory_gib())
    rows = quantize_and_back() | one_layer()
    for dtype in (torch.float32, torch.bfloat16):
        rows[f"training step, 4 x 128 tokens, {str(dtype)[6:]} products"] = {b: training_step(b, dtype) for b in ("lab", "bnb")}
    timed = {name: {side: spread_of(s) for side, s in interleaved(sides, args.rounds).items()} for name, sides in rows.items()}
    peaks = {b: {d: peak_of_a_step(b, d) for d in ("float32", "bfloat16")} for b in ("lab", "bnb")}
    save_result("cpu", {"timings": timed, "peak_memory_gib": peaks})
    table = pd.DataFrame({name: {"lab (ms)": t["lab"]["median_ms"], "bitsandbytes (ms)": t["bnb"]["median_ms"],
                                 "ratio": t["bnb"]["median_ms"] / t["lab"]["median_ms"]} for name, t in timed.items()}).T
    print(table.round(2).to_string())
    print("peak memory of three training steps (GiB):", json.dumps(peaks))


if __name__ == "__main__": main()
