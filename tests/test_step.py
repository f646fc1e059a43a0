"""A recorded step is the step: batches filled up, the mask that is not needed, graphs against the same launches.

Protects: losses and gradients over several steps and shapes, what cannot be recorded, the switch. Graphs need a GPU.
"""
import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from step_families import FAMILIES, family
from test_fused import small
from torch import nn

from benchmarks.common import random_batch
from conftest import devices
from qlora_lab.checkpointing import checkpoint_layers
from qlora_lab.engine import capture, dispatch, step_graph
from qlora_lab.engine.dispatch import (
    ALWAYS,
    AT_WORK,
    FASTER,
    IN_TORCH,
    LACK,
    REHEARSED,
    TRIAL,
    places,
    twin,
    use_kernels,
)
from qlora_lab.engine.filled_up import causal, filled_loss, padded
from qlora_lab.engine.fused_adamw import adamw_triton
from qlora_lab.engine.fusing import fuse_layers
from qlora_lab.engine.gpu import empty_cache, triton
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.step_graph import StepGraph, forget, forward_backward
from qlora_lab.lora import trainable
from qlora_lab.paged import adamw
from qlora_lab.train import answer_losses, train_step

on_card = torch.cuda.is_available()  # by its interpreter Triton cuts bfloat16 off instead of rounding it
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def switched_on_again():
    yield
    use_kernels()


