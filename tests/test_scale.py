"""Several processes, one run: the steps, the bytes and the files of one process, and what may not differ."""
import json
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from several import several
from torch import nn

from qlora_lab.data import collate, encode
from qlora_lab.dealing import dealt, learned
from qlora_lab.lora import add_lora, trainable
from qlora_lab.model import load_model
from qlora_lab.processes import hash_of, rank, sum_gradients, world
from qlora_lab.records import LabError
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters, summed_loss, train

lesson = import_module("qlora_lab.train")
SHORT = dict(steps=20, batch_size=3, accumulation=2, rank=4, eval_examples=8, eval_prompts=1, lr=2e-3, eval_every=10)


@pytest.fixture(scope="module")
def group():
    with several() as run: yield run


def trained(tiny, data, folder, stop=None, **settings):
    "Train, in however many processes; what each of them has afterwards."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32, device="cpu")
    config = TrainConfig(folder=str(folder), **SHORT | settings)
    if stop:
        class Ends:
            def on_start(self, outset): pass
            def on_step(self, row):
                if row["step"] == stop: raise KeyboardInterrupt
            def on_evaluation(self, row): pass
            def on_end(self, run): pass
        try: train(model, tokenizer, data, config, progress=False, watchers=[Ends()])
        except KeyboardInterrupt: return "ended"
    made = train(model, tokenizer, data, config, progress=False)
    return {"losses": made.losses, "held": made.held_out, "before": made.before.loss, "after": made.after.loss,
            "adapter": hash_of(trainable(model)), "world": world(), "answers": made.record["answers"]}


@pytest.fixture(scope="module")
def alone(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return trained(tiny, data, folder), load_file(folder / "adapter" / "adapter_model.safetensors")


def close(made, alone, folder, within=1e-5):
    "Losses of one process, and its adapter within the rounding of float32."
    assert max(abs(a - b) for a, b in zip(made["losses"], alone[0]["losses"], strict=True)) < within
    assert abs(made["before"] - alone[0]["before"]) < 1e-5 and abs(made["after"] - alone[0]["after"]) < 1e-4
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == alone[1].keys()
    assert all(torch.allclose(adapter[k], alone[1][k], atol=1e-3) for k in adapter)


@pytest.mark.parametrize("count", [2, 3])
def test_several_take_the_steps_of_one(count, group, alone, tiny, data, tmp_path):
    "Losses of 20 steps within 1e-5 in float32; all end with the same bytes; each line and file is written once."
    made = group(count, trained, tiny, data, tmp_path / "run")
    assert {m["world"] for m in made} == {count} and all(m == made[0] for m in made)
    close(made[0], alone, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "done"
    assert not list((tmp_path / "run").glob(".*"))  # no lock, nothing half


def test_going_on_with_another_number_of_processes(group, alone, tiny, data, tmp_path):
    "Two begin, one goes on, three end it: the run of one."
    folder, how = tmp_path / "run", dict(checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt): group(2, cut_short, tiny, data, folder, 6, how)
    trained(tiny, data, folder, stop=11, **how)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 11
    made = group(3, trained, tiny, data, folder, None)
    close(made[0], alone, folder)


def cut_short(tiny, data, folder, stop, how):
    "All processes end after a step, as by a signal."
    def ends(*args, real=lesson.one_step):
        if args[-1] == stop: raise KeyboardInterrupt
        return real(*args)
    with patch.object(lesson, "one_step", ends): return trained(tiny, data, folder, **how)


@pytest.mark.parametrize("how", [dict(packing=True), dict(checkpointing=True), dict(pass_size=1),
                                 dict(optimizer_bits=8, device_budget=1), dict(method="dora")],
                         ids=lambda how: next(iter(how)))
def test_with_other_settings(how, group, tiny, data, tmp_path):
    made = group(2, with_settings, tiny, data, tmp_path / "two", how | {"steps": 6})
    one = trained(tiny, data, tmp_path / "one", **how | {"steps": 6})
    assert made[0] == made[1]
    assert max(abs(a - b) for a, b in zip(made[0]["losses"], one["losses"], strict=True)) < 2e-5


def with_settings(tiny, data, folder, how): return trained(tiny, data, folder, **how)


def by_torch(tiny, data):
    "One step's gradients by DistributedDataParallel and by the lab's sum."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32, device="cpu")
    config = TrainConfig(**SHORT)
    model = attach_adapters(model, config).train()
    learn = encode(tokenizer, data.train[:6], 256, "refuse", say=lambda line: None)
    chosen, lengths = [[0, 1, 2], [3, 4, 5]], [len(t.ids) for t in learn]
    batches = [collate([learn[i] for i in some]) for some in dealt(chosen, lengths, 3)]
    total = learned(learn, chosen)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
        def forward(self, batch): return summed_loss(self.model, batch) / total

    parallel = nn.parallel.DistributedDataParallel(Loss())
    for batch in batches: parallel(batch).backward()
    theirs = [p.grad * world() for p in trainable(model)]  # it takes the mean over processes
    model.zero_grad()
    for batch in batches: (summed_loss(model, batch) / total).backward()
    sum_gradients(trainable(model))
    return max((a - p.grad).abs().max().item() for a, p in zip(theirs, trainable(model)))


def test_gradients_are_those_of_distributed_data_parallel(group, tiny, data):
    assert max(group(2, by_torch, tiny, data)) < 1e-6


def differing(tiny, data, folder, what):
    "The second process has something else."
    config, other = TrainConfig(folder=str(folder), **SHORT), what if rank() == 1 else None
    if other == "seed": config = replace(config, seed=1)
    if other == "data": data = replace(data, train=data.train[1:])
    def old(): return {"torch": "1.0"}
    def by_chance(model, lora, seed, dtype): return add_lora(model, lora, 7, dtype)
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32, device="cpu")
    with ExitStack() as changed:
        if other == "versions": changed.enter_context(patch("qlora_lab.same_run.versions", old))
        if other == "adapters": changed.enter_context(patch.object(lesson, "add_lora", by_chance))
        try: train(model, tokenizer, data, config, progress=False)
        except LabError as e: return str(e)


@pytest.mark.parametrize(("what", "named"), [
    ("seed", "another seed (1) than process 0 (0)"), ("data", "another data"), ("versions", "another versions"),
    ("adapters", "beginning of what learns")])
def test_what_differs_is_refused_before_the_first_step(what, named, group, tiny, data, tmp_path):
    "By all processes, in one sentence; nothing is written."
    said = group(2, differing, tiny, data, tmp_path / "run", what)
    assert said[0] == said[1] and named in said[0] and "process 1" in said[0]
    assert not (tmp_path / "run" / "run.json").exists()
