"What a run is told is what it does, to the number: share held out, warm-up, length of a gradient, data."
import json
from math import cos, pi

import pytest
import torch
from torch import nn

from conftest import make_llama
from qlora_lab.data import Split, data_hash, pair, split, tokenize
from qlora_lab.linear4bit import quantize_model
from qlora_lab.rates import adapter_groups, rate_factor, rates_at
from qlora_lab.runs import fingerprint, open_folder
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters, one_step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("share", [0.02, 0.1, 0.12, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_share_held_out_is_the_share_that_was_asked_for(share, seed):
    "Of many groups of one example each, within four standard deviations of a fair draw."
    n = 6000
    data = split([pair(f"question {i}", "yes") for i in range(n)], share, seed)
    assert abs(len(data.held_out) / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_a_smaller_share_is_part_of_a_larger_one():
    "A group is held out from a share on: nobody crosses over when the share grows."
    rows, before = [pair(f"question {i}", "yes") for i in range(500)], set()
    for share in (0.1, 0.2, 0.4, 0.8):
        held = {e.prompt for e in split(rows, share).held_out}
        assert before < held
        before = held


def by_hand(schedule, warmup, steps, step):
    "Formulas of the page on rates, written once more."
    if schedule == "constant": return min(1., (step + 1) / warmup) if warmup else 1.
    if step < warmup: return step / warmup
    left = (steps - step) / (steps - warmup)
    return left if schedule == "linear" else (1 + cos(pi * (1 - left))) / 2


@pytest.mark.parametrize("warmup", [0, 1, 4, 0.25])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_every_step(schedule, warmup):
    "The warm-up takes the steps it was given, and not one more; a share of 20 steps is 5."
    config, counted = TrainConfig(schedule=schedule, warmup=warmup, steps=20, lr=3.), 5 if warmup == 0.25 else warmup
    made = [rate_factor(config, step) for step in range(20)]
    assert made == pytest.approx([by_hand(schedule, counted, 20, step) for step in range(20)], abs=1e-12)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]},
                                 {"params": [nn.Parameter(torch.zeros(1))], "initial_lr": 12.}], lr=1.)
    for step in (0, 3, 4, 5, 19):
        assert rates_at(config, step, optimizer) == pytest.approx([3 * made[step], 12 * made[step]])


@pytest.fixture(scope="module")
def ready(tokenizer, data):
    "A step's worth of rows."
    return [tokenize(tokenizer, e) for e in data.train[:8]]


def moved(ready, **settings):
    "By how far a step of plain descent moves the adapters, at a rate of 1; and what the step says of itself."
    config = TrainConfig(**dict(steps=4, batch_size=4, accumulation=2, rank=2, lr=1., warmup=0) | settings)
    model = attach_adapters(quantize_model(make_llama()), config)
    learning = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learning]
    row = one_step(model, torch.optim.SGD(learning, lr=1e-9), ready, config, 0)
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(learning, before)]).norm().item(), row


@pytest.mark.parametrize("longest", [0.3, 1e-3, 1e-2])
def test_a_gradient_is_shortened_to_the_length_that_was_asked_for(longest, ready):
    "Not to ten times it; its own length is what the step tells."
    length, row = moved(ready, max_grad_norm=longest)
    assert row["grad_norm"] > longest and length == pytest.approx(longest, rel=1e-4)


@pytest.mark.parametrize("longest", [0., 1e3])
def test_a_gradient_that_is_short_enough_is_left(longest, ready):
    length, row = moved(ready, max_grad_norm=longest)
    assert length == pytest.approx(row["grad_norm"], rel=1e-4)


def test_a_step_moves_by_the_rate(ready):
    "Of the schedule, not of the optimizer as it was made."
    length, row = moved(ready, max_grad_norm=0.1, lr=0.5, warmup=4)
    assert row["lr"] == 0.125 and length == pytest.approx(0.1 * 0.125, rel=1e-4)


def test_each_group_of_an_optimizer_has_its_own_rate(ready):
    "With LoRA+ B moves by its own rate: as far as it would move at a rate of 1 without, times that."
    def of_b(**settings):
        config = TrainConfig(**dict(batch_size=4, accumulation=2, rank=2, lr=1., warmup=0, max_grad_norm=0.) | settings)
        model = attach_adapters(quantize_model(make_llama()), config)
        groups = adapter_groups(model, config)
        one_step(model, torch.optim.SGD(groups, lr=1e-9), ready, config, 0)
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n])
    assert torch.allclose(of_b(loraplus_ratio=8.), 8 * of_b(), rtol=1e-4, atol=1e-9) and of_b().abs().max() > 1e-4


def test_a_fingerprint_knows_both_sides_of_the_data(tmp_path):
    "Held-out data that is another makes another run; each side is told under its own name, and no side for the other."
    model, config = quantize_model(make_llama()), TrainConfig(folder=str(tmp_path))
    a, b, c = ([pair(f"{name} {i}", "yes") for i in range(3)] for name in "abc")
    here = fingerprint(model, Split(a, b), config)
    assert (here["data"], here["held_out"]) == (data_hash(a), data_hash(b))
    for other, differs in ((Split(a, c), "held_out"), (Split(c, b), "data")):
        there = fingerprint(model, other, config)
        assert {k for k in here if here[k] != there[k]} == {differs}
        (tmp_path / "run.json").write_text(json.dumps({"identity": here}))
        with pytest.raises(ValueError, match=f"holds another run: {differs} was"): open_folder(tmp_path, there)
    assert fingerprint(model, Split(b, a), config) != here
