"""What an installation brings: a site no more than its trainer needs, and the study everything."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.environments import closure, environment_of, installing

NOT_AT_A_SITE = {
    *("dagster", "dagster-webserver", "mlflow", "mlflow-skinny", "pandas", "pyarrow", "datasets", "matplotlib"),
    *("nemo-toolkit", "scikit-learn", "scipy", "onnx", "py3langid", "tabulate", "pydantic-settings"),
}
CLIENT_SIDE = ["fedsft_assets.federation.site.process", "fedsft_assets.cli.site"]


def test_a_site_gets_neither_dagster_nor_mlflow_nor_anything_of_the_study() -> None:
    for extra in ("site", "server"):
        assert not closure(installing(extra)) & NOT_AT_A_SITE, extra


def test_the_study_gets_all_that_a_site_and_the_server_get() -> None:
    study = set(installing("study"))
    for extra in ("site", "server", "data"):
        assert set(installing(extra)) <= study
    assert {"dagster", "mlflow", "nvflare", "torch", "nemo-toolkit", "pandas", "pyarrow"} <= closure(study)


def _imported(path: Path) -> set[str]:
    """Top names of all that a file imports, at its top or later."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _reached(modules: list[str]) -> set[Path]:
    """Files of the package that can be imported from these modules, also late, but for the site's data command."""
    reached: set[Path] = set()
    waiting = list(modules)
    while waiting:
        path = PROJECT / (waiting.pop().replace(".", "/") + ".py")
        if path.is_file() and path not in reached and "data" not in path.relative_to(PROJECT).parts:
            reached.add(path)
            waiting += [name for name in _imported(path) if name.startswith("fedsft_assets.")]
    return reached


def test_whatever_the_client_can_import_is_a_requirement_of_a_site() -> None:
    direct = {canonicalize_name(Requirement(text).name) for text in installing("site")}
    brought = packages_distributions()
    files = _reached(CLIENT_SIDE)
    assert PROJECT / "fedsft_assets/model/language_model.py" in files
    for path in files:
        for name in {name.split(".")[0] for name in _imported(path)} - {"fedsft_assets", *sys.stdlib_module_names}:
            providers = {canonicalize_name(found) for found in brought.get(name, [])}
            assert providers & direct, f"{path.relative_to(PROJECT)} imports {name}, which the extra `site` lacks"


TRAIN_A_ROUND = """
import sys
from pathlib import Path
import nvflare.client
from nvflare.app_common.abstract.fl_model import FLModel
import fedsft_assets.federation.site.process
from fedsft_assets.federation.protocol.messages import KIND_KEY, VERSION, VERSION_KEY, Kind
from fedsft_assets.federation.protocol.phases import PhaseClock
from fedsft_assets.federation.site.trainer import SiteTrainer
from fedsft_assets.specs.plan import SitePlan
plan = SitePlan.model_validate_json(Path(sys.argv[1]).read_text())
trainer = SiteTrainer(plan, PhaseClock(), lambda text, points: print(text))
first = {} if plan.training.peft else dict(trainer.devices.weights())
meta = {VERSION_KEY: VERSION, KIND_KEY: Kind.FULL}
result = trainer.train(FLModel(params=first, current_round=0, meta=meta))
print("trained", len(result.params), "tensors, train_loss", result.metrics["train_loss"])
unwanted = sorted({"dagster", "mlflow", "pandas", "pyarrow", "matplotlib", "nemo", "sklearn"} & set(sys.modules))
print("unwanted", unwanted)
"""


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, {"rank": 2}], ids=["all weights", "adapters"])
def test_a_round_is_trained_with_what_a_site_installs_and_nothing_else(
    tmp_path: Path, peft: dict[str, int] | None
) -> None:
    from fedsft_assets.data.sources.sample import write_sample
    from fedsft_assets.data.splits import split_dataset
    from fedsft_assets.model.base_model import create_base_model
    from fedsft_assets.specs.job import PeftSpec, TrainingSpec
    from fedsft_assets.specs.model_preset import PRESETS
    from fedsft_assets.specs.plan import SitePlan
    from fedsft_assets_tests.shipped import DATASETS

    tiny, dolly = PRESETS["tiny"], DATASETS["dolly"]
    write_sample("dolly", tmp_path / "raw")
    split_dataset(dolly, tmp_path / "raw", tmp_path / "dolly")
    create_base_model(tiny, into=tmp_path / "tiny.nemo", seed=1)
    plan = SitePlan(
        job="fedavg",
        site="site-1",
        rounds=1,
        local_epochs=1,
        max_local_steps=2,
        max_evaluation_records=8,
        seed=1,
        training=tiny.resolve(TrainingSpec(peft=PeftSpec(**peft) if peft else None)),
        base_model=tmp_path / "tiny.nemo",
        training_file=tmp_path / "dolly/training.jsonl",
        validation_file=tmp_path / "dolly/validation.jsonl",
        digests={},
    )
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    programs = environment_of(installing("site"), tmp_path / "environment")
    done = subprocess.run(
        [str(programs / "python3"), "-I", "-c", TRAIN_A_ROUND, str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    assert done.stdout.splitlines()[-1] == "unwanted []"
