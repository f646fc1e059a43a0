"The support desk's file: every line as the page says, no leak between the sides, and scores that can fail."
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from qlora_lab import support_desk
from qlora_lab.assets import smollm2_folder
from qlora_lab.records import LabError
from qlora_lab.shares import Share
from qlora_lab.support_desk import LABELS, PRIORITIES, desk, desk_file, grade, parse_reply

ROWS = [json.loads(line) for line in Path("nbs/data/support.jsonl").read_text(encoding="utf-8").splitlines()]
TICKETS, REPLIES = ([r["messages"][i]["content"] for r in ROWS] for i in (0, 1))
PARSED = list(map(parse_reply, REPLIES))


def shingles(text: str, n: int = 4) -> set:
    "Runs of n words."
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}


def overlap(a: set, b: set) -> float: return len(a & b) / len(a | b)


def test_every_line_has_a_ticket_a_reply_and_an_account():
    assert len(ROWS) >= 240
    for row in ROWS:
        assert set(row) == {"messages", "group"}
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(set(m) == {"role", "content"} and m["content"] == m["content"].strip() for m in row["messages"])
        assert re.fullmatch(r"account-\d{4}|visitor-\d\d", row["group"])


def test_every_reply_keeps_the_house_format_and_every_label_is_there_often_enough():
    assert all(PARSED)
    assert min(Counter(p.label for p in PARSED)[label] for label in LABELS) >= 15
    assert {p.priority for p in PARSED} == set(PRIORITIES)


def test_labels_are_not_told_by_account():
    "Else the split by account would leave nothing to learn from, or everything."
    by_account = {}
    for row, p in zip(ROWS, PARSED): by_account.setdefault(row["group"], set()).add(p.label)
    accounts = [labels for name, labels in by_account.items() if name.startswith("account")]
    assert len(by_account) >= 50 and min(map(len, accounts)) >= 3


@pytest.mark.parametrize("texts", [TICKETS, [f"{p.says} {p.next_step}" for p in PARSED]], ids=["tickets", "replies"])
def test_no_two_are_nearly_the_same(texts):
    assert len(set(texts)) == len(texts)
    found = [shingles(t) for t in texts]
    assert max(overlap(a, b) for a, b in combinations(found, 2)) < 0.2
    assert overlap(found[0], shingles(texts[0] + " Thank you very much.")) > 0.2  # the control


def test_no_sentence_of_a_reply_is_written_twice():
    "A page of templates would show itself here."
    sentences = Counter(s for p in PARSED for s in re.split(r"(?<=[.!?]) ", p.says))
    assert {s for s, n in sentences.items() if n > 1} == set()


def test_the_greeting_names_who_wrote():
    names = {}
    for row, p in zip(ROWS, PARSED): names.setdefault(row["group"], set()).add(p.name)
    assert all(len(found) == 1 for found in names.values())


def test_nothing_points_at_anyone_real():
    text = "\n".join(TICKETS + REPLIES)
    domains = set(re.findall(r"[\w-]+\.(?:com|net|org|io|de|co|uk|eu|app|dev|info|example)\b", text.lower()))
    assert domains == {"fennelbook.example"}
    assert not re.search(r"https?:|www\.", text)
    assert not re.search(r"(?<!\d)\+\d|\b0\d{3,}[ /-]?\d|\d{3}[ -]\d{3,}|\d{7,}", text)  # telephone and card numbers
    addresses = set(re.findall(r"\S+@\S+", text))
    assert all(a.rstrip(",.").endswith("fennelbook.example") for a in addresses)


def test_a_ticket_and_its_reply_are_short():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    texts = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in ROWS]
    lengths = sorted(map(len, tokenizer(texts).input_ids))
    assert lengths[-1] <= 250
    assert 100 <= lengths[len(lengths) // 10] and lengths[len(lengths) * 9 // 10] <= 190


def test_the_split_is_fixed_and_does_not_leak():
    data = desk()
    assert (len(data.train), len(data.held_out)) == (211, 50)
    assert not {e.group for e in data.train} & {e.group for e in data.held_out}
    assert {parse_reply(e.answer).label for e in data.held_out} == set(LABELS)
    learned = [shingles(e.prompt) for e in data.train]
    assert max(overlap(shingles(e.prompt), s) for e in data.held_out for s in learned) < 0.1


def test_white_space_around_a_reply_is_no_fault_and_everything_else_is():
    good = REPLIES[0]
    assert parse_reply(f"\n{good} \n") == PARSED[0]
    lines = good.split("\n")
    for i in range(len(lines)): assert parse_reply("\n".join(lines[:i] + lines[i + 1:])) is None
    for changed in (good.replace("|", "-"), good.replace("[setup", "[Setup"), good.replace("normal]", "soon]"),
                    good.replace("Next step:", "Next:"), good + "\nP.S. Bye.", good.replace("Hello", "Hi", 1)):
        assert parse_reply(changed) is None


def test_an_answer_out_of_format_has_no_right_label():
    held_out = desk().held_out[:2]
    graded = grade([held_out[0].answer, held_out[1].answer.replace("Next step", "Then")], held_out)
    assert graded.format_kept.passed == graded.label_right.passed == (True, False)
    assert graded.table["label"].isna().tolist() == [False, True]


def test_grade_refuses_what_does_not_belong_together():
    held_out = desk().held_out[:2]
    with pytest.raises(LabError, match="1 answers for 2 tickets"): grade([held_out[0].answer], held_out)
    with pytest.raises(LabError, match="0 answers"): grade([], [])


def test_all_right_is_not_certain_and_accounts_count():
    sure = Share((True,) * 50, tuple("abcde" * 10))
    assert sure.interval()[1] == pytest.approx(1) and 0.9 < sure.interval()[0] < 0.95
    apart = Share((True, True, True, True, False, False, False, False), tuple("aaaabbbb"))
    mixed = Share((True, True, False, False, True, True, False, False), tuple("aaaabbbb"))
    assert apart.worth == pytest.approx(8 / 7) and mixed.worth == 8
    assert Share((True,), ("a",)).worth == 1


def test_the_interval_is_wilsons():
    "8 of 10: the interval of the literature."
    low, high = Share((True,) * 8 + (False,) * 2, tuple("abcdefghij")).interval()
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


def test_a_package_without_its_repository_says_so(monkeypatch, tmp_path):
    class Spec: origin = str(tmp_path / "qlora_lab" / "__init__.py")
    monkeypatch.setattr(support_desk, "find_spec", lambda name: Spec)
    with pytest.raises(LabError, match="come with the repository"): desk_file()


def test_a_reply_out_of_format_is_refused_by_its_line(tmp_path):
    rows = [json.dumps(ROWS[0]), json.dumps(ROWS[1]).replace("Next step", "Then")]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(rows))
    with pytest.raises(LabError, match="mine.jsonl:2"): desk(file)
