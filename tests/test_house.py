"The house's rules, each held for every room: short lines, modules and cells, one way for the data, plain openings."
import ast
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LESSONS = [p for p in NOTEBOOKS if re.match(r"\d\d[a-z]?_", p.name)]
MODULES = sorted(p for p in (ROOT / "qlora_lab").rglob("*.py") if p.name != "_modidx.py")
EXPORTED = [p for p in MODULES if p.name != "__init__.py"]
FOLDERS = "qlora_lab", "tests", "benchmarks", "scripts"
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")) if p.name != "_modidx.py"]
WIDE = re.compile(r"#\| *(fig-cap|fig-alt|code-summary):|\|")  # captions and rows of tables are one line


def name(path): return path.relative_to(ROOT).as_posix()


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind and "".join(c["source"]).strip()]


def statements(source):
    "The lines of a code cell, without blank ones and directives."
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith(("#|", "%"))]


def sizes(path): return [n for n in (len(statements(c)) for c in cells(path, "code")) if n]


@pytest.mark.parametrize("path", [ROOT / "conftest.py", ROOT / "setup.py", *SOURCES], ids=name)
def test_no_wide_line(path):
    "But for `__all__`, which nbdev writes and wraps at 130."
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("__all__ = ")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_wide_line_in_a_notebook(path):
    lines = [line for kind in ("code", "markdown") for c in cells(path, kind) for line in c.splitlines()]
    assert not [line for line in lines if len(line) > 120 and not WIDE.match(line)]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p in LESSONS or p.parent.name == "engine"], ids=name)
def test_no_wide_line_is_printed(path):
    "What a page shows 80 characters of; a table of pandas has its own layout, and a widget's text is not shown."
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    plain = [o.get("text", o.get("data", {}).get("text/plain", "")) for o in outputs
             if not {"text/html", "image/png", "application/vnd.jupyter.widget-view+json"} & o.get("data", {}).keys()]
    assert not [line for text in plain for line in "".join(text).splitlines() if len(line) > 84]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_short_cells(path):
    "A cell teaches one point; what outgrows 25 lines holds two."
    assert max(sizes(path), default=0) <= 25


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_what_is_compared_has_no_random_name(path):
    "pandas gives each styled table a name of its own, unless it is told one: `style.set_uuid`."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.search(r"^# NBVAL_IGNORE_OUTPUT\b", source, re.M): continue
        shown = "".join(html for out in cell["outputs"] for html in out.get("data", {}).get("text/html", ""))
        assert not re.search(r'id="T_[0-9a-f]{5}"', shown), source


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_a_lesson_is_read_in_one_pass(path):
    "At most 45 cells, exports included; half of the code cells have at most six lines."
    whole = len(cells(path, "code")) + len(cells(path, "markdown"))
    assert whole <= 45 and statistics.median(sizes(path)) <= 6, (whole, statistics.median(sizes(path)))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_memory_goes_back_when_no_card_works(path):
    "torch itself may wait for one stream of several, and take away what another still reads."
    lines = path.read_text(encoding="utf-8").splitlines()
    for above, line in zip(lines, lines[1:]): assert "cuda.empty_cache()" not in line or "cuda.synchronize(" in above


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_short_modules(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (200 if path.name == "cli.py" else 300)


@pytest.mark.parametrize("path", EXPORTED, ids=name)
def test_a_module_opens_with_its_reasons(path):
    "After the docstring, 8 to 20 lines of comment that stand without the notebook."
    text = path.read_text(encoding="utf-8").partition("__all__")[2]
    opening = re.search(r"^# %% .*\n((?:#.*\n)+)", text, re.M)
    assert opening and 8 <= len(opening[1].splitlines()) <= 20, opening and opening[1]


@pytest.mark.parametrize("path", EXPORTED, ids=name)
def test_classes_are_whole(path):
    "No method is hung on to a class after the fact."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        parts = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
        hung = [t for t in parts if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)]
        assert not [t.attr for t in hung if t.value.id in classes]


