#!/usr/bin/env python3
"""Set up this environment's JupyterLab for the course: `python scripts/jupyter.py`.

Its kernel chooses how threads wait before it loads torch (see nbs/reference/threads.ipynb) and takes the place of the
environment's own "python3", so notebooks name no other. JupyterLab asks nobody on the network for news or updates.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARE = Path(sys.prefix) / "share/jupyter"


def put(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    argv = [sys.executable, str(ROOT / "qlora_lab/threads.py"), "ipykernel_launcher", "-f", "{connection_file}"]
    put(SHARE / "kernels/python3/kernel.json",
        {"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python", "metadata": {"debugger": True}})
    put(SHARE / "lab/settings/overrides.json",
        {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}})


if __name__ == "__main__": main()
