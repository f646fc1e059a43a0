"gpt-oss as it ships: MXFP4 decoded as transformers decodes it, kept, trained through, turned into NF4, written back."
import copy
import json

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import devices
from qlora_lab.bnb_files import save_quantized
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.expert_adapters import adapt_experts
from qlora_lab.engine.experts import Experts4bit, expert_parameters
from qlora_lab.engine.held_experts import HeldExperts
from qlora_lab.engine.mxfp4 import E2M1, ExpertsMX, decode_mxfp4, open_mxfp4, save_mxfp4
from qlora_lab.linear4bit import Linear4bit, PackedWeight, logical_numel, quantize_model, saved_for_backward
from qlora_lab.model import load_model, memory_bill
from qlora_lab.records import LabError

QUANT = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                             "model.embed_tokens", "lm_head"]}


def pack(w):
    "[E, in, out] to blocks [E, out, in / 32, 16] and scales, by the rule of the OCP document."
    groups = w.float().transpose(1, 2).unflatten(-1, (-1, 32))
    power = groups.abs().amax(-1).clamp(min=2. ** -100).log2().floor() - 2
    scaled = groups / torch.exp2(power)[..., None]
    magnitude = (scaled.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (power + 127).to(torch.uint8)


def shipped(where, change=None, config_change=None):
    "A folder as gpt-oss ships, and its tensors."
    model = families.build("gpt_oss", dtype=torch.bfloat16)
    state = {k: t.contiguous() for k, t in model.state_dict().items()}
    for at, _, name in expert_parameters(model):
        blocks, scales = pack(state.pop(f"{at}.{name}"))
        state |= {f"{at}.{name}_blocks": blocks, f"{at}.{name}_scales": scales}
    if change: change(state)
    where.mkdir()
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"quantization_config": QUANT} | (config_change or {})
    (where / "config.json").write_text(json.dumps(config, default=str))
    return state


def config_of(where):
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(where)


def opened(where, **kw): return open_mxfp4(str(where), config_of(where), **kw)


def theirs(where, dtype=torch.float32):
    "transformers' own model, decoded. Its decoder gives bfloat16 whatever is asked for, so the model is cast after."
    from transformers import AutoModelForCausalLM, Mxfp4Config
    model = AutoModelForCausalLM.from_pretrained(where, quantization_config=Mxfp4Config(dequantize=True),
                                                 dtype=torch.bfloat16, experts_implementation="eager")
    for p in model.parameters(): p.data = p.data.to(dtype)  # .to(dtype) would round the position tables
    return model


def both_ways(model):
    "Logits, and the gradient of a sum of them with respect to the embedded tokens."
    embedded = model.get_input_embeddings()(families.ids()).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.dtype)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), embedded)[0]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_decoding_is_exact(dtype, device):
    "Every code under every scale but NaN: the rule of the format in float64, and transformers' own decoder."
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    scales = torch.arange(255, dtype=torch.uint8).view(1, 1, -1)
    blocks = torch.arange(256).view(-1, 16).to(torch.uint8)[None, :, None].expand(1, 16, 255, 16).contiguous()
    got = decode_mxfp4(blocks.to(device), scales.expand(1, 16, 255).to(device), dtype).cpu()
    levels = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    right = (levels[codes] * torch.exp2(scales.double() - 127)[..., None]).flatten(-2)
    assert torch.equal(got, right.to(dtype))
    assert torch.equal(got.transpose(1, 2), convert_moe_packed_tensors(blocks, scales.expand(1, 16, 255), dtype=dtype))
    assert decode_mxfp4(blocks[..., :1, :], torch.full((1, 16, 1), 255)).isnan().all()  # 255 is not a number


def test_opened_as_transformers_opens_it(tmp_path):
    "Every tensor that is not packed, its dtype, and the position tables; then logits and gradients."
    shipped(tmp_path / "made")
    ours, reference = opened(tmp_path / "made"), theirs(tmp_path / "made", torch.bfloat16)
    assert not ours.training and not any(p.is_meta for p in (*ours.parameters(), *ours.buffers()))
    tensors = dict(ours.named_parameters()) | dict(ours.named_buffers())
    for name, t in (*reference.named_parameters(), *reference.named_buffers()):
        if isinstance(ours.get_submodule(name) if name.endswith("_proj") else None, ExpertsMX):
            assert torch.equal(ours.get_submodule(name).decoded(torch.bfloat16), t)
        else: assert tensors[name].dtype == t.dtype and torch.equal(tensors[name], t), name
    a, b = both_ways(opened(tmp_path / "made", dtype=torch.float32)), both_ways(theirs(tmp_path / "made"))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True)) and b[1].abs().max() > 1e-3


