"""Ways to merge an adapter into a model in 4 bits, compared on held-out answers: python -m benchmarks.merging.

SmolLM2 in NF4 learns the docstrings of Python's standard library (--run FOLDER keeps and reuses that training), then
some more steps two ways from the same adapter: as before, and through the quantizer. Every way to merge is held against
the adapter that it merges. Results: results/merging.json, or --name; the example's sums of each way are in it, so that
lesson 13 computes its own intervals. What there is of them lies in NAME_so_far.json until all is there. On a GPU add
--device cuda.
"""
import argparse
import copy
import gc
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.common import RESULTS, save_result
from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.assets import smollm2_folder
from qlora_lab.data import default_split, tokenize
from qlora_lab.divergence import agreement, divergence, gain_kept, said
from qlora_lab.engine.merge_aware import through_quantizer
from qlora_lab.lora import load_adapter, save_adapter, trainable
from qlora_lab.merged_weights import base_numbers, update_of
from qlora_lab.model import answer, load_model
from qlora_lab.runs import TrainConfig
from qlora_lab.scoring import spread
from qlora_lab.ship import ROUNDINGS, WITH_DATA, merge, merged_4bit, survival
from qlora_lab.train import one_step, train

RATIOS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # length of an update over that of its weight


class Bench:
    "The model as it is opened for each way, the examples, and what has been found."
    def __init__(self, asked):
        self.asked, self.split = asked, default_split()
        self.how = dict(device=asked.device, dtype=torch.float32, compute_dtype=torch.float32)
        folder = asked.run or tempfile.mkdtemp()
        self.config = TrainConfig(folder=folder, steps=asked.steps, eval_examples=asked.examples)
        model, self.tokenizer = load_model(**self.how)
        self.held = [tokenize(self.tokenizer, e) for e in spread(self.split.held_out, asked.examples)]
        self.prompts = spread(self.split.held_out, asked.prompts)
        self.untrained, self.start = said(model, self.held), time.perf_counter()
        self.ways, self.result = {}, {}  # what has been found

    def keep(self, name):
        "Write it."
        done = {"ways": self.ways, "settings": vars(self.asked) | {"run": None}}
        return save_result(name, self.result | done | {"seconds": time.perf_counter() - self.start})

    def adapted(self, adapter):
        "The 4-bit model with an adapter."
        gc.collect()
        return load_adapter(load_model(**self.how)[0], adapter)

    def answers(self, model): return answer(model, self.tokenizer, [e.prompt for e in self.prompts])

    def note(self, name, model, trained, answers):
        "What a merged model says, beside what it was merged from."
        start = time.perf_counter()
        found, texts = said(model, self.held), self.answers(model)
        kept, kl = gain_kept(self.untrained.score, trained.score, found.score), divergence(trained, found)
        changed = [a != b for a, b in zip(answers, texts, strict=True)]
        self.ways[name] = {"loss_sums": found.score.sums, "kl_sums": kl.sums, "agreement": agreement(trained, found),
                           "changed": changed, "answers": texts[:8]}
        self.keep(f"{self.asked.name}_so_far")
        print(f"{name:34} loss {found.score.loss:.4f}  keeps {kept[0]:7.1%} ± {kept[1]:.1%}  KL {kl.loss:.5f} ± "
              f"{kl.stderr:.5f}  answers changed {sum(changed) / max(1, len(changed)):.0%}  "
              f"({time.perf_counter() - start:.0f} s)", flush=True)


def more_steps(bench, adapter, out, rounding=None, lr=None):
    "Go on from an adapter, as before or through the quantizer; the adapter's folder and the losses."
    model, asked = bench.adapted(adapter).train(), bench.asked
    for n, p in model.named_parameters(): p.requires_grad_("lora_" in n)
    if rounding: through_quantizer(model, rounding)
    config = replace(bench.config, lr=lr or asked.lr_more, warmup=0)
    learn = [tokenize(bench.tokenizer, e) for e in bench.split.train]
    optimizer = torch.optim.AdamW(trainable(model), weight_decay=0)
    rows = [one_step(model, optimizer, learn, config, asked.steps + k) for k in range(asked.more)]
    save_adapter(model, out)
    return out, [r["loss"] for r in rows]


IN_16 = {"dequantized, float32": dict(dtype=torch.float32), "dequantized, bfloat16": dict(dtype=torch.bfloat16),
         "original, bfloat16": dict(how="original")}
IN_4 = {f"4bit, {rounding}": dict(how="4bit", rounding=rounding) for rounding in (*ROUNDINGS, WITH_DATA)}