def test_the_package_needs_no_fastcore():
    assert not [name(p) for p in MODULES if re.search(r"\bfastcore\b", p.read_text(encoding="utf-8"))]


ENGINE = ["qlora_lab", "engine"]

def imports(source, package):
    "What a module of this package imports, each as the parts of its full name; inside functions too."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (alias.name.split(".") for alias in node.names)
        if not isinstance(node, ast.ImportFrom): continue
        above = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
        module = node.module.split(".") if node.module else []
        yield from ([*above, *module, alias.name] for alias in node.names)


COURSE = [p for p in EXPORTED if p.parent.name == "qlora_lab" and p.name not in ("cli.py", "report.py", "doctor.py")]

@pytest.mark.parametrize("path", COURSE, ids=name)
def test_the_course_knows_the_engine_by_dispatch_alone(path):
    "The engine imports the course floor, never the other way; the command line stands above both."
    used = [parts for parts in imports(path.read_text(encoding="utf-8"), "qlora_lab") if parts[:2] == ENGINE]
    assert not [parts for parts in used if parts[2:3] != ["dispatch"]]


@pytest.mark.parametrize("line", ["from .engine import planner", "from . import engine", "from .engine.gpu import tl",
                                  "import qlora_lab.engine.planner as p", "from qlora_lab.engine import dispatch, gpu"])
def test_every_way_into_the_engine_is_seen(line):
    used = [parts for parts in imports(line, "qlora_lab") if parts[:2] == ENGINE]
    assert [parts for parts in used if parts[2:3] != ["dispatch"]]


def test_dispatch_stands_alone():
    assert not re.search(r"^from \.", (ROOT / "qlora_lab/engine/dispatch.py").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_an_opening_is_plain(path):
    "At most 35 words a sentence in the first two text cells."
    opening = " ".join(re.sub(r"^\|.*$", "", c, flags=re.M) for c in cells(path, "markdown")[:2])
    sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"\]\([^)]*\)", "]", opening))
    assert not [s for s in sentences if len(s.split()) > 35]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_lesson_that_is_named_is_linked(path):
    "'Lesson 05' is a link to it, and a lesson that is not there yet has none."
    there = {re.match(r"\d\d[a-z]?", p.name)[0]: p.name for p in LESSONS}
    for text in cells(path, "markdown"):
        plain = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        outside = re.sub(r"\[[^\]]*\]\([^)]*\)", "", plain)
        assert not [n for n in re.findall(r"[Ll]essons? (\d\d[a-z]?)\b", outside) if n in there], text
        for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]*)\)", plain):
            n = re.search(r"[Ll]esson (\d\d[a-z]?)\b", label)
            file = target.split("#")[0]
            if n: assert n[1] in there and file.endswith(there[n[1]]), (label, target)
            if re.search(r"/?\d\d[a-z]?_\w+\.ipynb", file): assert (path.parent / file).exists(), target


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_the_card_says_how_long(path):
    "The minutes on a lesson's card are those of the index, which counts words, lines and exercises."
    index = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    outputs = [o for c in index["cells"] for o in c.get("outputs", [])]
    table = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    told = re.search(rf"\({re.escape(path.name)}\).*\| (\d+) \|$", table, re.M)
    card = next(c for c in cells(path, "markdown") if "| time to work through |" in c)
    assert told and f"| {told[1]} minutes |" in card


def test_cells_are_folded_in_jupyterlab():
    "Set-up and solutions do not stand in plain view; run `python scripts/tidy.py`."
    spec = importlib.util.spec_from_file_location("tidy", ROOT / "scripts/tidy.py")
    tidy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tidy)
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert tidy.fold(json.loads(text)) == json.loads(text), name(path)


def test_ruff():
    "The linter's rules, in pyproject.toml, hold for modules, notebooks, tests, benchmarks and scripts."
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
