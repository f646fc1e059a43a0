"""How many weights were compared with bitsandbytes, and how many bytes differed.

    python -m benchmarks.exactness --device cuda --weights 500

Draws tensors of every shape the tests know (odd, short, cut, transposed, all-zero blocks, ties), in three dtypes,
eight block sizes, nested or not, nf4 and fp4; writes results/exactness_DEVICE.json. What would differ by the plain rule
of the lessons, without the twins that round exactly, is counted beside it.
"""
import argparse
import random
from collections import Counter

import bitsandbytes.functional as bnb
import torch

from benchmarks.common import save_result
from qlora_lab.double_quant import BLOCKSIZES, QuantizedTensor, quantize_4bit
from qlora_lab.engine.dispatch import standing_in

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def draw(rng: random.Random, device: str) -> torch.Tensor:
    "One tensor of a random kind."
    kind = rng.choice(("matrix", "odd", "vector", "large", "zeros", "transposed", "ties"))
    usual = rng.randint(1, 300), rng.randint(1, 500)
    shape = {"vector": (rng.randint(1, 100_000),), "large": (1024, 1024), "zeros": (64, 512)}.get(kind, usual)
    w = torch.randn(shape, device=device) * rng.choice((0.02, 1.0, 1e-3, 30.0))
    if kind == "zeros": w.view(-1)[rng.randint(0, 10_000):][:9000] = 0
    if kind == "ties": w = (w * 8 / w.abs().max()).round() / 8
    if kind == "transposed": w = w.t()
    return w.to(rng.choice(list(BITS)))


def plainly(device: str):
    "A block in which neither faster nor exact twins do the work."
    operations = [name + how for name in ("quantize", "quantize_absmax") for how in ("", "_exactly")]
    return standing_in({(operation, device): None for operation in operations})


def count(ours, packed, state, nested: bool) -> dict[str, int]:
    "Bytes and numbers of the stored parts that are not equal."
    return {"packed bytes": (ours.packed.view(-1) != packed.view(-1)).sum().item(),
            "statistics": (ours.stats != state.absmax).sum().item(),
            "second-level scales": (ours.absmax2 != state.state2.absmax).sum().item() if nested else 0,
            "means": int(ours.offset != state.offset) if nested else 0}


def decoded(packed, state) -> tuple[str, int]:
    "What of their bytes our way back reads otherwise: bits for nf4, values for fp4."
    flat = torch.Size([state.shape.numel()])  # bitsandbytes' AVX-512 kernel misreads blocks that cross rows
    state.shape = flat
    theirs = bnb.dequantize_4bit(packed, state).view(-1)
    back = QuantizedTensor.from_bitsandbytes(packed, state).dequantize().view(-1)
    if state.quant_type == "fp4": return "decoded fp4 (values)", (back != theirs).sum().item()
    bits = BITS[back.dtype]
    return "decoded nf4 (bits)", (back.view(bits) != theirs.view(bits)).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=float, default=50, help="millions to compare, at least")
    args = parser.parse_args()
    rng, seen, differ, plain = random.Random(0), 0, Counter(), Counter()
    torch.manual_seed(0)
    while seen < args.weights * 1e6:
        w, kind = draw(rng, args.device), rng.choice(("nf4", "fp4"))
        blocksize, nested = rng.choice(BLOCKSIZES), rng.random() < 0.5
        packed, state = bnb.quantize_4bit(w, quant_type=kind, blocksize=blocksize, compress_statistics=nested)
        differ.update(count(quantize_4bit(w, kind, blocksize, nested), packed, state, nested))
        with plainly(args.device): plain.update(count(quantize_4bit(w, kind, blocksize, nested), packed, state, nested))
        differ.update(dict([decoded(packed, state)]))
        seen += w.numel()
    result = {"weights": seen, "differences": dict(differ), "by the plain rule": dict(plain)}
    save_result(f"exactness_{args.device}", result)
    print(f"{seen:,} weights on {args.device}: {result}")


if __name__ == "__main__": main()