def ragged(lengths, in_front=False):
    "Rows of different lengths, half of each learned."
    ids = torch.randint(1, 128, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where((mask == 1) & (torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] // 2), ids, -100)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {k: v.flip(1) for k, v in batch.items()} if in_front else batch


@pytest.mark.parametrize("lengths", [(24, 17), (64, 64), (65, 3), (2, 2)], ids=str)
def test_filled_up_is_the_same_batch(lengths):
    "Every learned token is asked for at the place before it, and nothing else is."
    batch = ragged(lengths)
    ids, at, targets = padded(batch)
    assert ids.shape[1] % 64 == 0 and len(at) == len(targets) and len(at) % 64 == 0
    asked = {(a // ids.shape[1], a % ids.shape[1] + 1): t for a, t in zip(at.tolist(), targets.tolist()) if t != -100}
    labels = batch["labels"].tolist()
    expected = {(i, j): t for i, row in enumerate(labels) for j, t in enumerate(row) if j and t != -100}
    assert asked == expected and all(ids[i, j] == t for (i, j), t in asked.items())


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("lengths", [(24, 17), (65, 3)], ids=str)
def test_what_is_filled_in_behind_needs_no_mask(lengths, device):
    "Loss and gradients are those with a mask."
    found = []
    for fuse in (False, True):
        use_kernels(fuse)
        model = small(device=device)
        if fuse: fuse_layers(model)
        loss = filled_loss(model, ragged(lengths)) if fuse else answer_losses(model, ragged(lengths))[0].sum()
        loss.backward()
        found.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in trainable(model))]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_what_is_not_taken():
    "Padding in front; a model of which nothing learns is scored and not recorded."
    model = fuse_layers(small())
    assert filled_loss(model, ragged((9, 5))) is not None
    in_front = ragged((9, 5), in_front=True)
    assert filled_loss(model, in_front) is None and forward_backward(model, in_front, 7) is None
    model.requires_grad_(False)
    assert filled_loss(model, ragged((9, 5))) is not None and forward_backward(model, ragged((9, 5)), 7) is None


def test_each_place_of_the_table_holds_a_function():
    "A twin at a place that is not there would be found out by the first user of its device."
    tables = FASTER, ALWAYS, LACK, TRIAL
    for key, place in (row for table in tables for row in table.items()): assert callable(dispatch._found(place)), key
    assert set(REHEARSED) | IN_TORCH <= {operation for operation, _ in FASTER}


def test_what_stays_without_triton_uses_none_of_it():
    "A card whose Triton is broken keeps twins in torch alone: they take no function of a module that has kernels."
    for key, place in FASTER.items():
        if key[0] not in IN_TORCH: continue
        module = sys.modules[dispatch._found(place).__module__]
        used = {sys.modules.get(getattr(thing, "__module__", "")) for thing in vars(module).values()} - {None}
        assert not [m.__name__ for m in used if "triton" in vars(m)], key


def test_nothing_of_the_engine_is_imported_before_it_is_asked_for():
    "The package, and the question itself, wait for no compiler and no Triton."
    code = ("import sys, qlora_lab, qlora_lab.engine.dispatch as d; from qlora_lab import codebook; "
            "print([m for m in sys.modules if m.startswith('qlora_lab.engine.') and m != d.__name__], d.AT_WORK)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[] {}"


def test_the_switch_reaches_everything():
    use_kernels(False)
    assert not any(twin(*key) for key in FASTER) and {p.state for p in places() if p[:2] in FASTER} == {"switched off"}
    use_kernels()
    assert all(twin(*key) for key in FASTER if key[1] == "cpu" or torch.cuda.is_available())
    assert {p.state for p in places() if p.device == "cpu"} == {"at work"}


class Recording:
    "In place of a CUDA graph: notes its pool and how often it is replayed."
    made, at_work = [], False
    def __init__(self):
        self.replays, self.own, self.work = 0, object(), lambda: None
        Recording.made.append(self)
    def pool(self): return self.own
    def replay(self):
        self.replays += 1
        Recording.at_work = True
        self.work()
        Recording.at_work = False


@pytest.fixture
def recordings(monkeypatch):
    """As CUDA's graphs: what is recorded does not run then, and leaves gradients that hold anything; what is replayed
    works on the memory that was recorded."""
    @contextmanager
    def captured(recording, stream, device, pool=None):
        assert stream == f"of card {device}"
        recording.own = pool or recording.own
        yield

    def record(self, key, passes, inputs, record=StepGraph.record):
        before = [p.grad if p.grad is None else p.grad.clone() for p in self.params]
        record(self, key, passes, inputs)
        recording, held, result = self.graphs[key]
        if recording is None: return
        reached = [p.grad is not None for p in self.params]
        for p, g in zip(self.params, before):
            if p.grad is not None: p.grad.fill_(torch.nan) if g is None else p.grad.copy_(g)
        result.fill_(torch.nan)
        def work():
            there = [p.grad for p in self.params]
            for p, g in zip(self.params, self.grads): p.grad = None if key[1] else g
            result.copy_(passes(*held))
            for p, g, known in zip(self.params, self.grads, reached):
                if key[1] and known: g.copy_(p.grad)
            for p, g in zip(self.params, there): p.grad = g
        recording.work = work
    monkeypatch.setattr(StepGraph, "record", record)
    monkeypatch.setattr("qlora_lab.engine.step_graph.captured", captured)
    monkeypatch.setattr("qlora_lab.engine.step_graph.capture_stream", lambda card: f"of card {card}")
    stand_ins = {"CUDAGraph": Recording, "memory_reserved": lambda *_: 100,
                 "memory_allocated": lambda *_: 60, "mem_get_info": lambda *_: (1000, 2000),
                 "get_per_process_memory_fraction": lambda *_: 1.}
    for name, stand_in in stand_ins.items(): monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Recording, "made", [])
    return Recording.made


@pytest.fixture
def streams(monkeypatch):
    "Stand-ins, which nobody finds afterwards."
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    capture.capture_stream.cache_clear()
    yield capture.capture_stream
    capture.capture_stream.cache_clear()


def test_all_captures_of_a_card_share_a_stream(streams):
    "torch keeps work space for each, to the end of the process; a model that changes is recorded anew."
    assert streams(0) is streams(0) is not streams(1)


def test_memory_goes_back_when_no_card_works(monkeypatch):
    order, at_work = [], {0: True, 1: False, 2: True}
    stand_ins = {"is_initialized": lambda: True, "device_count": lambda: 3, "memory_reserved": at_work.get,
                 "synchronize": order.append, "empty_cache": lambda: order.append("emptied")}
    for name, stand_in in stand_ins.items(): monkeypatch.setattr(torch.cuda, name, stand_in)
    empty_cache()
    assert order == [0, 2, "emptied"]


def product(*params):
    "Passes of which each parameter's gradient is the sum of the input."
    def passes(t):
        sum((p * t).sum() for p in params).backward()
        return t.clone()
    return passes


def test_when_a_shape_is_recorded(recordings):
    "Not at first sight; once; for so many shapes; all in one pool of memory."
    p = nn.Parameter(torch.ones(3))
    graph = StepGraph([p], most=2)
    for n in (1, 2, 3, 1, 2, 3, 3, 1, 1):
        p.grad = None
        assert graph(product(p), torch.full((n, 1), 2.)).tolist() == [[2.]] * n and p.grad.tolist() == [2. * n] * 3
    assert [r.replays for r in recordings] == [3, 1] and len({r.own for r in recordings}) == 1


def test_a_failed_recording_leaves_nothing_behind(recordings):
    "One line of notice, the batch runs, and the next shape gets a pool of its own."
    graph, recorded = StepGraph([nn.Parameter(torch.ones(3))]), []
    def passes(t):
        if len(t) == 1 and len(recordings) == 1 and not recorded:
            recorded.append(1)
            raise torch.OutOfMemoryError("no room\nat all")
        return t * 2
    with pytest.warns(UserWarning, match="without a graph .no room.$"):
        found = [graph(passes, torch.ones(1)).item() for _ in range(3)]
    assert found == [2.] * 3 and graph.graphs[(torch.Size([1]),), True] == (None, None, None)
    for _ in range(2): graph(passes, torch.ones(2))
    assert recordings[1].own is not recordings[0].own and recordings[1].replays == 1


def test_a_failed_recording_holds_nothing(recordings, monkeypatch):
    "What its pass has made is gone before the next one starts, also where the capture's end raises anew."
    @contextmanager
    def captured(*_):
        try: yield
        finally: raise RuntimeError("the capture did not end")
    monkeypatch.setattr("qlora_lab.engine.step_graph.captured", captured)
    graph, made, there = StepGraph([nn.Parameter(torch.ones(3))]), [], []
    def passes(t):
        there.append(any(ref() is not None for ref in made))
        result = t * 2
        made.append(weakref.ref(result))
        def inner():  # as torch calls a module that has hooks
            if graph.recording: raise torch.OutOfMemoryError("no room")
            return result
        return inner()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="without a graph .no room.$"):
            for _ in range(3): assert graph(passes, torch.ones(1)).item() == 2
    finally: gc.enable()
    assert not any(there) and len(there) == 6


def test_a_model_that_waits_is_tried_once(recordings):
    "What asks the card for a number does so in every shape: one notice, no further trial."
    p = nn.Parameter(torch.ones(3))
    graph = StepGraph([p])
    def passes(t):
        if graph.recording: raise RuntimeError("operation not permitted when stream is capturing")
        return product(p)(t)
    with pytest.warns(UserWarning, match="the model runs without a graph .operation not") as said:
        for n in (1, 1, 2, 2, 1):
            p.grad = None
            assert graph(passes, torch.ones(n, 1)).tolist() == [[1.]] * n and p.grad.tolist() == [n] * 3
    assert len(said) == 1 and len(recordings) == 1


def test_gradients_are_made_by_the_first_recording(recordings):
    "They stay where it puts them; another shape, and a second pass, add to them there."
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    graph, passes = StepGraph([p, q]), product(p, q)
    def drop(): p.grad = q.grad = None
    for _ in range(2):
        drop()
        graph(passes, torch.ones(3))
    places = [g.data_ptr() for g in graph.grads]
    assert [p.grad.data_ptr(), q.grad.data_ptr()] == places and p.grad.tolist() == [1.] * 3
    graph(passes, torch.ones(3))  # a second pass of the same shape
    assert p.grad.tolist() == [2.] * 3 and len(graph.graphs) == 2
    drop()
    for _ in range(2): graph(passes, torch.full((1,), 5.))  # another shape, and once more
    assert p.grad.tolist() == [10.] * 3 and [p.grad.data_ptr(), q.grad.data_ptr()] == places and len(graph.graphs) == 3
    drop()
    made = [r.replays for r in recordings]
    graph(passes, torch.ones(3))
    assert [r.replays - n for r, n in zip(recordings, made)] == [1, 0, 0] and p.grad.data_ptr() == places[0]


def test_gradients_that_are_never_dropped(recordings):
    "Nobody makes them places, so after a few batches they get some, and recordings add to them."
    p = nn.Parameter(torch.ones(3))
    graph, passes = StepGraph([p]), product(p)
    for n in range(20):
        if p.grad is not None: p.grad.zero_()
        graph(passes, torch.full((1,), float(n)))
        assert p.grad.tolist() == [float(n)] * 3
    assert len(recordings) == 1 and recordings[0].replays > 8 and graph.maker is None
    p.grad = None
    graph(passes, torch.ones(1))
    assert p.grad.tolist() == [1.] * 3 and len(recordings) == 1


def test_a_gradient_that_the_recording_does_not_make(recordings):
    "Another loss has it; what that left in one step is not there in the next."
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    graph, passes = StepGraph([p, q]), product(p)
    for _ in range(5):
        p.grad = q.grad = None
        graph(passes, torch.ones(3))
        (q.sum() * 5).backward()
        assert q.grad.tolist() == [5.] * 3 and p.grad.tolist() == [1.] * 3


def test_gradients_made_elsewhere_count(recordings):
    "A batch that went another way before this one: both add up, whether there are places or not."
    p = nn.Parameter(torch.ones(3))
    graph, passes = StepGraph([p]), product(p)
    def elsewhere():
        p.grad = None
        (10 * p).sum().backward()
    for there in (False, True):
        elsewhere()
        graph(passes, torch.full((3,), 2.))
        assert p.grad.tolist() == [12.] * 3 and bool(graph.grads) == there
        p.grad = None
        for _ in range(2):
            graph(passes, torch.full((3,), 2.))
            p.grad = None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyboardInterrupt()], ids=["memory", "stopped"])
