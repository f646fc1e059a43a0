"Experts of MoE models in 4 bits: bytes, products and names against bitsandbytes, adapters against PEFT."
import copy
from contextlib import nullcontext

import families
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from torch import nn

from conftest import devices
from qlora_lab.bnb_format import packed_names, take_packed
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.dispatch import faster
from qlora_lab.engine.expert_adapters import adapt_experts, peft_names
from qlora_lab.engine.experts import (
    Experts4bit,
    expert_parameters,
    experts_left_alone,
    quantize_experts,
)
from qlora_lab.engine.held_experts import DenseExperts, HeldExperts, choose_forward, hold
from qlora_lab.linear4bit import quantize_model, saved_for_backward
from qlora_lab.records import LabError

MOE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text")
GATED = "experts.gate_up_proj", "experts.down_proj"


def twins(family, **kw):
    "A model with its experts in 4 bits, and the same with those experts decoded."
    packed = families.build(family, **kw)
    dense = copy.deepcopy(packed)
    dense.set_experts_implementation("eager")
    for name in quantize_experts(packed): dense.get_parameter(name).data = packed.get_submodule(name).whole.dequantize()
    return packed, dense


def both_ways(model, seed=3):
    "Logits, and the gradient of a sum of them with respect to the embedded tokens."
    embedded = model.get_input_embeddings()(families.ids()).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), embedded)[0]


@pytest.mark.parametrize("family", MOE)
def test_a_model_with_packed_experts_equals_one_with_decoded_experts(family):
    "Forward and backward; every parameter of experts is taken and nothing else is."
    packed, dense = twins(family)
    held = [n for n, m in packed.named_modules() if isinstance(m, HeldExperts)]
    assert len(held) == 2 * sum("Experts" in type(m).__name__ for m in dense.modules()) > 0
    (a, da), (b, db) = both_ways(packed), both_ways(dense)
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(da, db, atol=1e-6) and db.abs().max() > 1e-3
    assert not experts_left_alone(packed) and not any(p.dim() == 3 and "conv" not in n
                                                      for n, p in packed.named_parameters())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_and_names_are_bitsandbytes_own(quant_type, double_quant):
    ours, theirs = families.build("mixtral"), families.build("mixtral")
    for name in quantize_experts(ours, quant_type, 64, double_quant):
        at, _, last = name.rpartition(".")
        replace_parameter_4bit(theirs.get_submodule(at), last, double_quant, quant_type)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 64, 96), (2, 128, 128), (5, 33, 64), (1, 3, 1), (300, 9, 7)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_an_expert_is_cut_out_exactly(shape, blocksize, double_quant, device):
    "Also where it begins inside a block, in the middle of a byte, or inside a second-level block."
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    q = quantize_4bit(w, "nf4", blocksize, double_quant)
    held, whole = Experts4bit(q), q.dequantize(torch.float32)
    for e in {0, shape[0] // 2, shape[0] - 1}: assert torch.equal(held.decode(e, torch.float32), whole[e])
    assert torch.equal(held.whole.dequantize(), q.dequantize())


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 16, 8)])
def test_products_with_views(shape):
    "Every way that a model's code multiplies, against the decoded tensor; gradcheck for the way back."
    held = Experts4bit(quantize_4bit(torch.randn(shape), double_quant=True))
    w = held.whole.dequantize(torch.float64)
    x, y = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (shape[2], shape[1]))
    bias = torch.randn(shape[1], dtype=torch.float64)
    same = torch.testing.assert_close
    same(nn.functional.linear(x, held[1], bias), x @ w[1].T + bias)
    same(x @ held[torch.tensor(1)].T, x @ w[1].T)
    same(y @ held[-1].float(), y @ w[-1])
    same(torch.matmul(y, held[0]), y @ w[0])
    rows = torch.randn(shape[0], 3, shape[1], dtype=torch.float64, requires_grad=True)
    same(torch.bmm(rows, held), torch.bmm(rows, w))
    same(torch.bmm(rows @ w, held.transpose(1, 2)), torch.bmm(rows @ w, w.mT))
    assert torch.autograd.gradcheck(lambda x: nn.functional.linear(x, held[1]), x)
    assert torch.autograd.gradcheck(lambda y: y @ held[1], y)
    assert torch.autograd.gradcheck(lambda rows: torch.bmm(rows, held), rows)
    assert torch.autograd.gradcheck(lambda rows: torch.bmm(rows @ w, held.transpose(1, 2)), rows)


@pytest.mark.parametrize("misuse", [
    lambda h, x: torch.relu(h[0]), lambda h, x: h[0] @ x, lambda h, x: x + h[0], lambda h, x: torch.cat([h[0], x]),
    lambda h, x: h[torch.tensor([0, 1])], lambda h, x: h[:2], lambda h, x: x @ h, lambda h, x: torch.bmm(x[None], h[0]),
    lambda h, x: h.transpose(0, 1), lambda h, x: torch.einsum("ab,cb->ac", x, h[0]), lambda h, x: x.copy_(h[0])])
