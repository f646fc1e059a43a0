"What is on the disk, and who may be at it: permissions, order of syncing, full and read-only disks, two processes."
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from conftest import make_llama, make_tokenizer
from qlora_lab import load_model, records, save_quantized, together
from qlora_lab.engine.gguf_files import to_gguf
from qlora_lab.locks import claimed, locked
from qlora_lab.merged_model import save_merged
from qlora_lab.records import Busy, LabError, whole_folder, write_whole
from qlora_lab.together import scratch, write_together

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(os.name != "posix", reason="POSIX's files")]
EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)


def python(code, *args, **how):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_of_whatever_a_library_writes(umask, tmp_path):
    "safetensors lets only the owner read what it writes; here the user's umask decides, for every file of a model."
    model, tokenizer = load_model(_model(tmp_path), **EXACT)
    before = os.umask(umask)
    try:
        save_quantized(model, tmp_path / "q", tokenizer)
        save_merged(load_model(tmp_path / "m", quantize=None, **EXACT)[0], tmp_path / "merged", tokenizer)
        to_gguf(tmp_path / "merged", "F16", tmp_path / "g")
    finally: os.umask(before)
    for folder in ("q", "merged", "g"):
        files = list((tmp_path / folder).iterdir())
        assert files and {p.stat().st_mode & 0o777 for p in files} == {0o666 & ~umask}
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o777 & ~umask


def _model(place):
    make_llama(layers=1).save_pretrained(place / "m")
    make_tokenizer().save_pretrained(place / "m")
    return place / "m"


