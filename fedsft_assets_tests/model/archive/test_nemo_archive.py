"""Archives that strangers made: each attack is refused by name, and none has an effect."""

import hashlib
import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fedsft_assets.model.archive.archive_config import normalize_hf_config
from fedsft_assets.model.archive.nemo_archive import (
    CONFIG,
    WEIGHTS,
    content_digest,
    open_weights,
    read_config,
    read_tokenizer_files,
    write_archive,
)
from fedsft_assets.model.archive.torch_reader import TensorInfo
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.nemo_model import SFTModel
from fedsft_assets.specs.model_preset import model_preset

Members = dict[str, bytes]


def _keep(_: dict) -> None:
    pass


@pytest.fixture
def forge(base, tmp_path) -> Callable[..., Path]:
    """Write the base archive again after a change of its members, its configuration or its tar entries."""

    def make(change=_keep, config=_keep, entries=()) -> Path:
        with tarfile.open(base[0]) as tar:
            members = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}
        content = yaml.safe_load(members[CONFIG])
        config(content)
        members[CONFIG] = yaml.safe_dump(content).encode()
        change(members)
        path = tmp_path / "forged.nemo"
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            for entry in entries:
                tar.addfile(entry, io.BytesIO(b"\0" * entry.size))
        return path

    return make


def test_the_forge_itself_makes_a_good_archive(forge):
    assert LanguageModel.load(forge()).max_length == 256
    assert SFTModel.load(forge()).cfg.max_length == 256


def test_class_named_by_the_archive_is_never_imported(forge, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"target": "evil_module.Evil", "_target_": "evil_module.Evil", "cls": "evil_module.Evil", "params": {}}
    path = forge(config=lambda content: content.update(named))
    assert type(SFTModel.load(path)) is SFTModel
    assert LanguageModel.load(path).max_length == 256
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "imported").exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("force", ["0", "1"])
def test_pickled_code_in_the_weights_does_not_run(forge, tmp_path, monkeypatch, force):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    attack = pickle.dumps({"lm.x": _Touch(tmp_path / "ran")})
    path = forge(lambda members: members.update({WEIGHTS: attack}))
    for model in (SFTModel, LanguageModel):
        with pytest.raises(ModelError, match=r"forged\.nemo"):
            model.load(path)
    assert not (tmp_path / "ran").exists()


def _entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (_entry("../outside"), "is outside of the archive"),
        (_entry("/tmp/outside"), "is outside of the archive"),
        (_entry("back\\slash"), "is outside of the archive"),
        (_entry("folder/inside"), "is 2 levels deep, more than 1"),
        (_entry("folder", tarfile.DIRTYPE), "is 2 levels deep, more than 1"),
        (_entry("link", tarfile.SYMTYPE, "/etc/passwd"), "is neither a plain file nor a folder"),
        (_entry("link", tarfile.LNKTYPE, CONFIG), "is neither a plain file nor a folder"),
        (_entry("device", tarfile.CHRTYPE), "is neither a plain file nor a folder"),
    ],
    ids=lambda value: f"{value.name}-{value.type.decode()}" if isinstance(value, tarfile.TarInfo) else "",
)
def test_members_other_than_plain_files_at_the_top_are_refused(forge, entry, message):
    with pytest.raises(ModelError, match=rf"forged\.nemo: member .*{message}"):
        read_config(forge(entries=[entry]))


def test_too_many_members_and_doubled_members_are_refused(forge):
    with pytest.raises(ModelError, match="more than 64 members"):
        read_config(forge(entries=[_entry(f"file{index}") for index in range(100)]))
    with pytest.raises(ModelError, match="occurs twice"):
        read_config(forge(entries=[_entry(CONFIG)]))


@pytest.mark.parametrize("value", ["/etc/passwd", "nemo:../../etc/passwd", "nemo:missing.json", None])
def test_tokenizer_files_must_be_members_of_the_archive(forge, value):
    path = forge(config=lambda content: content["tokenizer"]["files"].update(tokenizer_json=value))
    with pytest.raises(ModelError, match=r"tokenizer\.files\.tokenizer_json: .* is not a file of the archive"):
        read_config(path)


def test_interpolations_that_would_read_the_environment_are_refused(forge):
    with pytest.raises(ModelError, match="interpolation"):
        read_config(forge(config=lambda content: content["hf"].update(name="${oc.env:HOME}")))


