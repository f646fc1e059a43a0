"""One decoder layer of each measured family on a GPU, fused and plain: time, memory, difference, and where time goes.

    python -m benchmarks.gpu_layers                          # all shapes, about two minutes on an H100
    python -m benchmarks.gpu_layers --shape gemma-3-4b --top 12

A checkpointed layer in 4 bits with adapters of rank 64 on random weights of the real shape, forward and backward, each
kernel launched from Python. For work on the engine; nothing is recorded.
"""
import argparse

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import random_model
from qlora_lab.checkpointing import decoder_layers
from qlora_lab.engine.dispatch import use_kernels
from qlora_lab.engine.fusing import is_fused
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.lora import trainable


def shape(family, hidden, inner, heads, keys, size, **more):
    "A config's fields; two layers, few words."
    return {"model_type": family, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
            "num_key_value_heads": keys, "head_dim": size, "num_hidden_layers": 2, "vocab_size": 1024,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 1 << 17} | more


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
GEMMA = {"sliding_window": 1024, "query_pre_attn_scalar": 256}
PHI = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
SHAPES = {  # fields of a config, sequences, tokens of each
    "llama-7b": (shape("llama", 4096, 11008, 32, 32, 128), 16, 512),
    "llama-3-8b": (shape("llama", 4096, 14336, 32, 8, 128), 4, 2048),
    "qwen2.5-7b": (shape("qwen2", 3584, 18944, 28, 4, 128), 4, 2048),
    "qwen3-8b": (shape("qwen3", 4096, 12288, 32, 8, 128), 16, 512),
    "qwen3-8b, long": (shape("qwen3", 4096, 12288, 32, 8, 128), 1, 2048),
    "gemma-3-4b, window": (shape("gemma3_text", 2560, 10240, 8, 4, 256, layer_types=["sliding_attention"] * 2, **GEMMA),
                           4, 2048),
    "gemma-3-4b, full": (shape("gemma3_text", 2560, 10240, 8, 4, 256, layer_types=["full_attention"] * 2, **GEMMA),
                         4, 2048),
    "phi-4-mini": (shape("phi3", 3072, 8192, 24, 8, 128, **PHI), 4, 2048),
    "qwen3-30b-a3b": (shape("qwen3_moe", 2048, 6144, 32, 4, 128, **EXPERTS), 4, 1024),
}


def built(fields: dict) -> torch.nn.Module:
    from transformers import AutoConfig
    config = AutoConfig.for_model(**fields)
    settings = Settings(rank=64, checkpointing=True, adapter_dtype="bfloat16")
    return random_model(config, settings)


def run(model: torch.nn.Module, sequences: int, tokens: int) -> tuple:
    "A function that runs a layer both ways, and its results: the output and all gradients."
    layer, device = decoder_layers(model)[0], torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.randn(sequences, tokens, model.config.hidden_size, generator=generator, device=device) for _ in "xg"]
    x, g = (t.bfloat16() for t in made)
    x.requires_grad_()
    rotary, places = model.get_decoder().rotary_emb, torch.arange(tokens, device=device)[None]
    kinds = [model.config.layer_types[0]] if hasattr(rotary, "layer_types") else []
    angles = rotary(x, places, *kinds)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    learns = [p for p in trainable(layer) if p.requires_grad]
    def work(mask=mask):
        y = layer(x, attention_mask=mask, position_embeddings=angles)
        return y, *torch.autograd.grad(y, [x, *learns], g, allow_unused=True)
    return layer, work


def by_mask(tokens: int, window: int | None) -> torch.Tensor | None:
    "What the plain layer needs for its window."
    if window is None or tokens <= window: return None
    return torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril().triu(1 - window)[None, None]


def measure(name: str, top: int) -> dict:
    "A row of the table; with `top`, the kernels that take most of the fused layer's time."
    from triton.testing import do_bench
    fields, sequences, tokens = SHAPES[name]
    model, row, found = built(fields), {}, {}
    layer, work = run(model, sequences, tokens)
    assert is_fused(layer), f"{name} is not fused"
    for who, on in (("fused", True), ("plain", False)):
        use_kernels(on)
        mask = {} if on else {"mask": by_mask(tokens, layer._fused.how["window"])}
        found[who] = [t for t in work(**mask) if t is not None]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(**mask)
        row[f"{who}, MiB"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        row[f"{who}, ms"] = do_bench(lambda mask=mask: work(**mask), warmup=50, rep=300)
    use_kernels()
    off = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*found.values())]
    row |= {"output off by": off[0], "gradients off by": max(off[1:])}
    if top:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize()
        print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=top, max_name_column_width=60))
    return row


def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--shape", help="the beginning of a name; all by default", default="")
    asked.add_argument("--top", type=int, help="kernels to list for each shape", default=0)
    args = asked.parse_args()
    rows = {}
    for name in SHAPES:
        if not name.startswith(args.shape): continue
        rows[name] = measure(name, args.top)
        torch.cuda.empty_cache()
    print(pd.DataFrame(rows).T.to_string(float_format=lambda v: f"{v:.3g}"))


if __name__ == "__main__": main()
