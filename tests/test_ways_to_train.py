"""Training as people do it: passes, schedules, LoRA+, the best adapter, patience, going on from an adapter.

Whatever the settings, a run that is cut short at any moment ends with the bytes of one that nobody disturbed. Here runs
end by an exception in place of a signal, at each file that they write and while they measure; tests/test_resume.py
kills processes.
"""
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_llama
from qlora_lab import locks
from qlora_lab.checkpoints import saved_step
from qlora_lab.data import Split, load_jsonl, split, tokenize
from qlora_lab.engine import dispatch
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.lora import load_adapter
from qlora_lab.model import load_model
from qlora_lab.rates import adapter_groups, make_optimizer, rate_factor, steps_of
from qlora_lab.records import LabError
from qlora_lab.runs import Run, fingerprint, open_folder
from qlora_lab.scoring import spread
from qlora_lab.settings import TrainConfig
from qlora_lab.starting_point import adapter_hash
from qlora_lab.train import attach_adapters, score, train
from qlora_lab.watching import Watcher

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = sys.modules["qlora_lab.train"]  # the package's `train` is the function
SHORT = dict(steps=10, batch_size=4, accumulation=1, rank=4, eval_examples=4, eval_prompts=0, checkpoint_every=3,
             warmup=0, lr=2e-2, max_grad_norm=0.)
