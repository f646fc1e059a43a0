"""Checkpoints that wait in host memory: the same bits, in and out of a recorded graph, in any order of passes.

The hooks run on a CPU as well, where a test puts the twin in by hand; streams, lanes and graphs need a GPU.
"""
import copy
import gc
import pickle
from contextlib import contextmanager

import pytest
import torch
from test_fused import ids, small
from torch import nn

from benchmarks.common import random_batch
from conftest import make_llama
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers, is_checkpointed
from qlora_lab.engine import copy_lanes, decoder_layer
from qlora_lab.engine.capture import Capture
from qlora_lab.engine.dispatch import faster, standing_in, use_kernels
from qlora_lab.engine.fusing import fuse_layers
from qlora_lab.engine.host_checkpoints import Kept, Places, keep_on_host
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.step_graph import StepGraph
from qlora_lab.lora import LoRALinear, trainable
from qlora_lab.records import LabError
from qlora_lab.train import train_step

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LAYERS = 4


@pytest.fixture(autouse=True)
def twins():
    "The twin works on a CPU too, and the switch is back on afterwards."
    with standing_in({("host_checkpoints", "cpu"): keep_on_host}): yield
    use_kernels()


def made(where, fused=False, layers=None, dropout=0., device="cpu", dtype=torch.float32):
    model = small(device=device, dtype=dtype, dropout=dropout, num_hidden_layers=LAYERS)
    checkpoint_layers(model, layers=layers, where=where)
    return fuse_layers(model) if fused else model


def loss_of(model, seed=0):
    torch.manual_seed(seed)
    given = ids(next(model.parameters()).device.type)
    return model(input_ids=given, labels=given, use_cache=False).loss


def grads(model, loss=None):
    loss = loss_of(model) if loss is None else loss
    for p in trainable(model): p.grad = None
    loss.backward()
    return [loss.detach(), *(p.grad for p in trainable(model))]


def same(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))


def keeper(model):
    layer = next(layer for layer in decoder_layers(model) if is_checkpointed(layer))
    return layer._aside.func.__self__


def free(model): return sum(size * len(pieces) for size, pieces in keeper(model).places.free.items())


def test_pieces_of_a_broken_recording_come_back():
    "A recording keeps its pieces to itself, another recording may share them; one that broke off leaves them to all."
    places, x, whole, broken = Places(), torch.zeros(1000), Capture(), Capture()
    mine, other = places.take(x, whole), places.take(x, broken)
    for piece in (mine, other): places.give_back(piece)
    shared = places.take(x, broken)
    assert shared.memory is other.memory
    again = places.take(x, broken)
    assert again.memory is mine.memory and again.known is whole
    for piece in (shared, again): places.give_back(piece)
    third = places.take(x, None)
    assert third.memory is not mine.memory and third.memory is not other.memory and places.nbytes == 3 * 4096
    broken.broken = True
    assert places.take(x, None).memory is other.memory and places.nbytes == 3 * 4096
    assert places.take(x, None).memory is not mine.memory


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layers", [None, 1, 3, (0, 2), (1, 2, 3)], ids=str)
def test_the_same_bits(fused, layers):
    "And every input but the last was on the host."
    model = made("host", fused, layers)
    assert same(grads(model), grads(made("device", fused, layers)))
    count = len(range(LAYERS) if layers is None else range(layers) if isinstance(layers, int) else layers)
    size = 1 << (ids("cpu").numel() * model.config.hidden_size * 4 - 1).bit_length()
    gc.collect()
    assert keeper(model).places.nbytes == free(model) == (count - 1) * size


def test_dropout_and_hooks_on_parameters():
    "The second run needs the adapters themselves: a hook that doubles a gradient doubles it once."
    def found(where):
        model = made(where, dropout=0.3)
        p = trainable(model)[3]
        p.register_hook(lambda g: 2 * g)
        return grads(model)
    assert same(found("host"), found("device"))


def test_a_wrapped_layer():
    "Another library's wrapper around a layer: parameters are named one by one, and found."
    model, plain = small(num_hidden_layers=LAYERS), grads(made("device"))
    for layer in decoder_layers(model):
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
    assert same(grads(checkpoint_layers(model, where="host")), plain)


