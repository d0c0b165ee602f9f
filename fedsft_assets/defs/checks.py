"""Asset checks on `processed/<dataset>` and `combined`: data quality required for training.

All checks are blocking: a failure with severity error stops downstream assets, a warning does not. A version becomes
current when no check has failed as an error, or each failure has been accepted; until then, the previous version stays
current.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from fedsft_assets.data.plots import percentiles
from fedsft_assets.data.quality import blank_outputs, language_sample, prompt_overlap
from fedsft_assets.data.records import DataError
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.resources import CANDIDATES, ChecksResource, ModelResource, StoreResource
from fedsft_assets.model.errors import ModelError
from fedsft_assets.specs.dataset import COMBINED, DatasetSpec
from fedsft_assets.specs.limits import CheckName, CheckSettings, Severity
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.store import Store
from fedsft_assets.versions import CURRENT, Verdict, current, judge


@dataclass(frozen=True)
class Finding:
    """The result of a check: a sentence and metadata."""

    passed: bool
    description: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """What a check guarantees, and the severity of its failure."""

    description: str
    severity: Severity


CHECKS: Mapping[CheckName, Check] = {
    "row_count": Check("About as many records as the current version has.", "error"),
    "no_empty_outputs": Check("Every record has a non-empty output.", "error"),
    "no_prompt_overlap": Check("No prompt is in two splits, so that no loss is measured on training data.", "error"),
    "token_lengths": Check("Records fit into the model's window.", "warn"),
    "languages": Check("Records are in the configured languages.", "warn"),
    "duplicates": Check("Rows are not duplicated.", "warn"),
}


class AcceptConfig(dg.Config):
    """Checks whose failure is accepted for the data checked in this run; recorded with the data."""

    accept: list[str] = Field([])


def data_checks(datasets: Sequence[DatasetSpec]) -> list[dg.AssetChecksDefinition]:
    """One check step per dataset, and one for `combined`."""
    names = [dataset.name for dataset in datasets]
    return [*map(_dataset_checks, names), _dataset_checks(COMBINED, names)]


def _dataset_checks(dataset: str, parts: Sequence[str] = ()) -> dg.AssetChecksDefinition:
    """The checks of a dataset; `parts` are the datasets it combines, whose splits must not share prompts with it."""
    key = _asset_key(dataset)

    @dg.multi_asset_check(
        name=f"check__{key.to_python_identifier()}",
        specs=[
            dg.AssetCheckSpec(
                name,
                asset=key,
                description=check.description,
                blocking=True,
                additional_deps=[_asset_key(part) for part in parts],
            )
            for name, check in CHECKS.items()
        ],
        ins={"version": dg.AssetIn(key, input_manager_key=CANDIDATES)},
    )
    def run_checks(
        context: dg.AssetCheckExecutionContext,
        config: AcceptConfig,
        store: StoreResource,
        checks: ChecksResource,
        model: ModelResource,
        version: Path,
    ) -> Iterator[dg.AssetCheckResult]:
        settings = checks.settings
        if unknown := sorted(set(config.accept) - set(CHECKS)):
            raise dg.Failure(f"accept: {', '.join(unknown)} is not a check; expected one of {', '.join(CHECKS)}")
        failed: dict[str, str] = {}
        with as_dagster_failure(DataError, ModelError):
            for name, finding in _findings(version, store.files, model.load(), settings):
                severity = settings.severity.get(name, CHECKS[name].severity)
                description, metadata = finding.description, dict(finding.metadata)
                if not finding.passed and severity == "error":
                    failed[name] = finding.description
                    if name in config.accept:
                        severity, description = "warn", f"Accepted: {description}"
                        metadata["accepted by run"] = context.run.run_id
                yield dg.AssetCheckResult(
                    check_name=name,
                    passed=finding.passed,
                    severity=dg.AssetCheckSeverity[severity.upper()],
                    description=description,
                    metadata=metadata,
                )
        accepted = sorted(set(failed) & set(config.accept))
        judge(version, Verdict(failed, accepted, f"Dagster run {context.run.run_id}" if accepted else ""))

    return run_checks


def _asset_key(dataset: str) -> dg.AssetKey:
    return dg.AssetKey([COMBINED] if dataset == COMBINED else ["processed", dataset])


def _findings(
    folder: Path, files: Store, preset: ModelPreset, settings: CheckSettings
) -> Iterator[tuple[CheckName, Finding]]:
    """Yield each check's finding for a version of splits as soon as it is available."""
    report = SplitReport.read(folder)
    parts = [files.processed(name) / digest for name, digest in report.parts.items()]
    yield "row_count", _row_count(report.records, folder, settings)
    yield "no_empty_outputs", _no_empty_outputs(folder)
    yield "no_prompt_overlap", _no_prompt_overlap([*parts, folder])
    yield "token_lengths", _token_lengths(folder, preset, files, settings.max_truncated)
    yield "languages", _languages(folder, settings)
    yield "duplicates", _duplicates(report, settings.max_duplicates)