def test_a_recording_that_fails_leaves_no_gradients(recordings, error):
    "They were never computed. For want of memory the batch runs without; anything else goes on its way."
    p = nn.Parameter(torch.ones(3))
    graph, calls = StepGraph([p]), []
    def passes(t):
        calls.append(product(p)(t))
        if len(calls) == 4: raise error  # the first runs as it is, two are measured, the fourth recorded
        return t
    graph(passes, torch.ones(3))
    p.grad = None
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt): graph(passes, torch.ones(3))
        assert p.grad is None
    else:
        with pytest.warns(UserWarning, match="without a graph"): graph(passes, torch.ones(3))
        assert p.grad.tolist() == [1.] * 3
    assert graph.grads is None


def test_recordings_go_where_memory_is_short(recordings, monkeypatch):
    "52 bytes of a pool, of which 12 are gradients: 40 for recordings of up to 2 numbers, so one of 8 may want 160."
    p, card = nn.Parameter(torch.ones(3)), {"free": 1000, "cached": 0, "limit": 1.}
    graph = StepGraph([p])
    def reserved(*_): return 60 + card["cached"] + 52 * bool(graph.graphs)
    stand_ins = {"memory_reserved": reserved, "memory_allocated": lambda *_: 60 + 12 * bool(graph.graphs),
                 "mem_get_info": lambda *_: (card["free"], 2000),
                 "get_per_process_memory_fraction": lambda *_: card["limit"]}
    for name, stand_in in stand_ins.items(): monkeypatch.setattr(torch.cuda, name, stand_in)
    def one_step(n, **now):
        card.update(now)
        p.grad = None
        graph(product(p), torch.full((n, 1), 3.))
        return p.grad.tolist() == [3. * n] * 3
    assert all(map(one_step, (2, 2, 8))) and len(graph.graphs) == 1 and graph.pool == 52
    assert one_step(7, free=150) and len(graph.graphs) == 1
    assert one_step(9) and not graph.graphs and graph.grads is None
    assert one_step(2, free=1000) and len(graph.graphs) == 1 and graph.pool == 52  # made anew
    assert one_step(9, free=150, cached=50) and len(graph.graphs) == 2  # what earlier passes left can be had
    assert one_step(10, free=1000, cached=0) and len(graph.graphs) == 2
    assert one_step(28, limit=0.12) and len(graph.graphs) == 2  # 240 bytes for this process, of which 112 are taken
    assert one_step(30) and not graph.graphs


