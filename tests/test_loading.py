"""What is loaded is what the file says, or it is refused in one sentence; what is asked for is kept or refused."""
import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import warnings

import families
import pytest
import torch
import transformers
from families import logits
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from conftest import devices, make_tokenizer
from qlora_lab import bnb_files, segments
from qlora_lab.against_file import Stored, hold_against, stored_files
from qlora_lab.bnb_files import save_quantized, skip_list
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.byte_hashes import hash_tensors
from qlora_lab.engine.examining import examine
from qlora_lab.from_peft import with_lab_layers
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.loading import listening, settle
from qlora_lab.lora import add_lora, save_adapter
from qlora_lab.model import answer, load_model, memory_bill, token_losses
from qlora_lab.processes import own_card
from qlora_lab.records import LabError
from qlora_lab.segments import ALLOCATOR

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)

pytestmark = pytest.mark.usefixtures("one_thread")


def rewrite(folder, change):
    "Change the tensors of a folder's file."
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def reconfigure(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return families.folder("llama", tmp_path_factory.mktemp("origin"))


@pytest.fixture
def folder(origin, tmp_path):
    "A folder of one's own to spoil."
    return shutil.copytree(origin, tmp_path / "model")


@pytest.fixture(params=["plain", "4 bits"])
def either(request, folder, tmp_path):
    "A plain folder, and one in 4 bits."
    if request.param == "plain": return folder
    return save_quantized(*load_model(folder, **EXACT)[:1], tmp_path / "packed", make_tokenizer())


DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, told", [
    (lambda s: {k: t for k, t in s.items() if not k.startswith(DOWN)}, f"missing: {DOWN}.weight"),
    (lambda s: {k: t for k, t in s.items() if ".layers.1." not in k}, "missing: model.layers.1.input_layernorm.weight"),
    (lambda s: {f"_orig_mod.{k}": t for k, t in s.items()}, "not expected: _orig_mod."),
    (lambda s: s | {"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)}, "not expected: model.layers.2.mlp.up"),
    (lambda s: s | {"model.norm.weight": torch.ones(32)}, r"(of another shape: )?model.norm.weight"),
], ids=["a weight", "a layer", "a prefix", "a layer too many", "a shape"])
def test_a_checkpoint_that_does_not_fit_its_config(change, told, either):
    with pytest.raises(LabError, match=told): load_model(rewrite(either, change), **EXACT)


def test_a_value_that_was_lost_on_the_way(folder):
    "One bit of one number: named. The file as it is: accepted."
    model, stored = AutoModelForCausalLM.from_pretrained(folder), Stored(stored_files(folder))
    assert hold_against(model, stored, "the file") == 21
    model.get_parameter(f"{DOWN}.weight").data.view(torch.int32)[5, 7] ^= 1
    with pytest.raises(LabError, match=f"the file: {DOWN}.weight: loaded otherwise"):
        hold_against(model, stored, "the file")


def test_weights_are_quantized_in_the_precision_of_the_file(folder):
    "A config that names bfloat16 over a file in float32: transformers rounds before anything is quantized."
    want = quantize_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    mixed = rewrite(reconfigure(folder, dtype="bfloat16"), lambda s: s | {"model.norm.weight": torch.ones(64).half()})
    got, _ = load_model(mixed, **EXACT)
    for name, layer in got.named_modules():
        if isinstance(layer, Linear4bit): assert torch.equal(layer.weight, want.get_submodule(name).weight)


def test_other_files_than_one_in_safetensors(folder):
    "Shards with an index; torch's older format, which can run code, is refused."
    want = logits(load_model(folder, **EXACT)[0])
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1 and torch.equal(logits(load_model(folder, **EXACT)[0]), want)
    for file in folder.glob("model*"): file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(LabError, match="can run code"): load_model(folder, **EXACT)

QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_a_tensor_in_two_spellings(either):
    "`layers.0…` beside `model.layers.0…`: harmless with equal bits, refused with two values."
    name = "model.layers.0.input_layernorm.weight"
    rewrite(either, lambda s: s | {name.removeprefix("model."): s[name].clone()})
    load_model(either, **EXACT)
    rewrite(either, lambda s: s | {name.removeprefix("model."): s[name] + 1})
    with pytest.raises(LabError, match=rf"safetensors: layers\S+ and {name} are both {name} and differ"):
        load_model(either, **EXACT)


def test_an_expert_in_two_spellings(tmp_path):
    "transformers makes one tensor of a list: all of a list are different experts, but for two of one number."
    made = families.folder("mixtral", tmp_path)
    model, name = AutoModelForCausalLM.from_pretrained(made), "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert hold_against(model, Stored(stored_files(made)), "the file") == 21
    rewrite(made, lambda s: s | {name.removeprefix("model."): s[name] + 1})
    with pytest.raises(LabError, match="transformers could not convert"): load_model(made, **EXACT)
    with pytest.raises(LabError, match=f"{name} are both model.layers.0.mlp.experts.gate_up_proj and differ"):
        hold_against(model, Stored(stored_files(made)), "the file")


def shard(folder, change=lambda first, second, index: None):
    "The folder's file as two shards with an index, each changed before it is written."
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [{n: tensors[n] for n in names[i::2]} for i in range(2)]
    index = {n: file for part, file in zip(parts, files) for n in part}
    change(*parts, index)
    for part, file in zip(parts, files): save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("change, told", [
    (lambda a, b, index: (b if QUERY in a else a).update({QUERY: torch.ones(64, 64)}), f"holds {QUERY}, and so does"),
    (lambda a, b, index: index.update({QUERY: next(f for f in index.values() if f != index[QUERY])}),
     f"holds {QUERY}, and by .*index.json it lies in model-0000"),
    (lambda a, b, index: (a if QUERY in a else b).pop(QUERY), f"missing: {QUERY}"),
], ids=["in two files", "in another file", "in no file"])
def test_shards_that_are_not_as_their_index_says(change, told, folder):
    with pytest.raises(LabError, match=told): load_model(shard(folder, change), **EXACT)


def test_shards_as_the_hub_has_them(folder):
    """Files that no index names are not looked at. It may name a tied tensor that no file holds, and leave out one
    that a file has, which is read, there as here."""
    reconfigure(folder, tie_word_embeddings=True)
    shard(folder, lambda a, b, index: [index.pop(QUERY), *(part.pop("lm_head.weight", None) for part in (a, b))])
    for surplus in ("consolidated", "model-00003-of-00003"):
        save_file({QUERY: torch.ones(64, 64)}, folder / f"{surplus}.safetensors")
    model, _ = load_model(folder, quantize=None, **EXACT)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.get_parameter(QUERY).eq(1).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_of_64_bits_come_back(double_quant, folder, tmp_path):
    "Scales are computed in 32 bits whatever the weight's dtype, so a folder may say float32, and lose nothing."
    def packed(model, name):
        save_quantized(model, tmp_path / name, make_tokenizer())
        return load_file(tmp_path / name / "model.safetensors")
    how = dict(double_quant=double_quant)
    want = load_model(folder, **how, **EXACT)[0]
    bits_of = {n: t for n, t in packed(want, "32").items() if ".weight." in n or t.dtype == torch.uint8}
    rewrite(folder, lambda s: {k: t.double() for k, t in s.items()})
    reconfigure(folder, dtype="float64")
    in_64 = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ways = (load_model(folder, **how, **EXACT)[0], quantize_model(in_64, **how),
            load_model(folder, **how, **EXACT | dict(dtype=torch.float64))[0])
    for i, model in enumerate(ways):
        made = packed(model, str(i))
        assert len(bits_of) > 14 and all(torch.equal(made[n], t) for n, t in bits_of.items())
        assert torch.equal(logits(load_model(tmp_path / str(i), **EXACT)[0]), logits(want))


@pytest.mark.parametrize("config, told", [
    (dict(model_type="t5"), "t5 is an encoder-decoder"),
    (dict(model_type="bart"), "bart is an encoder-decoder"),
    (dict(model_type="roberta", architectures=["RobertaForMaskedLM"]), "roberta is an encoder"),
    (dict(model_type="vit"), "vit has no causal language model"),
    (dict(model_type="clip"), "clip has no causal language model"),
    (dict(model_type="llama", architectures=["LlamaForTokenClassification"]), "written by LlamaForTokenClassification"),
    (dict(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "mine brings Python code of its own"),
    (dict(model_type="llama99"), "no family 'llama99'"),
    *((dict(model_type="llama", quantization_config=dict(quant_method=m)), f"quantized by {m}")
      for m in ("gptq", "awq", "fp8", "compressed-tensors", "hqq")),
    (dict(model_type="llama", quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True)), "8 bits"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_trained_is_refused_from_the_config(config, told, tmp_path):
    "There is nothing else in the folder: no weights, no tokenizer."
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LabError, match=told) as e: load_model(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change, dtype", [
    (lambda t: (t * 100).to(torch.int8), "I8"), (lambda t: t > 0, "BOOL"), (lambda t: t + 1j, "C64"),
    (lambda t: (t * 1e6).long(), "I64")], ids=["int8", "bool", "complex64", "int64"])
@pytest.mark.parametrize("name", [QUERY, "model.norm.weight", "lm_head.weight"])
def test_what_torch_would_cast_to_floats_is_refused(name, change, dtype, folder):
    rewrite(folder, lambda s: s | {name: change(s[name])})
    with pytest.raises(LabError, match=f"safetensors: {name} is stored in {dtype} and belongs where floats are"):
        load_model(folder, **EXACT)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_floats_beside_4_bit_weights_are_floats(dtype, folder, tmp_path):
    packed = save_quantized(*load_model(folder, **EXACT)[:1], tmp_path / "packed", make_tokenizer())
    rewrite(packed, lambda s: s | {"model.norm.weight": s["model.norm.weight"].to(dtype)})
    with pytest.raises(LabError, match="model.norm.weight is stored in"): load_model(packed, **EXACT)


def test_whole_numbers_that_the_model_has_too(folder):
    "A buffer of a model that counts something is read as it is."
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.register_buffer("seen", torch.tensor([3]))
    rewrite(folder, lambda s: s | {"model.norm.seen": torch.tensor([3])})
    assert hold_against(model, Stored(stored_files(folder)), "the file") == 22


def test_eight_bit_floats_and_adapters_are_not_taken_for_a_model(folder):
    "A file of fp8 without a word in the config; an adapter's config beside the model's."
    eight = shutil.copytree(folder, folder.parent / "eight")
    rewrite(eight, lambda s: s | {f"{DOWN}.weight": s[f"{DOWN}.weight"].to(torch.float8_e4m3fn)})
    with pytest.raises(LabError, match="8-bit floats"): load_model(eight)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LabError, match="load_adapter"): load_model(folder)


def test_a_wish_is_kept_or_refused(folder, tmp_path):
    "As stored by default; an explicit wish that differs is refused, None decodes."
    made, tokenizer = load_model(folder, "fp4", double_quant=False, **EXACT)
    packed = save_quantized(made, tmp_path / "packed", tokenizer)
    for wish in ({}, dict(quantize="fp4"), dict(double_quant=False, blocksize=64)):
        layer = load_model(packed, **wish, **EXACT)[0].model.layers[0].mlp.up_proj
        assert layer.quant_type == "fp4" and layer.absmax2 is None
    for wish, told in ((dict(quantize="nf4"), "quant_type='fp4', asked for 'nf4'"),
                       (dict(blocksize=128), "blocksize=64"),
                       (dict(double_quant=True), "double_quant=False, asked for True")):
        for backend in ("lab", "bnb"):
            with pytest.raises(LabError, match=told): load_model(packed, backend=backend, **wish, **EXACT)
    plain, _ = load_model(packed, quantize=None, **EXACT)
    weight = plain.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, made.model.layers[0].mlp.up_proj.quantized.dequantize(torch.float32))


