"""Real tokens a second on docstrings' real lengths, padded and packed: the lab, and Unsloth where it can be imported.

    python -m benchmarks.packing                             # on a GPU: 8B, 7B and 135M shapes; under 5 minutes
    python -m benchmarks.packing --shapes qwen3-8b --sides lab,unsloth --steps 16 --ways "padded, 1 x 64|packed, 64"
    python -m benchmarks.packing --cpu                       # SmolLM2 itself on real docstrings, 20 steps each way
    python -m benchmarks.packing --tiny --sides lab          # the same code on a CPU, in small; nothing is written

On a GPU the weights are random in real shapes, and so are the tokens; their numbers are those of the standard library's
docstrings in SmolLM2's tokens (results/docstring_lengths.json: length and learned tokens of each example, written by
--lengths). A step learns from 64 examples, r = 64, checkpointed. Ways: padded, in 4 passes of 16 or in one of 64;
packed, in rows as long as 16 or as 64 of the longest examples. All sides take the same steps. What is counted is real
tokens: padding and what rows are filled up with are no tokens.
"""
import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.common import RESULTS, random_model
from benchmarks.fast import LLAMA_LIKE, run
from benchmarks.shapes import SHAPES, shape_config

WARMUP = 8  # steps in which shapes are seen for the first time
BATCH, PASSES = 16, 4
WAYS = {"padded, 4 x 16": dict(), "padded, 1 x 64": dict(pass_size=64), "packed, 16": dict(packing=True),
        "packed, 64": dict(packing=True, pass_size=64)}
ADDED = {"padded": False, "packed": True}  # Unsloth's: all 64 at once


def lengths() -> list[list[int]]:
    "Length and learned tokens of each example."
    found = json.loads((RESULTS / "docstring_lengths.json").read_text())
    return [[*map(int, pair)] for pair in zip(found["tokens"].split(), found["learned"].split())]


def write_lengths() -> None:
    "Of the docstrings that lesson 10 learns from, in SmolLM2's tokens."
    from transformers import AutoTokenizer

    from benchmarks.common import save_result
    from qlora_lab.assets import quiet, smollm2_folder
    from qlora_lab.data import default_split, tokenize
    with quiet(): tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    tokens = [tokenize(tokenizer, e) for e in default_split().train]
    columns = {"tokens": [len(t.ids) for t in tokens], "learned": [int(t.mask[1:].sum()) for t in tokens]}
    save_result("docstring_lengths", {name: " ".join(map(str, column)) for name, column in columns.items()})


def random_examples(words: int) -> list:
    "Tokens without meaning in the docstrings' lengths, the last so many of each learned."
    from qlora_lab.data import Example, Tokens
    generator, nobody = torch.Generator().manual_seed(0), Example(({"role": "assistant", "content": ""},))
    def one(n, learned):
        return Tokens(torch.randint(0, words, (n,), generator=generator), torch.arange(n) >= n - learned, nobody)
    return [one(*row) for row in lengths()]


def config_of(shape: str, tiny: bool):
    from qlora_lab.engine.known_models import model_config
    return shape_config(shape, tiny) if shape in SHAPES else model_config(shape)


def settings_of(tiny: bool, **more):
    from qlora_lab.engine.rehearsal import Settings
    small = dict(dtype="float32", rank=4, device="cpu") if tiny else dict(rank=64)
    return Settings(adapter_dtype="float32" if tiny else "bfloat16", checkpointing=True, **small, **more)


def counted(seconds: list[float], tokens: list[int]) -> dict:
    "Real tokens a second: of all measured steps together, and of the one in the middle."
    speeds = [n / s for n, s in zip(tokens, seconds)]
    return {"tokens_per_s": sum(tokens) / sum(seconds), "median_tokens_per_s": statistics.median(speeds)}


def steps_of(model, optimizer, learn: list, config, warmup: int, steps: int, wait) -> dict:
    "Some steps of a run, measured after the warm-up."
    from qlora_lab.train import one_step
    seconds, said = [], []
    for step in range(warmup + steps):
        start = time.perf_counter()
        said.append(one_step(model, optimizer, learn, config, step))
        wait()
        seconds.append(time.perf_counter() - start)
    rows = said[warmup:]
    return counted(seconds[warmup:], [r["tokens"] for r in rows]) | {
        "losses": [r["loss"] for r in said], "norms": [r["grad_norm"] for r in said],
        "seconds": seconds[warmup:], "tokens": [r["tokens"] for r in rows]}


