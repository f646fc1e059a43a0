"""The step of models as people bring them: the lab, peft + bitsandbytes, and Unsloth where it can be imported.

    make bench-gpu ARGS="--only fast"                       # all rows; on an H100 the targets take some 25 minutes
    python -m benchmarks.fast --rows qwen3-8b-16x512 --sides lab,bnb,unsloth
    python -m benchmarks.fast --tiny --sides lab,bnb        # the same code on a CPU, in small
    python -m benchmarks.fast --rows qwen3-30b-a3b/8-4x1024 # 8 of its 48 layers
    CARD_GIB=24 python -m benchmarks.fast --rows qwen3-8b-1x65536 --sides host,unsloth --rounds 2  # a smaller card

Random weights in real shapes, made in 4 bits where they are used; r = 64, all linear layers, all tokens learned. A
row's sides are processes of their own, one after the other, with a time limit. Prints a table and merges what was
measured into results/gpu_fast.json, or for another card than an H100 into a file with its name; each row says its card,
date and versions.

Sides: lab; host (the lab, checkpoints in host memory); called (the lab, not recorded); unfused (recorded, but
transformers' own layers); one-head (the head as one product, whatever its vocabulary); bnb; unsloth.
"""
import argparse
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from benchmarks.common import (
    RESULTS,
    card_slug,
    peer_step,
    random_batch,
    random_model,
    random_peer,
    save_result,
    spread_of,
)
from benchmarks.shapes import SHAPES, shape_config
from qlora_lab.segments import use_expandable_segments

LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ATTENTION = LLAMA_LIKE[:4]  # all linear layers of a model whose experts are single parameters
WARMUP, ROUNDS = 2, 4


class Row(NamedTuple):
    "A line of the table."
    shape: str
    batch: int
    sequence: int
    checkpointing: bool = True
    layers: int | None = None  # the first so many of the shape's; None for all

    @property
    def folder(self) -> str: return f"{self.shape}-{self.layers or 'all'}"

    def config(self, tiny: bool): return shape_config(self.shape, tiny, self.layers)


CAP = "CARD_GIB"  # in the environment: allocations above it fail, as on a smaller card

ROWS = {
    "qwen3-8b-16x512": Row("qwen3-8b", 16, 512),
    "qwen3-8b-1x2048": Row("qwen3-8b", 1, 2048),
    "llama-3-8b-4x2048": Row("llama-3-8b", 4, 2048),
    "gemma-3-4b-4x2048": Row("gemma-3-4b", 4, 2048),
    "phi-4-mini-4x2048": Row("phi-4-mini", 4, 2048),
    "qwen2.5-7b-4x2048": Row("qwen2.5-7b", 4, 2048),
    "qwen3-30b-a3b-4x1024": Row("qwen3-30b-a3b", 4, 1024),
    "llama-7b-16x512": Row("llama-7b", 16, 512),
    "llama-7b-1x32768": Row("llama-7b", 1, 32768),
    "llama-7b-4x512-kept": Row("llama-7b", 4, 512, checkpointing=False),
    **{f"{shape}/8-4x2048": Row(shape, 4, 2048, layers=8) for shape in (  # no target names them
        "gemma-2-9b", "granite-3.1-8b", "llama-3.2-3b", "mistral-nemo-12b", "olmo-2-7b", "qwen3-14b", "smollm3-3b")},
}


def row_of(name: str) -> Row:
    "A row of the table, or SHAPE-BATCHxSEQUENCE, or SHAPE/LAYERS-BATCHxSEQUENCE."
    if name in ROWS: return ROWS[name]
    found = re.fullmatch(r"([^/]+)(?:/(\d+))?-(\d+)x(\d+)", name)
    layers = int(found[2]) if found and found[2] else None
    if found and found[1] in SHAPES and (layers is None or 1 <= layers <= SHAPES[found[1]]["num_hidden_layers"]):
        return Row(found[1], int(found[3]), int(found[4]), layers=layers)
    raise SystemExit(f"no row {name}; rows: {', '.join(ROWS)}, or as qwen3-8b-1x4096; shapes: {', '.join(SHAPES)}")


def card_gib() -> float | None:
    "The size of card that the environment asks for; None for the whole one."
    return float(os.environ[CAP]) if CAP in os.environ else None


def shrink(gib: float | None) -> None:
    "Make the card as small as that from now on; the plain path's loss may take more."
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    if gib: torch.cuda.set_per_process_memory_fraction(min(1., gib / whole))


def settings_of(row: Row, tiny: bool, who: str = "lab"):
    from qlora_lab.engine.rehearsal import Settings
    small = dict(dtype="float32", rank=4) if tiny else dict(rank=64)
    if who == "host": small["checkpoints_in"] = "host"
    kind = "float32" if tiny else "bfloat16"
    return Settings(adapter_dtype=kind, checkpointing=row.checkpointing, batch_size=row.batch, sequence=row.sequence,
                    device="cpu" if tiny else "cuda", **small)


