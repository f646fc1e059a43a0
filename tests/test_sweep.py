"A grid becomes runs: each once, through kills, several processes and failures, and a table that says what is so."
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import make_llama
from qlora_lab.cell_folders import CellFolder
from qlora_lab.cell_inputs import Bases
from qlora_lab.cell_work import prepare, serve
from qlora_lab.comparison import compare
from qlora_lab.manifest import verify
from qlora_lab.records import LabError
from qlora_lab.results import results, settings_of
from qlora_lab.runs import Run
from qlora_lab.settings import TrainConfig
from qlora_lab.sweeping import sweep

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = dict(steps=3, batch_size=4, accumulation=1, rank=2, eval_examples=8, dtype="float32")


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    "One layer, for steps that take no time."
    folder = tmp_path_factory.mktemp("models") / "small"
    make_llama(layers=1, hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def grid(small, jsonl): return SHORT | {"model": str(small), "data": str(jsonl)}


def sizes(model, tokenizer, data): return float(sum(p.numel() for p in model.parameters()))


def test_a_grid_is_carried_out_once(grid, tmp_path):
    "Every cell is a run; a second call does nothing, a larger grid only what is new."
    grid |= {"quant_type": ["nf4", "none"], "seed": [0, 1]}
    table = sweep(grid, tmp_path / "s", progress=False, measure={"numbers": sizes})
    assert list(table["state"]) == ["done"] * 4 and table["held-out loss [nats/token]"].notna().all()
    assert list(table["cell"]) == ["quant_type=nf4,seed=0", "quant_type=nf4,seed=1", "quant_type=none,seed=0",
                                   "quant_type=none,seed=1"]
    assert (table["numbers"] > 0).all() and all(verify(p).ok for p in table["folder"])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*") if p.is_file()}
    again = sweep(grid | {"seed": [0, 1, 2]}, tmp_path / "s", progress=False, measure={"numbers": sizes})
    assert list(again["state"]) == ["done"] * 6
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_a_cell_is_what_train_makes(grid, small, jsonl, tmp_path):
    "Copies of one base change nothing: the cell's losses are those of `train` on a model loaded for it alone."
    from qlora_lab.data import load_jsonl, split
    from qlora_lab.model import load_model
    from qlora_lab.train import train
    sweep(grid | {"seed": [0, 1]}, tmp_path / "s", progress=False)
    model, tokenizer = load_model(small, compute_dtype=torch.float32)
    own = {k: v for k, v in SHORT.items() if k != "dtype"} | {"seed": 1, "eval_prompts": 0}
    alone = train(model, tokenizer, split(load_jsonl(jsonl), 0.1), TrainConfig(tmp_path / "alone", **own), False)
    swept = Run.load(next((tmp_path / "s").glob("seed=1-*")))
    assert swept.losses == alone.losses and swept.after == alone.after
    row = results(alone.folder).iloc[0]  # a run that no sweep made is a row like any other
    assert (row["state"], row["rank"], row["quant_type"], row["blocksize"]) == ("done", 2, "nf4", 64)
    assert compare(alone, swept).difference == 0


def test_a_measure_that_comes_later_is_added(grid, tmp_path):
    sweep(grid, tmp_path / "s", progress=False)
    losses = (run := Run.load(next((tmp_path / "s").glob("run-*")))).losses
    table = sweep(grid, tmp_path / "s", progress=False, measure={"numbers": sizes})
    assert table["numbers"][0] > 0 and Run.load(run.folder).losses == losses and verify(run.folder).ok


def test_a_cell_that_fails_is_told_and_ends_nothing(grid, tmp_path):
    "Its message stands in the table; it is tried again on request alone."
    calls = []
    def moody(model, tokenizer, data):
        calls.append(1)
        if len(calls) == 1: raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 1.
    ask = dict(grid=grid | {"seed": [0, 1], "lr": [1e-3]}, folder=tmp_path / "s", progress=False, measure={"m": moody})
    table = sweep(**ask)
    assert list(table["state"]) == ["failed", "done"]
    assert table["message"][0].startswith("RuntimeError: CUDA out of memory")
    assert list(sweep(**ask)["state"]) == ["failed", "done"] and len(calls) == 2
    again = sweep(**ask, retry=True)
    assert list(again["state"]) == ["done"] * 2 and "message" not in again and len(calls) == 3
    assert table["cell [s]"][0] == again["cell [s]"][0] > 0  # what training took, not the measuring anew


def test_a_measure_s_own_errors_end_nothing(grid, tmp_path):
    "A file it does not find fails its cell; a disk that is full ends the sweep."
    def lost(model, tokenizer, data): return len((tmp_path / "none.txt").read_text())
    def full(model, tokenizer, data): raise OSError(errno.ENOSPC, "No space left on device")
    table = sweep(grid | {"seed": [0, 1]}, tmp_path / "s", progress=False, measure={"lost": lost})
    assert list(table["state"]) == ["failed"] * 2 and table["message"][0].startswith("FileNotFoundError")
    with pytest.raises(OSError, match="No space"): sweep(grid, tmp_path / "f", progress=False, measure={"full": full})


def test_a_cell_is_tried_again_once_for_all_workers(grid, tmp_path):
    "What failed after the call began is not open again to a worker that started later."
    work = prepare(grid, tmp_path / "s", retry=True)
    work.places[0].fail(LabError("no"))
    assert not work.left()
    assert not prepare(grid, tmp_path / "s", retry=True, begun=work.begun).left()
    os.utime(work.places[0].folder / "failed.json", (1, 1))
    assert prepare(grid, tmp_path / "s", retry=True).left()


def test_models_that_are_handed_over(grid, small, jsonl, tmp_path):
    "Their cells say how the base was held; another base, or data named twice, is refused."
    from qlora_lab.data import load_jsonl, split
    from qlora_lab.model import load_model
    own = {k: v for k, v in grid.items() if k not in ("model", "data", "dtype")}
    data = split(load_jsonl(jsonl), 0.1)
    four, plain = (load_model(small, kind, compute_dtype=torch.float32) for kind in ("nf4", None))
    ask = dict(grid=own, data=data, progress=False)
    first, second = (sweep(**ask, folder=tmp_path / name, base=base) for name, base in (("4", four), ("16", plain)))
    assert list(first["quant_type"]) == ["nf4"] and list(second["quant_type"]) == ["none"]
    assert first["held-out loss [nats/token]"][0] != second["held-out loss [nats/token]"][0]
    with pytest.raises(LabError, match="made on another base: quantization was"):
        sweep(**ask, folder=tmp_path / "4", base=plain)
    assert len(sweep(**ask, folder=tmp_path / "4", base=four)) == 1
    with pytest.raises(LabError, match="named in the grid too"):
        sweep(own | {"data": ["docstrings", "support"]}, tmp_path / "d", data, progress=False)
    assert not (tmp_path / "d").exists()


def test_the_card_of_a_sweep_is_the_current_one(grid, tmp_path, monkeypatch):
    "The peak that is measured is that of the card at work; on the processor's no card's peak is less the original."
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or nullcontext())
    work = prepare(grid, tmp_path / "s")
    work.bases.device = torch.device("cuda:1")
    serve(replace(work, places=[]), print)
    assert set(entered) == {torch.device("cuda:1")}
    bases = Bases((torch.nn.Linear(256, 1024), None), torch.device("cpu"))
    bases.copy(work.places[0].cell)
    assert bases.kept_gib > 0 or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bases.kept_gib == 0


