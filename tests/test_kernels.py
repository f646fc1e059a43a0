"""What is faster is the same: kernels against the plain path, and the plain path where kernels cannot be had.

Protects: bytes and bits of the C functions, values and gradients of the adapted layer, the switch, and the notice where there is no compiler.
Triton's kernels run on the GPU where there is one, else by Triton's interpreter, in float32. tests/test_parity.py runs every comparison with bitsandbytes by both paths.
"""
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_lab import kernels
from qlora_lab.blockwise import dequantize_packed, midpoints
from qlora_lab.double_quant import BLOCKSIZES, DYNAMIC8, levels_by_code, quantize_4bit
from qlora_lab.engine.adapted_linear import adapted_linear
from qlora_lab.engine.dispatch import AT_WORK, faster, twin, use_kernels
from qlora_lab.engine.rounding import quantize_blocks, reciprocal
from qlora_lab.kernels import (
    compiled,
    dequantize_c,
    dequantize_triton,
    quantize_absmax_triton,
    quantize_c,
    quantize_triton,
)
from qlora_lab.linear4bit import Linear4bit
from qlora_lab.lora import LoRALinear

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    compiled.cache_clear()
    use_kernels()


@needs_compiler
@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(-2. ** 100, 2. ** 100, width=32), min_size=1, max_size=64), blocks=st.integers(1, 300), blocksize=st.sampled_from(BLOCKSIZES),
       quant_type=st.sampled_from(["nf4", "fp4", "int4", "fp4_e2m1", "af4"]), nested=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_c_functions_give_the_plain_bits(values, blocks, blocksize, quant_type, nested, dtype):
    "Denormals, huge numbers, signed zeros, zeros alone: whatever the search comes up with."
    blocks = min(blocks, 300 * 64 // blocksize + 1)
    w = torch.tensor(values).repeat(blocks * blocksize // len(values) + 1)[:blocks * blocksize].to(dtype)
    if not w.isfinite().all(): return
    for ours, plain in zip(quantize_c(w, quant_type, blocksize), quantize_blocks(w, quant_type, blocksize)): assert torch.equal(ours, plain)
    q = quantize_4bit(w, quant_type, blocksize, nested)
    for to in (torch.float32, torch.bfloat16):
        plain = dequantize_packed(q.packed, q.absmax, levels_by_code(quant_type), blocksize, len(w), to)
        bits = torch.int32 if to == torch.float32 else torch.int16
        assert torch.equal(dequantize_c(q, to).view(bits), plain.view(bits))


@needs_compiler
def test_what_the_c_functions_leave_to_the_plain_path():
    "A partial last block, float16, rows that are not side by side: the same call, the same bytes."
    w = torch.randn(5, 77, generator=torch.Generator().manual_seed(0))
    assert quantize_c(w, "nf4", 64) is None and dequantize_c(quantize_4bit(w), torch.float32) is None
    assert dequantize_c(quantize_4bit(torch.ones(64, 64)), torch.float16) is None
    across = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(quantize_4bit(across).packed, quantize_4bit(across.contiguous()).packed)


@needs_compiler
def test_a_bad_number_is_named_by_both_paths():
    w = torch.ones(4, 64)
    w[2, 5] = torch.nan
    for on in (True, False):
        use_kernels(on)
        with pytest.raises(ValueError, match=r"nan at index \[2, 5\]"): quantize_4bit(w)


@pytest.mark.parametrize("path, cc", [("", None), (None, "/bin/false")], ids=["none", "broken"])
def test_without_a_compiler_one_notice_and_the_same_bytes(path, cc, monkeypatch, tmp_path):
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    usual = quantize_4bit(w)
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path))
    if path is not None: monkeypatch.setenv("PATH", path)
    if cc: monkeypatch.setenv("CC", cc)
    compiled.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not use_kernels()["cpu"] and not use_kernels()["cpu"]
        plain = quantize_4bit(w)
    assert len(said) == 1 and "plain torch operations" in str(said[0].message) and "\n" not in str(said[0].message)
    assert twin("dequantize", "cpu") is None
    assert torch.equal(plain.packed, usual.packed) and torch.equal(plain.dequantize(), usual.dequantize())


