"""How quickly a model answers on a CPU: token after token, with a 4-bit weight decoded each time or once an answer.

    python -m benchmarks.answers --tokens 32 --rounds 5

SmolLM2 with greedy answers of a fixed length, the sides taking turns: the lab's layers as they are, the same in
`decode_once`, without 4 bits, and bitsandbytes' layers. Writes results/answers_cpu.json: seconds of each side and its
tokens a second, the prompt's pass included.
"""
import argparse
from contextlib import nullcontext

import torch

from benchmarks.common import interleaved, save_result, spread_of
from qlora_lab.assets import quiet
from qlora_lab.engine.decoded_once import decode_once, decoded_bytes
from qlora_lab.linear4bit import PackedWeight
from qlora_lab.model import load_model
from qlora_lab.open_run import to_answer
from qlora_lab.talk import prompt_ids

PROMPT = "Write a short story about a cat that learns to open a door."


def answering(model, ids, tokens: int, block):
    "A call that makes one answer; returns its tokens."
    def call():
        with quiet(), torch.no_grad(), block(model) or nullcontext():
            return model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=tokens,
                                  max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                                  pad_token_id=0)
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    lab, tokenizer = load_model(device="cpu")
    ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": PROMPT}])])
    models = {"lab": lab, "lab, decoded once": lab, "not in 4 bits": load_model(quantize=None, device="cpu")[0],
              "bitsandbytes": to_answer(load_model(backend="bnb", device="cpu")[0])}
    calls = {name: answering(model, ids, asked.tokens, decode_once if "once" in name else lambda m: None)
             for name, model in models.items()}
    assert torch.equal(calls["lab"](), calls["lab, decoded once"]())
    sides = {name: spread_of(seconds) for name, seconds in interleaved(calls, asked.rounds, warmup=1).items()}
    for side in sides.values(): side["tokens_per_second"] = 1e3 * asked.tokens / side["median_ms"]
    held = decoded_bytes([m for m in lab.modules() if isinstance(m, PackedWeight)])
    print(save_result("answers_cpu", {"prompt_tokens": ids.shape[1], "tokens": asked.tokens, "rounds": asked.rounds,
                                      "decoded_bytes": held, "sides": sides}))
    for name, side in sides.items(): print(f"{name:20}{side['tokens_per_second']:8.1f} tokens/s")


if __name__ == "__main__": main()