def test_a_run_that_no_sweep_made_tells_how_its_base_was_held(tmp_path):
    "A number format, chosen scales, and the dtype of a base as it was."
    identity = {"model": "m", "backend": "lab", "quantization": None, "dtype": "torch.bfloat16",
                "compute_dtype": "None"}
    nf4 = {"quantization": "Linear4bit(8, 8, nf4, blocksize=64, double_quant)", "compute_dtype": "torch.float32"}
    wanted = {"none": ({}, ("none", None, None, "bfloat16")),
              "mxfp4": ({"rounded": {"format": "mxfp4", "blocksize": 32}}, ("mxfp4", 32, None, "bfloat16")),
              "nf4": (nf4, ("nf4", 64, "absmax", "float32")),
              "chosen": (nf4 | {"scales": "chosen"}, ("nf4", 64, "chosen", "float32"))}
    for name, (more, told) in wanted.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"identity": identity | more, "config": {"rank": 2}}))
        made = settings_of(tmp_path / name)
        assert tuple(made[k] for k in ("quant_type", "blocksize", "scales", "dtype")) == told, name


def test_a_loss_that_is_not_finite_is_told(grid, tmp_path):
    table = sweep(grid | {"lr": [1e30, 1e-3], "max_grad_norm": 0}, tmp_path / "s", progress=False)
    assert list(table["state"]) == ["failed", "done"] and "is nan" in table["message"][0]


