"Experts in groups against the loop: values, gradients, what autograd keeps, and on a GPU a graph that never waits."
import weakref

import families
import pytest
import torch
from test_fused import gradients
from test_fused_families import CASES, NAMES, made

from conftest import devices
from qlora_lab.engine import dispatch, expert_rows
from qlora_lab.engine import grouped_experts as groups
from qlora_lab.engine.expert_adapters import adapt_experts
from qlora_lab.engine.experts import quantize_experts
from qlora_lab.engine.fusing import fuse_layers
from qlora_lab.engine.gpu import triton
from qlora_lab.linear4bit import saved_for_backward

GATED = ["experts.gate_up_proj", "experts.down_proj"]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def model_of(family, rank=4, targets=GATED, device="cpu", dtype=torch.float32, quantize=True):
    from peft import LoraConfig
    model = families.build(family, dtype=dtype).to(device).requires_grad_(False)
    if quantize: quantize_experts(model)
    if not rank: return model
    config = LoraConfig(r=rank, lora_alpha=7, target_modules=[], target_parameters=list(targets))
    for adapter in adapt_experts(model, config).values():
        torch.nn.init.normal_(adapter.lora_B.weight, std=0.1)
    return model


def by(twin, model, **kw):
    "Logits and all gradients with `experts` done by a twin, None for the loop; and how often it did not decline."
    counted = []
    def count(*args):
        counted.append(twin(*args))
        return counted[-1]
    device = next(model.parameters()).device
    embedded = model.get_input_embeddings()(families.ids(**kw).to(device)).detach().requires_grad_()
    with dispatch.standing_in({("experts", device.type): twin and count}):
        logits = model(inputs_embeds=embedded).logits
        wanted = [embedded, *(p for p in model.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(logits.float().square().sum(), wanted)
    return [logits.detach(), *gradients], sum(y is not None for y in counted)


@pytest.mark.parametrize("most", [1 << 30, 40000, 1])
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3"])
def test_equals_the_loop(family, rank, most, monkeypatch):
    "At once, some at a time and one by one; with biases, clamped gates and stored transposed as gpt-oss has it."
    monkeypatch.setattr(groups, "MOST", most)
    model = model_of(family, rank)
    (got, times), (right, _) = by(groups.grouped_experts, model), by(None, model)
    assert times == sum("Experts" in type(m).__name__ and hasattr(m, "down_proj") for m in model.modules()) > 0
    assert len(got) == len(right)
    for a, b in zip(got, right, strict=True): assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-9


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="Triton's interpreter, for CPUs")
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_kernels_equal_the_loop(family, rank, monkeypatch):
    "The same with what runs on a card in place of torch's operations, run one program after the other."
    for name in ("combine", "shared_gate_backward"):
        monkeypatch.setattr(groups, name, getattr(expert_rows, f"{name}_kernel"))
    model = model_of(family, rank)
    (got, times), (right, _) = by(groups.grouped_experts, model), by(None, model)
    assert times == 2
    for a, b in zip(got, right, strict=True): assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-9


@pytest.mark.parametrize("targets", [GATED[:1], GATED[1:]])
def test_an_adapter_on_one_of_two(targets):
    model = model_of("gpt_oss", 4, targets, quantize=False)
    if targets == GATED[:1]: quantize_experts(model)  # the other one, packed
    (got, times), (right, _) = by(groups.grouped_experts, model), by(None, model)
    assert times == (2 if targets == GATED[:1] else 0)  # a dense parameter beside held ones is left to the loop
    for a, b in zip(got, right, strict=True): assert (a - b).abs().max() < 1e-5 * b.abs().max() + 1e-9


def test_experts_without_rows():
    "Two tokens choose four of eight experts; the others get gradients of zero."
    model = model_of("qwen3_moe", 4)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(8, 64, requires_grad=True)
    chosen, share = torch.tensor([[0, 2]] * 8), torch.rand(8, 2, requires_grad=True)
    wanted = [x, share, *(p for p in experts.parameters() if p.requires_grad)]
    results = []
    for twin in (groups.grouped_experts, None):
        with dispatch.standing_in({("experts", "cpu"): twin}):
            results.append(torch.autograd.grad(experts(x, chosen, share).square().sum(), wanted))
    for a, b in zip(*results, strict=True): assert (a - b).abs().max() < 1e-5 * b.abs().max()
    a = results[0][2].view(4, 4, -1)
    assert a[1].abs().max() == 0 and a[0].abs().max() > 0


def test_declines_what_it_does_not_do():
    "Few rows, autocast, float16, widths that the product does not take, biases that learn, experts that are not held."
    model = model_of("gpt_oss", 0)
    experts = model.model.layers[0].mlp.experts
    x, chosen, share = torch.randn(8, 64), torch.zeros(8, 2, dtype=torch.long), torch.rand(8, 2)
    assert groups.grouped_experts(experts, x, chosen, share) is not None
    assert groups.grouped_experts(experts, x[:1], chosen[:1], share[:1]) is None
    assert groups.grouped_experts(experts, x.half(), chosen, share) is None
    with torch.autocast("cpu"): assert groups.grouped_experts(experts, x, chosen, share) is None
    experts.down_proj_bias.requires_grad_(True)
    assert groups.grouped_experts(experts, x, chosen, share) is None
    plain = families.build("mixtral").model.layers[0].mlp.experts
    assert groups.grouped_experts(plain, x, chosen, share) is None
    odd = families.build("mixtral", intermediate_size=42)
    quantize_experts(odd)
    assert groups.grouped_experts(odd.model.layers[0].mlp.experts, x, chosen, share) is None
    assert families.logits(odd).isfinite().all()


def test_keeps_what_it_says():
    "x, shares, u, and what sorts; no rows, no h, nothing decoded."
    model = model_of("qwen3_moe", 0)
    experts = model.model.layers[0].mlp.experts
    tokens, each, hidden, width = 64, 2, 64, 64
    x, share = torch.randn(tokens, hidden, requires_grad=True), torch.rand(tokens, each, requires_grad=True)
    chosen = torch.arange(tokens * each).view(tokens, each) % 4
    with dispatch.standing_in({("experts", "cpu"): groups.grouped_experts}), saved_for_backward(experts) as kept:
        experts(x, chosen, share)
    rows = tokens * each
    assert sum(n for *_, n in kept.values()) == 4 * (x.numel() + rows + 2 * width * rows) + 17 * rows + 4 * 4


def test_meta_tensors_pass():
    "A plan takes the same path with tensors that have shapes alone, also where not all experts fit at once."
    from transformers import AutoModelForCausalLM
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(families.FAMILIES["qwen3_moe"]())
    quantize_experts(model)
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    for most in (1 << 30, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(groups, "MOST", most)
            assert model(input_ids=ids).logits.shape == (2, 16, 320)


@gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("most", [1 << 30, 1])
def test_equals_the_loop_on_a_gpu(family, most, monkeypatch):
    "In float32 up to rounding; in bfloat16 no farther from that than the loop is, in values and gradients."
    monkeypatch.setattr(groups, "MOST", most)
    model = model_of(family, 8, device="cuda", dtype=torch.bfloat16)
    how = dict(rows=4, length=64)
    (got, times), (loop, _) = by(groups.grouped_experts, model, **how), by(None, model, **how)
    assert times == 2
    exact, (near, _) = by(None, model.float(), **how)[0], by(groups.grouped_experts, model, **how)
    for a, b in zip(near, exact, strict=True): assert (a - b).norm() < 1e-4 * b.norm() + 1e-9
    far = [[((t.float() - e).norm() / (e.norm() + 1e-9)).item() for t, e in zip(ts, exact)] for ts in (got, loop)]
    assert max(far[0]) < 2 * max(far[1]) + 1e-3, far


@gpu
def test_recorded_in_a_graph():
    "Forward and backward of a layer's experts, recorded once and played with other tokens and another choice."
    model = model_of("qwen3_moe", 8, device="cuda", dtype=torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    share = torch.rand(64, 2, device="cuda", dtype=torch.bfloat16)
    chosen = torch.rand(64, 4, device="cuda").argsort(1)[:, :2].contiguous()
    trained = [x, *(p for p in experts.parameters() if p.requires_grad)]
    def step(): return torch.autograd.grad(groups.grouped_experts(experts, x, chosen, share).float().sum(), trained)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream): step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): recorded = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        chosen.copy_(torch.rand(64, 4, device="cuda").argsort(1)[:, :2])
    graph.replay()
    for a, b in zip(recorded, step(), strict=True): torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


FAMILIES_WITH_EXPERTS = [(name, more) for name, (_, more) in zip(NAMES, CASES) if "expert" in str(more)]


@pytest.mark.parametrize("name, more", FAMILIES_WITH_EXPERTS)
def test_a_second_run_leaves_the_second_product_out(name, more, monkeypatch):
    "Of checkpointed fused layers, with the same bits; what it decodes serves the way back. Not where a hook looks."
    model = fuse_layers(quantize_experts_of(made(name.split(",")[0], more, True)))
    seen, calls, real = [], [], groups.decoded
    monkeypatch.setattr(groups, "decoded", lambda *a: (calls.append(a), real(*a))[1])
    def passes():
        calls.clear()
        return gradients(model), len(calls)
    with dispatch.standing_in({("experts", "cpu"): groups.grouped_experts}):
        found, few = passes()
        experts = [m for m in model.modules() if hasattr(m, "down_proj") and "Experts" in type(m).__name__]
        hooks = [m.register_forward_hook(lambda m, args, out: seen.append(out.abs().max().item())) for m in experts]
        watched, many = passes()
        for hook in hooks: hook.remove()
    assert few == 4 * len(experts) and many == 6 * len(experts) and torch.equal(found, watched)
    assert len(seen) == 2 * len(experts) and min(seen) > 0


@gpu
@pytest.mark.parametrize("name, more", FAMILIES_WITH_EXPERTS)
def test_a_checkpointed_model_on_a_gpu(name, more):
    "Fused, in bfloat16, with second runs for their graph alone: no farther from float32 than the loop is."
    model = made(name.split(",")[0], more, True, device="cuda", dtype=torch.bfloat16)
    model, found = fuse_layers(quantize_experts_of(model)), []
    for twin in (groups.grouped_experts, None):
        with dispatch.standing_in({("experts", "cuda"): twin}): found.append(gradients(model, 64)[1:])
    with dispatch.standing_in({("experts", "cuda"): None}): exact = gradients(model.float(), 64)[1:]
    far = [((g - exact).norm() / exact.norm()).item() for g in found]
    assert far[0] < 1.5 * far[1] + 1e-3, far


def test_what_is_handed_over_goes():
    "The decoded experts of a second run: used once by the way back, then nobody's; a second way back decodes anew."
    model, held = model_of("qwen3_moe", 4), []
    experts = model.model.layers[0].mlp.experts
    x, chosen, share = torch.randn(8, 64, requires_grad=True), torch.tensor([[0, 2]] * 8), torch.rand(8, 2)
    with pytest.MonkeyPatch.context() as patch, groups.graph_alone():
        real = groups.decoded
        patch.setattr(groups, "decoded", lambda *a: (made := real(*a), held.append(weakref.ref(made)))[0])
        y = groups.grouped_experts(experts, x, chosen, share)
        assert len(held) == 1 and held[0]() is not None
        first, = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert len(held) == 2 and not any(ref() is not None for ref in held)
        again, = torch.autograd.grad(y, x, torch.ones_like(y))
        assert len(held) == 4 and torch.equal(first, again)


def quantize_experts_of(model):
    quantize_experts(model)
    return model


@pytest.mark.parametrize("device", devices())
def test_sorted_rows(device):
    chosen = torch.tensor([[3, 1], [0, 3], [3, 0]], device=device)
    rows = groups.sort_rows(chosen, 5)
    assert rows.expert.tolist() == [0, 0, 1, 3, 3, 3] and rows.ends.tolist() == [2, 3, 3, 6, 6]
    assert rows.order.tolist() == [2, 5, 1, 0, 3, 4]
    y = torch.arange(6., device=device)[:, None]
    assert torch.equal(groups.unsort(y[rows.order], rows), y)
