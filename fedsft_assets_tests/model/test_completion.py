import pytest
import torch

from fedsft_assets.model.batches import tokenize
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.model.training import train_round


@pytest.fixture(scope="module")
def trained(base, records, make_plan):
    """A model that knows its records by heart."""
    model = SFTModel.load(base[0])
    tokens = tokenize(records, model.tokenizer, model.max_length)
    train_round(model, tokens, make_plan(rounds=1, local_epochs=60, warmup_ratio=0.1), 0)
    return model


def test_a_memorized_answer_comes_back_and_stops_at_eos(trained, records):
    prompts = [record["input"] for record in records]
    expected = [record["output"] for record in records]
    assert trained.generate(prompts, max_new_tokens=40) == expected
    assert trained.generate(prompts, max_new_tokens=40, batch_size=1) == expected


def test_an_answer_is_cut_at_max_new_tokens(trained, records):
    [whole] = trained.generate([records[0]["input"]])
    [cut] = trained.generate([records[0]["input"]], max_new_tokens=2)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_a_prompt_longer_than_the_model_reads_loses_its_beginning(trained, records):
    [answer] = trained.generate(["snow is white. " * 200 + records[0]["input"]], max_new_tokens=12)
    assert isinstance(answer, str)


def test_sampling_follows_torchs_seed(model):
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return model.generate(["what is the colour of gold?"], max_new_tokens=12, temperature=1.0)

    assert sample(1) == sample(1) != sample(2)


def test_no_prompts_give_no_answers(model):
    assert model.generate([]) == []
