"""Bad input and faults: one clear message that names the file, line or field; nothing that was saved is harmed.

The library raises LabError or ValueError; the command line prints it on the error stream, without a traceback, and
exits with 2.
"""
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import make_llama, searched
from qlora_lab import cli
from qlora_lab.bnb_files import save_quantized
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.lora import add_lora, load_adapter, save_adapter, trainable
from qlora_lab.model import load_model
from qlora_lab.records import LabError

QUICK = ["--steps", "2", "--rank", "2", "--eval-examples", "2", "--eval-prompts", "1", "--checkpoint-every", "1",
         "--compute-dtype", "float32", "--held-out", "0.2"]


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def lab(capfd, monkeypatch):
    "The console script: exit code and error stream, checked for the form that every message has."
    monkeypatch.delenv("QLORA_LAB_DEBUG", raising=False)
    def call(*argv):
        code = cli.main([str(a) for a in argv])
        err = capfd.readouterr().err
        if code:
            assert code == 2 and "Traceback" not in err
            message = err.strip().splitlines()[-1]
            assert message.startswith("qlora-lab: ") and err.count("qlora-lab: ") == 1
            return code, message
        return code, err
    return call


@pytest.fixture(scope="module")
def finished(tiny, jsonl, tmp_path_factory):
    "A finished run of the console script."
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert cli.main(["train", "--data", str(jsonl), "--model", str(tiny), "--out", str(folder), *QUICK]) == 0
    return folder


# weights

@searched(60)
@given(st.integers(1, 400), st.integers(0, 399), st.sampled_from([torch.nan, torch.inf, -torch.inf]),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       st.sampled_from(["nf4", "fp4"]), st.booleans(), st.sampled_from([32, 64, 4096]))
def test_one_number_that_is_not_finite(n, at, bad, dtype, quant_type, nested, blocksize):
    "Anywhere, whole block or partial: it would spoil its block, and the mean of all blocks, without a word."
    w = torch.ones(n, dtype=dtype)
    w[at % n] = bad
    with pytest.raises(ValueError, match=rf"expected finite numbers.*at index \[{at % n}\]"):
        quantize_4bit(w, quant_type, blocksize, nested)


@pytest.mark.parametrize("what, message", [
    ((torch.ones(8, dtype=torch.int64),), "floating point.*int64"),
    ((torch.ones(8, dtype=torch.bool),), "floating point.*bool"),
    (([1., 2.],), "floating point.*list"),
    ((torch.ones(0),), "at least one number.*empty"),
    ((torch.ones(4, 0),), r"shape \(4, 0\)"),
    ((torch.ones(8), "nf5"), "unknown code book 'nf5'; known: .*nf4"),
    ((torch.ones(8), "int8"), "int8.*255 levels; four bits hold at most 16"),
    ((torch.ones(8), "nf4", 48), "block size 48: expected one of 32, 64"),
    ((torch.ones(8), "nf4", 0), "block size.*0|positive"),
    ((torch.ones(8), "nf4", 64.), "block size|whole number")])
def test_what_cannot_be_quantized(what, message):
    with pytest.raises(ValueError, match=message): quantize_4bit(*what)


def test_a_nan_in_a_models_file_from_the_command_line(tiny, jsonl, tokenizer, lab, tmp_path):
    "The layer's full name, and no run folder begun."
    model = make_llama()
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    code, message = lab("train", "--data", jsonl, "--model", tmp_path / "m", "--out", tmp_path / "run", *QUICK)
    assert code == 2 and "model.layers.0.self_attn.v_proj" in message and "nan" in message
    assert not (tmp_path / "run").exists()


# data

@pytest.mark.parametrize("line, parts", [
    ("{oops", ["not valid JSON", "column"]), ('{"prompt": "a"}', ["'completion'"]),
    ('{"prompt": "a", "completion": " "}', ["completion is an empty answer"]),
    ('{"messages": [{"role": "user", "content": "a"}]}', ["expected 'assistant'"])])
