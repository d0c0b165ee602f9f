"""The OASST1 format: two Parquet files of messages that form trees of prompts and ranked replies.

Source of the format: https://huggingface.co/datasets/OpenAssistant/oasst1
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fedsft_assets.data.records import Example
from fedsft_assets.data.tables import is_number, is_text, parquet_table, texts

FILES = (
    "data/train-00000-of-00001-b42a775f407cee45.parquet",
    "data/validation-00000-of-00001-134b8fd0c89408b6.parquet",
)
_COLUMNS = {
    "message_id": is_text,
    "parent_id": is_text,
    "text": is_text,
    "role": is_text,
    "lang": is_text,
    "rank": is_number,
}


def read(folder: Path) -> Iterator[Example]:
    """Each English assistant reply of rank 0 with the prompt that it answers, in the files' order.

    A reply whose parent is not a prompt of the same file has a blank instruction: it is unusable,
    not an error. Raises DataError for a file that is missing, broken or of another format.
    """
    for name in FILES:
        yield from _replies(parquet_table(folder / name, _COLUMNS))


def _replies(messages: pa.Table) -> Iterator[Example]:
    wanted = pc.and_(
        pc.and_(pc.equal(messages["role"], "assistant"), pc.equal(messages["lang"], "en")),
        pc.equal(messages["rank"].cast(pa.float64()), 0.0),
    )
    replies = messages.filter(wanted)
    prompts = messages.filter(pc.equal(messages["role"], "prompter"))
    parents = pc.index_in(replies["parent_id"], value_set=prompts["message_id"].combine_chunks(), skip_nulls=True)
    for prompt, reply in zip(texts(prompts["text"].take(parents)), texts(replies["text"]), strict=True):
        yield Example(prompt, "", reply)
