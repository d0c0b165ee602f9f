"""What a user can say about a job and a model: typed, validated, without behaviour.

`JobSpec.load` reads one file of `jobs/`; every error names the file, the field, what was found and
what was expected. Nothing here imports torch, NVFlare or Dagster.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedsft_assets import __version__
from fedsft_assets.store import file_digest

COMBINED = "combined"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # one that `fedsft-site` takes
_CAUSE_ENOUGH = 100.0  # times clip
SAMPLE = "sample"
HUB = "hub"

JobKind = Literal["local", "centralized", "federated"]
Precision = Literal["auto", "32", "bf16-mixed", "16-mixed"]
Strategy = Literal["ddp", "fsdp"]
ScheduleSpan = Literal["job", "round"]
OptimizerState = Literal["keep", "reset"]
WireFormat = Literal["fp32", "bf16-diff"]
Severity = Literal["error", "warn"]
CheckName = Literal["row_count", "no_empty_outputs", "no_prompt_overlap", "token_lengths", "languages", "duplicates"]
DataFormat = Literal["parquet", "jsonl", "csv", "json", "oasst1"]
FORMATS_BY_SUFFIX = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".json": "json"}


class SpecError(ValueError):
    """A job file, model or dataset that says something that cannot be done."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=BaseModel)


class SiteSpec(_Spec):
    """One federated client and the dataset that it trains on.

    With `private`, the study has no copy of the dataset: it is what the site has under that name.
    """

    dataset: str
    private: bool = False


class PeftSpec(_Spec):
    """Training of small adapters beside weights that stay as they are; only the adapters travel."""

    method: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0, description="adapters are scaled by alpha / rank")] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[
        list[str] | None,
        Field(min_length=1, description="names of layers and experts; unless said, all but the output's"),
    ] = None


class TrainingSpec(_Spec):
    """How a site trains. What is None is taken from the model preset."""

    batch_size: Annotated[int, Field(ge=1, description="records of an optimizer step, all devices together")] | None = (
        None
    )
    micro_batch_size: Annotated[int, Field(ge=1, description="most records in one forward pass")] | None = None
    micro_batch_tokens: Annotated[int, Field(ge=1, description="most tokens in one forward pass")] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    max_length: Annotated[int, Field(ge=8, description="tokens of one record, prompt and answer")] | None = None
    answer_only_loss: Annotated[bool, Field(description="as NeMo's; False learns prompts too")] = True
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="share of all steps")] = 0.05
    learning_rate_schedule: Annotated[ScheduleSpan, Field(description="one over all rounds, or one in each")] = "job"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clip: Annotated[float, Field(ge=0, description="norm; 0 clips nothing")] = 1.0
    precision: Annotated[Precision | None, Field(description="auto is the preset's; its auto, what is faster")] = None
    activation_checkpointing: bool | None = None
    optimizer_state: Annotated[OptimizerState, Field(description="what a site does with it between rounds")] = "keep"
    devices: Annotated[int, Field(ge=1, description="of one site's trainer")] | None = None
    strategy: Annotated[Strategy, Field(description="how several devices share the work")] | None = None
    peft: PeftSpec | None = None

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, said: Any) -> Any:
        """`precision: 32` is a number in YAML."""
        return "32" if type(said) is int and said == 32 else said


class FedAvg(_Spec):
    """The global model moves by the mean of the sites' changes."""

    name: Literal["fedavg"] = "fedavg"


class FedProx(_Spec):
    """FedAvg whose sites are held back: their loss has a term of mu / 2 times the squared distance that they went."""

    name: Literal["fedprox"]
    mu: Annotated[float, Field(gt=0)] = 0.01


class FedOpt(_Spec):
    """The mean of the sites' changes is a gradient to an optimizer at the server.

    `beta1` is also the momentum of `momentum`.
    """

    name: Literal["fedopt"]
    optimizer: Literal["adam", "momentum"] = "momentum"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.6
    beta2: Annotated[float, Field(ge=0, lt=1, description="of adam")] = 0.99
    epsilon: Annotated[float, Field(gt=0, description="of adam")] = 1e-3


class Scaffold(_Spec):
    """Sites correct each step by how their direction differs from that of all, which travels beside the weights."""

    name: Literal["scaffold"]