def planned(config, learn: list, size: int, tiny: bool, packed: bool) -> float:
    "GiB that the planner says of the largest pass."
    from qlora_lab.batches import longest_batch
    from qlora_lab.engine.planner import plan
    from qlora_lab.engine.rehearsal import Settings
    some = longest_batch(learn, size)
    own = settings_of(tiny, batch_size=size, sequence=len(some[-1].ids), accumulation=2,
                      learned=sum(int(t.mask[1:].sum()) for t in some))
    if "packed" in Settings.__dataclass_fields__: own = replace(own, packed=packed)
    return plan(config, **{k: getattr(own, k) for k in Settings.__dataclass_fields__}).total_gib


def lab_side(shape: str, ways: list[str], tiny: bool, steps: int) -> list[dict]:
    "The lab, each way with the same model."
    from qlora_lab.engine.dispatch import faster, use_kernels
    from qlora_lab.engine.paged_adamw import PagedAdamW
    from qlora_lab.lora import trainable
    from qlora_lab.runs import TrainConfig
    use_kernels()
    config, device = config_of(shape, tiny), torch.device("cpu" if tiny else "cuda")
    learn, found = random_examples(min(1000, config.vocab_size)), []
    model = random_model(config, settings_of(tiny), device.type)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    def wait(): return None if tiny else torch.cuda.synchronize()
    for way in ways:
        for n, p in model.named_parameters():
            if n in start: p.data.copy_(start[n])
        how = TrainConfig(batch_size=BATCH, accumulation=PASSES, lr=1e-4, warmup=0, **WAYS[way])
        optimizer = PagedAdamW(trainable(model), lr=1e-4)
        gc.collect()
        if not tiny:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = {"shape": shape, "who": "lab", "way": way} | steps_of(
            model, optimizer, learn, how, 1 if tiny else WARMUP, steps, wait)
        graph = model.__dict__.get("_graph")
        row["recorded"] = 0 if graph is None else sum(g is not None for g, _, _ in graph.graphs.values())
        if not tiny:
            row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
                    "reserved_gib": torch.cuda.max_memory_reserved() / 2 ** 30,
                    "planned_gib": planned(config, learn, how.pass_size or BATCH, tiny, how.packing)}
        found.append(row)
        del optimizer
        faster("forget", device, model)
    return found


def unsloth_side(shape: str, tiny: bool, steps: int, limit: int, folders: Path) -> list[dict]:
    "Unsloth in a process of its own, from a folder in 4 bits with the same shape."
    from benchmarks import fast
    from qlora_lab.batches import batch_indices
    if importlib.util.find_spec("unsloth") is None: return [dict(shape=shape, who="unsloth", error="is not installed")]
    name = next((name for name, row in fast.ROWS.items() if row.shape == shape), None)
    if name is None: return [dict(shape=shape, who="unsloth", error="no folder is written of this shape")]
    code = f"from benchmarks.fast import write_folder; write_folder({name!r}, {str(folders / shape)!r}, {tiny})"
    if failed := run([sys.executable, "-c", code], limit): return [dict(shape=shape, who="unsloth") | failed]
    rows, count = lengths(), [n for n, _ in lengths()]
    batches = [[rows[i] for k in range(s * PASSES, (s + 1) * PASSES) for i in batch_indices(count, BATCH, k)]
               for s in range(WARMUP + steps)]
    asked = folders / f"{shape}.json"
    asked.write_text(json.dumps(dict(folder=str(folders / shape), rank=64, targets=LLAMA_LIKE, words=1000,
                                     warmup=WARMUP, batches=batches, ways=ADDED)))
    script = Path(__file__).parent / "unsloth_packed.py"
    found = run([sys.executable, "-P", str(script), str(asked)], limit)
    if "error" in found: return [dict(shape=shape, who="unsloth") | found]
    return [dict(shape=shape, who="unsloth", way=way, version=found["version"]) | row
            | counted(row["seconds"], row["tokens"]) for way, row in found["ways"].items()]


