"""A head whose vocabulary no eight divides: loss and slope of 8,192 places, by the head's own product and by two.

    python -m benchmarks.heads              # writes results/heads_CARD.json

Heads of models as people bring them, and of the same models without the odd tokens. Times of recorded work would be the
same: these are kernels of milliseconds. The sides take turns.
"""
import re
from statistics import median

import torch
from torch import nn

from benchmarks.common import interleaved, save_result
from qlora_lab.engine.dispatch import standing_in
from qlora_lab.head_loss import Head, in_pieces

HEADS = {"granite-3.1-8b": (49155, 4096), "llama-2-7b, a padding token": (32001, 4096), "llama-2-7b": (32000, 4096),
         "llama-2-7b, two tokens more": (32002, 4096), "llama-3.2-1b, a padding token": (128257, 2048),
         "llama-3.2-1b": (128256, 2048), "gpt2-large": (50257, 1280), "qwen3-8b": (151936, 4096)}
PLACES = 8192


def row(name: str, rounds: int) -> dict:
    "Milliseconds of each side, and how far its slope is from the other's."
    vocabulary, width = HEADS[name]
    made = dict(device="cuda", dtype=torch.bfloat16)
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, **made).requires_grad_(False)
    states = torch.randn(PLACES, width, **made).requires_grad_()
    targets = torch.randint(vocabulary, (PLACES,), device="cuda")
    found = {}

    def side(who, twins):
        def work():
            states.grad = None
            with standing_in(twins): in_pieces(states, None, targets, Head(head, (), 2 * vocabulary)).sum().backward()
            torch.cuda.synchronize()
            found[who] = states.grad
        return work

    seconds = interleaved({"one product": side("one", {("head_logits", "cuda"): None}), "two": side("two", {})}, rounds)
    off = (found["two"].float() - found["one"].float()).norm() / found["one"].float().norm()
    return {"head": name, "vocabulary": vocabulary, "width": width, "slope_off": off.item(),
            **{f"{who}_ms": 1e3 * median(s) for who, s in seconds.items()}}


def main() -> None:
    if not torch.cuda.is_available(): raise SystemExit("this benchmark needs a GPU")
    card = re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    rows = []
    for name in HEADS:
        rows.append(row(name, rounds=9))
        print(rows[-1], flush=True)
    print(save_result(f"heads_{card}", {"places": PLACES, "rows": rows}))


if __name__ == "__main__": main()
