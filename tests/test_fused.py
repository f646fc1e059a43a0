"""A layer by hand is the layer: values, gradients and memory of fused layers, on a CPU by plain operations, on a GPU by kernels.

Protects: every product and sum of the hand-written backward pass, and what is left to the plain path.
"""
import statistics

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import devices
from qlora_lab import fused
from qlora_lab.checkpointing import MemoryTimeline, checkpoint_layers, decoder_layers
from qlora_lab.fused import Group, adapter_gradients, fits, fuse_layers, group_backward, group_forward, is_fused
from qlora_lab.linear4bit import Linear4bit, quantize_model, saved_for_backward
from qlora_lab.lora import LoRALinear, add_lora, trainable
from qlora_lab.records import LabError
from qlora_lab.engine.dispatch import use_kernels

there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(fused.triton is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    use_kernels()


def small(family="llama", targets="all-linear", device="cpu", dtype=torch.float32, dropout=0., compute=None, seed=0, rank=4, **more):
    torch.manual_seed(seed)
    config = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, sliding_window=None) | more
    model = quantize_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)), compute_dtype=compute)
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
    def filled(make): return lambda *args, **kwargs: t.fill_(torch.nan) if (t := make(*args, **kwargs)).is_floating_point() else t
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")): monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def ids(device, tokens=24): return torch.randint(0, 128, (2, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def gradients(model, tokens=24, **kwargs):
    "Loss and all gradients in one vector."
    for p in model.parameters(): p.grad = None
    given = ids(next(model.parameters()).device, tokens)
    loss = F.cross_entropy(model(input_ids=given, use_cache=False, **kwargs).logits[:, :-1].flatten(0, 1).float(), given[:, 1:].flatten())
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.float().flatten() for p in trainable(model))])


def off(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("targets, rank", [("all-linear", 4), (["q_proj", "v_proj", "down_proj"], 4), (["k_proj", "up_proj", "o_proj"], 8), (["v_proj", "gate_proj"], 16)], ids=["all", "some", "others", "few"])
@pytest.mark.parametrize("family, more", [("llama", {}), ("llama", dict(num_key_value_heads=4, intermediate_size=100, head_dim=8)), ("mistral", {}), ("qwen2", {})], ids=["llama", "odd", "mistral", "qwen2"])
def test_fused_layers_are_the_plain_ones(family, more, targets, rank, again, device, rubbish):
    "Biases, shared keys, layers without adapters, ranks that fill the room and that do not, widths that no tile divides; kept or computed a second time."
    use_kernels(False)
    plain = gradients(small(family, targets, device, rank=rank, **more))
    use_kernels()
    model = checkpoint_layers(small(family, targets, device, rank=rank, **more), again)
    assert fuse_layers(model) is model and all(map(is_fused, decoder_layers(model)))
    assert off(gradients(model), plain) < 1e-5


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("again", [False, True])
def test_fused_layers_round_no_worse_than_plain_ones(again, device):
    "Gradients in bfloat16 against float32, over several models: flash attention, the kernels, and sums inside products."
    ratios = []
    for seed in range(6):
        use_kernels(False)
        exact, plain = (gradients(small(device=device, dtype=d, seed=seed))[1:] for d in (torch.float32, torch.bfloat16))
        use_kernels()
        model = fuse_layers(checkpoint_layers(small(device=device, dtype=torch.bfloat16, seed=seed), again))
        ratios.append(off(gradients(model)[1:], exact) / off(plain, exact))
        assert off(plain, exact) < 0.1
    assert statistics.median(ratios) < 1.25  # the adapters, float32 here, are multiplied in bfloat16 too


def test_a_fused_layer_is_used(monkeypatch):
    "Without this, every comparison above could be of the plain path with itself."
    used, real = [], fused.attend
    monkeypatch.setattr(fused, "attend", lambda *args: used.append(1) or real(*args))
    gradients(fuse_layers(checkpoint_layers(small())))
    assert len(used) == 6  # three layers, each twice


def test_what_does_not_fit():
    assert fuse_layers(small("qwen3", head_dim=16)) is None  # norms of queries and keys
    assert fuse_layers(small(dropout=0.1)) is None
    assert fuse_layers(small(hidden_act="gelu")) is None
    assert fuse_layers(small(compute=torch.bfloat16)) is None
    trained = small("qwen2")
    decoder_layers(trained)[1].self_attn.q_proj.base_layer.bias.requires_grad_()
    assert fuse_layers(trained) is None and not any(map(is_fused, decoder_layers(trained)))
    plain = add_lora(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)), LoraConfig(r=4, target_modules="all-linear"))
    assert fuse_layers(plain) is None and not fits(nn.Linear(2, 2))
    assert fuse_layers(small(attention_dropout=0.5)) is None
    with pytest.warns(UserWarning, match="float16: decoder layers stay"): assert fuse_layers(small(dtype=torch.float16)) is None
    wrapped = small()
    wrapped.model.layers[0].forward = wrapped.model.layers[0].forward  # another library's
    assert fuse_layers(wrapped) is None


