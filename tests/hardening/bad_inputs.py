"""What the tests of bad inputs share: how a good file is spoiled, and what a reader may say to that.

A reader takes a file or refuses it: with a LabError of one sentence that names the file, within seconds, and without
taking memory that grows with what the file claims. Any other exception is a fault.
"""
import atexit
import json
import os
import random
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import psutil
from noted import LONG, note

from qlora_lab.records import LabError

COUNT = Counter(tried=0, refused=0)
atexit.register(lambda: note("inputs", **COUNT))
MANY = int(os.environ.get("HARDEN_EXAMPLES", "300")) if LONG else 0
SEED = int(os.environ.get("HARDEN_SEED", "0"))
SECONDS, MIB = 20, 400  # that one input may take


def spoilings(count: int) -> range:
    "Seeds of so many spoilings, in the long form of many more; another HARDEN_SEED, other ones."
    return range(SEED * 10**6, SEED * 10**6 + max(count, MANY))


class TooLong(BaseException):
    "Not an Exception, so that nothing on the way catches it."


@contextmanager
def bounded(seconds: int = SECONDS, mib: int = MIB):
    "Raise TooLong for what hangs, and AssertionError for what takes memory that it does not give back."
    def ring(*_): raise TooLong(f"more than {seconds} s")
    before, old = psutil.Process().memory_info().rss, signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    assert grown < mib, f"{grown:.0f} MiB more than before"


def refusal(read, path, *named) -> str | None:
    "What a reader says against a file, held to the form that every message has; None where it takes it."
    COUNT["tried"] += 1
    with bounded():
        try: read(path)
        except LabError as e: said = str(e)
        else: return None
    COUNT["refused"] += 1
    names = [Path(path).name, *named]
    assert any(str(name) in said for name in names), f"names neither of {names}: {said!r:.300}"
    assert "\n" not in said.strip() and len(said) < 1000 and said.isprintable(), f"not one sentence: {said!r:.300}"
    said.encode()
    return said


def refused(read, path, *named) -> str:
    "The same for a file that must not be taken."
    said = refusal(read, path, *named)
    assert said is not None, f"{path}: was taken"
    return said


# bytes

def cut(rng, raw): return raw[:rng.randrange(len(raw))]
def flipped(rng, raw):
    some = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 20))): some[rng.randrange(len(some))] ^= 1 << rng.randrange(8)
    return bytes(some)
def lost(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + raw[at + rng.choice((1, 2, 8, 300)):]
def doubled(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + raw[max(0, at - rng.choice((1, 8, 300))):]
def claimed(rng, raw):
    "A number of eight bytes that is far too large."
    at = rng.choice((0, 0, rng.randrange(max(1, len(raw) - 8))))
    return raw[:at] + rng.choice((2**60, 2**63 - 1, 2**64 - 1, 2**32, 0)).to_bytes(8, "little") + raw[at + 8:]
def filled(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + bytes(rng.randrange(256) for _ in range(16)) + raw[at + 16:]
def zeroed(rng, raw):
    at = rng.randrange(len(raw))
    return raw[:at] + bytes(min(64, len(raw) - at)) + raw[at + 64:]


WAYS = cut, flipped, lost, doubled, claimed, filled, zeroed


def spoiled_bytes(raw: bytes, seed: int, head: int = 4096) -> bytes:
    "A file's content with one fault in it, more often near its begin, where formats have their numbers."
    rng = random.Random(seed)
    way = WAYS[seed % len(WAYS)]
    if way is cut or rng.random() < 0.3 or len(raw) <= head: return way(rng, raw)
    return way(rng, raw[:head]) + raw[head:]


# values

NESTED = "[" * 100_000 + "]" * 100_000
ODD = (None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 1e308, -0.5, float("nan"), float("inf"), "", "x",
       "../../etc/passwd", "y" * 5000, "\ud800", "\x00", "/", [], {}, [[]], [None], {"a": {"b": []}}, ["a", 1],
       {"": ""}, "float32", "1e9", 10**400)


def places(value, path=()):
    "Every place in a value of JSON."
    yield path
    if isinstance(value, dict):
        for key in value: yield from places(value[key], (*path, key))
    if isinstance(value, list):
        for i, inner in enumerate(value): yield from places(inner, (*path, i))


def exchanged(value, path, new):
    "The value with another one at a place; `...` takes the place out."
    if not path: return new
    key, *rest = path
    if isinstance(value, dict):
        made = {k: exchanged(v, rest, new) if k == key else v for k, v in value.items()}
        return {k: v for k, v in made.items() if v is not ...}
    made = [exchanged(v, rest, new) if i == key else v for i, v in enumerate(value)]
    return [v for v in made if v is not ...]


def spoiled_value(value, seed: int, keep=()):
    "A value with one or two odd ones in it, or with a key less or more; names in `keep` are left alone."
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2))):
        found = [p for p in places(value) if p and not set(p) & set(keep)]
        if not found: return value
        path = rng.choice(found)
        value = exchanged(value, path, rng.choice((..., *ODD)))
    return value


def as_text(value) -> str:
    "As JSON, numbers that are none included."
    return json.dumps(value)


def written(path: Path, content: str | bytes) -> Path:
    "A file with some content."
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path
