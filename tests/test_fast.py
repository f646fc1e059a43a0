"""The benchmark of models as people bring them runs, in small and on a CPU, and what it measures is a training step.

Protects: every shape can be built with its buffers, both sides take steps, the folder for Unsloth can be opened.
"""
import json

import pytest
import torch

from benchmarks import fast
from benchmarks.common import random_model, spread_of
from benchmarks.shapes import SHAPES, shape_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_one_that_transformers_knows(name):
    "In real size the fields of a model that exists; made small it has the same kinds of layers."
    large, small = shape_config(name), shape_config(name, tiny=True)
    assert type(large) is type(small) and small.hidden_size == 64 < large.hidden_size
    assert large.to_dict().keys() == small.to_dict().keys() and {r.shape for r in fast.ROWS.values()} == {*SHAPES}


@pytest.mark.parametrize("name, who", [("qwen3-8b-16x512", "lab"), ("gemma-3-4b-4x2048", "lab"),
                                       ("phi-4-mini-4x2048", "lab"), ("qwen3-30b-a3b-4x1024", "lab"),
                                       ("qwen3-8b-16x512", "bnb"), ("gemma-3-4b-4x2048", "bnb")])
def test_a_side_takes_steps(name, who):
    "Losses fall, gradients are there, and the lab's first loss is that of its plain path."
    found = fast.in_this_process(name, who, tiny=True, rounds=3)
    assert len(found["seconds"]) == 3 and len(found["losses"]) == 5 and min(found["norms"]) > 0
    assert found["losses"][-1] < found["losses"][0] < 7
    if who == "lab": assert abs(found["plain_loss"] - found["losses"][0]) < 1e-2
    assert json.loads(json.dumps(found)) == found and spread_of(found["seconds"])["median_ms"] > 0


@pytest.mark.parametrize("shape", ["gemma-3-4b", "phi-4-mini"])
def test_buffers_are_those_of_the_library(shape):
    "Position tables and scales: a constant in their place would be another model."
    from transformers import AutoModelForCausalLM
    config = shape_config(shape, tiny=True)
    settings = fast.settings_of(fast.ROWS["qwen3-8b-16x512"], tiny=True)
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    found = dict(random_model(config, settings, "cpu").named_buffers())
    assert expected and all(torch.equal(found[name], b) for name, b in expected.items())


def test_a_folder_for_unsloth(tmp_path):
    "transformers opens it with bitsandbytes' layers; nothing is missing, nothing left over."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    fast.write_folder("qwen3-8b-16x512", str(tmp_path / "folder"), tiny=True)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", output_loading_info=True,
                                                       device_map={"": "cpu"})
    assert not any(info.values()) and model.is_loaded_in_4bit
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folder")) == 4


def test_rows_and_sides_are_named(monkeypatch):
    "Before anything is measured."
    monkeypatch.setattr(fast, "one_side", lambda *a: pytest.fail("measured"))
    for argv in (["--rows", "llama-7b-16x512,qwen9"], ["--rows", "qwen9-1x64"], ["--sides", "lab,us"]):
        last = argv[1].rpartition(",")[2]
        with pytest.raises(SystemExit, match=f"no (row|side) {last}"): fast.main([*argv, "--tiny"])
    with pytest.raises(SystemExit, match="at least 2"): fast.main(["--rounds", "1", "--tiny"])


def test_a_row_of_ones_own():
    "Any shape by its name, checkpointed; those of the table as they stand there."
    assert fast.row_of("qwen3-8b-1x65536") == fast.Row("qwen3-8b", 1, 65536)
    few = fast.row_of("qwen3-30b-a3b/8-4x1024")
    assert few == fast.Row("qwen3-30b-a3b", 4, 1024, layers=8) and few.config(False).num_hidden_layers == 8
    assert few.folder != fast.row_of("qwen3-30b-a3b-4x1024").folder
    for layers in (0, 49):
        with pytest.raises(SystemExit, match="no row"): fast.row_of(f"qwen3-30b-a3b/{layers}-4x1024")
    assert fast.row_of("llama-7b-4x512-kept").checkpointing is False


def test_rows_of_before_are_kept():
    "A run of some rows replaces those, and no others; of a peer, how fast it was before stays beside how fast it is."
    def of(row, who, date, speed=1.): return {k: speed for k in fast.SEEN} | {"row": row, "who": who, "made": date}
    before = [of("a", "lab", 1), of("a", "unsloth", 1, 7.), of("b", "bnb", 1)]
    done = [of("a", "lab", 2), of("a", "unsloth", 2, 5.)]
    for _ in range(2): before = fast.merged(done, before)  # it is saved after each side
    assert before == [of("b", "bnb", 1), *done] and "elsewhere" not in done[0]
    def speeds(r): return [e["tokens_per_s"] for e in r["elsewhere"]]
    assert speeds(done[1]) == [7.]
    third = of("a", "unsloth", 3, 6.)
    assert fast.merged([third], before)[-1] is third and speeds(third) == [7., 5.]
    failed = {"row": "a", "who": "unsloth", "error": "out of memory", "made": 4}
    fast.merged([failed], [third])
    assert speeds(failed) == [7., 5., 6.]


@pytest.mark.parametrize("card, name", [("NVIDIA H100 80GB HBM3", "gpu_fast"), ("NVIDIA H200", "gpu_fast_nvidia_h200"),
                                        ("NVIDIA A100-SXM4-40GB", "gpu_fast_nvidia_a100_sxm4_40gb")])
def test_a_card_has_its_own_record(card, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert fast.record_name() == name
    before = fast.recorded(name)
    assert {r["made"]["gpu"] for r in before} == ({card} if before else set())
    assert before or "a100" in name
