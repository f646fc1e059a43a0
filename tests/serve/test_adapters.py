"An adapter as GGUF, put on its base by llama.cpp: logits as PEFT has them."
import numpy as np
import pytest
import torch
from families import ids
from served import served

from conftest import make_llama, make_tokenizer

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make test-serve")

from qlora_lab.engine.gguf_adapters import adapter_to_gguf  # noqa: E402
from qlora_lab.engine.gguf_files import to_gguf  # noqa: E402

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("more", [
    {}, dict(use_rslora=True), dict(rank_pattern={"q_proj": 8}, alpha_pattern={"up_proj": 3})])
def test_an_adapter_on_its_base(more, tmp_path):
    from peft import LoraConfig, get_peft_model
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    torch.manual_seed(1)
    model = get_peft_model(make_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False,
                                                    **more)).eval()
    model.save_pretrained(tmp_path / "adapter")
    row = ids(rows=1, length=24)
    with torch.no_grad():
        ours = model(input_ids=row).logits[0].numpy()
        with model.disable_adapter(): plain = model(input_ids=row).logits[0].numpy()
    file, lora = to_gguf(base, "F32"), adapter_to_gguf(tmp_path / "adapter", base=base)
    with served(file, lora_path=str(lora)) as opened: theirs = opened.logits(row[0].tolist())
    assert np.abs(theirs - ours).max() < 1e-3 * ours.std() < np.abs(plain - ours).max() / 100
