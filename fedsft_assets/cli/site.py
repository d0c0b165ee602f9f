"""The command `fedsft-site`: manage a site's data, policy and connection."""

import argparse
import json
import os
import sys
from pathlib import Path

from fedsft_assets.access import close_kit, close_to_others
from fedsft_assets.cli.log import shown_log
from fedsft_assets.federation.connections.startup_kit import diagnose_connection
from fedsft_assets.federation.kit_policy import components, read_resources, write_site_policy
from fedsft_assets.federation.protocol.messages import SITE_HOME
from fedsft_assets.federation.site.files import BASE_MODELS, DATASETS, with_own_files
from fedsft_assets.files import file_digest
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import SPLITS, count_records

_RAW, _DOWNLOADS = "raw", "downloads"
_SECONDS_TO_REACH = 30.0  # a server that has just started needs some of it


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="fedsft-site", description=f"Manage the files of a site, in the folder named by {SITE_HOME}."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split", help="split a dataset of this site, described by its dataset file")
    split.add_argument("dataset", type=Path, help="<dataset>.yaml, as in the study's folder `datasets`")
    split.add_argument(
        "--source", default="hub", help="source of a dataset with 'hub:': 'hub', 'sample', or a folder of copies"
    )
    split.add_argument("--seed", type=int, help="the study's seed, if not the default")
    split.add_argument(
        "--proportions", type=float, nargs=3, metavar=SPLITS, help="the study's proportions, if not the default"
    )
    configure = commands.add_parser("configure", help="write this site's policy into its startup kit")
    configure.add_argument("kit", type=Path, help="the folder that contains startup/fed_client.json")
    configure.add_argument("--gpus", type=int, default=0, help="number of GPUs that jobs may use (default: 0)")
    configure.add_argument(
        "--gpu-memory", type=int, default=0, help="memory of each GPU in GiB, for jobs that request it"
    )
    configure.add_argument("--keep-logs", action="store_true", help="do not stream job logs to the server")
    reach = commands.add_parser("reach", help="test the connection between a startup kit and its server")
    reach.add_argument("kit", type=Path, help="the folder that contains startup/fed_client.json")
    commands.add_parser("show", help="list the files that jobs can use here, with records and SHA-256")
    check = commands.add_parser("check", help="show and verify the files that a job would use here")
    check.add_argument("plan", type=Path, help="the job folder's app_<site>/config/plan.json")
    args = parser.parse_args()
    run = {"split": _split, "configure": _configure, "reach": _reach, "show": _show, "check": _check}[args.command]
    try:
        with shown_log():
            run(args)
    except (SpecError, ValueError, OSError) as error:
        sys.exit(str(error))


def _home() -> Path:
    value = os.environ.get(SITE_HOME)
    if not value:
        raise SpecError(f"{SITE_HOME} is not set; set it to the folder that jobs may use at this site")
    home = Path(value).expanduser().resolve()
    if close_to_others(home, (DATASETS, BASE_MODELS, _RAW, _DOWNLOADS)).count:
        print(f"{home}: was open to other accounts of this computer; access removed", file=sys.stderr)
    return home


def _split(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read by huggingface_hub on import
    try:
        from fedsft_assets.data.sources.fetch import fetch
        from fedsft_assets.data.splits import split_dataset
    except ModuleNotFoundError as error:
        raise SpecError(f"{error.name} is not installed; splitting needs pip install '.[site,data]'") from error
    home, dataset = _home(), DatasetSpec.load(args.dataset)
    options = {"seed": args.seed, "proportions": args.proportions}
    settings = SplitSettings(**{key: value for key, value in options.items() if value is not None})
    fetch(dataset, args.source, into=home / _RAW / dataset.name, downloads=home / _DOWNLOADS)
    report = split_dataset(dataset, home / _RAW / dataset.name, home / DATASETS / dataset.name, settings)
    counts = ", ".join(f"{count:,} for {split}" for split, count in report.counts.items())
    print(
        f"{home / DATASETS / dataset.name}: {counts} ({report.duplicates:,} duplicates, {report.rejected:,} unusable)"
    )


def _configure(args: argparse.Namespace) -> None:
    if not (args.kit / "startup" / "fed_client.json").is_file():
        raise SpecError(f"{args.kit}: startup/fed_client.json is missing; expected the startup kit of a site")
    resources = read_resources(args.kit)
    if manager := components(resources).get("resource_manager"):
        manager["args"] |= {"num_of_gpus": args.gpus, "mem_per_gpu_in_GiB": args.gpu_memory}
    for path in write_site_policy(args.kit, resources, keep_logs=args.keep_logs):
        print(f"wrote {path}")
    if warning := close_kit(args.kit):
        print(warning)
    if os.environ.get(SITE_HOME):
        _home()


def _reach(args: argparse.Namespace) -> None:
    if problem := diagnose_connection(args.kit.resolve(), _SECONDS_TO_REACH):
        sys.exit(problem)
    print(f"{args.kit}: connected to the server; both sides accept each other's certificate")


def _show(_: argparse.Namespace) -> None:
    home = _home()
    records = [path for split in SPLITS for path in sorted((home / DATASETS).glob(f"*/{split}.jsonl"))]
    for path in sorted(records):
        print(f"{file_digest(path)}  {path.relative_to(home)}  {count_records(path):,} records")
    models = sorted((home / BASE_MODELS).glob("*.nemo"))
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
