"""What depends on a token's place, windows and chunks and positions: losses and gradients are transformers' own."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedsft_assets.model.training.answer_loss import AnswerLoss
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.trial import largest_window

VOCABULARY = 99
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = 16  # more than the records of the first trial have
PHIMOE = ("phimoe", {"sliding_window": WINDOW, **EXPERTS})
QWEN2_MOE = (
    "qwen2_moe",
    {
        **{"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 4},
        **{"shared_expert_intermediate_size": 24, **EXPERTS},
    },
)
LLAMA4 = ("llama4_text", {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, **EXPERTS})
MISTRAL = ("mistral", {"sliding_window": WINDOW})
GEMMA3 = ("gemma3_text", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2})
QWEN2 = ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2})
COHERE2 = ("cohere2", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2})


def lm_of(kind: str, config: dict[str, object]):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **config}))
    with torch.no_grad():  # weights of a usual size, so that attention counts
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return lm.eval()


def records(*lengths: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(1)
    return [Tokens(torch.randint(VOCABULARY, (n,), generator=generator).tolist(), prompt=n // 2) for n in lengths]


def gradients(lm) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    return found


def require_transformers_own(lm, loss: AnswerLoss, tokens: list[Tokens]) -> None:
    """The summed loss and all gradients are those of the model's own forward pass, record by record."""
    expected = torch.zeros(())
    for one in tokens:
        labels = torch.tensor([[-100] * one.prompt + one.ids[one.prompt :]])
        expected = expected + lm(input_ids=torch.tensor([one.ids]), labels=labels).loss * one.targets()
    expected.backward()
    wanted = gradients(lm)
    with loss.prepared():
        ours = loss(loss.batch(tokens))
    ours.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients(lm).items():
        atol = max(1e-4 * wanted[name].abs().max().item(), 1e-5)  # a key's bias has nothing but rounding
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("model", "packs"),
    [
        *((one, False) for one in (PHIMOE, QWEN2_MOE, LLAMA4)),
        *((one, True) for one in (MISTRAL, GEMMA3, QWEN2, COHERE2)),
    ],
    ids=["phimoe", "qwen2-moe", "llama4", "mistral", "gemma3", "qwen2", "cohere2"],
)
def test_records_beyond_the_window_have_transformers_own_gradients(model, packs):
    lm = lm_of(*model)
    loss = AnswerLoss(lm, pad_id=0)
    assert loss.packs is packs
    require_transformers_own(lm, loss, records(2 * WINDOW + 9, 5, WINDOW + 1, 3 * WINDOW))


@pytest.mark.parametrize("model", [PHIMOE, QWEN2_MOE, LLAMA4], ids=["phimoe", "qwen2-moe", "llama4"])
def test_records_that_cannot_outgrow_the_window_are_packed(model):
    lm = lm_of(*model)
    loss = AnswerLoss(lm, pad_id=0, longest=WINDOW)
    assert loss.packs
    require_transformers_own(lm, loss, records(WINDOW, 5, WINDOW - 1, WINDOW))


@pytest.mark.parametrize("kind", ["roberta", "bert", "rembert"])
def test_decoders_of_encoders_count_positions_in_their_own_way(kind):
    lm = lm_of(kind, {"is_decoder": True, "pad_token_id": 1})
    loss = AnswerLoss(lm, pad_id=1)
    require_transformers_own(lm, loss, [Tokens([id + 2 for id in one.ids if id < 97], 2) for one in records(20, 30, 9)])


def test_a_window_of_thousands_is_tried_too():
    assert not AnswerLoss(lm_of("phimoe", {"sliding_window": 2047, **EXPERTS}), pad_id=0).packs


@pytest.mark.parametrize(
    ("config", "longest", "expected"),
    [
        ({"sliding_window": 16}, None, 16),
        ({"sliding_window": 16}, 17, 16),
        ({"sliding_window": 16}, 16, None),
        ({"sliding_window": None}, None, None),
        ({"sliding_window": 16, "max_position_embeddings": 16}, None, None),
    ],
)
def test_a_window_counts_if_a_record_can_outgrow_it(config, longest, expected):
    assert largest_window(AutoConfig.for_model("mistral", **config), longest) == expected
