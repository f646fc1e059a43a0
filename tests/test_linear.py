"The 4-bit layer: forward and backward against a dense layer, and a state dict that bitsandbytes takes."
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from conftest import devices, make_llama
from qlora_lab.bnb_format import bnb_tensors, from_bnb_tensors
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.linear4bit import Linear4bit, logical_numel, matmul_4bit, quantize_model, saved_for_backward


def layer(out=96, into=128, bias=True, dtype=torch.float32, device="cpu", **kw):
    torch.manual_seed(0)
    linear = nn.Linear(into, out, bias=bias).to(device, dtype)
    return linear, Linear4bit.from_linear(linear, **kw)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_dense_layer_with_the_dequantized_weight(bias, dtype, device):
    "Forward and the gradients of input and bias, to the bit: the weight in between is the same tensor."
    linear, q = layer(bias=bias, dtype=dtype, device=device)
    dense = nn.Linear(128, 96, bias=bias, device=device, dtype=dtype)
    dense.weight.data = q.quantized.dequantize(dtype)
    if bias: dense.bias.data = linear.bias.data
    x = torch.randn(3, 5, 128, device=device, dtype=dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = q(a), dense(b)
    g = torch.randn_like(ya)
    ya.backward(g)
    yb.backward(g)
    assert torch.equal(ya, yb) and torch.equal(a.grad, b.grad)
    assert q.weight.grad is None and not q.weight.requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    "Backward against finite differences in float64, where a wrong factor or a missing sum cannot hide."
    w = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = quantize_4bit(w.float(), "nf4", 64)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None
    assert torch.autograd.gradcheck(lambda x, b: matmul_4bit(x, q, b), (x, b))


def test_keeps_no_dequantized_weight_for_backward():
    "The point of the layer: autograd keeps neither a float weight nor anything of its size."
    _, q = layer(512, 512, bias=False)
    x = torch.randn(2, 512, requires_grad=True)
    with saved_for_backward(q) as kept: q(x).sum()
    assert sum(n for *_, n in kept.values()) <= x.nbytes
    with saved_for_backward(q) as kept: torch.nn.functional.linear(x, q.quantized.dequantize()).sum()
    assert sum(n for *_, n in kept.values()) >= 512 * 512 * 4  # the control: the naive version does keep it


def test_changed_bytes_between_forward_and_backward_are_noticed():
    "A weight overwritten in place would give a silently wrong gradient."
    _, q = layer()
    y = q(torch.randn(2, 128, requires_grad=True)).sum()
    q.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): y.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changing_dtype_leaves_the_statistics_alone(dtype):
    "`.to(bfloat16)` and `.half()` must not round the scales, whose bytes are shared with bitsandbytes."
    for double_quant in (True, False):
        _, q = layer(double_quant=double_quant)
        before = {k: v.clone() for k, v in q.state_dict().items()}
        packed, stats = q.weight.clone(), q.stats.clone()
        q.to(dtype)
        assert torch.equal(q.weight, packed) and q.stats.dtype == stats.dtype and torch.equal(q.stats, stats)
        if double_quant: assert q.absmax2.dtype == q.offset.dtype == torch.float32
        assert q.quantized.dtype == q.quantized.dequantize().dtype == q.bias.dtype == dtype
        assert all(torch.equal(v, q.state_dict()[k]) for k, v in before.items() if "absmax" in k)


def test_compute_dtype_is_inside_only():
    "Products in bfloat16, input and output in the dtype of the model."
    linear, q = layer(compute_dtype=torch.bfloat16)
    x = torch.randn(4, 128)
    y = q(x)
    assert y.dtype == torch.float32 and torch.equal(y, q.float()(x))
    want = nn.functional.linear(x.bfloat16(), q.quantized.dequantize(torch.bfloat16), linear.bias.bfloat16())
    assert torch.equal(y, want.float())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_state_dict_is_bitsandbytes_own(quant_type, double_quant):
    "bitsandbytes' Params4bit is made from our tensors, serializes to the same bytes, and gives the same weight."
    _, q = layer(64, 128, quant_type=quant_type, double_quant=double_quant)
    ours = q.state_dict()
    stats = {k: v for k, v in ours.items() if k.startswith("weight.")}
    theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit.from_prequantized(ours["weight"], stats, device="cpu", module=theirs)
    theirs.bias.data = ours["bias"]
    decoded = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(decoded, q.quantized.dequantize())
    again = theirs.state_dict()
    assert again.keys() == ours.keys()
    assert all(torch.equal(v, again[k]) for k, v in ours.items() if "quant_state" not in k)
    x = torch.randn(3, 128)
    assert torch.allclose(theirs(x), q(x), atol=1e-5)


