"Checkpointing: the same bits as without and as torch's, gradients where the classic form has none, exact bytes."
import copy
import gc

import pytest
import torch
import torch.utils.checkpoint as torchs
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import devices, make_llama, searched
from qlora_lab.checkpointing import checkpoint, checkpoint_layers, decoder_layers
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import LoRALinear, add_lora, trainable
from qlora_lab.records import LabError
from qlora_lab.timeline import MemoryTimeline

IDS = torch.arange(24).view(2, 12) % 300
FORMS = {"none": lambda f, *a: f(*a), "re-entrant": lambda f, *a: torchs.checkpoint(f, *a, use_reentrant=True),
         "non-re-entrant": lambda f, *a: torchs.checkpoint(f, *a, use_reentrant=False), "ours": checkpoint}


def same(a, b):
    "Equal to the bit, None where the other has None."
    return len(a) == len(b) and all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b))


def make_layer(width, hidden, dropout, dtype, device):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(width, hidden), nn.Dropout(dropout), nn.GELU(), nn.LayerNorm(hidden),
                          nn.Linear(hidden, width), nn.Dropout(dropout))
    return layer.to(device, dtype)


def step(form, layer, x, needs=True, device="cpu"):
    "Output, gradients of input and parameters, and the random numbers that follow."
    torch.manual_seed(1)
    layer.zero_grad()
    x = x.clone().requires_grad_(needs)
    y = FORMS[form](layer, x)
    after_forward = torch.rand(1, device=device)
    (y.float().square().sum() + y.float().sum()).backward()
    following = torch.rand(1), torch.rand(1, device=device)
    return [y.detach(), after_forward, *following, x.grad, *(p.grad for p in layer.parameters())]


def llama(kind, **other):
    "Adapters that do something, on 4-bit layers of the lab or of bitsandbytes, with dropout."
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = make_llama(layers=3, **other)
    if kind == "lab": add_lora(quantize_model(model, compute_dtype=torch.float32), config)
    else:
        import bitsandbytes as bnb
        for name, m in list(model.named_modules()):
            if type(m) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=False, compute_dtype=torch.float32,
                                        quant_type="nf4")
                new.load_state_dict(m.state_dict())
                model.set_submodule(name, new.to("cpu"))
        model = get_peft_model(model, config)
    g = torch.Generator().manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_" in n: p.data.normal_(std=0.1, generator=g)
    return model.train()


def loss_and_grads(model, **kw):
    torch.manual_seed(2)
    model.zero_grad()
    ids = IDS.to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids, **kw).loss
    loss.backward()
    return [loss.detach(), torch.rand(1), *(p.grad for p in trainable(model))]


@searched(25)
@given(rows=st.integers(0, 5), width=st.integers(1, 9), hidden=st.integers(1, 17),
       dropout=st.sampled_from([0., 0.1, 0.5, 1.]),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), lead=st.sampled_from([(), (2,), (1, 3)]))
