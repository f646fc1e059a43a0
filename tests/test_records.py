"Files that appear whole or not at all, and what a result says of the machine that made it."
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import searched
from qlora_lab import records
from qlora_lab.provenance import peak_memory_gib, release_memory, versions
from qlora_lab.records import LabError, read_json, whole_folder, write_whole

WRITE = "import sys; from qlora_lab.records import *; "


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def python(code, *args, **kw):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, **kw)


# write_whole

@searched(30)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_what_is_written_can_be_read(tmp_path_factory, content):
    "Bytes as they are, text as UTF-8 with its own line ends, in a folder that did not exist."
    path = tmp_path_factory.mktemp("w") / "new" / "a.txt"
    try: wanted = content if isinstance(content, bytes) else content.encode()
    except UnicodeEncodeError: return
    assert write_whole(str(path), content) == path and path.read_bytes() == wanted and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", ["old", None])
def test_a_failure_at_any_step_leaves_what_was_there(step, error, old, tmp_path, monkeypatch):
    "The old content or no file, no litter, and the error itself is not swallowed."
    path = tmp_path / "a.json"
    if old: write_whole(path, old)
    def fail(*_): raise error
    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)): write_whole(path, "new")
    assert names(tmp_path) == (["a.json"] if old else []) and (not old or path.read_text() == old)


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_any_file(umask, tmp_path):
    "Who may read and write is for the user's umask to say, as with every other program."
    before = os.umask(umask)
    try:
        file = write_whole(tmp_path / "a", "x")
        with whole_folder(tmp_path / "m") as made: write_whole(made / "b", "x")
    finally: os.umask(before)
    modes = [p.stat().st_mode & 0o777 for p in (file, tmp_path / "m" / "b", tmp_path / "m")]
    assert modes == [0o666 & ~umask, 0o666 & ~umask, 0o777 & ~umask]


def test_a_reader_never_sees_half_a_file(tmp_path):
    "One process writes megabytes over and over; every read in between finds one whole content."
    path = write_whole(tmp_path / "a", "0" * 2_000_000)
    code = WRITE + "[write_whole(sys.argv[1], str(i % 10) * 2_000_000) for i in range(100_000)]"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        seen, end = set(), time.monotonic() + 20
        while len(seen) < 4 and time.monotonic() < end:
            content = path.read_text()
            assert len(content) == 2_000_000 and content == content[0] * 2_000_000
            seen.add(content[0])
        assert len(seen) >= 4 and writer.poll() is None
    finally:
        writer.kill()
        writer.wait()


# what a killed process leaves

@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(kind, tmp_path):
    """Killed before the name is taken: the old content is there, beside it the hidden rest, which goes with the next
    write of the same name and no other."""
    write_whole(tmp_path / "a", "old")
    killed = WRITE + "import os, signal; os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); "
    if kind == "file": killed += "write_whole(sys.argv[1], 'lost')"
    else: killed += "\nwith whole_folder(sys.argv[1]) as made: write_whole(made / 'x', 'lost')"
    path = tmp_path / ("a" if kind == "file" else "m")
    assert python(killed, path).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and (tmp_path / "a").read_text() == "old"
    write_whole(tmp_path / "a.json", "another")
    assert len(names(tmp_path)) == 3
    if kind == "file": write_whole(path, "new")
    else:
        with whole_folder(path) as made: (made / "x").write_text("new")
    assert names(tmp_path) == ["a", "a.json"] + (["m"] if kind == "folder" else [])
    assert (path if kind == "file" else path / "x").read_text() == "new"


@pytest.fixture(scope="module")
def gone():
    "The number of a process that is no more."
    p = subprocess.Popen([sys.executable, "-c", ""])
    p.wait()
    return p.pid


def test_what_may_be_in_use_is_left_alone(tmp_path, gone, monkeypatch):
    "A process that runs, another machine, user or container, a name of some other make: none of our business."
    ours = records._whose()
    stay = [f".a.{ours}-{os.getpid()}.x", f".a.{ours}-{os.getppid()}.x", f".a.{int(ours, 16) ^ 1:08x}-{gone}.x",
            f".a.{ours}-.x", f".a.{ours}-{gone}0000000000.x",
            f".a.{ours}-mine.x", ".a.x7f2", f".b.{ours}-{gone}.x", f"a.{ours}-{gone}.x", f".a.json.{ours}-{gone}.x"]
    for name in (*stay, f".a.{ours}-{gone}.x"): (tmp_path / name).write_text("")
    write_whole(tmp_path / "a", "new")
    assert names(tmp_path) == sorted([*stay, "a"])
    monkeypatch.setattr(platform, "node", lambda: "another machine")
    assert records._whose() != ours


def test_a_folder_that_cannot_be_listed_can_be_written(tmp_path, monkeypatch):
    "Tidying up is a courtesy; it must not stop a write."
    monkeypatch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert write_whole(tmp_path / "a", "x").read_text() == "x"


# whole_folder

def test_a_folder_takes_its_name_when_it_is_full(tmp_path):
    "Not before; an empty folder of that name makes room."
    (tmp_path / "m").mkdir()
    with whole_folder(str(tmp_path / "m")) as made:
        (made / "a").write_text("1")
        assert list((tmp_path / "m").iterdir()) == [] and made.parent == tmp_path
    assert names(tmp_path) == ["m"] and (tmp_path / "m" / "a").read_text() == "1"


