"""A head whose vocabulary is not a multiple of eight: its loss by one product and by two, and its products alone.

    python -m benchmarks.heads              # writes results/heads_CARD.json

Heads of models as people bring them, and of the same models without the tokens that were added. `losses`: loss and
slope of 8,192 places, the sides in turns, and how far the slope of the first places is from float32's; one product also
with torch's `allow_bf16_reduced_precision_reduction` off. `products`: one piece, into rows of the vocabulary's length
and of the next multiple of 64. No graphs: kernels of milliseconds.
"""
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.common import card_slug, interleaved, save_result
from benchmarks.gpu import timed
from qlora_lab.engine.dispatch import standing_in
from qlora_lab.engine.piecewise_loss import slopes_triton
from qlora_lab.head_loss import PIECE, Head, in_pieces

HEADS = {"granite-3.1-8b": (49155, 4096), "granite-3.1-8b, three tokens less": (49152, 4096),
         "llama-2-7b, one token more": (32001, 4096), "llama-2-7b": (32000, 4096),
         "llama-2-7b, two tokens more": (32002, 4096), "llama-2-7b, four tokens more": (32004, 4096),
         "llama-3.2-1b, one token more": (128257, 2048), "llama-3.2-1b": (128256, 2048),
         "llama-3-8b, one token more": (128257, 4096), "gpt2-large": (50257, 1280),
         "qwen3-8b": (151936, 4096)}
PLACES, EXACT = 8192, 256
MADE = dict(device="cuda", dtype=torch.bfloat16)


def made(name: str) -> tuple[nn.Linear, Tensor, Tensor]:
    "A frozen head, states and targets."
    vocabulary, width = HEADS[name]
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, **MADE).requires_grad_(False)
    return head, torch.randn(PLACES, width, **MADE), torch.randint(vocabulary, (PLACES,), device="cuda")


def slope(head: nn.Linear, states: Tensor, targets: Tensor, twins: dict, reduced: bool = True) -> Tensor:
    "The gradient of the states, of the whole loss in pieces; whether parts of a sum may be kept in bfloat16."
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
    states = states.detach().requires_grad_()
    with standing_in(twins):
        in_pieces(states, None, targets, Head(head, (), 2 * len(head.weight))).sum().backward()
    torch.cuda.synchronize()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True  # as torch has it
    return states.grad


def losses(name: str, rounds: int = 9) -> dict:
    "Milliseconds of each side, and how far its slope is from float32's."
    head, states, targets = made(name)
    one = {("head_logits", "cuda"): None}
    ways = {"one product": (one,), "one product, whole sums": (one, False), "two": ({},)}
    works = {who: partial(slope, head, states, targets, *how) for who, how in ways.items()}
    seconds, found = interleaved(works, rounds), {who: work().float() for who, work in works.items()}
    exact = slope(head.float(), states[:EXACT].float(), targets[:EXACT], {("slopes", "cuda"): None})
    return {"head": name, "vocabulary": head.out_features, "width": states.shape[1],
            "slope_off": ((found["two"] - found["one product"]).norm() / found["one product"].norm()).item(),
            **{f"{who}_ms": 1e3 * median(s) for who, s in seconds.items()},
            **{f"{who}_off": ((f[:EXACT] - exact).norm() / exact.norm()).item() for who, f in found.items()}}


def products(name: str) -> list[dict]:
    "Milliseconds of one piece: forward, loss and slope in place, back."
    head, states, targets = made(name)
    vocabulary, weight = head.out_features, head.weight
    places = min(PLACES, PIECE // (2 * vocabulary) // 64 * 64)
    states, targets, found = states[:places], targets[:places], []
    for row in dict.fromkeys((vocabulary, -(-vocabulary // 64) * 64)):
        rows = torch.empty(places, row, **MADE)[:, :vocabulary]
        works = {"forward": partial(torch.mm, states, weight.t(), out=rows),
                 "slopes": partial(slopes_triton, rows, targets), "back": partial(torch.mm, rows, weight)}
        found.append({"head": name, "vocabulary": vocabulary, "width": head.in_features, "places": places, "row": row,
                      **{f"{what}_ms": timed(work)[0] for what, work in works.items()}})
    return found


def main() -> None:
    if not torch.cuda.is_available(): raise SystemExit("this benchmark needs a GPU")
    found = {"places": PLACES, "losses": [], "products": [], "products_made": "each call after the cache was emptied"}
    for name in HEADS:
        whole, pieces = losses(name), products(name)
        print(whole, *pieces, sep="\n", flush=True)
        found["losses"].append(whole)
        found["products"] += pieces
    print(save_result(f"heads_{card_slug()}", found))


if __name__ == "__main__": main()