@needs_compiler
def test_a_library_cut_short_is_no_disaster(tmp_path):
    "The cache folder holds half a file: one notice, the plain path, right bytes."
    code = "import torch; from qlora_lab.double_quant import quantize_4bit; print(quantize_4bit(torch.ones(64, 64)).dequantize().eq(1).all().item())"
    def run(): return subprocess.run([sys.executable, "-c", code], env=os.environ | {"QLORA_LAB_CACHE": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert "no C kernels" not in run().stderr
    made, = tmp_path.rglob("*.so")
    made.write_bytes(made.read_bytes()[:100])
    again = run()
    assert again.stdout.strip() == "True" and again.stderr.count("no C kernels") == 1


def test_the_environment_switches_them_off():
    "QLORA_LAB_KERNELS=0 holds from the first weight on."
    code = ("import torch; from qlora_lab.double_quant import quantize_4bit; from qlora_lab.engine.dispatch import AT_WORK, FASTER; "
            "quantize_4bit(torch.ones(64, 64)).dequantize(); print(len(AT_WORK) > 0, set(AT_WORK) & set(FASTER))")
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"QLORA_LAB_KERNELS": "0"}, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "True set()"


def plain_layer(layer, x):
    use_kernels(False)
    try: return layer(x)
    finally: use_kernels()


def both_ways(layer, x, need=True):
    "Output and every gradient, by the kernel and by lesson 06."
    found = []
    for forward in (adapted_linear, plain_layer):
        layer.zero_grad()
        given = x.clone().requires_grad_(need)
        torch.manual_seed(1)
        y = forward(layer, given)
        (y.float().cos().sum() if y.requires_grad else y).backward()
        found.append([y.detach(), given.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad])
    return zip(*found)


def adapted(compute_dtype=None, bias=False, dropout=0., dtype=torch.float32, adapter=torch.float32, r=8, alpha=30):
    torch.manual_seed(0)
    layer = LoRALinear(Linear4bit.from_linear(nn.Linear(96, 160, bias=bias, dtype=dtype), compute_dtype=compute_dtype), r, alpha, dropout, dtype=adapter)
    nn.init.normal_(layer.lora_B.weight, std=0.05)
    return layer


@pytest.mark.parametrize("dropout", [0., 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute, tolerance", [(None, 2e-6), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16 products"])
@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 96)], ids=str)
def test_an_adapted_layer_is_its_parts(shape, compute, tolerance, bias, dropout):
    layer, x = adapted(compute, bias, dropout), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for ours, plain in both_ways(layer, x): assert ours.shape == plain.shape and (ours - plain).norm() <= tolerance * plain.norm()


def test_an_adapted_layer_in_bfloat16_throughout():
    "As on a GPU: within the rounding of bfloat16, in the types that the plain path gives."
    layer = adapted(dtype=torch.bfloat16)
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    for ours, plain in both_ways(layer, x):
        assert ours.dtype == plain.dtype and (ours.float() - plain.float()).norm() <= 1e-2 * plain.float().norm()


def test_an_input_without_gradient_gets_none():
    layer, x = adapted(), torch.randn(7, 96, generator=torch.Generator().manual_seed(2))
    (_, (gx, plain), *grads) = both_ways(layer, x, need=False)
    assert gx is None and plain is None and all((a - b).norm() <= 2e-6 * b.norm() for a, b in grads)


def test_a_changed_weight_is_noticed():
    "Packed bytes that change between the passes would give wrong gradients in silence."
    layer, x = adapted(), torch.randn(7, 96, requires_grad=True)
    y = adapted_linear(layer, x)
    layer.base_layer.stats.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): y.sum().backward()