def _records_before(folder: Path) -> int | None:
    """Number of records in the current version, to compare with; None if there is none."""
    versions = folder.parent
    return SplitReport.read(current(versions)).records if (versions / CURRENT).exists() else None


def _row_count(records: int, folder: Path, settings: CheckSettings) -> Finding:
    before = _records_before(folder)
    if before is None:
        found = f"{records:,} records; no earlier version to compare with."
        return Finding(True, found, {"records": records})
    ratio = records / before
    low, high = settings.min_rows, settings.max_rows
    found = f"{records:,} records, {ratio:.3g} times the {before:,} of the current version"
    advice = (
        f"expected {low:g} to {high:g} times; check the raw data, or accept this version if it is intended: "
        f"fedsft accept {folder.parent.name} row_count, or `accept` in the launchpad"
    )
    return _finding(low <= ratio <= high, found, advice, {"records": records, "records before": before, "ratio": ratio})


def _no_empty_outputs(folder: Path) -> Finding:
    blanks = blank_outputs(folder)
    count = sum(blank.count for blank in blanks.values())
    lines = [f"{split} line {line}" for split, blank in blanks.items() for line in blank.lines]
    found = f"{_counted(count, 'record has', 'records have')} a blank output{_listed(lines)}"
    metadata = {f"blank, {split}": blank.count for split, blank in blanks.items()}
    return _finding(count == 0, found, "materialize the splits again", {"blank": count, **metadata})


def _no_prompt_overlap(folders: Sequence[Path]) -> Finding:
    overlap = prompt_overlap(folders)
    examples = [f"{prompt.text!r} in {' and '.join(prompt.places)}" for prompt in overlap.examples]
    found = f"{_counted(overlap.count, 'prompt is', 'prompts are')} in several splits{_listed(examples)}"
    table = [dg.TableRecord({"prompt": prompt.text, "in": ", ".join(prompt.places)}) for prompt in overlap.examples]
    metadata = {"prompts": overlap.count, **({"examples": dg.MetadataValue.table(table)} if table else {})}
    advice = "materialize all processed assets, then combined, with the same split settings"
    return _finding(overlap.count == 0, found, advice, metadata)


def _token_lengths(folder: Path, preset: ModelPreset, files: Store, allowed: float) -> Finding:
    from fedsft_assets.model.preset_tokenizer import preset_tokenizer
    from fedsft_assets.model.training.lengths import token_lengths

    lengths = token_lengths(folder, preset_tokenizer(preset, files.tokenizers, files.downloads))
    count = int((lengths > preset.max_length).sum())
    share = count / len(lengths)
    found = (
        f"{count:,} of {len(lengths):,} records ({share:.2%}) are longer than {preset.max_length} tokens, "
        f"the window of {preset.name}"
    )
    advice = f"expected at most {allowed:.2%}; use a model with a longer window, or raise max_truncated"
    tokens = {f"tokens, {name}": value for name, value in percentiles(lengths).items() if name != "max"}
    return _finding(
        share <= allowed, found, advice, {"cut": count, "share": share, "window": preset.max_length, **tokens}
    )


def _languages(folder: Path, settings: CheckSettings) -> Finding:
    sample = language_sample(folder)
    share = sample.share(settings.languages)
    wanted = ", ".join(settings.languages)
    found = f"{share:.2%} of the {sample.worded:,} sampled records with words are in {wanted}"
    table = [
        dg.TableRecord({"language": code, "records": count, "share": count / sample.sampled})
        for code, count in sorted(sample.counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    advice = (
        f"expected at least {settings.min_language_share:.2%}; remove the other records, or change languages or "
        "min_language_share"
    )
    metadata = {"share": share, "sampled": sample.sampled, "languages": dg.MetadataValue.table(table)}
    return _finding(share >= settings.min_language_share, found, advice, metadata)


def _duplicates(report: SplitReport, allowed: float) -> Finding:
    share = report.duplicates / report.rows
    found = f"{report.duplicates:,} of {report.rows:,} rows ({share:.2%}) are duplicates and were removed"
    advice = f"expected at most {allowed:.2%}; check the source for duplicated rows, or raise max_duplicates"
    return _finding(
        share <= allowed, found, advice, {"duplicates": report.duplicates, "rows": report.rows, "share": share}
    )


def _finding(passed: bool, found: str, advice: str, metadata: Mapping[str, Any]) -> Finding:
    """A finding, with the advice appended if the check failed."""
    return Finding(passed, f"{found}." if passed else f"{found}; {advice}.", metadata)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _listed(items: Sequence[str]) -> str:
    return f" ({'; '.join(items)})" if items else ""
