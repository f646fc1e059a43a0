"""Examples of a packed row are what they are alone: losses, gradients, runs; on a CPU and, where there is one, a GPU.

Protects: attention that stops at an example's border, positions that begin again, the first token that nobody learns,
rows that hold what they may, and the refusal of models that cannot do it.
"""
import sys
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from families import FAMILIES, build
from hypothesis import given
from hypothesis import strategies as st
from test_fused import off, small
from test_fused_families import EACH, gemma2_by_the_way_that_leaves_its_cap_out, made  # noqa: F401  a fixture
from test_step import Recording, recordings  # noqa: F401  a fixture
from transformers import Gemma2PreTrainedModel

from conftest import devices, make_llama
from qlora_lab import plan
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers
from qlora_lab.data import Example, Tokens, collate
from qlora_lab.engine import beside
from qlora_lab.engine.dispatch import standing_in, use_kernels
from qlora_lab.engine.fusing import fuse_layers, needs_no_mask
from qlora_lab.engine.packed_attention import (
    Segments,
    _flash_takes,
    by_flash,
    flash_knows_segments,
    in_segments,
    segment_attention,
    segment_attention_backward,
    side_by_side,
)
from qlora_lab.engine.packed_plain import hands_on
from qlora_lab.engine.packed_rows import filled, filled_row, summed_loss
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.engine.step_graph import forward_backward
from qlora_lab.lora import trainable
from qlora_lab.memory import watch_step
from qlora_lab.model import load_model
from qlora_lab.packing import check_packing, in_rows, pack, packed_batches, row_tokens
from qlora_lab.records import LabError
from qlora_lab.runs import TrainConfig
from qlora_lab.train import answer_losses, answer_places, train, train_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
REFUSED = {"bloom": "no positions", "mamba": "no positions", "mamba2": "no positions", "qwen3_next": "would see"}


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    use_kernels()


def examples(lengths, words=120, seed=0):
    "Examples of random tokens; the first token is learned too, if one could."
    generator = torch.Generator().manual_seed(seed)
    def one(n):
        ids, mask = torch.randint(1, words, (n,), generator=generator), torch.rand(n, generator=generator) < 0.6
        return Tokens(ids, mask, Example(({"role": "assistant", "content": "x"},)))
    some = [one(n) for n in lengths]
    for t in some: t.mask[0] = t.mask[-1] = True
    return some


def learned(model, batch, grads=True):
    "Loss of each learned token, and the gradient of their sum with respect to all that learns."
    losses = answer_losses(model, batch)[0]
    params = trainable(model)
    found = torch.autograd.grad(losses.sum(), params, allow_unused=True) if grads else ()
    return losses.detach(), torch.cat([torch.zeros(p.numel()) if g is None else g.flatten()
                                       for p, g in zip(params, found)]) if grads else None


@pytest.fixture(scope="module")
def several():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield examples([21, 9, 33, 1, 14, 2])
    torch.set_num_threads(before)


