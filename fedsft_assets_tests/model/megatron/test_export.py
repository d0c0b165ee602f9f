"""Exports are the archives that NeMo writes: its names, order, shapes and settings, and the same values bit for bit."""

import io
import json
import tarfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedsft_assets.model.archive.members import open_archive
from fedsft_assets.model.archive.nemo_archive import open_weights, weights_of, write_archive
from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.megatron.dist_checkpoint_reader import DistributedTensors
from fedsft_assets.model.megatron.export import MegatronReport, export_megatron
from fedsft_assets.model.megatron.import_ import import_megatron
from fedsft_assets.model.megatron.layout import CORE, LEGACY, GPTShape, Layout
from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.model.hf_tokenizers import hf_tokenizer
from fedsft_assets_tests.model.megatron_archives import (
    MERGES,
    SETTINGS,
    SHAPE,
    VOCABULARY,
    megatron_logits,
    members,
    random_tensors,
    write_tar,
)

_GOLDEN = PROJECT.parent / "shared/data/megatron_golden"
_LAYOUTS: dict[str, Layout] = {"legacy": LEGACY, "mcore": CORE}
# What each training sets anew, and golden archives have from theirs.
_OF_TRAINING = {"micro_batch_size", "global_batch_size", "optim", "answer_only_loss"}
# The kernel of the layer norm, which changes no value.
_OF_THE_MACHINE = {"persist_layer_norm"}


def _golden(folder: str) -> Path:
    """An archive that NeMo 2.4.1 wrote. Skips the test where there is none."""
    if not _GOLDEN.is_dir():
        pytest.skip(f"no checkpoints of NeMo: {_GOLDEN} is not on this machine")
    return _GOLDEN / folder / "model.nemo"


@pytest.fixture(params=_LAYOUTS)
def golden(request) -> tuple[Path, Layout]:
    """An archive that NeMo 2.4.1 wrote, and its layout."""
    return _golden(request.param), _LAYOUTS[request.param]


@pytest.fixture
def make(tmp_path) -> Callable[..., Path]:
    """An archive of ours with the GPT-2 layout, small, with weights that all have an effect."""

    def write(kind: str = "tiny", **changes: Any) -> Path:
        tokenizer = hf_tokenizer(kind)
        sizes = {"n_positions": 24, "n_embd": 30, "n_layer": 2, "n_head": 3, "vocab_size": len(tokenizer)}
        special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        lm = GPT2LMHeadModel(GPT2Config(**sizes | special | changes))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        path = tmp_path / "ours.nemo"
        LanguageModel.wrap(lm, tokenizer, max_length=20).save(path)
        return path

    return write


def _tensors(archive: Path) -> dict[str, Tensor]:
    """All tensors of a Megatron archive, by their names in it."""
    with open_archive(archive, archive.parent) as source:
        if "model_weights.ckpt" in source.members:
            file = weights_of(source)
            return {name: file.read(name) for name in file.tensors}
        core = DistributedTensors(source)
        return {name: core.read(name) for name in core.tensors}


