"""Small changes to the course floor, one at a time: does a test fail?

    pip install cosmic-ray
    python -m benchmarks.mutation                        # the modules of the table below
    python -m benchmarks.mutation rates data --minutes 30
    python -m benchmarks.mutation settings --rest        # go on where the time was up

cosmic-ray says where a module can be changed and changes it: another comparison, another operation, a number one up or
down, `not`, `break` for `continue`, loops that never run. A statement that is left out is this file's own. At a place
with many changes two are taken, the nearest and one by lot. Its own runner starts Python anew for each change; here a
process that has imported torch and the others forks, and the child runs the tests of that module with the changed text
in place of the file. What the tests let pass is shown to the module's page, which is a test as well.

Writes results/mutation.json; a change that nothing catches is listed, with the word of `SAID` where somebody looked at
it. `SAID` is kept in benchmarks/mutation_said.json: place and change to the reason why it changes nothing.
"""
import argparse
import ast
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[name] = "1"
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

ROOT = Path(__file__).parents[1]
SAID = ROOT / "benchmarks/mutation_said.json"

MODULES = {  # module: its page, and tests of it, the quickest first
    "nf4": ("02_nf4", "test_nf4"),
    "blockwise": ("01_blockwise", "test_blockwise test_faults::test_what_cannot_be_quantized test_parity"),
    "double_quant": ("03_double_quant",
                     "test_double_quant test_faults::test_what_cannot_be_quantized test_linear test_parity"),
    "rates": ("reference/rates", "test_edges test_exact_settings test_ways_to_train"),
    "batches": ("reference/batches", "test_edges test_data test_exact_settings test_budget"),
    "scoring": ("reference/scoring", "test_edges test_evaluate test_train"),
    "data": ("09_data", "test_edges test_data test_templates test_examples test_exact_settings"),
    "lora": ("06_lora", "test_lora test_adapters_peft"),
    "examples": ("reference/examples", "test_examples test_data"),
    "conversations": ("reference/conversations", "test_examples test_data"),
    "settings": ("reference/settings", "test_settings test_exact_settings test_ways_to_train"),
    "token_masks": ("reference/token_masks", "test_data test_templates"),
    "bnb_format": ("reference/bnb_format", "test_linear test_experts"),
    "safe_files": ("reference/safe_files", "test_safe_files"),
}

READY = "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "pandas", "hypothesis", "pytest"


class Change(NamedTuple):
    "One small change to one module."
    module: str
    place: str  # line and the text of it
    what: str   # the operator
    text: str   # of the changed module

    @property
    def key(self) -> str: return f"{self.module}: {self.place} | {self.what} | {self.mark}"

    @property
    def mark(self) -> str: return hashlib.sha256(self.text.encode()).hexdigest()[:8]


def skipped(tree: ast.AST) -> list[tuple]:
    "Where types are named, and where messages are made: ranges of (line, column)."
    found = []
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Raise): parts.append(node)  # left out as a whole, below
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING": parts += [node.test, *node.body]
        found += [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p is not None]
    return found


NEAREST = {"Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt", "Eq": "NotEq", "NotEq": "Eq", "Is": "IsNot",
           "IsNot": "Is", "Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "FloorDiv": "Div",
           "Mod": "FloorDiv", "Pow": "Mul", "LShift": "RShift", "RShift": "LShift", "BitAnd": "BitOr",
           "BitOr": "BitAnd", "BitXor": "BitOr"}


def family(name: str) -> tuple[str, bool]:
    "An operator without what it puts in, and whether that is the nearest."
    parts = name.split("_")
    if len(parts) < 3: return name, True
    return "_".join(parts[:-1]), NEAREST.get(parts[-2]) == parts[-1]


def by_cosmic_ray(path: Path) -> list[tuple]:
    "(start, operator, text) of two changes of a kind at most at each place."
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names
    source, found = path.read_text(), {}
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or name in ("core/NoOp", "core/ExceptionReplacer"): continue  # fails at a tuple
        places = [where for node in nodes for where in operator().mutation_positions(node)]
        for i, (start, _) in enumerate(places): found.setdefault((start, family(name)[0]), []).append((name, i))
    made = []
    for (start, kind), several in sorted(found.items()):
        lot = int(hashlib.sha256(f"{start}{kind}".encode()).hexdigest()[:8], 16)
        near = [s for s in several if family(s[0])[1]]
        some = near[:2] if len(near) == len(several) else [*near[:1], several[lot % len(several)]]
        for name, i in dict.fromkeys(some):
            text = mutate_code(source, get_operator(name)(), i)
            if text and text != source: made.append((start, name.removeprefix("core/"), text))
    return made