MEASURED = SHORT | dict(eval_every=2, dropout=0.1)
SURE = MEASURED | dict(dropout=0.)  # a card drops other numbers out, by which another step can be the best
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    "One layer, for steps that take no time."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama(layers=1, hidden=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(jsonl):
    "Eight examples with one answer: the held-out loss of other answers falls at first, and then rises."
    whole = split(load_jsonl(jsonl), 0.2)
    return Split([e for e in whole.train if e.answer == whole.train[0].answer][:8], whole.held_out)


def opened(tiny, **more): return load_model(tiny, compute_dtype=torch.float32, **more)


def run(tiny, data, folder, watchers=(), **settings):
    config = TrainConfig(folder=folder, **SHORT | settings)
    return train(*opened(tiny), data, config, progress=False, watchers=watchers)


def results(folder):
    "What a run says, but for times and the machine."
    record = json.loads((folder / "run.json").read_text())
    told = {k: record[k] for k in ("state", "before", "after", "answers", "ended", "adapter_step", "steps")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}
    return told, [{k: v for k, v in row.items() if k != "seconds"} for row in lines], files


class CutShort(BaseException):
    "As sudden as a signal."


def cut_short(monkeypatch, tiny, data, folder, name, n, **settings):
    "Run until the n-th call of a function; whether it came to that."
    where, calls = {"replace": os, "score": TRAIN, "one_step": TRAIN}[name.partition(" ")[0]], []
    real = getattr(where, name.partition(" ")[0])
    def deadly(*args, **kw):
        calls.append(args)
        if len(calls) == n and not name.endswith("after"): raise CutShort
        result = real(*args, **kw)
        if len(calls) == n: raise CutShort
        return result
    with monkeypatch.context() as patched:
        patched.setattr(where, name.partition(" ")[0], deadly)
        try: run(tiny, data, folder, **settings)
        except CutShort: return True
    return False


WAYS = {"best": {}, "patience": {"patience": 1}, "all": dict(
    steps=100, epochs=4.5, schedule="cosine", warmup=0.2, loraplus_ratio=4., weight_decay=0.1, patience=4)}

@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
    "Runs that nobody disturbs, by name."
    folder = tmp_path_factory.mktemp("whole")
    for name, more in WAYS.items(): run(tiny, data, folder / name, **MEASURED | more)
    return {name: results(folder / name) for name in WAYS}


@pytest.mark.parametrize("way, name, moments", [
    ("best", "replace before", (7, 4, 5)), ("best", "replace after", (5, 3, 6)), ("best", "score", (2, 4, 3)),
    ("patience", "replace before", (4, 3)), ("patience", "replace after", (5, 2)), ("patience", "score", (3, 1)),
    ("all", "one_step", (6, 4)), ("all", "replace after", (6, 4, 3))])
def test_cut_short_it_ends_the_same(way, name, moments, whole, tiny, data, tmp_path, monkeypatch):
    "Before and after each kind of file, in a measurement and between two steps; several times in a run."
    settings = MEASURED | WAYS[way]
    cuts = [cut_short(monkeypatch, tiny, data, tmp_path / "run", name, n, **settings) for n in moments]
    assert sum(cuts) >= 2
    run(tiny, data, tmp_path / "run", **settings)
    assert results(tmp_path / "run") == whole[way]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_best_adapter_is_the_runs(whole, tiny, data, tmp_path):
    """`adapter/` is that of the step with the lowest held-out loss, the last one lies beside it; what the run says it
    scored is what the adapter scores."""
    done = run(tiny, data, tmp_path / "run", **SURE)
    losses = dict(done.held_out)
    assert list(losses) == [2, 4, 6, 8, 10] and done.adapter_step == min(losses, key=losses.get) == 6
    assert done.after.loss == pytest.approx(losses[done.adapter_step], abs=1e-12) and done.record["ended"]["step"] == 10
    assert done.record["last"]["held_out"] == losses[10]
    held = [tokenize(opened(tiny)[1], e) for e in data.held_out]
    for name, step in (("adapter", done.adapter_step), ("last_adapter", 10)):
        model = load_adapter(opened(tiny)[0], tmp_path / "run" / name)
        assert score(model, spread(held, 4)).loss == pytest.approx(losses[step], abs=1e-5)


def test_patience_ends_a_run_at_the_first_measurement_that_is_no_better(tiny, data, tmp_path):
    run(tiny, data, tmp_path / "run", **SURE, patience=1)
    told, lines, _ = results(tmp_path / "run")
    assert told["ended"]["why"] == "no better held-out loss in 1 measurements"
    *better, last = [row["held_out"] for row in lines if "held_out" in row]
    assert better == sorted(set(better), reverse=True) and last >= better[-1]
    assert told["ended"]["step"] == lines[-1]["step"] == 2 + 2 * len(better) < 10


def test_measuring_changes_no_step(tiny, data, tmp_path):
    "The same losses and the same last adapter, with measurements on the way and without."
    plain, measured = (run(tiny, data, tmp_path / str(n), eval_every=n, dropout=0.1) for n in (0, 3))
    assert plain.losses == measured.losses and "best" not in plain.record and plain.adapter_step == 10
    assert not (tmp_path / "0" / "last_adapter").exists()
    name = "adapter_model.safetensors"
    last = "adapter" if measured.adapter_step == 10 else "last_adapter"
    assert (tmp_path / "0/adapter" / name).read_bytes() == (tmp_path / "3" / last / name).read_bytes()


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("warmup, steps", [(0, 7), (3, 20), (0.07, 100), (5, 5)])
def test_schedules_are_transformers_own(name, warmup, steps):
    "To the bit, beside the scheduler on an optimizer; shares as TrainingArguments counts them."
    from math import ceil

    from transformers import get_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    count = warmup if warmup >= 1 else ceil(steps * warmup - 1e-9)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=count, num_training_steps=steps)
    config = TrainConfig(schedule=name, warmup=warmup, steps=steps, lr=3e-4)
    for step in range(steps):
        assert config.lr * rate_factor(config, step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_a_constant_rate_is_as_it_always_was():
    "Runs of every version: step n of the warm-up has n / warmup of the rate."
    config = TrainConfig()
    assert [config.lr * rate_factor(config, n) for n in range(9)] == [5e-4 * min(1, (n + 1) / 5) for n in range(9)]


@pytest.mark.parametrize("epochs, examples, size, passes, steps", [
    (1, 100, 4, 2, 13), (2, 100, 4, 2, 25), (0.5, 64, 4, 2, 4), (3, 10, 4, 1, 6), (0.01, 8, 4, 2, 1),
    (0.7, 10, 1, 1, 7)])
def test_passes(epochs, examples, size, passes, steps):
    assert steps_of(TrainConfig(epochs=epochs, batch_size=size, accumulation=passes), examples) == steps


def test_passes_are_said_and_done(tiny, data, tmp_path, capsys):
    done = run(tiny, data, tmp_path / "run", steps=100, epochs=2.5)
    assert len(done.losses) == done.record["steps"] == 5
    assert "steps   5: 2.5 passes over 8 examples" in capsys.readouterr().out
    assert TrainConfig(**done.record["config"]).epochs == 2.5


def wrapped(tiny, **kw):
    "The same model with PEFT's adapters."
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    config = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **kw)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)


