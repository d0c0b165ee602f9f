"""NeMo's `train_ds` and `validation_ds`: from JSONL files to the micro-batches that a Lightning trainer goes through.

Records, tokens and batches are those of this package's own trainer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import PositiveInt, ValidationError, field_validator
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from fedsft_assets.data.records import DataError
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.prompt_template import template
from fedsft_assets.model.training.answer_loss import AnswerLoss
from fedsft_assets.model.training.batches import Batch, Tokens, evaluation_batches, micro_batches, training_batches
from fedsft_assets.model.training.local_training import split_tokens
from fedsft_assets.specs.yaml_file import Spec

# What NeMo's configurations say about loading alone: here records are tokens in memory before the first step.
_WITHOUT_EFFECT = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "memmap_workers",
    "index_mapping_dir",
    "defer_setup",
)


class DataConfig(Spec):
    """What a `train_ds` or `validation_ds` may say; sizes are in records, of all processes together for the global one.

    Fields with one allowed value are NeMo's names for what this project does anyway.
    """

    file_names: list[Path]
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    max_seq_length: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    seed: int = 1234

    prompt_template: str | None = None
    label_key: Literal["output"] = "output"
    truncation_field: Literal["input"] = "input"
    truncation_method: Literal["left"] = "left"
    answer_only_loss: Literal[True] = True
    add_eos: Literal[True] = True
    add_sep: Literal[False] = False

    @field_validator("file_names", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @classmethod
    def read(cls, config: Mapping[str, Any], name: str) -> Self:
        """Read a configuration, null meaning unsaid. Raises ModelError that begins with `name` and the field."""
        said = {key: value for key, value in config.items() if value is not None and key not in _WITHOUT_EFFECT}
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            raise ModelError("; ".join(_explain(name, problem) for problem in error.errors())) from error


def _explain(name: str, problem: Any) -> str:
    field = ".".join(map(str, problem["loc"]))
    found = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
    hint = "; leave it out" if problem["type"] == "extra_forbidden" else ""
    return f"{name}.{field}: {problem['msg']}{found}{hint}"


class Part(NamedTuple):
    """The records of a micro-batch; `targets` are those of the whole batch over all processes, 0 where it has none.

    `weight` is 0 for one that only keeps step with other processes; `first` says that it begins a batch.
    """

    indices: Sequence[int]
    targets: int
    weight: int
    first: bool


class MicroBatch(NamedTuple):
    """A micro-batch as the model takes it; the other fields are those of its `Part`."""

    batch: Batch
    targets: int
    weight: int
    first: bool


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is."""

    rank: int = 0
    count: int = 1


class SFTDataset(Dataset[MicroBatch]):
    """Records as micro-batches: its keys are parts, its length is the number of records that an epoch has."""

    def __init__(self, tokens: Sequence[Tokens], loss: AnswerLoss, in_an_epoch: int) -> None:
        self.tokens, self._loss, self._in_an_epoch = tokens, loss, in_an_epoch

    def __len__(self) -> int:
        return self._in_an_epoch

    def __getitem__(self, part: Part) -> MicroBatch:
        batch = self._loss.batch([self.tokens[index] for index in part.indices])
        return MicroBatch(batch, part.targets, part.weight, part.first)


class Parts(DistributedSampler[Part]):
    """One process's micro-batches of an epoch, as many in each process.

    `batches` gives the records of each batch of an epoch (0-based), over all processes. Lightning tells the epoch, and
    leaves a sampler in place that knows its process; NeMo computes the steps of a schedule from `micro_batch_size`.
    """

    def __init__(
        self,
        dataset: SFTDataset,
        batches: Callable[[int], list[list[int]]],
        micro_batch_size: int,
        processes: Processes,
    ) -> None:
        super().__init__(dataset, num_replicas=processes.count, rank=processes.rank)
        self.micro_batch_size = micro_batch_size
        self._tokens, self._batches = dataset.tokens, batches
        of_processes = processes.count * micro_batch_size
        self._length = sum(math.ceil(len(batch) / of_processes) for batch in batches(0))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Part]:
        for batch in self._batches(self.epoch):
            targets = sum(self._tokens[index].targets() for index in batch)
            parts = micro_batches(self._tokens, batch, self.micro_batch_size, None, packed=True)
            own = [(part, 1) for part in parts[self.rank :: self.num_replicas]]
            idle = math.ceil(len(parts) / self.num_replicas) - len(own)
            for number, (part, weight) in enumerate(own + [(parts[0], 0)] * idle):
                yield Part(part, targets, weight, first=number == 0)