@pytest.mark.parametrize("family, more", [("granite", dict(residual_multiplier=0.3, attention_multiplier=0.2)), ("smollm3", dict(pad_token_id=0)), ("helium", dict(head_dim=16)), ("seed_oss", {}), ("ernie4_5", {})],
                         ids=lambda v: v if isinstance(v, str) else "")
def test_families_that_look_alike_stay_plain(family, more):
    "They scale, turn or drop something on the way."
    assert fuse_layers(small(family, **more)) is None


def test_what_goes_the_plain_way():
    "Padding in front, a cache, autocast, a window shorter than the sequence: as without fusing."
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    model, plain = fuse_layers(small()), small()
    assert torch.equal(gradients(model, attention_mask=mask), gradients(plain, attention_mask=mask))
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(gradients(model), gradients(plain))
    window = [f(small("mistral", sliding_window=8)) for f in (fuse_layers, lambda m: m)]
    assert torch.equal(*map(gradients, window)) and not decoder_layers(window[0])[0]._fused.takes(9, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        whole = [m.eval().generate(ids("cpu")[:, :6], max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, plain)]
    assert torch.equal(*whole)


def test_a_fused_layer_can_be_taken_back():
    "Checkpointing that is taken off takes the fused layer with it; fusing twice is fusing once."
    model, plain = small(), gradients(small())
    fuse_layers(fuse_layers(checkpoint_layers(model)))
    assert off(gradients(model), plain) < 1e-5
    checkpoint_layers(model, on=False)
    assert not any(map(is_fused, decoder_layers(model))) and torch.equal(gradients(model), plain)


def test_what_changes_after_fusing_counts():
    "Adapters added later, another scaling, another dtype: the plain way or the new value, never the old one."
    model = quantize_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)))
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
        decoder_layers(model)[0](x.transpose(0, 1).contiguous().transpose(0, 1), position_embeddings=cos).sum().backward()
        found.append(x.grad)
    assert off(*found) < 1e-5


@pytest.mark.parametrize("again", [False, True])
def test_large_weights_are_decoded_a_layer_at_a_time(again, monkeypatch):
    "Values and gradients stay; the peak is lower."
    found, peaks = [], []
    for piece in (1 << 30, 0):
        monkeypatch.setattr(fused, "PIECE", piece)
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
    with torch.autograd.graph.save_on_cpu(): loss = F.cross_entropy(model(input_ids=ids("cpu"), use_cache=False).logits[:, :-1].flatten(0, 1).float(), ids("cpu")[:, 1:].flatten())
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


@pytest.mark.parametrize("piece", [0, 1 << 30], ids=["pieces", "whole"])
def test_a_group_without_adapters_and_onto_something(piece, monkeypatch):
    "A frozen layer passes the gradient on; a residual and a bias are summed in."
    monkeypatch.setattr(fused, "PIECE", piece)
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
@pytest.mark.parametrize("ranks, room", [((8, 0, 16), 24), ((1, 2, 0), 8), ((0, 0, 5), 8), ((8, 0, 0), 8), ((0, 16, 0), 16), ((8, 8, 8), 24)], ids=str)
def test_room_is_for_adapters_alone(ranks, room, piece, monkeypatch, rubbish):
    "Some layers adapted, others not, one bias among them; nothing of what lay in the room before reaches a result."
    monkeypatch.setattr(fused, "PIECE", piece)
    torch.manual_seed(0)
    layers = [Linear4bit.from_linear(nn.Linear(64, n, bias=n == 40)) for n in (32, 96, 40)]
    layers = [LoRALinear(layer, r=r, alpha=2 * r) if r else layer for layer, r in zip(layers, ranks)]
    for layer in layers:
        if isinstance(layer, LoRALinear): nn.init.normal_(layer.lora_B.weight); layer.scaling = 2.
    group, x, g = Group(*layers), torch.randn(5, 64, requires_grad=True), torch.randn(5, 168)
    expected = torch.cat([layer(x) for layer in layers], 1)
    wanted = torch.autograd.grad(expected, [x, *group.params], g)
    def rubbish(t): return torch.cat([t.detach(), torch.full((5, group.room), torch.nan)], 1)
    with torch.no_grad():
        read, grad = rubbish(x), rubbish(g)
        y = group_forward(group, read)
        group.fill_back(grad)
        found = group_backward(group, grad, torch.full((5, 64), torch.nan)), *adapter_gradients(group, grad, read)
    assert group.room == room == y.shape[1] - 168 and torch.allclose(y[:, :168], expected, atol=1e-5)
    assert all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in zip(found, wanted, strict=True))


