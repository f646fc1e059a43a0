"Several adapters on one base: each as if it were alone, the base's bytes untouched, PEFT's model as the oracle."
import json
import warnings

import families
import pytest
import test_adapters_peft as cases
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_llama
from qlora_lab.adapter_files import ADAPTER_FILES
from qlora_lab.adapter_sets import adapter_set, base_alone, compare_answers
from qlora_lab.linear4bit import Linear4bit, quantize_model
from qlora_lab.lora import add_lora, load_adapter, save_adapter, trainable
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.tree_changes import changes, hanging

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"plain": dict(), "stable": dict(r=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
         "patterns": cases.PATTERNS, "dora": dict(use_dora=True, r=2), "head": dict(modules_to_save=["lm_head"])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Every kind that PEFT writes, by name, made on a dense model."
    place = tmp_path_factory.mktemp("adapters")
    for i, settings in enumerate((cases.VARIANTS | KINDS).values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's: tied weights, embeddings that are saved along
            made = cases.shake(get_peft_model(cases.llama(), cases.config(**settings)), seed=i)
            made.save_pretrained(place / str(i))
    return {name: place / str(i) for i, name in enumerate(cases.VARIANTS | KINDS)}


def hung(model):
    "By place what is in a model, by reference."
    return {(name, *place): value for name, m in model.named_modules(remove_duplicate=False)
            for place, value in hanging([m])[m].items() if not isinstance(value, (dict, set))}


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
def test_each_is_as_if_alone_and_the_base_as_it_was(folders, four_bits):
    "All kinds in one set, switched in two orders: logits of each loaded alone, to the bit, and the base to the byte."
    def base(): return quantize_model(cases.llama()) if four_bits else cases.llama()
    model = base()
    adapters, before, there = adapter_set(model), cases.logits(model), hung(model)
    digest, alone = adapters.base_hash(), {}
    for name, folder in folders.items():
        adapters.load_adapter(folder, name)
        alone[name] = cases.logits(load_adapter(base(), folder).eval())
    for name in [*folders, *reversed(folders)]:
        adapters.set_adapter(name)
        assert torch.equal(cases.logits(adapters.model), alone[name]), name
        assert not trainable(model)
    assert adapters.base_hash() == digest
    for name in folders: adapters.delete_adapter(name)
    assert adapters.names == [] and torch.equal(cases.logits(model), before)
    now = hung(model)
    assert now.keys() == there.keys() and all(now[k] is there[k] for k in there)


def test_the_hash_sees_one_byte():
    "The control: a base in which one code changed."
    adapters = adapter_set(quantize_model(cases.llama()))
    digest = adapters.base_hash()
    next(m for m in adapters.model.modules() if isinstance(m, Linear4bit)).weight.data[3] ^= 1
    assert adapters.base_hash() != digest


def test_equal_to_pefts_own_multi_adapter_model(folders):
    "On the numbers of the 4-bit base, with rank, alpha, targets, rsLoRA, DoRA and whole modules that differ."
    dense = cases.decoded(quantize_model(cases.llama()), cases.llama)
    adapters, theirs = adapter_set(quantize_model(cases.llama())), None
    for name in KINDS:
        adapters.load_adapter(folders[name], name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's: tied weights
            if theirs is None: theirs = PeftModel.from_pretrained(dense, folders[name], name)
            else: theirs.load_adapter(folders[name], name)
    for name in [*KINDS, *reversed(KINDS)]:
        adapters.set_adapter(name)
        theirs.set_adapter(name)
        assert torch.allclose(cases.logits(adapters.model), cases.logits(theirs.eval()), atol=1e-5), name
    with adapters.disable_adapter(), theirs.disable_adapter():
        assert torch.allclose(cases.logits(adapters.model), cases.logits(theirs), atol=1e-5)
    assert adapters.active_adapter == "plain"


def test_on_bitsandbytes_layers_peft_does_it(tiny, tmp_path):
    "The same words, the same logits as the lab's layers, and a base that is whole after the last adapter is gone."
    settings = {"a": dict(), "b": dict(r=2, use_rslora=True, target_modules=["q_proj"])}
    for i, (name, chosen) in enumerate(settings.items()):
        cases.shake(get_peft_model(load_model(tiny, None, device="cpu")[0], cases.config(**chosen)), i).save_pretrained(
            tmp_path / name)
    sets = [adapter_set(load_model(tiny, backend=b, compute_dtype=torch.float32, device="cpu")[0])
            for b in ("lab", "bnb")]
    digests = [s.base_hash() for s in sets]
    for s in sets:
        for name in settings: s.load_adapter(tmp_path / name, name)
        assert s.active_adapter == "a" and s.names == ["a", "b"]
    for name in ("b", None, "a", "b"):
        for s in sets: s.set_adapter(name)
        assert torch.allclose(*(cases.logits(s.model) for s in sets), atol=1e-4), name
    assert sets[0].memory().equals(sets[1].memory())
    for s in sets:
        for name in settings: s.delete_adapter(name)
    assert [s.base_hash() for s in sets] == digests and not hasattr(sets[1].model, "peft_config")
    for s in sets: s.load_adapter(tmp_path / "b", "again")
    assert torch.allclose(*(cases.logits(s.model) for s in sets), atol=1e-4)


def broken(folder, out, change):
    "A copy of an adapter with its tensors changed."
    out.mkdir()
    (out / ADAPTER_FILES[0]).write_text((folder / ADAPTER_FILES[0]).read_text())
    save_file(change(load_file(folder / ADAPTER_FILES[1])), out / ADAPTER_FILES[1])
    return out


def less(tensors): return dict(sorted(tensors.items())[1:])
def longer(tensors): return tensors | {k: torch.cat([t, t], 1) for k, t in tensors.items() if k.endswith("A.weight")}


@pytest.mark.parametrize("backend", ["lab", "bnb"])
@pytest.mark.parametrize("change", [less, longer])
@pytest.mark.parametrize("loaded", [0, 1])
def test_what_does_not_fit_is_refused_and_nothing_changed(backend, change, loaded, tiny, tmp_path):
    "A tensor that lacks, and a model of other sizes; as the first adapter and as the second."
    dense = load_model(tiny, None, device="cpu")[0]
    cases.shake(get_peft_model(dense, cases.config())).save_pretrained(tmp_path / "good")
    adapters = adapter_set(load_model(tiny, backend=backend, compute_dtype=torch.float32, device="cpu")[0])
    if loaded: adapters.load_adapter(tmp_path / "good", "good")
    before, digest = cases.logits(adapters.model), adapters.base_hash()
    there = hung(adapters.model)
    with pytest.raises(LabError, match="bad"):
        adapters.load_adapter(broken(tmp_path / "good", tmp_path / "bad", change), "bad")
    now = hung(adapters.model)
    assert now.keys() == there.keys() and all(now[k] is there[k] or backend == "bnb" for k in there)
    assert adapters.names == ["good"][:loaded] and adapters.active_adapter == ("good" if loaded else None)
    assert torch.equal(cases.logits(adapters.model), before) and adapters.base_hash() == digest
    if not loaded: adapters.load_adapter(tmp_path / "good", "good")
    assert adapters.active_adapter == "good"


def test_what_peft_would_write_into_the_base_is_refused_there(tiny, folders):
    "On bitsandbytes' layers alone; with the lab's it is the adapter's own (above)."
    adapters = adapter_set(load_model(tiny, backend="bnb", compute_dtype=torch.float32, device="cpu")[0])
    digest = adapters.base_hash()
    with pytest.raises(LabError, match="would write into the base"): adapters.load_adapter(folders["bias all"], "b")
    assert adapters.base_hash() == digest and adapters.names == []


@pytest.mark.parametrize("name, why", [("a.b", "no name"), ("", "no name"), ("base", "no name"), ("one", "already")])
def test_names(name, why, folders):
    adapters = adapter_set(quantize_model(cases.llama()))
    adapters.load_adapter(folders["plain"], "one")
    with pytest.raises(LabError, match=why): adapters.load_adapter(folders["plain"], name)
    for do in (adapters.set_adapter, adapters.delete_adapter, adapters.using("other").__enter__ and adapters._check):
        with pytest.raises(LabError, match=r"no adapter 'other' is loaded; there are \['one'\]"): do("other")


def test_a_model_that_has_an_adapter_is_refused():
    with pytest.raises(LabError, match="has an adapter already"):
        adapter_set(add_lora(quantize_model(cases.llama()), cases.config(), seed=0))


def test_switching_copies_nothing(folders):
    "Memory: the base once, of each adapter its file's bytes; a switch makes no tensor."
    model = quantize_model(cases.llama())
    adapters = adapter_set(model)
    for name in ("plain", "dora", "head"): adapters.load_adapter(folders[name], name)
    bill = adapters.memory()["bytes"]
    assert bill["base"] == sum(t.nbytes for t in adapters.base)
    for name in ("plain", "dora", "head"):
        assert bill[name] == sum(t.nbytes for t in load_file(folders[name] / ADAPTER_FILES[1]).values()), name
    pointers = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    adapters.set_adapter("dora")
    adapters.set_adapter("plain")
    assert {t.data_ptr() for t in (*model.parameters(), *model.buffers())} == pointers


def test_what_is_done_to_the_model_in_between_stays(folders, tmp_path):
    "A hook, a mode; and saving writes the active adapter as it came."
    model = quantize_model(cases.llama())
    adapters, seen = adapter_set(model), []
    for name in ("plain", "stable"): adapters.load_adapter(folders[name], name)
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.train()
    adapters.set_adapter("stable")
    assert all(m.training for m in model.modules())
    cases.logits(model.eval())
    adapters.set_adapter(None)
    cases.logits(model)
    assert len(seen) == 2
    handle.remove()
    adapters.set_adapter("stable")
    save_adapter(model, tmp_path / "again")
    a, b = (load_file(p / ADAPTER_FILES[1]) for p in (tmp_path / "again", folders["stable"]))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((tmp_path / "again" / ADAPTER_FILES[0]).read_text())["r"] == 8


def test_experts_and_routers_are_switched_too(tmp_path):
    "Adapters on bare parameters change classes and parametrizations of modules; these go back too."
    def base(): return quantize_model(families.build("mixtral"))
    wanted = ["experts.gate_up_proj", "gate.weight"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(cases.shake(add_lora(base(), config, seed=0)), tmp_path / "experts")
        save_adapter(cases.shake(add_lora(base(), cases.config(target_modules=["q_proj"]), seed=0)), tmp_path / "q")
    adapters = adapter_set(base())
    before, digest = families.logits(adapters.model), adapters.base_hash()
    there = hung(adapters.model)
    for name in ("experts", "q"): adapters.load_adapter(tmp_path / name, name)
    for name in ("q", "experts", "q"):
        adapters.set_adapter(name)
        alone = load_adapter(base(), tmp_path / name).eval()
        assert torch.equal(families.logits(adapters.model), families.logits(alone)), name
    adapters.set_adapter(None)
    now = hung(adapters.model)
    assert torch.equal(families.logits(adapters.model), before) and adapters.base_hash() == digest
    assert now.keys() == there.keys() and all(now[k] is there[k] for k in there)


def test_the_base_of_a_model_with_one_adapter(folders, tokenizer):
    "Asked without it for a block, and with it again, also after an error; a table of answers by a set."
    base = quantize_model(cases.llama())
    before, model = cases.logits(base), load_adapter(base, folders["plain"]).eval()
    after = cases.logits(model)
    with pytest.raises(KeyError), base_alone(model):
        assert torch.equal(cases.logits(model), before)
        raise KeyError
    assert torch.equal(cases.logits(model), after) and not torch.equal(before, after)
    with pytest.raises(LabError, match="took the place of parts"), \
            base_alone(load_adapter(quantize_model(cases.llama()), folders["head"])): pass
    adapters = adapter_set(quantize_model(make_llama(attention_bias=True, mlp_bias=True)))
    adapters.load_adapter(folders["plain"], "plain")
    table = compare_answers(adapters, tokenizer, ["read the file", "join two paths"], max_new_tokens=3)
    assert list(table) == ["prompt", "base", "plain"] and len(table) == 2 and adapters.active_adapter == "plain"
    with pytest.raises(LabError, match="no adapter 'x'"): compare_answers(adapters, tokenizer, ["a"], ["x"])


def test_changes_are_seen_by_reference():
    "A place that came, one that went, one that is another; equal numbers elsewhere are a change."
    m = nn.Linear(2, 2)
    before = hanging([m])
    m.weight = nn.Parameter(m.weight.detach().clone())
    m.bias = None
    m.note = "here"
    assert {c.place for c in changes(before)} == {("_parameters", "weight"), ("_parameters", "bias"),
                                                             (None, "note")}
    assert changes(hanging([m])) == []
