"""Number formats and better 4-bit weights, judged on a model's held-out documents: python -m benchmarks.data_types.

Three models: SmolLM2, whose weights lie on a 4-bit grid; the same function off the grid; and a small Llama trained here
from nothing on the standard library, whose weights were never quantized. For each: every number format at block sizes
from 16 to 1024; scales and codes chosen in the bytes of NF4 with double quantization, and what was tried beside them;
and, layer by layer, what rounding costs. Each number is kept by document, so that pages compute their own intervals.

Models run side by side on a GPU (--device cuda), one after the other on a CPU; --quick is a small check of everything.
What a model has finished lies in --folder and is not done again. Result: results/data_types.json, or --name.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import better_bytes
from benchmarks.common import save_result
from benchmarks.plain_llama import trained_from_nothing
from qlora_lab.assets import smollm2_folder
from qlora_lab.divergence import said
from qlora_lab.engine.number_formats import FORMATS, Format, Microscaled, format_named
from qlora_lab.engine.off_grid import off_grid
from qlora_lab.engine.study_texts import entry, held_out_texts, other_texts, rows_of_text, text_hash
from qlora_lab.linear_layers import quantizable
from qlora_lab.loading import open_tokenizer
from qlora_lab.measures import beside
from qlora_lab.records import read_json, write_whole

MODELS = "smollm2", "smollm2_off_grid", "from_nothing"
BLOCKS = 16, 32, 64, 128, 256, 512, 1024
CURVES = ("nf4", "nf4+f16", "nf4+dq", "af4+dq", "fp4+dq", "fp4_e2m1+dq", "fp4_e3m0+dq", "int4+dq", "int4_affine", "hqq",
          "int8")
SINGLE = "af4", "fp4", "fp4_e2m1", "fp4_e3m0", "int4", "mxfp4", "nvfp4"


class Study:
    "A model, its weights as they were, the documents, and what has been found; each part is written when it is done."
    def __init__(self, name: str, asked):
        self.name, self.asked, self.device = name, asked, torch.device(asked.device)
        self.file = Path(asked.folder) / f"{name}.json"
        self.found = read_json(self.file) if self.file.exists() else {}
        self.tokenizer = open_tokenizer(str(smollm2_folder()))
        texts = held_out_texts(4 if asked.quick else 24)
        self.rows = rows_of_text(self.tokenizer, texts, 64 if asked.quick else 512)
        self.model, reference = self.opened()
        self.layers = quantizable(self.model)[0]
        if asked.quick: self.layers = {n: m for n, m in self.layers.items() if ".layers.1." in n}
        self.before = {n: m.weight.detach().clone() for n, m in self.layers.items()}
        self.reference = said(reference, self.rows, keep=self.device)
        study = {"documents": list(texts), "text_hash": text_hash(texts), "weights": self.fingerprint(),
                 "row": len(self.rows[0].ids), "quick": asked.quick}
        if self.found.get("said", study) != study:
            raise SystemExit(f"{self.file}: of other texts or weights; remove it")
        self.found["said"] = study
        self.note("models", "as it is", lambda: {"bits": 32.0})

    def opened(self):
        "The model in float32, and the one that it is held against."
        from transformers import AutoModelForCausalLM
        if self.name == "from_nothing":
            made = trained_from_nothing(self.tokenizer, Path(self.asked.folder), self.device, self.asked.quick)
            self.found.setdefault("training", made.pop("training"))
            return made["model"], made["model"]
        load = AutoModelForCausalLM.from_pretrained
        models = [load(smollm2_folder(), dtype=torch.float32).eval().to(self.device) for _ in range(2)]
        if self.name == "smollm2_off_grid": off_grid(models[0])
        return models

    def fingerprint(self) -> str:
        "Of the weights, after a rounding that leaves the hardware's own out."
        sums = [round(m.weight.double().square().sum().item(), 3) for m in self.layers.values()]
        return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]

    def note(self, part: str, name: str, make):
        "Change the weights by `make`, measure, put them back, unless that is done; `make` gives what is to be noted."
        done = self.found.setdefault(part, {})
        if name in done: return
        start = time.perf_counter()
        told = make() or {}
        seconds = time.perf_counter() - start
        found = beside(self.model, self.rows, self.reference)
        done[name] = told | {"seconds": round(seconds, 2)} | entry(found)
        self.restore()
        self.write()
        print(f"{self.name:18} {part:10} {name:34} {told.get('bits', 0):6.3f} bits  loss {found['loss'].loss:.4f}  "
              f"KL {found['KL'].loss:.5f}  ({seconds:.1f} s)", flush=True)

    @torch.no_grad()
    def restore(self):
        for n, m in self.layers.items():
            m.weight.copy_(self.before[n])
            m.bias = None

    def write(self): write_whole(self.file, json.dumps(self.found) + "\n")


def formats(quick: bool) -> dict[str, Format]:
    "Name with block size to format."
    blocks, found = BLOCKS[2:3] if quick else BLOCKS, {}
    for b in blocks:
        for name in CURVES: found[f"{name}/{b}"] = format_named(name, b)
        for scale in ("e8m0", "e4m3"): found[f"e2m1 {scale}/{b}"] = Microscaled(f"e2m1 {scale}", b, scale)
    for name in SINGLE: found[f"{name}/{FORMATS[name].blocksize}"] = FORMATS[name]
    return found


@torch.no_grad()
def rounded(study: Study, format: Format) -> dict:
    "Round every layer; bits as stored, and the relative error of the weights in all and by kind of layer."
    stored, off, whole = 0, {}, {}
    for name, m in study.layers.items():
        w, kind = m.weight, name.rpartition(".")[2]
        kept = format.stored(w)
        new = format.decoded(kept, w.shape)
        stored += 8 * sum(t.nbytes for t in kept.values())
        off[kind] = off.get(kind, 0) + (new - w).double().square().sum()
        whole[kind] = whole.get(kind, 0) + w.double().square().sum()
        w.copy_(new)
    error = {k: (off[k] / whole[k]).sqrt().item() for k in off}
    return {"bits": stored / sum(w.numel() for w in study.before.values()), "blocksize": format.blocksize,
            "error": (sum(off.values()) / sum(whole.values())).sqrt().item(), "error_by_kind": error}


@torch.no_grad()
def cast_through(study: Study, dtype: torch.dtype) -> dict:
    for m in study.layers.values(): m.weight.copy_(m.weight.to(dtype))
    return {"bits": 16.0}


def data_types(study: Study) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        study.note("formats", str(dtype).removeprefix("torch."), lambda dtype=dtype: cast_through(study, dtype))
    for name, format in formats(study.asked.quick).items():
        study.note("formats", name, lambda format=format: rounded(study, format))


def calibration_rows(study: Study, n: int) -> list[torch.Tensor]:
    "Rows [8, length] of documents that are not held out, n documents in all at most."
    texts = {k: t for k, t in other_texts().items() if len(t) > 3000}
    length = 64 if study.asked.quick else 512
    rows = [row.ids for row in rows_of_text(study.tokenizer, texts, length) if len(row.ids) == length][:n]
    return [torch.stack(rows[i:i + 8]) for i in range(0, len(rows), 8)]


def one_model(name: str, asked) -> None:
    if asked.device == "cuda": torch.backends.cuda.matmul.allow_tf32 = False
    study = Study(name, asked)
    data_types(study)
    rows = calibration_rows(study, 8 if asked.quick else 64)
    better_bytes.ways(study, rows)
    if name == "smollm2": better_bytes.layer_by_layer(study, rows)
    study.found["done"] = True
    study.write()


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--quick", action="store_true", help="few documents and formats, to see that all of it runs")
    ask.add_argument("--folder", default="runs/data_types", help="what is done, by model")
    ask.add_argument("--model", choices=MODELS, help="one of them, in this process; its part is left in --folder")
    ask.add_argument("--name", default="data_types")
    asked, start = ask.parse_args(), time.perf_counter()
    if asked.model: return one_model(asked.model, asked)
    command = [sys.executable, "-m", "benchmarks.data_types", "--device", asked.device, "--folder", asked.folder]
    command += ["--quick"] * asked.quick
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    running, todo = [], [name for name in MODELS if not parts_of(asked).get(name, {}).get("done")]
    for name in todo:
        running.append(subprocess.Popen([*command, "--model", name], env=environment))
        if asked.device == "cpu": running[-1].wait()
    while waiting := [process for process in running if process.poll() is None]:  # a record at every cut
        with suppress(subprocess.TimeoutExpired): waiting[0].wait(20)
        if any(Path(asked.folder).glob("*.json")): save_result(asked.name, whole(asked, start))
    print(save_result(asked.name, found := whole(asked, start)))
    failed = [name for name, process in zip(todo, running) if process.returncode]
    if failed: raise SystemExit(f"broken off: {', '.join(failed)}; what is done is kept, start again to go on")
    if found["missing"]: raise SystemExit(f"missing: {found['missing']}")


def parts_of(asked) -> dict:
    "What each model has finished so far."
    files = {name: Path(asked.folder) / f"{name}.json" for name in MODELS}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


def whole(asked, start: float) -> dict:
    "The record, of the parts that there are, and what is missing in it."
    parts = parts_of(asked)
    wanted = {name: ["formats", "better"] + ["layers", "kept"] * (name == better_bytes.ALONE) for name in MODELS}
    missing = {name: [part for part in wanted[name] if part not in parts.get(name, {})] for name in MODELS}
    for name in MODELS:
        if not parts.get(name, {}).get("done"): missing[name].append("the end of its last part")
    return {"models": parts, "missing": {name: what for name, what in missing.items() if what},
            "settings": vars(asked) | {"folder": None}, "seconds": time.perf_counter() - start}


if __name__ == "__main__": main()