def plain_model(name="qwen3"):
    "Layers of transformers' own, checkpointed by the lab."
    return checkpoint_layers(family(name))


def steps_of(model, batches, total=7):
    "Loss and gradients of each step, dropped between."
    found = []
    for batch in batches:
        for p in model.parameters(): p.grad = None
        loss = forward_backward(model, batch, total)
        found.append(torch.cat([loss[None], *(p.grad.flatten() for p in trainable(model) if p.grad is not None)]))
    return found


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "olmoe"])
def test_plain_layers_are_recorded(name, recordings):
    "A recorded step of layers that are not fused is the step; rotary tables are made outside and held."
    model, batches = plain_model(name), [ragged((9, 5)), ragged((30, 12)), ragged((70, 65)), ragged((8, 8))]
    found = steps_of(model, batches * 2, 30)
    use_kernels(False)
    for batch, step in zip(batches * 2, found):
        loss = answer_losses(model, batch)[0].sum() / 30
        gradients = torch.autograd.grad(loss, trainable(model), allow_unused=True)
        expected = torch.cat([loss.detach()[None], *(g.flatten() for g in gradients if g is not None)])
        assert (step - expected).norm() < 1e-5 * expected.norm()
    assert model._graph.proven and len(model._graph.graphs) == 2 and sum(r.replays for r in recordings) == 6
    assert set(model._graph.tables) == {(2, 64), (2, 128)} and all(model._graph.tables.values())


def test_tables_are_not_made_while_a_step_is_recorded(recordings):
    "Phi-3's long rotary table looks at the longest position, for which a recording would have to wait."
    model, calls = plain_model("phi3"), []
    rotary, batch = model.model.rotary_emb, ragged((9, 5))
    def noted(*args, own=rotary.forward, **kwargs):
        calls.append("_graph" in model.__dict__ and model._graph.recording)
        return own(*args, **kwargs)
    rotary.forward = noted
    steps_of(model, [batch] * 2)
    made = [r for r in recordings]
    assert made and calls and not any(calls) and rotary.__dict__["forward"] is noted


def test_a_recording_that_goes_wrong_is_seen(recordings):
    "What a recording leaves out, no later step may leave out: a notice, and the step as it is from then on."
    p = nn.Parameter(torch.ones(3))
    graph = StepGraph([p])
    def passes(t):
        return product(p)(t * 0.5 if Recording.at_work else t)
    def one_step(n):
        p.grad = None
        assert graph(passes, torch.full((3,), n)).tolist() == [n] * 3 and p.grad.tolist() == [n] * 3
    one_step(1.)
    with pytest.warns(UserWarning, match="no step is recorded"): one_step(2.)
    for n in (3., 4.): one_step(n)
    assert graph.most == 0 and not graph.graphs and graph.grads is None and len(recordings) == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_in_which_order_a_step_is_recorded(recordings, monkeypatch, wrong):
    """What passes free is given back before the optimizer makes its moments, and before each recording; no pass runs
    beside the recordings but that of a new shape; what failed is gone before the step runs as it is."""
    p, events = nn.Parameter(torch.ones(3)), []
    graph = StepGraph([p])
    def passes(t):
        kind = "record" if graph.recording else "replay" if Recording.at_work else "pass"
        events.append((kind, bool(graph.graphs), p.grad is not None))
        return product(p)(t * 0.5 if wrong and Recording.at_work else t)
    monkeypatch.setattr(step_graph, "empty_cache", lambda: events.append(("empty", bool(graph.graphs), False)))
    def steps(*shapes):
        events.clear()
        p.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for n in shapes: graph(passes, torch.ones(n, 1))
        return list(events)
    assert steps(3) == [("empty", False, False), ("pass", False, False), ("empty", False, False)]
    begun = [("pass", False, False)] * 2 + [("empty", False, False), ("record", False, False)]
    gone = [("empty", False, False), ("pass", False, False)]
    assert steps(3) == [*begun, ("replay", True, False), *(gone if wrong else ())]
    if wrong: return
    added = [("empty", True, False), ("record", True, True), ("replay", True, True)]
    assert steps(3, 3) == [("replay", True, False), *added]
    assert steps(5) == [("pass", True, True)]  # a new shape: as it is, to where gradients lie
    assert steps(5) == added  # compared no more


def test_nothing_of_a_pass_waits_for_the_garbage_collector():
    "A cycle would hold its memory beside the recording."
    model, batch = plain_model(), ragged((9, 5))
    def tensors(): return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    for fuse in (False, True):
        if fuse: model = fuse_layers(small())
        steps_of(model, [batch])
        forget(model)
        gc.collect()
        gc.disable()
        try:
            before = tensors()
            loss = filled_loss(model, batch)
            loss.backward()
            assert tensors() > before
            del loss
            assert tensors() <= before
        finally: gc.enable()


