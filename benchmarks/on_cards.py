"""One of the processes that benchmarks.gpus starts: a part's work, together with the others. Started by torchrun.

Weights are random, made a tensor at a time on the card; those of a base that is to be spread wait in host memory until
`shard_base` has cut them, so no card ever has more than a layer of it whole. Each row has its plan beside it.
"""
# ruff: noqa: E402  (a setting of torch has to stand before torch)
import argparse
import faulthandler
import gc
import json
import os
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from benchmarks.common import random_batch, random_model
from benchmarks.wire import bandwidths, held, memory, timed
from qlora_lab import plan
from qlora_lab.engine.allocator import CONTEXT_GIB
from qlora_lab.engine.dispatch import faster
from qlora_lab.engine.gpu import empty_cache
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.portion import share
from qlora_lab.engine.scaling import unknown
from qlora_lab.engine.sharded_base import shard_base
from qlora_lab.lora import trainable
from qlora_lab.processes import gathered, is_first, joined, own_card, sum_gradients, world
from qlora_lab.train import train_step

CARD = 24
GIB = 2 ** 30
SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False}
ADAPTERS = dict(rank=16, adapter_dtype="bfloat16", checkpointing=True)
LITTLE = dict(rank=4, adapter_dtype="float32", dtype="float32", device="cpu", sequence=32)


def planned(shape: str, tiny: bool, each: int, sharding: str = "none", offload: bool = False, **settings):
    "The plan of a step in which each card has so many examples; alone, a card has its base whole."
    more = dict(sharding=sharding, offload=offload) if world() > 1 else {}
    asked = ADAPTERS | settings | (LITTLE if tiny else {})
    return plan(SMALL if tiny else shape, **asked, **more, cards=world(), batch_size=each * world(), name=shape)


def capped(p) -> float | None:
    "Let torch take what a card of 24 GiB has, and the step's activations beside it; above that it is out of memory."
    if not torch.cuda.is_available(): return None
    gib = CARD - CONTEXT_GIB + max(m.activations for m in p.moments.values()) / GIB
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    torch.cuda.set_per_process_memory_fraction(min(1., gib / whole))
    return gib


def emptied() -> None:
    "Nothing left of what was measured before, and no cap."
    gc.collect()
    if not torch.cuda.is_available(): return
    torch.cuda.set_per_process_memory_fraction(1.)
    empty_cache()


def built(p) -> tuple:
    "The plan's model and optimizer, and the seconds that `shard_base` took."
    config, own, start = model_config(json.loads(p.config)), share(p.settings, world()), None
    if p.spread.sharding == "none": model, seconds = random_model(config, own, own.device), None
    else:
        model, start = random_model(config, own, own.device, home="cpu"), time.perf_counter()
        shard_base(model, offload=p.spread.offload)
        seconds = time.perf_counter() - start
        faster("fuse_layers", torch.device(own.device), model)
    bits, budget = own.optimizer_bits, own.device_budget
    return model, PagedAdamW(trainable(model), lr=1e-4, bits=bits, device_budget=budget), seconds


def errors(p, found: dict) -> dict:
    "A plan beside what was measured."
    said = {"planned_gib": p.total_gib, "planned_card_gib": p.card_gib, "moment": p.peak}
    if "measured_gib" in found: said["memory_error"] = p.total_gib / found["measured_gib"] - 1
    if not unknown(p): said |= {"planned_s": p.time.total, "time_error": p.time.total / found["step_s"] - 1}
    return said


def apart(model, step, p) -> dict:
    "Where each card has all of the base: each card's step with nothing to wait for, and the sum of gradients alone."
    found = {"recorded": bool(getattr(model.__dict__.get("_graph"), "graphs", None))}
    if world() == 1 or p.spread.sharding != "none": return found
    with patch("qlora_lab.train.sum_gradients", lambda _: None), patch("qlora_lab.train.total_of", lambda n, _: n):
        alone = timed(step, 3)
    for t in trainable(model): t.grad = torch.zeros_like(t)
    return found | {"alone_s": gathered(alone), "sum_s": timed(lambda: sum_gradients(trainable(model)), 3)}


