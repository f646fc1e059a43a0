"""What is faster is the same: kernels against the plain path, and the plain path where kernels cannot be had.

Protects: bytes and bits of the C functions, values and gradients of the adapted layer, the switch, and the notice where
there is no compiler, or a Triton that does not work. Triton's kernels run on the GPU where there is one, else by
Triton's interpreter, in float32. tests/test_parity.py runs every comparison with bitsandbytes by both paths.
"""
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import searched
from qlora_lab.blockwise import dequantize_packed, midpoints
from qlora_lab.double_quant import BLOCKSIZES, DYNAMIC8, levels_by_code, quantize_4bit
from qlora_lab.engine import gpu
from qlora_lab.engine.adapted_linear import adapted_linear
from qlora_lab.engine.c_functions import compiled, dequantize_c, quantize_c
from qlora_lab.engine.dispatch import AT_WORK, faster, twin, use_kernels
from qlora_lab.engine.rounding import quantize_blocks, reciprocal
from qlora_lab.engine.triton_dequantize import dequantize_triton
from qlora_lab.engine.triton_quantize import quantize_absmax_triton, quantize_triton
from qlora_lab.linear4bit import Linear4bit, saved_for_backward
from qlora_lab.lora import LoRALinear

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    compiled.cache_clear()
    use_kernels()


