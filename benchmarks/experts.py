"""The experts of one layer of Qwen3-30B-A3B, forward and backward, by everybody who can: loop, groups, peers.

    python -m benchmarks.experts            # on an H100 about a minute; writes results/experts_gpu.json
    python -m benchmarks.experts --cpu      # a small layer on a CPU; writes results/experts_cpu.json

128 experts of 768 x 2048, eight for each of 4,096 tokens, random weights and choices; with adapters of rank 64 or none.
Peers: transformers' grouped_mm on 16-bit experts, and on bitsandbytes' parametrization, which decodes them all.
"""
import argparse
import copy
import gc

import pandas as pd
import torch
from peft import LoraConfig
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.common import interleaved, save_result, spread_of
from qlora_lab.engine import dispatch
from qlora_lab.engine.expert_adapters import adapt_experts
from qlora_lab.engine.experts import quantize_experts
from qlora_lab.engine.grouped_experts import grouped_experts


class Layer(nn.Module):
    "A module with experts, as a model has it."
    def __init__(self, config, device, dtype):
        super().__init__()
        with torch.device(device): self.experts = Qwen3MoeExperts(config).to(dtype)
        for p in self.experts.parameters(): nn.init.normal_(p, std=0.02)
        self.requires_grad_(False)


def sides(config, device, dtype, rank) -> dict[str, tuple[Layer, object]]:
    "Who takes part: a layer, and the twin that does `experts` (None: the loop, False: transformers' own)."
    def adapted(layer):
        wanted = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=rank, target_modules=[], target_parameters=wanted)
        if rank: adapt_experts(layer, lora, torch.bfloat16 if device == "cuda" else torch.float32)
        return layer
    torch.manual_seed(0)
    dense, found = Layer(config, device, dtype), {}
    packed = copy.deepcopy(dense)
    packed.experts.config = copy.deepcopy(config)
    quantize_experts(packed)
    adapted(packed)
    found["lab, in groups"], found["lab, the loop"] = (packed, grouped_experts), (packed, None)
    if rank: return found
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    theirs = copy.deepcopy(dense)
    for name in ("gate_up_proj", "down_proj"): replace_parameter_4bit(theirs.experts, name, True, "nf4")
    for layer in (dense, theirs):
        layer.experts.config = copy.deepcopy(config)
        layer.experts.config._experts_implementation = "grouped_mm"
    return found | {"16 bits, grouped_mm": (dense, False), "bitsandbytes, grouped_mm": (theirs, False)}


def measure(config, tokens, device, dtype, rank, rounds) -> list[dict]:
    "Milliseconds of a forward and backward pass, and on a GPU the memory that it takes at most."
    x = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype)
    each, experts = config.num_experts_per_tok, config.num_experts
    chosen = torch.rand(tokens, experts, device=device).topk(each, 1).indices
    share, grad = torch.full((tokens, each), 1 / each, device=device, dtype=dtype), torch.randn_like(x)
    def both(layer, twin):
        into = x.clone().requires_grad_()
        with dispatch.standing_in({("experts", device): twin or None}):
            layer.experts(into, chosen, share).backward(grad)
        if device == "cuda": torch.cuda.synchronize()
    rows, calls = [], {}
    for who, (layer, twin) in sides(config, device, dtype, rank).items():
        calls[who] = lambda layer=layer, twin=twin: both(layer, twin)
        rows.append({"who": who, "rank": rank})
        if device != "cuda": continue
        gc.collect()
        calls[who]()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[who]()
        rows[-1]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    times = interleaved(calls, rounds)
    return [row | spread_of(times[row["who"]]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true")
    cpu = parser.parse_args().cpu
    size = dict(hidden_size=512, moe_intermediate_size=256, num_experts=16, num_experts_per_tok=4) if cpu else dict(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    config = Qwen3MoeConfig(**size, experts_implementation="eager")
    tokens, device, dtype = (512, "cpu", torch.float32) if cpu else (4096, "cuda", torch.bfloat16)
    rows = [row for rank in (0, 16 if cpu else 64) for row in measure(config, tokens, device, dtype, rank, 7)]
    print(pd.DataFrame(rows).round(2).to_string())
    save_result("experts_cpu" if cpu else "experts_gpu", {"tokens": tokens, "shape": size, "experts": rows})


if __name__ == "__main__": main()
