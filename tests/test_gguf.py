"""GGUF files without llama.cpp: what is written, what is refused, and that nothing is left behind by what fails.

`tests/serve` opens such files in llama.cpp. Here the oracles are transformers' reader and the tokenizer's rendering.
"""
import json
import re
import resource

import gguf
import numpy as np
import pytest
import torch
from families import folder

from conftest import make_llama, make_tokenizer
from qlora_lab.engine.gguf_adapters import adapter_to_gguf
from qlora_lab.engine.gguf_files import contents, to_gguf
from qlora_lab.engine.gguf_types import HERE, Type, file_type, packed, tensor_type, unpacked
from qlora_lab.engine.gguf_vocabulary import describe_tokenizer
from qlora_lab.engine.modelfile import chain_of, go_template, modelfile
from qlora_lab.manifest import verify
from qlora_lab.records import LabError


@pytest.fixture
def merged(tmp_path):
    make_llama().save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def opened(file):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", HERE)
def test_each_type_holds_its_numbers(kind):
    "A block's error is at most half a step, and a block of zeros stays zero."
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    weight[0] = 0
    held = unpacked(packed(weight, Type[kind], "w"), Type[kind])
    step = np.abs(weight).reshape(8, 2, 32).max(2).repeat(32, 1).reshape(8, 64)
    levels = {"F32": 1e9, "F16": 1e3, "BF16": 150, "Q8_0": 127}.get(kind, 7 if kind[1] == "4" else 15)
    assert (np.abs(held - weight) <= step / levels * 0.6 + 1e-7).all() and not held[0].any()


def test_a_file_is_the_model(merged):
    from transformers import AutoTokenizer
    file = to_gguf(merged, "F32")
    model, ids = make_llama(), torch.arange(12)[None]
    with torch.no_grad(): assert torch.equal(opened(file)(ids).logits, model(ids).logits)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert theirs("read the 12 files").input_ids == make_tokenizer()("read the 12 files").input_ids
    assert theirs.chat_template == make_tokenizer().chat_template
    made = sorted(p.name for p in file.parent.iterdir())
    assert made == ["Modelfile", "README.md", "manifest.json", "model-F32.gguf"]
    steps = json.loads((file.parent / "manifest.json").read_text())["steps"]
    assert verify(file.parent) and steps[-1]["name"] == "export"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_opens_a_family(name, tmp_path):
    from transformers import AutoModelForCausalLM
    where = folder(name, tmp_path, **({"head_dim": 128} if name == "qwen3" else {}))  # which it takes to be 128
    model, ids = AutoModelForCausalLM.from_pretrained(where).eval(), torch.arange(12)[None]
    with torch.no_grad(): far = (opened(to_gguf(where, "F32"))(ids).logits - model(ids).logits).abs().max()
    assert far < 1e-4


def test_a_head_of_its_own_is_written(tmp_path):
    make_llama(tie=False).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    reader = gguf.GGUFReader(to_gguf(tmp_path / "m", "Q4_0"))
    assert {t.name: t.tensor_type.name for t in reader.tensors}["output.weight"] == "Q8_0"


def test_a_window_without_a_place_limits_the_context(tmp_path):
    where = folder("mistral", tmp_path, sliding_window=64)
    fields = gguf.GGUFReader(to_gguf(where, "F16")).fields
    assert fields["llama.context_length"].contents() == 64


def edited(where, file="config.json", **changes):
    path = where / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return where