Algorithm = Annotated[FedAvg | FedProx | FedOpt | Scaffold, Field(discriminator="name")]


class PrivacySpec(_Spec):
    """Gaussian differential privacy of a site's whole data: its change is clipped, and noise is added to it."""

    clip: Annotated[float, Field(gt=0, description="highest L2 norm of a site's change in a round")]
    noise_multiplier: Annotated[float, Field(ge=1e-9, description="standard deviation of the noise, in clips")]
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accept_useless_noise: Annotated[bool, Field(description="run also if nothing can be learned under it")] = False

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each number."""
        return self.clip * self.noise_multiplier

    def remedy(self, numbers: int, without: str) -> str:
        """Under what a model of so many numbers went astray, and what to try; `without` noise, what is said instead.

        Noise of many times `clip` is cause enough, and nothing else is said.
        """
        ratio = self.noise_multiplier * math.sqrt(numbers)
        noise = f"noise of {ratio:,.3g} times clip from each site in each round"
        if ratio > _CAUSE_ENOUGH:
            return f"under {noise}; try a lower filters.privacy.noise_multiplier"
        return f"{without}, or a lower filters.privacy.noise_multiplier: there is {noise}"

    @model_validator(mode="after")
    def _fits_float32(self) -> Self:
        if not 1e-30 <= self.deviation <= 1e30:
            raise ValueError(
                f"clip times noise_multiplier is {self.deviation:g}; expected 1e-30 to 1e30, as numbers that travel are"
            )
        return self


class FiltersSpec(_Spec):
    """What is done to a site's change before it leaves the site."""

    exclude: Annotated[list[str], Field(description="regular expressions: tensors that never leave a site")] = []
    privacy: PrivacySpec | None = None

    @model_validator(mode="after")
    def _patterns(self) -> Self:
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"exclude: {pattern!r} is not a regular expression: {error}") from error
        return self


def _require_noise_on_all(algorithm: FedAvg | FedProx | FedOpt | Scaffold, filters: FiltersSpec) -> None:
    """Raises ValueError where something would travel beside the noisy change that tells the change itself."""
    if filters.privacy and isinstance(algorithm, Scaffold):
        raise ValueError(
            "filters.privacy: scaffold sends a site's direction beside its change, neither clipped nor with noise, and"
            " the change can be told from it; expected fedavg, fedprox or fedopt as the algorithm"
        )