@needs_compiler
@searched(200)
@given(values=st.lists(st.floats(-2. ** 100, 2. ** 100, width=32), min_size=1, max_size=64),
       blocks=st.integers(1, 300), blocksize=st.sampled_from(BLOCKSIZES), nested=st.booleans(),
       quant_type=st.sampled_from(["nf4", "fp4", "int4", "fp4_e2m1", "af4"]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_c_functions_give_the_plain_bits(values, blocks, blocksize, quant_type, nested, dtype):
    "Denormals, huge numbers, signed zeros, zeros alone: whatever the search comes up with."
    blocks = min(blocks, 300 * 64 // blocksize + 1)
    w = torch.tensor(values).repeat(blocks * blocksize // len(values) + 1)[:blocks * blocksize].to(dtype)
    if not w.isfinite().all(): return
    for ours, plain in zip(quantize_c(w, quant_type, blocksize), quantize_blocks(w, quant_type, blocksize)):
        assert torch.equal(ours, plain)
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
    code = ("import torch; from qlora_lab.double_quant import quantize_4bit; "
            "print(quantize_4bit(torch.ones(64, 64)).dequantize().eq(1).all().item())")
    def run():
        environment = os.environ | {"QLORA_LAB_CACHE": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no C kernels" not in run().stderr
    made, = tmp_path.rglob("*.so")
    made.write_bytes(made.read_bytes()[:100])
    again = run()
    assert again.stdout.strip() == "True" and again.stderr.count("no C kernels") == 1


def test_the_environment_switches_them_off():
    "QLORA_LAB_KERNELS=0 holds from the first weight on."
    code = ("import torch; from qlora_lab.double_quant import quantize_4bit; "
            "from qlora_lab.engine.dispatch import AT_WORK, FASTER; quantize_4bit(torch.ones(64, 64)).dequantize(); "
            "print(len(AT_WORK) > 0, set(AT_WORK) & set(FASTER))")
    environment = os.environ | {"QLORA_LAB_KERNELS": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True set()"


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
    linear = nn.Linear(96, 160, bias=bias, dtype=dtype)
    layer = LoRALinear(Linear4bit.from_linear(linear, compute_dtype=compute_dtype), r, alpha, dropout, dtype=adapter)
    nn.init.normal_(layer.lora_B.weight, std=0.05)
    return layer


@pytest.mark.parametrize("dropout", [0., 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute, tolerance", [(None, 2e-6), (torch.bfloat16, 1e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 96)], ids=str)
def test_an_adapted_layer_is_its_parts(shape, compute, tolerance, bias, dropout):
    layer, x = adapted(compute, bias, dropout), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for ours, plain in both_ways(layer, x):
        assert ours.shape == plain.shape and (ours - plain).norm() <= tolerance * plain.norm()


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
        config = TrainConfig(folder=tmp_path / str(on), steps=10, batch_size=2, rank=4, lr=5e-3, eval_examples=8,
                             eval_prompts=1)
        run = train(model, tokenizer, data, config, progress=False)
        losses.append([*run.losses, run.after.loss])
    assert losses[0][-1] < losses[0][0] and max(abs(a - b) for a, b in zip(*losses)) < 1e-4


# ---------------------------------------------------------------- Triton, on a GPU or by its interpreter

on_card = torch.cuda.is_available()  # by its interpreter Triton cuts bfloat16 off instead of rounding it
there = torch.device("cuda" if on_card else "cpu")
needs_triton = pytest.mark.skipif(gpu.triton is None, reason="Triton is not installed")


def normal(*shape, seed=0): return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(there)


@needs_triton
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize, n", [(32, 32 * 130), (64, 64 * 64), (4096, 3 * 4096), (64, 64 * 7 + 8)])
def test_triton_decodes_to_the_plain_bits(quant_type, nested, blocksize, n):
    "Ends of tiles, blocks and groups at different places."
    q = quantize_4bit(normal(n), quant_type, blocksize, nested)
    plain = dequantize_packed(q.packed, q.absmax, levels_by_code(quant_type), blocksize, n)
    for wide in (1, 2, 8):
        assert torch.equal(dequantize_triton(q, torch.float32, None, wide).view(torch.int32), plain.view(torch.int32))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_weight_is_written_where_it_is_wanted(kernels):
    "Two weights one below the other, in the dtype of the place, by the kernel of this device and by the plain path."
    use_kernels(kernels)
    parts = [quantize_4bit(normal(n, 128, seed=n)) for n in (32, 64)]
    whole = torch.full((96, 128), 7., dtype=torch.bfloat16, device=there)
    for q, rows in zip(parts, whole.split((32, 64))): assert q.dequantize(out=rows) is rows
    assert torch.equal(whole, torch.cat([q.dequantize(torch.bfloat16) for q in parts]))
    wide = torch.full((64, 256), 7., device=there)
    parts[1].dequantize(out=wide[:, :128])
    assert torch.equal(wide[:, :128], parts[1].dequantize(torch.float32)) and (wide[:, 128:] == 7).all()
    with pytest.raises(ValueError, match=r"shape \(64, 128\), got \(16, 128\)"):
        parts[1].dequantize(out=wide[:16, :128])


@needs_triton
@pytest.mark.parametrize("rows, columns, gap", [(33, 64, 8), (16, 72, 24), (130, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if on_card else [torch.float32])
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
    "Columns apart, turned, rows at odd places, as long as the weight's but of other numbers; nothing else is touched."
    use_kernels(by != "plain")
    q = quantize_4bit(normal(16, 64))
    wholes = [torch.full((n,), 7., device=there) for n in (16 * 256, 64 * 16, 16 * 68, 64 * 16 * 64)]
    parts = (wholes[0].view(16, 256)[:, :128:2], wholes[1].view(64, 16).t(), wholes[2].view(16, 68)[:, :64],
             wholes[3].view(64, 16, 64)[:, :, 0].t())
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
        def decoded(p): return dequantize_packed(p, scales, levels_by_code("fp4"), blocksize, n)[:whole]
        assert torch.equal(decoded(packed), decoded(plain))
    else: assert torch.equal(packed[:(whole + 1) // 2], plain[:(whole + 1) // 2])


@needs_triton
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_triton_shows_a_bad_number_in_its_block(bad):
    "A maximum that passes over NaN would hide it from the check."
    w = normal(256)
    w[70] = bad
    absmax = quantize_triton(w, "nf4", 64)[1]
    assert not absmax[1].isfinite() and absmax[[0, 2, 3]].isfinite().all()


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


# ---------------------------------------------------------------- more than 2^31 weights

LARGE = 2 ** 31 + 64

LAST_PROGRAM = """
import numpy as np, torch, triton.language as tl
from triton.runtime import interpreter
from qlora_lab.engine.triton_dequantize import _dequantize
number, end = int(sys.argv[1]), int(sys.argv[2])  # of the program; weights before it
def far(t, kind, before):  # a pointer so far before a small tensor that the program's own places fall into it
    address = np.array([(t.data_ptr() - before * t.element_size()) % 2 ** 64], dtype=np.uint64)  # places add up to t's
    return tl.tensor(interpreter.TensorHandle(address, tl.pointer_type(kind)), tl.pointer_type(kind))
def program_id(self, axis): return interpreter.TensorHandle(np.array([number], dtype=np.int32), tl.int32)
type(interpreter.interpreter_builder).create_get_program_id = program_id
words, absmax = torch.full((8,), 0x0f0f0f0f, dtype=torch.int32), torch.tensor([2.])
levels, out = torch.arange(16.), torch.full((96,), 7.)
packed, stats, to = far(words, tl.int32, end // 8), far(absmax, tl.float32, end // 64), far(out, tl.float32, end)
_dequantize[(1,)](packed, stats, stats, stats, stats, levels, to, end // 8 + 8, 0,
                  ROW=0, PER_BLOCK=8, NESTED=False, WIDE=8, TILE=256, LARGE=True)
assert out[:64].tolist() == [0., 30.] * 32 and (out[64:] == 7).all(), out
"""


@needs_triton
@pytest.mark.skipif(on_card, reason="on a card the weight itself is there")
@pytest.mark.parametrize("end", [2 ** 31, 2 ** 35])
def test_the_last_program_of_a_large_weight_finds_its_places(end):
    "Addresses beyond 2^31: 64 weights, a tile of their own. A wrong address would end the process, so it has its own."
    code = [sys.executable, "-c", "import sys\n" + LAST_PROGRAM, str(end // 2048), str(end)]
    run = subprocess.run(code, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def no_room():
    "Two bytes a weight in, two out, half a byte packed; and what a comparison takes."
    return not on_card or torch.cuda.mem_get_info()[0] < 24 << 30


@pytest.mark.skipif(no_room(), reason="needs a GPU with 24 GiB free")
@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_of_more_than_2_31_numbers(nested):
    "Its first and last blocks are a small weight's: packed bytes, scales and decoded bits."
    small = normal(2048).bfloat16()
    w = torch.full((LARGE,), 0.01, dtype=torch.bfloat16, device=there)
    w[:1024], w[-1024:] = small[:1024], small[1024:]
    q, alone = quantize_4bit(w, double_quant=nested), quantize_4bit(small, double_quant=False)
    del w
    ends = torch.cat([q.packed[:512], q.packed[-512:]])
    assert torch.equal(ends, alone.packed)
    decoded = q.dequantize()
    scales = q.absmax
    assert nested or torch.equal(torch.cat([scales[:16], scales[-16:]]), alone.absmax)
    def plainly(packed, absmax):
        return dequantize_packed(packed, absmax, levels_by_code("nf4"), 64, 1024, torch.bfloat16)
    assert torch.equal(decoded[:1024], plainly(q.packed[:512], scales[:16]))
    assert torch.equal(decoded[-1024:], plainly(q.packed[-512:], scales[-16:]))
    between = decoded[1024:-1024]
    assert between.amin() == between.amax() > 0


# ---------------------------------------------------------------- streams, compilers, broken installations

@pytest.mark.skipif(not on_card, reason="no GPU")
def test_kernels_on_a_side_stream():
    "They run on the current stream, after what it holds and before what comes: no wait for the default one."
    w, stream = normal(4096, 4096).bfloat16(), torch.cuda.Stream()
    q = quantize_4bit(w)
    plain = q.dequantize()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what a kernel on another stream would not wait for
        doubled = w * 2
        there_again = quantize_4bit(doubled)
        back = there_again.dequantize()
        halved = back / 2
    stream.synchronize()
    assert torch.equal(there_again.packed, q.packed) and torch.equal(halved, plain)


def compiled_layer(layer, x, **how):
    "Output, gradient of the input and bytes that autograd keeps, of a layer and of the compiled one."
    found = []
    for forward in (layer, torch.compile(layer, fullgraph=True, **how)):
        given = x.clone().requires_grad_()
        forward(given).float().cos().sum().backward()  # the first call compiles
        with saved_for_backward(layer) as kept: y = forward(given)
        found.append((y.detach(), given.grad, sum(size for _, _, size in kept.values())))
    return found


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"] if on_card else ["aot_eager"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_is_one_graph(kernels, backend, bias):
    "fullgraph=True: values and gradients to the bit, and no decoded weight is kept between the passes."
    use_kernels(kernels)
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x = Linear4bit.from_linear(nn.Linear(128, 96, bias=bias)).to(there), normal(5, 128)
    (y, grad, kept), (y_compiled, grad_compiled, kept_compiled) = compiled_layer(layer, x, backend=backend)
    assert torch.equal(y, y_compiled) and torch.equal(grad, grad_compiled)
    assert kept == 0 and kept_compiled < 128 * 96


def test_a_compiled_adapter_is_one_graph():
    "While torch reads it the plain pieces do the work, up to rounding the same."
    torch._dynamo.reset()
    layer, x = adapted().to(there), normal(5, 96) * 50
    (y, grad, _), (y_compiled, grad_compiled, kept) = compiled_layer(layer, x, backend="aot_eager")
    assert torch.allclose(y, y_compiled, atol=1e-5) and torch.allclose(grad, grad_compiled, atol=1e-5)
    assert kept < 96 * 160 * 4


def test_a_bias_that_learns_gets_its_gradient_from_a_compiled_layer():
    torch._dynamo.reset()
    layer, x = Linear4bit.from_linear(nn.Linear(128, 64)).to(there), normal(2, 3, 128)
    layer.bias.requires_grad_()
    grads = []
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        forward(x).cos().sum().backward()
        grads.append(layer.bias.grad.clone())
    assert torch.equal(*grads)


@pytest.fixture
def pretended_card(monkeypatch):
    "A GPU that Triton supports, as far as torch can tell."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    gpu.first_kernel.cache_clear()
    yield
    monkeypatch.undo()
    gpu.first_kernel.cache_clear()


def notices(work):
    "The lines of notice that something gives."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in said if "no GPU kernels" in str(w.message)]


def test_a_triton_that_cannot_be_imported(pretended_card, monkeypatch):
    "Whatever it raises: one line of notice, and the plain pieces do the work."
    monkeypatch.setattr(gpu, "import_error", RuntimeError("libtriton.so: undefined symbol\nsomewhere"))
    notice, = notices(use_kernels)
    assert "Triton cannot be imported, RuntimeError" in notice and "\n" not in notice
    assert twin("dequantize", "cuda") is None and twin("forward_backward", "cuda") is None


def test_a_broken_triton_breaks_no_import(tmp_path):
    "A package of that name that raises something other than ImportError."
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('built for another machine')")
    code = ("import torch; from qlora_lab.engine import gpu; from qlora_lab.double_quant import quantize_4bit; "
            "from qlora_lab.engine import fused_adamw, triton_dequantize, triton_quantize; "
            "torch.cuda.is_available = lambda: True; quantize_4bit(torch.ones(64, 64)); print(gpu.gpu_lack())")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    lack = "Triton cannot be imported, RuntimeError: built for another machine"
    assert run.stdout.strip() == lack, run.stderr[-2000:]
    assert run.stderr.count("no GPU kernels") == 1


def test_a_triton_whose_first_kernel_fails(pretended_card, monkeypatch):
    "It is tried when a twin is first to work there, not before: one line of notice, and the plain pieces do the work."
    def failing(*args, **more): raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")
    monkeypatch.setattr(gpu, "triton", object())
    monkeypatch.setattr(torch, "zeros", failing)
    assert not notices(use_kernels) and not gpu.first_kernel.cache_info().currsize
    notice, = notices(lambda: twin("dequantize", "cuda"))
    assert "first kernel failed, RuntimeError" in notice and "\n" not in notice
    assert twin("dequantize", "cuda") is None and twin("fuse_layers", "cuda") is None
    assert twin("adapted_linear", "cuda") is not None  # written in torch's own operations
    assert "first kernel failed" in gpu.gpu_lack() and not notices(lambda: twin("dequantize", "cuda"))
