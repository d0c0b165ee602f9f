"""The jobs of `benchmarks.transfer`: one built as this project builds its own, and one of NVFlare's FedAvgRecipe."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import PROJECT
from benchmarks.transfer.model import Shape

_SCRIPT = "from benchmarks.transfer.site import main\n\nmain()\n"


@dataclass(frozen=True)
class Exchange:
    """Rounds in which sites are given a model and send it back."""

    shape: Shape
    sites: int
    rounds: int
    bf16: bool

    @property
    def bytes(self) -> int:
        """Of the model as it travels."""
        return self.shape.parameters * (2 if self.bf16 else 4)

    @property
    def site_names(self) -> list[str]:
        return [f"site-{number}" for number in range(1, self.sites + 1)]


def our_job(exchange: Exchange, archive: Path, diaries: Path, root: Path) -> Path:
    """The job folder of this project for the exchange, with a trainer that does not train."""
    from fedsft_assets.federation.job_folder import export_job
    from fedsft_assets.federation.protocol.messages import EXECUTION_KEY
    from fedsft_assets.federation.protocol.site_messages import RoundLimits
    from fedsft_assets.specs.job import JobSpec, SiteSpec
    from fedsft_assets.specs.plan import LocalWork

    wire = "bf16-diff" if exchange.bf16 else "fp32"
    spec = JobSpec(
        name="transfer",
        description="",
        sites={name: SiteSpec(dataset="none") for name in exchange.site_names},
        rounds=exchange.rounds,
        wire=wire,
    )
    limits = RoundLimits(
        work=LocalWork(local_epochs=1, max_local_steps=1, batch_size=1),
        precision="32",
        max_length=1,
        validation_records=1,
        records=dict.fromkeys(exchange.site_names, 1),
    )
    export_job(spec, archive, root, limits)
    folder = root / spec.name
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({**meta, EXECUTION_KEY: "transfer"}), encoding="utf-8")
    for site in exchange.site_names:
        path = folder / f"app_{site}" / "config" / "config_fed_client.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        (executor,) = config["executors"]
        executor["executor"] = {
            "path": "benchmarks.transfer.executor.BenchmarkSite",
            "args": {"command": _command("ours", diaries, "--wire", wire)},
        }
        path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def stock_job(exchange: Exchange, diaries: Path, root: Path) -> Path:
    """The job folder of NVFlare's recipe with its own settings; what they can be set to is as in the other job."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat

    shape = exchange.shape
    settings = {
        **{"layers": shape.layers, "width": shape.width, "vocabulary": shape.vocabulary, "positions": shape.positions},
        "dtype": "bfloat16" if exchange.bf16 else "float32",
    }
    script = root / "train.py"
    script.write_text(_SCRIPT, encoding="utf-8")
    recipe = FedAvgRecipe(
        name="transfer",
        model={"class_path": "benchmarks.transfer.model.Weights", "args": settings},
        min_clients=exchange.sites,
        num_rounds=exchange.rounds,
        train_script=str(script),
        train_args=f"stock --diaries {diaries}",
        launch_external_process=True,
        server_expected_format=ExchangeFormat.PYTORCH,
    )
    recipe.export(str(root))
    for app in (root / "transfer").glob("app*"):  # NVFlare leaves it elsewhere if it lies below a folder of sys.path
        (app / "custom").mkdir(exist_ok=True)
        (app / "custom" / script.name).write_text(_SCRIPT, encoding="utf-8")
    return root / "transfer"


def environment(folder: Path, ours: bool) -> dict[str, str]:
    """Of NVFlare's processes: its `python3` is this one, and the benchmark can be imported.

    With `ours`, also what this project sets for the processes of its own jobs.
    """
    paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    common = {
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    if not ours:
        return common
    from fedsft_assets.federation.protocol.messages import SITE_STATE_ROOT, STATE_ROOT
    from fedsft_assets.memory import MESSAGE_ENVIRONMENT

    states = {STATE_ROOT: str(folder / "states"), SITE_STATE_ROOT: str(folder / "site_states")}
    return {**common, **states, **MESSAGE_ENVIRONMENT}


def _command(way: str, diaries: Path, *more: str) -> list[str]:
    return ["python3", "-u", "-m", "benchmarks.transfer.site", way, "--diaries", str(diaries), *more]
