"""The model that is fine-tuned: a NeMo ModelPT around a Hugging Face causal language model.

One `.nemo` archive holds all of it: configuration, weights and tokenizer. Nothing here reads data
files or touches the network.
"""

import hashlib
import json
import pickle
import tarfile
from collections.abc import Iterator, Mapping
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from fedsft_assets.model import archive
from fedsft_assets.model.archive import ModelError
from fedsft_assets.model.batches import IGNORED, Batch
from fedsft_assets.model.completion import complete
from fedsft_assets.model.loss import head_only_at, summed_cross_entropy
from fedsft_assets.model.optimizer import Moments, OptimizerPlan, build_optimizer
from fedsft_assets.model.prompt_template import template
from fedsft_assets.store import publish_file

__all__ = ["ModelError", "OptimizerPlan", "SFTModel", "compute_device"]


class SFTModel(ModelPT):
    """A causal language model that learns to answer.

    `cfg` holds `hf` (the Hugging Face configuration), `tokenizer.files` (artifacts), `max_length`
    (tokens of a record) and `prompt_template` (a key of prompt_template.TEMPLATES). Weights are fp32.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        """Build the model of `cfg`. Its weights have no values yet: `load` and `wrap` give them theirs."""
        super().__init__(cfg=cfg, trainer=trainer)
        template(cfg.prompt_template)
        self._tokenizer_files = {
            path.name.removeprefix(_unique_part(value)): path.read_bytes()
            for key, value in list(cfg.tokenizer.files.items())
            for path in [Path(self.register_artifact(f"tokenizer.files.{key}", value))]
        }
        self.lm = _empty_lm(cfg)
        self._optimizer_plan: OptimizerPlan | None = None
        self._moments: Moments | None = None

    @classmethod
    def wrap(cls, lm: Any, tokenizer: Any, max_length: int, prompt_template: str = "answer") -> Self:
        """The model with the weights of a Hugging Face causal LM, in fp32, and its tokenizer.

        Raises ModelError if the tokenizer has no EOS token or more tokens than the model has
        embeddings, or if the configuration alone does not give a model of the same tensors.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{type(tokenizer).__name__}: the tokenizer has no EOS token, so no answer could end")
        embeddings = lm.get_input_embeddings().num_embeddings
        if len(tokenizer) > embeddings:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model has embeddings for {embeddings}")
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = {archive.artifact_key(path.name): str(path) for path in sorted(Path(folder).iterdir())}
            cfg = {
                "hf": archive.describe(json.loads(lm.config.to_json_string())),
                "tokenizer": {"files": files},
                "max_length": max_length,
                "prompt_template": prompt_template,
            }
            model = cls(OmegaConf.create(cfg))
        try:
            model.lm.load_state_dict(lm.state_dict())
        except RuntimeError as error:
            raise ModelError(f"{type(lm).__name__} cannot be rebuilt from its configuration: {error}") from error
        return model

    @classmethod
    def load(cls, path: Path) -> Self:
        """Restore an archive on the CPU, in fp32. It may come from anyone.

        No class that it names is imported, nothing but tensors is unpickled, nothing is written
        outside a temporary folder. Raises ModelError that names the file.
        """
        config = OmegaConf.create(archive.read_config(path))
        try:
            with _quiet_nemo():
                return cls.restore_from(
                    str(path),
                    override_config_path=config,
                    map_location=torch.device("cpu"),
                    save_restore_connector=_TensorsOnly(),
                )
        except (pickle.UnpicklingError, RuntimeError, EOFError, tarfile.TarError) as error:
            what = _some(str(error).splitlines())  # torch lists every tensor that does not fit
            raise ModelError(f"{path}: {archive.WEIGHTS} is truncated or not this model's: {what}") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise ModelError(f"{path}: cannot be restored: {type(error).__name__}: {error}") from error
        finally:
            # NeMo leaves this set when a restore fails, and the next model would believe it.
            cls._set_model_restore_state(is_being_restored=False)

    def save(self, path: Path) -> None:
        """Write the archive, whole or not at all; the tokenizer goes in, so that it needs no other file."""
        with TemporaryDirectory() as folder, publish_file(path) as fresh, _quiet_nemo():
            # NeMo would take a restored model's artifacts from the archive it came from, which may be gone.
            self.artifacts: dict[str, Any] = {}
            for name, content in self._tokenizer_files.items():
                file = Path(folder) / name
                file.write_bytes(content)
                self.register_artifact(f"tokenizer.files.{archive.artifact_key(name)}", str(file))
            self.save_to(str(fresh))

    def content_digest(self) -> str:
        """SHA-256 in hex of configuration, tokenizer and weights: the same for equal models.

        The archive's own bytes are not: NeMo puts random names and times into it.
        """
        config = OmegaConf.to_container(self.cfg, resolve=True)
        own = {field: config[field] for field in archive.FIELDS if field != "tokenizer"}  # type: ignore[call-overload,index]
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        for name, content in sorted(self._tokenizer_files.items()):
            digest.update(f"\0{name}\0{hashlib.sha256(content).hexdigest()}".encode())
        for name, tensor in sorted(self.weights().items()):
            digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def max_length(self) -> int:
        """Tokens of the longest record."""
        return int(self.cfg.max_length)

    @property
    def prompt_template(self) -> str:
        return str(self.cfg.prompt_template)

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; its padding token is EOS if it has none of its own."""
        with TemporaryDirectory() as folder:
            for name, content in self._tokenizer_files.items():
                (Path(folder) / name).write_bytes(content)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # the tokenizers library raises bare Exception for a bad file
                raise ModelError(f"the archive's tokenizer files cannot be read: {error}") from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def weights(self) -> dict[str, Tensor]:
        """All weights as they travel: copies on the CPU, fp32, each tied tensor once under its first name."""
        return {
            name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True)
            for name, tensor in self._distinct_tensors()
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights as `weights` gives them, of any float type; what is tied stays tied.

        Raises ModelError that names the tensors that are missing, unexpected or of another shape;
        then nothing was changed.
        """
        own = dict(self._distinct_tensors())
        problems = [f"missing {name}" for name in own if name not in weights]
        problems += [f"unexpected {name}" for name in weights if name not in own]
        problems += [
            f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        if problems:
            raise ModelError(f"these are not the weights of this model: {_some(problems)}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(weights[name])

    def answer_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss (scalar, fp32, nats) over a batch's answer tokens, and how many these are.

        A sum, so that the means over batches, micro-batches and devices can be weighted by tokens.
        """
        targets = batch.labels[:, 1:]
        answers = targets != IGNORED
        positions = torch.nn.functional.pad(answers, (0, 1)).flatten().nonzero().squeeze(1)
        with head_only_at(self.lm.get_output_embeddings(), positions) as called:
            output = self.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = output.logits.flatten(0, 1)
        if not called:
            logits = logits.index_select(0, positions)
        return summed_cross_entropy(logits, targets[answers]), len(positions)

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss over the batch's answer tokens."""
        loss, tokens = self.answer_loss(batch)
        return loss / max(tokens, 1)

    def plan_optimizer(self, plan: OptimizerPlan, moments: Moments | None = None) -> None:
        """Say what `configure_optimizers` shall build, and with which moments it goes on."""
        self._optimizer_plan = plan
        self._moments = moments

    def configure_optimizers(self) -> Any:
        """What Lightning asks for: the planned optimizer and its schedule, stepped with every batch."""
        if self._optimizer_plan is None:
            raise ModelError("plan_optimizer() must come before training")
        optimizer, scheduler = build_optimizer(self.parameters(), self._optimizer_plan, self._moments)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def generate(
        self, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0, batch_size: int = 16
    ) -> list[str]:
        """Answers to prompts, without the prompts: greedy, or sampled at a temperature above 0.

        An answer ends at EOS or after `max_new_tokens`. Prompts get the template of training; one
        that leaves no room for the answer loses its beginning.
        """
        style = template(self.prompt_template)
        with self.evaluating():
            texts = [style.prompt(text) for text in prompts]
            return complete(
                self.lm,
                self.tokenizer,
                texts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                batch_size=batch_size,
            )

    @contextmanager
    def evaluating(self) -> Iterator[torch.device]:
        """Within the block the model is on the compute device and in evaluation mode."""
        training, device = self.training, compute_device()
        self.to(device)
        self.eval()
        try:
            yield device
        finally:
            self.train(training)

    def _distinct_tensors(self) -> Iterator[tuple[str, Tensor]]:
        seen = set()
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def setup_training_data(self, train_data_config: DictConfig) -> None:  # noqa: ARG002 NeMo's name
        raise ModelError("train_ds: this model is trained by train_round, which takes tokens, not a configuration")

    def setup_validation_data(self, val_data_config: DictConfig) -> None:  # noqa: ARG002 NeMo's name
        raise ModelError("validation_ds: this model is evaluated by mean_loss, which takes tokens")

    @classmethod
    def list_available_models(cls) -> None:
        """NeMo asks for the models that can be downloaded by name: none."""
        return


class _TensorsOnly(SaveRestoreConnector):
    """NeMo's connector, which never unpickles more than tensors, and reads them without a second copy."""

    @staticmethod
    def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> Any:
        return torch.load(model_weights, map_location=map_location, weights_only=True, mmap=True)


def compute_device() -> torch.device:
    """Where a model is evaluated: the first GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _empty_lm(cfg: DictConfig) -> Any:
    hf = OmegaConf.to_container(cfg.hf, resolve=True)
    config = AutoConfig.for_model(**hf)  # type: ignore[arg-type]
    # Random values would be wasted: every tensor is loaded next, strictly.
    with no_init_weights():
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    lm.tie_weights()  # a part of the initialization that was left out
    return lm


def _unique_part(value: str) -> str:
    """The random part that NeMo puts before an artifact's file name; nothing for a local path."""
    name = archive.artifact_name(value)
    return value.removeprefix("nemo:").removesuffix(name) if name else ""


def _some(problems: list[str], shown: int = 5) -> str:
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problem.strip() for problem in problems[:shown]) + more


@contextmanager
def _quiet_nemo() -> Iterator[None]:
    """NeMo's log tells of every archive and every artifact; what matters here arrives as an error."""
    level = nemo_logging.get_verbosity()
    nemo_logging.set_verbosity(nemo_logging.ERROR)
    try:
        yield
    finally:
        nemo_logging.set_verbosity(level)
