#!/usr/bin/env python3
"""Build the documentation site: `python scripts/build_docs.py`, into `_site/`.

Notebooks, `_quarto.yml` and a page for each module go, prepared, into a working folder. Quarto renders that folder where it is
installed, and smalldocs, which comes with the requirements, where it is not: one configuration, the same pages and addresses.
"""
import argparse
import ast
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields, is_dataclass, MISSING
from pathlib import Path

import yaml
from execnb.nbio import mk_cell, read_nb, write_nb
from math_core import LatexError, LatexToMathML
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor, Processor
from nbdev.processors import _default_exp, clean_magics, clean_show_doc, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi
from nbdev.quarto import _nbdev_yml
from smalldocs import api
from smalldocs.site import build as smalldocs_build

ROOT = Path(__file__).resolve().parent.parent
CFG = get_config(path=ROOT)
API = "reference/api"  # the folder of the module pages, in the site
WIDGET = "application/vnd.jupyter.widget-view+json"


def parsed(source: str) -> list[ast.stmt]:
    "The statements of a cell; none where it is not plain Python."
    try: return ast.parse(source).body
    except SyntaxError: return []


class Title(Processor):
    "Title and subtitle become the page's front matter. nbdev's own step drops what else the cell holds, and takes the number from the address."
    def begin(self):
        cell = next((c for c in self.nb.cells if c.cell_type == "markdown"), None)
        found = re.match(r"#[ ]+(.+)\n*((?:>.*\n?)*)", cell.source) if cell else None
        if not found: raise SystemExit(f"{self.nb.path_}: the first text cell must begin with '# Title'")
        cell.source = cell.source[found.end():].strip() or None
        about = " ".join(line.lstrip("> ").strip() for line in found[2].splitlines())
        front = {"title": found[1].strip(), **({"description": about} if about else {})}
        self.nb.cells.insert(0, mk_cell(f"---\n{yaml.safe_dump(front, allow_unicode=True, width=1000)}---", "raw"))


class Code(Processor):
    "What a reader of the site sees of the code: all of it, folded where it is not the point; no notes to the tests, no one machine's warnings."
    def begin(self): self.lesson = re.match(r"index|\d\d_", Path(self.nb.path_).name)

    def cell(self, cell):
        if cell.cell_type != "code": return
        cell.source = re.sub(r"^# NBVAL_.*\n?", "", cell.source, flags=re.M).strip()
        if not cell.source: return hide_(cell)
        live = any(WIDGET in o.get("data", {}) for o in cell.outputs)
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]
        code = parsed(cell.source)
        names = [node.name for node in code if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        fold = ("Something to play with: in JupyterLab this cell has controls" if live else
                "Code of the figure" if "fig-cap:" in cell.directives_ else
                "Imports" if code and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in code) else
                f"Source of {', '.join(names)}" if names and "export" in cell.directives_ and not self.lesson else None)
        if fold and "code-fold:" not in cell.directives_: cell.source = f'#| code-fold: true\n#| code-summary: "{fold}"\n{cell.source}'


class ApiLinks(NbdevLookup):
    "Link the first mention of each exported name in a page's text to its entry in the API pages."
    def __init__(self, index: dict[str, str], page: Path):  # name -> 'module.qmd#name'; the page's path in the site
        to_api = os.path.relpath(API, page.parent)
        self.aliases, self.syms, self.done = {}, {name: f"{to_api}/{target}" for name, target in index.items()}, set()

    def _link_sym(self, m):
        name, start = m[1], m.start()
        plain = name.islower() and "_" not in name and not m[0].endswith("()`")  # `train`, `label`: as often a word as a name
        inside = m.string[start - 1:start] == "["                                # already the text of a link
        if plain or inside or name in self.done or name not in self.syms: return m[0]
        self.done.add(name)
        return super()._link_sym(m)

    def link_line(self, line): return line if line.startswith("#") else super().link_line(line)

    def __call__(self, cell):
        if cell.cell_type == "markdown": cell.source = self.linkify(cell.source)


