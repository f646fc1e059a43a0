"Merging: the merged model is the adapted one, in every family and kind of adapter, and opens in transformers alone."
import copy
import warnings

import families
import pytest
import torch
from families import FAMILIES, build, logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import make_llama
from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.bnb_files import save_quantized
from qlora_lab.dithering import quantize_dithered
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.experts import Experts4bit
from qlora_lab.engine.merge_aware import MergedLinear, through_quantizer
from qlora_lab.linear4bit import Linear4bit, PackedWeight, quantize_model
from qlora_lab.linear_layers import linear_layers
from qlora_lab.lora import add_lora, load_adapter, save_adapter, trainable
from qlora_lab.merged_weights import base_numbers, merged_weight, update_of
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.ship import merge, merged_4bit, save_merged, survival

pytestmark = pytest.mark.usefixtures("one_thread")


def quietly(function, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kw)


def stir(model, size=0.02, seed=1):
    "Move all that learns, so that nothing is a no-op."
    generator = torch.Generator().manual_seed(seed)
    for p in trainable(model): p.data += size * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def adapted(name="llama", size=0.02, **settings):
    "A random model of a family in 4 bits, with an adapter that does something."
    model = quietly(quantize_model, build(name))
    return stir(quietly(add_lora, model, LoraConfig(**(dict(r=4, target_modules="all-linear") | settings))), size)


def apart(got, wanted): return ((got - wanted).norm() / wanted.norm()).item()


def plain(model):
    "Nothing of the lab is left in a model, and nothing that learns."
    own = [n for n, m in model.named_modules() if type(m).__module__.startswith("qlora_lab")]
    assert not own and not any("lora_" in n for n, _ in model.named_parameters())
    assert not hasattr(model, "lora_config") and not any(p.requires_grad for p in model.parameters())
    return model


def reopened(model, folder, **how):
    model.save_pretrained(folder)
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_merged_is_the_adapted_model(name, tmp_path):
    "In float32 to rounding; written by transformers, opened by it alone, the same logits to the bit."
    experts = [n for n in ("experts.gate_up_proj", "experts.down_proj")
               if any(k.endswith(n) for k, _ in build(name).named_parameters())]
    model = adapted(name, target_parameters=experts or None)
    before = logits(model)
    merged = plain(merge(model, dtype=torch.float32))
    assert merged is model and apart(logits(merged), before) < 1e-5
    again = quietly(reopened, merged, tmp_path / "merged", dtype=torch.float32)
    assert apart(logits(again), logits(merged)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "qwen3_moe", "gemma2"])