MARKED = {*FAMILIES} - {*REFUSED, "gpt2", "opt", "falcon", "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text"}
if not Gemma2PreTrainedModel._supports_sdpa: MARKED.remove("gemma2")  # newer transformers


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_each_family_as_it_is_alone(name, several):
    """Losses and gradients of a row are those of the batch and of each example alone, by marks and by masks; windows
    are shorter than examples."""
    more = {"sliding_window": 5} if "sliding_window" in vars(FAMILIES[name]()) else {}
    model = build(name, **more).train()
    for key, p in model.named_parameters(): p.requires_grad_(p.dim() == 2 and (".layers." in key or ".h." in key))
    batch, expected = learned(model, collate(several))
    alone = torch.cat([learned(model, collate([t]), grads=False)[0] for t in several])
    assert hands_on(model) == (name in MARKED)
    for by_marks in (True, False)[name not in MARKED:]:
        use_kernels(by_marks)
        check_packing(model)
        losses, slope = learned(model, pack(several))
        assert len(losses) == sum(int(t.mask[1:].sum()) for t in several)
        assert off(losses, batch) < 1e-5 and off(losses, alone) < 1e-5 and off(slope, expected) < 2e-5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_nothing_is_seen_of_another_example(name, several):
    "Other tokens in the first example leave every bit of the second one's losses, but for experts' rounding."
    model = build(name)
    first, other, second = several[0], examples([21], seed=5)[0], several[2]
    with torch.no_grad(): found = [answer_losses(model, pack([t, second]))[0] for t in (first, other)]
    mine = int(second.mask[1:].sum())
    ends = [losses[-mine:] for losses in found]
    routed = any("expert" in key for key, _ in model.named_modules())
    assert off(*ends) < 1e-6 if routed else torch.equal(*ends)
    assert not torch.equal(found[0][:3], found[1][:3])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused(name):
    with pytest.raises(LabError, match=f"packing: {name}: .*{REFUSED[name]}.*leave packing out"):
        check_packing(build(name))


def test_what_leaks_is_noticed(monkeypatch):
    "The control: the same model without the joined masks, and one whose positions go on, are both refused."
    import qlora_lab.packing as packing
    model = make_llama()
    check_packing(model)
    with monkeypatch.context() as m:
        m.setattr(packing, "_within", lambda make, same, *args, **more: make(*args, **more))
        use_kernels(False)
        with pytest.raises(LabError, match="would see the one before"): check_packing(model)
    learned_positions = build("gpt2")
    learned_positions.transformer.wpe.weight.data.mul_(50)
    check_packing(learned_positions)
    own = learned_positions.transformer.forward
    def going_on(*args, position_ids=None, **more): return own(*args, **more)
    monkeypatch.setattr(learned_positions.transformer, "forward", going_on)
    with pytest.raises(LabError, match="another than alone"): check_packing(learned_positions)
    falcon = build("falcon", alibi=True)
    with pytest.raises(LabError, match="no positions"): check_packing(falcon)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_rows(lengths, most):
    "Each example once; no row too long but for an example alone; never more rows than with the next-fit rule."
    chosen = list(range(len(lengths)))
    rows = in_rows(chosen, lengths, most)
    assert sorted(k for row in rows for k in row) == chosen and rows == in_rows(chosen, lengths, most)
    sums = [sum(lengths[k] for k in row) for row in rows]
    assert all(total <= most or len(row) == 1 for total, row in zip(sums, rows)) and all(rows)
    assert len(rows) <= len(lengths)
    even = [total for total in sums if total <= most]
    if len(even) > 1: assert max(even) - min(even) <= max(lengths)


@pytest.mark.parametrize("lengths, most, expected", [
    ([7], 7, [7]), ([8], 7, [8]), ([9, 7], 7, [9, 7]), ([3, 3, 3], 9, [9]), ([3, 3, 3], 8, [6, 3]), ([5, 1], 5, [5, 1]),
    ([4, 4, 4, 4], 8, [8, 8])], ids=str)
def test_rows_that_are_just_full(lengths, most, expected):
    rows = in_rows(list(range(len(lengths))), lengths, most)
    assert sorted((sum(lengths[k] for k in row) for row in rows), reverse=True) == expected


def test_a_row_is_what_it_says():
    some = examples([3, 1, 2])
    row = pack(some)
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]] and row["attention_mask"].tolist() == [[1] * 6]
    assert row["labels"][0, [0, 3, 4]].tolist() == [-100] * 3  # nobody foretells a first token
    assert len(answer_places(row)[0]) == sum(int(t.mask[1:].sum()) for t in some)
    assert torch.equal(row["input_ids"][0], torch.cat([t.ids for t in some]))
    one = pack(some[:1]), collate(some[:1])
    assert all(torch.equal(one[0][k], one[1][k]) for k in ("input_ids", "attention_mask"))