def test_float32_products_stay_on_a_cpu(folder, tmp_path):
    "A folder that was saved for them; on any processor, and unless another dtype is asked for."
    made, tokenizer = load_model(folder, **EXACT)
    packed = save_quantized(made, tmp_path / "packed", tokenizer)
    def compute(**how): return load_model(packed, device="cpu", **how)[0].model.layers[0].mlp.up_proj.compute_dtype
    assert compute() == torch.float32 and compute(compute_dtype=torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("device", devices())
def test_rotary_frequencies_are_not_rounded(device, folder):
    "In a bfloat16 model, on the device where it is used."
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model.rotary_emb.inv_freq
    for how in (dict(quantize=None), {}, dict(backend="bnb")):
        model, _ = load_model(folder, dtype=torch.bfloat16, compute_dtype=torch.bfloat16, device=device, **how)
        got = model.model.rotary_emb.inv_freq
        assert got.dtype == torch.float32 and torch.equal(got.cpu(), want) and got.device.type == device


def test_a_loaded_model_does_not_drop(tmp_path):
    "Eval mode from a plain folder and from one in 4 bits."
    folder = families.folder("opt", tmp_path, dropout=0.5)
    model, tokenizer = load_model(folder, **EXACT)
    again, _ = load_model(save_quantized(model, tmp_path / "packed", tokenizer), **EXACT)
    assert not model.training and not again.training and torch.equal(logits(again), logits(again))


def test_what_transformers_warns_of_reaches_the_user(tmp_path):
    "A config that ties what the file does not: transformers unties, and says so in its log alone."
    folder = families.folder("qwen2", tmp_path)
    rewrite(folder, lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"] + 1})
    with pytest.warns(UserWarning, match="NOT tie"): model, _ = load_model(folder, **EXACT)
    again, _ = load_model(save_quantized(model, tmp_path / "packed", make_tokenizer()), **EXACT)
    assert torch.equal(logits(again), logits(model))


def test_harmless_lines_are_silent_and_the_log_is_as_it_was():
    log, before = transformers_logging.get_logger("transformers.x"), logging.getLogger("transformers").handlers
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with listening():
            for text in ("`torch_dtype` is deprecated!", "odd weights", "odd weights"): log.warning(text)
    assert [str(w.message) for w in said] == ["transformers: odd weights"]
    assert logging.getLogger("transformers").handlers is before


def test_bitsandbytes_layers_are_counted_too(tmp_path):
    "transformers makes none of Falcon's, and few of a mixture's: refused, and said."
    with pytest.raises(LabError, match="FalconForCausalLM: no weight could be put into 4 bits"):
        load_model(families.folder("falcon", tmp_path), backend="bnb", **EXACT)
    folder = families.folder("mixtral", tmp_path)
    with pytest.warns(UserWarning, match="10% of the weights.*three axes, as fused experts"):
        load_model(folder, backend="bnb", **EXACT)


# saving

def test_a_generation_config_that_transformers_will_not_write(folder, tmp_path):
    "Byte for byte what was read; if it was changed since, as it is now."
    content = '{"do_sample": false, "temperature": 0.9, "top_p": 0.6,  "eos_token_id": 1}'
    (folder / "generation_config.json").write_text(content)
    for part in folder.iterdir(): part.chmod(0o444)
    folder.chmod(0o555)
    model, tokenizer = load_model(folder, **EXACT)
    packed = save_quantized(model, tmp_path / "packed", tokenizer)
    assert (packed / "generation_config.json").read_text() == content
    model.generation_config.top_k = 7
    again = save_quantized(model, tmp_path / "again", tokenizer) / "generation_config.json"
    assert json.loads(again.read_text())["top_k"] == 7
    modes = {p.stat().st_mode & 0o777 for p in packed.iterdir()}
    folder.chmod(0o755)
    assert len(modes) == 1 and modes.pop() & 0o200


def test_a_tied_head_in_4_bits(tmp_path):
    "It is tied no more, and the config says so: else a reader would put the embeddings in its place."
    folder = families.folder("qwen2", tmp_path)
    model, tokenizer = load_model(folder, quantize=None, **EXACT)
    quantize_model(model, skip=())
    assert type(model.lm_head) is Linear4bit
    packed, want = save_quantized(model, tmp_path / "packed", tokenizer), logits(model)
    assert torch.equal(logits(load_model(packed, **EXACT)[0]), want)
    theirs = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}).train()
    assert torch.allclose(logits(theirs), want, atol=1e-3)


