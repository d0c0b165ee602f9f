"""A NeMo ModelPT for this project's archives, for use with NeMo's and Lightning's own tools.

Nothing that trains or evaluates here needs it: `language_model.LanguageModel` reads and writes the same archives by
itself. `nemo_agreement` compares the two.
"""

import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils import logging as nemo_logging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.utils.data import DataLoader

from fedsft_assets.files import publish_file
from fedsft_assets.model.archive import nemo_archive
from fedsft_assets.model.archive.archive_config import artifact_key, artifact_name
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel, empty_lm
from fedsft_assets.model.nemo_data import MicroBatch, Processes, training_loader, validation_loader
from fedsft_assets.model.prompt_template import template
from fedsft_assets.model.training.batches import Batch


class SFTModel(ModelPT):
    """A causal language model for supervised fine-tuning, with fp32 weights.

    `cfg` holds `hf` (the Hugging Face configuration), `tokenizer.files` (artifacts), `max_length` (tokens of a
    record), `prompt_template` (a key of prompt_template.TEMPLATES), and for training `train_ds`, `validation_ds` (see
    nemo_data.DataConfig) and `optim`. Weights are fp32.
    """

    _train_dl: Any
    _validation_dl: Any

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        """Build the model from `cfg`, with weights that stay uninitialized until restored."""
        super().__init__(cfg=cfg, trainer=trainer)
        template(cfg.prompt_template)
        self._tokenizer_files = {
            path.name.removeprefix(_unique_part(value)): path.read_bytes()
            for key, value in list(cfg.tokenizer.files.items())
            for path in [Path(self.register_artifact(f"tokenizer.files.{key}", value))]
        }
        self.lm = empty_lm(self._plain_config()["hf"])
        self._accumulated_before_fit: int | None = None
        self._step_loss = torch.zeros(())

    @classmethod
    def restore_from(
        cls,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: SaveRestoreConnector | None = None,
        trainer: Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """NeMo's own, for an archive that may come from anyone: this class is used, whatever class the file names.

        Nothing but tensors is unpickled, nothing is written outside a temporary folder, and of the archive's
        configuration the fields count that `nemo_archive.read_config` gives. Raises ModelError for one that it refuses.
        """
        config: Any = OmegaConf.create(nemo_archive.read_config(Path(restore_path)))
        if isinstance(override_config_path, str):
            config = OmegaConf.load(override_config_path)
        elif override_config_path is not None:
            config = OmegaConf.create(OmegaConf.to_container(override_config_path))
        config.pop("target", None)  # NeMo imports no class outside its own namespaces
        try:
            return super().restore_from(
                restore_path,
                override_config_path=None if return_config else config,
                map_location=map_location,
                strict=strict,
                return_config=return_config,
                save_restore_connector=save_restore_connector or _TensorsOnly(),
                trainer=trainer,
                validate_access_integrity=validate_access_integrity,
            )
        finally:
            # NeMo leaves this set when a restore fails, and the next model would believe it.
            cls._set_model_restore_state(is_being_restored=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """`restore_from`, on the CPU and without NeMo's log. Raises ModelError that names the file."""
        try:
            with _quiet_nemo():
                model: Self = cls.restore_from(str(path), map_location=torch.device("cpu"))
                return model
        except ModelError:
            raise
        except (pickle.UnpicklingError, RuntimeError, EOFError, tarfile.TarError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:5])  # torch lists every tensor
            raise ModelError(f"{path}: {nemo_archive.WEIGHTS} is truncated or not this model's: {reason}") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ModelError(f"{path}: cannot be restored: {type(error).__name__}: {error}") from error

    def save_to(self, save_path: str) -> None:
        """NeMo's own; the tokenizer goes in, so that the archive needs no other file."""
        with TemporaryDirectory() as folder:
            # NeMo would take a restored model's artifacts from the archive it came from, which may be gone.
            self.artifacts: dict[str, Any] = {}
            for name, content in self._tokenizer_files.items():
                file = Path(folder) / name
                file.write_bytes(content)
                self.register_artifact(f"tokenizer.files.{artifact_key(name)}", str(file))
            super().save_to(save_path)

    def save(self, path: Path) -> None:
        """`save_to`, whole or not at all, and without NeMo's log."""
        with publish_file(path) as fresh, _quiet_nemo():
            self.save_to(str(fresh))

    @cached_property
    def language_model(self) -> LanguageModel:
        """A LanguageModel that shares these weights, as this package trains and evaluates them."""
        return LanguageModel(self._plain_config(), self._tokenizer_files, self.lm)

    def setup_training_data(self, train_data_config: DictConfig | dict[str, Any]) -> None:
        """Set `train_ds`. The records are read when the trainer, which knows of other processes, begins."""
        self._update_dataset_config("train", train_data_config)
        self._train_dl: DataLoader[MicroBatch] | None = None

    def setup_validation_data(self, val_data_config: DictConfig | dict[str, Any]) -> None:
        """Set `validation_ds`, as `setup_training_data` does."""
        self._update_dataset_config("validation", val_data_config)
        self._validation_dl: DataLoader[MicroBatch] | None = None

    def setup_multiple_validation_data(self, val_data_config: DictConfig | dict[str, Any]) -> None:
        """The same: all files are one set of records, with one loss."""
        self.setup_validation_data(val_data_config)

    def setup(self, stage: str | None = None) -> None:
        """Lightning calls it at the beginning: read the records, and have the trainer accumulate micro-batches."""
        processes = Processes(self.trainer.global_rank, self.trainer.world_size)
        if stage == "fit" and self.cfg.get("train_ds"):
            self._train_dl, parts = training_loader(self.language_model, self.cfg.train_ds, processes)
            self._accumulate(parts)
        if stage in ("fit", "validate") and self.cfg.get("validation_ds"):
            self._validation_dl = validation_loader(self.language_model, self.cfg.validation_ds, processes)
        super().setup(stage)

    def _accumulate(self, parts: int) -> None:
        said = self.trainer.accumulate_grad_batches
        if said not in (1, parts):
            raise ModelError(
                f"accumulate_grad_batches: train_ds says {parts} (global_batch_size over micro_batch_size and"
                f" processes), the trainer {said}; leave it out there"
            )
        self._accumulated_before_fit, self.trainer.accumulate_grad_batches = said, parts

    def teardown(self, stage: str) -> None:
        """Lightning calls it at the end: the trainer is as it was given."""
        if self._accumulated_before_fit is not None:
            self.trainer.accumulate_grad_batches = self._accumulated_before_fit
            self._accumulated_before_fit = None
        super().teardown(stage)

    def training_step(self, batch: MicroBatch | Batch) -> Tensor:
        """What is to be minimized, a scalar.

        For a batch as `LanguageModel.answer_loss.batch` makes it, its mean loss over its targets. For a micro-batch of
        `train_ds`, its share of the mean over its whole batch, times what Lightning and DDP divide gradients by;
        `train_loss` is logged for each optimizer step and is that of the whole batch.
        """
        if isinstance(batch, Batch):
            return self._summed_loss(batch) / max(len(batch.targets), 1)
        share = self._summed_loss(batch.batch) * batch.weight / max(batch.targets, 1)
        self._step_loss = share.detach() + (0 if batch.first else self._step_loss)
        self.log("train_loss", self._step_loss, prog_bar=True, sync_dist=True, reduce_fx="sum")
        return share * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2, dtype=torch.float64, device=self.device)  # summed loss, targets

    def validation_step(self, batch: MicroBatch, _batch_index: int) -> None:
        """Add the loss of a micro-batch of `validation_ds`."""
        loss, targets = self._summed_loss(batch.batch), len(batch.batch.targets)
        self._validated += batch.weight * torch.stack([loss, loss.new_tensor(targets)])

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:  # noqa: ARG002 NeMo's name
        """Log `val_loss`: the mean over all targets of all processes."""
        loss, targets = self.trainer.strategy.reduce(self._validated, reduce_op="sum")
        self.log("val_loss", (loss / targets).float(), prog_bar=True, sync_dist=True)

    def _summed_loss(self, batch: Batch) -> Tensor:
        loss = self.language_model.answer_loss
        with loss.prepared():
            summed: Tensor = loss(batch)
        return summed

    def setup_optimizer_param_groups(self) -> None:
        """As in this package's own training, biases and norms do not decay, unless `optim_param_groups` has a say."""
        if "optim_param_groups" in self.cfg:
            super().setup_optimizer_param_groups()
            return
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._optimizer_param_groups = [
            {"params": [parameter for parameter in trained if parameter.ndim >= 2]},
            {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """What `optim` says, in NeMo's words; if it says no more than `lr`, AdamW at a constant rate, without decay."""
        if not self.cfg.get("optim") or self.cfg.optim.get("lr") is None:
            raise ModelError("optim.lr: set it in cfg before training with NeMo or Lightning")
        with open_dict(self.cfg):
            self.cfg.optim = {"name": "adamw", "weight_decay": 0.0, **self.cfg.optim}
        return super().configure_optimizers()

    def _plain_config(self) -> dict[str, Any]:
        config = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(config, dict)
        return {str(key): value for key, value in config.items()}

    @classmethod
    def list_available_models(cls) -> None:
        """The models that can be downloaded by name, required by NeMo: none."""
        return


class _TensorsOnly(SaveRestoreConnector):
    """A connector that unpickles tensors only, and memory-maps them instead of copying."""

    @staticmethod
    def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> Any:
        return torch.load(model_weights, map_location=map_location, weights_only=True, mmap=True)


def _unique_part(value: str) -> str:
    """The prefix of an artifact's file name in an archive; empty for a local path."""
    name = artifact_name(value)
    return value.removeprefix("nemo:").removesuffix(name) if name else ""


@contextmanager
def _quiet_nemo() -> Iterator[None]:
    """Suppress NeMo's log lines about every archive and artifact; failures are raised as errors."""
    level = nemo_logging.get_verbosity()
    nemo_logging.set_verbosity(nemo_logging.ERROR)
    try:
        yield
    finally:
        nemo_logging.set_verbosity(level)