def test_what_the_class_keeps_in_float32_stays_so(tmp_path):
    "gpt-oss keeps its norms, where float16 is asked for; so does transformers."
    shipped(tmp_path / "made")
    ours, kept = opened(tmp_path / "made", dtype=torch.float16), {}
    for name, p in ours.named_parameters(): kept.setdefault(p.dtype, []).append(name)
    assert kept[torch.float32] and all("norm" in name for name in kept[torch.float32])
    assert not any("layernorm" in name for name in kept[torch.float16])


def test_written_back_with_the_same_bytes(tmp_path):
    state = shipped(tmp_path / "made")
    model = opened(tmp_path / "made")
    save_mxfp4(copy.deepcopy(model).to(torch.bfloat16), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[k], t) for k, t in state.items())
    a, b = (config_of(tmp_path / n).to_dict() | {"_name_or_path": None} for n in ("again", "made"))
    assert a == b
    assert torch.equal(families.logits(opened(tmp_path / "again")), families.logits(model))
    assert torch.equal(families.logits(theirs(tmp_path / "again")), families.logits(theirs(tmp_path / "made")))


@pytest.mark.parametrize("double_quant", [False, True])
def test_turned_into_nf4(double_quant, tmp_path):
    "The bytes of decoding and quantizing."
    shipped(tmp_path / "made")
    kept = opened(tmp_path / "made")
    for quant_type, blocksize in (("nf4", 64), ("fp4", 128)):
        turned = opened(tmp_path / "made", quantize=quant_type, blocksize=blocksize, double_quant=double_quant)
        for name, held in turned.named_modules():
            if not isinstance(held, Experts4bit): continue
            right = quantize_4bit(kept.get_submodule(name).decoded(torch.bfloat16), quant_type, blocksize, double_quant)
            assert all(torch.equal(getattr(held.whole, k), getattr(right, k)) for k in ("packed", "stats"))
        assert sum(isinstance(m, HeldExperts) for m in turned.modules()) == 4
        assert sum(isinstance(m, Linear4bit) for m in turned.modules()) == 8  # attention, by the ordinary rule
        assert families.logits(turned).isfinite().all()


def test_decoded_on_request(tmp_path):
    shipped(tmp_path / "made")
    plain = opened(tmp_path / "made", quantize=None)
    assert not [m for m in plain.modules() if isinstance(m, HeldExperts)]
    plain.set_experts_implementation("eager")
    assert torch.equal(families.logits(plain), families.logits(theirs(tmp_path / "made", torch.bfloat16)))


