"""The planner: what it rehearses without bytes is what a live step takes, and what it said is what a card counted."""
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from benchmarks.common import random_batch
from conftest import searched
from qlora_lab import ledger, plan
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers
from qlora_lab.engine import rehearsal
from qlora_lab.engine.allocator import CONTEXT_GIB, LIBRARY_BYTES, cuda_block
from qlora_lab.engine.dispatch import AT_WORK, REHEARSED, twin, use_kernels
from qlora_lab.engine.fitting import CARDS, advice, cards, largest
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.layer_kinds import gradient_bytes, kind_of, representatives, told
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.rehearsal import Settings, chosen_layers, empty_batch, empty_model
from qlora_lab.linear4bit import quantize_model
from qlora_lab.lora import add_lora, trainable
from qlora_lab.memory import watch_step
from qlora_lab.records import LabError

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "memory_cuda.json"
PAPER = dict(rank=64, adapter_dtype="bfloat16", checkpointing=True)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lean(monkeypatch):
    "Unpack 4-bit weights on the CPU as a GPU's kernel does, without work space."
    use_kernels()
    def unpack(q, dtype, out): return torch.zeros(q.shape, dtype=dtype) if out is None else out.zero_()
    monkeypatch.setitem(AT_WORK, ("dequantize", "cpu"), unpack)


def tiny(family="llama", layers=4, kv=2, tied=False):
    return {"model_type": family, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": kv, "vocab_size": 300, "tie_word_embeddings": tied,
            "head_dim": 16}


def live(config, s):
    "A real model of random weights on the CPU, made without the planner's help; and a batch for it."
    model = AutoModelForCausalLM.from_config(model_config(config), dtype=getattr(torch, s.dtype))
    compute_dtype = getattr(torch, s.compute_dtype or s.dtype)
    if s.quantize: quantize_model(model, s.quantize, s.blocksize, s.double_quant, compute_dtype)
    targets = s.targets if isinstance(s.targets, str) else list(s.targets)
    add_lora(model, LoraConfig(r=s.rank, target_modules=targets), dtype=getattr(torch, s.adapter_dtype))
    if s.checkpointing: checkpoint_layers(model)
    if s.accumulation > 1:
        for p in trainable(model): p.grad = torch.zeros_like(p)
    return model.train(), random_batch(s.batch_size, s.sequence, s.learned, 300)


def own_bytes(model):
    "Parameters and buffers, shared ones once; the tables of positions, a few bytes, are no part of a plan."
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "rotary" not in n)]
    return sum(t.nbytes for t in {t.untyped_storage().data_ptr(): t for _, t in named}.values())


def step_peak(p):
    return max(m.total for k, m in p.moments.items() if k != "update")


@pytest.mark.parametrize("family, settings", [
    ("llama", dict(dtype="float32")),
    ("llama", dict(checkpointing=True, blocksize=32)),
    ("llama", dict(adapter_dtype="bfloat16", quantize=None)),
    ("llama", dict(adapter_dtype="bfloat16", checkpointing=True, accumulation=2)),
    ("mistral", dict(adapter_dtype="bfloat16", checkpointing=True)),
    ("mistral", dict(targets=("q_proj", "v_proj"), double_quant=False)),
    ("qwen2", dict(dtype="float32", checkpointing=True)),
    ("qwen2", dict(adapter_dtype="bfloat16", learned=20)),
    ("qwen3", dict(checkpointing=True)),
    ("qwen3", dict(adapter_dtype="bfloat16", compute_dtype="float32", checkpointing=True))],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()))
def test_rehearsal_equals_a_live_step(family, settings, lean):
    "To the byte: what a step takes beside the model, and what the model takes."
    config = tiny(family, tied=family == "qwen2")
    s = Settings(**{"batch_size": 2, "sequence": 48, "rank": 8, "device": "cpu"} | settings)
    p, (model, batch) = plan(config, **asdict(s)), live(config, s)
    assert watch_step(model, batch).peak == step_peak(p)
    held = sum(v for k, v in p.held.items() if k not in ("optimizer state", "libraries", "gradients from the start"))
    assert held == own_bytes(model)


