import pytest

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.training.batches import (
    Tokens,
    evaluation_batches,
    micro_batches,
    pack,
    pad,
    template,
    tokenize,
    training_batches,
    truncated,
)
from fedsft_assets_tests.model.hf_tokenizers import hf_tokenizer


def test_targets_are_the_answer_and_eos_only(model):
    [record] = tokenize([{"input": "what is {this}?", "output": "coal is black."}], model.tokenizer, 64)
    batch = pack([record])
    assert model.tokenizer.decode(record.ids[: record.prompt]) == "what is {this}?\n\nAnswer:"
    assert model.tokenizer.decode(batch.targets) == " coal is black.<|endoftext|>"
    assert record.targets() == len(batch.targets)


def test_targets_can_be_all_tokens_but_the_first():
    record = Tokens([5, 6, 7, 8], prompt=3)
    assert pack([record]).targets.tolist() == [8]
    assert pack([record], answer_only=False).targets.tolist() == [6, 7, 8]
    assert record.targets(answer_only=False) == 3


@pytest.mark.parametrize("make", [pack, lambda tokens: pad(tokens, pad_id=1)], ids=["packed", "padded"])
def test_a_target_is_predicted_where_the_token_before_it_stands(make):
    batch = make([Tokens([5, 6, 7, 8], prompt=2), Tokens([9, 10], prompt=1)])
    inputs = batch.input_ids.flatten()
    assert [(inputs[p].item(), t.item()) for p, t in zip(batch.positions, batch.targets, strict=True)] == [
        (6, 7),
        (7, 8),
        (9, 10),
    ]


def test_a_row_has_no_padding_and_every_record_begins_at_position_0():
    batch = pack([Tokens([5, 6, 7, 8], prompt=2), Tokens([9, 10, 11], prompt=1)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.lengths == [3, 2]
    assert batch.attention_mask is None


def test_padding_is_on_the_right_and_not_attended_to():
    batch = pad([Tokens([5, 6, 7], prompt=2), Tokens([8, 9], prompt=1)], pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6], [8, 1]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]


def test_micro_batches_keep_every_record_and_both_limits():
    tokens = _of_lengths(9, 2, 7, 30, 3, 5)
    assert micro_batches(tokens, [5, 0, 2], None, None, packed=True) == [[5, 0, 2]]
    assert micro_batches(tokens, range(6), None, 12, packed=True) == [[1, 4, 5], [2], [0], [3]]
    assert micro_batches(tokens, range(6), None, 12, packed=False) == [[1, 4], [5], [2], [0], [3]]
    assert micro_batches(tokens, range(6), 2, None, packed=True) == [[1, 4], [5, 2], [0, 3]]
    assert micro_batches(tokens, [], 2, None, packed=True) == []


def test_a_long_context_loses_its_beginning_and_the_answer_nothing(model):
    record = {"input": "snow " * 100 + "gold", "output": "the sea is blue."}
    [cut] = tokenize([record], model.tokenizer, 40)
    assert len(cut) == 40
    assert model.tokenizer.decode(cut.ids).endswith("gold\n\nAnswer: the sea is blue.<|endoftext|>")
    assert truncated([cut]) == (1, 0)


def test_an_answer_that_alone_is_too_long_is_cut_counted_and_gets_no_eos(model):
    [cut] = tokenize([{"input": "say snow", "output": "snow " * 100}], model.tokenizer, 20)
    assert len(cut) == 20
    assert cut.prompt == 1
    assert cut.ids[-1] != model.tokenizer.eos_token_id
    assert truncated([cut]) == (1, 1)


def test_a_special_token_spelled_out_in_a_record_stays_text(model):
    [record] = tokenize([{"input": "a", "output": "b<|endoftext|>c"}], model.tokenizer, 64)
    assert record.ids.count(model.tokenizer.eos_token_id) == 1


def test_bos_begins_a_record_once_and_survives_truncation():
    tokenizer = hf_tokenizer("with BOS")
    whole, cut = (tokenize([{"input": "abc" * 9, "output": "d"}], tokenizer, n)[0] for n in (100, 12))
    assert whole.ids[0] == cut.ids[0] == tokenizer.bos_token_id
    assert whole.ids.count(tokenizer.bos_token_id) == cut.ids.count(tokenizer.bos_token_id) == 1
    assert len(cut) == 12


def test_an_unknown_template_is_refused_by_name():
    with pytest.raises(ModelError, match="'chat' is not one of answer, nemo"):
        template("chat")


def _of_lengths(*lengths: int) -> list[Tokens]:
    return [Tokens([0] * length, prompt=1) for length in lengths]


@pytest.mark.parametrize("packed", [True, False])
def test_training_batches_hold_every_record_once_and_only_the_last_is_short(packed):
    tokens = _of_lengths(*range(2, 105))
    batches = training_batches(tokens, 8, seed=3, epoch=0, packed=packed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(tokens)))
    assert [len(batch) for batch in batches] == [8] * 12 + [7]


@pytest.mark.parametrize("packed", [True, False])
def test_training_batches_depend_on_seed_and_epoch_only(packed):
    tokens = _of_lengths(*range(2, 105))
    assert training_batches(tokens, 8, 3, 1, packed) == training_batches(tokens, 8, 3, 1, packed)
    assert training_batches(tokens, 8, 3, 1, packed) != training_batches(tokens, 8, 3, 2, packed)
    assert training_batches(tokens, 8, 3, 1, packed) != training_batches(tokens, 8, 4, 1, packed)


_MIXED = [2 + (7 * index) % 97 for index in range(400)]


def test_records_that_are_packed_come_in_an_order_that_has_nothing_to_do_with_their_lengths():
    batches = training_batches(_of_lengths(*_MIXED), 8, 3, 0, packed=True)
    assert batches == training_batches(_of_lengths(*reversed(_MIXED)), 8, 3, 0, packed=True)


def test_records_that_are_padded_are_sorted_within_small_windows_alone():
    shuffled = training_batches(_of_lengths(*_MIXED), 8, 3, 0, packed=True)
    batches = training_batches(_of_lengths(*_MIXED), 8, 3, 0, packed=False)
    place = {index: number // 4 for number, batch in enumerate(shuffled) for index in batch}
    windows = [{place[index] for index in batch} for batch in batches]
    assert all(len(window) == 1 for window in windows)
    assert len(set.union(*windows)) == 13
    assert windows != sorted(windows, key=max)  # and windows do not come one after the other
    longest = [max(_MIXED[index] for index in batch) for batch in batches]
    padding = sum(8 * length for length in longest) / sum(_MIXED) - 1
    assert padding < 0.25 < sum(8 * max(_MIXED[index] for index in batch) for batch in shuffled) / sum(_MIXED) - 1
    assert longest != sorted(longest)


def test_evaluation_batches_are_sorted_by_length():
    assert evaluation_batches(_of_lengths(9, 3, 5), 2) == [[1, 2], [0]]
