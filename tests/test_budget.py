"""One dial: what is chosen for a budget fits and is the fastest that does, and the run is the same run."""
import json
import sys
from dataclasses import replace

import pytest
import torch

from conftest import make_llama
from qlora_lab import plan
from qlora_lab.batches import regrouped
from qlora_lab.checkpointing import decoder_layers, is_checkpointed
from qlora_lab.data import tokenize
from qlora_lab.engine.budget import fastest, frugal, longest, seconds, told_of, within_budget
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.runs import fingerprint, open_folder
from qlora_lab.settings import TrainConfig, gib_of
from qlora_lab.train import attach_adapters, one_step, train

pytestmark = pytest.mark.usefixtures("one_thread")
WIDE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320}


def asked(gib, **more):
    return plan(WIDE, gib, **{"rank": 8, "batch_size": 4, "sequence": 512, "device": "cuda"} | more)


def every_way(p):
    "All that could be chosen, planned one by one."
    whole = p.settings.batch_size * p.settings.accumulation
    for size in (n for n in range(1, whole + 1) if whole % n == 0):
        for layers in range(p.layers + 1):
            for where in ("device", "host"):
                yield p.again(batch_size=size, accumulation=whole // size, checkpointing=layers > 0,
                              checkpointed_layers=layers % p.layers, checkpoints_in=where if layers else "device")


def fits(p): return (p.again(accumulation=2) if p.recorded and p.settings.accumulation == 1 else p).fits