def prepare_notebook(
    source: Path,           # the notebook
    target: Path,           # where the prepared one goes
    page: Path,             # its path in the site
    index: dict[str, str],  # exported name -> 'module.qmd#name'
) -> None:
    "Write a notebook as the site shows it: stored outputs, no hidden cells, no directives but the renderer's."
    nb = read_nb(source)
    module = _default_exp(nb)
    NBProcessor(nb=nb, procs=[Title, strip_ansi, hide_line, filter_stream_, hide_, rm_header_dash, clean_magics, clean_show_doc, Code,
                              ApiLinks(index, page)]).process()
    if module and module != "__init__":
        link = f"{os.path.relpath(API, page.parent)}/{module}.qmd"
        nb.cells.append(mk_cell(f"What this page exports, by name: [`{CFG.lib_name}.{module}`]({link}).", "markdown"))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, target)


def module_page(
    settings: api.Settings,
    module,                        # the imported module
    symbols: list[api.Symbol],     # its inventory
    built_in: tuple[str, Path],    # title and path of its notebook
) -> str:
    "One module's page, by smalldocs, and what that leaves out: where it is built, constants, properties, and a short form for default configurations."
    text = api.page(settings, module, symbols)
    name, own = module.__name__, {s.name for s in symbols}
    title, notebook = built_in
    intro = f"Built step by step in [{title}]({os.path.relpath(notebook, API)})."
    constants = [n for n in getattr(module, "__all__", []) if n not in own]
    if constants: intro += "\n\nConstants: " + ", ".join(f"`{n}`" for n in constants) + "."
    text = re.sub(r'^title: .*\ndescription: .*\n---\n', f'title: "{name}"\n---\n\n{intro}\n', text, count=1, flags=re.M)
    for cls in (o for o in api.own(module) if isinstance(o, type)):
        if is_dataclass(cls) and all(f.default is not MISSING for f in fields(cls)): text = text.replace(repr(cls()), f"{cls.__name__}()")
        rows = [[f"`{n}`", api.type_text(p.fget.__annotations__.get("return", ""), module), api.summary(p)]
                for n, p in vars(cls).items() if isinstance(p, property) and not n.startswith("_")]
        if rows:
            head = f"## class {cls.__name__} "
            start = text.index(head)
            end = re.compile(r"^##", re.M).search(text, start + len(head))
            end = end.start() if end else len(text)
            text = f"{text[:end].rstrip()}\n\n{api.table(rows, ['Property', 'Type', 'Description'])}\n\n{text[end:]}"
    return text.rstrip() + "\n"


