"""Builds the checkpoint of a job from the weights that its server saved, and scores it.

Runs as its own process, so that the supervisor does not import the model, and can use the simulator's fork server.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.federation.runtimes.simulator.forked_python import LOST


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's scores on the testing split, and the content digests of it and its base model."""

    test_loss: float
    perplexity: float
    digest: str
    base_model_digest: str


def make_checkpoint(
    command: list[str], environment: dict[str, str], job_folder: Path, weights: Path, testing_file: Path, into: Path
) -> Checkpoint:
    """Write the checkpoint's files into the folder `into`, in a process started with `command`.

    Raises JobError, retryable if that process was killed or could not be forked, or OSError for local resource problems
    such as a full disk.
    """
    arguments = [str(path) for path in (job_folder, weights, testing_file, into)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode == os.EX_IOERR:
        raise OSError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise JobError(
            f"writing the checkpoint failed (exit code {done.returncode}):\n{done.stderr[-4000:].strip()}",
            retryable=done.returncode < 0 or done.returncode == LOST,
        )
    return Checkpoint(**json.loads(done.stdout))


def _make(job_folder: Path, weights: Path, testing_file: Path, into: Path) -> Checkpoint:
    import torch

    from fedsft_assets.model.archive.nemo_archive import content_digest
    from fedsft_assets.model.language_model import LanguageModel
    from fedsft_assets.model.training.local_training import mean_loss, split_tokens

    plan = JobFolder.read(job_folder).located_plans[0]
    model = LanguageModel.load(plan.base_model)
    trained = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    if plan.training.peft:
        from fedsft_assets.model.training.lora import ADAPTER_FOLDER, add_adapters

        adapters = add_adapters(model, plan.training.peft, plan.seed)
        model.load_weights(trained)
        adapters.save(into / ADAPTER_FOLDER)
        adapters.merge()
    else:
        model.load_weights(trained)
    archive = into / MODEL_FILE
    model.save(archive)
    # As read back from the archive, with the records and truncation of a site.
    saved = LanguageModel.load(archive)
    tokens = split_tokens(saved, testing_file, plan.training.max_length, plan.max_evaluation_records)
    test = mean_loss(saved, tokens, plan.training)
    return Checkpoint(test.loss, test.perplexity, content_digest(archive), content_digest(plan.base_model))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a job's checkpoint; print its scores as JSON.")
    for name in ("job_folder", "weights", "testing_file", "into"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries may print
            made = _make(args.job_folder, args.weights, args.testing_file, args.into)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(os.EX_IOERR)
    print(json.dumps(asdict(made)))


if __name__ == "__main__":
    main()