def test_a_row_ends_where_the_model_counts_otherwise():
    "Chunks of Llama 4, another rotation of Phi-3 beyond a length; a longer example is alone, and so equal."
    lengths = [30, 100, 20]
    assert row_tokens(make_llama(), lengths, 3) == 300
    assert row_tokens(build("llama4_text", attention_chunk_size=64), lengths, 3) == 64
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.] * 8, "long_factor": [2.] * 8, "factor": 2.,
            "original_max_position_embeddings": 48}
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=48)
    assert row_tokens(model, lengths, 3) == 48
    some = examples([30, 60, 18, 9])
    rows = packed_batches(model, some, [[0, 1], [2, 3]], 2)
    assert [row["input_ids"].shape[1] for row in rows] == [60, 30, 27]
    alone = torch.cat([learned(model, collate([some[k]]), grads=False)[0] for k in (1, 0, 2, 3)])
    assert off(torch.cat([learned(model, row, grads=False)[0] for row in rows]), alone) < 1e-5


# ---- the engine's way


@pytest.mark.parametrize("lengths", [[21, 9, 33, 1, 14, 2], [64], [65], [128, 64, 64], [5] * 20, [1]], ids=str)
def test_a_filled_up_row_is_the_same_row(lengths):
    "Few shapes; every token in a segment no longer than they may be; places and targets as in the batch."
    batch = pack(examples(lengths))
    row, n = filled_row(batch), sum(lengths)
    tokens, sizes = row.ids.shape[1], row.ends.diff()
    assert tokens == filled(n) and tokens % 64 == 0 and n <= tokens < n + 64 and row.ends[0] == 0
    assert (sizes >= 0).all() and sizes.sum() == tokens and sizes.max() <= len(row.places) and len(sizes) % 16 == 0
    assert sizes[:len(lengths)].tolist() == lengths and len(row.places) >= max(lengths)
    assert len(row.places) & (len(row.places) - 1) == 0 and len(row.at) % 64 == 0
    at, targets = answer_places(batch)
    counted = row.targets != -100
    assert row.at[counted].tolist() == at.tolist() and row.targets[counted].tolist() == targets.tolist()
    assert row.positions[0, n:].eq(0).all() and torch.equal(row.positions[:, :n], batch["position_ids"])


def test_few_shapes():
    "Within an octave a row is filled up to one of sixteen lengths, by a sixteenth at most."
    found = {filled(n) for n in range(4096, 8192)}
    assert len(found) == 17 and all(filled(n) - n < 256 for n in range(4096, 8192))
    assert {filled(n) - n for n in range(1, 1024)} == set(range(64))


def places_of(ends, longest): return Segments(torch.tensor(ends, dtype=torch.int32), longest)


def test_what_hands_marks_on_is_asked_each_time():
    "Dropout in attention, eager attention, attention that looks ahead, a class of somebody's own: masks."
    assert hands_on(make_llama())
    for other in (dict(attention_dropout=0.1), dict(attn_implementation="eager")):
        assert not hands_on(make_llama(**other))
    model = make_llama()
    model.model.layers[0].self_attn.is_causal = False
    assert not hands_on(model)
    model = make_llama()
    model.model.layers[1].self_attn.__class__ = type("Own", (type(model.model.layers[1].self_attn),), {})
    assert not hands_on(model)


