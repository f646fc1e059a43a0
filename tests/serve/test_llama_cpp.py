"""What llama.cpp makes of the lab's files: logits of every family, tokens of every kind of tokenizer, every type.

The oracle is transformers on the folder that was exported. Models are tiny and random; float32 throughout, so that what
is left is the order of sums.
"""
import json

import gguf
import numpy as np
import pytest
import torch
from families import folder, ids
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from conftest import WORDS, make_llama, make_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make test-serve")

from served import served  # noqa: E402

from qlora_lab.engine.gguf_files import contents, to_gguf  # noqa: E402
from qlora_lab.engine.gguf_types import file_type  # noqa: E402
from qlora_lab.engine.gguf_vocabulary import _CASED, REST, SLASHED  # noqa: E402
from qlora_lab.engine.gguf_vocabulary import WORDS as CUT_WORDS  # noqa: E402
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
    far = np.abs(theirs - ours).max() / ours.std()
    assert far < (4e-3 if "gemma" in model.config.model_type else 1e-4), far


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


TEXT = ("Don't you'RE 1 12 123 1234 12345.67  two   blanks\n\n new\tlines \r\n é café ÀÉ naïve 日本語 🦙🚀 x_y "
        "CamelCase a/b // --- !!! 'tis   \n  end ")


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


# --- types ---

def matrices(file):
    "Name to (type, bytes) of a file's matrices."
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1}


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_the_bytes_of_a_type_are_those_of_llama_cpp(kind, tmp_path):
    "Its quantizer, told to do all matrices alike, against ours; a code may fall to the other side of a tie."
    where, _ = randomized("llama", tmp_path, tie_word_embeddings=False)
    plain, ours = to_gguf(where, "F32"), matrices(to_gguf(where, kind))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = file_type(kind).code, 2, True
    target = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), params) == 0
    theirs = matrices(target)
    alike = [name for name in ours if ours[name][0] == theirs[name][0] == kind]
    assert len(alike) >= 14
    a, b = (np.frombuffer(b"".join(side[n][1] for n in alike), np.uint8) for side in (ours, theirs))
    assert (a != b).mean() < 1e-3


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K", "IQ4_NL", "IQ4_XS"])
def test_types_by_llama_cpp_keep_what_their_bits_allow(kind, tmp_path):
    "256 inputs a layer, so that nothing falls back; the more bits the nearer."
    model = make_llama(hidden=256, layers=2)
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    file = to_gguf(tmp_path / "m", kind)
    row = ids(rows=1, length=40)
    with torch.no_grad(): ours = model(input_ids=row).logits[0].numpy()
    with served(file) as opened: theirs = opened.logits(row[0].tolist())
    far = np.sqrt(((theirs - ours) ** 2).mean()) / ours.std()
    assert far < {"6": 0.06, "5": 0.1, "4": 0.2, "3": 0.4, "2": 0.8}[kind.strip("IQ")[0]]
    held = contents(file)
    wanted = kind.removesuffix("_M").removesuffix("_S")
    assert held.types[wanted] >= 7 and held.bits < {"6": 7.5, "5": 6.8, "4": 6.3, "3": 5.5, "2": 5}[kind.strip("IQ")[0]]


def test_a_full_disk_while_llama_cpp_writes(tmp_path):
    import resource
    make_llama(hidden=256).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    size, limits = contents(to_gguf(tmp_path / "m", "F32", tmp_path / "plain")).mib * 2**20, resource.getrlimit(
        resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size) // 20, limits[1]))
    try:
        with pytest.raises(LabError): to_gguf(tmp_path / "m", "Q6_K")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "plain"]


# --- the course's model ---

def test_greedy_answers_are_the_merged_models(tmp_path):
    "SmolLM2 in F16: the same answer, token by token, with the same end."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_lab.assets import smollm2_folder
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    turn = [{"role": "user", "content": "Write a one-line docstring for `def add(a, b)`."}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text)["input_ids"]
    with torch.no_grad(): whole = model.generate(torch.tensor([asked]), max_new_tokens=16, do_sample=False)[0]
    said = whole[len(asked):]
    with served(to_gguf(smollm2_folder(), "F16", tmp_path / "f16")) as opened:
        assert opened.tokens(text) == asked
        assert opened.answer(asked, len(said)) == said.tolist()


# --- llama.cpp's own converter ---

def converter():
    "The folder with llama.cpp's converter, which came with the source of the wheel."
    import llama_cpp

    from qlora_lab.assets import cache_folder
    place = cache_folder() / "wheels" / f"llama-cpp-python-{llama_cpp.__version__}" / "llama.cpp"
    if not place.is_dir(): pytest.skip("llama.cpp's converter is not in the cache: make test-serve")
    return place


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "llama3"])
def test_a_file_is_what_llama_cpps_converter_writes(name, tmp_path):
    "Tensors byte by byte, and every key that the converter writes; it knows tokenizers by a hash, so none is here."
    import subprocess
    import sys
    family, more = ("llama", dict(rope_parameters=LLAMA3)) if name == "llama3" else (name, CASES[name])
    where, _ = randomized(family, tmp_path, **more)
    code = ("import sys; sys.path.insert(0, '.'); sys.argv[0] = 'convert';"
            "from conversion.base import TextModel; TextModel.set_vocab = lambda self: None;"
            "import conversion.llama, conversion.qwen; conversion.llama.LlamaModel.set_vocab = lambda self: None;"
            "conversion.qwen.Qwen2Model.set_vocab = lambda self: None;"
            "import runpy; runpy.run_path('convert_hf_to_gguf.py', run_name='__main__')")
    target = tmp_path / "theirs.gguf"
    done = subprocess.run([sys.executable, "-c", code, str(where), "--outtype", "f16", "--outfile", str(target)],
                          cwd=converter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (gguf.GGUFReader(f) for f in (to_gguf(where, "F16"), target))
    a, b = ({t.name: (t.tensor_type, t.data.tobytes()) for t in side.tensors} for side in (ours, theirs))
    assert a.keys() == b.keys() and [n for n in a if a[n] != b[n]] == []
    for key, field in theirs.fields.items():
        if key.startswith(("GGUF.", "general.")): continue
        assert ours.fields[key].contents() == pytest.approx(field.contents()), key
