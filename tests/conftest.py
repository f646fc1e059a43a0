"What tests share: a tokenizer and a model small enough to train in a second, the site, and a search without chance."
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
COUNT = itertools.count(1)

FUZZ = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"


def searched(n: int = 100, **how) -> settings:
    "How a test searches: `make test` tries the same n cases each time, `make fuzz` as many new ones as asked."
    wanted = int(os.environ.get("FUZZ_EXAMPLES", "300")) if FUZZ else n
    return settings(max_examples=wanted, derandomize=not FUZZ, deadline=None, **how)


settings.register_profile("searched", searched())  # of tests that say nothing
settings.load_profile("searched")

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORDS = ["read the file", "return the sum", "close a socket", "sort the list", "parse the header", "open an archive",
         "count the words", "join two paths"]


def devices():
    "The CPU, and the GPU where there is one."
    return ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHATML
    return tokenizer


def make_llama(seed=0, layers=2, hidden=64, tie=True, **other):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**dict(
        vocab_size=320, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tie,
        bos_token_id=None, eos_token_id=1, pad_token_id=1) | other)).eval()


def torch_state():
    "What holds for all that a thread does with torch."
    return dict(saved=torch._C._autograd._top_saved_tensors_default_hooks(True), grad=torch.is_grad_enabled(),
                modes=torch._C._len_torch_dispatch_stack(), functions=torch._C._len_torch_function_stack(),
                dtype=torch.get_default_dtype(), threads=torch.get_num_threads(),
                exact=torch.are_deterministic_algorithms_enabled(), autocast=torch.is_autocast_enabled("cpu"))


@pytest.fixture(autouse=True)
def torch_as_it_was():
    "A block that somebody opened is closed again, however the pass in it ended."
    before = torch_state()
    yield
    assert torch_state() == before


@pytest.fixture
def own():
    "A name for a code book, which is free again afterwards."
    from qlora_lab.blockwise import _codebooks
    yield f"own {next(COUNT)}"  # another each time: levels are remembered by name
    for name in [n for n in _codebooks if n.startswith("own ")]: del _codebooks[name]


@pytest.fixture(scope="module")
def one_thread():
    "For steps over a few thousand numbers, in which two threads only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_site(out):
    command = [sys.executable, ROOT/"scripts/build_docs.py", "--renderer", "smalldocs", "--out", out]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The documentation site, built once for all processes of pytest; any warning of the renderer ends the build."
    if os.environ.get("QLORA_LAB_SITE"): return Path(os.environ["QLORA_LAB_SITE"])
    place = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"): place = place.parent  # which all share
    out, whole = place / "docs/site", place / "docs/whole"
    out.parent.mkdir(exist_ok=True)
    with FileLock(place / "docs.lock"):
        if not whole.exists():
            done = build_site(out)
            assert done.returncode == 0, done.stderr[-4000:]
            whole.touch()
    return out


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    "A folder with a random Llama and a tokenizer, as `save_pretrained` writes them."
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    "80 examples in 20 groups, all of which a model of this size can get better at."
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    rows = [{"prompt": f"{w} {i}", "completion": f"{w.capitalize()}.", "group": f"g{i // 4}"}
            for i, w in enumerate(WORDS * 10)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="session")
def data(jsonl):
    from qlora_lab.data import load_jsonl, split
    return split(load_jsonl(jsonl), 0.2)