def test_unpacking_on_a_cpu_takes_little_more():
    "The real thing unpacks in chunks; beside a step of any size its work space is nothing."
    s = Settings(rank=8, sequence=48, checkpointing=True, adapter_dtype="bfloat16", device="cpu")
    more = watch_step(*live(tiny(), s)).peak - step_peak(plan(tiny(), **asdict(s)))
    assert 0 <= more <= 1 << 19


def test_attention_has_to_be_named():
    "Left to choose, the meta device takes attention that keeps the scores: not the step that is taken."
    s = Settings(sequence=256)
    def peak(name): return watch_step(empty_model(model_config(tiny()), s, 3, name), empty_batch(s)).peak
    peaks = peak(None), peak("sdpa")
    assert peaks[1] > 1.2 * peaks[0]


def rehearse_all(config, s):
    "The moments of a step in which every layer is rehearsed, its peak, and whether layers were fused."
    kernels, layers = [twin(name, "cuda") for name in REHEARSED], config["num_hidden_layers"]
    model, timeline, fused = rehearsal.rehearse(model_config(config), s, layers, kernels)
    left = [gradient_bytes(trainable(layer), cuda_block) for layer in decoder_layers(model)]
    return told(timeline, list(range(layers)), [0] * layers if s.accumulation > 1 else left), timeline.peak, fused


def check_few_against_all(config, s):
    "Few layers give the moments of all, the highest of which is the peak of what was rehearsed."
    whole, peak, fused = rehearse_all(config, s)
    # work space that the plan adds to the way back; with accumulation it is there from the second pass on
    recording = LIBRARY_BYTES["cuda"] // 2 * (fused and s.accumulation == 1)
    planned = plan(config, **asdict(s)).moments
    few = {k: m.total - recording * ("backward" in k) for k, m in planned.items() if k != "update"}
    assert max(few.values()) == peak
    assert few == {k: m.total for k, m in whole.items() if k in few}
    return fused


@searched(6)
@example(7, 7, 2, 32, "nf4", 1, "float32")  # gradients outgrow what a layer lets go of: the highest is visited late
@example(7, 7, 200, 2, "nf4", 1, "float32")  # the other way round
@example(7, 7, 64, 32, "nf4", 2, "float32")  # gradients that are there from the start do not grow
@example(4, 0, 2, 2, "nf4", 1, "bfloat16")  # gradients so small that several share one piece of memory
@example(9, 4, 64, 8, "nf4", 1, "float32")  # the first four checkpointed
@given(st.integers(1, 7), st.integers(0, 7), st.sampled_from([2, 64, 200]), st.sampled_from([2, 32]),
       st.sampled_from(["nf4", None]), st.integers(1, 2), st.sampled_from(["float32", "bfloat16"]))
def test_few_layers_speak_for_all(layers, checkpointed, sequence, rank, quantize, accumulation, adapter_dtype):
    "Rehearsing every layer gives the same moments as five of them, or some more where checkpoints end."
    checkpointed = min(checkpointed, layers)
    s = Settings(sequence=sequence, rank=rank, checkpointing=checkpointed > 0, checkpointed_layers=checkpointed,
                 quantize=quantize, accumulation=accumulation, adapter_dtype=adapter_dtype,
                 checkpoints_in="host" if layers % 2 else "device")
    assert check_few_against_all(tiny(layers=layers), s) == (quantize is not None)


@pytest.mark.parametrize("more", [dict(checkpointing=True), dict(), dict(targets=r".*layers\.[2-9]\.mlp.*"),
                                  dict(checkpointing=True, checkpointed_layers=5, checkpoints_in="host")], ids=str)
@pytest.mark.parametrize("config", [
    dict(model_type="gemma3_text", num_hidden_layers=13, sliding_window=32),
    dict(model_type="qwen3", num_hidden_layers=9, use_sliding_window=True, sliding_window=32, max_window_layers=4)],
    ids=lambda c: c["model_type"])
