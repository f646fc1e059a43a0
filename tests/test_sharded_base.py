"""A base spread over processes gives the losses and gradients of a whole one, to the bit, or says why it does not.

Protects: 4-bit weights that are cut, sent, put together and decoded; what is refused; that nothing stays whole.
"""
import copy
import os
import socket
import tempfile
import time
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import families
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from several import several
from torch import nn

from conftest import make_llama, make_tokenizer
from qlora_lab import head_loss
from qlora_lab.bnb_files import save_quantized
from qlora_lab.checkpointing import checkpoint_layers, decoder_layers
from qlora_lab.double_quant import QuantizedTensor
from qlora_lab.engine import sharded_base
from qlora_lab.engine.dispatch import faster
from qlora_lab.engine.fusing import fits, fuse_layers, is_fused
from qlora_lab.engine.gathered import bytes_held, gathered_bytes, unsharded
from qlora_lab.engine.recordable import overheard
from qlora_lab.engine.sharded_base import shard_base
from qlora_lab.engine.step_graph import forward_backward
from qlora_lab.linear4bit import Linear4bit, PackedWeight, logical_numel, quantize_model
from qlora_lab.loading import kinds_of
from qlora_lab.lora import add_lora, save_adapter, trainable
from qlora_lab.memory import ledger
from qlora_lab.merged_model import check_mergeable
from qlora_lab.model import answer, memory_bill
from qlora_lab.processes import all_say, joined, let_go_at_end, own_card, rank
from qlora_lab.records import LabError
from qlora_lab.shards import here, is_shard
from qlora_lab.train import summed_loss


@pytest.fixture(scope="module")
def run():
    with several() as found: yield found


def adapted(model, targets="all-linear", seed=0, **more):
    "The model with adapters whose second halves are not zero."
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **more), seed)
    generator = torch.Generator().manual_seed(seed)
    for p in trainable(model): p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.05
    return model.train()


def llama(double_quant=True, blocksize=64, quant_type="nf4", targets="all-linear", hidden=64, **shape):
    model = make_llama(hidden=hidden, layers=3, **shape)
    return adapted(quantize_model(model, quant_type, blocksize, double_quant), targets)


