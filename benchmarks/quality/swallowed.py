"""What bfloat16 swallows, in training: the same runs with sums of four kinds, over rates, warm-ups and seeds.

Four ways to add an adapter to its layer (nbs/engine/swallowed): in float32, the control; in bfloat16 in one product, as
fused layers do; onto an array that is rounded already; apart, as PEFT's and the lab's plain layers do. For each run the
loss of every step, the held-out loss as it was trained and with the same adapter in float32, and at some steps what of
each layer's update would arrive. A cell lies in a file of its own, so that the study goes on where it was cut short.
"""
import json
import os
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.quality.record import TF32, keep
from benchmarks.quality.rows import data_sets
from qlora_lab.assets import SMOLLM2
from qlora_lab.data import collate, tokenize
from qlora_lab.engine.dispatch import faster, standing_in
from qlora_lab.engine.swallowed import swallowed
from qlora_lab.loading import best_device
from qlora_lab.methods import trained_tensors
from qlora_lab.model import load_model
from qlora_lab.rates import make_optimizer
from qlora_lab.records import LabError, read_json, write_whole
from qlora_lab.scoring import spread
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters, one_step, score

SUMS = "float32", "one product", "onto", "apart"
PLANS = [(1e-5, 5), (5e-5, 5), (5e-4, 0), (5e-4, 5), (5e-4, 20), (2e-3, 5)]  # rate, steps of warm-up
USUAL = PLANS[3]
SEEDS = range(4)
ASKED = 1, 2, 3, 5, 10, 20, 50, 100  # steps after which each layer is asked
STEPS, HELD, PROBE = 100, 64, 4


def plain(device: torch.device, way: str):
    "A block in which adapters are added as a way says; fused layers do it in one product."
    left = {"one product": (), "float32": (), "onto": ("fuse_layers",), "apart": ("fuse_layers", "adapted_linear")}[way]
    return standing_in({(operation, device.type): None for operation in left}) if left else nullcontext()


class Rig:
    "What the cells of one process share: data, and a float32 model by which adapters are judged."
    def __init__(self, name: str, quick: bool):
        self.name, self.quick, self.device, data = name, quick, best_device(), data_sets()["docstrings"]
        self.judge, self.tokenizer = self.opened(torch.float32)
        with plain(self.device, "apart"): self.judge = attach_adapters(self.judge, TrainConfig()).train()
        self.learn = [tokenize(self.tokenizer, e) for e in data.train]
        self.held = [tokenize(self.tokenizer, e) for e in spread(data.held_out, 4 if quick else HELD)]
        self.probe = {"input_ids": collate(self.held[:PROBE])["input_ids"].to(self.device)}

    def opened(self, dtype): return load_model(self.name, compute_dtype=dtype, dtype=dtype, device=self.device)

    def judged(self, model) -> float:
        "Held-out loss of a model's adapter in float32."
        own = trained_tensors(self.judge)
        for n, t in trained_tensors(model).items(): own[n].data.copy_(t)
        return score(self.judge, self.held).loss

    def asked(self, model) -> dict:
        "By kind of layer and way, what arrives: means over the layers of a kind."
        own = trained_tensors(self.judge)
        for n, t in trained_tensors(model).items(): own[n].data.copy_(t)
        rows = defaultdict(list)
        for name, arrivals in swallowed(self.judge, self.probe).items():
            for way, a in arrivals.items(): rows[name.rpartition(".")[2], way].append(a)
        return {f"{kind}, {way}": [round(sum(v) / len(each), 4) for v in zip(*each)]
                for (kind, way), each in rows.items()}

    def cell(self, way: str, plan: tuple[float, int], seed: int) -> dict:
        "One run."
        steps = 3 if self.quick else STEPS
        config = TrainConfig(lr=plan[0], warmup=plan[1], seed=seed, steps=steps, batch_size=2 if self.quick else 8,
                             accumulation=1)
        model = self.opened(torch.float32 if way == "float32" else torch.bfloat16)[0]
        with plain(self.device, way):
            model = attach_adapters(model, config).train()
            optimizer, rows, arrivals = make_optimizer(model, config), [], {}
            for k in range(steps):
                rows.append(one_step(model, optimizer, self.learn, config, k))
                if k + 1 in ASKED: arrivals[str(k + 1)] = self.asked(model)
            held = score(model, self.held).loss
            faster("forget", self.device, model)
        return {"losses": [round(r["loss"], 4) for r in rows], "norms": [round(r["grad_norm"], 3) for r in rows],
                "held_out": round(held, 5), "held_out_in_float32": round(self.judged(model), 5), "arrivals": arrivals}


@contextmanager
def in_float32():
    "A block whose processes, and whose record, have products of float32: the control is in float32, products too."
    with patch.dict(os.environ):
        os.environ.pop(TF32, None)
        yield


def key(way: str, plan: tuple[float, int], seed: int) -> str: return f"{way}, {plan[0]:g}, {plan[1]}, {seed}"


def at_work(todo, folder: Path, name: str, quick: bool, threads: int) -> None:
    "What a process does: take cells from a queue until it is empty."
    torch.set_num_threads(threads)
    rig = Rig(name, quick)
    while (one := todo.get()) is not None:
        write_whole(folder / f"{key(*one)}.json", json.dumps(rig.cell(*one)))
        if torch.cuda.is_available(): torch.cuda.empty_cache()


def study(bench) -> None:
    "Every cell that is not there yet, and the record."
    folder = bench.folder.parent / f"{bench.folder.name}_swallowed"
    plans, seeds = ([USUAL], range(1)) if bench.quick else (PLANS, SEEDS)
    cells = [one for one in product(SUMS, plans, seeds) if one[0] != "onto" or one[1] == USUAL]
    todo = [one for one in cells if not (folder / f"{key(*one)}.json").exists()]
    if todo: _share(todo, folder, bench)
    paths = {key(*one): folder / f"{key(*one)}.json" for one in cells}
    made = {name: read_json(path) for name, path in paths.items() if path.exists()}
    result = {"steps": STEPS, "held_out_examples": HELD, "probe_examples": PROBE, "key":
         "sum, rate, steps of warm-up, seed", "arrivals": "unchanged, kept, size", "cells": made}
    with in_float32(): keep("quality_swallowed", result, bench.quick)
    if len(made) < len(cells): raise KeyboardInterrupt


def _share(todo: list, folder: Path, bench) -> None:
    "Processes that share the cells; when they are interrupted, what is done stays."
    spawn = get_context("spawn")
    queue, count = spawn.Queue(), min(bench.workers, len(todo))
    for one in [*todo, *[None] * count]: queue.put(one)
    args = queue, folder, str(bench.model or SMOLLM2), bench.quick, max(1, torch.get_num_threads() // count)
    processes = [spawn.Process(target=at_work, args=args, daemon=True) for _ in range(count)]
    try:
        with in_float32():
            for p in processes: p.start()
        for p in processes: p.join()
        broken = sum(p.exitcode != 0 for p in processes)
        if broken: raise LabError(f"{broken} of {count} processes broke off; what is done is kept")
    except KeyboardInterrupt: print("swallowed: cut short", flush=True)
    finally:
        for p in processes:
            if p.is_alive(): p.terminate()
            p.join()
