"""Every family: opened as transformers opens it, put into 4 bits, saved, opened again here and by transformers.

Bits are compared with transformers' own, and with the files.
"""
import copy
import json
import warnings

import families
import pytest
import torch
from families import FAMILIES, logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_lab.bnb_files import save_quantized
from qlora_lab.casting import cast
from qlora_lab.linear4bit import Linear4bit
from qlora_lab.model import load_model

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
ONLY_LAB = {"falcon": "FalconLinear", "llama4_text": "Llama4TextExperts"}  # transformers makes no 4-bit layers of these

pytestmark = pytest.mark.usefixtures("one_thread")


class Family:
    "A folder with a random model, the lab's 4-bit model of it, and the folder to which that was saved."
    def __init__(self, name, where):
        self.name, self.folder, self.saved = name, families.folder(name, where), where / "saved"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.model, self.tokenizer = load_model(self.folder, **EXACT)
            self.said_loading = [str(w.message) for w in said]
            del said[:]
            save_quantized(self.model, self.saved, self.tokenizer)
            self.said_saving = [str(w.message) for w in said]
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
    assert torch.allclose(logits(plain), family.logits, atol=1e-4)


def test_saved_and_opened_here(family, tmp_path):
    "The same logits, the same bytes when saved again, decoded on request, and in eval mode."
    again, tokenizer = load_model(family.saved, **EXACT)
    assert not again.training and torch.equal(logits(again), family.logits)
    again.load_state_dict(family.model.state_dict())
    assert torch.equal(logits(again), family.logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_quantized(again, tmp_path / "again", tokenizer)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (family.saved / "model.safetensors").read_bytes()
    plain, _ = load_model(family.saved, quantize=None, **EXACT)
    assert not any(isinstance(m, Linear4bit) for m in plain.modules())
    assert torch.allclose(logits(plain), family.logits, atol=1e-5)


def test_saved_and_opened_by_transformers(family):
    "The same logits with bitsandbytes' layers; where transformers makes none of a class, it is said while saving."
    quantization = json.loads((family.saved / "config.json").read_text())["quantization_config"]
    if family.name in ONLY_LAB:
        assert quantization["quant_method"] == "qlora_lab" and ONLY_LAB[family.name] in family.said_saving[0]
        return
    assert quantization["quant_method"] == "bitsandbytes" and not family.said_saving
    theirs, info = AutoModelForCausalLM.from_pretrained(family.saved, output_loading_info=True, device_map={"": "cpu"})
    assert not any(info.values())
    assert torch.allclose(logits(theirs.train()), family.logits, atol=1e-3)  # eval mode would repack the weights


def test_bitsandbytes_quantizes_the_same_layers(family, tmp_path):
    "To the same bytes, as far as it quantizes them; and what it writes, in shards and as floats, the lab opens."
    if family.name in ONLY_LAB: pytest.skip("transformers makes no such 4-bit layers")
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
    assert not ours_alone - their_own and all("dt_proj" in n for n in their_own - ours_alone)


def test_what_the_file_holds_is_what_the_model_holds(family):
    "Codes, scales and all else under the model's own names; nothing twice."
    stored, state = load_file(family.saved / "model.safetensors"), family.model.state_dict()
    assert stored.keys() <= state.keys() and all(torch.equal(t, state[n]) for n, t in stored.items())
    left = state.keys() - stored.keys()
    assert all(any(state[n].data_ptr() == state[m].data_ptr() for m in stored) for n in left)