def test_layers_of_two_kinds_are_refused(folder, tmp_path):
    model, _ = load_model(folder, quantize=None, **EXACT)
    quantize_model(model.model.layers[0])
    quantize_model(model.model.layers[1], blocksize=128)
    with pytest.raises(LabError, match="of 2 kinds"): save_quantized(model, tmp_path / "packed")


def test_shards_are_written_one_by_one(folder, tmp_path):
    "The same tensors, whatever the size of a file."
    model, tokenizer = load_model(folder, **EXACT)
    one, many = (save_quantized(model, tmp_path / size, tokenizer, size) for size in ("5GB", "40KB"))
    files = list(many.glob("*.safetensors"))
    assert len(files) > 2 and not (many / "model.safetensors").exists()
    shards = {k: t for file in files for k, t in load_file(file).items()}
    whole = load_file(one / "model.safetensors")
    assert shards.keys() == whole.keys() and all(torch.equal(t, whole[k]) for k, t in shards.items())
    assert torch.equal(logits(load_model(many, **EXACT)[0]), logits(model))


def test_llama_4_with_single_experts(tmp_path):
    "As transformers' own 4-bit checkpoints of it have them: opened, saved, and opened by transformers."
    from qlora_lab.bnb_reader import fused, single_experts
    folder = families.folder("llama4_text", tmp_path)
    model, tokenizer = load_model(folder, quantize=None, **EXACT)
    torch.manual_seed(0)
    single_experts(model)
    for m in model.modules():
        if isinstance(m, nn.Linear) and m.weight.is_meta: m.to_empty(device="cpu").weight.data.normal_(0, 0.02)
    packed = save_quantized(quantize_model(model), tmp_path / "packed", tokenizer)
    again, want = load_model(packed, **EXACT)[0], logits(model)
    experts = [m for n, m in again.named_modules() if ".experts.3.up_proj" in n]
    assert not fused(again) and experts and all(type(m) is Linear4bit for m in experts)
    assert torch.equal(logits(again), want)
    theirs = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}).train()
    assert torch.allclose(logits(theirs), want, atol=1e-3)


