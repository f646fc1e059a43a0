"""A layer by hand is the layer: values, gradients, memory of fused layers; on a CPU plain operations, on a GPU kernels.

Protects: every product and sum of the hand-written backward pass, and what is left to the plain path.
"""
import copy
import pickle
import statistics

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import devices
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers
from qlora_lab.engine import activation, attention, decoder_layer, head_norms, norms, rotation
from qlora_lab.engine import group as groups
from qlora_lab.engine.dispatch import use_kernels
from qlora_lab.engine.fusing import HARMLESS, fits, fuse_layers, is_fused
from qlora_lab.engine.group import Group, adapter_gradients, group_backward, group_forward
from qlora_lab.linear4bit import Linear4bit, quantize_model, saved_for_backward
from qlora_lab.lora import LoRALinear, add_lora, trainable
from qlora_lab.records import LabError
from qlora_lab.timeline import MemoryTimeline

there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(norms.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    use_kernels()


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}


def unquantized(family, **more): return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | more))


def small(family="llama", targets="all-linear", device="cpu", dtype=torch.float32, dropout=0., compute=None, seed=0,
          rank=4, **more):
    torch.manual_seed(seed)
    config = {"num_hidden_layers": 3, "num_key_value_heads": 2, "sliding_window": None} | more
    model = quantize_model(unquantized(family, **config), compute_dtype=compute)
    add_lora(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=dropout), seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name: nn.init.normal_(p, std=0.1)
        elif "bias" in name: nn.init.normal_(p, std=0.1)
    model = model.to(device)
    for name, p in model.named_parameters():
        if "lora_" not in name and p.is_floating_point(): p.data = p.data.to(dtype)
    return model.train()


@pytest.fixture
def rubbish(monkeypatch):
    "New memory is full of NaN, as it may be."
    def filled(make):
        def made(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t
        return made
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def ids(device, tokens=24):
    return torch.randint(0, 128, (2, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def gradients(model, tokens=24, **kwargs):
    "Loss and all gradients in one vector."
    for p in model.parameters(): p.grad = None
    given = ids(next(model.parameters()).device, tokens)
    logits = model(input_ids=given, use_cache=False, **kwargs).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), given[:, 1:].flatten())
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.float().flatten() for p in trainable(model))])


