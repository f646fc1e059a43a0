"""The loss in pieces is the loss, and a batch filled up is the batch: for every family, head and dtype.

Protects: values and gradients against transformers' own logits; what is not known goes whole; which models look ahead.
"""
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from step_families import FAMILIES, family, gemma3_with_vision
from torch import nn

from qlora_lab import head_loss
from qlora_lab.engine import filled_up
from qlora_lab.engine.filled_up import causal, filled_loss, without_mask
from qlora_lab.engine.gpu import triton
from qlora_lab.engine.piecewise_loss import slopes_triton
from qlora_lab.head_loss import Head, in_pieces, place_losses, slopes, states_and_head
from qlora_lab.linear4bit import Linear4bit, saved_for_backward
from qlora_lab.lora import LoRALinear, trainable
from qlora_lab.train import activation_bytes, answer_losses, answer_places, summed_loss

pytestmark = pytest.mark.usefixtures("one_thread")
on_card = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
LENGTHS = (40, 27)  # longer than the windows of the small models


def ragged(lengths=LENGTHS):
    "Rows of different lengths, half of each learned."
    ids = torch.randint(2, 120, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    where, long = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    mask = (where < long).long()
    labels = torch.where((mask == 1) & (where >= long // 2), ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def made(name):
    return gemma3_with_vision() if name == "gemma3 with vision" else family(name)


def whole_losses(model, batch):
    "By transformers' own logits of all places."
    at, targets = answer_places(batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1)[at].float(), targets, reduction="none")


def gradients(loss, model):
    found = torch.autograd.grad(loss, trainable(model), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def alike(one, other, much=1e-5):
    assert one.norm() > 0 and (one - other).norm() < much * one.norm()


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3 with vision"])
def test_of_every_family(name):
    "In pieces of five places and filled up without a mask: losses and gradients are those of the model's own logits."
    model, batch = made(name), ragged()
    at, targets = answer_places(batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    whole = whole_losses(model, batch)
    weights = torch.linspace(0.5, 1.5, len(at))  # as of a caller who weighs tokens
    expected, pieces = gradients((whole * weights).sum(), model), place_losses(model, inputs, at, targets, piece=5)
    assert torch.allclose(pieces, whole, atol=1e-5, rtol=1e-5) and states_and_head(model, inputs) is not None
    alike(expected, gradients((pieces * weights).sum(), model))
    filled = filled_loss(model, batch)
    assert causal(model) and torch.allclose(filled, whole.sum(), rtol=1e-5)
    alike(gradients(whole_losses(model, batch).sum(), model), gradients(filled, model))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "granite", "cohere"])
def test_what_comes_after_the_head_matters(name):
    "The control: without it the losses are others."
    model, batch = family(name), ragged()
    at, targets = answer_places(batch)
    states, head = states_and_head(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
    assert head.steps and head.numbers() not in (None, (1., None))
    bare = in_pieces(states, at, targets, head._replace(steps=()))
    assert (bare - whole_losses(model, batch)).abs().max() > 0.1


def biased(model):
    model.lm_head = nn.Linear(32, 128).requires_grad_(False)
def in_4_bits(model): model.lm_head = Linear4bit.from_linear(model.lm_head)
def adapted(model):
    model.lm_head = LoRALinear(Linear4bit.from_linear(model.lm_head), r=4)
    nn.init.normal_(model.lm_head.lora_B.weight)
def learning(model): model.lm_head.requires_grad_()
def bias_that_learns(model):
    model.lm_head = nn.Linear(32, 128)
    model.lm_head.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [biased, in_4_bits, adapted, learning, bias_that_learns])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_kind_of_head(change, name):
    "Its own parameters get their gradient, where they learn."
    model, batch = family(name), ragged()
    change(model)
    at, targets = answer_places(batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    weights = torch.linspace(0.5, 1.5, len(at))
    whole, pieces = whole_losses(model, batch), place_losses(model, inputs, at, targets, piece=7)
    assert torch.allclose(pieces, whole, atol=1e-4)
    alike(*(gradients((nats * weights).sum(), model) for nats in (whole, pieces)))


@pytest.mark.parametrize("change", [biased, in_4_bits, adapted, learning, None])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_all_places_as_they_lie(change, name):
    "To the bit what chosen ones give; states stay as they were, and a second backward pass gives the same."
    model, batch = family(name), ragged((40, 40))
    if change: change(model)
    states, head = states_and_head(model, {k: batch[k] for k in ("input_ids", "attention_mask")})
    targets, own = batch["labels"].flatten(), [p for p in head.module.parameters() if p.requires_grad]
    states, found = states.detach().requires_grad_(), []
    before, weights = states.detach().clone(), torch.linspace(0.5, 1.5, len(targets))
    for at in (None, torch.arange(80)):
        nats = in_pieces(states, at, targets, head, 7)
        for keep in (True, False):
            grads = torch.autograd.grad((nats * weights).sum(), [states, *own], retain_graph=keep)
            found.append([nats.detach(), *grads])
    assert torch.equal(states, before) and found[0][1].norm() > 0
    for other in found[1:]: assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("lengths,copied", [((64, 64), False), ((60, 64), False), ((128,), False), ((128, 20), True)])
def test_where_all_are_learned_no_place_is_copied(lengths, copied, monkeypatch):
    "Filled up they are as many as there are; with a shorter row some are chosen. The loss is the plain one either way."
    model, batch, asked = family("llama"), ragged(lengths), []
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    def noted(states, at, *args, own=head_loss.in_pieces):
        asked.append(at)
        return own(states, at, *args)
    whole = whole_losses(model, batch).sum()
    monkeypatch.setattr(head_loss, "in_pieces", noted)
    loss = filled_loss(model, batch)
    assert (asked[-1] is not None) == copied and torch.allclose(loss, whole, rtol=1e-5)
    alike(gradients(whole, model), gradients(loss, model))


def test_a_head_that_peft_saves():
    "`modules_to_save` puts a copy that learns beside the frozen one."
    model, batch = family("llama"), ragged()
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    heads = [p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    whole, pieces = whole_losses(model, batch), answer_losses(model, batch)[0]
    expected, found = (torch.autograd.grad(nats.sum(), heads)[0] for nats in (whole, pieces))
    assert torch.allclose(whole, pieces, atol=1e-5) and torch.allclose(expected, found, atol=1e-4)


def test_what_is_not_known_goes_whole():
    "Logits that are cut, masked in place, mixed with others: noticed, and right."
    model, batch = family("llama"), ragged()
    own = type(model).forward
    def cut(logits): return logits[..., :125]
    def masked(logits):
        logits[..., :3] = -1e4
        return logits
    def mixed(logits): return logits + logits.flip(1)
    for change in (cut, masked, mixed):
        class Changed(type(model)):
            def forward(self, *args, change=change, **kwargs):
                out = own(self, *args, **kwargs)
                out.logits = change(out.logits)
                return out
        other = family("llama")
        other.__class__ = Changed
        assert torch.equal(answer_losses(other, batch)[0], whole_losses(other, batch))
        assert states_and_head(other, {"input_ids": batch["input_ids"]}) is None
    assert states_and_head(model, {"input_ids": batch["input_ids"]}) is not None


def test_a_piece_is_as_large_as_its_bytes(monkeypatch):
    "Whole 64s where they fit, at least one place; the result does not depend on it."
    sizes = []
    def noted(states, targets, head, learn, own=head_loss.piece_losses):
        sizes.append(len(states))
        return own(states, targets, head, learn)
    monkeypatch.setattr(head_loss, "piece_losses", noted)
    states, targets, found = torch.randn(300, 8), torch.randint(50, (300,)), []
    head = Head(nn.Linear(8, 50).requires_grad_(False), (), 200)
    for room, expected in ((200 * 130, [128, 128, 44]), (200 * 40, [40] * 7 + [20]), (1 << 20, [300]), (1, [1] * 300)):
        monkeypatch.setattr(head_loss, "PIECE", room)
        sizes.clear()
        found.append(in_pieces(states, torch.arange(300), targets, head))
        assert sizes == expected
    assert all(torch.allclose(found[0], nats, atol=1e-5) for nats in found)


def test_only_a_piece_is_there_and_nothing_of_it_is_kept(monkeypatch):
    "What autograd keeps does not grow with the vocabulary, capped or not; and without autograd no slope is made."
    batch = ragged()
    for name in ("llama", "gemma2"):
        small, large = family(name), family(name, vocab_size=4096)
        assert activation_bytes(small, batch) == activation_bytes(large, batch)
        with saved_for_backward(small) as kept: whole_losses(small, batch)
        assert sum(n for *_, n in kept.values()) > activation_bytes(small, batch)
    def refused(*args): raise AssertionError("a gradient nobody asked for")
    monkeypatch.setattr(torch.autograd, "grad", refused)
    with torch.no_grad(): assert summed_loss(small, batch) > 0


def test_no_place_at_all():
    "A batch in which nothing is learned has no losses."
    model, batch = family("llama"), ragged()
    batch["labels"][:] = -100
    losses, rows = answer_losses(model, batch)
    assert losses.shape == rows.shape == (0,)


def test_a_model_that_looks_ahead_keeps_its_mask():
    "Attention both ways, and a prefix that sees itself: their batches are left to the plain path."
    model = family("gemma3_text", use_bidirectional_attention=True)
    assert not causal(model) and filled_loss(model, ragged()) is None
    class Prefix(type(family("llama").model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state + 1e-4 * out.last_hidden_state.mean(1, keepdim=True)
            return out
    other = family("llama")
    other.model.__class__ = Prefix
    assert not causal(other) and causal(family("llama"))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_are_chosen_by_length(kind, monkeypatch):
    "Up to 100 tokens, and beyond: what is filled in must not choose others."
    dynamic = dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000., "factor": 4.},
                   max_position_embeddings=100)
    long = dict(original_max_position_embeddings=100, max_position_embeddings=256)
    for length, taken in ((60, True), (90, False), (120, kind == "longrope")):
        model = family("phi3", **long) if kind == "longrope" else family("llama", **dynamic)
        batch = ragged((length, 20))
        found, expected = filled_loss(model, batch), whole_losses(model, batch).sum()
        assert (found is not None) == taken and (not taken or torch.allclose(found, expected, rtol=1e-5))
        if taken or length > 100: continue
        with monkeypatch.context() as patch:  # the control: filled up all the same
            patch.setattr(filled_up, "same_rotation", lambda *args: True)
            assert not torch.allclose(filled_loss(model, batch), expected, rtol=1e-5)


def test_a_model_that_scales_its_embeddings_in_place():
    "As CTRL does."
    from transformers import CTRLConfig, CTRLLMHeadModel
    torch.manual_seed(0)
    model = CTRLLMHeadModel(CTRLConfig(vocab_size=128, n_embd=32, dff=48, n_layer=2, n_head=4)).requires_grad_(False)
    assert causal(model)


def test_asking_draws_no_random_numbers():
    "Dropout of the first step is that of a run that is taken up again."
    model = family("llama")
    model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, nn.Dropout(0.5))
    model.get_input_embeddings = lambda: model.model.embed_tokens[0]
    before = torch.get_rng_state()
    assert causal(model) and torch.equal(before, torch.get_rng_state())


def test_the_table_of_masks_is_put_back():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), without_mask(family("llama")):
        assert dict(ALL_MASK_ATTENTION_FUNCTIONS) != before
        raise KeyError
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before


@needs_triton
@pytest.mark.parametrize("numbers", [(1., None), (0.25, None), (1 / 30, 30.), (0.5, 2.)], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 1000, 4096, 9001])
def test_loss_and_slope_in_one_pass(numbers, vocabulary):
    "One tile, several, a rest; large logits, infinite ones, places that do not count."
    inner, outer = numbers
    generator = torch.Generator().manual_seed(vocabulary)
    x = (20 * torch.randn(5, vocabulary, generator=generator)).requires_grad_()
    x.data[1, 0], x.data[2, 1] = -torch.inf, 300.
    targets = torch.tensor([0, 2, 1, -100, vocabulary - 1])
    y = inner * x if outer is None else outer * (inner * x).tanh()
    nats, slope = slopes(y.detach(), targets)
    expected, = torch.autograd.grad(y, x, slope)
    if outer: expected[1, 0] = 0.  # torch has 0 * inf there
    device = "cuda" if on_card else "cpu"
    own = x.detach().to(device)
    found = slopes_triton(own, targets.to(device), inner, outer)
    assert torch.allclose(found.cpu(), nats, rtol=1e-5, atol=1e-5)
    assert torch.allclose(own.cpu(), expected, atol=1e-5, equal_nan=True)


@needs_triton
def test_what_the_kernel_leaves_to_the_plain_path():
    x, t = torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)
    for logits, targets in ((x.double(), t), (x.t(), t), (x, t.int())): assert slopes_triton(logits, targets) is None
    assert slopes_triton(x[:0], t[:0]).shape == (0,)


@pytest.mark.skipif(not on_card, reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [32_000, 151_936, 262_208])
def test_the_kernel_rounds_once(dtype, vocabulary):
    "On a GPU, in 16 bits: the slope is that of float32, rounded to nearest."
    generator = torch.Generator("cuda").manual_seed(0)
    x = (4 * torch.randn(70, vocabulary, device="cuda", generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (70,), device="cuda", generator=generator)
    nats, slope = slopes(x.float(), targets)
    own = x.clone()
    found = slopes_triton(own, targets)
    assert torch.allclose(found, nats, rtol=1e-5, atol=1e-5)
    assert ((own.float() - slope).abs() <= 2 ** -8 * slope.abs() + 1e-6).all()
