"""peft + bitsandbytes under accelerate's FSDP2, as their documents advise: codes kept as bfloat16, so that they are cut.

Adapters and the optimizer are sharded with the base; torch's AdamW, since bitsandbytes' knows no sharded parameters.
"""
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from benchmarks.common import peer_step, random_batch, random_peer
from benchmarks.wire import timed
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


def prepared(config, own):
    "The model as accelerate hands it back, its optimizer, and what became of its codes."
    model = random_peer(config, own, own.device, storage=torch.bfloat16)
    before = [codes_hash(layer) for layer in decoder_layers(model)]
    kinds = sorted({type(layer).__name__ for layer in decoder_layers(model)})
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=kinds, cpu_ram_efficient_loading=False)
    accelerator = Accelerator(cpu=own.device == "cpu", fsdp_plugin=plugin, mixed_precision="bf16")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, gathered_equal(model, before)


def peer_row(config, own) -> dict:
    "Some steps of one process's examples, and what was gathered."
    model, optimizer, bytes_ = prepared(config, own)
    batch = random_batch(own.batch_size, own.sequence, own.learned)
    def step(): return [peer_step(model, optimizer, batch) for _ in range(own.accumulation)]
    loss, _ = step()[-1]
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    return {"who": "peft + bitsandbytes under accelerate", "loss": loss, "step_s": timed(step, 3), **bytes_}
