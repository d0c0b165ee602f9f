"""What a study was made of: its data with versions and licenses, its base model, and where its jobs ran."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedsft_assets.data.records import DataError
from fedsft_assets.data.sources.fetch import is_sampled
from fedsft_assets.data.split_report import SplitReport, version_with
from fedsft_assets.specs.dataset import COMBINED, HUB, SAMPLE, DatasetSpec
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store

NOT_STATED = "not stated"
_GENERATED = "generated sample: the published license does not apply"


@dataclass(frozen=True)
class DatasetFacts:
    """A dataset in the version that models were tested on. `license` holds for what was read, from `source`."""

    name: str
    title: str
    source: str
    license: str
    version: str
    counts: Mapping[str, int]
    dropped: int


@dataclass(frozen=True)
class BaseModelFacts:
    name: str
    title: str
    digest: str


def dataset_facts(
    store: Store, testing_split: str, specs: Iterable[DatasetSpec], data: str
) -> list[DatasetFacts] | None:
    """The datasets of the combined splits with this digest, by name; `data` is the setting that says what is read.

    None if the home has these splits no longer.
    """
    combined = version_with(store.combined, testing_split)
    if combined is None:
        return None
    known = {spec.name: spec for spec in specs}
    found = []
    for name, version in sorted(SplitReport.read(combined).parts.items()):
        try:
            report = SplitReport.read(store.processed(name) / version)
        except DataError:
            return None
        spec = known.get(name)
        source, license_ = _source(spec, data) if spec else ("no longer in the study", NOT_STATED)
        dropped = report.duplicates + report.rejected
        title = spec.label if spec else name
        found.append(DatasetFacts(name, title, source, license_, version, report.counts, dropped))
    return found


def trained_on(spec: JobSpec, datasets: Sequence[DatasetFacts]) -> list[DatasetFacts]:
    """The datasets that a job was trained on, except private ones."""
    return [one for one in datasets if one.name in spec.datasets or COMBINED in spec.datasets]


def terms(spec: JobSpec, datasets: Sequence[DatasetFacts]) -> str:
    """The licenses of what a job was trained on: `CC BY-NC 4.0 (alpaca); Apache 2.0 (oasst1)`."""
    names: dict[str, list[str]] = {}
    for one in trained_on(spec, datasets):
        names.setdefault(one.license, []).append(one.name)
    if spec.private_sites:
        names["known to the sites alone"] = [spec.sites[site].dataset for site in spec.private_sites]
    return "; ".join(f"{license_} ({', '.join(of)})" for license_, of in names.items())


def _source(spec: DatasetSpec, data: str) -> tuple[str, str]:
    """Where its files come from, and their license."""
    stated = spec.license or NOT_STATED
    if spec.path:
        return str(spec.path), stated
    if is_sampled(spec, data):
        return "the embedded sample, in the format of the published dataset", _GENERATED
    if data in (HUB, SAMPLE):
        return f"the hub: {spec.hub} at {spec.revision[:12]}", stated
    return f"a copy of {spec.hub}", stated
