"""Notebooks as the documentation site shows them: stored outputs, no hidden cells, no directives but the renderer's."""
import ast
import os
import re
from pathlib import Path

import yaml
from docs_api import API, short
from execnb.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor, Processor
from nbdev.processors import (
    _default_exp,
    clean_magics,
    clean_show_doc,
    filter_stream_,
    hide_,
    hide_line,
    rm_header_dash,
    strip_ansi,
)

ROOT = Path(__file__).resolve().parent.parent
CFG = get_config(path=ROOT)
WIDGET = "application/vnd.jupyter.widget-view+json"


def parsed(source: str) -> list[ast.stmt]:
    "The statements of a cell; none where it is not plain Python."
    try: return ast.parse(source).body
    except SyntaxError: return []


def imports(node: ast.stmt) -> bool:
    "Whether a statement only imports, tries to, or does so for annotations alone."
    typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return typing or isinstance(node, (ast.Import, ast.ImportFrom, ast.Try))


class Title(Processor):
    """Title and subtitle become the page's front matter.

    nbdev's own step drops what else the cell holds, and takes the number from the address.
    """
    def begin(self):
        cell = next((c for c in self.nb.cells if c.cell_type == "markdown"), None)
        found = re.match(r"#[ ]+(.+)\n*((?:>.*\n?)*)", cell.source) if cell else None
        if not found: raise SystemExit(f"{self.nb.path_}: the first text cell must begin with '# Title'")
        cell.source = cell.source[found.end():].strip() or None
        about = " ".join(line.lstrip("> ").strip() for line in found[2].splitlines())
        front = {"title": found[1].strip(), **({"description": about} if about else {})}
        self.nb.cells.insert(0, mk_cell(f"---\n{yaml.safe_dump(front, allow_unicode=True, width=1000)}---", "raw"))


class Text(Processor):
    "Blocks of text without a language get one, so that both renderers shade and wrap them."
    def cell(self, cell):
        if cell.cell_type != "markdown": return
        fenced = False
        lines = cell.source.splitlines()
        for i, line in enumerate(lines):
            if not line.lstrip().startswith("```"): continue
            if not fenced and line.strip() == "```": lines[i] = line + "text"
            fenced = not fenced
        cell.source = "\n".join(lines)


class Code(Processor):
    """What a reader of the site sees of the code: all of it, folded where it is not the point.

    Notes to the tests and warnings of one machine stay out.
    """
    def begin(self): self.lesson = re.match(r"index|\d\d", Path(self.nb.path_).name)

    def cell(self, cell):
        if cell.cell_type != "code": return
        cell.source = re.sub(r"^# NBVAL_.*\n?", "", cell.source, flags=re.M).strip()
        if not cell.source: return hide_(cell)
        live = any(WIDGET in o.get("data", {}) for o in cell.outputs)
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]
        fold = self.summary(cell, live)
        if fold and "code-fold:" not in cell.directives_:
            cell.source = f'#| code-fold: true\n#| code-summary: "{fold}"\n{cell.source}'

    def summary(self, cell, live: bool) -> str | None:
        "The line that a folded cell shows; None for a cell that stands open."
        code, exported = parsed(cell.source), "export" in cell.directives_
        if live: return "Something to play with: in JupyterLab this cell has controls"
        if "fig-cap:" in cell.directives_: return "Code of the figure"
        if not code and exported: return "What the module says of itself"
        if code and all(map(imports, code)):
            return "Imports of the module" if exported else "Imports of this page"
        names = [node.name for node in code if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        shown = [n for n in names if not n.startswith("_")] or ["helpers"] * bool(names)
        return f"Source of {', '.join(shown)}" if names and exported and not self.lesson else None


class RawTables(Processor):
    "For Quarto: a table in HTML as a raw block; as HTML output it would bring jquery and require.js from the network."
    def cell(self, cell):
        if cell.cell_type != "code": return
        for output in cell.outputs:
            found = output.get("data", {}).pop("text/html", None)
            if found is None: continue
            html = re.sub(r"<style.*?</style>", "", "".join(found), flags=re.S)
            output["data"] = {"text/markdown": f"```{{=html}}\n{html}\n```"}


class ApiLinks(NbdevLookup):
    "Link the first mention of each exported name in a page's text to its entry in the API pages."
    def __init__(self, index: dict[str, str], page: Path):  # name -> 'module.qmd#name'; the page's path in the site
        to_api = os.path.relpath(API, page.parent)
        self.aliases, self.done = {}, set()
        self.syms = {name: f"{to_api}/{target}" for name, target in index.items()}

    def _link_sym(self, m):
        name, start = m[1], m.start()
        plain = name.islower() and "_" not in name and not m[0].endswith("()`")  # `train`: as often a word as a name
        inside = m.string[start - 1:start] == "["                                # already the text of a link
        if plain or inside or name in self.done or name not in self.syms: return m[0]
        self.done.add(name)
        return super()._link_sym(m)

    def link_line(self, line): return line if line.startswith("#") else super().link_line(line)

    def __call__(self, cell):
        if cell.cell_type == "markdown": cell.source = self.linkify(cell.source)


def title_of(notebook) -> str:
    "The title of a notebook, as its first text cell has it."
    return next(c.source for c in notebook.cells if c.cell_type == "markdown").splitlines()[0].lstrip("# ")


def prepare_notebook(
    source: Path,           # the notebook
    target: Path,           # where the prepared one goes
    page: Path,             # its path in the site
    index: dict[str, str],  # exported name -> 'module.qmd#name'
    renderer: str,          # "quarto" or "smalldocs"
) -> None:
    "Write a notebook as the site shows it."
    nb = read_nb(source)
    module = _default_exp(nb)
    steps = [Title, strip_ansi, hide_line, filter_stream_, hide_, rm_header_dash, clean_magics, clean_show_doc]
    steps += [Text, Code]
    if renderer == "quarto": steps.append(RawTables)
    NBProcessor(nb=nb, procs=[*steps, ApiLinks(index, page)]).process()
    if module and not module.startswith("__"):  # the package itself, and what `python -m` runs, have no page
        link = f"{os.path.relpath(API, page.parent)}/{short(module)}.qmd"
        nb.cells.append(mk_cell(f"What this page exports, by name: [`{CFG.lib_name}.{module}`]({link}).", "markdown"))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)
