"""Every command of README and docs, taken from the pages, in a clone with an account's home of its own.

The clone has one small job over the embedded sample; else it is as a user has it. Commands that would download, need
what this machine has not, or take many minutes are named here with the reason; what they would start is looked at.
Those of docs/production.md are run by `test_production_document`, files and settings by `test_document_files`.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsft_assets.data.sources.sample import write_sample
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.model.megatron.export import export_megatron
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets_tests.clones import Clone, Page, Rehearsal, Started
from fedsft_assets_tests.documents import DOCUMENTS, Block, Command, blocks
from fedsft_assets_tests.shipped import DATASETS

pytestmark = pytest.mark.slow

# What pages have in place of what a reader has, and a test makes.
PUBLISHED, MODELS, ARCHIVE = "/data/published", "/models/", "nemo_gpt1.3B_fp16.nemo"
DEMO = "make demo"
A_TEST = "fedsft_assets_tests/test_versions.py"  # of all tests that `make test` runs
TOGETHER = {"login.md": "security.md"}  # its script asks the pages that this one opens
TESTED_ELSEWHERE = ("production.md",)
SAID = "What is the capital of Norway?\n"  # to what asks

_HUB, _MINUTES = "downloads from the hub", "takes many minutes"
NOT_RUN = {
    "FEDSFT_HOME=$PWD/.fedsft-hub make study DATA=hub": _HUB,
    "make study MODEL=gpt-1.3b DATA=hub": _HUB,
    "FEDSFT_MODEL_PATH=/models/nemo_gpt1.3B_fp16.nemo make study MODEL=gpt-1.3b DATA=hub": _HUB,
    "FEDSFT_HOME=$PWD/.fedsft-smollm2 make study MODEL=smollm2-135m": _MINUTES,
    "make study DATA=../shared/data/real_samples MODEL=smollm2-135m "
    'OVERRIDES="--rounds 2 --max-local-steps 8 --max-evaluation-records 16" FEDSFT_HOME=$PWD/.fedsft-smollm2': _MINUTES,
    "make study": "needs a federation, as docs/production.md sets one up",
    ".venv/bin/fedsft tasks --checkpoint fedavg --tasks hellaswag,piqa,winogrande --into scores": _HUB,
    "make rivals": "downloads what other systems need",
    ".venv/bin/python -m benchmarks.data": _MINUTES,
    ".venv/bin/python -m benchmarks.training": _MINUTES,
    ".venv/bin/python -m benchmarks.megatron_import": _MINUTES,
    ".venv/bin/python -m benchmarks.overhead": _MINUTES,
    ".venv/bin/python -m benchmarks.transfer": _MINUTES,
    ".venv/bin/python -m benchmarks.noise": _MINUTES,
}
_STUDY = r"^\| fedavg +\| federated +\| +1 \|"
# What is to be seen in what each command prints, if it prints anything. Those that serve pages are asked for them.
PRINTS = {
    DEMO: _STUDY,
    "make test": r"\d+ passed",
    "FEDSFT_HOME=$PWD/.fedsft-mine make study DATA=/data/published MODEL=/models/my-hugging-face-model": _STUDY,
    "FEDSFT_HOME=$PWD/.fedsft-seeds make study SEEDS=3": rf"^seed 1236$(?s:.*){_STUDY}",
    "FEDSFT_HOME=$PWD/.fedsft-published make study DATA=/data/published": _STUDY,
    "FEDSFT_HOME=$PWD/.fedsft-my-causal-lm make study MODEL=/models/my-causal-lm": _STUDY,
    '.venv/bin/fedsft-generate --checkpoint fedavg --prompt "What is the capital of Norway?"': r"\S",
    ".venv/bin/fedsft-generate --checkpoint fedavg --interactive": r"\S",
    ".venv/bin/fedsft tasks --checkpoint base_model --tasks piqa --data ~/benchmarks --limit 50": r"piqa",
    ".venv/bin/fedsft import nemo_gpt1.3B_fp16.nemo --into gpt.nemo": r"^gpt\.nemo: .* parameters in .*; records",
    "(umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > ~/fedsft-token)": "",
    ".venv/bin/fedsft export --checkpoint fedavg --format megatron --into fedavg-megatron.nemo": "legacy layout",
    ".venv/bin/fedsft export --checkpoint fedavg --format megatron-core --into fedavg-core.nemo": "-core layout",
    ".venv/bin/fedsft export --checkpoint fedavg --format huggingface --into fedavg-hf": "in model.safetensors",
    ".venv/bin/dagster schedule start weekly_study --workspace workspace.yaml": r"weekly_study",
    ".venv/bin/dagster sensor start new_data --workspace workspace.yaml": "new_data",
    ".venv/bin/dagster asset list --module-name fedsft_assets.definitions --select 'key:\"raw/dolly\"+'": (
        r"^checkpoint/fedavg\n(?s:.*)^processed/dolly\nraw/dolly$"
    ),
    ".venv/bin/python -c 'import torch; print(torch.cuda.device_count(), \"GPUs\")'": r"^\d+ GPUs$",
    ".venv/bin/dagster instance concurrency set gpu 2": "gpu",
    ".venv/bin/fedsft prune --dry-run": "unneeded versions and workspaces$",
    "FEDSFT_RUNTIME=poc make study": rf"submitted FLARE job .* \(poc\)$(?s:.*){_STUDY}",
    ".venv/bin/fedsft poc status": "site-3",
    ".venv/bin/fedsft poc stop": r"^ended \d+ processes",
    "MLFLOW_TRACKING_URI=http://127.0.0.1:5000 MLFLOW_TRACKING_TOKEN=… python report.py": "fedsft-tiny",
}
PAGES_OF = {"ui": {"Dagster", "MLflow"}, "tensorboard": {"TensorBoard"}, "serve": {"model"}}
_SERVES = re.compile(r"\bmake (ui|tensorboard|serve)$")
# A script of a reader's, as docs/security.md has one: which models are registered.
REPORT = "import mlflow\nprint(*(model.name for model in mlflow.MlflowClient().search_registered_models()))\n"


def _commands(*documents: Path) -> list[Command]:
    found = [command for document in documents for block in blocks(document, "bash") for command in block.commands]
    return [command for command in found if command.page not in TESTED_ELSEWHERE]


ALL = _commands(*DOCUMENTS)
PAGES = list(dict.fromkeys(command.page for command in ALL if command.text not in NOT_RUN))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    clone = Clone(tmp_path_factory.mktemp("clone"))
    yield clone
    assert clone.stop_all() == []


@pytest.fixture(scope="module")
def places(clone: Clone) -> dict[str, str]:
    """What stands for the folders and archives that pages name: the sample as published, and small models."""
    beside = clone.folder.parent
    for dataset in DATASETS.values():
        write_sample(dataset.name, beside / "published" / dataset.folder)
    (models := beside / "models").mkdir()
    create_base_model(PRESETS["tiny"], models / "tiny.nemo", 7, ["question and answer"])
    for name in ("my-hugging-face-model", "my-causal-lm"):
        export_huggingface(models / "tiny.nemo", models / name)
    export_megatron(models / "tiny.nemo", clone.folder / ARCHIVE, "legacy")
    (clone.folder / "report.py").write_text(REPORT)
    (questions := clone.account / "benchmarks/piqa").mkdir(parents=True)
    question = {"goal": "Open a box.", "sol1": "Pull the lid.", "sol2": "Eat the lid."}
    (questions / "valid.jsonl").write_text(f"{json.dumps(question)}\n" * 60)
    (questions / "valid-labels.lst").write_text("0\n" * 60)
    return {PUBLISHED: str(beside / "published"), MODELS: f"{models}/"}


@pytest.fixture(scope="module")
def printed(clone: Clone) -> dict[str, str]:
    """What each command printed that was run already: one that two pages have is run once."""
    demo = Command("README.md", (), DEMO, "")
    return {demo.script: clone.run(demo.script, {}, "")}


def _replaced(script: str, places: dict[str, str]) -> str:
    for written, here in places.items():
        script = script.replace(written, here)
    return script


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TOGETHER.values()])
def test_every_command_of_a_page_does_what_it_says(
    clone: Clone, places: dict[str, str], printed: dict[str, str], page: str
) -> None:
    names = [page, *([TOGETHER[page]] if page in TOGETHER else [])]
    commands = [command for command in ALL if command.page in names and command.text not in NOT_RUN]
    assert commands
    _type(clone, commands, places, printed)


def _type(clone: Clone, commands: list[Command], places: dict[str, str], printed: dict[str, str]) -> None:
    """One command after the other; what serves pages does so while the rest is run."""
    for at, command in enumerate(commands):
        script = _replaced(command.script, places)
        if serves := _SERVES.search(command.text):
            if script in printed:
                continue
            with clone.serving(script) as pages:
                assert pages.keys() == PAGES_OF[serves[1]]
                assert {page.status() for page in pages.values()} == {401}
                _type(clone, commands[at + 1 :], places | _asked(pages), printed)
            printed[script] = ""
            return
        if script not in printed:
            printed[script] = clone.run(script, {"TESTS": A_TEST}, SAID)
        assert re.search(PRINTS[command.text], printed[script], re.MULTILINE), printed[script][-6000:]


def _asked(pages: dict[str, Page]) -> dict[str, str]:
    """What a script that asks MLflow's pages is told in place of the port and the token of the page."""
    if mlflow := pages.get("MLflow"):
        return {
            "http://127.0.0.1:5000": mlflow.base,
            "MLFLOW_TRACKING_TOKEN=…": f"MLFLOW_TRACKING_TOKEN={mlflow.token}",
        }
    return {}


