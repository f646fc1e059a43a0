"""Every family: opened as transformers opens it, put into 4 bits, saved, opened again here and by transformers.

Bits are compared with transformers' own, and with the files.
"""
import copy
import json
import os
import subprocess
import sys
import warnings

import families
import pytest
import torch
from families import FAMILIES, logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_lab.bnb_files import save_quantized
from qlora_lab.casting import cast
from qlora_lab.engine.experts import Experts4bit
from qlora_lab.linear4bit import Linear4bit, PackedWeight
from qlora_lab.model import load_model

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
ONLY_LAB = {"falcon": "FalconLinear", "mixtral": "MixtralExperts", "olmoe": "OlmoeExperts",
            "qwen2_moe": "Qwen2MoeExperts", "qwen3_moe": "Qwen3MoeExperts", "qwen3_next": "Qwen3NextExperts",
            "gpt_oss": "GptOssExperts", "deepseek_v3": "DeepseekV3Experts", "glm4_moe": "Glm4MoeExperts",
            "llama4_text": "Llama4TextExperts"}  # transformers makes no 4-bit layers of these

pytestmark = pytest.mark.usefixtures("one_thread")


class Family:
    "A folder with a random model, the lab's 4-bit model of it, and the folders to which that was saved, both ways."
    def __init__(self, name, where):
        self.name, self.folder = name, families.folder(name, where)
        self.saved, self.kept = where / "saved", where / "kept"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.model, self.tokenizer = load_model(self.folder, **EXACT)
            self.said_loading = [str(w.message) for w in said]
            del said[:]
            save_quantized(self.model, self.saved, self.tokenizer)
            self.said_saving = [str(w.message) for w in said]
            del said[:]
            save_quantized(self.model, self.kept, self.tokenizer, decode=False)
            self.said_keeping = [str(w.message) for w in said]
        self.logits = logits(self.model)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def tensors(model):
    "Every parameter and buffer, under each of its names."
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _packed(found, name): return name in found and found[name].dtype == torch.uint8


def test_dtypes_are_those_of_transformers(family):
    "Name, dtype and bits of all that is not in 4 bits: rotary frequencies, router biases, what is kept in float32."
    dtype = torch.float16 if family.name == "gpt_oss" else torch.bfloat16  # gpt_oss keeps its norms, in float16 alone
    theirs = tensors(AutoModelForCausalLM.from_pretrained(family.folder, dtype=dtype))
    plain = tensors(load_model(family.folder, quantize=None, dtype=dtype, device="cpu")[0])
    assert plain.keys() == theirs.keys()
    for ours in (plain, tensors(cast(copy.deepcopy(family.model), dtype))):
        both = [n for n in ours if n in theirs and ours[n].dtype != torch.uint8]
        assert not [n for n in both if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]


def test_a_forward_pass_is_that_of_the_decoded_weights(family):
    "transformers' model with our decoded weights in it: Conv1D's are stored the other way round."
    plain = AutoModelForCausalLM.from_pretrained(family.folder, dtype=torch.float32)
    layers = {n: m for n, m in family.model.named_modules() if isinstance(m, Linear4bit)}
    assert layers and not family.model.training
    for name, layer in layers.items():
        weight, decoded = plain.get_submodule(name).weight, layer.quantized.dequantize(torch.float32)
        weight.data.copy_(decoded.t() if type(plain.get_submodule(name)).__name__ == "Conv1D" else decoded)
    held = {n: m for n, m in family.model.named_modules() if isinstance(m, Experts4bit)}
    assert bool(held) == (family.name in ONLY_LAB and family.name != "falcon")
    for name, m in held.items(): plain.get_parameter(name).data.copy_(m.whole.dequantize(torch.float32))
    assert torch.allclose(logits(plain), family.logits, atol=1e-4)


def quantization_of(folder): return json.loads((folder / "config.json").read_text())["quantization_config"]


def opened(folder):
    "A folder opened here; little of it may be in 4 bits."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(folder, **EXACT)


