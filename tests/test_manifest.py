"The record of an artefact: what is altered, missing or added is told by name, and nothing altered becomes recorded."
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import make_llama, make_tokenizer, searched
from qlora_lab import file_hashes, manifest, origins
from qlora_lab.data import Split, pair
from qlora_lab.manifest import MANIFEST, history, keep_record, record_file, record_run, record_step, verify
from qlora_lab.manifest_file import digest_of, read_manifest, write_manifest
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.runs import TrainConfig
from qlora_lab.train import train

FILES = {"model.safetensors": bytes(range(256)) * 5000, "config.json": b"{}", "sub/adapter/a.bin": b"abc", "empty": b""}
BASE = {"name": "a-base", "sha256": "0" * 64, "licence": "mit"}

pytestmark = pytest.mark.usefixtures("one_thread")


def filled(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def artefact(tmp_path):
    folder = filled(tmp_path / "artefact")
    record_step(folder, "merge", settings={"how": "4bit"}, base=BASE)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run that is done, of a model in a folder, with no manifest yet."
    root = tmp_path_factory.mktemp("trained")
    make_llama().save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    (root / "base/README.md").write_text("---\nlicense: mit\n---\n")
    model, tokenizer = load_model(root / "base", device="cpu")
    rows = [pair(f"sort list {i}", f"the list {i}", group=str(i)) for i in range(8)]
    train(model, tokenizer, Split(rows[:5], rows[5:]), TrainConfig(
        folder=root / "run", steps=2, batch_size=2, accumulation=1, rank=2, eval_prompts=1, warmup=1), progress=False)
    (root / "run" / MANIFEST).unlink(missing_ok=True)
    return root


@pytest.fixture
def run(trained, tmp_path):
    "As earlier versions left it: without a manifest."
    folder = shutil.copytree(trained / "run", tmp_path / "run")
    (folder / MANIFEST).unlink(missing_ok=True)
    return folder


def link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def flip(path, at=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def other(path, kind):
    path.unlink()
    kind(path)


def kept_time(path):
    "A bit flipped, size and time as before."
    s = path.stat()
    flip(path, -1)
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))


CHANGES = {
    "a bit": (lambda f: flip(f / "model.safetensors", 1_279_999), "altered", "model.safetensors"),
    "a bit, at the same time": (lambda f: kept_time(f / "model.safetensors"), "altered", "model.safetensors"),
    "cut short": (lambda f: os.truncate(f / "config.json", 1), "altered", "config.json"),
    "longer": (lambda f: (f / "empty").write_text(" "), "altered", "empty"),
    "a link to the same bytes": (lambda f: link(f / "model.safetensors"), "altered", "model.safetensors"),
    "a pipe": (lambda f: other(f / "config.json", os.mkfifo), "altered", "config.json"),
    "gone": (lambda f: (f / "sub/adapter/a.bin").unlink(), "missing", "sub/adapter/a.bin"),
    "a folder gone": (lambda f: shutil.rmtree(f / "sub"), "missing", "sub/adapter/a.bin"),
    "a folder in its place": (lambda f: other(f / "empty", os.mkdir), "missing", "empty"),
    "come": (lambda f: (f / "sub/model.py").write_text("1"), "added", "sub/model.py"),
    "a link come": (lambda f: (f / "sub/x").symlink_to("/etc"), "added", "sub/x"),
    "hidden": (lambda f: (f / ".x").write_text("1"), "added", ".x"),
}


@pytest.mark.parametrize("change, where, name", CHANGES.values(), ids=CHANGES)
def test_each_change_is_told_by_name(change, where, name, artefact):
    assert verify(artefact).ok and verify(artefact).files == len(FILES)
    change(artefact)
    verdict = verify(artefact)
    found = {"altered": [*verdict.altered], "missing": [*verdict.missing], "added": [*verdict.added]}
    assert not verdict.ok and not verdict and found.pop(where) == [name] and not any(found.values())
    assert any(name in line and where in line for line in verdict.lines()) and verdict.manifest == "whole"


def test_what_git_and_the_hub_put_there_is_passed_over(artefact):
    for name in (".git/config", ".cache/huggingface/x", ".gitattributes", ".lock"):
        (artefact / name).parent.mkdir(parents=True, exist_ok=True)
        (artefact / name).write_text("1")
    assert verify(artefact).ok
    (artefact / "sub/.lock").write_text("1")  # not of the folder itself
    assert [*verify(artefact).added] == ["sub/.lock"]