CHILD = """
import sys, torch
torch.set_num_threads(1)
from qlora_lab.sweeping import sweep
from qlora_lab.watching import Watcher
class Slow(Watcher):
    def on_step(self, row):
        import time
        print("step", row["step"], flush=True)
        time.sleep(0.3)
sweep({grid!r}, {folder!r}, watchers=[Slow()] if {slow} else (), progress=True)
"""

def child(grid, folder, slow=False):
    code = textwrap.dedent(CHILD.format(grid=grid, folder=str(folder), slow=slow))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)


def test_killed_in_the_middle_it_goes_on(grid, tmp_path):
    "SIGKILL after a checkpoint: the same bytes as uninterrupted, and finished cells are not touched."
    grid |= {"seed": [0, 1], "steps": 6, "checkpoint_every": 2}
    process = child(grid, tmp_path / "killed", slow=True)
    for line in iter(process.stdout.readline, ""):
        if line.startswith("step 5") and _done(tmp_path / "killed"): process.kill()
    assert process.wait() == -signal.SIGKILL
    states = sorted(p.state() for p in _places(tmp_path / "killed"))
    assert states == ["done", "unfinished"]
    first = {p: p.stat().st_mtime_ns for p in _done(tmp_path / "killed")[0].rglob("*") if p.is_file()}
    sweep(grid, tmp_path / "killed", progress=False)
    sweep(grid, tmp_path / "whole", progress=False)
    assert all(p.stat().st_mtime_ns == t for p, t in first.items())
    for place in _places(tmp_path / "whole"):
        other = tmp_path / "killed" / place.folder.name / "adapter/adapter_model.safetensors"
        assert (place.folder / "adapter/adapter_model.safetensors").read_bytes() == other.read_bytes()


def _places(root):
    told = [(p.parent, json.loads(p.read_text())["settings"]) for p in sorted(root.glob("*/cell.json"))]
    return [CellFolder(folder, settings) for folder, settings in told]

def _done(root): return [p.folder for p in _places(root) if p.is_done()]


def test_processes_share_the_cells(grid, tmp_path, capsys):
    "Two processes at one folder do each cell once, and both wait for the last."
    grid |= {"seed": list(range(6))}
    other = child(grid, tmp_path / "s", slow=True)
    next(line for line in iter(other.stdout.readline, "") if line.startswith("step"))  # it has its first cell
    table = sweep(grid, tmp_path / "s")
    told = [line.split()[:2] for line in other.communicate()[0].splitlines() if line.startswith("done")]
    assert 1 <= len(told) < 6 and list(table["state"]) == ["done"] * 6
    told += [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("done")]
    assert sorted(name for _, name in told) == [f"seed={i}" for i in range(6)]


def test_workers_are_started(grid, tmp_path):
    table = sweep(grid | {"seed": [0, 1]}, tmp_path / "s", progress=False, workers=2)
    assert list(table["state"]) == ["done"] * 2
    with pytest.raises(LabError, match="cannot be handed to another process"):
        sweep(grid | {"seed": [4, 5]}, tmp_path / "n", progress=False, workers=2, measure={"m": lambda *a: 1.})
    with pytest.raises(LabError, match="workers=0"): sweep(grid, tmp_path / "n", workers=0)
    with pytest.raises(LabError, match="measure=3"): sweep(grid, tmp_path / "n", workers=2, measure=3)
    assert not (tmp_path / "n").exists()  # refused before anything is made


def test_a_base_in_a_number_format(grid, tmp_path):
    "The run says in which format its base was, and is opened again with it; another format is another run."
    from qlora_lab.open_run import open_run
    table = sweep(grid | {"quant_type": ["mxfp4", "int4_affine"]}, tmp_path / "s", progress=False)
    assert list(table["state"]) == ["done"] * 2
    runs = [Run.load(p) for p in table["folder"]]
    assert [r.record["identity"]["rounded"]["format"] for r in runs] == ["mxfp4", "int4_affine"]
    weights = [open_run(r.folder, None)[0].model.layers[0].mlp.down_proj.weight for r in runs]
    plain = sweep(grid | {"quant_type": "none"}, tmp_path / "s", progress=False)
    plain = open_run(plain["folder"][0], None)[0]
    assert all(0 < (w - plain.model.layers[0].mlp.down_proj.weight).abs().mean() for w in weights)
    assert not torch.equal(*weights) and runs[0].losses != runs[1].losses


