"""Megatron archives become the same model: NeMo's own logits, both layouts, every form that NeMo writes, no other."""

import io
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsft_assets.model.archive.nemo_archive import content_digest, open_weights, read_config
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.megatron.import_ import ImportReport, import_megatron
from fedsft_assets.model.megatron.layout import CORE, LEGACY, GPTShape
from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.model.megatron_archives import (
    SETTINGS,
    SHAPE,
    VOCABULARY,
    distributed,
    megatron_logits,
    members,
    random_tensors,
    saved,
    stacked,
    write_folder,
    write_tar,
)

_GOLDEN = PROJECT.parent / "shared/data/megatron_golden"


@pytest.fixture
def convert(tmp_path) -> Callable[..., LanguageModel]:
    """Import an archive of these files, and load the result."""

    def make(files: dict[str, bytes], mode: str = "w") -> LanguageModel:
        import_megatron(write_tar(tmp_path / "megatron.nemo", files, mode=mode), tmp_path / "ours.nemo", 1024)
        return LanguageModel.load(tmp_path / "ours.nemo").eval()

    return make


@pytest.fixture
def legacy() -> dict[str, bytes]:
    return members(SETTINGS, random_tensors(LEGACY))


@pytest.fixture
def core(tmp_path) -> dict[str, bytes]:
    return {
        **members({**SETTINGS, "mcore_gpt": True}),
        **distributed(stacked(random_tensors(CORE)), tmp_path / "distributed"),
    }


def _same(one: LanguageModel, other: LanguageModel) -> bool:
    ours, theirs = one.weights(), other.weights()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", ["legacy", "mcore"])
@pytest.mark.parametrize("folder", [False, True], ids=["archive", "folder"])
def test_logits_are_those_that_nemo_computed(tmp_path, layout, folder):
    if not _GOLDEN.is_dir():
        pytest.skip(f"no checkpoints of NeMo: {_GOLDEN} is not on this machine")
    source = _GOLDEN / layout / "model.nemo"
    if folder:
        with tarfile.open(source) as tar:
            tar.extractall(tmp_path / "folder", filter="data")
        source = tmp_path / "folder"
    report = import_megatron(source, tmp_path / "ours.nemo", 1024)
    assert report == ImportReport(
        layout=LEGACY if layout == "legacy" else CORE,
        shape=GPTShape(layers=2, hidden=64, heads=4, ffn=256, positions=128, vocabulary=384),
        tokens=373,
        max_length=128,
        activation="gelu_pytorch_tanh",
        types=("float32",),
        bytes=4 * 132_864,
    )
    model = LanguageModel.load(tmp_path / "ours.nemo").eval()
    golden = np.load(_GOLDEN / layout / "logits.npz")
    with torch.no_grad():
        logits = model.lm(torch.from_numpy(golden["input_ids"])).logits
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({"bias_gelu_fusion": True}, False),
        ({"bias_gelu_fusion": False}, True),
        ({"bias_gelu_fusion": None, "bias_activation_fusion": True}, False),
        ({"bias_gelu_fusion": True, "bias_activation_fusion": False}, True),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, False),
        ({"bias_gelu_fusion": False, "onnx_safe": True}, True),
    ],
    ids=str,
)
def test_logits_are_megatrons_in_both_forms_of_gelu(convert, changes, exact):
    tensors = random_tensors(LEGACY)
    model = convert(members({**SETTINGS, **changes}, tensors))
    ids = torch.randint(0, SHAPE.vocabulary, (2, SHAPE.positions), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.lm.double()(ids).logits
    right, wrong = (megatron_logits(tensors, ids, SHAPE, form) for form in (exact, not exact))
    torch.testing.assert_close(logits, right, rtol=0, atol=1e-9)
    assert (logits - wrong).abs().max() > 1e-5


def test_the_fusion_of_gelu_is_on_where_nothing_is_said(convert):
    settings = {name: value for name, value in SETTINGS.items() if name != "bias_gelu_fusion"}
    assert convert(members(settings, random_tensors(LEGACY))).hf["activation_function"] == "gelu_pytorch_tanh"


def test_both_layouts_are_the_same_model(convert, legacy, core):
    assert _same(convert(legacy), convert(core))


def _unfused(name: str) -> str:
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("layout", "rename", "whole"),
    [
        (LEGACY, lambda name: f"model.module.{name.removeprefix('model.')}", False),
        (LEGACY, lambda name: f"module.{name.removeprefix('model.')}", False),
        (LEGACY, lambda name: name.removeprefix("model."), False),
        (CORE, lambda name: name, False),
        (CORE, lambda name: f"model.module.{name.removeprefix('model.')}", False),
        (CORE, _unfused, False),
        (CORE, _unfused, True),
        (CORE, lambda name: f"module.{name.removeprefix('model.')}", True),
    ],
)
def test_every_name_that_nemo_gives_is_understood_and_types_are_kept(convert, tmp_path, layout, rename, whole, dtype):
    tensors = random_tensors(layout, dtype)
    content = {rename(name): tensor for name, tensor in (stacked(tensors) if whole else tensors).items()}
    converted = convert(members(SETTINGS, content))
    reference = convert(members(SETTINGS, random_tensors(LEGACY, dtype)))
    assert _same(converted, reference)
    with open_weights(tmp_path / "ours.nemo") as file:
        assert {info.dtype for info in file.tensors.values()} == {dtype}


