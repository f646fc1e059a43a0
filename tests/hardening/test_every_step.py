"""Each write, rename, link and fsync of a deed fails in turn, or is cut: nothing that was whole is harmed, nothing half
is taken for whole, and the same call afterwards does it after all.

`make harden` takes every step; `make test` some of them, other ones for each way.
"""
import os
import random
import signal

import pytest
import torch
from deeds import DEEDS, EXPECTED, THEIRS, tiny
from layer import WAYS, faults
from noted import LONG, note
from several import forking

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = {"train": 5, "gguf": 3}  # steps of a deed that `make test` takes, a way; others 4


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "Each deed without a fault: where it lies, and the number of its steps."
    found = {}
    def get(name):
        if name not in found:
            place = prepared(name, tmp_path_factory.mktemp(name))
            with faults(place / "out") as layer, faults(place) as outer: DEEDS[name].do(place)
            DEEDS[name].whole(place / "out")
            found[name] = place, max(layer.count, outer.count)
        return found[name]
    return get


def prepared(name, place):
    tiny(place / "tiny")
    DEEDS[name].prepare(place)
    return place


def others(place):
    "What lies beside the deed."
    return {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and "out" not in p.relative_to(place).parts[0]}


def hidden(place): return [p for p in place.rglob(".*") if p.name not in (".lock", *THEIRS)]


@pytest.mark.parametrize("how", [w for w in WAYS if w != "kill"])
@pytest.mark.parametrize("name", DEEDS)
def test_each_step_fails_in_turn(name, how, done, tmp_path):
    (reference, steps), deed = done(name), DEEDS[name]
    assert steps > 4
    chosen = range(1, steps + 1)
    if not LONG: chosen = sorted(random.Random(f"{name} {how}").sample(chosen, min(steps, SOME.get(name, 4))))
    for at in chosen:
        place = prepared(name, tmp_path / str(at))
        beside, out = others(place), place / "out"
        with faults(place, at, how) as layer:
            try: deed.do(place)
            except EXPECTED as e: said = str(e)
            else: said = "nothing"
        where = f"{name}, {how} at step {at} of {steps}, {layer.steps[at - 1]}: {said}"
        assert layer.met and "\n" not in said, where
        assert others(place) == beside, where
        assert not hidden(place) or "unlink" in layer.steps[at - 1], (where, hidden(place))
        try: deed.whole(out)
        except Exception as e: assert deed.half_is_named(out), f"{where}: {e!r}"
        if not out.exists() or name in ("train", "adapter"): deed.do(place)
        deed.whole(out)
        assert deed.same(out, reference / "out"), where
    note("steps", deed=name, way=how, steps=steps, tried=len(chosen))


def undertake(name, place, at):
    "The deed, up to the step at which its process is gone."
    torch.set_num_threads(1)
    with faults(place, at, "kill"): DEEDS[name].do(place)


def killed(name, place, at):
    "The deed in a process of its own, which knows nothing of a card that this one may be using; its exit code."
    child = forking().Process(target=undertake, args=(name, place, at))
    child.start()
    child.join(60)
    hung = child.exitcode is None
    child.kill()
    child.join()
    assert not hung, f"{name} hung at step {at}"
    return child.exitcode


@pytest.mark.parametrize("name", DEEDS)
def test_a_process_is_gone_at_each_step(name, done, tmp_path):
    "With half of a write done, or before a rename; what it left goes with the next call."
    (reference, steps), deed = done(name), DEEDS[name]
    chosen = range(1, steps + 1)
    if not LONG: chosen = sorted(random.Random(name).sample(chosen, min(steps, SOME.get(name, 4))))
    for at in chosen:
        place = prepared(name, tmp_path / str(at))
        beside, out = others(place), place / "out"
        assert killed(name, place, at) == -signal.SIGKILL
        assert {p: c for p, c in others(place).items() if not hidden_part(p, place)} == beside
        try: deed.whole(out)
        except Exception as e: assert deed.half_is_named(out), (name, at, e)
        if not out.exists() or name in ("train", "adapter"): deed.do(place)
        deed.whole(out)
        assert deed.same(out, reference / "out") and not hidden(place), (name, at, hidden(place))
    note("steps", deed=name, way="kill", steps=steps, tried=len(chosen))


def hidden_part(path, place): return any(part.startswith(".") for part in path.relative_to(place).parts)


def test_the_layer_does_what_it_says(tmp_path):
    "The control: each way leaves its own trace of a plain write, and what lies elsewhere is let alone."
    path = tmp_path / "in" / "a"
    path.parent.mkdir()
    for how, left in (("fail", b""), ("cut", b"01234")):
        with pytest.raises(OSError), faults(path.parent, 1, how), open(path, "wb") as f: f.write(b"0123456789")
        assert path.read_bytes() == left
    with faults(path.parent, 1, "fail") as layer: (tmp_path / "b").write_text("elsewhere")
    assert layer.count == 0 and (tmp_path / "b").read_text() == "elsewhere"
    with pytest.raises(OSError), faults(path.parent, 1, "cut"): os.replace(path, path.with_name("c"))
    assert not path.exists() and path.with_name("c").exists()


def test_the_layer_sees_a_plain_writer(tmp_path):
    "The control: files written one after the other, in place, leave a half that the deed's own test finds."
    place = prepared("adapter", tmp_path)
    def plainly(folder, config, tensors):
        from safetensors.torch import save
        (folder / "adapter_config.json").write_text(config)
        (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    whole = {p.name: p.read_bytes() for p in (place / "out").iterdir()}
    with pytest.raises(OSError), faults(place, 2, "cut"):
        plainly(place / "out", whole["adapter_config.json"].decode(), {"x": torch.ones(2)})
    with pytest.raises(Exception): DEEDS["adapter"].whole(place / "out")  # noqa: B017 - whatever it raises
