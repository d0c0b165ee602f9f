"""What a user can say about a job and a model: typed, validated, without behaviour.

`JobSpec.load` reads one file of `jobs/`; every error names the file, the field, what was found and
what was expected. Nothing here imports torch, NVFlare or Dagster.
"""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsft_assets.store import file_digest

COMBINED = "combined"
SAMPLE = "sample"
HUB = "hub"

JobKind = Literal["local", "centralized", "federated"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
OptimizerState = Literal["keep", "reset"]
Severity = Literal["error", "warn"]
CheckName = Literal["row_count", "no_empty_outputs", "no_prompt_overlap", "token_lengths", "languages", "duplicates"]
DataFormat = Literal["parquet", "jsonl", "csv", "json", "oasst1"]
FORMATS_BY_SUFFIX = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".json": "json"}


class SpecError(ValueError):
    """A job file, model or dataset that says something that cannot be done."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=_Spec)


class SiteSpec(_Spec):
    """One federated client and the dataset that it trains on."""

    dataset: str


class TrainingSpec(_Spec):
    """How a site trains. What is None is taken from the model preset."""

    batch_size: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    max_length: Annotated[int, Field(ge=8, description="tokens of one record, prompt and answer")] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="share of all steps")] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clip: Annotated[float, Field(ge=0, description="norm; 0 clips nothing")] = 1.0
    precision: Precision = "32"
    optimizer_state: Annotated[OptimizerState, Field(description="what a site does with it between rounds")] = "keep"


class ColumnsSpec(_Spec):
    """What a dataset calls the three texts of a row; `context` is optional, in the dataset and in each row."""

    instruction: str
    context: str | None = None
    response: str

    @property
    def names(self) -> list[str]:
        """The columns that there are."""
        return [name for name in (self.instruction, self.context, self.response) if name]


class ConversationsSpec(_Spec):
    """Which replies of OASST1's message trees become records, and what their input is. The defaults are NVFlare's."""

    languages: Annotated[list[str], Field(description="of the reply; an empty list takes every language")] = ["en"]
    min_review_count: Annotated[int, Field(ge=0, description="of the reply and all messages of its input")] = 0
    leave_out: Annotated[
        list[Literal["deleted", "synthetic"]], Field(description="messages that may be in no record")
    ] = []
    context: Annotated[
        Literal["prompt", "path"], Field(description="the input: the prompt, or all messages from the first one to it")
    ] = "prompt"


class DatasetSpec(_Spec):
    """One dataset: where its files are, and how a row becomes an example.

    `files` are relative to the hub repository, or to `path` where that is a folder. A relative
    `path` starts at the folder of the dataset's YAML file.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    title: str = ""
    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$", description="a dataset repository of the hub")] | None = (
        None
    )
    revision: Annotated[str, Field(description="a commit, branch or tag of that repository")] = "main"
    path: Annotated[Path, Field(description="a file or folder")] | None = None
    files: Annotated[list[str], Field(min_length=1)] | None = None
    format: DataFormat
    columns: ColumnsSpec | None = None
    conversations: ConversationsSpec | None = None

    @property
    def label(self) -> str:
        """What a person is told that it is."""
        return self.title or self.name

    @property
    def folder(self) -> str:
        """What a folder of published datasets calls this one's folder: the repository's name."""
        return self.hub.split("/")[1] if self.hub else self.name

    @property
    def file_names(self) -> list[str]:
        """The dataset's files, relative to its folder."""
        return self.files or ([self.path.name] if self.path else [])

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check `datasets/<name>.yaml`; the dataset's name is the file's.

        Raises SpecError with one line for each field that is wrong.
        """
        content = _read_yaml(path, "'path:' and 'columns:'")
        if "format" not in content and (inferred := _inferred_format(content)):
            content["format"] = inferred
        spec = _validated(cls, path, {**content, "name": content.get("name", path.stem)})
        if spec.name != path.stem:
            raise SpecError(f"{path}: name: {spec.name!r} is not the file's name; remove it or write {path.stem!r}")
        if spec.name == COMBINED:
            raise SpecError(f"{path}: {COMBINED!r} is the union of all datasets; give the file another name")
        if spec.path is None:
            return spec
        place = path.parent.resolve() / spec.path.expanduser()
        if place.is_dir() and not spec.files:
            raise SpecError(f"{path}: files: {place} is a folder; name the files in it that make up the dataset")
        return spec.model_copy(update={"path": place})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.hub is None) == (self.path is None):
            raise ValueError("say either 'path:', a file or folder, or 'hub:', a repository")
        if self.hub and not self.files:
            raise ValueError("files: name the files of the repository that make up the dataset")
        for name in self.files or []:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} leads out of the dataset's folder")
        if self.format == "oasst1":
            if self.columns:
                raise ValueError("columns: the format oasst1 has its own; say 'conversations:' to choose among replies")
        elif self.conversations:
            raise ValueError("conversations: only the format oasst1 has them")
        elif self.columns is None:
            raise ValueError("columns: say which are 'instruction', 'response' and, if there is one, 'context'")
        return self


class SplitSettings(_Spec):
    """How records are split; one for all datasets of a study, so that a prompt is in one split everywhere."""

    seed: int = 1234
    proportions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    max_rejected: Annotated[float, Field(ge=0, le=1, description="share of rows that may be unusable")] = 0.01
    max_chars: Annotated[int, Field(ge=1, description="characters of an input or output")] = 200_000

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if min(self.proportions) <= 0 or not math.isclose(sum(self.proportions), 1):
            raise ValueError(
                "proportions: expected 3 positive shares that add up to 1, for training, validation and testing, "
                f"found {self.proportions}"
            )
        return self


class CheckSettings(_Spec):
    """What the asset checks allow, and how bad it is when they do not: an error stops what is downstream."""

    min_rows: Annotated[float, Field(ge=0, description="records, as a share of the last materialization's")] = 0.5
    max_rows: Annotated[float, Field(gt=0, description="records, as a multiple of the last materialization's")] = 10.0
    max_truncated: Annotated[float, Field(ge=0, le=1, description="share of records longer than the window")] = 0.2
    max_duplicates: Annotated[float, Field(ge=0, le=1, description="share of rows")] = 0.05
    languages: Annotated[list[str], Field(min_length=1, description="ISO 639-1 codes")] = ["en"]
    min_language_share: Annotated[float, Field(ge=0, le=1, description="share of records in these languages")] = 0.8
    severity: Annotated[dict[CheckName, Severity], Field(description="in place of a check's own")] = {}


class JobSpec(_Spec):
    """One NVFlare job: who trains on what, for how long, and how results are averaged."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str
    algorithm: Literal["fedavg"] = "fedavg"
    sites: Annotated[dict[str, SiteSpec], Field(min_length=1)]
    rounds: Annotated[int, Field(ge=1)]
    local_epochs: Annotated[int, Field(ge=1, description="passes over the local data in a round")] = 1
    max_local_steps: Annotated[int, Field(ge=1, description="cuts a round short")] | None = None
    max_evaluation_records: Annotated[int, Field(ge=1, description="cuts validation and testing")] | None = None
    seed: int = 1234
    training: TrainingSpec = TrainingSpec()

    @property
    def kind(self) -> JobKind:
        if len(self.sites) > 1:
            return "federated"
        return "centralized" if self.datasets == [COMBINED] else "local"

    @property
    def datasets(self) -> list[str]:
        return [site.dataset for site in self.sites.values()]

    @classmethod
    def load(cls, path: Path, datasets: list[str]) -> Self:
        """Read and check `jobs/<job>.yaml`; the job's name is the file's.

        `datasets` are the names that a site may train on, beside `combined`.
        Raises SpecError with one line for each field that is wrong.
        """
        content = _read_yaml(path, "'sites:' and 'rounds:'")
        spec = _validated(cls, path, {**content, "name": content.get("name", path.stem)})
        if spec.name != path.stem:
            raise SpecError(f"{path}: name: {spec.name!r} is not the file's name; remove it or write {path.stem!r}")
        known = [*datasets, COMBINED]
        for site, site_spec in spec.sites.items():
            if site_spec.dataset not in known:
                raise SpecError(
                    f"{path}: sites.{site}.dataset: {site_spec.dataset!r} is not a dataset; one of {', '.join(known)}"
                )
        return spec

    def override(self, **changes: Any) -> Self:
        """A copy with other values; those that are None stay as they are.

        Keys are fields of the job or of its training. Raises SpecError for values that do not fit.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        training = {key: given.pop(key) for key in list(given) if key in TrainingSpec.model_fields}
        data = self.model_dump()
        try:
            return type(self).model_validate({**data, **given, "training": {**data["training"], **training}})
        except ValidationError as error:
            raise SpecError("\n".join(_explain(Path(f"jobs/{self.name}.yaml with overrides"), error))) from error

    @model_validator(mode="after")
    def _site_names(self) -> Self:
        for site in self.sites:
            if not site or not all(c.isalnum() or c in "-_." for c in site) or site == "server":
                raise ValueError(f"{site!r} cannot name a site; use letters, digits, '-', '_', and not 'server'")
        return self


def load_jobs(folder: Path, datasets: list[str]) -> list[JobSpec]:
    """All jobs of a folder, by name. Raises SpecError if there is none, or for the first file that is wrong."""
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise SpecError(f"{folder}: has no job files; write one as <job>.yaml")
    return [JobSpec.load(path, datasets) for path in paths]


class ResolvedTraining(_Spec):
    """A TrainingSpec with nothing left open."""

    batch_size: int
    learning_rate: float
    max_length: int
    warmup_ratio: float
    weight_decay: float
    gradient_clip: float
    precision: Precision
    optimizer_state: OptimizerState


class SitePlan(_Spec):
    """All that a site's trainer is told, as one JSON file in its part of the job folder.

    Paths are valid at the site. `training_file` and `validation_file` are JSONL files of records. `digests`
    holds the SHA-256 that both had when the job folder was built.
    """

    job: str
    site: str
    rounds: int
    local_epochs: int
    max_local_steps: int | None
    max_evaluation_records: int | None
    seed: int
    training: ResolvedTraining
    base_model: Path
    training_file: Path
    validation_file: Path
    digests: dict[str, str]

    def verify_files(self) -> None:
        """Raises SpecError if a file is missing or is not the one that the job folder was built for."""
        for field, digest in self.digests.items():
            path: Path = getattr(self, field)
            if not path.is_file():
                raise SpecError(f"{self.site}: {field}: {path} is missing; build the data and the job folder again")
            if file_digest(path) != digest:
                raise SpecError(f"{self.site}: {field}: {path} has changed since; build the job folder again")


@dataclass(frozen=True)
class ModelPreset:
    """A named model source, with the training values that suit it.

    `folder` is set for a Hugging Face folder of the user's; `extra` names the optional dependency
    group that brings the weights.
    """

    name: str
    title: str
    learning_rate: float
    batch_size: int
    max_length: int
    folder: Path | None = None
    extra: str | None = None

    def resolve(self, training: TrainingSpec) -> ResolvedTraining:
        """The job's training values, with the preset's where the job says nothing."""
        own = {key: getattr(self, key) for key in ("batch_size", "learning_rate", "max_length")}
        said = training.model_dump(exclude_none=True)
        return ResolvedTraining(**{**own, **said})


PRESETS = {
    preset.name: preset
    for preset in (
        ModelPreset(
            name="tiny",
            title="GPT-2 layout, about 1 M parameters, random weights, byte-level BPE of the embedded sample",
            learning_rate=4e-3,
            batch_size=16,
            max_length=256,
        ),
        ModelPreset(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, Llama layout, pretrained",
            learning_rate=1e-4,
            batch_size=2,
            max_length=256,
            extra="smollm2",
        ),
    )
}


def model_preset(name: str) -> ModelPreset:
    """The preset of that name, or one made for a Hugging Face causal LM folder at that path.

    Raises SpecError if it is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return ModelPreset(
            name=folder.resolve().name,
            title=f"Hugging Face causal LM of {folder}",
            learning_rate=1e-5,
            batch_size=4,
            max_length=1024,
            folder=folder.resolve(),
        )
    raise SpecError(
        f"FEDSFT_MODEL: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with a config.json"
    )


def load_datasets(folder: Path) -> dict[str, DatasetSpec]:
    """All datasets of a folder, by name, in the order of their names.

    Raises SpecError if there is none, or for the first file that is wrong.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise SpecError(f"{folder}: has no dataset files; write one as <dataset>.yaml")
    return {path.stem: DatasetSpec.load(path) for path in paths}


def _read_yaml(path: Path, fields: str) -> dict[str, Any]:
    """The fields of a YAML file, which has some like those."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: expected fields like {fields}, found {type(content).__name__}")
    return content


def _validated(cls: type[S], path: Path, content: dict[str, Any]) -> S:
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        raise SpecError("\n".join(_explain(path, error))) from error


def _inferred_format(content: dict[str, Any]) -> str | None:
    """What the names of a dataset's files say of their format."""
    names = content.get("files") or [content.get("path")]
    suffixes = {PurePosixPath(str(name)).suffix.lower() for name in names} if isinstance(names, list) else set()
    return FORMATS_BY_SUFFIX.get(suffixes.pop()) if len(suffixes) == 1 else None


def _explain(path: Path, error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        found = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
        lines.append(f"{path}: {field}: {problem['msg']}{found}")
    return lines