def off(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("targets, rank", [
    ("all-linear", 4), (["q_proj", "v_proj", "down_proj"], 4), (["k_proj", "up_proj", "o_proj"], 8),
    (["v_proj", "gate_proj"], 16)], ids=["all", "some", "others", "few"])
@pytest.mark.parametrize("family, more", [
    ("llama", {}), ("llama", {"num_key_value_heads": 4, "intermediate_size": 100, "head_dim": 8}), ("mistral", {}),
    ("qwen2", {})], ids=["llama", "odd", "mistral", "qwen2"])
def test_fused_layers_are_the_plain_ones(family, more, targets, rank, again, device, rubbish):
    """Biases, shared keys, layers without adapters, ranks that fill the room and that do not, widths that no tile
    divides; kept or computed a second time."""
    use_kernels(False)
    plain = gradients(small(family, targets, device, rank=rank, **more))
    use_kernels()
    model = checkpoint_layers(small(family, targets, device, rank=rank, **more), again)
    assert fuse_layers(model) is model and all(map(is_fused, decoder_layers(model)))
    assert off(gradients(model), plain) < 1e-5


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("again", [False, True])
def test_fused_layers_round_no_worse_than_plain_ones(again, device):
    "Gradients in bfloat16 against float32, over several models: flash attention, kernels, sums inside products."
    ratios = []
    for seed in range(6):
        use_kernels(False)
        pair = [gradients(small(device=device, dtype=d, seed=seed)) for d in (torch.float32, torch.bfloat16)]
        exact, plain = (found[1:] for found in pair)
        use_kernels()
        model = fuse_layers(checkpoint_layers(small(device=device, dtype=torch.bfloat16, seed=seed), again))
        ratios.append(off(gradients(model)[1:], exact) / off(plain, exact))
        assert off(plain, exact) < 0.1
    assert statistics.median(ratios) < 1.25  # the adapters, float32 here, are multiplied in bfloat16 too


def test_a_fused_layer_is_used(monkeypatch):
    "Without this, every comparison above could be of the plain path with itself."
    used, real = [], decoder_layer.attend
    monkeypatch.setattr(decoder_layer, "attend", lambda *args: used.append(1) or real(*args))
    gradients(fuse_layers(checkpoint_layers(small())))
    assert len(used) == 6  # three layers, each twice


def test_what_does_not_fit():
    assert fuse_layers(small(dropout=0.1)) is None
    assert fuse_layers(small(hidden_act="relu")) is None
    assert fuse_layers(small(compute=torch.bfloat16)) is None
    trained = small("qwen2")
    decoder_layers(trained)[1].self_attn.q_proj.base_layer.bias.requires_grad_()
    assert fuse_layers(trained) is None and not any(map(is_fused, decoder_layers(trained)))
    plain = add_lora(unquantized("llama", num_hidden_layers=1), LoraConfig(r=4, target_modules="all-linear"))
    assert fuse_layers(plain) is None and not fits(nn.Linear(2, 2))
    assert fuse_layers(small(attention_dropout=0.5)) is None
    half = small(dtype=torch.float16)
    with pytest.warns(UserWarning, match="float16: decoder layers stay"): assert fuse_layers(half) is None
    wrapped = small()
    wrapped.model.layers[0].forward = wrapped.model.layers[0].forward  # another library's
    assert fuse_layers(wrapped) is None


@pytest.mark.parametrize("family, more", [("helium", {"head_dim": 16}), ("seed_oss", {}), ("ernie4_5", {})],
                         ids=lambda v: v if isinstance(v, str) else "")
def test_families_that_look_alike_stay_plain(family, more):
    "They scale, turn or drop something on the way."
    assert fuse_layers(small(family, **more)) is None


def test_what_goes_the_plain_way():
    "Padding in front, a cache, autocast, a mask for a window: as without fusing."
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    model, plain = fuse_layers(small()), small()
    assert torch.equal(gradients(model, attention_mask=mask), gradients(plain, attention_mask=mask))
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(gradients(model), gradients(plain))
    window = [f(small("mistral", sliding_window=8)) for f in (fuse_layers, lambda m: m)]
    assert torch.equal(*map(gradients, window))
    with torch.no_grad():
        how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        whole = [m.eval().generate(ids("cpu")[:, :6], **how) for m in (model, plain)]
    assert torch.equal(*whole)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "layer_past", "max_length_q", "output_router_logits", ""])
def test_what_a_fused_layer_does_not_know_goes_the_plain_way(name):
    "A cache under whatever name: transformers has had three. What is nothing, or changes nothing, is no reason."
    layer, given = decoder_layers(fuse_layers(small()))[0], {}
    layer._unfused = lambda x, **kwargs: given.update(kwargs)
    x = torch.randn(1, 5, 64)
    how = {"position_embeddings": (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))}
    for nothing in (None, False): assert layer(x, **how, **{name: nothing}).shape == x.shape and not given
    for harmless in HARMLESS: assert layer(x, **how, **{harmless: torch.arange(5)}).shape == x.shape and not given
    for value in (True, 0, torch.zeros(2)):
        given.clear()
        layer(x, **how, **{name: value})
        assert given[name] is value and given["position_embeddings"] is how["position_embeddings"]


def test_a_fused_layer_can_be_taken_back():
    "Checkpointing that is taken off takes the fused layer with it; fusing twice is fusing once."
    model, plain = small(), gradients(small())
    fuse_layers(fuse_layers(checkpoint_layers(model)))
    assert off(gradients(model), plain) < 1e-5
    checkpoint_layers(model, on=False)
    assert not any(map(is_fused, decoder_layers(model))) and torch.equal(gradients(model), plain)


