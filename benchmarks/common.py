"What every benchmark shares: fair timing of two sides, and results that say where they come from."
import json
import re
import statistics
import time
from pathlib import Path

from qlora_lab.provenance import provenance
from qlora_lab.records import write_whole

RESULTS = Path(__file__).parent / "results"


def save_result(name: str, result: dict) -> Path:
    "Write results/NAME.json with its provenance."
    return write_whole(RESULTS / f"{name}.json", json.dumps({"provenance": provenance(), **result}, indent=1) + "\n")


def card_slug() -> str:
    "The card's name, as part of a file's."
    import torch
    return re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


def interleaved(sides: dict, rounds: int = 7, warmup: int = 2) -> dict[str, list[float]]:
    "Seconds of each call, the sides taking turns so that a slow minute of the machine hits both."
    seconds = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if i >= warmup: seconds[name].append(time.perf_counter() - start)
    return seconds


def spread_of(seconds: list[float]) -> dict[str, float]:
    "Median and quartiles, in milliseconds."
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": 1e3 * statistics.median(seconds), "quartiles_ms": [1e3 * low, 1e3 * high]}


def put_buffers(model, config, device: str) -> None:
    "Position tables, scales and biases, which are no weights, as transformers computes them."
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    with init_empty_weights(include_buffers=False): real = AutoModelForCausalLM.from_config(config)
    for name, b in real.named_buffers():
        parent, _, last = name.rpartition(".")
        if not b.is_meta: model.get_submodule(parent)._buffers[last] = b.to(device)


def random_model(config, settings, device: str = "cuda", seed: int = 0, home: str | None = None):
    """The model of a `rehearsal.Settings` with random weights, live on a device and ready to train.

    The shapes are real, the words are not. `home` is where the weights stay, made on the device one by one; it is the
    device itself by default, on which layers are then fused.
    """
    import torch
    from torch import nn

    from qlora_lab.engine.dispatch import faster
    from qlora_lab.engine.rehearsal import empty_model
    model = empty_model(config, settings, attention="sdpa")
    put_buffers(model, config, device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta: continue
            t = torch.empty(p.shape, dtype=p.dtype, device=device)
            if p.dtype == torch.uint8: t.random_(0, 256, generator=generator)
            elif "Norm" in type(module).__name__: t.fill_(1)
            else: t.normal_(0, 0.02, generator=generator)
            module._parameters[name] = nn.Parameter(t.to(home or device), requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is None or not b.is_meta: continue
            t = torch.empty(b.shape, dtype=b.dtype, device=device)
            t = t.random_(0, 256, generator=generator) if b.dtype == torch.uint8 else t.fill_(0.02)
            module._buffers[name] = t.to(home or device)
    if config.tie_word_embeddings: model.tie_weights()
    if home is None: faster("fuse_layers", torch.device(device), model)
    return model


def random_batch(batch_size: int, sequence: int, learned: int | None = None, vocabulary: int = 1000) -> dict:
    "Token numbers without meaning, without padding; the last `learned` places count, all of them by default."
    import torch
    ids = torch.randint(0, vocabulary, (batch_size, sequence), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if learned is not None: labels.view(-1)[:-learned] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def random_peer(config, settings, device: str = "cuda", seed: int = 0, storage=None):
    "The same shapes by peft and bitsandbytes: their 4-bit layers, their adapters, transformers' checkpointing."
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoModelForCausalLM

    from qlora_lab.linear4bit import set_submodule
    dtype, stored = getattr(torch, settings.dtype), {"quant_storage": storage or torch.uint8}
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)
    def random(p): return torch.empty(p.shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    for name, m in list(model.named_modules()):
        if type(m) is not nn.Linear or name.endswith("lm_head"): continue
        layer = bnb.nn.Linear4bit(m.in_features, m.out_features, bias=m.bias is not None, compute_dtype=dtype,
                                  quant_type="nf4", compress_statistics=settings.double_quant, device="meta", **stored)
        layer.weight = bnb.nn.Params4bit(random(m.weight), requires_grad=False, quant_type="nf4",
                                         compress_statistics=settings.double_quant, **stored)._quantize(device)
        layer.quant_state = layer.weight.quant_state  # where it is looked for once FSDP has the parameter
        set_submodule(model, name, layer)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                norm = "Norm" in type(module).__name__
                value = torch.ones(p.shape, dtype=dtype, device=device) if norm else random(p)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    put_buffers(model, config, device)
    if config.tie_word_embeddings: model.tie_weights()
    model.config.use_cache = False
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    targets = "all-linear" if settings.targets == "all-linear" else list(settings.targets)
    model = get_peft_model(model, LoraConfig(r=settings.rank, target_modules=targets, task_type="CAUSAL_LM"))
    for p in model.parameters():
        if p.requires_grad: p.data = p.data.to(getattr(torch, settings.adapter_dtype))
    return model.train()


def peer_step(model, optimizer, batch: dict, max_grad_norm: float = 0.3) -> tuple[float, float]:
    "A step as users of peft and bitsandbytes take it: transformers' own loss, from the logits of all places."
    import torch
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    loss = model(**{k: t.to(device) for k, t in batch.items()}).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()