def test_what_is_no_weight_is_passed_over(convert, legacy):
    content: dict[str, Any] = {
        **random_tensors(LEGACY),
        "model.language_model.encoder.layers.0.self_attention.query_key_value._extra_state": None,
        "model.language_model.encoder.layers.1.mlp.dense_h_to_4h._extra_state": io.BytesIO(b"fp8"),
        "model.language_model.encoder.layers.2.mlp.dense_h_to_4h._extra_state": torch.zeros(7, dtype=torch.uint8),
        "optimizer.state.exp_avg.model.language_model.embedding.word_embeddings.weight": torch.zeros(3),
        "global_step": 7,
        "pytorch-lightning_version": "2.0.7",
    }
    assert _same(convert(members(SETTINGS, content)), convert(legacy))


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.encoder.layers.0.mlp.dense_h_to_4h_2.weight",
        "model.language_model.encoder.layers.3.input_layernorm.weight",
        "model.language_model.rotary_pos_emb.inv_freq",
        "model.language_model.encoder.layers.0.adapter.linear_in.weight",
        "surprise",
    ],
)
def test_tensors_that_gpt2_has_not_are_named(convert, name):
    content = {**random_tensors(LEGACY), name: torch.zeros(4)}
    with pytest.raises(ModelError, match=rf"megatron\.nemo: has tensors that GPT-2 does not have: {name}$"):
        convert(members(SETTINGS, content))


def test_an_untied_output_layer_is_refused_although_the_settings_say_nothing(convert):
    content = {**random_tensors(LEGACY), "model.language_model.output_layer.weight": torch.zeros(384, 24)}
    with pytest.raises(ModelError, match=r"output_layer\.weight: .*not tied to the token table"):
        convert(members(SETTINGS, content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.language_model.encoder.layers.2.mlp.dense_4h_to_h.bias"),
            "dense_4h_to_h.bias is missing",
        ),
        (
            lambda t: t.pop("model.language_model.embedding.word_embeddings.weight"),
            "has no tensor word_embeddings.weight",
        ),
        (
            lambda t: t.update({"model.language_model.encoder.layers.1.input_layernorm.bias": torch.zeros(23)}),
            r"input_layernorm.bias has shape \(23,\), expected \(24,\) by",
        ),
        (
            lambda t: t.update({"model.language_model.encoder.final_layernorm.bias": torch.zeros(24).double()}),
            "final_layernorm.bias: torch.float64 is not one of",
        ),
        (
            lambda t: t.update({"model.language_model.embedding.word_embeddings.weight": torch.zeros(256, 24)}),
            "word_embeddings.weight has 256 rows, but the tokenizer has 261 tokens",
        ),
        (
            lambda t: t.update({"model.language_model.embedding.position_embeddings.weight": torch.zeros(33, 24)}),
            "position_embeddings.weight has 33 rows, but model_config.yaml says 32",
        ),
        (
            lambda t: t.update({"model.module.language_model.encoder.final_layernorm.bias": torch.zeros(24)}),
            "are the same weight",
        ),
    ],
)
def test_weights_that_do_not_fit_the_settings_are_named(convert, change, message):
    tensors = random_tensors(LEGACY)
    change(tensors)
    with pytest.raises(ModelError, match=rf"megatron\.nemo: .*{message}"):
        convert(members(SETTINGS, tensors))


