"Training: the same losses as PEFT on bitsandbytes, honest uncertainty, a model that learns."
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from qlora_lab.bnb_files import save_quantized
from qlora_lab.data import collate, tokenize
from qlora_lab.double_quant import QuantizedTensor
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import load_adapter
from qlora_lab.model import answer, load_model, memory_bill
from qlora_lab.records import LabError
from qlora_lab.runs import Run
from qlora_lab.scoring import Score, improvement
from qlora_lab.settings import TrainConfig
from qlora_lab.train import answer_losses, attach_adapters, score, train
from qlora_lab.trimming import trim_between_layers

SHORT = dict(steps=20, batch_size=4, accumulation=2, rank=4, eval_examples=8, eval_prompts=2, lr=2e-3)


def run(tiny, data, folder, backend="lab", **kw):
    model, tokenizer = load_model(tiny, backend=backend, compute_dtype=torch.float32)
    return train(model, tokenizer, data, TrainConfig(folder=str(folder), **(SHORT | kw)), progress=False)


@pytest.fixture(scope="module")
def lab(tiny, data, tmp_path_factory):
    return run(tiny, data, tmp_path_factory.mktemp("runs") / "lab")


def test_same_losses_as_peft_and_bitsandbytes(lab, tiny, data, tmp_path):
    "The real thing: 20 steps in float32 from the same seed, step by step and at the end, and much the same adapter."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
    save_quantized(model, tmp_path / "base", tokenizer)  # shared, since bitsandbytes would make other bytes on a card
    peer = run(tmp_path / "base", data, tmp_path / "bnb", backend="bnb")
    assert max(abs(a - b) for a, b in zip(lab.losses, peer.losses)) < 1e-5
    assert abs(lab.before.loss - peer.before.loss) < 1e-5 and abs(lab.after.loss - peer.after.loss) < 1e-4
    a, b = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (lab, peer))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_it_learns(lab):
    "The held-out loss falls by far more than its uncertainty."
    gain, error = improvement(lab.before, lab.after)
    assert gain > 0.2 and gain > 5 * error > 0


def test_the_run_folder_tells_all(lab):
    "Configuration, versions, machine, data, a line a step, answers before and after, memory by component."
    record = json.loads((lab.folder / "run.json").read_text())
    assert record["state"] == "done" and record["config"]["rank"] == 4 and record["identity"]["data"]
    assert {"date", "command", "cpu", "versions"} <= record["provenance"].keys()
    assert record["provenance"]["versions"]["torch"]
    assert [m["step"] for m in lab.metrics] == list(range(1, 21))
    assert len(lab.answers) == 2 and set(lab.answers.columns) == {"prompt", "reference", "before", "after"}
    assert {"4-bit codes", "quantization statistics", "adapters", "gradients", "optimizer",
            "activations"} <= set(lab.memory.index)
    held, full = lab.memory["QLoRA"], lab.memory["16-bit full"]
    assert (held > 0).all() and held.sum() < full.sum()
    saved = load_file(lab.folder / "adapter" / "adapter_model.safetensors")
    assert held["adapters"] == held["gradients"] == sum(t.nbytes for t in saved.values()) <= held["optimizer"] / 2


def test_the_saved_adapter_is_the_trained_one(lab, tiny, data):
    "Loaded on a fresh model it scores what the run says it scored."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
    load_adapter(model, lab.folder / "adapter")
    held = [tokenize(tokenizer, e) for e in data.held_out[:8]]
    again = score(model, held)
    assert again.tokens == tuple(int(t.mask[1:].sum()) for t in held)
    assert Run.load(lab.folder).after.loss == lab.after.loss