@pytest.mark.parametrize("block", [block for page in DOCUMENTS for block in blocks(page, "python")], ids=str)
@pytest.mark.usefixtures("printed")
def test_python_of_a_page_runs_where_the_demo_has_run(clone: Clone, block: Block) -> None:
    (clone.folder / "page.py").write_text(block.text)
    assert re.search(r"\S", clone.run(".venv/bin/python page.py", {}, ""))


def test_what_is_not_run_is_on_a_page_and_what_is_run_says_what_it_shows() -> None:
    texts = {command.text for command in ALL}
    assert NOT_RUN.keys() | PRINTS.keys() <= texts
    assert {text for text in texts - NOT_RUN.keys() - PRINTS.keys() if not _SERVES.search(text)} == set()


# Reads the settings as the study does, and does nothing.
_READS = """
import json, sys
from fedsft_assets.cli import main as cli
def say(args, settings):
    print(json.dumps({**vars(args), **settings.purpose, "source": settings.source}))
cli._study = say
cli.main()
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return Rehearsal(tmp_path_factory.mktemp("rehearsal"))


@pytest.mark.parametrize("command", [command for command in ALL if command.text in NOT_RUN], ids=lambda c: c.text)
def test_what_is_not_run_would_start_with_what_there_is(rehearsal: Rehearsal, command: Command) -> None:
    if "../shared/" in command.text and not (rehearsal.folder.parent / "shared").exists():
        pytest.skip(f"no real rows: {PROJECT.parent / 'shared'} is not on this machine")
    *_, last = rehearsal.started(command, command.script)
    match last.argv[1:]:
        case ["-m", "fedsft_assets.cli", "study", *_]:
            said = json.loads(_run(rehearsal, last, "-c", _READS, *last.argv[3:]))
            for variable, value in re.findall(r"\b(DATA|MODEL)=(\S+)", command.text):
                assert said[variable.lower()].endswith(value.removeprefix("..")), variable
            for option, value in re.findall(r"--([\w-]+) (\d+)", command.text):
                assert said[option.replace("-", "_")] == int(value)
        case ["-m", module] if module.startswith("benchmarks."):
            helped = _run(rehearsal, last, "-m", module, "--help")
            for option, values in re.findall(r"(--[a-z-]+) ([\w-]+(?:, [\w-]+| or [\w-]+)*)", command.comment):
                choices = re.search(rf"{option} {{(.*?)}}", helped)
                assert choices, option
                assert set(re.split(", | or ", values)) <= set(choices[1].split(","))
        case ["tasks", *words]:
            helped = _run(rehearsal, last, "-m", "fedsft_assets.cli", "tasks", "--help")
            assert [word for word in words if word.startswith("--") and word not in helped] == []
        case ["-m", "pip", "install", "--quiet", extra]:
            project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
            assert extra.removeprefix(".[").removesuffix("]") in project["optional-dependencies"]
        case other:
            pytest.fail(f"{command.text}: starts {other}, which is not looked at")


def _run(rehearsal: Rehearsal, started: Started, *arguments: str) -> str:
    """What this project's Python prints in the place and environment in which something was started."""
    environment = {**started.environment, "PYTHONPATH": str(PROJECT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=rehearsal.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