def row(p, model, optimizer) -> dict:
    "Some steps of a model."
    own, cards = share(p.settings, world()), world()
    batch = random_batch(own.batch_size, own.sequence, own.learned)
    learned = cards * own.accumulation * int((batch["labels"][:, 1:] != -100).sum())
    batches = [{k: t.to(own.device) for k, t in batch.items()}] * own.accumulation
    def step(): return train_step(model, optimizer, batches, 1e-4, 0.3, learned)
    loss, _ = step()
    if "_graph" in model.__dict__: model._graph.clear()  # a replay takes memory without asking
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, 3)
    found = {"model": p.model, "cards": cards, "each": own.batch_size * own.accumulation, "sequence": own.sequence,
             "settings": asdict(p.settings), "spread": asdict(p.spread), "loss": loss, "step_s": seconds,
             "tokens_per_s": cards * own.batch_size * own.accumulation * own.sequence / seconds, "held": held(model)}
    found |= memory()
    return found | errors(p, found) | apart(model, step, p)


def rows(shape: str, tiny: bool, sizes: tuple[int, ...], cap: bool = False, **settings) -> list[dict]:
    "Steps of one model with so many examples on each card."
    emptied()
    plans = [planned(shape, tiny, each, **settings) for each in sizes]
    limit = capped(max(plans, key=lambda p: p.total_gib)) if cap and world() > 1 else None
    with warnings.catch_warnings(record=True) as said:
        model, optimizer, seconds = built(plans[0])
        found = [row(p, model, optimizer) | {"shard_base_s": seconds, "cap_gib": limit} for p in plans]
    for each in found: each["notices"] = sorted({str(w.message) for w in said})
    faster("forget", torch.device(plans[0].settings.device), model)  # its memory, before the next
    return found


def shard65(tiny: bool, offload: bool = False) -> list[dict]:
    "65 billion weights under the cap, an example each and eight."
    return rows("llama-65b", tiny, (1, 8), cap=True, sharding="full", offload=offload)


def alone(tiny: bool) -> list[dict]:
    "One card with the work of one of two, and the whole base."
    return [*rows("llama-3-8b", tiny, (4,), sequence=2048), *rows("qwen3-32b", tiny, (2,), sequence=2048),
            *rows("llama-65b", tiny, (1, 8))]


def plans(tiny: bool) -> list[dict]:
    "Further steps: another rank, gradients accumulated, the base whole and spread."
    return [*rows("llama-7b", tiny, (1,), rank=64, sharding="full"),
            *rows("llama-3-8b", tiny, (4,), sequence=1024),
            *rows("llama-3-8b", tiny, (4,), sequence=1024, sharding="full"),
            *rows("qwen3-8b", tiny, (1,), accumulation=4, sequence=1024, sharding="full", offload=True)]


def peers(tiny: bool) -> dict:
    "Ours, then theirs, on the same work."
    from benchmarks.fsdp_peer import changed_by_copying, peer_row
    ours = rows("qwen3-32b", tiny, (2,), sequence=2048, sharding="full")[0]
    emptied()
    p = planned("qwen3-32b", tiny, 2, sequence=2048)
    theirs = peer_row(model_config(json.loads(p.config)), share(p.settings, world()))
    tokens = world() * ours["each"] * ours["sequence"]
    return {"ours": ours, "theirs": theirs | {"tokens_per_s": tokens / theirs["step_s"]},
            "ratio": theirs["step_s"] / ours["step_s"], "changed_by_copying": changed_by_copying(p.settings.device)}


PARTS = {"wire": bandwidths, "ddp": lambda tiny: rows("llama-3-8b", tiny, (4,), sequence=2048), "shard65": shard65,
         "offload65": partial(shard65, offload=True), "peers": peers, "plans": plans, "alone": alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--limit", type=float, help="seconds after which a process says where it stands")
    args = parser.parse_args()
    if args.limit: faulthandler.dump_traceback_later(args.limit)
    if not (args.tiny or torch.cuda.is_available()): raise SystemExit("this benchmark needs GPUs, or --tiny")
    with joined(own_card(torch.device("cpu" if args.tiny else "cuda")), wait=240):
        found = PARTS[args.part](args.tiny)
        if is_first(): args.to.write_text(json.dumps(found))


if __name__ == "__main__": main()