@searched(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_byte_of_the_manifest_can_be_changed(artefact, data):
    "Each change is told, or leaves the content as it was (a blank)."
    path = artefact / MANIFEST
    whole = path.read_bytes()
    try:
        content = bytearray(whole)
        content[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        verdict = verify(artefact)
        same = verdict.ok and json.loads(bytes(content)) == json.loads(whole)
        assert same or verdict.manifest in ("damaged", "edited")
    finally: path.write_bytes(whole)


HOSTILE = {
    "climbs": ({"files": {"../secret": {"sha256": "0" * 64, "bytes": 1}}}, "no file inside the folder"),
    "absolute": ({"files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "no file inside the folder"),
    "in between": ({"files": {"sub/../../x": {"sha256": "0" * 64, "bytes": 1}}}, "no file inside the folder"),
    "itself": ({"files": {MANIFEST: {"sha256": "0" * 64, "bytes": 1}}}, "no file inside the folder"),
    "no hash": ({"files": {"config.json": {"sha256": "x", "bytes": 1}}}, "no sha256"),
    "a list": ({"files": []}, "no field 'files'"),
    "a later layout": ({"manifest": 2}, "layout"),
    "a step of nothing": ({"steps": [1]}, "a step"),
}


@pytest.mark.parametrize("change, told", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_reads_nothing(change, told, artefact, monkeypatch):
    "With a digest of its own."
    content = read_manifest(artefact) | change
    (artefact / MANIFEST).write_text(json.dumps(content | {"digest": digest_of(content)}))
    monkeypatch.setattr(manifest, "hash_file", lambda path: pytest.fail(f"read {path}"))
    verdict = verify(artefact)
    assert verdict.manifest == "damaged" and told in verdict.told and not verdict.ok
    with pytest.raises(LabError, match=told): record_step(artefact, "export")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"manifest": NaN}', "[" * 100_000, "\xff\xfe"])
def test_half_a_manifest(content, artefact):
    (artefact / MANIFEST).write_bytes(content.encode("latin1"))
    verdict = verify(artefact)
    assert verdict.manifest == "damaged" and len(verdict.lines()) == 1 and MANIFEST in verdict.told


def test_a_file_that_cannot_be_read(artefact, monkeypatch):
    whole = os.open
    def refuse(path, *how, **more):
        if str(path).endswith("config.json"): raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *how, **more)
    monkeypatch.setattr(os, "open", refuse)
    verdict = verify(artefact)
    assert verdict.altered == {"config.json": "cannot be read (Permission denied)"}
    with pytest.raises(LabError, match=r"config.json: cannot be read \(Permission denied\)"):
        record_step(artefact, "export")


def test_a_file_that_changes_while_it_is_read(artefact, monkeypatch):
    whole = file_hashes.hashlib.file_digest
    def slow(f, kind):
        found = whole(f, kind)
        with open(f.name, "ab") as more: more.write(b"x")
        return found
    monkeypatch.setattr(file_hashes.hashlib, "file_digest", slow)
    with pytest.raises(LabError, match="changed while it was read"): record_step(artefact, "export")
    assert all("changed while" in why for why in verify(artefact).altered.values())


def test_a_pipe_does_not_hold_the_check_up(artefact):
    os.mkfifo(artefact / "pipe")
    done = threading.Thread(target=lambda: verify(artefact), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive() and verify(artefact).added == {"pipe": "not a plain file"}


def test_only_a_digest_from_elsewhere_tells_a_forged_record(artefact):
    noted = verify(artefact).digest
    assert verify(artefact, noted).ok and verify(artefact, f"sha256:{noted.upper()}").ok
    flip(artefact / "config.json")
    (artefact / MANIFEST).unlink()
    record_step(artefact, "merge", settings={"how": "4bit"}, base=BASE)
    assert verify(artefact).ok and verify(artefact, noted).manifest == "another" and not verify(artefact, noted).ok


def test_what_has_no_manifest_is_a_verdict_of_its_own(tmp_path, run):
    (tmp_path / "empty").mkdir()
    verdict = verify(run)
    assert verdict.manifest == "none" and not verdict.ok and "earlier version" in verdict.told
    assert "expected a folder that train, merge or export wrote" in verify(tmp_path / "empty").told
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": "running"}))
    assert "not done" in verify(run).told
    (run / "run.json").write_text("{")
    assert "damaged run.json" in verify(run).told
    with pytest.raises(LabError, match="no such folder"): verify(tmp_path / "nowhere")
    with pytest.raises(LabError, match="no such folder"): verify(run / "run.json")


def test_a_run_gets_its_record(run, trained):
    "Base, data, settings, metrics with their errors; nothing of the machine's folders."
    path = record_run(run)
    content, record = read_manifest(run), json.loads((run / "run.json").read_text())
    assert verify(run).ok and content["base"] == {
        "name": "base", "licence": "mit", "sha256": origins.weights_hash(trained / "base")}
    assert content["data"] == {"train": record["identity"]["data"], "held_out": record["identity"]["held_out"]}
    step, = content["steps"]
    assert (step["name"], step["settings"]["rank"], step["settings"]["folder"]) == ("train", 2, "run")
    for side in ("before", "after"):
        loss, error = step["metrics"][side]["held-out loss, nats a token"]
        score = record[side]["score"]
        assert loss == pytest.approx(sum(score["sums"]) / sum(score["tokens"])) and 0 < error < loss
    assert str(trained) not in path.read_text() and str(Path.home()) not in path.read_text()
    with pytest.raises(LabError, match="there already"): record_run(run)


def test_a_run_that_cannot_have_a_record(run, trained):
    record = json.loads((run / "run.json").read_text())
    for change, told in (({"state": "running"}, "not done"), ({"identity": {}}, "not the whole record"),
                         ({"after": {}}, "run.json: after is {}, expected a score")):
        (run / "run.json").write_text(json.dumps(record | change))
        with pytest.raises(LabError, match=told): record_run(run)
    gone = record["identity"] | {"model": str(trained / "gone")}
    (run / "run.json").write_text(json.dumps(record | {"identity": gone}))
    with pytest.raises(LabError, match="no such folder"): record_run(run)
    (run / "run.json").write_text(json.dumps(record | {"identity": record["identity"] | {"model": "?"}}))
    with pytest.warns(UserWarning, match="needs to be told its base"): keep_record(run)  # trained all the same
    record_run(run, base=BASE)
    keep_record(run)  # there already: nothing to do, nothing to say
    assert read_manifest(run)["base"] == BASE and not (run / MANIFEST).read_text().count("gone\"")


@pytest.mark.parametrize("recorded", [True, False], ids=["with a manifest", "of an earlier version"])
def test_a_history_goes_along(run, tmp_path, recorded):
    "Train, merge, export: each knows what it started from, and the same base and data."
    if recorded: record_run(run)
    merged, exported = filled(tmp_path / "merged"), filled(tmp_path / "exported")
    record_step(merged, "merge", run, {"how": "dequantized"}, {"before": {"KL": 0.}, "after": {"KL": (0.1, 0.02)}})
    record_step(exported, "export", merged, {"gguf": "Q4_K_M", "dtype": torch.float16})
    content = read_manifest(exported)
    assert [s["name"] for s in content["steps"]] == ["train", "merge", "export"] and verify(exported).ok
    assert content["base"]["licence"] == "mit" and content["data"]["train"]
    assert content["steps"][2]["source"] == read_manifest(merged)["digest"]
    assert content["steps"][1]["source"] == (read_manifest(run)["digest"] if recorded else None)
    assert content["steps"][1]["metrics"]["after"]["KL"] == [0.1, 0.02]
    assert content["steps"][2]["settings"]["dtype"] == "float16" and set(content["files"]) == set(FILES)


def test_a_plain_model_is_a_base(trained, tmp_path):
    record_step(filled(tmp_path / "exported"), "export", trained / "base")
    content = read_manifest(tmp_path / "exported")
    assert content["base"]["name"] == "base" and len(content["steps"]) == 1 and content["data"] == {}
    with pytest.raises(LabError, match="no such folder"): history(tmp_path / "nowhere")
    with pytest.raises(LabError, match="no weights"): record_step(tmp_path / "exported", "x") and history(tmp_path)


def test_no_altered_file_becomes_a_recorded_one(artefact, run, tmp_path):
    "Neither that of the source, nor one of the folder's own; what a step says it wrote, and a README, may change."
    record_run(run)
    flip(run / "adapter/adapter_model.safetensors", -1)
    with pytest.raises(LabError, match="adapter_model.safetensors: altered since"): history(run)
    before = (artefact / MANIFEST).read_bytes()
    flip(artefact / "model.safetensors")
    for source in (None, run):
        with pytest.raises(LabError, match="model.safetensors: altered since"): record_step(artefact, "export", source)
    with pytest.raises(LabError, match="altered since"): record_step(tmp_path, "export", artefact)
    assert (artefact / MANIFEST).read_bytes() == before
    (artefact / "README.md").write_text("mine")
    record_step(artefact, "again", written=("model.safetensors",))
    (artefact / "README.md").write_text("mine, changed")
    record_step(artefact, "and again")
    assert verify(artefact).ok and len(read_manifest(artefact)["steps"]) == 3
    (artefact / "config.json").unlink()
    with pytest.raises(LabError, match="config.json: recorded in manifest.json, and not there"):
        record_step(artefact, "export")


def test_an_edited_record_is_not_gone_on_with(artefact, tmp_path):
    path = artefact / MANIFEST
    path.write_text(path.read_text().replace("mit", "gpl"))
    for go_on in (lambda: record_step(artefact, "export"), lambda: history(artefact),
                  lambda: record_file(artefact, "config.json")):
        with pytest.raises(LabError, match="edited after it was written"): go_on()


def test_an_artefact_holds_its_own_bytes(artefact):
    (artefact / "tokenizer.json").symlink_to(artefact / "config.json")
    with pytest.raises(LabError, match="tokenizer.json: a link"): record_step(artefact, "export")


def test_one_file_is_recorded_anew(artefact):
    (artefact / "config.json").write_text("[]")
    flip(artefact / "sub/adapter/a.bin")
    record_file(artefact, "config.json")
    assert [*verify(artefact).altered] == ["sub/adapter/a.bin"] and len(read_manifest(artefact)["steps"]) == 1


def test_a_full_disk_leaves_the_old_record(artefact, monkeypatch):
    before = (artefact / MANIFEST).read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"): record_step(artefact, "export")
    assert (artefact / MANIFEST).read_bytes() == before and verify(artefact).ok


def test_what_cannot_be_written_down_is_refused(artefact):
    with pytest.raises(LabError, match="cannot hold a Tensor"):
        record_step(artefact, "export", settings={"weights": torch.ones(2)})
    record_step(artefact, "export", metrics={"after": {"loss": torch.tensor(2.), "nan": float("nan")}})
    assert read_manifest(artefact)["steps"][1]["metrics"]["after"] == {"loss": 2.0, "nan": "nan"}


def test_another_base_is_another_hash(tmp_path, monkeypatch):
    "All bytes count; where nothing has changed, none is read again; a file changed in place is."
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.zeros(100)}, folder / "model.safetensors")
    first = origins.base_of(folder)
    monkeypatch.setattr(origins, "hash_file", lambda path: pytest.fail(f"read {path} again"))
    assert origins.base_of(folder) == first == {"name": "model", "sha256": first["sha256"], "licence": None}
    monkeypatch.undo()
    kept_time(folder / "model.safetensors")
    assert origins.base_of(folder)["sha256"] != first["sha256"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(LabError, match="no weights"): origins.base_of(folder)


def test_a_hub_id_is_its_commit_and_the_network_is_not_asked(tmp_path, monkeypatch):
    "As the Hub's library lays its cache out."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(LabError, match="no such model in the Hub's cache"): origins.base_of("owner/model")
    commit, repo = "a" * 40, tmp_path / "models--owner--model"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "snapshots" / commit / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\n")
    assert origins.base_of("owner/model") == {"name": "owner/model", "revision": commit, "licence": "llama3"}


def test_a_manifest_written_twice_is_the_same_bytes(artefact):
    before = (artefact / MANIFEST).read_bytes()
    write_manifest(artefact, read_manifest(artefact))
    assert (artefact / MANIFEST).read_bytes() == before