def test_a_bad_line_from_the_command_line(line, parts, jsonl, tiny, lab, tmp_path):
    "File and line, what was expected; before the model is loaded, so at once."
    path = tmp_path / "mine.jsonl"
    path.write_text(jsonl.read_text().splitlines()[0] + "\n" + line + "\n")
    code, message = lab("train", "--data", path, "--model", tiny, "--out", tmp_path / "run", *QUICK)
    assert code == 2 and f"{path}:2: " in message and all(p in message for p in parts)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_or_not_a_file(lab, tmp_path, tiny):
    code, message = lab("train", "--data", tmp_path / "none.jsonl", "--model", tiny)
    assert code == 2 and "none.jsonl: no such file" in message
    code, message = lab("train", "--data", tmp_path, "--model", tiny)
    assert code == 2 and str(tmp_path) in message


def test_a_pair_longer_than_the_context(jsonl, tiny, lab, tmp_path):
    """Longer than --max-length, and longer than the model can take whatever --max-length says: the line is named both
    times."""
    path = tmp_path / "mine.jsonl"
    path.write_text(jsonl.read_text() + json.dumps({"prompt": "x" * 400, "completion": "y"}) + "\n")
    for limit, allowed in (("64", 64), ("100000", 256)):
        code, message = lab("train", "--data", path, "--model", tiny, "--out", tmp_path / "run", *QUICK,
                            "--max-length", limit)
        assert code == 2 and "mine.jsonl:81: " in message and f"longer than {allowed}" in message
        assert not (tmp_path / "run").exists()


def test_too_little_data(tiny, lab, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    code, message = lab("train", "--data", path, "--model", tiny, "--out", tmp_path / "run")
    assert code == 2 and "mine.jsonl: 1 examples in 1 groups leave one side of the split empty" in message


# models

def test_a_model_that_is_not_there(jsonl, lab, tmp_path):
    "A path, a folder without a model, a hub id that cannot be had: what was looked for, and where."
    (tmp_path / "empty").mkdir()
    for name, part in ((tmp_path / "none", "no model named"), ("smollm3", "no model named 'smollm3'"),
                       (tmp_path / "empty", "no config.json"), ("owner/model", "'owner/model'")):
        code, message = lab("train", "--data", jsonl, "--model", name, "--out", tmp_path / "run", *QUICK)
        assert code == 2 and part in message and str(name) in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, keep",
                         [("model.safetensors", 0.5), ("model.safetensors", 0.), ("config.json", 0.5),
                          ("model.safetensors", None), ("tokenizer.json", 0.5)])
def test_a_model_cut_short(name, keep, tiny, jsonl, lab, tmp_path):
    "A download that broke off: the model is named."
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    whole = (folder / name).read_bytes()
    if keep is None: (folder / name).unlink()
    else: (folder / name).write_bytes(whole[:int(len(whole) * keep)])
    code, message = lab("train", "--data", jsonl, "--model", folder, "--out", tmp_path / "run", *QUICK)
    assert code == 2 and str(folder) in message and not (tmp_path / "run").exists()


def test_a_4bit_checkpoint_that_lacks_a_part(tiny, tokenizer, tmp_path):
    "Statistics lost on the way: the layer would decode to nothing sensible."
    from safetensors.torch import load_file, save_file
    model, _ = load_model(tiny, compute_dtype=torch.float32)
    save_quantized(model, tmp_path / "q", tokenizer)
    file = tmp_path / "q" / "model.safetensors"
    state = load_file(file)
    lost = next(k for k in state if k.endswith("norm.weight"))
    save_file({k: v for k, v in state.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(LabError, match="missing"): load_model(tmp_path / "q")


def test_a_4bit_checkpoint_is_not_written_over_another(tiny, tmp_path):
    model, _ = load_model(tiny, compute_dtype=torch.float32)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("mine")
    with pytest.raises(LabError, match="already holds something"): save_quantized(model, tmp_path / "q")
    assert [p.name for p in tmp_path.rglob("*")] == ["q", "mine.txt"]


# adapters and run folders

def test_an_adapter_for_another_model(finished):
    model = make_llama(layers=1)
    with pytest.raises(LabError, match="made for another model.*missing in this model"):
        load_adapter(model, finished / "adapter")


@pytest.mark.parametrize("base", ["owner/model", None])
def test_an_adapter_that_names_its_base_or_does_not(base, tmp_path):
    "Where the file says what it was made for, so does the message; else it does not speak of a base named None."
    from peft import LoraConfig
    model = add_lora(nn.Sequential(nn.Linear(4, 4)),
                     LoraConfig(r=2, target_modules=["0"], base_model_name_or_path=base), seed=0)
    save_adapter(model, tmp_path)
    with pytest.raises(LabError, match="made for another model") as e:
        load_adapter(nn.Sequential(nn.Linear(8, 4)), tmp_path)
    assert str(e.value).endswith("(the adapter names 'owner/model' as its base)" if base else "in this model")


def test_a_folder_that_holds_another_run(finished, tiny, jsonl, lab):
    "Another rank, another seed, other data: refused with the setting that differs; the run stays as it was."
    before = snapshot(finished)
    for change in (["--rank", "4"], ["--seed", "1"], ["--steps", "3"], ["--eval-examples", "3"], ["--quantize", "fp4"],
                   ["--held-out", "0.5"], ["--backend", "bnb"]):
        code, message = lab("train", "--data", jsonl, "--model", tiny, "--out", finished, *QUICK, *change)
        assert code == 2 and "holds another run" in message and str(finished) in message
    assert snapshot(finished) == before


def test_a_folder_that_holds_other_files(tiny, jsonl, lab, tmp_path):
    "Someone's holiday pictures are not overwritten; nor is a file that is where the folder should be."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "beach.jpg").write_bytes(b"sand")
    (tmp_path / "file").write_text("x")
    for out in ("run", "file"):
        code, message = lab("train", "--data", jsonl, "--model", tiny, "--out", tmp_path / out, *QUICK)
        assert code == 2 and str(tmp_path / out) in message
    assert (tmp_path / "run" / "beach.jpg").read_bytes() == b"sand" and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["run.json", "checkpoint/state.safetensors"])
