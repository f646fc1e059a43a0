"""One letter, one meaning: the formulas of the lessons and the tables of nbs/reference/notation.ipynb agree.

Protects: no letter twice in the table, each symbol used by the lesson it names, no letter of a lesson without a row.
"""
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
LESSONS = sorted(p for p in NBS.glob("*.ipynb") if re.match(r"\d\d[a-z]?_", p.name))
GREEK = "alpha|beta|gamma|delta|epsilon|varepsilon|eta|theta|lambda|mu|nu|rho|sigma|tau|phi|omega|ell"


def prose(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def formulas(text):
    "What stands between dollars, outside code."
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", text, re.S)]


def letters(formula):
    "The single letters of a formula: Latin ones, and Greek ones by name; words and commands are none."
    formula = re.sub(r"\\(?:text|mathrm|operatorname|begin|end|quad)\{[^{}]*\}", " ", formula)
    greek = set(re.findall(rf"\\({GREEK})(?![a-zA-Z])", formula))
    formula = re.sub(r"\\mathcal|\\text[a-z]+", "", formula)
    return greek | set(re.findall(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", " ", formula)))


def symbol(formula):
    "A symbol without its index: its letter, whether it wears a hat, and its level in brackets."
    level = re.search(r"\^\{\((\d)\)\}", formula)
    hat, base = "\\hat" in formula, re.sub(r"_\{?\w+\}?|\^\{\(\d\)\}|\\hat|[\s{}]", "", formula)
    return base, hat, level and level[1]


def used(sought, formula):
    "Whether a symbol stands in a formula, with its hat and level, whatever its index."
    base, hat, level = sought
    letter = re.escape(base) + (r"(?![a-zA-Z])" if base.startswith("\\") else "")
    pattern = (r"\\hat\s*\{?\s*" if hat else "") + letter + (rf"\^\{{\({level}\)\}}" if level else "")
    return base.lstrip("\\") in letters(formula) and re.search(pattern, formula)


def rows(columns):
    "The rows of the page's tables that have so many columns and begin with a symbol or a link."
    text = prose(NBS / "reference/notation.ipynb")
    lines = [line[1:-1].split("|") for line in text.splitlines() if re.match(r"\| (\$|\[|\| \$)", line)]
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


LINK = re.compile(r"\[(\d\d[a-z]?) [^\]]*\]\(\.\./([^)]+)\)")
TABLE = [(symbol(f), LINK.search(row[4])) for row in rows(5) for f in formulas(row[0])]
LOCAL = {}
for _row in rows(3):  # a row without a lesson goes on with the one above
    if _row[0]: _lesson = re.search(r"\(\.\./([^)]+)\)", _row[0])[1]
    LOCAL.setdefault(_lesson, set()).update(x for f in formulas(_row[1]) for x in letters(f))

def label(sought, link): return f"{link[1]} {sought[0]}{' hat' if sought[1] else ''}{sought[2] or ''}".replace("\\", "")

NAMED = [pytest.param(s, link, id=label(s, link)) for s, link in TABLE]


def test_no_letter_stands_twice():
    symbols = [s for s, _ in TABLE]
    assert len(symbols) > 25 and len(set(symbols)) == len(symbols)


@pytest.mark.parametrize("sought, link", NAMED)
def test_a_symbol_is_used_where_the_table_says(sought, link):
    number, file = link[1], link[2]
    assert file.startswith(number + "_") and any(used(sought, f) for f in formulas(prose(NBS / file)))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_every_letter_has_a_meaning(path):
    "In the table, or among the letters that the page lists for this lesson alone."
    known = {s[0].lstrip("\\") for s, _ in TABLE} | LOCAL.get(path.name, set())
    unknown = {x: f for f in formulas(prose(path)) for x in letters(f) - known}
    assert not unknown


@pytest.mark.parametrize("name", LOCAL)
def test_a_letter_of_one_lesson_is_used_there(name):
    if not (NBS / name).exists(): pytest.skip("no such lesson yet")
    assert LOCAL[name] <= {x for f in formulas(prose(NBS / name)) for x in letters(f)}


def test_letters_are_read_as_meant():
    "The test's own ruler."
    assert letters(r"\hat w_i = v_{q_i}\, m_j") == {"w", "i", "v", "q", "m", "j"}
    assert letters(r"\max_{j \in \text{block}} |m_j - \mu|") == {"j", "m", "mu"} and letters(r"10^{-38}") == set()
    assert symbol(r"q^{(2)}_j") == ("q", False, "2") and symbol(r"\hat W") == ("W", True, None)
    assert used(symbol(r"m^{(2)}"), r"v\, m^{(2)} + \mu") and not used(symbol(r"m^{(2)}"), "m_j")
    assert used(symbol(r"\hat m_j"), r"\hat m_j") and not used(symbol(r"\hat m_j"), "m_j")