def test_in_4_bits_again(name, tmp_path):
    "The same layers are in 4 bits, of the same kind; saved and opened by the lab, the same logits."
    experts = ["experts.down_proj"] if name in ("mixtral", "qwen3_moe") else None
    model = adapted(name, target_parameters=experts)
    def kinds(m): return {n.replace(".base_layer", ""): (k.quant_type, k.blocksize, k.nested) for n, k in
                          ((n, k.quantized) for n, k in m.named_modules() if isinstance(k, PackedWeight))}
    before, wanted = kinds(model), logits(model)
    merged = merge(model, how="4bit")
    assert kinds(merged) == before and not adapted_layers(merged)
    assert 1e-4 < apart(logits(merged), wanted) < 0.5
    quietly(save_quantized, merged, tmp_path / "four", families.tokenizer(), decode=False)
    again, _ = quietly(load_model, tmp_path / "four", device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    assert apart(logits(again), logits(merged)) < 1e-6


KINDS = {
    "rslora": dict(use_rslora=True, lora_alpha=3), "dora": dict(use_dora=True),
    "patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 32}),
    "tied head": dict(target_modules=["q_proj", "lm_head"]),
    "tied embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "dora embeddings": dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "embeddings and head": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "trained whole": dict(modules_to_save=["lm_head", "norm"], target_modules=["q_proj"]),
    "trained whole, in 4 bits": dict(modules_to_save=["up_proj"], target_modules=["q_proj"]),
    "dropout": dict(lora_dropout=0.1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["dequantized", "4bit"])
def test_every_kind_of_adapter(kind, how, tmp_path):
    "Qwen2 with a tied head: what no longer is one table is written as two."
    model = adapted("qwen2", **KINDS[kind]).eval()
    wanted, tied = logits(model), model.lm_head.weight is model.get_input_embeddings().weight
    if how == "4bit":
        merged, close = merge(model, how="4bit"), 0.3
        quietly(save_quantized, merged, tmp_path / "made", families.tokenizer())
        again, _ = quietly(load_model, tmp_path / "made", device="cpu", dtype=torch.float32,
                           compute_dtype=torch.float32)
    else:
        merged, close = plain(merge(model, dtype=torch.float32)), 1e-5
        again = quietly(reopened, merged, tmp_path / "made", dtype=torch.float32)
    assert apart(logits(merged), wanted) < close
    assert apart(logits(again), logits(merged)) < 1e-6
    untied = kind in ("tied head", "tied embeddings", "dora embeddings", "embeddings and head", "trained whole")
    assert merged.config.tie_word_embeddings is not untied and (tied or untied)


@pytest.mark.parametrize("settings", [dict(bias="all"), dict(bias="lora_only"), dict(lora_bias=True)])
def test_biases_that_were_trained(settings):
    model = adapted("gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **settings)
    wanted = logits(model)
    assert apart(logits(plain(merge(model, dtype=torch.float32))), wanted) < 1e-5


def test_a_whole_layer_of_gpt2_in_4_bits_comes_back_as_conv1d(tmp_path):
    "Its copy learned as a linear layer; the model's class stores the weight the other way round."
    model = adapted("gpt2", target_modules=["c_attn"], modules_to_save=["c_fc"], fan_in_fan_out=True)
    wanted = logits(model)
    merged = plain(merge(model, dtype=torch.float32))
    assert apart(logits(quietly(reopened, merged, tmp_path / "made", dtype=torch.float32)), wanted) < 1e-5


def test_a_bias_that_has_nowhere_to_go_is_refused_and_nothing_changed():
    model = adapted(lora_bias=True)
    before, wanted = {n: id(p) for n, p in model.named_parameters()}, logits(model)
    for how in ("dequantized", "4bit"):
        with pytest.raises(LabError, match="has none that could take it"): merge(model, how=how)
    assert {n: id(p) for n, p in model.named_parameters()} == before and torch.equal(logits(model), wanted)


def test_numbers_are_added_in_float32_and_rounded_once():
    "Not decoded to bfloat16 first, nor the update rounded first: those differ."
    model = adapted()
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.base_layer.quantized.dequantize(torch.float32) + update_of(layer)
    twice = layer.base_layer.quantized.dequantize(torch.bfloat16) + update_of(layer).bfloat16()
    merged = merge(model, dtype=torch.bfloat16)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, exact.bfloat16())
    assert not torch.equal(exact.bfloat16(), twice) and merged.dtype == torch.bfloat16


def test_original_base(tmp_path):
    "Onto the weights that the 4-bit ones were made of; the difference is the quantization error, and nothing else."
    folder = families.folder("qwen2", tmp_path)
    model, _ = quietly(load_model, folder, device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    stir(add_lora(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])))
    layer, file = model.model.layers[1].mlp.up_proj, build("qwen2")
    wanted = file.model.layers[1].mlp.up_proj.weight + update_of(layer)
    merged = plain(merge(model, how="original", base=folder))
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, wanted)
    assert torch.equal(merged.model.layers[1].mlp.down_proj.weight, file.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "falcon"])