def test_tensors_there_and_back():
    "What is written is what is read; a file that lacks a part says so."
    q = quantize_4bit(torch.randn(32, 64))
    back = from_bnb_tensors(q.packed, bnb_tensors(q))
    assert torch.equal(back.dequantize(), q.dequantize()) and back.nbytes == q.nbytes
    with pytest.raises(ValueError, match="not a bitsandbytes 4-bit weight"):
        from_bnb_tensors(q.packed, {"absmax": q.stats})


def test_quantize_model_takes_all_linear_layers_but_the_head():
    "The count of weights stays; the names stay; the head, the embeddings and the norms stay as they are."
    model = make_llama(tie=False)
    n = sum(p.numel() for p in model.parameters())
    quantize_model(model)
    kinds = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.lm_head) is nn.Linear and logical_numel(model) == n


def test_a_layer_that_cannot_be_quantized_is_named():
    "One NaN among millions of weights: the message says where."
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: .*nan at index \[3, 5\]"):
        quantize_model(model)


def test_what_autograd_keeps_is_let_go():
    "An operation that keeps its own output: watching it must not keep it alive when the graph goes, used or not."
    x = torch.ones(8, requires_grad=True)
    for use in (True, False):
        with saved_for_backward() as kept: y = x.exp()
        assert kept
        alive = weakref.ref(y)
        if use: y.sum().backward()
        del y
        assert alive() is None
    assert torch.equal(x.grad, torch.ones(8).exp())


# whole models

def toy():
    "Two linear layers, one of them under two names, and a third with the weight of the second."
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "tied": nn.Linear(64, 64)})
    model["again"], model["tied"].weight = model["a"], model["b"].weight
    return model


def test_shared_layers_and_weights_stay_shared():
    model = quantize_model(toy())
    assert type(model["a"]) is Linear4bit and model["again"] is model["a"]
    assert type(model["tied"]) is Linear4bit and model["tied"].weight is model["b"].weight
    assert not torch.equal(model["tied"].bias, model["b"].bias)
    assert logical_numel(model) == sum(p.numel() for p in toy().parameters())


def test_nothing_is_replaced_where_one_weight_is_unfit():
    "The last layer has a NaN, or no numbers at all."
    model = toy()
    model["b"].weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="layer b: .*nan"): quantize_model(model)
    assert type(model["a"]) is nn.Linear
    with torch.device("meta"): empty = toy()
    with pytest.raises(ValueError, match="layer a: .*meta device"): quantize_model(empty)
    with pytest.raises(ValueError, match="meta device"): quantize_4bit(torch.empty(64, 64, device="meta"))


def test_numbers_whose_scales_overflow_are_refused():
    "Finite weights that double quantization would decode to infinity, as bitsandbytes' does."
    huge = torch.full((64, 128), 3e38)
    with pytest.raises(ValueError, match="overflows float32; quantize without"): quantize_4bit(huge)
    assert quantize_4bit(huge, double_quant=False).dequantize().isfinite().all()


def test_the_share_in_4_bits_is_told():
    "Nothing: an error. A little: a warning with names and reasons. Most of it: no word."
    import warnings
    head = nn.ModuleDict({"table": nn.Embedding(50, 64), "lm_head": nn.Linear(64, 50)})
    with pytest.raises(ValueError, match=r"ModuleDict: no weight could be put into 4 bits \(lm_head: the output head"):
        quantize_model(head)
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.router = nn.Parameter(torch.randn(4, 64, 64)), nn.Linear(64, 64)
        def forward(self, x): return x @ self.up.mean(0)
    with pytest.warns(UserWarning, match=r"20% .* what stays: \*\.up \(3\): Experts computes @ self\.up\.mean\(0\)"):
        quantize_model(nn.ModuleList(Experts() for _ in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(toy(), skip=("a",))
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.big, self.small = nn.Linear(64, 256), nn.Linear(64, 64)
        def forward(self, x): return self.big(x) @ self.small.weight
    with pytest.warns(UserWarning, match=r"stay as they are: \*\.small \(2\): Reads takes its weight without calling"):
        quantize_model(nn.ModuleList([Reads(), Reads()]))


def test_skip_names_layers_or_nothing():
    "None: the head. Nothing: the head too goes into 4 bits. A last part of a name, or a whole name."
    def four(**kw): return {n for n, m in quantize_model(make_llama(tie=False), **kw).named_modules()
                            if isinstance(m, Linear4bit)}
    everything = four(skip=())
    assert everything - four() == {"lm_head"}
    assert everything - four(skip=("up_proj",)) == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert everything - four(skip=("model.layers.1.mlp.up_proj",)) == {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_state_dict_is_read_again(assign, bias):
    "Strictly, into a layer of another kind; the parameter stays the object that it was, unless tensors are assigned."
    _, source = layer(bias=bias)
    other = Linear4bit.from_linear(nn.Linear(128, 96, bias=bias), "fp4", double_quant=False)
    before, state, x = other.weight, source.state_dict(), torch.randn(3, 128)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), source(x)) and (other.weight is before) != assign
    model = nn.Sequential(nn.Linear(4, 4), source)
    nn.Sequential(nn.Linear(4, 4), other).load_state_dict(model.state_dict())
    stored_as_floats = state | {"weight": state["weight"].view(-1).view(torch.bfloat16)[:, None]}
    other.load_state_dict(stored_as_floats)
    assert torch.equal(other(x), source(x))
    for lacking, told in (("weight.absmax", "not a bitsandbytes"), ("weight", "Missing key")):
        cut = {k: v for k, v in state.items() if k != lacking}
        with pytest.raises(RuntimeError, match=told): other.load_state_dict(cut)
    with pytest.raises(RuntimeError, match=r"weight of \(96, 128\), expected \(64, 64\)"):
        Linear4bit.from_linear(nn.Linear(64, 64, bias=bias)).load_state_dict(state)


def test_copies_of_a_layer():
    "deepcopy, pickle, torch.save: the same output, memory of its own."
    import copy
    import io
    import pickle
    _, q = layer()
    x, file = torch.randn(3, 128), io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), q(x)) and other.weight.data_ptr() != q.weight.data_ptr()


