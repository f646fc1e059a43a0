"Runs, checkpoints, manifests and GGUF files that were changed: refused by the file's name, or read; nothing else."
import json
import shutil

import pytest
import torch
from bad_inputs import as_text, refusal, refused, spoiled_bytes, spoiled_value, spoilings, written

from conftest import WORDS, make_llama, make_tokenizer
from qlora_lab.data import load_examples, split
from qlora_lab.engine.gguf_files import contents, to_gguf
from qlora_lab.manifest import verify
from qlora_lab.model import load_model
from qlora_lab.open_run import open_run
from qlora_lab.results import results
from qlora_lab.runs import Run
from qlora_lab.settings import TrainConfig
from qlora_lab.train import train
from qlora_lab.watching import Watcher

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
SHORT = dict(steps=4, batch_size=2, accumulation=1, rank=2, eval_examples=4, eval_prompts=1, checkpoint_every=2,
             eval_every=2, lr=1e-3)
DATA = split(load_examples([{"prompt": f"{w} {i}", "completion": f"{w.capitalize()}.", "group": f"g{i // 4}"}
                            for i, w in enumerate(WORDS * 5)]), 0.2)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


class Stop(Watcher):
    "Ends a run in its third step."
    def on_step(self, row):
        if row["step"] == 3: raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    make_llama(hidden=32, layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base):
    "A function that trains in a folder, or goes on there."
    def go(folder, watchers=()):
        model, tokenizer = load_model(base, **EXACT)
        return train(model, tokenizer, DATA, TrainConfig(folder=str(folder), **SHORT), False, watchers)
    return go


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory): return trained(tmp_path_factory.mktemp("runs") / "done").folder


