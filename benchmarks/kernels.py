"""The way back from 4 bits on a GPU: share of a copy's speed, and one layer in both directions.

    python -m benchmarks.kernels

Writes results/kernels_cuda.json, which lesson 14 shows. The lab, its plain path, bitsandbytes and torch's own copy in one run.
"""
import torch
from torch import nn

from benchmarks.common import save_result
from qlora_lab import kernels
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.linear4bit import Linear4bit

SHAPES = (4096, 4096), (11008, 4096), (22016, 8192)


def median_ms(work) -> float:
    from triton.testing import do_bench
    return do_bench(work, warmup=25, rep=150, return_mode="median")


def ceilings() -> dict:
    "What the card can do at all: bytes copied, and bfloat16 products."
    here, there = (torch.empty(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = 2 * here.numel() / median_ms(lambda: there.copy_(here)) / 1e9
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return {"copy_tbs": copy, "product_tflops": 2 * 8192 ** 3 / median_ms(lambda: a @ a) / 1e9}


def decoding() -> list[dict]:
    "Nested NF4 to bfloat16."
    import bitsandbytes.functional as bnb
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
        q = quantize_4bit(weight)
        packed, state = q.to_bitsandbytes()
        moved = weight.numel() * 2 + q.nbytes
        kernels.use_kernels(False)
        plain, plain_ms = q.dequantize(), median_ms(lambda: q.dequantize())
        kernels.use_kernels(True)
        ours = q.dequantize()
        row = {"shape": shape, "moved_bytes": moved, "equal": torch.equal(ours, plain) and torch.equal(ours, bnb.dequantize_4bit(packed, state))}
        for who, ms in (("lab", median_ms(lambda: q.dequantize())), ("plain", plain_ms), ("bitsandbytes", median_ms(lambda: bnb.dequantize_4bit(packed, state)))):
            row |= {f"{who}_ms": ms, f"{who}_tbs": moved / ms / 1e9}
        rows.append(row)
        print(row, flush=True)
    return rows


def layer() -> list[dict]:
    "4096 to 11008, forward and backward to the input."
    import bitsandbytes as bnb
    linear = nn.Linear(4096, 11008, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    peer = bnb.nn.Linear4bit(4096, 11008, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    peer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    sides, rows = {"bf16": linear, "lab": Linear4bit.from_linear(linear), "bitsandbytes": peer.cuda()}, []
    for tokens in (512, 2048, 8192):
        x, g = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True), torch.randn(1, tokens, 11008, device="cuda", dtype=torch.bfloat16)
        rows.append({"tokens": tokens, **{f"{who}_ms": median_ms(lambda m=m: m(x).backward(g)) for who, m in sides.items()}})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    if not torch.cuda.is_available(): raise SystemExit("this benchmark needs a GPU; its recorded run is in benchmarks/results/kernels_cuda.json")
    print(save_result("kernels_cuda", {"ceilings": ceilings(), "decoding": decoding(), "layer": layer()}))


if __name__ == "__main__": main()