@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_name_in_use_is_refused(there, tmp_path):
    "What is there stays, the half-made folder goes, and the message names what is in the way."
    if there == "folder":
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "mine").write_text("mine")
    else: (tmp_path / "m").write_text("mine")
    with pytest.raises(LabError, match="m: already holds something"):
        with whole_folder(tmp_path / "m") as made: (made / "a").write_text("1")
    assert names(tmp_path) == ["m"]
    assert (tmp_path / "m" / "mine" if there == "folder" else tmp_path / "m").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_no_folder(error, tmp_path):
    with pytest.raises(error):
        with whole_folder(tmp_path / "m") as made:
            (made / "half").write_text("x")
            raise error
    assert names(tmp_path) == []


# read_json

@pytest.mark.parametrize("content, message", [
    (b"[1, 2]", "expected a JSON object in braces, got list"), (b"null", ".*got NoneType"), (b'"text"', ".*got str"),
    (b"3.5", ".*got float"), (b"true", ".*got bool"), (b"", "not valid JSON.*cut short"),
    (b'{\n "a": 1,\n "b"', "not valid JSON.*line 3"), (b"\xff\xfe{", "not valid JSON.*cut short")])
def test_what_is_not_a_json_object(content, message, tmp_path):
    "The file is named, whatever it holds; a list is as wrong as half an object."
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LabError, match=rf"config\.json: {message}"): read_json(tmp_path / "config.json")


def test_a_json_object(tmp_path):
    value = {"a": [1, None, "ü"], "b": {}}
    assert read_json(str(write_whole(tmp_path / "a.json", json.dumps(value)))) == value
    with pytest.raises(LabError, match=r"none\.json: no such file"): read_json(tmp_path / "none.json")


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
def test_what_has_no_end_is_not_read(tmp_path):
    "By any reader of a whole text: a device, a pipe that nobody writes to, a folder, a file beyond all measure."
    from qlora_lab.examples import read_text
    from qlora_lab.grids import read_grid
    from qlora_lab.manifest_file import parsed
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as f: f.truncate(records.LARGEST + 1)
    wanted = {Path("/dev/zero"): "a device", tmp_path / "pipe": "a device or a pipe", tmp_path: "a folder",
              tmp_path / "large": "larger than 64 MiB"}
    signal.alarm(20)
    try:
        for path, told in wanted.items():
            for read in (read_json, read_grid, read_text, parsed):
                if read is parsed: told = "not a plain file|larger"
                elif read is read_text and path.name == "large": continue  # data have any size
                with pytest.raises(LabError, match=f"{path.name}: ({told})"): read(path)
    finally: signal.alarm(0)


def test_a_place_with_a_drive_in_front():
    "C:/m/config.json is one place, and its first letter is not."
    from qlora_lab.claimed_sizes import told_of
    with pytest.raises(LabError, match="^C:/m/config.json: not a Config"), told_of("C:/m/config.json"):
        raise LabError("not a Config")
    with pytest.raises(LabError, match="^C:/m: odd"), told_of("C:/m: cannot be built"): raise LabError("C:/m: odd")


# provenance

def test_provenance_has_what_is_needed_and_no_folder(tmp_path):
    """In a process of its own with absolute paths on its command line: the command keeps their last parts, nothing else
    names a folder."""
    script = tmp_path / "measure.py"
    script.write_text("import json; from qlora_lab.provenance import provenance; print(json.dumps(provenance()))")
    done = subprocess.run([sys.executable, script, tmp_path / "data.jsonl", "--steps", "3"],
                          capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told["command"].endswith("measure.py data.jsonl --steps 3")
    assert not any(str(p) in done.stdout for p in (tmp_path, Path(sys.executable).parent, Path.home(), Path.cwd()))
    assert told["cores"] == os.cpu_count() and told["threads"] >= 1 and told["cpu"] and told["date"].endswith("+00:00")
    assert told["versions"] == versions() and told["versions"]["python"] == platform.python_version()
    assert all(told["versions"].values())
    assert versions(("torch", "no-such-package"))["no-such-package"] is None


# memory

def test_the_peak_rises_with_what_is_held_and_stays():
    """Of a process of its own: neither an earlier test sets the peak, nor this process, which has held 0.5 GiB more
    when it starts the other."""
    assert len(b"1" * 2 ** 29)
    code = "import torch; from qlora_lab.provenance import peak_memory_gib as peak\n" \
           "d = 'cuda' if torch.cuda.is_available() else 'cpu'\n" \
           "a = peak(); x = torch.ones(2 ** 27, device=d); b = peak(); del x; print(a, b, peak())"
    a, b, c = map(float, python(code).stdout.split())
    assert 0.4 < b - a < 0.6 and c > b - 0.01
    if not torch.cuda.is_available(): assert peak_memory_gib() > 0.5  # what this process has held at the top


PIECES = """
import sys, psutil
from qlora_lab.provenance import release_memory
def held(): return psutil.Process().memory_info().rss / 2 ** 20 - start
start, pieces, total = psutil.Process().memory_info().rss / 2 ** 20, [], 128 * 2 ** 20
while total > 0: pieces.append(b"1" * (20_000 + 7_919 * len(pieces) % 80_000)); total -= len(pieces[-1])
full, kept = held(), pieces[::50]
pieces.clear()
if sys.argv[1] == "release": release_memory()
print(full, held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed pieces, and has malloc_trim")
def test_release_memory_hands_freed_pieces_back():
    """Pieces below the size that is mapped on its own, of many lengths, a few left in between. Control: without the
    call nearly all stays with the process."""
    (full, kept), (also_full, left) = (map(float, python(PIECES, how).stdout.split()) for how in ("keep", "release"))
    assert min(full, also_full) > 120 and kept > 0.9 * full and left < 0.1 * also_full


def test_release_memory_elsewhere(monkeypatch):
    "A C library without such a call, and a system that is not Linux: nothing happens."
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert release_memory() is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert release_memory() is None