@pytest.fixture(scope="module")
def half(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "half"
    with pytest.raises(KeyboardInterrupt): trained(folder, [Stop()])
    return folder


def spoil(path, whole, seed):
    "One odd value in a file of JSON, in most cases; else one fault in its bytes."
    if path.suffix == ".json" and seed % 5: return written(path, as_text(spoiled_value(json.loads(whole), seed)))
    if path.suffix == ".jsonl" and seed % 5:
        lines = whole.decode().splitlines()
        lines[seed % len(lines)] = as_text(spoiled_value(json.loads(lines[seed % len(lines)]), seed))
        return written(path, "\n".join(lines) + "\n")
    return written(path, spoiled_bytes(whole, seed, 1200))


def sayings(read, source, file, count, place):
    "What a reader says to copies of a folder in which one file is odd."
    whole, said = (source / file).read_bytes(), []
    for seed in spoilings(count):
        shutil.rmtree(place, ignore_errors=True)
        spoil(shutil.copytree(source, place) / file, whole, seed)
        said.append(refusal(read, place, (source / file).name))
    return said


def looked_at(folder):
    "All that a record is asked for."
    run = Run.load(folder)
    return run.losses, run.before.stderr, run.after.loss, run.held_out, run.answers, run.memory, run.base


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl"])
def test_a_record_that_was_changed(file, done, tmp_path):
    looked_at(done)
    said = sayings(looked_at, done, file, 40, tmp_path / "run")
    assert sum(s is not None for s in said) > 8


SCORE = {"sums": [1.0, 10**400], "tokens": [1, 1], "groups": ["a", "b"]}
ODD_PARTS = [
    ("before", {"score": SCORE}), ("after", {"score": SCORE}), ("memory", {"codes": [1]}),
    ("memory", {"codes": [10**400] * 3}), ("base", {"held": {"quantize": ["a", 1]}}), ("base", {"held": {"": ""}}),
    ("base", {"held": {"blocksize": 10**400}}), ("base", {"held": {}, "mark": [1]}), ("answers", [{"reference": "a"}]),
    ("ended", {"step": None}), ("steps", "x"), ("peak_memory_gib", None), ("provenance", {"command": 1}),
    ("before", ...), ("after", ...), ("memory", ...), ("answers", ...), ("identity", ...), ("identity", {})]


@pytest.mark.parametrize("name, value", ODD_PARTS, ids=range(len(ODD_PARTS)))
def test_an_odd_part_of_a_record(name, value, done, tmp_path):
    "Of another kind, too large a number, or not there: the file and the part are named where it is asked for."
    record = json.loads((done / "run.json").read_text()) | {name: value}
    (tmp_path / "run").mkdir()
    written(tmp_path / "run/run.json", as_text({k: v for k, v in record.items() if v is not ...}))
    assert name in refused(looked_at, tmp_path / "run", "run.json") or name == "identity"


SWEPT = [("cell.json", {"settings": []}), ("cell.json", {}), ("run.json", {"identity": []}),
         *(("measures.json", {"measures": odd}) for odd in (
             [], {"a": {"score": SCORE}}, {"a": {"value": "x"}}, {"a": {"score": {}}}))]


@pytest.mark.parametrize("file, content", SWEPT, ids=range(len(SWEPT)))
def test_an_odd_file_of_a_cell(file, content, done, tmp_path):
    "What a sweep puts beside a run, and the run's own record, as its table reads them."
    folder = shutil.copytree(done, tmp_path / "run")
    assert len(results(folder)) == 1
    written(folder / file, as_text(content))
    refused(results, folder, file)


@pytest.mark.parametrize("name", ["state", "before", "answers"])
def test_going_on_needs_what_each_run_has(name, half, trained, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    written(folder / "run.json", as_text({k: v for k, v in record.items() if k != name}))
    assert f"says nothing of {name!r}" in refused(trained, folder, "run.json")


@pytest.mark.parametrize("name, value", [("seconds", ...), ("lr", ...), ("tokens", 10**400), ("step", 1.0),
                                         ("loss", None), ("held_out_stderr", "x")])
def test_an_odd_line_of_metrics(name, value, half, trained, tmp_path):
    folder = shutil.copytree(half, tmp_path / "run")
    first, *more = (folder / "metrics.jsonl").read_text().splitlines()
    row = {k: v for k, v in (json.loads(first) | {name: value}).items() if v is not ...}
    written(folder / "metrics.jsonl", "\n".join([as_text(row), *more]) + "\n")
    assert "metrics.jsonl:1" in refused(trained, folder, "metrics.jsonl")


@pytest.mark.parametrize("file", ["run.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"])
def test_opening_a_run_that_was_changed(file, done, tmp_path):
    def opened(folder): open_run(folder, device="cpu")
    said = sayings(opened, done, file, 16, tmp_path / "run")
    assert sum(s is not None for s in said) > 4


@pytest.mark.parametrize("part", ["identity", "base", "config", "provenance"])
def test_each_entry_of_a_record_left_out(part, done, tmp_path):
    "Opened, and told of in a table, as it was; or refused by the file's name."
    record, folder = json.loads((done / "run.json").read_text()), shutil.copytree(done, tmp_path / "run")
    def opened(folder): open_run(folder, device="cpu")
    for name in record[part]:
        rest = {k: v for k, v in record[part].items() if k != name}
        written(folder / "run.json", as_text(record | {part: rest}))
        for read in (opened, results): refusal(read, folder, "run.json")


@pytest.mark.parametrize("name", ["dtype", "compute_dtype"])
def test_no_type_is_guessed(name, done, tmp_path):
    record, folder = json.loads((done / "run.json").read_text()), shutil.copytree(done, tmp_path / "run")
    written(folder / "run.json", as_text(record | {"identity": record["identity"] | {name: "torch.flot32"}}))
    assert name in refused(lambda folder: open_run(folder, device="cpu"), folder, "run.json")


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl", "checkpoint/state.safetensors"])
def test_going_on_with_a_run_that_was_changed(file, half, trained, tmp_path):
    said = sayings(trained, half, file, 14, tmp_path / "run")
    assert sum(s is not None for s in said) > 2


def test_crafted_checkpoints(half, trained, tmp_path):
    "Headers that claim 2^60 bytes or numbers, a step that is none, another one's tensors."
    from safetensors.torch import load_file, save_file
    state = load_file(half / "checkpoint/state.safetensors")
    def kept(step, tensors=state): return lambda path: save_file(tensors, path, metadata={"step": step})
    huge = b'{"__metadata__":{"step":"2"},"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'
    wide = {k: torch.cat([t, t]) if t.dim() else t for k, t in state.items()}
    for make in (lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"), kept("two"), kept("9" * 5000),
                 lambda path: path.write_bytes(len(huge).to_bytes(8, "little") + huge + bytes(4)), kept("-1"),
                 kept("2", dict(list(state.items())[:-3])), kept("2", wide), kept("1000000000")):
        folder = shutil.copytree(half, tmp_path / "run")
        make(folder / "checkpoint/state.safetensors")
        refused(trained, folder, "state.safetensors", "metrics.jsonl")
        shutil.rmtree(folder)


def test_a_manifest_that_was_changed(done, tmp_path):
    "It is refused, or found to differ from the files; or what was changed says nothing of them."
    def held(folder):
        verdict = verify(folder)
        assert verdict is not None
    assert (done / "manifest.json").is_file()
    sayings(held, done, "manifest.json", 40, tmp_path / "run")


def test_a_gguf_file_that_was_changed(base, tmp_path):
    "Any fault in its numbers: a sentence, and no memory for what they claim."
    file = to_gguf(base, "Q8_0", tmp_path / "out")
    whole, said = file.read_bytes(), []
    for seed in spoilings(60):
        said.append(refusal(contents, written(tmp_path / "odd.gguf", spoiled_bytes(whole, seed, 900))))
    assert sum(s is not None for s in said) > 15


GGUF = b"GGUF" + (3).to_bytes(4, "little")
NUMBER = {n: n.to_bytes(8, "little") for n in (0, 1, 2**20, 2**40, 2**60, 2**64 - 1)}
KEY = NUMBER[1] + b"a"  # a name of one letter


@pytest.mark.parametrize("raw", [
    b"", b"GGUF", GGUF, GGUF + NUMBER[2**60] * 2, GGUF + NUMBER[0] + NUMBER[2**64 - 1],
    GGUF + NUMBER[0] + NUMBER[1] + NUMBER[2**60] + b"a", GGUF + NUMBER[2**40] + NUMBER[0],
    GGUF + NUMBER[0] + NUMBER[1] + KEY + (8).to_bytes(4, "little") + NUMBER[2**60],
    GGUF + NUMBER[0] + NUMBER[1] + KEY + (9).to_bytes(4, "little") + (4).to_bytes(4, "little") + NUMBER[2**60],
    GGUF + NUMBER[0] + NUMBER[1] + KEY + (9).to_bytes(4, "little") + (9).to_bytes(4, "little") * 40_000,
    GGUF + NUMBER[0] + NUMBER[1] + KEY + (99).to_bytes(4, "little"), b"GGUF" + (9).to_bytes(4, "big") + NUMBER[0] * 2,
    GGUF + NUMBER[2**20] + NUMBER[0], bytes(10_000)], ids=range(14))
def test_crafted_gguf(raw, tmp_path):
    refused(contents, written(tmp_path / "a.gguf", raw))
