"""Every family of decoder layers that is fused is transformers' own layer, values and gradients, kept or run twice.

Protects: the descriptions of engine/families, the parts that only some families have, and the care in taking a layer.
"""
import statistics

import pytest
import torch
from test_fused import gradients, ids, off, small
from test_step import ragged
from torch import nn
from transformers import AutoConfig, Gemma2PreTrainedModel

from conftest import devices
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers
from qlora_lab.engine import decoder_layer
from qlora_lab.engine.dispatch import REHEARSED, twin, use_kernels
from qlora_lab.engine.families import LAYERS, parts_of, window_of
from qlora_lab.engine.fusing import fuse_layers, fused_part, is_fused, needs_no_mask
from qlora_lab.engine.rehearsal import Settings, rehearse
from qlora_lab.linear4bit import saved_for_backward
from qlora_lab.lora import LoRALinear
from qlora_lab.train import answer_losses

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ODD_HEADS = IDS | {"head_dim": 24}  # heads times size is not the width
PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
EXPERTS = IDS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": ODD_HEADS, "gemma": ODD_HEADS,
    "gemma2": ODD_HEADS | {"query_pre_attn_scalar": 20, "sliding_window": 64},
    "gemma3_text": ODD_HEADS | {"query_pre_attn_scalar": 20, "sliding_window": 64},
    "phi3": IDS | PART, "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2}, "olmo2": IDS,
    "smollm3": IDS | {"no_rope_layers": [1, 0, 1]}, "cohere": IDS | {"use_qk_norm": True}, "stablelm": IDS,
    "starcoder2": IDS, "phi": IDS | {"num_key_value_heads": 4}, "gpt_neox": IDS,
    "mixtral": {"num_local_experts": 4}, "olmoe": EXPERTS, "qwen3_moe": EXPERTS | ODD_HEADS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
}
MORE = {  # the other side of a family's switch
    "cohere": IDS | {"use_qk_norm": False}, "stablelm": IDS | {"use_parallel_residual": True},
    "gpt_neox": IDS | {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    "qwen3_moe": EXPERTS | {"mlp_only_layers": [1], "head_dim": 16}, "qwen3": IDS | {"attention_bias": True},
    "starcoder2": IDS | {"use_bias": False}, "granite": {"mlp_bias": True, "attention_bias": True},
    "llama": {"hidden_act": "gelu", "num_key_value_heads": 1, "head_dim": 8}, "mixtral": {"hidden_act": "gelu_new"},
}
CASES = [*FAMILIES.items(), *MORE.items()]
NAMES = [*FAMILIES, *(f"{name}, other" for name in MORE)]
EACH = pytest.mark.parametrize("family, more", CASES, ids=NAMES)


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    use_kernels()


@pytest.fixture(autouse=True)
def gemma2_by_the_way_that_leaves_its_cap_out(request):
    "Newer transformers have no such way any more: there it stays plain, and a test says that this is said."
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if asked.get("family") != "gemma2" or "attn_implementation" in str(asked): return
    if not Gemma2PreTrainedModel._supports_sdpa: pytest.skip("this transformers caps Gemma 2's scores in every way")


def made(family, more, again=False, **how):
    "A model of random weights whose norms do something."
    model = small(family, **how, **more)
    generator = torch.Generator().manual_seed(9)
    for name, p in model.named_parameters():
        if "norm" in name: p.data += 0.3 * torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
    return checkpoint_layers(model, again)


def tables(model, layer, x, places):
    "cos and sin for a layer's kind."
    rotary, kinds = model.get_decoder().rotary_emb, getattr(model.config, "layer_types", None)
    if not hasattr(rotary, "layer_types"): return rotary(x, places)
    return rotary(x, places, kinds[[*decoder_layers(model)].index(layer)])


def passes(model, x, places, at=1, fused=True):
    "The output of a layer, the gradients of its input and adapters; by the fused layer or by what it stands in for."
    layer, x = decoder_layers(model)[at], x.clone().requires_grad_()
    run = layer if fused else getattr(layer, "_unfused", layer)
    y = run(x, attention_mask=None, position_embeddings=tables(model, layer, x, places))
    learns = [p for p in layer.parameters() if p.requires_grad]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    found = torch.autograd.grad(y, [x, *learns], g, allow_unused=True)
    return [y.detach(), *(torch.zeros(1, device=y.device) if t is None else t for t in found)]


def random(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def test_every_family_has_a_case():
    found = {type(decoder_layers(small(name, **more))[0]).__name__ for name, more in FAMILIES.items()}
    assert found == set(LAYERS)


@EACH
@pytest.mark.parametrize("device", devices())
def test_a_model_of_a_family_is_the_plain_one(family, more, device):
    "Loss and the gradients of all adapters, through three layers, kept and run twice."
    use_kernels(False)
    plain = gradients(made(family, more, device=device))
    use_kernels()
    for again in (False, True):
        model = made(family, more, again, device=device)
        assert fuse_layers(model) is model and all(map(is_fused, decoder_layers(model)))
        assert off(gradients(model), plain) < 1e-5


@EACH
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("batch, tokens", [(1, 13), (3, 7)])
def test_a_layer_of_a_family_is_the_plain_one(family, more, batch, tokens, device):
    "Output, gradients of input and adapters; one sequence and three at places of their own, an odd number of tokens."
    x = random(batch, tokens, 64, device=device)
    places = torch.arange(tokens, device=device)[None] + 5 * torch.arange(1, batch + 1, device=device)[:, None]
    for at in (0, 1):
        plain = passes(made(family, more, device=device), x, places, at)
        for again in (False, True):
            found = passes(fuse_layers(made(family, more, again, device=device)), x, places, at)
            assert len(found) == len(plain) and all(off(a, b) < 2e-5 or not b.any() for a, b in zip(found, plain))


@EACH
@pytest.mark.parametrize("device", devices())
def test_a_family_rounds_no_worse_than_the_plain_layer(family, more, device):
    "In bfloat16 against float32, over several inputs."
    if "moe" in family or family in ("mixtral", "olmoe"): pytest.skip("another rounding can choose another expert")
    low, ratios = torch.bfloat16, []
    exact, plain, fused = (made(family, more, device=device, dtype=dtype) for dtype in (torch.float32, low, low))
    fuse_layers(fused)
    for seed in range(5):
        x, places = random(2, 24, 64, device=device) + seed / 10, torch.arange(24, device=device)[None]
        wanted, theirs, ours = (passes(m, x.to(dtype), places) for m, dtype in
                                ((exact, torch.float32), (plain, low), (fused, low)))
        errors = [[off(a.float(), b) for a, b in zip(found, wanted)] for found in (ours, theirs)]
        assert max(errors[1]) < 0.15
        ratios += [a / b for a, b in zip(*errors)]
    assert statistics.median(ratios) < 1.3


@pytest.mark.parametrize("family", [
    "qwen3", "gemma3_text", "olmo2", "cohere", "phi", "granite", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("again", [False, True])
def test_backward_twice(family, again):
    "What the first backward pass writes over must be its own, a norm's input and experts' graphs too."
    model = fuse_layers(made(family, FAMILIES[family], again))
    loss = model(input_ids=ids("cpu"), use_cache=False).logits.float().square().mean()
    learns = [p for p in model.parameters() if p.requires_grad]
    first, second = (torch.autograd.grad(loss, learns, retain_graph=True, allow_unused=True) for _ in range(2))
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "olmo2", "phi", "qwen3_moe"])
@pytest.mark.parametrize("again", [False, True])
def test_saved_tensors_may_be_kept_elsewhere(family, again):
    "Hooks that copy them cut off the graphs of attention and of experts; both are run again."
    plain, model = gradients(made(family, FAMILIES[family])), fuse_layers(made(family, FAMILIES[family], again))
    with torch.autograd.graph.save_on_cpu(): found = gradients(model)
    assert off(found, plain) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpointed_layer_keeps_its_input(family):
    model = fuse_layers(made(family, FAMILIES[family], True))
    x, layer = random(2, 24, 64).requires_grad_(), decoder_layers(model)[0]
    angles = tables(model, layer, x, torch.arange(24)[None])
    with saved_for_backward(model) as kept: layer(x, attention_mask=None, position_embeddings=angles)
    assert sorted(n for _, _, n in kept.values()) == sorted([x.nbytes, *(t.nbytes for t in angles)])


@pytest.mark.parametrize("family", [name for name, family in zip(FAMILIES, LAYERS.values()) if not family.experts])
@pytest.mark.parametrize("again", [False, True])
def test_a_family_can_be_rehearsed(family, again):
    "On tensors without bytes, by the arrays that the kernels would make."
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 128, "num_hidden_layers": 3}
    config = AutoConfig.for_model(family, **IDS | shape | FAMILIES[family])
    kernels = [twin(name, "cuda") for name in REHEARSED]
    _, timeline, fused = rehearse(config, Settings(rank=4, sequence=33, checkpointing=again), 2, kernels)
    assert fused and timeline.peak > 0


WINDOWED = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": FAMILIES["gemma3_text"] | {"sliding_window": 8, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": FAMILIES["phi3"] | {"sliding_window": 8}, "mixtral": {"num_local_experts": 4, "sliding_window": 8},
}


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("tokens", [8, 9, 24, 27])
def test_a_window_is_kept_without_a_mask(family, tokens, device):
    "Sequences longer than the window: the plain layers by transformers' mask, the fused ones by the mask of one entry."
    use_kernels(False)
    plain = gradients(made(family, WINDOWED[family], device=device), tokens)
    use_kernels()
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    for again in (False, True):
        model = fuse_layers(made(family, WINDOWED[family], again, device=device))
        assert off(gradients(model, tokens, attention_mask=no_mask), plain) < 1e-5
    found = [window_of(parts_of(layer)) for layer in decoder_layers(model)]
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    assert found == [8 if kind == "sliding_attention" else None for kind in kinds]


