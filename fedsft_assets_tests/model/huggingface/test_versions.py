"""An exported folder is as the architecture's publishers have it: transformers 4.57 and 5 read the same model."""

import json
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets_tests.model.hf_tokenizers import hf_tokenizer
from fedsft_assets_tests.model.small_models import DENSE, EXPERTS, INFINITE, MAMBA, small_model

KINDS = [*DENSE, *EXPERTS, *MAMBA, *INFINITE]
KINDS_OF_4 = [kind for kind in KINDS if kind != "nemotron_h"]  # which transformers 4.57 does not have
TEXT = "<|im_start|>What kind of snow, Zoë?<tool> It is white."


def tokenizer_with_more() -> Any:
    """With a chat template, added tokens and a special one of its own."""
    tokenizer = hf_tokenizer("with added tokens")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"
    return tokenizer


def exported(kind: str, folder: Path, **changes: Any) -> Path:
    """The folder of an archive of this kind."""
    tokenizer = tokenizer_with_more()
    folder.mkdir()
    LanguageModel.wrap(small_model(kind, tokenizer, **changes), tokenizer, 64).save(folder / "ours.nemo")
    export_huggingface(folder / "ours.nemo", folder / "hf", shard=20_000)
    return folder / "hf"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(lm: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(torch.tensor([ids])).logits


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_that_transformers_saves_and_loads_again(tmp_path, kind):
    folder = exported(kind, tmp_path / kind)
    ours = LanguageModel.load(folder.parent / "ours.nemo").eval()
    ours.lm.save_pretrained(tmp_path / "theirs")
    theirs, written = weights_of(tmp_path / "theirs"), weights_of(folder)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in theirs.items())
    lm, problems = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(problems.values()), problems
    again, before = lm.state_dict(), ours.lm.state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    ids = list(range(3, 40))
    torch.testing.assert_close(logits(lm, ids), logits(ours.lm, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("gpt_neox", "embed_out.weight", None),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", (48, 32)),
        ("qwen2_moe", "model.layers.1.mlp.experts.3.gate_proj.weight", (24, 32)),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.down_proj.weight", (32, 24)),
        ("olmoe", "model.layers.1.mlp.experts.3.up_proj.weight", (48, 32)),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight", (4, 96, 32)),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", (4, 32, 96)),
    ],
)
def test_heads_and_experts_have_the_names_that_they_were_published_with(tmp_path, kind, name, shape):
    written = weights_of(exported(kind, tmp_path / kind))
    assert name in written
    assert shape in (None, tuple(written[name].shape))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("llama", {"rope_theta": 777.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("gpt_neox", {"rotary_emb_base": 777.0, "rotary_pct": 0.5}),
        ("persimmon", {"rope_theta": 777.0, "partial_rotary_factor": 0.75}),
        ("gemma3_text", {"rope_theta": 1554.0, "rope_local_base_freq": 777.0, "rope_scaling": {"factor": 2.0}}),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 4}),
    ],
)
def test_what_has_another_name_now_is_said_under_the_old_one_too(tmp_path, kind, said):
    config = json.loads((exported(kind, tmp_path / kind) / "config.json").read_text())
    for name, value in said.items():
        assert value.items() <= config[name].items() if isinstance(value, dict) else config[name] == value


def test_archives_keep_their_names_and_tied_tensors_are_written_once(tmp_path):
    folder = exported("mixtral", tmp_path / "mixtral", tie_word_embeddings=True)
    assert "lm_head.weight" not in weights_of(folder)
    names = LanguageModel.load(folder.parent / "ours.nemo").state_dict()
    assert {"lm.lm_head.weight", "lm.model.layers.0.mlp.experts.gate_up_proj"} <= names.keys()


def test_an_archive_of_other_tensors_is_refused_by_their_names(tmp_path):
    tokenizer = hf_tokenizer("tiny")
    model = LanguageModel.wrap(small_model("llama", tokenizer), tokenizer, 64)
    model.hf = model.hf | {"num_hidden_layers": 3}
    model.save(tmp_path / "ours.nemo")
    with pytest.raises(ModelError, match=r"ours\.nemo: model_weights\.ckpt: .*missing lm\.model\.layers\.2\."):
        export_huggingface(tmp_path / "ours.nemo", tmp_path / "folder")


# One process for all folders: importing transformers takes longer than reading them.
_READER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
text, ids, *folders = sys.argv[1:]
for folder in folders:
    lm, problems = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        logits = lm.eval().float()(torch.tensor([json.loads(ids)])).logits
    print(json.dumps({
        "version": transformers.__version__,
        "problems": {name: sorted(map(str, found)) for name, found in problems.items() if found},
        "logits": logits.tolist(),
        "ids": tokenizer(text)["input_ids"],
        "text": tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False),
        "end": lm.generation_config.eos_token_id,
    }))
"""
_IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("exported")
    return {kind: exported(kind, here / kind) for kind in KINDS_OF_4}


@pytest.fixture(scope="module")
def read_by_4(tmp_path_factory, folders) -> dict[str, dict[str, Any]]:
    """What transformers 4.57 makes of the folders, in an environment that sees torch and others behind its own."""
    environment = tmp_path_factory.mktemp("old") / "environment"
    venv.create(environment, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "transformers==4.57.*"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be had from a package index: {done.stderr.strip()[-300:]}")
    command = [python, "-c", _READER, TEXT, json.dumps(_IDS), *folders.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(folders, answers, strict=True))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS_OF_4)
def test_transformers_4_reads_the_same_model_and_tokenizer(folders, read_by_4, kind):
    folder, read = folders[kind], read_by_4[kind]
    assert read["version"].startswith("4.57.")
    assert read["problems"] == {}
    expected = logits(LanguageModel.load(folder.parent / "ours.nemo").lm, _IDS)
    difference = (torch.tensor(read["logits"]) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert read["ids"] == tokenizer(TEXT)["input_ids"] == tokenizer_with_more()(TEXT)["input_ids"]
    assert read["text"] == tokenizer.decode(read["ids"], skip_special_tokens=True)
    assert read["chat"] == tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    assert read["end"] == tokenizer.eos_token_id
