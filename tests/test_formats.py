"Number formats: bit for bit what other implementations store, bits that are counted, bad input that is refused."
import math

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import devices, make_llama
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.mxfp4 import E2M1, decode_mxfp4
from qlora_lab.engine.number_formats import (
    FORMATS,
    HQQ,
    Coded,
    Microscaled,
    e2m1_codes,
    format_named,
    hqq_zero,
    round_model,
)
from qlora_lab.records import LabError

SIGNED = [*E2M1, *(-v for v in E2M1)]


def weights(*shape, seed=0, tails=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).pow(tails) * 0.05


def e4m3(x):
    "Rounded to e4m3 from its definition, in exact arithmetic: four bits of exponent, three of fraction, ties to even."
    if x == 0: return 0.
    step = 2. ** (max(math.frexp(x)[1] - 1, -6) - 3)
    return min(round(x / step) * step, 448.)  # Python's round takes ties to even


def e2m1(x):
    "The same with one bit of fraction, two of exponent, and a sign."
    step = 2. ** (max(math.frexp(abs(x))[1] - 1, 0) - 1)
    return math.copysign(min(round(abs(x) / step) * step, 6.), x)


@given(st.floats(-8, 8, width=32))
def test_e2m1_is_rounded_as_a_float_is(x):
    assert SIGNED[e2m1_codes(torch.tensor([x])).item()] == e2m1(x)


@pytest.mark.parametrize("tails", [1, 3])
def test_mxfp4_by_its_definition(tails):
    w, f = weights(6, 96, tails=tails), FORMATS["mxfp4"]
    kept = f.stored(w)
    wanted = []
    for block in w.view(-1, 32).tolist():
        scale = 2. ** (math.frexp(max(map(abs, block)))[1] - 3)
        wanted.append([e2m1(x / scale) * scale for x in block])
    assert torch.equal(f.rounded(w), torch.tensor(wanted).view_as(w))
    assert torch.equal(f.rounded(w), decode_mxfp4(kept["codes"], kept["scales"], torch.float32))
    assert f.bits == 4.25


@pytest.mark.parametrize("tails", [1, 3])
def test_nvfp4_by_its_definition(tails):
    w, f = weights(6, 96, tails=tails), FORMATS["nvfp4"]
    kept = f.stored(w)
    tensor = kept["tensor_scale"]
    assert tensor == w.abs().max() / (6 * 448)
    absmax = w.view(-1, 16).abs().amax(1)
    scales = torch.tensor([e4m3(x) for x in (absmax / 6 / tensor).tolist()])
    assert torch.equal(kept["scales"].float().view(-1), scales)
    inverse = torch.where(scales > 0, (1 / tensor) / scales, 0.)
    levels = [[e2m1(x) for x in block] for block in (w.view(-1, 16) * inverse[:, None]).tolist()]
    assert torch.equal(f.rounded(w), (torch.tensor(levels) * (tensor * scales)[:, None]).view_as(w))
    assert f.bits == pytest.approx(4.5, abs=1e-3)


def test_rows_that_are_no_whole_blocks_do_not_meet():
    w = weights(5, 40)
    for name in ("mxfp4", "nvfp4"):
        whole = FORMATS[name].rounded(nn.functional.pad(w, (0, 56)))
        assert torch.equal(FORMATS[name].rounded(w), whole[:, :40])


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_coded_formats_are_bitsandbytes_own(book, nested, device):
    w = weights(64, 192).to(device)
    packed, state = bnb.quantize_4bit(w, quant_type=book, compress_statistics=nested)
    ours = FORMATS[book + "+dq" * nested].rounded(w)
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("book", ["nf4", "af4", "fp4", "fp4_e2m1", "fp4_e3m0", "int4"])
@pytest.mark.parametrize("blocksize", [32, 256])
def test_coded_formats_store_what_the_lab_stores(book, blocksize):
    w = weights(40, 100)  # a last block that is short
    for nested in (False, True):
        q, f = quantize_4bit(w, book, blocksize, nested), FORMATS[book + "+dq" * nested].at(blocksize)
        assert torch.equal(f.rounded(w), q.dequantize())
        assert f.bits_of(w) == pytest.approx(q.bits_per_param)


def test_blocks_of_16_are_lesson_01():
    from qlora_lab.blockwise import dequantize_blockwise, quantize_blockwise
    w = weights(8, 100)
    plain = dequantize_blockwise(*quantize_blockwise(w, "nf4", 16), "nf4", 16).view_as(w)
    assert torch.equal(FORMATS["nf4"].at(16).rounded(w), plain)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_keeps_zeros_and_comes_near(name):
    f, w = FORMATS[name], weights(32, 128)
    assert torch.equal(f.rounded(torch.zeros(4, 128)), torch.zeros(4, 128))
    w[:, :64] = 0
    got = f.rounded(w)
    assert torch.isfinite(got).all() and got[:, :64].abs().max() <= (0.02 if "+dq" in name else 0)
    assert (got - w).norm() < 0.25 * w.norm()
    assert torch.equal(f.rounded(w.bfloat16()), f.rounded(w.bfloat16().float()))


