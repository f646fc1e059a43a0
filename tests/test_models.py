"""Every family of models through everything: loaded, saved, opened again here and by transformers, adapted, its adapter
in PEFT, trained for three steps, planned. What comes out is the record that the page *Models* shows.

`QLORA_LAB_RECORD=1 pytest tests/test_models.py` writes the record anew; otherwise it is held against what happens.
"""
import json
import os
import warnings
from functools import cache

import pytest
import torch
from families import FAMILIES, folder, ids, logits

from conftest import ROOT
from qlora_lab import add_lora, load_adapter, load_model, plan, save_adapter, save_quantized, train
from qlora_lab.data import Split, pair
from qlora_lab.held import held_tensors
from qlora_lab.linear_layers import quantizable
from qlora_lab.lora import trainable
from qlora_lab.records import LabError
from qlora_lab.settings import TrainConfig

RECORD = ROOT / "benchmarks/results/models.json"
EXACT = dict(dtype=torch.float32, compute_dtype=torch.float32, device="cpu")


def share_in_4_bits(model):
    "Of the weights that are no embeddings."
    counts = [(kind, n) for kind, _, n in held_tensors(model) if kind != "embeddings"]
    return sum(n for kind, n in counts if kind == "4-bit codes") / sum(n for _, n in counts)


def said(call):
    "What a call gives, and the warnings it gave, one line each."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [" ".join(str(w.message).split()) for w in caught if issubclass(w.category, UserWarning)]


def load(s):
    (s.model, s.tokenizer), told = said(lambda: load_model(s.folder, **EXACT))
    s.logits = logits(s.model)
    assert s.logits.isfinite().all() and torch.equal(s.logits, logits(s.model))
    assert not s.model.training
    _, stay = quantizable(s.model)
    return {"in 4 bits": round(share_in_4_bits(s.model), 2), "stay": sorted(set(stay.values())), "said": told}


def save(s):
    "In the form that transformers opens, and in that which keeps everything in 4 bits."
    s.saved, s.whole = s.where / "saved", s.where / "whole"
    _, told = said(lambda: save_quantized(s.model, s.saved, s.tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_quantized(s.model, s.whole, s.tokenizer, decode=False)
    return {"said": told}


def reopen(s):
    for written in (s.saved, s.whole):
        (model, _), _ = said(lambda written=written: load_model(written, **EXACT))
        whole, found = share_in_4_bits(model) == share_in_4_bits(s.model), logits(model)
        assert torch.equal(found, s.logits) if whole else torch.allclose(found, s.logits, atol=1e-5)  # decoded experts
        again = s.where / f"again from {written.name}"
        said(lambda model=model, again=again: save_quantized(model, again, s.tokenizer, decode=False))
        files = sorted(p.name for p in written.glob("*.safetensors"))
        assert files and all((again / f).read_bytes() == (written / f).read_bytes() for f in files)
    assert share_in_4_bits(model) == share_in_4_bits(s.model)
    return {}


def reopen_in_transformers(s):
    from transformers import AutoModelForCausalLM
    model, info = AutoModelForCausalLM.from_pretrained(s.saved, output_loading_info=True, device_map={"": "cpu"})
    assert not any(info.values()), info
    difference = (logits(model.train()) - s.logits).abs().max()  # in eval mode bitsandbytes repacks weights on a CPU
    assert difference < 1e-3, difference
    return {}


def adapt(s):
    from peft import LoraConfig
    s.adapted, _ = load_model(s.folder, **EXACT)
    _, told = said(lambda: add_lora(s.adapted, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
                                    seed=0))
    assert (logits(s.adapted) - s.logits).abs().max() < 1e-4
    s.adapted(input_ids=ids(), labels=ids()).loss.backward()
    halves = {n: p for n, p in s.adapted.named_parameters() if "lora_B" in n}
    seen = {n: p for n, p in halves.items() if "vision" not in n}  # the batch is text
    dead = [n for n, p in seen.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert halves and not dead, dead
    with torch.no_grad():
        for n, p in halves.items(): p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(n)))
    s.adapter = save_adapter(s.adapted, s.where / "adapter")
    again, _ = load_model(s.folder, **EXACT)
    assert torch.equal(logits(load_adapter(again, s.adapter)), logits(s.adapted))
    return {"adapters": len(halves), "said": told}


def adapter_in_peft(s):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    dense, _ = load_model(s.folder, quantize=None, **EXACT)
    ours = logits(load_adapter(dense, s.adapter))
    theirs, told = said(lambda: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(s.folder, dtype=torch.float32), str(s.adapter)))
    assert not told, told
    assert (ours - logits(theirs)).abs().max() < 1e-4
    return {}


def train_three_steps(s):
    from conftest import WORDS
    examples = [pair(f"say {w}", f"{w}, {i}", f"g{i}") for i, w in enumerate(WORDS * 2)]
    model, _ = load_model(s.folder, **EXACT)
    config = TrainConfig(folder=str(s.where / "run"), steps=3, batch_size=2, accumulation=1, eval_prompts=1,
                         eval_examples=2, lr=1e-2, warmup=1, checkpointing=True, rank=4)
    run = train(model, s.tokenizer, Split(examples[:12], examples[12:]), config, progress=False)
    assert run.after.loss < run.before.loss and all(m["grad_norm"] > 0 for m in run.metrics)
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainable(model))
    return {}


def planned(s):
    found = plan(s.folder, sequence=64, rank=4, device="cpu", dtype="float32")
    assert found.total_gib > 0
    return {}


OPERATIONS = {"load": load, "save": save, "reopen": reopen, "reopen in transformers": reopen_in_transformers,
              "adapt": adapt, "adapter in PEFT": adapter_in_peft, "train": train_three_steps, "plan": planned}


class Family:
    "What the operations on one family leave to each other."
    def __init__(self, name, where):
        self.name, self.where, self.folder = name, where, folder(name, where)


def one_operation(family, name):
    "What the record says of a cell: what came out, or the sentence in which it was refused."
    try: found = {"works": True, **OPERATIONS[name](family)}
    except LabError as e: found = {"works": False, "why": " ".join(str(e).split())}
    return json.loads(json.dumps(found).replace(str(family.where), "…"))


@cache
def recorded():
    "family to operation to what came out; empty while a record is made."
    return {} if os.environ.get("QLORA_LAB_RECORD") else json.loads(RECORD.read_text())["families"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_through_everything(name, tmp_path):
    "Each cell works, or is refused in one sentence; and the page says so."
    family = Family(name, tmp_path)
    found = {operation: one_operation(family, operation) for operation in OPERATIONS}
    if recorded(): assert found == recorded()[name]
    else: MADE[name] = found


MADE = {}


@pytest.fixture(scope="module", autouse=True)
def record():
    "Write what was found, if that is wanted."
    yield
    if not os.environ.get("QLORA_LAB_RECORD") or MADE.keys() != FAMILIES.keys(): return
    from qlora_lab.provenance import provenance
    from qlora_lab.records import write_whole
    write_whole(RECORD, json.dumps({"provenance": provenance(), "families": MADE}, indent=1) + "\n")
