"""Archives that strangers made: each attack is refused by name, and none has an effect."""

import io
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedsft_assets.model.archive import CONFIG, WEIGHTS, ModelError, describe, read_config
from fedsft_assets.model.sft_model import SFTModel

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
    assert SFTModel.load(forge()).max_length == 256


def test_class_named_by_the_archive_is_never_imported(forge, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"target": "evil_module.Evil", "_target_": "evil_module.Evil", "cls": "evil_module.Evil", "params": {}}
    assert type(SFTModel.load(forge(config=lambda content: content.update(named)))) is SFTModel
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
    with pytest.raises(ModelError, match=r"forged\.nemo"):
        SFTModel.load(path)
    assert not (tmp_path / "ran").exists()


def _entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        _entry("../outside"),
        _entry("/tmp/outside"),
        _entry("folder/inside"),
        _entry("link", tarfile.SYMTYPE, "/etc/passwd"),
        _entry("link", tarfile.LNKTYPE, CONFIG),
        _entry("device", tarfile.CHRTYPE),
    ],
    ids=lambda entry: f"{entry.name}-{entry.type.decode()}",
)
def test_members_other_than_plain_files_at_the_top_are_refused(forge, entry):
    with pytest.raises(ModelError, match="is not a plain file at the top"):
        read_config(forge(entries=[entry]))


def test_too_many_members_and_doubled_members_are_refused(forge):
    with pytest.raises(ModelError, match="more than 64 members"):
        read_config(forge(entries=[_entry(f"file{index}") for index in range(100)]))
    with pytest.raises(ModelError, match="is there twice"):
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
    with pytest.raises(ModelError, match="bytes, more than"):
        read_config(forge(prefix(b"#" * (2 << 20) + b"\n")))


def test_options_that_could_download_code_are_not_part_of_a_configuration():
    hf = {"model_type": "gpt2", "auto_map": {"AutoModel": "x--y.Z"}, "text_config": {"attn_implementation": "x/y"}}
    assert describe({**hf, "_attn_implementation": "x/y"}) == {"model_type": "gpt2", "text_config": {}}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.95])
def test_truncated_archives_are_refused_with_their_name(base, tmp_path, share):
    content = base[0].read_bytes()
    path = tmp_path / "cut.nemo"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"cut\.nemo.*truncated"):
        SFTModel.load(path)


def test_missing_compressed_and_foreign_archives_are_refused_with_their_name(base, forge, tmp_path):
    with pytest.raises(ModelError, match=r"none\.nemo: no such file"):
        SFTModel.load(tmp_path / "none.nemo")
    zipped = tmp_path / "zipped.nemo"
    with tarfile.open(zipped, "w:gz") as tar:
        tar.add(base[0], "x")
    with pytest.raises(ModelError, match=r"zipped\.nemo: is not an uncompressed tar"):
        SFTModel.load(zipped)

    def foreign(content: dict) -> None:
        content.pop("hf")
        content["target"] = "nemo.collections.asr.models.EncDecCTCModel"

    with pytest.raises(ModelError, match=r"has no hf .*EncDecCTCModel"):
        SFTModel.load(forge(config=foreign))


def test_weights_of_another_shape_are_refused(forge):
    with pytest.raises(
        ModelError, match=r"forged\.nemo.*size mismatch for lm\.transformer\.wte\.weight.* and \d+ more"
    ):
        SFTModel.load(forge(config=lambda content: content["hf"].update(n_embd=96)))


def test_a_failed_restore_does_not_disturb_the_next_one(base, forge):
    with pytest.raises(ModelError, match="model_type"):
        SFTModel.load(forge(config=lambda content: content.update(hf={"layers": 1})))
    with pytest.raises(ModelError, match="cannot be restored"):
        SFTModel.load(forge(config=lambda content: content["hf"].update(model_type="no-such-model")))
    assert SFTModel.load(base[0])._is_model_being_restored() is False
