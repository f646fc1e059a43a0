"The lab's layers in other trainers, its adapter on other layers: the same gradients, the same logits."
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from conftest import devices, make_llama, make_tokenizer
from qlora_lab.bnb_files import save_quantized
from qlora_lab.data import collate, pair, tokenize
from qlora_lab.linear4bit import Linear4bit
from qlora_lab.lora import add_lora, load_adapter, reset_lora, save_adapter, trainable
from qlora_lab.model import load_model
from qlora_lab.records import LabError
from qlora_lab.train import summed_loss

EXACT = dict(device="cpu", dtype=torch.float32, compute_dtype=torch.float32)
QUIET = dict(report_to=[], save_strategy="no", disable_tqdm=True)
STEP = dict(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_grad_norm=0.)

pytestmark = pytest.mark.usefixtures("one_thread")


class Gradients(TrainerCallback):
    "Keeps the gradients of a step, before it is taken."
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = [p.grad.clone() for p in trainable(model)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "One model, as it is and in 4 bits."
    root = tmp_path_factory.mktemp("elsewhere")
    make_llama(vocab_size=300).save_pretrained(root / "plain")
    make_tokenizer().save_pretrained(root / "plain")
    save_quantized(*load_model(root / "plain", **EXACT)[:1], root / "packed", make_tokenizer())
    return root


def adapted(folder, device="cpu"):
    "A model whose adapters say something, and what it learns from: answers of different lengths, an odd batch."
    model, tokenizer = load_model(folder, **EXACT | {"device": device})
    add_lora(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    reset_lora(model, 0)
    draw = torch.Generator().manual_seed(1)
    for p in trainable(model): p.data += 0.02 * torch.randn(p.shape, generator=draw).to(device)
    rows = [pair(f"sort the list {i}", "sum " * (1 + 3 * (i % 3)), str(i)) for i in range(6)]
    return model.train(), tokenizer, [tokenize(tokenizer, row) for row in rows]


def by_the_lab(folder, device):
    "Gradients of the mean over all learned tokens of three batches."
    model, _, learn = adapted(folder, device)
    total = sum(int(t.mask[1:].sum()) for t in learn)
    for i in range(0, 6, 2): (summed_loss(model, collate(learn[i:i + 2])) / total).backward()
    return [p.grad for p in trainable(model)]


def same(got, want):
    assert len(got) == len(want) > 20
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * w.abs().max().item() if w.is_cuda else 1e-7)


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("device", devices())
def test_the_trainer_of_transformers(kind, checkpointing, device, folders, tmp_path):
    "The lab's tokens, its collate, a model made 4-bit here or opened as such. The adapter is the lab's."
    want = by_the_lab(folders / kind, device)
    model, _, learn = adapted(folders / kind, device)
    packed = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    seen = Gradients()
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=device == "cpu",
                                             gradient_checkpointing=checkpointing, **QUIET, **STEP),
                      train_dataset=learn, data_collator=collate, callbacks=[seen])
    trainer.train()
    same(seen.kept, want)
    assert packed and all(torch.equal(model.get_submodule(n).weight, w) for n, w in packed.items())
    with pytest.raises(LabError, match="save_adapter"): trainer.save_model(tmp_path / "saved")
    save_adapter(model, tmp_path / "adapter")
    again, _ = load_model(folders / kind, **EXACT | {"device": device})
    load_adapter(again, tmp_path / "adapter")
    batch = {k: v.to(device) for k, v in collate(learn).items() if k != "labels"}
    with torch.no_grad(): assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("device", devices())
def test_the_trainer_of_trl(kind, device, folders, tmp_path):
    "Rows with labels pass as they are. Adapters stay in float32, which on bitsandbytes' layers TRL casts to bfloat16."
    if device == "cpu" and torch.cuda.is_available(): pytest.skip("TRL's head is a kernel wherever there is a card")
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    want = by_the_lab(folders / kind, device)
    model, tokenizer, learn = adapted(folders / kind, device)
    rows = [{"input_ids": t.ids.tolist(), "labels": torch.where(t.mask, t.ids, -100).tolist()} for t in learn]
    seen = Gradients()
    trl.SFTTrainer(model, trl.SFTConfig(str(tmp_path), bf16=False, gradient_checkpointing=False, max_length=None,
                                        use_cpu=device == "cpu", **QUIET, **STEP),
                   train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[seen]).train()
    same(seen.kept, want)
    assert all(p.dtype == torch.float32 for p in trainable(model))


def test_the_adapter_on_bitsandbytes_layers_in_peft(folders, tmp_path):
    "PEFT opens the lab's adapter on a model that bitsandbytes made 4-bit: the lab's logits. Without it: others."
    model, _, learn = adapted(folders / "plain")
    save_adapter(model, tmp_path / "adapter")
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folders / "plain", quantization_config=kind, dtype=torch.float32,
                                                  device_map={"": "cpu"}).train()  # in eval mode a CPU repacks it
    batch = {k: v for k, v in collate(learn).items() if k != "labels"}
    with torch.no_grad():
        want, bare = model(**batch).logits, theirs(**batch).logits
        got = PeftModel.from_pretrained(theirs, tmp_path / "adapter").train()(**batch).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (bare - want).abs().max() > 1e-2
