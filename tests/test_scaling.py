"""Planning for several cards: what real processes hold and are sent is what the plan says."""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from several import several

from benchmarks.wire import Received, held, lend_copies, passes, risen
from qlora_lab import cli, plan
from qlora_lab.engine import scaling
from qlora_lab.engine.budget import fastest, seconds
from qlora_lab.engine.fitting import advice, largest
from qlora_lab.engine.gathered import bytes_held
from qlora_lab.engine.portion import Piece, Sizes, Spread, cut, frozen_pieces, pieces, share, sizes, summed
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.engine.scaling import as_dict, in_words, recorded_gbs, step_time, unknown, weights_met, wire_gbs
from qlora_lab.engine.sharded_base import shard_base
from qlora_lab.processes import PIECE
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
CONFIG = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 999, "tie_word_embeddings": False}
STEP = dict(rank=8, sequence=96, device="cpu", dtype="float32", checkpointing=True)
PAPER = dict(rank=64, adapter_dtype="bfloat16", checkpointing=True)
NOT_MODEL = "optimizer state", "libraries", "gradients from the start"


def a_step(config, own, sharding, offload):
    "In one of several processes: what it holds, how far memory rises in a step, and what it is sent."
    from test_memory import live

    from qlora_lab.engine.dispatch import AT_WORK, use_kernels
    use_kernels()
    def unpack(q, dtype, out): return torch.zeros(q.shape, dtype=dtype) if out is None else out.zero_()
    AT_WORK["dequantize", "cpu"] = unpack  # without work space, as a GPU's kernel
    torch.manual_seed(0)
    model, batch = live(config, own)
    if sharding == "full": shard_base(model, offload=offload)
    batches = [batch] * own.accumulation
    passes(model, batches)
    if own.accumulation == 1: model.zero_grad(set_to_none=True)
    with Received() as received: passes(model, batches)
    if own.accumulation == 1: model.zero_grad(set_to_none=True)
    lend_copies(model)
    return held(model), risen(lambda: passes(model, batches)), received.bytes


@pytest.fixture(scope="module")
def run():
    with several() as run: yield run


def stepped(run, cards, config=CONFIG, sharding="full", offload=False, **settings):
    "The plan of a step, and what each process of a real one had."
    p = plan(config, **STEP | settings, cards=cards, sharding=sharding, offload=offload)
    return p, run(cards, a_step, config, share(p.settings, cards), sharding, offload)


@pytest.mark.parametrize("cards, more", [
    (2, dict(batch_size=2)),
    (2, dict(batch_size=1, accumulation=4)),
    (2, dict(batch_size=2, config=CONFIG | {"vocab_size": 30001, "tie_word_embeddings": True})),
    (2, dict(batch_size=1, accumulation=2, config=CONFIG | {"vocab_size": 30001})),
    (2, dict(batch_size=2, offload=True, double_quant=False, targets=r".*layers\.[23]\..*")),
    (2, dict(batch_size=2, sharding="none")),
    (3, dict(batch_size=3))], ids=["two", "passes", "large root", "large table", "late adapters", "whole", "three"])
def test_real_processes_agree(run, cards, more):
    "What is held and what travels to the byte, the peak within 3 %."
    p, found = stepped(run, cards, **more)
    held = {k: v for k, v in p.held.items() if k not in NOT_MODEL}
    rise = max(m.total for k, m in p.moments.items() if k != "update")
    gathers = sum(n for k, n in p.travels.wire.items() if k != "gradients")
    for has, risen_by, received in found:
        assert has == held
        assert received == {"gathers": gathers, "sums": p.travels.wire["gradients"]}
        assert abs(rise / risen_by - 1) < 0.03, (rise, risen_by, {k: m.total for k, m in p.moments.items()})


@pytest.mark.parametrize("tied, peak", [(False, "gathering the table"), (True, "gathering the root")])
def test_a_large_vocabulary_is_the_peak(tied, peak):
    "Gathered, as a buffer and as tensors, it is more than any layer; a table of its own goes after the look-up."
    config = CONFIG | {"vocab_size": 30001, "tie_word_embeddings": tied}
    p = plan(config, **STEP, batch_size=2, cards=2, sharding="full")
    found = pieces(p.config, Settings(**{k: v for k, v in STEP.items() if k in ("rank", "device", "dtype")}))
    assert p.peak == peak and bool(found.table) != tied
    assert sum(piece.kind == "embeddings" for piece in found.table + found.root) == 1


def all_cut(count):
    "What is planned of models that are not made from a config, and what is then held."
    from test_sharded_base import KINDS
    found = {}
    for name in ("shared weight", "embeddings adapted", "a copy that learns", "bias"):
        model = KINDS[name]()
        planned = Counter()
        for piece in sum(frozen_pieces(model).values(), ()): planned[piece.kind] += cut(piece, count)
        shard_base(model)
        spread = bytes_held(model)["spread"]
        found[name] = planned == Counter({k: n for k, n in spread.items() if n})
    return found


