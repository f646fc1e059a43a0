"""The site and JupyterLab as a person has them: in a browser (Debian's chromium, driven by Playwright).

Skipped where there is none.
"""
import ast
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number);
                       return [m[0], m[1], m[2], m.length > 3 ? m[3] : 1]; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const lum = c => { const f = c.slice(0, 3).map(linear);
                     return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const behind = e => { const stack = [];
                        for (let n = e; n; n = n.parentElement) stack.push(parse(getComputedStyle(n).backgroundColor));
                        return stack.reverse().reduce((b, a) => over(a, b), [255, 255, 255, 1]); };
  const faint = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join(" ").trim();
    const box = e.getBoundingClientRect(), unseen = getComputedStyle(e).visibility === "hidden";
    if (!own || !box.width || !box.height || unseen || e.closest("math, svg, .visually-hidden")) continue;
    let opacity = 1; for (let n = e; n; n = n.parentElement) opacity *= Number(getComputedStyle(n).opacity);
    if (opacity < .05) continue;
    const back = behind(e), ink = parse(getComputedStyle(e).color); ink[3] *= opacity;
    const [a, b] = [lum(over(ink, back)), lum(back)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className} "${own.slice(0, 30)}"`);
  }
  return [...new Set(faint)];
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(site):
    "The site, served on this machine."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
        def handle(self):
            with suppress(ConnectionError): super().handle()  # a tab that was closed while it loaded
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def opened(browser, address, page, width=1280, scheme="light"):
    "A page, and what it said or asked of the network while it opened."
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, said = context.new_page(), []
    tab.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: said.append(str(e)))
    tab.on("request", lambda r: said.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    tab.goto(f"{address}/{page}")
    return tab, said


PAGES = ["index.html", "02_nf4.html", "04_paged.html", "10_train.html", "engine/dispatch.html",
         "reference/notation.html", "reference/api/lora.html", "howto/command_line.html"]
FIGURE = ".jupyter-widgets-output-area img, .widget-output img"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read(browser, address, page, width, scheme):
    "No request to the network, no failure, no scrolling sideways, contrast at least 4.5:1, the reader's own scheme."
    tab, said = opened(browser, address, page, width, scheme)
    tab.wait_for_timeout(200)
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(v => v < 80)")
    assert dark == (scheme == "dark")
    assert tab.evaluate(CONTRAST) == []
    faint = "<p style='color: #888'>too faint</p>"
    tab.evaluate(f'document.querySelector("main").insertAdjacentHTML("afterbegin", "{faint}")')
    assert len(tab.evaluate(CONTRAST)) == 1  # what is too faint is found
    tab.context.close()


WIDE = """() => [...document.querySelectorAll("main .cell-output pre, main math[display=block]")]
                 .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60))"""


def test_printed_results_fit(browser, address, site):
    "Nothing printed is cut at 1280 pixels, and no line of a lesson or an engine page has to wrap (80 characters fit)."
    tab, _ = opened(browser, address, "index.html")
    wide = []
    folders = [site, *(site / folder for folder in ("engine", "reference", "howto", "commands"))]
    for page in sorted(page for folder in folders for page in folder.glob("*.html")):
        tab.goto(f"{address}/{page.relative_to(site).as_posix()}")
        if page.parent in folders[:2]: tab.add_style_tag(content="main pre { white-space: pre !important }")
        wide += [(page.name, text) for text in tab.evaluate(WIDE)]
    assert not wide
    cut = "<div class='cell-output'><pre style='white-space: pre'>" + 40 * "cut " + "</pre></div>"
    tab.evaluate(f'document.querySelector("main").insertAdjacentHTML("afterbegin", "{cut}")')
    assert len(tab.evaluate(WIDE)) == 1  # what is cut is found
    tab.context.close()


def test_search_and_theme(browser, address):
    tab, said = opened(browser, address, "index.html")
    box = tab.locator("input[type=search]:visible, .smalldocs-search input:visible, #quarto-search input:visible")
    box.first.fill("absmax")
    tab.wait_for_selector("a[href*='01_blockwise'] >> visible=true")
    before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.keyboard.press("Escape")
    tab.locator(".quarto-color-scheme-toggle:visible").first.click()
    tab.wait_for_timeout(300)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before and said == []
    tab.context.close()


def test_the_theme_switch_is_found_on_a_phone(browser, address):
    tab, _ = opened(browser, address, "index.html", 390)
    tab.locator(".navbar-toggler:visible").first.click()
    tab.wait_for_timeout(600)
    switch = tab.locator(".quarto-color-scheme-toggle:visible").first
    assert switch.bounding_box()["height"] >= 16
    tab.context.close()


def test_the_keyboard_alone_reaches_everything(browser, address):
    "Tab walks through links in order, and what has the focus can be seen."
    tab, _ = opened(browser, address, "index.html")
    seen = []
    for _ in range(25):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            const marked = s.outlineStyle !== "none" || s.boxShadow !== "none";
            return [e.tagName, e.textContent.trim().slice(0, 20), marked]; }"""))
    links = [s for s in seen if s[0] == "A"]
    assert len({tuple(s[:2]) for s in links}) > 5 and all(s[2] for s in links), seen
    tab.context.close()


# ---------------------------------------------------------------- JupyterLab

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab as `make lab` starts it, over a copy of the notebooks."
    folder = tmp_path_factory.mktemp("lab")
    for name in ("nbs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}", "--no-browser", "--allow-root",
               "--IdentityProvider.token=of-this-test", str(folder / "nbs")]
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_DATA_DIR": str(folder / "data")}
    env = os.environ | own | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try: urllib.request.urlopen(f"{base}/api?token=of-this-test", timeout=2).close()
        except OSError: time.sleep(0.5)
        else: break
    else: raise AssertionError("JupyterLab did not start")
    yield base
    server.terminate()
    server.wait(20)


def in_the_lab(browser, lab, notebook):
    tab, said = opened(browser, lab, f"lab/tree/{notebook}?token=of-this-test&reset")
    tab.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    return tab, said


def test_the_index_opens_in_jupyterlab(browser, lab):
    "Without boilerplate on top, without a question about news, without an error."
    tab, said = in_the_lab(browser, lab, "index.ipynb")
    tab.wait_for_timeout(3000)
    assert tab.locator(".jp-MarkdownOutput h1").first.inner_text().startswith("QLoRA Lab")
    assert tab.locator("text=official Jupyter news").count() == 0
    assert not [s for s in said if not s.startswith("http") or "127.0.0.1" not in s], said
    tab.context.close()


def test_solutions_are_folded_in_jupyterlab():
    cells = json.loads((ROOT / "nbs/02_nf4.ipynb").read_text(encoding="utf-8"))["cells"]
    hidden = [c["metadata"]["jupyter"]["source_hidden"] for c in cells if "#| hide\n" in "".join(c["source"])]
    assert hidden and all(hidden)


def end_sessions(lab):
    "Stop every kernel of the server."
    def ask(path, method="GET"):
        token = {"Authorization": "token of-this-test"}
        request = urllib.request.Request(f"{lab}/api/{path}", method=method, headers=token)
        with urllib.request.urlopen(request, timeout=30) as answer: return answer.read()
    for session in json.loads(ask("sessions")): ask(f"sessions/{session['id']}", "DELETE")


def runs_to_its_end(tab, last, begin=90, end=400):
    "Run all cells; whether the last one ran, or False where after `begin` seconds none has."
    tab.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle], .jp-KernelStatus", timeout=60_000)
    tab.click("text=Run >> nth=0")
    tab.click("text=Run All Cells")
    start, highest = time.time(), 0
    while time.time() - start < (end if highest else begin):
        prompts = " ".join(tab.locator(".jp-InputPrompt").all_inner_texts())
        highest = max([highest, *map(int, re.findall(r"\[(\d+)\]", prompts))])
        if highest >= last: return True
        tab.mouse.wheel(0, 1500)
        tab.wait_for_timeout(500)
    return False


def test_lesson_02_runs_to_its_end_and_its_slider_moves_the_figure(browser, lab):
    "A kernel that does not begin is started anew: at times ipykernel 7 never answers its first request."
    cells = json.loads((ROOT / "nbs/02_nf4.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    last = sum(bool(ast.parse(source).body) for source in code)  # comments do not count
    for _ in range(3):
        tab, said = in_the_lab(browser, lab, "02_nf4.ipynb")
        if ran := runs_to_its_end(tab, last): break
        tab.context.close()
        end_sessions(lab)
    assert ran and tab.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    tab.locator(".widget-slider .noUi-handle").first.scroll_into_view_if_needed()
    tab.wait_for_timeout(2000)
    before = after = tab.locator(FIGURE).first.get_attribute("src")
    for _ in range(40):
        tab.locator(".widget-slider .noUi-handle").first.focus()
        tab.keyboard.press("ArrowLeft")
        tab.wait_for_timeout(1000)
        after = tab.locator(FIGURE).first.get_attribute("src")
        if after != before: break
    assert after != before
    assert not [s for s in said if not s.startswith("http")], said
    tab.context.close()
