"""Which model of a study to use and why, in two sentences, from the comparison's verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedsft_assets.evaluation.comparison import SHOWN_BASE_MODEL, Comparison
from fedsft_assets.evaluation.report.site_gains import SiteGain
from fedsft_assets.evaluation.statistics.verdicts import Verdict
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.model.errors import listed

_LISTED = 3  # names in a sentence


@dataclass(frozen=True)
class Recommendation:
    """`job` is the model to use, None for the base model; `headline` says so, `reasons` why, as sentences."""

    job: str | None
    headline: str
    reasons: list[str]

    @property
    def why(self) -> str:
        """The reasons as a text."""
        return " ".join(f"{reason}." for reason in self.reasons)


def recommend(comparison: Comparison, gains: Sequence[SiteGain]) -> Recommendation:
    """A federated model that is measurably better than the base model and that no site's own model beats.

    Otherwise the local model that beats it, or the base model. A centralized model is a bound, not a candidate, as it
    needs all data in one place. Without a federated job, the model with the lowest test loss. `gains` are of its sites.
    """
    loss = {model: found.value for model, found in comparison.scores.items()}
    of_kind = {
        kind: [r for r in comparison.reports if r.kind == kind] for kind in ("local", "centralized", "federated")
    }
    federated = sorted(of_kind["federated"], key=lambda report: loss[report.job])
    if not federated:
        return _without_federated(comparison, loss)
    best = federated[0]
    verdicts = {verdict.other: verdict for verdict in comparison.verdicts if verdict.job == best.job}
    beaten_by = [report for report in of_kind["local"] if verdicts[report.job].outcome == "worse"]
    if beaten_by:
        local = min(beaten_by, key=lambda report: loss[report.job])
        if loss[local.job] < loss[SHOWN_BASE_MODEL]:
            return Recommendation(
                local.job,
                f"Use {local.job}, the model of one site alone",
                [
                    f"Its test loss of {loss[local.job]:.3f} is measurably lower than the {loss[best.job]:.3f} of"
                    f" {best.job}, the best federated model, and that of the base model is"
                    f" {loss[SHOWN_BASE_MODEL]:.3f}: training together has not paid off yet"
                ],
            )
    if verdicts[SHOWN_BASE_MODEL].outcome != "better" or beaten_by:
        return Recommendation(None, "Keep the base model for now", [_not_better(best, verdicts[SHOWN_BASE_MODEL])])
    reasons = [_over_others(best, len(federated), of_kind["local"], verdicts, loss)]
    if losing := [gain.site for gain in gains if gain.job == best.job and gain.own_is_better]:
        reasons.append(
            f"At {_names(losing)}, the site's own model is still measurably better on questions like its own"
        )
    elif of_kind["centralized"]:
        bound = of_kind["centralized"][0]
        reasons.append(_beside_bound(bound, verdicts[bound.job], loss))
    return Recommendation(best.job, f"Use {best.job}, a federated model", reasons)


def _without_federated(comparison: Comparison, loss: dict[str, float]) -> Recommendation:
    best = min(comparison.reports, key=lambda report: loss[report.job])
    base = loss[SHOWN_BASE_MODEL]
    untested = "as the study has no federated job, no difference between models is tested"
    if loss[best.job] >= base:
        reason = f"No trained model has a lower test loss than its {base:.3f}; {untested}"
        return Recommendation(None, "Keep the base model for now", [reason])
    reason = (
        f"Its test loss of {loss[best.job]:.3f} is the lowest, and that of the base model is {base:.3f}; {untested}"
    )
    return Recommendation(best.job, f"Use {best.job}, a {best.kind} model", [reason])


def _not_better(best: JobReport, over_base: Verdict) -> str:
    found = {
        "better": "is better than it, but not than the model of a site alone, which is no better than the base model",
        "worse": "is measurably worse than it: training has made the model worse",
        "not decidable": "is not measurably better than it with these data",
    }
    return f"{best.job}, the best federated model, {found[over_base.outcome]}"


def _over_others(
    best: JobReport, federated: int, local: list[JobReport], verdicts: dict[str, Verdict], loss: dict[str, float]
) -> str:
    """That it is better than the base model, and how it is beside the sites' own models."""
    of = f"The best of {federated} federated models, it" if federated > 1 else "It"
    said = (
        f"{of} predicts the right answers to test questions measurably better than the base model (loss"
        f" {loss[best.job]:.3f} instead of {loss[SHOWN_BASE_MODEL]:.3f}; lower is better)"
    )
    if not local:
        return f"{said}; no site's own model was trained, so what a site gains by taking part is not known"
    if undecided := [report.job for report in local if verdicts[report.job].outcome != "better"]:
        return f"{said}; whether also better than {_names(undecided)}, trained at one site, these data cannot tell"
    nearest = min(local, key=lambda report: loss[report.job])
    every = "the one site's own model" if len(local) == 1 else f"each of the {len(local)} sites' own models"
    return (
        f"{said} and than {every} (the nearest, {nearest.job}: {loss[nearest.job]:.3f}), and all data stays at its site"
    )


def _beside_bound(bound: JobReport, verdict: Verdict, loss: dict[str, float]) -> str:
    beside = {
        "better": "worse even so",
        "worse": "measurably better, but not an option where data may not leave its site",
        "not decidable": "not measurably different",
    }
    found = beside[verdict.outcome]
    return f"Training on all data in one place ({bound.job}) gives {loss[bound.job]:.3f}, {found}"


def _names(jobs: list[str]) -> str:
    if len(jobs) > _LISTED:
        return listed(jobs, most=_LISTED)
    return " and ".join([", ".join(jobs[:-1]), jobs[-1]] if len(jobs) > 1 else jobs)