LEFT_OUT = {"called": "forward_backward", "unfused": "fuse_layers", "one-head": "head_logits"}  # side: twin


def lab_step(row: Row, who: str, config, batch: dict, tiny: bool):
    "The lab's model and step, and the loss of its plain path."
    from qlora_lab.engine.dispatch import AT_WORK, use_kernels
    from qlora_lab.engine.paged_adamw import PagedAdamW
    from qlora_lab.lora import trainable
    from qlora_lab.train import summed_loss, train_step
    use_kernels()
    gone = LEFT_OUT.get(who)
    AT_WORK.pop((gone, "cuda"), None)
    model = random_model(config, settings_of(row, tiny, who), "cpu" if tiny else "cuda")
    optimizer = PagedAdamW(trainable(model), lr=1e-4)
    use_kernels(False)
    try:
        with torch.no_grad(): plain = summed_loss(model, batch).item() / (row.batch * (row.sequence - 1))
    except torch.OutOfMemoryError: plain = None  # transformers' layers hold more in one pass than a step here
    use_kernels()
    AT_WORK.pop((gone, "cuda"), None)
    return model, lambda: train_step(model, optimizer, [batch], 1e-4, 0.3), {"plain_loss": plain}


def bnb_step(row: Row, config, batch: dict, tiny: bool):
    "peft and bitsandbytes as they come."
    from benchmarks.memory import peer_optimizer
    settings = settings_of(row, tiny)
    model = random_peer(config, settings, "cpu" if tiny else "cuda")
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4) if tiny else peer_optimizer(params, settings)
    return model, lambda: peer_step(model, optimizer, batch), {}


def measured(step, tiny: bool, rounds: int) -> dict:
    "Seconds, losses, lengths of gradients and memory of some steps."
    def wait(): return None if tiny else torch.cuda.synchronize()
    gc.collect()
    if not tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, said = [], []
    for _ in range(WARMUP + rounds):
        wait()
        start = time.perf_counter()
        said.append(step())
        wait()
        seconds.append(time.perf_counter() - start)
    found = {"seconds": seconds[WARMUP:], "losses": [loss for loss, _ in said], "norms": [norm for _, norm in said]}
    if tiny: return found
    return found | {"peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
                    "reserved_gib": torch.cuda.max_memory_reserved() / 2 ** 30}


def in_this_process(name: str, who: str, tiny: bool, rounds: int) -> dict:
    "A side of a row, by the lab or by peft and bitsandbytes."
    row, start = row_of(name), time.perf_counter()
    if who != "bnb" and not tiny: use_expandable_segments()  # as `load_model`; PEFT leaves it to its users
    if tiny: row = row._replace(batch=2, sequence=64)
    config = row.config(tiny)
    batch = random_batch(row.batch, row.sequence, vocabulary=min(1000, config.vocab_size))
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        made = bnb_step(row, config, batch, tiny) if who == "bnb" else lab_step(row, who, config, batch, tiny)
        model, step, more = made
        more["loading_s"] = time.perf_counter() - start
        if not tiny: shrink(card_gib())
        found = more | measured(step, tiny, rounds)
    graph = model.__dict__.get("_graph")
    found["recorded"] = graph is not None and any(g is not None for g, _, _ in graph.graphs.values())
    said = {str(w.message).splitlines()[0] for w in noted}
    return found | {"notices": sorted(s for s in said if "graph" in s or "recorded" in s or "kernels" in s)}