def test_the_bits_of_torch_and_of_no_checkpoint(rows, width, hidden, dropout, dtype, lead):
    "Values, gradients and every random number drawn afterwards, for both of torch's forms and for none."
    layer = make_layer(width, hidden, dropout, dtype, "cpu")
    x = torch.randn(*lead, rows, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    results = {form: step(form, layer, x) for form in FORMS}
    assert all(same(r, results["none"]) for r in results.values())


@pytest.mark.parametrize("device", devices())
def test_dropout_on_each_device(device):
    "The random state of the device that the tensors are on is noted, used again and put back."
    layer, x = make_layer(64, 128, 0.5, torch.float32, device), torch.randn(32, 64, device=device)
    assert same(step("ours", layer, x, device=device), step("none", layer, x, device=device))


@pytest.mark.parametrize("device", devices())
def test_no_input_requires_grad(device):
    "As above frozen embeddings: the classic form gives parameters nothing, the lab's what no checkpoint gives."
    def made(): return LoRALinear(Linear4bit.from_linear(nn.Linear(32, 32)), r=2, alpha=2, dropout=0.5)
    layers = nn.Sequential(*(made() for _ in range(3))).to(device)
    head, x = torch.randn(32, device=device, requires_grad=True), torch.randn(4, 32, device=device)
    def grads(form):
        torch.manual_seed(4)
        layers.zero_grad()
        h = x
        for layer in layers: h = FORMS[form](layer, h)
        (h @ head).square().sum().backward()
        return [p.grad for p in trainable(layers)]
    with pytest.warns(UserWarning, match="None of the inputs"): classic = grads("re-entrant")
    assert all(g is None for g in classic)
    plain = grads("none")
    assert None not in plain and same(grads("ours"), plain) and same(grads("non-re-entrant"), plain)


def test_autograd_grad():
    "torch.autograd.grad, which the classic form refuses, for some inputs and for all."
    layer, x = make_layer(8, 8, 0.5, torch.float32, "cpu"), torch.randn(4, 8, requires_grad=True)
    def grad(form, wanted):
        torch.manual_seed(5)
        return torch.autograd.grad(FORMS[form](layer, x).square().sum(), wanted)
    for wanted in ([x], [layer[0].weight], [x, *layer.parameters()]):
        assert same(grad("ours", wanted), grad("none", wanted))
    with pytest.raises(RuntimeError): grad("re-entrant", [x])


@pytest.mark.parametrize("hooked", ["parameter", "late", "input"])
def test_hooks_act_once(hooked):
    "A hook that doubles a gradient doubles it once, on parameters and inputs, before or after the pass."
    layer = make_layer(8, 8, 0., torch.float32, "cpu")
    def grads(form):
        layer.zero_grad()
        x = torch.ones(4, 8, requires_grad=True)
        target = x if hooked == "input" else layer[0].weight
        def hook(): return target.register_hook(lambda g: 2 * g)
        if hooked != "late": handle = hook()
        y = FORMS[form](layer, x)
        if hooked == "late": handle = hook()
        y.square().sum().backward()
        assert len(target._backward_hooks) == 1
        handle.remove()
        return [x.grad, *(p.grad for p in layer.parameters())]
    assert same(grads("ours"), grads("none"))


def test_a_shared_parameter_and_two_backwards():
    "One layer used twice sums its gradients; a graph that is kept can be gone through again."
    layer, x = make_layer(8, 8, 0.5, torch.float32, "cpu"), torch.randn(4, 8)
    def grads(form):
        torch.manual_seed(6)
        layer.zero_grad()
        y = FORMS[form](layer, FORMS[form](layer, x.clone().requires_grad_())).sum()
        y.backward(retain_graph=True)
        y.backward()
        return [p.grad for p in layer.parameters()]
    assert same(grads("ours"), grads("none"))


def test_what_goes_in_and_out():
    "Keywords, nested containers, None, numbers, integer tensors, outputs in a dict; inputs without a gradient."
    w = nn.Parameter(torch.randn(5))
    def f(x, pair, *, scale, index=None, nothing=None):
        a, (b, n) = x * w, pair
        return {"sum": a * scale + b * n, "parts": [a.sin(), None, index], "n": n + 1}
    x, b = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    args, kwargs = (x, (b, 3)), dict(scale=2., index=torch.arange(3))
    ours, plain = checkpoint(f, *args, params=[w], **kwargs), f(*args, **kwargs)
    assert torch.equal(ours["sum"], plain["sum"]) and ours["parts"][1] is None and ours["n"] == 4
    assert torch.equal(ours["parts"][2], kwargs["index"])
    assert not ours["parts"][2].requires_grad
    def total(out): return out["sum"].sum() + out["parts"][0].square().sum()
    assert same(torch.autograd.grad(total(ours), [x, w]), torch.autograd.grad(total(plain), [x, w])) and b.grad is None
    def one(out): return out["parts"][0].sum()  # one output of several used
    again = checkpoint(f, *args, params=[w], **kwargs)
    assert same(torch.autograd.grad(one(again), [x, w]), torch.autograd.grad(one(f(*args, **kwargs)), [x, w]))


def test_an_output_that_depends_on_nothing():
    "A constant among the outputs, or a parameter that is not used, gives zeros or nothing, no error."
    x = torch.randn(3, requires_grad=True)
    constant, y = checkpoint(lambda x: (torch.ones(2), x * 2), x)
    constant.sum().backward()
    assert x.grad is None or not x.grad.any()
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    checkpoint(lambda x: x * used, x, params=[used, unused]).sum().backward()
    assert torch.equal(used.grad, x.detach()) and unused.grad is None
    _, doubled = checkpoint(lambda x: (torch.ones(2), x * 2), x)
    assert torch.equal(torch.autograd.grad(doubled.sum(), x)[0], torch.full((3,), 2.))


def test_a_parameter_that_was_not_named():
    "An error, not a gradient that is missing in silence; frozen ones need no mention."
    layer, x = nn.Linear(4, 6), torch.randn(2, 4, requires_grad=True)
    y = checkpoint(lambda x: layer(x), x)
    with pytest.raises(LabError, match=r"trainable tensor of shape \(6, 4\)|trainable tensor of shape \(6,\)"):
        y.sum().backward()
    outside = (torch.ones(4, requires_grad=True) * 2)
    with pytest.raises(LabError, match=r"shape \(4,\)"): checkpoint(lambda x: x * outside, x).sum().backward()
    layer.requires_grad_(False)
    checkpoint(lambda x: layer(x), x).sum().backward()


def test_a_parameter_changed_between_the_passes():
    "The second run would not be the first: torch's own error."
    layer = nn.Linear(4, 4)
    y = checkpoint(layer, torch.randn(2, 4))
    with torch.no_grad(): layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): y.sum().backward()