def test_nothing_but_products_is_computed(misuse):
    held = Experts4bit(quantize_4bit(torch.randn(3, 64, 64)))
    with pytest.raises(LabError, match="multiplied with"): misuse(held, torch.randn(64, 64))


def test_other_implementations_are_refused():
    "A user who chooses to batch experts is told, instead of products with bytes."
    packed, _ = twins("mixtral")
    packed.set_experts_implementation("grouped_mm")
    with pytest.raises(LabError): families.logits(packed)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_autograd_keeps_no_decoded_expert(family):
    packed, dense = (model.requires_grad_(False) for model in twins(family))
    def kept(model):
        embedded = model.get_input_embeddings()(families.ids()).detach().requires_grad_()
        with saved_for_backward(model) as found: model(inputs_embeds=embedded).logits.sum()
        return sorted(n for *_, n in found.values())
    assert kept(packed) == kept(dense)


def test_state_dict_comes_back():
    "Strictly, into another model, with statistics of another kind, after a deepcopy and a move to bfloat16."
    packed, _ = twins("gpt_oss")
    state, said = packed.state_dict(), families.logits(packed)
    other = families.build("gpt_oss", seed=9)
    quantize_experts(other, "fp4", 32, double_quant=False)
    other = copy.deepcopy(other)
    other.load_state_dict(state)
    assert torch.equal(families.logits(other), said)
    moved = copy.deepcopy(packed).to(torch.bfloat16)
    experts = moved.model.layers[0].mlp.experts
    assert experts.down_proj.dtype == torch.bfloat16 and experts.down_proj.offset.dtype == torch.float32
    assert torch.equal(experts.down_proj.weight, packed.model.layers[0].mlp.experts.down_proj.weight)
    assert families.logits(moved).sub(said).abs().max() < 0.1


def test_a_state_dict_that_does_not_fit_is_refused():
    packed, _ = twins("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    state = packed.state_dict()
    short = {k: v for k, v in state.items() if k != f"{name}.absmax"}
    with pytest.raises(RuntimeError, match=f"{name}: not a bitsandbytes 4-bit weight"): packed.load_state_dict(short)
    without = {k: v for k, v in state.items() if not k.startswith(name)}
    with pytest.raises(RuntimeError, match="Missing key"): packed.load_state_dict(without)
    with pytest.raises(RuntimeError, match="Unexpected key"): families.build("mixtral").load_state_dict(state)


def test_pickled_and_opened_by_somebody_else(tmp_path):
    packed, _ = twins("qwen3_moe")
    torch.save(packed, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(families.logits(again), families.logits(packed))


def test_bitsandbytes_opens_our_experts_and_we_open_theirs():
    packed, dense = twins("qwen3_moe")
    state = packed.state_dict()
    assert packed_names(state) == [n for n, m in packed.named_modules() if isinstance(m, Experts4bit)]
    theirs = families.build("qwen3_moe", seed=5)
    theirs.load_state_dict({k: v for k, v in state.items() if "experts" not in k}, strict=False)
    for name in packed_names(state):
        at, _, last = name.rpartition(".")
        module = theirs.get_submodule(at)
        module._parameters[last] = nn.Parameter(state[name], requires_grad=False)
        stats = {k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")}
        replace_parameter_4bit_prequantized(module, last, stats, torch.device("cpu"))
    theirs.set_experts_implementation("eager")
    assert torch.allclose(families.logits(theirs), families.logits(dense), atol=1e-5)
    their_state = theirs.state_dict()
    assert all(torch.equal(their_state[k], v) for k, v in state.items() if "quant_state" not in k)
    for name, q in take_packed(their_state).items():
        assert torch.equal(q.dequantize(), dense.get_parameter(name))
    assert not [k for k in their_state if "absmax" in k or "quant_" in k]


@pytest.mark.parametrize("skip", ["experts", "model.layers.1.mlp.experts", "down_proj"])
def test_experts_are_left_out_by_name(skip):
    "By the name of the parameter or of its module, as linear layers are; and it is said where little is left."
    model = families.build("mixtral")
    with pytest.warns(UserWarning, match="experts.*: left out by name") if skip == "experts" else nullcontext():
        quantize_model(model, skip=(skip, "lm_head"))
    packed = {n for n, m in model.named_modules() if isinstance(m, Experts4bit)}
    everything = {f"model.layers.{i}.mlp.experts.{n}" for i in range(2) for n in ("gate_up_proj", "down_proj")}
    assert packed == {n for n in everything if not f".{n}.".count(f"{skip}.")}


def test_packed_experts_of_a_file_are_held():
    "As a reader of checkpoints puts them in; another name, or something else than experts, is left to the reader."
    packed, _ = twins("gpt_oss")
    read, other = take_packed(packed.state_dict()), families.build("gpt_oss", seed=5)
    other.load_state_dict({k: v for k, v in packed.state_dict().items() if "experts" not in k}, strict=False)
    assert len(read) == 4
    for name, q in read.items(): assert faster("hold_experts", torch.device("cpu"), other, name, q, None) is True
    for name, p in packed.named_parameters():
        if name.endswith("_bias"): other.get_parameter(name).data = p.data
    assert torch.equal(families.logits(other), families.logits(packed))
    q = next(iter(read.values()))
    assert not faster("hold_experts", torch.device("cpu"), other, "model.layers.0.mlp.experts.up", q, None)
    assert not faster("hold_experts", torch.device("cpu"), other, "model.lyers.0.mlp.experts.up", q, None)


def test_meta_and_real_experts_have_the_same_bytes():
    "What a plan counts on the meta device is what a model holds."
    from transformers import AutoModelForCausalLM
    real = families.build("qwen3_moe")
    with torch.device("meta"): empty = AutoModelForCausalLM.from_config(families.FAMILIES["qwen3_moe"]())
    assert faster("quantize_experts", torch.device("meta"), empty) == quantize_experts(real)
    for name, held in real.named_modules():
        if not isinstance(held, Experts4bit): continue
        a, b = held.whole, empty.get_submodule(name).whole
        assert (a.nbytes, a.shape, a.stats.dtype) == (b.nbytes, b.shape, b.stats.dtype) and b.packed.is_meta


def test_numbers_that_cannot_be_quantized_are_named_and_nothing_is_changed():
    model = families.build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj.*nan at index \[2, 3, 4\]"):
        quantize_experts(model)
    assert not [m for m in model.modules() if isinstance(m, HeldExperts)]


def test_what_does_more_than_multiply_stays_and_says_why():
    class OddExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(2, 64, 64)) for _ in range(2))
            self.bias = nn.Parameter(torch.zeros(2, 64))

        def forward(self, x, e):
            return x @ self.up[e] + self.bias[e] + (self.down[e] + 1).sum()
    model = nn.ModuleDict({"experts": OddExperts()})
    assert list(experts_left_alone(model)) == ["experts.down"]
    assert quantize_experts(model) == ["experts.up"] and list(expert_parameters(model))[0][2] == "down"
    assert quantize_experts(families.build("mixtral"), skip=("down_proj", "model.layers.0.mlp.experts.gate_up_proj")
                            ) == ["model.layers.1.mlp.experts.gate_up_proj"]


def lora_config(targets=GATED, **kw):
    from peft import LoraConfig
    return LoraConfig(**dict(r=3, lora_alpha=7, target_modules=[], target_parameters=list(targets)) | kw)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family, settings", [
    ("mixtral", {}), ("gpt_oss", {"use_rslora": True}), ("llama4_text", {}), ("deepseek_v3", {}),
    ("mixtral", {"targets": ["layers.1.mlp.experts.down_proj"]}),
    ("qwen3_moe", {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3}})])
