"""The startup's question: a model of 13 billion weights, support replies, one card of 24 GiB. Does it train?

    python -m benchmarks.one_card            # a GPU; about four minutes
    python -m benchmarks.one_card --tiny     # the same run of the replies on a CPU, in small; nothing is written

The shape is Llama-2-13B's, the weights are random and made in 4 bits, layer by layer; r = 64 on all linear layers,
adapters in bfloat16. torch may take 24 GiB less what CUDA itself takes (engine.allocator.CONTEXT_GIB), whatever the
card has; above that it is out of memory. Parts, each written to results/one_card.json as soon as it is done:

replies   the support desk by `load_model` and `train` with budget="24GiB", from a 4-bit folder; the tokenizer is made
          from the tickets, as no word of a random model has a meaning
controls  what must not fit: the base in 16 bits, and the 4-bit base with every activation kept
sizes     steps of other batches and lengths, each as the planner chooses for the budget
peer      peft + bitsandbytes under the same cap, with transformers' checkpointing
"""
# ruff: noqa: E402  (a setting of torch has to stand before torch)
import argparse
import gc
import json
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.common import RESULTS, random_model, save_result
from benchmarks.memory import one
from qlora_lab import TrainConfig, plan
from qlora_lab.bnb_files import save_quantized
from qlora_lab.data import data_hash, tokenize
from qlora_lab.engine.allocator import CONTEXT_GIB
from qlora_lab.engine.budget import fastest, told_of
from qlora_lab.engine.gpu import empty_cache
from qlora_lab.engine.known_models import model_config
from qlora_lab.engine.rehearsal import Settings
from qlora_lab.linear4bit import set_submodule
from qlora_lab.lora import LoRALinear
from qlora_lab.model import load_model
from qlora_lab.support_desk import desk
from qlora_lab.train import train

CARD, SHAPE = 24, "llama-2-13b"
SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32000}
ADAPTERS = dict(rank=64, adapter_dtype="bfloat16")
SIZES = (16, 512), (1, 16384)  # examples a step, tokens each
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def capped() -> None:
    "What torch may take on a card of 24 GiB."
    whole = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    torch.cuda.set_per_process_memory_fraction(min(1., (CARD - CONTEXT_GIB) / whole))


def emptied() -> None:
    "Nothing left of what was measured before."
    gc.collect()
    if not torch.cuda.is_available(): return
    empty_cache()
    torch.cuda.reset_peak_memory_stats()


def desk_tokenizer(words: int = 1500) -> PreTrainedTokenizerFast:
    "Pieces of words from the tickets themselves; as many as make a ticket about as long as SmolLM2's tokenizer does."
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=words, special_tokens=marks, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    data = desk()
    made.train_from_iterator((m["content"] for e in data.train for m in e.messages), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=marks[0], eos_token=marks[1], pad_token=marks[2],
                                   chat_template=TEMPLATE)


def write_base(folder: Path, tiny: bool) -> None:
    "The shape as a 4-bit folder of random bytes, with the tokenizer."
    config, device = (model_config(SMALL), "cpu") if tiny else (model_config(SHAPE), "cuda")
    settings = Settings(rank=1, device=device, dtype="float32" if tiny else "bfloat16")
    model = random_model(config, settings, device)
    for path, m in list(model.named_modules()):
        if isinstance(m, LoRALinear): set_submodule(model, path, m.base_layer)
    model.config.architectures = [type(model).__name__]
    save_quantized(model, folder, desk_tokenizer())


def replies(tiny: bool, steps: int = 20, batch: int = 16) -> dict:
    "The support desk's run, as a user takes it."
    with tempfile.TemporaryDirectory(prefix="one-card-") as place:
        base, folder = Path(place) / "base", Path(place) / "run"
        write_base(base, tiny)
        emptied()
        model, tokenizer = load_model(base, device="cpu" if tiny else None)
        data = desk()
        config = TrainConfig(folder=folder, steps=steps, batch_size=batch, accumulation=1, alpha=16, lr=2e-4,
                             budget="2GiB" if tiny else f"{CARD}GiB", eval_prompts=1, **ADAPTERS)
        run = train(model, tokenizer, data, config, progress=False)
    lengths = sorted(len(tokenize(tokenizer, e).ids) for e in data.train)
    seconds = [m["seconds"] for m in run.metrics[5:]]  # the first ones record the step
    tokens = [m["tokens"] for m in run.metrics[5:]]
    return {"chosen": run.record["chosen"], "steps": steps, "batch": batch, "losses": run.losses,
            "tokens_an_example": {"median": statistics.median(lengths), "longest": lengths[-1]},
            "data": {"train": len(data.train), "hash": data_hash(data.train)}, "step_s": statistics.median(seconds),
            "tokens_per_s": sum(tokens) / sum(seconds), "examples_per_s": batch / statistics.median(seconds),
            "allocated_gib": run.record["peak_memory_gib"],
            "reserved_gib": 0. if tiny else torch.cuda.max_memory_reserved() / 2 ** 30}


def sized(batch: int, sequence: int) -> dict:
    "A step of so many examples, as the planner chooses."
    p = fastest(plan(SHAPE, CARD, batch_size=batch, sequence=sequence, **ADAPTERS))
    return {"batch": batch, "sequence": sequence, "chosen": told_of(p), "planned_gib": p.card_gib} | tried(p.settings)


def tried(settings: Settings, peer: bool = False) -> dict:
    "Some steps under the cap, or how they ended."
    emptied()
    capped()
    said = {"settings": asdict(settings)}
    try: found = one(SHAPE, settings, 2, peer)
    except torch.OutOfMemoryError as e: return said | {"outcome": "out of memory", "message": str(e).split(". GPU")[0]}
    tokens = settings.batch_size * settings.sequence * settings.accumulation
    return said | {"outcome": "finished", "tokens_per_s": tokens / found["step_s"]} | found


def control(**settings) -> dict:
    "What must not fit, and what the planner says of it."
    p = plan(SHAPE, CARD, **ADAPTERS, **settings)
    return {"planned_gib": p.card_gib, "fits_by_plan": p.fits} | tried(p.settings)


def parts(tiny: bool) -> dict:
    "What is measured, by name."
    checkpointed = dict(batch_size=16, sequence=512, checkpointing=True)
    return {"replies": lambda: replies(tiny),
            "controls": lambda: {"16-bit base": control(quantize=None, checkpointing=True),
                                 "all activations kept": control(batch_size=16, sequence=512)},
            "sizes": lambda: [sized(*size) for size in SIZES],
            "peer": lambda: {"batch": 16, "sequence": 512} | tried(Settings(**ADAPTERS, **checkpointed), peer=True)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("replies", "sizes", "controls", "peer"), action="append")
    parser.add_argument("--tiny", action="store_true", help="the replies' run on a CPU, in small; nothing is written")
    args = parser.parse_args(argv)
    if args.tiny: return print(json.dumps(replies(True, steps=8, batch=4), indent=1))
    if not torch.cuda.is_available(): raise SystemExit("this benchmark needs a GPU, or --tiny")
    capped()
    path = RESULTS / "one_card.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    done = {k: v for k, v in before.items() if k != "provenance"} | {"card_gib": CARD, "torch_gib": CARD - CONTEXT_GIB}
    for name, part in parts(False).items():
        if args.only and name not in args.only: continue
        done[name] = part()
        print(name, json.dumps(done[name]), flush=True)
        save_result("one_card", done)  # what is done stays done


if __name__ == "__main__": main()
