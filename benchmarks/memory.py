"""The planner against the card: what it says before, and what torch's allocator counts.

    python -m benchmarks.memory            # a GPU with 80 GB; seven minutes; --only PART renews one part of the record
    python -m benchmarks.memory --cpu      # SmolLM2 on a CPU, against the process's peak

Writes results/memory_cuda.json or results/memory_cpu.json.
"""
# ruff: noqa: E402  (a setting of torch has to stand before torch)
import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

if "claims" in sys.argv: os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from benchmarks.common import RESULTS, peer_step, random_batch, random_model, random_peer, save_result
from qlora_lab import plan
from qlora_lab.engine.allocator import CONTEXT_GIB
from qlora_lab.engine.fitting import largest
from qlora_lab.engine.gpu import empty_cache
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.lora import trainable
from qlora_lab.provenance import peak_memory_gib, provenance, release_memory
from qlora_lab.train import train_step

PAPER = dict(rank=64, adapter_dtype="bfloat16", checkpointing=True)  # the paper's adapters, on all linear layers
PAGED = dict(device_budget=256 << 20)

CONFIGURATIONS = [  # name, settings
    ("smollm2-135m", dict(batch_size=16, sequence=512)),
    ("smollm2-1.7b", dict(batch_size=4, sequence=512)),
    ("smollm2-1.7b", dict(batch_size=8, sequence=1024, checkpointing=True, rank=8)),
    ("smollm2-1.7b", dict(batch_size=2, sequence=1024, quantize=None)),
    ("qwen2.5-1.5b", dict(batch_size=2, sequence=512, adapter_dtype="bfloat16")),
    ("qwen2.5-3b", dict(batch_size=4, sequence=1024, checkpointing=True, optimizer_bits=8)),
    ("llama-7b", dict(**PAPER)),
    ("llama-7b", dict(**PAPER | dict(checkpointing=False))),
    ("llama-7b", dict(batch_size=16, sequence=512, **PAPER)),
    ("llama-7b", dict(batch_size=1, sequence=4096, rank=16, targets=("q_proj", "v_proj"), checkpointing=True)),
    ("llama-7b", dict(batch_size=2, quantize=None, **PAPER)),
    ("llama-7b", dict(batch_size=2, accumulation=2, double_quant=False, **PAPER)),
    ("mistral-7b", dict(batch_size=2, sequence=2048, rank=32, checkpointing=True, adapter_dtype="bfloat16", **PAGED)),
    ("llama-3-8b", dict(batch_size=4, sequence=1024, **PAPER)),
    ("llama-3-8b", dict(batch_size=2, sequence=1024, learned=128)),
    ("qwen2.5-14b", dict(batch_size=1, sequence=2048, rank=16, checkpointing=True)),
    ("llama-13b", dict(**PAPER)),
    ("llama-13b", dict(batch_size=1, sequence=1024, rank=16, **PAGED)),
    ("llama-33b", dict(**PAPER, **PAGED)),
    ("llama-33b", dict(batch_size=4, sequence=512, **PAPER)),
    ("llama-65b", dict(**PAPER)),
    ("llama-65b", dict(**PAPER, **PAGED)),
    ("llama-2-70b", dict(**PAPER, **PAGED)),
]
CPU = [dict(batch_size=4, sequence=128), dict(batch_size=4, sequence=128, compute_dtype="float32"),
       dict(batch_size=8, sequence=128, learned=128),
       dict(batch_size=4, sequence=256, checkpointing=True), dict(batch_size=1, sequence=512, rank=64)]
CLAIMS = [("llama-7b", 8), ("llama-13b", 24), ("llama-33b", 24), ("llama-65b", 48), ("llama-2-70b", 48)]  # and GiB


def peer_optimizer(params, settings: Settings):
    import bitsandbytes as bnb
    return (bnb.optim.PagedAdamW32bit if settings.device_budget else bnb.optim.AdamW32bit)(params, lr=1e-4)


def one(name: str, settings: Settings, steps: int = 3, peer: bool = False) -> dict:
    "Peak of torch's allocator over whole training steps, the first aside, and a step's time; by the lab or its peer."
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # those of a recording would be counted with the next configuration too
    empty_cache()
    model = (random_peer if peer else random_model)(model_config(name), settings)
    if peer: optimizer = peer_optimizer(trainable(model), settings)
    else:
        bits, budget = settings.optimizer_bits, settings.device_budget
        optimizer = PagedAdamW(trainable(model), lr=1e-4, bits=bits, device_budget=budget)
    batches = [random_batch(settings.batch_size, settings.sequence, settings.learned)] * settings.accumulation
    def step():
        if not peer: return train_step(model, optimizer, batches, 1e-4, 0.3)
        for batch in batches: peer_step(model, optimizer, batch)  # of one batch each
    step()
    if "_graph" in model.__dict__: model._graph.clear()  # a replay takes memory without asking
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    free, total = torch.cuda.mem_get_info()
    return {"measured_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2 ** 30,
            "outside_gib": (total - free - torch.cuda.memory_reserved()) / 2 ** 30,
            "step_s": statistics.median(seconds)}


def row(name: str, **settings) -> dict:
    p = plan(name, **settings)
    found, tokens = one(name, p.settings), p.settings.batch_size * p.settings.sequence * p.settings.accumulation
    found = {"model": name, "settings": asdict(p.settings), "planned_gib": p.total_gib, "moment": p.peak,
             "parts": p.parts, **found, "error": p.total_gib / found["measured_gib"] - 1,
             "tokens_per_s": tokens / found["step_s"]}
    print(f"{name:14} {found['planned_gib']:7.3f} {found['measured_gib']:7.3f} GiB {found['error']:+8.3%} "
          f"{found['step_s']:7.3f} s  {settings}", flush=True)
    return found


