"""Token lengths: what a trainer will see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsft_assets.data.plots import percentiles, plot_lengths
from fedsft_assets.data.records import read_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.files import folder_digest
from fedsft_assets.model.preset_tokenizer import preset_tokenizer
from fedsft_assets.model.training.batches import tokenize
from fedsft_assets.model.training.lengths import token_lengths
from fedsft_assets.specs.model_preset import PRESETS, model_preset
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.model.hf_tokenizers import KINDS, hf_tokenizer
from fedsft_assets_tests.shipped import DATASETS


@pytest.fixture
def splits(source: Path, tmp_path: Path) -> Path:
    split_dataset(DATASETS["dolly"], source / DATASETS["dolly"].folder, tmp_path / "splits")
    return tmp_path / "splits"


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_trainers_tokens(splits: Path, kind: str) -> None:
    tokenizer: Any = hf_tokenizer(kind)
    records = [record for split in SPLITS for record in read_records(split_file(splits, split))]
    expected = [len(tokens) for tokens in tokenize(records, tokenizer, 10_000)]
    lengths = token_lengths(splits, tokenizer.backend_tokenizer)
    assert lengths.tolist() == expected
    assert lengths.dtype == np.int32


def test_they_are_measured_again_only_for_other_records_or_another_tokenizer(
    splits: Path, source: Path, tmp_path: Path
) -> None:
    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in splits.glob(".tokens-*")}

    tokenizer = preset_tokenizer(PRESETS["tiny"], tmp_path)
    first = token_lengths(splits, tokenizer)
    written = kept()
    assert len(written) == len(SPLITS)
    assert token_lengths(splits, tokenizer).tolist() == first.tolist()
    assert kept() == written
    tokenizer.add_tokens(["What kind of"])
    assert token_lengths(splits, tokenizer).sum() < first.sum()
    assert len(kept()) == 2 * len(SPLITS)
    split_dataset(DATASETS["alpaca"], source / DATASETS["alpaca"].folder, splits)
    assert len(token_lengths(splits, tokenizer)) != len(first)
    assert len(kept()) == len(SPLITS)


def test_what_is_kept_beside_the_splits_is_no_part_of_the_dataset(splits: Path, tmp_path: Path) -> None:
    visible = sorted(path.name for path in splits.iterdir())
    token_lengths(splits, preset_tokenizer(PRESETS["tiny"], tmp_path))
    report = SplitReport.read(splits)
    assert report.digest == folder_digest(splits, [f"{split}.jsonl" for split in SPLITS])
    assert sorted(path.name for path in splits.iterdir() if not path.name.startswith(".")) == visible


def test_a_folder_of_the_users_gives_its_own_tokenizer(tmp_path: Path, splits: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    preset_tokenizer(PRESETS["tiny"], tmp_path).save(str(folder / "tokenizer.json"))
    tiny = token_lengths(splits, preset_tokenizer(PRESETS["tiny"], tmp_path))
    assert token_lengths(splits, preset_tokenizer(model_preset(str(folder)), tmp_path)).tolist() == tiny.tolist()


def test_percentiles_are_lengths_that_occur() -> None:
    lengths = np.arange(1, 201, dtype=np.int32)
    assert percentiles(lengths) == {"p50": 100, "p95": 190, "p99": 198, "max": 200}
    assert percentiles(lengths[:1]) == {"p50": 1, "p95": 1, "p99": 1, "max": 1}


def test_the_histogram_is_a_picture(tmp_path: Path) -> None:
    plot_lengths(np.array([5, 300, 80], np.int32), 256, "dolly", tmp_path / "new" / "lengths.png")
    assert (tmp_path / "new" / "lengths.png").read_bytes().startswith(b"\x89PNG")