def test_groups_are_those_of_peft(tiny):
    "LoRA+: the same parameters at the same rates with the same decay as create_loraplus_optimizer's."
    from peft.optimizers import create_loraplus_optimizer
    config = TrainConfig(rank=4, lr=2e-4, loraplus_ratio=16., weight_decay=0.02)
    ours, theirs = attach_adapters(opened(tiny)[0], config), wrapped(tiny)
    plus = dict(lr=config.lr, loraplus_lr_ratio=16., loraplus_weight_decay=0.02)
    peer = create_loraplus_optimizer(theirs, torch.optim.AdamW, **plus)
    def told(model, groups):
        plain = ((n.removeprefix("base_model.model.").replace(".default", ""), p) for n, p in model.named_parameters())
        names = {id(p): n for n, p in plain}
        return [(g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups if g["params"]]
    assert told(ours, make_optimizer(ours, config).param_groups) == told(theirs, peer.param_groups)
    assert len(told(ours, adapter_groups(ours, config))) == 2


def test_adapters_of_embeddings_and_biases_have_groups_of_their_own():
    "By PEFT's rule: embeddings learn at 1e-6, what is called a bias never decays."
    from peft import LoraConfig

    from qlora_lab.lora import add_lora
    model = add_lora(make_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    model.extra_bias = torch.nn.Parameter(torch.zeros(3))
    groups = adapter_groups(model, TrainConfig(lr=1e-3, loraplus_ratio=2., weight_decay=0.1))
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0.1, 2), (1e-6, 0.1, 2), (2e-3, 0.1, 2), (2e-3, 0., 1)]


@pytest.mark.parametrize("budget", [None, 4096])
def test_groups_step_as_torchs_adamw(budget):
    "Rates and decay of each group, and no decay through the gradient: the same numbers to the bit, paged or not."
    torch.manual_seed(0)
    start = [torch.randn(40, 30), torch.randn(300), torch.randn(30, 8)]
    ends = []
    for make in (torch.optim.AdamW, PagedAdamW):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [{"params": params[:1], "lr": 1e-3, "weight_decay": 0.1}, {"params": params[1:], "lr": 1.6e-2}]
        paged = dict(device_budget=budget, page_bytes=2048) if budget and make is PagedAdamW else {}
        optimizer = make(groups, lr=1e-3, weight_decay=0., **paged)
        for step in range(4):
            torch.manual_seed(step)
            for p in params: p.grad = torch.randn(p.shape)
            optimizer.step()
        ends.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_each_group_has_its_rate(tiny, data, tmp_path, monkeypatch):
    "With a schedule: the rate of B is ratio times that of A at every step, as LambdaLR has it."
    seen, real = [], TRAIN.train_step
    def step(model, optimizer, batches, lr, *more):
        seen.append(lr)
        return real(model, optimizer, batches, lr, *more)
    monkeypatch.setattr(TRAIN, "train_step", step)
    done = run(tiny, data, tmp_path / "run", steps=6, schedule="linear", warmup=2, loraplus_ratio=8.)
    assert [m["lr"] for m in done.metrics] == [a for a, _ in seen] == [0., .01, .02, .015, .01, .005]
    assert all(b == 8 * 2e-2 * (a / 2e-2) for a, b in seen)


@pytest.fixture(scope="module")
def earlier(tiny, data, tmp_path_factory):
    return run(tiny, data, tmp_path_factory.mktemp("earlier") / "run", steps=4)


@pytest.mark.parametrize("of_run", [True, False])
def test_going_on_from_an_adapter(of_run, earlier, tiny, data, tmp_path):
    "A run's folder or PEFT's: it begins where the other ended, is known by the adapter's bytes, and resumes."
    where = str(earlier.folder if of_run else earlier.folder / "adapter")
    done = run(tiny, data, tmp_path / "run", steps=4, init_adapter=where)
    assert done.before.loss == pytest.approx(earlier.after.loss, abs=1e-6) and done.losses[0] < earlier.losses[0]
    assert done.record["identity"]["init_adapter"] == adapter_hash(where)
    assert done.record["identity"]["init_adapter"] != adapter_hash(str(done.folder))
    other = {**done.record["identity"], "init_adapter": adapter_hash(str(done.folder))}
    with pytest.raises(LabError, match="init_adapter"): open_folder(done.folder, other)