@pytest.mark.parametrize("form", ["saved", "kept"])
def test_saved_and_opened_here(family, form, tmp_path):
    "The same logits, the same bytes when saved again, decoded on request, and in eval mode."
    saved = getattr(family, form)
    again, tokenizer = opened(saved)
    found, decoded = logits(again), form == "saved" and family.name in ONLY_LAB  # decoded experts are other products
    assert not again.training
    assert torch.allclose(found, family.logits, atol=1e-5) if decoded else torch.equal(found, family.logits)
    if form == "kept":
        again.load_state_dict(family.model.state_dict())
        assert torch.equal(logits(again), family.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_quantized(again, tmp_path / "again", tokenizer, decode=form == "saved")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert quantization_of(tmp_path / "again") == quantization_of(saved)
    plain, _ = load_model(saved, quantize=None, **EXACT)
    assert not any(isinstance(m, PackedWeight) for m in plain.modules())
    assert torch.allclose(logits(plain), family.logits, atol=1e-5)


def test_saved_and_opened_by_transformers(family):
    "The same logits; where transformers makes no 4-bit layer of a class, its weights are decoded, and that is said."
    assert quantization_of(family.saved)["quant_method"] == "bitsandbytes"
    assert len(family.said_saving) == (family.name in ONLY_LAB)
    theirs, info = AutoModelForCausalLM.from_pretrained(family.saved, output_loading_info=True, device_map={"": "cpu"})
    assert not any(info.values())
    assert torch.allclose(logits(theirs.train()), family.logits, atol=1e-3)  # eval mode would repack the weights
    if family.name not in ONLY_LAB: return
    numbers = sum(m.quantized.shape.numel() for m in lost(family.model))
    assert f"{numbers:,} weights of {ONLY_LAB[family.name]} are written decoded" in family.said_saving[0]
    assert "decode=False" in family.said_saving[0]


def lost(model):
    "The 4-bit layers of which transformers makes none."
    held = [m for m in model.modules() if isinstance(m, Experts4bit)]
    return held or [m for m in model.modules() if isinstance(m, Linear4bit)]


def test_kept_in_4_bits_for_the_lab(family):
    "Nothing decoded: half a byte a weight; the config names the lab's method, where transformers could not open it."
    method = quantization_of(family.kept)["quant_method"]
    assert method == ("qlora_lab" if family.name in ONLY_LAB else "bitsandbytes")
    assert len(family.said_keeping) == (family.name in ONLY_LAB)
    if family.said_keeping: assert ONLY_LAB[family.name] in family.said_keeping[0]
    again, _ = opened(family.kept)
    assert len(lost(again)) == len(lost(family.model))


MISLEADING = {  # families whose names lead a reader astray
    "jetmoe": families.of("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=16),
    "laguna": families.of("laguna", head_dim=16, **families.EXPERTS)}


@pytest.mark.parametrize("name", MISLEADING)
def test_misleading_names_come_back(name, tmp_path, monkeypatch):
    "JetMoE calls a parameter of experts `weight`; a rule for older files renames Laguna's shared experts."
    monkeypatch.setitem(FAMILIES, name, MISLEADING[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family = Family(name, tmp_path)
        again = {form: opened(getattr(family, form))[0] for form in ("saved", "kept")}
        save_quantized(again["kept"], tmp_path / "again", family.tokenizer, decode=False)
    assert torch.equal(logits(again["kept"]), family.logits)
    assert torch.allclose(logits(again["saved"]), family.logits, atol=1e-5)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (family.kept / "model.safetensors").read_bytes()
    theirs, info = AutoModelForCausalLM.from_pretrained(family.saved, output_loading_info=True, device_map={"": "cpu"})
    assert not any(info.values()) and torch.allclose(logits(theirs.train()), family.logits, atol=1e-3)


ALONE = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids, out = torch.tensor(eval(sys.argv[2])), {}
with torch.no_grad():
    for name in sys.argv[3:]:
        model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", device_map={"": "cpu"})
        out[name] = model.train()(input_ids=ids).logits.float()
assert not any(name.startswith("qlora_lab") for name in sys.modules)
save_file(out, sys.argv[1] + "/logits.safetensors")
"""


def test_without_the_lab(tmp_path):
    "A process that never imports it opens what was written for every family of which something is decoded."
    from qlora_lab.linear4bit import quantize_model
    want = {}
    for name in ("llama", *ONLY_LAB):
        model = quantize_model(families.build(name), compute_dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_quantized(model, tmp_path / name)
        want[name] = logits(model)
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path), str(families.ids().tolist()), *want],
                   check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    got = load_file(tmp_path / "logits.safetensors")
    assert {n: torch.allclose(got[n], t, atol=1e-4) for n, t in want.items()} == dict.fromkeys(want, True)


def test_bitsandbytes_quantizes_the_same_layers(family, tmp_path):
    "To the same bytes, as far as it quantizes them; and what it writes, in shards and as floats, the lab opens."
    if family.name == "falcon": pytest.skip("transformers makes no such 4-bit layers")
    from transformers import BitsAndBytesConfig
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(family.folder, dtype=torch.float32, device_map={"": "cpu"},
                                                  quantization_config=how)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    family.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    opened, _ = load_model(tmp_path, **EXACT)
    ours, read = tensors(family.model), tensors(opened)
    packed = [n for n in read if read[n].dtype == torch.uint8]
    assert packed and all(torch.equal(read[n], ours[n]) for n in packed if _packed(ours, n))
    ours_alone = {n for n, m in family.model.named_modules() if isinstance(m, Linear4bit)}
    their_own = {n for n, m in opened.named_modules() if isinstance(m, Linear4bit)}
    read = ("dt_proj", "x_proj", "out_proj") if "mamba" in family.name else ()  # in passing, some in training alone
    assert not ours_alone - their_own and all(n.endswith(read) for n in their_own - ours_alone)


def test_what_the_file_holds_is_what_the_model_holds(family):
    "Codes, scales and all else under the model's own names; nothing twice."
    stored, state = load_file(family.kept / "model.safetensors"), family.model.state_dict()
    assert stored.keys() <= state.keys() and all(torch.equal(t, state[n]) for n, t in stored.items())
    left = state.keys() - stored.keys()
    assert all(any(state[n].data_ptr() == state[m].data_ptr() for m in stored) for n in left)
