"""The asset check `opens_in_nemo` on every `checkpoint/<job>`: NeMo restores the archive and gives the same logits.

One step checks all checkpoints that a Dagster run makes, so that NeMo is imported once. It blocks nothing, and a
checkpoint that fails costs no other its check.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from fedsft_assets.credentials import redact
from fedsft_assets.defs.resources import StoreResource, made_by
from fedsft_assets.defs.seeds import partition_of
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store
from fedsft_assets.versions import current, existing

CHECK = "opens_in_nemo"


def nemo_checks(jobs: Sequence[JobSpec]) -> dg.AssetChecksDefinition:
    @dg.multi_asset_check(
        name=CHECK,
        specs=[
            dg.AssetCheckSpec(
                CHECK,
                asset=["checkpoint", job.name],
                description="NeMo's own restore_from opens the archive, and the model gives the same logits.",
            )
            for job in jobs
        ],
        can_subset=True,
    )
    def run_checks(context: dg.AssetCheckExecutionContext, store: StoreResource) -> Iterator[dg.AssetCheckResult]:
        for key in sorted(context.selected_asset_check_keys):
            yield _result(key.asset_key, store.of_run(context.run), context.run)

    return run_checks


def _result(checkpoint: dg.AssetKey, files: Store, run: dg.DagsterRun) -> dg.AssetCheckResult:
    """What NeMo makes of a checkpoint. Whatever goes wrong is this checkpoint's result and no other's."""
    from fedsft_assets.model.nemo_agreement import agreement

    passed, metadata = False, dict[str, Any]()
    try:
        archive = _version(checkpoint, files, run) / MODEL_FILE
        metadata["path"] = dg.MetadataValue.path(archive)
        found = agreement(archive)
    except Exception as error:  # a damaged archive can raise anything
        description = str(error) or type(error).__name__
    else:
        passed = found.agrees
        description = (
            f"{found.tokens} tokens of {found.prompts} prompts: the largest difference of a logit is"
            f" {found.difference:.3g}, the largest logit {found.largest:.3g}."
        )
        metadata |= {"largest difference": found.difference, "largest logit": found.largest}
        metadata |= {"prompts": found.prompts, "tokens": found.tokens}
    return dg.AssetCheckResult(
        asset_key=checkpoint,
        check_name=CHECK,
        passed=passed,
        severity=dg.AssetCheckSeverity.ERROR,
        description=redact(description),
        metadata=metadata,
    )


def _version(checkpoint: dg.AssetKey, files: Store, run: dg.DagsterRun) -> Path:
    """What this Dagster run made, else the current version. Raises NoVersionError."""
    try:
        version = made_by(files, run.run_id, checkpoint.path, partition_of(run.tags))
    except FileNotFoundError:
        return current(files.checkpoint(checkpoint.path[-1]))
    return existing(version)