@pytest.mark.parametrize("window", [None, 1, 3, 24])
def test_attention_by_segments_is_attention_of_each(window):
    "With shared heads, an empty segment, a scale; kept and run again."
    generator = torch.Generator().manual_seed(1)
    q, k, v, g = (torch.randn(1, n, 30, 16, generator=generator) for n in (4, 2, 2, 4))
    ends = [0, 9, 10, 10, 23, 30, 30]
    how = {"scale": 0.3, "window": window}
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    from qlora_lab.engine.attention import attention
    parts = []
    for a, b in zip(ends, ends[1:]):
        if a == b: continue
        out, inner = attention(*(t[:, :, a:b] for t in (q, k, v)), **how)
        parts.append([out.detach(), *torch.autograd.grad(out, inner, g[:, :, a:b])])
    expected = [torch.cat(some, 2) for some in zip(*parts)]
    for keep in (True, False):
        out, leaves = segment_attention(q, k, v, places_of(ends, 16), keep, **how)
        found = [out, *segment_attention_backward(g, out, leaves, places_of(ends, 16), **how)]
        assert all(off(a, b) < 1e-5 for a, b in zip(found, expected))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = side_by_side(*leaves, places_of(ends, 16), 0.3, window)
    assert all(off(a, b) < 1e-5 for a, b in zip((out, *torch.autograd.grad(out, leaves, g)), expected))


def unfused(model):
    "Its layers as transformers has them."
    for layer in decoder_layers(model):
        for name in ("forward", "_unfused", "_fused"): layer.__dict__.pop(name, None)
    return model


def passed(model, batch, way):
    "Loss and gradients in one vector."
    for p in model.parameters(): p.grad = None
    loss = way(model, batch)
    if loss.requires_grad: loss.backward()
    return torch.cat([loss.detach()[None].float(), *(p.grad.float().flatten() for p in trainable(model))]).cpu()


def plainly(model, batch): return answer_losses(model, batch)[0].sum()


@pytest.mark.parametrize("device", devices())
@EACH
def test_fused_layers_keep_examples_apart(family, more, device, several):
    "Every family that is fused, windows among them, kept or run twice: a row by fused layers is a batch by plain ones."
    row, batch = pack(examples([70, 9, 33, 1])), collate(examples([70, 9, 33, 1]))
    use_kernels(False)
    model = made(family, more, device=device)
    expected = passed(model, batch, plainly)
    use_kernels()
    for again in (False, True):
        fuse_layers(checkpoint_layers(unfused(model), again))
        assert needs_no_mask(model, 128)
        assert off(passed(model, row, summed_loss), expected) < 2e-5


def test_a_row_that_is_not_fused_has_a_mask():
    "A layer that declines, or was changed since: transformers' masks keep the examples apart; no mask is an error."
    batch = pack(examples([20, 9, 30]))
    plain, model = (fuse_layers(small()) for _ in range(2))
    expected = passed(plain, batch, summed_loss)
    model.model.layers[1].input_layernorm.weight.requires_grad_()  # this layer is not fused any longer
    assert not needs_no_mask(model, 64)
    loss = summed_loss(model, batch)
    assert off(loss.detach(), expected[0]) < 1e-5
    row = filled_row(batch)
    with in_segments(Segments(row.ends, 64)), pytest.raises(LabError, match="not fused"):
        model.model.layers[1](torch.zeros(1, 64, 64), attention_mask=None, position_embeddings=(None, None))


@pytest.mark.parametrize("where", ["device", "host"])
def test_beside_checkpoints(where, monkeypatch):
    "Checkpointed in part, on the device or on the host with all that layers keep there; fused layers and plain ones."
    for name, value in {"OPERATIONS": 1e-6, "WORTH": 0, "LARGE": 0}.items(): monkeypatch.setattr(beside, name, value)
    lengths = [30, 9, 21]
    use_kernels(False)
    expected = passed(small(), collate(examples(lengths)), plainly)
    with warnings.catch_warnings(action="ignore"): model = checkpoint_layers(small(), layers=2, where=where)
    found = [passed(model, pack(examples(lengths)), plainly)]
    use_kernels()
    found.append(passed(model, pack(examples(lengths)), plainly))  # marks, also when a layer runs again
    with standing_in({("host_checkpoints", "cpu"): "engine.host_checkpoints.keep_on_host"}):
        model = fuse_layers(checkpoint_layers(small(), layers=2, where=where))
    found.append(passed(model, pack(examples(lengths)), summed_loss))
    assert all(off(f, expected) < 1e-5 for f in found)