def batch(seed=0, tokens=13):
    ids = torch.randint(0, 100, (2, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def both_ways(model, loss=summed_loss, data=None):
    "Loss, and the gradients of all that learns."
    found = loss(model, data or batch())
    found.backward()
    grads = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    return found.detach(), grads


def equal(a, b): return torch.equal(a[0], b[0]) and all(map(torch.equal, a[1], b[1])) and len(a[1]) == len(b[1]) > 0


def spread_equals(model, **how):
    "Whether two passes each way, after spreading, give what they gave before, and leave nothing whole."
    before = both_ways(model)
    assert before[0].isfinite() and any(g.abs().max() > 0 for g in before[1])
    shard_base(model, **how)
    if "lora_config" in model.__dict__: assert all(not is_shard(p) for p in trainable(model))
    pairs = [both_ways(model), both_ways(model)]
    assert model not in head_loss._WHOLE, "the head saw all places at once"
    return all(equal(before, pair) for pair in pairs) and not gathered_bytes(model)


def raised(action, kind=LabError):
    try: action()
    except kind as e: return str(e)
    return None


# --- equal to the bit ---------------------------------------------------------------------------------------------

def shared_between_layers():
    "Two layers with one weight, its statistics too."
    model = make_llama(layers=3)
    a, b = (model.model.layers[i].mlp for i in (0, 2))
    b.up_proj.weight = a.up_proj.weight
    model = quantize_model(model)
    assert a.up_proj.weight is b.up_proj.weight and a.up_proj.stats is b.up_proj.stats
    return adapted(model, ["q_proj", "down_proj"])


KINDS = {
    "tied": llama, "untied": lambda: llama(tie=False),
    "single scales": lambda: llama(double_quant=False),
    "fp4, blocks of 4096": lambda: llama(quant_type="fp4", blocksize=4096),
    "odd shapes": lambda: llama(hidden=40, intermediate_size=37, vocab_size=331, blocksize=128),
    "bias": lambda: llama(attention_bias=True, mlp_bias=True),
    "16 bits": lambda: adapted(make_llama(layers=3).to(torch.bfloat16).requires_grad_(False)),
    "embeddings adapted": lambda: llama(targets=["embed_tokens", "q_proj", "lm_head"], tie=False),
    "a copy that learns": lambda: llama_with_copy(),
    "shared weight": shared_between_layers,
}


def llama_with_copy():
    return adapted(quantize_model(make_llama(tie=False)), ["q_proj"], modules_to_save=["lm_head"])


def many_kinds(names): return {name: spread_equals(KINDS[name]()) for name in names}


@pytest.mark.parametrize("count", [2, 3])
def test_a_spread_base_computes_as_a_whole_one(run, count):
    "Losses and gradients, two steps, on each process."
    names = list(KINDS) if count == 2 else ["untied", "odd shapes"]
    for found in run(count, many_kinds, names): assert found == dict.fromkeys(names, True)


class Block(nn.Module):
    "Two odd matrices: fewer bytes, scales and rows than a boundary between processes would like."
    def __init__(self, width=3, inner=5):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x): return x + self.down(self.up(x).tanh())


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.out = nn.ModuleList(Block() for _ in range(3)), nn.Linear(3, 1)

    def forward(self, x):
        for layer in self.layers: x = layer(x)
        return self.out(x)


def toys():
    found = {}
    for double_quant in (True, False):
        torch.manual_seed(0)
        model = quantize_model(Toy(), double_quant=double_quant, skip=("out",)).requires_grad_(False)
        x = torch.randn(4, 3, requires_grad=True)
        before = torch.autograd.grad(model(x).sum(), x)
        shard_base(model)
        after = torch.autograd.grad(model(x).sum(), x)
        local = here(model.layers[0].up.weight).numel()
        found[double_quant] = torch.equal(*before, *after), local, model.layers[0].up.weight.numel()
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_tensors_smaller_than_the_number_of_processes(run, count):
    "8 bytes of codes, one scale, a second scale, an offset: some processes have nothing of a tensor."
    results = run(count, toys)
    for double_quant in (True, False):
        assert all(found[double_quant][0] for found in results)
        assert sum(found[double_quant][1] for found in results) == results[0][double_quant][2] == 8


def experts(folder):
    import test_mxfp4
    found = {}
    for name, build in {"mixtral": lambda: quantize_model(families.build("mixtral")),
                        "gpt_oss": lambda: quantize_model(families.build("gpt_oss")),
                        "mxfp4": lambda: test_mxfp4.opened(folder, dtype=torch.float32)}.items():
        for more in ({}, {"target_parameters": ["experts.down_proj"]}):
            model = adapted(build().requires_grad_(False), ["q_proj", "o_proj"], **more)
            held = [m for m in model.modules() if hasattr(m, "decode") and "LoRA" not in type(m).__name__]
            same = spread_equals(model)
            found[name, len(more)] = len(held), same, raised(lambda held=held: held[0].decode(0, torch.float32))
    return found


def test_held_experts(run, tmp_path):
    "Packed as one tensor, and MXFP4 as gpt-oss ships it; an expert is not decoded from a part."
    import test_mxfp4
    test_mxfp4.shipped(tmp_path / "made")
    for found in run(2, experts, tmp_path / "made"):
        assert all(count and same and "spread" in said for count, same, said in found.values()), found


# --- bitsandbytes --------------------------------------------------------------------------------------------------

def by_bnb(storage, nested=True):
    "bitsandbytes' layers with codes in that type, under PEFT's adapters."
    import bitsandbytes as bnb
    model = make_llama(layers=2)
    for parent in list(model.model.layers.modules()):
        for name, child in [(n, c) for n, c in parent.named_children() if type(c) is nn.Linear]:
            new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.float32,
                                    quant_type="nf4", compress_statistics=nested, quant_storage=storage)
            new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=new,
                                           compress_statistics=nested, quant_storage=storage)
            setattr(parent, name, new.to("cpu"))
            if storage == torch.uint8: new.quant_state = None  # then the parameter alone knows it
    model.is_loaded_in_4bit = True
    model = get_peft_model(model.requires_grad_(False), LoraConfig(r=4, target_modules="all-linear"))
    for p in trainable(model): p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    return model.train()