def test_few_layers_of_each_kind_speak_for_all(config, more):
    "Five layers with a window to one without; adapters in some of the layers alone; the first layers without a window."
    config = tiny() | config
    check_few_against_all(config, Settings(rank=4, sequence=40, **more))
    numbers, _, stands = chosen_layers(json.dumps(model_config(config).to_dict()), Settings(**more))
    assert len(stands) == config["num_hidden_layers"] and len(numbers) <= len(stands)


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=40))
def test_representatives_keep_every_neighbourhood(kinds):
    "Each layer is stood for by one of its kind, with neighbours of the same kinds; and no new neighbourhood is made."
    numbers, stands = representatives(kinds)
    kinds_and_first = [(kind, kinds.index(kind) == i) for i, kind in enumerate(kinds)]
    def around(row): return list(zip([None, None, *row], [None, *row], row, [*row[1:], None]))
    few, whole = around([kinds_and_first[i] for i in numbers]), around(kinds_and_first)
    assert set(few) == set(whole) and [few[n] for n in stands] == whole
    assert len(representatives(kinds + kinds[-1:] * 50)[0]) < len(kinds) + 5


def test_kinds_see_what_matters():
    "Layers of Gemma 3 differ by their window; those of a Llama in nothing."
    def kinds(config): return [kind_of(layer) for layer in decoder_layers(AutoModelForCausalLM.from_config(config))]
    assert len(set(kinds(model_config(tiny(layers=3))))) == 1
    gemma = kinds(model_config(tiny("gemma3_text", layers=7) | {"sliding_window": 16}))
    assert len(set(gemma)) == 2 and gemma[5] != gemma[4] == gemma[0] == gemma[6]


@pytest.mark.parametrize("settings", [dict(rank=2, adapter_dtype="bfloat16"), dict(rank=2), dict(rank=32),
                                      dict(rank=2, adapter_dtype="bfloat16", quantize=None)], ids=str)
def test_gradients_of_the_update_are_what_the_step_leaves(settings):
    "Pieces of memory that adapters share count once, at the update and, with accumulation, from the start."
    s, kernels = Settings(sequence=2, **settings), [twin(name, "cuda") for name in REHEARSED]
    _, timeline, _ = rehearsal.rehearse(model_config(tiny()), s, 4, kernels)
    left, p = timeline.live[-1] - cuda_block(4), plan(tiny(), **asdict(s))  # all but the loss
    assert p.moments["update"].gradients == left
    assert p.again(accumulation=2).held["gradients from the start"] == left


def test_optimizer_state_is_what_the_optimizer_allocates():
    for budget, bits in ((None, 32), (None, 8), (1 << 15, 32), (1 << 16, 8)):
        s = Settings(rank=8, device="cpu", dtype="float32", optimizer_bits=bits, device_budget=budget)
        p, params = plan(tiny(), **asdict(s)), trainable(live(tiny(), s)[0])
        optimizer = PagedAdamW(params, bits=bits, device_budget=budget)
        assert p.held["optimizer state"] == optimizer.device_bytes, (budget, bits)
        assert p.host == (sum(t.nbytes for t in optimizer.arrays.values()) if budget else 0)


def test_parts_add_up():
    p = plan("llama-7b", 24, rank=64)
    highest = max(sum(p.held.values()) + m.total for m in p.moments.values())
    assert sum(p.parts.values()) / 2 ** 30 == p.total_gib == highest / 2 ** 30
    assert p.card_gib > p.total_gib + CONTEXT_GIB
    assert p.fits is True and p.again(batch_size=64).fits is False and plan("llama-7b").fits is None


def test_largest_is_the_largest():
    p = plan(tiny(), 1., batch_size=2, checkpointing=True)
    n, k = largest(p), largest(p, "batch_size")
    assert n % 64 == 0 and p.again(sequence=n).fits and not p.again(sequence=n + 64).fits
    assert p.again(batch_size=k).fits and not p.again(batch_size=k + 1).fits
    assert largest(p, limit=n - 1) == n - 64 and largest(p, limit=63) == 0
    assert largest(plan("llama-65b", 8)) == 0


def test_learned_tokens_go_along():
    "Fewer logits, longer texts; in a larger batch as many an example."
    p = plan(tiny() | {"vocab_size": 20000}, 1.1, checkpointing=True, learned=200)
    n, k = largest(p), largest(p, "batch_size")
    assert p.again(sequence=n).fits and not p.again(sequence=n + 64).fits and n > largest(p.again(learned=None))
    assert p.again(batch_size=k, learned=200 * k).fits and not p.again(batch_size=k + 1, learned=200 * (k + 1)).fits


