"""The table of names: every tensor of GPT-2 once, and values that come back bit for bit from both sides."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedsft_assets.model.megatron.layout import CORE, LEGACY, to_hf, to_megatron, weights
from fedsft_assets_tests.model.megatron_archives import SHAPE


def test_every_tensor_of_gpt2_is_there_once_with_its_shape_in_its_order():
    config = GPT2Config(
        n_layer=SHAPE.layers,
        n_embd=SHAPE.hidden,
        n_head=SHAPE.heads,
        n_inner=SHAPE.ffn,
        n_positions=SHAPE.positions,
        vocab_size=SHAPE.vocabulary,
    )
    expected = {name: tuple(t.shape) for name, t in GPT2LMHeadModel(config).state_dict().items()}
    assert expected.pop("lm_head.weight") == expected["transformer.wte.weight"]
    assert list(expected.items()) == [(weight.hf, weight.hf_shape) for weight in weights(SHAPE)]
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == SHAPE.parameters


@pytest.mark.parametrize("layout", [LEGACY, CORE])
def test_no_two_weights_have_a_name_in_common(layout):
    names = [name for weight in weights(SHAPE) for name in weight.names(layout)]
    assert len(names) == len(set(names))


def test_only_layers_of_megatron_core_are_stacked():
    for weight in weights(SHAPE):
        assert weight.stacked_names(LEGACY) == ()
        assert len(weight.stacked_names(CORE)) == (0 if weight.layer is None else len(weight.names(CORE)))
    stacked = {name for weight in weights(SHAPE) for name in weight.stacked_names(CORE)}
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in stacked
    assert "decoder.layers.input_layernorm.weight" in stacked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_go_both_ways_bit_for_bit(dtype):
    torch.manual_seed(0)
    for weight in weights(SHAPE):
        tensor = torch.randn(weight.shape).to(dtype)
        ours = to_hf(weight, tensor, SHAPE.heads)
        assert ours.shape == weight.hf_shape
        assert ours.is_contiguous()
        back = to_megatron(weight, ours, SHAPE.heads)
        assert back.is_contiguous()
        assert torch.equal(back, tensor)


def test_queries_keys_and_values_of_each_head_are_put_together():
    weight = next(weight for weight in weights(SHAPE) if weight.kind == "qkv bias")
    width = SHAPE.hidden // SHAPE.heads
    # Head h has part p (query, key, value) as the numbers from 100 * h + 10 * p on.
    values = [100 * head + 10 * part + i for head in range(SHAPE.heads) for part in range(3) for i in range(width)]
    ours = to_hf(weight, torch.tensor(values), SHAPE.heads).view(3, SHAPE.heads, width)
    for part in range(3):
        for head in range(SHAPE.heads):
            assert ours[part, head].tolist() == [100 * head + 10 * part + i for i in range(width)]
