#!/usr/bin/env python3
"""Build the documentation site: `python scripts/build_docs.py`, into `_site/`.

Notebooks (docs_pages.py), `_quarto.yml` and a page for each module (docs_api.py) go, prepared, into a working folder.
Quarto renders that folder where it is installed, and smalldocs, which comes with the requirements, where it is not: one
configuration, the same pages and addresses. What either leaves that would need a network is taken out at the end.
"""
import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from docs_api import API, module_page, short
from docs_pages import CFG, ROOT, prepare_notebook, title_of
from execnb.nbio import read_nb
from math_core import LatexError, LatexToMathML
from nbdev.processors import _default_exp
from nbdev.quarto import _nbdev_yml
from smalldocs import api
from smalldocs.site import build as smalldocs_build

IMPORT = re.compile(r"""@import\s+(?:url\(\s*["']?(?:https?:)?//[^)]*\)|["'](?:https?:)?//[^"']*["'])[^;]*;""")
TAKEN_ALONG = {".css", ".png", ".svg", ".jpg", ".woff", ".txt"}  # kinds of files that pages use


def visible(path: Path) -> bool: return not any(part[0] in "._" for part in path.relative_to(CFG.nbs_path).parts)


def prepare(
    work: Path,      # an empty folder
    renderer: str,   # "quarto" or "smalldocs"
) -> None:
    "Write everything a renderer needs into the working folder."
    settings = api.Settings(work, [CFG.lib_name], API, ROOT, f"{CFG.git_url}/blob/{CFG.branch}")
    settings.importable()
    symbols = api.inventory([CFG.lib_name])
    index = {}
    for s in symbols:
        names = (s.name, f"{s.module}.{s.name}", f"{short(s.module)}.{s.name}") if s.name else ()
        index |= dict.fromkeys(names, f"{short(s.module)}.qmd#{s.name}")
    built_in = {}
    for path in sorted(p for p in CFG.nbs_path.rglob("*.ipynb") if visible(p)):
        page, nb = path.relative_to(CFG.nbs_path), read_nb(path)
        prepare_notebook(path, work/page, page, index, renderer)
        if module := _default_exp(nb): built_in[f"{CFG.lib_name}.{module}"] = title_of(nb), page
    (work/API).mkdir(parents=True)
    for module in api.package_modules(CFG.lib_name):
        name = module.__name__
        if name == f"{CFG.lib_name}.engine": continue  # the folder, which holds nothing itself
        if name not in built_in: raise SystemExit(f"{name}: no notebook exports this module")
        text = module_page(settings, module, [s for s in symbols if s.module == name], built_in[name])
        (work/API/f"{short(name)}.qmd").write_text(text, encoding="utf-8")
    for file in (f for f in CFG.nbs_path.rglob("*") if f.suffix in TAKEN_ALONG and visible(f)):
        target = work/file.relative_to(CFG.nbs_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.copy(ROOT/"_quarto.yml", work)
    (work/"nbdev.yml").write_text(yaml.safe_dump(about(renderer), allow_unicode=True), encoding="utf-8")


def about(renderer: str) -> dict:
    "What `_quarto.yml` takes from settings.ini, and the two settings that only Quarto needs."
    keys = "title", "description", "branch", "git_url", "doc_host", "doc_baseurl"
    found = yaml.safe_load(_nbdev_yml.format(doc_path="_site", **{k: CFG[k] for k in keys}))
    found["website"]["navbar"] = {"right": [{"text": "Source", "href": CFG.git_url}]}
    if renderer == "quarto":  # smalldocs follows the reader's scheme by itself, and its formulas become MathML below
        found["format"] = {"html": {"html-math-method": "mathml", "respect-user-color-scheme": True}}
    return found


def math_to_mathml(
    page: str,  # HTML with `\\(...\\)` and `\\[...\\]` in spans of class "math", waiting for KaTeX from the network
) -> str:       # HTML with MathML, which browsers draw by themselves
    "Formulas that need no network; raises LatexError for one that is not LaTeX."
    convert = LatexToMathML(fancy_error=False).convert_with_local_state
    def one(m): return convert(html.unescape(m[2]), displaystyle=m[1] == "display")
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', one, page, flags=re.S)
    return re.sub(r'<(?:link|script)[^>]*/katex[@/][^>]*>(?:</script>)?\n?', "", page)


def without_network(site: Path) -> None:
    "Themes ask a font host by @import, in either renderer; the fonts of the reader's machine will do."
    for file in site.rglob("*.css"):
        text = file.read_text(encoding="utf-8")
        new = IMPORT.sub("", text)
        if new != text: file.write_text(new, encoding="utf-8")


def in_the_order_of_the_course(site: Path) -> None:
    "The list of pages for language models follows the sidebar, whatever order the renderer gave it."
    index = site/"llms.txt"
    if not index.exists(): return
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    order = [Path(p).with_suffix("").as_posix() for p in sidebar(config)]
    lines = index.read_text(encoding="utf-8").splitlines()
    base = f"{CFG.doc_host}{CFG.doc_baseurl}/"
    def place(line):
        page = line.rpartition("](")[2].rstrip(")").removeprefix(base).removesuffix(".llms.md").removesuffix(".html")
        return order.index(page) if page in order else len(order)
    pages = [i for i, line in enumerate(lines) if line.startswith("- [")]
    for i, line in zip(pages, sorted((lines[i] for i in pages), key=place)): lines[i] = line
    index.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sidebar(config: dict) -> list[str]:
    "The pages of the sidebar, in its order."
    def pages(entries):
        for e in entries: yield from [e] if isinstance(e, str) else pages(e.get("contents", []))
    return list(pages(config["website"]["sidebar"]["contents"]))


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
        except LatexError as e:
            raise SystemExit(f"docs: {page.relative_to(site.out)}: a formula that is not LaTeX: {e}") from None
    return site.out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT/"_site", help="folder of the site (default: _site)")
    parser.add_argument("--renderer", choices=["quarto", "smalldocs"],
                        help="default: quarto where it is installed, else smalldocs")
    parser.add_argument("--keep", type=Path, help="keep the prepared notebooks and pages in this new folder")
    args = parser.parse_args()
    args.renderer = args.renderer or ("quarto" if shutil.which("quarto") else "smalldocs")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out/"site_libs").is_dir():
        sys.exit(f"{args.out}: holds something that is no site; name another folder with --out")
    if args.keep and args.keep.exists(): sys.exit(f"{args.keep}: exists; --keep wants a new folder")
    return args


def main() -> None:
    "Build into a temporary folder, then put the whole site in place of the old one."
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="qlora_lab_docs_") as tmp:
        work = args.keep or Path(tmp)/"work"
        work.mkdir(parents=True)
        prepare(work, args.renderer)
        site = render(work, args.renderer)
        without_network(site)
        in_the_order_of_the_course(site)
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.move(site, args.out)
    pages = sum(1 for _ in args.out.rglob("*.html"))
    print(f"{pages} pages in {args.out}, by {args.renderer}: open {args.out/'index.html'}")


if __name__ == "__main__": main()