def test_the_fastest_that_fits():
    "Against a search of every way, from a budget in which everything fits to one in which hardly anything does."
    ways = list(every_way(asked(8)))
    sizes = sorted(p.card_gib for p in ways)
    for gib in (sizes[-1] * 1.1, sizes[len(sizes) // 3], sizes[0] * 1.01):
        found = fastest(asked(gib))
        assert found.fits and found.gpu_gib == gib
        allowed = [p for p in (replace(p, gpu_gib=gib) for p in ways) if fits(p)]
        assert seconds(found) == pytest.approx(min(map(seconds, allowed)), rel=1e-9)
    with pytest.raises(LabError, match=r"the least that this step can do with is [\d.]+ GiB"): fastest(asked(0.9))


def test_the_order_of_the_ways():
    "More checkpoints, the host, more passes and pages each cost time, and each saves memory."
    p = asked(8, batch_size=16)
    host = dict(checkpointing=True, checkpoints_in="host")
    ways = [p, p.again(checkpointing=True, checkpointed_layers=3), p.again(checkpointing=True), p.again(**host)]
    assert [seconds(q) for q in ways] == sorted(seconds(q) for q in ways)
    assert [q.total_gib for q in ways] == sorted((q.total_gib for q in ways), reverse=True)
    assert seconds(p.again(batch_size=4, accumulation=4)) > seconds(p)
    large = plan("llama-7b", 24, rank=64)
    paged = large.again(device_budget=256 << 20)
    assert seconds(paged) > seconds(large) and paged.total_gib < large.total_gib
    assert frugal(large).total_gib <= min(paged.total_gib, large.again(**host).total_gib)


@pytest.mark.parametrize("text, gib", [("24GiB", 24), ("800 MiB", 800 / 1024), ("0.5gib", 0.5), ("12", 12), (3, 3)])
def test_sizes(text, gib): assert gib_of(text) == gib


@pytest.mark.parametrize("text", ["24GB", "lots", "-3GiB", "0", "GiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(LabError, match="24GiB"): gib_of(text)
    with pytest.raises(LabError, match="24GiB"): TrainConfig(budget=text)


def test_the_longest_text():
    "It fits, with all that saves memory, and 64 tokens more do not."
    n = longest(WIDE, "1.1GiB", rank=8)
    p = frugal(plan(WIDE, 1.1, rank=8))
    assert n % 64 == 0 and n and p.again(sequence=n).fits and not p.again(sequence=n + 64).fits


def test_passes_of_another_size():
    "The same examples, each once, those of a length together."
    lengths = [5, 3, 9, 1, 7, 2]
    assert regrouped([[0, 1], [2, 3]], lengths, 0) == [[0, 1], [2, 3]]
    assert regrouped([[0, 1], [2, 3]], lengths, 3) == [[3, 1, 0], [2]]


def test_some_layers_as_the_config_says():
    model = attach_adapters(make_llama(layers=4), TrainConfig(checkpointing=True, checkpointed_layers=3))
    assert [is_checkpointed(layer) for layer in decoder_layers(model)] == [True, True, True, False]
    for odd in (dict(checkpointed_layers=-1), dict(checkpoints_in="disk"), dict(pass_size=-2)):
        with pytest.raises(LabError): TrainConfig(**odd)


def test_a_run_within_a_budget(tiny, data, tmp_path, capsys):
    "It says what it chose, ends where the run as asked ends, up to rounding, and goes on under another budget."
    def run(name, **more):
        model, tokenizer = load_model(tiny, dtype=torch.float32, compute_dtype=torch.float32)
        config = TrainConfig(folder=tmp_path / name, **dict(steps=4, batch_size=4, rank=4, lr=5e-3, eval_examples=8,
                                                            eval_prompts=1, checkpoint_every=2) | more)
        return train(model, tokenizer, data, config, progress=False)
    plain, within = run("plain"), run("budget", budget="64GiB")
    assert plain.losses == pytest.approx(within.losses, rel=1e-4)
    assert plain.after.loss == pytest.approx(within.after.loss, rel=1e-4)
    said = capsys.readouterr().out
    assert said.startswith("budget  64GiB: 1 pass of 8, no layer checkpointed") and within.record["chosen"] in said
    assert within.record["config"]["pass_size"] == 8 and "chosen" not in plain.record
    assert within.record["identity"] == plain.record["identity"]
    with pytest.raises(LabError, match="the least that this step"): run("little", budget="10MiB")
    assert not (tmp_path / "little").exists()


def test_a_half_done_run_goes_on_under_another_budget(tiny, data, tmp_path, monkeypatch):
    "Cut short twice, each time gone on with in another way to keep memory: the run that nobody disturbed."
    steps_done = []
    def run(name, stop=None, **more):
        def step(model, optimizer, learn, config, n):
            if n == stop: raise KeyboardInterrupt
            steps_done.append((name, n))
            return one_step(model, optimizer, learn, config, n)
        monkeypatch.setattr(sys.modules["qlora_lab.train"], "one_step", step)  # the package's `train` is the function
        model, tokenizer = load_model(tiny, dtype=torch.float32, compute_dtype=torch.float32)
        config = TrainConfig(folder=tmp_path / name, **dict(steps=6, batch_size=4, rank=4, lr=5e-3, eval_examples=8,
                                                            eval_prompts=1, checkpoint_every=2) | more)
        return train(model, tokenizer, data, config, progress=False)
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt): run("cut", 3, budget="64GiB")
    with pytest.raises(KeyboardInterrupt): run("cut", 5, checkpointing=True, pass_size=2, device_budget=1)
    cut = run("cut", budget="32GiB")
    assert [n for name, n in steps_done if name == "cut"] == [0, 1, 2, 2, 3, 4, 4, 5]
    assert cut.losses == pytest.approx(whole.losses, rel=1e-4)
    assert cut.after.loss == pytest.approx(whole.after.loss, rel=1e-4)
    assert "32GiB" in cut.record["chosen"]


def test_another_way_to_keep_memory_is_the_same_run(tiny, data, tmp_path):
    "Checkpoints, pages, passes and budgets are no part of a run's identity; what changes results is."
    model, _ = load_model(tiny)
    identity = fingerprint(model, data, TrainConfig())
    (tmp_path / "run.json").write_text(json.dumps({"state": "running", "identity": identity}))
    for same in (dict(checkpointing=True), dict(budget="3GiB"), dict(pass_size=2), dict(device_budget=64),
                 dict(checkpointing=True, checkpointed_layers=1, checkpoints_in="host")):
        assert open_folder(tmp_path, fingerprint(model, data, TrainConfig(**same)))
    other = fingerprint(model, data, TrainConfig(batch_size=2))
    with pytest.raises(LabError, match="batch_size"): open_folder(tmp_path, other)


def test_what_is_chosen_for_a_run_is_its_plan(tiny, data):
    "The longest examples and the model as it is; with dropout the passes stay."
    model, tokenizer = load_model(tiny)
    tokens = [tokenize(tokenizer, e, 256) for e in data.train]
    config, said = within_budget(TrainConfig(budget="64GiB", batch_size=4, accumulation=3), model, tokens)
    assert config.pass_size == 12 and not config.checkpointing and "1 pass of 12" in said
    assert within_budget(TrainConfig(budget="64GiB", batch_size=4, dropout=0.1), model, tokens)[0].pass_size == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gib", [40, 14, 9])
def test_a_card_keeps_the_budget(gib):
    "A step of what was chosen, on the card: what torch had allocated stays within the plan."
    from benchmarks.memory import row
    found = fastest(plan("smollm2-1.7b", gib, rank=64, batch_size=16, sequence=512))
    s = found.settings
    measured = row("smollm2-1.7b", rank=64, batch_size=s.batch_size, sequence=512, checkpointing=s.checkpointing,
                   checkpointed_layers=s.checkpointed_layers, checkpoints_in=s.checkpoints_in,
                   device_budget=s.device_budget, accumulation=s.accumulation)
    assert abs(measured["error"]) < 0.01 and measured["measured_gib"] < gib, told_of(found)
