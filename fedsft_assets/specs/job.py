"""Schema of `jobs/<name>.yaml`: sites, rounds, training, algorithm and filters of one job."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.yaml_file import Spec, SpecError, read_yaml, validated, yaml_files

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # accepted by `fedsft-site`
_CAUSE_ENOUGH = 100.0  # times clip: noise that alone explains divergence

BASE_MODEL = "base_model"
"""The name of the base model among those of jobs."""
DEFAULT_SEED = 1234

JobKind = Literal["local", "centralized", "federated"]
Precision = Literal["auto", "32", "bf16-mixed", "16-mixed"]
Strategy = Literal["ddp", "fsdp"]
ScheduleSpan = Literal["job", "round"]
OptimizerState = Literal["keep", "reset"]
WireFormat = Literal["fp32", "bf16-diff"]


class SiteSpec(Spec):
    """One federated client and the dataset that it trains on.

    With `private`, the study has no copy of the dataset: the site uses its own data of that name.
    """

    dataset: str
    private: bool = False


class PeftSpec(Spec):
    """Training of small adapters with frozen base weights; only the adapters are exchanged."""

    method: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0, description="adapters are scaled by alpha / rank")] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[
        list[str] | None,
        Field(min_length=1, description="names of layers and experts; default: all except the output layer"),
    ] = None


class TrainingSpec(Spec):
    """How a site trains. None values are taken from the model preset."""

    batch_size: Annotated[int, Field(ge=1, description="records of an optimizer step, all devices together")] | None = (
        None
    )
    micro_batch_size: Annotated[int, Field(ge=1, description="most records in one forward pass")] | None = None
    micro_batch_tokens: Annotated[int, Field(ge=1, description="most tokens in one forward pass")] | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    max_length: Annotated[int, Field(ge=8, description="tokens of one record, prompt and answer")] | None = None
    answer_only_loss: Annotated[bool, Field(description="as in NeMo; False trains on prompts too")] = True
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="share of all steps")] = 0.05
    learning_rate_schedule: Annotated[
        ScheduleSpan, Field(description="one schedule over all rounds, or one per round")
    ] = "job"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    gradient_clip: Annotated[float, Field(ge=0, description="norm; 0 clips nothing")] = 1.0
    precision: Annotated[Precision | None, Field(description="auto: the preset's; if that is auto, the faster one")] = (
        None
    )
    activation_checkpointing: bool | None = None
    optimizer_state: Annotated[OptimizerState, Field(description="optimizer state at a site between rounds")] = "keep"
    devices: Annotated[int, Field(ge=1, description="of one site's trainer")] | None = None
    strategy: Annotated[Strategy, Field(description="how several devices share the work")] | None = None
    simulator_threads: (
        Annotated[int, Field(ge=1, description="CPU threads that a simulation's trainers share; default: all cores")]
        | None
    ) = None
    peft: PeftSpec | None = None

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Accept `precision: 32`, which is a number in YAML."""
        return "32" if type(value) is int and value == 32 else value


class FedAvg(Spec):
    """The global model moves by the mean of the sites' changes."""

    name: Literal["fedavg"] = "fedavg"


class FedProx(Spec):
    """FedAvg with a proximal term in the sites' loss: mu / 2 times the squared distance from the global model."""

    name: Literal["fedprox"]
    mu: Annotated[float, Field(gt=0)] = 0.01


class FedOpt(Spec):
    """The mean of the sites' changes is a gradient to an optimizer at the server.

    `beta1` is also the momentum of `momentum`.
    """

    name: Literal["fedopt"]
    optimizer: Literal["adam", "momentum"] = "momentum"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.6
    beta2: Annotated[float, Field(ge=0, lt=1, description="of adam")] = 0.99
    epsilon: Annotated[float, Field(gt=0, description="of adam")] = 1e-3


class Scaffold(Spec):
    """Sites correct each step with control variates, which are exchanged with the weights."""

    name: Literal["scaffold"]


Algorithm = Annotated[FedAvg | FedProx | FedOpt | Scaffold, Field(discriminator="name")]


class PrivacySpec(Spec):
    """Gaussian differential privacy of a site's whole dataset: its change is clipped, and noise is added."""

    clip: Annotated[float, Field(gt=0, description="maximum L2 norm of a site's change in a round")]
    noise_multiplier: Annotated[
        float, Field(ge=1e-9, description="standard deviation of the noise as a multiple of clip")
    ]
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accept_useless_noise: Annotated[bool, Field(description="run even if nothing can be learned under this noise")] = (
        False
    )

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each element."""
        return self.clip * self.noise_multiplier

    def remedy(self, numbers: int, without: str) -> str:
        """Cause and remedy for a diverged model of `numbers` elements.

        `without` is the text about causes other than noise.

        If the noise is many times `clip`, only the noise is mentioned.
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
                f"clip times noise_multiplier is {self.deviation:g}; expected 1e-30 to 1e30, to fit float32"
            )
        return self


class FiltersSpec(Spec):
    """Filters applied to a site's change before it leaves the site."""

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


