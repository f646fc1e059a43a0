"""llama-cpp-python's wheel, compiled once into the user's cache, and the converter of its sources for the tests.

    python scripts/serve_wheel.py        # prints the folder that `pip install --find-links` takes

PyPI has its source alone. A full build takes about six minutes on two cores; this one leaves out the multimodal library
and llama.cpp's helpers for its programs, which nobody needs here, and takes about half. The wheel holds code for AVX2
and not for this processor in particular, so that it can be kept.
"""
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_lab.assets import cache_folder

ROOT = Path(__file__).resolve().parents[1]
LEAN = "set(LLAMA_BUILD_COMMON OFF)\n"  # read inside the project, where it outweighs the cached ON
OPTIONS = ("-DLLAVA_BUILD=OFF", "-DGGML_NATIVE=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
           "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_SERVER=OFF")
KEPT = "conversion/", "gguf-py/", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "LICENSE"


def pinned() -> str:
    "The tested version."
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("llama-cpp-python=="))


def pip(*words: str, **environment: str) -> None:
    "Run pip of this Python, quietly; what it says is shown where it fails."
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment)
    if done.returncode: sys.exit("\n".join(done.stdout.splitlines()[-30:]) + f"\npip {words[0]} failed; see above")


def check_compiler() -> None:
    "Leave with one sentence where there is no compiler."
    if any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")): return
    sys.exit("llama-cpp-python has to be compiled, and there is no C++ compiler here; on Debian and Ubuntu: "
             "apt install g++")


def keep_converter(source: Path, place: Path) -> None:
    "llama.cpp's own converter, by which the tests check the lab's."
    with tarfile.open(source) as packed, TemporaryDirectory(dir=place.parent) as hidden:
        top = f"{source.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
        wanted = [m for m in packed.getmembers() if m.name.startswith(tuple(top + k for k in KEPT))]
        odd = next((m.name for m in wanted if not (m.isfile() or m.isdir()) or ".." in Path(m.name).parts), None)
        if odd: raise SystemExit(f"{source}: {odd} is no plain file inside of it; nothing was unpacked")
        newer = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
        packed.extractall(hidden, wanted, **newer)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(Path(hidden) / top, place)


def main() -> None:
    version = pinned()
    wheels = cache_folder() / "wheels" / f"llama-cpp-python-{version}"
    converter = wheels / "llama.cpp"
    if not list(wheels.glob("*.whl")) or not converter.is_dir():
        check_compiler()
        wheels.mkdir(parents=True, exist_ok=True)
        print(f"Compiling llama-cpp-python {version} into {wheels}: some minutes, this once.", file=sys.stderr)
        start = time.perf_counter()
        with TemporaryDirectory(dir=wheels) as work:
            place = Path(work)
            wanted = f"llama-cpp-python=={version}"
            pip("download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", work, wanted)
            (source,) = place.glob("*.tar.gz")
            (place / "lean.cmake").write_text(LEAN, encoding="utf-8")
            options = " ".join([*OPTIONS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={place / 'lean.cmake'}"])
            pip("wheel", "-q", "--no-deps", "-w", work, str(source), CMAKE_ARGS=options)
            keep_converter(source, converter)
            (wheel,) = place.glob("*.whl")
            os.replace(wheel, wheels / wheel.name)
        print(f"Compiled in {time.perf_counter() - start:.0f} s.", file=sys.stderr)
    print(wheels)


if __name__ == "__main__": main()
