"""The documentation site: nothing broken, nothing missing, nothing that needs a network or that no reader should see.

Built by the pip-only renderer into a temporary folder; QLORA_LAB_SITE names a site that is there, by either renderer.
"""
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from nbdev.config import get_config
from smalldocs import api
from smalldocs.check import scan

from conftest import build_site

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"))
NBS = {p.relative_to(ROOT/"nbs"): json.loads(p.read_text(encoding="utf-8")) for p in BOOKS
       if not any(part[0] in "._" for part in p.relative_to(ROOT/"nbs").parts)}
CONFIG = (ROOT/"_quarto.yml").read_text(encoding="utf-8")
LESSON = re.compile(r"\d\d[a-z]?_\w+\.ipynb$")


def cells(notebook, kind): return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]

def marked(notebook, directive):
    "The code cells with a directive, as the site shows them."
    found = [c for c in cells(notebook, "code") if re.search(rf"^#\|\s*{directive}", c, re.M)]
    return {re.sub(r"^#\|.*\n?", "", c, flags=re.M).strip() for c in found}

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
        self.ids, self.formulas = set(), 0
        self.links, self.body_links, self.loads, self.images = [], [], [], []
        self.cells, self.prose, self.stack = [], [], []
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
        if tag not in self.VOID: self.stack.append((tag, a.get("class") or ""))
        if tag == "pre" and self.in_cell(): self.cells.append("")

    def in_cell(self):
        "Inside the code of a cell: one renderer marks the <pre>, the other the box around it."
        tags = [t for t, _ in self.stack]
        return "pre" in tags and any("cell-code" in c.split() for _, c in self.stack)

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag: pass

    def handle_data(self, data):
        tags = [t for t, _ in self.stack]
        if self.in_cell(): self.cells[-1] += data
        elif not {"script", "style", "pre", "code", "math"} & set(tags): self.prose.append(data)


@pytest.fixture(scope="module")
def pages(site): return {p.relative_to(site): Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}


def test_every_notebook_and_module_has_its_page_and_its_place(pages):
    modules = {p.stem for p in (ROOT/get_config(path=ROOT).lib_name).rglob("*.py") if not p.stem.startswith("_")}
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
            there = target.suffix == ".html" and target.exists()
            known = pages.get(target.resolve().relative_to(site.resolve())) if there else None
            lost = url.fragment and known and unquote(url.fragment) not in known.ids
            if not target.exists() or lost: broken.append(f"{where}: {href}")
    assert not broken


def test_pages_need_no_network(site, pages):
    "Neither do their styles and scripts: no font host, no library from elsewhere."
    loads = [(where, src) for where, page in pages.items() for src in page.loads]
    far = [(where, src) for where, src in loads if urlsplit(src).scheme not in ("", "data") or urlsplit(src).netloc]
    assert not far
    for file in site.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", file.read_text(encoding="utf-8"), flags=re.S)
        asked = re.findall(r"""(?:@import\s+["']?|url\(\s*["']?)((?:https?:)?//[^"')]+)""", text)
        assert not asked, (file.name, asked)
    for file in [*site.rglob("*.js"), *site.rglob("*.html")]:
        text = file.read_text(encoding="utf-8")
        calls = r"(?:import\s*\(|importScripts\(|\.src\s*=|require\(\[?|fetch\()"
        asked = re.findall(calls + r"""\s*["'](?:https?:)?//[^"']+""", text)
        assert not asked, (file.name, asked)


def test_formulas_have_a_font_that_stretches(site):
    "It comes with the site, and holds what a renderer of mathematics needs to build brackets of any height."
    from fontTools.ttLib import TTFont
    face = re.search(r"@font-face \{[^}]*url\(\"(fonts/[^\"]+)\"\)", (site/"styles.css").read_text(encoding="utf-8"))
    font = TTFont(site/face[1])
    assert "MATH" in font and {ord(c) for c in "∑∫√⌈⌉⌊⌋⏟αβδημσ"} <= set(font.getBestCmap())


def test_images_say_what_they_show(pages):
    images = [(where, src, alt) for where, page in pages.items() for src, alt in page.images]
    assert not [image for image in images if len(image[2]) < 15]
    shown = sum(len(page.images) for page in pages.values())
    seen = [c for nb in NBS.values() for c in nb["cells"] if "hide" not in c["source"][:1]]
    outputs = [o for c in seen for o in c.get("outputs", [])]
    stored = sum("image/png" in o.get("data", {}) for o in outputs)
    assert shown >= stored