def require_noise_on_all(algorithm: FedAvg | FedProx | FedOpt | Scaffold, filters: FiltersSpec) -> None:
    """Raise ValueError if the algorithm would also send values that reveal the change under the noise."""
    if filters.privacy and isinstance(algorithm, Scaffold):
        raise ValueError(
            "filters.privacy: scaffold also sends a site's control variate, neither clipped nor with noise, which"
            " reveals the change; expected fedavg, fedprox or fedopt as the algorithm"
        )


class JobSpec(Spec):
    """One NVFlare job: its sites and their data, the length of training, and the aggregation."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str
    algorithm: Algorithm = FedAvg()
    sites: Annotated[dict[str, SiteSpec], Field(min_length=1)]
    min_sites: Annotated[int, Field(ge=1, description="a round continues with this many; default: all")] | None = None
    site_timeout: Annotated[
        float, Field(gt=0, description="seconds of silence after which a round no longer waits for a site")
    ] = 1800.0
    max_update_ratio: (
        Annotated[float, Field(ge=1, description="maximum norm of a site's update, relative to the others' median")]
        | None
    ) = 10.0
    wire: Annotated[WireFormat, Field(description="wire precision")] = "fp32"
    filters: FiltersSpec = FiltersSpec()
    rounds: Annotated[int, Field(ge=1)]
    local_epochs: Annotated[
        float, Field(gt=0, description="passes over the local data per round; 0.5 is half, drawn again each round")
    ] = 1
    max_local_steps: Annotated[int, Field(ge=1, description="limit per round")] | None = None
    max_evaluation_records: Annotated[int, Field(ge=1, description="limit for validation and testing")] | None = None
    seed: int = DEFAULT_SEED
    training: TrainingSpec = TrainingSpec()

    @property
    def kind(self) -> JobKind:
        if len(self.sites) > 1:
            return "federated"
        return "centralized" if self.datasets == [COMBINED] else "local"

    @property
    def datasets(self) -> list[str]:
        """Datasets that sites train on, except private ones."""
        return [site.dataset for site in self.sites.values() if not site.private]

    @property
    def private_sites(self) -> list[str]:
        return [name for name, site in self.sites.items() if site.private]

    @classmethod
    def load(cls, path: Path, datasets: list[str]) -> Self:
        """Read and check `jobs/<job>.yaml`; the job's name is the file's.

        `datasets` are the names of datasets that a site may train on, besides `combined`. Raises SpecError with one
        line per invalid field.
        """
        content = read_yaml(path, "'sites:' and 'rounds:'")
        spec = validated(cls, path, {**content, "name": content.get("name", path.stem)})
        if spec.name != path.stem:
            raise SpecError(f"{path}: name: {spec.name!r} is not the file's name; remove it or write {path.stem!r}")
        if spec.name == BASE_MODEL:
            raise SpecError(f"{path}: name: {BASE_MODEL!r} is what the base model is compared as; rename the file")
        known = [*datasets, COMBINED]
        for site, site_spec in spec.sites.items():
            if site_spec.private:
                if not _PLAIN_NAME.fullmatch(site_spec.dataset) or site_spec.dataset == COMBINED:
                    raise SpecError(
                        f"{path}: sites.{site}.dataset: {site_spec.dataset!r} is not a valid name of a private dataset;"
                        " expected letters, digits, '_' and '-'"
                    )
            elif site_spec.dataset not in known:
                raise SpecError(
                    f"{path}: sites.{site}.dataset: {site_spec.dataset!r} is not a training dataset; expected one of"
                    f" {', '.join(known)}"
                )
        return spec

    def override(self, **changes: Any) -> Self:
        """A copy with changed values; None values are ignored.

        Keys are fields of the job or of its training. Raises SpecError for invalid values.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        training = {key: given.pop(key) for key in list(given) if key in TrainingSpec.model_fields}
        data = self.model_dump()
        changed = {**data, **given, "training": {**data["training"], **training}}
        return validated(type(self), Path(f"jobs/{self.name}.yaml with overrides"), changed)

    @field_validator("algorithm", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """Accept `algorithm: fedprox` for the algorithm with its defaults."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _enough_sites(self) -> Self:
        if self.min_sites is not None and self.min_sites > len(self.sites):
            raise ValueError(f"min_sites ({self.min_sites}) exceeds the number of sites ({len(self.sites)})")
        return self

    @model_validator(mode="after")
    def _noise_on_all(self) -> Self:
        require_noise_on_all(self.algorithm, self.filters)
        return self

    @model_validator(mode="after")
    def _site_names(self) -> Self:
        for site in self.sites:
            if not site or not all(c.isalnum() or c in "-_." for c in site) or site == "server":
                raise ValueError(f"{site!r} cannot name a site; use letters, digits, '-', '_', and not 'server'")
        return self


def sites_of(jobs: Iterable[JobSpec]) -> list[str]:
    """The names of all sites of these jobs."""
    return sorted({site for job in jobs for site in job.sites})


def load_jobs(folder: Path, datasets: list[str]) -> list[JobSpec]:
    """All jobs of a folder, by name. Raises SpecError if there is none, or for the first invalid file."""
    paths = yaml_files(folder)
    if not paths:
        raise SpecError(f"{folder}: has no job files; write one as <job>.yaml")
    return [JobSpec.load(path, datasets) for path in paths]
