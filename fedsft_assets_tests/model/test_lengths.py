"""Token lengths: what a trainer will see, measured once."""

from pathlib import Path

import numpy as np
import pytest

from fedsft_assets.data.records import read_records
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.data.views import percentiles, plot_lengths
from fedsft_assets.model.batches import tokenize
from fedsft_assets.model.lengths import LENGTHS_FILE, token_lengths
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.model.tokenizer import preset_tokenizer
from fedsft_assets.specs import PRESETS, model_preset
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.shipped import DATASETS


@pytest.fixture
def splits(source: Path, tmp_path: Path) -> Path:
    split_dataset(DATASETS["dolly"], source / DATASETS["dolly"].folder, tmp_path / "splits")
    return tmp_path / "splits"


def test_lengths_are_those_of_the_trainers_tokens(splits: Path, model: SFTModel) -> None:
    records = [record for split in SPLITS for record in read_records(split_file(splits, split))]
    expected = [len(tokens) for tokens in tokenize(records, model.tokenizer, 10_000, model.prompt_template)]
    assert token_lengths(splits, model.tokenizer.backend_tokenizer).tolist() == expected


def test_they_are_measured_again_only_for_other_records_or_another_tokenizer(
    splits: Path, source: Path, tmp_path: Path
) -> None:
    tokenizer = preset_tokenizer(PRESETS["tiny"], tmp_path)
    first = token_lengths(splits, tokenizer)
    kept = splits / LENGTHS_FILE
    written = kept.stat().st_mtime_ns
    assert token_lengths(splits, tokenizer).tolist() == first.tolist()
    assert kept.stat().st_mtime_ns == written
    tokenizer.add_tokens(["What kind of"])
    assert token_lengths(splits, tokenizer).sum() < first.sum()
    assert kept.stat().st_mtime_ns > written
    split_dataset(DATASETS["alpaca"], source / DATASETS["alpaca"].folder, splits)
    assert len(token_lengths(splits, tokenizer)) != len(first)


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