def test_a_window_that_a_family_does_not_read_is_none():
    assert window_of(parts_of(decoder_layers(small("llama", sliding_window=8))[0])) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_layer_is_used(family, monkeypatch):
    "Without this, every comparison above could be of the plain path with itself."
    used, real = [], decoder_layer.attend
    monkeypatch.setattr(decoder_layer, "attend", lambda *args: used.append(1) or real(*args))
    gradients(fuse_layers(made(family, FAMILIES[family], True)))
    assert len(used) == 6  # three layers, each twice


def swapped(model, kind):
    "A model with one part that is not transformers' own."
    layer = decoder_layers(model)[1]
    if kind == "norm": layer.input_layernorm = nn.RMSNorm(64).requires_grad_(False)
    elif kind == "head norm": layer.self_attn.q_norm = nn.RMSNorm(24).requires_grad_(False)
    elif kind == "forward": layer.mlp.forward = layer.mlp.forward
    elif kind == "hook": layer.self_attn.register_forward_hook(lambda *args: None)
    elif kind == "subclass": layer.__class__ = type(type(layer).__name__, (type(layer),), {})
    elif kind == "mlp": layer.mlp.__class__ = type("OtherMLP", (type(layer.mlp),), {})
    elif kind == "adapter":
        part = layer.self_attn.q_proj
        part.__class__ = type("OtherLoRA", (LoRALinear,), {})
    elif kind == "scaling": layer.mlp.down_proj.scaling = 3.
    elif kind == "head norm learns": layer.self_attn.k_norm.weight.requires_grad_()
    elif kind == "bidirectional": layer.self_attn.is_causal = False
    return model