@pytest.mark.parametrize("settings, said", [
    (dict(rank=8), "rank is 4, expected 8"), (dict(alpha=8), "alpha is 32, expected 8"), (dict(rslora=True), "rslora"),
    (dict(targets=("q_proj", "v_proj")), "targets"), (dict(init_adapter="nowhere"), "neither a run's folder")])
def test_an_adapter_that_does_not_fit(settings, said, earlier, tiny, data, tmp_path):
    "One sentence that names the setting; no folder is left."
    with pytest.raises(LabError, match=said):
        run(tiny, data, tmp_path / "run", **dict(init_adapter=str(earlier.folder)) | settings)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_done_is_no_beginning(tiny, data, tmp_path, monkeypatch):
    assert cut_short(monkeypatch, tiny, data, tmp_path / "first", "one_step", 5)
    with pytest.raises(LabError, match="not done"):
        run(tiny, data, tmp_path / "run", init_adapter=str(tmp_path / "first"))


def test_a_run_of_an_earlier_version_goes_on(tiny, data, tmp_path, monkeypatch):
    "Its identity lacks the fields that came later; with their defaults it is the same run, with others another."
    whole = results(run(tiny, data, tmp_path / "whole").folder)
    assert cut_short(monkeypatch, tiny, data, tmp_path / "run", "one_step", 8)
    record = json.loads((tmp_path / "run/run.json").read_text())
    for name in ("epochs", "schedule", "loraplus_ratio", "init_adapter", "merge_aware", "eval_every", "patience"):
        del record["identity"][name], record["config"][name]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(LabError, match="schedule was 'constant', now 'linear'"):
        run(tiny, data, tmp_path / "run", schedule="linear")
    run(tiny, data, tmp_path / "run")
    assert results(tmp_path / "run") == whole
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["adapter_step"], record["ended"], record["steps"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert Run.load(tmp_path / "run").adapter_step == 10 and Run.load(tmp_path / "run").held_out == []


def test_a_loss_that_is_not_finite_ends_the_run(tiny, data, tmp_path):
    "One sentence; the checkpoint stays as it was, and so does every line before."
    with pytest.raises(LabError, match="^step .* is (nan|inf), so the run ended here"):
        run(tiny, data, tmp_path / "run", lr=1e30)
    with pytest.raises(LabError, match="after training is (nan|inf)"):
        run(tiny, data, tmp_path / "one", lr=1e30, steps=1)
    assert not (tmp_path / "one/adapter").exists()
    folder = tmp_path / "late"
    config = dict(lr=1e-2, checkpoint_every=3)
    with pytest.raises(LabError, match="step 8: loss is nan.*its checkpoint of step 6 is whole"):
        run(tiny, data, folder, watchers=[Poison(8)], **config)
    assert saved_step(folder) == 6 and len((folder / "metrics.jsonl").read_text().splitlines()) == 7
    assert all(t.isfinite().all() for t in load_file(folder / "checkpoint/state.safetensors").values())
    again, well = run(tiny, data, folder, **config), run(tiny, data, tmp_path / "well", **config)
    assert results(again.folder) == results(well.folder)


class Poison(Watcher):
    "Breaks the model before a step."
    def __init__(self, step): self.step = step
    def on_step(self, row):
        if row["step"] != self.step - 1: return
        log = sys._getframe(3).f_locals["log"]
        next(p for p in log.model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_model_that_is_broken_before_the_first_step(tiny, data, tmp_path):
    model, tokenizer = opened(tiny)
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(LabError, match="before the first step is nan"):
        train(model, tokenizer, data, TrainConfig(folder=tmp_path / "run", **SHORT), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_clip_of_zero_clips_nothing(tiny, data, tmp_path):
    "As a clip that is longer than every gradient; one that makes no sense is refused."
    none, wide = (run(tiny, data, tmp_path / str(n), steps=3, max_grad_norm=n) for n in (0., 1e9))
    assert none.losses == wide.losses
    for odd in (-1., float("nan"), float("inf")):
        with pytest.raises(LabError, match="max_grad_norm="): TrainConfig(max_grad_norm=odd)


def test_two_at_once(tiny, data, tmp_path):
    "While a run is at work another call on its folder is refused, and changes nothing; afterwards it is free."
    class Second(Watcher):
        def on_step(self, row):
            if row["step"] != 2: return
            before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
            with pytest.raises(LabError, match=f"process {os.getpid()}.*at work in this folder"):
                run(tiny, data, tmp_path / "run", steps=3)
            with pytest.raises(LabError, match="at work"): locks.check_free(tmp_path / "run")
            said.append(before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()})
    said = []
    done = run(tiny, data, tmp_path / "run", steps=3, watchers=[Second()])
    assert said == [True] and len(done.losses) == 3
    locks.check_free(tmp_path / "run")
    assert run(tiny, data, tmp_path / "run", steps=3).losses == done.losses


def test_lines_that_are_gone(tiny, data, tmp_path, monkeypatch):
    "A checkpoint counts on the lines before it, and on the best adapter; one that is gone is named."
    assert cut_short(monkeypatch, tiny, data, tmp_path / "run", "one_step", 8, **MEASURED)
    metrics, kept = tmp_path / "run/metrics.jsonl", tmp_path / "run/checkpoint"
    lines = metrics.read_text()
    metrics.write_text("\n".join(lines.splitlines()[1:]) + "\n")
    with pytest.raises(LabError, match="has not a line for each of the 6 steps"):
        run(tiny, data, tmp_path / "run", **MEASURED)
    metrics.write_text(lines)
    for path in kept.glob("best-*"): path.unlink()
    with pytest.raises(LabError, match="best-.*the best adapter so far is damaged or gone"):
        run(tiny, data, tmp_path / "run", **MEASURED)


def test_the_last_steps_train_through_the_quantizer(tiny, data, tmp_path, monkeypatch):
    """The twin is asked once, before the first of these steps, and again where a run goes on among them; the best
    adapter is one of theirs; without a twin nothing is trained."""
    with pytest.raises(LabError, match="merge_aware: nothing trains through the quantizer"):
        with dispatch.standing_in({("through_quantizer", DEVICE): None}):
            run(tiny, data, tmp_path / "none", merge_aware=4)
    assert not list((tmp_path / "none").glob("metrics.jsonl"))
    asked = []
    def through(model): asked.append(len((folder / "metrics.jsonl").read_text().splitlines()))
    settings = MEASURED | dict(merge_aware=0.3, checkpoint_every=1)
    with dispatch.standing_in({("through_quantizer", DEVICE): through}):
        folder = tmp_path / "whole"
        done = run(tiny, data, folder, **settings)
        assert asked == [7] and done.adapter_step > 7
        folder = tmp_path / "run"
        assert cut_short(monkeypatch, tiny, data, folder, "one_step", 10, **settings) and asked == [7, 7]
        assert results(run(tiny, data, folder, **settings).folder) == results(done.folder) and asked[2:] == [9]


@pytest.mark.parametrize("odd", [
    dict(epochs=-1.), dict(epochs=2., steps=50), dict(schedule="polynomial"), dict(warmup=1.5), dict(warmup=-5),
    dict(patience=2), dict(loraplus_ratio=0.), dict(merge_aware=-1), dict(lr=float("nan")), dict(alpha=0),
    dict(steps=2.5), dict(weight_decay=-0.1), dict(patience=1, eval_every=1, merge_aware=3), dict(eval_every=-1)])
def test_settings_that_make_no_sense(odd):
    with pytest.raises(LabError, match=f"^{next(iter(odd))}="): TrainConfig(**odd)


def test_an_identity_knows_what_changes_a_result(tiny, data):
    "Each new setting makes another run; logs do not."
    model, config = opened(tiny)[0], TrainConfig()
    plain = fingerprint(model, data, config)
    for other in (dict(epochs=1.), dict(schedule="linear"), dict(warmup=3), dict(loraplus_ratio=2.), dict(eval_every=5),
                  dict(eval_every=5, patience=2), dict(merge_aware=5)):
        assert fingerprint(model, data, replace(config, **other)) != plain
    assert fingerprint(model, data, TrainConfig(tensorboard=True, checkpoint_every=7)) == plain


def test_a_damaged_best_adapter_is_named(tiny, data, tmp_path, monkeypatch):
    assert cut_short(monkeypatch, tiny, data, tmp_path / "run", "score", 7, **SURE)  # before, five times, after
    best = next((tmp_path / "run/checkpoint").glob("best-*"))
    save_file({"a": torch.zeros(1)}, best)
    with pytest.raises(LabError, match=best.name): run(tiny, data, tmp_path / "run", **SURE)