class ColumnsSpec(_Spec):
    """What a dataset calls the three texts of a row; `context` is optional, in the dataset and in each row."""

    instruction: str
    context: str | None = None
    response: str

    @property
    def names(self) -> list[str]:
        """The columns that there are."""
        return [name for name in (self.instruction, self.context, self.response) if name]

    @model_validator(mode="after")
    def _a_column_each(self) -> Self:
        for name in self.names:
            if self.names.count(name) > 1:
                texts = [text for text, column in self.model_dump().items() if column == name]
                raise ValueError(
                    f"{name!r} is named for {' and '.join(texts)}; expected a column for each: put prompt and "
                    "answer into columns of their own first"
                )
        return self


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
        content = read_yaml(path, "'path:' and 'columns:'")
        if "format" not in content and (inferred := _inferred_format(content)):
            content["format"] = inferred
        spec = validated(cls, path, {**content, "name": content.get("name", path.stem)})
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
            if [PurePosixPath(other) for other in self.files or []].count(PurePosixPath(name)) > 1:
                raise ValueError(f"files: {name!r} is there twice; name each file once")
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
    algorithm: Algorithm = FedAvg()
    sites: Annotated[dict[str, SiteSpec], Field(min_length=1)]
    min_sites: Annotated[int, Field(ge=1, description="a round goes on with so many; all unless said")] | None = None
    site_timeout: Annotated[
        float, Field(gt=0, description="seconds without a word after which a round no longer waits for a site")
    ] = 1800.0
    max_update_ratio: (
        Annotated[
            float, Field(ge=1, description="norm of a site's update by the others' median, beyond which it is refused")
        ]
        | None
    ) = 10.0
    wire: Annotated[WireFormat, Field(description="in which numbers weights travel")] = "fp32"
    filters: FiltersSpec = FiltersSpec()
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
        """What sites train on, as far as the study has it."""
        return [site.dataset for site in self.sites.values() if not site.private]

    @property
    def private_sites(self) -> list[str]:
        return [name for name, site in self.sites.items() if site.private]

    @classmethod
    def load(cls, path: Path, datasets: list[str]) -> Self:
        """Read and check `jobs/<job>.yaml`; the job's name is the file's.

        `datasets` are the names that a site may train on, beside `combined`.
        Raises SpecError with one line for each field that is wrong.
        """
        content = read_yaml(path, "'sites:' and 'rounds:'")
        spec = validated(cls, path, {**content, "name": content.get("name", path.stem)})
        if spec.name != path.stem:
            raise SpecError(f"{path}: name: {spec.name!r} is not the file's name; remove it or write {path.stem!r}")
        known = [*datasets, COMBINED]
        for site, site_spec in spec.sites.items():
            if site_spec.private:
                if not _PLAIN_NAME.fullmatch(site_spec.dataset) or site_spec.dataset == COMBINED:
                    raise SpecError(
                        f"{path}: sites.{site}.dataset: {site_spec.dataset!r} is no name of a private dataset;"
                        " expected letters, digits, '_' and '-'"
                    )
            elif site_spec.dataset not in known:
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

    @field_validator("algorithm", mode="before")
    @classmethod
    def _by_name(cls, said: Any) -> Any:
        """`algorithm: fedprox` is the algorithm with its defaults."""
        return {"name": said} if isinstance(said, str) else said

    @model_validator(mode="after")
    def _enough_sites(self) -> Self:
        if self.min_sites is not None and self.min_sites > len(self.sites):
            raise ValueError(f"min_sites: {self.min_sites} of {len(self.sites)} sites cannot answer")
        return self

    @model_validator(mode="after")
    def _noise_on_all(self) -> Self:
        _require_noise_on_all(self.algorithm, self.filters)
        return self

    @model_validator(mode="after")
    def _site_names(self) -> Self:
        for site in self.sites:
            if not site or not all(c.isalnum() or c in "-_." for c in site) or site == "server":
                raise ValueError(f"{site!r} cannot name a site; use letters, digits, '-', '_', and not 'server'")
        return self


def load_jobs(folder: Path, datasets: list[str]) -> list[JobSpec]:
    """All jobs of a folder, by name. Raises SpecError if there is none, or for the first file that is wrong."""
    paths = _yaml_files(folder)
    if not paths:
        raise SpecError(f"{folder}: has no job files; write one as <job>.yaml")
    return [JobSpec.load(path, datasets) for path in paths]


class LocalWork(_Spec):
    """How much a site trains in each round: how many steps and records follow from how many records it has."""

    local_epochs: int
    max_local_steps: int | None
    batch_size: int

    def steps(self, records: int) -> int:
        """Optimizer steps of one round over that many records."""
        steps = self.local_epochs * math.ceil(records / self.batch_size)
        return min(steps, self.max_local_steps or steps)

    def samples(self, records: int) -> int:
        """Records that one round trains on, each pass counted."""
        epochs, steps = divmod(self.steps(records), math.ceil(records / self.batch_size))
        return epochs * records + min(steps * self.batch_size, records)


class ResolvedTraining(_Spec):
    """A TrainingSpec with nothing left open but limits that are not wanted."""

    batch_size: int
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float
    max_length: int
    answer_only_loss: bool = True
    warmup_ratio: float
    learning_rate_schedule: ScheduleSpan = "job"
    weight_decay: float
    gradient_clip: float
    precision: Precision
    activation_checkpointing: bool = False
    optimizer_state: OptimizerState
    devices: int = 1
    strategy: Strategy = "ddp"
    peft: PeftSpec | None = None


