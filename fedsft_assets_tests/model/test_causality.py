"""Encoders are refused, and decoders of all sorts are not. The tensors are random: what is tried is the structure."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.causality import require_causal
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.training.answer_loss import AnswerLoss
from fedsft_assets.specs.model_preset import model_preset

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE_KEY = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Sizes of their own that are not called as in SMALL.
OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "pad_index": 2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def lm_of(kind: str, **config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {"vocab_size": 199, **OTHERS.get(kind, SMALL), **config}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()


@pytest.mark.parametrize(
    "kind",
    [
        *("bert", "roberta", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "ernie", "roformer", "rembert"),
        *("megatron-bert", "roberta-prelayernorm", "data2vec-text", "bert-generation", "big_bird", "xlm", "xlnet"),
    ],
)
def test_an_encoder_is_refused_before_it_is_trained(kind):
    lm = lm_of(kind)
    message = (
        rf"{type(lm).__name__} \({kind}\) is not a causal language model.* sees the answers that it should predict"
    )
    with pytest.raises(ModelError, match=message):
        AnswerLoss(lm, pad_id=0)


def test_a_decoder_that_was_made_to_look_both_ways_is_refused():
    with pytest.raises(ModelError, match="not a causal language model"):
        require_causal(lm_of("gemma3_text", use_bidirectional_attention=True, **ONE_KEY))
    with pytest.raises(ModelError, match="not a causal language model"):
        require_causal(lm_of("llama", is_causal=False))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", {"is_decoder": True}),
        ("roberta", {"is_decoder": True}),
        ("xlm", {"causal": True}),
        ("gpt2", {}),
        ("llama", {}),
        ("mpt", {}),
        ("bart", {}),
        ("mamba", {}),
        ("mixtral", {**EXPERTS, **ONE_KEY}),
        ("mistral", {"sliding_window": 4, **ONE_KEY}),
        ("llama4_text", {"attention_chunk_size": 4, "intermediate_size_mlp": 48, **EXPERTS, **ONE_KEY}),
    ],
)
def test_a_causal_model_passes_and_is_left_as_it_was(kind, config):
    lm = lm_of(kind, **config).train()
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    require_causal(lm)
    assert torch.rand(1) == expected
    assert lm.training
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())


def test_no_base_model_is_made_of_an_encoder_and_the_folder_is_named(model, tmp_path):
    lm_of("bert", vocab_size=len(model.tokenizer)).save_pretrained(tmp_path / "bert")
    model.tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"/bert: BertLMHeadModel \(bert\) is not a causal.*is_decoder to true"):
        create_base_model(model_preset(str(tmp_path / "bert")), tmp_path / "bert.nemo", 1)
    assert not (tmp_path / "bert.nemo").exists()
