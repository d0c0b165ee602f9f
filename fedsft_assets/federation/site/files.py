"""Selects the files that a site trains on: from the study's home on the same machine, or the site's own files.

A plan comes from the submitter of the job. If `FEDSFT_SITE_HOME` is set, it can name a dataset, a split and a base
model, but no path: nothing outside that folder is read. The command `fedsft-site` fills the folder, lists its contents,
and writes the site's policy. Requires pydantic and PyYAML only, and the extra `data` for splitting.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from fedsft_assets.federation.protocol.messages import SITE_HOME, STUDY_HOME
from fedsft_assets.files import file_digest
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import SPLITS, split_file

DATASETS, BASE_MODELS = "datasets", "base_models"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def with_own_files(plan: SitePlan, environment: Mapping[str, str]) -> SitePlan:
    """The plan with this machine's paths, after checking that the files exist and have the plan's digests.

    Without `FEDSFT_SITE_HOME`, the files are in the study's home. With it, the dataset `support` is
    `<home>/datasets/support/training.jsonl` and `validation.jsonl`, the base model `tiny` is
    `<home>/base_models/tiny.nemo`. Raises SpecError naming the plan's field and the file.
    """
    value = environment.get(SITE_HOME)
    if not value:
        plan = plan.located(Path(environment.get(STUDY_HOME, "")))
        plan.verify_files()
        return plan
    home = Path(value).expanduser()
    if not home.is_absolute() or not home.is_dir():
        raise SpecError(
            f"{plan.site}: {SITE_HOME}: {value!r} is not a folder; give the absolute path of the one with"
            f" {DATASETS}/ and {BASE_MODELS}/"
        )
    own = {
        "training_file": _records(plan, "training_file", home),
        "validation_file": _records(plan, "validation_file", home),
        "base_model": _base_model(plan, home),
    }
    for field, path in own.items():
        if not path.is_file():
            raise SpecError(f"{plan.site}: {field}: {path} is missing; {_how_to_get(field, path)}")
        wanted = plan.digests.get(field)
        if wanted and (found := file_digest(path)) != wanted:
            raise SpecError(
                f"{plan.site}: {field}: {path} has the SHA-256 {found}, but the job was built for {wanted};"
                f" {_how_to_get(field, path)}, or rebuild the job for this file"
            )
    return plan.model_copy(update=own)


def _records(plan: SitePlan, field: str, home: Path) -> Path:
    """The site's file for the dataset and split in the plan's path, `…/<dataset>/<digest>/<split>.jsonl`."""
    path: Path = getattr(plan, field)
    dataset = _plain(plan, field, path.parent.parent.name)
    if path.suffix != ".jsonl" or path.stem not in SPLITS:
        raise SpecError(
            f"{plan.site}: {field}: {str(path)!r} is not a split file; expected one of {', '.join(SPLITS)}, as .jsonl"
        )
    return split_file(home / DATASETS / dataset, path.stem)


def _base_model(plan: SitePlan, home: Path) -> Path:
    name = _plain(plan, "base_model", plan.base_model.name)
    if not name.endswith(".nemo"):
        raise SpecError(f"{plan.site}: base_model: {name!r} is not a .nemo archive")
    return home / BASE_MODELS / name


def _plain(plan: SitePlan, field: str, name: str) -> str:
    """The name, after checking that it cannot point outside its folder."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"{plan.site}: {field}: {name!r} in {str(getattr(plan, field))!r} is not a plain name")
    return name


def _how_to_get(field: str, path: Path) -> str:
    if field == "base_model":
        return "copy the study's base model there"
    if field == "training_file":
        return f"split the site's data with 'fedsft-site split {path.parent.name}.yaml', or copy the study's file there"
    return "copy the study's file there: all sites validate on the same records"
