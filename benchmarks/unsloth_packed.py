"""Packed and padded steps in Unsloth, for benchmarks.packing: a process of its own, as benchmarks.unsloth_side is.

    python benchmarks/unsloth_packed.py ASKED.json

Rows are what its trainer's collator hands to the model: ids [1, tokens], positions that begin again, labels, and the
lengths of the examples (`packed_seq_lengths`), no mask. What it prints last is JSON.
"""
# ruff: noqa: E402, F401  (Unsloth wants to be imported first)
import json
import runpy
import sys
import time
from pathlib import Path

loaded = runpy.run_path(str(Path(__file__).with_name("unsloth_side.py")))["loaded"]

# isort: split
import gc

import torch
import unsloth


def examples(batch: list, words: int, seed: int) -> list:
    "Random tokens [length] and labels, of which the last so many are learned."
    generator, found = torch.Generator().manual_seed(seed), []
    for length, learned in batch:
        ids = torch.randint(0, words, (length,), generator=generator)
        found.append((ids, torch.where(torch.arange(length) >= length - learned, ids, -100)))
    return found


def inputs(some: list, packed: bool) -> dict:
    "What the model is called with."
    if packed:
        counts = [len(ids) for ids, _ in some]
        return {"input_ids": torch.cat([ids for ids, _ in some])[None].cuda(),
                "labels": torch.cat([labels for _, labels in some])[None].cuda(),
                "position_ids": torch.cat([torch.arange(n) for n in counts])[None].cuda(),
                "packed_seq_lengths": torch.tensor(counts, dtype=torch.int32)}
    def filled(tensors, value): return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    mask = filled([torch.ones_like(ids) for ids, _ in some], 0)
    return {"input_ids": filled([ids for ids, _ in some], 0).cuda(), "attention_mask": mask.cuda(),
            "labels": filled([labels for _, labels in some], -100).cuda()}


def steps(model, optimizer, params: list, asked: dict, packed: bool) -> dict:
    "All steps one way, measured after the warm-up."
    seconds, losses, norms = [], [], []
    for n, batch in enumerate(asked["batches"]):
        torch.cuda.synchronize()
        start = time.perf_counter()
        given = inputs(examples(batch, asked["words"], n), packed)
        with torch.autocast("cuda", torch.bfloat16): loss = model(**given).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        norms.append(norm.item())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = [sum(length for length, _ in batch) for batch in asked["batches"]]
    return {"seconds": seconds[asked["warmup"]:], "tokens": tokens[asked["warmup"]:], "losses": losses, "norms": norms}


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    model = loaded(asked | {"sequence": 8192, "checkpointing": True})
    from unsloth.utils.packing import mark_allow_overlength
    mark_allow_overlength(model)
    params, ways, gib = [p for p in model.parameters() if p.requires_grad], {}, 2 ** 30
    for way, packed in asked["ways"].items():
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ways[way] = steps(model, optimizer, params, asked, packed) | {
            "peak_gib": torch.cuda.max_memory_allocated() / gib, "reserved_gib": torch.cuda.max_memory_reserved() / gib}
    print(json.dumps({"ways": ways, "version": unsloth.__version__}))


if __name__ == "__main__": main()