class SitePlan(_Spec):
    """All that a site's trainer is told, as one JSON file in its part of the job folder.

    Paths are relative to the study's home: `base_model` is `base_models/<preset>/<digest>/<preset>.nemo`, the files of
    records are `processed/<dataset>/<digest>/<split>.jsonl` and `combined/<digest>/<split>.jsonl`; see `located`.
    `digests` holds the SHA-256 of the latter, of what the study has a copy of; `package` is the version of this package
    that built the job folder.
    """

    package: str = __version__
    job: str
    site: str
    rounds: int
    local_epochs: int
    max_local_steps: int | None
    max_evaluation_records: int | None
    seed: int
    training: ResolvedTraining
    algorithm: Algorithm = FedAvg()
    wire: WireFormat = "fp32"
    filters: FiltersSpec = FiltersSpec()
    base_model: Path
    training_file: Path
    validation_file: Path
    digests: dict[str, str]

    @model_validator(mode="after")
    def _noise_on_all(self) -> Self:
        _require_noise_on_all(self.algorithm, self.filters)
        return self

    @property
    def work(self) -> LocalWork:
        return LocalWork(
            local_epochs=self.local_epochs,
            max_local_steps=self.max_local_steps,
            batch_size=self.training.batch_size,
        )

    def located(self, home: Path) -> Self:
        """The plan with the paths that hold on the machine of that home."""
        fields = ("base_model", "training_file", "validation_file")
        return self.model_copy(update={field: home / getattr(self, field) for field in fields})

    def verify_files(self) -> None:
        """Raises SpecError if a file is missing or is not the one that the job folder was built for."""
        for field in ("training_file", "validation_file"):
            path: Path = getattr(self, field)
            if not path.is_file():
                raise SpecError(f"{self.site}: {field}: {path} is missing; build the data and the job folder again")
            if field in self.digests and file_digest(path) != self.digests[field]:
                raise SpecError(f"{self.site}: {field}: {path} has changed since; build the job folder again")


_OF_THE_PRESET = (
    *("batch_size", "learning_rate", "max_length", "precision"),
    *("micro_batch_tokens", "activation_checkpointing", "devices", "strategy"),
)


@dataclass(frozen=True)
class PublishedArchive:
    """A Megatron-GPT archive on the hub: where, its SHA-256, and the sizes that its settings must name."""

    repository: str
    revision: str
    file: str
    digest: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by the names that Megatron's settings have for them."""
        names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ModelPreset:
    """A named model source, with the training values that suit it.

    `folder` is set for a Hugging Face folder of the user's, `archive` for a `.nemo` archive or the folder of
    its files; `published` says which archive it is or, without `archive`, where to download it. `extra` names
    the optional dependency group that brings the weights.
    """

    name: str
    title: str
    learning_rate: float
    batch_size: int
    max_length: int
    precision: Precision = "auto"
    micro_batch_tokens: int | None = None
    activation_checkpointing: bool = False
    devices: int = 1
    strategy: Strategy = "ddp"
    folder: Path | None = None
    archive: Path | None = None
    published: PublishedArchive | None = None
    extra: str | None = None

    def resolve(self, training: TrainingSpec) -> ResolvedTraining:
        """The job's training values, with the preset's where the job says nothing, or `auto`."""
        own = {key: getattr(self, key) for key in _OF_THE_PRESET}
        said = {key: value for key, value in training.model_dump(exclude_none=True).items() if value != "auto"}
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
            precision="32",  # bf16 is slower on models of this size, and its losses would depend on the processor
        ),
        ModelPreset(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, Llama layout, pretrained",
            learning_rate=1e-4,
            batch_size=8,
            max_length=512,
            micro_batch_tokens=1024,
            extra="smollm2",
        ),
        # Learning rate, batch and length are those of NVFlare's published fine-tuning of both models. Its micro
        # batch is one record, and 5B was trained on two devices a site. The commits are the newest of both
        # repositories; of the three archives of 5B, only `tp1` is a whole model.
        ModelPreset(
            name="gpt-1.3b",
            title="Megatron-GPT 1.3B, GPT-2 layout, pretrained",
            learning_rate=5e-6,
            batch_size=128,
            max_length=2048,
            micro_batch_tokens=2048,
            published=PublishedArchive(
                repository="nvidia/nemo-megatron-gpt-1.3B",
                revision="a1781a9061340847cdc4474d497de83ff13f4e21",
                file="nemo_gpt1.3B_fp16.nemo",
                digest="0e3c4482d75ecdf622c567690d1323b363bf41074e00b8f7d1a43305535557c3",
                num_layers=24,
                hidden_size=2048,
                num_attention_heads=16,
                max_position_embeddings=2048,
            ),
        ),
        ModelPreset(
            name="gpt-5b",
            title="Megatron-GPT 5B, GPT-2 layout, pretrained",
            learning_rate=5e-6,
            batch_size=128,
            max_length=2048,
            micro_batch_tokens=2048,
            activation_checkpointing=True,
            devices=2,
            strategy="fsdp",
            published=PublishedArchive(
                repository="nvidia/nemo-megatron-gpt-5B",
                revision="319a24066955bd1128a72312ee7f85c3558ad6e9",
                file="nemo_gpt5B_fp16_tp1.nemo",
                digest="3187cf4a4864c57164e87c05e0afa3b684b3ea8ce26b4ef1ebb64a27be4f6556",
                num_layers=24,
                hidden_size=4096,
                num_attention_heads=32,
                max_position_embeddings=2048,
            ),
        ),
    )
}


