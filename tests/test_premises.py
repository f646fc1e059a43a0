"After set-up nothing leaves the machine: data, training, merging, exporting, chatting, with every way out shut."
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import sealed

from conftest import make_llama, make_tokenizer

HERE = Path(__file__).resolve().parent


@cache
def no_interface():
    "What a command starts with to run where there is no network interface; nothing where that cannot be had."
    alone = ["unshare", "-rn"]
    try: tried = subprocess.run([*alone, "true"], capture_output=True, timeout=20)
    except OSError: return []
    return alone if tried.returncode == 0 else []


def run(what, cwd, *before):
    "As somebody who has set nothing: the lab must not need to be told that there is no network."
    told = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN")
    env = {k: v for k, v in os.environ.items() if k not in told}
    env |= {"HF_HOME": str(cwd / "hub"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    return subprocess.run([*before, sys.executable, str(HERE / "sealed.py"), str(what)], cwd=cwd, env=env, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=300)


def test_the_road_is_gone_with_every_way_out_shut(tmp_path):
    "From rows to a model that is served: each command of the lab, on a folder of weights, and the course's own model."
    make_llama(vocab_size=300).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(sealed.rows())
    done = run(tmp_path, tmp_path, *no_interface())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert not (tmp_path / "hub").exists() or not [p for p in (tmp_path / "hub").rglob("*") if p.is_file()]


@pytest.mark.parametrize("what", ["python", "native", "local"])
def test_the_watches_see_what_asks(what, tmp_path):
    "The controls: a connection by Python, a socket by a library in C, and one between processes of this machine."
    done = run(what, tmp_path)
    filtered = done.stdout.startswith("filtered")
    if what == "local": assert done.returncode == 0, done.stderr
    elif what == "python": assert done.returncode == sealed.LEFT and "create_connection" in done.stderr
    elif filtered: assert done.returncode == -signal.SIGSYS and "sealed.py" in done.stderr
    else: pytest.skip("this kernel takes no filter of calls, so native libraries are watched by the namespace alone")