def test_advice_ends_where_it_fits():
    p = plan("llama-7b", 8, batch_size=4, sequence=1024, rank=64, quantize=None)
    steps = advice(p)
    assert steps[-1][1].fits and not any(q.fits for _, q in steps[:-1])
    assert all(b.total_gib < a.total_gib for (_, a), (_, b) in zip([("", p), *steps], steps))
    assert all(q.settings.batch_size * q.settings.accumulation == 4 for _, q in steps)
    assert advice(plan("llama-7b", 80)) == []
    (what, q), = advice(plan(tiny(), 1.01, sequence=1 << 14, rank=8, checkpointing=True, adapter_dtype="bfloat16",
                             device_budget=1 << 30, learned=1 << 10))
    assert what.startswith("sequences of") and q.fits and q.settings.learned == min(1 << 10, q.settings.sequence - 1)


def test_cards_grow():
    fits = list(cards(plan("llama-13b", rank=64, checkpointing=True)).values())
    assert fits == sorted(fits) and len(fits) == len(CARDS) and fits[-1]


@pytest.mark.parametrize("call, words", [
    (lambda: plan("llama-9b"), ["llama-9b", "did you mean llama-7b"]),
    (lambda: plan("no-such/config.json"), ["no-such/config.json", "no such file"]),
    (lambda: plan({"model_type": "t5"}), ["t5", "rehearses"]),
    (lambda: plan({"model_type": "gpt2"}), ["lacks", "hidden_size"]),
    (lambda: plan({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320,
                   "n_positions": 128}, sequence=129), ["sequence=129", "128 places"]),
    (lambda: plan({"model_type": "gemma3", "text_config": {"hidden_size": 64}}), ["lacks", "num_hidden_layers"]),
    (lambda: plan("llama-7b", checkpointing=True, checkpointed_layers=33), ["checkpointed_layers=33", "32 layers"]),
    (lambda: plan("llama-7b", checkpointed_layers=-1), ["checkpointed_layers=-1"]),
    (lambda: plan("llama-7b", checkpoints_in="disk"), ["checkpoints_in='disk'"]),
    (lambda: plan({"model_type": "llama", "hidden_size": 64}), ["lacks", "num_hidden_layers"]),
    (lambda: plan(tiny() | {"hidden_size": "64"}), ["hidden_size", "whole number"]),
    (lambda: plan(tiny() | {"hidden_size": -64}), ["hidden_size", "positive"]),
    (lambda: plan({k: v for k, v in tiny().items() if k != "head_dim"} | {"hidden_size": 70}), ["config", "70"]),
    (lambda: plan(tiny(kv=3)), ["4 heads", "3 key_value_heads"]),
    (lambda: plan("llama-7b", rank=0), ["rank=0"]),
    (lambda: plan("llama-7b", rank="8"), ["rank='8'"]),
    (lambda: plan("llama-7b", sequence=512.5), ["sequence=512.5"]),
    (lambda: plan("llama-7b", batch_size=10 ** 9), ["batch_size=1000000000"]),
    (lambda: plan("llama-7b", dtype="int8"), ["int8"]),
    (lambda: plan("llama-7b", blocksize=100), ["blocksize=100", "64"]),
    (lambda: plan("llama-7b", gpu_gib=-1), ["gpu_gib"]),
    (lambda: plan("llama-7b", device_budget=100), ["device_budget", "page"]),
    (lambda: plan("llama-7b", learned=10 ** 6), ["learned"]),
    (lambda: plan("llama-7b", targets=("no_such_proj",)), ["no_such_proj"]),
    (lambda: plan("llama-7b", quantize="int3"), ["int3"]),
    (lambda: plan("llama-7b", quantize="int8"), ["int8", "four bits"]),
    (lambda: largest(plan("llama-7b")), ["gpu_gib"]),
    (lambda: watch_step(torch.nn.Linear(2, 2).requires_grad_(False), {}), ["trainable"])])
def test_bad_input_is_named(call, words):
    with pytest.raises((LabError, ValueError)) as e: call()
    assert all(w in str(e.value) for w in words), str(e.value)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B-Instruct", "mistralai/Mistral-7B-v0.1",
                                  "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Meta-Llama-3-8B"])