@pytest.mark.parametrize("kind", ["norm", "head norm", "forward", "hook", "subclass", "mlp", "adapter", "scaling",
                                  "head norm learns", "bidirectional"])
def test_whatever_is_not_as_transformers_made_it_stays_plain(kind):
    model = swapped(made("qwen3", ODD_HEADS), kind)
    assert fuse_layers(model) is None and not any(map(is_fused, decoder_layers(model)))


def test_a_patched_class_stays_plain(monkeypatch):
    "As kernels of other libraries patch transformers: the class keeps its name, its forward pass is theirs."
    model = made("qwen3", ODD_HEADS)
    kind = type(decoder_layers(model)[0].mlp)
    real = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: real(self, x))
    assert fuse_layers(model) is None


@pytest.mark.parametrize("family, more", [
    ("phi3", {"resid_pdrop": 0.1}), ("starcoder2", {"residual_dropout": 0.1}), ("gpt_neox", {"hidden_dropout": 0.1}),
    ("stablelm", {"hidden_dropout": 0.1}), ("stablelm", {"qk_layernorm": True}), ("phi", {"qk_layernorm": True}),
    ("phi", {"resid_pdrop": 0.1}), ("olmoe", {"clip_qkv": 5.}), ("mixtral", {"router_jitter_noise": 0.1}),
    ("qwen3", {"attention_dropout": 0.1}), ("gemma2", {"attn_implementation": "eager"}),
    ("gemma3_text", {"use_bidirectional_attention": True})], ids=str)
