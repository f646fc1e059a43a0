"The dynamic 8-bit code with its sign and without, by bitsandbytes' own function, and the second level by hand."
import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lab.double_quant import dequantize_absmax, dynamic_map, quantize_absmax, quantize_blockwise


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
    assert torch.equal(dequantize_absmax(*quantize_absmax(absmax, 64), 64), dequantize_absmax(
        *quantize_absmax(absmax, blocksize=64), blocksize=64))