@pytest.mark.parametrize("spoil, told", [
    (lambda s: {k: t for k, t in s.items() if k != f"{UP}.nested_absmax"}, "do not belong together|nested"),
    (lambda s: {k: t for k, t in s.items() if not k.startswith(f"{UP}.quant_s")}, "not a bitsandbytes 4-bit weight"),
    (lambda s: s | {UP: s[UP][:100].clone()}, "100 of codes"),
    (lambda s: s | {f"{UP}.quant_map": s[f"{UP}.quant_map"].flip(0)}, "another code book"),
    (lambda s: {k: t for k, t in s.items() if k != UP}, UP),
    (lambda s: {k: t for k, t in s.items() if not k.startswith(f"{UP}.")}, "of another shape: .*up_proj"),
], ids=["nested scales", "numbers", "codes cut", "code book", "codes", "all but codes"])
def test_a_4bit_weight_that_lacks_a_part(spoil, told, folder, tmp_path):
    "Each would decode to something, or to nothing: the layer is named."
    packed = save_quantized(*load_model(folder, **EXACT)[:1], tmp_path / "packed", make_tokenizer())
    with pytest.raises(LabError, match=told) as e: load_model(rewrite(packed, spoil), **EXACT)
    assert "up_proj" in str(e.value)


def test_names_to_skip_are_no_traps(monkeypatch):
    "Older transformers read them as patterns from the beginning: `gate` would keep `gate_proj` out of 4 bits."
    from transformers.quantizers.quantizers_utils import should_convert_module
    def toy(): return nn.ModuleDict({name: nn.Linear(64, 64) for name in ("gate", "gate_proj", "up")})
    model, twin = quantize_model(toy(), skip=("gate",)), toy()
    model.dtype, twin._keep_in_fp32_modules = torch.float32, None
    monkeypatch.setattr(bnb_files, "empty_twin", lambda *_: twin)
    skip, lost = skip_list(model)
    assert not lost and [n for n in model if should_convert_module(n, skip)] == ["gate_proj", "up"]
    if Version(transformers.__version__) < Version("5.24"):  # the control
        assert not should_convert_module("gate_proj", ["gate"])


