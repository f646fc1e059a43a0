"""What a run trains: adapters of several kinds and starts, or every weight.

Full training is held to a loop in plain torch, and its folder to what opens it; starts that look at the weight before
4 bits are held to PEFT's functions and to what they promise: an error that gets smaller.
"""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from conftest import make_llama
from qlora_lab.adapter_kinds import adapted_layers
from qlora_lab.batches import batch_indices
from qlora_lab.data import Split, collate, load_jsonl, split, tokenize
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.repair import _moments, best_product, start_of, without_adapters
from qlora_lab.linear4bit import Linear4bit
from qlora_lab.lora import load_adapter
from qlora_lab.merged_weights import base_numbers, merged_weight
from qlora_lab.methods import trained_tensors
from qlora_lab.model import load_model
from qlora_lab.open_run import open_run, round_base
from qlora_lab.records import LabError
from qlora_lab.settings import FROM_THE_WEIGHT, TrainConfig
from qlora_lab.ship import merge
from qlora_lab.train import attach_adapters, train
from qlora_lab.watching import Watcher

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([[5, 9, 20, 3]], device=DEVICE)
SHORT = dict(steps=6, batch_size=4, accumulation=1, rank=4, alpha=16, eval_examples=4, eval_prompts=0, warmup=0,
             checkpoint_every=2, lr=2e-2, max_grad_norm=0.)
WHOLE = {k: v for k, v in SHORT.items() if k not in ("rank", "alpha")} | {"method": "full", "lr": 2e-3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama(layers=1, hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(jsonl):
    whole = split(load_jsonl(jsonl), 0.2)
    return Split(whole.train[:16], whole.held_out)


def opened(tiny, **more): return load_model(tiny, **dict(compute_dtype=torch.float32, dtype=torch.float32) | more)


def run(tiny, data, folder, watchers=(), quantize="nf4", **settings):
    model, tokenizer = opened(tiny, quantize=quantize)
    config = TrainConfig(folder=folder, **settings)
    return train(model, tokenizer, data, config, progress=False, watchers=watchers), model


class Cut(BaseException):
    "As sudden as a signal."


class CutAt(Watcher):
    def __init__(self, step): self.step = step

    def on_step(self, row):
        if row["step"] == self.step: raise Cut


@pytest.fixture(scope="module")
def whole(tiny, data, tmp_path_factory):
    return run(tiny, data, tmp_path_factory.mktemp("runs") / "whole", quantize=None, **WHOLE)


def test_full_training_is_adamw_on_every_weight(whole, tiny, data):
    model, tokenizer = opened(tiny, quantize=None)
    learn = [tokenize(tokenizer, e) for e in data.train]
    optimizer = torch.optim.AdamW(model.train().requires_grad_(True).parameters(), lr=2e-3, weight_decay=0.)
    for step in range(6):
        batch = collate([learn[i] for i in batch_indices([len(t.ids) for t in learn], 4, step, 0)])
        batch = {name: of.to(model.device) for name, of in batch.items()}
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - whole[0].losses[step]) < 1e-4
    for a, b in zip(model.parameters(), whole[1].parameters(), strict=True): assert torch.allclose(a, b, atol=2e-4)


def test_the_folder_of_a_full_run_holds_a_model_and_no_adapter(whole, tiny, data):
    done, trained = whole
    assert {p.name for p in done.folder.iterdir() if p.is_dir()} == {"model", "checkpoint"} and done.whole
    with safe_open(done.folder / "checkpoint" / "state.safetensors", "pt") as f: names = list(f.keys())
    assert {n.partition(".")[0] for n in names} == {"model", "optimizer"}
    for again in (load_model(done.folder / "model", quantize=None, dtype=torch.float32)[0], open_run(done.folder)[0]):
        with torch.no_grad(): assert torch.equal(again(IDS).logits, trained.eval()(IDS).logits)
        assert not any(p.requires_grad for p in again.parameters())
    tables = [m.get_input_embeddings().weight for m in (open_run(done.folder, None)[0], opened(tiny, quantize=None)[0])]
    assert torch.equal(*tables)
    bill = done.memory
    assert list(bill.columns) == ["this run", "16-bit full"] and "adapters" not in bill.index
    numbers = sum(p.numel() for p in trained.parameters())
    assert bill.loc["gradients", "this run"] == 4 * numbers and bill.loc["optimizer", "this run"] >= 8 * numbers


@pytest.mark.parametrize("settings", [
    WHOLE | {"eval_every": 2}, SHORT | {"method": "dora"}, SHORT | {"init": "loftq5"}])
def test_cut_short_it_ends_the_same(settings, tiny, data, tmp_path):
    "Killed after any step, and again, the same call ends with the same bytes."
    how = {"quantize": None if settings.get("method") == "full" else "nf4"}
    def files(folder):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}
    run(tiny, data, tmp_path / "undisturbed", **how, **settings)
    for step in (3, 5):
        with pytest.raises(Cut): run(tiny, data, tmp_path / "cut", [CutAt(step)], **how, **settings)
    run(tiny, data, tmp_path / "cut", **how, **settings)
    assert files(tmp_path / "cut") == files(tmp_path / "undisturbed")


