"""Named models, with suitable training values for each."""

from dataclasses import dataclass, replace
from pathlib import Path

from fedsft_assets.specs.job import Precision, Strategy, TrainingSpec
from fedsft_assets.specs.plan import ResolvedTraining
from fedsft_assets.specs.yaml_file import SpecError

_OF_THE_PRESET = (
    *("batch_size", "learning_rate", "max_length", "precision"),
    *("micro_batch_tokens", "activation_checkpointing", "devices", "strategy", "simulator_threads"),
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
        """The sizes by their names in Megatron's settings."""
        names = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ModelPreset:
    """A named model source, with the training values that suit it.

    `folder` is set for the user's Hugging Face folder, `archive` for a `.nemo` archive or the folder of its files;
    `published` says which archive it is or, without `archive`, where to download it. `extra` names the optional
    dependency group that provides the weights.
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
    simulator_threads: int | None = None
    folder: Path | None = None
    archive: Path | None = None
    published: PublishedArchive | None = None
    extra: str | None = None

    def resolve(self, training: TrainingSpec) -> ResolvedTraining:
        """The job's training values, with the preset's where the job has none or `auto`."""
        own = {key: getattr(self, key) for key in _OF_THE_PRESET}
        given = {key: value for key, value in training.model_dump(exclude_none=True).items() if value != "auto"}
        return ResolvedTraining(**{**own, **given})


PRESETS = {
    preset.name: preset
    for preset in (
        ModelPreset(
            name="tiny",
            title="GPT-2 layout, about 1 M parameters, random weights, byte-level BPE of the embedded sample",
            learning_rate=2e-3,  # with 3e-3, rounding makes another model of the same job on another processor
            batch_size=8,
            max_length=256,
            precision="32",  # bf16 is slower on models of this size, and its losses would depend on the processor
            simulator_threads=2,  # rounding, and so the losses, would depend on the number of cores
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
    """The preset named `name`, or one for the model at that path.

    A path is a Hugging Face causal LM folder, a `.nemo` archive, or the folder of an archive's files.

    `archive` is the path of a published model's archive. Raises SpecError if the name is none of these, or the archive
    is missing or does not apply.
    """
    if archive is not None:
        if name not in PRESETS or PRESETS[name].published is None:
            known = ", ".join(preset.name for preset in PRESETS.values() if preset.published)
            raise SpecError(f"FEDSFT_MODEL_PATH: {archive} does not apply to FEDSFT_MODEL={name}; only to {known}")
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


def has_random_weights(model: str) -> bool:
    """Whether the base model of a preset is drawn with a seed, not pretrained; `model` may be a path, too."""
    preset = PRESETS.get(model)
    return preset is not None and not (preset.published or preset.extra)