@pytest.mark.parametrize(("name", "bits"), [
    ("nf4", 4.5), ("nf4+f16", 4.25), ("nf4+dq", 4.127), ("int8", 8.5), ("int4_affine", 4.3125), ("hqq", 4.5)])
def test_bits_are_those_of_what_is_stored(name, bits):
    assert FORMATS[name].bits == pytest.approx(bits, abs=1e-3)
    assert FORMATS[name].at(128).bits == pytest.approx(4 * (1 + (name == "int8")) + (bits % 1) / 2, abs=1e-2)


def test_affine_holds_zero_and_both_ends():
    w = torch.tensor([[-0.375, 1.5, 0, 0.03] * 16])
    assert FORMATS["int4_affine"].rounded(w)[0, :3].tolist() == [-0.375, 1.5, 0]


def test_hqq_lowers_the_error_that_it_is_made_for():
    w = weights(64, 512, tails=3)
    plain = HQQ("start")
    def error(t): return (t - w).abs().pow(0.7).sum()
    low, high = (m(w.view(-1, 64), 1, keepdim=True) for m in (torch.amin, torch.amax))
    start = ((w.view(-1, 64) - low) / (high - low) * 15).round() / 15 * (high - low) + low
    assert error(plain.rounded(w)) < 0.97 * error(start.view_as(w))


def by_the_formula(blocks, inverse, zero, p=0.7, beta=10., growth=1.01, rounds=20):
    "HQQ's solver in plain numbers, as its authors write it down: shrink the errors, then the mean that is left."
    def shrink(x, beta): return np.sign(x) * max(0., abs(x) - abs(x) ** (p - 1) / beta) if x else 0.
    zero, least = list(zero), np.inf
    for _ in range(rounds):
        errors = []
        for k, (row, s) in enumerate(zip(blocks, inverse)):
            codes = [min(15., max(0., np.round(w * s + zero[k]))) for w in row]
            off = [w - (c - zero[k]) / s for w, c in zip(row, codes)]
            errors += map(abs, off)
            zero[k] = np.mean([c - (w - shrink(x, beta)) * s for w, c, x in zip(row, codes, off)])
        beta *= growth
        if np.mean(errors) >= least: break
        least = np.mean(errors)
    return zero


def test_hqq_is_its_formula():
    w = weights(6, 64, tails=3).double()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    inverse = 15 / (high - low)
    start = (-low * inverse).round()
    wanted = by_the_formula(w.tolist(), inverse[:, 0].tolist(), start[:, 0].tolist())
    got = hqq_zero(w, inverse, start)[:, 0]
    assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), atol=1e-9)
    assert (got - start[:, 0]).abs().min() > 1e-3  # it moved


def test_microscaled_in_other_blocks_than_the_standard():
    w = weights(8, 256)
    errors = [(Microscaled("e2m1", b, "e8m0").rounded(w) - w).norm().item() for b in (16, 32, 64, 128, 256)]
    assert max(errors) < 1.1 * min(errors)  # a scale without fraction: smaller blocks gain next to nothing
    assert torch.equal(Microscaled("e2m1", 32, "e8m0").rounded(w), FORMATS["mxfp4"].rounded(w))


def test_a_model_is_rounded_in_place_head_and_embeddings_aside():
    model, before = make_llama(), make_llama()
    round_model(model, "nf4+dq")
    changed = {n for (n, p), q in zip(model.named_parameters(), before.parameters()) if not torch.equal(p, q)}
    assert changed == {n for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), quantize_4bit(before.get_parameter(name)).dequantize())
    kept = round_model(make_llama().bfloat16(), "mxfp4")
    assert kept.dtype == torch.bfloat16


def test_bad_input_gets_one_message():
    with pytest.raises(LabError, match="unknown number format 'nf5'; known: nf4"): format_named("nf5")
    with pytest.raises(LabError, match="mxfp4 is defined for blocks of 32, not of 64"): format_named("mxfp4", 64)
    with pytest.raises(ValueError, match="at index"): FORMATS["nvfp4"].rounded(torch.tensor([[1., float("nan")]]))
    with pytest.raises(LabError, match="beyond float16"): FORMATS["nf4+f16"].rounded(torch.full((1, 64), 1e6))
    model = make_llama()
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(LabError, match="layer model.layers.1.mlp.up_proj: expected finite"): round_model(model, "nf4")
    assert isinstance(format_named("nf4", 128), Coded)
