"""The documentation site, built by the pip-only renderer into a temporary folder: nothing broken, nothing missing, nothing that a
reader should not see, and nothing that needs a network."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from nbdev.config import get_config
from smalldocs.check import scan

ROOT = Path(__file__).parent.parent
NBS = {p.relative_to(ROOT/"nbs"): json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT/"nbs").rglob("*.ipynb"))
       if not any(part[0] in "._" for part in p.relative_to(ROOT/"nbs").parts)}
CONFIG = (ROOT/"_quarto.yml").read_text(encoding="utf-8")
LESSON = re.compile(r"\d\d[a-z]?_\w+\.ipynb$")


def cells(notebook, kind): return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]

def listed(entries):
    "The pages of a sidebar, in its order."
    for e in entries:
        if isinstance(e, str): yield e
        else: yield from listed(e.get("contents", []))

SIDEBAR = list(listed(yaml.safe_load(CONFIG)["website"]["sidebar"]["contents"]))


class Page(HTMLParser):
    "What a page links to and shows."
    VOID = {"img", "link", "meta", "input", "br", "hr", "source", "col", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.body_links, self.loads, self.images, self.cells, self.prose, self.formulas = set(), [], [], [], [], [], [], 0
        self.stack = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
            if any(t == "main" for t, _ in self.stack): self.body_links.append(a["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in a: self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon"): self.loads.append(a["href"])
        if tag == "img": self.images.append((a.get("src", "")[:60], a.get("alt") or ""))
        if tag == "math": self.formulas += 1
        if tag == "pre" and "cell-code" in (a.get("class") or ""): self.cells.append("")
        if tag not in self.VOID: self.stack.append((tag, a.get("class") or ""))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag: pass

    def handle_data(self, data):
        tags = [t for t, _ in self.stack]
        if any(t == "pre" and "cell-code" in c for t, c in self.stack): self.cells[-1] += data
        elif not {"script", "style", "pre", "code", "math"} & set(tags): self.prose.append(data)


def build(out):
    return subprocess.run([sys.executable, ROOT/"scripts/build_docs.py", "--renderer", "smalldocs", "--out", out], capture_output=True, text=True, cwd=out.parent)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")/"site"
    done = build(out)
    assert done.returncode == 0, done.stderr[-4000:]  # any warning of the renderer ends the build
    return out


@pytest.fixture(scope="module")
def pages(site): return {p.relative_to(site): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}


def test_every_notebook_and_module_has_its_page_and_its_place(pages):
    modules = {p.stem for p in (ROOT/get_config(path=ROOT).lib_name).glob("*.py") if not p.stem.startswith("_")}
    expected = {str(p) for p in NBS} | {f"reference/api/{m}.qmd" for m in modules}
    assert set(SIDEBAR) == expected
    assert set(pages) == {Path(p).with_suffix(".html") for p in expected}


def test_lessons_stand_in_course_order():
    lessons = [p for p in SIDEBAR if LESSON.match(p)]
    assert SIDEBAR[0] == "index.ipynb" and lessons == sorted(lessons) == SIDEBAR[1:len(lessons) + 1]


def test_links_arrive(site, pages):
    broken = []
    for where, page in pages.items():
        for href in page.links + page.loads:
            url = urlsplit(href)
            if url.scheme or url.netloc or href in ("", "#"): continue
            target = (site/where).parent/unquote(url.path) if url.path else site/where
            if target.is_dir(): target = target/"index.html"
            known = pages.get(target.resolve().relative_to(site.resolve())) if target.suffix == ".html" and target.exists() else None
            if not target.exists() or (url.fragment and known and unquote(url.fragment) not in known.ids): broken.append(f"{where}: {href}")
    assert not broken


def test_pages_need_no_network(pages):
    assert not [f"{where}: {src}" for where, page in pages.items() for src in page.loads if urlsplit(src).scheme not in ("", "data")]


def test_images_say_what_they_show(pages):
    assert not [f"{where}: {src} alt={alt!r}" for where, page in pages.items() for src, alt in page.images if len(alt) < 15]
    shown = sum(len(page.images) for page in pages.values())
    stored = sum("image/png" in o.get("data", {}) for nb in NBS.values() for c in nb["cells"] for o in c.get("outputs", []) if "hide" not in c["source"][:1])
    assert shown >= stored


def test_hidden_cells_and_directives_stay_out(pages):
    for path, nb in NBS.items():
        shown = {c.strip() for c in pages[path.with_suffix(".html")].cells}
        hidden = {re.sub(r"^#\|.*\n?", "", c, flags=re.M).strip() for c in cells(nb, "code") if re.search(r"^#\|\s*hide\s*$", c, re.M)}
        assert not shown & hidden - {""}, path
        assert not [c for c in shown if re.search(r"^#\s*(\||NBVAL_)", c, re.M) or "show_doc" in c or "nbdev_export" in c], path
    assert not [where for where, page in pages.items() if "#|" in "".join(page.prose)]


def test_exported_code_can_be_read(pages):
    "A course in building it shows what is built: the code of each exported cell, not its signature alone."
    for path, nb in NBS.items():
        shown = {c.strip() for c in pages[path.with_suffix(".html")].cells}
        exported = {re.sub(r"^#\|.*\n?", "", c, flags=re.M).strip() for c in cells(nb, "code") if re.search(r"^#\|\s*exports?\s*$", c, re.M)}
        assert exported <= shown, path


def test_no_link_is_left_as_text(pages):
    "As one is where Markdown stands inside HTML."
    assert not [f"{where}: {text[:80]}" for where, page in pages.items() for text in page.prose if re.search(r"\]\([\w./#-]+\)", text)]


def test_formulas_are_drawn(pages):
    raw = re.compile(r"\$\$|\\\(|\\\[|\\begin\{|\\frac|(?<![\w$])\$[^\s$](?:[^$\n]*[^\s$])?\$")
    assert not [f"{where}: {m[0]}" for where, page in pages.items() for text in page.prose for m in raw.finditer(text)]
    for path, nb in NBS.items():
        text = "".join(re.sub(r"```.*?```", "", c, flags=re.S) for c in cells(nb, "markdown"))
        assert pages[path.with_suffix(".html")].formulas >= text.count("$$") // 2, path


def test_search_and_both_themes(site):
    found = json.loads((site/"search.json").read_text(encoding="utf-8"))
    assert {e["href"].split("#")[0] for e in found} == {str(p.relative_to(site)) for p in site.rglob("*.html")}
    start = (site/"index.html").read_text(encoding="utf-8")
    assert 'data-mode="light"' in start and 'data-mode="dark"' in start


def test_modules_lead_to_their_lessons_and_back(pages):
    for path, nb in NBS.items():
        module = next((m[1] for c in cells(nb, "code") if (m := re.search(r"^#\|\s*default_exp\s+(\w+)", c, re.M)) and m[1] != "__init__"), None)
        if not module: continue
        api = Path(f"reference/api/{module}.html")
        assert [h for h in pages[path.with_suffix(".html")].body_links if h.endswith(f"api/{module}.html")], path
        assert [h for h in pages[api].body_links if h.endswith(path.with_suffix(".html").name)], api


def test_bibliography_holds_what_is_cited():
    page = "\n\n".join(cells(NBS[Path("reference/bibliography.ipynb")], "markdown"))
    entries = {m[1]: m[2] for m in re.finditer(r"^### (\S+)\n(.*?)(?=^##|\Z)", page, re.M | re.S)}
    cited = {m for nb in NBS.values() for c in cells(nb, "markdown") for m in re.findall(r"bibliography\.ipynb#([\w-]+)", c)}
    assert cited <= set(entries)
    for key, entry in entries.items():
        assert re.search(rf"^@\w+\{{{key},$", entry, re.M) and entry.count("{") == entry.count("}"), key  # its BibTeX, under the same key
        assert re.search(r"\]\(https://", entry) and re.search(r"year +=", entry), key


@pytest.mark.parametrize("path", NBS, ids=str)
def test_text_reads_alike_everywhere(path):
    "Syntax that one of JupyterLab, Quarto and smalldocs would show as raw text."
    for text in cells(NBS[path], "markdown"):
        plain = re.sub(r"`[^`\n]*`", "", text)
        assert not scan(plain) and not re.search(r"^:::|\{#[\w-]+\}", plain, re.M), text


def test_owner_and_host_stand_in_settings_alone():
    cfg = get_config(path=ROOT)
    texts = {"_quarto.yml": CONFIG, **{str(p): "".join(cells(nb, "markdown")) for p, nb in NBS.items()}}
    for value in (cfg.git_url, cfg.doc_host): assert not [name for name, text in texts.items() if value.split("//")[1] in text]


def test_build_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/notes.txt").write_text("keep")
    done = build(tmp_path/"mine")
    assert done.returncode == 1 and "--out" in done.stderr and (tmp_path/"mine/notes.txt").read_text() == "keep"
