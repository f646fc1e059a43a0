"The card says what is on record and nothing else, the Hub's own library reads it, and a person's card is kept."
import json
import re

import pytest
from huggingface_hub import ModelCard

from qlora_lab import cli
from qlora_lab.assets import SMOLLM2
from qlora_lab.manifest import MANIFEST, record_step, verify
from qlora_lab.manifest_file import read_manifest
from qlora_lab.model_card import is_ours, model_card, write_card
from qlora_lab.records import LabError

BASE = {"name": "owner/base", "revision": "f" * 40, "licence": "apache-2.0"}
SCORE = {"sums": [10., 14., 9.], "tokens": [5, 6, 5], "groups": ["a", "b", "c"]}
RUN = {"state": "done", "identity": {"model": SMOLLM2, "data": "1" * 16, "held_out": "2" * 16, "quantization": "nf4"},
       "config": {"steps": 100, "rank": 16}, "provenance": {"versions": {"torch": "2"}, "date": "2026-01-02T03:04:05"},
       "before": {"score": SCORE}, "after": {"score": SCORE | {"sums": [5., 6., 7.]}}, "base": BASE | {"name": SMOLLM2},
       "peak_memory_gib": 1.5, "seconds": 60.}


def folder_of(tmp_path, *files, base=BASE, **step):
    folder = tmp_path / "tickets"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    record_step(folder, "merge", base=base, **step)
    return folder


def read(folder):
    "As the Hub reads it."
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("files, library, relation, load", [
    (["config.json", "model.safetensors"], "transformers", "finetune", "load_model('tickets')"),
    (["adapter_config.json", "adapter_model.safetensors"], "peft", "adapter", "load_adapter(model, 'tickets')"),
    (["m-Q4_K_M.gguf", "Modelfile"], "gguf", "quantized", "llama-cli -m tickets/m-Q4_K_M.gguf"),
], ids=["merged", "adapter", "gguf"])
def test_a_card_is_one_that_the_hub_reads(files, library, relation, load, tmp_path):
    folder = folder_of(tmp_path, *files, data={"name": "owner/rows", "licence": "cc0-1.0"})
    write_card(folder)
    card = read(folder)
    head = card.data.to_dict()
    assert (head["base_model"], head["library_name"], head["base_model_relation"]) == ("owner/base", library, relation)
    assert (head["license"], head["datasets"]) == ("apache-2.0", ["owner/rows"])
    assert head["pipeline_tag"] == "text-generation"
    assert load in card.text and ("ollama create tickets -f Modelfile" in card.text) == ("Modelfile" in files)
    assert verify(folder).ok and "README.md" in read_manifest(folder)["files"]


def test_what_is_not_known_is_not_in_the_head(tmp_path):
    "A base by a folder's name is none of the Hub's; no licence is guessed."
    folder = folder_of(tmp_path, "config.json", base={"name": "my-base", "sha256": "a" * 64}, data={"name": "mine"})
    write_card(folder)
    head, text = read(folder).data.to_dict(), read(folder).text
    assert not head.keys() & {"base_model", "license", "datasets", "base_model_relation"}
    assert "a model named my-base" in text and text.count("not known") >= 3 and "a" * 64 in text


def test_numbers_and_their_intervals(tmp_path):
    "1.96 standard errors; a number without an error has no interval."
    metrics = {"before": {"loss": (2., 0.1), "KL": 0.}, "after": {"loss": (1., 0.05), "KL": (0.25, float("nan"))}}
    text = model_card(folder_of(tmp_path, "config.json", metrics=metrics, settings={"how": "4bit"}))
    assert "| loss | 2 ± 0.2 | 1 ± 0.098 |" in text and "| KL | 0 | 0.25 |" in text and "| how | 4bit |" in text


def test_a_run_of_an_earlier_version_has_a_card_too(tmp_path):
    "From its run.json, with no manifest; the course's model by its id on the Hub."
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_bytes(bytes(3 << 20))
    write_card(folder)
    card = read(folder)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.library_name == "peft"
    assert "| `adapter/adapter_model.safetensors` | 3.0 MiB |" in card.text and not (folder / MANIFEST).exists()
    assert "| held-out loss, nats a token | 2.062 ± " in card.text and "| peak memory, GiB | 1.5 |" in card.text
    (folder / "run.json").write_text(json.dumps(RUN | {"state": "running"}))
    with pytest.raises(LabError, match="not done"): write_card(folder)