def test_save_pretrained_is_refused(folder, tmp_path):
    "It would write what nobody reads. Copies refuse too, PEFT saves adapters, and decoded weights can be saved."
    from peft import LoraConfig, get_peft_model
    model, tokenizer = load_model(folder, **EXACT)
    packed = save_quantized(model, tmp_path / "packed", tokenizer)
    for some in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), load_model(packed, **EXACT)[0]):
        with pytest.raises(LabError, match="take save_quantized"): some.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    load_model(packed, quantize=None, **EXACT)[0].save_pretrained(tmp_path / "decoded")
    tokenizer.save_pretrained(tmp_path / "decoded")
    assert torch.equal(logits(load_model(tmp_path / "decoded", quantize=None, **EXACT)[0]),
                       logits(load_model(packed, quantize=None, **EXACT)[0]))
    save_adapter(add_lora(model, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "adapter")
    theirs = get_peft_model(load_model(folder, quantize=None, **EXACT)[0], LoraConfig(r=2, target_modules=["q_proj"]))
    quantize_model(theirs, skip=("lm_head", "default")).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "adapter_config.json").exists()


# answers

def test_surprises_come_without_all_logits(folder, monkeypatch):
    "The head sees a piece of the places at a time, and the numbers are those of all at once."
    from qlora_lab import head_loss
    model, tokenizer = load_model(folder, **EXACT)
    text, rows = "Down, down, down. There was nothing else to do.", []
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad(): whole = model(input_ids=ids).logits[0, :-1]
    want = torch.nn.functional.cross_entropy(whole, ids[0, 1:], reduction="none")
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.numel() // out.shape[-1]))
    monkeypatch.setattr(head_loss, "PIECE", 4 * 4 * whole.shape[-1])
    assert torch.allclose(token_losses(model, tokenizer, text), want, atol=1e-5)
    assert max(rows) <= 4 < len(want)