def test_what_an_adapted_layer_leaves_to_the_plain_path():
    x = torch.randn(2, 96)
    assert adapted_linear(LoRALinear(nn.Linear(96, 160)), x) is None
    assert adapted_linear(adapted(), x.half()) is None
    trained = adapted(bias=True)
    trained.base_layer.bias.requires_grad_()
    assert adapted_linear(trained, x) is None
    with torch.autocast("cpu", torch.bfloat16): assert adapted_linear(adapted(), x) is None


def test_a_layer_uses_the_kernel_and_the_switch_reaches_it(monkeypatch):
    "Without this, every comparison above could be of the plain path with itself."
    layer, x, used = adapted(), torch.randn(2, 96), []
    monkeypatch.setitem(AT_WORK, ("adapted_linear", "cpu"), lambda *args: used.append(1) or adapted_linear(*args))
    layer(x)
    assert used
    use_kernels(False)
    layer(x)
    assert len(used) == 1 and faster("adapted_linear", x.device, layer, x) is None


def test_a_run_ends_the_same_by_both_paths(tiny, data, tmp_path):
    "Ten steps: the same losses within rounding, by kernels and by plain torch."
    from qlora_lab.model import load_model
    from qlora_lab.train import TrainConfig, train
    losses = []
    for on in (True, False):
        use_kernels(on)
        model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
        run = train(model, tokenizer, data, TrainConfig(folder=tmp_path / str(on), steps=10, batch_size=2, rank=4, lr=5e-3, eval_examples=8, eval_prompts=1), progress=False)
        losses.append([*run.losses, run.after.loss])
    assert losses[0][-1] < losses[0][0] and max(abs(a - b) for a, b in zip(*losses)) < 1e-4


# ---------------------------------------------------------------- Triton, on a GPU or by its interpreter

there = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


def normal(*shape, seed=0): return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(there)


@needs_triton
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize, n", [(32, 32 * 130), (64, 64 * 64), (4096, 3 * 4096), (64, 64 * 7 + 8)])
def test_triton_decodes_to_the_plain_bits(quant_type, nested, blocksize, n):
    "Ends of tiles, blocks and groups at different places."
    q = quantize_4bit(normal(n), quant_type, blocksize, nested)
    plain = dequantize_packed(q.packed, q.absmax, levels_by_code(quant_type), blocksize, n)
    for wide in (1, 2, 8): assert torch.equal(dequantize_triton(q, torch.float32, None, wide).view(torch.int32), plain.view(torch.int32))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_weight_is_written_where_it_is_wanted(kernels):
    "Two weights one below the other, in the dtype of the place, by the kernel of this device and by the plain path."
    use_kernels(kernels)
    parts, whole = [quantize_4bit(normal(n, 128, seed=n)) for n in (32, 64)], torch.full((96, 128), 7., dtype=torch.bfloat16, device=there)
    for q, rows in zip(parts, whole.split((32, 64))): assert q.dequantize(out=rows) is rows
    assert torch.equal(whole, torch.cat([q.dequantize(torch.bfloat16) for q in parts]))
    wide = torch.full((64, 256), 7., device=there)
    parts[1].dequantize(out=wide[:, :128])
    assert torch.equal(wide[:, :128], parts[1].dequantize(torch.float32)) and (wide[:, 128:] == 7).all()
    with pytest.raises(ValueError, match=r"shape \(64, 128\), got \(16, 128\)"): parts[1].dequantize(out=wide[:16, :128])


