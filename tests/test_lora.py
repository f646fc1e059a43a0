"Adapters: nothing at the start, PEFT's own files in both directions, and no setting silently ignored."
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from conftest import make_llama
from qlora_lab.adapter_files import ADAPTER_FILES
from qlora_lab.linear4bit import quantize_model
from qlora_lab.lora import LoRALinear, add_lora, load_adapter, lora_state, reset_lora, save_adapter, trainable
from qlora_lab.records import LabError

IDS = torch.arange(24).view(2, 12) % 300
CONFIGS = {
    "plain": dict(r=4, lora_alpha=8),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True),
    "some": dict(r=2, target_modules=["q_proj", "v_proj"]),
    "pattern": dict(r=2, target_modules=r".*layers\.1\.mlp\.(up|down)_proj"),
    "but": dict(r=2, target_modules="all-linear", exclude_modules=["k_proj"])}


def config(**kw):
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | kw))


def shake(model, seed=1):
    "Give B values, so that the adapters do something."
    g = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data.normal_(generator=g)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_no_op_at_the_start_and_only_adapters_train():
    "B is zero, so the model answers as before to the bit; the base is frozen."
    model = quantize_model(make_llama())
    before = logits(model)
    add_lora(model, config())
    assert torch.equal(logits(model), before)
    assert len(trainable(model)) == 2 * 7 * 2
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


def test_scaling():
    "alpha / r, or alpha / sqrt(r) when stabilised."
    base = nn.Linear(8, 8)
    assert LoRALinear(base, 16, 32).scaling == 2 and LoRALinear(base, 16, 32, rslora=True).scaling == 8


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_reads_our_file(kind, tmp_path):
    "Saved here, opened by PEFT on an untouched model: the same logits."
    ours = add_lora(make_llama(), config(**CONFIGS[kind]), seed=3)
    shake(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = PeftModel.from_pretrained(make_llama(), tmp_path / "a").eval()
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-6)
    assert not torch.allclose(logits(make_llama()), logits(ours), atol=1e-2)  # the control: the adapters matter
    again = load_adapter(make_llama(), tmp_path / "a")
    assert torch.equal(logits(again), logits(ours))
    named = {n for n, _ in theirs.named_parameters() if "lora_" in n}
    assert {n.replace(".default", "") for n in named} == set(lora_state(ours))


@pytest.mark.parametrize("kind", CONFIGS)
def test_we_read_pefts_file(kind, tmp_path):
    "Saved by PEFT, opened here: the same logits."
    theirs = get_peft_model(make_llama(), config(**CONFIGS[kind])).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make_llama(), tmp_path)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-6)


def test_a_seed_starts_both_libraries_alike():
    "So that a run can be repeated with PEFT: the same names in the same order take the same numbers."
    ours, theirs = add_lora(make_llama(), config()), get_peft_model(make_llama(), config())
    reset_lora(ours, 7)
    reset_lora(theirs, 7)
    a = lora_state(ours)
    b = {n.replace(".default", ""): p.detach() for n, p in theirs.named_parameters() if "lora_" in n}
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    "Half the inputs gone, the rest doubled; none of it in evaluation, and never on the base."
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(1000, 1, bias=False), r=1, alpha=1, dropout=0.5)
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.ones_(layer.lora_A.weight)
    nn.init.ones_(layer.lora_B.weight)
    x = torch.ones(1, 1000)
    layer.train()
    y = layer(x).item()
    assert y != 1000 and y % 2 == 0 and 800 < y < 1200
    assert layer.eval()(x).item() == 1000


def test_a_second_helping_is_refused():
    "Two sets of adapters on one model would be saved as one."
    with pytest.raises(LabError, match="has adapters already"): add_lora(add_lora(make_llama(), config()), config())


@pytest.mark.parametrize("field, value", [
    ("layer_replication", [(0, 2), (1, 2)]), ("use_qalora", True), ("trainable_token_indices", [1, 2]),
    ("fan_in_fan_out", True), ("init_lora_weights", "pissa")])
def test_settings_we_do_not_have_are_refused(field, value):
    "A setting that would be ignored gives other numbers than PEFT's, without a word."
    with pytest.raises(LabError, match=rf"LoraConfig\.{field}="): add_lora(make_llama(), config(**{field: value}))


def test_no_matching_layer():
    "A misspelt layer is named, with what there is."
    with pytest.raises(LabError, match="names no linear layer.*up_proj"):
        add_lora(make_llama(), config(target_modules=["up_prj"]))


@pytest.mark.parametrize("other", [dict(layers=3), dict(hidden=128)])
def test_an_adapter_for_another_model_changes_nothing(other, tmp_path):
    "More layers or other sizes: one message, and the model is as it was."
    save_adapter(add_lora(make_llama(**other), config()), tmp_path)
    model = make_llama()
    before = logits(model)
    with pytest.raises(LabError, match="made for another model"): load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before) and not any(isinstance(m, LoRALinear) for m in model.modules())


def test_a_damaged_adapter_says_which_file(tmp_path):
    "A file missing, cut short, or not JSON."
    save_adapter(add_lora(make_llama(), config()), tmp_path)
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(LabError, match="adapter_model.safetensors: not a whole"): load_adapter(make_llama(), tmp_path)
    weights.unlink()
    with pytest.raises(LabError, match="adapter_model.safetensors: no such file"): load_adapter(make_llama(), tmp_path)
    weights.write_bytes(whole)
    settings.write_text(settings.read_text()[:40])
    with pytest.raises(LabError, match="adapter_config.json"): load_adapter(make_llama(), tmp_path)


def test_the_file_is_the_same_each_time(tmp_path):
    "Equal adapters, equal bytes: what resuming is measured by."
    a, b = (save_adapter(add_lora(make_llama(), config(), seed=5), tmp_path / n) for n in "ab")
    for name in ADAPTER_FILES: assert (a / name).read_bytes() == (b / name).read_bytes()
    assert json.loads((a / "adapter_config.json").read_text())["peft_type"] == "LORA"