def test_what_changes_after_fusing_counts():
    "Adapters added later, another scaling, another dtype: the plain way or the new value, never the old one."
    model = quantize_model(unquantized("llama", num_hidden_layers=1))
    fuse_layers(model.requires_grad_(False))
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"), seed=0)
    assert gradients(model)[1:].any() and fuse_layers(model) is model and gradients(model)[1:].any()
    model = fuse_layers(small())
    decoder_layers(model)[1].input_layernorm.weight.requires_grad_()
    assert gradients(model)[1:].any() and decoder_layers(model)[1].input_layernorm.weight.grad.any()
    fused, plain = fuse_layers(small()), small()
    for m in (fused, plain):
        for layer in m.modules():
            if isinstance(layer, LoRALinear): layer.scaling = 0.5
    assert off(gradients(fused), gradients(plain)) < 1e-5
    assert not decoder_layers(fused.to(torch.bfloat16))[0]._fused.takes(24, torch.bfloat16, torch.device("cpu"))


def test_fused_before_checkpointed_is_said():
    model = checkpoint_layers(fuse_layers(small()))
    with pytest.raises(LabError, match="fused before"): fuse_layers(model)


def test_a_gradient_without_memory_of_its_own():
    "`sum().backward()` gives one number for all places."
    found = []
    for make in (fuse_layers, lambda m: m):
        model, x = make(small()), torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        cos = model.model.rotary_emb(x, torch.arange(24)[None])
        across = x.transpose(0, 1).contiguous().transpose(0, 1)
        decoder_layers(model)[0](across, position_embeddings=cos).sum().backward()
        found.append(x.grad)
    assert off(*found) < 1e-5


@pytest.mark.parametrize("again", [False, True])
def test_large_weights_are_decoded_a_layer_at_a_time(again, monkeypatch):
    "Values and gradients stay; the peak is lower."
    found, peaks = [], []
    for piece in (1 << 30, 0):
        monkeypatch.setattr(groups, "PIECE", piece)
        model = fuse_layers(checkpoint_layers(small(hidden_size=256, intermediate_size=1024), again))
        gradients(model, 4)
        with MemoryTimeline() as timeline: found.append(gradients(model, 4))
        peaks.append(timeline.peak)
    assert off(*found) < 1e-5 and peaks[1] < peaks[0] - 256 * 1024 * 4 * 0.9


@pytest.mark.parametrize("again", [False, True])
def test_backward_twice(again):
    "What the first backward pass writes over must be its own."
    model = fuse_layers(checkpoint_layers(small(), again))
    given = ids("cpu")
    loss = model(input_ids=given, use_cache=False).logits.float().square().mean()
    first, second = (torch.autograd.grad(loss, trainable(model), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("again", [False, True])
def test_saved_tensors_may_be_kept_elsewhere(again):
    "Hooks that copy them cut attention's graph off; it is run again."
    model, plain = fuse_layers(checkpoint_layers(small(), again)), gradients(small())
    with torch.autograd.graph.save_on_cpu():
        logits = model(input_ids=ids("cpu"), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids("cpu")[:, 1:].flatten())
    loss.backward()
    assert off(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in trainable(model))]), plain) < 1e-5


def test_a_changed_weight_is_noticed():
    model = fuse_layers(checkpoint_layers(small()))
    loss = model(input_ids=ids("cpu"), use_cache=False).logits.mean()
    decoder_layers(model)[1].mlp.up_proj.base_layer.stats.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


def test_a_checkpointed_layer_keeps_its_input():
    model = fuse_layers(checkpoint_layers(small()))
    x, angles = torch.randn(2, 24, 64, requires_grad=True), (torch.randn(1, 24, 16),) * 2
    with saved_for_backward(model) as kept: decoder_layers(model)[0](x, position_embeddings=angles)
    assert sorted(n for _, _, n in kept.values()) == sorted([x.nbytes, angles[0].nbytes])


