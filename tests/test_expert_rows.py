"""Rows of experts: kernels against plain twins, at widths that no tile divides and wider than a tile.

Protects: sums over a token's rows, the gate's way back with shares, keys of every width, meta tensors.
"""
import pytest
import torch

from conftest import devices
from qlora_lab.engine import expert_rows as rows_of
from qlora_lab.engine.activation import activation
from qlora_lab.engine.gpu import triton

needs_triton = pytest.mark.skipif(triton is None, reason="no Triton")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
WHERE = [pytest.param("cpu", torch.float32, marks=interpreted), pytest.param("cuda", torch.float32, marks=gpu),
         pytest.param("cuda", torch.bfloat16, marks=gpu)]  # Triton's interpreter has no products in bfloat16


def numbers(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def choices(tokens, each, experts, device="cpu"):
    at = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(3)).argsort(1)
    return at[:, :each].contiguous().to(device)


def near(a, b, dtype):
    off = (a.float() - b.float()).abs().max() / b.float().abs().max()
    return off < (1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("experts", [1, 4, 255, 256, 257, 600])
def test_rows_stand_by_expert(experts, device):
    "However many there are: each row has its token's choice, and each expert's rows end where it says."
    chosen = torch.randint(experts, (50, 3), generator=torch.Generator().manual_seed(0)).to(device)
    rows = rows_of.Sorted(*(t.cpu() for t in rows_of.sort_rows(chosen, experts)))
    chosen = chosen.cpu()
    flat = chosen.reshape(-1)
    assert torch.equal(rows.expert.long(), flat.sort().values) and torch.equal(flat[rows.order], rows.expert.long())
    assert torch.equal(rows.ends.long(), flat.bincount(minlength=experts).cumsum(0)) and rows.ends.dtype == torch.int32
    assert torch.equal(rows.order[rows.back], torch.arange(150))


@needs_triton
@pytest.mark.parametrize("device, dtype", WHERE)
@pytest.mark.parametrize("each, width", [(1, 5), (3, 64), (8, 1500)])
def test_tokens_are_put_together(each, width, dtype, device):
    rows = rows_of.sort_rows(choices(7, each, 9, device), 9)
    y = numbers(7 * each, width, device=device, dtype=dtype)
    for share in (None, numbers(7, each, seed=1, device=device)):
        plain = rows_of.combine_plain(y, rows, each, share)
        found = rows_of.combine_kernel(y, rows, each, share)
        assert found.dtype == dtype and found.shape == (7, width) and near(found, plain, dtype)


@needs_triton
@pytest.mark.parametrize("device, dtype", WHERE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("curve, width", [("silu", 37), ("silu", 1500), ("tanh", 64), ("erf", 5)])
def test_the_way_back_through_gate_and_share(curve, width, gated, dtype, device):
    u, v = (numbers(11, n, seed=n, device=device, dtype=dtype) for n in (width * (1 + gated), width))
    share = numbers(11, seed=2, device=device, dtype=dtype)
    plain, kernel, left = v.clone(), v.clone(), v.clone()
    expected = rows_of.shared_gate_backward_plain(plain, u, share, curve, gated)
    found = rows_of.shared_gate_backward_kernel(kernel, u, share, curve, gated)
    without = rows_of.shared_gate_backward_kernel(left, u, share, curve, gated, keep=False)
    for a, b in zip((*found, kernel), (*expected, plain), strict=True): assert a.dtype == b.dtype and near(a, b, dtype)
    assert all(map(torch.equal, found, without)) and torch.equal(left, v)
    assert near(kernel, activation(u, 0, curve, gated), dtype) and found[1].dtype == torch.float32


def test_meta_tensors_pass():
    rows = rows_of.Sorted(*(t.to("meta") for t in rows_of.sort_rows(choices(6, 2, 4), 4)))
    y, u = torch.empty(12, 8, device="meta"), torch.empty(12, 16, device="meta")
    assert rows_of.combine(y, rows, 2).shape == (6, 8)
    du, d_share = rows_of.shared_gate_backward(y, u, torch.empty(12, device="meta"))
    assert du.shape == (12, 16) and d_share.shape == (12,)
