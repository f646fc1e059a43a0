"Merging and merge-aware training on a GPU: the same bits in training and in the merged model, the CPU's codes."
import families
import pytest
import torch
from peft import LoraConfig

from conftest import make_llama
from qlora_lab.dithering import quantize_dithered
from qlora_lab.double_quant import quantize_4bit
from qlora_lab.engine.dispatch import use_kernels
from qlora_lab.engine.fusing import fuse_layers, is_fused
from qlora_lab.engine.merge_aware import MergedLinear, through_quantizer
from qlora_lab.linear4bit import quantize_model
from qlora_lab.lora import add_lora, trainable
from qlora_lab.ship import merge
from qlora_lab.train import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def adapted(): return adapted_of(make_llama())


def adapted_of(plain):
    torch.manual_seed(0)
    model = quantize_model(plain.cuda())
    add_lora(model, LoraConfig(r=8, target_modules="all-linear"), seed=0)
    for p in trainable(model): p.data += 0.02 * torch.randn_like(p)
    return model


@torch.no_grad()
def logits(model): return model(input_ids=families.ids().cuda()).logits


def test_dithered_codes_are_those_of_the_cpu():
    torch.manual_seed(0)
    base = quantize_4bit(torch.randn(512, 1000))
    target = base.dequantize(torch.float32) + 0.02 * torch.randn(512, 1000)
    here, there = quantize_dithered(target, base), quantize_dithered(target.cuda(), base.to("cuda"))
    assert (here.packed != there.packed.cpu()).float().mean() < 1e-5


@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_training_is_on_the_merged_weights(rounding):
    "Of a fused model too: its layers give way, and what was trained is what is merged, to the bit."
    model = adapted().train()
    assert fuse_layers(model) is model and all(map(is_fused, model.model.layers))
    before = logits(model)
    assert through_quantizer(model, rounding) == 14
    assert not torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for _ in range(3):
        model(input_ids=families.ids().cuda(), labels=families.ids().cuda()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(isinstance(m, MergedLinear) for m in model.modules()) == 14
    wanted = logits(model.eval())
    assert torch.equal(logits(merge(model, how="4bit", rounding=rounding)), wanted)


def test_a_step_through_the_quantizer_is_recorded(recwarn):
    "Nothing in it waits for the card: the same losses as without a recording, and no word of one that failed."
    batch = {"input_ids": families.ids(), "labels": families.ids(), "attention_mask": torch.ones_like(families.ids())}
    def losses(model):
        through_quantizer(model)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        return [train_step(model, optimizer, [batch], 1e-3, 0.3)[0] for _ in range(5)]
    use_kernels(False)
    try: called = losses(adapted().train())
    finally: use_kernels()
    model = adapted().train()
    torch.testing.assert_close(losses(model), called, rtol=1e-3, atol=1e-3)
    assert any(graph is not None for graph, _, _ in model._graph.graphs.values())
    assert not [w for w in recwarn if "without a graph" in str(w.message)]


def test_merged_into_plain_weights():
    model = adapted().eval()
    wanted = logits(model)
    got = logits(merge(model, dtype=torch.float32))
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_a_pass_through_the_quantizer_keeps_no_weight():
    "What is allocated after a forward pass of one layer is its input and its output."
    model = adapted()
    through_quantizer(model)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(8, 64, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # tables and handles are there now
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 2048


def test_merged_into_the_original(tmp_path):
    "The checkpoint lies in memory of the host, the adapters on the card."
    plain = make_llama()
    plain.save_pretrained(tmp_path)
    model = adapted_of(plain)
    on_host = adapted_of(make_llama()).cpu()
    got, wanted = (merge(m.eval(), how="original", base=tmp_path, dtype=torch.float32) for m in (model, on_host))
    for name, w in wanted.state_dict().items(): torch.testing.assert_close(got.state_dict()[name].cpu(), w)