def test_names_of_the_hub(name): assert model_config(name).hidden_size


def test_config_files(tmp_path):
    config = tiny()
    (tmp_path / "config.json").write_text(json.dumps(config))
    parts = plan(config).parts
    assert plan(tmp_path).parts == plan(tmp_path / "config.json").parts == plan(model_config(config)).parts == parts
    assert plan(config, targets=["q_proj"]).parts == plan(config, targets=("q_proj",)).parts
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LabError, match="config.json"): plan(tmp_path)


def test_ledger_counts_every_byte(lean):
    "The model's own bytes, the optimizer's, and a step's high point; and it leaves gradients as they were."
    s = Settings(rank=4, sequence=32, dtype="float32", device="cpu")
    model, batch = live(tiny(), s)
    in_step = ["gradients", "activations", "logits and loss", "work in flight"]
    optimizer = PagedAdamW(trainable(model))
    kinds = ledger(model, optimizer, batch)["bytes"].groupby(level=0).sum()
    assert kinds.drop(in_step + ["optimizer state"], errors="ignore").sum() == own_bytes(model)
    assert kinds["optimizer state"] == 8 * sum(p.numel() for p in trainable(model))
    assert kinds.reindex(in_step).sum() == step_peak(plan(tiny(), **asdict(s)))
    assert all(p.grad is None for p in model.parameters())
    for p in trainable(model): p.grad = torch.ones_like(p)
    with_gradients = ledger(model, batch=batch)["bytes"]
    assert with_gradients["gradients", "float32"] == sum(p.nbytes for p in trainable(model))
    assert all((p.grad == 1).all() for p in trainable(model))


def test_cuda_block_cuts_what_is_worth_cutting():
    mib = 1 << 20
    for asked, taken in ((1, 512), (512, 512), (513, 1024), (9 * mib, 9 * mib), (11 * mib, 12 * mib),
                         (11 * mib - 512, 11 * mib - 512), (135 * mib, 136 * mib), (86 * mib, 86 * mib)):
        assert cuda_block(asked) == taken


def still_comparable(row, p):
    "Whether a recorded step has today's loss, or its highest moment elsewhere: other records are of another step."
    return row["moment"] != "loss" or row["parts"]["logits and loss"] == p.moments["loss"].logits


@pytest.mark.skipif(not RECORD.exists(), reason="no recorded run")
def test_the_recorded_card_agrees():
    "What the planner says today of each recorded step is within 0.2 % of the card in the median, never 1 % off."
    rows = json.loads(RECORD.read_text())["rows"]
    plans = [plan(r["model"], **r["settings"]) for r in rows]
    errors = [abs(p.total_gib / r["measured_gib"] - 1) for r, p in zip(rows, plans) if still_comparable(r, p)]
    assert len(errors) >= 14 and statistics.median(errors) < 0.002 and max(errors) < 0.01


@pytest.mark.skipif(not RECORD.exists(), reason="no recorded run")
def test_what_was_said_to_fit_did_fit():
    for c in json.loads(RECORD.read_text())["claims"]:
        for tried in c["tried"]:
            p = plan(c["model"], c["card_gib"], **PAPER, device_budget=256 << 20, sequence=tried["sequence"])
            assert tried["outcome"] == "finished" or not p.fits, (c["model"], tried)
            assert p.fits or tried["sequence"] > c["longest"], (c["model"], tried)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_agrees():
    "In a process of its own, since what other tests left behind would count."
    code = """
from benchmarks.memory import row
for settings in (dict(), dict(checkpointing=True, adapter_dtype="bfloat16"), dict(quantize=None, batch_size=2),
                 dict(accumulation=2)):
    assert abs(row("smollm2-1.7b", **settings)["error"]) < 0.01, settings
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RECORD.parents[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_allocator_takes_what_cuda_block_says():
    "In a process of its own, whose allocator has no pieces left over from others."
    code = """
import torch
from qlora_lab.engine.allocator import cuda_block
for n in (1, 513, 9 << 20, (11 << 20) + 5, 135 << 20, (86 << 20) - 1):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    t = torch.empty(n, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() - before == cuda_block(n), n
    del t
"""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_ALLOC_CONF")}  # another test's segments may grow
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
