"""How long it takes to look at many examples: reading, tokenizing with the mask, near copies, the whole report.

    python -m benchmarks.data                    # a few minutes on a core

Writes benchmarks/results/data.json; seconds are those that the process spent on a core, so that other work on the
machine does not count. The examples are made: a pool of words drawn as often as English draws its own
(Zipf's law), prompts of 20 words and answers of 20, every fiftieth one a copy with a word changed; they are written as
JSON lines and read from there.
"""
import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.common import save_result


def write_examples(path: Path, n: int, words: int = 20, every: int = 50) -> int:
    "Write n examples; returns how many of them are near copies."
    draw, letters = np.random.default_rng(0), np.array(list("etaoinshrdlu"))
    pool = np.array(["".join(draw.choice(letters, 2 + i % 7)) for i in range(30_000)])
    weights = 1 / np.arange(1, len(pool) + 1)
    drawn = draw.choice(pool, (n, 2 * words), p=weights / weights.sum())
    copies, kept = 0, None
    with path.open("w") as file:
        for i, text in enumerate(drawn):
            if i % every == every - 1:
                text, copies = kept.copy(), copies + 1
                text[draw.integers(2 * words)] = "another"
            kept = text if kept is None or i % every == 0 else kept
            row = {"prompt": " ".join(text[:words]) + "?", "completion": " ".join(text[words:]) + ".", "group": str(i)}
            file.write(json.dumps(row) + "\n")
    return copies


def timed(what: str, work, seconds: dict):
    start = time.process_time()
    done = work()
    seconds[what] = round(time.process_time() - start, 1)
    print(f"{what}: {seconds[what]} s", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--name", default="data", help="of the result's file")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from qlora_lab.assets import smollm2_folder
    from qlora_lab.data import encode, load_examples
    from qlora_lab.engine.data_report import data_report
    from qlora_lab.engine.near_copies import near_copies
    tokenizer, seconds = AutoTokenizer.from_pretrained(smollm2_folder()), {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "made.jsonl"
        copies = write_examples(path, args.examples)
        examples = timed("load_examples", lambda: load_examples(path), seconds)
        rows = timed("encode", lambda: encode(tokenizer, examples), seconds)
        texts = [f"{e.prompt}\n{e.answer}" for e in examples]
        first = timed("near_copies", lambda: near_copies(texts), seconds)
        report = timed("data_report", lambda: data_report(path, tokenizer), seconds)
    found = sum(g != i for i, g in enumerate(first))
    result = {"examples": args.examples, "tokens": sum(len(row.ids) for row in rows), "seconds": seconds,
              "near_copies_made": copies, "near_copies_found": found, "leaks": report.copies.leaks}
    print(save_result(args.name, result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__": main()