def test_what_is_cut_of_any_model(run):
    "A weight that two layers share is held twice; adapted embeddings are no group of their own."
    for found in run(2, all_cut, 2): assert len(found) == 4 and all(found.values()), found


def test_gradients_are_summed_in_pieces():
    "As many bytes at once as `sum_gradients` takes, types apart, the marks first."
    a, b, c = (torch.empty(n, dtype=torch.bfloat16, device="meta") for n in (PIECE // 4, PIECE // 4, PIECE))
    d = torch.empty(7, device="meta")
    assert summed([a, b, d, c, a]) == (5, PIECE, 2 * PIECE, PIECE // 2, 28)
    p = plan("llama-65b", **PAPER, batch_size=2, cards=2, sharding="full")
    assert p.moments["gradients summed"].in_flight == PIECE


def test_one_card_is_as_it_was():
    "To the byte, whatever is said of speeds."
    p, q = plan("llama-7b", 24, **PAPER), plan("llama-7b", 24, **PAPER, cards=1, wire_gbs=1.)
    assert (p.held, p.moments, p.card_gib, p.travels.wire) == (q.held, q.moments, q.card_gib, {})
    assert in_words(q) == ""


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 64))
def test_shares_are_those_of_chunks(rows, row, cards):
    "As torch.chunk cuts, the first piece being a full one; everybody's together hold the tensor."
    t = torch.zeros(rows, row, dtype=torch.uint8)
    n = cut(Piece("", rows, row), cards)
    assert n == t.chunk(cards)[0].numel() and rows * row <= n * cards < (rows + cards) * row
    assert sizes((Piece("", rows, row),), cards) == Sizes(n, n, n * cards * (cards > 1), n * cards)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16))