def test_adapters_equal_pefts(family, settings, packed):
    "Names, shapes, logits and gradients, on experts in 4 bits and on dense ones."
    from peft import get_peft_model
    ours, dense = twins(family)
    if not packed: ours = copy.deepcopy(dense)
    ours.requires_grad_(False)
    made, theirs = adapt_experts(ours, lora_config(**settings)), get_peft_model(dense, lora_config(**settings))
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    pairs = [(getattr(made[own], half).weight, named.pop(f"base_model.model.{name}.{half}.weight"))
             for own, name in peft_names(ours).items() for half in ("lora_A", "lora_B")]
    assert pairs and not named and {id(p) for p, _ in pairs} == {id(p) for p in ours.parameters() if p.requires_grad}
    for own, p in pairs:
        if p.abs().max() == 0: assert own.abs().max() == 0  # B starts as zeros in both
        p.data.copy_(own.data.normal_(std=0.1))
    for model in (ours, theirs): model(families.ids()).logits.square().sum().backward()
    assert torch.allclose(families.logits(ours), families.logits(theirs), atol=1e-5)
    for own, p in pairs: torch.testing.assert_close(own.grad, p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item())


def test_adapted_experts_keep_names_and_come_back():
    packed, _ = twins("mixtral")
    adapt_experts(packed, lora_config())
    state = packed.state_dict()
    assert "model.layers.0.mlp.experts.down_proj.base_layer.absmax" in state
    other, _ = twins("mixtral", seed=4)
    adapt_experts(other, lora_config())
    other.load_state_dict(state)
    assert torch.equal(families.logits(copy.deepcopy(other)), families.logits(packed))


@pytest.mark.parametrize("settings, said", [
    ({"targets": ["mlp.experts.up_proj"]}, "no parameter of this model is called 'mlp.experts.up_proj'"),
    ({"targets": ["q_proj.weight"]}, "linear layers by target_modules"),
    ({"lora_dropout": 0.1}, "lora_dropout=0.1"), ({"use_dora": True}, "use_dora=True")])
def test_adapters_that_cannot_be_are_refused(settings, said):
    packed, _ = twins("mixtral")
    with pytest.raises(LabError, match=said): adapt_experts(packed, lora_config(**settings))
    assert not peft_names(packed)


def test_the_plain_loop_and_held_dense_experts_agree():
    "Held as they are, experts give the same bits as the parameter did."
    model = families.build("olmoe")
    model.set_experts_implementation("eager")
    said = families.logits(model)
    for _, m, name in list(expert_parameters(model)):
        hold(m, name, DenseExperts(m._parameters[name]))
        choose_forward(m)
    assert torch.equal(families.logits(model), said)
