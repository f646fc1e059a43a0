"""The planner takes every family: what it rehearses without bytes is what a live step of that family takes on a CPU."""
import json
import warnings
from dataclasses import asdict

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig
from test_memory import lean, own_bytes, step_peak  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM

from benchmarks.common import random_batch
from qlora_lab import plan
from qlora_lab.checkpointing import checkpoint_layers
from qlora_lab.engine.dispatch import REHEARSED, faster, rehearsing, twin
from qlora_lab.engine.empty_answers import Answers, empty_attention
from qlora_lab.engine.known_models import FAMILIES as PLANNED
from qlora_lab.engine.known_models import KNOWN, model_config
from qlora_lab.engine.paged_adamw import PagedAdamW
from qlora_lab.engine.rehearsal import Settings, empty_model
from qlora_lab.linear4bit import quantize_model
from qlora_lab.lora import add_lora, trainable
from qlora_lab.memory import watch_step
from qlora_lab.records import LabError

pytestmark = pytest.mark.usefixtures("one_thread", "lean")

LAYERED = {  # as many layers as it takes to have every kind in several places
    "gemma3_text": dict(num_hidden_layers=8, sliding_window=16),
    "qwen3_next": dict(num_hidden_layers=6, layer_types=["linear_attention", "full_attention", "linear_attention"] * 2),
    "deepseek_v3": dict(num_hidden_layers=5, first_k_dense_replace=2),
    "llama4_text": dict(num_hidden_layers=6, interleave_moe_layer_step=2),
    "mamba": dict(num_hidden_layers=5),
}


def described(name, **changes):
    "A family's tiny config as the content of its config.json."
    fields = FAMILIES[name]().to_dict()
    if "num_hidden_layers" in changes:  # which kind each layer is follows from their number
        fields = {k: v for k, v in fields.items() if not (isinstance(v, list) and k.endswith(("_types", "_layers")))}
    return json.loads(json.dumps(fields | changes, default=str))


def live(config, s):
    "A real model of random weights, made without the planner's help."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(config), dtype=getattr(torch, s.dtype))
    quantize_model(model, compute_dtype=getattr(torch, s.dtype))
    add_lora(model, LoraConfig(r=s.rank, target_modules="all-linear"), dtype=getattr(torch, s.adapter_dtype))
    if s.checkpointing: checkpoint_layers(model, layers=s.checkpointed_layers or None)
    return model.train()


def compare(config, s, within=0.):
    "Step, model and optimizer: planned against live."
    p, model = plan(config, **asdict(s)), live(config, s)
    batch = random_batch(s.batch_size, s.sequence, vocabulary=300)
    watch_step(model, batch)  # tables that are made once and stay
    for q in trainable(model): q.grad = None
    step = watch_step(model, batch).peak
    assert abs(step_peak(p) / step - 1) <= within, (step_peak(p), step)
    held = sum(v for k, v in p.held.items() if k not in ("optimizer state", "libraries", "gradients from the start"))
    assert abs(held / own_bytes(model) - 1) <= 0.001
    assert p.held["optimizer state"] == PagedAdamW(trainable(model)).device_bytes


ROUTED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v3", "glm4_moe",
          "llama4_text")
# Not counted: that a random router gives experts unequal shares; two numbers of 8 bytes that Falcon makes of its mask.
WITHIN = dict.fromkeys(ROUTED, 0.01) | {"falcon": 1e-4}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_plan_is_the_step(name, checkpointing):
    s = Settings(rank=4, batch_size=2, sequence=24, dtype="float32", checkpointing=checkpointing, device="cpu")
    compare(described(name), s, WITHIN.get(name, 0.))