def test_original_base_of_other_classes(name, tmp_path):
    "Experts that the file has one by one, weights stored as [in, out]: an adapter that does nothing gives the file."
    folder = families.folder(name, tmp_path)
    model, _ = quietly(load_model, folder, device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    wanted = ["experts.down_proj"] if name == "mixtral" else None
    quietly(add_lora, model, LoraConfig(r=4, target_modules="all-linear", target_parameters=wanted))
    merged = plain(merge(model, how="original", base=folder))
    there = dict(build(name).named_parameters())
    assert all(torch.equal(p, there[n]) for n, p in merged.named_parameters()) and len(there) > 10


def test_another_base_is_refused_and_nothing_changed(tmp_path):
    "Another seed, another norm, another width, a base in 4 bits, a name that is none."
    model = adapted("qwen2")
    norm, wanted = build("qwen2"), logits(model)
    norm.model.norm.weight.data[3] = 2
    cases = {"seed": (build("qwen2", seed=1), "of the bytes of .* differ"), "norm": (norm, "model.norm.weight differs"),
             "width": (build("qwen2", intermediate_size=192), "is \\(192, 64\\), there \\(128, 64\\)"),
             "family": (build("llama"), "llama, not qwen2")}
    for name, (other, told) in cases.items():
        other.save_pretrained(tmp_path / name)
        with pytest.raises(LabError, match=told): merge(model, how="original", base=tmp_path / name)
    four = quietly(quantize_model, build("qwen2"))
    quietly(save_quantized, four, tmp_path / "four", families.tokenizer())
    with pytest.raises(LabError, match="its weights are quantized"): merge(model, how="original", base=tmp_path / "four")
    with pytest.raises(LabError, match="no model named"): merge(model, how="original", base="nothing")
    with pytest.raises(LabError, match="needs the base"): merge(model, how="original")
    assert torch.equal(logits(model), wanted)


def test_what_merge_refuses():
    bare = quietly(quantize_model, build("llama"))
    with pytest.raises(LabError, match="has no adapter"): merge(bare)
    with pytest.raises(LabError, match="expected 'dequantized', '4bit', 'original'"): merge(adapted(), how="16bit")
    with pytest.raises(LabError, match="is for how='original'"): merge(adapted(), base="somewhere")
    with pytest.raises(LabError, match="expected 'dithered' or 'nearest'"): merge(adapted(), how="4bit", rounding="up")
    dense = stir(add_lora(build("llama"), LoraConfig(r=4, target_modules=["q_proj"])))
    with pytest.raises(LabError, match="no 4-bit layer"): merge(copy.deepcopy(dense), how="4bit")
    wanted = logits(dense)
    assert apart(logits(plain(merge(dense, dtype=torch.float32))), wanted) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_of_peft_and_bitsandbytes(tmp_path, dora):
    "The same merged weights as from the lab's own layers with the same adapter."
    folder = families.folder("llama", tmp_path)
    exact = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    theirs, _ = quietly(load_model, folder, backend="bnb", **exact)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora)
    theirs = stir(quietly(get_peft_model, theirs, config))
    quietly(theirs.save_pretrained, tmp_path / "adapter")
    wanted, ours = logits(theirs), load_adapter(quietly(load_model, folder, **exact)[0], tmp_path / "adapter")
    merged, own = quietly(merge, theirs, dtype=torch.float32), merge(ours, dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), own.parameters(), strict=True))
    assert apart(logits(plain(merged)), wanted) < 1e-5


def test_peft_merges_our_adapter_to_the_same_dense_weights(tmp_path):
    "On the decoded model PEFT's merge_and_unload is ours, in float32 to the last bits."
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    plain_base = build("llama")
    for n, m in linear_layers(model).items():
        if isinstance(m, Linear4bit): plain_base.get_submodule(n).weight.data = base_numbers(m)
    theirs = PeftModel.from_pretrained(plain_base, tmp_path / "adapter").merge_and_unload()
    ours = merge(model, dtype=torch.float32)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True): assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dithered_codes(quant_type, nested):
    "On a level nothing moves; a small update survives on the average; only codes change; the same on every call."
    torch.manual_seed(0)
    base = quantize_4bit(torch.randn(256, 512), quant_type, double_quant=nested)
    w, update = base.dequantize(torch.float32), 0.01 * torch.randn(256, 512)
    same = quantize_dithered(w, base)
    assert torch.equal(same.dequantize(torch.float32), w)
    if quant_type == "nf4": assert torch.equal(same.packed, base.packed)  # fp4 has two codes for zero
    again = quantize_dithered(w + update, base)
    assert torch.equal(again.packed, quantize_dithered(w + update, base).packed) and again.stats is base.stats
    kept = survival(w, again.dequantize(torch.float32), update)
    lost = survival(w, quantize_4bit(w + update, quant_type, double_quant=nested).dequantize(torch.float32), update)
    assert 0.9 < kept < 1.1 and lost < 0.2


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_training_through_the_quantizer_is_on_the_merged_weights(rounding):
    "The logits of the training pass are those of the merged 4-bit model, to the bit; before and after steps."
    model = adapted("llama", size=0.05).train()
    assert through_quantizer(model, rounding) == 14
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    for _ in range(3):
        loss = model(input_ids=families.ids(), labels=families.ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    wanted, halves = logits(model), [p.clone() for p in trainable(model)]
    assert through_quantizer(model, rounding) == 14 and torch.equal(logits(model), wanted)
    assert all(torch.equal(a, b) for a, b in zip(halves, trainable(model), strict=True))
    assert torch.equal(logits(merge(model, how="4bit", rounding=rounding)), wanted)


def test_the_gradient_goes_straight_through():
    "That of the slow, plain form: a rounding whose gradient is the identity, all matrices whole."
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w, rounded): return rounded.clone()
        @staticmethod
        def backward(ctx, grad): return grad, None
    model = adapted("llama", size=0.05)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, requires_grad=True)
    slow = base_numbers(layer.base_layer) + layer.lora_B.weight @ layer.lora_A.weight * layer.scaling
    y = nn.functional.linear(x, Straight.apply(slow, merged_4bit(layer).dequantize(torch.float32)))
    leaves = x, layer.lora_A.weight, layer.lora_B.weight
    wanted = torch.autograd.grad(y.square().sum(), leaves)
    through_quantizer(model)
    fast = model.model.layers[0].mlp.up_proj
    assert isinstance(fast, MergedLinear)
    got = torch.autograd.grad(fast(x).square().sum(), leaves)
    for a, b in zip(got, wanted): assert apart(a, b) < 1e-5


