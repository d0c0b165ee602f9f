"""The command `fedsft`: run the study, open the user interfaces, import and export models."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pydantic import ValidationError

from fedsft_assets.cli import poc, serve, tasks, versions
from fedsft_assets.cli.generate import find_archive
from fedsft_assets.cli.log import shown_log
from fedsft_assets.cli.ui.token import TokenFileError
from fedsft_assets.credentials import redact, redact_error
from fedsft_assets.defs.assets.job_folder import JobOverrides
from fedsft_assets.disk import explain
from fedsft_assets.home import close_home
from fedsft_assets.home_file import HomeError
from fedsft_assets.model.errors import ModelError
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import Settings
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.tracking import Outbox, Tracking
from fedsft_assets.versions import short

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from fedsft_assets.model.huggingface.export import HuggingFaceReport
    from fedsft_assets.model.megatron.export import MegatronReport
    from fedsft_assets.model.megatron.import_ import ImportReport
    from fedsft_assets.model.megatron.layout import Layout

# Command-line names and types of the values that Dagster's launchpad offers for a job folder.
_OVERRIDES = {
    name.replace("_", "-"): next(kind for kind in get_args(field.annotation) if kind is not type(None))
    for name, field in JobOverrides.model_fields.items()
}
# Export formats, with the Megatron layout of those that have one.
_FORMATS: "dict[str, Layout | None]" = {
    "megatron": "legacy",
    "megatron-core": "megatron-core",
    "huggingface": None,
}
_PATIENT_SECONDS = 60  # timeout per request to the tracking server when a user is waiting


def main() -> None:
    """Run the command, redacting secrets from its errors."""
    try:
        with shown_log():
            _main()
    except SystemExit as end:
        if isinstance(end.code, str):
            end.code = redact(end.code)
        raise
    except Exception as error:
        redact_error(error)
        raise


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="fedsft", description="Compare federated, centralized and local supervised fine-tuning."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("study", help="materialize everything, from raw data to the comparison")
    _add_purpose(study)
    overrides = study.add_argument_group("overrides of the values in the job files")
    for name, kind in _OVERRIDES.items():
        overrides.add_argument(f"--{name}", type=kind)
    _add_purpose(commands.add_parser("ui", help="Dagster and MLflow in the browser, on this machine only"))
    commands.add_parser("tensorboard", help="the curves of all jobs in TensorBoard, on this machine only")
    commands.add_parser("track", help="deliver pending records to the MLflow tracking server")
    export = commands.add_parser("export", help="write a checkpoint for NeMo 2.4.1's Megatron-GPT, or for Hugging Face")
    export.add_argument("--checkpoint", required=True, help="a .nemo archive, the name of a job, or 'base_model'")
    export.add_argument("--format", required=True, choices=_FORMATS)
    export.add_argument("--into", required=True, type=Path, help="the .nemo archive, or the new folder")
    take = commands.add_parser("import", help="convert NeMo's Megatron-GPT archive to an archive of this project")
    take.add_argument("archive", type=Path, metavar="ARCHIVE", help="a .nemo archive, or the folder of its files")
    take.add_argument("--into", required=True, type=Path, help="the .nemo archive to write")
    take.add_argument("--max-length", type=int, default=1024, help="maximum tokens of a record (default: 1024)")
    tasks.add_commands(commands)
    serve.add_commands(commands)
    poc.add_commands(commands)
    versions.add_commands(commands)
    args = parser.parse_args()
    run = {
        "study": _study,
        "ui": _ui,
        "export": _export,
        "import": _import,
        "tasks": tasks.run,
        "serve": serve.run,
        "poc": poc.run,
        "accept": versions.run_accept,
        "prune": versions.run_prune,
        "track": _track,
        "tensorboard": _tensorboard,
    }[args.command]
    try:
        settings = _settings(args)
    except HomeError as error:
        sys.exit(str(error))
    try:
        run(args, settings)
    except (HomeError, TokenFileError) as error:
        sys.exit(str(error))
    except Exception as error:
        if text := explain(error, settings.home):
            sys.exit(text)
        raise


def _add_purpose(parser: argparse.ArgumentParser) -> None:
    """Options that a home remembers; by default, the remembered values apply."""
    parser.add_argument("--data", help="'sample', 'hub', or a folder laid out as the published repositories are")
    parser.add_argument("--model", help="a model preset or a Hugging Face causal LM folder")
    parser.add_argument("--seeds", help="how many seeds every job is trained with, as 3, or which, as 7,8,9")


def _settings(args: argparse.Namespace) -> Settings:
    """Read the settings and export them to child processes. Exits with an error for invalid ones."""
    for name in ("data", "model", "seeds"):
        if value := getattr(args, name, None):
            os.environ[f"FEDSFT_{name.upper()}"] = value
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit("\n".join(map(_wrong_setting, error.errors())))
    os.environ.update(home_environment(settings.home))
    close_home(settings.home)
    return settings


def _wrong_setting(error: "ErrorDetails") -> str:
    name = "__".join(str(part) for part in error["loc"])
    variable = name if name.isupper() else f"FEDSFT_{name.upper()}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{variable}: {message}" if error["type"] == "value_error" else f"{variable}: {error['input']!r}: {message}"


def _study(args: argparse.Namespace, settings: Settings) -> None:
    from fedsft_assets.cli.study import prepare_instance, run_study
    from fedsft_assets.defs.resources import made_by
    from fedsft_assets.defs.run import StudyFailedError

    prepare_instance(settings)
    try:
        overrides = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _OVERRIDES}
        run_id = run_study(overrides, settings)
    except StudyFailedError as error:
        sys.exit(str(error))
    store = settings.store
    comparison, inference = (short(made_by(store, run_id, [report])) for report in ("comparison", "inference"))
    print(f"\n{(comparison / 'comparison.md').read_text(encoding='utf-8')}")
    for title, path in (
        ("report", comparison / "report.html"),
        ("plot", comparison / "comparison.png"),
        ("answers", inference / "inference.md"),
        ("checkpoints", store.home / "checkpoints"),
        ("MLflow store", settings.mlflow_uri or store.home / "mlflow.db"),
    ):
        print(f"{title + ':':13} {_short(path)}")
    print(f"{'view:':13} make ui")


def _export(args: argparse.Namespace, settings: Settings) -> None:
    from fedsft_assets.model.huggingface.export import export_huggingface
    from fedsft_assets.model.megatron.export import export_megatron

    try:
        archive = find_archive(args.checkpoint, settings.store, settings.model)
        layout = _FORMATS[args.format]
        if layout is None:
            folder = export_huggingface(archive, args.into)
            print(f"{args.into}: {folder.architecture}, {_size(folder)}, in {', '.join(folder.files)}")
        else:
            made = export_megatron(archive, args.into, layout)
            print(f"{args.into}: {layout} layout, {_size(made)}; {made.tokens} tokens in {made.shape.vocabulary} rows")
    except (ModelError, SpecError, OSError) as error:
        sys.exit(str(error))


def _import(args: argparse.Namespace, _: Settings) -> None:
    from fedsft_assets.model.megatron.import_ import import_megatron

    if args.max_length < 2:
        sys.exit(f"--max-length: {args.max_length} is too short for a prompt and an answer")
    if args.into.resolve() == args.archive.resolve():
        sys.exit(f"--into: {args.into} is the archive itself; choose another file")
    try:
        report = import_megatron(args.archive, args.into, args.max_length)
    except (ModelError, OSError) as error:
        sys.exit(str(error))
    print(f"{args.into}: {_size(report)}; records of up to {report.max_length} tokens")


def _size(report: "HuggingFaceReport | MegatronReport | ImportReport") -> str:
    return f"{report.parameters:,} parameters in {', '.join(report.types)}"


def _short(path: Path | str) -> Path | str:
    here = Path.cwd()
    return path.relative_to(here) if isinstance(path, Path) and path.is_relative_to(here) else path


def _ui(_: argparse.Namespace, settings: Settings) -> None:
    from fedsft_assets.cli.study import prepare_instance
    from fedsft_assets.cli.ui.start import serve, study_servers

    prepare_instance(settings)
    serve(settings, study_servers(settings))


def _tensorboard(_: argparse.Namespace, settings: Settings) -> None:
    from fedsft_assets.cli.ui.start import serve, tensorboard_server

    serve(settings, [tensorboard_server(settings)])


def _track(_: argparse.Namespace, settings: Settings) -> None:
    outbox = Outbox(settings.store.outbox)
    if outbox.is_empty:
        print("no pending MLflow records")
        return
    remaining = outbox.deliver(Tracking.of(settings), answer_seconds=_PATIENT_SECONDS)
    if remaining:
        sys.exit(
            "\n".join(f"{entry.job}: not delivered: {entry.reason}; kept in {entry.folder}" for entry in remaining)
        )
