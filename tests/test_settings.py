"Every number that can be asked for is checked, by its type and its name, before anything runs."
import json
import math
from dataclasses import MISSING, fields, is_dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab import cli
from qlora_lab.data import split
from qlora_lab.engine.compressed import calibration
from qlora_lab.engine.planner import plan
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.grids import cells
from qlora_lab.intervals import errors_wide
from qlora_lab.records import LabError
from qlora_lab.settings import LIMITS, TrainConfig, _bare, as_json, check_fields, check_numbers
from qlora_lab.sweeping import sweep
from qlora_lab.talk import check_manner

NUMBERS = [f.name for f in fields(TrainConfig) if f.type in (int, float)]
COUNTS = [f.name for f in fields(TrainConfig) if f.type is int]
NO_NUMBERS = [math.nan, math.inf, -math.inf, 10 ** 400, 1e39, "1", None, True, [1], 1j, b"1"]
BESIDE = {"patience": {"eval_every": 1}, "epochs": {}, "merge_aware": {}}


def refused(name, value, cls=TrainConfig):
    with pytest.raises(LabError) as e: cls(**{name: value} | BESIDE.get(name, {}))
    assert str(e.value).startswith(f"{name}=") and "\n" not in str(e.value), e.value


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number(name):
    for value in NO_NUMBERS: refused(name, value)
    if name in COUNTS: refused(name, 2.5)


@pytest.mark.parametrize("name", [n for n in NUMBERS if n != "seed"])
def test_negative_numbers_and_zero(name):
    "Zero says something for some (never, none, all of it), and is refused for the others."
    refused(name, -1)
    refused(name, -1e-9) if name not in COUNTS else refused(name, -2 ** 40)
    zero = next((holds(0) for names, holds, _ in LIMITS if name in names), None)
    assert zero is not None, f"{name} has no row in LIMITS"
    if zero: assert getattr(TrainConfig(**{name: 0} | BESIDE.get(name, {})), name) == 0
    else: refused(name, 0)


@pytest.mark.parametrize(("name", "values"), [
    ("rslora", [1, "no", None]), ("tensorboard", ["false"]), ("checkpointing", [0, "yes"]), ("packing", [None]),
    ("targets", ["", " ", (), [], None, 3, ("q_proj", 3), ("",)]), ("folder", [None, 3, b"x", "a\0b"]),
    ("init_adapter", [None, 3, b"x"]), ("original_base", [1.]), ("method", ["dare", None, 1]), ("init", [True]),
    ("schedule", ["Cosine"]), ("long", [1]), ("adapter_dtype", ["int8"]), ("checkpoints_in", ["disk"]),
    ("budget", ["24 parsecs", -1, math.nan, "0GiB"]), ("seed", [2 ** 63, -2 ** 63]), ("optimizer_bits", [16, 0])])
def test_what_is_no_word(name, values):
    for value in values: refused(name, value)


def test_numbers_that_are_too_much_together():
    with pytest.raises(LabError, match=r"batch_size \* accumulation"): TrainConfig(batch_size=5000, accumulation=5000)
    with pytest.raises(LabError, match=r"lr \* loraplus_ratio"): TrainConfig(lr=1e30, loraplus_ratio=1e10)


def test_numbers_of_other_libraries_are_numbers():
    "And run.json takes them."
    config = TrainConfig(steps=np.int64(7), lr=np.float64(1e-3), dropout=np.float32(0.5), alpha=Fraction(3, 2))
    told = json.loads(json.dumps(as_json(config)))
    assert told["steps"] == 7 and told["alpha"] == 1.5 and type(config.steps) is int and type(config.lr) is float
    assert type(TrainConfig().alpha) is int  # as it was written: the adapter's config has it so


@given(st.sampled_from(NUMBERS), st.one_of(st.floats(), st.integers()))
def test_any_number_is_taken_or_refused_by_name(name, value):
    try: config = TrainConfig(**{name: value} | BESIDE.get(name, {}))
    except LabError as e: assert str(e).startswith((f"{name}=", "batch_size *", "lr *", "epochs=")), e
    else: assert math.isfinite(getattr(config, name))


# what a step is planned with

@pytest.mark.parametrize("name", [f.name for f in fields(Settings) if int in _bare(f.type)[0]])
def test_numbers_of_a_plan(name):
    for value in (math.nan, 2.5, "1", True, -1): refused(name, value, Settings)


def test_words_of_a_plan():
    for name, values in {"checkpointing": [1], "packed": ["no"], "targets": [(), ""], "kernels": [None]}.items():
        for value in values: refused(name, value, Settings)


# every option of every command

def options(cls):
    "The options with a number, those of nested groups too."
    for f in fields(cls):
        kinds, _ = _bare(f.type)
        inner = next((k for k in kinds if is_dataclass(k)), None)
        if inner: yield from ((name, kind, inner) for name, kind, _ in options(inner))
        if kinds and kinds[0] in (int, float): yield f.name, kinds[0], cls


def made(cls, **values):
    "An object of a command, whatever it must be told."
    needed = {f.name: "x" for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    check_fields(cls(**needed | values))


OPTIONS = [(command, *option) for command in cli.COMMANDS for option in options(cli.options_of(command))]


@pytest.mark.parametrize(("command", "name", "kind", "cls"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_number_of_a_command(command, name, kind, cls):
    for value in (math.nan, math.inf, *([-1] if name != "seed" else [])):
        with pytest.raises(LabError, match=f"^{name}="): made(cls, **{name: value})


def test_there_are_options():
    assert len(OPTIONS) > 40 and {"chat", "compare", "export", "sweep", "plan", "data"} <= {o[0] for o in OPTIONS}


@pytest.mark.parametrize("line", [
    "chat x --max-new-tokens 0", "chat x --temperature inf", "compare x y --level 1", "compare x y --level nan",
    "export x --gguf F16 --examples 0", "export x --gptq --max-length -1", "sweep x.toml --workers 0",
    "data x.jsonl --samples -1", "data x.jsonl --held-out 0", "plan x --gpu-gib nan", "plan x --sequence 0",
    "plan x --device-budget -1", "train --held-out nan", "train --seed 99999999999999999999", "train --lr 1e400"])
def test_from_the_command_line(line, capsys):
    "Code 2 and one line that names the option, before a file is looked for."
    assert cli.main(line.split()) == 2
    said = capsys.readouterr().err
    name = line.split("--")[-1].split()[0].replace("-", "_")
    assert said.startswith("qlora-lab: ") and said.count("\n") == 1 and name in said.replace("-", "_"), said


def by_cells(v): return cells([{"quant_type": "nf4", "blocksize": v}])


FUNCTIONS = {lambda v: sweep({"lr": 1e-3}, workers=v): "workers", lambda v: check_manner(v, 0): "max_new_tokens",
             lambda v: check_manner(1, v): "temperature", lambda v: errors_wide(3, v): "level",
             lambda v: split([], v): "held_out", lambda v: calibration(None, [1], v): "count",
             lambda v: plan("llama-7b", v): "gpu_gib", by_cells: "blocksize"}


def test_arguments_of_functions():
    for odd in ({"longest": 0}, {"level": 0}, {"count": 1.5}, {"temperature": -1}, {"held_out": 1}, {"workers": "2"}):
        with pytest.raises(LabError, match=f"^{next(iter(odd))}="): check_numbers(**odd)
    for call, name in FUNCTIONS.items():
        for odd in (-1, math.nan, math.inf, "2", True):
            with pytest.raises(LabError, match=f"^{name}="): call(odd)
    check_numbers(longest=1, level=0.5, temperature=0, held_out=None, unknown=-3)