def test_all_is_synced_before_the_rename_and_the_name_after(tmp_path, monkeypatch):
    "Files, the folders that they lie in, the folder itself; then its name, which is content of the folder above."
    seen, sync, replace = [], os.fsync, os.replace
    def name(fd): return os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).partition("-")[0]
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(name(fd)), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"-> {os.path.basename(b)}"), replace(a, b))[1])
    with whole_folder(tmp_path / "new" / "m") as made:
        (made / "sub").mkdir()
        for file in ("a", "sub/b"): (made / file).write_text("x")
    inside = seen[:seen.index("-> m")]
    assert tmp_path.name.partition("-")[0] in inside[0]  # where the folder "new" got its name
    assert {"a", "b", "sub"} <= set(inside) and inside.index("b") < inside.index("sub")
    assert any(n.startswith(".m.") for n in inside) and seen[seen.index("-> m") + 1:] == ["new"]
    seen.clear()
    write_whole(tmp_path / "f", "x")
    assert seen[0].startswith(".f.") and seen[1] == "-> f" and len(seen) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_the_message_names_the_file_that_was_to_be(number, tmp_path, monkeypatch):
    "And not the hidden one, whatever the disk has against it."
    def fail(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as e: write_whole(tmp_path / "run.json", "x")
    assert (e.value.errno, e.value.filename) == (number, str(tmp_path / "run.json"))
    with pytest.raises(OSError) as e, whole_folder(tmp_path / "m") as made: (made / "a").write_text("x")
    assert e.value.errno == number and e.value.filename.startswith(str(tmp_path / "m")) and not list(tmp_path.iterdir())


FULL = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from qlora_lab.cli import main
sys.exit(main(sys.argv[2:]))"""


def test_a_run_on_a_full_disk(tiny, jsonl, tmp_path, limit=40_000):
    "One line that names the file, nothing half; with room the same command ends."
    out = tmp_path / "run"
    argv = ["train", "--data", jsonl, "--model", tiny, "--out", out, "--steps", "4", "--rank", "4", "--held-out", "0.2",
            "--checkpoint-every", "1", "--eval-examples", "2", "--eval-prompts", "0", "--device", "cpu"]
    p = python(FULL, limit, *argv)
    _, said = p.communicate(timeout=120)
    last = said.strip().splitlines()[-1]
    assert p.returncode == 2 and "Traceback" not in said and last.startswith(f"qlora-lab: {out}/"), said
    assert "File too large" in last and "/." not in last
    for path in out.rglob("*") if out.exists() else ():
        if path.suffix == ".json": json.loads(path.read_text())
        assert path.suffix != ".safetensors"  # not even the first one had room
    from qlora_lab.cli import main
    assert main([str(a) for a in argv]) == 0 and json.loads((out / "run.json").read_text())["state"] == "done"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_only_be_read(tmp_path):
    tmp_path.chmod(0o555)
    try:
        for write in (lambda p: write_whole(p, "x"), lambda p: write_together(p, {"a": b"x"})):
            with pytest.raises(PermissionError) as e: write(tmp_path / "new")
            assert str(tmp_path) in str(e.value)
    finally: tmp_path.chmod(0o755)


# two processes

MAKES = """
import sys, time
from qlora_lab.records import whole_folder
with whole_folder(sys.argv[1]) as made:
    (made / "a").write_text("first")
    print("at it", flush=True)
    sys.stdin.read()"""


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_two_processes_make_one_folder(end, tmp_path):
    "The second is refused at once, by the number of the first; a killed one leaves the way free, and nothing behind."
    first = python(MAKES, tmp_path / "m")
    assert first.stdout.readline() == "at it\n"
    began = time.perf_counter()
    with pytest.raises(Busy, match=f"m: process {first.pid} is making this folder"):
        with whole_folder(tmp_path / "m"): raise AssertionError("it began")
    with whole_folder(tmp_path / "other"): pass  # another folder beside it is free
    assert time.perf_counter() - began < 5
    if end == "is killed": first.kill()
    first.communicate()
    if end == "ends":
        with pytest.raises(LabError, match="already holds something"), whole_folder(tmp_path / "m"): pass
        assert (tmp_path / "m" / "a").read_text() == "first"
    else:
        with whole_folder(tmp_path / "m") as made: (made / "a").write_text("second")
        assert (tmp_path / "m" / "a").read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other"]


def test_what_is_there_is_found_before_the_work(tmp_path):
    "A conversion of an hour does not end with a name that was taken all the time."
    (tmp_path / "m").write_text("mine")
    with pytest.raises(LabError, match="already holds something"), whole_folder(tmp_path / "m"):
        raise AssertionError("it began")


def test_a_folder_inside_one_that_is_being_made(tmp_path):
    with whole_folder(tmp_path / "m") as made:
        with whole_folder(made / "inner") as inner: (inner / "a").write_text("x")
        with whole_folder(made / "empty"): pass
    assert (tmp_path / "m" / "inner" / "a").read_text() == "x" and (tmp_path / "m" / "empty").is_dir()


def test_the_same_folder_spelled_in_two_ways(tmp_path, monkeypatch):
    "From where one stands and from the root: it is one folder, and its process does not wait for itself."
    monkeypatch.chdir(tmp_path)
    signal.alarm(20)
    try:
        with whole_folder("m") as made, whole_folder(made.absolute() / "inner") as inner: (inner / "a").write_text("x")
    finally: signal.alarm(0)
    assert (tmp_path / "m" / "inner" / "a").read_text() == "x"
    with pytest.raises(LabError, match="^n: cannot be written"), whole_folder("n") as made:
        with whole_folder(made.absolute()): raise _SafetensorError("I/O error: disk full (os error 28)")


_SafetensorError = type("SafetensorError", (Exception,), {})


def test_names_that_begin_alike(tmp_path):
    "Llama-3.1 is being made; Llama-3 is another folder."
    with whole_folder(tmp_path / "m.1"):
        with whole_folder(tmp_path / "m") as made: (made / "a").write_text("x")
        with pytest.raises(Busy), whole_folder(tmp_path / "m.1"): pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.1"]


def test_files_are_synced_where_only_a_writer_may(tmp_path, monkeypatch):
    "As on Windows, which forces nothing to the disk that was opened for reading."
    import fcntl
    import stat
    seen = []
    def writable(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode): seen.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY)
    monkeypatch.setattr(records, "fcntl", None)
    monkeypatch.setattr(os, "fsync", writable)
    save_quantized(load_model(_model(tmp_path), **EXACT)[0], tmp_path / "q")
    assert len(seen) > 3 and all(seen)


# files that change together

OLD, NEW = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b"}


def test_files_of_others_stay(tmp_path):
    "Those with a dot too: every repository of the Hub has a .gitattributes."
    write_together(tmp_path / "x", OLD)
    for name in (".gitattributes", ".hidden", "c"): (tmp_path / "x" / name).write_text("mine")
    write_together(tmp_path / "x", NEW)
    found = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    assert found == NEW | dict.fromkeys((".gitattributes", ".hidden", "c"), b"mine")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("before", [OLD, {}])
def test_a_folder_whose_place_is_not_ours(number, before, tmp_path, monkeypatch):
    "A mount point, or a folder in one that may not be written: its files change in place."
    folder = tmp_path / "x"
    folder.mkdir()
    write_together(folder, before) if before else None
    def no(path, *_, **how):
        if str(path).startswith(str(tmp_path / ".x.")): raise OSError(number, "no", str(path))
        return mkdir(path, *_, **how)
    mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", no)
    write_together(folder, NEW)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == NEW and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2")
@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.EXDEV])
def test_a_folder_that_takes_no_other_name(number, tmp_path, monkeypatch):
    import ctypes
    def refuses(*_): return ctypes.set_errno(number) and None or -1
    monkeypatch.setattr(together.ctypes, "CDLL", lambda *_, **how: type("C", (), {"renameat2": staticmethod(refuses)}))
    write_together(tmp_path / "x", OLD)
    write_together(tmp_path / "x", NEW)
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == NEW and len(list(tmp_path.iterdir())) == 1


def test_what_is_there_already_is_not_written_again(tmp_path, monkeypatch):
    write_together(tmp_path / "x", OLD)
    def no(*_): raise AssertionError("written")
    monkeypatch.setattr(os, "fsync", no)
    write_together(tmp_path / "x", OLD)


CONVERTS = """
import sys, time
from pathlib import Path
from unittest.mock import patch
from qlora_lab import assets
def convert(gguf, made):
    with open(Path(sys.argv[1]) / "log", "a") as f: f.write("converted\\n")
    (made / "model.safetensors").write_text("x")
    time.sleep(1)
with patch.object(assets, "_convert", convert), patch.object(assets, "_package_file", lambda *_: None):
    print(assets.smollm2_folder())"""


def test_two_processes_want_the_cache(tmp_path):
    "One converts, the others wait for it; all get the folder."
    env = os.environ | {"QLORA_LAB_CACHE": str(tmp_path / "cache")}
    some = [python(CONVERTS, tmp_path, env=env) for _ in range(3)]
    said = [p.communicate(timeout=120) for p in some]
    assert [p.returncode for p in some] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1 and (tmp_path / "log").read_text() == "converted\n"


def test_a_cache_whose_first_writer_was_killed(tmp_path):
    env = os.environ | {"QLORA_LAB_CACHE": str(tmp_path / "cache")}
    first = python(CONVERTS, tmp_path, env=env)
    while not (tmp_path / "log").exists(): time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = python(CONVERTS, tmp_path, env=env)
    second.communicate(timeout=120)
    assert second.returncode == 0 and [p.name for p in (tmp_path / "cache").iterdir()] == ["smollm2-135m-instruct"]


def test_a_file_that_one_process_changes(tmp_path):
    "Read, changed and written again: a second one would lose what the first one adds."
    with claimed(tmp_path / "answers.json"):
        with pytest.raises(LabError, match=f"process {os.getpid()} on .* is at work"):
            with claimed(tmp_path / "answers.json"): pass
        with claimed(tmp_path / "others.json"), locked(tmp_path): pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_leaves_goes_with_the_next(tmp_path):
    "A merged model beside it, of many gigabytes."
    code = MAKES.replace("records import whole_folder", "together import scratch").replace("whole_folder", "scratch")
    code = code.replace("import sys, time", "import sys\nfrom pathlib import Path")
    first = python(code.replace("(sys.argv[1])", "(Path(sys.argv[1]))"), tmp_path / "out")
    assert first.stdout.readline() == "at it\n"
    first.kill()
    first.communicate()
    assert len(list(tmp_path.iterdir())) == 1
    with scratch(tmp_path / "out") as place: assert list(tmp_path.iterdir()) == [place]
    assert not list(tmp_path.iterdir())