def left_out(path: Path) -> list[tuple]:
    "The same for statements that do something and give nothing: calls, raises, additions."
    source, made = path.read_text(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Expr, ast.Raise, ast.AugAssign)): continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant): continue
        lines = source.splitlines(keepends=True)
        before, after = lines[node.lineno - 1][:node.col_offset], lines[node.end_lineno - 1][node.end_col_offset:]
        lines[node.lineno - 1:node.end_lineno] = [before + "pass" + after]
        made.append(((node.lineno, node.col_offset), "LeftOut", "".join(lines)))
    return made


def changes(module: str) -> list[Change]:
    "The changes to a module, in the order of its lines."
    path = ROOT / f"qlora_lab/{module}.py"
    source, none = path.read_text(), skipped(ast.parse(path.read_text()))
    lines, made = source.splitlines(), []
    for start, what, text in by_cosmic_ray(path) + left_out(path):
        if what != "LeftOut" and any(a <= start < b for a, b in none): continue
        try: same = ast.dump(ast.parse(text)) == ast.dump(ast.parse(source))
        except SyntaxError: continue
        if not same: made.append(Change(module, f"{start[0]}:{start[1]} {lines[start[0] - 1].strip()}", what, text))
    return sorted(dict.fromkeys(made), key=lambda c: (int(c.place.partition(":")[0]), c.place, c.what))


class Put(MetaPathFinder, Loader):
    "An import that gives a module's changed text, under the name of its file."
    def __init__(self, change: Change): self.change, self.name = change, f"qlora_lab.{change.module}"

    def find_spec(self, name, path=None, target=None):
        if name != self.name: return None
        return ModuleSpec(name, self, origin=str(ROOT / f"qlora_lab/{self.change.module}.py"))

    def exec_module(self, module):
        module.__file__ = module.__spec__.origin
        exec(compile(self.change.text, module.__file__, "exec"), module.__dict__)


def of_the_project(name: str) -> bool:
    "Whether a module is one that a change is in, or that tests it."
    return name.partition(".")[0] in ("qlora_lab", "conftest") or name.startswith("test_")


def child(change: Change | None, tests: list[str], out: Path) -> int:
    "The tests in a process of their own that has the libraries already: 0 where all pass."
    null = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.chdir(ROOT)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (6 << 30),) * 2)
    for name in list(filter(of_the_project, sys.modules)): del sys.modules[name]  # loaded here, and unchanged
    if change: sys.meta_path.insert(0, Put(change))
    import pytest
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *tests]))


def forked(change: Change | None, tests: list[str], limit: float) -> str:
    "What became of the tests: passed, failed, or stopped after so many seconds."
    with tempfile.TemporaryDirectory(prefix="mutation") as place:
        os.environ["TMPDIR"] = place
        pid, ends = os.fork(), time.monotonic() + limit
        if not pid:
            os.setsid()
            tempfile.tempdir = None
            code = 1
            try: code = child(change, tests, Path(place) / "out")
            except BaseException: code = 1
            finally: os._exit(code)
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                if os.environ.get("SHOW"): print((Path(place) / "out").read_text()[-1500:])
                return "passed" if status == 0 else "failed"
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "stopped"


def by_page(change: Change, page: str, tree: Path, limit: float = 300) -> str:
    "What the module's page says, run and compared with what is stored, in a copy of the project."
    file = tree / f"qlora_lab/{change.module}.py"
    file.write_text(change.text)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--nbval", "-p", "no:cacheprovider", f"nbs/{page}.ipynb"]
    try: code = subprocess.run(command, cwd=tree, capture_output=True, timeout=limit,
                               env=os.environ | {"PYTHONPATH": str(tree)}).returncode
    except subprocess.TimeoutExpired: return "stopped"
    finally: shutil.copy(ROOT / f"qlora_lab/{change.module}.py", file)
    return "failed" if code else "passed"


def copied(place: str) -> Path:
    "The project, to be changed."
    for name in ("qlora_lab", "nbs", "benchmarks", "tests"): shutil.copytree(ROOT / name, Path(place) / name)
    for name in ("conftest.py", "pyproject.toml", "settings.ini", "constraints.txt"):
        if (ROOT / name).exists(): shutil.copy(ROOT / name, place)
    return Path(place)