STORAGES = torch.uint8, torch.bfloat16, torch.float16, torch.float32


def bnb_kinds():
    found = {}
    for storage in STORAGES:
        model = by_bnb(storage)
        codes = next(m for m in model.modules() if hasattr(m, "quant_state")).weight
        assert codes.dtype == storage
        kinds, folder = kinds_of(model), tempfile.mkdtemp()
        assert len(kinds) == 1
        model.save_pretrained(f"{folder}/whole")
        found[storage] = spread_equals(model) and kinds_of(model) == kinds != []
        model.save_pretrained(f"{folder}/spread")  # adapters, by PEFT's own wrapper
        a, b = (load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("whole", "spread"))
        found[storage] &= a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items()) and len(a) > 0
        with torch.no_grad(): model.eval()(batch()["input_ids"])  # on some CPUs it would repack the codes
        found[storage] &= equal(both_ways(model.train()), both_ways(by_bnb(storage)))
        found["bill", storage] = memory_bill(model).loc["4-bit codes", "weights"]
    return found


def test_bitsandbytes_in_any_storage(run):
    "Bytes are cut as bytes: a storage type of floats, another one than all else has, is never cast."
    results = run(2, bnb_kinds)
    weights = memory_bill(by_bnb(torch.uint8)).loc["4-bit codes", "weights"]
    for found in results: assert all(found[storage] for storage in STORAGES)
    for storage in STORAGES: assert sum(found["bill", storage] for found in results) == weights


def cast_on_the_way():
    "As a policy of mixed precision does it with codes that pass for floats."
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    model = by_bnb(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with patch.object(sharded_base, "_wrap", lambda m, how, offload: fully_shard(m, mp_policy=policy, **how)):
        fine = raised(lambda: shard_base(model))  # norms in float32 are cast, which the proof sees
    with patch.object(sharded_base, "_wrap", lambda m, how, offload: fully_shard(m, mp_policy=policy, **how)), \
            patch.object(sharded_base, "as_bytes", lambda t: t.view(-1, 1)):
        return fine, raised(lambda: shard_base(by_bnb(torch.float32)))


def test_a_cast_on_the_way_is_seen(run):
    for fine, said in run(2, cast_on_the_way): assert "gathers other bytes" in said and "gathers other bytes" in fine


def test_an_older_torch_cuts_up_whole_numbers():
    "Before 2.12 it made each part a parameter that learns, for a moment; torch as it is comes back behind the block."
    from torch.distributed.fsdp._fully_shard import _fsdp_param as place
    codes = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="floating point"): nn.Parameter(codes)
    for version, changed in (("2.11.0", True), ("2.12.0", False)):
        with patch.object(torch, "__version__", version), sharded_base._bytes_too():
            assert (place.nn is not nn) == changed and place.nn.Module is nn.Module
            if changed: assert [place.nn.Parameter(t).requires_grad for t in (codes, codes / 1)] == [False, True]
        assert place.nn is nn


# --- the proof at start --------------------------------------------------------------------------------------------

def first_codes(module): return next(m for m in module.modules() if isinstance(m, PackedWeight)).weight


def flip(part): part.view(-1)[3] ^= 16
def swap(part): part.view(-1)[:part.numel()] = part.view(-1).flip(0)
def shift(part): part.copy_(part.roll(1, 0))


@contextmanager
def damaged(how, layer):
    "The parts of a layer, changed in the last process after they were cut."
    plain, count = sharded_base._wrap, []
    def wrap(module, *args):
        plain(module, *args)
        count.append(module)
        if len(count) == layer + 1 and dist.get_rank() == dist.get_world_size() - 1: how(here(first_codes(module)))
    with patch.object(sharded_base, "_wrap", wrap): yield