@pytest.mark.parametrize("noise", [0., 1e-3])
def test_what_may_differ(noise):
    "Kernels that add in any order differ from themselves; ten times as far is allowed, and a millionth."
    p, calls = nn.Parameter(torch.ones(3)), []
    proof = StepGraph([p])
    def passes(t):
        calls.append(1)
        return product(p)(t + noise * len(calls))
    for off, fine in ((0., True), (5e-7, True), (5e-3, bool(noise)), (1., False)):
        proof.proven, proof.most = False, 32
        expected = proof.expect(passes, (torch.ones(3),))
        found = expected[0][0] * (1 + off), expected[0][1]
        def prove(expected=expected, found=found): proof.prove(expected, found)
        if fine: prove()
        else:
            with pytest.warns(UserWarning, match="no step is recorded"): prove()
        assert proof.proven == fine and (proof.most > 0) == fine and p.grad is None


def test_measuring_leaves_gradients_and_random_numbers():
    "Gradients that are added to, and those that are made."
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    p.grad, graph = torch.full((3,), 5.), StepGraph([p, q])
    before, place = torch.get_rng_state(), p.grad
    def passes(t): return product(p, q)(t * torch.rand(3))
    first, second, _ = graph.expect(passes, (torch.ones(3),))
    assert p.grad is place and p.grad.tolist() == [5.] * 3 and q.grad is None
    assert first == second and torch.equal(before, torch.get_rng_state())


def on_a_module(model, hook): return model.model.layers[0].register_forward_hook(hook)
def before_a_module(model, hook): return model.lm_head.register_forward_pre_hook(hook)
def on_a_parameter(model, hook): return trainable(model)[0].register_hook(hook)
def after_a_parameter(model, hook): return trainable(model)[0].register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("put", [on_a_module, before_a_module, on_a_parameter, after_a_parameter])
def test_a_hook_hears_every_step(put, recordings):
    "As long as it is there nothing is recorded; autocast is not either, whose casts a recording would keep."
    model, batch, heard = plain_model(), ragged((9, 5)), []
    causal(model)
    hook = put(model, lambda *args: heard.append(1))
    for _ in range(3): assert forward_backward(model, batch, 7) is None
    for _ in range(3): train_step(model, PagedAdamW(trainable(model), lr=1e-3), [batch], 1e-3, 1.)
    assert len(heard) >= 3 and not recordings
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16): assert forward_backward(model, batch, 7) is None
    assert forward_backward(model, batch, 7) is not None


def in_eval_mode(model): model.eval()
def not_checkpointed(model): checkpoint_layers(model, on=False)
def another_product(model): model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
def another_that_learns(model): model.model.layers[1].input_layernorm.weight.requires_grad_()


@pytest.mark.parametrize("change", [in_eval_mode, not_checkpointed, another_product, another_that_learns])
def test_plain_layers_that_were_changed_are_recorded_anew(change, recordings):
    model, batch = plain_model(), ragged((9, 5))
    steps_of(model, [batch] * 3)
    first = model._graph
    steps_of(model, [batch])
    assert model._graph is first
    change(model)
    steps_of(model, [batch])
    assert model._graph is not first


def test_a_model_that_was_moved_is_recorded_anew(recordings, monkeypatch):
    "Its old recordings know addresses that are others' by now."
    model = fuse_layers(small())
    batch = ragged((9, 5))
    forward_backward(model, batch, 7)
    first = model._graph
    forward_backward(model, batch, 7)
    assert model._graph is first
    model.to(torch.float64).to(torch.float32)
    forward_backward(model, batch, 7)
    assert model._graph is not first
    emptied = []
    monkeypatch.setattr(step_graph, "empty_cache", lambda: emptied.append("_graph" in model.__dict__))
    forget(model)
    assert emptied == [False] and all(p.grad is not None for p in trainable(model))


def fewer_layers(model): model.model.layers = model.model.layers[:1]
def other_embeddings(model): model.model.embed_tokens = nn.Embedding(128, 64).requires_grad_(False)
def a_norm_that_learns(model): model.model.norm.weight.requires_grad_()
def other_head(model): model.lm_head = nn.Linear(64, 128, bias=False).requires_grad_(False)


@pytest.mark.parametrize("change", [fewer_layers, other_embeddings, a_norm_that_learns, other_head])
def test_a_model_that_was_changed_is_recorded_anew(change, recordings):
    "Otherwise the old one would be replayed: loss and gradients are those of the model as it is."
    model, batch = fuse_layers(small()), ragged((9, 5))
    def step():
        for p in model.parameters(): p.grad = None
        return forward_backward(model, batch, 7)
    for _ in range(2): step()
    change(model)
    found = [step() for _ in range(3)][-1]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    use_kernels(False)
    for p in model.parameters(): p.grad = None
    plain = answer_losses(model, batch)[0].sum() / 7
    plain.backward()
    assert torch.allclose(found, plain, rtol=1e-5)
    assert all(torch.allclose(g, model.get_parameter(n).grad, atol=1e-5) for n, g in gradients.items())


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_shorter_than_the_sequence_is_kept(family):
    "Filled up, too: the loss is that of the plain model."
    more = dict(sliding_window=70) | (dict(use_sliding_window=True, max_window_layers=0) if family == "qwen2" else {})
    for lengths in ((60, 40), (66, 40), (100, 90), (150, 3)):
        model, plain = fuse_layers(small(family, **more)), small(family, **more)
        found = filled_loss(model, ragged(lengths))
        assert torch.allclose(found, answer_losses(plain, ragged(lengths))[0].sum(), rtol=1e-5)


def test_a_model_without_layers_is_left_alone():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
        def get_output_embeddings(self): return self.head
        get_input_embeddings = get_output_embeddings
    assert fuse_layers(Bare()) is None


