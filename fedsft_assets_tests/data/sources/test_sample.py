"""The embedded sample: fixed bytes in the published layout, and what a model can learn from it."""

import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.records import read_records
from fedsft_assets.data.sources.sample import sample_examples, write_sample
from fedsft_assets.data.sources.sample_text import CHORES, COUNTRIES
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.files import folder_digest
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.shipped import DATASETS

_EVERY_DATASET = pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))

# Digests of the sample as it was first released, written with pyarrow 25.0.1. They change only when
# its content does on purpose, or with a pyarrow that lays out Parquet files differently.
_GOLDEN = {
    "alpaca": "4a46af96cdd86da104d737fce08db8d23e2bf2350b857d01482b96117820c050",
    "dolly": "b62b730df89ebae6bf5185d3d8f35ff8e2d9b6aecf74c49662b38499fc8eb941",
    "oasst1": "2928d5e47995558443304c51ba48198d0cfb6e367fee4f7540dd722c35d7ccd2",
}


@_EVERY_DATASET
def test_the_bytes_are_fixed(dataset: DatasetSpec, tmp_path: Path) -> None:
    write_sample(dataset.name, tmp_path)
    assert folder_digest(tmp_path) == _GOLDEN[dataset.name]


def test_another_process_with_another_hash_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    write_sample("oasst1", tmp_path / "here")
    script = (
        "import sys; from pathlib import Path; from fedsft_assets.data.sources.sample import write_sample; "
        "write_sample('oasst1', Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "there")]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "99", "PYTHONPATH": str(Path(__file__).parents[3])})
    assert folder_digest(tmp_path / "here") == folder_digest(tmp_path / "there")


@_EVERY_DATASET
def test_files_and_columns_are_those_of_the_published_files(
    dataset: DatasetSpec, real_samples: Path, tmp_path: Path
) -> None:
    write_sample(dataset.name, tmp_path)
    for name in dataset.file_names:
        ours, published = tmp_path / name, real_samples / dataset.folder / name
        if name.endswith(".parquet"):
            assert pq.read_schema(ours).equals(pq.read_schema(published))
        else:
            first, theirs = (orjson.loads(path.read_bytes().split(b"\n")[0]) for path in (ours, published))
            assert list(first) == list(theirs)


@_EVERY_DATASET
def test_each_dataset_fills_its_splits_and_shows_what_is_left_out(dataset: DatasetSpec, tmp_path: Path) -> None:
    write_sample(dataset.name, tmp_path / "raw")
    report = split_dataset(dataset, tmp_path / "raw", tmp_path / "splits")
    assert 600 <= report.records <= 700
    assert min(report.counts.values()) >= 50
    assert (report.rejected > 0) == (report.duplicates > 0) == (dataset.name != "oasst1")
    texts = [r for split in SPLITS for r in read_records(split_file(tmp_path / "splits", split))]
    assert max(len(record["input"]) + len(record["output"]) for record in texts) < 256


def test_the_reader_has_to_choose_among_the_messages(tmp_path: Path) -> None:
    write_sample("oasst1", tmp_path)
    messages = [row for name in DATASETS["oasst1"].file_names for row in pq.read_table(tmp_path / name).to_pylist()]
    replies = [message for message in messages if message["role"] == "assistant"]
    assert {message["lang"] for message in replies} == {"en", "de", "es"}
    assert {message["rank"] for message in replies} == {None, 0, 1, 2}
    assert any(message["deleted"] for message in messages)
    assert any(message["role"] == "prompter" and message["parent_id"] for message in messages)


@pytest.mark.parametrize(
    ("name", "subjects"), [("alpaca", list(COUNTRIES)), ("oasst1", list(CHORES))], ids=["alpaca", "oasst1"]
)
def test_what_is_asked_in_validation_is_answered_in_training(name: str, subjects: list[str], tmp_path: Path) -> None:
    write_sample(name, tmp_path / "raw")
    split_dataset(DATASETS[name], tmp_path / "raw", tmp_path / "splits")
    training, validation, testing = (
        {s for s in subjects for record in read_records(split_file(tmp_path / "splits", split)) if s in record["input"]}
        for split in SPLITS
    )
    assert training == set(subjects)
    assert len(validation | testing) > len(subjects) / 2


def test_what_there_is_to_learn_is_what_the_readers_find(tmp_path: Path) -> None:
    found = set()
    for dataset in DATASETS.values():
        write_sample(dataset.name, tmp_path / dataset.name)
        for batch in read_examples(dataset, tmp_path / dataset.name):
            texts = (batch.instruction.to_pylist(), batch.context.fill_null("").to_pylist(), batch.response.to_pylist())
            found |= set(zip(*texts, strict=True))
    assert found == {tuple(example) for example in sample_examples()}