REFUSED = {
    "another activation": (lambda w: edited(w, hidden_act="gelu"), "hidden_act='gelu'"),
    "a rotation": (lambda w: edited(w, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
                   "rope_type='dynamic'"),
    "half of each head": (lambda w: edited(w, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                                                               "partial_rotary_factor": 0.5}), "part of each head"),
    "quantized weights": (lambda w: edited(w, quantization_config={"load_in_4bit": True}), "quantized"),
    "another family": (lambda w: edited(w, model_type="bloom"), "'bloom' is not written as GGUF"),
    "another shape": (lambda w: edited(w, intermediate_size=96), "the config asks for"),
    "a missing config": (lambda w: (w / "config.json").unlink(), "no config.json"),
    "missing weights": (lambda w: (w / "model.safetensors").unlink(), "no weights"),
    "half a file": (lambda w: (w / "model.safetensors").write_bytes((w / "model.safetensors").read_bytes()[:20000]),
                    "not a whole safetensors file"),
    "no end mark": (lambda w: edited(edited(w, "tokenizer_config.json", eos_token=None), "generation_config.json",
                                     eos_token_id=None), "no end mark"),
    "a run": (lambda w: ((w / "config.json").unlink(), (w / "run.json").write_text("{}")), "a run; merge it first"),
    "an adapter": (lambda w: ((w / "config.json").unlink(), (w / "adapter_config.json").write_text("{}")),
                   "an adapter without its base"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name, merged):
    change, said = REFUSED[name]
    change(merged)
    with pytest.raises(LabError, match=re.escape(said)): to_gguf(merged, "F16")
    assert [p.name for p in merged.parent.iterdir()] == ["merged"]


def test_weights_that_do_not_fit(merged):
    from safetensors.torch import load_file, save_file
    tensors = load_file(merged / "model.safetensors")
    for value, said in ((7e4, "take 'BF16'"), (float("nan"), "not finite")):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
        save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(LabError, match=said): to_gguf(merged, "F16")
    assert [p.name for p in merged.parent.iterdir()] == ["merged"]


def test_another_type_and_a_taken_folder(merged):
    for kind, said in (("Q4KM", "did you mean 'Q4_K_M'"), ("IQ1_S", "importance matrix"), ("int4", "expected one of")):
        with pytest.raises(LabError, match=said): to_gguf(merged, kind)
    taken = merged.parent / "taken"
    taken.mkdir()
    (taken / "mine").write_text("kept")
    with pytest.raises(LabError, match="already holds something"): to_gguf(merged, "F16", taken)
    assert (taken / "mine").read_text() == "kept"


def test_a_full_disk_leaves_nothing(merged, capsys):
    "Files may not grow beyond 64 KiB, as on a disk with no room: one sentence, and no folder."
    from qlora_lab.cli import main
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try: code = main(["export", str(merged), "--gguf", "F16"])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 2 and "cannot be written" in said and said.count("\n") == 1
    assert [p.name for p in merged.parent.iterdir()] == ["merged"]


def test_where_a_result_goes(merged, monkeypatch):
    from qlora_lab.engine.gguf_files import default_out
    monkeypatch.chdir(merged)
    assert default_out(".", "F16") == merged.parent / "merged-F16" and str(default_out("a/b", "F16")) == "a/b-F16"


def test_too_little_room_is_told_before(merged, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda where: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(LabError, match="MiB are free"): to_gguf(merged, "F16")


def test_a_file_cut_short_is_told(merged):
    file = to_gguf(merged, "F16")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(LabError, match="not a whole GGUF file"): contents(file)


def test_rows_that_are_no_blocks_stay_in_16_bits():
    assert tensor_type(file_type("Q4_0"), "blk.0.ffn_up.weight", (8, 40)) == Type.F16
    assert tensor_type(file_type("Q8_0"), "blk.0.attn_norm.weight", (64,)) == Type.F32


# --- tokenizers ---

def test_more_tokens_than_rows_and_other_kinds_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    make_tokenizer().save_pretrained(tmp_path / "t")
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(LabError, match="embedding 100 rows"): describe_tokenizer(writer, tmp_path / "t", 100)
    other = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="a", unk_token="<unk>").save_pretrained(tmp_path / "u")
    with pytest.raises(LabError, match="of the kind Unigram"): describe_tokenizer(writer, tmp_path / "u", 10)


def test_an_unknown_cut_is_refused(tmp_path):
    from tokenizers import Regex, pre_tokenizers
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, False, False)])
    tokenizer.save_pretrained(tmp_path / "t")
    with pytest.raises(LabError, match=r"cuts a text by '\\\\w\+'"):
        describe_tokenizer(gguf.GGUFWriter(None, "llama"), tmp_path / "t", 320)


def test_rows_without_a_token_are_unused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "t")
    writer = gguf.GGUFWriter(None, "llama")
    describe_tokenizer(writer, tmp_path / "t", 320)
    kinds = writer.kv_data[0]["tokenizer.ggml.token_type"].value
    assert len(kinds) == 320 and kinds[-1] == gguf.TokenType.UNUSED and kinds[0] == gguf.TokenType.CONTROL


def test_a_chat_without_the_first_mark_is_served_without_it(tmp_path):
    from tokenizers import processors
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    for template, added in ((tokenizer.chat_template, True), ("{{ messages[0]['content'] }}", False)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "t")
        writer = gguf.GGUFWriter(None, "llama")
        describe_tokenizer(writer, tmp_path / "t", 320)
        assert writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value == added


# --- Modelfile ---

def by_go(template, messages):
    "What Go makes of a template with one range over messages, if, else if and end."
    head, body, tail = re.fullmatch(r"(.*?){{ range \.Messages }}(.*){{ end }}{{ end }}(.*)", template, re.S).groups()
    pairs = re.findall(r'{{ (?:else )?if eq \.Role "(\w+)" }}(.*?)(?={{ else if|\Z)', body, re.S)
    return head + "".join(dict(pairs)[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + tail


HEADED = ("{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
          "{% if add_generation_prompt %}<|head|>assistant\n\n{% endif %}")


@pytest.mark.parametrize("template", [None, HEADED])
def test_a_modelfile_says_what_the_template_says(template):
    tokenizer = make_tokenizer()
    if template: tokenizer.chat_template, tokenizer.bos_token = template, "<s>"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n\n there"},
                {"role": "assistant", "content": "<b>yes</b>"}, {"role": "user", "content": "And 2 + 2?"}]
    text = modelfile("m.gguf", tokenizer, [1], 256)
    written = re.search(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M)[1]
    for some in (messages, messages[1:], messages[1:2]):
        assert by_go(written, some) == tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=True)
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_a_template_that_adds_a_system_text_gives_it():
    tokenizer = make_tokenizer()
    turn = "<|im_start|>system\nYou help.<|im_end|>\n"
    tokenizer.chat_template = f"{{% if messages[0]['role'] != 'system' %}}{turn}{{% endif %}}{tokenizer.chat_template}"
    assert chain_of(tokenizer).system == "You help."
    assert 'SYSTEM """You help."""' in modelfile("m.gguf", tokenizer, [1], 256)


