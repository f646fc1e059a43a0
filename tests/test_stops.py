"""A run that cannot go on ends at that step: examples and layer named, the last good checkpoint kept, never "done"."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_llama
from qlora_lab import TrainConfig, load_model, train
from qlora_lab.checkpoints import saved_step
from qlora_lab.data import Split, pair
from qlora_lab.nonfinite import NotFinite, Watch, all_finite, few, located, told
from qlora_lab.records import LabError, read_json
from qlora_lab.train import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
POISON = 17  # line of the example that spoils a step


def rows(n=24):
    return [pair(f"sort the list {i}", "read the file" + " ~" * (i == POISON), f"g{i}", f"mine.jsonl:{i}")
            for i in range(n)]


DATA = Split(rows(), [pair("close a socket", "return the sum", f"h{i}", f"held.jsonl:{i}") for i in range(4)])


def config(folder, **other):
    return TrainConfig(**dict(folder=folder, steps=12, batch_size=4, accumulation=1, rank=2, lr=1e-3, eval_prompts=0,
                              checkpoint_every=1, warmup=0) | other)


def opened(tiny): return load_model(tiny, device="cpu", compute_dtype=torch.float32)


def stopped(model, tokenizer, settings, data=DATA):
    with pytest.raises(NotFinite) as e: train(model, tokenizer, data, settings, progress=False)
    assert "\n" not in str(e.value)
    return e.value


def sound(folder):
    "Nothing that lies in a run's folder is not finite, and it is not done."
    for path in folder.rglob("*.safetensors"): assert all_finite(list(load_file(path).values())), path
    for line in (folder / "metrics.jsonl").read_text().splitlines(): assert "NaN" not in line and "Inf" not in line
    assert read_json(folder / "run.json")["state"] == "running"
    assert not (folder / "adapter").exists() and not (folder / "manifest.json").exists()


def spoil_token(model, tokenizer):
    "A word of one example alone whose embedding is infinite."
    bad = tokenizer("~", add_special_tokens=False).input_ids[-1]
    def hook(module, args, out): return out.masked_fill((args[0] == bad)[..., None], float("inf"))
    model.model.embed_tokens.register_forward_hook(hook)


def test_a_loss_that_is_nan_names_step_example_and_layer(tiny, tokenizer, tmp_path):
    model, _ = opened(tiny)
    spoil_token(model, tokenizer)
    e = stopped(model, tokenizer, config(tmp_path / "run"))
    step = e.at["step"]
    assert e.at["alone"] == [f"mine.jsonl:{POISON}"] and f"mine.jsonl:{POISON}" in str(e) and len(e.at["examples"]) == 4
    assert e.at["layer"] == "model.embed_tokens" and e.at["layer"] in str(e) and e.at["way"] == "forward"
    assert str(e).startswith(f"step {step}: ") and saved_step(tmp_path / "run") == step - 1
    sound(tmp_path / "run")
    assert read_json(tmp_path / "run" / "run.json")["stopped"] == e.at


def test_it_stops_there_again_and_ends_where_the_cause_is_gone(tiny, tokenizer, tmp_path):
    "The step follows from the seed, so a second try meets it too; with the model mended the same run ends."
    at = []
    for _ in range(2):
        model, _ = opened(tiny)
        spoil_token(model, tokenizer)
        at.append(stopped(model, tokenizer, config(tmp_path / "run")).at)
    assert at[0] == at[1]
    run = train(*opened(tiny), DATA, config(tmp_path / "run"), progress=False)
    assert run.record["state"] == "done" and "stopped" not in run.record and len(run.metrics) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("every", [3, 100])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_on_a_gpu_the_way_back_is_taken(every, method, tiny, tokenizer, tmp_path):
    """The update has been made when the loss is known; the search begins from the checkpoint, or from what the adapters
    began with. All weights without a checkpoint are no more to be had: the examples are named, and no layer."""
    model, _ = load_model(tiny, device="cuda", quantize="nf4" if method == "lora" else None)
    spoil_token(model, tokenizer)
    how = {} if method == "lora" else {"method": "full", "rank": TrainConfig.rank}
    e = stopped(model, tokenizer, config(tmp_path / "run", checkpoint_every=every, **how))
    assert f"mine.jsonl:{POISON}" in e.at["examples"] and len(e.at["examples"]) == 4
    if method == "full" and not saved_step(tmp_path / "run"): assert e.at["layer"] is None
    else: assert e.at["layer"] == "model.embed_tokens" and e.at["alone"] == [f"mine.jsonl:{POISON}"]
    sound(tmp_path / "run")


class Spoiled(torch.autograd.Function):
    "Forward as it is; backward nan from the third pass on."
    passes = 0

    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, g): return g * (float("nan") if Spoiled.passes >= 3 else 1.)


class Act(nn.Module):
    def forward(self, x): return Spoiled.apply(nn.functional.silu(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_that_is_nan_names_the_layer(checkpointing, tiny, tokenizer, tmp_path, monkeypatch):
    "The loss is sound; named is the output nearest to the loss, in the layer whose backward pass is at fault."
    model, _ = opened(tiny)
    model.model.layers[0].mlp.act_fn = Act()
    monkeypatch.setattr(Spoiled, "passes", 0)
    real = torch.nn.utils.clip_grad_norm_
    def clip(*args):
        Spoiled.passes += 1
        return real(*args)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip)
    e = stopped(model, tokenizer, config(tmp_path / "run", checkpointing=checkpointing))
    assert e.at["what"] == "grad_norm" and e.at["way"] == "backward"
    assert e.at["layer"].startswith("model.layers.0.mlp"), e.at
    sound(tmp_path / "run")
    assert saved_step(tmp_path / "run") == e.at["step"] - 1 == 3


@pytest.mark.parametrize("at", [1, 12])
def test_a_weight_that_an_update_spoils(at, tiny, tokenizer, tmp_path, monkeypatch):
    "Loss and gradient are finite; a checkpoint of that step, the first or the last, would not be."
    from qlora_lab.engine.paged_adamw import PagedAdamW
    real = PagedAdamW.step
    def step(self, closure=None):
        real(self)
        if int(self.state[self.parameters[3]]["step"]) == at: self.parameters[3].data.view(-1)[-1] = float("-inf")
    monkeypatch.setattr(PagedAdamW, "step", step)
    e = stopped(*opened(tiny), config(tmp_path / "run"))
    assert e.at["step"] == at and "lora_" in e.at["what"] and e.at["what"] in str(e)
    assert saved_step(tmp_path / "run") == at - 1 and len(e.at["examples"]) == 4 and e.at["examples"][0] in str(e)
    sound(tmp_path / "run")


def test_a_held_out_loss_that_is_nan(tiny, tokenizer, tmp_path):
    "Before the first step and on the way: the held-out example is named."
    data = Split([r for r in rows() if r.source != f"mine.jsonl:{POISON}"], [*DATA.held_out, rows()[POISON]])
    model, _ = opened(tiny)
    spoil_token(model, tokenizer)
    e = stopped(model, tokenizer, config(tmp_path / "first"), data)
    assert "before the first step" in str(e) and e.at["alone"] == [f"mine.jsonl:{POISON}"]
    assert not (tmp_path / "first").exists()
    class Later:
        def on_start(self, outset): spoil_token(self.model, tokenizer)
        def on_step(self, row): pass
        def on_evaluation(self, row): pass
        def on_end(self, run): pass
    Later.model, _ = opened(tiny)
    with pytest.raises(NotFinite) as found:
        train(Later.model, tokenizer, data, config(tmp_path / "way", eval_every=2), False, [Later()])
    assert found.value.at["step"] == 2 and found.value.at["alone"] == [f"mine.jsonl:{POISON}"]
    sound(tmp_path / "way")


def test_a_step_whose_gradient_is_nan_changes_nothing():
    "On a CPU, where it is known in time."
    from peft import LoraConfig

    from qlora_lab.engine.paged_adamw import PagedAdamW
    from qlora_lab.lora import add_lora, trainable
    model = add_lora(make_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), seed=0)
    optimizer = PagedAdamW(trainable(model))
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None],
             "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    before = [p.clone() for p in trainable(model)]
    norm = model.model.norm.weight.data[0].item()
    model.model.norm.weight.data[0] = float("nan")
    assert not torch.tensor(train_step(model, optimizer, [batch], 1e-2, 0.3)).isfinite().any()
    assert all(map(torch.equal, before, trainable(model)))
    model.model.norm.weight.data[0] = norm
    train_step(model, optimizer, [batch], 1e-2, 0.3)  # the control: it can change
    assert not all(map(torch.equal, before, trainable(model)))


def test_no_eyes_are_left_on_a_model():
    model = make_llama()
    with pytest.raises(KeyError), Watch(model): raise KeyError
    assert not any(m._forward_hooks for m in model.modules())


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tiny, tokenizer, tmp_path):
    "Of an earlier version, or damaged."
    model, _ = opened(tiny)
    spoil_token(model, tokenizer)
    stopped(model, tokenizer, config(tmp_path / "run"))
    path = tmp_path / "run" / "checkpoint" / "state.safetensors"
    saved, step = load_file(path), saved_step(tmp_path / "run")
    name = next(n for n in saved if "lora_B" in n)
    save_file(saved | {name: saved[name].fill_(float("inf"))}, path, {"step": str(step)})
    with pytest.raises(LabError, match="state.safetensors: not a whole checkpoint .*lora_B.*not finite"):
        train(*opened(tiny), DATA, config(tmp_path / "run"), progress=False)


# what lies under a run is exchanged

def cut_short(model, tokenizer, settings, after=3):
    class Stop(Exception): "Ends a run."
    def tell(self, row):
        if row["step"] == after: raise KeyboardInterrupt
    looker = type("Looker", (), {"on_start": lambda *_: None, "on_step": tell, "on_evaluation": lambda *_: None,
                                 "on_end": lambda *_: None})()
    with pytest.raises(KeyboardInterrupt): train(model, tokenizer, DATA, settings, False, [looker])


@pytest.mark.parametrize("done", [False, True])
def test_a_base_exchanged_under_the_same_name(done, tiny, tokenizer, tmp_path):
    "Before a resume, and where a finished run is asked for again: told by its weights; the run stays as it was."
    base, folder = shutil.copytree(tiny, tmp_path / "base"), tmp_path / "run"
    if done: train(*opened(base), DATA, config(folder, steps=3), progress=False)
    else: cut_short(*opened(base), config(folder, steps=6))
    steps = 3 if done else 6
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    make_llama(seed=1).save_pretrained(base)
    with pytest.raises(LabError, match="another run: .*base' is not the base that it was begun with: its weights"):
        train(*opened(base), DATA, config(folder, steps=steps), progress=False)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    make_llama(seed=0).save_pretrained(base)
    assert train(*opened(base), DATA, config(folder, steps=steps), progress=False).record["state"] == "done"


@pytest.mark.parametrize("how", ["renamed", "removed", "exchanged"])
def test_a_folder_that_loses_its_name_under_a_run(how, tiny, tokenizer, tmp_path):
    "No second folder is made at the old name; under the new one the run is whole, and goes on there."
    folder, other = tmp_path / "run", tmp_path / "moved"
    class Mover:
        def on_start(self, outset): pass
        def on_evaluation(self, row): pass
        def on_end(self, run): pass
        def on_step(self, row):
            if row["step"] != 4: return
            folder.rename(other)
            if how == "removed": shutil.rmtree(other)
            if how == "exchanged": folder.mkdir()
    with pytest.raises(LabError, match="run: renamed or removed while a process was at work"):
        train(*opened(tiny), DATA, config(folder), False, [Mover()])
    assert not folder.exists() if how != "exchanged" else not any(folder.iterdir())
    if how == "removed": return
    assert saved_step(other) == 4
    run = train(*opened(tiny), DATA, config(other), progress=False)
    whole = train(*opened(tiny), DATA, config(tmp_path / "whole"), progress=False)
    assert (run.kept / "adapter_model.safetensors").read_bytes() == (
        whole.kept / "adapter_model.safetensors").read_bytes()
    assert json.loads((other / "run.json").read_text())["state"] == "done"


def test_names_of_many_examples_are_few_in_the_record():
    "A measurement that fails has all held-out examples in it; run.json names eight, and says how many more there are."
    tokens = [SimpleNamespace(example=SimpleNamespace(source=f"mine.jsonl:{i}")) for i in range(1000)]
    e = located(NotFinite("step 3: the loss is nan; look"), None, tokens)
    assert e.at["examples"] == [f"mine.jsonl:{i}" for i in range(8)] + ["992 more"] and len(str(e)) < 300
    assert told(list("abcabc")) == "a, b, c" and told(list("abcdefghi")) == "a, b, c, d, e, f, g, h and 1 more"
    assert few(list("abcdefgha")) == list("abcdefgh")
