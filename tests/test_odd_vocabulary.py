"A head whose vocabulary is not a multiple of eight: its last columns apart, in rows that are longer than the logits."
import copy

import families
import pytest
import torch
from torch import nn

from qlora_lab import Linear4bit
from qlora_lab.engine.dispatch import REHEARSED, register, standing_in
from qlora_lab.engine.gpu import triton
from qlora_lab.engine.odd_vocabulary import odd_logits
from qlora_lab.engine.piecewise_loss import slopes_triton
from qlora_lab.head_loss import Head, in_pieces, place_losses
from qlora_lab.lora import LoRALinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(triton is None, reason="Triton is not installed")
KINDS = [torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]  # Triton's interpreter cuts, not rounds
ON_CARD = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


def apart(found=odd_logits):
    "A block in which this function is asked for logits."
    return standing_in({("head_logits", DEVICE): found})


def made(vocabulary, kind=torch.bfloat16, bias=False, width=256):
    torch.manual_seed(vocabulary)
    return nn.Linear(width, vocabulary, bias=bias, dtype=kind, device=DEVICE).requires_grad_(False)


def far(found, right): return ((found.float() - right).norm() / right.norm()).item()


@NEEDS_TRITON
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [7, 9, 127, 1001, 9001, 9002, 9004])
def test_loss_and_slope_as_by_one_product(vocabulary, kind, bias):
    "With the kernel that works in the longer rows: as near to float32 as the head's own passes, but for a rounding."
    head, states = made(vocabulary, kind, bias), torch.randn(24, 256, device=DEVICE).to(kind)
    targets = torch.randint(vocabulary, (24,), device=DEVICE)
    targets[3] = -100
    asked = []

    def noted(twin):
        def answer(*args):
            found = twin(*args)
            asked.append(found is not None)
            return found
        return answer

    def passes(head, states):
        x = states.clone().requires_grad_()
        nats = in_pieces(x, None, targets, Head(head, (), 2 * vocabulary), piece=16)
        return nats, torch.autograd.grad(nats.sum(), x)[0]

    plain = {("head_logits", DEVICE): None, ("slopes", DEVICE): None}
    with standing_in(plain): right, own = passes(copy.deepcopy(head).float(), states.float()), passes(head, states)
    with standing_in({("head_logits", DEVICE): noted(odd_logits), ("slopes", DEVICE): noted(slopes_triton)}):
        found = passes(head, states)
    assert asked == 4 * [True]
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
    "eight divides": lambda: made(104), "32 bits": lambda: made(103, torch.float32),
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


@NEEDS_TRITON
@pytest.mark.parametrize("outer", [None, 30.])
@pytest.mark.parametrize("vocabulary, row", [(1000, 1003), (9001, 9024), (3000, 3008), (63, 64)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_what_stands_behind_the_logits_stays(kind, vocabulary, row, outer):
    "Numbers, and what is none; on a card rows of another length may be summed in another order."
    torch.manual_seed(row)
    off, step = (0., 0.) if DEVICE == "cpu" else (1e-5, torch.finfo(kind).eps)
    rows = torch.randn(6, row, device=DEVICE).to(kind)
    rows[1, vocabulary:], rows[2, vocabulary:] = torch.nan, torch.inf
    behind, x = rows[:, vocabulary:].clone(), rows[:, :vocabulary].clone()
    targets = torch.tensor([0, 2, 1, -100, vocabulary - 1, 5], device=DEVICE)
    nats, slope = slopes_triton(x, targets, 0.5, outer), x
    torch.testing.assert_close(slopes_triton(rows[:, :vocabulary], targets, 0.5, outer), nats, rtol=off, atol=0)
    torch.testing.assert_close(rows[:, :vocabulary], slope, rtol=max(off, step), atol=off / 100)
    assert slope.abs().sum() > 0
    assert torch.equal(rows[:, vocabulary:].nan_to_num(7., 8.), behind.nan_to_num(7., 8.))


@NEEDS_TRITON
def test_rows_that_end_with_the_memory():
    "Nothing is behind the last one, so the kernel must not look."
    targets = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    assert slopes_triton(torch.ones(6, 64, device=DEVICE)[:, :60], targets) is not None
    assert slopes_triton(torch.ones(6, 64, device=DEVICE)[:, 4:], targets) is None


def test_a_plan_rehearses_it():
    "On tensors without bytes, in the rows that a step has."
    assert "head_logits" in REHEARSED
    head = nn.Linear(256, 103, bias=False, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    assert odd_logits(head, torch.empty(4, 256, device="meta", dtype=torch.bfloat16)).stride() == (128, 1)


@ON_CARD
@pytest.mark.parametrize("vocabulary, width", [(128257, 2048), (49155, 4096), (32004, 4096)])
def test_a_piece_of_real_size(vocabulary, width):
    "The slope of the states, against float32."
    head, states = made(vocabulary, width=width), torch.randn(256, width, device=DEVICE).bfloat16()
    targets = torch.randint(vocabulary, (256,), device=DEVICE)

    def slope(head, states, found):
        x = states.clone().requires_grad_()
        with apart(found): nats = in_pieces(x, None, targets, Head(head, (), 2 * vocabulary))
        return torch.autograd.grad(nats.sum(), x)[0]

    own, found = slope(head, states, None), slope(head, states, odd_logits)
    right = slope(head.float(), states.float(), None)
    assert far(found, right) < 1.5 * far(own, right)


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
