"""Each fault of the clinic breaks out in a tiny model, the doctor names it, and it is gone when its block has ended."""
import pytest
from test_doctor import ROWS, teach

from conftest import make_llama, make_tokenizer
from qlora_lab.engine.examining import examine
from qlora_lab.engine.findings import KNOWN
from qlora_lab.faults import ILLNESSES, Case, short_run
from qlora_lab.linear4bit import quantize_model
from qlora_lab.lora import add_lora
from qlora_lab.methods import lora_config
from qlora_lab.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def case():
    config = TrainConfig(rank=4, alpha=8)
    model = add_lora(quantize_model(teach(make_llama(layers=3))), lora_config(config), 0)
    rows = sorted(ROWS, key=lambda r: len(r.ids))
    return Case(model, make_tokenizer(), [r for pair in zip(rows, rows[::-1]) for r in pair], config)


def told(case, steps=0):
    found = examine(case.model, case.tokenizer, batch=case.batch(0), config=case.config, steps=steps)
    return {f.name: f for f in found.findings if f.verdict != "well"}


@pytest.mark.parametrize("name", ILLNESSES)
def test_the_doctor_names_it_and_it_can_be_taken_out(case, name):
    illness = ILLNESSES[name]
    assert told(case.begin()) == {}
    with illness.by(case):
        if illness.steps: short_run(case, illness.steps)
        found = told(case, illness.steps)
    assert found[name].verdict == "ill" and found[name].organ == KNOWN[name].organ and found[name].cure
    assert told(case.begin()) == {}


def test_each_fault_says_what_it_is():
    assert all(i.symptom and i.guess and i.test.endswith("?") or "count" in i.test or "bytes" in i.test
               for i in ILLNESSES.values()) and len(ILLNESSES) >= 16