def test_a_finished_run_is_read_not_trained(lab, tiny, data):
    "The same call again changes no file."
    before = {p: p.read_bytes() for p in lab.folder.rglob("*") if p.is_file()}
    assert run(tiny, data, lab.folder).losses == lab.losses
    assert before == {p: p.read_bytes() for p in lab.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("settings, told", [
    (dict(batch_size=999), "do not fill one batch of 999"), (dict(batch_size=999, tensorboard=True), "batch of 999"),
    (dict(batch_size=999, init="pissa"), "batch of 999"), (dict(max_length=1), "longer than 1"),
    (dict(targets=("nope",)), "nope")])
def test_what_cannot_be_trained_leaves_the_folder_free(settings, told, tiny, data, tmp_path):
    "A call that was refused has begun no run, so the corrected one may have the folder."
    with pytest.raises(LabError, match=told): run(tiny, data, tmp_path / "run", **settings)
    assert run(tiny, data, tmp_path / "run", steps=1).record["state"] == "done"


def test_accumulation_is_one_big_batch(tiny, data):
    "Two passes of four learn what one of eight does, though their answers differ in length."
    from qlora_lab.train import train_step
    grads = []
    for sizes in ((8,), (2, 6)):
        model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
        model = attach_adapters(model, TrainConfig(rank=4))
        tokens = [tokenize(tokenizer, e) for e in data.train[:8]]
        cut = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        loss, _ = train_step(model, optimizer, [collate(tokens[a:b]) for a, b in zip(cut, cut[1:])], 1., 1e9)
        grads.append((loss, {n: p.detach() - before[n] for n, p in model.named_parameters() if p.requires_grad}))
    (la, a), (lb, b) = grads
    assert abs(la - lb) < 1e-6 and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert any(v.abs().max() > 1e-4 for v in a.values())


def test_answer_losses_are_cross_entropy_of_the_shifted_answers(tiny, data):
    "Against the plain way: all logits, shift by one, ignore what is masked."
    model, tokenizer = load_model(tiny, quantize=None, dtype=torch.float32)
    batch = collate([tokenize(tokenizer, e) for e in data.train[:5]])
    batch = {name: of.to(model.device) for name, of in batch.items()}
    losses, rows = answer_losses(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    keep = batch["labels"][:, 1:] != -100
    assert torch.allclose(losses, plain[keep], atol=1e-5) and torch.equal(rows, keep.nonzero()[:, 0])


def test_scoring_leaves_dropout_out_and_puts_it_back(tiny, data):
    "A held-out loss with dropout would be worse than the model is."
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
    model = attach_adapters(model, TrainConfig(rank=4, dropout=0.5)).train()
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(generator=torch.Generator(p.device).manual_seed(0))
    held = [tokenize(tokenizer, e) for e in data.held_out[:4]]
    assert score(model, held) == score(model, held)
    assert all(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_answers_after_training_leave_dropout_out(tiny, data, tmp_path):
    "With dropout in the run, the answers it reports are those its adapter gives."
    done = run(tiny, data, tmp_path / "r", dropout=0.9, lr=2e-2)
    model, tokenizer = load_model(tiny, compute_dtype=torch.float32)
    load_adapter(model, done.folder / "adapter").eval()
    assert answer(model, tokenizer, list(done.answers["prompt"])) == list(done.answers["after"])


def test_standard_errors():
    """Groups, not examples, are the sample: two modules with one thing to say each are two, however many functions they
    have."""
    one = Score((2., 4.), (1, 1), ("a", "b"))
    assert one.loss == 3 and math.isclose(one.stderr, 1)  # sd of (2, 4) over sqrt(2)
    many = Score((2., 2., 4., 4.), (1,) * 4, ("a", "a", "b", "b"))
    assert many.loss == 3 and math.isclose(many.stderr, 1)
    assert math.isnan(Score((2., 4.), (1, 1), ("a", "a")).stderr)
    assert improvement(one, replace(one, sums=(1., 3.))) == (1., 0.)  # paired: each fell by the same


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(rank=0), dict(batch_size=-1), dict(dropout=1.), dict(dropout=-.1), dict(lr=0.), dict(lr=-1.),
    dict(max_length=0)])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(LabError, match=f"{next(iter(bad))}="): TrainConfig(**bad)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_checkpoints_go_both_ways(quant_type, double_quant, tiny, tmp_path):
    """transformers with bitsandbytes opens what we saved, we open what they saved: the same bytes, logits and bill.
    What they quantize on a CPU is what we quantize; a card's statistics are others."""
    ours, tokenizer = load_model(tiny, quant_type, compute_dtype=torch.float32, double_quant=double_quant)
    save_quantized(ours, tmp_path / "ours", tokenizer)
    theirs, _ = load_model(tmp_path / "ours", backend="bnb", compute_dtype=torch.float32)
    quantized_by_them, _ = load_model(tiny, quant_type, "bnb", compute_dtype=torch.float32, double_quant=double_quant)
    quantized_by_them.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    back, _ = load_model(tmp_path / "theirs", compute_dtype=torch.float32)
    ids = torch.arange(20, device=ours.device)[None] + 5
    both = (ours, theirs), (back, quantized_by_them)
    with torch.no_grad(): logits = [[m(input_ids=ids).logits.float() for m in pair] for pair in both]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in logits)
    if ids.device.type == "cpu": assert torch.equal(logits[0][0], logits[1][0])
    assert memory_bill(back).equals(memory_bill(ours))
    for here, there in both:
        layers = {name: m.quantized for name, m in here.named_modules() if isinstance(m, Linear4bit)}
        assert len(layers) == 14
        for name, got in layers.items():
            weight = there.get_submodule(name).weight
            want = QuantizedTensor.from_bitsandbytes(weight.detach(), weight.quant_state)
            assert all(torch.equal(getattr(got, part), getattr(want, part)) for part in ("packed", "stats"))
            assert got.nested == want.nested == double_quant and torch.equal(got.dequantize(), want.dequantize())


def test_freed_memory_is_handed_back_between_layers(monkeypatch):
    """Twice for each fifth layer of a training step, never while answers are made; and a model without layers is left
    alone."""
    import sys

    from conftest import make_llama
    calls = []
    monkeypatch.setattr(sys.modules["qlora_lab.trimming"], "release_memory", lambda: calls.append(1))
    model = trim_between_layers(make_llama(layers=11).train())
    ids = torch.arange(8)[None]
    with torch.no_grad(): model(ids)
    assert not calls
    loss = model(ids, labels=ids).loss
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 4
    linear = torch.nn.Linear(2, 2)
    assert trim_between_layers(linear) is linear


def test_a_run_on_a_cpu_hands_memory_back():
    "The planner supposes it."
    from conftest import make_llama
    every = attach_adapters(quantize_model(make_llama(layers=11)), TrainConfig()).model.layers
    assert sum(len(layer._forward_hooks) for layer in every) == len(every) // 5
