"""SmolLM2 learns the support desk: held-out loss, format kept, label right, before and after.

    python -m benchmarks.support_desk            # about twelve minutes on two cores

Trains in runs/support_desk as `qlora-lab train --data nbs/data/support.jsonl --held-out 0.2` does, and goes on there
if it was cut short. Three sets of answers to the held-out tickets are graded: by the untrained model, by the untrained
model that is told the house's rules with each ticket (a control), and by the trained one. A second control deals the
trained model's answers out to other tickets. Writes benchmarks/results/support_desk.json.
"""
import argparse
import json
import os
import random
import time
from pathlib import Path

from benchmarks.common import RESULTS, save_result
from qlora_lab import TrainConfig
from qlora_lab.data import data_hash
from qlora_lab.model import answer, load_model
from qlora_lab.records import write_whole
from qlora_lab.runs import Run
from qlora_lab.scoring import improvement
from qlora_lab.support_desk import Grade, desk, grade
from qlora_lab.train import train

RULES = """You answer support tickets of Fennelbook. Reply in exactly five lines:
[label | priority]
Hello NAME,
one to three sentences that answer the ticket
Next step: one line
Your Fennelbook desk
The label is one of billing, login, bug, setup, messages, account, idea, other. The priority is one of urgent, normal,
low. Write "Hello," where the ticket has no name. The ticket:

"""
LONGEST = 128  # tokens of an answer; the desk's own have at most 110
FIRST = 16     # tokens in which a first line has room


def answered(model, tokenizer, texts: list[str], longest: int = LONGEST, size: int = 64) -> list[str]:
    "Greedy answers."
    batches = [texts[i:i + size] for i in range(0, len(texts), size)]
    return [a for batch in batches for a in answer(model, tokenizer, batch, max_new_tokens=longest)]


def begun(model, tokenizer, texts: list[str]) -> list[str]:
    "Greedy answers, of which those that do not begin as the house does are not finished: they are out of format."
    answers = answered(model, tokenizer, texts, FIRST)
    on = [i for i, a in enumerate(answers) if a.startswith("[") and "|" in a]
    for i, whole in zip(on, answered(model, tokenizer, [texts[i] for i in on])): answers[i] = whole
    return answers


def controls(folder: Path, model, tokenizer, tickets: list) -> dict[str, list[str]]:
    "The untrained model's answers, kept beside the run so that a benchmark cut short goes on from them."
    path, key = folder.with_name(folder.name + "_untrained.json"), data_hash(tickets)
    if path.exists() and (found := json.loads(path.read_text()))["tickets"] == key: return found["answers"]
    plain = [e.prompt for e in tickets]
    made = {"untrained": begun(model, tokenizer, plain),
            "told the rules": begun(model, tokenizer, [RULES + text for text in plain])}
    write_whole(path, json.dumps({"tickets": key, "answers": made}))
    return made


def graded(answers: dict[str, list[str]], tickets: list) -> dict[str, Grade]:
    "Each set of answers, and the trained model's dealt out to other tickets."
    dealt = random.Random(0).sample(answers["trained"], len(tickets))
    found = {name: grade(given, tickets) for name, given in (answers | {"dealt out": dealt}).items()}
    for name, g in found.items(): print(f"{name:15} format kept {g.format_kept}, label right {g.label_right}")
    return found


def as_json(found: dict[str, Grade]) -> dict:
    "Which tickets passed; intervals follow from that and the groups (shares.Share)."
    return {name: {score: {"share": s.share, "passed": list(s.passed)} for score, s in
                   (("format_kept", g.format_kept), ("label_right", g.label_right))} for name, g in found.items()}


def again() -> Path:
    "Grade the recorded answers once more, by today's rules; when and where they were made stays as it was."
    path = RESULTS / "support_desk.json"
    record, tickets = json.loads(path.read_text()), desk().held_out
    if record["data"]["hash"][1] != data_hash(tickets): raise SystemExit("the record is of other tickets")
    record["scores"] = as_json(graded(record["answers"], tickets))
    return write_whole(path, json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/support_desk"), help="where the run lives")
    parser.add_argument("--few", type=int, help="this many held-out tickets, and nothing is written")
    parser.add_argument("--again", action="store_true", help="grade the recorded answers again; nothing is trained")
    args = parser.parse_args(argv)
    if args.again: return print(again())
    data, (model, tokenizer) = desk(), load_model()
    tickets = data.held_out[:args.few]
    given = controls(args.folder, model, tokenizer, tickets)
    for name, texts in given.items(): print(name, *grade(texts, tickets)[:2], flush=True)
    config = TrainConfig(folder=args.folder, steps=args.steps, lr=args.lr, rank=args.rank, alpha=2 * args.rank)
    run: Run = train(model, tokenizer, data, config)
    start = time.perf_counter()
    answers = given | {"trained": answered(model, tokenizer, [e.prompt for e in tickets])}
    seconds = {"training": run.record["seconds"], "answers": time.perf_counter() - start}
    found = graded(answers, tickets)
    fell, error = improvement(run.before, run.after)
    print(f"{run.before} before, {run.after} after; fell by {fell:.3f} ± {error:.3f}")
    if args.few: return
    scores = {k: {"loss": s.loss, "stderr": s.stderr} for k, s in (("before", run.before), ("after", run.after))}
    print(save_result("support_desk", {
        "data": {"train": len(data.train), "held_out": len(data.held_out),
                 "hash": [data_hash(data.train), data_hash(data.held_out)]},
        "config": run.record["config"] | {"folder": args.folder.name}, "losses": run.losses, "held_out": scores,
        "improvement": {"nats": fell, "stderr": error},
        "seconds": seconds, "load": os.getloadavg()[0],  # processes that wanted to run: how busy the machine was
        "peak_memory_gib": run.record["peak_memory_gib"], "groups": [e.stays_with for e in tickets],
        "scores": as_json(found), "answers": answers}))
    print(json.dumps(scores))


if __name__ == "__main__": main()