def _files(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def _settings(archive: Path) -> dict[str, Any]:
    return yaml.safe_load(_files(archive)["./model_config.yaml"])


def _equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("layout", [LEGACY, CORE])
def test_nemos_own_archives_come_back_bit_for_bit(tmp_path, golden, layout):
    theirs, own_layout = golden
    import_megatron(theirs, tmp_path / "ours.nemo", 128)
    report = export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", layout)
    assert report == MegatronReport(
        layout=layout,
        shape=GPTShape(layers=2, hidden=64, heads=4, ffn=256, positions=128, vocabulary=384),
        tokens=373,
        activation="gelu_pytorch_tanh",
        types=("float32",),
        bytes=4 * 132_864,
    )
    import_megatron(tmp_path / "export.nemo", tmp_path / "back.nemo", 128)
    assert (tmp_path / "back.nemo").read_bytes() == (tmp_path / "ours.nemo").read_bytes()
    if layout == own_layout:
        assert _equal(_tensors(tmp_path / "export.nemo"), _tensors(theirs))


def test_settings_are_those_of_nemos_own_archives(tmp_path, golden):
    theirs, layout = golden
    import_megatron(theirs, tmp_path / "ours.nemo", 128)
    export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", layout)
    expected, found = _settings(theirs), _settings(tmp_path / "export.nemo")
    assert expected.keys() - found.keys() == {"answer_only_loss"}
    for settings in (expected, found):
        for name in _OF_TRAINING | _OF_THE_MACHINE:
            settings.pop(name, None)
        for file in ("vocab_file", "merge_file"):
            settings["tokenizer"][file] = settings["tokenizer"][file].removeprefix("nemo:").partition("_")[2]
    assert found == expected


def test_files_are_those_of_nemos_own_archives(tmp_path, golden):
    theirs, layout = golden
    import_megatron(theirs, tmp_path / "ours.nemo", 128)
    export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", layout)
    expected, found = _files(theirs), _files(tmp_path / "export.nemo")
    for file in ("vocab.json", "merges.txt"):
        (own,) = (content for name, content in found.items() if name.endswith(f"_{file}"))
        (nemos,) = (content for name, content in expected.items() if name.endswith(f"_{file}"))
        assert (json.loads(own) == json.loads(nemos)) if file == "vocab.json" else (own == nemos)
    plain = {name for name in expected if "_vocab" not in name and "_merges" not in name and "__0_" not in name}
    assert plain < found.keys()
    if layout == CORE:
        assert found["./model_weights/metadata.json"] == expected["./model_weights/metadata.json"]
        assert torch.load(io.BytesIO(found["./model_weights/common.pt"]), weights_only=True) == {}


def test_states_and_pieces_of_megatron_core_are_those_of_nemos_own_archive(tmp_path):
    theirs = _golden("mcore")
    import_megatron(theirs, tmp_path / "ours.nemo", 128)
    export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", CORE)
    with open_archive(theirs, tmp_path) as expected, open_archive(tmp_path / "export.nemo", tmp_path) as found:
        own, nemos = DistributedTensors(found), DistributedTensors(expected)
        assert own.tensors == nemos.tensors
        assert own.non_tensors == nemos.non_tensors != {}


@pytest.mark.parametrize(("activation", "exact"), [("gelu_new", False), ("gelu_pytorch_tanh", False), ("gelu", True)])
def test_megatron_computes_our_logits_with_the_exported_weights(tmp_path, make, activation, exact):
    archive = make(activation_function=activation)
    report = export_megatron(archive, tmp_path / "export.nemo", LEGACY)
    assert _settings(tmp_path / "export.nemo")["bias_activation_fusion"] is not exact
    ids = torch.randint(0, 1280, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = LanguageModel.load(archive).eval().lm.double()(ids).logits
    weights = torch.load(
        io.BytesIO(_files(tmp_path / "export.nemo")["./model_weights.ckpt"]), weights_only=True, map_location="cpu"
    )
    right, wrong = (megatron_logits(weights, ids, report.shape, form) for form in (exact, not exact))
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-9)
    assert (ours - wrong).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [LEGACY, CORE])
def test_weights_keep_their_type_and_bits(tmp_path, dtype, layout):
    source = write_tar(tmp_path / "megatron.nemo", members(SETTINGS, random_tensors(LEGACY, dtype)))
    import_megatron(source, tmp_path / "ours.nemo", 32)
    report = export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", layout)
    assert report.types == (str(dtype).removeprefix("torch."),)
    assert {tensor.dtype for tensor in _tensors(tmp_path / "export.nemo").values()} == {dtype}
    import_megatron(tmp_path / "export.nemo", tmp_path / "back.nemo", 32)
    assert (tmp_path / "back.nemo").read_bytes() == (tmp_path / "ours.nemo").read_bytes()


