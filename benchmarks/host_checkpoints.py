"""Checkpoints on the card and in host memory: time of a step and memory, side by side on one card.

    python -m benchmarks.host_checkpoints              # writes results/host_checkpoints_cuda.json

Rank 64 on all linear layers of random weights, recorded steps. The plan of each stands beside what torch had reserved.
"""
import gc
import statistics
import time

import torch

from benchmarks.common import random_batch, random_model, save_result
from qlora_lab import plan
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.lora import trainable
from qlora_lab.train import train_step

PAPER = dict(rank=64, adapter_dtype="bfloat16", checkpointing=True)
SHAPES = [("llama-7b", 16, 512), ("llama-7b", 1, 2048), ("llama-7b", 1, 32768)]
WAYS = {"device": {}, "host": dict(checkpoints_in="host"), "first half": dict(checkpointed_layers=16),
        "none": dict(checkpointing=False)}


def row(name: str, batch_size: int, sequence: int, way: str, steps: int = 5) -> dict:
    "Median time of a recorded step, and memory; the first steps, which record, aside."
    p = plan(name, **PAPER | dict(batch_size=batch_size, sequence=sequence) | WAYS[way])
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(model_config(name), p.settings)
    optimizer, batches = PagedAdamW(trainable(model), lr=1e-4), [random_batch(batch_size, sequence)]
    seconds, losses = [], []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss, norm = train_step(model, optimizer, batches, 1e-4, 0.3)
        assert norm > 0
        losses.append(loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    recorded = "_graph" in model.__dict__ and any(g is not None for g, _, _ in model._graph.graphs.values())
    gib = 2 ** 30
    return {"shape": f"{name} {batch_size} x {sequence}", "checkpoints": way, "recorded": recorded,
            "tokens_per_s": round(batch_size * sequence / statistics.median(seconds[3:])),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / gib, 2),
            "allocated_gib": round(torch.cuda.max_memory_allocated() / gib, 2), "planned_gib": round(p.total_gib, 2),
            "in_host_memory_gib": round(p.host_inputs / gib, 2), "loss": losses[-1]}


def main() -> None:
    rows = []
    for shape in SHAPES:
        for way in WAYS:
            try: rows.append(row(*shape, way))
            except torch.OutOfMemoryError: print(shape, way, "out of memory", flush=True)
            else: print(rows[-1], flush=True)
    print(save_result("host_checkpoints_cuda", {"rows": rows}))


if __name__ == "__main__": main()
