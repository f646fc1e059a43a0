"""peft + bitsandbytes under accelerate's FSDP2, as advised: codes stored as bfloat16, so that they are cut.

Adapters and the optimizer are sharded with the base; torch's AdamW, since bitsandbytes' knows no sharded parameters.
"""
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from benchmarks.common import peer_step, random_batch, random_peer
from benchmarks.wire import memory, timed
from qlora_lab.checkpointing import decoder_layers
from qlora_lab.engine.byte_hashes import hash_tensors


def codes(layer) -> dict[str, torch.Tensor]:
    "A layer's 4-bit codes, whole, as bytes."
    found = {n: m.weight for n, m in layer.named_modules() if getattr(m, "quant_state", None) is not None}
    assert found
    return {n: t.detach().as_subclass(torch.Tensor).view(torch.uint8).flatten() for n, t in found.items()}


def loaded(model) -> tuple[list[str], dict[str, torch.Tensor]]:
    "Each layer's hash, and the first one's codes."
    layers = decoder_layers(model)
    return [hash_tensors(codes(layer).items()) for layer in layers], {n: t.clone() for n, t in codes(layers[0]).items()}


def gathered_equal(model, before: tuple) -> dict:
    "Of each layer, whether its codes are cut, and gather to the bytes that were loaded; of the first, how many differ."
    (digests, first), wrapped, same, found = before, 0, 0, {}
    for layer, digest in zip(decoder_layers(model), digests, strict=True):
        cut = isinstance(layer, FSDPModule)
        if cut: layer.unshard()
        wrapped += cut
        same += hash_tensors(codes(layer).items()) == digest
        found = found or differing(codes(layer), first)
        if cut: layer.reshard()
    return {"layers": len(digests), "layers_cut": wrapped, "layers_with_the_bytes_loaded": same, "first_layer": found}


def differing(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> dict:
    "16-bit words, those with other bytes, and how many of these are no number in bfloat16."
    now, before = (torch.cat([t[n] for n in before]).view(torch.bfloat16) for t in (now, before))
    other = now.view(torch.int16) != before.view(torch.int16)
    return {"words": other.numel(), "other": int(other.sum()), "of_them_nan": int(before[other].isnan().sum())}


def changed_by_copying(device: str) -> dict[str, int]:
    "Of the 65,536 words of bfloat16, how many come out with other bits, by torch's ways to copy."
    words = torch.arange(2 ** 16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16)
    plain, each = torch.empty_like(words).copy_(words), torch.empty_like(words)
    torch._foreach_copy_([each], [words])
    ways = {"copy_": plain, "_foreach_copy_": each}
    return {name: int((t.view(torch.int16) != words.view(torch.int16)).sum()) for name, t in ways.items()}


def as_on_cards(accelerator, plugin) -> None:
    "accelerate has FSDP between cards alone: what its state would do there."
    plugin.set_mixed_precision("bf16")
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def prepared(config, own):
    "The model as accelerate hands it back, its optimizer, and what was loaded."
    model = random_peer(config, own, own.device, storage=torch.bfloat16)
    before = loaded(model)
    kinds = sorted({type(layer).__name__ for layer in decoder_layers(model)})
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=kinds, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=own.device == "cpu", fsdp_plugin=plugin, mixed_precision="bf16")
    if own.device == "cpu": as_on_cards(accelerator, plugin)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, before


def peer_row(config, own) -> dict:
    "Some steps of one process's examples, and what was gathered."
    model, optimizer, before = prepared(config, own)
    found = {"who": "peft + bitsandbytes under accelerate", "before": gathered_equal(model, before)}
    batch = random_batch(own.batch_size, own.sequence, own.learned)
    def step(): return [peer_step(model, optimizer, batch) for _ in range(own.accumulation)]
    loss, _ = step()[-1]
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    seconds, peak = timed(step, 3), memory()
    return found | {"loss": loss, "step_s": seconds, **peak, "after": gathered_equal(model, before)}