def test_inputs_of_any_shape():
    "One axis, with a bias that learns; no rows at all; inference mode."
    _, q = layer()
    q.bias.requires_grad_(True)
    x = torch.randn(128, requires_grad=True)
    q(x).sum().backward()
    assert torch.equal(q.bias.grad, torch.ones(96)) and x.grad.shape == (128,)
    empty = torch.randn(2, 0, 128, requires_grad=True)
    q(empty).sum().backward()
    assert q(empty).shape == (2, 0, 96) and empty.grad.shape == empty.shape
    with torch.inference_mode(): y = q(x)
    assert torch.equal(y, q(x).detach())


def test_conv1d_is_quantized_the_right_way_round():
    "GPT-2's layer stores [in, out]; its twin gives what it gave, as far as rounding lets it."
    from transformers.pytorch_utils import Conv1D
    torch.manual_seed(0)
    conv, x = Conv1D(96, 64), torch.randn(3, 64)
    twin = Linear4bit.from_linear(conv)
    assert (twin.in_features, twin.out_features) == (64, 96)
    assert torch.equal(twin.quantized.packed, quantize_4bit(conv.weight.t().contiguous()).packed)
    assert (twin(x) - conv(x)).norm() < 0.15 * conv(x).norm()


def test_a_layer_to_whose_dtype_inputs_are_cast_stays():
    "Mamba casts its states to the head's dtype: a head in 4 bits would get bytes."
    from families import build

    from qlora_lab.linear_layers import quantizable
    take, stay = quantizable(build("mamba"), skip=())
    assert "lm_head" not in take and "dtype" in stay["lm_head"]
    assert "lm_head" in quantizable(build("llama"), skip=())[0]


def writes_into_weights(family):
    "A model of a family that changes weights by itself, in eval mode."
    from families import LLAMA, TOKENS, config
    from transformers import AutoModelForCausalLM
    gemma = LLAMA | dict(intermediate_size=[128, 128], head_dim=16, vocab_size_per_layer_input=320, altup_num_inputs=2,
                         hidden_size_per_layer_input=64, num_kv_shared_layers=0, laurel_rank=8,
                         layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0])
    rwkv = TOKENS | dict(hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, context_length=64)
    return AutoModelForCausalLM.from_config(config(family, **{"gemma3n_text": gemma, "rwkv": rwkv}[family])).eval()


@pytest.mark.parametrize("family, stays", [("gemma3n_text", "altup.prediction_coefs"), ("rwkv", "attention.output")])
def test_a_layer_into_which_a_model_writes_stays(family, stays):
    "Gemma 3n clamps a weight while it trains, RWKV divides some while it does not; both are loaded in eval mode."
    from qlora_lab.linear_layers import left_alone
    model, ids = writes_into_weights(family), torch.randint(3, 250, (1, 8))
    odd = left_alone(model)
    assert sum(name.endswith(stays) for name in odd) == 2 and left_alone(model.train()) == odd
    quantize_model(model.eval())
    for training in (False, True, False): assert model.train(training)(input_ids=ids).logits.isfinite().all()


def test_a_write_that_the_settings_rule_out_leaves_a_layer_in():
    from qlora_lab.linear_layers import left_alone
    rwkv = writes_into_weights("rwkv")
    rwkv.rwkv.config.rescale_every = 0
    assert not left_alone(rwkv)
