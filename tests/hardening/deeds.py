"""What the lab does to a disk, each deed small: how it is prepared, done, and known to be whole."""
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig

from conftest import make_llama, make_tokenizer
from qlora_lab import TrainConfig, assets, load_adapter, load_model, merge, save_adapter, save_quantized, train
from qlora_lab.data import Split, pair
from qlora_lab.engine.gguf_files import contents, to_gguf
from qlora_lab.locks import check_free
from qlora_lab.lora import add_lora, lora_state
from qlora_lab.manifest import record_step, verify
from qlora_lab.merged_model import save_merged
from qlora_lab.records import LabError

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
THEIRS = "notes.txt", ".gitattributes"  # files of somebody's in an adapter's folder
DATED = "manifest.json", "README.md", "run.json", "metrics.jsonl"  # say when, or how fast


def tiny(folder):
    "A model with a tokenizer."
    make_llama(layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def adapted(place, rank, seed):
    "A model with an adapter that does something."
    model, tokenizer = load_model(place / "tiny", **EXACT)
    add_lora(model, LoraConfig(r=rank, lora_alpha=8 * rank, target_modules=["q_proj", "v_proj"]), seed=seed)
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name: p.data.normal_()
    return model, tokenizer


def rows(n, at): return [pair(f"sort the list {i}", "read the file", f"{at}{i}", f"{at}:{i}") for i in range(n)]


def config(folder, **other):
    return TrainConfig(**dict(folder=folder, steps=6, batch_size=2, accumulation=1, rank=2, lr=1e-2, eval_prompts=0,
                              eval_every=2, checkpoint_every=3, warmup=0, dropout=0.1) | other)


def contents_of(folder):
    "Files by name, without what says when they were written or where."
    found = [p for p in folder.rglob("*") if p.is_file() and p.name not in DATED and not p.name.startswith(".")]
    return {p.relative_to(folder): p.read_bytes().replace(str(folder.parent).encode(), b"") for p in found}


class Deed:
    "Writes `out` below a place where a model lies in tiny/."
    def prepare(self, place): "What is there before."
    def do(self, place): raise NotImplementedError

    def whole(self, out):
        "Raise unless what lies there can be used."
        raise NotImplementedError

    def half_is_named(self, out): return not out.exists()  # whether nothing can be taken for what it is not
    def same(self, out, reference):
        return contents_of(out) == contents_of(reference)


class Training(Deed):
    "A run with measurements, a best adapter and checkpoints."
    method = "lora"

    def do(self, place):
        model, tokenizer = load_model(place / "tiny", **EXACT)
        train(model, tokenizer, Split(rows(8, "a"), rows(3, "b")), config(place / "out"), progress=False)

    def whole(self, out):
        assert json.loads((out / "run.json").read_text())["state"] == "done" and verify(out)
        assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]

    def half_is_named(self, out):
        "A run that is not done says so, and nobody is at work in it; one that is done may still lack its manifest."
        check_free(out)
        record = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {"state": "running"}
        return record["state"] == "running" or record["state"] == "done" and not (out / "manifest.json").exists()


class Adapter(Deed):
    "An adapter in the place of another one, beside files of somebody's."
    def prepare(self, place):
        save_adapter(adapted(place, 2, 0)[0], place / "out")
        for name in THEIRS: (place / "out" / name).write_text("mine")

    def do(self, place): save_adapter(adapted(place, 4, 1)[0], place / "out")

    def whole(self, out):
        "One of the two, with the scaling that is its own."
        model, _ = load_model(out.parent / "tiny", **EXACT)
        load_adapter(model, out)
        rank = model.lora_config.r
        assert model.lora_config.lora_alpha == 8 * rank
        assert all((out / name).read_text() == "mine" for name in THEIRS)
        wanted = lora_state(adapted(out.parent, rank, {2: 0, 4: 1}[rank])[0])
        assert all(torch.equal(t, wanted[n]) for n, t in lora_state(model).items())

    def half_is_named(self, out):
        self.whole(out)
        return True


class Quantized(Deed):
    "A 4-bit checkpoint in several files."
    def do(self, place):
        model, tokenizer = load_model(place / "tiny", **EXACT)
        save_quantized(model, place / "out", tokenizer, "50KB")

    def whole(self, out): load_model(out, **EXACT)


class Merged(Deed):
    "A merged model with its record."
    def do(self, place):
        model, tokenizer = adapted(place, 2, 0)
        save_merged(merge(model), place / "out", tokenizer)

    def whole(self, out): load_model(out, **EXACT, quantize=None)


class Exported(Deed):
    "A GGUF file with a Modelfile, a record and a card."
    def prepare(self, place):
        model, tokenizer = load_model(place / "tiny", **EXACT, quantize=None)
        save_merged(model, place / "merged", tokenizer)
        record_step(place / "merged", "merge", place / "tiny")

    def do(self, place): to_gguf(place / "merged", "F16", place / "out")

    def whole(self, out):
        assert verify(out) and contents(out / "model-F16.gguf").types and (out / "Modelfile").exists()


class Converted(Deed):
    "The cache's own model, converted when it is first asked for."
    def do(self, place):
        def convert(gguf, made): shutil.copytree(place / "tiny", made, dirs_exist_ok=True, copy_function=copied)
        with patch.object(assets, "_convert", convert), patch.object(assets, "_package_file", lambda *_: None), \
                patch.object(assets, "cache_folder", lambda: place), patch.object(assets, "SMOLLM2", "out"):
            assets.smollm2_folder()

    def whole(self, out): load_model(out, **EXACT)


def copied(source, target):
    "By Python's own writes, which can be cut."
    with open(target, "wb") as f: f.write(Path(source).read_bytes())


DEEDS = {"train": Training(), "adapter": Adapter(), "quantized": Quantized(), "merged": Merged(), "gguf": Exported(),
         "converted": Converted()}
EXPECTED = LabError, OSError