def test_trained_through(tmp_path):
    "Adapters on experts that stay in MXFP4: the loss falls, no byte changes, and autograd keeps no decoded expert."
    from peft import LoraConfig
    shipped(tmp_path / "made")
    model = opened(tmp_path / "made", dtype=torch.float32)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    made = adapt_experts(model, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        loss = model(input_ids=families.ids(), labels=families.ids()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01 and len(made) == 4 and len(trained) == 8
    after = {k.replace(".base_layer", ""): t for k, t in model.state_dict().items()}
    assert all(torch.equal(after[k], t) for k, t in before.items())
    with saved_for_backward(model) as kept: model(input_ids=families.ids()).logits.sum()
    assert max(n for *_, n in kept.values()) < made["model.layers.0.mlp.experts.down_proj"].shape.numel()


@pytest.mark.parametrize("change, said", [
    (lambda s: s.pop("model.layers.0.mlp.experts.down_proj_scales"), "down_proj_blocks has no .*_scales"),
    (lambda s: s.pop("model.layers.1.self_attn.q_proj.weight"), "lacks .*q_proj.weight"),
    (lambda s: [s.pop(f"model.layers.1.mlp.experts.down_proj_{k}") for k in ("blocks", "scales")], "lacks .*down_proj"),
    (lambda s: s.update({"model.layers.7.bias": torch.zeros(2)}), "model.layers.7.bias is in the file and not"),
    (lambda s: s.update({"model.norm.weight": torch.zeros(2)}), r"model.norm.weight: \(2,\) in the file"),
    (lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "norm.weight: torch.int8 in the"),
    (lambda s: s["model.layers.0.mlp.experts.down_proj_scales"].__setitem__((1, 2, 0), 255), "not a number"),
    (lambda s: s.update({k: t[:, :-1].contiguous() for k, t in s.items() if "gate_up_proj_" in k and "bias" not in k}),
     "gate_up_proj: .* by config.json")])
def test_a_file_that_does_not_fit_is_refused(change, said, tmp_path):
    shipped(tmp_path / "made", change)
    with pytest.raises(LabError, match=said): opened(tmp_path / "made")


def test_a_file_cut_short_is_refused(tmp_path):
    shipped(tmp_path / "made")
    whole = (tmp_path / "made" / "model.safetensors").read_bytes()
    (tmp_path / "made" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(LabError, match="not a whole safetensors file"): opened(tmp_path / "made")


def test_by_the_names_that_everybody_uses(tmp_path):
    "load_model opens it as it is, with the settings for answers; counted, saved and opened again with the same bytes."
    state = shipped(tmp_path / "made")
    families.tokenizer().save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.5}')
    model, tokenizer = load_model(tmp_path / "made", device="cpu", dtype=torch.bfloat16)
    assert sum(isinstance(m, ExpertsMX) for m in model.modules()) == 4
    assert model.generation_config.eos_token_id == [1, 7]
    bill, codes = memory_bill(model), sum(t.numel() for n, t in state.items() if n.endswith("_blocks"))
    assert bill.loc["4-bit codes", "weights"] == 2 * codes and bill.loc["4-bit codes", "bytes"] == codes
    assert bill.loc["quantization statistics", "bytes"] * 16 == codes
    numbers = sum(p.numel() for p in families.build("gpt_oss").parameters())
    assert logical_numel(model) == bill["weights"].sum() == numbers
    with pytest.raises(LabError, match="save_quantized"): model.save_pretrained(tmp_path / "plain")
    for size in ("5GB", "60KB"):
        again, _ = load_model(save_quantized(model, tmp_path / size, tokenizer, size), device="cpu", dtype=model.dtype)
        assert torch.equal(families.logits(again), families.logits(model))
    written = [n for n in (tmp_path / "60KB").iterdir() if n.suffix == ".safetensors"]
    assert len(written) > 2
    read = load_file(tmp_path / "5GB" / "model.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[k], t) for k, t in state.items())
    made, back = (tmp_path / n / "generation_config.json" for n in ("made", "5GB"))
    assert made.read_bytes() == back.read_bytes()


def test_what_is_asked_for(tmp_path):
    "Another 4-bit type in the blocks that were asked for; what MXFP4 cannot be, and what bitsandbytes cannot."
    shipped(tmp_path / "made")
    families.tokenizer().save_pretrained(tmp_path / "made")
    def load(**kw): return load_model(tmp_path / "made", device="cpu", **kw)[0]
    kinds = {(m.quant_type, m.blocksize, m.absmax2 is not None) for m in load(quantize="fp4", blocksize=128).modules()
             if isinstance(m, PackedWeight)}
    assert kinds == {("fp4", 128, True)}
    assert not any(isinstance(m, (HeldExperts, PackedWeight)) for m in load(quantize=None).modules())
    for kw in (dict(blocksize=64), dict(quantize="mxfp4", double_quant=True)):
        with pytest.raises(LabError, match="stored in MXFP4, blocks of 32"): load(**kw)
    with pytest.raises(LabError, match="nf5"): load(quantize="nf5")
    with pytest.raises(LabError, match="bitsandbytes has no layers for MXFP4"): load(backend="bnb")


def test_linear_layers_in_4_bits_beside_mxfp4(tmp_path):
    "By choice, after the reader; what no config could say is not saved."
    shipped(tmp_path / "made")
    model = quantize_model(opened(tmp_path / "made", dtype=torch.float32))
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 8
    assert sum(isinstance(m, ExpertsMX) for m in model.modules()) == 4 and families.logits(model).isfinite().all()
    with pytest.raises(LabError, match="experts in MXFP4 and .*q_proj in another"):
        save_quantized(model, tmp_path / "q")


def test_what_is_not_in_mxfp4_is_not_saved_as_such(tmp_path):
    shipped(tmp_path / "made")
    with pytest.raises(LabError, match="no experts in MXFP4"):
        save_mxfp4(opened(tmp_path / "made", quantize="nf4"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_sharded_folders_open(tmp_path):
    "Blocks in one file, their scales in another."
    state = shipped(tmp_path / "made")
    (tmp_path / "made" / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for k, t in state.items(): parts["b.safetensors" if "_scales" in k else "a.safetensors"][k] = t
    for file, part in parts.items(): save_file(part, tmp_path / "made" / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: file for file, part in parts.items() for k in part}}
    (tmp_path / "made" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert opened(tmp_path / "made").state_dict().keys() == state.keys()
