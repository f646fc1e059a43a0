"""What a process may take of the host's memory is what the machine has, or less where a control group says so.

Protects: limits of every group around the process count, in both forms of the files; what cannot be read limits
nothing.
"""
from types import SimpleNamespace

import psutil
import pytest

from qlora_lab.engine import host_checkpoints, host_memory
from qlora_lab.engine.host_memory import HostMemory, control_groups, number_in
from qlora_lab.engine.machine_organ import cores_allowed

GIB = 2 ** 30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    "A function: the memory found on a machine of 64 GiB, 50 of them free, whose groups have these files."
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    def found(own, files, ask=host_memory.host_memory):
        for name, text in files.items():
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / name).write_text(f"{text}\n")
        if own is not None: (tmp_path / "own").write_text(own)
        return ask(tmp_path / "tree", tmp_path / "own")
    return found


OLDER = {"memory/a/memory.limit_in_bytes": 4 * GIB, "memory/a/memory.usage_in_bytes": 3 * GIB,
         "memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file 0"}


def v2(group, limit, used): return {f"{group}/memory.max": limit, f"{group}/memory.current": used}


@pytest.mark.parametrize("own, files, total, available", [
    ("0::/\n", {}, 64, 50),
    ("0::/\n", v2(".", 8 * GIB, 3 * GIB), 8, 5),
    ("0::/a/b\n", v2("a/b", 8 * GIB, 3 * GIB) | v2("a", 6 * GIB, 5 * GIB), 6, 1),
    ("0::/a/b\n", v2("a/b", "max", 3 * GIB) | v2("a", 6 * GIB, 4 * GIB), 6, 2),
    ("0::/a/b\n", v2("b", 1 * GIB, 0), 64, 50),                              # somebody else's
    ("0::/machine/name\n", v2(".", 8 * GIB, 8 * GIB + 5), 8, 0),              # the container's own root; a little over
    ("0::/../../x\n", v2(".", 8 * GIB, 2 * GIB), 8, 6),                       # seen from within another namespace
    ("0::/a\n", v2("a", 100 * GIB, 99 * GIB), 64, 50),                        # more than there is
    ("0::/a\n", {"a/memory.max": 8 * GIB}, 8, 8),
    ("0::/a\n", v2("a", 8 * GIB, 7 * GIB) | {"a/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB}"}, 8, 3),
    ("0::/a\n", v2("a", "twelve", 1), 64, 50),
    ("0::/a\n", v2("unified/a", 8 * GIB, 3 * GIB), 8, 5),                     # both forms beside each other
    ("3:cpu,memory:/a\n", {"cpu,memory/a/memory.limit_in_bytes": 4 * GIB}, 4, 4),
    ("nonsense\n\n0::/a\n", v2("a", 8 * GIB, 3 * GIB), 8, 5),
    ("9:memory:/a\n1:cpu,cpuacct:/b\n0::/\n", OLDER, 4, 2),
    ("9:memory:/a\n", {"memory/memory.limit_in_bytes": 4 * GIB}, 4, 4),
    ("9:memory:/a\n", {"memory/a/memory.limit_in_bytes": 9223372036854771712}, 64, 50),
    (None, v2(".", 8 * GIB, 3 * GIB), 8, 5), (None, {"memory/memory.limit_in_bytes": 4 * GIB}, 4, 4)])
def test_the_least_of_all_limits_holds(own, files, total, available, groups):
    assert groups(own, files) == HostMemory(total * GIB, available * GIB)


def test_files_that_cannot_be_read(tmp_path):
    "Nothing is known then, and nothing raised."
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_text("")
    for path in (tmp_path / "folder", tmp_path / "empty", tmp_path / "none"): assert number_in(path) is None
    assert number_in(tmp_path / "empty", "inactive_file") is None


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "150000 100000"}, 1.5), ({"cpu.max": "max 100000"}, None), ({"cpu.max": "max"}, None),
    ({"cpu.max": "400000 100000", "job/cpu.max": "50000 100000"}, 0.5),
    ({"cpu.max": "50000 100000", "job/cpu.max": "max 100000"}, 0.5),
    ({"cpu/cpu.cfs_quota_us": 200000, "cpu/cpu.cfs_period_us": 100000}, 2.),
    ({"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, None), ({}, None)])
def test_the_least_quota_of_processors(files, cores, groups):
    assert groups("3:cpu,cpuacct:/job\n0::/job\n", files, cores_allowed) == cores


def test_groups_are_named_from_within(groups):
    def named(tree, own): return [str(p.relative_to(tree)) for p in control_groups("memory", tree, own)]
    found = groups("0::/a/b\n4:memory:/c\n5:cpuset:/d\n", {}, named)
    assert found == ["a/b", "a", ".", "unified/a/b", "unified/a", "unified", "memory/c", "memory"]


def test_checkpoints_on_the_host_keep_to_the_limit(monkeypatch):
    "Where the container has a tenth of the machine, its layers send away what the tenth has room for."
    monkeypatch.setattr(host_checkpoints, "host_memory", lambda: HostMemory(10 * GIB, 9 * GIB))
    monkeypatch.setattr(host_checkpoints, "_memory_here", host_checkpoints._memory_here.__wrapped__)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host_checkpoints.host_bytes() == pytest.approx(7 * GIB)