def test_settings_that_change_a_layer_keep_it_plain(family, more):
    assert fuse_layers(made(family, FAMILIES[family] | more)) is None


def test_what_routers_found_goes_the_plain_way():
    "A loss that reads it needs a graph from there to the layers before."
    model, plain = (made("mixtral", FAMILIES["mixtral"]) for _ in range(2))
    fuse_layers(model)
    assert torch.equal(*(gradients(m, output_router_logits=True) for m in (model, plain)))
    for m in (model, plain): m.config.output_router_logits = True
    assert torch.equal(*map(gradients, (model, plain)))


def test_whatever_learns_among_experts_gets_its_gradient():
    "A router set to learn, after fusing: it is a parameter of the node from then on."
    model, plain = (made("qwen3_moe", FAMILIES["qwen3_moe"]) for _ in range(2))
    fuse_layers(checkpoint_layers(model))
    for m in (model, plain): decoder_layers(m)[1].mlp.gate.weight.requires_grad_()
    assert off(gradients(model), gradients(plain)) < 1e-5
    assert decoder_layers(model)[1].mlp.gate.weight.grad.any()


def test_hooks_that_sleep_do_not_matter():
    "transformers leaves its own behind once hidden states were asked for."
    model = made("qwen3", ODD_HEADS)
    model(input_ids=ids("cpu"), output_hidden_states=True, use_cache=False)
    assert fuse_layers(model) is model


def test_queries_and_keys_are_kept_twice_only_with_norms():
    "What a layer that is not checkpointed holds: the turned ones beside what the product wrote."
    def held(family, **more):
        model = fuse_layers(made(family, {"head_dim": 16, "num_hidden_layers": 1} | more))
        x, layer = random(2, 24, 64).requires_grad_(), decoder_layers(model)[0]
        angles = tables(model, layer, x, torch.arange(24)[None])
        with saved_for_backward(model) as kept: layer(x, attention_mask=None, position_embeddings=angles)
        return sum(n for _, _, n in kept.values())
    assert held("qwen3") - held("llama") == 2 * 24 * (64 + 32) * 4


def test_a_norm_that_is_exchanged_after_fusing_is_noticed():
    model, plain = (made("qwen3", ODD_HEADS) for _ in range(2))
    fuse_layers(model)
    for m in (model, plain): decoder_layers(m)[1].self_attn.k_norm = nn.RMSNorm(24).requires_grad_(False)
    layer = decoder_layers(model)[1]
    assert fused_part(layer, 24, torch.float32, torch.device("cpu")) is None
    assert off(gradients(model), gradients(plain)) < 1e-5


def test_capped_scores_are_said():
    model = made("gemma2", FAMILIES["gemma2"] | {"attn_implementation": "eager"})
    with pytest.warns(UserWarning, match="capped: decoder layers stay"): assert fuse_layers(model) is None


SCALED = {"gemma2": {"final_logit_softcapping": 2.}, "granite": {"logits_scaling": 4.}, "cohere": {"logit_scale": 0.3}}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_family_is_the_plain_one(family):
    "As a step takes it, filled up and without a mask; or left to the plain path, as where logits are scaled."
    more = FAMILIES[family] | SCALED.get(family, {})
    found = twin("summed_loss", "cuda")(fuse_layers(made(family, more)), ragged((60, 40)))
    plain = answer_losses(made(family, more), ragged((60, 40)))[0].sum()
    assert found is None or torch.allclose(found, plain, rtol=1e-5)
    assert found is not None or family in ("phi", *SCALED)  # a head with a bias, or something behind it


def test_no_mask_is_needed_where_every_layer_takes_the_pass():
    model = fuse_layers(made("gemma3_text", WINDOWED["gemma3_text"]))
    assert needs_no_mask(model, 27) and not needs_no_mask(made("llama", {}), 27)
    decoder_layers(model)[2].mlp.requires_grad_(False)
    decoder_layers(model)[2].self_attn.q_norm.weight.requires_grad_()
    assert not needs_no_mask(model, 27)