@pytest.mark.parametrize("fused", [False, True])
def test_two_graphs_at_a_time(fused):
    "Two forward passes before two backward passes, in either order, and one gone through twice."
    model, plain = made("host", fused), made("device", fused)
    for order in ((0, 1), (1, 0)):
        both = [[loss_of(m), loss_of(m) * 3] for m in (model, plain)]
        assert all(same(grads(model, both[0][i]), grads(plain, both[1][i])) for i in order)
    loss = loss_of(model)
    first, second = (torch.autograd.grad(loss, trainable(model), retain_graph=True) for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_pass_that_breaks_off(error, fused, monkeypatch):
    "The next one is whole, the places come back, and no hook stays behind, which `conftest` sees to for all tests."
    def fails(*_): raise error
    model, plain = made("host", fused), grads(made("device", fused))
    with monkeypatch.context() as m, pytest.raises(error):
        if fused: m.setattr(decoder_layer, "mlp", fails)
        else: m.setattr(decoder_layers(model)[2].mlp, "forward", fails)
        loss_of(model)
    assert same(grads(model), plain)
    hook = trainable(model)[LAYERS].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError): grads(model)
    hook.remove()
    for p in trainable(model): p.grad = None
    gc.collect()
    assert same(grads(model), plain)
    gc.collect()
    assert keeper(model).places.nbytes == free(model)


@pytest.mark.parametrize("fused", [False, True])
def test_what_was_changed_is_noticed(fused):
    "Behind saved-tensor hooks torch compares no versions; here they are compared."
    model = made("host", fused)
    loss = loss_of(model)
    with torch.no_grad(): trainable(model)[0].add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


def test_copies_and_taking_off():
    "A copy of the model has hooks and places of its own; off, nothing is left."
    model = made("host")
    plain = grads(model)
    for p in trainable(model): p.grad = None
    other = copy.deepcopy(model)
    assert keeper(other) is not keeper(model) and same(grads(other), plain)
    assert same(grads(pickle.loads(pickle.dumps(other))), plain)
    checkpoint_layers(model)  # on the device again
    assert not any("_aside" in layer.__dict__ for layer in decoder_layers(model))
    checkpoint_layers(other, on=False)
    assert not any("_aside" in layer.__dict__ or is_checkpointed(layer) for layer in decoder_layers(other))
    assert same(grads(model), plain) and same(grads(other), plain)


def test_some_of_the_layers():
    "A count, a choice, a change of it; fused and not."
    model = make_llama(layers=4)
    def on(): return [is_checkpointed(layer) for layer in decoder_layers(model)]
    for layers, wanted in ((2, [1, 1, 0, 0]), ((3, 1), [0, 1, 0, 1]), (None, [1] * 4), (1, [1, 0, 0, 0])):
        checkpoint_layers(model, layers=layers)
        assert on() == [bool(w) for w in wanted]
    assert same(grads(made("device", True, 2)), grads(made("device", True)))
    for odd in (0, 5, (4,), (-1,), ()):
        with pytest.raises(LabError, match="layers="): checkpoint_layers(model, layers=odd)
    with pytest.raises(LabError, match="where='disk'"): checkpoint_layers(model, where="disk")


def test_a_cpu_says_that_it_has_no_other_memory():
    with standing_in({("host_checkpoints", "cpu"): None}), pytest.warns(UserWarning, match="stay where they are"):
        model = checkpoint_layers(make_llama(), where="host")
    assert all(map(is_checkpointed, decoder_layers(model)))


def test_two_inputs_are_there_at_a_time(monkeypatch):
    "In the backward pass: the layer's own, and the one that comes next."
    model, most, alive = made("host"), [0], []
    fetch = Kept.fetch
    def noted(self):
        fetch(self)
        alive.append(self)
        most[0] = max(most[0], sum(k.x is not None and not k.stays for k in set(alive)))
    monkeypatch.setattr(Kept, "fetch", noted)
    grads(model)
    assert len(set(alive)) == LAYERS and most[0] == 1  # what is handed out is the graph's


# ---------------------------------------------------------------- on a GPU

