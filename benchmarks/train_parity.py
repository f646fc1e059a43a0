"""The lab and peft + bitsandbytes on the same model, seeds and data, in float32: do they learn the same?

    python -m benchmarks.train_parity            # about ten minutes on two cores

Writes benchmarks/results/train_parity.json: the loss of every step of both, held-out scores before and after, seconds
and peak memory. Each side runs in a process of its own, so that neither warms up or crowds the other.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import save_result


def one_side(backend: str, steps: int, folder: Path) -> None:
    "Train with one backend; the run's folder holds all that is reported."
    from qlora_lab.data import default_split
    from qlora_lab.model import load_model
    from qlora_lab.train import TrainConfig, train
    model, tokenizer = load_model(backend=backend, compute_dtype=torch.float32, device="cpu")  # one base for both
    train(model, tokenizer, default_split(), TrainConfig(folder=str(folder), steps=steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/train_parity"), help="where the two runs live")
    parser.add_argument("--side", choices=("lab", "bnb"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side: return one_side(args.side, args.steps, args.folder / args.side)

    from qlora_lab.train import Run
    sides = {}
    for side in ("lab", "bnb"):
        subprocess.run([sys.executable, "-m", "benchmarks.train_parity", "--side", side, "--steps", str(args.steps),
                        "--folder", str(args.folder)], check=True)
        run = Run.load(args.folder / side)
        sides[side] = {"losses": run.losses, "seconds": sum(m["seconds"] for m in run.metrics),
                       "peak_memory_gib": run.record["peak_memory_gib"],
                       "held_out": {k: {"loss": s.loss, "stderr": s.stderr}
                                    for k, s in (("before", run.before), ("after", run.after))},
                       "config": run.record["config"], "memory": run.record["memory"]}
    apart = [abs(a - b) for a, b in zip(sides["lab"]["losses"], sides["bnb"]["losses"])]
    ends = [sides[side]["held_out"]["after"]["loss"] for side in ("lab", "bnb")]
    result = {"sides": sides, "largest_difference_first_20_steps": max(apart[:20]), "largest_difference": max(apart),
              "held_out_difference": abs(ends[0] - ends[1])}
    print(save_result("train_parity", result))
    print(json.dumps({k: v for k, v in result.items() if k != "sides"}, indent=1))


if __name__ == "__main__": main()