def test_a_plan_needs_no_triton():
    "The kernels that a plan rehearses are named, not run."
    code = "import sys; sys.modules['triton'] = None; from qlora_lab import plan; print(plan('smollm2-135m').total_gib)"
    from qlora_lab.engine.planner import plan
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert float(out.stdout) == plan("smollm2-135m").total_gib < plan("smollm2-135m", kernels=False).total_gib


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_an_update_is_noticed_by_autograd():
    "A backward pass that still needs the old values is refused, as after any change in place."
    w, g, m, v = moments(64, torch.float32)
    w.requires_grad_()
    loss = (w * w).sum()
    with torch.no_grad(): assert adamw_triton([w], [g], [m], [v], [1], 1e-3, (0.9, 0.999), 1e-8, 0.)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


def moments(n, dtype, seed=0):
    "A parameter, its gradient and AdamW's two moments of it."
    generator = torch.Generator().manual_seed(seed)
    def random(scale): return torch.randn(n, generator=generator) * scale
    made = random(0.02).to(dtype), random(1e-3).to(dtype), random(1e-3), random(1e-3).square()
    return [t.to("cuda" if torch.cuda.is_available() else "cpu") for t in made]


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if on_card else [torch.float32])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1}, {"betas": (.8, 0.95), "eps": 1e-6}, {"lr": 0.01}], ids=str)
def test_an_update_in_one_pass_is_adamw(dtype, more):
    "Two parameters, one at its first step; every bit on a GPU. The interpreter rounds product and sum apart."
    asked = dict(steps=[1, 7], lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.) | more
    use_kernels(False)
    plain, kernel = ([list(z) for z in zip(moments(300, dtype), moments(1024 * 3 + 1, dtype, 1))] for _ in range(2))
    adamw(*plain, **asked)
    assert adamw_triton(*kernel, **asked)
    for one, other in zip((t for ts in plain for t in ts), (t for ts in kernel for t in ts)):
        if torch.cuda.is_available(): assert torch.equal(one, other)
        else: assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)
    assert not torch.equal(plain[0][0], moments(300, dtype)[0])


def test_what_the_update_leaves_to_the_plain_path():
    "torch has another formula for small betas; numbers that lie apart; double precision."
    p, g, m, v = moments(64, torch.float32)
    rest = [3], 1e-3
    assert not adamw_triton([p], [g], [m], [v], *rest, (0.5, 0.9), 1e-8, 0.)
    assert not adamw_triton([p[::2]], [g[::2]], [m[::2]], [v[::2]], *rest, (0.9, 0.9), 1e-8, 0.)
    assert not adamw_triton([p.double()], [g], [m], [v], *rest, (0.9, 0.9), 1e-8, 0.)


# ---------------------------------------------------------------- on a GPU

def model_and_optimizer(mode, dtype=torch.bfloat16):
    use_kernels(mode != "plain")
    model = checkpoint_layers(small(device="cuda", dtype=dtype))
    if mode != "plain": fuse_layers(model)
    if mode == "called": del AT_WORK["forward_backward", "cuda"]
    return model, PagedAdamW(trainable(model), lr=1e-2)


def several_steps(mode, dtype=torch.bfloat16):
    "Shapes that come and go, two forward passes a step among them."
    model, optimizer = model_and_optimizer(mode, dtype)
    asked = [(100, 1), (40, 1), (100, 1), (40, 1), (100, 2), (130, 1), (40, 3), (100, 1)]
    def one(n, times): return train_step(model, optimizer, [random_batch(2, n, vocabulary=128)] * times, 1e-2, 0.3)
    return [one(n, times) for n, times in asked], model


@needs_gpu
def test_a_recorded_step_is_the_same_step():
    "That of the same kernels in launches but for the last bit of a division, and that of plain torch up to rounding."
    recorded, model = several_steps("recorded")
    assert len(model._graph.graphs) == 3 and all(graph is not None for graph, _, _ in model._graph.graphs.values())
    exact, plain = several_steps("recorded", torch.float32)[0], several_steps("plain", torch.float32)[0]
    def off(one, other): return max(abs(a - b) / b for step in zip(one, other) for a, b in zip(*step))
    assert off(recorded, several_steps("called")[0]) < 1e-5 and off(exact, plain) < 1e-3


@needs_gpu
def test_a_recorded_step_on_a_side_stream():
    "Recorded and replayed on the stream that is current then; losses and gradients are those of the default one."
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        model, _ = model_and_optimizer("recorded")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                for p in trainable(model): p.grad = None
                loss = forward_backward(model, random_batch(2, 64, vocabulary=128), 126)
        stream.synchronize()
        assert len(model._graph.graphs) == 1
        found.append(torch.cat([loss[None], *(p.grad.flatten().float() for p in trainable(model))]))
    assert torch.equal(*found)


@pytest.mark.parametrize("to_none", [False, True])
def test_which_recordings_a_caller_gets(recordings, to_none):
    "Gradients dropped: one recording that makes them, and one that adds for a second pass. Zeroed: one that adds."
    p = nn.Parameter(torch.ones(3))
    graph = StepGraph([p])
    for _ in range(12):
        if to_none: p.grad = None
        elif p.grad is not None: p.grad.zero_()
        graph(product(p), torch.ones(1))
        assert p.grad.tolist() == [1.] * 3
    graph(product(p), torch.ones(1))
    assert p.grad.tolist() == [2.] * 3
    assert [makes for _, makes in graph.graphs] == ([True, False] if to_none else [False])


