"Nothing unsafe is loaded: no code, no pickles, no way out of a folder; each is refused before anything of it is read."
import ast
import json
import shutil
import sys
from pathlib import Path

import families
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from conftest import make_tokenizer
from qlora_lab.adapter_files import read_adapter
from qlora_lab.against_file import Stored
from qlora_lab.bnb_files import save_quantized
from qlora_lab.engine.known_models import model_config
from qlora_lab.lora import add_lora, load_adapter, save_adapter
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.safe_files import below, check_folder, stays_inside

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
ROOT = Path(__file__).resolve().parent.parent
OPENED, UNPICKLED = [], []

pytestmark = pytest.mark.usefixtures("one_thread")


def listen(event, args):
    if event == "open" and isinstance(args[0], str): OPENED.append(args[0])
    if event == "pickle.find_class": UNPICKLED.append(args)


sys.addaudithook(listen)


@pytest.fixture(scope="module")
def origin(tmp_path_factory): return families.folder("llama", tmp_path_factory.mktemp("origin"))


@pytest.fixture
def folder(origin, tmp_path): return shutil.copytree(origin, tmp_path / "model")


@pytest.fixture
def adapter(folder, tmp_path):
    model, _ = load_model(folder, **EXACT)
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def evil(folder, file="own.py"):
    "Code that leaves a trace when it is run."
    trace = folder.parent / "trace"
    classes = "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Tokenizer"))
    (folder / file).write_text(f"open({str(trace)!r}, 'w')\n{classes}")
    return trace


def sharded(folder, where):
    "The weights in a file that the index names."
    path = (folder / where).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / "model.safetensors", path)
    names = load_file(path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, where)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def away(folder, file):
    "A file that lies elsewhere, and a link to it in its place."
    shutil.move(folder / file, folder.parent / "secret")
    (folder / file).symlink_to(folder.parent / "secret")


AUTO = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
HOSTILE = {
    "code of a family that there is": (lambda f: change(f, "config.json", auto_map=AUTO), "code of its own"),
    "code of another family": (lambda f: change(f, "config.json", auto_map=AUTO, model_type="own"), "code of its own"),
    "code of another repository": (
        lambda f: change(f, "config.json", auto_map={"AutoConfig": "owner/other--own2.Config"}), "code of its own"),
    "code of a tokenizer": (
        lambda f: change(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}), "of its own"),
    "code of a tokenizer, as a list": (
        lambda f: change(f, "tokenizer_config.json", auto_map=["own.Tokenizer", None]), "code of its own"),
    "attention from the Hub": (
        lambda f: change(f, "config.json", attn_implementation="owner/kernel"), "asks for code from the Hub"),
    "attention from the Hub, inside": (
        lambda f: change(f, "config.json", _attn_implementation={"": "sdpa", "x": "owner/kernel@main"}), "the Hub"),
    "experts from the Hub": (
        lambda f: change(f, "config.json", text_config={"experts_implementation": "owner/kernel"}), "from the Hub"),
    "an index that climbs": (lambda f: sharded(f, "../secret.safetensors"), "expected a .safetensors file inside"),
    "an index that climbs later": (lambda f: sharded(f, "sub/../../secret.safetensors"), "expected a .safetensors"),
    "an index of pickles": (lambda f: change(f, "model.safetensors.index.json", weight_map={"a": "x.bin"}), "expected"),
    "an index of numbers": (lambda f: change(f, "model.safetensors.index.json", weight_map={"a": 1}), "expected"),
    "an index without a map": (lambda f: change(f, "model.safetensors.index.json", weight_map=[]), "no weight_map"),
    "weights elsewhere": (lambda f: change(f, "config.json", transformers_weights="../x.safetensors"), "not inside"),
    "a config elsewhere": (lambda f: change(f, "config.json", configuration_files=["config.4/../../x.json"]), "not in"),
    "a tokenizer elsewhere": (
        lambda f: change(f, "tokenizer_config.json", fast_tokenizer_files=["/x/tokenizer.4.0.json"]), "not inside"),
    "linked weights": (lambda f: away(f, "model.safetensors"), "a link out of the folder"),
    "a linked config": (lambda f: away(f, "config.json"), "a link out of the folder"),
    "a linked template": (lambda f: away(f, "chat_template.jinja"), "a link out of the folder"),
    "a link in a circle": (lambda f: (f / "latest").symlink_to("latest"), "a link that leads back to itself"),
    "a template in a circle": (
        lambda f: [(f / a).symlink_to(b) for a, b in (("x.jinja", "y.jinja"), ("y.jinja", "x.jinja"))], "to itself"),
    "a linked folder": (lambda f: (f / "chat_templates").symlink_to("/etc"), "a link out of the folder"),
}


