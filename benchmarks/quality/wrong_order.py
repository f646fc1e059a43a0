"""The mutant of QPiSSA: the largest part is taken out of a base that is in 4 bits already.

What is left lies on no grid, and quantizing it adds a second error to the first. The adapter lies in a folder from
which a run can go on (`init_adapter`), and the base is made anew in each process.
"""
from pathlib import Path

import torch
from peft import LoraConfig

from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.engine.repair import put, start_of
from qlora_lab.lora import add_lora, save_adapter
from qlora_lab.model import load_model

RANK, ALPHA = 16, 32


@torch.no_grad()
def wrong_base(name: str, folder: str, dtype: torch.dtype, device: torch.device) -> tuple:
    "The model in 4 bits twice, and the tokenizer; the adapter is written where there is none yet."
    model, tokenizer = load_model(name, compute_dtype=dtype, dtype=dtype, device=device)
    add_lora(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", base_model_name_or_path=name), 0)
    for layer in adapted_layers(model).values():
        q = layer.base_layer.quantized
        b, a, base = start_of("qpissa", q.dequantize(torch.float32), q, RANK)
        put(layer, b, a, base)
    if not (Path(folder) / "adapter_model.safetensors").exists(): save_adapter(model, folder)
    for n, layer in list(adapted_layers(model).items()): model.set_submodule(n, layer.base_layer)
    del model.lora_config
    return model.requires_grad_(False), tokenizer
