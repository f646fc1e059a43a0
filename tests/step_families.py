"Tiny random models of each family, for tests of what happens around their layers."
import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(vocab_size=128, bos_token_id=None, eos_token_id=1, pad_token_id=None)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, **COMMON)
NARROW = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1,
                n_shared_experts=1, first_k_dense_replace=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
LONG = dict(rope_parameters={"rope_type": "longrope", "rope_theta": 10000., "short_factor": [1.] * 4,
                             "long_factor": [2.] * 4, "factor": 2.}, original_max_position_embeddings=128)
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
              layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=16, head_dim=8)
STATES = dict(hidden_size=32, num_hidden_layers=2, state_size=8, **COMMON)
OPT = dict(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
FALCON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256, **COMMON)

FAMILIES = {
    "llama": SIZES, "mistral": SIZES | dict(sliding_window=20), "qwen2": SIZES | dict(tie_word_embeddings=True),
    "qwen3": SIZES | dict(head_dim=8), "gemma": SIZES | dict(head_dim=8),
    "gemma2": SIZES | dict(head_dim=8, sliding_window=20, final_logit_softcapping=2.),
    "gemma3_text": SIZES | dict(head_dim=8, sliding_window=20, final_logit_softcapping=2.), "phi": SIZES,
    "phi3": SIZES | LONG, "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, **COMMON), "gpt_neox": NARROW,
    "opt": OPT | COMMON | dict(word_embed_proj_dim=16), "bloom": dict(hidden_size=32, n_layer=2, n_head=4, **COMMON),
    "falcon": FALCON, "falcon alibi": FALCON | dict(alibi=True, new_decoder_architecture=False),
    "granite": SIZES | dict(logits_scaling=4., residual_multiplier=0.5), "cohere": SIZES | dict(logit_scale=3.),
    "cohere2": SIZES | dict(logit_scale=3., sliding_window=20), "olmo2": SIZES, "smollm3": SIZES, "stablelm": SIZES,
    "starcoder2": SIZES | dict(sliding_window=20), "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2),
    "olmoe": SIZES | dict(num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": SIZES | EXPERTS | dict(shared_expert_intermediate_size=16),
    "qwen3_moe": SIZES | EXPERTS | dict(head_dim=8), "qwen3_next": SIZES | EXPERTS | LINEAR,
    "gpt_oss": SIZES | dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=20),
    "deepseek_v3": NARROW | DEEPSEEK | LATENT, "glm4_moe": SIZES | DEEPSEEK | dict(head_dim=8),
    "llama4_text": SIZES | dict(head_dim=8, num_local_experts=4, intermediate_size_mlp=48, attention_chunk_size=20),
    "mamba": STATES, "mamba2": STATES | dict(num_heads=8, head_dim=8, n_groups=1),
    "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=256, **COMMON),
}


def family(name: str, seed: int = 0, **more):
    "A model in float32 whose logits are far from even, frozen but for the weights of its first layer's products."
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.split()[0], **FAMILIES[name] | more)
    for rate in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, rate): setattr(config, rate, 0.)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.get_output_embeddings().parameters(): p.data.mul_(20)
    return learning(model)


def learning(model):
    "Frozen, but for the matrices of the decoder's list of layers."
    model.requires_grad_(False)
    for name, p in model.named_parameters(): p.requires_grad_(p.dim() == 2 and (".layers." in name or ".h." in name or
                                                                                ".blocks." in name))
    return model.train()


def gemma3_with_vision(seed: int = 0):
    "The model with a vision tower, asked about text."
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    torch.manual_seed(seed)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)
    text = SIZES | dict(head_dim=8, sliding_window=20, final_logit_softcapping=2.)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127,
                          boi_token_index=126, eoi_token_index=125)
    return learning(Gemma3ForConditionalGeneration(config).to(torch.float32))
