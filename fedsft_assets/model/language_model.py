"""The model to fine-tune: a Hugging Face causal language model with its tokenizer, in one `.nemo` archive.

Plain PyTorch: reading, training, evaluating and writing it does not need NeMo. `nemo_model.SFTModel` loads the
same archive as a NeMo model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from fedsft_assets.model.archive import nemo_archive
from fedsft_assets.model.archive.archive_config import normalize_hf_config
from fedsft_assets.model.archive.torch_reader import TensorInfo
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings, end_tokens
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template
from fedsft_assets.model.tokenizer.encode import TextEncoder, front_tokens
from fedsft_assets.model.tokenizer.files import tokenizer_files, tokenizer_of
from fedsft_assets.model.trainable import require_equal_ties, require_finite, require_floats, require_same_shapes
from fedsft_assets.model.training.answer_loss import AnswerLoss

# The same functions as the originals, in one kernel instead of eight.
_ACTIVATIONS = ("activation_function", "hidden_act", "activation")
_FASTER_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that begin and end a record; `front` are those that the tokenizer prepends to every text, if any."""

    front: Sequence[int]
    eos: int


class LanguageModel(nn.Module):
    """A causal language model `lm` in fp32, with its settings in an archive.

    `hf` is the Hugging Face configuration, `tokenizer_files` has file contents by name, `max_length` is in tokens
    per record, `prompt_template` is a key of prompt_template.TEMPLATES.
    """

    def __init__(
        self, config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes], lm: nn.Module | None = None
    ) -> None:
        """Build the model from an archive's configuration. Without `lm`, its weights are uninitialized."""
        super().__init__()
        template(config["prompt_template"])
        self.hf: dict[str, Any] = dict(config["hf"])
        self.max_length = int(config["max_length"])
        self.prompt_template = str(config["prompt_template"])
        self.tokenizer_files = dict(tokenizer_files)
        self.lm: Any = empty_lm(self.hf) if lm is None else lm
        self.adapters_only = False  # if True, only adapters are trained and sent; see training/lora.py

    @classmethod
    def wrap(cls, lm: Any, tokenizer: Any, max_length: int, prompt_template: str = DEFAULT_TEMPLATE) -> Self:
        """Build the model from a Hugging Face causal LM's weights, in fp32, its tokenizer, and all its EOS tokens.

        Raises ModelError if the tokenizer has no EOS token, is not a fast tokenizer or has more tokens than the
        model has embeddings, if the configuration alone does not give a model with the same tensors, or if the
        weights cannot be trained.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{type(tokenizer).__name__}: the tokenizer has no EOS token, so no answer could end")
        embeddings = lm.get_input_embeddings().num_embeddings
        if len(tokenizer) > embeddings:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model has embeddings for {embeddings}")
        files = tokenizer_files(tokenizer)
        if "tokenizer.json" not in files:
            raise ModelError(f"{type(tokenizer).__name__}: is not a fast tokenizer; save it with a tokenizer.json")
        hf = normalize_hf_config(json.loads(lm.config.to_json_string()))
        ends = end_tokens(hf.get("eos_token_id"))
        every_end = end_tokens(ends, getattr(lm.generation_config, "eos_token_id", None))
        if every_end != ends:  # an archive has no generation settings of its own
            hf["eos_token_id"] = every_end
        model = cls({"hf": hf, "max_length": max_length, "prompt_template": prompt_template}, files)
        weights = {f"lm.{name}": tensor for name, tensor in lm.state_dict().items()}
        require_finite(lm)
        require_floats(model.state_dict(), {name: tensor.dtype for name, tensor in weights.items()})
        require_equal_ties(model.tied(), weights.get)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(f"{type(lm).__name__} cannot be rebuilt from its configuration: {error}") from error
        return model

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an archive, which may be untrusted, into fp32 weights on the CPU, tensor by tensor.

        No class that it names is imported, and only tensors are unpickled. Raises ModelError that names the file.
        """
        config = nemo_archive.read_config(path)
        files = nemo_archive.read_tokenizer_files(path, config)
        try:
            model = cls(config, files)
        except Exception as error:  # transformers raises errors of many kinds for a bad configuration
            raise ModelError(f"{path}: cannot be restored: {type(error).__name__}: {error}") from error
        with nemo_archive.open_weights(path) as weights:
            require_same_shapes(
                {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
                {name: info.shape for name, info in weights.tensors.items()},
                f"{path}: {nemo_archive.WEIGHTS} does not hold the weights of the model that"
                f" {nemo_archive.CONFIG} describes",
            )
            where = f"{path}: {nemo_archive.WEIGHTS}: "
            kinds = {name: info.dtype for name, info in weights.tensors.items()}
            require_floats(model.state_dict(), kinds, where)
            apart = {name: first for name, first in model.tied().items() if not weights.share(name, first)}
            require_equal_ties(apart, weights.read, where)
            with torch.no_grad():
                for name, tensor in model.distinct_parameters().items():
                    tensor.copy_(weights.read(name))
        return model

    def save(self, path: Path) -> None:
        """Write the archive, atomically; it contains the tokenizer and needs no other file.

        Raises ModelError if there are unmerged adapters, which an archive cannot hold.
        """
        if self.adapters_only:
            raise ModelError(f"{path}: merge the model's adapters before saving it")
        tensors = self.state_dict(keep_vars=True)
        nemo_archive.write_archive(
            path,
            {"hf": self.hf, "max_length": self.max_length, "prompt_template": self.prompt_template},
            self.tokenizer_files,
            {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
            lambda name: tensors[name].detach().cpu().contiguous(),
            self.tied(),
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; its padding token defaults to EOS."""
        return tokenizer_of(self.tokenizer_files)

    @property
    def tokenizer_json(self) -> bytes:
        """The content of tokenizer.json. Raises ModelError if the archive has none."""
        if "tokenizer.json" not in self.tokenizer_files:
            raise ModelError(
                f"the archive's tokenizer has no tokenizer.json, only {', '.join(sorted(self.tokenizer_files))};"
                " save it with a current transformers, which writes one"
            )
        return self.tokenizer_files["tokenizer.json"]

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The ids that begin and end a record, from the tokenizer's files: much faster than loading the tokenizer."""
        raw = Tokenizer.from_buffer(self.tokenizer_json)
        text = json.loads(self.tokenizer_files.get("tokenizer_config.json", b"{}")).get("eos_token")
        text = text.get("content") if isinstance(text, dict) else text
        eos = raw.token_to_id(text) if isinstance(text, str) else None
        if eos is None:
            raise ModelError("tokenizer_config.json: eos_token: not a token of tokenizer.json, so no answer could end")
        return SpecialTokens(front_tokens(raw), eos)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The encoder of prompts, the same as for training records."""
        return TextEncoder(self.tokenizer_json)

    @cached_property
    def answer_loss(self) -> AnswerLoss:
        """The loss of batches, computed in the fastest way that this model supports."""
        return AnswerLoss(self.lm, pad_id=self.special_tokens.eos, longest=self.max_length)

    def forget_answer_loss(self) -> None:
        """Discard `answer_loss`, after the model's layers were changed."""
        self.__dict__.pop("answer_loss", None)

    def distinct_parameters(self) -> dict[str, Tensor]:
        """All weights by name, not copied; tied tensors once, under their first name; with adapters, only theirs."""
        if self.adapters_only:
            return {
                name.replace(".default.", "."): tensor  # peft's adapter name, which its files omit too
                for name, tensor in self.state_dict(keep_vars=True).items()
                if tensor.requires_grad
            }
        seen: set[int] = set()
        return {
            name: tensor
            for name, tensor in self.state_dict(keep_vars=True).items()
            if id(tensor) not in seen and not seen.add(id(tensor))  # type: ignore[func-returns-value]
        }

    def tied(self) -> dict[str, str]:
        """The other names of tied tensors, each with the first name of the same tensor."""
        first: dict[int, str] = {}
        tensors = self.state_dict(keep_vars=True)
        return {name: kept for name, tensor in tensors.items() if (kept := first.setdefault(id(tensor), name)) != name}

    def weights(self) -> dict[str, Tensor]:
        """All weights in the form in which they are sent: fp32 copies on the CPU, tied tensors once."""
        return dict(self.each_weight())

    def each_weight(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `weights` one at a time."""
        for name, tensor in self.distinct_parameters().items():
            yield name, tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights with the names of `weights`, in any float dtype; ties are kept.

        Raises ModelError naming the tensors that are missing, unexpected or of another shape, and then changes
        nothing.
        """
        self.require_same(weights)
        with torch.no_grad():
            for name, tensor in self.distinct_parameters().items():
                tensor.copy_(weights[name])

    def require_same(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ModelError if these tensors do not have the names and shapes of `weights`."""
        require_same_shapes(
            {name: tuple(tensor.shape) for name, tensor in self.distinct_parameters().items()},
            {name: tuple(tensor.shape) for name, tensor in weights.items()},
            "these are not the weights of this model",
        )

    def generate(
        self, prompts: list[str], settings: GenerationSettings | None = None, batch_size: int = 16, chat: bool = False
    ) -> list[str]:
        """Generate answers to prompts, without the prompts: greedily, or by `settings`.

        Prompts are formatted with the training template, or with the tokenizer's chat template if `chat`. Those
        that leave no room for the answer are truncated at the beginning.
        """
        from fedsft_assets.model.text_generation import ChatTurn, chat_tokens, complete, plain_tokens, prompt_room

        settings = settings or GenerationSettings()
        tokens = [
            chat_tokens(self.tokenizer, [ChatTurn("user", text)], prompt_room(self.lm, settings))
            if chat
            else plain_tokens(self.text_encoder, text, self.prompt_template)
            for text in prompts
        ]
        with self.evaluating():
            return complete(self.lm, self.tokenizer, tokens, settings, batch_size=batch_size)

    @contextmanager
    def evaluating(self) -> Iterator[torch.device]:
        """Within the block, the model is on the compute device and in evaluation mode."""
        training, device = self.training, compute_device()
        self.to(device)
        self.eval()
        try:
            yield device
        finally:
            self.train(training)


def compute_device() -> torch.device:
    """The device for training and evaluation: the first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def import_architecture(path: Path) -> None:
    """Import transformers' code for the architecture of an archive. Raises ModelError that names the file."""
    hf = nemo_archive.read_config(path)["hf"]
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(**hf))]
    except Exception as error:
        raise ModelError(f"{path}: is not a causal LM: {error}") from error


def empty_lm(hf: Mapping[str, Any]) -> Any:
    """The causal LM of a Hugging Face configuration, in fp32, with uninitialized weights."""
    hf = {key: _FASTER_ACTIVATIONS.get(value, value) if key in _ACTIVATIONS else value for key, value in hf.items()}
    # Skip random initialization: all tensors are loaded afterwards, strictly.
    with no_init_weights():
        config = AutoConfig.for_model(**hf)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    lm.tie_weights()  # part of the skipped initialization
    return lm