def training_loader(
    model: LanguageModel, config: Mapping[str, Any], processes: Processes
) -> tuple[DataLoader[MicroBatch], int]:
    """The micro-batches of a `train_ds`, and how many of them each process has in a whole batch.

    The order of an epoch is that of `training_batches`, by seed and epoch. Raises ModelError.
    """
    name = "train_ds"
    said = _read(model, config, name)
    if said.global_batch_size is None:
        raise ModelError(f"{name}.global_batch_size: say how many records an optimizer step takes")
    size, micro = said.global_batch_size, said.micro_batch_size or max(said.global_batch_size // processes.count, 1)
    if size % (micro * processes.count):
        raise ModelError(
            f"{name}.global_batch_size: {size} is no multiple of micro_batch_size ({micro}) times processes"
            f" ({processes.count})"
        )
    tokens, loss = _tokens(model, said, name), model.answer_loss
    left_out = len(tokens) % size if said.drop_last else 0
    if len(tokens) == left_out:
        raise ModelError(f"{name}.drop_last: there are {len(tokens)} records, less than a batch of {size}")

    def batches(epoch: int) -> list[list[int]]:
        if said.shuffle:
            every = training_batches(tokens, size, said.seed, epoch, loss.packs)
        else:
            every = [list(range(start, min(start + size, len(tokens)))) for start in range(0, len(tokens), size)]
        return every[:-1] if left_out else every

    dataset = SFTDataset(tokens, loss, len(tokens) - left_out)
    return _loader(dataset, Parts(dataset, batches, micro, processes)), size // (micro * processes.count)


def validation_loader(model: LanguageModel, config: Mapping[str, Any], processes: Processes) -> DataLoader[MicroBatch]:
    """The micro-batches of a `validation_ds`, each record once. Raises ModelError."""
    name = "validation_ds"
    said = _read(model, config, name)
    micro = said.micro_batch_size or said.global_batch_size
    if micro is None:
        raise ModelError(f"{name}.micro_batch_size: say how many records go through the model at once")
    tokens = _tokens(model, said, name)
    dataset = SFTDataset(tokens, model.answer_loss, len(tokens))
    batches = evaluation_batches(tokens, micro * processes.count)
    return _loader(dataset, Parts(dataset, lambda _epoch: batches, micro, processes))


def _loader(dataset: SFTDataset, parts: Parts) -> DataLoader[MicroBatch]:
    return DataLoader(dataset, batch_size=None, sampler=parts)


def _read(model: LanguageModel, config: Mapping[str, Any], name: str) -> DataConfig:
    said = DataConfig.read(config, name)
    text = template(model.prompt_template).text
    if said.prompt_template not in (None, text):
        raise ModelError(f"{name}.prompt_template: the model's is {text!r}, found {said.prompt_template!r}")
    if said.max_seq_length is not None and not 2 <= said.max_seq_length <= model.max_length:
        raise ModelError(
            f"{name}.max_seq_length: expected 2 to {model.max_length}, the longest record of this model,"
            f" found {said.max_seq_length}"
        )
    return said


def _tokens(model: LanguageModel, config: DataConfig, name: str) -> list[Tokens]:
    """All records of all files, in their order."""
    longest = config.max_seq_length or model.max_length
    try:
        tokens = [one for file in config.file_names for one in split_tokens(model, file, longest)]
    except DataError as error:
        raise ModelError(f"{name}.file_names: {error}") from error
    if not tokens:
        raise ModelError(f"{name}.file_names: no records in {', '.join(map(str, config.file_names)) or 'no file'}")
    return tokens
