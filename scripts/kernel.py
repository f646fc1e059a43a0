#!/usr/bin/env python3
"""Give this environment's Jupyter a kernel that chooses how its threads wait before it loads torch: `python scripts/kernel.py`.

It takes the place of the environment's own "python3" kernel, so notebooks name no other.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    folder = Path(sys.prefix) / "share/jupyter/kernels/python3"
    folder.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, str(ROOT / "qlora_lab/threads.py"), "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python", "metadata": {"debugger": True}}
    (folder / "kernel.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
