"Options of every command with values that make no sense: exit code 2, one line that names the option or the file."
import random
import typing
from dataclasses import MISSING, fields
from itertools import pairwise

import pytest
from bad_inputs import COUNT, bounded, spoilings
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import searched
from qlora_lab import cli
from qlora_lab.assets import smollm2_folder
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.planner import plan
from qlora_lab.records import LabError, printable
from qlora_lab.settings import TrainConfig

WORDS = ("", " ", "-1", "0", "1", "nan", "inf", "-inf", "1e999", "9" * 5000, "0x10", "1_000", "٣", "x", "none", "None",
         "true", "..", "../x", "/", "~", "a\0b", "\udcff", "\x1b[2J", "--", "--help=", "@x", "'", "%s", "{}", "\n",
         "é" * 300)

pytestmark = pytest.mark.usefixtures("one_thread", "converted")


@pytest.fixture(scope="module")
def converted():
    "The course's model is there: to convert it takes longer than a wrong line may."
    smollm2_folder()


def names(command):
    "The options of a command, as a line has them."
    return ["--" + f.name.replace("_", "-") for f in fields(cli.options_of(command)) if f.default is not MISSING]


OTHERS = "unrecognized options", "found none"  # what names no option that there is


def told(words, capfd, *named):
    "Exit code 2 and one sentence that names one of these, whatever the line says; a crash has 70."
    COUNT.update(tried=1, refused=1)
    with bounded(): code = cli.main(words)
    out, err = capfd.readouterr()
    said = " ".join(err.split("qlora-lab: ")[1:])
    assert code == 2 and err.startswith("qlora-lab: ") and "Traceback" not in err + out, (code, err[-600:])
    assert "\x1b" not in err and len(err) < 3000 and len(said) > 10 and "a defect of" not in err
    assert any(n.replace("-", "_") in said.replace("-", "_") for n in named), (words, said)
    return said


def test_a_crash_is_told_apart(capfd, monkeypatch):
    "The control: an error that nobody expected has another exit code, and `told` finds it."
    monkeypatch.delenv("QLORA_LAB_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_run", lambda argv: {}["gone"])
    with pytest.raises(AssertionError, match="70"): told(["data", "gone"], capfd, "gone")
    assert cli.main(["data"]) == 70 and "a defect of the lab" in capfd.readouterr().err
    def full(argv): raise RuntimeError("CUDA out of memory")
    monkeypatch.setattr(cli, "_run", full)
    assert cli.main(["data"]) == 2


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_odd_words_on_the_line(command, capfd, monkeypatch, tmp_path):
    "An option, or two, with a value that is none; what the command would work on is not there."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QLORA_LAB_DEBUG", raising=False)
    known = names(command) or ["--loud"]
    place = [] if command in ("train", "doctor") else [str(tmp_path / "gone")]
    if command == "train": place = ["--data", str(tmp_path / "gone.jsonl")]
    if command == "doctor": place = [str(tmp_path / "gone"), "--loud"]
    for seed in spoilings(14):
        rng = random.Random(seed)
        words = [w for _ in range(rng.choice((1, 1, 2))) for w in (rng.choice(known), rng.choice(WORDS))]
        if command == "train" and ("--data", "none") in {(o, w.lower()) for o, w in pairwise(words)}: continue  # trains
        there = [f.name for f in fields(cli.options_of(command))]
        said = [printable(w)[:50] for w in (*words, *there, *OTHERS)]
        told([command, *place, *words], capfd, *place[-1:], *(w.lstrip("-") for w in said if w.strip(" -")))
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("line", [
    [""], ["\0"], ["train\n"], ["-"], ["--"], ["train", "\udcff"], ["9" * 5000], ["tràin"], ["data"], ["chat"],
    ["train", *["--rank", "8"] * 200, "--data", "gone.jsonl"], ["compare"], ["sweep", "/dev/null/x"], ["merge"],
    ["data", "/dev/zero"], ["data", "/"], ["sweep", "/"], ["plan", "/etc/passwd"],
    ["sweep", "/dev/zero"]], ids=range(19))
def test_odd_lines(line, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told(line, capfd, *(printable(word)[:50] for word in line if word.strip("-")), "COMMAND", "found none")


NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers()))
FIELDS = [f.name for f in fields(TrainConfig)]


@searched(200)
@given(st.dictionaries(st.sampled_from(FIELDS), NUMBERS, min_size=1, max_size=4))
def test_any_setting(asked):
    "A run's settings are made, or refused by the name of one; no other error."
    try: made = TrainConfig(**asked)
    except LabError as e: assert any(name in str(e) for name in FIELDS), str(e)
    else:
        for f in fields(made):
            value, kind = getattr(made, f.name), f.type
            if kind in (int, float): assert value == value and abs(value) != float("inf")
            if typing.get_origin(kind) is typing.Literal: assert value in typing.get_args(kind)


SIZES = st.one_of(st.integers(-2, 2**70), st.none(), st.booleans(), st.floats(), st.text(max_size=3))


@searched(60)
@given(st.dictionaries(st.sampled_from(["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
                                        "num_key_value_heads", "intermediate_size", "model_type"]), SIZES, max_size=3))
def test_any_config_for_the_planner(odd):
    "Sizes of any kind are refused by a sentence before anything is built."
    sound = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 vocab_size=320)
    try: model_config(sound | odd)
    except LabError as e: assert "\n" not in str(e)


@searched(60)
@example({"quantize": ""}, None)
@example({"quantize": "dynamic8"}, None)
@given(st.dictionaries(st.sampled_from(["sequence", "batch_size", "rank", "blocksize", "quantize", "dtype", "targets"]),
                       NUMBERS, min_size=1, max_size=2), NUMBERS)
def test_any_setting_of_a_plan(asked, budget):
    try: plan("smollm2-135m", budget, **asked)
    except LabError as e: assert str(e)
