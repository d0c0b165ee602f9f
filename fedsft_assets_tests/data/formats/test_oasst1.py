"""OASST1: which replies are taken, with what input, and which cannot be."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.formats import oasst1
from fedsft_assets.data.formats.examples import Rejected
from fedsft_assets.data.records import DataError
from fedsft_assets.specs.dataset import ConversationsSpec

_SCHEMA = pa.schema(
    [
        ("message_id", pa.string()),
        ("parent_id", pa.string()),
        ("text", pa.string()),
        ("role", pa.string()),
        ("lang", pa.string()),
        ("review_count", pa.int32()),
        ("deleted", pa.bool_()),
        ("synthetic", pa.bool_()),
        ("rank", pa.float64()),
    ]
)

Message = dict[str, Any]


def _prompt(message: str, parent: str | None = None, **fields: Any) -> Message:
    return {
        **{"message_id": message, "parent_id": parent, "text": f"ask {message}", "role": "prompter", "lang": "en"},
        **{"review_count": 3, "deleted": False, "synthetic": False, "rank": None, **fields},
    }


def _reply(message: str, parent: str | None, rank: float | None = 0, **fields: Any) -> Message:
    return _prompt(message, parent, **{"role": "assistant", "text": f"say {message}", "rank": rank, **fields})


def _write(path: Path, messages: Sequence[Message], schema: pa.Schema = _SCHEMA) -> Path:
    pq.write_table(pa.Table.from_pylist(list(messages), schema=schema), path)
    return path


def _read(paths: Sequence[Path], **options: Any) -> tuple[list[tuple[str | None, str | None]], list[Rejected]]:
    batches = list(oasst1.read(paths, ConversationsSpec(**options)))
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch.instruction.to_pylist(), batch.response.to_pylist(), strict=True)
    ]
    return pairs, [row for batch in batches for row in batch.rejected]


@pytest.mark.parametrize("rank", [pa.int32(), pa.float64()], ids=str)
def test_best_english_replies_come_with_the_prompt_that_they_answer(tmp_path: Path, rank: pa.DataType) -> None:
    schema = _SCHEMA.set(_SCHEMA.get_field_index("rank"), pa.field("rank", rank))
    train = [
        _prompt("p1"),
        _reply("r1", "p1"),
        _reply("r2", "p1", 1),
        _prompt("p2", "r1"),
        _reply("r3", "p2"),
        _reply("r4", "p2", None),
        _prompt("p3", lang="de"),
        _reply("r5", "p3", lang="de"),
    ]
    paths = [
        _write(tmp_path / "train", train, schema),
        _write(tmp_path / "validation", [_prompt("p4"), _reply("r6", "p4")], schema),
    ]
    pairs, rejected = _read(paths)
    assert pairs == [("ask p1", "say r1"), ("ask p2", "say r3"), ("ask p4", "say r6")]
    assert rejected == []


def test_a_rank_that_is_not_a_number_is_no_rank(tmp_path: Path) -> None:
    path = _write(tmp_path / "train", [_prompt("p1"), _reply("r1", "p1", math.nan), _reply("r2", "p1", 0.0)])
    assert _read([path])[0] == [("ask p1", "say r2")]


def test_languages_can_be_chosen(tmp_path: Path) -> None:
    messages = [message for lang in ("en", "de", "fr") for message in (
        _prompt(f"p-{lang}", lang=lang), _reply(f"r-{lang}", f"p-{lang}", lang=lang)
    )]  # fmt: skip
    path = _write(tmp_path / "train", messages)
    assert [response for _, response in _read([path], languages=["de", "fr"])[0]] == ["say r-de", "say r-fr"]
    assert len(_read([path], languages=[])[0]) == 3


def test_few_reviews_and_flagged_messages_can_be_left_out_with_all_that_is_built_on_them(tmp_path: Path) -> None:
    messages = [
        _prompt("p1"),
        _reply("r1", "p1"),
        _prompt("p2"),
        _reply("r2", "p2", review_count=1),
        _prompt("p3", deleted=True),
        _reply("r3", "p3"),
        _prompt("p4", "r3"),
        _reply("r4", "p4"),
        _prompt("p5"),
        _reply("r5", "p5", synthetic=True),
        _prompt("p6", deleted=None, synthetic=None, review_count=None),
        _reply("r6", "p6", deleted=None, synthetic=None),
    ]
    path = _write(tmp_path / "train", messages)

    def taken(**options: Any) -> list[str]:
        return [str(response).removeprefix("say ") for _, response in _read([path], **options)[0]]

    assert taken() == ["r1", "r2", "r3", "r4", "r5", "r6"]
    assert taken(min_review_count=2) == ["r1", "r3", "r4", "r5"]
    assert taken(leave_out=["deleted"]) == ["r1", "r2", "r4", "r5", "r6"]
    assert taken(leave_out=["deleted"], context="path") == ["r1", "r2", "r5", "r6"]
    assert taken(leave_out=["deleted", "synthetic"], min_review_count=3) == ["r1", "r4"]


def test_options_ask_for_their_columns_only_when_they_are_used(tmp_path: Path) -> None:
    schema = pa.schema([field for field in _SCHEMA if field.name not in ("review_count", "deleted")])
    path = _write(tmp_path / "train", [_prompt("p1"), _reply("r1", "p1")], schema)
    assert len(_read([path])[0]) == 1
    with pytest.raises(DataError, match=r"train: column review_count: is missing, found message_id, "):
        _read([path], min_review_count=1)
    with pytest.raises(DataError, match=r"train: column deleted: is missing"):
        _read([path], leave_out=["deleted"])


def test_the_whole_conversation_can_be_the_input(tmp_path: Path) -> None:
    messages = [
        _prompt("p1"),
        _reply("r1", "p1"),
        _prompt("p2", "r1"),
        _reply("r2", "p2"),
        _prompt("p3", "r2"),
        _reply("r3", "p3"),
    ]
    random.Random(1).shuffle(messages)
    path = _write(tmp_path / "train", messages)
    batches = list(oasst1.read([path], ConversationsSpec(context="path")))
    found = {
        response: (text, anchor)
        for batch in batches
        if batch.anchor is not None
        for text, response, anchor in zip(
            batch.instruction.to_pylist(), batch.response.to_pylist(), batch.anchor.to_pylist(), strict=True
        )
    }
    assert found == {
        "say r1": ("ask p1", "ask p1"),
        "say r2": ("User: ask p1\n\nAssistant: say r1\n\nUser: ask p2", "ask p1"),
        "say r3": (
            "User: ask p1\n\nAssistant: say r1\n\nUser: ask p2\n\nAssistant: say r2\n\nUser: ask p3",
            "ask p1",
        ),
    }


@pytest.mark.parametrize("context", ["prompt", "path"])
def test_replies_without_a_prompt_are_rejected_rows_with_their_reasons(tmp_path: Path, context: str) -> None:
    messages = [
        _reply("orphan", "gone"),
        _reply("top", None),
        _prompt("p1"),
        _reply("fine", "p1"),
        _reply("to-reply", "fine"),
        _reply("self", "self"),
        _prompt("ring-p", "ring-r"),
        _reply("ring-r", "ring-p"),
        _prompt("below", "lost"),
        _reply("deep", "below"),
        _reply("unwanted", "gone", rank=1),
    ]
    path = _write(tmp_path / "train", messages)
    pairs, rejected = _read([path], context=context)
    deep = [("ask below", "say deep")] if context == "prompt" else []
    assert pairs == [("ask p1", "say fine"), *deep]
    reasons = {row.row: row.reason for row in rejected}
    expected = {
        1: "parent_id: no message has this id",
        2: "parent_id: is null, but a reply needs a prompt",
        5: "parent_id: is not a prompt",
        6: "parent_id: is part of a cycle",
        8: "parent_id: is part of a cycle",
    }
    if context == "path":
        expected[10] = "parent_id: the parent of a message further up is missing"
    assert reasons == expected
    assert {row.file for row in rejected} == {"train"}


@pytest.mark.parametrize("context", ["prompt", "path"])
def test_replies_to_an_id_that_several_messages_have_are_rejected(tmp_path: Path, context: str) -> None:
    train = [
        _prompt("p1"),
        _reply("r1", "p1"),
        _prompt("p2"),
        _reply("r2", "p2"),
        _prompt("p3", "r2"),
        _reply("r3", "p3"),
    ]
    validation = [_prompt("p2", text="ask something else"), _prompt("p4"), _reply("r4", "p4")]
    paths = [_write(tmp_path / "train", train), _write(tmp_path / "validation", validation)]
    pairs, rejected = _read(paths, context=context)
    deep = [("ask p3", "say r3")] if context == "prompt" else []
    assert pairs == [("ask p1", "say r1"), *deep, ("ask p4", "say r4")]
    reasons = {row.row: row.reason for row in rejected}
    assert reasons.pop(4) == "parent_id: several messages have this id"
    assert list(reasons) == ([] if context == "prompt" else [6])
    assert {row.file for row in rejected} == {"train"}


@pytest.mark.parametrize("context", ["prompt", "path"])
def test_any_order_and_batch_size_gives_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    rng = random.Random(5)
    messages = [_prompt("p0")]
    for n in range(1, 400):
        parent = rng.choice(messages)
        make = _reply if parent["role"] == "prompter" else _prompt
        messages.append(make(f"m{n}", parent["message_id"]))
    by_id = {message["message_id"]: message for message in messages}

    def path_to(message: Message) -> list[Message]:
        parent = by_id.get(message["parent_id"])
        return [*path_to(parent), parent] if parent else []

    expected = set()
    for message in messages:
        if message["role"] == "assistant":
            texts = [m["text"] for m in path_to(message)]
            turns = [f"{'User' if k % 2 == 0 else 'Assistant'}: {text}" for k, text in enumerate(texts)]
            whole = "\n\n".join(turns) if len(turns) > 1 else texts[0]
            expected.add((texts[-1] if context == "prompt" else whole, message["text"]))
    assert len(expected) > 100
    monkeypatch.setattr("fedsft_assets.data.formats.parquet.BATCH_ROWS", 16)
    for seed in (None, 1, 2):
        if seed is not None:
            random.Random(seed).shuffle(messages)
        paths = [_write(tmp_path / "train", messages[:250]), _write(tmp_path / "validation", messages[250:])]
        pairs, rejected = _read(paths, context=context)
        assert len(pairs) == len(expected)
        assert set(pairs) == expected
        assert rejected == []


def test_texts_that_are_no_text_reject_what_is_built_on_them(tmp_path: Path) -> None:
    messages = [_prompt("p1"), _reply("r1", "p1"), _prompt("p2", "r1"), _reply("r2", "p2"), _prompt("p3", text=None)]
    messages.append(_reply("r3", "p3"))
    table = pa.Table.from_pylist(messages, schema=_SCHEMA)
    column = pa.array([None if m["text"] is None else m["text"].encode() for m in messages], pa.binary())
    broken = pa.array(
        [b"\xff" if m["message_id"] == "p1" else t for m, t in zip(messages, column.to_pylist(), strict=True)]
    )
    texts = pa.StringArray.from_buffers(len(messages), *[broken.buffers()[1], broken.buffers()[2], broken.buffers()[0]])
    pq.write_table(table.set_column(table.schema.get_field_index("text"), "text", texts), tmp_path / "train")
    pairs, rejected = _read([tmp_path / "train"])
    assert pairs == [("ask p2", "say r2"), (None, "say r3")]
    assert [(row.row, row.reason) for row in rejected] == [(2, "text: of the reply or its input is not UTF-8")]
    assert [row.row for row in _read([tmp_path / "train"], context="path")[1]] == [2, 4]
