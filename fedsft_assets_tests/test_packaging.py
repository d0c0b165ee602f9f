"""What an installation brings: a site no more than its trainer needs, and the study everything."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
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


def test_requirements_txt_has_a_version_for_each_requirement() -> None:
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    for wanted in map(Requirement, installing("study", "dev", "smollm2")):
        version = versions.get(canonicalize_name(wanted.name), "0")
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted}: run `make lock`"


def _imports(modules: list[str], without: str = "") -> set[tuple[str, str]]:
    """Who of the package imports which other package, at its top or later, of all that these modules can reach."""
    graph = grimp.build_graph("fedsft_assets", include_external_packages=True)
    for module in graph.modules if without else ():
        if module == without or module.startswith(f"{without}."):
            graph.remove_module(module)
    reached = {*modules, *(name for module in modules for name in graph.find_upstream_modules(module))}
    own = {module for module in reached if module.split(".")[0] == "fedsft_assets"}
    others = reached - own - sys.stdlib_module_names
    return {(module, name) for module in own for name in graph.find_modules_directly_imported_by(module) & others}


def test_whatever_the_client_can_import_is_a_requirement_of_a_site() -> None:
    direct = {canonicalize_name(Requirement(text).name) for text in installing("site")}
    brought = packages_distributions()
    found = _imports(CLIENT_SIDE, without="fedsft_assets.data")  # which `fedsft-site split` needs, with an extra
    assert ("fedsft_assets.model.language_model", "transformers") in found
    for module, name in sorted(found):
        providers = {canonicalize_name(provider) for provider in brought.get(name, [])}
        assert providers & direct, f"{module} imports {name}, which the extra `site` lacks"


def test_the_servers_part_needs_only_what_every_part_needs() -> None:
    """The extra `server` brings nothing else; NVFlare brings numpy."""
    found = {name for _, name in _imports(["fedsft_assets.federation.server.controller"])}
    assert found == {"torch", "numpy", "safetensors", "nvflare", "pydantic", "yaml"}


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