def cpu_side(steps: int) -> list[dict]:
    "SmolLM2 in 4 bits on the docstrings, as lesson 10 trains it; both ways in turn, step by step."
    from qlora_lab.data import default_split, tokenize
    from qlora_lab.engine.paged_adamw import PagedAdamW
    from qlora_lab.lora import trainable
    from qlora_lab.model import load_model
    from qlora_lab.runs import TrainConfig
    from qlora_lab.train import attach_adapters, one_step
    ways = {"padded, 2 x 4": dict(), "padded, 1 x 8": dict(pass_size=8), "packed, 4": dict(packing=True),
            "packed, 8": dict(packing=True, pass_size=8)}
    sides, learn = {}, None
    for way, more in ways.items():
        model, tokenizer = load_model(compute_dtype=torch.float32)
        config = TrainConfig(**more)
        model = attach_adapters(model, config).train()
        learn = learn or [tokenize(tokenizer, e) for e in default_split().train]
        sides[way] = model, PagedAdamW(trainable(model), config.lr), config, {"seconds": [], "tokens": [], "losses": []}
    for step in range(2 + steps):
        for model, optimizer, config, noted in sides.values():
            said = one_step(model, optimizer, learn, config, step)
            noted["losses"].append(said["loss"])
            if step >= 2:
                for key in ("seconds", "tokens"): noted[key].append(said[key])
    return [{"shape": "smollm2-135m", "who": "lab", "way": way} | noted | counted(noted["seconds"], noted["tokens"])
            for way, (_, _, _, noted) in sides.items()]


def table(rows: list[dict]) -> pd.DataFrame:
    names = "shape", "who", "way", "tokens_per_s", "median_tokens_per_s", "peak_gib", "planned_gib", "recorded", "error"
    def ends(losses): return {"first loss": losses[0], "last loss": losses[-1]}
    shown = [{k: r.get(k) for k in names} | ends(r.get("losses") or [None]) for r in rows]
    return pd.DataFrame(shown).dropna(axis=1, how="all").round(3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen3-8b,smollm2-135m,llama-7b", help="names, with commas between")
    parser.add_argument("--sides", default="lab,unsloth", help="of lab, unsloth")
    parser.add_argument("--ways", default="|".join(WAYS), help="of the lab's, with | between")
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after eight more")
    parser.add_argument("--limit", type=int, default=150, help="seconds for a process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--cpu", action="store_true", help="SmolLM2 itself on this machine's processor")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU; nothing is written")
    parser.add_argument("--lengths", action="store_true", help="write results/docstring_lengths.json and end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.lengths: return write_lengths()
    if args.one: return print(json.dumps(lab_side(*json.loads(args.one))))
    if not (args.tiny or args.cpu or torch.cuda.is_available()): raise SystemExit("needs a GPU, or --cpu, or --tiny")
    rows, name = [], "cpu_packing" if args.cpu else "gpu_packing"
    if args.cpu: rows = cpu_side(args.steps)
    for shape in () if args.cpu else args.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="packing-") as folders:
            for who in args.sides.split(","):
                if who == "unsloth": found = unsloth_side(shape, args.tiny, args.steps, args.limit, Path(folders))
                else:
                    asked = json.dumps([shape, args.ways.split("|"), args.tiny, args.steps])
                    found = run([sys.executable, "-m", "benchmarks.packing", "--one", asked], args.limit)
                    found = found if isinstance(found, list) else [dict(shape=shape, who="lab") | found]
                rows += found
                print(table(found).to_string(index=False), flush=True)
                if not args.tiny: written(args.out, name, rows)  # what is done stays done
    if args.cpu:
        print(table(rows).to_string(index=False))
        written(args.out, name, rows)


def written(folder: Path, name: str, rows: list[dict]) -> None:
    "The result so far, with its provenance."
    from qlora_lab.provenance import provenance
    from qlora_lab.records import write_whole
    write_whole(folder / f"{name}.json", json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__": main()