def test_a_checkpoint_of_adapters_is_none_of_a_model(whole, tiny, data, tmp_path):
    "The same folder asked for another method is refused by name."
    with pytest.raises(LabError, match="method was 'full', now 'lora'"):
        run(tiny, data, whole[0].folder, quantize=None, **{k: v for k, v in WHOLE.items() if k != "method"})
    with pytest.raises(LabError, match="trained all weights and has no adapter"):
        run(tiny, data, tmp_path / "next", init_adapter=str(whole[0].folder), **SHORT)


@pytest.mark.parametrize("odd", [
    dict(method="full", rank=8), dict(method="full", init="gaussian"), dict(method="full", targets="q_proj"),
    dict(method="full", merge_aware=2), dict(method="full", budget="4GiB"), dict(method="full", loraplus_ratio=2.),
    dict(method="all"), dict(init="luck"), dict(init="loftq", init_adapter="runs/x"), dict(original_base="x")])
def test_settings_that_make_no_sense(odd):
    with pytest.raises(LabError, match="^(method|init|original_base)") as e: TrainConfig(**odd)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("quantize, settings, why", [
    ("nf4", WHOLE, "in 4 bits"), ("nf4", SHORT | {"init": "pissa"}, "take init='qpissa'"),
    (None, SHORT | {"init": "loftq"}, "no layer is in 4 bits"), (None, SHORT | {"init": "eora"}, "no layer is in 4"),
    ("nf4", SHORT | {"init": "qpissa", "original_base": "nowhere/at-all-there"}, "nowhere"),
    ("nf4", SHORT | {"init": "loftq", "targets": ("embed_tokens", "q_proj")}, "starts no embedding"),
    ("nf4", SHORT | {"init": "loftq", "rank": 199}, "at most")])
def test_what_a_model_cannot_do_is_said(quantize, settings, why, tiny, data, tmp_path):
    with pytest.raises(LabError, match=why): run(tiny, data, tmp_path / "run", quantize=quantize, **settings)
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_checkpoint_is_no_original_base(tiny, data, tmp_path, tokenizer):
    "Weights of the right names and shapes that are another model's are refused before anything is changed."
    make_llama(seed=1, layers=1, hidden=64).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(LabError, match="another model than the 4-bit base"):
        run(tiny, data, tmp_path / "run", init="loftq", original_base=str(tmp_path / "other"), **SHORT)


def weights_now(model):
    "By layer what it multiplies with: the base and the adapter's update."
    return {n: merged_weight(m) for n, m in adapted_layers(model).items()}


