"""What llama.cpp makes of the lab's files: logits of every family, tokens of every kind of tokenizer, every type.

The oracle is transformers on the folder that was exported. Models are tiny and random; float32 throughout, so that what
is left is the order of sums.
"""
import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conftest import WORDS, make_llama, make_tokenizer
from families import build, folder, ids

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make test-serve")

from served import served  # noqa: E402

from qlora_lab.engine.gguf_files import contents, to_gguf  # noqa: E402
from qlora_lab.engine.gguf_types import HERE, Type, file_type, packed, tensor_type, unpacked  # noqa: E402
from qlora_lab.engine.gguf_vocabulary import REST, WORDS as CUT_WORDS, _CASED, SLASHED  # noqa: E402
from qlora_lab.records import LabError  # noqa: E402

GEMMA = dict(query_pre_attn_scalar=16, sliding_window=8)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
CASES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "smollm3": dict(num_hidden_layers=4), "gemma": {},
    "gemma2": GEMMA, "gemma3_text": GEMMA,
    "granite": dict(attention_multiplier=0.2, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
}
PLAIN, LINEAR = dict(rope_type="default", rope_theta=1e6), dict(rope_type="linear", rope_theta=1e4, factor=2.0)
ROPES = {
    "llama-llama3": ("llama", LLAMA3), "llama-linear": ("llama", LINEAR), "llama-yarn": ("llama", YARN),
    "qwen3-yarn": ("qwen3", YARN), "mistral-theta": ("mistral", PLAIN),
    "gemma3-linear": ("gemma3_text", dict(full_attention=LINEAR, sliding_attention=PLAIN | dict(rope_theta=1e4)))}


def randomized(name, where, **changes):
    "A folder with a model whose every tensor is random: norms and biases too, which start as ones and zeros."
    from families import FAMILIES, tokenizer
    from transformers import AutoModelForCausalLM
    made = FAMILIES[name]().to_dict() | changes
    from families import config
    kind = made.pop("model_type")
    if "num_hidden_layers" in changes or "layer_types" in made: made.pop("layer_types", None)
    if "num_hidden_layers" in changes: made.pop("no_rope_layers", None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **made), dtype=torch.float32)
    for parameter in model.parameters(): parameter.data += 0.1 * torch.randn_like(parameter)
    target = where / name
    model.eval().save_pretrained(target)
    tokenizer().save_pretrained(target)
    return target, model


def compare(file, model, length=40):
    "llama.cpp has gelu as a table in float16, so Gemma agrees less closely."
    row = ids(rows=1, length=length)
    with torch.no_grad(): ours = model(input_ids=row).logits[0].float().numpy()
    with served(file) as opened: theirs = opened.logits(row[0].tolist())[:, :ours.shape[1]]
    assert np.abs(theirs - ours).max() < (4e-3 if "gemma" in model.config.model_type else 1e-4) * ours.std(), np.abs(theirs - ours).max() / ours.std()


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_family(name, tmp_path):
    where, model = randomized(name, tmp_path, **CASES[name])
    compare(to_gguf(where, "F32"), model)


@pytest.mark.parametrize("name", ROPES)
def test_logits_of_a_rotation(name, tmp_path):
    family, rope = ROPES[name]
    more = GEMMA | dict(num_hidden_layers=6) if family.startswith("gemma") else {}
    where, model = randomized(family, tmp_path, rope_parameters=rope, max_position_embeddings=512, **more)
    compare(to_gguf(where, "F32"), model, length=120)


@pytest.mark.parametrize("changes", [dict(attention_bias=True), dict(mlp_bias=True), dict(head_dim=32)])
def test_llamas_of_other_shapes(changes, tmp_path):
    where, model = randomized("llama", tmp_path, **changes)
    compare(to_gguf(where, "F32"), model)


TEXT = ("Don't you'RE 1 12 123 1234 12345.67  two   blanks\n\n new\tlines \r\n é café ÀÉ naïve 日本語 🦙🚀 x_y CamelCase "
        "a/b // --- !!! 'tis   \n  end ")


def trained(cutter, normalizer=None, byte_level=True, ignore=False):
    "A small tokenizer that cuts a text so."
    inner = Tokenizer(models.BPE(byte_fallback=not byte_level, fuse_unk=not byte_level, ignore_merges=ignore,
                                 unk_token=None if byte_level else "<unk>"))
    inner.pre_tokenizer = cutter
    if normalizer: inner.normalizer = normalizer
    marks = ["<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if byte_level: inner.decoder = decoders.ByteLevel()
    else:
        marks = ["<unk>", *marks, *(f"<0x{i:02X}>" for i in range(256))]
        alphabet = []
    inner.train_from_iterator([*WORDS, TEXT, "1234 123 12 1 12345"] * 3, trainers.BpeTrainer(
        vocab_size=560, special_tokens=marks, show_progress=False, initial_alphabet=alphabet))
    return inner


def wrapped(inner):
    from transformers import PreTrainedTokenizerFast
    more = {"unk_token": "<unk>"} if inner.token_to_id("<unk>") is not None else {}
    spec = json.loads(inner.to_str())
    if more:  # bytes are pieces, not marks
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
        inner = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", clean_up_tokenization_spaces=False,
                                   **more)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(False, False, False)])


BYTES = {
    "gpt-2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])),
    "llama-bpe": lambda: trained(split(CUT_WORDS + r"\p{N}{1,3}" + REST), ignore=True),
    "smaug-bpe": lambda: trained(split(CUT_WORDS + r"\p{N}{1,3}" + REST)),
    "qwen2": lambda: trained(split(CUT_WORDS + r"\p{N}" + REST), normalizers.NFC()),
    "tekken": lambda: trained(split(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{SLASHED}"), ignore=True),
}
_BLANKS = normalizers.Replace(" ", "▁")
PIECES = {
    "llama2": lambda: trained(None, normalizers.Sequence([normalizers.Prepend("▁"), _BLANKS]), byte_level=False),
    "gemma": lambda: trained(pre_tokenizers.Split(" ", "merged_with_previous"), _BLANKS, byte_level=False),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace("▁", "always", False), byte_level=False),
}


@pytest.mark.parametrize("name", [*BYTES, *PIECES])
def test_tokens(name, tmp_path):
    tokenizer = wrapped((BYTES | PIECES)[name]())
    where = tmp_path / "model"
    make_llama(vocab_size=len(tokenizer) + 3, pad_token_id=None, eos_token_id=None).save_pretrained(where)
    tokenizer.save_pretrained(where)
    file = to_gguf(where, "F16")
    with served(file) as opened:
        for text in (TEXT, "a", "  ", "12345", "Hello world", "don't"):
            if name == "metaspace" and text == "  ": continue  # llama.cpp puts a blank before a blank too
            assert opened.tokens(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        marked = "<|im_start|>user\nHi 12<|im_end|>\n"
        assert opened.tokens(marked) == tokenizer(marked, add_special_tokens=False)["input_ids"]
        assert opened.ends_at(tokenizer.eos_token_id)
    if name in BYTES: assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name


def test_every_end_mark_ends_an_answer(tmp_path):
    where = folder("llama", tmp_path)
    said = json.loads((where / "generation_config.json").read_text())
    (where / "generation_config.json").write_text(json.dumps(said | {"eos_token_id": [1, 7, 9]}))
    with served(to_gguf(where, "F16")) as opened:
        assert [opened.ends_at(i) for i in (0, 1, 7, 8, 9)] == [False, True, True, False, True]
