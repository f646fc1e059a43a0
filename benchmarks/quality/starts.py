"""Starts of adapters before any training: the error of each layer, and the held-out loss, of SmolLM2 on a CPU.

    python -m benchmarks.quality.starts          # took 24 minutes on two busy cores

Each start is put on the model in NF4 with double quantization (nbs/engine/repair). The error is that of the weight
that a layer multiplies with, as a share of the weight; the loss is that of held-out docstrings, kept by module, so that
starts can be compared in pairs. Writes benchmarks/results/quality_starts.json after each start.
"""
import argparse
import time

import torch

from benchmarks.common import save_result
from benchmarks.quality.record import by_group
from benchmarks.quality.rows import data_sets
from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.assets import SMOLLM2
from qlora_lab.casting import empty_twin
from qlora_lab.data import tokenize
from qlora_lab.engine.repair import put, start_of
from qlora_lab.merged_weights import base_numbers, update_of
from qlora_lab.model import load_model
from qlora_lab.original_base import OriginalBase
from qlora_lab.scoring import spread
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters, score

STARTS = "16 bits", "default", "loftq", "loftq5", "eora", "qpissa", "wrong order"


@torch.no_grad()
def taken_in_the_wrong_order(model) -> None:
    "QPiSSA of a base that is in 4 bits already."
    for layer in adapted_layers(model).values():
        q = layer.base_layer.quantized
        put(layer, *start_of("qpissa", q.dequantize(torch.float32), q, len(layer.lora_A.weight)))


def started(name: str, data, rank: int) -> tuple:
    "A model with its adapters as they begin, and the tokenizer."
    how = {"compute_dtype": torch.float32, "dtype": torch.float32, "device": "cpu"}
    model, tokenizer = load_model(SMOLLM2, quantize=None if name == "16 bits" else "nf4", **how)
    init = name if name in ("loftq", "loftq5", "eora", "qpissa") else "default"
    learn = [tokenize(tokenizer, e) for e in data.train[:64]]
    attach_adapters(model, TrainConfig(init=init, rank=rank, folder="runs/starts"), learn)
    if name == "wrong order": taken_in_the_wrong_order(model)
    return model, tokenizer


@torch.no_grad()
def errors(model, original: OriginalBase) -> dict[str, float]:
    "By kind of layer: |W - (base + s B A)| over |W|, of all layers of the kind together."
    off, whole = {}, {}
    for name, layer in adapted_layers(model).items():
        kind, w = name.rpartition(".")[2], original.weight(name, layer.base_layer).float()
        off[kind] = off.get(kind, 0.) + (base_numbers(layer.base_layer) + update_of(layer) - w).square().sum().item()
        whole[kind] = whole.get(kind, 0.) + w.square().sum().item()
    return {kind: round((off[kind] / whole[kind]) ** 0.5, 5) for kind in off}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--examples", type=int, default=96, help="held-out ones")
    ask.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    asked = ask.parse_args()
    data, found, groups, start = data_sets()["docstrings"], {}, None, time.perf_counter()
    for rank in asked.ranks:
        for name in STARTS if rank == asked.ranks[0] else [s for s in STARTS if s not in ("16 bits", "default")]:
            model, tokenizer = started(name, data, rank)
            original = OriginalBase(SMOLLM2, empty_twin(model, torch.float32))
            s = score(model, [tokenize(tokenizer, e) for e in spread(data.held_out, asked.examples)])
            parts = by_group(s)
            groups = {"names": list(parts), "tokens": [v[1] for v in parts.values()]}
            found[f"{name}, rank {rank}"] = {"loss": round(s.loss, 5), "nats": [round(v[0], 3) for v in parts.values()],
                                             "errors": errors(model, original)}
            print(f"{name}, rank {rank}: {s.loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
            save_result("quality_starts", {"examples": asked.examples, "groups": groups, "starts": found})


if __name__ == "__main__": main()