def test_nothing_is_kept_of_the_merged_weight():
    "autograd keeps the input and what is in memory anyway."
    from qlora_lab.linear4bit import saved_for_backward
    model = adapted("llama")
    through_quantizer(model)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(5, 64, requires_grad=True)
    with saved_for_backward(layer) as kept: layer(x)
    assert sum(n for _, _, n in kept.values()) == x.nbytes


def test_a_saved_adapter_of_such_training_is_any_adapter(tmp_path):
    model = adapted("llama")
    through_quantizer(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(quantize_model(build("llama")), tmp_path / "adapter")
    layer, other = (m.model.layers[1].self_attn.q_proj for m in (model, again))
    assert torch.equal(merged_weight(layer), merged_weight(other))
    assert torch.equal(logits(merge(again, how="4bit")), logits(model))


def test_what_has_no_way_through_the_quantizer():
    with pytest.raises(LabError, match="plain LoRA on 4-bit linear layers, not DoRALinear"):
        through_quantizer(adapted(use_dora=True))
    with pytest.raises(LabError, match="no adapter sits on a 4-bit layer"):
        through_quantizer(add_lora(build("llama"), LoraConfig(r=4, target_modules=["q_proj"])))


def test_merged_experts_are_packed_again_in_the_same_blocks():
    model = adapted("qwen3_moe", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    held = model.model.layers[0].mlp.experts.down_proj
    base, whole = held.base_layer, torch.stack([held.decode(e, torch.float32) for e in range(len(held))])
    merge(model, how="4bit", rounding="nearest")
    again = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(again, Experts4bit) and torch.equal(again.whole.packed, quantize_4bit(whole).packed)
    assert not torch.equal(again.weight, base.weight)


def test_what_training_put_on_goes():
    "Checkpoints and what the lab noted; a fused layer is let go of."
    from qlora_lab.checkpointing import checkpoint_layers, is_checkpointed
    from qlora_lab.engine.fusing import fuse_layers, is_fused
    model = quantize_model(make_llama())
    stir(add_lora(model, LoraConfig(r=4, target_modules="all-linear")))
    checkpoint_layers(model)
    assert fuse_layers(model) is model and is_fused(model.model.layers[0])
    merge(model)
    assert not any(is_fused(m) or is_checkpointed(m) or "_fused" in m.__dict__ for m in model.model.layers)


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_base_that_was_opened_in_4_bits(name, tmp_path):
    "Nothing of the checkpoint's quantization is left in the merged model, nor in what is written of it."
    quietly(save_quantized, quietly(quantize_model, build(name)), tmp_path / "four", families.tokenizer(), decode=False)
    exact = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
    model, _ = quietly(load_model, tmp_path / "four", **exact)
    stir(quietly(add_lora, model, LoraConfig(r=4, target_modules=["q_proj"])))
    wanted = logits(model)
    merged = plain(merge(model, dtype=torch.float32))
    assert apart(logits(merged), wanted) < 1e-5 and not hasattr(merged.config, "quantization_config")
    quietly(save_merged, merged, tmp_path / "plain", families.tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert apart(logits(again), wanted) < 1e-5


def test_settings_for_answers_are_written_as_they_are(tmp_path):
    "Also those that transformers would refuse to write, such as a temperature for greedy answers."
    model = adapted()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    quietly(save_merged, merge(model), tmp_path / "made", families.tokenizer())
    assert '"temperature": 0.6' in (tmp_path / "made" / "generation_config.json").read_text()
    assert model.generation_config.temperature == 0.6