def listed(module: str, alive: list[Change], before: dict | None, tried: set[str], said: dict) -> list[dict]:
    "What nothing caught, for the record: this time, and before where it was not tried again, its line changed or not."
    found = [{"place": c.place, "change": c.what, "mark": c.mark} for c in alive]
    found += [c for c in (before or {"alive": []})["alive"] if c["mark"] not in tried]
    def key(c): return f"{module}: {c['place']} | {c['change']} | {c['mark']}"
    return [c | {"said": said.get(key(c), c.get("said"))} for c in
            sorted(found, key=lambda c: int(c["place"].partition(":")[0]))]


def try_module(module: str, until: float, pages: bool, one_in: int, before: dict | None, rest=False) -> dict:
    """All changes of a module that the time allows, or one in so many of them, by lot; with a record from before only
    those that nothing caught then, or the `rest`, for which the time was up (changes are tried in order)."""
    page, names = MODULES[module]
    tests = [f"tests/{file}.py{sign}{name}" for file, sign, name in (n.partition("::") for n in names.split())]
    every, said = changes(module), json.loads(SAID.read_text()) if SAID.exists() else {}
    count, alive, tried = {"changes": len(every), "tried": 0, "by tests": 0, "by the page": 0}, [], set()
    every = [change for change in every if int(change.mark, 16) % one_in == 0]
    if before:
        if rest and before["changes"] != len(every): raise SystemExit(f"{module}: has changed since it was tried")
        there = {c["mark"] for c in before["alive"]}
        every = every[before["tried"]:] if rest else [c for c in every if c.mark in there and c.key not in said]
        count = {k: before[k] for k in count}
    begun = time.monotonic()
    if every and forked(None, tests, 900) != "passed": raise SystemExit(f"{module}: its tests fail as it is")
    whole = time.monotonic() - begun
    with tempfile.TemporaryDirectory(prefix="mutation") as place:
        tree = copied(place) if pages else None
        for change in every:
            if time.monotonic() > until: break
            tried.add(change.mark)
            count["tried"] += rest or not before
            if forked(change, tests, 3 * whole + 30) != "passed": count["by tests"] += 1
            elif pages and by_page(change, page, tree) != "passed": count["by the page"] += 1
            else:
                alive.append(change)
                print(f"  alive  {change.key}", flush=True)
    left = listed(module, alive, before, tried, said)
    print(f"{module}: {count}, {len(left)} alive, {time.monotonic() - begun:.0f} s", flush=True)
    return count | {"alive": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--minutes", type=float, default=110, help="after which no further change is tried")
    parser.add_argument("--no-pages", action="store_true", help="show what the tests let pass to no page")
    parser.add_argument("--one-in", type=int, default=1, help="try one change in so many, by lot")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--again", action="store_true", help="try only what nothing caught before")
    which.add_argument("--rest", action="store_true", help="try only what the time did not allow before")
    parser.add_argument("--list", action="store_true", help="say the changes and try none")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    args = parser.parse_args()
    if args.rest and args.one_in > 1: parser.error("--rest goes on in order; --one-in draws lots")
    every = {module: changes(module) for module in args.modules}
    if args.list: return print("\n".join(c.key for some in every.values() for c in some))
    sys.path.insert(0, str(ROOT / "tests"))
    for name in READY: import_module(name)
    until, old = time.monotonic() + 60 * args.minutes, json.loads(args.out.read_text()) if args.out.exists() else {}
    done = old.get("modules", {})
    for module in args.modules:
        done[module] = try_module(module, until, not args.no_pages, args.one_in,
                                  done.get(module) if args.again or args.rest else None, args.rest)
        write(args.out, done)


def write(out: Path, done: dict) -> None:
    "The record, with its sums."
    from qlora_lab.provenance import provenance
    from qlora_lab.records import write_whole
    tried, caught = (sum(m[k] for m in done.values() for k in keys) for keys in
                     (("tried",), ("by tests", "by the page")))
    looked = sum(bool(c["said"]) for m in done.values() for c in m["alive"])
    sums = {"tried": tried, "caught": caught, "changes nothing or caught since": looked,
            "not caught": tried - caught - looked,
            "share caught": round(caught / max(tried - looked, 1), 4)}
    write_whole(out, json.dumps({"provenance": provenance(), "all": sums, "modules": done}, indent=1) + "\n")


if __name__ == "__main__": main()
