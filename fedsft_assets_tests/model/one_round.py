"""What test_many_devices.py starts under torchrun: rounds of training, one case after another, on all processes.

Reads `cases.pt`, a list of Case as dictionaries, in the folder that it is given, and writes there what each gave:
`<number>.pt`, a dictionary of `weights`, `losses` and `validation`, from rank 0.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.devices.choose import devices_for
from fedsft_assets.model.training.local_training import mean_loss, train_round
from fedsft_assets.model.training.lora import add_adapters
from fedsft_assets.specs.plan import SitePlan


def train(plan: SitePlan, tokens: list[Tokens], padded: bool) -> dict[str, object]:
    """All rounds of the plan from the base model: losses of steps, loss before and after, final weights."""
    model = LanguageModel.load(plan.base_model)
    if plan.training.peft:
        add_adapters(model, plan.training.peft, plan.seed)
    if padded:
        model.answer_loss.packs = False
    weights = model.weights()
    devices = devices_for(model, plan.training)
    # What a site does: weights come from rank 0 alone.
    devices.load_weights(weights if devices.rank == 0 else {})
    validation = [mean_loss(model, tokens, plan.training, devices).loss]
    moments, losses = None, []
    for round in range(plan.rounds):
        report = train_round(model, tokens, plan, round, moments=moments, devices=devices)
        moments = report.moments if plan.training.optimizer_state == "keep" else None
        losses += [point.loss for point in report.points]
        validation.append(mean_loss(model, tokens, plan.training, devices).loss)
    return {"weights": dict(devices.weights()), "losses": losses, "validation": validation}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for number, case in enumerate(torch.load(folder / "cases.pt", weights_only=True)):
        plan = SitePlan.model_validate_json(case["plan"])
        tokens = [Tokens(ids, prompt) for ids, prompt in case["tokens"]]
        result = train(plan, tokens, case["padded"])
        if int(os.environ["RANK"]) == 0:
            torch.save(result, folder / f"{number}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
