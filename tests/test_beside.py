"""What checkpointed layers keep on the host beside their inputs: the same bits, less to do, and what the bus carries.

On a CPU a test puts the hooks in by hand; streams and recorded steps need a GPU.
"""
from itertools import combinations

import pytest
import torch
from test_fused import gradients, off
from test_fused_families import CASES, EACH, NAMES, made
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from benchmarks.common import random_batch
from benchmarks.shapes import shape_config
from conftest import devices
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers
from qlora_lab.double_quant import QuantizedTensor
from qlora_lab.engine import beside, decoder_layer, host_checkpoints
from qlora_lab.engine.beside import Beside, beside_bytes, chosen, offers
from qlora_lab.engine.dispatch import REHEARSED, standing_in, twin, use_kernels
from qlora_lab.engine.fusing import fuse_layers
from qlora_lab.engine.host_checkpoints import Kept, keep_on_host, piece_bytes
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.planner import plan
from qlora_lab.engine.rehearsal import Settings, empty_model, rehearse
from qlora_lab.lora import trainable
from qlora_lab.train import train_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FIVE = "llama", "qwen3", "gemma2", "phi", "mixtral"
SOME = pytest.mark.parametrize("family, more", [CASES[NAMES.index(name)] for name in FIVE], ids=FIVE)
SETS = [s for n in range(4) for s in combinations(("qkv", "middle", "attention"), n)]


@pytest.fixture(autouse=True)
def twins():
    with standing_in({("host_checkpoints", "cpu"): keep_on_host}): yield
    use_kernels()


@pytest.fixture
def all_of_it(monkeypatch):
    "A bus that carries everything, and nothing too small for it."
    for name in ("OPERATIONS", "WORTH", "LARGE"): monkeypatch.setattr(beside, name, 0 if name != "OPERATIONS" else 1e-6)


def waiting(model): return fuse_layers(checkpoint_layers(model, where="host"))
def only(names, monkeypatch):
    "Of what a layer offers, these."
    monkeypatch.setattr(beside, "chosen", lambda f, places, tokens, itemsize, room=0:
                        tuple(o for o in offers(f, tokens, itemsize) if o.name in names))


def keeper(model): return decoder_layers(model)[0]._aside.func.__self__