def damage():
    found = []
    for how in (flip, swap, shift):
        with damaged(how, layer=1): found.append(raised(lambda: shard_base(llama())))
    return found


def test_damage_on_the_way_is_refused(run):
    "One flipped bit, bytes in another order, a part that is shifted: every process says so, and names the layer."
    for said in sum(run(2, damage), []): assert "model.layers.1" in said and "gathers other bytes" in said


def other_base(change):
    model = llama()
    if dist.get_rank() == 1: change(model)
    return raised(lambda: shard_base(model))


def flip_one(model): model.model.layers[2].mlp.up_proj.base_layer.stats.view(torch.uint8)[5] ^= 1
def other_norm(model): model.model.norm.weight.data[3] += 1e-3
def other_adapter(model): model.model.layers[0].self_attn.q_proj.lora_A.weight.data[0, 0] += 1


@pytest.mark.parametrize("change, said", [(flip_one, "model.layers.2"), (other_norm, "norms"), (other_adapter, None)])
def test_processes_with_different_bases_are_refused(run, change, said):
    "By every process, with the rank and the layer. Adapters are another matter, and agreed upon elsewhere."
    for found in run(3 if said else 2, other_base, change):
        if said is None: assert found is None
        else: assert f"process 1 has another base than process 0: {said}" in found or "norms differs" in found


# --- parts are not decoded -----------------------------------------------------------------------------------------

