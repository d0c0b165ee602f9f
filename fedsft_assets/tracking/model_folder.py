"""Writes the folder of an MLflow model: all that a checkpoint needs to be loaded and served, besides its archive."""

from __future__ import annotations

import json
import shutil
import zipfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import fedsft_assets
from fedsft_assets.tracking import model_loader
from fedsft_assets.tracking.record import Ending, Registration, TrackedExecution

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

CARD = "README.md"
_CODE, _LOADER = "code", "fedsft_model_loader"
_REQUIREMENTS = ("mlflow", "jinja2", "numpy", "orjson", "pyyaml", "tokenizers", "torch", "transformers")
# `fedsft_assets.model` and what it may import: the layers below it in pyproject.toml.
_PACKED = ("__init__.py", "access.py", "credentials.py", "files.py", "memory.py", "store.py", "versions.py")
_PACKED_FOLDERS = ("data", "model", "specs")
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # equal code gives equal files
_EXAMPLE = "What is the capital of Norway?"


def write_model_folder(
    folder: Path, model_id: str, execution: TrackedExecution, run_id: str, ending: Ending, what: Registration
) -> None:
    """Write everything but the archive into the empty `folder`."""
    from mlflow import pyfunc
    from mlflow.models import Model
    from mlflow.models.utils import _save_example
    from mlflow.utils.environment import _mlflow_conda_env, _PythonEnv

    requirements = pinned_requirements()
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    _mlflow_conda_env(path=str(folder / "conda.yaml"), additional_pip_deps=requirements, install_mlflow=False)
    _PythonEnv.current().to_yaml(str(folder / "python_env.yaml"))
    (folder / _CODE).mkdir()
    shutil.copyfile(model_loader.__file__, folder / _CODE / f"{_LOADER}.py")
    _pack(folder / model_loader.PACKAGE)
    (folder / CARD).write_text(_card(execution, ending, what), encoding="utf-8")
    model = Model(
        run_id=run_id,
        utc_time_created=datetime.fromtimestamp(ending.at, UTC),
        signature=_signature(),
        model_id=model_id,
        metadata={"job": execution.job, "digest": what.digest, "fedsft_assets": fedsft_assets.__version__},
    )
    environment = {"conda_env": "conda.yaml", "python_env": "python_env.yaml"}
    pyfunc.add_to_model(model, loader_module=_LOADER, code=_CODE, **environment)
    _save_example(model, [_EXAMPLE], str(folder))
    model.save(str(folder / "MLmodel"))


def write_reference(folder: Path, what: Registration) -> None:
    """Write where the archive is, into the folder of a model that does not contain it."""
    reference = {"path": what.archive, "digest": what.digest}
    (folder / model_loader.REFERENCE).write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")


def pinned_requirements() -> list[str]:
    """What a registered model needs, in the versions installed here."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def _pack(target: Path) -> None:
    """Write the part of this package that loads archives and generates answers as a zip file that Python imports."""
    package = Path(fedsft_assets.__file__).parent
    files = [package / name for name in _PACKED]
    files += [file for name in _PACKED_FOLDERS for file in sorted((package / name).rglob("*.py"))]
    with zipfile.ZipFile(target, "w") as packed:
        for file in files:
            name = file.relative_to(package.parent).as_posix()
            packed.writestr(zipfile.ZipInfo(name, _FIXED_DATE), file.read_bytes(), zipfile.ZIP_DEFLATED)


def _signature() -> ModelSignature:
    """Prompts in, answers out; the parameters are the options of `fedsft-generate`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, model_loader.MAX_NEW_TOKENS),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("top_k", DataType.long, 0),
                ParamSpec("top_p", DataType.double, 1.0),
                ParamSpec("seed", DataType.long, None),
                ParamSpec("chat", DataType.boolean, False),
            ]
        ),
    )


def _card(execution: TrackedExecution, ending: Ending, what: Registration) -> str:
    """The model card, in Markdown."""
    results = {name: number for name, number in ending.results.items() if not name.startswith("system/")}
    return "\n".join(
        [
            f"# {what.model}: {execution.job}",
            "",
            execution.note,
            "",
            "A causal language model, fine-tuned on instructions. It answers prompts as `fedsft-generate` does, in the"
            " prompt template that it was trained with.",
            "",
            "```python",
            "import mlflow",
            "",
            f'model = mlflow.pyfunc.load_model("models:/{what.model}@champion")',
            f'model.predict(["{_EXAMPLE}"], params={{"max_new_tokens": 64}})',
            "```",
            "",
            "## Results",
            "",
            "Losses are in nats per answer token.",
            "",
            *_table(("result", "value"), {name: f"{number:.6g}" for name, number in results.items()}),
            "",
            "## Training",
            "",
            *_table(("parameter", "value"), execution.params),
            "",
            "## Origin",
            "",
            *_table(
                ("what", "value"),
                {
                    "archive": what.archive,
                    "checkpoint digest": what.digest,
                    "digest of the data it was scored on": what.data,
                    **execution.tags,
                },
            ),
            "",
        ]
    )


def _table(headers: tuple[str, str], rows: dict[str, str]) -> list[str]:
    cells = [headers, ("---", "---"), *rows.items()]
    return [f"| {name} | {' '.join(str(value).split()).replace('|', chr(92) + '|')} |" for name, value in cells]
