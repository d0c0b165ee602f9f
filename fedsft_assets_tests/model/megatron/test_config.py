"""Megatron's settings: what GPT-2 can express is understood, in old and new words, and the rest is refused by name."""

import pytest

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.config import MegatronGPT, gpt2_config, megatron_gpt, megatron_settings, read_settings
from fedsft_assets_tests.model.megatron_archives import SETTINGS, SHAPE

MODEL = MegatronGPT(
    layers=SHAPE.layers,
    hidden=SHAPE.hidden,
    heads=SHAPE.heads,
    ffn=SHAPE.ffn,
    positions=(SHAPE.positions, SHAPE.positions),
    epsilon=1e-5,
    activation="gelu_pytorch_tanh",
)


def test_settings_of_2022_are_understood_with_nemos_defaults_for_what_came_later():
    assert read_settings(SETTINGS, "a.nemo") == MODEL


def test_what_is_not_said_has_nemos_default():
    bare = {name: SETTINGS[name] for name in ("num_layers", "hidden_size", "num_attention_heads")}
    assert read_settings({**bare, "max_position_embeddings": SHAPE.positions}, "a.nemo") == MegatronGPT(
        layers=3, hidden=24, heads=3, ffn=96, positions=(32,), epsilon=1e-5, activation="gelu_pytorch_tanh"
    )


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_pytorch_tanh"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"bias_gelu_fusion": False, "bias_activation_fusion": True}, "gelu_pytorch_tanh"),
        ({"bias_gelu_fusion": True, "bias_activation_fusion": False}, "gelu"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_pytorch_tanh"),
        ({"bias_gelu_fusion": False, "onnx_safe": True}, "gelu"),
    ],
    ids=str,
)
def test_the_form_of_gelu_follows_from_its_fusion_under_both_of_its_names(changes, activation):
    assert read_settings({**SETTINGS, **changes}, "a.nemo").activation == activation


@pytest.mark.parametrize(
    "changes",
    [
        {"apply_query_key_layer_scaling": False},
        {"normalization": "LayerNorm"},
        {"kv_channels": 8, "num_query_groups": 3},
        {"transformer_engine": True, "mcore_gpt": True},
        {"sequence_parallel": True, "fp32_residual_connection": True},
        {"virtual_pipeline_model_parallel_size": None, "num_moe_experts": None},
    ],
    ids=str,
)
def test_settings_that_change_no_value_are_no_matter(changes):
    assert read_settings({**SETTINGS, **changes}, "a.nemo") == MODEL


_REFUSED = [
    ("position_embedding_type", "rope"),
    ("activation", "swiglu"),
    ("activation", "squared-relu"),
    ("normalization", "layernorm1p"),
    ("normalization", "rmsnorm"),
    ("share_embeddings_and_output_weights", False),
    ("num_query_groups", 1),
    ("kv_channels", 16),
    ("tensor_model_parallel_size", 2),
    ("pipeline_model_parallel_size", 4),
    ("transformer_block_type", "post_ln"),
    ("bias", False),
    ("headscale", True),
    ("normalize_attention_scores", False),
    ("megatron_legacy", True),
    ("attention_type", "multiquery"),
    ("num_moe_experts", 8),
    ("window_size", [128, 0]),
    ("transformer_engine", True),
    ("layernorm_epsilon", 0),
    ("layernorm_epsilon", "small"),
    ("bias_gelu_fusion", "yes"),
    ("num_layers", 0),
    ("num_layers", 10**9),
    ("hidden_size", "${oc.env:HOME}"),
    ("num_attention_heads", True),
    ("num_attention_heads", 5),
    ("ffn_hidden_size", -4),
]


@pytest.mark.parametrize(("name", "value"), _REFUSED, ids=str)
def test_settings_that_gpt2_cannot_express_are_refused_by_name_and_value(name, value):
    shown = "True" if value is True else str(value).replace("$", r"\$").replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ModelError, match=rf"^a\.nemo: .*{name}.*{shown}"):
        read_settings({**SETTINGS, name: value}, "a.nemo")


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads"])
def test_settings_that_are_missing_are_named(name):
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    with pytest.raises(ModelError, match=rf"^a\.nemo: {name}: expected a positive number, found None"):
        read_settings(settings, "a.nemo")


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_what_is_written_for_a_gpt2_is_read_as_the_same_model(core, activation):
    expected = MegatronGPT(2, 48, 4, 100, (64,), 1e-6, activation)
    hf = gpt2_config(expected, 64, 384, 7)
    assert megatron_gpt(hf, "ours.nemo") == expected
    settings = megatron_settings(megatron_gpt(hf, "ours.nemo"), core)
    assert read_settings(settings, "a.nemo") == MegatronGPT(2, 48, 4, 100, (64, 64), 1e-6, activation)
    assert settings["mcore_gpt"] is core


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("tie_word_embeddings", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("n_layer", 0),
    ],
)
def test_a_configuration_that_megatron_cannot_express_is_refused_by_name_and_value(name, value):
    hf = {**gpt2_config(MODEL, 32, 384, 7), name: value}
    with pytest.raises(ModelError, match=rf"^ours\.nemo: hf\.?:? ?{name}: .*{value}"):
        megatron_gpt(hf, "ours.nemo")
