"Code books by definition and by the tables of bitsandbytes; blocks, packed codes, and what cannot be taken, by hand."
import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lab.blockwise import (
    codebook,
    dequantize_blockwise,
    dequantize_packed,
    pack_4bit,
    quantize_blockwise,
    register_codebook,
    unpack_4bit,
)
from qlora_lab.double_quant import DYNAMIC8, quantize_4bit
from qlora_lab.nf4 import NF4

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP Microscaling Formats 1.0, section 5.3.3
E3M0 = [0, 0.25, 0.5, 1, 2, 4, 8, 16]


def of_both_signs(magnitudes):
    top = max(magnitudes)
    return torch.tensor([m / top for m in sorted([-m for m in magnitudes] + magnitudes)], dtype=torch.float32)


@pytest.mark.parametrize("name, levels", [
    ("int8", torch.tensor([k / 127 for k in range(-127, 128)])), ("int4", torch.tensor([k / 7 for k in range(-7, 8)])),
    ("fp4_e2m1", of_both_signs(E2M1)), ("fp4_e3m0", of_both_signs(E3M0)),
    ("fp4", bnb.get_4bit_type("fp4", device="cpu").sort().values), ("dynamic8", bnb.create_dynamic_map())])
def test_levels(name, levels):
    assert codebook(name).dtype == torch.float32 and torch.equal(codebook(name), levels)


@pytest.mark.parametrize("name", ["int8", "int4", "fp4", "fp4_e2m1", "fp4_e3m0", "nf4", "af4", "dynamic8"])
def test_no_zero_has_a_sign(name):
    "0 decodes to the same bits whichever of two zeros a code means."
    code = codebook(name)
    assert not code[code == 0].signbit().any() and (code == 0).any()


@pytest.mark.parametrize("values", [
    (-1, 1), (0, 0.5), (-0.5, 0), (-0.25, 0.25, 0.25), range(2), torch.linspace(-1, 1, 256),
    torch.tensor([-1, 0, 1], dtype=torch.float64)])
def test_a_code_book_of_ones_own(values, own):
    levels = register_codebook(own, values)
    assert torch.equal(levels, torch.as_tensor(values, dtype=torch.float32)) and torch.equal(levels, codebook(own))
    codes, absmax = quantize_blockwise(torch.tensor([-2., 0.5, 2.]), own)
    assert torch.equal(codes, quantize_blockwise(torch.tensor([-2., 0.5, 2.]), levels)[0]) and absmax == 2


NONE = [(1,), (), ((-1, 1),), (0.1, 0), (-1, 0.5, 0.4), (0, 1.001), (-1.001, 0), (float("nan"), 1), (0, float("nan")),
        (0, float("inf")), torch.linspace(-1, 1, 257), torch.tensor(0.5)]


@pytest.mark.parametrize("values", NONE)
def test_what_is_no_code_book(values, own):
    with pytest.raises(ValueError, match=f"'{own}': expected 2 to 256 ascending levels within"):
        register_codebook(own, values)
    with pytest.raises(ValueError, match=f"unknown code book '{own}'; known: af4, dynamic8, fp4"): codebook(own)
    with pytest.raises(ValueError, match="expected 2 to 256 ascending levels within"):
        quantize_blockwise(torch.ones(3), torch.as_tensor(values, dtype=torch.float32))


def test_a_name_keeps_its_levels(own):
    "Weights are stored under it: other levels would decode them to other numbers."
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    register_codebook(own, torch.linspace(-1, 1, 16))
    q = quantize_4bit(x, own)
    before = q.dequantize()
    assert torch.equal(register_codebook(own, torch.linspace(-1, 1, 16)), codebook(own))  # a cell that is run again
    for other in (torch.linspace(-1, 1, 15), torch.linspace(-1, 0.9, 16)):
        with pytest.raises(ValueError, match=f"'{own}' has other levels, and weights may be stored in them"):
            register_codebook(own, other)
    with pytest.raises(ValueError, match="'nf4' has other levels"): register_codebook("nf4", torch.linspace(-1, 1, 16))
    assert torch.equal(q.dequantize(), before) and torch.equal(codebook("nf4"), NF4)


@pytest.mark.parametrize("name, levels", [("nf4", NF4), ("dynamic8", DYNAMIC8)])
def test_nobody_changes_a_code_book_in_place(name, levels, own):
    "What is handed out is a copy, and what is registered is one."
    before = codebook(name)
    codebook(name).zero_()
    mine = torch.tensor([-1., 1.])
    register_codebook(own, mine).zero_()
    mine.zero_()
    assert torch.equal(codebook(name), before) and torch.equal(levels, before)
    assert codebook(own).tolist() == [-1, 1]