def plain_ways(bench, adapter, trained, answers, ways, label=""):
    "Some ways to merge one adapter."
    data = [tokenize(bench.tokenizer, e) for e in spread(bench.split.train, bench.asked.calibration)]
    for name, how in ways.items():
        if how.get("rounding") == WITH_DATA: how = how | {"data": data}
        if how.get("how") == "original": how = how | {"base": smollm2_folder()}
        start = time.perf_counter()
        model = merge(bench.adapted(adapter), **how)
        if model.dtype == torch.bfloat16: model.float()  # the weights were rounded; products stay in float32
        seconds = time.perf_counter() - start
        bench.note(label + name, model, trained, answers)
        bench.ways[label + name]["seconds"] = seconds  # opened and merged


def by_peft(bench, adapter, trained, answers):
    "PEFT's merge_and_unload: on bitsandbytes' layers, and on the 16-bit base."
    from peft import PeftModel
    bases = {"PEFT, bitsandbytes 4 bit": dict(backend="bnb"), "PEFT, 16-bit base": dict(quantize=None)}
    for name, how in bases.items():
        model = load_model(**bench.how, **how)[0]
        if "16-bit" in name: model.bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        bench.note(name, model.float() if "16-bit" in name else model, trained, answers)


def ratios_of(model):
    "Length of each layer's update over that of its weight."
    def ratio(m): return (update_of(m).norm() / base_numbers(m.base_layer).norm()).item()
    return {n: ratio(m) for n, m in adapted_layers(model).items()}


def curve(bench, adapter, every=30):
    "How much of an update survives in 4 bits: some layers, their trained updates stretched to each length."
    model, found = bench.adapted(adapter), {r: {} for r in ROUNDINGS}
    layers = list(adapted_layers(model).values())[::every]
    for wanted in RATIOS:
        for rounding in ROUNDINGS:
            kept, off = [], []
            for m in layers:
                m, base = copy.deepcopy(m), base_numbers(m.base_layer)
                m.lora_B.weight.data *= wanted * base.norm() / update_of(m).norm()
                after, update = merged_4bit(m, rounding).dequantize(torch.float32), update_of(m)
                kept.append(survival(base, after, update))
                off.append(((after - base - update).norm() / base.norm()).item())
            found[rounding][str(wanted)] = {"survival": kept, "error": off}
    return found


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--steps", type=int, default=150)
    ask.add_argument("--more", type=int, default=30, help="steps through the quantizer")
    ask.add_argument("--lr-more", type=float, default=5e-4, help="rate of these")
    ask.add_argument("--examples", type=int, default=96)
    ask.add_argument("--prompts", type=int, default=24)
    ask.add_argument("--calibration", type=int, default=64, help="training examples that calibrated codes see")
    ask.add_argument("--run", help="folder of the training, kept and reused")
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--name", default="merging")
    bench = Bench(asked := ask.parse_args())
    where, result = Path(tempfile.mkdtemp()), bench.result
    model = load_model(**bench.how)[0]
    run = train(model, bench.tokenizer, bench.split, bench.config, progress=False)
    adapter = Path(run.folder) / "adapter"
    model = bench.adapted(adapter)
    trained, answers, ratios = said(model, bench.held), bench.answers(model), ratios_of(model)
    print(f"untrained {bench.untrained.score}, trained {trained.score}", flush=True)
    for name, how in {"untrained, NF4": {}, "untrained, 16-bit base": dict(quantize=None)}.items():
        bench.note(name, load_model(**bench.how, **how)[0], trained, answers)
    plain_ways(bench, adapter, trained, answers, IN_16 | IN_4)
    by_peft(bench, adapter, trained, answers)
    result |= {"trained": asdict(trained.score), "untrained": asdict(bench.untrained.score), "ratios": ratios,
               "curve": curve(bench, adapter), "more": {}}
    longer, losses = more_steps(bench, adapter, where / "longer")
    model = bench.adapted(longer)
    reference, answers = said(model, bench.held), bench.answers(model)
    result |= {"longer": asdict(reference.score), "ratios_longer": ratios_of(model)}
    result["more"]["as before"] = losses
    print(f"trained on {reference.score}", flush=True)
    plain_ways(bench, longer, reference, answers, IN_4, "longer: ")
    for rounding in ROUNDINGS:
        aware, losses = more_steps(bench, adapter, where / rounding, rounding)
        result["more"][rounding] = losses
        model = merge(bench.adapted(aware), how="4bit", rounding=rounding)
        bench.note(f"merge-aware, {rounding}", model, reference, answers)
    print(bench.keep(asked.name))
    (RESULTS / f"{asked.name}_so_far.json").unlink(missing_ok=True)


if __name__ == "__main__": main()
