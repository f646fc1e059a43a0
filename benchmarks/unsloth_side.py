"""A training step in Unsloth, for benchmarks.fast: a process of its own, since importing Unsloth changes transformers.

    python benchmarks/unsloth_side.py '{"folder": ..., "batch": 16, "sequence": 512, "checkpointing": true, ...}'

Unsloth is used as its users do, from a folder with a 4-bit checkpoint and a tokenizer. What it prints last is JSON.
"""
# ruff: noqa: E402, F401  (Unsloth wants to be imported first)
import json
import os
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
import unsloth

# isort: split
import gc
import statistics

import torch
from unsloth import FastLanguageModel


def loaded(asked: dict):
    "The model with adapters, ready to train."
    longest = max(asked["sequence"], 2048)
    model, _ = FastLanguageModel.from_pretrained(asked["folder"], max_seq_length=longest, dtype=torch.bfloat16,
                                                 load_in_4bit=True)
    kept = "unsloth" if asked["checkpointing"] else False
    model = FastLanguageModel.get_peft_model(model, r=asked["rank"], lora_alpha=16, lora_dropout=0, bias="none",
                                             target_modules=asked["targets"], use_gradient_checkpointing=kept,
                                             random_state=0)
    FastLanguageModel.for_training(model)
    return model


def measured(step, masked: bool, asked: dict) -> tuple[list[float], list[tuple[float, float]]]:
    "Seconds of the measured steps; loss and gradient's length of all."
    seconds, said = [], []
    for _ in range(asked["warmup"] + asked["rounds"]):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        said.append(step(masked))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[asked["warmup"]:], said


def main() -> None:
    asked = json.loads(sys.argv[1])
    start = time.perf_counter()
    whole = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    if asked["card_gib"]: torch.cuda.set_per_process_memory_fraction(min(1., asked["card_gib"] / whole))
    model = loaded(asked)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    ids = torch.randint(0, asked["words"], (asked["batch"], asked["sequence"]),
                        generator=torch.Generator().manual_seed(0)).cuda()

    def step(masked: bool) -> tuple[float, float]:
        mask = torch.ones_like(ids) if masked else None
        with torch.autocast("cuda", torch.bfloat16): loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    loading, ways, failed = time.perf_counter() - start, {}, None
    for masked in (True, False):  # the faster counts: which attention is chosen depends on the mask
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try: seconds, said = measured(step, masked, asked)
        except torch.OutOfMemoryError as e:
            failed = e
            continue
        gib = 2 ** 30
        ways[masked] = {"seconds": seconds, "losses": [loss for loss, _ in said],
                        "norms": [norm for _, norm in said], "peak_gib": torch.cuda.max_memory_allocated() / gib,
                        "reserved_gib": torch.cuda.max_memory_reserved() / gib, "mask of ones": masked}
    if not ways: raise failed
    best = min(ways.values(), key=lambda way: statistics.median(way["seconds"]))
    print(json.dumps(best | {"loading_s": loading, "version": unsloth.__version__}))


if __name__ == "__main__": main()