@pytest.mark.parametrize("x, blocksize, message", [
    ([1., 2.], 64, "floating point tensor to quantize, got list"), (torch.arange(3), 64, "got torch.int64"),
    (torch.empty(4, 16, device="meta"), 64, r"no numbers on the meta device, \(4, 16\)"),
    (torch.empty(3, 0), 64, r"got an empty tensor of shape \(3, 0\)"),
    (torch.ones(3), 0, "as block size, got 0"), (torch.ones(3), 1.5, "as block size, got 1.5"),
    (torch.tensor([[1., 2.], [3., float("inf")]]), 2, r"got inf at index \[1, 1\] of shape \(2, 2\)"),
    (torch.tensor([float("nan"), 1.]), 64, r"got nan at index \[0\] of shape \(2,\)")])
def test_what_cannot_be_cut_into_blocks(x, blocksize, message):
    with pytest.raises(ValueError, match=message): quantize_blockwise(x, "int8", blocksize)


@pytest.mark.parametrize("n", [1, 7, 64, 65])
@pytest.mark.parametrize("blocksize", [1, 3, 64])
def test_blocks_one_by_one(n, blocksize):
    "The nearest level of each number over its block's largest, by hand; a block of zeros stays zero."
    x, code = torch.randn(n, generator=torch.Generator().manual_seed(n)), codebook("fp4_e2m1").tolist()
    x[:blocksize] = 0
    codes, absmax = quantize_blockwise(x, "fp4_e2m1", blocksize)
    assert codes.dtype == torch.uint8 and len(codes) == n and len(absmax) == -(-n // blocksize)
    assert absmax.tolist() == [x[i:i + blocksize].abs().max() for i in range(0, n, blocksize)]
    back = dequantize_blockwise(codes, absmax, "fp4_e2m1", blocksize)
    for i, (value, found) in enumerate(zip(x.tolist(), back.tolist())):
        scale = absmax[i // blocksize].item()
        best = min(abs(level * scale - value) for level in code)
        assert abs(abs(found - value) - best) < 1e-6 * max(scale, 1)
    assert not back[:blocksize].any()


def test_scales_whose_sum_is_too_large():
    "Numbers are finite one by one; the mean of scales, which double quantization takes off, has to be so too."
    x = torch.full((3, 64), 3e38)
    codes, absmax = quantize_blockwise(x, "int8")
    assert len(absmax) == 3 and torch.equal(dequantize_blockwise(codes, absmax, "int8"), x.view(-1))
    assert torch.equal(quantize_4bit(x, "nf4", double_quant=False).dequantize(), x)
    with pytest.raises(ValueError, match="the scales' mean overflows float32; quantize without double_quant"):
        quantize_4bit(x, "nf4", double_quant=True)


def test_the_first_of_several_that_are_not_finite():
    x = torch.ones(4, 64)
    x[2, 5], x[3, 1] = torch.nan, torch.inf
    for quantize in (quantize_4bit, quantize_blockwise):
        with pytest.raises(ValueError, match=r"got nan at index \[2, 5\] of shape \(4, 64\); mend or drop"):
            quantize(x, "nf4")


def test_two_codes_a_byte():
    "The first in the high nibble; an odd one has a 0 beside it."
    codes = torch.tensor([1, 2, 15], dtype=torch.uint8)
    packed = pack_4bit(codes)
    assert packed.tolist() == [[0x12], [0xf0]] and packed.dtype == torch.uint8
    assert unpack_4bit(packed).tolist() == [1, 2, 15, 0]
    assert torch.equal(unpack_4bit(packed, 3), codes) and torch.equal(unpack_4bit(packed, 2), codes[:2])
    assert pack_4bit(codes[:2]).tolist() == [[0x12]] and unpack_4bit(packed.view(1, 2), 3).tolist() == [1, 2, 15]


@pytest.mark.parametrize("n", [1, 127, 128])
def test_packed_numbers_again(n):
    "As unpacked ones, rounded once to the type asked for; float32 where none is."
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    codes, absmax = quantize_blockwise(x, "nf4", 32)
    back = dequantize_blockwise(codes, absmax, "nf4", 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = dequantize_packed(pack_4bit(codes), absmax, tuple(NF4.tolist()), 32, n, dtype)
        assert found.dtype == dtype and torch.equal(found, back.to(dtype))
    assert dequantize_packed(pack_4bit(codes), absmax, tuple(NF4.tolist()), 32, n).dtype == torch.float32


@pytest.mark.parametrize("n", [128, 129])
def test_blocks_of_64_where_nothing_is_said(n):
    x = torch.arange(1., n + 1)
    codes, absmax = quantize_blockwise(x, "int8")
    assert torch.equal(absmax, quantize_blockwise(x, "int8", 64)[1])
    assert torch.equal(dequantize_blockwise(codes, absmax, "int8"), dequantize_blockwise(codes, absmax, "int8", 64))
