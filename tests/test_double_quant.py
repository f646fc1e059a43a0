"The dynamic 8-bit code with its sign and without, by bitsandbytes' own function, and the second level by hand."
import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lab.blockwise import codebook, quantize_blockwise, register_codebook
from qlora_lab.double_quant import (
    QuantizedTensor,
    dequantize_absmax,
    dynamic_map,
    levels_by_code,
    quantize_4bit,
    quantize_absmax,
)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code(signed):
    code = dynamic_map(signed)
    assert torch.equal(code, bnb.create_dynamic_map(signed=signed)) and code.dtype == torch.float32
    assert torch.equal(dynamic_map(), dynamic_map(True)) and not torch.equal(dynamic_map(True), dynamic_map(False))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_scales_of_scales(n):
    "The mean taken off, the rest in blocks of 256, and back again within half a step of the code."
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 1
    codes, absmax2, offset = quantize_absmax(absmax)
    assert codes.shape == (n,) and codes.dtype == torch.uint8 and absmax2.shape == (-(-n // 256),)
    assert offset == absmax.mean() and offset.shape == ()
    by_hand = quantize_blockwise(absmax - absmax.mean(), dynamic_map(), 256)
    assert torch.equal(codes, by_hand[0]) and torch.equal(absmax2, by_hand[1])
    back = dequantize_absmax(codes, absmax2, offset)
    widest = dynamic_map().diff().max() / 2
    for i in range(n): assert abs(back[i] - absmax[i]) <= widest * absmax2[i // 256] + 1e-6
    finer = quantize_absmax(absmax, 64)
    assert finer[1].shape == (-(-n // 64),) and dequantize_absmax(*finer, 64).sub(absmax).abs().max() <= widest


@pytest.mark.parametrize("name, n", [("nf4", 16), ("af4", 16), ("int4", 15), ("fp4", 16), ("fp4_e3m0", 16)])
def test_what_a_code_stands_for(name, n):
    "Sixteen levels for every type, zeros for codes that none has; those of fp4 in the order of their bits."
    levels = levels_by_code(name)
    assert len(levels) == 16 and sorted(levels[:n]) == codebook(name).tolist() and not any(levels[n:])
    if name == "fp4": assert list(levels) == (bnb.get_4bit_type("fp4", device="cpu") + 0.).tolist()
    else: assert list(levels[:n]) == codebook(name).tolist()


@pytest.mark.parametrize("n, works", [(2, True), (15, True), (16, True), (17, False)])
def test_four_bits_hold_sixteen(n, works, own):
    levels = register_codebook(own, torch.linspace(-1, 1, n))
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    if not works:
        for refused in (lambda: levels_by_code(own), lambda: quantize_4bit(w, own)):
            with pytest.raises(ValueError, match=f"'{own}' has {n} levels; four bits hold at most 16"): refused()
        return
    q = quantize_4bit(w, own, double_quant=False)
    nearest = (w.view(-1, 64, 1) / w.abs().amax(1).view(-1, 1, 1) - levels).abs().argmin(-1)
    assert torch.allclose(q.dequantize(), levels[nearest] * w.abs().amax(1, keepdim=True))


def test_what_a_weight_is_said_to_take():
    "Codes, a byte a block, a scale for 256 of those, and the mean; without double quantization four bytes a block."
    w = torch.randn(8, 64)
    for double, expected in ((True, 8 * 64 // 2 + 8 + 4 + 4), (False, 8 * 64 // 2 + 8 * 4)):
        q = quantize_4bit(w, double_quant=double)
        assert q.nested == double and q.nbytes == expected and q.bits_per_param == expected * 8 / 512
        assert (q.blocksize, q.quant_type, q.shape, q.dtype) == (64, "nf4", w.shape, w.dtype)
    bare = QuantizedTensor(q.packed, q.stats, q.shape, q.dtype)
    assert (bare.blocksize, bare.quant_type, bare.nested) == (64, "nf4", False)
    assert torch.equal(bare.dequantize(), q.dequantize())


def test_bitsandbytes_gets_no_code_book_that_it_does_not_know(own):
    register_codebook(own, torch.linspace(-1, 1, 16))
    with pytest.raises(ValueError, match=f"'nf4' and 'fp4', not '{own}'"):
        quantize_4bit(torch.randn(8, 64), own).to_bitsandbytes()
