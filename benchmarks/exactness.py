"""How many weights were compared with bitsandbytes, and how many bytes differed.

    python -m benchmarks.exactness --device cuda --weights 500

Draws tensors of every shape the tests know (odd, short, cut, transposed, all-zero blocks, ties), in three dtypes, eight block
sizes, nested or not, nf4 and fp4; writes results/exactness_DEVICE.json.
"""
import argparse
import random

import torch

from benchmarks.common import save_result
from qlora_lab.double_quant import BLOCKSIZES, QuantizedTensor, quantize_4bit

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def draw(rng: random.Random, device: str) -> torch.Tensor:
    "One tensor of a random kind."
    kind = rng.choice(("matrix", "odd", "vector", "large", "zeros", "transposed", "ties"))
    shape = {"vector": (rng.randint(1, 100_000),), "large": (1024, 1024), "zeros": (64, 512)}.get(kind, (rng.randint(1, 300), rng.randint(1, 500)))
    w = torch.randn(shape, device=device) * rng.choice((0.02, 1.0, 1e-3, 30.0))
    if kind == "zeros": w.view(-1)[rng.randint(0, 10_000):][:9000] = 0
    if kind == "ties": w = (w * 8 / w.abs().max()).round() / 8
    if kind == "transposed": w = w.t()
    return w.to(rng.choice(list(BITS)))


def main() -> None:
    import bitsandbytes.functional as bnb
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", type=float, default=50, help="millions to compare, at least")
    args = parser.parse_args()
    rng = random.Random(0)
    torch.manual_seed(0)
    seen, differ = 0, dict.fromkeys(("packed bytes", "statistics", "second-level scales", "means", "decoded nf4 (bits)", "decoded fp4 (values)"), 0)
    while seen < args.weights * 1e6:
        w, kind, blocksize, nested = draw(rng, args.device), rng.choice(("nf4", "fp4")), rng.choice(BLOCKSIZES), rng.random() < 0.5
        packed, state = bnb.quantize_4bit(w, quant_type=kind, blocksize=blocksize, compress_statistics=nested)
        ours = quantize_4bit(w, kind, blocksize, nested)
        seen += w.numel()
        differ["packed bytes"] += (ours.packed.view(-1) != packed.view(-1)).sum().item()
        differ["statistics"] += (ours.stats != state.absmax).sum().item()
        if nested:
            differ["second-level scales"] += (ours.absmax2 != state.state2.absmax).sum().item()
            differ["means"] += int(ours.offset != state.offset)
        state.shape = torch.Size([w.numel()])  # flat: bitsandbytes' AVX-512 kernel misreads blocks that cross rows
        theirs, back = bnb.dequantize_4bit(packed, state).view(-1), QuantizedTensor.from_bitsandbytes(packed, state).dequantize().view(-1)
        if kind == "nf4": differ["decoded nf4 (bits)"] += (back.view(BITS[w.dtype]) != theirs.view(BITS[w.dtype])).sum().item()
        else: differ["decoded fp4 (values)"] += (back != theirs).sum().item()
    save_result(f"exactness_{args.device}", {"weights": seen, "differences": differ})
    print(f"{seen:,} weights on {args.device}: {differ}")


if __name__ == "__main__": main()