def test_token_rows_are_filled_up_with_zeros_as_nemo_counts_them(tmp_path, make):
    archive = make(vocab_size=1290)
    report = export_megatron(archive, tmp_path / "export.nemo", LEGACY)
    table = _tensors(tmp_path / "export.nemo")["model.language_model.embedding.word_embeddings.weight"]
    assert (report.tokens, report.shape.vocabulary, len(table)) == (1280, 1408, 1408)
    assert torch.equal(table[:1290], LanguageModel.load(archive).lm.transformer.wte.weight)
    assert not table[1290:].any()
    multiple = _settings(tmp_path / "export.nemo")["make_vocab_size_divisible_by"]
    assert -(-1280 // multiple) * multiple == 1408


@pytest.mark.parametrize("layout", [LEGACY, CORE])
@pytest.mark.parametrize("rows", [1281, 1290, 1408, 1536])
def test_every_number_of_token_rows_comes_back(tmp_path, make, rows, layout):
    archive = make(vocab_size=rows)
    export_megatron(archive, tmp_path / "export.nemo", layout)
    report = import_megatron(tmp_path / "export.nemo", tmp_path / "back.nemo", 20)
    assert (report.tokens, report.shape.vocabulary) == (1280, rows)
    assert _equal(LanguageModel.load(tmp_path / "back.nemo").weights(), LanguageModel.load(archive).weights())


@pytest.mark.parametrize("rows", [1279, 1409, -1, True, "1290"])
def test_a_number_of_token_rows_that_cannot_be_is_refused(tmp_path, make, rows):
    export_megatron(make(vocab_size=1290), tmp_path / "export.nemo", LEGACY)
    files = {name.removeprefix("./"): content for name, content in _files(tmp_path / "export.nemo").items()}
    settings = yaml.safe_load(files["model_config.yaml"]) | {"unpadded_vocab_size": rows}
    files["model_config.yaml"] = yaml.safe_dump(settings).encode()
    write_tar(tmp_path / "wrong.nemo", files)
    with pytest.raises(ModelError, match="unpadded_vocab_size: expected a number from 1280"):
        import_megatron(tmp_path / "wrong.nemo", tmp_path / "back.nemo", 20)


def test_sizes_of_every_kind_go_there_and_back(tmp_path, make):
    archive = make(n_layer=1, n_head=5, n_inner=50, n_positions=16, layer_norm_epsilon=1e-4, resid_pdrop=0.2)
    export_megatron(archive, tmp_path / "export.nemo", CORE)
    settings = _settings(tmp_path / "export.nemo")
    assert {name: settings[name] for name in ("num_layers", "num_attention_heads", "ffn_hidden_size")} == {
        "num_layers": 1,
        "num_attention_heads": 5,
        "ffn_hidden_size": 50,
    }
    assert (settings["encoder_seq_length"], settings["max_position_embeddings"]) == (16, 16)
    assert (settings["layernorm_epsilon"], settings["hidden_dropout"]) == (1e-4, 0.2)
    import_megatron(tmp_path / "export.nemo", tmp_path / "back.nemo", 16)
    assert _equal(LanguageModel.load(tmp_path / "back.nemo").weights(), LanguageModel.load(archive).weights())


def test_the_same_model_gives_the_same_bytes(tmp_path, make):
    archive = make()
    for layout in (LEGACY, CORE):
        for name in ("one", "two"):
            export_megatron(archive, tmp_path / name, layout)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("layout", [LEGACY, CORE])
def test_no_more_than_one_weight_is_in_memory(tmp_path, make, monkeypatch, layout):
    archive, alive, most = make(), weakref.WeakSet(), 0
    read = TensorFile.read

    def counted(self: TensorFile, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        nonlocal most
        most = max(most, len(alive))
        tensor = read(self, name, rows)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(TensorFile, "read", counted)
    export_megatron(archive, tmp_path / "export.nemo", layout)
    assert most == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "relu"}, "hf.activation_function: 'relu'"),
        ({"tie_word_embeddings": False}, "hf.tie_word_embeddings: False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "hf.scale_attn_by_inverse_layer_idx: True"),
        ({"scale_attn_weights": False}, "hf.scale_attn_weights: False"),
    ],
    ids=str,
)
def test_what_megatron_gpt_has_not_is_refused_by_name(tmp_path, make, changes, words):
    archive = make(**changes)
    (tmp_path / "export.nemo").write_text("earlier")
    with pytest.raises(ModelError, match=words):
        export_megatron(archive, tmp_path / "export.nemo", LEGACY)
    assert (tmp_path / "export.nemo").read_text() == "earlier"