@pytest.mark.parametrize("spoil, told", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_folder_is_refused_before_it_is_read(spoil, told, folder):
    "In one sentence; no code has run, no weights and nothing outside the folder has been opened."
    trace = evil(folder)
    spoil(folder)
    OPENED.clear()
    with pytest.raises(LabError, match=told) as e: load_model(folder, **EXACT)
    assert "\n" not in str(e.value) and str(folder) in str(e.value) and not trace.exists()
    assert not [p for p in OPENED if "secret" in p or p.endswith((".safetensors", "own.py"))]


def test_what_is_harmless_is_opened(folder, tmp_path):
    "Code that nothing names, or that is not there, links inside, shards in a folder below, pickles beside weights."
    trace = evil(folder)
    change(folder, "config.json", auto_map={"AutoConfig": "gone.Config"}, attn_implementation="eager")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    (folder / "optimizer.pt").write_bytes(b"not a pickle")
    sharded(folder, "sub/model-1.safetensors")
    shutil.move(folder / "config.json", folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    load_model(folder, **EXACT)
    load_model(shutil.copytree(folder, tmp_path / "copy"), **EXACT)
    assert not trace.exists()


def test_the_hubs_cache_is_opened(folder, tmp_path):
    "Its snapshots are links to the blobs of the same repository; links to another repository's are not followed."
    snapshot, blobs = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    load_model(snapshot, **EXACT)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(LabError, match="a link out of the folder"): load_model(snapshot, **EXACT)


def test_paths_of_a_makers_machine_are_not_followed(folder, tmp_path):
    "Tokenizers carry such paths; they name nothing that is read."
    (tmp_path / "secret.json").write_text("{}")
    change(folder, "tokenizer_config.json", tokenizer_file=str(tmp_path / "secret.json"),
           special_tokens_map_file=str(tmp_path / "secret.json"), name_or_path="/home/ada/model")
    OPENED.clear()
    load_model(folder, **EXACT)
    assert any(p.endswith("tokenizer.json") for p in OPENED) and not [p for p in OPENED if "secret" in p]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth",
                                  "model.ckpt", "model.pkl"])
def test_weights_in_a_pickle_are_refused(name, folder):
    "Whole and well-meant, or not: it is not opened."
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / name)
    OPENED.clear()
    with pytest.raises(LabError, match=f"{name}: weights in a form that can run code") as e: load_model(folder, **EXACT)
    assert "\n" not in str(e.value) and not [p for p in OPENED if p.endswith(name)]
    with pytest.raises(LabError, match="not a safetensors file"): Stored([str(folder / name)])


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_leads_out_of_its_folder(file, adapter):
    away(adapter, file)
    with pytest.raises(LabError, match="a link out of the folder"): read_adapter(adapter)


def test_an_adapter_with_code_or_in_a_pickle(adapter):
    trace = evil(adapter)
    whole = (adapter / "adapter_config.json").read_text()
    change(adapter, "adapter_config.json", auto_map=AUTO)
    with pytest.raises(LabError, match="code of its own"): read_adapter(adapter)
    (adapter / "adapter_config.json").write_text(whole)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(LabError, match="can run code"): read_adapter(adapter)
    assert not trace.exists()


@pytest.mark.parametrize("field", [{"attn_implementation": "owner/kernel"},
                                   {"text_config": {"_attn_implementation": "owner/kernel"}}])
def test_a_plan_fetches_no_kernel(field):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
    with pytest.raises(LabError, match="asks for code from the Hub .*owner/kernel"):
        model_config({"model_type": "llama"} | sizes | field)
    model_config({"model_type": "llama", "id2label": {0: "a/b"}, "attn_implementation": "eager"} | sizes)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "", "C:/x", "c:x", "a\\b", "a\0b", "./../x"])
