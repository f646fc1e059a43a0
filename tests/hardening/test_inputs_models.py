"Folders of models and adapters in which one file is wrong: refused by its name, or opened; nothing else happens."
import json
import shutil

import pytest
import torch
from bad_inputs import NESTED, as_text, refusal, refused, spoiled_bytes, spoiled_value, spoilings, written
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from conftest import make_llama, make_tokenizer
from qlora_lab.bnb_files import save_quantized
from qlora_lab.lora import add_lora, load_adapter, save_adapter
from qlora_lab.model import load_model

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def bare(): return make_llama(hidden=32, layers=1)


def opened(folder): load_model(folder, **EXACT)


def attached(folder): load_adapter(bare(), folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A model, the same in 4 bits, and an adapter for it, as the lab and transformers write them."
    place, tokenizer = tmp_path_factory.mktemp("sound"), make_tokenizer()
    bare().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    model, _ = load_model(place / "model", **EXACT)
    save_quantized(model, place / "packed", tokenizer)
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    save_adapter(model, place / "adapter")
    return place


FILES = [("model", "config.json", opened, 12), ("model", "tokenizer.json", opened, 12),
         ("model", "tokenizer_config.json", opened, 4), ("model", "generation_config.json", opened, 2),
         ("model", "model.safetensors", opened, 10), ("packed", "config.json", opened, 8),
         ("packed", "model.safetensors", opened, 10), ("adapter", "adapter_config.json", attached, 8),
         ("adapter", "adapter_model.safetensors", attached, 8)]


@pytest.mark.parametrize("kind, file, read, least", FILES, ids=[f"{kind}-{file}" for kind, file, *_ in FILES])
def test_one_odd_file(kind, file, read, least, sound, tmp_path):
    "Values exchanged in JSON, bytes in all; `least` of 24 are refused, and the folder as it was is opened."
    folder = shutil.copytree(sound / kind, tmp_path / "folder")
    read(folder)
    whole, said = (folder / file).read_bytes(), []
    for seed in spoilings(24):
        if file.endswith(".json") and seed % 5: new = as_text(spoiled_value(json.loads(whole), seed))
        else: new = spoiled_bytes(whole, seed, 1500)
        written(folder / file, new)
        said.append(refusal(read, folder, file))
    assert sum(s is not None for s in said) >= least


def change(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SIZES = dict(num_hidden_layers=2**31, vocab_size=2**31, hidden_size=2**20, intermediate_size=2**40, head_dim=2**31,
             num_attention_heads=2**40)


@pytest.mark.parametrize("kind", ["model", "packed"])
@pytest.mark.parametrize("field", SIZES)
def test_a_size_out_of_proportion(kind, field, sound, tmp_path):
    "Refused at once, before memory is taken for it."
    folder = shutil.copytree(sound / kind, tmp_path / "folder")
    change(folder, "config.json", **{field: SIZES[field]})
    assert "config.json: " in refused(opened, folder, "config.json")


@pytest.mark.parametrize("where", ["vocabulary", "added"])
def test_a_token_with_a_number_out_of_proportion(where, sound, tmp_path):
    "tokenizers would make a list as long as the largest number."
    folder = shutil.copytree(sound / "model", tmp_path / "folder")
    told = json.loads((folder / "tokenizer.json").read_text())
    if where == "vocabulary": told["model"]["vocab"]["a"] = 2**31
    else: told["added_tokens"][0]["id"] = 2**31
    written(folder / "tokenizer.json", json.dumps(told))
    assert "no vocabulary is that large" in refused(opened, folder, "tokenizer.json")


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_cannot_be_quantized(odd, sound, tmp_path):
    "The model and the layer are named."
    folder = shutil.copytree(sound / "model", tmp_path / "folder")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj"
    state[f"{name}.weight"][3, 4] = odd
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(opened, folder, "model.safetensors")


@pytest.mark.parametrize("added", [1, True, "x", {"a": 1}, [1], [[]]])
def test_added_tokens_that_are_no_list(added, sound, tmp_path):
    "Looked through for numbers out of proportion; what they are besides is the library's to refuse."
    folder = shutil.copytree(sound / "model", tmp_path / "folder")
    told = json.loads((folder / "tokenizer.json").read_text()) | {"added_tokens": added, "more": [2**31]}
    written(folder / "tokenizer.json", json.dumps(told))
    refused(opened, folder, "tokenizer.json")


@pytest.mark.parametrize("field, value, told", [
    ("r", 2**31, "rank 2147483648"), ("r", 0, "at least 1"), ("r", "8", "whole number"), ("lora_alpha", [], "finite"),
    ("lora_alpha", float("nan"), "finite"), ("lora_dropout", 1.5, "below 1"), ("target_modules", 5, "names of layers"),
    ("rank_pattern", {"q_proj": 2**31}, "rank"), ("rank_pattern", ["q_proj"], "patterns"),
    ("target_modules", "(" * 50, "regular expression"), ("target_modules", "(.*)*x", "for ever"),
    ("target_modules", r"(\w+\.?)+\d", "for ever"), ("rank_pattern", {"(ab|a[a-z]*)*0": 4}, "for ever"),
    ("target_modules", ["q_proj", 1], "names of layers"),
    ("modules_to_save", "lm_head", "names of modules"), ("layers_to_transform", [-1], "numbers of layers"),
    ("use_rslora", "yes", "true or false"), ("bias", [], "bias"), ("peft_type", [], "peft_type"),
    ("init_lora_weights", {}, "init_lora_weights"), ("monteclora_config", {"": ""}, "monteclora_config"),
    ("arrow_config", {"a": {"b": []}}, "arrow_config"),
    ("target_parameters", "x", "names of modules"), ("lora_alpha", 10**400, "finite")])
def test_a_setting_of_an_adapter_of_another_kind(field, value, told, sound, tmp_path):
    folder = shutil.copytree(sound / "adapter", tmp_path / "folder")
    change(folder, "adapter_config.json", **{field: value})
    assert told in refused(attached, folder, "adapter_config.json")


HEADERS = {
    "2^60 bytes": (2**60).to_bytes(8, "little") + b"{}", "2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "100 MB and no more": (10**8).to_bytes(8, "little") + b"{", "nothing": b"", "seven bytes": b"\0" * 7,
    "no object": (2).to_bytes(8, "little") + b"[]",
    "a tensor of 2^60 numbers": b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}',
    "sizes that overflow": b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}',
    "places beyond the end": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4294967296,4294967304]}}',
    "places that overlap": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
                           b'"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "backwards": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}',
    "a size below zero": b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
    "an unknown dtype": b'{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}',
    "deep": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "many names": json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)})}