NO_CHAINS = {
    "none": (None, "no chat template"),
    "trims what was said": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim | upper }}\n{% endfor %}",
                            "leaves a message out"),
    "rewrites earlier turns": ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last else "
                               "m['content'] | truncate(4) }}[/]{% endfor %}", ""),
    "refuses a system message": ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}",
                                 "refuses"),
    "braces": ("{% for m in messages %}{{ '{{' }}{{ m['role'] }}{{ m['content'] }}{{ '}}' }}{% endfor %}", "braces"),
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain_is_left_out_with_the_reason(name):
    tokenizer = make_tokenizer()
    tokenizer.chat_template, said = NO_CHAINS[name]
    assert said in chain_of(tokenizer)
    text = modelfile("m.gguf", tokenizer, [1], 256)
    assert "TEMPLATE \"" not in text and "# No TEMPLATE: " in text


def test_nothing_in_a_template_becomes_an_instruction():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", '"""\nFROM /etc/passwd\n')
    lines = modelfile("m.gguf", tokenizer, [1], 256).splitlines()
    assert [line for line in lines if line.startswith("FROM")] == ["FROM ./m.gguf"]


def test_go_template_is_one_line_of_actions():
    assert go_template(chain_of(make_tokenizer())).count("{{ end }}") == 2


# --- adapters ---

def test_an_adapter_alone(tmp_path, merged):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(make_llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["k_proj", "down_proj"],
                                                    alpha_pattern={"down_proj": 3}, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(merged)
    model.save_pretrained(tmp_path / "adapter")
    file = adapter_to_gguf(tmp_path / "adapter")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(file).tensors}
    down = held["blk.1.ffn_down.weight.lora_b"] @ held["blk.1.ffn_down.weight.lora_a"] * 6 / 4
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    assert torch.allclose(down, layer.get_delta_weight("default"), atol=1e-6) and verify(file.parent)
    with pytest.raises(LabError, match="without its base"):
        adapter_to_gguf(tmp_path / "adapter", tmp_path / "x", base="nowhere")
    make_llama(hidden=128).save_pretrained(tmp_path / "other")
    with pytest.raises(LabError, match="made for another model"):
        adapter_to_gguf(tmp_path / "adapter", tmp_path / "x", base=tmp_path / "other")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("more, said", [
    (dict(use_dora=True), "DoRA"), (dict(modules_to_save=["lm_head"]), "pairs of A and B"),
    (dict(bias="all"), "pairs of A and B")])
def test_what_a_gguf_adapter_cannot_hold(more, said, tmp_path, merged):
    from peft import LoraConfig, get_peft_model
    base = make_llama(attention_bias=True)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **more)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LabError, match=said): adapter_to_gguf(tmp_path / "adapter", base=merged)


# --- the command ---

@pytest.mark.parametrize("words, said", [
    ("merged", "expected one of --gguf TYPE, --gptq and --awq"),
    ("merged --gguf Q4_0 --awq", "expected one of"),
    ("merged --gguf Q4KM", "did you mean 'Q4_K_M'?"),
    ("nowhere --gguf F16", "no such folder"),
])
def test_mistakes_of_the_command(words, said, merged, capsys, monkeypatch):
    from qlora_lab.cli import main
    monkeypatch.chdir(merged.parent)
    assert main(["export", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words, package, extra", [("--gguf Q4_K_M", "llama_cpp", "serve"),
                                                   ("--gptq", "llmcompressor", "compress"),
                                                   ("--awq", "compressed_tensors", "compress")])
def test_a_missing_extra_is_named(words, package, extra, merged, capsys, monkeypatch):
    from importlib import util

    from qlora_lab.cli import main
    from qlora_lab.engine import compressed, gguf_files
    def find(name): return None if name == package else util.find_spec("json")
    for module in (compressed, gguf_files): monkeypatch.setattr(module, "find_spec", find)
    assert main(["export", str(merged), *words.split()]) == 2
    assert f"pip install 'qlora-lab[{extra}]'" in capsys.readouterr().err
    assert [p.name for p in merged.parent.iterdir()] == ["merged"]


def test_the_command_writes_a_file(merged, capsys):
    from qlora_lab.cli import main
    assert main(["export", str(merged), "--gguf", "q8_0", "--out", str(merged.parent / "out")]) == 0
    said = capsys.readouterr().out
    assert "model-Q8_0.gguf" in said and "bits a weight" in said and verify(merged.parent / "out")