class Calls(TorchDispatchMode):
    "Counts attention's passes forward and backward, and weights decoded."
    def __init__(self, monkeypatch):
        super().__init__()
        self.forward = self.backward = self.decoded = 0
        decode = QuantizedTensor.dequantize
        def counted(*args, **kwargs):
            self.decoded += 1
            return decode(*args, **kwargs)
        monkeypatch.setattr(QuantizedTensor, "dequantize", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "_attention" in name and name.endswith("backward"): self.backward += 1
        elif "_attention" in name: self.forward += 1
        return func(*args, **kwargs or {})


@EACH
def test_every_family_gives_the_same_bits(family, more, all_of_it):
    "Loss and gradients, with all that it offers; twice, since places are used again."
    expected, model = gradients(fuse_layers(made(family, more, True))), waiting(made(family, more))
    for _ in range(2): assert torch.equal(gradients(model), expected)


@SOME
@pytest.mark.parametrize("names", SETS, ids="-".join)
def test_every_set_gives_the_same_bits(family, more, names, all_of_it, monkeypatch):
    expected = gradients(fuse_layers(made(family, more, True)))
    only(names, monkeypatch)
    assert torch.equal(gradients(waiting(made(family, more))), expected)


@SOME
@pytest.mark.parametrize("device", devices())
def test_it_spares_what_it_says(family, more, device, all_of_it, monkeypatch):
    """Attention runs once in the first two of three layers, and the products of queries, keys and values are not made a
    second time; nor is in all three, where nothing else needs it, the one behind attention."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    plain = fuse_layers(made(family, more, True, device=device, dtype=dtype))
    model = waiting(made(family, more, device=device, dtype=dtype))
    expected, _ = gradients(plain), gradients(model)  # kernels are tried in the first pass
    with monkeypatch.context() as m, Calls(m) as before: gradients(plain)
    with monkeypatch.context() as m, Calls(m) as after: found = gradients(model)
    f = decoder_layers(model)[0]._fused
    spared = 2 * len(f.qkv.layers) + 3 * (not f.parallel and f.norm_behind is None)
    assert off(found, expected) < (1e-9 if device == "cpu" else 0.01)
    assert before.decoded - after.decoded == spared
    assert (before.forward, before.backward) == (6, 3) and (after.forward, after.backward) == (4, 3)


@pytest.mark.parametrize("large", [0, 1 << 13, 1 << 22])
def test_the_graph_may_be_asked_twice(large, all_of_it, monkeypatch):
    """A second backward pass finds everything as it was, though the first wrote over what it fetched; also where some
    results, or all, are too small to travel."""
    monkeypatch.setattr(beside, "LARGE", large)
    model = waiting(made("llama", {}))
    given = torch.arange(48).view(2, 24)
    loss = model(input_ids=given, labels=given, use_cache=False).loss
    first, second = (torch.autograd.grad(loss, trainable(model), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("which", range(5), ids=["input", "qkv", "out", "middle", "none"])
def test_one_bit_on_the_host_is_seen(which, all_of_it, monkeypatch):
    "A control: what is read in the second run is what was sent."
    sent, real, given = [], Kept.__init__, torch.arange(48).view(2, 24)
    monkeypatch.setattr(Kept, "__init__", lambda self, *a: (real(self, *a), sent.append(self))[0])
    def found(spoil):
        sent.clear()
        model = waiting(made("llama", {}))
        loss = model(input_ids=given, labels=given, use_cache=False).loss
        order = [sent[0], sent[1], sent[2], sent[4]]  # between the last two logsumexp
        assert [k.home.numel() // 48 for k in order] == [64, 144, 64, 64]
        if spoil and which < 4: order[which].home.view(-1).view(torch.int32)[5] ^= 1 << 22
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable(model))])
    assert torch.equal(found(True), found(False)) == (which == 4)


def test_a_pass_without_a_backward_pass_gives_its_places_back(all_of_it):
    model = waiting(made("llama", {}))
    def pieces(): return sum(size * len(some) for size, some in keeper(model).places.free.items())
    gradients(model)
    once = keeper(model).places.nbytes
    given = torch.arange(48).view(2, 24)
    for _ in range(3): model(input_ids=given, use_cache=False)
    with torch.no_grad(): model(input_ids=given, use_cache=False)
    gradients(model)
    assert keeper(model).places.nbytes == pieces() == once


def test_small_results_and_parts_of_arrays_are_not_kept():
    sent, whole = [], torch.zeros(1 << 20)
    b = Beside(frozenset(["qkv", "attention"]), lambda t, ahead: sent.append(t))
    for t in (whole[:-1], whole[::2], torch.zeros(3)): b.keep("qkv", t)
    b.keep("middle", whole)
    assert not sent and not b.kept
    b.keep("attention", whole, torch.zeros(3))
    assert len(sent) == 1 and isinstance(b.kept["attention"][1], torch.Tensor)


def test_places_come_back_with_the_backward_pass(all_of_it):
    "Though the loss, and so the graph, is still there."
    model, given, kept = waiting(made("llama", {})), torch.arange(48).view(2, 24), []
    for _ in range(3):
        loss = model(input_ids=given, labels=given, use_cache=False).loss
        once = keeper(model).places.nbytes
        loss.backward()
        kept.append(loss)
        places = keeper(model).places
        assert places.nbytes == once == sum(size * len(some) for size, some in places.free.items())


def test_a_pass_that_was_interrupted_leaves_nothing_to_others(all_of_it, monkeypatch):
    "Checkpoints that stay on the device afterwards send nothing."
    model, given = waiting(made("llama", {})), torch.arange(48).view(2, 24)
    expected = gradients(fuse_layers(made("llama", {}, True)))
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(decoder_layer, "mlp", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        model(input_ids=given, labels=given, use_cache=False)
    places = keeper(model).places
    taken = places.nbytes
    assert taken > 0
    fuse_layers(checkpoint_layers(model, where="device"))
    assert torch.equal(gradients(model), expected) and places.nbytes == taken


def parts(name, **more):
    "A fused layer in a real shape, without bytes."
    with standing_in({("fuse_layers", "meta"): fuse_layers}):
        how = dict(rank=64, adapter_dtype="bfloat16", checkpointing=True, checkpoints_in="host", sequence=64)
        config = shape_config(name)
        config.num_hidden_layers = 2
        model = fuse_layers(empty_model(config, Settings(**how | more)))
    return decoder_layers(model)[0]._fused


CHOSEN = {  # what the bus of an H100 carries beside the input
    ("llama-7b", 512): {"qkv"}, ("llama-7b", 32768): {"qkv", "middle", "attention"},
    ("llama-3-8b", 2048): {"qkv", "middle", "attention"}, ("qwen3-8b", 512): {"qkv", "middle"},
    ("qwen2.5-7b", 2048): {"qkv", "middle", "attention"}, ("phi-4-mini", 2048): {"middle", "attention"},
    ("qwen3-30b-a3b", 1024): set()}


@pytest.mark.parametrize("name, tokens", CHOSEN)
def test_what_a_shape_keeps(name, tokens):
    "By hand: two operations a weight and token, four a key seen and number of a head; 11,500 of them a byte."
    f = parts(name)
    found = chosen(f, 8192, tokens, 2)
    assert {o.name for o in found} == CHOSEN[name, tokens]
    config = shape_config(name)
    heads, width = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    work = 2 * sum(g.inputs * g.outputs for g in f.groups) + 4 * tokens * heads * size
    assert not found or (2 * width + sum(o.nbytes for o in found)) * 11_500 <= work


def test_what_the_host_has_room_for():
    "Of a layer's room its input comes off first; what is left decides, in pieces of powers of two."
    f, mib = parts("llama-3-8b"), 1 << 20
    def names(room): return {o.name for o in chosen(f, 8192, 2048, 2, room)}
    assert names(64 * mib - 1) == names(127 * mib) == set() and names(128 * mib) == {"middle"}
    assert names(64 * mib + 128 * mib) == {"middle", "attention"} and names(64 * mib + 192 * mib) == {"qkv", "middle"}
    assert names(64 * mib + 256 * mib) == {"qkv", "middle", "attention"}


def test_a_host_without_room_keeps_inputs_alone(all_of_it, monkeypatch):
    monkeypatch.setattr(host_checkpoints, "SHARE", 0.)
    model = waiting(made("llama", {}))
    expected = gradients(fuse_layers(made("llama", {}, True)))
    assert torch.equal(gradients(model), expected)
    assert keeper(model).places.nbytes == 2 * piece_bytes(48 * model.config.hidden_size * 4)


def test_no_better_set_fits():
    f = parts("llama-3-8b")
    some = offers(f, 2048, 2)
    for limit in range(0, 40_000, 500):
        work = 2 * sum(g.inputs * g.outputs for g in f.groups) + 4 * 2048 * f.out.inputs
        with pytest.MonkeyPatch.context() as m:
            m.setattr(beside, "OPERATIONS", work / (limit + 2 * f.qkv.inputs))
            found = chosen(f, 8192, 2048, 2)
        best = max(sum(o.spared for o in s) for n in range(4) for s in combinations(some, n)
                   if sum(o.nbytes for o in s) <= limit + 1e-6)
        assert sum(o.spared for o in found) == best


@pytest.mark.parametrize("window, worth", [(None, True), (256, False), (512, True), (8192, True)])
def test_what_a_window_spares(window, worth):
    f = parts("llama-7b")
    f.how = f.how | {"window": window}
    assert ("attention" in {o.name for o in offers(f, 32768, 2)}) == worth
    assert "attention" not in {o.name for o in offers(f, 1023, 2)}


@pytest.mark.parametrize("operations", [1e-6, 1e12])
def test_a_plan_counts_what_waits_on_the_host(operations, all_of_it, monkeypatch):
    "Inputs and what is beside them: in all what the pieces of a step take."
    monkeypatch.setattr(beside, "OPERATIONS", operations)
    model = waiting(made("llama", {}))
    given = torch.arange(48).view(2, 24)
    loss = model(input_ids=given, labels=given, use_cache=False).loss  # a forward pass sends all of it
    layers = decoder_layers(model)
    found = sum(beside_bytes(layer, 48, 24, 4) for layer in layers[:-1])  # the last one's middle stays on the device
    inputs = (len(layers) - 1) * piece_bytes(48 * model.config.hidden_size * 4)
    assert keeper(model).places.nbytes == found + inputs and (found > 0) == (operations < 1) and loss > 0


def test_a_plan_for_a_card_counts_it_too():
    "Of 31 of 32 layers: input and what the product of queries, keys and values wrote, in powers of two."
    p = plan("llama-7b", rank=64, adapter_dtype="bfloat16", batch_size=16, sequence=512, checkpointing=True,
             checkpoints_in="host")
    tokens = 16 * 512
    assert p.host_inputs == 31 * (piece_bytes(tokens * 4096 * 2) + piece_bytes(tokens * (3 * 4096 + 192) * 2))


def test_the_device_holds_less_while_the_second_half_s_gradients_are_made(all_of_it, monkeypatch):
    "With the middle at hand nothing of attention's half is there but what was fetched."
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=512, num_attention_heads=4, vocab_size=128,
                                  num_key_value_heads=4, num_hidden_layers=8)
    kernels = tuple({name: twin(name, "cuda") for name in REHEARSED}.values())
    how, peaks = dict(rank=4, sequence=4096, checkpointing=True, checkpoints_in="host"), {}
    for names in (("attention",), ("middle", "attention")):
        only(names, monkeypatch)
        peaks[names] = rehearse(config, Settings(**how), 8, kernels)[1].peak
    few, more = peaks.values()
    assert more < few - 4096 * 64 * 2  # more by what came ahead, less by norm, products and what attention read


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi", "mixtral"])
def test_recorded_steps_with_everything_beside(family, all_of_it):
    "Losses of recorded steps with and without, over batches of two shapes."
    def losses(where):
        more = CASES[NAMES.index(family)][1]
        model = fuse_layers(checkpoint_layers(made(family, more, device="cuda", dtype=torch.bfloat16), where=where))
        optimizer = PagedAdamW(trainable(model), lr=1e-2)
        batches = [random_batch(2, n, vocabulary=128) for n in (64, 128)]
        found = [train_step(model, optimizer, [batches[i % 2]], 1e-2, 0.3)[0] for i in range(12)]
        assert any(graph for graph, _, _ in model._graph.graphs.values())
        return torch.tensor(found)
    assert off(losses("host"), losses("device")) < 0.01
