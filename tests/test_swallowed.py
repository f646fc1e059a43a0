"""What bfloat16 swallows: the arithmetic, and that the lab's own layers do what the three ways say of them.

A layer in plain operations adds apart, an adapted 4-bit layer adds onto a rounded array, a group of fused layers adds
inside one product: each is run in bfloat16 and compared with what `arrival` says of its way.
"""
import math

import pytest
import torch
from torch import nn

from conftest import devices, make_llama
from qlora_lab.engine.adapted_linear import AdaptedLinear
from qlora_lab.engine.dispatch import standing_in
from qlora_lab.engine.group import Group, group_forward
from qlora_lab.engine.swallowed import WAYS, arrival, swallowed
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import LoRALinear
from qlora_lab.records import LabError
from qlora_lab.settings import TrainConfig
from qlora_lab.train import attach_adapters

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_number_by_hand():
    "At 1 a unit of bfloat16 is 2^-7: half of it and less is lost, unless y is not rounded before."
    y, u = torch.tensor([1.]), torch.tensor([2. ** -8])
    assert arrival(y, u, "apart").kept == arrival(y, u, "onto").kept == 0  # a tie, to the even one
    assert arrival(y, u * 1.01, "apart").kept == pytest.approx(2 / 1.01)
    low, high = arrival(y + 2. ** -8 - 1e-5, torch.tensor([2e-5]), "one product"), arrival(y, u * 0, "apart")
    assert low.unchanged == 0 and low.kept > 100 and math.isnan(high.kept) and high.unchanged == 1


@pytest.mark.parametrize("way", WAYS)
def test_in_float32_everything_arrives(way):
    torch.manual_seed(0)
    y, u = torch.randn(64, 64), torch.randn(64, 64) * 1e-3
    assert arrival(y, u, way, torch.float32).kept == pytest.approx(1, abs=1e-3)


def test_rounding_once_loses_nothing_on_the_whole():
    torch.manual_seed(0)
    y = torch.randn(512, 512)
    for size in (1e-2, 1e-3, 1e-4):
        u = size * torch.randn(512, 512)
        assert arrival(y, u, "one product").kept == pytest.approx(1, abs=0.15 if size < 1e-3 else 0.05)
        assert arrival(y, u, "onto").kept <= arrival(y, u, "one product").kept + 0.05
    assert arrival(y, 1e-4 * y.sign(), "apart").kept < 0.2


def layer_of(size):
    "A layer in 4 bits with an adapter whose update is about so long as a share of the output."
    torch.manual_seed(0)
    linear = nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
    layer = LoRALinear(Linear4bit.from_linear(linear, compute_dtype=torch.bfloat16), r=8, alpha=16)
    nn.init.normal_(layer.lora_B.weight, std=size)
    return layer, torch.randn(64, 128).bfloat16()


def in_float32(layer, x):
    w = layer.base_layer.quantized.dequantize(torch.float32)
    return x.float() @ w.t(), layer.scaling * (x.float() @ layer.lora_A.weight.t()) @ layer.lora_B.weight.t()


def by_the_layer(way, layer, x):
    "The layer's answer with its adapter and without, as the lab computes it in that way."
    def answer():
        if way == "apart":
            with standing_in({("adapted_linear", "cpu"): None}): return layer(x)
        a, b, q = layer.lora_A.weight, layer.lora_B.weight, layer.base_layer.quantized
        if way == "onto":
            return AdaptedLinear.apply(x, None, a, b, layer.scaling, q, None, torch.bfloat16, q.packed, q.stats)
        group = Group(layer)
        return group_forward(group, group.with_room(x))[:, :group.outputs]
    whole = answer()
    kept, layer.lora_B.weight.data = layer.lora_B.weight.data, torch.zeros_like(layer.lora_B.weight)
    bare, layer.lora_B.weight.data = answer(), kept
    return whole.float(), bare.float()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [3e-2, 1e-3, 1e-4])
@torch.no_grad()
def test_the_labs_layers_add_as_their_way_says(way, size):
    layer, x = layer_of(size)
    y, u = in_float32(layer, x)
    whole, bare = by_the_layer(way, layer, x)
    kept = ((whole - bare) * u).sum() / u.square().sum()
    assert kept.item() == pytest.approx(arrival(y, u, way).kept, abs=0.12)
    if size == 1e-4: assert (kept > 0.8) == (way == "one product")


@pytest.mark.parametrize("device", devices())
def test_every_adapted_layer_is_asked(device):
    "Wherever the model is; what it is called with may lie on the CPU."
    model = quantize_model(make_llama(layers=1)).to(device)
    with standing_in({("fuse_layers", device): None}): model = attach_adapters(model, TrainConfig(rank=4))
    ids = {"input_ids": torch.tensor([[5, 9, 20, 3]])}
    before = swallowed(model, ids)
    assert len(before) == 7 and all(math.isnan(a.kept) for ways in before.values() for a in ways.values())
    for n, p in model.named_parameters():
        if "lora_B" in n: nn.init.normal_(p.data, std=0.1)
    assert all(0.9 < a.kept < 1.1 for ways in swallowed(model, ids).values() for a in ways.values())


def test_a_model_without_adapters_is_refused():
    with pytest.raises(LabError, match="no adapted layer was called"):
        swallowed(make_llama(layers=1), {"input_ids": torch.tensor([[5, 9]])})
