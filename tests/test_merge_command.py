"`qlora-lab merge`: from a run to a folder that transformers opens, whole or not at all, with its record."
import json
import resource
import shutil
import signal
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lab.cli import main
from qlora_lab.manifest import verify
from qlora_lab.model import load_model
from qlora_lab.open_run import open_run
from qlora_lab.runs import TrainConfig
from qlora_lab.ship import merge
from qlora_lab.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def run(tiny, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    model, tokenizer = load_model(tiny, device="cpu", compute_dtype=torch.float32)
    config = TrainConfig(folder=str(folder), steps=3, batch_size=4, accumulation=1, lr=1e-2, rank=4, eval_prompts=3)
    train(model, tokenizer, data, config, progress=False)
    return folder


@torch.no_grad()
def logits(model): return model(input_ids=IDS).logits


@pytest.mark.parametrize("how", ["dequantized", "original", "4bit"])
def test_what_is_written_is_the_merged_model(run, tmp_path, capsys, how):
    out = tmp_path / "made"
    assert main(["merge", str(run), "--out", str(out), "--how", how, "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "held-out loss, nats a token" in said and "KL from the adapted model" in said and str(out) in said
    model, _, _ = open_run(run, device="cpu")
    base = json.loads((run / "run.json").read_text())["identity"]["model"]
    wanted = logits(merge(model, how, base if how == "original" else None, torch.float32))
    if how == "4bit": again, _ = load_model(out, device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    else: again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(logits(again), wanted, atol=1e-6)
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_the_folder_carries_its_record(run, tmp_path):
    out = tmp_path / "made"
    assert main(["merge", str(run), "--out", str(out)]) == 0
    assert verify(out).ok and "merged by QLoRA Lab" in (out / "README.md").read_text()
    steps = json.loads((out / "manifest.json").read_text())["steps"]
    assert [s["name"] for s in steps][-2:] == ["train", "merge"]
    step = steps[-1]
    assert step["settings"] == {"how": "dequantized", "dtype": "bfloat16"}
    name = "held-out loss, nats a token"
    before, after = (step["metrics"][side][name][0] for side in ("before", "after"))
    assert abs(before - after) < 0.05 and step["metrics"]["after"]["KL from the adapted model"][0] < 0.01


def fails(capsys, *words):
    assert main(["merge", *map(str, words)]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("qlora-lab: ") and "\n" not in told
    return told


def test_mistakes_are_one_sentence_and_change_nothing(run, tiny, tmp_path, capsys):
    taken, before = tmp_path / "taken", sorted(p.name for p in run.rglob("*"))
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert "already holds something" in fails(capsys, run, "--out", taken)
    assert (taken / "mine.txt").read_text() == "mine"
    out = tmp_path / "out"
    assert "no run here" in fails(capsys, tmp_path / "nowhere", "--out", out)
    assert "is for how='original'" in fails(capsys, run, "--out", out, "--base", tiny)
    assert "--out" in fails(capsys, run)
    other = shutil.copytree(tiny, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.model.layers[0].mlp.up_proj.weight.data += 0.02
    model.save_pretrained(other)
    capsys.readouterr()
    told = fails(capsys, run, "--out", out, "--how", "original", "--base", other)
    assert "another model than the 4-bit base" in told
    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "adapter")
    assert "adapter" in fails(capsys, bare, "--out", out)
    assert not out.exists() and sorted(p.name for p in run.rglob("*")) == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_nothing(run, tmp_path, capsys):
    "A file may be of 64 KiB: the weights do not fit."
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try: told = fails(capsys, run, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "large" in told.lower() and not list(tmp_path.iterdir())


def test_a_run_without_prompts_has_no_numbers(run, tmp_path, capsys):
    "Nothing is made up where nothing was kept."
    bare = shutil.copytree(run, tmp_path / "bare")
    record = json.loads((bare / "run.json").read_text()) | {"answers": []}
    (bare / "run.json").write_text(json.dumps(record))
    if (bare / "manifest.json").exists(): (bare / "manifest.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert main(["merge", str(bare), "--out", str(tmp_path / "out")]) == 0
    assert "adapted" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"][-1]["metrics"] == {}
