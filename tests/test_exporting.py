"A run, exported: merged on the way, with its history in the record, and nothing left beside the result."
import json

import pytest
import torch

from conftest import make_llama, make_tokenizer
from qlora_lab.cli import main
from qlora_lab.manifest import verify


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two steps on a tiny model in 4 bits."
    from qlora_lab import TrainConfig, load_model, train
    from qlora_lab.data import pair, split
    place = tmp_path_factory.mktemp("export")
    make_llama().save_pretrained(place / "base")
    make_tokenizer().save_pretrained(place / "base")
    model, tokenizer = load_model(place / "base", compute_dtype=torch.float32, device="cpu")
    data = split([pair(f"read the file {i}", f"sort the list {i}", group=str(i)) for i in range(12)], 0.3)
    train(model, tokenizer, data, TrainConfig(folder=str(place / "run"), steps=2, batch_size=2, accumulation=1, rank=4,
                                              eval_examples=2, eval_prompts=1))
    return place / "run"


def test_a_run_is_merged_first(run, capsys):
    from transformers import AutoModelForCausalLM

    from qlora_lab.open_run import open_run
    assert main(["export", str(run), "--gguf", "BF16"]) == 0
    out = run.parent / "run-BF16"
    steps = json.loads((out / "manifest.json").read_text())["steps"]
    assert [s["name"] for s in steps] == ["train", "merge", "export"] and verify(out)
    assert sorted(p.name for p in run.parent.iterdir()) == ["base", "run", "run-BF16"]
    opened = AutoModelForCausalLM.from_pretrained(out, gguf_file="model-BF16.gguf", dtype=torch.float32).eval()
    model, _, _ = open_run(str(run), device="cpu")
    ids = torch.arange(20)[None]
    with torch.no_grad(): ours, theirs = model(ids).logits.float(), opened(ids).logits
    assert (ours - theirs).abs().max() < 0.05 * ours.std()


def test_the_adapter_of_a_run_goes_beside_it(run):
    assert main(["export", str(run / "adapter"), "--gguf", "F32", "--base", str(run.parent / "base")]) == 0
    out = run.parent / "run-adapter-F32"
    assert verify(out) and (out / "adapter-F32.gguf").is_file()
    assert [s["name"] for s in json.loads((out / "manifest.json").read_text())["steps"]] == ["train", "export"]


def test_a_run_that_is_not_done_is_refused(run, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    record = json.loads((run / "run.json").read_text()) | {"state": "running"}
    (tmp_path / "begun" / "run.json").write_text(json.dumps(record))
    assert main(["export", str(tmp_path / "begun"), "--gguf", "F16"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["begun"]


def test_examples_to_calibrate_on_are_those_that_were_learned(run, tmp_path):
    "Without --data the docstrings, and not for a run that learned from others."
    from qlora_lab.commands.exporting import Export, calibrating
    from qlora_lab.records import LabError
    with pytest.raises(LabError, match="name them with --data"): calibrating(Export(str(run), gptq=True))
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"prompt": f"read {i}", "completion": "sort"}) + "\n" for i in range(20)))
    assert len(calibrating(Export(str(run), gptq=True, data=str(mine)))) < 20
