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


def codes_hash(layer) -> str:
    "Of a layer's 4-bit codes, whole."
    named = [(name, m.weight) for name, m in layer.named_modules() if getattr(m, "quant_state", None) is not None]
    assert named
    return hash_tensors((name, t.detach().as_subclass(torch.Tensor).view(torch.uint8)) for name, t in named)


def gathered_equal(model, before: list[str]) -> dict:
    "Of each layer, whether its codes are cut, and gather to the bytes that were loaded."
    wrapped, same = 0, 0
    for layer, digest in zip(decoder_layers(model), before, strict=True):
        cut = isinstance(layer, FSDPModule)
        if cut: layer.unshard()
        wrapped += cut
        same += codes_hash(layer) == digest
        if cut: layer.reshard()
    return {"layers": len(before), "layers_cut": wrapped, "layers_with_the_bytes_loaded": same}


def as_on_cards(accelerator, plugin) -> None:
    "accelerate has FSDP between cards alone: what its state would do there."
    plugin.set_mixed_precision("bf16")
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def prepared(config, own):
    "The model as accelerate hands it back, its optimizer, and each layer's hash as it was loaded."
    model = random_peer(config, own, own.device, storage=torch.bfloat16)
    before = [codes_hash(layer) for layer in decoder_layers(model)]
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
    model, optimizer, digests = prepared(config, own)
    found = {"who": "peft + bitsandbytes under accelerate", "before": gathered_equal(model, digests)}
    batch = random_batch(own.batch_size, own.sequence, own.learned)
    def step(): return [peer_step(model, optimizer, batch) for _ in range(own.accumulation)]
    loss, _ = step()[-1]
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    seconds, peak = timed(step, 3), memory()
    return found | {"loss": loss, "step_s": seconds, **peak, "after": gathered_equal(model, digests)}
