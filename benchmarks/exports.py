"""What is left of a trained model in each format that it can be exported to.

    make train                                   # runs/docstrings, which is exported here
    python -m benchmarks.exports                 # needs the extras serve and compress; about half an hour on two cores
    python -m benchmarks.exports --formats Q4_0 AWQ     # these anew; the other rows of the same run stay

The run is merged into its dequantized weights in 16 bits. That model is exported to each format, and each is asked on
the same held-out docstrings: GGUF files by llama.cpp itself, which is what serves them, the others by transformers and
the lab. Written down are bits a weight over the whole file, its size, the KL divergence from the 16-bit model and the
held-out loss, each with its standard error clustered by module, and the share of places with the same likeliest token.

NF4 is a case of its own: the merged weights are decoded NF4 plus a change far smaller than a step, so the nearest level
is the one that the base had, and rounding takes most of what was trained away. Lesson 13 is about that.

Writes results/exports.json.
"""
import argparse
import math
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import RESULTS, save_result
from qlora_lab import load_model, save_quantized
from qlora_lab.commands.exporting import merged
from qlora_lab.data import collate, default_split, tokenize
from qlora_lab.divergence import Said, agreement, divergence, said
from qlora_lab.engine.compressed import to_awq, to_gptq
from qlora_lab.engine.gguf_files import contents, to_gguf
from qlora_lab.provenance import release_memory
from qlora_lab.records import read_json
from qlora_lab.train import answer_places

OTHERS = "NF4", "NF4 + DQ", "GPTQ", "AWQ"
GGUF = "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "IQ4_NL", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K"


def said_by_llama_cpp(file: Path, tokens: list) -> Said:
    "What llama.cpp says at the answers' places, keys and values in float32."
    import llama_cpp
    longest = max(len(t.ids) for t in tokens)
    model = llama_cpp.Llama(str(file), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False,
                            n_threads=1, type_k=0, type_v=0, flash_attn=False)
    logs, targets = [], []
    for one in tokens:
        at, target = answer_places(collate([one]))
        model.reset()
        model.eval(one.ids.tolist())
        logs.append(torch.from_numpy(model.scores[:len(one.ids)])[at].log_softmax(1))
        targets.append(target)
    model.close()
    return Said(logs, targets, tuple(one.example.stays_with for one in tokens))


def mib(*files: Path) -> float: return sum(f.stat().st_size for f in files) / 2**20


def weights_of(folder: Path) -> list[Path]: return sorted(folder.glob("*.safetensors"))


def row(name: str, size: float, parameters: int, ours: Said, theirs: Said, seconds: float) -> dict:
    "One format."
    kl, loss = divergence(ours, theirs), theirs.score
    found = {"format": name, "mib": round(size, 1), "bits": round(size * 2**23 / parameters, 3), "kl": kl.loss,
             "kl_error": kl.stderr, "loss": loss.loss, "loss_error": loss.stderr, "agreement": agreement(ours, theirs),
             "seconds": round(seconds, 1)}
    assert all(math.isfinite(v) for k, v in found.items() if k != "format")
    print(f"{name:10} {found['bits']:6.2f} bits {size:7.1f} MiB  KL {kl.loss:.4f} ± {kl.stderr:.4f}  "
          f"loss {loss.loss:.4f} ± {loss.stderr:.4f}  {found['agreement']:.1%}", flush=True)
    return found


def nf4(folder: Path, place: Path, double: bool, tokens: list) -> tuple[float, Said]:
    "The merged model in NF4 again."
    def loaded(dtype): return load_model(folder, "nf4", double_quant=double, compute_dtype=dtype, dtype=dtype)
    theirs = said(loaded(torch.float32)[0], tokens)
    save_quantized(loaded(torch.bfloat16)[0], place)
    return mib(*weights_of(place)), theirs


def opened(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(folder: Path, work: Path, examples: int, calibrated: int, wanted: list[str], save) -> None:
    "Every format of a merged model; what is there is saved after each."
    model, tokenizer = load_model(folder, None, dtype=torch.float32)
    data = default_split()
    tokens = [tokenize(tokenizer, e) for e in data.held_out[:examples]]
    ours, parameters = said(model, tokens), sum(p.numel() for p in model.parameters())
    rows = []
    def add(*of, **more):
        rows.append(row(of[0], of[1], parameters, ours, *of[2:]) | more)
        save({"parameters": parameters, "examples": len(tokens), "tokens": sum(ours.score.tokens),
              "calibrated on": calibrated, "formats": rows})
    add("16 bits", mib(*weights_of(folder)), ours, 0)
    del model
    for kind in (k for k in GGUF if k in wanted):
        start = time.perf_counter()
        file = to_gguf(folder, kind, work / kind)
        took = time.perf_counter() - start
        add(kind, mib(file), said_by_llama_cpp(file, tokens), took, tensors=contents(file).types)
        shutil.rmtree(file.parent)
    for double, name in ((False, "NF4"), (True, "NF4 + DQ")):
        if name not in wanted: continue
        start = time.perf_counter()
        size, theirs = nf4(folder, work / name, double, tokens)
        add(name, size, theirs, time.perf_counter() - start)
    for make, name in ((to_gptq, "GPTQ"), (to_awq, "AWQ")):
        if name not in wanted: continue
        start = time.perf_counter()
        made = make(folder, data.train, work / name, count=calibrated)
        took = time.perf_counter() - start
        add(name, mib(*weights_of(made)), said(opened(made), tokens), took)
        shutil.rmtree(made)
        release_memory()


def kept(found: dict) -> dict:
    "With the rows of an earlier recording of the same run on the same examples, in the order of the formats."
    file = RESULTS / "exports.json"
    before = read_json(file) if file.is_file() else {}
    same = all(before.get(k) == found[k] for k in ("run", "examples", "tokens"))
    rows = {f["format"]: f for f in (before["formats"] if same else []) + found["formats"]}
    return found | {"formats": [rows[name] for name in ("16 bits", *GGUF, *OTHERS) if name in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/docstrings"))
    parser.add_argument("--examples", type=int, default=96, help="held-out docstrings")
    parser.add_argument("--calibrated", type=int, default=128, help="examples that GPTQ and AWQ look at")
    parser.add_argument("--formats", nargs="+", default=[*GGUF, *OTHERS], choices=[*GGUF, *OTHERS])
    asked = parser.parse_args()
    record = read_json(asked.run / "run.json")
    with TemporaryDirectory() as place, merged(asked.run, Path(place) / "out") as folder:
        run = {k: record["config"][k] for k in ("steps", "rank", "lr")} | {"data": record["identity"]["data"]}
        measure(folder, Path(place), asked.examples, asked.calibrated, asked.formats,
                lambda found: save_result("exports", kept({"run": run, **found})))


if __name__ == "__main__": main()