@pytest.mark.parametrize("spare", [0, 1])
def test_an_expert_for_tokens_of_nobody_gets_none(spare):
    "Newer transformers ask for one more than there are; a list of another length is taken as it is."
    tokens, experts, k = 48, 4, 2
    with Answers("cpu"):
        _, chosen = torch.topk(torch.empty(tokens, experts, device="meta"), k, dim=-1)
        asked = torch.nn.functional.one_hot(chosen, experts + spare).permute(2, 1, 0)
        hit = torch.greater(asked.sum(dim=(-1, -2)), 0).nonzero()
        shares = [len(torch.where(asked[i])[1]) for i in hit[:, 0].tolist()]
        assert len(torch.empty(7, device="meta").nonzero()) == 7
    assert shares == [tokens * k // experts] * experts


@pytest.mark.parametrize("checkpointed", [None, 0, 3])
@pytest.mark.parametrize("name", LAYERED)
def test_a_plan_of_several_kinds_of_layers(name, checkpointed):
    s = Settings(rank=4, batch_size=2, sequence=24, dtype="float32", checkpointing=checkpointed is not None,
                 checkpointed_layers=checkpointed or 0, device="cpu")
    compare(described(name, **LAYERED[name]), s, WITHIN.get(name, 0.))


def test_experts_are_rehearsed_as_the_device_has_them():
    "In groups on a GPU, in the model's own loop on a CPU; which of them is no setting of the plan's."
    model = empty_model(model_config(described("mixtral")), Settings(rank=4))
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    x, chosen = torch.empty(24, 64, device="meta"), torch.empty(24, 2, dtype=torch.long, device="meta")
    def ways(device):
        with rehearsing([twin(name, device) for name in REHEARSED]):
            return faster("experts", x.device, experts, x, chosen, torch.empty(24, 2, device="meta"))
    assert ways("cuda").shape == x.shape and ways("cpu") is None


def test_a_plan_does_not_tell_of_a_share():
    "Of a few layers that are rehearsed: the share in 4 bits is said of the model that is trained."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(described("llama"), rank=3)


def test_every_family_of_the_matrix_is_planned():
    assert set(FAMILIES) == set(PLANNED)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-30b-a3b", "gemma-3-4b", "phi-4-mini"])
def test_known_shapes_are_planned_for_a_card(name):
    "Within seconds; with checkpoints in host memory less is on the card."
    p = plan(name, 80, rank=64, checkpointing=True, batch_size=8, sequence=1024)
    assert p.fits and p.again(checkpoints_in="host").total_gib < p.total_gib


def test_known_shapes_have_the_sizes_of_their_names():
    "Weights in billions, from a model without bytes."
    wanted = {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7, "qwen3-4b": 4., "qwen3-8b": 8.2, "qwen3-14b": 14.8,
              "qwen3-32b": 32.8, "qwen3-30b-a3b": 30.5, "gemma-3-1b": 1., "gemma-3-4b": 3.9, "gemma-3-12b": 11.8,
              "gemma-3-27b": 27., "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "smollm3-3b": 3.08, "phi-4": 14.7,
              "phi-4-mini": 3.84, "mixtral-8x7b": 46.7}
    with torch.device("meta"):
        for name, billion in wanted.items():
            model = AutoModelForCausalLM.from_config(model_config(name))
            found = sum(p.numel() for p in model.parameters()) / 1e9
            assert abs(found / billion - 1) < 0.02, (name, found)
    assert set(wanted) <= set(KNOWN)


@pytest.mark.parametrize("name, odd, said", [
    ("qwen3", dict(num_key_value_heads=0), "num_key_value_heads"), ("phi", dict(num_key_value_heads=-1), "heads is -1"),
    ("bloom", dict(n_head=7), "divisible"), ("falcon", dict(num_attention_heads=7), "divisible"),
    ("phi3", dict(hidden_act="x"), "'x'"), ("gpt2", dict(embd_pdrop=7), "dropout"),
    ("mixtral", dict(num_experts_per_tok=9), "not in range"), ("qwen3", dict(head_dim=0), "built"),
    ("mistral", dict(pad_token_id=99999), "Padding_idx"), ("gemma2", dict(sliding_window=None), "sliding_window"),
    ("glm4_moe", dict(return_dict=False), "rehearsed"), ("llama4_text", dict(head_dim=3), "shape"),
    ("gpt_oss", dict(num_local_experts=-1), "num_local_experts"), ("gpt2", dict(n_layer=10**15), "n_layer"),
    ("llama", dict(vocab_size=10**15), "vocab_size")], ids=str)
def test_a_config_that_describes_no_model_is_refused(name, odd, said):
    "In one sentence, whether its sizes, building it or a step of it says so; what was raised is chained."
    with pytest.raises(LabError, match=said) as refused:
        plan(FAMILIES[name]().to_dict() | odd, sequence=32, rank=4, device="cpu", dtype="float32")
    assert "\n" not in str(refused.value) and ("cannot be" in str(refused.value)) == bool(refused.value.__cause__)


def test_a_number_below_zero_that_is_no_size():
    "A layer counted from the end, as the vision part of some models names one; -1 where there is no limit."
    odd = dict(vision_feature_layer=-2, max_relative_positions=-1)
    plan(FAMILIES["llama"]().to_dict() | odd, sequence=32, rank=4, device="cpu", dtype="float32")


def test_a_fault_of_the_lab_is_chained(monkeypatch):
    "Named in the sentence, and there to be looked at."
    def faulty(*_): raise RuntimeError("a fault of the lab's")
    monkeypatch.setattr("qlora_lab.engine.planner.rehearsed", faulty)
    with pytest.raises(LabError, match="a fault of the lab's") as refused: plan("smollm2-135m", device="cpu")
    assert type(refused.value.__cause__) is RuntimeError


def test_fewer_heads_of_keys_where_torch_has_no_kernel_for_them(monkeypatch):
    "Where a CPU has none the scores are multiplied out, and it is still said that heads are shared."
    monkeypatch.setattr("qlora_lab.engine.empty_answers._keeps_scores", lambda *_: True)
    q, k = (torch.empty(1, heads, 5, 24, device="meta") for heads in (6, 3))
    for mask in (None, torch.empty(1, 1, 5, 5, dtype=torch.bool, device="meta")):
        assert empty_attention("cpu", q, k, k, mask, is_causal=mask is None, enable_gqa=True).shape == q.shape
