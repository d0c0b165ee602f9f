"""Which files a site trains on: those of the study's home on its machine, or, at a site, files of its own choice.

A plan comes from whoever submits the job. Where `FEDSFT_SITE_HOME` is set, it can name a dataset, a split and a base
model, and never a path: nothing outside that folder is read. The command `fedsft-site` fills the folder, shows what is
in it, and writes what the site allows. Only pydantic and PyYAML are needed, and the extra `data` for splitting.
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
    """The plan with the paths that hold on this machine, all of them there and with the digests that it names.

    Without `FEDSFT_SITE_HOME`, they are in the study's home, on its machine. With it, the dataset `support`
    is in `<home>/datasets/support/`, as `training.jsonl` and `validation.jsonl`, the base model `tiny` in
    `<home>/base_models/tiny.nemo`. Raises SpecError that names the plan's field and the file.
    """
    said = environment.get(SITE_HOME)
    if not said:
        plan = plan.located(Path(environment.get(STUDY_HOME, "")))
        plan.verify_files()
        return plan
    home = Path(said).expanduser()
    if not home.is_absolute() or not home.is_dir():
        raise SpecError(
            f"{plan.site}: {SITE_HOME}: {said!r} is no folder; give the whole path of the one that has"
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
                f" {_how_to_get(field, path)}, or have the job built for what is here"
            )
    return plan.model_copy(update=own)


def _records(plan: SitePlan, field: str, home: Path) -> Path:
    """The site's own file of the dataset and split of the plan's path: `…/<dataset>/<digest>/<split>.jsonl`."""
    path: Path = getattr(plan, field)
    dataset = _plain(plan, field, path.parent.parent.name)
    if path.suffix != ".jsonl" or path.stem not in SPLITS:
        raise SpecError(f"{plan.site}: {field}: {str(path)!r} names no split; one of {', '.join(SPLITS)}, as .jsonl")
    return split_file(home / DATASETS / dataset, path.stem)


def _base_model(plan: SitePlan, home: Path) -> Path:
    name = _plain(plan, "base_model", plan.base_model.name)
    if not name.endswith(".nemo"):
        raise SpecError(f"{plan.site}: base_model: {name!r} names no .nemo archive")
    return home / BASE_MODELS / name


def _plain(plan: SitePlan, field: str, name: str) -> str:
    """The name if it can lead nowhere else."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"{plan.site}: {field}: {name!r} in {str(getattr(plan, field))!r} is no plain name")
    return name


def _how_to_get(field: str, path: Path) -> str:
    if field == "base_model":
        return "copy the study's base model there"
    if field == "training_file":
        return f"split the site's data with 'fedsft-site split {path.parent.name}.yaml', or copy the study's file there"
    return "copy the study's file there: all sites validate on the same records"