def model_preset(name: str, archive: Path | None = None) -> ModelPreset:
    """The preset of that name, or one made for the model at that path: a Hugging Face causal LM folder, a
    `.nemo` archive, or the folder of an archive's files.

    `archive` is where the archive of a published model is already. Raises SpecError if the name is none of
    these, or the archive is not there or no use to it.
    """
    if archive is not None:
        if name not in PRESETS or PRESETS[name].published is None:
            known = ", ".join(preset.name for preset in PRESETS.values() if preset.published)
            raise SpecError(f"FEDSFT_MODEL_PATH: {archive} is no use to FEDSFT_MODEL={name}; it is for {known}")
        if not archive.is_file() and not (archive / "model_config.yaml").is_file():
            raise SpecError(f"FEDSFT_MODEL_PATH: {archive} is neither a .nemo archive nor a folder with its files")
        return replace(PRESETS[name], archive=archive.resolve())
    if name in PRESETS:
        return PRESETS[name]
    folder = Path(name).expanduser()
    if (folder.suffix == ".nemo" and folder.is_file()) or (folder / "model_config.yaml").is_file():
        return ModelPreset(
            name=folder.resolve().name.removesuffix(".nemo"),
            title=f"NeMo archive {folder}",
            learning_rate=1e-5,
            batch_size=4,
            max_length=1024,
            micro_batch_tokens=4096,
            archive=folder.resolve(),
        )
    if (folder / "config.json").is_file():
        return ModelPreset(
            name=folder.resolve().name,
            title=f"Hugging Face causal LM of {folder}",
            learning_rate=1e-5,
            batch_size=4,
            max_length=1024,
            micro_batch_tokens=4096,
            folder=folder.resolve(),
        )
    raise SpecError(
        f"FEDSFT_MODEL: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a .nemo archive"
        " nor a folder with a config.json or a model_config.yaml"
    )


def load_datasets(folder: Path) -> dict[str, DatasetSpec]:
    """All datasets of a folder, by name, in the order of their names.

    Raises SpecError if there is none, or for the first file that is wrong.
    """
    paths = _yaml_files(folder)
    if not paths:
        raise SpecError(f"{folder}: has no dataset files; write one as <dataset>.yaml")
    return {path.stem: DatasetSpec.load(path) for path in paths}


def _yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a folder, by name. Raises SpecError for one with another ending: nobody would miss it."""
    for path in sorted(folder.glob("[!.]*.*")):
        if path.suffix != ".yaml" and path.suffix.lower() in (".yml", ".yaml"):
            raise SpecError(f"{path}: is not read, only files that end in .yaml are; name it {path.stem}.yaml")
    return sorted(folder.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML's plain values, and an error for a field that occurs twice, of which PyYAML takes the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise SpecError(f"line {line}: {key.value}: occurs twice, first in line {lines[name]}; remove one")
                lines[name] = line
        return node


def read_yaml(path: Path, fields: str) -> dict[str, Any]:
    """The fields of a YAML file, which has some like those. Raises SpecError that names the file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: expected fields like {fields}, found {type(content).__name__}")
    return content


def validated(cls: type[S], path: Path, content: dict[str, Any]) -> S:
    """What the file says, checked. Raises SpecError with one line for each field that is wrong."""
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