@pytest.mark.parametrize("again", [False, True])
def test_a_fused_model_can_be_copied_and_pickled(again):
    "The copy is fused, by layers of its own: what happens to its adapters is nothing to the first."
    model = fuse_layers(checkpoint_layers(small(), again))
    found = gradients(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(is_fused, decoder_layers(other))) and torch.equal(gradients(other), found)
        for p in trainable(other): p.data.zero_()
        for layer, first in zip(decoder_layers(other), decoder_layers(model)):
            assert layer.forward.args[0] is layer and layer._fused.unchanged()
            assert layer._fused.qkv.layers[0] is layer.self_attn.q_proj is not first.self_attn.q_proj
        assert not torch.equal(gradients(other), found) and torch.equal(gradients(model), found)


def test_a_bias_that_learns_keeps_a_layer_plain():
    "In a base layer, or in a norm, before the model is fused and after."
    for name in ("self_attn.q_proj.base_layer.bias", "post_attention_layernorm.weight"):
        model = small("qwen2")
        learns = decoder_layers(model)[1].get_parameter(name).requires_grad_()
        assert not fits(decoder_layers(model)[1]) and fuse_layers(model) is None
        learns.requires_grad_(False)
        assert fuse_layers(model) is model
        learns.requires_grad_()
        gradients(model)
        assert learns.grad.abs().sum() > 0


@pytest.mark.parametrize("piece", [0, 1 << 30], ids=["pieces", "whole"])
def test_a_group_without_adapters_and_onto_something(piece, monkeypatch):
    "A frozen layer passes the gradient on; a residual and a bias are summed in."
    monkeypatch.setattr(groups, "PIECE", piece)
    torch.manual_seed(0)
    layers = [Linear4bit.from_linear(nn.Linear(64, n)) for n in (32, 96)]
    group, x, onto, g = Group(*layers), torch.randn(5, 64, requires_grad=True), torch.randn(5, 128), torch.randn(5, 128)
    expected = onto + torch.cat([layer(x) for layer in layers], 1)
    assert group.room == 0 and group.with_room(x) is x
    with torch.no_grad():
        y = group_forward(group, x, onto)
        group.fill_back(g)
        g_x = group_backward(group, g, torch.full((5, 64), torch.nan))
    assert y is onto and adapter_gradients(group, g, x) == [] and torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(g_x, torch.autograd.grad(expected, x, g)[0], atol=1e-5)


@pytest.mark.parametrize("piece", [0, 1 << 30], ids=["pieces", "whole"])
@pytest.mark.parametrize("ranks, room", [
    ((8, 0, 16), 24), ((1, 2, 0), 8), ((0, 0, 5), 8), ((8, 0, 0), 8), ((0, 16, 0), 16), ((8, 8, 8), 24)], ids=str)
def test_room_is_for_adapters_alone(ranks, room, piece, monkeypatch, rubbish):
    "Some layers adapted, others not, one bias among them; nothing of what lay in the room before reaches a result."
    monkeypatch.setattr(groups, "PIECE", piece)
    torch.manual_seed(0)
    layers = [Linear4bit.from_linear(nn.Linear(64, n, bias=n == 40)) for n in (32, 96, 40)]
    layers = [LoRALinear(layer, r=r, alpha=2 * r) if r else layer for layer, r in zip(layers, ranks)]
    for layer in layers:
        if not isinstance(layer, LoRALinear): continue
        nn.init.normal_(layer.lora_B.weight)
        layer.scaling = 2.
    group, x, g = Group(*layers), torch.randn(5, 64, requires_grad=True), torch.randn(5, 168)
    expected = torch.cat([layer(x) for layer in layers], 1)
    wanted = torch.autograd.grad(expected, [x, *group.params], g)
    def with_rubbish(t): return torch.cat([t.detach(), torch.full((5, group.room), torch.nan)], 1)
    with torch.no_grad():
        read, grad = with_rubbish(x), with_rubbish(g)
        y = group_forward(group, read)
        group.fill_back(grad)
        found = group_backward(group, grad, torch.full((5, 64), torch.nan)), *adapter_gradients(group, grad, read)
    assert group.room == room == y.shape[1] - 168 and torch.allclose(y[:, :168], expected, atol=1e-5)
    assert all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in zip(found, wanted, strict=True))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(there, dtype)


