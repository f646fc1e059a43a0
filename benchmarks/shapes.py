"Shapes of models as people bring them, as the fields of their config.json, and the same made tiny."

HALF = dict(short_factor=[1.] * 48, long_factor=[1.] * 48)  # Phi-4-mini rotates three quarters of 128, in pairs
SHAPES = {
    "llama-7b": dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=32768),
    "llama-3-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
                       rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "qwen2.5-7b": dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768,
                       rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3-8b": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
                     max_position_embeddings=40960, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "gemma-3-4b": dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
                       num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=262208,
                       sliding_window=1024, max_position_embeddings=131072),
    "phi-4-mini": dict(model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
                       num_attention_heads=24, num_key_value_heads=8, vocab_size=200064, tie_word_embeddings=True,
                       partial_rotary_factor=0.75, original_max_position_embeddings=4096, sliding_window=262144,
                       max_position_embeddings=131072, bos_token_id=199999, eos_token_id=199999, pad_token_id=199999,
                       rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, **HALF)),
    "qwen3-30b-a3b": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                          num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936,
                          moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
                          max_position_embeddings=40960, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "mistral-nemo-12b": dict(model_type="mistral", hidden_size=5120, intermediate_size=14336, num_hidden_layers=40,
                             num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=131072,
                             sliding_window=None, max_position_embeddings=131072,
                             rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "llama-3.2-3b": dict(model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                         num_attention_heads=24, num_key_value_heads=8, head_dim=128, vocab_size=128256,
                         tie_word_embeddings=True, max_position_embeddings=131072,
                         rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "gemma-2-9b": dict(model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=256, vocab_size=256000,
                       query_pre_attn_scalar=256, sliding_window=4096, max_position_embeddings=8192),
    "qwen3-14b": dict(model_type="qwen3", hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
                      num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=151936,
                      max_position_embeddings=40960, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "granite-3.1-8b": dict(model_type="granite", hidden_size=4096, intermediate_size=12800, num_hidden_layers=40,
                           num_attention_heads=32, num_key_value_heads=8, vocab_size=49155, tie_word_embeddings=True,
                           attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0,
                           residual_multiplier=0.22, max_position_embeddings=131072,
                           rope_parameters=dict(rope_type="default", rope_theta=1e7)),
    "olmo-2-7b": dict(model_type="olmo2", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32, vocab_size=100352, max_position_embeddings=4096,
                      rope_parameters=dict(rope_type="default", rope_theta=5e5)),
    "smollm3-3b": dict(model_type="smollm3", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                       num_attention_heads=16, num_key_value_heads=4, vocab_size=128256, tie_word_embeddings=True,
                       max_position_embeddings=65536, pad_token_id=128004,
                       rope_parameters=dict(rope_type="default", rope_theta=5e6)),
}
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=320, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=1)
SMALLER = dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, sliding_window=40)


def shape_config(name: str, tiny: bool = False, layers: int | None = None):
    "The config of a shape, or of its first layers; a tiny one has its kinds of layers."
    from transformers import AutoConfig
    fields = dict(SHAPES[name])
    if layers: fields["num_hidden_layers"] = layers
    if tiny:
        fields |= TINY | {k: v for k, v in SMALLER.items() if k in fields}
        if name == "phi-4-mini":
            fields["rope_parameters"] |= dict(short_factor=[1.] * 6, long_factor=[1.] * 6)
            fields["original_max_position_embeddings"] = 128
    return AutoConfig.for_model(**fields)