def normal(*shape, seed=0, dtype=torch.float32): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(there, dtype)


@needs_triton
@pytest.mark.parametrize("rows, width", [(1, 8), (5, 64), (3, 1000), (2, 1025)])
def test_kernels_between_the_products(rows, width):
    "Rows and tiles that no power of two fills; by Triton's interpreter without a GPU."
    x, g, around, w = normal(rows, width), normal(rows, width, seed=1), normal(rows, width, seed=2), normal(width, seed=3)
    def wider(t, more=8): return torch.cat([t, torch.full((rows, more), 7., device=there)], 1)[:, :t.shape[1]]
    for room in (0, 8):
        (y, rstd), (plain, r) = (f(x, w, 1e-5, room) for f in (fused.rms_norm_kernel, fused.rms_norm_plain))
        assert y.shape == plain.shape == (rows, width + room) and torch.allclose(y[:, :width], plain[:, :width], atol=1e-5) and torch.allclose(rstd, r)
        grads = [f(g, x, w, rstd, wider(around), room) for f in (fused.rms_norm_backward_kernel, fused.rms_norm_backward_plain)]
        assert torch.allclose(*(t[:, :width] for t in grads), atol=1e-4) and grads[0].shape == (rows, width + room)
        gate_up, outs, grads = wider(normal(rows, 2 * width), room), [torch.full((rows, 2 * width), 7., device=there) for _ in range(2)], [wider(g, room).clone() for _ in range(3)]
        assert torch.allclose(fused.swiglu_kernel(gate_up, room)[:, :width], fused.swiglu_plain(gate_up), atol=1e-5)
        for f, grad, out in zip((fused.swiglu_backward_kernel, fused.swiglu_backward_plain), grads, outs): f(grad, gate_up, out)
        assert torch.allclose(*outs, atol=1e-5) and torch.allclose(*grads[:2], atol=1e-5) and torch.allclose(grads[0], fused.swiglu_plain(gate_up), atol=1e-5)
        whole = torch.cat([gate_up, torch.full((rows, 8), 7., device=there)], 1)
        fused.swiglu_backward_kernel(grads[2], whole[:, :2 * width], whole[:, :2 * width])
        assert torch.equal(whole[:, :2 * width], outs[0]) and (whole[:, 2 * width:] == 7).all()  # written over what it read, and not over the rest


@needs_triton
@pytest.mark.parametrize("heads, size, positions, rows", [(1, 8, 4, 4), (3, 16, 5, 10), (4, 24, 6, 6)])
def test_rotation_and_back(heads, size, positions, rows):
    "In place and out of place, a part of wider rows, angles shared by a batch; and turning back undoes it."
    wide, turn = normal(rows, heads * size + 8), normal(1, positions, size // 2)
    cos, sin = (torch.cat([f(turn)] * 2, -1) for f in (torch.cos, torch.sin))
    part, out, plain = wide[:, :heads * size], torch.zeros(rows, heads * size + 3, device=there)[:, :heads * size], torch.zeros(rows, heads * size, device=there)
    fused.rotate_kernel(part, out, cos, sin, heads, 1)
    fused.rotate_plain(part, plain, cos, sin, heads, 1)
    assert torch.allclose(out, plain, atol=1e-6)
    strange = part.clone()
    strange[0, 0], strange[-1, -1] = torch.inf, -torch.inf
    fused.rotate_kernel(strange, out, cos, sin, heads, 0)
    assert torch.equal(strange, out)
    before = wide.clone()
    for sign in (1, -1): fused.rotate_kernel(part, part, cos, sin, heads, sign)
    assert torch.allclose(wide, before, atol=1e-6) and torch.equal(wide[:, heads * size:], before[:, heads * size:])