@pytest.mark.parametrize("kind", HEADERS)
def test_crafted_weights(kind, sound, tmp_path):
    "In a model, a 4-bit model and an adapter: no memory is taken for what a header claims."
    head = HEADERS[kind] if isinstance(HEADERS[kind], bytes) else HEADERS[kind].encode()
    raw = head if head[:1] != b"{" else len(head).to_bytes(8, "little") + head + bytes(16)
    for name, file, read in (("model", "model.safetensors", opened), ("packed", "model.safetensors", opened),
                             ("adapter", "adapter_model.safetensors", attached)):
        folder = shutil.copytree(sound / name, tmp_path / name)
        written(folder / file, raw)
        refused(read, folder, file)


META = {"shape": [2**40, 2**40], "blocksize": 0, "dtype": "Tensor", "quant_type": ["nf4"], "nested_offset": "0",
        "nested_blocksize": 2**70}


@pytest.mark.parametrize("field", [*META, "no object", "no JSON", "deep"])
def test_crafted_statistics(field, sound, tmp_path):
    "The JSON beside a 4-bit weight is looked at field by field."
    folder = shutil.copytree(sound / "packed", tmp_path / "folder")
    state = load_file(folder / "model.safetensors")
    name = next(n for n in state if "quant_state.bitsandbytes__" in n)
    meta = json.loads(bytes(state[name].tolist()))
    text = {"no object": "[]", "no JSON": "{", "deep": NESTED[:4000] + NESTED[-4000:]}.get(field)
    raw = (text or json.dumps(meta | {field: META.get(field)})).encode()
    state[name] = torch.tensor(list(raw), dtype=torch.uint8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused(opened, folder)
    assert "quant_state" in said or "second-level block size" in said or "code book" in said


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json",
                                  "adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [NESTED, '{"a":' * 50_000 + "1" + "}" * 50_000, '{"a": ' + "9" * 5000 + "}", "[]",
                                     '"x"', "null", "", "\0" * 4096, '{"a": "\udc80"}'], ids=range(9))
def test_a_bomb_of_json(file, content, sound, tmp_path):
    "Nested without an end, of digits without an end, of another kind, empty: nothing is built of it."
    read, kind = (attached, "adapter") if file.startswith("adapter") else (opened, "model")
    folder = shutil.copytree(sound / kind, tmp_path / "folder")
    written(folder / file, content)
    refused(read, folder, file)


def test_a_file_that_is_too_large_to_be_a_config(sound, tmp_path):
    "A sparse file of 10 GiB is refused by its size."
    folder = shutil.copytree(sound / "model", tmp_path / "folder")
    with (folder / "generation_config.json").open("r+b") as f: f.truncate(10 << 30)
    assert "larger than 64 MiB" in refused(opened, folder, "generation_config.json")
