#!/usr/bin/env python3
"""After a change to a notebook: `python scripts/tidy.py` exports modules, cleans notebooks, folds cells for JupyterLab.

Folded (`jupyter.source_hidden`, a mark that nbdev_clean keeps, see settings.ini) is the source of a cell that the site
does not show or shows folded too: set-up and figures marked `echo: false` or `code-fold: true`, cells marked `hide` (in
which the exercises' solutions are run), and the comment that opens a module.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDED = re.compile(r"^#\| *(hide|echo: *false|code-fold: *true)\s*$", re.M)


def folds(source: str) -> bool:
    "Whether a code cell's source is folded."
    code = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    return bool(FOLDED.search(source)) or "#| export" in source and not code


def fold(notebook: dict) -> dict:
    "Mark the cells of a notebook, and take the mark from others."
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code": continue
        cell["metadata"].pop("jupyter", None)
        if folds("".join(cell["source"])): cell["metadata"]["jupyter"] = {"source_hidden": True}
    return notebook


def main() -> None:
    for name in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / name], cwd=ROOT, check=True)
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        text = path.read_text(encoding="utf-8")
        new = json.dumps(fold(json.loads(text)), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if new != text: path.write_text(new, encoding="utf-8")


if __name__ == "__main__": main()
