"Scales, codes and layers that are chosen: less error in bitsandbytes' own bytes, budgets kept, clear refusals."
import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from conftest import devices, make_llama
from qlora_lab.bnb_files import save_quantized
from qlora_lab.data import Example, Tokens
from qlora_lab.divergence import divergence, said
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine import calibrated
from qlora_lab.engine.chosen_scales import chosen_4bit, chosen_together, sayable, with_chosen_scales
from qlora_lab.engine.dispatch import standing_in
from qlora_lab.engine.off_grid import off_grid
from qlora_lab.engine.sensitivity import estimated, measured, within_bytes
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import add_lora
from qlora_lab.model import load_model
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread")


def weight(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(n, width, seed=0):
    "Of which a few directions carry most."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)
    return torch.randn(n, width, generator=g) @ mix.T


def squared(q, w): return (q.dequantize(torch.float32) - w).square().sum()


def off(q, w, x): return ((q.dequantize(torch.float32) - w) @ x.T).square().sum()


def rows_of(model, n=4, length=24):
    return list(torch.randint(0, model.config.vocab_size, (n, length), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_chosen_scales_lower_the_error_and_keep_the_bytes(quant_type, double_quant, device):
    w = weight(48, 256).to(device)
    plain, q = (make(w, quant_type, 64, double_quant) for make in (quantize_4bit, chosen_4bit))
    assert squared(q, w) < 0.95 * squared(plain, w)
    assert (q.nbytes, q.shape, q.dtype, q.stats.dtype) == (plain.nbytes, plain.shape, plain.dtype, plain.stats.dtype)
    if double_quant: assert torch.equal(q.absmax2, plain.absmax2) and torch.equal(q.offset, plain.offset)
    if quant_type != "int4":
        packed, state = q.to_bitsandbytes()
        assert torch.equal(bnb.dequantize_4bit(packed, state), q.dequantize())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_that_share_their_errors(quant_type, device):
    w, x = weight(32, 192).to(device), inputs(2000, 192).to(device)
    seen, new = x[:1500], x[1500:]
    plain, scales = quantize_4bit(w, quant_type), chosen_4bit(w, quant_type)
    q = chosen_4bit(w, quant_type, h=seen.T @ seen)
    assert off(q, w, new) < 0.5 * off(plain, w, new) and off(q, w, new) < off(scales, w, new)
    assert squared(q, w) > squared(scales, w)  # the price: the weight itself is farther off
    packed, state = q.to_bitsandbytes()
    assert torch.equal(bnb.dequantize_4bit(packed, state), q.dequantize())


def test_layers_with_the_same_inputs_are_what_they_are_alone():
    x = inputs(600, 128)
    h, weights = x.T @ x, [weight(24, 128, seed=i) for i in range(3)]
    together = chosen_together(weights, ("nf4", 64, True), h)
    for w, q in zip(weights, together):
        alone = chosen_4bit(w, h=h)
        assert off(q, w, x) == pytest.approx(off(alone, w, x).item(), rel=0.02)  # sums may be rounded otherwise


@pytest.mark.parametrize("shape", [(5, 100), (3, 7), (64, 64)])
def test_odd_shapes_zeros_and_dead_inputs(shape):
    w = weight(*shape)
    w[0] = 0
    h = torch.zeros(shape[1], shape[1])
    for q in (chosen_4bit(w), chosen_4bit(w, h=h), chosen_4bit(w, h=torch.eye(shape[1]))):
        assert torch.isfinite(q.dequantize()).all() and squared(q, w) < 1.01 * squared(quantize_4bit(w), w)
    assert torch.equal(chosen_4bit(torch.zeros(2, 64)).dequantize(), torch.zeros(2, 64))


def test_only_what_can_be_stored_is_chosen():
    w = weight(64, 256)
    q = with_chosen_scales(quantize_4bit(w), w)
    stats, values = sayable(q, q.absmax)
    assert torch.equal(stats, q.stats) and torch.equal(values, q.absmax)
    best = torch.stack([squared(with_chosen_scales(quantize_4bit(w), w, multiples=(m,)), w) for m in (0.7, 0.9, 1.)])
    assert squared(q, w) < best.min()


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_with_chosen_scales(double_quant):
    model, plain, chosen = (make_llama(layers=2) for _ in range(3))
    rows = rows_of(model, 16, 48)
    quantize_model(plain, double_quant=double_quant)
    quantize_model(chosen, double_quant=double_quant, scales="chosen", calibration=rows)
    with torch.no_grad(): wanted, *said = (m(torch.stack(rows)).logits for m in (model, plain, chosen))
    assert (said[1] - wanted).norm() < 0.75 * (said[0] - wanted).norm()
    assert sum(t.nbytes for t in chosen.state_dict().values()) == sum(t.nbytes for t in plain.state_dict().values())
    free = quantize_model(make_llama(layers=2), double_quant=double_quant, scales="chosen")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(free.get_submodule(name).quantized.dequantize(),
                       chosen_4bit(model.get_submodule(name).weight, double_quant=double_quant).dequantize())


def test_large_models_are_calibrated_in_pieces(monkeypatch):
    "Each layer on its own, behind those that are quantized: the first reads what it read, the last something else."
    whole, model = make_llama(layers=2), make_llama(layers=2).train()
    rows = rows_of(model)
    quantize_model(whole, scales="chosen", calibration=rows)
    monkeypatch.setattr(calibrated, "ROOM", 1)
    quantize_model(model, scales="chosen", calibration=rows)
    assert sum(type(m) is Linear4bit for m in model.modules()) == 14 and model.training
    def same(name): return torch.equal(model.get_submodule(name).weight, whole.get_submodule(name).weight)
    assert same("model.layers.0.self_attn.q_proj") and not same("model.layers.1.mlp.down_proj")
    by_hand = make_llama(layers=2)  # the first decoder layer rounded, and the sums of the second taken then
    for n, m in model.model.layers[0].named_modules():
        if type(m) is Linear4bit: by_hand.model.layers[0].get_submodule(n).weight.data = m.quantized.dequantize()
    layer = by_hand.model.layers[1].self_attn.q_proj
    h = calibrated.gathered(by_hand, [layer], [r[None] for r in rows])[layer]
    found, wanted = model.model.layers[1].self_attn.q_proj.quantized, chosen_4bit(layer.weight, h=h)
    assert (found.packed != wanted.packed).float().mean() < 0.02  # sums may be rounded otherwise


def test_no_graph_is_kept_of_calibration(monkeypatch):
    "Weights that could learn, as they can when their layers are quantized, keep no activation of a row."
    model, seen = make_llama(layers=1), []
    def forward(*args, real=model.forward, **kwargs):
        out = real(*args, **kwargs)
        seen.append(out.logits.requires_grad)
        return out
    model.forward = forward
    assert all(p.requires_grad for p in model.parameters())
    quantize_model(model, scales="chosen", calibration=rows_of(model))
    assert seen == [False] * 4


def test_a_calibration_that_breaks_off_leaves_the_mode():
    model = make_llama(layers=1).train()
    def breaks(*_): raise ZeroDivisionError
    model.lm_head.register_forward_pre_hook(breaks)
    with pytest.raises(ZeroDivisionError): quantize_model(model, scales="chosen", calibration=[torch.tensor([5])])
    assert model.training


@pytest.mark.parametrize("how", [dict(scales="chosen"), dict(keep=30_000), dict(keep=("down_proj",))])
def test_a_chosen_model_is_saved_trained_and_opened_as_any(how, tiny, tmp_path):
    exact = dict(dtype=torch.float32, compute_dtype=torch.float32, device="cpu")
    if how.get("keep") != ("down_proj",): how = how | {"calibration": ["read the file", "return the sum of the list"]}
    model, tokenizer = load_model(tiny, **how, **exact)
    save_quantized(model, tmp_path / "saved", tokenizer)
    again, theirs = (load_model(tmp_path / "saved", backend=b, **exact)[0] for b in ("lab", "bnb"))
    ids = torch.arange(12)[None]
    with torch.no_grad(): logits, *found = (m(ids).logits for m in (model, again, theirs))
    assert torch.equal(found[0], logits) and torch.allclose(found[1], logits, atol=1e-4)
    from peft import LoraConfig
    add_lora(model, LoraConfig(r=2, target_modules="all-linear"))(ids, labels=ids).loss.backward()


@pytest.mark.filterwarnings("error")
def test_keep_by_name_and_by_bytes(tiny):
    model = make_llama(layers=2)
    quantize_model(model, keep=("down_proj", "model.layers.0.self_attn.q_proj"))
    kept = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert kept == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
                    "model.layers.0.self_attn.q_proj"}
    model = load_model(tiny, keep=40_000, calibration=["read the file", "sort the list"], device="cpu")[0]
    kept = [m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    assert kept and 30_000 < sum(2 * m.weight.numel() for m in kept) <= 40_000


def test_the_estimate_is_the_measured_divergence():
    model = make_llama(layers=2)
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    rows = [r[None] for r in rows_of(model, 48, 16)]
    asked = [p.requires_grad_(i % 2 > 0).requires_grad for i, p in enumerate(model.parameters())]
    grads = [torch.full_like(p, i) if i % 3 else None for i, p in enumerate(model.parameters())]
    for p, grad in zip(model.parameters(), grads): p.grad = grad
    before = [p.detach().clone() for p in model.parameters()]
    def nats(f, rows): return torch.tensor([sum(v) / len(v) for v in f(model, rows, layers).values()])
    one, other = nats(estimated, rows), nats(measured, [scored(r[0]) for r in rows])
    assert (one.sum() / other.sum()).item() == pytest.approx(1, abs=0.3)
    assert torch.corrcoef(torch.stack([one.log(), other.log()]))[0, 1] > 0.8
    assert [p.requires_grad for p in model.parameters()] == asked
    for i, (p, grad) in enumerate(zip(model.parameters(), grads)):
        assert p.grad is grad and (grad is None or bool((grad == i).all()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def scored(ids): return Tokens(ids, torch.ones(len(ids), dtype=torch.bool), Example(()))


def test_layers_that_share_a_weight_cost_once():
    "What rounding the one weight of two layers costs stands under the first name; with all layers it is kept or not."
    model = make_llama(layers=2)
    for p in model.parameters(): p.data *= 4 if p.dim() > 1 else 1
    one, other = (f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
    model.get_submodule(other).weight = model.get_submodule(one).weight
    layers = {n: m for n, m in model.named_modules() if n in (one, other)}
    rows = [r[None] for r in rows_of(model, 48, 16)]
    found = estimated(model, rows, layers)
    w, before = model.get_submodule(one).weight, model.get_submodule(one).weight.detach().clone()
    reference = said(model, held := [scored(r[0]) for r in rows])
    with torch.no_grad():
        w.copy_(quantize_4bit(before).dequantize())
        exact = divergence(reference, said(model, held)).loss
        w.copy_(before)
    assert sum(found[one]) / 48 == pytest.approx(exact, rel=0.5) and found[other] == [0.] * 48
    quantize_model(model, keep=2 * w.numel(), calibration=rows)
    assert type(model.get_submodule(one)) is type(model.get_submodule(other))


def test_a_weight_is_put_back_where_measuring_breaks_off():
    model = make_llama(layers=1)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.clone()
    layer.register_forward_hook(Breaking())
    with pytest.raises(Breaking.Off): measured(model, [scored(torch.arange(6))], {"q": layer})
    assert torch.equal(layer.weight, before)


class Breaking:
    "A hook that lets the first pass through."
    class Off(Exception): pass
    def __init__(self): self.passes = 0

    def __call__(self, *_):
        self.passes += 1
        if self.passes > 1: raise self.Off


def test_a_budget_takes_the_most_for_a_byte_and_shared_weights_together():
    model = nn.ModuleDict({n: nn.Linear(8, size, bias=False) for n, size in (("a", 8), ("b", 16), ("c", 8), ("d", 4))})
    model.c.weight = model.a.weight
    layers, nats = dict(model.items()), {"a": 1., "b": 2.5, "c": 1., "d": 0.1}
    assert within_bytes(model, layers, nats, 128) == ["a", "c"]
    assert within_bytes(model, layers, nats, 128 + 256) == ["a", "c", "b"]
    assert within_bytes(model, layers, nats, 128 + 64) == ["a", "c", "d"]  # b does not fit
    assert within_bytes(model, layers, nats, 0) == []


def test_off_the_grid_the_model_is_the_same():
    model, same = make_llama(layers=2), make_llama(layers=2)
    off_grid(same)
    ids = torch.arange(20)[None]
    with torch.no_grad(): assert torch.allclose(same(ids).logits, model(ids).logits, atol=1e-5)
    for (n, p), q in zip(model.named_parameters(), same.parameters()):
        assert ("embed" in n or n == "model.norm.weight") == torch.equal(p, q)
    with pytest.raises(LabError, match="a Llama in float32"): off_grid(make_llama().bfloat16())


def test_wishes_that_cannot_be_met(tiny):
    model, rows = make_llama(), rows_of(make_llama())
    cases = [(dict(scales="best"), "scales='best': expected 'absmax' or 'chosen'"),
             (dict(calibration=rows), "scales='chosen' or keep=<bytes> alone"),
             (dict(keep=1000), "takes calibration="), (dict(keep=("gate",)), "is called gate"),
             (dict(keep=1e6, calibration=rows), "a whole number of bytes, or names"),
             (dict(keep=1e6, scales="chosen"), "a whole number of bytes, or names"),
             (dict(keep=True, calibration=rows), "a whole number of bytes, or names"),
             (dict(keep=("down_proj", 3)), "a whole number of bytes, or names"),
             (dict(keep=1000, calibration=[[]]), "none of them empty"),
             (dict(scales="chosen", calibration=[]), "at least one row"),
             (dict(scales="chosen", calibration=[[1, 5000]]), "a token has the number 5000"),
             (dict(keep=1000, calibration=[[-1]]), "a token has the number -1"),
             (dict(scales="chosen", calibration=[torch.tensor([], dtype=torch.long)]), "none of them empty")]
    for how, told in cases:
        with pytest.raises(LabError, match=told): quantize_model(model, **how)
    assert not any(type(m) is Linear4bit for m in model.modules())
    with standing_in({("choices", "cpu"): None}), pytest.raises(LabError, match="nothing chooses on cpu"):
        quantize_model(model, scales="chosen")  # as on a device for which there is no twin
    for how in (dict(quantize=None), dict(backend="bnb")):
        with pytest.raises(LabError, match="here it does not"): load_model(tiny, scales="chosen", device="cpu", **how)
