"""This project's data preparation as a user's script would call it: three datasets to splits, then the union.

Prints what the reports say as JSON; `benchmarks.data` starts and measures it.
"""

import json
import sys
from pathlib import Path

from benchmarks.data_files import FOLDERS
from fedsft_assets.data.combine import combine
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.specs.dataset import load_datasets

PROJECT = Path(__file__).resolve().parents[1]


def main(raw: Path, out: Path) -> None:
    """Prepare the published files under `raw` into `out`."""
    datasets = load_datasets(PROJECT / "datasets")
    reports = {
        name: split_dataset(datasets[name], raw=raw / folder, into=out / "processed" / name)
        for name, folder in FOLDERS.items()
    }
    reports["combined"] = combine([out / "processed" / name for name in FOLDERS], into=out / "combined")
    figures = {
        name: {"records": report.records, "duplicates": report.duplicates, "rejected": report.rejected}
        for name, report in reports.items()
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