@pytest.mark.parametrize("fused", [True, False])
def test_a_recorded_row_is_the_row(recordings, fused):  # noqa: F811
    "Three steps of rows of one shape, with other lengths and positions each: recorded once, replayed with their own."
    made_up = [[30, 9, 20], [5, 40, 14], [33, 1, 23], [20, 20, 22]]
    model, other = (fuse_layers(small()) if fused else small() for _ in range(2))
    for i, lengths in enumerate(made_up):
        batch = pack(examples(lengths, seed=i))
        for p in model.parameters(): p.grad = None
        loss = forward_backward(model, batch, 10)
        found = torch.cat([loss[None], *(p.grad.flatten() for p in trainable(model))])
        expected = passed(other, batch, lambda m, b: plainly(m, b) / 10)
        assert off(found, expected) < 1e-5
    assert [r.replays for r in recordings] == [3] and Recording is not None


def test_rows_of_a_step_add_up():
    "One row, two rows, or batches: one step, the same loss and length of gradient; odd examples among them."
    found = []
    for way in ("batches", "rows", "one row"):
        model, some = small(), examples([30, 9, 20, 1, 2, 25, 40, 8])
        chosen = [[0, 1, 2, 3], [4, 5, 6, 7]]
        size = {"rows": 2, "one row": 8}.get(way)
        batches = packed_batches(model, some, chosen, size) if size else [collate([some[i] for i in c]) for c in chosen]
        assert len(batches) == {"one row": 1}.get(way, 2)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        found.append(train_step(model, optimizer, batches, 1e-3, 0.3))
    for other in found[1:]: assert other == pytest.approx(found[0], rel=1e-5)


# ---- runs


def run(tiny, data, folder, **more):
    model, tokenizer = load_model(tiny, dtype=torch.float32, compute_dtype=torch.float32)
    config = TrainConfig(folder=folder, **dict(steps=4, batch_size=4, rank=4, lr=5e-3, eval_examples=8, eval_prompts=1,
                                               checkpoint_every=2, packing=True) | more)
    return train(model, tokenizer, data, config, progress=False)


@pytest.fixture(scope="module")
def plain(tiny, data, tmp_path_factory): return run(tiny, data, tmp_path_factory.mktemp("plain") / "run", packing=False)


@pytest.mark.parametrize("more", [dict(pass_size=8), dict(pass_size=3, checkpointing=True), dict(budget="64GiB")],
                         ids=str)
def test_a_packed_run_is_the_run(tiny, data, plain, tmp_path, more):
    "The same steps on the same examples, however rows and passes are cut."
    found = run(tiny, data, tmp_path / "packed", **more)
    assert found.losses == pytest.approx(plain.losses, rel=1e-4)
    assert [m["grad_norm"] for m in found.metrics] == pytest.approx([m["grad_norm"] for m in plain.metrics], rel=1e-3)
    assert [m["tokens"] for m in found.metrics] == [m["tokens"] for m in plain.metrics]
    assert found.after.loss == pytest.approx(plain.after.loss, rel=1e-3)
    assert found.record["identity"] == plain.record["identity"]


