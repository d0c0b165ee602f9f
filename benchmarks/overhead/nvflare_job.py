"""The overhead benchmark's work in NVFlare's stock simulator: its FedAvg recipe, each client's script a process.

Run it with OMP_NUM_THREADS=1: by default each trainer takes all cores, and they get in each other's way.
"""

import shutil
import sys
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv, set_per_site_config
from nvflare.recipe.utils import add_final_global_evaluation

from benchmarks.overhead.input import Input

_SCRIPT = "benchmarks/overhead/nvflare_client.py"  # from the project's root: NVFlare finds no other path to it again


def run(given: Input, into: Path) -> None:
    """Write the final model to `into`; the simulator works beside it.

    No best model is selected: the final evaluation would score that one too.
    """
    sites = given.sites
    recipe = FedAvgRecipe(
        name="overhead",
        model={
            "class_path": "benchmarks.overhead.nvflare_model.BaseModel",
            "args": {"folder": str(given.hugging_face)},
        },
        min_clients=len(sites),
        num_rounds=given.part.rounds,
        train_script=_SCRIPT,
        launch_external_process=True,
        command=f"{sys.executable} -u",
    )
    set_per_site_config(recipe, {site: {"train_args": f"{given.folder} {site}"} for site in sites})
    add_final_global_evaluation(recipe)
    workspace = into.with_suffix("")
    shutil.rmtree(workspace, ignore_errors=True)
    finished = recipe.execute(SimEnv(clients=sites, workspace_root=str(workspace)))
    [model] = Path(finished.get_result()).glob("server/simulate_job/app_server/FL_global_model.pt")
    shutil.copyfile(model, into)


if __name__ == "__main__":
    run(Input(Path(sys.argv[1])), Path(sys.argv[2]))