def peers() -> list[dict]:
    "The lab and peft + bitsandbytes on the same shapes, one after the other."
    rows = []
    for name, settings in (("llama-7b", PAPER), ("llama-65b", PAPER), ("llama-65b", PAPER | PAGED)):
        for who in ("lab", "peft + bitsandbytes"):
            found = one(name, Settings(**settings), 5, who != "lab")
            rows.append({"model": name, "paged": "device_budget" in settings, "who": who, **found,
                         "tokens_per_s": 512 / found["step_s"]})
            print(rows[-1], flush=True)
    return rows


def claim(name: str, card: int) -> dict:
    "The longest sequence that fits by plan, under a cap of the card's size; and one a tenth longer, which must not."
    p = plan(name, card, **PAPER, **PAGED)
    longest, tried = largest(p), []
    total = torch.cuda.mem_get_info()[1]
    for sequence in (512, longest, -(-longest * 11 // 10 // 64) * 64):
        q = p.again(sequence=sequence)
        gc.collect()
        empty_cache()
        torch.cuda.set_per_process_memory_fraction((card - CONTEXT_GIB) * 2 ** 30 / total)
        said = {"sequence": sequence, "planned_gib": q.total_gib, "fits_by_plan": q.fits}
        try: tried.append(said | {"outcome": "finished"} | one(name, q.settings, 1))
        except torch.OutOfMemoryError: tried.append(said | {"outcome": "out of memory"})
        finally: torch.cuda.set_per_process_memory_fraction(1.)
        print(name, card, tried[-1], flush=True)
    return {"model": name, "card_gib": card, "longest": longest, "tried": tried}


def cpu_one(settings: dict) -> None:
    "A process of its own: load SmolLM2, take three steps, print what was planned and the peak."
    import psutil
    from transformers import AutoTokenizer
    from transformers.models.llama import modeling_llama  # noqa: F401  what a run imports anyway

    from qlora_lab import cli  # noqa: F401
    from qlora_lab.assets import smollm2_folder
    from qlora_lab.model import load_model
    from qlora_lab.train import TrainConfig, attach_adapters
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())  # noqa: F841  and reads before it plans
    before = psutil.Process().memory_info().rss
    dtype, handed_back = settings.pop("compute_dtype"), settings.pop("handed_back")
    if not handed_back: sys.modules["qlora_lab.train"].release_memory = lambda: None
    on_cpu = dict(device="cpu", dtype="float32", compute_dtype=dtype, process_bytes=before)
    p = plan("smollm2-135m", **on_cpu, **settings)
    model, _ = load_model(compute_dtype=getattr(torch, dtype), dtype=torch.float32, device="cpu")
    config = TrainConfig(rank=p.settings.rank, checkpointing=p.settings.checkpointing)
    model = attach_adapters(model, config).train()
    optimizer = PagedAdamW(trainable(model), lr=1e-4)
    batches = [random_batch(p.settings.batch_size, p.settings.sequence, p.settings.learned)] * p.settings.accumulation
    for _ in range(3):
        train_step(model, optimizer, batches, 1e-4, 0.3)
        if handed_back: release_memory()
    print(json.dumps({"planned_gib": p.total_gib, "measured_gib": peak_memory_gib(), "handed_back": handed_back,
                      "settings": asdict(p.settings), "parts": p.parts}))


def keep(part: str, result: dict):
    "Put a part into the record, beside the others; each says when and on what it was made."
    path = RESULTS / "memory_cuda.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    before.pop("provenance", None)
    return save_result("memory_cuda", before | result | {"made": before.get("made", {}) | {part: provenance()}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", choices=("configurations", "claims", "peers"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return cpu_one(json.loads(args.one))
    if args.cpu:
        rows = []
        for settings in CPU:
            for handed_back in (True, False):
                asked = json.dumps({"compute_dtype": "bfloat16", "handed_back": handed_back} | settings)
                command = [sys.executable, "-m", "benchmarks.memory", "--one", asked]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(out.stdout.splitlines()[-1])
                rows.append(found | {"error": found["planned_gib"] / found["measured_gib"] - 1})
                planned, measured = found["planned_gib"], found["measured_gib"]
                print(f"{planned:6.2f} {measured:6.2f} GiB {rows[-1]['error']:+7.1%}  {asked}", flush=True)
        return print(save_result("memory_cpu", {"rows": rows}))
    parts = ("configurations", "claims", "peers")
    if args.only is None:  # each in a process of its own: bitsandbytes' managed memory stays with the process
        for part in parts: subprocess.run([sys.executable, "-m", "benchmarks.memory", "--only", part], check=True)
        return
    result = {}
    if args.only == "peers": result["peers"] = peers()
    if args.only == "configurations":
        rows = [row(name, **settings) for name, settings in CONFIGURATIONS]
        errors = [abs(r["error"]) for r in rows]
        result |= {"median_error": statistics.median(errors), "largest_error": max(errors), "rows": rows}
        print(f"{len(rows)} configurations: median error {result['median_error']:.3%}, "
              f"largest {result['largest_error']:.3%}", flush=True)
    if args.only == "claims": result["claims"] = [claim(*c) for c in CLAIMS]
    print(keep(args.only, result))


if __name__ == "__main__": main()
