"The levels of NF4 and AF4: by the quantiles of another library, by bitsandbytes' own tables, and what cannot be asked."
from statistics import NormalDist

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lab.blockwise import codebook
from qlora_lab.nf4 import AF4, NF4, create_normal_map


def by_hand(offset, bits):
    "Quantiles at evenly spaced probabilities: half of the codes above 0, one fewer below."
    def half(n): return [NormalDist().inv_cdf(offset + (0.5 - offset) * k / n) for k in range(n)]
    above, below = half(2 ** (bits - 1)), half(2 ** (bits - 1) - 1)
    return torch.tensor([-q / above[0] for q in below] + [0.] + [q / above[0] for q in reversed(above)])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("offset", [0.6, 0.9677083, 0.995])
def test_levels_are_quantiles(offset, bits):
    levels = create_normal_map(offset, bits)
    assert levels.dtype == torch.float32 and len(levels) == 2 ** bits
    assert torch.allclose(levels, by_hand(offset, bits), atol=2e-6)


def test_what_is_asked_where_nothing_is_said():
    "The offset and the bits of the paper: as bitsandbytes' function makes them, and as NF4's table has them."
    assert torch.equal(create_normal_map(), create_normal_map(0.9677083, 4))
    theirs = bnb.create_normal_map().unique()  # filled up with zeros to 256
    assert torch.allclose(create_normal_map(), theirs, atol=1e-6)
    assert torch.allclose(create_normal_map(), NF4, atol=2e-6)


@pytest.mark.parametrize("ours, name", [(NF4, "nf4"), (AF4, "af4")])
def test_tables_are_those_of_bitsandbytes(ours, name):
    "bitsandbytes lists AF4 from the top."
    theirs = bnb.get_4bit_type(name, device="cpu").sort().values
    assert torch.equal(ours, theirs) and torch.equal(ours, codebook(name))


@pytest.mark.parametrize("offset", [0.5, 1., 0.4, 1.2, float("nan")])
def test_an_offset_is_a_probability_above_a_half(offset):
    with pytest.raises(ValueError, match=f"between 0.5 and 1, got {offset}"): create_normal_map(offset)


@pytest.mark.parametrize("bits", [1, 9])
def test_two_to_eight_bits(bits):
    with pytest.raises(ValueError, match=f"expected 2 to 8 bits, got {bits}"): create_normal_map(bits=bits)