def test_names_that_lead_out(name, tmp_path):
    assert not stays_inside(name)
    with pytest.raises(LabError, match="not inside the folder"): below(tmp_path, name)


def test_names_that_stay(tmp_path):
    assert below(tmp_path, "a/b.json") == tmp_path / "a/b.json" and stays_inside("a..b/..c")
    (tmp_path / "up").symlink_to("..")
    with pytest.raises(LabError, match="a link out of the folder"): below(tmp_path, "up/x")
    with pytest.raises(LabError, match="not valid JSON"): check_folder(_with(tmp_path / "half", "config.json", "{"))


def _with(folder, name, text):
    folder.mkdir()
    (folder / name).write_text(text)
    return folder


def test_nothing_is_unpickled_whatever_is_opened(folder, adapter, tmp_path):
    "Python tells of each class that a pickle asks for. The control: one that asks."
    model, tokenizer = load_model(folder, **EXACT)
    save_quantized(model, tmp_path / "packed", make_tokenizer())
    sharded(shutil.copytree(folder, tmp_path / "shards"), "model-1.safetensors")
    UNPICKLED.clear()
    for source in (folder, tmp_path / "packed", tmp_path / "shards"):
        load_adapter(load_model(source, **EXACT)[0], adapter)
    load_model(folder, backend="bnb", device="cpu")
    assert not UNPICKLED
    torch.save(torch.ones(2), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert UNPICKLED


# `linear_layers` evaluates conditions from the source of transformers' classes that are installed, and of no file
ALLOWED = {"linear_layers": {"eval"}}
CALLS = {"torch.load", "torch.save", "eval", "exec", "pd.read_pickle"}
FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {"trust_remote_code": False, "weights_only": None, "allow_pickle": False, "use_safetensors": True}


@pytest.mark.parametrize("path", sorted((ROOT / "qlora_lab").rglob("*.py")), ids=lambda p: p.stem)
def test_no_module_reads_a_pickle_or_runs_code_from_a_file(path):
    "No such import, no torch.load or torch.save, no eval or exec; the options that allow it are off wherever they are."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): assert not FORBIDDEN & {a.name.partition(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom): assert (node.module or "").partition(".")[0] not in FORBIDDEN
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func)
        assert called not in CALLS - ALLOWED.get(path.stem, set()), node.lineno
        for key in node.keywords:
            if key.arg in UNSAFE: assert isinstance(key.value, ast.Constant) and key.value.value is UNSAFE[key.arg]


def test_every_opening_of_a_model_says_no_to_code():
    "transformers' from_pretrained of weights, configs and tokenizers, wherever the package calls it for a model."
    for name in ("loading", "bnb_files", "admission"):
        tree = ast.parse((ROOT / f"qlora_lab/{name}.py").read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).startswith("Auto")
                 and ast.unparse(n.func).endswith(".from_pretrained")]
        assert calls or name == "bnb_files"
        for call in calls:
            text = ast.unparse(call)
            assert "trust_remote_code=False" in text or "**how" in text, text
            if "AutoModel" in text: assert "use_safetensors=True" in text or "**how" in text, text


def test_many_tensors_of_one_name(folder):
    "A header that gives a name twice, or places outside of the file, is safetensors' own to refuse: one sentence."
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    raw = (folder / "x.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b"[0,8]", b"[0,9]"))
    with pytest.raises(LabError) as e: load_model(folder, **EXACT)
    assert "\n" not in str(e.value)


def test_every_call_says_no_to_code():
    "transformers asks in the terminal, or runs what a cache allowed before, where a call leaves it open."
    for path in sorted((Path(__file__).parent.parent / "qlora_lab").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute): continue
            opens = call.func.attr == "from_pretrained" and getattr(call.func.value, "id", "").startswith("Auto")
            said = {k.arg: getattr(k.value, "value", None) for k in call.keywords}  # None: a dict, which says it there
            assert not opens or None in said or said.get("trust_remote_code") is False, f"{path.name}:{call.lineno}"