def test_a_packed_run_goes_on_to_the_same_bytes(tiny, data, plain, tmp_path, monkeypatch):
    "Rows follow from the step alone. The first row holds four of the longest examples, as a batch of four does."
    real = sys.modules["qlora_lab.train"].one_step
    whole = run(tiny, data, tmp_path / "whole")
    assert whole.losses == pytest.approx(plain.losses, rel=1e-4)
    def step(model, optimizer, learn, config, n):
        if n == 3: raise KeyboardInterrupt
        return real(model, optimizer, learn, config, n)
    with monkeypatch.context() as m:
        m.setattr(sys.modules["qlora_lab.train"], "one_step", step)
        with pytest.raises(KeyboardInterrupt): run(tiny, data, tmp_path / "cut")
    cut = run(tiny, data, tmp_path / "cut")
    ends = [(r.folder / "adapter/adapter_model.safetensors").read_bytes() for r in (whole, cut)]
    assert ends[0] == ends[1] and whole.losses == cut.losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_plan_holds_a_packed_row(name, checkpointing):
    "With its masks, which an unpacked step does not need: a hundredth more than the live step at most, and no less."
    from test_plan_families import described, live, step_peak
    s = Settings(rank=4, batch_size=3, sequence=40, dtype="float32", device="cpu", packed=True,
                 checkpointing=checkpointing)
    model, batch = live(described(name), s), pack(examples([40] * 3))
    batch["labels"] = torch.where(batch["position_ids"] > 0, batch["input_ids"], -100)  # all are learned
    use_kernels(False)
    watch_step(model, batch)
    step = watch_step(model, batch).peak
    packed, apart = (step_peak(plan(described(name), **asdict(replace(s, packed=p)))) for p in (True, False))
    assert step <= packed < 1.01 * step and apart < packed


def test_a_run_that_cannot_be_packed_leaves_nothing(tokenizer, data, tmp_path):
    model = build("mamba")
    with pytest.raises(LabError, match="packing: mamba"):
        train(model, tokenizer, data, TrainConfig(folder=tmp_path / "run", packing=True, steps=1), progress=False)
    assert not (tmp_path / "run").exists()


# ---- on a card


@needs_gpu
@pytest.mark.parametrize("window", [None, 24])
def test_the_flash_kernel_takes_segments(window):
    "Against one by one in float32, in both ways of calling it; sizes of head that the kernel fills up."
    assert flash_knows_segments(torch.device("cuda", torch.cuda.current_device()))
    segments = Segments(torch.tensor([0, 90, 91, 200, 256, 256], dtype=torch.int32, device="cuda"), 128)
    for size in (64, 96, 128, 256):
        q, k, v, g = (torch.randn(1, n, 256, size, device="cuda").bfloat16() for n in (4, 2, 2, 4))
        leaves = [t.float().requires_grad_() for t in (q, k, v)]
        out = side_by_side(*leaves, segments, None, window)
        expected = [out, *torch.autograd.grad(out, leaves, g.float())]
        assert _flash_takes(q, segments)
        out, leaves = segment_attention(q, k, v, segments, window=window)
        found = [out, *segment_attention_backward(g, out, leaves, segments, window=window)]
        kept = by_flash(segments, q, k, v, None, window)
        assert all(off(a.float(), b) < 0.02 for a, b in zip(found, expected)) and torch.equal(kept[0], out)


@needs_gpu
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_recorded_row_on_a_card(family, again):
    "bfloat16, recorded and replayed: as near to plain layers in float32 as plain layers in bfloat16 are."
    more = {"sliding_window": 24, "head_dim": 64} if family == "gemma3_text" else {"head_dim": 64}
    made_up = [[70, 9, 41], [5, 90, 25], [33, 1, 86], [40, 40, 40]]
    def of(dtype): return small(family, device="cuda", dtype=dtype, **more)
    exact, near = of(torch.float32), of(torch.bfloat16)
    model = fuse_layers(checkpoint_layers(of(torch.bfloat16), again))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, lengths in enumerate(made_up):
            some = examples(lengths, seed=i)
            use_kernels(False)
            wanted, rounded = (passed(m, collate(some), plainly) for m in (exact, near))
            use_kernels()
            for p in model.parameters(): p.grad = None
            loss = forward_backward(model, pack(some), 1)
            found = torch.cat([loss[None].float(), *(p.grad.float().flatten() for p in trainable(model))]).cpu()
            assert off(found[1:], wanted[1:]) < max(0.02, 2 * off(rounded[1:], wanted[1:]))
            assert abs(found[0] - wanted[0]) < 0.01 * abs(wanted[0])
    assert any(g is not None for g, _, _ in model._graph.graphs.values())
