"""GPTQ and AWQ by llm-compressor, on tiny models: the folder opens in transformers, and calibration has an effect.

The oracle for GPTQ is rounding to the nearest level in the same groups: it errs less per weight, and more in what a
layer answers to the inputs that it was calibrated on.
"""
import json
import subprocess
import sys

import pytest
import torch

from conftest import make_llama, make_tokenizer

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: make test-compress")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: make test-compress")

from qlora_lab.data import pair, tokenize  # noqa: E402
from qlora_lab.engine.compressed import bits_of, calibration, to_awq, to_gptq  # noqa: E402
from qlora_lab.manifest import verify  # noqa: E402
from qlora_lab.records import LabError  # noqa: E402

CLI = "from qlora_lab.cli import main; raise SystemExit(main())"
EXAMPLES = [pair(f"read the file {i} and {'count the words ' * (i % 3)}", f"sort the list {i}") for i in range(24)]


@pytest.fixture
def merged(tmp_path):
    make_llama(hidden=128, tie=False).save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def opened(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rows(): return torch.cat([tokenize(make_tokenizer(), e).ids for e in EXAMPLES[:8]])[None, :200]


@pytest.mark.parametrize("make", [to_gptq, to_awq])
def test_a_folder_opens_and_answers_nearly_as_before(make, merged):
    out = make(merged, EXAMPLES, count=8)
    with torch.no_grad(): ours, theirs = opened(merged)(rows()).logits, opened(out)(rows()).logits
    assert 0 < (theirs - ours).pow(2).mean().sqrt() < 0.25 * ours.std()
    assert verify(out) and 4.1 < bits_of(out) < 4.4
    step = json.loads((out / "manifest.json").read_text())["steps"][-1]
    assert step["name"] == "export" and step["settings"]["examples"] == 8 and step["settings"]["group"] == 128
    assert torch.equal(opened(out).get_output_embeddings().weight, opened(merged).get_output_embeddings().weight)


@pytest.mark.parametrize("way", ["--gptq", "--awq"])
def test_the_command_in_a_process_of_its_own(way, merged, tmp_path):
    "llm-compressor is imported there by nobody before, as for a user."
    rows = "".join(json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in EXAMPLES)
    (tmp_path / "rows.jsonl").write_text(rows)
    asked = ["export", str(merged), way, "--data", str(tmp_path / "rows.jsonl"), "--examples", "8"]
    done = subprocess.run([sys.executable, "-c", CLI, *asked], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-600:]
    assert bits_of(next(tmp_path.glob("merged-*"))) < 4.4


def test_gptq_looks_at_what_goes_through_a_layer(merged):
    "One layer of the first block: less error in its output than by the nearest level, and more in its weights."
    out = opened(to_gptq(merged, EXAMPLES, count=24))
    model = opened(merged)
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0][0]))
    with torch.no_grad(): model(rows())
    hook.remove()
    with torch.no_grad(): out(rows())  # the first pass unpacks the layers
    weight, gptq = layer.weight.detach(), out.model.layers[0].self_attn.q_proj.weight.detach()
    groups = weight.view(len(weight), -1, 128)
    scale = groups.abs().amax(2, keepdim=True) * 2 / 15
    nearest = ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)
    def error(w): return float((seen[0] @ (w - weight).T).pow(2).mean())
    assert error(gptq) < error(nearest) and (gptq - weight).norm() > (nearest - weight).norm()


def test_examples_are_rows_of_the_models_own_template(merged):
    made = calibration(make_tokenizer(), EXAMPLES, count=5, longest=16)
    assert len(made) == 5 and all(r["input_ids"].shape[1] <= 16 for r in made)
    assert torch.equal(made[0]["input_ids"][0], tokenize(make_tokenizer(), EXAMPLES[0]).ids[:16])
    with pytest.raises(LabError, match="no examples"): calibration(make_tokenizer(), [])


def test_what_is_refused_leaves_nothing(merged):
    make_llama(hidden=72, num_key_value_heads=4, head_dim=18).save_pretrained(merged)
    with pytest.raises(LabError, match="no group of 32 divides"): to_gptq(merged, EXAMPLES)
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(LabError, match="quantized already"): to_awq(merged, EXAMPLES)
    assert [p.name for p in merged.parent.iterdir()] == ["merged"]
