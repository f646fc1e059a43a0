"""What a training step through the quantizer costs beside a plain one: python -m benchmarks.merge_aware.

SmolLM2 in NF4, float32 on the CPU, the course's batches; the three ways take turns, so that a slow minute of the
machine hits all of them. Result: results/merge_aware.json, which the engine page *merge-aware* reads.
"""
import argparse
from itertools import count

import torch

from benchmarks.common import interleaved, save_result, spread_of
from qlora_lab.data import default_split, tokenize
from qlora_lab.engine.merge_aware import through_quantizer
from qlora_lab.lora import trainable
from qlora_lab.model import load_model
from qlora_lab.runs import TrainConfig
from qlora_lab.ship import ROUNDINGS
from qlora_lab.train import attach_adapters, one_step


def stepper(config, device, rounding=None):
    "A call that takes the next step of training, plainly or through the quantizer."
    model, tokenizer = load_model(device=device, dtype=torch.float32, compute_dtype=torch.float32)
    model = attach_adapters(model, config).train()
    if rounding: through_quantizer(model, rounding)
    learn = [tokenize(tokenizer, e) for e in default_split().train]
    optimizer, taken = torch.optim.AdamW(trainable(model), weight_decay=0), count()
    return lambda: one_step(model, optimizer, learn, config, next(taken))["loss"]


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--device", default="cpu")
    asked, config = ask.parse_args(), TrainConfig()
    ways = {"plain": None, **{rounding: rounding for rounding in ROUNDINGS}}
    times = interleaved({name: stepper(config, asked.device, rounding) for name, rounding in ways.items()},
                        asked.rounds)
    for name, seconds in times.items(): print(f"{name:10} {spread_of(seconds)}")
    print(save_result("merge_aware", {"seconds": times, "settings": vars(asked)}))


if __name__ == "__main__": main()
