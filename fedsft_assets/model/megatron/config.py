"""Conversion between Megatron-GPT's settings in NeMo's `model_config.yaml` and GPT-2's configuration.

Settings that GPT-2 cannot express are refused by name. Weights and files are handled elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedsft_assets.model.errors import ModelError

Activation = Literal["gelu", "gelu_pytorch_tanh"]

# The field in which an export records the token table's rows before padding; NeMo keeps unknown fields.
UNPADDED = "unpadded_vocab_size"

_MAX_LAYERS = 1024
# Settings that change what a model computes, with the values for GPT-2. A missing setting has the first value:
# the default of NeMo 1.11 (2022), which wrote the published archives, and of all later versions.
_GPT2_VALUES: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu",),
    "normalization": ("layernorm", "LayerNorm"),
    "position_embedding_type": ("learned_absolute",),
    "share_embeddings_and_output_weights": (True,),
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "bias": (True,),
    "add_bias_linear": (True,),
    "gated_linear_unit": (False,),
    "headscale": (False,),
    "normalize_attention_scores": (True,),
    "megatron_legacy": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "apply_embedding_scaling": (False,),
    "qk_layernorm": (False,),
    "multi_latent_attention": (False,),
    "window_size": (None,),
    "num_moe_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
}
# Model parallelism: each archive or folder of such a checkpoint has only a part of the model.
_PARALLEL = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "expert_model_parallel_size"),
)


@dataclass(frozen=True)
class MegatronGPT:
    """The settings of a model that both Megatron-GPT and GPT-2 can express.

    `positions` are the candidates for the number of positions: `max_position_embeddings` in the legacy layout,
    `encoder_seq_length` in Megatron-core; the position table in the weights decides.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    positions: tuple[int, ...]
    epsilon: float
    activation: Activation


def read_settings(settings: Mapping[str, Any], where: str) -> MegatronGPT:
    """Parse the settings of a Megatron-GPT archive. Raises ModelError that names the setting and its value.

    `apply_query_key_layer_scaling` and all fusions except that of GELU do not affect results and are ignored.
    """
    for name, allowed in _GPT2_VALUES.items():
        value = settings.get(name, allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise ModelError(f"{where}: {name}: {value!r} is not supported by GPT-2; expected {allowed[0]!r}")
    for name in _PARALLEL:
        if settings.get(name, 1) not in (None, 1):
            raise ModelError(
                f"{where}: {name}: {settings[name]!r}: the model is partitioned, which is not supported;"
                " merge it into one partition with NeMo's megatron_change_num_partitions.py"
            )
    layers, hidden = _number(settings, "num_layers", where), _number(settings, "hidden_size", where)
    heads = _number(settings, "num_attention_heads", where)
    if layers > _MAX_LAYERS:
        raise ModelError(f"{where}: num_layers: {layers} is more than {_MAX_LAYERS}")
    if hidden % heads:
        raise ModelError(f"{where}: hidden_size: {hidden} is not a multiple of num_attention_heads, {heads}")
    for name, own in (("num_query_groups", heads), ("kv_channels", hidden // heads)):
        if settings.get(name) not in (None, own):
            raise ModelError(f"{where}: {name}: {settings[name]!r} is not supported by GPT-2; expected {own}")
    if settings.get("transformer_engine") and not settings.get("mcore_gpt"):
        raise ModelError(
            f"{where}: transformer_engine: True: Transformer Engine is supported only in Megatron-core (mcore_gpt)"
        )
    lengths = [name for name in ("max_position_embeddings", "encoder_seq_length") if settings.get(name) is not None]
    if not lengths:
        raise ModelError(f"{where}: max_position_embeddings: expected a positive number, found nothing")
    epsilon = settings.get("layernorm_epsilon", 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise ModelError(f"{where}: layernorm_epsilon: expected a small number above 0, found {epsilon!r}")
    ffn = _number(settings, "ffn_hidden_size", where) if settings.get("ffn_hidden_size") is not None else 4 * hidden
    return MegatronGPT(
        layers=layers,
        hidden=hidden,
        heads=heads,
        ffn=ffn,
        positions=tuple(_number(settings, name, where) for name in lengths),
        epsilon=float(epsilon),
        activation=_activation(settings, where),
    )


def gpt2_config(model: MegatronGPT, positions: int, vocabulary: int, eos: int | None) -> dict[str, Any]:
    """The Hugging Face configuration of the model, without dropout, like NVFlare's published fine-tuning.

    `positions` and `vocabulary` are the rows of the tables, including padding.
    """
    import json

    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=model.hidden,
        n_layer=model.layers,
        n_head=model.heads,
        n_inner=model.ffn,
        activation_function=model.activation,
        layer_norm_epsilon=model.epsilon,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return json.loads(config.to_json_string())


def megatron_gpt(hf: Mapping[str, Any], where: str) -> MegatronGPT:
    """Parse a Hugging Face configuration for export to Megatron-GPT.

    Raises ModelError that names a field and value that Megatron-GPT cannot express.
    """
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu"),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in allowed.items():
        if hf.get(name, values[0]) not in values:
            raise ModelError(
                f"{where}: hf.{name}: {hf[name]!r} is not supported by Megatron-GPT; expected"
                f" {' or '.join(map(str, values))}"
            )
    hidden = _number(hf, "n_embd", f"{where}: hf")
    exact = hf.get("activation_function") == "gelu"
    return MegatronGPT(
        layers=_number(hf, "n_layer", f"{where}: hf"),
        hidden=hidden,
        heads=_number(hf, "n_head", f"{where}: hf"),
        ffn=hf.get("n_inner") or 4 * hidden,
        positions=(_number(hf, "n_positions", f"{where}: hf"),),
        epsilon=float(hf.get("layer_norm_epsilon", 1e-5)),
        activation="gelu" if exact else "gelu_pytorch_tanh",
    )


def megatron_settings(model: MegatronGPT, core: bool) -> dict[str, Any]:
    """The model's settings in NeMo's configuration, with the names of NeMo 2.4.1; `read_settings` reads them back."""
    fused = model.activation == "gelu_pytorch_tanh"
    return {
        "mcore_gpt": core,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": model.positions[0],
        "max_position_embeddings": model.positions[0],
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "kv_channels": None,
        "num_query_groups": None,
        "apply_query_key_layer_scaling": False,
        "normalization": "layernorm",
        "layernorm_epsilon": model.epsilon,
        "bias": True,
        "activation": "gelu",
        "bias_activation_fusion": fused,
        "openai_gelu": False,
        "onnx_safe": False,
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "normalize_attention_scores": True,
        "position_embedding_type": "learned_absolute",
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": 128,
    }


def _activation(settings: Mapping[str, Any], where: str) -> Activation:
    """The kind of GELU: both Megatron's fused bias kernel and OpenAI's GELU use the tanh approximation.

    NeMo before 1.13 called the fusion `bias_gelu_fusion`.
    """
    fusion = "bias_gelu_fusion" if "bias_activation_fusion" not in settings else "bias_activation_fusion"
    chosen = {fusion: settings.get(fusion, True), "openai_gelu": settings.get("openai_gelu", False)}
    for name, value in chosen.items():
        if not isinstance(value, bool):
            raise ModelError(f"{where}: {name}: expected true or false, found {value!r}")
    return "gelu_pytorch_tanh" if any(chosen.values()) else "gelu"


def _number(settings: Mapping[str, Any], name: str, where: str) -> int:
    value = settings.get(name)
    if type(value) is not int or value < 1:
        raise ModelError(f"{where}: {name}: expected a positive number, found {value!r}")
    return value
