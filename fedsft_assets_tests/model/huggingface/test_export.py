"""An exported folder is what Hugging Face loads: the same weights bit for bit, the same tokens, answers that end."""

import json
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from fedsft_assets.model.archive.nemo_archive import open_weights, read_config, read_tokenizer_files, write_archive
from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.huggingface import export
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.megatron.import_ import import_megatron
from fedsft_assets.model.megatron.layout import LEGACY
from fedsft_assets_tests.model.hf_tokenizers import hf_tokenizer
from fedsft_assets_tests.model.megatron_archives import SETTINGS, members, random_tensors, write_tar

_SIZES = {
    "gpt2": {"n_positions": 24, "n_embd": 30, "n_layer": 2, "n_head": 3},
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@pytest.fixture
def make(tmp_path) -> Callable[..., Path]:
    def write(layout: str = "gpt2", kind: str = "tiny", **changes: Any) -> Path:
        tokenizer = hf_tokenizer(kind)
        sizes = _SIZES[layout] | {"vocab_size": len(tokenizer)} | changes
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = (GPT2Config if layout == "gpt2" else LlamaConfig)(**sizes, **special)
        path = tmp_path / "ours.nemo"
        LanguageModel.wrap(AutoModelForCausalLM.from_config(config), tokenizer, max_length=20).save(path)
        return path

    return write


def _load(folder: Path) -> Any:
    lm, problems = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(problems.values()), problems
    return lm.eval()


def _same(lm: Any, archive: Path) -> bool:
    ours, theirs = LanguageModel.load(archive).lm.state_dict(), lm.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [("gpt2", {}), ("gpt2", {"activation_function": "gelu"}), ("llama", {}), ("llama", {"tie_word_embeddings": True})],
    ids=str,
)
def test_hugging_face_loads_the_same_weights_and_logits(tmp_path, make, layout, changes):
    archive = make(layout, **changes)
    report = export_huggingface(archive, tmp_path / "folder")
    assert report.architecture == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[layout]
    assert (report.files, report.types) == (("model.safetensors",), ("float32",))
    lm, ours = _load(tmp_path / "folder"), LanguageModel.load(archive).eval()
    assert _same(lm, archive)
    assert report.parameters == sum(parameter.numel() for parameter in lm.parameters())
    ids = torch.randint(0, 1280, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(lm(ids).logits, ours.lm(ids).logits, rtol=0, atol=1e-6)


def test_a_folder_makes_the_same_archive_again(tmp_path, make):
    archive = make()
    export_huggingface(archive, tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder", local_files_only=True)
    again = LanguageModel.wrap(_load(tmp_path / "folder"), tokenizer, max_length=20)
    ours = LanguageModel.load(archive).weights()
    assert again.weights().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.weights().items())


def test_large_models_are_cut_into_files(tmp_path, make):
    archive = make()
    report = export_huggingface(archive, tmp_path / "folder", shard=40_000)
    assert len(report.files) > 2
    assert {path.name for path in (tmp_path / "folder").glob("*.safetensors")} == set(report.files)
    index = json.loads((tmp_path / "folder/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes
    for file in report.files:
        with safe_open(tmp_path / "folder" / file, "pt") as tensors:
            names = [name for name, place in index["weight_map"].items() if place == file]
            assert set(tensors.keys()) == set(names) != set()
            size = sum(tensors.get_tensor(name).nbytes for name in names)
            assert size <= 40_000 or len(names) == 1
    assert _same(_load(tmp_path / "folder"), archive)


def _mixed(archive: Path, into: Path) -> Path:
    """The archive with matrices in bf16 and vectors in fp32, as mixed-precision training leaves them."""

    def dtype(info: TensorInfo) -> torch.dtype:
        return torch.bfloat16 if len(info.shape) > 1 else torch.float32

    config = read_config(archive)
    with open_weights(archive) as weights:
        infos = {name: TensorInfo(dtype(info), info.shape) for name, info in weights.tensors.items()}
        files = read_tokenizer_files(archive, config)
        write_archive(into, config, files, infos, lambda name: weights.read(name).to(infos[name].dtype))
    return into


@pytest.mark.parametrize("mixed", [False, True])
def test_files_are_byte_for_byte_those_that_safetensors_writes(tmp_path, make, mixed):
    archive = _mixed(make("llama"), tmp_path / "mixed.nemo") if mixed else make("llama")
    report = export_huggingface(archive, tmp_path / "folder", shard=40_000)
    assert len(report.types) == 1 + mixed
    for file in report.files:
        save_file(load_file(tmp_path / "folder" / file), tmp_path / "expected", metadata={"format": "pt"})
        assert (tmp_path / "folder" / file).read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_type(tmp_path, dtype):
    source = write_tar(tmp_path / "megatron.nemo", members(SETTINGS, random_tensors(LEGACY, dtype)))
    import_megatron(source, tmp_path / "ours.nemo", 32)
    export_huggingface(tmp_path / "ours.nemo", tmp_path / "folder")
    lm = _load(tmp_path / "folder")
    assert lm.dtype == dtype
    assert _same(lm.float(), tmp_path / "ours.nemo")


def test_rows_without_a_token_are_never_generated(tmp_path):
    tensors = random_tensors(LEGACY)
    # Of all rows, those that no token has are the likeliest.
    tensors["model.language_model.embedding.word_embeddings.weight"][261:] *= 50
    source = write_tar(tmp_path / "megatron.nemo", members(SETTINGS, tensors))
    import_megatron(source, tmp_path / "ours.nemo", 32)
    export_huggingface(tmp_path / "ours.nemo", tmp_path / "folder")
    lm, tokenizer = _load(tmp_path / "folder"), AutoTokenizer.from_pretrained(tmp_path / "folder")
    prompt = tokenizer("the thing", return_tensors="pt")
    with torch.no_grad():
        assert lm(**prompt).logits[0, -1].argmax() > 260
    assert lm.generate(**prompt, max_new_tokens=20, do_sample=False).max() <= 260


def test_answers_end_with_the_tokenizers_eos(tmp_path, make):
    export_huggingface(make("llama", "with BOS"), tmp_path / "folder")
    tokenizer, lm = AutoTokenizer.from_pretrained(tmp_path / "folder"), _load(tmp_path / "folder")
    assert (lm.generation_config.bos_token_id, lm.generation_config.eos_token_id) == (1, 2)
    assert lm.generation_config.pad_token_id == 2
    text = "What is it?\n\nAnswer: naïve"
    assert tokenizer(text)["input_ids"] == hf_tokenizer("with BOS")(text)["input_ids"]


def test_no_more_than_one_tensor_is_in_memory(tmp_path, make, monkeypatch):
    archive, read = make(), TensorFile.read
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    seen = []

    def counted(self: TensorFile, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        seen.append(len(alive))
        tensor = read(self, name, rows)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(TensorFile, "read", counted)
    export_huggingface(archive, tmp_path / "folder", shard=40_000)
    assert len(seen) > 20
    assert set(seen) == {0}


def test_a_folder_that_is_there_is_left_alone(tmp_path, make):
    archive = make()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.txt").write_text("mine")
    for taken in (tmp_path / "folder", archive):
        with pytest.raises(ModelError, match="already exists"):
            export_huggingface(archive, taken)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.txt"]


def test_an_export_that_fails_leaves_nothing(tmp_path, make, monkeypatch):
    archive = make()
    content = archive.read_bytes()
    monkeypatch.setattr(export, "publish_folder", _breaks_at_the_end(export.publish_folder))
    with pytest.raises(OSError, match="no space"):
        export_huggingface(archive, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["ours.nemo"]
    assert archive.read_bytes() == content


def _breaks_at_the_end(publish: Callable[[Path], Any]) -> Callable[[Path], Any]:
    @contextmanager
    def broken(target: Path) -> Any:
        with publish(target) as fresh:
            yield fresh
            raise OSError("no space left on device")

    return broken


def test_a_model_that_is_no_causal_language_model_is_refused_by_name(tmp_path, make):
    archive = make()
    content = archive.read_bytes()
    # A kind of model that transformers knows, with a name of the same length.
    archive.write_bytes(content.replace(b"model_type: gpt2", b"model_type: clip", 1))
    with pytest.raises(ModelError, match=r"hf\.model_type: 'clip' is not a causal language model"):
        export_huggingface(archive, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
