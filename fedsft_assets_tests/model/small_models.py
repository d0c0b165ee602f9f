"""Small causal language models of many kinds, with random weights, as tests use them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_WIDTH = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA = _WIDTH | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
_QWEN_MOE = _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 777.0}
_SSM = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}

SMALL = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
# With infinite numbers in their configuration.
INFINITE: dict[str, dict[str, Any]] = {
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
    },
    "nemotron_h": {
        **{**SMALL, "head_dim": 16, "layers_block_type": ["mamba", "attention"]},
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
    },
    "falcon_h1": {**SMALL, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 16},
    "bamba": {**SMALL, **_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **{**SMALL, **_MAMBA, "layer_types": ["mamba", "attention"]},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    },
}

# Rotary embeddings are never those of the defaults: whoever forgets to read what is said about them gets another model.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": _LLAMA | {"rope_parameters": _YARN},
    "gpt_neox": _WIDTH
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}},
    "persimmon": _WIDTH
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.75}},
    "gemma3_text": _WIDTH
    | {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1554.0},
        },
    },
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _QWEN_MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _QWEN_MOE | {"head_dim": 8},
    "olmoe": _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": _WIDTH | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _YARN},
    "deepseek_v3": _LLAMA
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    },
    "jamba": _WIDTH
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "mamba": _SSM,
    "falcon_mamba": _SSM,
    **INFINITE,
    "roberta": _WIDTH | {"is_decoder": True, "pad_token_id": 1},
}
DENSE = ["gpt2", "llama", "gpt_neox", "persimmon", "gemma3_text"]
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss", "deepseek_v3", "jamba"]
MAMBA = ["mamba", "falcon_mamba"]


def small_model(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """A model of this kind for the tokens of a tokenizer, the same each time, in evaluation mode."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **special | CONFIGS[kind] | {"vocab_size": len(tokenizer)} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        lm = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in lm.parameters():  # biases and gates are not zero
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return lm.eval()
