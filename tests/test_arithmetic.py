"Exercises with exact answers: each is right by other means, no fact is on both sides, and a wrong answer is wrong."
import re
from collections import Counter
from datetime import datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conftest import searched
from qlora_lab.arithmetic import KINDS, RANGES, arithmetic_split, exact
from qlora_lab.data import Example, pair
from qlora_lab.records import LabError

SEEDS = st.integers(-10 ** 9, 10 ** 9)
SECONDS = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
SIZES = SECONDS | {"kilometres": 100000, "metres": 100, "centimetres": 1, "tonnes": 10 ** 6, "kilograms": 1000,
                   "grams": 1, "m": 100, "cm": 1, "kg": 1000, "g": 1, "": 1}


def amount(text: str) -> Fraction:
    "Of 3.50, 1071 cm, 14 m."
    number, _, unit = text.partition(" ")
    return Fraction(number) * SIZES[unit]


def worked_out(e: Example) -> str:
    "The answer, from the text of the question alone."
    asked, numbers = e.prompt, [int(n) for n in re.findall(r"\d+", e.prompt)]
    match e.group.split(",")[0]:
        case "addition": return str(sum(numbers))
        case "subtraction": return str(max(numbers) - min(numbers))
        case "product": return str(sum(numbers[0] for _ in range(numbers[1])))
        case "leftover": return str(numbers[0] - numbers[1] * int(Fraction(*numbers)))
        case "purchase":
            if "get back" in asked: return str(numbers[2] - sum([numbers[0]] * numbers[1]))
            return str(sum([numbers[0]] * numbers[2]) + numbers[1])
        case "units":
            told = sum(int(n) * SIZES[unit] for n, unit in re.findall(r"(\d+) (\w+)", asked))
            return str(Fraction(told, SIZES[re.match(r"How many (\w+) are", asked)[1]]))
        case "comparison":
            return max(re.fullmatch(r"Which is more, (.+) or (.+)\?", asked).groups(), key=amount)
        case "clock":
            start = datetime.strptime(re.search(r"\d\d:\d\d", asked)[0], "%H:%M")
            wait = {unit: int(n) for n, unit in re.findall(r"(\d+) (hours|minutes)", asked)}
            return (start + timedelta(**wait)).strftime("%H:%M")
    raise AssertionError(e.group)


def fact(e: Example) -> tuple:
    "What an exercise is about, as read from its text; for plain sums the three numbers that belong together."
    kind, numbers = e.group.split(",")[0], re.findall(r"\d+", e.prompt)
    if kind in ("addition", "subtraction"): return "sum", *sorted([*numbers, e.answer], key=int)
    if kind == "product": return kind, *sorted(numbers, key=int)
    if kind == "purchase":
        return kind, *((numbers[1], numbers[0], e.answer) if "get back" in e.prompt else (numbers[2], *numbers[:2]))
    if kind == "comparison": return kind, *sorted(re.fullmatch(r"Which is more, (.+) or (.+)\?", e.prompt).groups())
    return kind, *re.findall(r"\d\d:\d\d|\d+(?: \w+s\b)?|(?<=many )\w+(?= are \d)", e.prompt)


@searched(12)
@given(SEEDS)
@example(0)
def test_every_answer_is_right(seed):
    data = arithmetic_split(480, 120, seed)
    for e in data.train + data.held_out: assert worked_out(e) == e.answer, e


@searched(12)
@given(SEEDS, SEEDS)
@example(0, 0)
def test_nothing_held_out_is_trained_on_by_any_seed(seed, other):
    train, held_out = arithmetic_split(720, 24, seed).train, arithmetic_split(24, 480, other).held_out
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert not {fact(e) for e in train} & {fact(e) for e in held_out}
    assert not {e.group for e in train} & {e.group for e in held_out}
    assert len({e.group for e in held_out}) == 24


@searched(12)
@given(SEEDS, st.integers(1, 300), st.integers(1, 300))
def test_a_longer_list_begins_with_the_shorter(seed, few, many):
    few, many = sorted((few, many))
    short, long = arithmetic_split(few, few, seed), arithmetic_split(many, many, seed)
    assert short.train == long.train[:few] and short.held_out == long.held_out[:few]


@searched(12)
@given(SEEDS)
def test_no_exercise_comes_twice_and_the_groups_are_even(seed):
    for side in vars(arithmetic_split(480, 240, seed)).values():
        assert len({e.prompt for e in side}) == len({(e.group, fact(e)) for e in side}) == len(side)
        counts = Counter(e.group for e in side)
        assert len(counts) == len(KINDS) * len(RANGES) and len(set(counts.values())) == 1


def test_the_same_seed_gives_the_same_exercises_and_another_others():
    assert arithmetic_split(48, 24, 1) == arithmetic_split(48, 24, 1)
    assert len({e.prompt for seed in range(3) for e in arithmetic_split(48, 24, seed).train}) > 140
    first = arithmetic_split(24, 24).held_out[0]
    assert (first.prompt, first.answer) == ("What is 99 + 55?", "154")  # the same on every machine and Python


def test_each_range_is_harder_than_the_one_before():
    "Longer numbers, or more of them."
    def digits(kind, size):
        group = [e for e in data.train if e.group.startswith(f"{kind}, {size}")]
        return sum(len(re.findall(r"\d", e.prompt)) for e in group) / len(group)
    data = arithmetic_split(1200, 24)
    for kind in set(KINDS) - {"comparison", "clock"}: assert digits(kind, "small") < digits(kind, "middle")
    for kind in set(KINDS) - {"comparison", "product"}: assert digits(kind, "middle") < digits(kind, "large")


@searched(30)
@given(st.integers(0, 10 ** 9), st.integers(0, 10 ** 9))
def test_exact_knows_a_number_however_it_is_written_and_no_other(n, m):
    e = pair("?", str(n))
    for same in (str(n), f" {n}\n", f"{n}.", f"{n:,}"): assert exact(e, same)
    assert exact(e, str(m)) == (n == m)
    for other in ("", f"-{n}", f"{n}0", f"{n} {n}", f"The answer is {n}.", f"{n} or {n + 1}"):
        assert not exact(e, other)


def test_exact_asks_for_the_unit_and_lets_case_pass():
    e = pair("Which is more, 1071 cm or 10 m?", "1071 cm")
    assert exact(e, "1071 CM.") and exact(e, "1,071 cm")
    assert not exact(e, "1071") and not exact(e, "1071 m") and not exact(e, "1071cm")
    assert not exact(pair("?", "3.5"), "3.50") and not exact(pair("?", "3.5"), "35")


@pytest.mark.parametrize("many", [dict(examples=0), dict(held_out=0), dict(examples=-3), dict(held_out=2.5),
                                  dict(examples="many"), dict(examples=True)])
def test_a_number_that_is_none_is_refused(many):
    with pytest.raises(LabError, match=f"{next(iter(many))}=.*expected a number of exercises"): arithmetic_split(**many)


@pytest.mark.parametrize("seed", [None, "first", 1.5, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(LabError, match="seed=.*whole number"): arithmetic_split(24, 24, seed)


def test_more_exercises_than_there_are_is_refused():
    with pytest.raises(LabError, match="of the kind product, small, and .* found; ask for fewer"):
        arithmetic_split(20000, 24)