@needs_gpu
@pytest.mark.parametrize("to_none", [False, True])
def test_gradients_stay_where_the_recording_writes_them(to_none):
    "Dropped, zeroed, or left to add up: each replay adds to what is there."
    model, _ = model_and_optimizer("recorded")
    batch, params = random_batch(2, 64, vocabulary=128), trainable(model)
    once = None
    for _ in range(12):
        for p in params:
            if to_none: p.grad = None
            elif p.grad is not None: p.grad.zero_()
        forward_backward(model, batch, 126)
        now = [p.grad.clone() for p in params]
        assert once is None or all(map(torch.equal, once, now))
        once = now
    forward_backward(model, batch, 126)
    assert all(torch.allclose(p.grad, 2 * g, rtol=1e-2) for p, g in zip(params, once))
    graphs = model._graph.graphs
    assert all(graph is not None for graph, _, _ in graphs.values())
    assert [makes for _, makes in graphs] == ([True, False] if to_none else [False])  # the last pass above adds


@pytest.mark.parametrize("began", [True, False])
def test_a_pool_that_was_never_in_use_stays_with_its_graphs(began, monkeypatch):
    "The count of its users is lowered only where the capture had raised it."
    called = []
    state = SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=called.append)
    def end(device, pool):
        if not began: raise RuntimeError("not currently recording to mempool_id")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: called.append(pool), raising=False)
    monkeypatch.setattr(torch.cuda, "default_generators", [state])
    capture._switch_back(0, (0, 7))
    assert called == ([(0, 7), "copy"] if began else ["copy"])


@needs_gpu
def test_a_capture_that_breaks_off_leaves_nothing_behind():
    "The card's memory comes back, random numbers go on where they were; what was recorded before is dropped."
    p = nn.Parameter(torch.ones(3, device="cuda"))
    graph = StepGraph([p])
    def drawn(t): return t + torch.rand_like(t)
    def waits(t):
        large = torch.ones(2 ** 28, device="cuda")  # 1 GiB
        return t * (1 + 0 * large.sum().item())
    for _ in range(3): graph(drawn, torch.zeros(3))
    assert graph.graphs
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    torch.manual_seed(1)
    expected = torch.rand(4, device="cuda")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="without a graph"):
        for _ in range(2): graph(waits, torch.zeros(2))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held and torch.equal(torch.rand(4, device="cuda"), expected)
    assert len({tuple(graph(drawn, torch.zeros(3)).tolist()) for _ in range(4)}) == 4


@needs_gpu
def test_a_model_that_is_recorded_anew_takes_no_more():
    "Work space of the products too, which torch keeps for each stream that they ran on."
    model, batch, held = fuse_layers(small().cuda()), ragged((40, 27)), []
    for _ in range(4):
        for _ in range(3):
            for p in trainable(model): p.grad = None
            forward_backward(model, batch, 67)
        assert any(graph is not None for graph, _, _ in model._graph.graphs.values())
        forget(model)
        for p in trainable(model): p.grad = None
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[1:])) == 1, held


WAITS = {"bloom", "mpt", "falcon", "falcon alibi", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
         "gpt_oss", "deepseek_v3", "glm4_moe", "llama4_text", "mamba", "mamba2"}  # may ask the card for a number


