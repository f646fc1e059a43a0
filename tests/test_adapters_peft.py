"Every adapter that PEFT writes for a linear layer loads with PEFT's own logits, or is refused for what it is."
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import families
from conftest import make_llama
from qlora_lab.adapter_files import ADAPTER_FILES
from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.dora import DoRALinear
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import LoRALinear, add_lora, load_adapter, lora_state, reset_lora, save_adapter, trainable
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(24).view(2, 12) % 300
PATTERNS = dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, alpha_pattern={"up_proj": 3})
VARIANTS = {
    "plain": dict(),
    "two names": dict(target_modules=["q_proj", "v_proj"]),
    "by the family": dict(target_modules=None),
    "regex": dict(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"),
    "patterns": PATTERNS,
    "rslora, patterns": dict(use_rslora=True, **PATTERNS),
    "dora": dict(use_dora=True),
    "dora, rslora, patterns": dict(use_dora=True, use_rslora=True, **PATTERNS),
    "lora_bias": dict(lora_bias=True),
    "bias all": dict(bias="all", target_modules=["q_proj", "gate_proj"]),
    "bias lora_only": dict(bias="lora_only", target_modules=["q_proj", "gate_proj"]),
    "bias all, lora_bias": dict(bias="all", lora_bias=True),
    "head kept": dict(modules_to_save=["lm_head"]),
    "head and embedding kept": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "norms kept, bias all": dict(modules_to_save=["norm"], bias="all"),
    "whole mlp kept": dict(target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "layers, pattern": dict(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"),
    "but": dict(target_modules="all-linear", exclude_modules=["k_proj", "model.layers.0.mlp.up_proj"]),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "random": dict(init_lora_weights=False),
    "eva": dict(init_lora_weights="eva"),
    "mica": dict(init_lora_weights="mica", target_modules=["q_proj", "up_proj"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "head": dict(target_modules=["lm_head", "q_proj"]),
    "embedding and head, dora": dict(target_modules=["lm_head", "embed_tokens", "q_proj"], use_dora=True),
    "head by regex": dict(target_modules=r".*(lm_head|o_proj)"),
}


def config(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 'eva' has settings of its own
        return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | settings))


def llama(**other):
    return make_llama(**(dict(attention_bias=True, mlp_bias=True) | other))


def shake(model, seed=1):
    "Random numbers in all that learns, and in what an initializer froze."
    g = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        if not (p.requires_grad or "lora_" in n): continue
        near = 1. if "magnitude" in n or n.endswith("norm.weight") else 0.
        p.data = near + 0.2 * torch.randn(p.shape, generator=g)
    return model


def decoded(model, make):
    "A dense model of the same numbers as one in 4 bits."
    dense = make()
    for n, m in model.named_modules():
        if not isinstance(m, Linear4bit): continue
        there = dense.get_submodule(n.removesuffix(".base_layer"))
        w = m.quantized.dequantize()
        there.weight.data.copy_(w.t() if type(there).__name__ == "Conv1D" else w)
    return dense


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def by_peft(base, folder, **settings):
    "Trained and saved by PEFT: what it computes, and its model."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: tied weights, embeddings that are saved along
        theirs = shake(get_peft_model(base, config(**settings))).eval()
        theirs.save_pretrained(folder)
    return logits(theirs), theirs


def in_peft(base, folder):
    "Opened by PEFT, which must neither miss nor leave out a tensor, nor change a setting."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in ("Model has `tie_word_embeddings", "`init_lora_weights` is 'eva'", ".*has no bias"):
            warnings.filterwarnings("ignore", message=harmless)
        model = PeftModel.from_pretrained(base, folder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved along
        theirs = get_peft_model_state_dict(model)
    ours = load_file(folder / ADAPTER_FILES[1])
    assert ours.keys() <= theirs.keys() and not [k for k in theirs.keys() - ours.keys() if ".base_layer.weight" not in k]
    return model


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_pefts_file_here_and_ours_there(kind, four_bits, tmp_path):
    "PEFT trains, the lab loads: equal logits. The lab saves that, PEFT loads: equal logits again."
    base = quantize_model(llama()) if four_bits else llama()
    make = (lambda: decoded(quantize_model(llama()), llama)) if four_bits else llama
    expected, _ = by_peft(make(), tmp_path / "theirs", **VARIANTS[kind])
    assert not torch.allclose(expected, logits(base), atol=1e-2)  # the control: the adapter matters
    ours = load_adapter(base, tmp_path / "theirs").eval()
    assert torch.allclose(logits(ours), expected, atol=1e-5), (logits(ours) - expected).abs().max()
    save_adapter(ours, tmp_path / "ours")
    back = in_peft(make(), tmp_path / "ours")
    assert torch.allclose(logits(back), expected, atol=1e-5)


# -- families: the layers that the lab adapts, PEFT adapts too, under the names that the lab writes

FAMILIES = [f for f in families.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_both_ways(family, tmp_path):
    "Added and saved here on 4 bits, opened by PEFT on the same numbers; then saved there and opened here."
    model = quantize_model(families.build(family))
    def dense(): return decoded(model, lambda: families.build(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that 'all-linear' leaves out
        add_lora(model, config(), seed=0)
    expected = families.logits(shake(model).eval())
    save_adapter(model, tmp_path / "ours")
    theirs = in_peft(dense(), tmp_path / "ours")
    assert torch.allclose(families.logits(theirs), expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(dense(), tmp_path / "theirs").eval()
    assert torch.allclose(families.logits(again), expected, atol=1e-5)