@pytest.mark.parametrize("keep", [0., 0.3, 0.99])
def test_a_run_cut_short(name, keep, finished, tiny, jsonl, lab, tmp_path):
    "A disk that filled up elsewhere: the damaged file is named, and left for its owner to look at."
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"state": "running"}))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:int(len(whole) * keep)])
    before = snapshot(folder)
    code, message = lab("train", "--data", jsonl, "--model", tiny, "--out", folder, *QUICK)
    assert code == 2 and str(folder / name) in message and snapshot(folder) == before


# files

@pytest.mark.parametrize("content", ["[1, 2]", "null", "{"])
def test_an_adapters_config_that_is_no_object(content, finished, tmp_path):
    "Valid JSON or not: the file is named, and the model stays as it was. (`test_records` has the rest on files.)"
    shutil.copytree(finished / "adapter", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(content)
    model = make_llama()
    with pytest.raises(LabError, match=r"adapter_config\.json: (expected a JSON object|not valid JSON)"):
        load_adapter(model, tmp_path / "a")
    assert not any("lora_" in n for n, _ in model.named_parameters())


# the command line itself

@pytest.mark.parametrize("argv, part", [
    ([], "COMMAND"), (["trian"], "trian"), (["train", "--rnak", "8"], "--rnak"),
    (["train", "--rank", "eight"], "eight"), (["train", "--rank", "0"], "rank=0"),
    (["train", "--dropout", "1"], "dropout=1"), (["train", "--lr", "0"], "lr=0"),
    (["train", "--held-out", "2"], "held_out=2"), (["train", "--quantize", "int3"], "int3"),
    (["train", "--device", "quantum"], "quantum"), (["doctor", "--loud"], "--loud")])
def test_bad_arguments(argv, part, lab):
    code, message = lab(*argv)
    assert code == 2 and part in message


def test_debug_shows_the_traceback(monkeypatch):
    "For whoever has to find out why."
    monkeypatch.setenv("QLORA_LAB_DEBUG", "1")
    with pytest.raises(LabError): cli.main(["train", "--data", "nowhere.jsonl"])


def test_target_modules_of_nothing(tiny, jsonl, lab, tmp_path):
    code, message = lab("train", "--data", jsonl, "--model", tiny, "--out", tmp_path / "run", *QUICK,
                        "--targets", "qq_proj")
    assert code == 2 and "qq_proj" in message and "q_proj" in message and not (tmp_path / "run").exists()


def test_saving_an_adapter_does_not_need_luck(tmp_path, monkeypatch):
    "If the second file cannot be written, the adapter that was there before is still whole."
    from peft import LoraConfig
    model = add_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), seed=0)
    save_adapter(model, tmp_path)
    before = snapshot(tmp_path)
    nn.init.ones_(trainable(model)[1])
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): save_adapter(model, tmp_path)
    assert snapshot(tmp_path) == before