@needs_gpu
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_a_card(name, checkpointed):
    "Recorded, or with one line of notice not; loss and gradients are the plain ones, with their mask."
    model = family(name).cuda()
    if checkpointed: checkpoint_layers(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = steps_of(model, [ragged((40, 27)), ragged((12, 30)), ragged((40, 27))], 30)
    recorded = [g for g, _, _ in model._graph.graphs.values() if g is not None]
    notices = [w for w in said if "without a graph" in str(w.message) or "no step is recorded" in str(w.message)]
    assert len(recorded) + len(notices) == 1 and (recorded or name in WAITS), [str(w.message) for w in notices]
    use_kernels(False)
    for lengths, step in zip(((40, 27), (12, 30), (40, 27)), found):
        loss = answer_losses(model, ragged(lengths))[0].sum() / 30
        gradients = torch.autograd.grad(loss, trainable(model), allow_unused=True)
        expected = torch.cat([loss.detach()[None], *(g.flatten() for g in gradients if g is not None)])
        assert (step - expected).norm() < 1e-4 * expected.norm()


def held_at_most(model, batch, steps):
    "Bytes that steps take from the card, over what is there before."
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    optimizer = PagedAdamW(trainable(model), lr=1e-3)
    for _ in range(steps): train_step(model, optimizer, [batch], 1e-3, 1.)
    return torch.cuda.max_memory_reserved() - before


@needs_gpu
@pytest.mark.parametrize("off", [0., 1e-7, 1.], ids=["equal", "near", "wrong"])
def test_a_recording_takes_the_memory_of_one_pass(off, monkeypatch):
    "Compared or not, and where it is dropped again: never a second pass's worth from the card."
    def numbers(self, result, own=StepGraph.numbers):
        loss, length = own(self, result)
        return loss * (1 + off * bool(self.graphs)), length
    monkeypatch.setattr(StepGraph, "numbers", numbers)
    batch = random_batch(512, 512, vocabulary=128)
    model = fuse_layers(small(device="cuda", dtype=torch.bfloat16))
    del AT_WORK["forward_backward", "cuda"]
    once = held_at_most(model, batch, 3)
    use_kernels(False)
    use_kernels()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recorded = held_at_most(model, batch, 4)
    assert once > 2 ** 30 and recorded <= 1.1 * once + 0.2 * 2 ** 30
    assert bool(model._graph.graphs) == (off < 1) == (not [w for w in said if "no step is recorded" in str(w.message)])


@needs_gpu
def test_dropout_under_checkpoints_is_not_recorded_in_silence():
    "The second run inside a recording would drop other numbers, and the comparison sees it; without checkpoints none."
    for checkpointed in (False, True):
        model = family("llama", attention_dropout=0.)
        for layer in model.model.layers: layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.5))
        model = model.cuda().train()
        if checkpointed: checkpoint_layers(model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            steps_of(model, [ragged((40, 27))] * 3, 30)
        assert any("recorded" in str(w.message) or "graph" in str(w.message) for w in said) == checkpointed
        assert bool(model._graph.graphs) != checkpointed


@needs_gpu
def test_the_switch_reaches_a_fused_model():
    "Off, its layers are plain torch again, to the bit."
    found = []
    for fuse in (False, True):
        use_kernels()
        model = small(device="cuda")
        if fuse: fuse_layers(model)
        use_kernels(False)
        assert not twin("forward_backward", "cuda")
        found.append(answer_losses(model, ragged((24, 17)))[0])
    assert torch.equal(*found)


@needs_gpu
def test_what_cannot_be_recorded_runs_as_it_is():
    "One line of notice, right results, and the GPU works on."
    p = nn.Parameter(torch.ones(3, device="cuda"))
    graph, waits = StepGraph([p]), lambda t: t * t.sum().item()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [graph(waits, torch.tensor([1., 2., 3.])).tolist() for _ in range(4)]
    assert found == [[6., 12., 18.]] * 4 and len([w for w in said if "without a graph" in str(w.message)]) == 1
    assert graph(lambda t: t + 1, torch.zeros(2)).tolist() == [1., 1.]


@needs_gpu
def test_only_so_many_shapes_are_recorded():
    p = nn.Parameter(torch.ones(3, device="cuda"))
    graph = StepGraph([p], most=2)
    for n in (1, 2, 3, 1, 2, 3, 3, 1):
        p.grad = None
        assert graph(lambda t: t * 2, torch.ones(n)).tolist() == [2.] * n
    assert len(graph.graphs) == 2


@needs_gpu
def test_a_run_records_its_steps(tiny, data, tmp_path, monkeypatch):
    "`train` fuses and records on a GPU, and ends where plain torch ends."
    from qlora_lab.model import load_model
    from qlora_lab.train import TrainConfig, train
    losses = []
    for on in (True, False):
        use_kernels(on)
        model, tokenizer = load_model(tiny, device="cuda", dtype=torch.float32, compute_dtype=torch.float32)
        config = TrainConfig(folder=tmp_path / str(on), steps=10, batch_size=2, rank=4, lr=5e-3, eval_examples=8,
                             eval_prompts=1, checkpointing=True)
        made, record = [], StepGraph.record
        def noted(self, *args, made=made, record=record):
            made.append(1)
            return record(self, *args)
        monkeypatch.setattr(StepGraph, "record", noted)
        run = train(model, tokenizer, data, config, progress=False)
        monkeypatch.undo()
        assert bool(made) == on and "_graph" not in model.__dict__
        losses.append([*run.losses, run.after.loss])
    assert losses[0][-1] < losses[0][0] and max(abs(a - b) for a, b in zip(*losses)) < 1e-3


def side_by_side(*work):
    "What some threads return, each given a function that waits for the others and says whether all say so."
    count, told = len(work), [None] * len(work)
    barrier, said = threading.Barrier(count, timeout=20), [True] * count
    def all_say(i):
        def every(flag):
            said[i] = flag
            barrier.wait()
            found = all(said)
            barrier.wait()
            return found
        return every
    def run(i): told[i] = work[i](all_say(i))
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    return told


@pytest.mark.parametrize("case", ["alike", "other shapes", "one cannot", "one differs", "one passes by"])
def test_processes_whose_passes_wait_for_each_other(recordings, case):
    "Each makes as many passes as the others, whatever its batches are; a proof is made together or not at all."
    shapes = [[1, 1, 1, 1, 1, 1], [1, 2, 1, 2, 2, 1] if case == "other shapes" else [1, 1, 1, 1, 1, 1]]
    def process(i):
        def work(every):
            p = nn.Parameter(torch.ones(3))
            graph, passed = StepGraph([p], every=every), []
            def passes(t):
                if graph.recording and case == "one cannot" and i: raise RuntimeError("cannot be recorded")
                if not graph.recording:
                    passed.append(every(True))  # where a layer would be gathered
                wrong = case == "one differs" and i and len(passed) == 4 and not graph.recording  # the first replay
                return product(p)(t + 1. * bool(wrong))
            for n, rows in enumerate(shapes[i]):
                p.grad = None
                if case == "one passes by" and i and n == 1:
                    graph.pass_by()
                    passes(torch.ones(rows, 1))
                else: assert graph(passes, torch.ones(rows, 1)).sum() == rows
            return len(passed), graph.proven, graph.most > 0
        return work
    with warnings.catch_warnings(record=True): told = side_by_side(process(0), process(1))
    fine = case in ("alike", "other shapes", "one passes by")
    assert told[0] == told[1] and told[0][1:] == (fine, fine)
    assert told[0][0] == 6 + 2 + (case == "one differs")  # the proof takes two, and a recording that is not taken one
