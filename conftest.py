"What plain `pytest --nbval nbs/` needs, so that no one has to remember options."
import os
import re
from unittest.mock import patch

import pytest

from scripts.warm_kernels import PLACE, QUIET

for name, value in QUIET.items(): os.environ.setdefault(name, value)  # the kernels inherit it

# Processes of pytest-xdist that share their cores would wait for each other's threads at every product.
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")

import qlora_lab  # noqa: E402, F401  before torch, so that how threads wait is chosen


def pytest_configure(config):
    "Run notebooks in this environment, whatever kernels the user has installed elsewhere; warm, where `make` said so."
    if not hasattr(config.option, "nbval_current_env"): return
    if PLACE in os.environ: config.option.nbval_kernel_name = "python3"
    else: config.option.nbval_current_env = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    "A notebook's kernel, which starts here, sees no card: what its cells have stored are a CPU's numbers."
    if getattr(item, "cell", None) is None: return (yield)
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""): return (yield)


def pytest_itemcollected(item):
    """What nbval is told about a cell of a notebook.

    Its number: nbdev_clean removes execution counts, and without one nbval refuses to compare a cell's output. And
    whether to compare it: nbval knows its mark only alone on a line, here it may be followed by the reason, as in
    `# NBVAL_IGNORE_OUTPUT: why`.
    """
    cell = getattr(item, "cell", None)
    if cell is None: return
    if cell.get("execution_count") is None: cell["execution_count"] = item.cell_num + 1
    if re.search(r"^# NBVAL_IGNORE_OUTPUT\b", cell.source, re.M): item.options["check"] = False