def wider(t, more=8): return torch.cat([t, torch.full((len(t), more), 7., device=there)], 1)[:, :t.shape[1]]


WIDTHS = [(1, 8), (5, 64), (3, 1000), (2, 1025)]


KINDS = sorted(set(norms.NORMS.values()))


@needs_triton
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("room", [0, 8])
@pytest.mark.parametrize("rows, width", WIDTHS)
def test_norms_by_kernels(rows, width, room, kind):
    "Rows that no power of two fills, with and without bias, residual, rstd; by Triton's interpreter without a GPU."
    x, g, around, onto = (normal(rows, width, seed=i) for i in range(4))
    w, bias = (normal(width, seed=i) for i in (4, 5))
    for more in ((), (kind, None, onto), (kind, bias if kind.centred else None)):
        (y, rstd), (plain, r) = (f(wider(x), w, 1e-5, room, *more) for f in (norms.norm_kernel, norms.norm_plain))
        assert y.shape == plain.shape == (rows, width + room) and torch.allclose(rstd, r)
        assert torch.allclose(y[:, :width], plain[:, :width], atol=1e-5)
    for kept, add in ((norms.norm_plain(x, w, 1e-5, kind=kind)[1], wider(around)), (None, None)):
        outs = [torch.cat([x, torch.full((rows, room), 7., device=there)], 1) for _ in range(2)]
        both = norms.norm_backward_kernel, norms.norm_backward_plain
        grads = [f(g, o[:, :width], w, 1e-5, kept, add, room, kind, o) for f, o in zip(both, outs)]  # over x itself
        new = norms.norm_backward_kernel(g, x, w, 1e-5, kept, add, room, kind)
        assert torch.allclose(*(t[:, :width] for t in grads), atol=1e-4) and new.shape == (rows, width + room)
        assert grads[0] is outs[0] and (outs[0][:, width:] == 7).all()
        assert torch.equal(new[:, :width], outs[0][:, :width])


@needs_triton
@pytest.mark.parametrize("curve, gated", [(c, g) for c in ("silu", "tanh", "erf") for g in (True, False)])
@pytest.mark.parametrize("room", [0, 8])
@pytest.mark.parametrize("rows, width", WIDTHS)
def test_the_activation_by_kernels(rows, width, room, curve, gated):
    "Tiles that no power of two fills, parts of wider rows; gradients written over what was read, not over the rest."
    both, how = width * (1 + gated), (curve, gated)
    gate_up, g = wider(normal(rows, both), room), normal(rows, width, seed=1)
    outs = [torch.full((rows, both), 7., device=there) for _ in range(2)]
    grads = [wider(g, room).clone() for _ in range(3)]
    y, kernel = activation.activation_plain(gate_up, 0, *how), activation.activation_backward_kernel
    assert torch.allclose(activation.activation_kernel(gate_up, room, *how)[:, :width], y, atol=1e-5)
    for f, grad, out in zip((kernel, activation.activation_backward_plain), grads, outs): f(grad, gate_up, out, *how)
    assert torch.allclose(*outs, atol=1e-5) and all(torch.allclose(grad, y, atol=1e-5) for grad in grads[:2])
    whole = torch.cat([gate_up, torch.full((rows, 8), 7., device=there)], 1)
    kernel(grads[2], whole[:, :both], whole[:, :both], *how)
    assert torch.equal(whole[:, :both], outs[0]) and (whole[:, both:] == 7).all()