def test_another_layout_than_gpt2s_is_refused_by_name(tmp_path):
    tokenizer = hf_tokenizer("tiny")
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    LanguageModel.wrap(lm, tokenizer, max_length=20).save(tmp_path / "ours.nemo")
    with pytest.raises(ModelError, match=r"hf\.model_type: 'llama'"):
        export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", LEGACY)
    assert not (tmp_path / "export.nemo").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("missing", r"lm\.transformer\.h\.1\.ln_2\.bias: expected numbers of shape \(30,\), found None"),
        ("another shape", r"lm\.transformer\.h\.1\.ln_2\.bias: expected .* found TensorInfo"),
        ("one more", r"lm\.extra: Megatron-GPT has no such tensor"),
        ("untied", r"lm\.lm_head\.weight differs from lm\.transformer\.wte\.weight"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path, make, wrong, words):
    archive, bias = make(), "lm.transformer.h.1.ln_2.bias"
    with open_weights(archive) as file:
        tensors = {name: file.read(name) for name in file.tensors}
    changed = {
        "missing": {name: tensor for name, tensor in tensors.items() if name != bias},
        "another shape": tensors | {bias: torch.zeros(31)},
        "one more": tensors | {"lm.extra": torch.zeros(1)},
        "untied": tensors | {"lm.lm_head.weight": tensors["lm.lm_head.weight"] + 1},
    }[wrong]
    _rewrite(archive, changed)
    with pytest.raises(ModelError, match=words):
        export_megatron(archive, tmp_path / "export.nemo", LEGACY)


def _rewrite(archive: Path, tensors: Mapping[str, Tensor], **hf: object) -> None:
    """Write the archive anew with other tensors, or other fields of its configuration."""
    model = LanguageModel.load(archive)
    config = {"hf": model.hf | hf, "max_length": model.max_length, "prompt_template": model.prompt_template}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_archive(archive, config, model.tokenizer_files, infos, tensors.__getitem__)


def test_more_layers_than_tensors_are_refused_before_they_are_counted(tmp_path, make):
    archive = make()
    with open_weights(archive) as file:
        tensors = {name: file.read(name) for name in file.tensors}
    _rewrite(archive, tensors, n_layer=10**12)
    with pytest.raises(ModelError, match=r"hf\.n_layer: 1000000000000"):
        export_megatron(archive, tmp_path / "export.nemo", LEGACY)


def test_the_archive_itself_and_folders_are_not_written_over(tmp_path, make):
    archive = make()
    before = archive.read_bytes()
    with pytest.raises(ModelError, match="is the archive itself"):
        export_megatron(archive, tmp_path / "." / archive.name, LEGACY)
    with pytest.raises(ModelError, match="is a folder"):
        export_megatron(archive, tmp_path, LEGACY)
    assert archive.read_bytes() == before


def test_the_tokenizer_is_nemos_two_files(tmp_path):
    import_megatron(
        write_tar(tmp_path / "megatron.nemo", members(SETTINGS, random_tensors(LEGACY))), tmp_path / "ours.nemo", 32
    )
    report = export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", LEGACY)
    assert (report.tokens, report.shape) == (len(VOCABULARY), SHAPE)
    said = _settings(tmp_path / "export.nemo")["tokenizer"]
    files = _files(tmp_path / "export.nemo")
    assert (said["library"], said["type"]) == ("megatron", "GPT2BPETokenizer")
    assert json.loads(files[f"./{said['vocab_file'].removeprefix('nemo:')}"]) == VOCABULARY
    assert files[f"./{said['merge_file'].removeprefix('nemo:')}"].decode() == MERGES


def test_special_tokens_stay_special(tmp_path):
    tokenizer = hf_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    config = GPT2Config(n_positions=24, n_embd=12, n_layer=1, n_head=2, vocab_size=1288, bos_token_id=0, eos_token_id=0)
    LanguageModel.wrap(GPT2LMHeadModel(config), tokenizer, max_length=20).save(tmp_path / "ours.nemo")
    export_megatron(tmp_path / "ours.nemo", tmp_path / "export.nemo", LEGACY)
    assert _settings(tmp_path / "export.nemo")["tokenizer"]["special_tokens"] == {
        "additional_special_tokens": ["<|user|>", "<|assistant|>"]
    }
    import_megatron(tmp_path / "export.nemo", tmp_path / "back.nemo", 20)
    text = "<|user|>What is it?\n<|assistant|> It's naïve, 日本.<|endoftext|>"
    ids = LanguageModel.load(tmp_path / "back.nemo").tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert {1280, 1281, 0} < set(ids)