def test_double_backward_is_refused():
    "A gradient penalty would be a constant; nested checkpoints, which differentiate inside, are none of that."
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(LabError, match="create_graph"):
        torch.autograd.grad(checkpoint(torch.sin, x).sum(), x, create_graph=True)


def test_nested():
    "Checkpoints inside a checkpoint: the same bits, dropout included."
    layers, x = nn.Sequential(*(make_layer(6, 6, 0.5, torch.float32, "cpu") for _ in range(4))), torch.randn(3, 6)
    def halves(h, part):
        if len(part) == 1: return part[0](h)
        for p in (part[:len(part) // 2], part[len(part) // 2:]): h = checkpoint(halves, h, p, params=p.parameters())
        return h
    def grads(f):
        torch.manual_seed(7)
        layers.zero_grad()
        f(x, layers).sum().backward()
        return [torch.rand(1), *(p.grad for p in layers.parameters())]
    assert same(grads(halves), grads(lambda h, part: part(h)))


@pytest.mark.parametrize("device", devices())
def test_autocast(device):
    "The second run has the dtypes of the first, wherever the backward pass is called."
    layer, x = nn.Linear(8, 8).to(device), torch.randn(4, 8, device=device)
    def grads(form, inside):
        layer.zero_grad()
        h = x.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            y = FORMS[form](layer, h)
            if inside: y.sum().backward()
        if not inside: y.sum().backward()
        return [y, h.grad, layer.weight.grad]
    for inside in (False, True):
        assert grads("ours", inside)[0].dtype == torch.bfloat16 and same(grads("ours", inside), grads("none", inside))
    with torch.autocast(device, torch.bfloat16, enabled=False): y = checkpoint(layer, x)
    with torch.autocast(device, torch.bfloat16): y.sum().backward()  # and no autocast where there was none
    assert y.dtype == torch.float32


@pytest.mark.parametrize("kind", ["lab", "bnb"])
def test_a_whole_model(kind):
    "Loss, gradients and the random state that follows: the same bits with, without and off again; names stay."
    model = llama(kind)
    names, modules = list(model.state_dict()), [n for n, _ in model.named_modules()]
    plain = loss_and_grads(model, use_cache=False)
    assert None not in plain
    with MemoryTimeline() as before: loss_and_grads(model, use_cache=False)
    assert checkpoint_layers(model) is model
    assert same(loss_and_grads(model, use_cache=False), plain)
    assert same(loss_and_grads(model, use_cache=True), plain)  # ignored: a second run would fill it again
    with MemoryTimeline() as during: loss_and_grads(model, use_cache=False)
    assert during.peak < 0.6 * before.peak
    assert list(model.state_dict()) == names and [n for n, _ in model.named_modules()] == modules
    calls = []
    layer = decoder_layers(model)[0]
    hook = layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    loss_and_grads(checkpoint_layers(model), use_cache=False)
    assert len(calls) == 2  # once a pass
    loss_and_grads(checkpoint_layers(model, on=False), use_cache=False)
    assert len(calls) == 3 and "forward" not in layer.__dict__
    hook.remove()
    assert same(loss_and_grads(checkpoint_layers(model, on=False), use_cache=False), plain)


def test_as_transformers_does():
    "The same bits as transformers' own checkpointing; both at once are refused."
    model = llama("lab")
    ours = loss_and_grads(checkpoint_layers(model), use_cache=False)
    checkpoint_layers(model, on=False).gradient_checkpointing_enable({"use_reentrant": False})
    assert same(loss_and_grads(model, use_cache=False), ours)
    with pytest.raises(LabError, match="gradient_checkpointing_disable"): checkpoint_layers(model)
    model.gradient_checkpointing_disable()
    assert same(loss_and_grads(checkpoint_layers(model), use_cache=False), ours)


@pytest.mark.parametrize("kind", ["lab", "bnb"])
def test_generation_is_untouched(kind):
    "With the cache, without autograd, in train and eval mode (bitsandbytes, which repacks in eval, in train)."
    model = llama(kind)
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    def answer(): return model.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False)
    plain = answer()
    checkpoint_layers(model)
    assert torch.equal(answer(), plain)
    if kind == "lab": model.eval()
    assert torch.equal(answer(), plain)


def test_caches():
    "An eval pass with autograd fills the cache it is given; a training pass that should go on from one is refused."
    model = checkpoint_layers(llama("lab"))
    past = model.eval()(input_ids=IDS, use_cache=True).past_key_values
    assert past.get_seq_length() == IDS.shape[1]
    with pytest.raises(LabError, match="cannot go on from a cache"): model.train()(input_ids=IDS, past_key_values=past)


def test_a_copy_is_a_copy():
    "The copy's layers run the copy's weights."
    model = checkpoint_layers(llama("lab"))
    twin = copy.deepcopy(model)
    for p in trainable(twin): p.data.zero_()
    assert not same(loss_and_grads(twin, use_cache=False)[:1], loss_and_grads(model, use_cache=False)[:1])
    assert all(p.grad is not None for p in trainable(twin))


def test_another_wrapper_stays():
    "A forward that some library put on a layer before is used, and is there again afterwards."
    model, calls = llama("lab"), []
    layer = decoder_layers(model)[0]
    own = layer.forward
    def theirs(*a, **k):
        calls.append(1)
        return own(*a, **k)
    layer.forward = theirs
    loss_and_grads(checkpoint_layers(model), use_cache=False)
    assert len(calls) == 2 and checkpoint_layers(model, on=False) and layer.__dict__["forward"] is theirs


def test_all_weights_trained_and_other_families():
    "Not adapters alone, and layers that are called otherwise."
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=320, n_positions=32, bos_token_id=1, eos_token_id=1)
    neox = GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32,
                         vocab_size=320)
    models = [make_llama(), GPT2LMHeadModel(gpt2), GPTNeoXForCausalLM(neox)]
    for model in models:
        model.train()
        plain = loss_and_grads(model, use_cache=False)
        assert len(decoder_layers(model)) == 2
        assert same(loss_and_grads(checkpoint_layers(model), use_cache=False), plain)


