"""What is compared: rows of settings, the data sets they learn, and how their bases are opened.

All rows do the same work: 100 steps of 8 examples, a constant rate after five steps, gradients clipped at 0.3. They
keep numbers and sums in float32, whatever their base is held in, so that two rows differ by what their weights can say
and by nothing that bfloat16 rounds on the way; rows named bfloat16 are the exception and say what it changes. Products
read float32 numbers as TF32 (ten bits behind the point, summed in float32), or whole with --exact. "LoRA" and "full"
have the 16-bit weights of the file. A base in a number format that has no 4-bit layer (int8, mxfp4) is that model with
its weights rounded, which computes the same.
"""
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import torch

from qlora_lab.arithmetic import arithmetic_split
from qlora_lab.assets import SMOLLM2, smollm2_folder
from qlora_lab.cell_inputs import open_base
from qlora_lab.data import Example, Split, default_split, split
from qlora_lab.engine.number_formats import round_model
from qlora_lab.model import load_model
from qlora_lab.support_desk import desk

COMMON = {"steps": 100, "batch_size": 8, "accumulation": 1, "dtype": "float32", "eval_examples": 500, "eval_prompts": 0}
PLAIN = {"quant_type": "none"}
NF4 = {"quant_type": "nf4", "double_quant": True}
AS = " as "  # "smollm2-135m-instruct as mxfp4": a dense model whose weights are rounded to a format


WRONG = "runs/wrong_order"  # the adapter that was taken out of a base in 4 bits (wrong_order)


def rounded(name: str) -> dict: return {"quant_type": "none", "model": f"{SMOLLM2}{AS}{name}"}


ROWS = {
    "full": PLAIN | {"method": "full"},
    "LoRA": PLAIN,
    "int8": rounded("int8"),
    "int4": {"quant_type": "int4", "double_quant": False},
    "fp4": {"quant_type": "fp4", "double_quant": False},
    "mxfp4": rounded("mxfp4"),
    "nf4": {"quant_type": "nf4", "double_quant": False},
    "nf4+dq": NF4,
    "nf4+dq, DoRA": NF4 | {"method": "dora"},
    "nf4+dq, rsLoRA": NF4 | {"rslora": True},
    "nf4+dq, LoRA+": NF4 | {"loraplus_ratio": 16.},
}
BFLOAT16 = {"LoRA, bfloat16": PLAIN | {"dtype": "bfloat16"}, "nf4+dq, bfloat16": NF4 | {"dtype": "bfloat16"}}
RANKS = {f"{base}, rank {r}": ROWS[base] | {"rank": r} for base in ("nf4+dq", "LoRA") for r in (2, 4, 64, 256)}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = {"nf4+dq, attention": NF4 | {"targets": ATTENTION}, "nf4+dq, MLP": NF4 | {"targets": MLP},
           "nf4+dq, attention, rank 42": NF4 | {"targets": ATTENTION, "rank": 42}}  # as many numbers as all at 16
STARTS = {f"nf4+dq, {init}": NF4 | {"init": init} for init in ("loftq", "loftq5", "eora", "qpissa")}
STARTS |= {"nf4+dq, wrong order": NF4 | {"model": f"{SMOLLM2}{AS}wrong order", "init_adapter": WRONG},
           "LoRA, pissa": PLAIN | {"init": "pissa"}}
OTHERS = "full", "LoRA", "fp4", "nf4+dq"  # rows of the other data sets
EVERY = ROWS | BFLOAT16 | RANKS | TARGETS | STARTS

FIRST = {"full": 1e-4, "nf4+dq, LoRA+": 1.25e-4, "nf4+dq, rsLoRA": 2.5e-4}  # the middle of a first ladder
FIRST |= {name: 2.5e-4 for name in ("nf4+dq, qpissa", "nf4+dq, wrong order", "LoRA, pissa")}
MIDDLE = 1e-3  # of all others


def dealt_anew(examples: list[Example]) -> list[Example]:
    "The same questions with the answers of others."
    answers = Random(0).sample([e.messages[-1] for e in examples], len(examples))
    return [replace(e, messages=(*e.messages[:-1], a)) for e, a in zip(examples, answers)]


@cache
def data_sets() -> dict[str, Split]:
    "By name: what is learned, and held out to judge by, or (\"..., to choose by\") to choose a rate by."
    made = {}
    for name, whole in (("docstrings", default_split()), ("support", desk())):
        inner = split(whole.train, 0.12 if name == "docstrings" else 0.25)
        made |= {name: Split(inner.train, whole.held_out), f"{name}, to choose by": inner}
    sums = arithmetic_split()
    made |= {"arithmetic": sums, "arithmetic, to choose by": Split(sums.train, arithmetic_split(seed=1).held_out)}
    learned = made["docstrings"]
    return made | {"docstrings, dealt anew": Split(dealt_anew(learned.train), learned.held_out)}


def tiny_folder(where: Path) -> Path:
    "A model of two layers with the course's tokenizer, to try the scripts with."
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    if (where / "config.json").exists(): return where
    words = AutoTokenizer.from_pretrained(smollm2_folder())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                                 bos_token_id=None, eos_token_id=words.eos_token_id)).save_pretrained(where)
    words.save_pretrained(where)
    return where


def opened(cell: dict, device: torch.device) -> tuple:
    "The base of a cell: as its settings say, or one of those that have no layer of their own."
    name, _, kind = cell["model"].partition(AS)
    if not kind: return open_base(cell, device)
    dtype = getattr(torch, cell["dtype"])
    if kind == "wrong order":
        from benchmarks.quality.wrong_order import wrong_base
        return wrong_base(name, cell["init_adapter"], dtype, device)
    model, tokenizer = load_model(name, quantize=None, dtype=torch.float32, device="cpu")
    model = round_model(model, kind).to(device)
    for p in model.parameters(): p.data = p.data.to(dtype)
    return model, tokenizer
