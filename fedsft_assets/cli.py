"""The command `fedsft`: run the study, open the user interfaces."""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from fedsft_assets.assets.job_folder import JobOverrides
from fedsft_assets.settings import Settings

# Command-line names and types of the values that Dagster's launchpad offers for a job folder.
_OVERRIDES = {
    name.replace("_", "-"): next(kind for kind in get_args(field.annotation) if kind is not type(None))
    for name, field in JobOverrides.model_fields.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="fedsft", description="Federated supervised fine-tuning, compared.")
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("study", help="materialize everything, from raw data to the comparison")
    study.add_argument("--data", help="'sample', 'hub', or a folder laid out as the published repositories are")
    study.add_argument("--model", help="a model preset or a Hugging Face causal LM folder")
    overrides = study.add_argument_group("in place of the values in the job files")
    for name, kind in _OVERRIDES.items():
        overrides.add_argument(f"--{name}", type=kind)
    commands.add_parser("ui", help="Dagster and MLflow in the browser, on this machine only")
    args = parser.parse_args()
    if args.command == "ui":
        _ui()
    else:
        _study(args)


def _study(args: argparse.Namespace) -> None:
    # Step processes read the same settings, from the environment.
    os.environ.update({f"FEDSFT_{key.upper()}": getattr(args, key) for key in ("data", "model") if getattr(args, key)})
    settings = Settings()
    from fedsft_assets.study import StudyFailedError, prepare_instance, run_study

    prepare_instance(settings)
    try:
        run_study({name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _OVERRIDES})
    except StudyFailedError as error:
        sys.exit(str(error))
    store = settings.store
    print(f"\n{(store.reports / 'comparison.md').read_text(encoding='utf-8')}")
    for title, path in (
        ("plot", store.reports / "comparison.png"),
        ("checkpoints", store.home / "checkpoints"),
        ("MLflow store", settings.mlflow_uri or store.home / "mlflow.db"),
    ):
        print(f"{title + ':':13} {_short(path)}")
    print(f"{'look at it:':13} make ui")


def _short(path: Path | str) -> Path | str:
    here = Path.cwd()
    return path.relative_to(here) if isinstance(path, Path) and path.is_relative_to(here) else path


def _ui() -> None:
    from fedsft_assets.study import prepare_instance
    from fedsft_assets.ui import serve

    settings = Settings()
    prepare_instance(settings)
    serve(settings)


if __name__ == "__main__":
    main()