@pytest.mark.parametrize("init", [i for i in FROM_THE_WEIGHT if i != "pissa"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_repaired_model_is_nearer_to_its_original(init, rslora, tiny, data):
    "Whatever the scaling, each layer is nearer to the weight before 4 bits than 4 bits alone are."
    original = opened(tiny, quantize=None)[0]
    model, tokenizer = opened(tiny)
    plain = {n: base_numbers(m) for n, m in model.named_modules() if hasattr(m, "quant_type")}
    learn = [tokenize(tokenizer, e) for e in data.train]
    attach_adapters(model, TrainConfig(init=init, rslora=rslora, rank=8, alpha=24), learn)
    for name, now in weights_now(model).items():
        w = original.get_submodule(name).weight
        assert (now - w).norm() < 0.95 * (plain[name] - w).norm(), name


def test_pissa_is_pefts(tiny):
    "The same product and the same rest as PEFT's, and a model that answers as before."
    model = attach_adapters(opened(tiny, quantize=None)[0], TrainConfig(init="pissa", rank=4, alpha=8))
    theirs = get_peft_model(opened(tiny, quantize=None)[0], LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa"))
    for name, m in adapted_layers(model).items():
        peft = theirs.base_model.model.get_submodule(name)
        update = merged_weight(m) - base_numbers(m.base_layer)
        assert torch.allclose(update, peft.get_delta_weight("default"), atol=1e-5)
        assert torch.allclose(m.base_layer.weight, peft.base_layer.weight, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, opened(tiny, quantize=None)[0](IDS).logits, atol=1e-4)


@pytest.mark.parametrize("quantize, init", [("nf4", "qpissa"), ("nf4", "loftq5"), (None, "pissa")])
def test_a_changed_base_travels_with_its_adapter(quantize, init, tiny, data, tmp_path):
    "Opened anew, the run answers as it was trained; its adapter on the old base does not."
    done, trained = run(tiny, data, tmp_path / "run", quantize=quantize, init=init, **SHORT)
    with torch.no_grad():
        said = trained.eval()(IDS).logits
        assert torch.allclose(open_run(done.folder)[0](IDS).logits, said, atol=1e-5)
        old = load_adapter(opened(tiny, quantize=quantize)[0], done.folder / "adapter").eval()
        assert not torch.allclose(old(IDS).logits, said, atol=1e-4)
    named = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(done.folder / "base") and (done.folder / "base" / "config.json").is_file()


@pytest.mark.parametrize("init", ["loftq", "eora"])
def test_where_the_base_stays_the_adapter_is_plain_lora(init, tiny, data, tmp_path):
    done, trained = run(tiny, data, tmp_path / "run", init=init, **SHORT)
    assert not (done.folder / "base").exists()
    again = load_adapter(opened(tiny)[0], done.folder / "adapter").eval()
    with torch.no_grad(): assert torch.allclose(again(IDS).logits, trained.eval()(IDS).logits, atol=1e-5)


def test_eora_is_best_where_it_is_asked_and_the_wrong_order_is_worst():
    torch.manual_seed(0)
    w, x = torch.randn(48, 96) / 10, torch.randn(400, 96) * torch.linspace(0.1, 3, 96)
    q, h = quantize_4bit(w), x.t() @ x
    def left(b, a, base=None): return (base or q).dequantize(torch.float32) + b @ a - w
    starts = {k: left(*start_of(k, w, q, 8, h)) for k in FROM_THE_WEIGHT if k != "pissa"}
    wrong = left(*start_of("qpissa", q.dequantize(torch.float32), q, 8))
    nothing = q.dequantize(torch.float32) - w
    def answers(e): return (x @ e.t()).norm().item()
    assert answers(starts["eora"]) < 0.98 * answers(starts["loftq"]) and starts["eora"].norm() > starts["loftq"].norm()
    assert answers(starts["loftq"]) < answers(nothing)
    assert max(map(torch.norm, starts.values())) < nothing.norm() < wrong.norm()


def test_the_best_product_is_the_truncated_svd():
    for shape in ((40, 24), (24, 40), (24, 24)):
        m = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, s, v = torch.linalg.svd(m, full_matrices=False)
        b, a = best_product(m, 6)
        assert torch.allclose(b @ a, u[:, :6] * s[:6] @ v[:6], atol=1e-5)
        assert torch.allclose(b.norm(dim=0), a.norm(dim=1), atol=1e-4)
        flat = best_product(m, 6, torch.eye(shape[1]))
        assert torch.allclose(flat[0] @ flat[1], b @ a, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PEFT's LoftQ wants a GPU")
def test_loftq_leaves_pefts_error():
    "Numbers that lie between two codes, and directions of one length, may fall otherwise; what is left may not."
    from peft.utils.loftq_utils import loftq_init
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) / 10
    plain = quantize_4bit(w, double_quant=False)
    for init, rounds in (("loftq", 1), ("loftq5", 5)):
        base, a, b = loftq_init(w.cuda(), num_bits=4, reduced_rank=16, num_iter=rounds)
        own_b, own_a, q = start_of(init, w, plain, 16)
        theirs = ((base + b @ a).cpu() - w).norm().item()
        ours = ((q or plain).dequantize(torch.float32) + own_b @ own_a - w).norm().item()
        assert ours == pytest.approx(theirs, rel=2e-3)  # the error is noise: its directions are near to each other


def test_the_base_alone_for_a_block(tiny):
    model = attach_adapters(opened(tiny)[0], TrainConfig(rank=4))
    names, bare = set(dict(model.named_parameters())), set(dict(opened(tiny)[0].named_parameters()))
    with without_adapters(model): assert set(dict(model.named_parameters())) == bare
    assert set(dict(model.named_parameters())) == names and hasattr(model, "lora_config")


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica"])
def test_pefts_other_starts_by_name(init, tiny, data, tmp_path):
    "The seed decides the numbers; the untrained model answers as its base."
    a, b, c = (attach_adapters(opened(tiny)[0], TrainConfig(init=init, rank=4, seed=s)) for s in (0, 0, 1))
    same = [torch.equal(x, y) for x, y in zip(trained_tensors(a).values(), trained_tensors(b).values(), strict=True)]
    other = [torch.equal(x, y) for x, y in zip(trained_tensors(a).values(), trained_tensors(c).values(), strict=True)]
    assert all(same) and (init == "mica" or not all(other))
    with torch.no_grad(): assert torch.allclose(a.eval()(IDS).logits, opened(tiny)[0](IDS).logits, atol=1e-4)


def test_dora_learns_with_both_backends_alike(tiny, data, tmp_path):
    settings = SHORT | {"lr": 5e-4, "method": "dora"}
    lab, _ = run(tiny, data, tmp_path / "lab", **settings)
    model, tokenizer = opened(tiny, backend="bnb")
    peft = train(model, tokenizer, data, TrainConfig(folder=tmp_path / "peft", **settings), progress=False)
    assert max(abs(a - b) for a, b in zip(lab.losses, peft.losses)) < 1e-3
    with safe_open(lab.folder / "adapter" / "adapter_model.safetensors", "pt") as f: names = list(f.keys())
    assert any("magnitude" in n for n in names)


def test_runs_of_older_versions_are_still_the_same_run(tiny, data, tmp_path):
    "A run.json without the new settings is that of their defaults."
    done, _ = run(tiny, data, tmp_path / "run", **SHORT)
    record = json.loads((done.folder / "run.json").read_text())
    for name in ("method", "init", "original_base"):
        for part in ("identity", "config"): record[part].pop(name, None)
    (done.folder / "run.json").write_text(json.dumps(record))
    again, _ = run(tiny, data, tmp_path / "run", **SHORT)
    assert again.losses == done.losses and not again.whole and open_run(done.folder)[2].losses == done.losses


def test_commands_know_a_run_without_an_adapter(whole, tiny, tmp_path, capsys):
    "Reported, talked to and described as the model that it is; merging and exporting name the folder to take."
    from qlora_lab.cli import main
    from qlora_lab.commands.chat import open_talk
    from qlora_lab.commands.report import plain, report
    from qlora_lab.model_card import write_card
    folder = whole[0].folder
    said = plain(report(whole[0]))
    assert f"model        {folder / 'model'}" in said and "load_adapter" not in said and "this run" in said
    made, _ = open_talk(str(folder), (), "cpu")
    assert made.names == []
    for command in (["merge", str(folder), "--out", str(tmp_path / "m")],
                    ["export", str(folder), "--gguf", "f16", "--out", str(tmp_path / "g.gguf")]):
        assert main(command) != 0
        assert f"its model lies whole in {folder / 'model'}" in " ".join(capsys.readouterr().err.split())
    card = write_card(folder).read_text()
    assert "all its weights trained" in card and "PeftModel" not in card and "/model" in card


TEXTS = ["read the file", "return the sum of the list", "sort the names", "open the door and close it again"]


def bases(model):
    "By name the numbers of each base layer, whatever holds them."
    plain = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if n.split(".")[-1] != "lora_A"}
    return {n: base_numbers(m) for n, m in plain.items() if n.endswith("_proj") and not hasattr(m, "base_layer")}


@pytest.mark.parametrize("how", [
    dict(scales="chosen", calibration=TEXTS), dict(scales="chosen"), dict(keep=("down_proj",)),
    dict(keep=40_000, calibration=TEXTS), dict(scales="chosen", keep="down_proj", calibration=TEXTS)])
def test_a_run_on_a_chosen_base_opens_on_that_base(how, tiny, data, tmp_path):
    "Every layer is what it was, with the adapter and without; and its adapter names the base that it is for."
    model, tokenizer = opened(tiny, **how)
    before = bases(model)
    done = train(model, tokenizer, data, TrainConfig(folder=tmp_path / "run", **SHORT), progress=False)
    for adapter in ("adapter", None):
        again = open_run(done.folder, adapter)[0]
        now = bases(again)
        assert before.keys() == now.keys() and all(torch.equal(before[n], now[n]) for n in now)
    with torch.no_grad():
        assert torch.allclose(open_run(done.folder)[0](IDS).logits, model.eval()(IDS).logits, atol=1e-5)
    named = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    by_texts = "scales" in how or "calibration" in how
    assert named == done.base == str(done.folder / "base" if by_texts else tiny)
    if by_texts:
        (done.folder / "base").rename(tmp_path / "away")
        with pytest.raises(LabError, match="does not lie in base/; give (scales|keep)="): open_run(done.folder)
        again = open_run(done.folder, **how)[0]
        assert all(torch.equal(before[n], v) for n, v in bases(again).items())


def test_chosen_scales_that_no_checkpoint_can_say_are_asked_for(tiny, data, tmp_path):
    how = {"scales": "chosen", "calibration": TEXTS}
    model, tokenizer = opened(tiny, quantize="int4", blocksize=32, **how)
    before = bases(model)
    done = train(model, tokenizer, data, TrainConfig(folder=tmp_path / "run", **SHORT), progress=False)
    assert not (done.folder / "base").exists()
    with pytest.raises(LabError, match="give scales='chosen' and calibration="): open_run(done.folder)
    assert all(torch.equal(before[n], v) for n, v in bases(open_run(done.folder, **how)[0]).items())


def test_another_choice_is_another_run(tiny, data, tmp_path):
    "In both directions: the wish that is newly there, and the one that is no longer there."
    ways = [dict(), dict(scales="chosen"), dict(scales="chosen", calibration=TEXTS),
            dict(scales="chosen", calibration=TEXTS[:2]), dict(keep=("q_proj", "v_proj")), dict(keep=("v_proj",))]
    config = TrainConfig(folder=tmp_path / "run", **SHORT | {"steps": 1})
    for here in ways:
        model, tokenizer = opened(tiny, **here)
        train(model, tokenizer, data, replace(config, folder=tmp_path / str(ways.index(here))), progress=False)
        for other in ways:
            model, tokenizer = opened(tiny, **other)
            again = replace(config, folder=tmp_path / str(ways.index(here)))
            if here == other: train(model, tokenizer, data, again, progress=False)
            else:
                with pytest.raises(LabError, match="holds another run"):
                    train(model, tokenizer, data, again, progress=False)
    dense, tokenizer = opened(tiny, quantize=None)
    train(round_base(dense, "int8"), tokenizer, data, config, progress=False)
    with pytest.raises(LabError, match="rounded was .*, now None"):
        train(opened(tiny, quantize=None)[0], tokenizer, data, config, progress=False)


def test_starts_on_a_chosen_base(tiny, data, tmp_path):
    "What leaves the base as it is begins there too; what would throw its scales away is refused; it merges."
    original = opened(tiny, quantize=None)[0]
    how = dict(scales="chosen", calibration=TEXTS)
    for init in ("loftq", "eora"):
        model, tokenizer = opened(tiny, **how)
        plain = bases(model)
        learn = [tokenize(tokenizer, e) for e in data.train]
        attach_adapters(model, TrainConfig(init=init, rank=8, alpha=24), learn)
        off = [(now - original.get_submodule(n).weight).norm() / (plain[n] - original.get_submodule(n).weight).norm()
               for n, now in weights_now(model).items()]
        assert max(off) < 1 and sum(off) < 0.95 * len(off)
    for init in ("qpissa", "loftq5"):
        with pytest.raises(LabError, match="scales were chosen; take scales='absmax'"):
            attach_adapters(opened(tiny, **how)[0], TrainConfig(init=init, rank=8))
    model, tokenizer = opened(tiny, **how)
    done = train(model, tokenizer, data, TrainConfig(folder=tmp_path / "run", **SHORT), progress=False)
    adapted = open_run(done.folder)[0]
    meant = {n: merged_weight(m, original.get_submodule(n).weight) for n, m in adapted_layers(adapted).items()}
    merged = merge(adapted, "original", str(tiny), torch.float32)
    for n, w in meant.items(): assert torch.allclose(merged.get_submodule(n).weight, w, atol=1e-6)
    make_llama(seed=1, layers=1, hidden=64).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(LabError, match="is farther from it than 4 bits take"):
        merge(open_run(done.folder)[0], "original", str(tmp_path / "other"))


def test_a_base_that_no_checkpoint_can_say_is_not_changed(tiny):
    model = opened(tiny, quantize="nf4", blocksize=128)[0]
    with pytest.raises(LabError, match="no 4-bit checkpoint can say nf4 in blocks of 128"):
        attach_adapters(model, TrainConfig(init="qpissa", rank=4))


def test_a_rank_that_one_layer_cannot_have_changes_none(tiny):
    "q_proj comes first and could have it; k_proj, with half as many rows, could not."
    model = opened(tiny)[0]
    before = bases(model)
    with pytest.raises(LabError, match="rank 40: model.layers.0.self_attn.k_proj has a weight of rank 32 at most"):
        attach_adapters(model, TrainConfig(init="qpissa", rank=40))
    assert all(torch.equal(before[n], w) for n, w in bases(model).items())
    assert not any(m.lora_B.weight.any() for m in adapted_layers(model).values())


def test_eora_names_a_layer_that_no_example_reaches(tiny, data):
    model, tokenizer = opened(tiny)
    model.model.extra = Linear4bit(quantize_4bit(torch.randn(64, 64)))
    with pytest.raises(LabError, match="no example reaches model.extra"):
        dict(_moments(model, {"model.extra": model.model.extra}, "eora", [tokenize(tokenizer, data.train[0])]))


def test_all_weights_and_then_adapters(tiny, data, tmp_path):
    "The second run's base is what the first has made; its folder holds an adapter; the first call is still the first."
    first, model = run(tiny, data, tmp_path / "whole", quantize=None, **WHOLE)
    tokenizer = opened(tiny)[1]
    again = train(model, tokenizer, data, TrainConfig(folder=tmp_path / "whole", **WHOLE), progress=False)
    assert again.losses == first.losses
    second = train(model, tokenizer, data, TrainConfig(folder=tmp_path / "lora", **SHORT), progress=False)
    assert second.base == str(first.folder / "model") and not second.whole
    assert {p.name for p in second.folder.iterdir() if p.is_dir()} == {"adapter", "checkpoint"}
    with safe_open(second.folder / "checkpoint" / "state.safetensors", "pt") as f: names = list(f.keys())
    assert not any("embed" in n for n in names)
    with torch.no_grad():
        assert torch.allclose(open_run(second.folder)[0](IDS).logits, model.eval()(IDS).logits, atol=1e-5)


def test_a_merged_model_is_nobodys_base_any_more(tiny, data, tmp_path):
    "A rounded base with its adapter merged in is no rounded base: nothing is rounded again."
    model, tokenizer = opened(tiny, quantize=None)
    model = attach_adapters(round_base(model, "int4"), TrainConfig(rank=4))
    for p in (p for p in model.parameters() if p.requires_grad): torch.nn.init.normal_(p, std=0.05)
    model = merge(model, "dequantized", dtype=torch.float32)
    assert not [name for name in model.__dict__ if name.startswith("lab_")]


def test_a_changed_base_is_written_once(tiny, data, tmp_path, monkeypatch):
    from qlora_lab import methods
    wrote = []
    faster = methods.faster
    monkeypatch.setattr(methods, "faster", lambda name, *args: (wrote.append(name), faster(name, *args))[1])
    done, _ = run(tiny, data, tmp_path / "run", init="loftq5", **SHORT | {"lr": 1e-1, "eval_every": 1})
    assert Path(done.folder / "last_adapter").is_dir() and wrote.count("save_base") == 1
