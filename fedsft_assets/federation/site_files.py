"""Which files a site trains on: those of the study's home on its machine, or, at a site, files of its own choice.

A plan comes from whoever submits the job. Where `FEDSFT_SITE_HOME` is set, it can name a dataset, a split and a base
model, and never a path: nothing outside that folder is read. The command `fedsft-site` fills the folder, shows what is
in it, and writes what the site allows. Only pydantic and PyYAML are needed, and the extra `data` for splitting.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from fedsft_assets.access import close_kit, close_to_others
from fedsft_assets.federation.exchange import SITE_HOME, STUDY_HOME
from fedsft_assets.federation.kit_policy import components, read_resources, write_site_policy
from fedsft_assets.federation.startup_kit import why_not_connected
from fedsft_assets.specs import DatasetSpec, SitePlan, SpecError, SplitSettings
from fedsft_assets.store import SPLITS, count_records, file_digest, split_file

_DATASETS, _BASE_MODELS, _RAW, _DOWNLOADS = "datasets", "base_models", "raw", "downloads"
_SECONDS_TO_REACH = 30.0  # a server that has just been started takes some of them
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
            f" {_DATASETS}/ and {_BASE_MODELS}/"
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
    return split_file(home / _DATASETS / dataset, path.stem)


def _base_model(plan: SitePlan, home: Path) -> Path:
    name = _plain(plan, "base_model", plan.base_model.name)
    if not name.endswith(".nemo"):
        raise SpecError(f"{plan.site}: base_model: {name!r} names no .nemo archive")
    return home / _BASE_MODELS / name


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="fedsft-site", description=f"The files of a site, in the folder that {SITE_HOME} names."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split", help="make the splits of a dataset of this site, from its dataset file")
    split.add_argument("dataset", type=Path, help="<dataset>.yaml, as in the study's folder `datasets`")
    split.add_argument(
        "--source", default="hub", help="where a dataset with 'hub:' comes from: 'hub', 'sample', or a folder of copies"
    )
    split.add_argument("--seed", type=int, help="the study's, if it has another one than the default")
    split.add_argument(
        "--proportions", type=float, nargs=3, metavar=SPLITS, help="the study's, if it has other ones than the default"
    )
    configure = commands.add_parser("configure", help="write what this site allows into its startup kit")
    configure.add_argument("kit", type=Path, help="the folder that has startup/fed_client.json")
    configure.add_argument("--gpus", type=int, default=0, help="that jobs may use (default: none)")
    configure.add_argument("--gpu-memory", type=int, default=0, help="of each, in GiB, for jobs that ask for some")
    configure.add_argument("--keep-logs", action="store_true", help="send no log of a job to the server")
    reach = commands.add_parser("reach", help="say whether a startup kit and its server accept each other")
    reach.add_argument("kit", type=Path, help="the folder that has startup/fed_client.json")
    commands.add_parser("show", help="list what jobs can use here, with records and SHA-256")
    check = commands.add_parser("check", help="say which files a job would use here, and whether they are right")
    check.add_argument("plan", type=Path, help="the job folder's app_<site>/config/plan.json")
    args = parser.parse_args()
    try:
        {"split": _split, "configure": _configure, "reach": _reach, "show": _show, "check": _check}[args.command](args)
    except (SpecError, ValueError, OSError) as error:
        sys.exit(str(error))


def _home() -> Path:
    said = os.environ.get(SITE_HOME)
    if not said:
        raise SpecError(f"{SITE_HOME} is not set; set it to the folder that jobs may use at this site")
    home = Path(said).expanduser().resolve()
    if close_to_others(home, (_DATASETS, _BASE_MODELS, _RAW, _DOWNLOADS)).count:
        print(f"{home}: was open to other accounts of this computer; no longer", file=sys.stderr)
    return home


def _split(args: argparse.Namespace) -> None:
    try:
        from fedsft_assets.data.sources import fetch
        from fedsft_assets.data.splits import split_dataset
    except ModuleNotFoundError as error:
        raise SpecError(f"{error.name} is not installed; splitting needs pip install '.[site,data]'") from error
    home, dataset = _home(), DatasetSpec.load(args.dataset)
    said = {"seed": args.seed, "proportions": args.proportions}
    settings = SplitSettings(**{key: value for key, value in said.items() if value is not None})
    fetch(dataset, args.source, into=home / _RAW / dataset.name, downloads=home / _DOWNLOADS)
    report = split_dataset(dataset, home / _RAW / dataset.name, home / _DATASETS / dataset.name, settings)
    counts = ", ".join(f"{count:,} for {split}" for split, count in report.counts.items())
    print(
        f"{home / _DATASETS / dataset.name}: {counts} ({report.duplicates:,} duplicates, {report.rejected:,} unusable)"
    )


def _configure(args: argparse.Namespace) -> None:
    if not (args.kit / "startup" / "fed_client.json").is_file():
        raise SpecError(f"{args.kit}: has no startup/fed_client.json; expected the startup kit of a site")
    resources = read_resources(args.kit)
    if manager := components(resources).get("resource_manager"):
        manager["args"] |= {"num_of_gpus": args.gpus, "mem_per_gpu_in_GiB": args.gpu_memory}
    for path in write_site_policy(args.kit, resources, keep_logs=args.keep_logs):
        print(f"wrote {path}")
    if said := close_kit(args.kit):
        print(said)
    if os.environ.get(SITE_HOME):
        _home()


def _reach(args: argparse.Namespace) -> None:
    if why := why_not_connected(args.kit.resolve(), _SECONDS_TO_REACH):
        sys.exit(why)
    print(f"{args.kit}: the server is reached, and each accepts the other's certificate")


def _show(_: argparse.Namespace) -> None:
    home = _home()
    records = [path for split in SPLITS for path in sorted((home / _DATASETS).glob(f"*/{split}.jsonl"))]
    for path in sorted(records):
        print(f"{file_digest(path)}  {path.relative_to(home)}  {count_records(path):,} records")
    models = sorted((home / _BASE_MODELS).glob("*.nemo"))
    for path in models:
        print(f"{file_digest(path)}  {path.relative_to(home)}  {path.stat().st_size:,} bytes")
    if not records or not models:
        print(f"{home}: has {len(records)} splits and {len(models)} base models; a job needs both", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    plan = with_own_files(SitePlan.model_validate_json(args.plan.read_text(encoding="utf-8")), os.environ)
    files = {field: str(getattr(plan, field)) for field in ("training_file", "validation_file", "base_model")}
    unknown = sorted(set(files) - set(plan.digests))
    print(json.dumps({"job": plan.job, "site": plan.site, **files, "without a digest": unknown}, indent=2))


if __name__ == "__main__":
    main()