@needs_triton
@pytest.mark.parametrize("rows, columns, gap", [(33, 64, 8), (16, 72, 24), (130, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32])  # Triton's interpreter cuts bfloat16 off
def test_triton_writes_to_a_part_of_wider_rows(rows, columns, gap, dtype):
    "Every bit in its place, nothing in between; blocks go over the ends of rows."
    q, wide = quantize_4bit(normal(rows, columns)), torch.full((rows, columns + gap), 7., dtype=dtype, device=there)
    assert dequantize_triton(q, dtype, wide[:, :columns]).data_ptr() == wide.data_ptr()
    use_kernels(False)
    assert torch.equal(wide[:, :columns], q.dequantize(dtype)) and (wide[:, columns:] == 7).all()


@needs_triton
def test_what_triton_leaves_to_the_plain_path():
    assert dequantize_triton(quantize_4bit(normal(3, 5)), torch.float32) is None


@pytest.mark.parametrize("by", ["this device's kernel", "plain", pytest.param("triton", marks=needs_triton)])
def test_a_weight_is_written_to_strange_places(by):
    "Columns apart, turned, rows at odd places, rows as long as the weight's but of other numbers: right all the same, and nothing else is touched."
    use_kernels(by != "plain")
    q = quantize_4bit(normal(16, 64))
    wholes = [torch.full((n,), 7., device=there) for n in (16 * 256, 64 * 16, 16 * 68, 64 * 16 * 64)]
    parts = wholes[0].view(16, 256)[:, :128:2], wholes[1].view(64, 16).t(), wholes[2].view(16, 68)[:, :64], wholes[3].view(64, 16, 64)[:, :, 0].t()
    for whole, part in zip(wholes, parts):
        assert (dequantize_triton(q, torch.float32, part) if by == "triton" else q.dequantize(out=part)) is part
        assert torch.equal(part, q.dequantize(torch.float32)) and (whole == 7).sum() == whole.numel() - 16 * 64


@needs_triton
@pytest.mark.parametrize("quant_type", ["nf4", "int4", "fp4"])
@pytest.mark.parametrize("blocksize, n", [(32, 4096), (64, 64 * 37), (512, 512 * 5), (64, 64 * 9 + 13), (4096, 5000)])
def test_triton_codes_to_the_plain_bytes(quant_type, blocksize, n):
    "Whole blocks by the rule of this device; a partial last one by the GPU's, which scales it like any other."
    w = normal(n, seed=n)
    packed, absmax = quantize_triton(w, quant_type, blocksize)
    plain, scales = quantize_blocks(w, quant_type, blocksize)
    assert packed.shape == plain.shape and torch.equal(absmax, scales)
    whole = n // blocksize * blocksize if there.type == "cpu" else n
    if quant_type == "fp4" and there.type == "cpu":  # the sign of zero differs from device to device
        ours, theirs = (dequantize_packed(p, scales, levels_by_code("fp4"), blocksize, n)[:whole] for p in (packed, plain))
        assert torch.equal(ours, theirs)
    else: assert torch.equal(packed[:(whole + 1) // 2], plain[:(whole + 1) // 2])


@needs_triton
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_triton_shows_a_bad_number_in_its_block(bad):
    "A maximum that passes over NaN would hide it from the check."
    w = normal(256)
    w[70] = bad
    assert not quantize_triton(w, "nf4", 64)[1][1].isfinite() and quantize_triton(w, "nf4", 64)[1][[0, 2, 3]].isfinite().all()


@needs_triton
def test_triton_gives_a_block_of_zeros_code_zero():
    w = normal(256)
    w[64:128] = 0
    packed, absmax = quantize_triton(w, "nf4", 64)
    assert not packed[32:64].any() and absmax[1] == 0 and packed[:32].any()


@needs_triton
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 1000])
def test_triton_codes_statistics_by_the_search(blocks):
    "Nearest of 256 levels, ties to the even code; equal scales alone give code 0."
    absmax = normal(blocks, seed=blocks).abs()
    absmax[: blocks // 2: 7] = absmax.mean()
    codes, absmax2, offset = quantize_absmax_triton(absmax)
    assert offset == absmax.mean()
    for at in range(0, blocks, 256):
        x = absmax[at:at + 256] - offset
        top = x.abs().max()
        assert absmax2[at // 256] == top
        scaled, middle = x * reciprocal(top), midpoints(DYNAMIC8).to(there)
        below, above = (torch.bucketize(scaled, middle, right=r) for r in (False, True))
        expected = torch.where(above % 2 == 0, above, below) if top else torch.zeros_like(below)
        assert torch.equal(codes[at:at + 256].int(), expected.int())