def test_padded_rows_stay_and_are_no_tokens(convert):
    tensors = random_tensors(LEGACY)
    model = convert(members(SETTINGS, tensors))
    assert model.hf["vocab_size"] == 384
    assert len(model.tokenizer) == len(VOCABULARY) == 261
    assert torch.equal(
        model.lm.transformer.wte.weight, tensors["model.language_model.embedding.word_embeddings.weight"]
    )
    assert model.lm.lm_head.weight is model.lm.transformer.wte.weight


def test_the_records_are_no_longer_than_the_positions(convert, legacy, tmp_path):
    assert convert(legacy).max_length == SHAPE.positions
    report = import_megatron(tmp_path / "megatron.nemo", tmp_path / "short.nemo", 16)
    assert report.max_length == LanguageModel.load(tmp_path / "short.nemo").max_length == 16


def test_the_same_archive_gives_the_same_bytes_and_another_gives_others(legacy, tmp_path):
    source = write_tar(tmp_path / "megatron.nemo", legacy)
    for name in ("one", "two"):
        import_megatron(source, tmp_path / f"{name}.nemo", 16)
    assert (tmp_path / "one.nemo").read_bytes() == (tmp_path / "two.nemo").read_bytes()
    other = members({**SETTINGS, "bias_gelu_fusion": False}, random_tensors(LEGACY))
    import_megatron(write_tar(source, other), tmp_path / "other.nemo", 16)
    assert content_digest(tmp_path / "other.nemo") != content_digest(tmp_path / "one.nemo")


def test_compressed_archives_and_folders_are_the_same_model(convert, legacy, core, tmp_path):
    expected = convert(legacy)
    for files in (legacy, core):
        assert _same(convert(files, mode="w:gz"), expected)
        folder = write_folder(tmp_path / f"folder{len(files)}", files)
        import_megatron(folder, tmp_path / "folder.nemo", 16)
        assert _same(LanguageModel.load(tmp_path / "folder.nemo"), expected)
    left = {path.name for path in tmp_path.iterdir()} - {"distributed", "megatron.nemo", "ours.nemo", "folder.nemo"}
    assert all(name.startswith("folder") for name in left)


def test_an_archive_without_weights_is_refused(convert):
    with pytest.raises(ModelError, match=r"has neither model_weights\.ckpt nor model_weights/\.metadata"):
        convert(members(SETTINGS))
    with pytest.raises(ModelError, match=r"megatron\.nemo: has no model_config\.yaml"):
        convert({"weights/.metadata": b"", "context/model.yaml": b""})


def test_settings_and_tokenizers_that_do_not_fit_are_refused_with_the_archives_name(convert):
    tensors = random_tensors(LEGACY)
    with pytest.raises(
        ModelError, match=r"megatron\.nemo: model_config\.yaml: activation: 'swiglu' is not supported by GPT-2"
    ):
        convert(members({**SETTINGS, "activation": "swiglu"}, tensors))
    with pytest.raises(ModelError, match=r"megatron\.nemo: model_config\.yaml: tokenizer\.library: 'sentencepiece'"):
        convert(members({**SETTINGS, "tokenizer": {"library": "sentencepiece"}}, tensors))


def test_zarr_is_refused_with_what_to_do(convert):
    weight = "model_weights/model.embedding.word_embeddings.weight/.zarray"
    with pytest.raises(ModelError, match=r"megatron\.nemo: \S*word_embeddings\.weight/\.zarray: .*torch_dist"):
        convert({**members(SETTINGS), weight: b"{}"})


