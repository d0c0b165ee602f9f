"""`fedsft export` and `fedsft import`: models go out and come in, and what is wrong is said in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fedsft_assets import cli
from fedsft_assets.model.base import create_base_model
from fedsft_assets.specs import PRESETS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The home of a study with one checkpoint, of the job `fedavg`."""
    home = tmp_path_factory.mktemp("home")
    path = home / "checkpoints/fedavg/model.nemo"
    create_base_model(PRESETS["tiny"], path, 7, ["question and answer"])
    return path


@pytest.fixture
def fedsft(tmp_path, checkpoint, monkeypatch, capsys) -> Callable[..., str]:
    """Run the command in an empty folder; what it prints, or the message that it ends with."""
    monkeypatch.setenv("FEDSFT_HOME", str(checkpoint.parents[2]))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, fails: bool = False) -> str:
        monkeypatch.setattr("sys.argv", ["fedsft", *arguments])
        if not fails:
            cli.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as end:
            cli.main()
        return str(end.value.code)

    return run


@pytest.mark.parametrize(("name", "layout"), [("megatron", "legacy"), ("megatron-core", "megatron-core")])
def test_a_checkpoint_goes_to_megatron_and_comes_back(fedsft, name, layout):
    said = fedsft("export", "--checkpoint", "fedavg", "--format", name, "--into", "megatron.nemo")
    assert said.startswith(f"megatron.nemo: {layout} layout, ")
    assert said.endswith("parameters in float32; 271 tokens in 384 rows\n")
    back = fedsft("import", "megatron.nemo", "--into", "back.nemo", "--max-length", "100")
    assert back.splitlines()[-1].startswith("back.nemo: ")
    assert back.endswith("records of up to 100 tokens\n")
    fedsft("export", "--checkpoint", "back.nemo", "--format", name, "--into", "again.nemo")
    assert Path("again.nemo").read_bytes() == Path("megatron.nemo").read_bytes()


def test_a_checkpoint_goes_to_hugging_face(fedsft, checkpoint):
    said = fedsft("export", "--checkpoint", str(checkpoint), "--format", "huggingface", "--into", "folder")
    assert said.startswith("folder: GPT2LMHeadModel, ")
    assert said.endswith("in model.safetensors\n")
    assert AutoModelForCausalLM.from_pretrained("folder", local_files_only=True).config.n_layer == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "export --format megatron --checkpoint fedvag --into new.nemo",
            "--checkpoint: 'fedvag' is no file and no check",
        ),
        (
            "export --format megatron --checkpoint text.nemo --into new.nemo",
            "text.nemo: is not an uncompressed tar arc",
        ),
        ("import none.nemo --into new.nemo", "none.nemo: no such file or folder"),
        ("import text.nemo --into new.nemo", "text.nemo: is no tar archive"),
        ("import text.nemo --into ./text.nemo", "--into: text.nemo is the archive itself; name another file"),
        ("import text.nemo --into new.nemo --max-length 1", "--max-length: 1 tokens are too few"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fedsft, arguments, words):
    Path("text.nemo").write_text("no archive")
    said = fedsft(*arguments.split(), fails=True)
    assert said.startswith(words)
    assert "\n" not in said
    assert [path.name for path in Path().iterdir()] == ["text.nemo"]


def test_an_archive_of_ours_is_not_imported(fedsft, checkpoint):
    said = fedsft("import", str(checkpoint), "--into", "new.nemo", fails=True)
    assert said == f"{checkpoint}: is no archive of Megatron's but one of this project's; use it as it is"


def test_an_archive_is_never_written_over_itself(fedsft, checkpoint):
    before = checkpoint.read_bytes()
    said = fedsft("export", "--checkpoint", "fedavg", "--format", "megatron", "--into", str(checkpoint), fails=True)
    assert said == f"{checkpoint}: is the archive itself; name another file"
    assert checkpoint.read_bytes() == before