def angles(positions, turned, pairs=False):
    turn = normal(1, positions, turned // 2, seed=5)
    both = turn.repeat_interleave(2, -1) if pairs else torch.cat([turn] * 2, -1)
    return both.cos(), both.sin()


@needs_triton
@pytest.mark.parametrize("turned, pairs", [(1, False), (1, True), (0.75, False)], ids=["halves", "neighbours", "part"])
@pytest.mark.parametrize("heads, size, positions, rows", [(1, 8, 4, 4), (3, 16, 5, 10), (4, 24, 6, 6)])
def test_rotation_and_back(heads, size, positions, rows, turned, pairs):
    "In place and out of place, a part of wider rows, angles shared by a batch; and turning back undoes it."
    width, (cos, sin) = heads * size, angles(positions, 2 * int(size * turned / 2), pairs)
    wide = normal(rows, width + 8)
    part, plain = wide[:, :width].unflatten(1, (heads, size)), torch.zeros(rows, heads, size, device=there)
    out = torch.zeros(rows, width + 3, device=there)[:, :width].unflatten(1, (heads, size))
    rotation.rotate_kernel(part, out, cos, sin, 1, pairs)
    rotation.rotate_plain(part, plain, cos, sin, 1, pairs)
    assert torch.allclose(out, plain, atol=1e-6)
    strange = part.clone()
    strange[0, 0, 0], strange[-1, -1, -1] = torch.inf, -torch.inf
    rotation.rotate_kernel(strange, out, cos, sin, 0, pairs)
    assert torch.equal(strange, out)
    before = wide.clone()
    for sign in (1, -1): rotation.rotate_kernel(part, part, cos, sin, sign, pairs)
    assert torch.allclose(wide, before, atol=1e-6) and torch.equal(wide[:, width:], before[:, width:])


@needs_triton
def test_heads_that_lie_apart_are_turned():
    "As GPT-NeoX has them: query, key and value of a head together."
    (cos, sin), whole = angles(6, 8), normal(6, 3 * 3 * 8)
    query, plain = whole.view(6, 3, 3, 8)[:, :, 0], torch.empty(6, 3, 8, device=there)
    rotation.rotate_plain(query, plain, cos, sin, 1)
    others = whole.view(6, 3, 3, 8)[:, :, 1:].clone()
    rotation.rotate_kernel(query, query, cos, sin, 1)
    assert torch.allclose(query, plain, atol=1e-6) and torch.equal(whole.view(6, 3, 3, 8)[:, :, 1:], others)


class Weighted(nn.Module):
    "A norm's weight and eps, as HeadNorm reads them."
    def __init__(self, *shape):
        super().__init__()
        self.weight, self.eps = nn.Parameter(normal(*shape, seed=7), requires_grad=False), 1e-6


@needs_triton
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("way", ["each", "own weights", "together"])
@pytest.mark.parametrize("heads, size, positions, rows", [(1, 8, 4, 4), (3, 16, 5, 10), (5, 24, 6, 6)])
def test_norms_of_heads_by_kernels(heads, size, positions, rows, way, kind):
    "Forward, and the way back over what was read, parts of wider rows; neighbours turned for the kind that has them."
    shape = {"each": (size,), "own weights": (heads, size), "together": (heads * size,)}[way]
    n, pairs = Weighted(*shape), kind.centred
    n = head_norms.HeadNorm(n, kind, way == "together", pairs)
    def part(t): return wider(t.flatten(1)).unflatten(1, (heads, size))
    x, g, turn = normal(rows, heads, size), normal(rows, heads, size, seed=1), angles(positions, size, pairs)
    outs, backs = [part(torch.zeros_like(x)) for _ in range(2)], [part(x) for _ in range(2)]
    for f, out in zip((head_norms.norm_and_turn_kernel, head_norms.norm_and_turn_plain), outs):
        f(n, part(x), out, *turn)
    assert torch.allclose(*outs, atol=1e-5)
    both = head_norms.norm_and_turn_backward_kernel, head_norms.norm_and_turn_backward_plain
    for f, back in zip(both, backs): f(n, g, back, back, *turn)
    assert torch.allclose(*backs, atol=1e-4)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_attention_through_a_window(window, device):
    "As with a mask of tokens times tokens, for windows that divide the sequence and that do not."
    q, k, v, g = (normal(2, heads, 33, 16, seed=heads).to(device) for heads in (4, 2, 2, 4))
    seen = torch.ones(33, 33, dtype=torch.bool, device=device).tril().triu(1 - window)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = F.scaled_dot_product_attention(*leaves, attn_mask=seen, scale=0.2, enable_gqa=True)
    out, mine = attention.attention(q, k, v, scale=0.2, window=window)
    assert torch.allclose(out, plain, atol=1e-5)
    found = attention.attention_backward(g, out, mine, scale=0.2, window=window)
    assert all(map(lambda a, b: torch.allclose(a, b, atol=1e-4), found, torch.autograd.grad(plain, leaves, g)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_flash_kernel_knows_windows(size):
    "In bfloat16, values and gradients, as by blocks; it is what a card takes."
    device = torch.device("cuda")
    assert attention.flash_knows_windows(torch.device("cuda", torch.cuda.current_device()))
    shapes = [(2, heads, 300, size) for heads in (8, 4, 4, 8)]
    q, k, v, g = (normal(*shape, seed=i).to(device, torch.bfloat16) for i, shape in enumerate(shapes))
    found = []
    for way in (attention.windowed_by_flash, attention.windowed_by_blocks, attention.windowed):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = way(*leaves, None, 100)
        found.append([out, *torch.autograd.grad(out, leaves, g)])
    assert all(off(a.float(), b.float()) < 0.02 for a, b in zip(*found[:2]))
    assert torch.equal(found[0][0], found[2][0])


def kept_result(q, k, v, g, **how):
    "Out and gradients by a result that a first run keeps and a second reads, and the kernel's name."
    first = attention.Result()
    attention.attention(q, k, v, False, **how, result=first)
    second = attention.Result(first.kernel, first.tensors)
    out, leaves = attention.attention(q, k, v, **how, result=second)
    found = attention.attention_backward(g, out, leaves, **how, result=second)
    return [out, *found], {kernel: name for name, kernel in attention.KERNELS.items()}.get(first.kernel)


def by_graph(q, k, v, g, **how):
    out, leaves = attention.attention(q, k, v, **how)
    return [out, *attention.attention_backward(g, out, leaves, **how)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, name", [(None, "cpu"), (40, "cpu"), (8, None)])
def test_a_kept_result_of_attention(dtype, window, name):
    "In every bit what the graph gives; where queries go in blocks nothing is kept."
    how = {"scale": 0.2, "window": window}
    given = [normal(2, heads, 33, 16, seed=heads).to("cpu", dtype) for heads in (4, 2, 2, 4)]
    found, kernel = kept_result(*given, **how)
    assert kernel == name and all(map(torch.equal, found, by_graph(*given, **how)))


def test_an_operator_that_does_something_else_is_not_called(monkeypatch):
    "Each is tried beside torch's own graph: one that takes other arguments, and one that is wrong."
    given = [normal(2, heads, 33, 16, seed=heads).cpu() for heads in (4, 2, 2, 4)]
    right = attention.KERNELS["cpu"]
    def other(*args): raise TypeError("other arguments")
    def wrong(*args): return [1.1 * t for t in right.backward(*args)]
    for backward in (other, wrong):
        attention._gives_what_torch_gives.cache_clear()
        monkeypatch.setitem(attention.KERNELS, "cpu", attention.Kernel(right.forward, backward))
        found, kernel = kept_result(*given)
        assert kernel is None and all(map(torch.equal, found, by_graph(*given)))
    attention._gives_what_torch_gives.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shared", [1, 4])
def test_a_kept_result_of_attention_on_a_gpu(size, window, shared):
    "In bfloat16, as the layer calls it: views of one product's output; also with the kernels that torch takes second."
    tokens, heads = 700, (8, 8 // shared, 8 // shared)
    qkv = normal(2 * tokens, sum(heads) * size).to("cuda", torch.bfloat16)
    parts = [t.unflatten(1, (-1, size)) for t in qkv.split([n * size for n in heads], 1)]
    q, k, v = (t.unflatten(0, (2, -1)).transpose(1, 2) for t in parts)
    g = normal(2, tokens, 8, size, seed=1).to("cuda", torch.bfloat16).transpose(1, 2)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            expected = by_graph(q, k, v, g, scale=0.1, window=window)
            found, kernel = kept_result(q, k, v, g, scale=0.1, window=window)
        assert kernel == ("window" if window else kernel) and torch.equal(found[0], expected[0])
        assert all(off(a.float(), b.float()) < 0.01 for a, b in zip(found, expected))
    found, kernel = kept_result(q, k, v, g, window=window)  # what a card takes of itself
    assert kernel in ("window",) if window else kernel in ("cudnn", "flash")


large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 40 << 30


@pytest.mark.skipif(not large, reason="no GPU with 40 GiB")
@pytest.mark.parametrize("what", ["norm", "gate", "rotation"])
def test_more_than_two_to_the_31_numbers(what):
    "The last rows of arrays beyond 32-bit places are what the same rows give alone; the angles' array is as long."
    rows, width = 2 ** 19 + 2, 4096
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    last, w = x[-2:].clone(), normal(width, dtype=torch.bfloat16)
    if what == "norm":
        (y, rstd), (alone, _) = (norms.norm_kernel(t, w, 1e-5) for t in (x, last))
        grads = [norms.norm_backward_kernel(t, t, w, 1e-5, r, t) for t, r in ((x, rstd), (last, rstd[-2:]))]
        assert torch.equal(y[-2:], alone) and torch.equal(grads[0][-2:], grads[1])
    elif what == "gate":
        y, alone = activation.activation(x), activation.activation(last)
        assert torch.equal(y[-2:], alone)
        for grad, gate_up in ((y, x), (alone, last)): activation.activation_backward(grad, gate_up, gate_up)
        assert torch.equal(x[-2:], last) and torch.equal(y[-2:], alone)
    else:
        turn, alone = x[None], last.clone()
        out = torch.empty_like(x)
        rotation.rotate(x[:, None], out[:, None], turn, turn, 1)
        ends = turn[:, -2:].clone()
        rotation.rotate(last[:, None], alone[:, None], ends, ends, 1)
        assert torch.equal(out[-2:], alone)
        n = head_norms.HeadNorm(Weighted(width).to("cuda", torch.bfloat16), norms.LLAMA, False, False)
        whole, small_part = x[:, None], last[:, None].clone()
        for t, places in ((whole, turn), (small_part, ends)):
            made = torch.empty_like(t)
            n.forward(t, made, places, places)
            n.backward(made, t, t, places, places)
        assert torch.equal(whole[-2:], small_part)


@pytest.mark.parametrize("name", [
    "norms.norm_plain", "norms.norm_backward_plain", "rotation.rotate", "activation.activation",
    "activation.activation_backward", "head_norms.norm_and_turn_plain"])
def test_each_operation_has_a_name(name):
    "A function with its own entry in the documentation, which a lambda is not."
    module, _, what = name.partition(".")
    modules = {"norms": norms, "rotation": rotation, "activation": activation, "head_norms": head_norms}
    found = getattr(modules[module], what)
    assert found.__name__ == what and found.__doc__
