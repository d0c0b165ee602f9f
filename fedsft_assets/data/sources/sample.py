"""The embedded sample: small raw files in the three published formats, identical bytes on every call.

The content is in `sample_text`, the file layout here. Nothing depends on the clock or the machine.
"""

import random
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from fedsft_assets.data.sources.sample_text import Example, SampleMessage, conversations, facts, passages

_ALPACA_FILE = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
_DOLLY_FILE = "databricks-dolly-15k.jsonl"
_OASST1_FILES = (
    "data/train-00000-of-00001-b42a775f407cee45.parquet",
    "data/validation-00000-of-00001-134b8fd0c89408b6.parquet",
)
_ALPACA_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
_ALPACA_TEXT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
_ALPACA_SCHEMA = pa.schema([(name, pa.string()) for name in ("instruction", "input", "output", "text")])
_OASST1_SCHEMA = pa.schema(
    [
        ("message_id", pa.string()),
        ("parent_id", pa.string()),
        ("user_id", pa.string()),
        ("created_date", pa.string()),
        ("text", pa.string()),
        ("role", pa.string()),
        ("lang", pa.string()),
        ("review_count", pa.int32()),
        ("review_result", pa.bool_()),
        ("deleted", pa.bool_()),
        ("rank", pa.int32()),
        ("synthetic", pa.bool_()),
        ("model_name", pa.string()),
        ("message_tree_id", pa.string()),
        ("tree_state", pa.string()),
    ]
)
_FIRST_MESSAGE = datetime(2023, 2, 5, 14, 23, 50, tzinfo=UTC)


def write_sample(dataset_name: str, folder: Path) -> None:
    """Write the raw files of one sampled dataset into `folder`, under their published names."""
    _WRITERS[dataset_name](folder, _random(dataset_name))


def sample_examples() -> Iterator[Example]:
    """Yield the usable rows of all sampled datasets."""
    yield from facts(_random("alpaca"))
    yield from passages(_random("dolly"))
    for tree in conversations(_random("oasst1")):
        yield from _replies(tree)


def _replies(turn: SampleMessage) -> Iterator[Example]:
    """Yield the best English replies below a turn, each with its prompt."""
    for reply in turn.replies:
        if (reply.role, reply.lang, reply.rank) == ("assistant", "en", 0):
            yield Example(turn.text, "", reply.text)
        yield from _replies(reply)


def _random(dataset_name: str) -> random.Random:
    return random.Random(f"fedsft sample of {dataset_name}")


def _write_alpaca(folder: Path, rng: random.Random) -> None:
    rows = []
    for instruction, context, response in facts(rng):
        row = {"instruction": instruction, "input": context, "output": response}
        template = _ALPACA_TEXT_WITH_INPUT if context else _ALPACA_TEXT
        rows.append({**row, "text": template.format(**row)})
    _write_parquet(folder / _ALPACA_FILE, rows, _ALPACA_SCHEMA)


def _write_dolly(folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _DOLLY_FILE).open("wb") as file:
        for instruction, context, response in passages(rng):
            row = {
                "instruction": instruction,
                "context": context,
                "response": response,
                "category": "closed_qa" if context else "classification",
            }
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))


def _write_oasst1(folder: Path, rng: random.Random) -> None:
    trees = [_messages(tree, index, rng) for index, tree in enumerate(conversations(rng))]
    validation = len(trees) // 10
    for name, part in zip(_OASST1_FILES, (trees[:-validation], trees[-validation:]), strict=True):
        _write_parquet(folder / name, (message for tree in part for message in tree), _OASST1_SCHEMA)


def _messages(root: SampleMessage, index: int, rng: random.Random) -> list[dict[str, Any]]:
    """The tree's messages, parents before their replies, as rows of the published table."""
    tree_id = _identifier(rng)
    rows: list[dict[str, Any]] = []

    def add(turn: SampleMessage, parent_id: str | None, message_id: str) -> None:
        written = _FIRST_MESSAGE + timedelta(hours=index, minutes=len(rows))
        rows.append(
            {
                "message_id": message_id,
                "parent_id": parent_id,
                "user_id": _identifier(rng),
                "created_date": written.isoformat(),
                "text": turn.text,
                "role": turn.role,
                "lang": turn.lang,
                "review_count": 3,
                "review_result": not turn.deleted,
                "deleted": turn.deleted,
                "rank": turn.rank,
                "synthetic": False,
                "model_name": None,
                "message_tree_id": tree_id,
                "tree_state": "ready_for_export",
            }
        )
        for reply in turn.replies:
            add(reply, message_id, _identifier(rng))

    add(root, None, tree_id)
    return rows


def _identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="none")


_WRITERS = {"alpaca": _write_alpaca, "dolly": _write_dolly, "oasst1": _write_oasst1}
SAMPLED = tuple(_WRITERS)
