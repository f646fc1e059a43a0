"""The lab beside peft + bitsandbytes on a CPU: quantize, dequantize, one layer, one training step, loading.

    make bench            # or python -m benchmarks.cpu

Prints a table of medians and ratios (above 1: the lab is faster) and writes results/cpu.json. Timed work takes turns in
one process; loading, and the peak memory of a training step, are those of processes of their own.
"""
import argparse
import atexit
import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache

import pandas as pd
import torch

from benchmarks.common import interleaved, save_result, spread_of
from qlora_lab.assets import SMOLLM2
from qlora_lab.provenance import peak_memory_gib


def quantize_and_back(n: int = 4096) -> dict[str, dict]:
    "16.8 M weights to nested NF4 and back, in float32 and bfloat16."
    import bitsandbytes.functional as bnb

    from qlora_lab.double_quant import quantize_4bit
    weight = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) * 0.02
    ours, (packed, state) = quantize_4bit(weight), bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed, packed)
    def quantize_theirs(): return bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    rows = {"quantize 16.8 M weights": {"lab": lambda: quantize_4bit(weight), "bnb": quantize_theirs}}
    for dtype in (torch.float32, torch.bfloat16):
        def theirs(dtype=dtype):
            state.dtype = dtype
            return bnb.dequantize_4bit(packed, state)
        assert torch.equal(ours.dequantize(dtype), theirs())
        rows[f"dequantize 16.8 M weights to {str(dtype)[6:]}"] = {"lab": lambda dtype=dtype: ours.dequantize(dtype),
                                                                  "bnb": theirs}
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
    return {"one layer 576 to 1536, 512 tokens, both passes": {"lab": lambda: lab(x).backward(g),
                                                               "bnb": lambda: peer(x).backward(g)}}


SHAPES = {  # random weights in the shapes of other models
    "Qwen3-0.6B, 8 of 28 layers": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "Gemma-3-270M": dict(
        model_type="gemma3_text", hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=262144, sliding_window=512, tie_word_embeddings=True),
}


@cache
def random_model(shape: str) -> str:
    "A folder with random weights in one of `SHAPES`, and the tokenizer of SmolLM2, which nobody asks."
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from qlora_lab.assets import smollm2_folder
    folder = tempfile.mkdtemp(prefix="qlora_lab_bench_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2_folder()).save_pretrained(folder)
    return folder


def training_step(side: str, dtype: torch.dtype | None = None, name: str = SMOLLM2):
    """A callable that takes one step on 4 x 128 tokens: QLoRA by the lab or by peft + bitsandbytes, or peft's LoRA on
    the float32 model."""
    from peft import LoraConfig, get_peft_model

    from qlora_lab.lora import trainable
    from qlora_lab.model import load_model
    from qlora_lab.train import TrainConfig, attach_adapters, train_step
    if side == "unquantized":
        model, _ = load_model(name, quantize=None)
        lora = LoraConfig(r=TrainConfig.rank, lora_alpha=TrainConfig.alpha, target_modules="all-linear",
                          task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).train()
    else:
        model, _ = load_model(name, backend=side, compute_dtype=dtype)
        model = attach_adapters(model, TrainConfig()).train()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)
    ids = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(128) >= 112, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return lambda: train_step(model, optimizer, [batch], 1e-4, 0.3)


def steps() -> dict[str, dict]:
    """Steps with the same kind of products on both sides, and as each side does them unless told otherwise, beside LoRA
    without quantization."""
    name = "training step, 4 x 128 tokens, "  # of SmolLM2
    rows = {f"{name}{str(d)[6:]} products": {side: training_step(side, d) for side in ("lab", "bnb")}
            for d in (torch.float32, torch.bfloat16)}
    defaults = {"lab": training_step("lab"), "bnb": training_step("bnb", torch.float32),
                "unquantized": training_step("unquantized")}
    others = {}
    for shape in SHAPES:
        peer = training_step("bnb", torch.float32, random_model(shape))
        for how, dtype in (("float32 products", torch.float32), ("by default", None)):
            others[f"{name}{shape}, {how}"] = {"lab": training_step("lab", dtype, random_model(shape)), "bnb": peer}
    return rows | {f"{name}by default": defaults} | others


def peak_of_a_step(side: str, dtype: str) -> float:
    "Peak resident memory in GiB of a process that loads the model and takes three steps."
    out = subprocess.run([sys.executable, "-m", "benchmarks.cpu", "--peak", side, dtype], check=True,
                         capture_output=True, text=True)
    return float(out.stdout.split()[-1])


IMPORTS = "import torch and transformers"
LOADING = {IMPORTS: "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM",
           "lab": "import qlora_lab; qlora_lab.load_model()",
           "bnb": "import qlora_lab; qlora_lab.load_model(backend='bnb')"}


def loading() -> dict[str, dict]:
    """From nothing to a loaded 4-bit SmolLM2, its weights converted before: whole processes, and of that what importing
    the libraries takes."""
    sides = {name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
             for name, code in LOADING.items()}
    return {name: spread_of(s) for name, s in interleaved(sides, 5, 1).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.peak:
        step = training_step(args.peak[0], getattr(torch, args.peak[1]))
        for _ in range(3): step()
        return print(peak_memory_gib())
    rows = quantize_and_back() | one_layer() | steps()
    timed = {name: {side: spread_of(s) for side, s in interleaved(sides, args.rounds).items()}
             for name, sides in rows.items()}
    peaks = {b: {d: peak_of_a_step(b, d) for d in ("float32", "bfloat16")} for b in ("lab", "bnb")}
    timed["from nothing to a loaded model"] = loading()
    save_result("cpu", {"timings": timed, "peak_memory_gib": peaks})
    table = pd.DataFrame({name: {"lab (ms)": t["lab"]["median_ms"], "bitsandbytes (ms)": t["bnb"]["median_ms"],
                                 "ratio": t["bnb"]["median_ms"] / t["lab"]["median_ms"],
                                 "unquantized (ms)": t.get("unquantized", {}).get("median_ms")}
                          for name, t in timed.items()}).T
    print(table.astype(float).round(2).to_string(na_rep=""))
    imports = timed["from nothing to a loaded model"][IMPORTS]["median_ms"]
    print(f"of loading, imports of torch and transformers: {imports:.0f} ms")
    print("peak memory of three training steps (GiB):", json.dumps(peaks))


if __name__ == "__main__": main()