def test_examples_are_dealt_out_evenly(batch_size, accumulation, cards):
    s = Settings(batch_size=batch_size, accumulation=accumulation, learned=batch_size)
    if batch_size * accumulation % cards:
        with pytest.raises(LabError, match=f"cards={cards}.*multiple of {cards}"): share(s, cards)
        return
    own, every = share(s, cards), batch_size * accumulation // cards
    assert own.batch_size <= batch_size and own.batch_size * (own.accumulation - 1) < every
    assert every <= own.batch_size * own.accumulation
    if accumulation % cards == 0: assert (own.batch_size, own.accumulation) == (batch_size, accumulation // cards)


def test_shards_come_to_the_whole():
    "Of real shapes: all cards' shares are the base, but for what fills up and what the allocator rounds."
    one, two = (plan("llama-65b", **PAPER, batch_size=n, cards=n, sharding="full") for n in (1, 2))
    parts = "4-bit codes", "quantization statistics", "embeddings", "other linear weights", "norms and biases"
    for k in parts: assert 0 <= 2 * two.held[k] / one.held[k] - 1 < 0.02, k
    assert two.held["adapters"] == one.held["adapters"]
    learns = pieces(two.config, Settings(rank=64, adapter_dtype="bfloat16"))
    assert learns.sums[0] == 80 * 14 and sum(learns.sums[1:]) == one.held["adapters"]
    assert one.travels.wire == {} and two.travels.wire["gradients"] == sum(2 * (n // 2) for n in learns.sums)


def test_weights_met_are_the_models():
    "Counted from codes: LLaMA-7B has 6.74 billion weights, of which embeddings and head are not looked up here."
    assert weights_met(plan("llama-7b")) == 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    assert weights_met(plan("llama-3.2-1b")) == 16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)
    assert weights_met(plan("llama-3.1-405b", cards=2, batch_size=2, sharding="full")) == 126 * 16384 * (
        2 * 16384 + 2 * 1024 + 3 * 53248)


def test_a_step_waits_for_what_is_slow():
    "Faster wires never take longer; on a slow one the gathers are all; working alone is what one card takes."
    p = plan("llama-65b", **PAPER, batch_size=2, cards=2, sharding="full")
    times = [p.again(wire_gbs=g).time.total for g in (1e-3, 1., 50., 450., 1e9)]
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(sum(p.travels.wire.values()) / 1e6, rel=0.05)
    assert times[-1] == pytest.approx(plan("llama-65b", **PAPER).time.total, rel=1e-6)
    assert step_time(p, 3.).working == 3.
    assert p.again(offload=True).time.total > p.time.total > p.again(sharding="none").time.total


def test_offload_leaves_the_shards_on_the_host():
    p = plan("llama-65b", **PAPER, batch_size=2, cards=2, sharding="full")
    q = p.again(offload=True)
    assert "4-bit codes" not in q.parts and q.parts["embeddings"] == p.parts["embeddings"]
    assert q.travels.host > 15 << 30
    assert q.travels.bus == pytest.approx(2 * q.travels.host, rel=0.02) and q.card_gib < p.card_gib - 14


def test_a_record_replaces_what_is_nominal(tmp_path, monkeypatch):
    record = tmp_path / "gpus.json"
    assert recorded_gbs(record) is None
    rows = [dict(what=w, bytes=b, gbs=g) for w, b, g in
            (("all_gather", 1 << 20, 50.), ("all_gather", 1 << 30, 333.), ("all_reduce", 1 << 31, 400.))]
    record.write_text(json.dumps({"wire": rows}))
    assert recorded_gbs(record) == 333.
    monkeypatch.setattr(scaling.recorded_gbs, "__defaults__", (record,))
    assert wire_gbs(Spread(2)) == (333., "recorded") and wire_gbs(Spread(2, wire_gbs=7.)) == (7., "given")
    assert wire_gbs(Spread(16))[1] == "nominal"
    record.write_text(json.dumps({"wire": [{"bytes": 1}]}))
    with pytest.raises(LabError, match="gpus.json.*wire"): recorded_gbs(record)
    record.write_text(json.dumps({"plans": []}))
    assert recorded_gbs(record) is None


def test_what_no_rate_is_known_of_is_said():
    for name, more in (("llama-7b", dict(device="cpu")), ("llama-7b", dict(quantize=None)),
                       ("llama-7b", dict(optimizer_bits=8)), ("mixtral-8x7b", dict())):
        p = plan(name, cards=2, batch_size=2, **more)
        assert unknown(p) and unknown(p) in in_words(p) and as_dict(p)["seconds"] is None
        with pytest.raises(LabError, match="no rate is known"): step_time(p)
    json.dumps(as_dict(p))


@pytest.mark.parametrize("call, words", [
    (lambda: plan("llama-7b", cards=2), ["cards=2", "1 examples", "multiple of 2"]),
    (lambda: plan("llama-7b", cards=0), ["cards=0", "at least 1"]),
    (lambda: plan("llama-7b", cards=1.5), ["cards=1.5", "whole number"]),
    (lambda: plan("llama-7b", sharding="half"), ["sharding='half'", "none or full"]),
    (lambda: plan("llama-7b", offload=True), ["offload", "sharding='full'"]),
    (lambda: plan("llama-7b", wire_gbs=0), ["wire_gbs=0", "more than 0"]),
    (lambda: plan("llama-7b", batch_size=2, cards=2, wire_gbs=float("nan")), ["wire_gbs", "finite"])])
def test_bad_input_is_named(call, words):
    with pytest.raises(LabError) as e: call()
    assert all(w in str(e.value) for w in words), str(e.value)


def test_plans_turned_round():
    "Batches grow by as many as can be dealt out; advice ends with more cards; the fastest step fits."
    p = plan(CONFIG, 1.85, rank=8, batch_size=3, sequence=64, cards=3)
    n = largest(p, "batch_size")
    assert n % 3 == 0 and p.again(batch_size=n).fits and not p.again(batch_size=n + 3).fits
    steps = advice(plan("llama-3.1-405b", 80, **PAPER))
    assert steps[-1][0].startswith("share it over") and steps[-1][1].fits and steps[-1][1].spread.sharding == "full"
    whole = plan("llama-65b", 40, **PAPER, batch_size=2, cards=2)
    assert [what for what, _ in advice(whole)] == ["share the base out over the 2 cards"]
    q = fastest(whole.again(sharding="full"))
    assert q.fits and q.spread.cards == 2 and seconds(q) <= seconds(whole.again(sharding="full", checkpointing=True))


def test_the_command_says_what_travels(capsys):
    asked = "plan llama-65b --gpu-gib 24 --rank 64 --checkpointing --adapter-dtype bfloat16 --device-budget 256"
    assert cli.main(f"{asked} --cards 4 --batch-size 4 --sharding full --wire-gbs 450".split()) == 0
    said = capsys.readouterr().out
    words = "over 4 cards", "on each card", "layers, backward", "450 GB/s, given", "a step takes"
    assert all(w in said for w in words)
    assert cli.main([*asked.split(), "--cards", "4"]) == 2 and "multiple of 4" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards_agree(tmp_path):
    "Memory within 3 %, time within 20 %."
    subprocess.run([sys.executable, "-m", "benchmarks.gpus", "plans", "--to", str(tmp_path / "found.json")],
                   check=True, cwd=ROOT)
    for row in json.loads((tmp_path / "found.json").read_text())["plans"]:
        assert abs(row["memory_error"]) < 0.03 and abs(row["time_error"]) < 0.2, row