def prepare(
    work: Path,      # an empty folder
    renderer: str,   # "quarto" or "smalldocs"
) -> None:
    "Write everything a renderer needs into the working folder."
    nbs = {p.relative_to(CFG.nbs_path): p for p in sorted(CFG.nbs_path.rglob("*.ipynb"))
           if not any(part[0] in "._" for part in p.relative_to(CFG.nbs_path).parts)}
    source = f"{CFG.git_url}/blob/{CFG.branch}"
    settings = api.Settings(work, [CFG.lib_name], API, ROOT, source)
    settings.importable()
    symbols = api.inventory([CFG.lib_name])
    short = {s.module: s.module.rpartition(".")[2] for s in symbols}
    index = {key: f"{short[s.module]}.qmd#{s.name}" for s in symbols if s.name for key in (s.name, f"{s.module}.{s.name}", f"{short[s.module]}.{s.name}")}
    built_in = {}
    for page, path in nbs.items():
        prepare_notebook(path, work/page, page, index)
        nb = read_nb(path)
        title = next(c.source for c in nb.cells if c.cell_type == "markdown").splitlines()[0].lstrip("# ")
        if module := _default_exp(nb): built_in[f"{CFG.lib_name}.{module}"] = title, page
    (work/API).mkdir(parents=True)
    for module in api.package_modules(CFG.lib_name):
        name = module.__name__
        if name not in built_in: raise SystemExit(f"{name}: no notebook exports this module")
        text = module_page(settings, module, [s for s in symbols if s.module == name], built_in[name])
        (work/API/f"{short[name]}.qmd").write_text(text, encoding="utf-8")
    for file in (f for f in CFG.nbs_path.rglob("*") if f.suffix in {".css", ".png", ".svg", ".jpg"}):
        if any(part[0] in "._" for part in file.relative_to(CFG.nbs_path).parts): continue
        (work/file.relative_to(CFG.nbs_path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, work/file.relative_to(CFG.nbs_path))
    shutil.copy(ROOT/"_quarto.yml", work)
    keys = "title", "description", "branch", "git_url", "doc_host", "doc_baseurl"
    about = yaml.safe_load(_nbdev_yml.format(doc_path="_site", **{k: CFG[k] for k in keys}))
    about["website"]["navbar"] = {"right": [{"text": "Source", "href": CFG.git_url}]}
    if renderer == "quarto": about["format"] = {"html": {"html-math-method": "mathml"}}  # what `math_to_mathml` does after smalldocs
    (work/"nbdev.yml").write_text(yaml.safe_dump(about, allow_unicode=True), encoding="utf-8")


def math_to_mathml(
    page: str,  # HTML with `\\(...\\)` and `\\[...\\]` in spans of class "math", waiting for KaTeX from the network
) -> str:       # HTML with MathML, which browsers draw by themselves
    "Formulas that need no network; raises LatexError for one that is not LaTeX."
    convert = LatexToMathML(fancy_error=False).convert_with_local_state
    def one(m): return convert(html.unescape(m[2]), displaystyle=m[1] == "display")
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', one, page, flags=re.S)
    return re.sub(r'<(?:link|script)[^>]*/katex[@/][^>]*>(?:</script>)?\n?', "", page)


def render(
    work: Path,      # the prepared folder
    renderer: str,   # "quarto" or "smalldocs"
) -> Path:           # the site
    "Render the prepared folder; any warning of smalldocs is an error."
    if renderer == "quarto":
        subprocess.run(["quarto", "render", ".", "--no-cache"], cwd=work, check=True)
        return work/"_site"
    site = smalldocs_build(work, quiet=True)
    if site.warnings: raise SystemExit("\n".join(f"docs: {w}" for w in site.warnings))
    for page in site.out.rglob("*.html"):
        try: page.write_text(math_to_mathml(page.read_text(encoding="utf-8")), encoding="utf-8")
        except LatexError as e: raise SystemExit(f"docs: {page.relative_to(site.out)}: a formula that is not LaTeX: {e}") from None
    return site.out


def main() -> None:
    "Build into a temporary folder, then put the whole site in place of the old one."
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT/"_site", help="folder of the site (default: _site)")
    parser.add_argument("--renderer", choices=["quarto", "smalldocs"], default="quarto" if shutil.which("quarto") else "smalldocs",
                        help="default: quarto where it is installed, else smalldocs")
    parser.add_argument("--keep", type=Path, help="keep the prepared notebooks and pages in this new folder")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out/"site_libs").is_dir():
        sys.exit(f"{args.out}: holds something that is no site; name another folder with --out")
    if args.keep and args.keep.exists(): sys.exit(f"{args.keep}: exists; --keep wants a new folder")
    with tempfile.TemporaryDirectory(prefix="qlora_lab_docs_") as tmp:
        work = args.keep or Path(tmp)/"work"
        work.mkdir(parents=True)
        prepare(work, args.renderer)
        site = render(work, args.renderer)
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.move(site, args.out)
    print(f"{sum(1 for _ in args.out.rglob('*.html'))} pages in {args.out}, by {args.renderer}: open {args.out/'index.html'}")


if __name__ == "__main__": main()