@pytest.mark.parametrize("names", [None, ["input_ids", "token_type_ids", "attention_mask"]])
def test_a_tokenizer_that_gives_token_types(names, folder):
    "Old configs name them, and generate refuses them."
    if names: reconfigure(folder, "tokenizer_config.json", model_input_names=names)
    model, tokenizer = load_model(folder, **EXACT)
    assert tokenizer.model_input_names == (names or tokenizer.model_input_names)
    assert len(answer(model, tokenizer, ["Hello", "Hello, a longer one"], 3)) == 2
    assert answer(model, tokenizer, []) == []


def takes_segments(call, said, monkeypatch, system="linux", can=True):
    "What the call leaves in an environment where this was said before."
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(segments, "cards_map_memory", lambda: can)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(said))
        call()
        return os.environ


@pytest.mark.parametrize("system, said, can, left", [
    ("linux", {}, True, {ALLOCATOR[1]: "expandable_segments:True"}), ("linux", {}, False, {}), ("win32", {}, True, {}),
    *(("linux", {name: "max_split_size_mb:64"}, True, {name: "max_split_size_mb:64"}) for name in ALLOCATOR)])
def test_segments_that_grow_are_asked_for(system, said, can, left, monkeypatch):
    "Where system and cards have them and nobody has said something of the allocator."
    assert takes_segments(segments.use_expandable_segments, said, monkeypatch, system, can) == left


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", [lambda name: settle(name, torch.bfloat16, None),
                                  lambda name: own_card(torch.device(name))], ids=["load_model", "commands"])
def test_who_chooses_a_card_asks_for_them(call, device, monkeypatch):
    "Before CUDA can have started."
    found = takes_segments(lambda: call(device), {}, monkeypatch)
    assert (ALLOCATOR[1] in found) == (device == "cuda")


SEGMENTS = """
import sys, torch
from qlora_lab.model import load_model
assert torch.cuda.is_available() and not torch.cuda.is_initialized()
load_model(sys.argv[1])
large = [s for s in torch.cuda.memory_snapshot() if s["segment_type"] == "large"]
print(all(s["is_expandable"] for s in large), len(large) > 0)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_lies_in_segments_that_grow(tmp_path):
    "torch has read the wish, though it was imported before."
    folder, env = families.folder("llama", tmp_path, vocab_size=65536), os.environ.copy()
    for name in ALLOCATOR: env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", SEGMENTS, str(folder)], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


@pytest.mark.parametrize("device", devices())
def test_the_base_is_the_same_on_every_device(device, folder):
    "Weights go to 4 bits on the CPU, wherever the model is to be: an adapter trained on a card opens on its own base."
    plain, _ = load_model(folder, quantize=None, **EXACT)
    want = {name: quantize_4bit(m.weight) for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    model, _ = load_model(folder, **EXACT | {"device": device})
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert layers and {m.weight.device.type for m in layers.values()} == {device}
    for name, m in layers.items():
        for part in ("packed", "stats", "absmax2", "offset"):
            assert torch.equal(getattr(m.quantized, part).cpu(), getattr(want[name], part))
    if device == "cuda":  # the control: quantized there, some statistics would be others
        w = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(quantize_4bit(w.to(device)).stats.cpu(), quantize_4bit(w).stats)


@pytest.mark.parametrize("device", devices())
def test_looking_moves_nothing_of_bitsandbytes(device, folder, tmp_path, monkeypatch):
    """`Params4bit.cpu` makes a copy of the weight and moves its statistics themselves: on a card a layer that was
    looked at so would read them in host memory."""
    def moved(*_): raise AssertionError("moved by being looked at")
    save_quantized(*load_model(folder, **EXACT)[:1], tmp_path / "packed", make_tokenizer())
    monkeypatch.setattr("bitsandbytes.nn.Params4bit.to", moved)
    model, tokenizer = load_model(tmp_path / "packed", backend="bnb", **EXACT | {"device": device})
    assert answer(model, tokenizer, "read the file", 2) and memory_bill(model).loc["4-bit codes"].sum()
    assert examine(model, tokenizer).findings and hash_tensors(model.named_parameters())
    assert with_lab_layers(model)