def test_yaml_aliases_and_huge_configurations_are_refused(forge):
    def prefix(text: bytes) -> Callable[[Members], None]:
        return lambda members: members.update({CONFIG: text + members[CONFIG]})

    with pytest.raises(ModelError, match="aliases"):
        read_config(forge(prefix(b"a: &a [x]\nb: [*a, *a]\n")))
    with pytest.raises(ModelError, match="nested more than 50 levels deep"):
        read_config(forge(prefix(b"x: " + b"[" * 100_000)))
    with pytest.raises(ModelError, match="bytes, more than"):
        read_config(forge(prefix(b"#" * (2 << 20) + b"\n")))


def test_options_that_could_download_code_are_not_part_of_a_configuration():
    hf = {"model_type": "gpt2", "auto_map": {"AutoModel": "x--y.Z"}, "text_config": {"attn_implementation": "x/y"}}
    assert normalize_hf_config({**hf, "_attn_implementation": "x/y"}) == {"model_type": "gpt2", "text_config": {}}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.95])
def test_truncated_archives_are_refused_with_their_name(base, tmp_path, share):
    content = base[0].read_bytes()
    path = tmp_path / "cut.nemo"
    path.write_bytes(content[: int(share * len(content))])
    for model in (SFTModel, LanguageModel):
        with pytest.raises(ModelError, match=r"cut\.nemo.*truncated"):
            model.load(path)


def test_missing_compressed_and_foreign_archives_are_refused_with_their_name(base, forge, tmp_path):
    with pytest.raises(ModelError, match=r"none\.nemo: no such file"):
        SFTModel.load(tmp_path / "none.nemo")
    zipped = tmp_path / "zipped.nemo"
    with tarfile.open(zipped, "w:gz") as tar:
        tar.add(base[0], "x")
    with pytest.raises(ModelError, match=r"zipped\.nemo: is a gzip file; expected an uncompressed tar"):
        SFTModel.load(zipped)

    def foreign(content: dict) -> None:
        content.pop("hf")
        content["target"] = "nemo.collections.asr.models.EncDecCTCModel"

    with pytest.raises(ModelError, match=r"has no hf .*EncDecCTCModel"):
        SFTModel.load(forge(config=foreign))


def test_weights_of_another_shape_are_refused(forge):
    path = forge(config=lambda content: content["hf"].update(n_embd=96))
    with pytest.raises(ModelError, match=r"forged\.nemo.*size mismatch for lm\.transformer\.wte\.weight"):
        SFTModel.load(path)
    with pytest.raises(ModelError, match=r"forged\.nemo.*lm\.transformer\.wte\.weight has shape .* and \d+ more"):
        LanguageModel.load(path)


def test_a_failed_restore_does_not_disturb_the_next_one(base, forge):
    with pytest.raises(ModelError, match="model_type"):
        SFTModel.load(forge(config=lambda content: content.update(hf={"layers": 1})))
    with pytest.raises(ModelError, match="cannot be restored"):
        SFTModel.load(forge(config=lambda content: content["hf"].update(model_type="no-such-model")))
    assert SFTModel.load(base[0])._is_model_being_restored() is False