def test_all_weights_and_what_is_kept(grid, tmp_path):
    "A cell of method 'full' is measured later from its model; with keep='numbers' only the numbers are left, whole."
    grid = {k: v for k, v in grid.items() if k != "rank"} | {"method": "full", "quant_type": "none", "lr": 1e-4}
    sweep(grid, tmp_path / "s", progress=False)
    def never(cell, device): raise AssertionError("its own model is opened; nobody needs the base")
    table = sweep(grid, tmp_path / "s", progress=False, measure={"numbers": sizes}, base=never)
    assert table["numbers"][0] > 0 and verify(table["folder"][0]).ok
    bare = sweep(grid | {"method": ["full", "lora"]}, tmp_path / "bare", progress=False, keep="numbers")
    for folder in map(Path, bare["folder"]):
        assert not {"model", "adapter", "checkpoint"} & {p.name for p in folder.iterdir()} and verify(folder).ok
    again = sweep(grid, tmp_path / "bare", progress=False, measure={"numbers": sizes})
    assert "was not kept" in again["message"][0] and list(again["state"]) == ["failed"]


def test_the_sweep_command(grid, tmp_path, capsys):
    "A file in TOML; a dry run makes nothing, a failure is exit code 1, a mistake 2, and the table is written."
    from qlora_lab.cli import main
    lines = [f"{k} = {json.dumps(v)}" for k, v in grid.items()]
    (tmp_path / "grid.toml").write_text("\n".join([*lines, "seed = [0, 1]", "[[grid]]", "lr = [1e-3, 1e-2]"]))
    (tmp_path / "odd.toml").write_text("\n".join([*lines, "lr = [1e-3, 1e30]", "max_grad_norm = 0"]))
    (tmp_path / "wrong.toml").write_text("lr = [1e-3")
    asked = ["--folder", str(tmp_path / "s")]
    assert main(["sweep", str(tmp_path / "grid.toml"), "--dry-run", *asked]) == 0 and not (tmp_path / "s").exists()
    capsys.readouterr()
    assert main(["sweep", str(tmp_path / "grid.toml"), "--dry-run", "--json", *asked]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert [(c["state"], c["seed"], c["lr"]) for c in cells] == [
        ("waiting", seed, lr) for seed in (0, 1) for lr in (1e-3, 1e-2)] and not (tmp_path / "s").exists()
    assert main(["sweep", str(tmp_path / "grid.toml"), "--dry-run", *asked]) == 0
    assert main(["sweep", str(tmp_path / "grid.toml"), *asked, "--table", str(tmp_path / "t.csv")]) == 0
    assert "4, 0 of them done" in (out := capsys.readouterr().out) and "Methods, held-out loss" in out
    assert (tmp_path / "t.csv").read_text().count("\n") == 3
    assert main(["sweep", str(tmp_path / "odd.toml"), *asked, "--json"]) == 1
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["done", "failed"]
    for name, told in (("wrong.toml", "not valid TOML"), ("none.toml", "no such file")):
        assert main(["sweep", str(tmp_path / name)]) == 2 and told in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "grid.toml"), "--table", "t.doc"]) == 2


def test_what_the_table_cannot_have_is_said_first(grid, tmp_path, capsys):
    "A metric or a method that is none, before anything runs; a warm-up as long as the run; a table not written."
    from qlora_lab.cli import main
    text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in (grid | {"lr": [1e-3, 2e-3]}).items())
    (tmp_path / "grid.toml").write_text(text)
    asked = "sweep", str(tmp_path / "grid.toml"), "--folder", str(tmp_path / "s"), "--device", "cpu"
    for more, said in ((("--metric", "acuracy"), "expected one of 'held-out loss'"),
                       (("--reference", "lr=7e-3"), "there are lr=0.001, lr=0.002")):
        assert main([*asked, "--dry-run", *more]) == 2 and said in " ".join(capsys.readouterr().err.split())
    assert main([*asked, "--dry-run"]) == 0 and "lr is never reached" in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "--dry-run", "--reference", "lr=2e-3"]) == 0
    capsys.readouterr()
    (tmp_path / "three.toml").write_text(f"{text}\nwarmup = 3\n")  # the third of three steps has the whole rate
    assert main(["sweep", str(tmp_path / "three.toml"), *asked[2:], "--dry-run"]) == 0
    assert "never reached" not in " ".join(capsys.readouterr().out.split())
    (tmp_path / "one.toml").write_text(text.replace("[0.001, 0.002]", "0.001"))
    one = "sweep", str(tmp_path / "one.toml"), "--folder", str(tmp_path / "o"), "--device", "cpu"
    assert main([*one, "--table", str(tmp_path / "t.md")]) == 1
    assert "was not written" in capsys.readouterr().err and not (tmp_path / "t.md").exists()


