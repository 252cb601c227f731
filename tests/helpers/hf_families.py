"""Configs of small models of many architectures."""

from __future__ import annotations

from typing import Any

__all__ = ["MODELS", "MORE", "VOCABULARY"]

VOCABULARY = 97

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # tied random ones repeat the last token for ever
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_MIXED = ["sliding_attention", "full_attention"] * 2
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# Name -> (config class, arguments). Windows are shorter than the text.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GQA),
    "Mistral, window 16": ("MistralConfig", {**_GQA, "sliding_window": 16}),
    "Qwen2": ("Qwen2Config", _GQA),
    "Qwen2, windows": (
        "Qwen2Config",
        {**_GQA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "Qwen3": ("Qwen3Config", {**_GQA, "head_dim": 24}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**_GQA, **_MOE}),
    "Gemma 2": (
        "Gemma2Config",
        {**_GQA, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "Gemma 3": (
        "Gemma3TextConfig",
        {**_GQA, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": _MIXED},
    ),
    "Gemma 4, shared K and V": (
        "Gemma4TextConfig",
        {
            **_GQA,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 16,
            "layer_types": _MIXED,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "Phi-3": ("Phi3Config", _GQA),
    "GPT-OSS": (
        "GptOssConfig",
        {
            **_GQA,
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _MIXED,
        },
    ),
    "DiffLlama": ("DiffLlamaConfig", _GQA),
    "OLMo-2": ("Olmo2Config", _GQA),
    "Granite": ("GraniteConfig", {**_GQA, "attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "StableLM": ("StableLmConfig", _GQA),
    "Falcon": (
        "FalconConfig",
        {key: value for key, value in _COMMON.items() if key != "intermediate_size"},
    ),
    "Falcon, ALiBi": (
        "FalconConfig",
        {**{key: value for key, value in _COMMON.items() if key != "intermediate_size"}, "alibi": True},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", _COMMON),
    "GPT-2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
    ),
    "Llama 4, chunks": (
        "Llama4TextConfig",
        {
            **_GQA,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "moe_layers": [],
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 3,
        },
    ),
    **{
        name: (f"{name}Config", {**_GQA, **more})
        for name, more in {
            "Apertus": {},
            "Arcee": {},
            "BitNet": {},
            "Cohere": {},
            "Cohere2": {"head_dim": 16, "sliding_window": 16, "layer_types": _MIXED},
            "Ernie4_5": {"head_dim": 16},
            "Exaone4": {"head_dim": 16, "sliding_window": 16, "layer_types": _MIXED},
            "Gemma": {"head_dim": 16},
            "Glm": {"head_dim": 16},
            "Glm4": {"head_dim": 16},
            "Helium": {"head_dim": 16},
            "HunYuanDenseV1": {"head_dim": 16},
            "Ministral": {"head_dim": 16, "sliding_window": 16, "layer_types": _MIXED},
            "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "Nemotron": {},
            "Olmo": {},
            "Olmo3": {"sliding_window": 16, "layer_types": _MIXED},
            "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
            "Persimmon": {"num_key_value_heads": 4},
            "Phi": {},
            "SeedOss": {"head_dim": 16},
            "SmolLM3": {},
            "Starcoder2": {"sliding_window": 16},
        }.items()
    },
    "GPT-J": (
        "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 16},
    ),
    "MPT": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 512, "use_cache": True},
    ),
    "OPT": (
        "OPTConfig",
        {
            **{key: value for key, value in _COMMON.items() if key != "intermediate_size"},
            "ffn_dim": 96,
            "init_std": 0.25,
        },
    ),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        {
            **_GQA,
            **_MOE,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}


# Further decoders, for what runs models without transformers' generate().
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3, longrope": (
        "Phi3Config",
        {
            **_GQA,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 128,
                "short_factor": [1.5] * 8,
                "long_factor": [4.0] * 8,
            },
        },
    ),
    "Llama, dynamic NTK": (
        "LlamaConfig",
        {
            **_GQA,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "Llama, YaRN": (
        "LlamaConfig",
        {
            **_GQA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "DeepSeek-V2": (
        "DeepseekV2Config",
        {
            **MODELS["DeepSeek-V3"][1],
            "topk_method": "greedy",
        },
    ),
    "Gemma 3n, shared K and V": (
        "Gemma3nTextConfig",
        {
            **_GQA,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": _MIXED,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "GPT-BigCode": (
        "GPTBigCodeConfig",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.25,
        },
    ),
    "BioGpt": ("BioGptConfig", {**_COMMON}),
    **{
        name: (f"{name}Config", {**_GQA, **more})
        for name, more in {
            "AriaText": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            "Dots1": {
                **_MOE,
                "n_routed_experts": 4,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
            "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_layer_start_index": 1},
            "FlexOlmo": {"num_experts": 4, "num_experts_per_tok": 2},
            "Glm4Moe": {
                **_MOE,
                "head_dim": 16,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
            "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "Qwen2Moe": {**_MOE, "shared_expert_intermediate_size": 32},
        }.items()
    },
}
