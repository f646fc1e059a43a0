"""A small Llama trained from nothing on the sources and manual of Python, for benchmarks that need weights nobody has
quantized before: the same seed, texts and machine give the same model.
"""
import math
import sysconfig
import time
from pathlib import Path

import torch

from qlora_lab.engine.study_texts import LEFT_OUT, held_out_texts, other_texts, text_hash
from qlora_lab.records import whole_folder

SHAPE = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
             num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True)
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True)


def corpus() -> dict[str, str]:
    "Sources of the standard library, and documents that are not held out; no module of a held-out document."
    held = {name.removeprefix("docstrings: ") for name in held_out_texts(10 ** 6)}
    root, found = Path(sysconfig.get_paths()["stdlib"]), dict(other_texts())
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if LEFT_OUT & set(parts) or parts[0].removesuffix(".py") in held: continue
        try: found["/".join(parts)] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
    return found


def _tokens(tokenizer, texts: dict[str, str]) -> torch.Tensor:
    "[n] all of them, each text followed by the token that ends one."
    ids = [i for text in texts.values() for i in [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]]
    return torch.tensor(ids)


def _trained(model, ids: torch.Tensor, device, steps: int, batch: int, length: int, lr: float = 1e-3) -> list[float]:
    "Train a model in place; the loss of each step."
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    draw, losses, warmup = torch.Generator().manual_seed(0), [], max(1, steps // 15)
    for step in range(steps):
        ramp = min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups: group["lr"] = lr * ramp
        at = torch.randint(0, len(ids) - length, (batch, 1), generator=draw) + torch.arange(length)
        rows = ids[at].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % 100 == 0: print(f"from nothing: step {step}, loss {loss.item():.3f}", flush=True)
    return torch.stack(losses).tolist()


def trained_from_nothing(tokenizer, folder: Path, device: torch.device, quick: bool) -> dict:
    "The model in float32, in eval mode, and a word on its training; read from the folder where it was trained before."
    from transformers import LlamaConfig, LlamaForCausalLM
    where = folder / "from_nothing"
    if where.exists():
        model = LlamaForCausalLM.from_pretrained(where, dtype=torch.float32)
        return {"model": model.eval().to(device), "training": model.config.training}
    start, texts = time.perf_counter(), corpus()
    ids = _tokens(tokenizer, texts if not quick else dict(list(texts.items())[:20]))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **(SMALL if quick else SHAPE))).to(device).train()
    torch.use_deterministic_algorithms(True, warn_only=True)
    steps, batch, length = (5, 2, 64) if quick else (1200, 32, 512)
    losses = _trained(model, ids, device, steps, batch, length)
    torch.use_deterministic_algorithms(False)
    model.config.training = {"losses": losses[::20], "steps": steps, "tokens a step": batch * length,
                             "tokens of text": len(ids), "text_hash": text_hash(texts),
                             "seconds": round(time.perf_counter() - start, 1)}
    with whole_folder(where) as made: model.save_pretrained(made)
    return {"model": model.eval(), "training": model.config.training}