@needs_gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("late", [None, "in", "out", "compute"])
def test_the_same_bits_on_a_gpu(fused, late, monkeypatch):
    "Each queue held up by milliseconds: a wait that is missing shows."
    plain = grads(made("device", fused, device="cuda"))
    lane = copy_lanes.Streams.lane
    @contextmanager
    def held(self, name, *after):
        with lane(self, name, *after):
            if name == late: torch.cuda._sleep(10_000_000)
            yield
    monkeypatch.setattr(copy_lanes.Streams, "lane", held)
    model = made("host", fused, device="cuda")
    if late == "compute":
        for layer in decoder_layers(model): layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10_000_000))
    for _ in range(3): assert same(grads(model), plain)


@needs_gpu
@pytest.mark.parametrize("layers", [None, 2])
def test_in_a_recorded_graph(layers):
    "Several steps, shapes and accumulation: losses and adapters are those of checkpoints on the device, in every bit."
    asked = [(100, 1), (40, 1), (100, 1), (40, 1), (100, 2), (130, 1), (40, 3), (100, 1), (100, 2)]
    found = []
    for where in ("device", "host"):
        model = made(where, True, layers, device="cuda", dtype=torch.bfloat16)
        optimizer = PagedAdamW(trainable(model), lr=1e-2)
        steps = [train_step(model, optimizer, [random_batch(2, n, vocabulary=128)] * times, 1e-2, 0.3)
                 for n, times in asked]
        graphs = model._graph.graphs
        assert graphs and all(graph is not None for graph, _, _ in graphs.values())
        found.append((steps, [p.detach().clone() for p in trainable(model)]))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])


@needs_gpu
def test_a_pass_between_recordings():
    "A graph that is kept while recordings are replayed finds its inputs untouched."
    model = made("host", True, device="cuda")
    batch, optimizer = random_batch(2, 24, vocabulary=128), PagedAdamW(trainable(model), lr=0.)
    for _ in range(3): train_step(model, optimizer, [batch], 0., 0.3)
    assert isinstance(model._graph, StepGraph) and model._graph.graphs
    plain = grads(model)
    loss = loss_of(model)
    faster("forward_backward", torch.device("cuda"), model, random_batch(2, 24, vocabulary=100), 46)  # no update
    for p in trainable(model): p.grad = None
    assert same(grads(model, loss), plain)


@needs_gpu
def test_a_recording_that_runs_out_of_memory():
    "Its places on the host serve the passes that go on without it, and the notice says what was short."
    model, batch = made("host", False, device="cuda"), random_batch(2, 24, vocabulary=128)
    def full(*_):
        if torch.cuda.is_current_stream_capturing(): raise torch.OutOfMemoryError("out of memory")
    decoder_layers(model)[-1].register_forward_pre_hook(full)
    full.__module__ = "qlora_lab"  # a hook of somebody else's is never recorded
    optimizer = PagedAdamW(trainable(model), lr=0.)
    found = [train_step(model, optimizer, [batch], 0., 0.3)]
    places = keeper(model).places
    once = places.nbytes
    with pytest.warns(UserWarning, match="without a graph .out of memory"):
        found += [train_step(model, optimizer, [batch], 0., 0.3) for _ in range(3)]
    assert [graph for graph, _, _ in model._graph.graphs.values()] == [None]
    assert found == found[:1] * 4 and places.nbytes == free(model) == once


@needs_gpu
def test_memory_is_given_back():
    "At the turn fewer inputs are on the card, by what the host holds."
    def at_the_turn(where):
        model = make_llama(layers=12, hidden=256).to("cuda").requires_grad_(False)
        for layer in decoder_layers(model): layer.mlp.up_proj = LoRALinear(layer.mlp.up_proj, r=2, alpha=2)
        checkpoint_layers(model, where=where)
        given = torch.ones(8, 256, dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = model.model(input_ids=given, use_cache=False).last_hidden_state
        held = torch.cuda.memory_allocated() - before
        out.sum().backward()
        return held
    x = 8 * 256 * 256 * 4
    at_the_turn("device")  # the first product takes its work space
    assert at_the_turn("device") - at_the_turn("host") == 11 * x  # the last layer's stays


def test_a_module_without_layers_is_refused():
    with pytest.raises(LabError, match="found none"): checkpoint_layers(nn.Linear(2, 2), where="host")
