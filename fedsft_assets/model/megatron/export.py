"""Export of this project's archives as Megatron-GPT archives for NeMo 2.4.1's `MegatronGPTModel.restore_from`.

The reverse of `import_`: values are preserved bit for bit, in their stored dtype, and written tensor by tensor.
NeMo and Megatron are not needed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import Tensor

from fedsft_assets.model.archive.archive_config import artifact_member
from fedsft_assets.model.archive.nemo_archive import CONFIG, WEIGHTS, open_weights, read_config, read_tokenizer_files
from fedsft_assets.model.archive.tar_writer import new_tar, tar_folder, tar_member
from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo, dtype_names
from fedsft_assets.model.archive.torch_writer import write_tensors
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.config import UNPADDED, MegatronGPT, megatron_gpt, megatron_settings
from fedsft_assets.model.megatron.dist_checkpoint_writer import FOLDER, Piece, write_checkpoint
from fedsft_assets.model.megatron.layout import CORE, LEGACY, PREFIX, GPTShape, Layout, Weight, to_megatron, weights
from fedsft_assets.model.megatron.vocabulary import Vocabulary, megatron_vocabulary
from fedsft_assets.model.progress import ByteProgress

# The linear layers with an fp8 state in Megatron-core; it is empty without fp8, but required.
_WITH_STATE = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_VOCABULARY_MULTIPLE = 128

# Settings that NeMo 2.4.1 requires besides the model's own. None affects what the weights compute;
# training overrides batch sizes, optimizer and precision.
_REST: dict[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "init_method_std": 0.02,
    "use_scaled_init_method": True,
    "ffn_dropout": 0.0,
    "do_layer_norm_weight_decay": False,
    "pre_process": True,
    "post_process": True,
    # Torch's layer norm, which Megatron-core uses without Apex, does not support the persistent kernel.
    "persist_layer_norm": False,
    "rotary_percentage": 1.0,
    "precision": 32,
    "native_amp_init_scale": 4294967296,
    "native_amp_growth_interval": 1000,
    "hysteresis": 2,
    "fp32_residual_connection": False,
    "fp16_lm_cross_entropy": False,
    "megatron_amp_O2": False,
    "grad_allreduce_chunk_size_mb": 125,
    "gradient_accumulation_fusion": False,
    "bias_dropout_add_fusion": True,
    "masked_softmax_fusion": True,
    "get_attention_mask_from_fusion": True,
    "seed": 1234,
    # If false, restoring sets the CUDA device, and fails on a machine without one.
    "use_cpu_initialization": True,
    "gradient_as_bucket_view": True,
    "sync_batch_comm": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "sequence_parallel": False,
    "transformer_engine": False,
    "fp8": False,
    "use_flash_attention": False,
    "optim": {
        "name": "adamw",
        "lr": 1e-5,
        "weight_decay": 0.01,
        "betas": [0.9, 0.98],
        "sched": {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 0, "min_lr": 0.0},
    },
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "nemo_version": "2.4.1",
}


@dataclass(frozen=True)
class MegatronReport:
    """What was exported: `shape.vocabulary` counts the token table's rows, `tokens` those of the tokenizer."""

    layout: Layout
    shape: GPTShape
    tokens: int
    activation: str
    types: tuple[str, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        return self.shape.parameters


def export_megatron(archive: Path, into: Path, layout: Layout) -> MegatronReport:
    """Write the model of one of this project's archives as the Megatron archive `into`, atomically.

    The token table is padded with zero rows to a multiple of 128, as in NeMo; importing drops them again.
    Raises ModelError that names the archive and the field that Megatron-GPT or its tokenizer cannot express.
    """
    if into.resolve() == archive.resolve():
        raise ModelError(f"{into}: is the archive itself; choose another file")
    if into.is_dir():
        raise ModelError(f"{into}: is a folder; name the archive to write, such as {into / 'megatron.nemo'}")
    config = read_config(archive)
    model = megatron_gpt(config["hf"], f"{archive}: {CONFIG}")
    vocabulary = megatron_vocabulary(read_tokenizer_files(archive, config), str(archive))
    with open_weights(archive) as tensors:
        unpadded = _shape(archive, tensors, model, vocabulary)
        types = {weight.hf: tensors.tensors[f"lm.{weight.hf}"].dtype for weight in weights(unpadded)}
        shape = replace(unpadded, vocabulary=_round_up(unpadded.vocabulary, _VOCABULARY_MULTIPLE))
        infos = {weight: TensorInfo(types[weight.hf], weight.shape) for weight in weights(shape)}
        report = MegatronReport(
            layout=layout,
            shape=shape,
            tokens=vocabulary.tokens,
            activation=model.activation,
            types=dtype_names(infos.values()),
            bytes=sum(info.nbytes for info in infos.values()),
        )
        read = _reader(tensors, report)
        files = {
            "vocab_file": (artifact_member("vocab.json", vocabulary.vocab_json), vocabulary.vocab_json),
            "merge_file": (artifact_member("merges.txt", vocabulary.merges_txt), vocabulary.merges_txt),
        }
        settings = _settings(
            config["hf"], model, report, vocabulary, {field: name for field, (name, _) in files.items()}
        )
        if unpadded != shape:
            settings[UNPADDED] = unpadded.vocabulary
        with new_tar(into) as file:
            tar_folder(file, "./")  # like NeMo, which writes an entry for each folder
            for name, content in [(CONFIG, yaml.safe_dump(settings, sort_keys=False).encode()), *files.values()]:
                with tar_member(file, f"./{name}"):
                    file.write(content)
            if layout == CORE:
                _write_core(file, shape, infos, read)
            else:
                _write_legacy(file, infos, read)
    return report


def _shape(archive: Path, tensors: TensorFile, model: MegatronGPT, vocabulary: Vocabulary) -> GPTShape:
    """The sizes of the model. Raises ModelError if a weight is missing or unexpected."""
    word, head = "lm.transformer.wte.weight", "lm.lm_head.weight"
    table = tensors.tensors.get(word)
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{archive}: {WEIGHTS}: has no token table {word}")
    rows = table.shape[0]
    if model.layers > len(tensors.tensors):
        raise ModelError(f"{archive}: {CONFIG}: hf.n_layer: {model.layers}, but {WEIGHTS} has fewer tensors than that")
    if rows < vocabulary.tokens:
        raise ModelError(f"{archive}: {word} has {rows} rows, but the tokenizer has {vocabulary.tokens} tokens")
    shape = GPTShape(
        layers=model.layers, hidden=model.hidden, heads=model.heads, ffn=model.ffn,
        positions=model.positions[0], vocabulary=rows,
    )  # fmt: skip
    expected = {f"lm.{weight.hf}": weight.hf_shape for weight in weights(shape)}
    for name, size in expected.items():
        found = tensors.tensors.get(name)
        if found is None or found.shape != size or not found.dtype.is_floating_point:
            raise ModelError(f"{archive}: {WEIGHTS}: {name}: expected numbers of shape {size}, found {found}")
    more = sorted(tensors.tensors.keys() - expected.keys() - {head})
    if more:
        raise ModelError(f"{archive}: {WEIGHTS}: {more[0]}: Megatron-GPT has no such tensor")
    same = head not in tensors.tensors or tensors.shared.get(head) == word or tensors.shared.get(word) == head
    if not same and not torch.equal(tensors.read(head), tensors.read(word)):
        raise ModelError(f"{archive}: {WEIGHTS}: {head} differs from {word}, but Megatron-GPT ties its embeddings")
    return shape


def _reader(tensors: TensorFile, report: MegatronReport) -> Callable[[Weight], Tensor]:
    """A function that reads a weight in Megatron's form, padded, and logs progress."""
    progress = ByteProgress(report.bytes, "written")

    def read(weight: Weight) -> Tensor:
        tensor = to_megatron(weight, tensors.read(f"lm.{weight.hf}"), report.shape.heads)
        if padding := weight.shape[0] - tensor.shape[0]:
            tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
        progress.add(tensor.nbytes)
        return tensor

    return read


def _write_legacy(file: BinaryIO, infos: Mapping[Weight, TensorInfo], read: Callable[[Weight], Tensor]) -> None:
    named = {PREFIX[LEGACY] + weight.names(LEGACY)[0]: weight for weight in infos}
    with tar_member(file, f"./{WEIGHTS}"):
        write_tensors(file, {name: infos[weight] for name, weight in named.items()}, lambda name: read(named[name]))


def _write_core(
    file: BinaryIO, shape: GPTShape, infos: Mapping[Weight, TensorInfo], read: Callable[[Weight], Tensor]
) -> None:
    """Write Megatron-core's layout: layers are rows of one tensor, and layer norms belong to the linear layers."""

    def piece(weight: Weight, info: TensorInfo) -> Piece:
        if weight.layer is None:
            return Piece(PREFIX[CORE] + weight.names(CORE)[0], info.dtype, info.shape, None, lambda: read(weight))
        name, whole = PREFIX[CORE] + weight.stacked_names(CORE)[0], (shape.layers, *info.shape)
        return Piece(name, info.dtype, whole, weight.layer, lambda: read(weight))

    states = (
        f"{PREFIX[CORE]}decoder.layers.{module}._extra_state/shard_{layer}_{shape.layers}"
        for layer in range(shape.layers)
        for module in _WITH_STATE
    )
    tar_folder(file, f"./{FOLDER}/")
    pieces: Iterator[Piece] = (piece(weight, info) for weight, info in infos.items())
    write_checkpoint(file, lambda name: tar_member(file, f"./{name}"), pieces, states)


def _settings(
    hf: Mapping[str, Any], model: MegatronGPT, report: MegatronReport, vocabulary: Vocabulary, files: Mapping[str, str]
) -> dict[str, Any]:
    """The content of NeMo's model_config.yaml; `files` has the names of the tokenizer's members by field."""
    rows, multiple = report.shape.vocabulary, _VOCABULARY_MULTIPLE
    tokenizer: dict[str, Any] = {
        "library": "megatron",
        "type": "GPT2BPETokenizer",
        "model": None,
        **{field: f"nemo:{name}" for field, name in files.items()},
        "delimiter": None,
        "sentencepiece_legacy": False,
    }
    if vocabulary.special:
        tokenizer["special_tokens"] = {"additional_special_tokens": list(vocabulary.special)}
    return {
        **megatron_settings(model, report.layout == CORE),
        # NeMo rounds the number of tokens up to a multiple of this; if that is not the number of rows, use the latter.
        "make_vocab_size_divisible_by": multiple if _round_up(vocabulary.tokens, multiple) == rows else rows,
        "hidden_dropout": hf.get("resid_pdrop", 0.1),
        "attention_dropout": hf.get("attn_pdrop", 0.1),
        "tokenizer": tokenizer,
        **_REST,
    }


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