def test_the_list_with_the_weights():
    "A decoder may have other lists of modules, before its layers or inside them."
    model = make_llama()
    layers = model.model.layers
    del model.model.layers
    model.model.heads, model.model.layers = nn.ModuleList([nn.Linear(2, 2)]), layers
    layers[0].experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(9)])
    assert decoder_layers(model) is layers


def test_weights_are_decoded_once_more(monkeypatch):
    "Twice a step, three times when checkpointed; the first layer's queries, keys, values pass none on."
    from qlora_lab.double_quant import QuantizedTensor
    model, count, decode = llama("lab"), [0], QuantizedTensor.dequantize
    def counted(self, *args):
        count[0] += 1
        return decode(self, *args)
    monkeypatch.setattr(QuantizedTensor, "dequantize", counted)
    loss_and_grads(model, use_cache=False)
    assert count[0] == 2 * 3 * 7 - 3
    loss_and_grads(checkpoint_layers(model), use_cache=False)
    assert count[0] == (2 + 3) * 3 * 7 - 6


def test_no_layers():
    "What was expected, and what to do instead."
    with pytest.raises(LabError, match="Linear: expected layers in an nn.ModuleList"):
        checkpoint_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("device", [*devices(), "meta"])
def test_timeline_by_hand(device):
    "Outputs count once, views and in-place results not again, what was there before never; all is given back."
    there = torch.ones(10, device=device)
    with MemoryTimeline() as t:
        a = torch.ones(100, device=device)            # + 400
        b = a + there[0]                              # + 400, a view of what was there: nothing
        a.mul_(2)
        t.mark("two")
        parts = b.view(10, 10).split(5)               # views
        del a, b                                      # - 400 at the next operator
        there.add_(1)
        half = parts[0].to(torch.float16)             # + 100
        del parts                                     # - 400
        empty = torch.empty(0, device=device)
    assert t.live == [0, 400, 400, 800, 800, 800, 800, 800, 400, 500, 100]
    assert t.marks == [(5, "two")] and t.peak == 800 and t.now == 100
    del half, empty, there
    assert t.now == 0 and not t._watched