@pytest.mark.parametrize("folder", ["mp_rank_00", "mp_rank_01", "tp_rank_00_pp_rank_000"])
def test_models_cut_into_parts_are_refused_by_the_name_of_the_part(convert, folder):
    files = members(SETTINGS)
    with pytest.raises(ModelError, match=rf"megatron\.nemo: {folder[:10]}.*partitioned"):
        convert({**files, f"{folder}/model_weights.ckpt": saved(random_tensors(LEGACY))})


def test_another_shape_than_expected_is_refused_by_name(legacy, tmp_path):
    source = write_tar(tmp_path / "megatron.nemo", legacy)
    with pytest.raises(ModelError, match=r"model_config\.yaml: num_layers: 3 is not the 24 of the preset"):
        import_megatron(source, tmp_path / "x.nemo", 16, expect={"hidden_size": 24, "num_layers": 24})
    assert not (tmp_path / "x.nemo").exists()


def test_what_was_there_stays_when_an_import_fails(legacy, tmp_path):
    into = tmp_path / "x.nemo"
    into.write_bytes(b"old")
    legacy["model_weights.ckpt"] = legacy["model_weights.ckpt"][:-5000]
    source = write_tar(tmp_path / "megatron.nemo", legacy)
    with pytest.raises(ModelError, match=r"model_weights\.ckpt: is truncated"):
        import_megatron(source, into, 16)
    assert into.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"x.nemo", "megatron.nemo"}


def test_an_archive_of_this_project_is_named_as_one(base, tmp_path):
    with pytest.raises(ModelError, match=r"\.nemo: is an archive of this project, not of Megatron"):
        import_megatron(base[0], tmp_path / "x.nemo", 16)
    assert list(tmp_path.iterdir()) == []


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_the_weights_or_the_metadata_does_not_run(legacy, core, tmp_path):
    attack = pickle.dumps({"model.x": _Touch(tmp_path / "ran")})
    for name, files in (("model_weights.ckpt", legacy), ("model_weights/.metadata", core)):
        with pytest.raises(ModelError, match=rf"megatron\.nemo: {name}: "):
            import_megatron(write_tar(tmp_path / "megatron.nemo", {**files, name: attack}), tmp_path / "x.nemo", 16)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_the_settings_name_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = dict.fromkeys(("target", "_target_", "cls", "name"), "evil_module.Evil")
    files = members({**SETTINGS, **named}, random_tensors(LEGACY))
    import_megatron(write_tar(tmp_path / "megatron.nemo", files), tmp_path / "x.nemo", 16)
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "imported").exists()
    assert "evil" not in str(read_config(tmp_path / "x.nemo"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"x: !!python/object/apply:os.system ['touch ran']\n", "is not YAML"),
        (b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "has YAML aliases"),
        (b"x: " + b"[" * 100_000, "is nested more than 50 levels deep"),
        (b"#" * (2 << 20), "bytes, more than"),
        (b"- a\n- list\n", "expected fields"),
        (b"\xff\xfe\xfd", "is not text"),
    ],
    ids=["tag", "aliases", "depth", "size", "list", "bytes"],
)
def test_hostile_settings_are_refused(convert, legacy, text, message):
    with pytest.raises(ModelError, match=rf"megatron\.nemo: model_config\.yaml:? .*{message}"):
        convert({**legacy, "model_config.yaml": text})


def test_an_import_loads_neither_nemo_nor_torchs_distributed_checkpoints(core, tmp_path):
    source = write_tar(tmp_path / "megatron.nemo", core)
    code = (
        "import sys; from pathlib import Path; from fedsft_assets.model.megatron.import_ import import_megatron; "
        f"import_megatron(Path({str(source)!r}), Path({str(tmp_path / 'x.nemo')!r}), 16); "
        "print([name for name in sys.modules if name.split('.')[0] in ('nemo', 'megatron', 'lightning', 'dagster')"
        " or name == 'torch.distributed.checkpoint.metadata'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(convert, tmp_path, value):
    tensors = random_tensors(LEGACY, torch.float16)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.dense_h_to_4h.weight"))
    tensors[name][0, 0] = value
    with pytest.raises(ModelError, match=rf"megatron\.nemo: \S*{name}: 1 of [\d,]+ weights are NaN or infinite"):
        convert(members(SETTINGS, tensors))
    assert not (tmp_path / "ours.nemo").exists()