def test_what_failed_is_told_with_the_table(grid, tmp_path, capsys):
    "A method has the name that was checked before, though a cell failed; a reference that failed costs no more."
    from qlora_lab.cli import main
    text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in (grid | {"lr": [1e-3, 1e30], "max_grad_norm": 0}).items())
    (tmp_path / "grid.toml").write_text(text)
    asked = "sweep", str(tmp_path / "grid.toml"), "--folder", str(tmp_path / "s"), "--device", "cpu"
    for name in ("lr=0.001", "lr=1e+30"):
        assert main([*asked, "--reference", name]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert "No table of methods" in out and "Failed (1)" in out and "is nan" in out
    assert main([*asked, "--reference", "lr=0.001", "--json"]) == 1
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["done", "failed"]
    (tmp_path / "two.toml").write_text(text.replace("1e+30", "0.002"))
    asked = "sweep", str(tmp_path / "two.toml"), *asked[2:], "--json", "--table", str(tmp_path / "t.md")
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 2 and "written" in err


def test_the_table_of_a_sweep(grid, tmp_path):
    "In a notebook it is shown in its place while cells are at work, and says at the end what is so."
    from qlora_lab.sweep_table import SweepTable
    work = prepare(grid | {"lr": [1e-3, 1e30], "max_grad_norm": 0, "seed": [0, 1]}, tmp_path / "s")
    seen = []
    with SweepTable(work.places) as table:
        table.show = lambda head, lines: seen.append((head, lines))
        serve(replace(work, watchers=(table,)), table.told)
    assert "1 running" in seen[0][0] and seen[-1][0] == "4 cells: 2 failed, 2 done"
    assert [line.state for line in seen[-1][1]].count("failed") == 2
    assert "is nan" in "".join(line.message for line in seen[-1][1])


def test_chosen_scales_are_part_of_a_cell(grid, tmp_path):
    "Other weights than absmax gives, told by the run, and opened with them again."
    from qlora_lab.open_run import open_run
    table = sweep(grid | {"scales": ["absmax", "chosen"]}, tmp_path / "s", progress=False)
    assert list(table["state"]) == ["done"] * 2
    runs = [Run.load(p) for p in table["folder"]]
    assert [r.record["identity"].get("scales") for r in runs] == [None, "chosen"]
    assert runs[0].before.loss != runs[1].before.loss
    layers = [open_run(r.folder, None)[0].model.layers[0].mlp.down_proj for r in runs]
    assert not torch.equal(*(m.weight for m in layers)) or not torch.equal(*(m.absmax for m in layers))


def test_bitsandbytes_layers_are_copied_too(grid, tmp_path):
    "A cell on bitsandbytes' layers is a cell like any other, twice from one base."
    table = sweep(grid | {"backend": ["lab", "bnb"], "seed": [0, 1]}, tmp_path / "s", progress=False)
    assert list(table["state"]) == ["done"] * 4, list(table.get("message", []))
    loss = table["held-out loss [nats/token]"]
    assert abs(loss[0] - loss[2]) < 1e-3 and abs(loss[1] - loss[3]) < 1e-3 and loss[2] != loss[3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_processes_share_a_card(grid, tmp_path):
    "Memory and speed are those of a cell; the original of the base is no part of its peak."
    ask = grid | {"quant_type": ["nf4", "none"], "seed": [0, 1], "dtype": "bfloat16"}
    shared = sweep(ask, tmp_path / "shared", progress=False, workers=2, device="cuda")
    alone = sweep(ask, tmp_path / "alone", progress=False, device="cuda")
    for table in (shared, alone):
        assert list(table["state"]) == ["done"] * 4, list(table.get("message", []))
        assert (table["peak memory [GiB]"] > 0).all() and table["device"].str.contains("NVIDIA").all()
    assert (alone["others at work"] == 0).all()
    gap = (shared["held-out loss [nats/token]"] - alone["held-out loss [nats/token]"]).abs()
    assert gap.max() < 1e-2