def write_folder(name: str, folder: str, tiny: bool) -> None:
    "The shape as a 4-bit checkpoint of random bytes with a tokenizer of four words, for Unsloth."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from qlora_lab.bnb_files import save_quantized
    from qlora_lab.linear4bit import set_submodule
    from qlora_lab.lora import LoRALinear
    row = row_of(name)._replace(checkpointing=False)
    config = row.config(tiny)
    model = random_model(config, settings_of(row, tiny), "cpu" if tiny else "cuda")
    for path, m in list(model.named_modules()):
        if isinstance(m, LoRALinear): set_submodule(model, path, m.base_layer)
    model.config.architectures = [type(model).__name__]
    gib = sum(t.nbytes for t in model.state_dict().values()) / 2 ** 30
    if gib > 24: raise SystemExit(f"{gib:.0f} GiB to write: are the experts in 4 bits?")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    save_quantized(model, folder, PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"))


def run(command: list, limit: int) -> dict:
    "What a process prints last, as JSON; or why there is nothing."
    try: out = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired: return {"error": f"took more than {limit} s"}
    lines = [line for line in (out.stderr if out.returncode else out.stdout).splitlines() if line.strip()]
    if out.returncode: return {"error": lines[-1][:300] if lines else f"exit {out.returncode}"}
    return json.loads(lines[-1]) if lines else {}


def unsloth_side(name: str, folders: Path, tiny: bool, rounds: int, limit: int) -> dict:
    "A step in Unsloth, in a process of its own."
    row = row_of(name)
    if importlib.util.find_spec("unsloth") is None: return {"error": "unsloth is not installed"}
    folder = folders / row.folder
    if not folder.exists():
        code = f"from benchmarks.fast import write_folder; write_folder({name!r}, {str(folder)!r}, {tiny})"
        failed = run([sys.executable, "-c", code], limit)
        if failed: return failed
    targets = PHI if row.shape.startswith("phi") else ATTENTION if "num_experts" in SHAPES[row.shape] else LLAMA_LIKE
    asked = dict(row._asdict(), folder=str(folder), rank=64, targets=targets, words=1000,
                 warmup=WARMUP, rounds=rounds, card_gib=card_gib())
    script = Path(__file__).parent / "unsloth_side.py"
    return run([sys.executable, "-P", str(script), json.dumps(asked)], limit)  # -P: no module beside it is imported


def one_side(name: str, who: str, args, folders: Path) -> dict:
    "A side of a row, measured in a process of its own."
    from qlora_lab.provenance import provenance
    if who == "unsloth": found = unsloth_side(name, folders, args.tiny, args.rounds, args.limit)
    else:
        asked = json.dumps([name, who, args.tiny, args.rounds])
        found = run([sys.executable, "-m", "benchmarks.fast", "--one", asked], args.limit)
    row = row_of(name)._replace(batch=2, sequence=64) if args.tiny else row_of(name)
    if "seconds" in found:
        found |= spread_of(found["seconds"])
        found["tokens_per_s"] = row.batch * row.sequence / (found["median_ms"] / 1e3)
    made = {k: v for k, v in provenance().items() if k in ("date", "gpu", "versions", "commit")}
    if card_gib(): found["card_gib"] = card_gib()
    return {"row": name, "who": who, **row._asdict(), **found, "made": made}


def table(rows: list[dict]) -> pd.DataFrame:
    "What is printed."
    names = ("row", "who", "tokens_per_s", "peak_gib", "reserved_gib", "recorded", "loading_s", "error")
    shown = [{k: r.get(k) for k in names} | {"loss": r.get("losses", [None])[0], "norm": r.get("norms", [None])[0],
                                             "plain loss": r.get("plain_loss")} for r in rows]
    return pd.DataFrame(shown).dropna(axis=1, how="all").round(3)


FIRST = "NVIDIA H100 80GB HBM3"  # whose record most pages show


def record_name() -> str:
    "Each kind of card has a record of its own, so that no row stands beside another card's."
    return "gpu_fast" if torch.cuda.get_device_name() == FIRST else f"gpu_fast_{card_slug()}"


PEERS = "bnb", "unsloth"
SIDES = "lab", "host", *LEFT_OUT, *PEERS
SEEN = "tokens_per_s", "reserved_gib", "seconds", "losses", "norms", "made"  # what is kept of a peer's earlier run


def merged(rows: list[dict], before: list[dict]) -> list[dict]:
    "With what was measured before: other rows and sides, and of the peers how fast they were on other machines."
    old = {(r["row"], r["who"]): r for r in before}
    for r in rows:
        was = old.pop((r["row"], r["who"]), {})
        if r["who"] not in PEERS or was.get("made") == r["made"]: continue  # of this call, which saves after each side
        seen = was.get("elsewhere", []) + ([{k: was[k] for k in SEEN}] if {*SEEN} <= {*was} else [])
        if seen: r["elsewhere"] = seen
    return [*old.values(), *rows]


def recorded(name: str) -> list[dict]:
    "The rows on record."
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="names, with commas between")
    parser.add_argument("--sides", default="lab,bnb,unsloth", help="of " + ", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measured steps, after two more")
    parser.add_argument("--limit", type=int, default=180, help="seconds for a side")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU; nothing is written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one: return print(json.dumps(in_this_process(*json.loads(args.one))))
    if not args.tiny and not torch.cuda.is_available(): raise SystemExit("this benchmark needs a GPU, or --tiny")
    if args.rounds < 2: raise SystemExit(f"--rounds {args.rounds}: expected at least 2, for a median and its spread")
    asked, sides = args.rows.split(","), args.sides.split(",")
    unknown = sorted({*sides} - {*SIDES})
    if unknown: raise SystemExit(f"no side {', '.join(unknown)}")
    rows = {name: row_of(name) for name in asked}  # a name that is none ends it here, not after the others' minutes
    done, folders = [], Path(tempfile.mkdtemp(prefix="fast-", dir=os.environ.get("TMPDIR")))
    try:
        for i, name in enumerate(asked):
            for who in sides:
                done.append(one_side(name, who, args, folders))
                print(table(done[-1:]).to_string(index=False), flush=True)
                if args.tiny: continue
                record = record_name()
                save_result(record, {"rows": merged(done, recorded(record))})  # what is done stays done
            if rows[name].folder not in [rows[other].folder for other in asked[i + 1:]]:
                shutil.rmtree(folders / rows[name].folder, ignore_errors=True)
    finally: shutil.rmtree(folders, ignore_errors=True)
    print("\n" + table(done).to_string(index=False))


if __name__ == "__main__": main()
