"""`fedsft export` and `fedsft import`: models go out and come in, and what is wrong is said in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fedsft_assets.cli import main as cli
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The home of a study with one checkpoint, of the job `fedavg`."""
    home = tmp_path_factory.mktemp("home")
    versions = home / "checkpoints/fedavg"
    with made_current(versions) as folder:
        create_base_model(PRESETS["tiny"], folder / "model.nemo", 7, ["question and answer"])
    return current(versions) / "model.nemo"


@pytest.fixture
def fedsft(tmp_path, checkpoint, monkeypatch, capsys) -> Callable[..., str]:
    """Run the command in an empty folder; what it prints, or the message that it ends with."""
    home = checkpoint.parents[3]
    for name in (*home_environment(home), "FEDSFT_DATA", "FEDSFT_MODEL"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
    monkeypatch.setenv("FEDSFT_HOME", str(home))
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
    progress, result = back.splitlines()
    assert progress.startswith(f"megatron.nemo: {layout} layout, ")
    assert result.startswith("back.nemo: ")
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
            "--checkpoint: 'fedvag' is neither a file nor",
        ),
        (
            "export --format megatron --checkpoint text.nemo --into new.nemo",
            "text.nemo: is not an uncompressed tar arc",
        ),
        ("import none.nemo --into new.nemo", "none.nemo: no such file or folder"),
        ("import text.nemo --into new.nemo", "text.nemo: is not an uncompressed tar archive"),
        ("import text.nemo --into ./text.nemo", "--into: text.nemo is the archive itself; choose another file"),
        ("import text.nemo --into new.nemo --max-length 1", "--max-length: 1 is too short"),
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
    assert said == f"{checkpoint}: is an archive of this project, not of Megatron; use it without importing"


def test_an_archive_is_never_written_over_itself(fedsft, checkpoint):
    before = checkpoint.read_bytes()
    said = fedsft("export", "--checkpoint", "fedavg", "--format", "megatron", "--into", str(checkpoint), fails=True)
    assert said == f"{checkpoint}: is the archive itself; choose another file"
    assert checkpoint.read_bytes() == before


def test_any_command_closes_a_home_of_an_earlier_version_and_says_so(fedsft, checkpoint, monkeypatch, capsys):
    home = checkpoint.parents[3]
    home.chmod(0o755)
    checkpoint.chmod(0o644)
    assert fedsft("track") == "no pending MLflow records\n"
    assert (home.stat().st_mode & 0o777, checkpoint.stat().st_mode & 0o777) == (0o700, 0o600)
    home.chmod(0o755)
    monkeypatch.setattr("sys.argv", ["fedsft", "track"])
    cli.main()
    assert capsys.readouterr().err == (
        f"warning: {home}: 1 files and folders were open to other accounts of this computer; access removed\n"
    )


def test_no_secret_is_in_the_last_words_of_a_command(fedsft, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "planted-3141")
    said = fedsft("export", "--checkpoint", "planted-3141", "--format", "megatron", "--into", "new.nemo", fails=True)
    assert said.startswith("--checkpoint: '***' is neither a file")
    monkeypatch.setattr(cli.Outbox, "entries", lambda _: [].index("https://me:planted@host"))
    monkeypatch.setattr("sys.argv", ["fedsft", "track"])
    with pytest.raises(ValueError, match=r"^'https://\*\*\*@host' is not in list$"):
        cli.main()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FEDSFT_RUNTIME", "cloud", "FEDSFT_RUNTIME: 'cloud': Input should be 'simulator', 'poc' or 'production'"),
        ("FEDSFT_POC__THREADS", "-1", "FEDSFT_POC__THREADS: '-1': Input should be greater than or equal to 0"),
        ("FEDSFT_HOME", "/x?y", "FEDSFT_HOME: /x?y contains '?', which SQLite URLs cannot represent"),
    ],
)
@pytest.mark.parametrize("command", ["study", "ui", "poc status", "track", "tensorboard"])
def test_wrong_setting_is_said_in_one_line(fedsft, monkeypatch, command, variable, value, words):
    monkeypatch.setenv(variable, value)
    said = fedsft(*command.split(), fails=True)
    assert said.startswith(words)
    assert "\n" not in said
