"What the long form has met, a line each, for benchmarks/hardening.py."
import json
import os

LONG = os.environ.get("QLORA_LAB_HARDEN") == "long"  # `make harden`


def note(part, **facts):
    "Add a line to the file that QLORA_LAB_HARDENING names, if it names one."
    path = os.environ.get("QLORA_LAB_HARDENING")
    if not path: return
    with open(path, "a") as f: f.write(json.dumps({"part": part} | facts) + "\n")