def test_timeline_of_constants():
    "torch.tensor and an index list make memory too."
    with MemoryTimeline() as t:
        data = torch.tensor([1., 2., 3.])
        same_data = torch.ops.aten.lift_fresh(data)  # counted once
    assert t.now == 12
    del data, same_data
    assert t.now == 0


def test_timeline_of_an_allocator_that_rounds():
    "What is taken, coming and going."
    with MemoryTimeline(lambda n: -(-n // 512) * 512) as t:
        a = torch.ones(100)
        b = torch.cat([a, a])
    assert t.live == [0, 512, 1536]
    del a
    assert t.now == 1024
    del b
    assert t.now == 0


@pytest.mark.parametrize("device", devices())
def test_timeline_of_a_backward_pass(device):
    "By hand: sin keeps its input; the backward pass, on a GPU in its own thread, makes cos and the gradients."
    x = torch.randn(1000, device=device, requires_grad=True)
    with MemoryTimeline() as t:
        # exp keeps its output (once more seen by a detach); sin its input, which was there before
        y = x.sin().exp().sum()
        t.mark("backward")
        # 1 and its expanded view; times exp's output, which then goes; cos(x); their product, which stays
        y.backward()
    assert t.live == [0, 4000, 8000, 8000, 4004, 4004, 4008, 4008, 4008, 8008, 8008, 12008, 4008]
    assert t.marks == [(5, "backward")]
    assert t.peak == 12008 and t.now == 4004  # the gradient of x, and y
    del y
    x.grad = None
    assert t.now == 0 and not t._watched


@pytest.mark.parametrize("device", devices())
def test_timeline_leaves_nothing(device):
    "A step of a whole model, checkpointed: what remains is the gradients, to the byte; without them, nothing."
    model = checkpoint_layers(llama("lab")).to(device)
    with MemoryTimeline() as t: loss_and_grads(model, use_cache=False)
    gc.collect()
    assert t.now == sum(p.grad.nbytes for p in trainable(model))
    model.zero_grad()
    gc.collect()
    assert t.now == 0 and not t._watched


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_timeline_against_the_allocator():
    "On a GPU the peak is torch's own, but for rounding to 512 bytes and workspace."
    layers = nn.Sequential(*(make_layer(512, 2048, 0.1, torch.float32, "cuda") for _ in range(4)))
    x = torch.randn(256, 512, device="cuda")
    layers(x).sum().backward()
    layers.zero_grad()
    torch.cuda.synchronize()
    for form in ("none", "ours"):
        layers.zero_grad()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        with MemoryTimeline() as t:
            h = x
            for layer in layers: h = FORMS[form](layer, h)
            h.sum().backward()
        peak = torch.cuda.max_memory_allocated() - start
        assert abs(peak - t.peak) < 0.02 * peak + 2 ** 16, (form, peak, t.peak)
        del h


def test_a_checkpoint_keeps_inputs_alone():
    "In bytes, at the turn: the input of each layer but the first, which was there, and the last output."
    layers, x = nn.Sequential(*(make_layer(32, 256, 0.5, torch.float32, "cpu") for _ in range(5))), torch.randn(16, 32)
    with MemoryTimeline() as t:
        h = x
        for layer in layers: h = checkpoint(layer, h)
    assert t.now == 5 * x.nbytes
    with t: h.sum().backward()
    # the inputs are gone, while the output is still held
    assert t.now == x.nbytes + sum(p.grad.nbytes for p in layers.parameters())
    layers.zero_grad()
    del h
    assert t.now == 0