def decode_locally(rows, blocksize):
    "Whether each process, with its own part of codes and of scales, gets the numbers that those codes stand for."
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(nn.Linear(40, rows, bias=False), blocksize=blocksize, double_quant=False)
    model = nn.Sequential(nn.ModuleList([nn.Sequential(layer)]))
    right = layer.quantized.dequantize().view(-1)
    shard_base(model)
    codes, scales = here(layer.weight), here(layer.stats)
    first = dist.get_rank() * 2 * -(-layer.weight.numel() // dist.get_world_size())
    mine = right[first:first + 2 * len(codes)]
    need = -(-len(mine) // blocksize)
    part = QuantizedTensor(codes, torch.cat([scales, scales.new_zeros(max(0, need - len(scales)))]), mine.shape,
                           torch.float32, blocksize, "nf4")
    refused = raised(lambda: layer.quantized), raised(lambda: layer(torch.ones(1, 40)))
    return torch.equal(part.dequantize(), mine), refused


def test_a_part_decoded_by_itself_is_wrong(run):
    "37 rows of 40: the cut goes through a block. Where it does not, by chance, nobody would notice: so it is refused."
    wrong, lucky = run(2, decode_locally, 37, 64), run(2, decode_locally, 64, 64)
    assert not all(same for same, _ in wrong) and all(same for same, _ in lucky)
    for _, refused in wrong + lucky: assert all("spread over several processes" in said for said in refused)


def skipping():
    "A layer that runs without being gathered, as if its hooks had gone."
    model = llama()
    shard_base(model)
    layer = model.model.layers[1]
    layer._forward_pre_hooks.clear()
    plain = raised(lambda: summed_loss(model, batch()), RuntimeError)  # its norm, which torch watches over
    return plain, raised(lambda: layer.mlp(torch.ones(1, 64)))


def test_a_layer_that_was_not_gathered_is_refused(run):
    for plain, said in run(2, skipping): assert "DTensor" in plain and "spread over several processes" in said


# --- beside other pieces -------------------------------------------------------------------------------------------

def beside():
    found = {"checkpointed": spread_equals(checkpoint_layers(llama()))}
    found["offloaded"] = spread_equals(llama(), offload=True)
    model = llama()
    shard_base(model)
    spread, plain = both_ways(checkpoint_layers(model)), both_ways(llama())
    found["checkpointed after"] = equal(spread, plain)
    for again in (False, True):
        model = llama()
        if again: checkpoint_layers(model)
        assert fuse_layers(model) is model
        found["fused", again] = spread_equals(model) and all(map(is_fused, decoder_layers(model)))
        found["fused", again] &= all(map(fits, decoder_layers(model)))
    model, fused = llama(), llama()
    shard_base(model)
    assert fuse_layers(model) is model and fuse_layers(fused) is fused
    found["fused after"] = equal(both_ways(model), both_ways(fused))
    found["by dispatch"] = faster("shard_base", torch.device("cpu"), llama()) is not None
    return found


def test_beside_checkpoints_offload_and_fused_layers(run):
    "In either order."
    for found in run(2, beside): assert all(found.values()), found


def dropped(again):
    "The groups that are whole at each moment of a step, and what is left of their memory after it."
    model, seen, storages, rests = llama(tie=False), [], [], []
    if again: checkpoint_layers(model)
    rest = model.model.norm.weight.nbytes + model.lm_head.weight.nbytes  # the table of embeddings is given back
    shard_base(model)
    for layer in decoder_layers(model):
        projection = layer.mlp.down_proj
        def look(m, args, out=None):
            seen.append(tuple(sorted(gathered_bytes(model))))
            storages.append(m.base_layer.weight.untyped_storage())
        projection.register_forward_hook(look)
        projection.lora_B.weight.register_hook(lambda grad: seen.append(tuple(sorted(gathered_bytes(model)))))
    model.lm_head.register_forward_hook(lambda *_: rests.append(gathered_bytes(model)))
    summed_loss(model, batch()).backward()
    assert all(found == {"": rest} for found in rests) and len(rests) > 1
    return seen, gathered_bytes(model), [s.nbytes() for s in storages]


@pytest.mark.parametrize("again", [False, True])
def test_one_layer_is_whole_at_a_time(run, again):
    "And the rest of the model, which holds no layer; nothing is whole after the step."
    for seen, left, storages in run(2, dropped, again):
        assert left == {} and set(storages) == {0} and len(seen) >= 6
        assert {len(groups) for groups in seen} == {2} and all(groups[0] == "" for groups in seen)
        assert len(set(seen)) == 3


def held(offload):
    model = llama()
    whole, weights = (memory_bill(model), bytes_held(model)), logical_numel(model)
    shard_base(model, offload=offload)
    assert logical_numel(model) == weights
    table = bytes_held(model)
    both_ways(model)
    assert bytes_held(model).equals(table)
    return whole, table, memory_bill(model), ledger(model)


def test_bytes_of_each_process(run):
    "Half of the base each, up to padding; adapters, offsets and tables on both; bills count what is here."
    results = run(2, held, False)
    (bill, whole), *_ = results[0]
    assert whole["spread"].sum() == 0
    for _, table, after, entries in results:
        parts, total = table.loc["4-bit codes", "spread"], whole.loc["4-bit codes", "everywhere"]
        assert parts == total // 2 and table.loc["adapters", "everywhere"] == whole.loc["adapters", "everywhere"]
        assert after.loc["4-bit codes", "bytes"] == parts and entries.loc[("4-bit codes", "uint8"), "bytes"] == parts
        assert table["spread"].sum() < 0.51 * whole.drop("adapters")["everywhere"].sum()
        assert table.loc["quantization statistics", "everywhere"] == 4 * 21  # offsets, one number a layer
    for kind in ("4-bit codes", "embeddings", "norms and biases"):
        assert sum(after.loc[kind, "weights"] for _, _, after, _ in results) == bill.loc[kind, "weights"]


# --- what else touches the base ------------------------------------------------------------------------------------

def saved(folder):
    rank = dist.get_rank()
    model = llama()
    save_adapter(model, folder / f"whole{rank}")
    plain = {n.replace(".base_layer", ""): t.clone() for n, t in model.state_dict().items()}
    shard_base(model)
    save_adapter(model, folder / f"spread{rank}")
    both_ways(model)
    with unsharded(model): again = {n.replace(".base_layer", ""): t.clone() for n, t in model.state_dict().items()}
    same = plain.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in plain.items())
    bare = quantize_model(make_llama())
    shard_base(bare)
    said = raised(lambda: save_quantized(bare, folder / f"no{rank}"))
    with unsharded(bare): save_quantized(bare, folder / f"base{rank}")
    return same, said, equal(both_ways(model), both_ways(llama()))


def test_adapters_are_saved_and_a_base_when_it_is_gathered(run, tmp_path):
    for same, said, after in run(2, saved, tmp_path): assert same and after and "spread over several processes" in said
    save_quantized(quantize_model(make_llama()), tmp_path / "one")
    for who in (0, 1):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            a, b = ((tmp_path / f"{kind}{who}" / file).read_bytes() for kind in ("whole", "spread"))
            assert a == b
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / f"base{who}" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def refusals():
    found, model = {}, llama()
    full = make_llama().requires_grad_(True)
    full.lab_method = "full"
    found["method='full'"] = raised(lambda: shard_base(full))
    unready = by_bnb(torch.uint8)
    for m in unready.modules():
        if hasattr(m, "quant_state"): m.weight.quant_state = None
    found["of type Params4bit"] = raised(lambda: shard_base(unready))
    with torch.device("meta"): found["no bytes"] = raised(lambda: shard_base(make_llama().requires_grad_(False)))
    shard_base(model)
    found["already"] = raised(lambda: shard_base(model))
    found["merge"] = raised(lambda: check_mergeable(model, "dequantized"))
    found["types"] = raised(lambda: model.to(torch.bfloat16))
    found["state dict"] = raised(model.state_dict)
    found["takes no state dict"] = raised(lambda: model.load_state_dict({}))
    found["copied"] = raised(lambda: copy.deepcopy(model))
    def change():
        with unsharded(model): model.model.layers[0].mlp.up_proj.base_layer.weight[0] ^= 1
    found["change is lost"] = raised(change)
    found["no pass"] = raised(lambda: unsharded_pass(model))
    assert model.to("cpu") is model and type(model).__name__ == "LlamaForCausalLM"
    assert equal(both_ways(model), both_ways(llama())) and not gathered_bytes(model)
    return found


def unsharded_pass(model):
    with unsharded(model): model(torch.ones(1, 2).long())


def test_what_would_go_wrong_in_silence_is_refused(run):
    for found in run(2, refusals):
        assert all(said and part in said for part, said in found.items()), found


def test_without_a_group_of_processes():
    with pytest.raises(LabError, match="torchrun"): shard_base(llama())


def module_in_two_layers():
    model = make_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return raised(lambda: shard_base(quantize_model(model)))


def test_a_module_in_two_layers_is_refused(run):
    for said in run(2, module_in_two_layers): assert "share a module" in said


def answering():
    "Each process asks something else, and gets what it would get alone."
    tokenizer, prompt = make_tokenizer(), ["read the file", "sort"][dist.get_rank()]
    model = llama().eval()
    alone = answer(model, tokenizer, prompt, 5 + 4 * dist.get_rank())
    shard_base(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return alone, answer(model, tokenizer, prompt, 5 + 4 * dist.get_rank())


def test_answers_are_made_together(run):
    "Answers of different lengths: who is done goes on running until all are, or the others would wait for ever."
    for alone, together in run(2, answering): assert alone == together


def with_a_batch_that_is_not_recorded():
    "The second process has padding in front."
    model, own, none = shard_base(llama()), batch(), []
    own["attention_mask"][:, :rank()] = 0
    for _ in range(3):
        part = forward_backward(model, own, 10)
        if part is None: (summed_loss(model, own) / 10).backward()
        none.append(part is None)
        model.zero_grad()
    modules, learn = list(model.modules()), trainable(model)
    heard = overheard(modules, learn), overheard(modules, learn, sharded=True)
    return none, heard, model._graph.every is all_say, model._graph.undecided


def test_who_does_not_record_answers_who_would(run):
    "Passes wait for each other, and so do those who ask whether to record; FSDP2's hooks are part of a pass."
    first, second = run(2, with_a_batch_that_is_not_recorded)
    assert first == ([False] * 3, (True, False), True, True) and second == ([True] * 3, *first[1:])


def on_cards_by_name(told):
    "Whether a step would be recorded if the group were NCCL's, and what is said; each process has its own word."
    model, word = shard_base(llama()), {"NCCL_GRAPH_REGISTER": told[rank()]} if told[rank()] else {}
    with (patch.object(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl"), warnings.catch_warnings(record=True)
          as said, patch.dict(os.environ)):
        warnings.simplefilter("always")
        os.environ.pop("NCCL_GRAPH_REGISTER", None)
        os.environ |= word
        forward_backward(model, batch(), 10)
    return model._graph.most > 0, [str(w.message) for w in said if "recorded" in str(w.message)]


def test_memory_that_nccl_would_register_is_not_recorded(run):
    "Only where it does not, in all processes: what it has registered may be given back, and read all the same."
    assert run(2, on_cards_by_name, ["0", "0"]) == [(True, [])] * 2
    for told in ([None, "0"], ["1", "1"]):
        for records, said in run(2, on_cards_by_name, told): assert not records and "NCCL_GRAPH_REGISTER=0" in said[0]


@pytest.mark.parametrize("before, after", [({}, "0"), ({"NCCL_GRAPH_REGISTER": "1"}, "1")])
def test_recordings_end_before_their_group(monkeypatch, before, after):
    "torch waits forever where a group goes first; the environment's own word on NCCL stays."
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": ""}
    order, held = [], type("Held", (), {"clear": lambda self: order.append("cleared")})()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *a, name=name, **k: order.append(name))
    with patch.dict(os.environ, clear=True):
        os.environ |= told | before
        with joined(torch.device("cuda")): let_go_at_end(held)
        assert os.environ["NCCL_GRAPH_REGISTER"] == after
    assert order == ["init_process_group", "cleared", "destroy_process_group"]


# --- two cards -----------------------------------------------------------------------------------------------------

two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def on_a_card(rank, port, offload, told):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    with joined(own_card(torch.device("cuda"))):  # and leave it, with recordings of gathers still there
        whole = llama().to("cuda")
        before = both_ways(whole)
        model = llama()  # on the host: the parts alone go to the card
        shard_base(model, offload=offload)
        base = {p.device.type for n, p in model.named_parameters() if is_shard(p) and ".layers." in n}
        assert base == {"cpu" if offload else "cuda"} and all(p.is_cuda for p in trainable(model))
        fuse_layers(whole), fuse_layers(model)
        pairs = [(both_ways(whole), both_ways(model)) for _ in range(2)]
        same = all(torch.allclose(a[0], b[0], rtol=1e-5) and all(
            torch.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(a[1], b[1])) for a, b in pairs)
        close = torch.allclose(before[0], pairs[0][1][0], rtol=1e-4)
        recorded = [recorded_step(model) for _ in range(4)]
        steps = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(recorded[0], recorded[-1]))
        told.put((rank, same and close and steps and bool(model._graph.graphs) and not gathered_bytes(model)))


def recorded_step(model):
    "Loss and gradients by way of the recorder: as it is, recorded, replayed."
    for p in trainable(model): p.grad = None
    part = faster("forward_backward", torch.device("cuda"), model, batch(), 10)
    return [part, *(p.grad.clone() for p in trainable(model))]


@two_cards
@pytest.mark.parametrize("offload", [False, True])
def test_two_cards(offload):
    "By NCCL, from the host, fused: as a whole model on one card."
    from torch import multiprocessing
    told = multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = multiprocessing.spawn(on_a_card, (port, offload, told), nprocs=2, join=False)
    end = time.monotonic() + 180
    while not processes.join(timeout=5):
        if time.monotonic() < end: continue
        for p in processes.processes: p.kill()
        pytest.fail("the group was not left")
    assert sorted(told.get() for _ in range(2)) == [(0, True), (1, True)]