def test_hidden_cells_and_directives_stay_out(pages):
    for path, nb in NBS.items():
        shown = {c.strip() for c in pages[path.with_suffix(".html")].cells}
        unseen = re.compile(r"^#\|\s*(hide|echo: false|default_exp)", re.M)
        assert shown or not [c for c in cells(nb, "code") if not unseen.search(c)], path
        assert not shown & marked(nb, r"hide\s*$") - {""}, path
        assert not [c for c in shown if re.search(r"^#\s*(\||NBVAL_)|show_doc|nbdev_export", c, re.M)], path
    assert not [where for where, page in pages.items() if "#|" in "".join(page.prose)]


def test_exported_code_can_be_read(pages):
    "A course in building it shows what is built: the code of each exported cell, not its signature alone."
    for path, nb in NBS.items():
        shown = {c.strip() for c in pages[path.with_suffix(".html")].cells}
        assert marked(nb, r"exports?\s*$") <= shown, path


def test_each_docstring_is_on_its_page(site):
    "None is lost to a renderer that reads something else in its first words."
    for symbol in api.inventory([get_config(path=ROOT).lib_name]):
        page = site/f"reference/api/{symbol.module.rpartition('.')[2]}.html"
        if not symbol.name or not symbol.summary: continue
        words = re.findall(r"[A-Za-z]{4,}", symbol.summary)[:4]
        text = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
        assert re.search(r"[^A-Za-z]+(?:\w{1,3}[^A-Za-z]+)*".join(words), text), symbol


def test_tables_of_the_api_say_something(site):
    "No column without an entry, no private helper, no mark of a heading left as text."
    files, tables = sorted((site/"reference/api").glob("*.html")), 0
    assert {f"reference/api/{file.stem}.qmd" for file in files} == {p for p in SIDEBAR if p.endswith(".qmd")} != set()
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "{#" not in re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S), file.name
        assert not re.search(r"<h[23][^>]*>(?:class )?_\w", text), file.name
        for table in re.findall(r"<table.*?</table>", text, re.S):
            found = re.findall(r"<tr.*?</tr>", table, re.S)
            split = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in found]
            rows = [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in split]
            assert all(any(column) for column in zip(*rows[1:])), (file.name, rows[:2])
            tables += len(rows) > 1
    assert tables > len(files)


def test_no_link_is_left_as_text(pages):
    "As one is where Markdown stands inside HTML."
    prose = [(where, text) for where, page in pages.items() for text in page.prose]
    assert not [f"{where}: {text[:80]}" for where, text in prose if re.search(r"\]\([\w./#-]+\)", text)]


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
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(cells(nb, "code")), re.M)
        if not found or found[1].startswith("__"): continue
        module = found[1].rpartition(".")[2]
        page = Path(f"reference/api/{module}.html")
        assert [h for h in pages[path.with_suffix(".html")].body_links if h.endswith(f"api/{module}.html")], path
        assert [h for h in pages[page].body_links if h.endswith(path.with_suffix(".html").name)], page


def test_language_models_get_the_pages_in_course_order(site):
    listed = re.findall(r"\]\(\S*?/(\d\d[a-z]?_\w+)\.llms\.md\)", (site/"llms.txt").read_text(encoding="utf-8"))
    assert listed == [Path(p).stem for p in SIDEBAR if LESSON.match(p)]


def test_bibliography_holds_what_is_cited():
    page = "\n\n".join(cells(NBS[Path("reference/bibliography.ipynb")], "markdown"))
    entries = {m[1]: m[2] for m in re.finditer(r"^### (\S+)\n(.*?)(?=^##|\Z)", page, re.M | re.S)}
    text = "\n".join(c for nb in NBS.values() for c in cells(nb, "markdown"))
    cited = set(re.findall(r"bibliography\.ipynb#([\w-]+)", text))
    assert cited <= set(entries)
    for key, entry in entries.items():
        bibtex = re.search(rf"^@\w+\{{{key},$", entry, re.M)  # under the same key
        assert bibtex and entry.count("{") == entry.count("}"), key
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
    for value in (cfg.git_url, cfg.doc_host):
        assert not [name for name, text in texts.items() if value.split("//")[1] in text]


def test_build_refuses_a_folder_that_holds_something_else(tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/notes.txt").write_text("keep")
    done = build_site(tmp_path/"mine")
    assert done.returncode == 1 and "--out" in done.stderr and (tmp_path/"mine/notes.txt").read_text() == "keep"