def test_a_persons_card_is_kept(tmp_path):
    "Written by hand, or ours with one character changed, in the text or in the head; `force` overwrites."
    folder = folder_of(tmp_path, "config.json")
    ours = write_card(folder).read_text()
    assert is_ours(ours) and write_card(folder).read_text() == ours
    for text in ("# Mine\n", ours + "!", ours.replace("apache-2.0", "mit", 1), ours.replace("sha256 of", "sha256 or")):
        (folder / "README.md").write_text(text)
        with pytest.raises(LabError, match="written or changed by somebody else"): write_card(folder)
        assert (folder / "README.md").read_text() == text
    assert write_card(folder, force=True).read_text() == ours and verify(folder).ok
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(LabError, match="somebody else"): write_card(folder)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LabError, match="a link"): write_card(folder, force=True)
    assert not (tmp_path / "elsewhere").exists()


def test_names_from_elsewhere_stay_text(tmp_path):
    "A base whose name would close the table, open a tag or a head of its own."
    evil = "x | y\n---\nlicense: mit\n<script>alert(1)</script> [a](javascript:b) `c`"
    folder = folder_of(tmp_path, "config.json", base={"name": evil, "licence": "a: b\n- c"}, data={"name": evil},
                       settings={evil: evil})
    write_card(folder)
    card = read(folder)
    assert card.data.license == "a: b\n- c" and "<script>" not in card.text and "\n---\nlicense" not in card.text
    assert not re.search(r"(?<!\\)\]\((?!https://huggingface)", card.text)


def test_a_card_of_a_folder_that_has_its_name_only_later(tmp_path):
    folder = folder_of(tmp_path, "config.json")
    text = write_card(folder, name="my model").read_text()
    assert "\n# my model\n" in text and "load_model('my model')" in text and "verify 'my model'" in text
    assert "tickets" not in text and verify(folder).ok


def test_what_has_no_record_has_no_card(tmp_path):
    with pytest.raises(LabError, match="no such folder"): model_card(tmp_path / "nowhere")
    with pytest.raises(LabError, match=r"no manifest.json and no run.json"): model_card(tmp_path)
    folder = folder_of(tmp_path, "tokenizer.json")
    with pytest.raises(LabError, match="nothing to write a card for"): model_card(folder)
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("owner", "other"))
    with pytest.raises(LabError, match="edited"): model_card(folder)


def test_the_commands(tmp_path, capsys):
    "0 whole, 1 not, 2 a mistake; one line for a mistake; JSON for programs."
    folder = folder_of(tmp_path, "config.json", "model.safetensors")
    def said(*words):
        code = cli.main([*map(str, words)])
        return code, *capsys.readouterr()
    assert said("verify", folder)[0] == 0
    code, out, _ = said("verify", folder, "--json")
    noted = json.loads(out)["digest"]
    assert code == 0 and json.loads(out)["ok"] is True and said("verify", folder, "--digest", noted)[0] == 0
    assert said("verify", folder, "--digest", "0" * 64)[0] == 1
    assert said("model-card", folder, "--base-licence", "mit", "--data", "tickets", "--data-licence", "cc0-1.0")[0] == 0
    assert read(folder).data.license == "mit" and "| their licence | cc0-1.0 |" in read(folder).text
    (folder / "config.json").write_text("[]")
    code, out, _ = said("verify", folder)
    assert code == 1 and "altered  config.json: other bytes of the same number" in out
    code, out, _ = said("verify", folder, "--json")
    assert code == 1 and json.loads(out)["altered"] == {"config.json": "other bytes of the same number"}
    (folder / MANIFEST).unlink()
    code, out, _ = said("verify", folder)
    assert code == 1 and f"has no {MANIFEST}" in out
    for words in (["verify", tmp_path / "nowhere"], ["verify"], ["verify", folder, "--no-such"],
                  ["model-card", tmp_path / "nowhere"], ["model-card", folder]):
        code, out, err = said(*words)
        assert code == 2 and err.startswith("qlora-lab: ") and err.count("\n") == 1, words
