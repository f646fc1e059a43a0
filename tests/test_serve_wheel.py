"The script that compiles llama-cpp-python: one sentence where it cannot, and nothing unpacked outside its folder."
import importlib.util
import io
import tarfile

import pytest

from conftest import ROOT


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("serve_wheel", ROOT / "scripts/serve_wheel.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def archive(path, names):
    with tarfile.open(path, "w:gz") as out:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            out.addfile(member, io.BytesIO(b"x"))
    return path


def test_without_a_compiler_one_sentence(script, monkeypatch):
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no C.. compiler here"): script.check_compiler()


def test_the_converter_is_kept_and_nothing_else(script, tmp_path):
    top = "llama_cpp_python-1.0/vendor/llama.cpp"
    inside = f"{top}/conversion/base.py", f"{top}/gguf-py/gguf/a.py", f"{top}/src/llama.cpp"
    source = archive(tmp_path / "llama_cpp_python-1.0.tar.gz", [*inside, "llama_cpp_python-1.0/setup.py"])
    script.keep_converter(source, tmp_path / "kept")
    assert sorted(p.name for p in (tmp_path / "kept").rglob("*.py")) == ["a.py", "base.py"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", source.name]


def test_a_path_that_climbs_out_is_refused(script, tmp_path):
    top = "llama_cpp_python-1.0/vendor/llama.cpp"
    source = archive(tmp_path / "llama_cpp_python-1.0.tar.gz", [f"{top}/conversion/../../../../../out.py"])
    with pytest.raises(SystemExit, match="nothing was unpacked"): script.keep_converter(source, tmp_path / "kept")
    assert not (tmp_path.parent / "out.py").exists() and not (tmp_path / "kept").exists()


def test_the_version_is_the_pinned_one(script): assert script.pinned().count(".") == 2
