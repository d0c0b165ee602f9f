"""The datasets that come with the project, as tests use them."""

from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.dataset import load_datasets

DATASETS = load_datasets(PROJECT / "datasets")
