"""Two cards: what travels, what a base spread over them takes and yields, beside one card and beside others.

    make bench-gpus                                # two GPUs; about ten minutes
    python -m benchmarks.gpus wire ddp             # some parts alone
    python -m benchmarks.gpus --tiny               # the same code by gloo on a CPU, in small; nothing is written

Each part is processes of their own, started by torchrun (benchmarks.on_cards), and goes into results/gpus.json as soon
as it is done; one that fails, or takes too long, leaves the others.

wire       bandwidth of two collectives (qlora_lab.engine.scaling reads it)
ddp        8B, the base whole on each card
shard65    65B spread over two cards that may take 24 GiB beside activations
offload65  the same, its parts in host memory
peers      Qwen3-32B, 4 x 2048 tokens: spread by us, and by peft + bitsandbytes under accelerate's FSDP2; are the bytes
           gathered those that were loaded?
plans      further steps against their plans; every row of the others has its plan beside it, too
alone      one card with what a card of the others had to do, and the whole base
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS
from qlora_lab.provenance import provenance
from qlora_lab.records import write_whole

PARTS = {"wire": 2, "ddp": 2, "shard65": 2, "offload65": 2, "peers": 2, "plans": 2, "alone": 1}  # to processes
LIMIT = 300  # seconds of a start; a little before, each process says where it stands, and works on


def launched(part: str, count: int, tiny: bool) -> object:
    "What some processes found; raises RuntimeError, with the last that they said."
    with tempfile.TemporaryDirectory() as place:
        told = Path(place) / "found.json"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                "-m", "benchmarks.on_cards", part, "--to", str(told), *["--tiny"] * tiny,
                "--limit", str(max(1, LIMIT - 60))]
        threads = "1" if tiny else str(max(1, (os.cpu_count() or 1) // count))  # torchrun's own default is 1
        env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": threads} | os.environ
        run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
                               start_new_session=True)
        try: said = run.communicate(timeout=LIMIT)[0]
        except subprocess.TimeoutExpired:
            run.terminate()  # torchrun ends its processes, which are of groups of their own
            try: said = run.communicate(timeout=60)[0]
            except subprocess.TimeoutExpired as e:
                os.killpg(run.pid, signal.SIGKILL)
                said = (e.output or b"").decode()
            said = f"not done in {LIMIT} s\n{said}"
        if not told.exists() or run.returncode:  # the first that was said has the reason, the last where each stood
            said = said if len(said) < 8000 else f"{said[:4000]}\n...\n{said[-4000:]}"
            raise RuntimeError(f"{part}, {count} processes:\n{said}")
        return json.loads(told.read_text())


def kept(path: Path, part: str, found: object, seconds: float) -> None:
    "Write a part into the record, with its own date and versions."
    before = json.loads(path.read_text()) if path.exists() else {}
    about = before.get("about", {}) | {part: {"seconds": seconds, **provenance()}}
    write_whole(path, json.dumps(before | {"provenance": provenance(), "about": about, part: found}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"all by default: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="by gloo on a CPU, in small; nothing is written")
    parser.add_argument("--to", type=Path, help="the record; results/gpus.json, or nothing where it is tiny")
    args = parser.parse_args(argv)
    if wrong := set(args.parts) - set(PARTS): parser.error(f"no part {', '.join(wrong)}; parts: {', '.join(PARTS)}")
    path, failed = args.to or (None if args.tiny else RESULTS / "gpus.json"), []
    for part in args.parts or PARTS:
        start = time.perf_counter()
        try: found = launched(part, PARTS[part], args.tiny)
        except RuntimeError as e:
            failed.append(part)
            print(e, file=sys.stderr, flush=True)
            continue
        seconds = time.perf_counter() - start
        print(f"{part}: {seconds:.0f} s", json.dumps(found), flush=True)
        if path: kept(path, part, found, seconds)
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__": main()
