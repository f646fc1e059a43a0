"A head whose vocabulary no eight divides: its last columns apart; and rows that are longer than the logits."
import copy

import families
import pytest
import torch
from torch import nn

from qlora_lab import Linear4bit
from qlora_lab.engine.dispatch import register, standing_in
from qlora_lab.engine.gpu import triton
from qlora_lab.engine.odd_vocabulary import odd_logits
from qlora_lab.engine.piecewise_loss import slopes_triton
from qlora_lab.head_loss import Head, in_pieces, place_losses, slopes
from qlora_lab.lora import LoRALinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CARD = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


def apart(found=odd_logits):
    "A block in which this function is asked for logits."
    return standing_in({("head_logits", DEVICE): found})


def made(vocabulary, kind=torch.bfloat16, bias=False, width=256):
    torch.manual_seed(vocabulary)
    return nn.Linear(width, vocabulary, bias=bias, dtype=kind, device=DEVICE).requires_grad_(False)


def far(found, right): return ((found.float() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [9, 15, 64, 127, 1001, 9001, 9002, 9004])
def test_loss_and_slope_as_by_one_product(vocabulary, kind, bias):
    "As near to float32 as the head's own passes, but for one more rounding."
    head, states = made(vocabulary, kind, bias), torch.randn(70, 256, device=DEVICE).to(kind)
    targets = torch.randint(vocabulary, (70,), device=DEVICE)
    targets[3] = -100

    def passes(head, states):
        x = states.clone().requires_grad_()
        nats = in_pieces(x, None, targets, Head(head, (), 2 * vocabulary), piece=32)
        return nats, torch.autograd.grad(nats.sum(), x)[0]

    with apart(None): right, own = passes(copy.deepcopy(head).float(), states.float()), passes(head, states)
    with apart(): found = passes(head, states)
    for a, b, c in zip(found, own, right): assert far(a, c) < 1.5 * far(b, c) + 1e-4 and far(b, c) < 0.02


@pytest.mark.parametrize("name", ["llama", "granite", "cohere", "gemma2", "gpt2", "phi"])
def test_models_of_an_odd_vocabulary(name):
    "Scaled, capped, with a bias, tied: losses and a gradient far below as the model's own code gives them."
    model = families.build(name, vocab_size=259, dtype=torch.bfloat16).to(DEVICE).requires_grad_(False)
    learns = next(p for n, p in model.named_parameters() if "norm" in n or "ln_1" in n).requires_grad_()
    inputs = dict(input_ids=families.ids().to(DEVICE))
    targets = families.ids(2).to(DEVICE).flatten()
    asked = []

    def counted(head, states):
        asked.append(odd_logits(head, states))
        return asked[-1]

    def passes(found):
        with apart(found): nats = place_losses(model, inputs, None, targets)
        return nats, torch.autograd.grad(nats.sum(), learns)[0].float()

    (own, slope), (nats, there) = passes(None), passes(counted)
    assert asked and all(logits is not None and logits.stride(0) == 320 for logits in asked)
    assert torch.allclose(nats, own, atol=0.02) and far(there, slope) < 0.03


class Listens(nn.Linear): pass


def with_hook(head):
    head.register_forward_hook(lambda *args: None)
    return head


def replaced(head):
    head.forward = lambda x: torch.zeros(len(x), 103)
    return head


OTHERS = {
    "eight divides": lambda: made(104), "less than eight": lambda: made(7), "32 bits": lambda: made(103, torch.float32),
    "learns": lambda: made(103).requires_grad_(), "a class of its own": lambda: Listens(256, 103).bfloat16(),
    "a hook": lambda: with_hook(made(103)), "another forward": lambda: replaced(made(103)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(made(103)), "no weight": nn.Identity,
    "adapted": lambda: LoRALinear(made(103), 4), "4 bits": lambda: Linear4bit.from_linear(made(103))}


@pytest.mark.parametrize("kind", OTHERS)
def test_heads_that_keep_their_own_pass(kind):
    head, states = OTHERS[kind]().to(DEVICE), torch.randn(4, 256, dtype=torch.bfloat16, device=DEVICE)
    assert odd_logits(made(103), states) is not None and odd_logits(head, states) is None


def test_states_that_the_head_has_to_cast_or_refuse():
    head, states = made(103), torch.randn(4, 256, device=DEVICE)
    assert odd_logits(head, states) is None and odd_logits(head, states.half()) is None
    with torch.autocast(DEVICE, torch.bfloat16): assert odd_logits(head, states.bfloat16()) is None
    assert odd_logits(head, states.bfloat16()) is not None


def test_what_a_model_does_to_its_logits_in_place():
    "Logits are no view of the longer rows for autograd."
    head, states = made(103), torch.randn(4, 256, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    one, = torch.autograd.grad(odd_logits(head, states).mul_(2).sum(), states)
    two, = torch.autograd.grad(odd_logits(head, states).mul(2).sum(), states)
    assert torch.equal(one, two) and one.abs().sum() > 0


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("vocabulary, row", [(1000, 1003), (9001, 9024), (4096, 4160), (63, 64)])
def test_what_stands_behind_the_logits_stays(vocabulary, row):
    "Not a number, even."
    torch.manual_seed(row)
    rows = torch.full((6, row), torch.nan, device=DEVICE)
    rows[:, :vocabulary] = x = 5 * torch.randn(6, vocabulary, device=DEVICE)
    targets = torch.tensor([0, 2, 1, -100, vocabulary - 1, 5], device=DEVICE)
    nats, slope = slopes(x, targets)
    assert torch.allclose(slopes_triton(rows[:, :vocabulary], targets), nats, rtol=1e-5, atol=1e-5)
    assert torch.allclose(rows[:, :vocabulary], slope, atol=1e-5) and rows[:, vocabulary:].isnan().all()
    ends = torch.ones(6, row, device=DEVICE)[:, row - vocabulary:]  # with the memory, so that nothing is behind
    assert slopes_triton(ends, targets) is None


@ON_CARD
def test_a_card_asks_for_it():
    "By the table, without a word."
    from qlora_lab.engine.dispatch import twin, use_kernels
    use_kernels()
    assert twin("head_logits", "cuda") is odd_logits
    states, seen = torch.randn(70, 256, dtype=torch.bfloat16, device=DEVICE), []
    targets = torch.zeros(70, dtype=int, device=DEVICE)

    def noted(head, states):
        seen.append(len(states))
        return odd_logits(head, states)

    try:
        register("head_logits", "cuda", noted)
        in_pieces(states, None, targets, Head(made(9001), (), 18002), piece=40)
    finally: register("head_logits", "cuda", "engine.odd_vocabulary.odd_logits")
    assert seen == [40, 30]
