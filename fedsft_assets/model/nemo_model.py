"""A NeMo ModelPT for this project's archives, for use with NeMo's and Lightning's own tools.

Nothing in this package needs it: `language_model.LanguageModel` reads and writes the same archives without NeMo.
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
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fedsft_assets.files import publish_file
from fedsft_assets.model.archive import nemo_archive
from fedsft_assets.model.archive.archive_config import artifact_key, artifact_name
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel, empty_lm
from fedsft_assets.model.prompt_template import template
from fedsft_assets.model.training.batches import Batch
from fedsft_assets.model.training.optimizer import build_optimizer


class SFTModel(ModelPT):
    """A causal language model for supervised fine-tuning, with fp32 weights.

    `cfg` has `hf` (the Hugging Face configuration), `tokenizer.files` (artifacts), `max_length` (tokens per
    record), `prompt_template` (a key of prompt_template.TEMPLATES), and for training `optim.lr`.
    """

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

    @classmethod
    def load(cls, path: Path) -> Self:
        """Restore an archive, which may be untrusted, through NeMo, on the CPU, in fp32.

        No class that it names is imported, only tensors are unpickled, and nothing is written outside a temporary
        folder. Raises ModelError that names the file.
        """
        config = OmegaConf.create(nemo_archive.read_config(path))
        try:
            with _quiet_nemo():
                return cls.restore_from(
                    str(path),
                    override_config_path=config,
                    map_location=torch.device("cpu"),
                    save_restore_connector=_TensorsOnly(),
                )
        except (pickle.UnpicklingError, RuntimeError, EOFError, tarfile.TarError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:5])  # torch lists every tensor
            raise ModelError(f"{path}: {nemo_archive.WEIGHTS} is truncated or not this model's: {reason}") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ModelError(f"{path}: cannot be restored: {type(error).__name__}: {error}") from error
        finally:
            # NeMo leaves this set after a failed restore, which would affect the next model.
            cls._set_model_restore_state(is_being_restored=False)

    def save(self, path: Path) -> None:
        """Write the archive through NeMo, atomically; it contains the tokenizer and needs no other file."""
        with TemporaryDirectory() as folder, publish_file(path) as fresh, _quiet_nemo():
            # NeMo would take a restored model's artifacts from its original archive, which may no longer exist.
            self.artifacts: dict[str, Any] = {}
            for name, content in self._tokenizer_files.items():
                file = Path(folder) / name
                file.write_bytes(content)
                self.register_artifact(f"tokenizer.files.{artifact_key(name)}", str(file))
            self.save_to(str(fresh))

    @cached_property
    def language_model(self) -> LanguageModel:
        """A LanguageModel that shares these weights, as this package trains and evaluates them."""
        return LanguageModel(self._plain_config(), self._tokenizer_files, self.lm)

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss, a scalar, over the targets of a batch from `LanguageModel.answer_loss.batch`."""
        loss = self.language_model.answer_loss
        with loss.prepared():
            return loss(batch) / max(len(batch.targets), 1)

    def configure_optimizers(self) -> Any:
        """AdamW with the constant learning rate `optim.lr`."""
        if "optim" not in self.cfg:
            raise ModelError("optim.lr: set it in cfg before training with NeMo or Lightning")
        return build_optimizer(self.parameters(), self.cfg.optim.lr, weight_decay=0.0, fused=True, moments=None)

    def _plain_config(self) -> dict[str, Any]:
        config = OmegaConf.to_container(self.cfg, resolve=True)
        assert isinstance(config, dict)
        return {str(key): value for key, value in config.items()}

    def setup_training_data(self, train_data_config: DictConfig) -> None:  # noqa: ARG002 NeMo's name
        raise ModelError("train_ds: this model takes batches, not a data configuration")

    def setup_validation_data(self, val_data_config: DictConfig) -> None:  # noqa: ARG002 NeMo's name
        raise ModelError("validation_ds: this model takes batches, not a data configuration")

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
