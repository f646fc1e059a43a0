"""Tiny random models of every family that the lab is held to: two layers, 64 wide, 320 words, no dropout.

Every row of a weight is a multiple of 64 long: bitsandbytes 0.50.2 decodes others wrongly on a CPU.
`FAMILIES` gives a config by name, `build` a random model in float32, `folder` a folder with model and tokenizer as
`save_pretrained` writes them.
"""
from functools import cache
from pathlib import Path

import torch

from conftest import make_tokenizer

TOKENS = dict(vocab_size=320, bos_token_id=None, eos_token_id=1, pad_token_id=1)
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **TOKENS)
LLAMA = dict(intermediate_size=128, num_key_value_heads=2, max_position_embeddings=512, **SMALL)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
              moe_intermediate_size=64, first_k_dense_replace=1)
LATENT = dict(q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=28,
              patch_size=14)


def config(kind, **settings):
    from transformers import AutoConfig
    return AutoConfig.for_model(kind, **settings)


def of(kind, base=LLAMA, without=(), **more):
    "A function that makes the config: transformers is imported when it is called."
    settings = {k: v for k, v in base.items() if k not in without} | more
    return lambda: config(kind, **settings)


def gemma3():
    "Gemma 3 with its eyes: the text model stands below `language_model`."
    return config("gemma3", text_config=dict(head_dim=16, **LLAMA), vision_config=VISION, mm_tokens_per_image=4,
                  image_token_index=300, boi_token_index=301, eoi_token_index=302, eos_token_id=1, pad_token_id=1)


FAMILIES = {
    "llama": of("llama"),
    "mistral": of("mistral"),
    "qwen2": of("qwen2", tie_word_embeddings=True),
    "qwen3": of("qwen3", head_dim=16),
    "gemma": of("gemma", head_dim=16),
    "gemma2": of("gemma2", head_dim=16),
    "gemma3_text": of("gemma3_text", head_dim=16),
    "gemma3": gemma3,
    "phi": of("phi"),
    "phi3": of("phi3"),
    "gpt2": of("gpt2", TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0,
               attn_pdrop=0.0),
    "gpt_neox": of("gpt_neox", without=["num_key_value_heads"]),
    "opt": of("opt", SMALL, ffn_dim=128, max_position_embeddings=512, word_embed_proj_dim=64, dropout=0.0),
    "bloom": of("bloom", TOKENS, hidden_size=64, n_layer=2, n_head=4),
    "falcon": of("falcon", SMALL, max_position_embeddings=512, new_decoder_architecture=False, multi_query=True),
    "granite": of("granite"),
    "cohere": of("cohere"),
    "olmo2": of("olmo2"),
    "smollm3": of("smollm3"),
    "stablelm": of("stablelm"),
    "starcoder2": of("starcoder2"),
    "mixtral": of("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "olmoe": of("olmoe", **EXPERTS),
    "qwen2_moe": of("qwen2_moe", moe_intermediate_size=64, shared_expert_intermediate_size=64, **EXPERTS),
    "qwen3_moe": of("qwen3_moe", head_dim=16, moe_intermediate_size=64, **EXPERTS),
    "qwen3_next": of("qwen3_next", head_dim=16, moe_intermediate_size=64, shared_expert_intermediate_size=64,
                     linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
                     layer_types=["linear_attention", "full_attention"], **EXPERTS),
    "gpt_oss": of("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": of("deepseek_v3", LLAMA | dict(num_key_value_heads=4), **ROUTED, **LATENT),
    "glm4_moe": of("glm4_moe", head_dim=16, **ROUTED),
    "llama4_text": of("llama4_text", head_dim=16, num_local_experts=4, intermediate_size_mlp=128,
                      attention_chunk_size=128),
    "mamba": of("mamba", TOKENS, hidden_size=64, num_hidden_layers=2, state_size=8),
    "mamba2": of("mamba2", TOKENS, hidden_size=64, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=16,
                 n_groups=1),
}


def build(name, seed=0, dtype=torch.float32, **changes):
    "A random model of a family, in eval mode; `changes` are set on its config."
    from transformers import AutoModelForCausalLM
    made = FAMILIES[name]()
    for key, value in changes.items(): setattr(made, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    for key, buffer in model.named_buffers():  # a router's bias starts as zeros: a lost one would not be seen
        if key.endswith("e_score_correction_bias"): buffer.normal_()
    return model.eval()


@cache
def tokenizer(): return make_tokenizer()


def folder(name, where, **changes):
    "A folder below `where` with a random model of a family and a tokenizer."
    made = Path(where) / name
    build(name, **changes).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def ids(seed=1, rows=2, length=12):
    "Tokens to ask a model with."
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, **kw):
    "What a model makes of `ids`."
    with torch.no_grad(): return model(input_ids=ids(**kw).to(next(model.parameters()).device)).logits.float()
