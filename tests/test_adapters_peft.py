"Every adapter that PEFT writes for a linear layer loads with PEFT's own logits, or is refused for what it is."
import json
import warnings

import families
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_llama
from qlora_lab.adapter_files import ADAPTER_FILES, read_tensors
from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.dora import DoRALinear
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import LoRALinear, add_lora, load_adapter, lora_state, reset_lora, save_adapter, trainable
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(24).view(2, 12) % 300
PATTERNS = dict(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, alpha_pattern={"up_proj": 3})
VARIANTS = {
    "plain": dict(),
    "two names": dict(target_modules=["q_proj", "v_proj"]),
    "by the family": dict(target_modules=None),
    "regex": dict(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"),
    "patterns": PATTERNS,
    "rslora, patterns": dict(use_rslora=True, **PATTERNS),
    "dora": dict(use_dora=True),
    "dora, rslora, patterns": dict(use_dora=True, use_rslora=True, **PATTERNS),
    "lora_bias": dict(lora_bias=True),
    "bias all": dict(bias="all", target_modules=["q_proj", "gate_proj"]),
    "bias lora_only": dict(bias="lora_only", target_modules=["q_proj", "gate_proj"]),
    "bias all, lora_bias": dict(bias="all", lora_bias=True),
    "head kept": dict(modules_to_save=["lm_head"]),
    "head and embedding kept": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "norms kept, bias all": dict(modules_to_save=["norm"], bias="all"),
    "whole mlp kept": dict(target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]),
    "layers": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    "layers, pattern": dict(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers"),
    "but": dict(target_modules="all-linear", exclude_modules=["k_proj", "model.layers.0.mlp.up_proj"]),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "random": dict(init_lora_weights=False),
    "eva": dict(init_lora_weights="eva"),
    "mica": dict(init_lora_weights="mica", target_modules=["q_proj", "up_proj"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "head": dict(target_modules=["lm_head", "q_proj"]),
    "embedding and head, dora": dict(target_modules=["lm_head", "embed_tokens", "q_proj"], use_dora=True),
    "head by regex": dict(target_modules=r".*(lm_head|o_proj)"),
}


def config(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 'eva' has settings of its own
        return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | settings))


def llama(**other):
    return make_llama(**(dict(attention_bias=True, mlp_bias=True) | other))


def shake(model, seed=1):
    "Random numbers in all that learns, and in what an initializer froze."
    g = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        if not (p.requires_grad or "lora_" in n): continue
        near = 1. if "magnitude" in n or n.endswith("norm.weight") else 0.
        p.data = near + 0.2 * torch.randn(p.shape, generator=g)
    return model


def decoded(model, make):
    "A dense model of the same numbers as one in 4 bits."
    dense = make()
    for n, m in model.named_modules():
        if hasattr(m, "decode") and ".base_layer" not in n:  # experts
            for e, w in enumerate(dense.get_parameter(n).data): w.copy_(m.decode(e, w.dtype))
        if not isinstance(m, Linear4bit): continue
        there = dense.get_submodule(n.removesuffix(".base_layer"))
        w = m.quantized.dequantize()
        there.weight.data.copy_(w.t() if type(there).__name__ == "Conv1D" else w)
    return dense


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def by_peft(base, folder, **settings):
    "Trained and saved by PEFT: what it computes, and its model."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: tied weights, embeddings that are saved along
        theirs = shake(get_peft_model(base, config(**settings))).eval()
        theirs.save_pretrained(folder)
    return logits(theirs), theirs


def in_peft(base, folder):
    "Opened by PEFT, which must neither miss nor leave out a tensor, nor change a setting."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in ("Model has `tie_word_embeddings", "`init_lora_weights` is 'eva'", ".*has no bias",
                         "fan_in_fan_out is set to True but the target",  # one field for layers of both kinds
                         "`is_gradient_checkpointing` is deprecated"):  # PEFT asks newer transformers by the old name
            warnings.filterwarnings("ignore", message=harmless)
        model = PeftModel.from_pretrained(base, folder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved along
        theirs = get_peft_model_state_dict(model)
    ours = load_file(folder / ADAPTER_FILES[1])
    assert ours.keys() <= theirs.keys()
    twice = (".base_layer.weight", ".original_module.", ".modules_to_save.")  # what PEFT saves along
    assert not [k for k in theirs.keys() - ours.keys() if not any(part in k for part in twice)]
    return model


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_pefts_file_here_and_ours_there(kind, four_bits, tmp_path):
    "PEFT trains, the lab loads: equal logits. The lab saves that, PEFT loads: equal logits again."
    base = quantize_model(llama()) if four_bits else llama()
    make = (lambda: decoded(quantize_model(llama()), llama)) if four_bits else llama
    expected, _ = by_peft(make(), tmp_path / "theirs", **VARIANTS[kind])
    assert not torch.allclose(expected, logits(base), atol=1e-2)  # the control: the adapter matters
    ours = load_adapter(base, tmp_path / "theirs").eval()
    assert torch.allclose(logits(ours), expected, atol=1e-5), (logits(ours) - expected).abs().max()
    save_adapter(ours, tmp_path / "ours")
    back = in_peft(make(), tmp_path / "ours")
    assert torch.allclose(logits(back), expected, atol=1e-5)


# -- families: the layers that the lab adapts, PEFT adapts too, under the names that the lab writes

@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_both_ways(family, tmp_path):
    "Added and saved here on 4 bits, opened by PEFT on the same numbers; then saved there and opened here."
    model = quantize_model(families.build(family))
    def dense(): return decoded(model, lambda: families.build(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that 'all-linear' leaves out
        add_lora(model, config(), seed=0)
    expected = families.logits(shake(model).eval())
    save_adapter(model, tmp_path / "ours")
    theirs = in_peft(dense(), tmp_path / "ours")
    assert torch.allclose(families.logits(theirs), expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(dense(), tmp_path / "theirs").eval()
    assert torch.allclose(families.logits(again), expected, atol=1e-5)


ODD = [("gpt2", dict(use_dora=True)), ("gpt2", dict(lora_bias=True, fan_in_fan_out=True)),
       ("gpt2", dict(target_modules=None)), ("falcon", dict(use_dora=True)),
       ("gpt2", dict(target_modules=["wte", "lm_head", "c_attn"], use_dora=True)),
       ("gpt2", dict(target_modules=["c_fc"], modules_to_save=["lm_head", "ln_f"], bias="all")),
       ("gemma3_text", dict(target_modules=["embed_tokens", "q_proj"])),
       ("phi", dict(modules_to_save=["lm_head"], bias="all")),
       ("gemma3_text", dict(target_modules=["embed_tokens", "lm_head"], use_dora=True)),
       ("opt", dict(bias="lora_only"))]


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("family, settings", ODD)
def test_kinds_on_odd_layers(family, settings, four_bits, tmp_path):
    "Weights stored transposed, embeddings that scale, tied heads, biases in the head: PEFT's file here, ours there."
    base = families.build(family)
    if four_bits: quantize_model(base)
    def dense(): return decoded(base, lambda: families.build(family)) if four_bits else families.build(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shake(get_peft_model(dense(), config(**settings))).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    expected, make = families.logits(theirs), dense()
    ours = load_adapter(base, tmp_path / "theirs").eval()
    assert torch.allclose(families.logits(ours), expected, atol=2e-5)
    save_adapter(ours, tmp_path / "ours")
    assert torch.allclose(families.logits(in_peft(make, tmp_path / "ours")), expected, atol=2e-5)


def test_a_model_that_classifies(tmp_path):
    "PEFT trains its new head whole, without being told: `score` comes along."
    from transformers import AutoModelForSequenceClassification
    def make():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(llama().config).eval()
    theirs = shake(get_peft_model(make(), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(), tmp_path).eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5) and ours.score.weight.requires_grad


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_all_linear_of_peft_means_experts_and_routers(family, tmp_path):
    "PEFT turns the old names of these families into parameters; its file loads on dense experts and on 4 bits."
    model = quantize_model(families.build(family))
    def dense(): return decoded(model, lambda: families.build(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = shake(get_peft_model(dense(), config())).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        expected = families.logits(theirs)
        for base in (dense(), quantize_model(families.build(family))):
            ours = load_adapter(base, tmp_path / "theirs").eval()
            assert torch.allclose(families.logits(ours), expected, atol=1e-5)
        save_adapter(ours, tmp_path / "ours")
        back = PeftModel.from_pretrained(dense(), tmp_path / "ours").eval()
    assert torch.allclose(families.logits(back), expected, atol=1e-5)


@pytest.mark.parametrize("weight", ["shared_experts.gate_proj.weight", "mlp.gate.weight"])
def test_a_layer_whose_name_peft_takes_for_experts_is_named_by_its_weight(weight, tmp_path):
    "Its name in target_modules would become the experts' in PEFT; names that no parameter has are passed over."
    names = [weight, "of.another.model"]
    settings = dict(target_modules=["o_proj"], target_parameters=names, alpha_pattern={weight: 64})
    expected, _ = by_peft(families.build("deepseek_v3"), tmp_path / "a", **settings)
    ours = load_adapter(families.build("deepseek_v3"), tmp_path / "a").eval()
    assert torch.allclose(logits(ours), expected, atol=1e-5)
    save_adapter(ours, tmp_path / "b")
    again = load_adapter(families.build("deepseek_v3"), tmp_path / "b").eval()
    assert torch.allclose(logits(again), expected, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: that the pattern fits no module; for the parameter it counts
        back = PeftModel.from_pretrained(families.build("deepseek_v3"), tmp_path / "b").eval()
    assert torch.allclose(logits(back), expected, atol=1e-5)


def test_the_weight_of_a_layer_named_as_a_parameter_is_the_layer(tmp_path):
    "target_parameters=['q_proj.weight']: PEFT's file has the names of an adapted layer."
    settings = dict(target_modules=["v_proj"], target_parameters=["q_proj.weight"])
    expected, _ = by_peft(llama(), tmp_path / "a", **settings)
    dense = load_adapter(llama(), tmp_path / "a").eval()
    assert torch.allclose(logits(dense), expected, atol=1e-5) and len(adapted_layers(dense)) == 4
    save_adapter(dense, tmp_path / "b")
    assert torch.allclose(logits(in_peft(llama(), tmp_path / "b")), expected, atol=1e-5)


# -- adding does what the config says

PATTERNED = {"of the weight": dict(alpha_pattern={"q_proj.weight": 64}, rank_pattern={"q_proj.weight": 2}),
             "of the layer, named too": dict(alpha_pattern={"v_proj": 64}, rank_pattern={"v_proj": 2})}


@pytest.mark.parametrize("case", PATTERNED)
def test_patterns_for_a_layer_named_by_its_weight(case, tmp_path):
    "PEFT holds them against the weight's name; saved here, where the layer is named, they say the same."
    expected, _ = by_peft(llama(), tmp_path / "peft", target_modules=["v_proj"], target_parameters=["q_proj.weight"],
                          **PATTERNED[case])
    ours = load_adapter(llama(), tmp_path / "peft")
    assert torch.allclose(logits(ours), expected, atol=1e-4)
    save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "ours")), logits(ours))
    assert torch.allclose(logits(in_peft(llama(), tmp_path / "ours")), expected, atol=1e-4)


def test_a_pattern_that_misses_a_weights_name_is_refused():
    "PEFT would leave it without effect."
    settings = config(target_modules=["v_proj"], target_parameters=["q_proj.weight"], alpha_pattern={"q_proj": 64})
    with pytest.raises(LabError, match="'q_proj', which fits no adapted layer"): add_lora(llama(), settings)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_first_pattern_that_fits_decides_in_the_file_too(field, tmp_path):
    "The keys of a file are sorted; the special case was first, and would come second."
    patterns = {field: {"v_proj|q_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}}
    ours = shake(add_lora(quantize_model(llama()), config(target_modules=["q_proj", "v_proj"], **patterns)))
    save_adapter(ours, tmp_path)
    assert torch.equal(logits(load_adapter(quantize_model(llama()), tmp_path)), logits(ours))
    assert torch.allclose(logits(in_peft(decoded(quantize_model(llama()), llama), tmp_path)), logits(ours), atol=1e-4)


@pytest.mark.parametrize("name", ["attn.c_proj.weight", "c_attn.weight"])
def test_a_weight_stored_turned_round_is_refused_as_a_parameter(name, tmp_path):
    "PEFT takes its rows for outputs: a square one would load with both halves in each other's place."
    by_peft(families.build("gpt2"), tmp_path, target_modules=[], target_parameters=[name])
    with pytest.raises(LabError, match=r"stored as \[in, out\].*target_modules"):
        load_adapter(families.build("gpt2"), tmp_path)


def test_a_weight_that_is_read_in_passing_is_refused_as_a_parameter(tmp_path):
    "Where PEFT's own forward pass goes without the adapter."
    by_peft(families.build("mamba"), tmp_path, target_modules=["in_proj"], target_parameters=["dt_proj.weight"])
    with pytest.raises(LabError, match="MambaMixer takes it without calling"):
        load_adapter(families.build("mamba"), tmp_path)


@pytest.mark.parametrize("kind", VARIANTS)
def test_adding_is_a_no_op_and_trains_what_the_file_holds(kind):
    "A fresh adapter changes nothing, whatever its kind; each tensor that PEFT trains gets a gradient."
    settings, model = VARIANTS[kind], quantize_model(llama())
    if kind == "eva":
        with pytest.raises(LabError, match="'eva' takes its numbers from data"): add_lora(model, config(**settings))
        return
    before = logits(model)
    add_lora(model, config(**settings), seed=3)
    random = settings.get("init_lora_weights") is False
    assert torch.allclose(logits(model), before, atol=1e-4) != random
    shake(model)(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable(model))
    theirs = get_peft_model(llama(), config(**settings))
    held = {n.replace(".default", "").replace(".modules_to_save", "").replace("vector.weight", "vector")
            for n, p in theirs.named_parameters() if p.requires_grad}
    learning = {f"base_model.model.{n}" for n, p in model.named_parameters() if p.requires_grad}
    assert learning == held and learning <= lora_state(model).keys()


def test_a_seed_starts_both_libraries_alike_for_every_part():
    "Embeddings and magnitudes too."
    settings = dict(target_modules=["embed_tokens", "q_proj"], use_dora=True)
    ours, theirs = add_lora(llama(), config(**settings), seed=7), get_peft_model(llama(), config(**settings))
    reset_lora(theirs, 7)
    there = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    here = lora_state(ours)
    assert len(here) == len(there) == 3 + 3 * 2
    for n, p in here.items(): assert torch.allclose(p, there.get(n, there.get(n + ".weight")), atol=1e-6), n


def test_training_with_dora_is_pefts(tmp_path):
    "Three steps of SGD, with dropout off, end with the same numbers."
    models = add_lora(llama(), config(use_dora=True), seed=1), get_peft_model(llama(), config(use_dora=True))
    reset_lora(models[1], 1)
    for model in models:
        optimizer = torch.optim.SGD(trainable(model), 0.5)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(logits(models[0]), logits(models[1]), atol=1e-5)
    assert not torch.allclose(logits(models[0]), logits(llama()), atol=1e-3)


def test_other_kinds_are_not_taken_for_plain_layers():
    "Who fuses plain layers asks for their class."
    for settings in (dict(use_dora=True), dict(lora_bias=True), dict(target_modules=["embed_tokens"])):
        layers = adapted_layers(add_lora(llama(), config(**settings)))
        assert layers and not any(isinstance(m, LoRALinear) for m in layers.values())


def test_one_layer_under_two_names_has_one_adapter():
    "Both names lead to it."
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    add_lora(model, config(target_modules=["a"]))
    assert model.a is model.b and isinstance(model.b, LoRALinear) and len(trainable(model)) == 2


def test_a_4_bit_dora_layer_keeps_no_decoded_weight():
    "What autograd keeps of one pass is as large as the rows, not as the weight."
    from qlora_lab.linear4bit import saved_for_backward
    layer = DoRALinear(Linear4bit.from_linear(nn.Linear(512, 512)), r=2)
    with saved_for_backward(layer) as kept: layer(torch.randn(2, 512, requires_grad=True))
    assert sum(size for *_, size in kept.values()) < 512 * 512


# -- what is refused says what it is

def written(folder, **changes):
    "A plain adapter whose config says something else."
    save_adapter(add_lora(llama(), config(target_modules=["q_proj"])), folder)
    path = folder / ADAPTER_FILES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


REFUSED = {
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}], "ensure_weight_tying": [True],
    "layer_replication": [[[0, 2], [1, 2]]], "megatron_config": [{"a": 1}], "use_qalora": [True],
    "alora_invocation_tokens": [[5, 6]], "arrow_config": [{"top_k": 2}], "use_bdlora": [{"nblocks": 2}],
    "kasa_config": [{"beta": 0.1}], "monteclora_config": [{"num_samples": 4}], "velora_config": [{"num_groups": 4}],
    "bias": ["some"]}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in REFUSED.items() for v in values])
def test_a_field_is_refused_by_its_name(field, value, tmp_path):
    "In a file and in a config: field, value and a way out, and never another model's fault."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, at making such a config
        with pytest.raises(LabError, match=rf"LoraConfig\.{field}=") as e:
            load_adapter(llama(), written(tmp_path, **{field: value}))
    assert "another model" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", "OFT", "ADALORA", "XLORA", "TRAINABLE_TOKENS"])
def test_another_method_is_refused_by_its_name(kind, tmp_path):
    with pytest.raises(LabError, match=f"peft_type='{kind}'"): load_adapter(llama(), written(tmp_path, peft_type=kind))


def test_loftq_is_refused_by_its_name(tmp_path):
    "PEFT asks for settings of its own with it."
    changes = dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with pytest.raises(LabError, match="loftq"): load_adapter(llama(), written(tmp_path, **changes))


@pytest.mark.parametrize("init, more, converts", [
    *((kind, {}, True) for kind in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")), ("loftq", {}, False),
    ("pissa", dict(use_rslora=True), True), ("pissa", dict(rank_pattern={"q_proj": 2}), True),
    ("pissa", dict(use_rslora=True, rank_pattern={"q_proj": 2}), False),
    ("olora", dict(use_rslora=True, alpha_pattern={"q_proj": 2}), False)])
def test_the_way_out_is_one_that_peft_has(init, more, converts, tmp_path):
    "PEFT converts some, and none where rsLoRA has patterns."
    told = "path_initial_model_for_weight_conversion" if converts else "PEFT does not convert it.*merge it with PEFT"
    if init == "loftq": more = dict(loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with pytest.raises(LabError, match=told): load_adapter(llama(), written(tmp_path, init_lora_weights=init, **more))


def test_a_field_of_a_newer_peft(tmp_path):
    "Harmless where it is empty, refused where it is set."
    load_adapter(llama(), written(tmp_path / "a", use_future=None))
    with pytest.raises(LabError, match="use_future=3: the installed PEFT has no such setting"):
        load_adapter(llama(), written(tmp_path / "b", use_future=3))


def test_pefts_converted_pissa_loads(tmp_path):
    "The cure that the refusal names: PEFT saves it as plain LoRA."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(llama(), config(init_lora_weights="pissa", target_modules=["q_proj", "up_proj"]))
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        shake(theirs).eval()
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    ours = load_adapter(llama(), tmp_path / "plain").eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)


@pytest.mark.parametrize("spelling", ["{}", "_orig_mod.{}", "base_model.model._orig_mod.{}", "base_model.model.{}"])
@pytest.mark.parametrize("adapter", ["", ".default", ".mine"])
def test_names_in_every_spelling(spelling, adapter, tmp_path):
    "Prefixes, wrappers and the adapter's own name say nothing of the layer."
    model = shake(add_lora(llama(), config(), seed=2))
    save_adapter(model, tmp_path)
    path = tmp_path / ADAPTER_FILES[1]
    def spelt(name):
        stem, _, last = name.removeprefix("base_model.model.").rpartition(".")
        return spelling.format(f"{stem}{adapter}.{last}")
    save_file({spelt(n): t for n, t in load_file(path).items()}, path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype, told", [
    (torch.float8_e4m3fn, "F8_E4M3"), (torch.int32, "I32"), (torch.complex64, "C64"), (torch.bool, "BOOL")])
def test_a_tensor_that_is_no_float(dtype, told, tmp_path):
    "torch casts these without a word, and looks for infinities in none of 8 bits."
    path = written(tmp_path) / ADAPTER_FILES[1]
    name, first = next(iter((saved := load_file(path)).items()))
    save_file(saved | {name: first.to(dtype)}, path)
    with pytest.raises(LabError, match=f"{name} is stored in {told} and belongs where floats are"):
        load_adapter(llama(), tmp_path)


def test_a_module_beside_the_adapters_may_count(tmp_path):
    "Whole numbers among the buffers of a module that is trained beside them."
    path = written(tmp_path) / ADAPTER_FILES[1]
    save_file(load_file(path) | {"base_model.model.score.seen": torch.tensor([3])}, path)
    assert read_tensors(path)["score.seen"].dtype == torch.int64


def test_two_spellings_of_one_name(tmp_path):
    "Harmless with equal bits; with two values nobody could say which of them is loaded."
    path = written(tmp_path) / ADAPTER_FILES[1]
    name, first = next(iter((saved := load_file(path)).items()))
    other = name.removeprefix("base_model.model.")
    save_file(saved | {other: first.clone()}, path)
    load_adapter(llama(), tmp_path)
    for t in (first + 1, first.double(), first[:1].clone()):
        save_file(saved | {other: t}, path)
        with pytest.raises(LabError, match=f"{name} and {other}|{other} and {name}"): load_adapter(llama(), tmp_path)


def test_a_compiled_model_of_pefts(tmp_path):
    "PEFT's file of a model that was compiled before it was wrapped."
    theirs = shake(get_peft_model(torch.compile(llama(), backend="eager"), config(target_modules=["q_proj"]))).eval()
    theirs.save_pretrained(tmp_path)
    assert torch.allclose(logits(load_adapter(llama(), tmp_path).eval()), logits(theirs), atol=1e-5)


def test_folders_that_hold_something_else(tmp_path):
    "Pickle, several adapters, two in one file, numbers that are not finite."
    folder = written(tmp_path / "one")
    tensors, file = load_file(folder / ADAPTER_FILES[1]), folder / ADAPTER_FILES[1]
    save_file({n.replace(".weight", f".{a}.weight"): t + 0 for n, t in tensors.items() for a in "ab"}, file)
    with pytest.raises(LabError, match=r"the adapters \['a', 'b'\] in one file"): load_adapter(llama(), folder)
    save_file({n: t * float("nan") for n, t in tensors.items()}, file)
    with pytest.raises(LabError, match="not finite"): load_adapter(llama(), folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(LabError, match="can run code.*save_pretrained"): load_adapter(llama(), folder)
    with pytest.raises(LabError, match=r"the adapters \['one'\] lie in folders of their own"):
        load_adapter(llama(), tmp_path)


def test_a_grown_vocabulary_is_told(tmp_path):
    "PEFT saves the embedding along: of another size, the cure is named; of the same, the model gets its numbers."
    theirs = llama(tie=False)
    theirs.get_input_embeddings().weight.data.mul_(2)
    expected, _ = by_peft(theirs, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    ours = load_adapter(llama(tie=False), tmp_path / "a").eval()
    assert torch.allclose(logits(ours), expected, atol=1e-5)
    save_adapter(ours, tmp_path / "b")
    assert torch.allclose(logits(load_adapter(llama(tie=False), tmp_path / "b")), expected, atol=1e-5)
    with pytest.raises(LabError, match=r"another vocabulary.*resize_token_embeddings\(320\)"):
        load_adapter(llama(tie=False, vocab_size=352), tmp_path / "a")


@pytest.mark.parametrize("changes", [dict(r=8), dict(use_dora=True), dict(lora_bias=True)])
def test_a_config_that_disagrees_with_the_tensors(changes, tmp_path):
    "Another rank, or parts that the file lacks: the folder is at fault, not the model."
    with pytest.raises(LabError, match="the two files disagree.*lora_"):
        load_adapter(llama(), written(tmp_path, **changes))


@pytest.mark.parametrize("settings, says", [
    (dict(target_modules=["mlp"]), "LlamaMLP: the lab adapts linear layers"),
    (dict(target_modules="q_proj"), r"pattern for whole names: \['q_proj'\] names layers by their last part"),
    (dict(rank_pattern={"q_prj": 2}), "q_prj"),
    (dict(modules_to_save=["classifier"]), "names no module"), (dict(target_modules=["input_layernorm"]), "RMSNorm"),
    (dict(modules_to_save=["_proj"], target_modules=["q_proj"]), "named too"),
    (dict(target_parameters=["w1"]), "no parameter of this model"),
    (dict(lora_bias=True, target_modules=["embed_tokens"]), "no place for a bias")])
def test_a_config_that_names_nothing_changes_nothing(settings, says):
    model = llama()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(LabError, match=says): add_lora(model, config(**settings))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("field, value", [("use_dora", True), ("lora_dropout", 0.1), ("lora_bias", True)])
@pytest.mark.parametrize("parameter", ["gate.weight", "down_proj"])
def test_what_a_parameter_cannot_have_is_refused_first(parameter, field, value):
    "As PEFT refuses it, and before anything is changed."
    model = families.build("mixtral")
    with pytest.raises(LabError, match=rf"LoraConfig\.{field}=.* together with target_parameters"):
        add_lora(model, config(target_modules=["q_proj"], target_parameters=[parameter], **{field: value}))
    assert all(p.requires_grad for p in model.parameters()) and not adapted_layers(model)


def test_no_table_for_a_family():
    "target_modules=None where PEFT has no layers on record: what is there is named."
    model = families.build("smollm3")
    with pytest.raises(LabError, match="family 'smollm3'.*q_proj"): add_lora(model, config(target_modules=None))


def test_a_layer_that_is_left_alone_says_why():
    "Named: refused. Reached by 'all-linear': left out, and said once."
    model = families.build("llama4_text")
    with pytest.raises(LabError, match="router.*forward of its own"): add_lora(model, config(target_modules=["router"]))
    match = "'all-linear' leaves out model.layers.*router.*experts, no linear layers"
    with pytest.warns(UserWarning, match=match) as said:
        add_lora(model, config())
    assert len(said) == 1
