"requirements.lock is constraints.txt with hashes: the same versions, all that a setup needs, and pip takes it."
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]


def plain(name): return re.sub(r"[-_.]+", "-", name).lower()


def test_versions_are_those_that_are_tested():
    "Each line has the version of constraints.txt; to make the lock anew: python scripts/lock.py."
    pins = {plain(name): version for name, version in PINS.items()}
    for line in LINES:
        name, version = line.partition(" ")[0].split("==")
        assert pins[plain(name)] == version, line


def test_every_line_has_hashes():
    for line in LINES: assert re.fullmatch(r"[\w.-]+==[\w.+-]+( --hash=sha256:[0-9a-f]{64})+", line), line
    names = [plain(line.partition("==")[0]) for line in LINES]
    assert len(names) == len(set(names))
    raw = [line.partition("==")[0].lower() for line in LINES]
    assert raw == sorted(raw)


def test_what_a_setup_installs_is_in_it():
    "Everything that settings.ini asks for, for use and for development."
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    asked = " ".join(settings["DEFAULT"][k] for k in ("requirements", "dev_requirements")).split()
    there = {plain(line.partition("==")[0]) for line in LINES}
    assert {plain(re.split(r"[<>=!~;\[]", name)[0]) for name in asked} <= there


def test_another_content_is_refused(tmp_path):
    "pip compares the hashes: a small wheel with the right name and version, and not the right bytes, is not installed."
    import zipfile
    line = next(line for line in LINES if line.startswith("six=="))
    version = line.partition(" ")[0].split("==")[1]
    wheel = tmp_path / f"six-{version}-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("six.py", "")
        z.writestr(f"six-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: six\nVersion: {version}\n")
        z.writestr(f"six-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"six-{version}.dist-info/RECORD", "")
    (tmp_path / "lock").write_text(line + "\n")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--isolated", "--no-index", "--find-links", tmp_path,
                           "--require-hashes", "--no-deps", "--target", tmp_path / "site", "-r", tmp_path / "lock"],
                          capture_output=True, text=True)
    assert done.returncode and "HASHES" in done.stderr + done.stdout and not (tmp_path / "site").exists()