@pytest.fixture
def rewrite(base, tmp_path) -> Callable[..., Path]:
    """Write the base archive again through `write_archive`, with weights of that type."""

    def make(name: str = "again.nemo", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        config = {**read_config(base[0]), **changes}
        files = read_tokenizer_files(base[0], config)
        with open_weights(base[0]) as weights:
            infos = {name: TensorInfo(dtype, info.shape) for name, info in weights.tensors.items()}
            write_archive(
                tmp_path / name, config, files, infos, lambda name: weights.read(name).to(dtype), weights.shared
            )
        return tmp_path / name

    return make


def test_an_archive_written_here_is_the_same_model_to_nemo(base, rewrite):
    written, original = SFTModel.load(rewrite()), LanguageModel.load(base[0])
    assert list(written.state_dict()) == list(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor)
    assert written.language_model.tokenizer_files == original.tokenizer_files
    assert written.lm.lm_head.weight is written.lm.transformer.wte.weight


def test_nemos_own_restore_takes_an_archive_written_here(rewrite):
    config = SFTModel.restore_from(str(rewrite()), return_config=True)
    assert config.target == "fedsft_assets.model.nemo_model.SFTModel"
    assert config.nemo_version


def test_equal_models_are_equal_bytes_and_another_is_not(rewrite):
    first, second = rewrite("first.nemo").read_bytes(), rewrite("second.nemo").read_bytes()
    assert first == second
    assert rewrite("third.nemo", max_length=99).read_bytes() != first


def _digest(model: LanguageModel) -> str:
    """What a content digest is, over a model in memory."""
    own = {"hf": model.hf, "max_length": model.max_length, "prompt_template": model.prompt_template}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for name, content in sorted(model.tokenizer_files.items()):
        digest.update(f"\0{name}\0{hashlib.sha256(content).hexdigest()}".encode())
    for name, tensor in sorted(model.weights().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_the_digest_is_the_models_whoever_wrote_it_and_in_whatever_type(base, rewrite, tmp_path):
    model = LanguageModel.load(base[0])
    SFTModel.load(base[0]).save(tmp_path / "nemo.nemo")
    assert content_digest(base[0]) == _digest(model)
    assert content_digest(rewrite()) == content_digest(tmp_path / "nemo.nemo") == content_digest(base[0])
    half = rewrite("half.nemo", torch.float16)
    assert content_digest(half) == _digest(LanguageModel.load(half)) != content_digest(base[0])
    with open_weights(half) as weights:
        assert {info.dtype for info in weights.tensors.values()} == {torch.float16}
        assert weights.shared == {"lm.lm_head.weight": "lm.transformer.wte.weight"}


def test_weights_are_read_from_the_archive_in_place_and_alone(base):
    expected = LanguageModel.load(base[0]).state_dict()
    with open_weights(base[0]) as weights:
        assert list(weights.tensors) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(weights.read(name), tensor)


def test_a_write_that_fails_leaves_what_was_there(rewrite, tmp_path):
    path = rewrite()
    before = path.read_bytes()
    config, info = read_config(path), TensorInfo(torch.float32, (2,))
    with pytest.raises(ModelError, match="a: expected"):
        write_archive(path, config, {"tokenizer.json": b"{}"}, {"a": info}, lambda _: torch.ones(3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({}, {"../escape": b""}, "tokenizer file '../escape'"),
        ({}, {}, r"tokenizer\.files: expected the files"),
        ({"max_length": 1}, {"tokenizer.json": b""}, "max_length"),
        ({"prompt_template": "${oc.env:HOME}"}, {"tokenizer.json": b""}, "interpolation"),
    ],
)
def test_an_archive_that_could_not_be_read_is_not_written(tmp_path, config, files, message):
    good = {"hf": {"model_type": "gpt2"}, "max_length": 8, "prompt_template": "answer"}
    with pytest.raises(ModelError, match=message):
        write_archive(tmp_path / "x.nemo", {**good, **config}, files, {}, lambda _: torch.ones(1))
    assert not list(tmp_path.iterdir())


def test_values_that_no_configuration_has_are_refused(forge):
    def dated(members: Members) -> None:
        members[CONFIG] = members[CONFIG].replace(b"prompt_template: answer", b"prompt_template: 2020-01-01")

    with pytest.raises(ModelError, match=r"a value that is not allowed in a model's configuration: .*date"):
        read_config(forge(dated))


def test_a_header_that_asks_for_gigabytes_is_refused(tmp_path):
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 4 << 30
    path = tmp_path / "header.nemo"
    with path.open("wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(5 << 30)  # takes no space
    with pytest.raises(ModelError, match=r"header\.nemo: .*bytes at once are more than"):
        read_config(path)


@pytest.fixture
def with_weight(base, tmp_path) -> Callable[[str, torch.Tensor], Path]:
    """Write the base archive again with another tensor under a name."""

    def make(name: str, tensor: torch.Tensor) -> Path:
        config = read_config(base[0])
        with open_weights(base[0]) as weights:
            values = {**{name: weights.read(name) for name in weights.tensors}, name: tensor}
        infos = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in values.items()}
        path = tmp_path / "other.nemo"
        write_archive(path, config, read_tokenizer_files(base[0], config), infos, values.__getitem__)
        return path

    return make


def test_a_head_of_its_own_in_a_model_that_ties_it_is_refused(base, with_weight):
    head = LanguageModel.load(base[0]).lm.lm_head.weight.detach().clone()
    assert LanguageModel.load(with_weight("lm.lm_head.weight", head)).max_length == 256
    head[3] += 1
    with pytest.raises(ModelError, match=r"other\.nemo: .*lm_head\.weight differs from lm\.transformer\.wte"):
        LanguageModel.load(with_weight("lm.lm_head.weight", head))


def test_integers_for_weights_are_refused(with_weight):
    path = with_weight("lm.transformer.ln_f.weight", torch.ones(192, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"other\.nemo: .*lm\.transformer\.ln_f\.weight: has values of int8, expected"):
        LanguageModel.load(path)


def test_an_archive_with_nan_in_its_weights_does_not_become_a_base_model(with_weight, tmp_path):
    path = with_weight("lm.transformer.ln_f.weight", torch.full((192,), float("nan")))
    with pytest.raises(ModelError, match=r"other\.nemo: .*lm\.transformer\.ln_f\.weight: 192 of 192 weights are NaN"):
        create_base_model(model_preset(str(path)), tmp_path / "x.nemo", 1)
    assert not (tmp_path / "x.nemo").exists()
