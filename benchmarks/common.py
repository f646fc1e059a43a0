"What every benchmark shares: fair timing of two sides, and results that say where they come from."
import json
import statistics
import time
from pathlib import Path

from qlora_lab.records import provenance, write_whole

RESULTS = Path(__file__).parent / "results"


def save_result(name: str, result: dict) -> Path:
    "Write results/NAME.json with its provenance."
    return write_whole(RESULTS / f"{name}.json", json.dumps({"provenance": provenance(), **result}, indent=1) + "\n")


def interleaved(sides: dict, rounds: int = 7, warmup: int = 2) -> dict[str, list[float]]:
    "Seconds of each call, the sides taking turns so that a slow minute of the machine hits both."
    seconds = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if i >= warmup: seconds[name].append(time.perf_counter() - start)
    return seconds


def spread_of(seconds: list[float]) -> dict[str, float]:
    "Median and quartiles, in milliseconds."
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": 1e3 * statistics.median(seconds), "quartiles_ms": [1e3 * low, 1e3 * high]}
