"""Decides which model is the champion: one that is better than the last one and the base model, beyond the interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedsft_assets.evaluation.comparison import SHOWN_BASE_MODEL
from fedsft_assets.evaluation.record_scores import common_records
from fedsft_assets.specs.job import BASE_MODEL

if TYPE_CHECKING:
    import pandas as pd

    from fedsft_assets.evaluation.statistics.verdicts import Verdict

CHAMPION = "_champion"  # as a model in a table of losses; no job can have this name
_SHOWN = {BASE_MODEL: SHOWN_BASE_MODEL, CHAMPION: "the champion"}


@dataclass(frozen=True)
class Decision:
    """Who is champion and challenger, by the digests of their weights, and why, for each model that was judged.

    `champion` is None if nobody is: there was none, and no model is better than the base model. `names` are those of
    the models, by digest.
    """

    champion: str | None
    challenger: str | None
    reasons: dict[str, str]
    names: dict[str, str]

    def markdown(self) -> str:
        """A line for each model that was judged."""
        roles = {self.challenger: " (challenger)", self.champion: " (champion)"}
        lines = [f"- {self.names[digest]}{roles.get(digest, '')}: {said}" for digest, said in self.reasons.items()]
        return "\n".join(lines)


def decide(losses: pd.DataFrame, digests: Mapping[str, str], champion: str | None) -> Decision:
    """Judge all jobs on the records that every model was scored on.

    `losses` has the columns of record_scores and `model`: jobs, `base_model`, and CHAMPION if the champion is none of
    them. `digests` are of their weights, `champion` is that of the champion so far. A job takes its place if its test
    loss is lower than the champion's and the base model's, each beyond the interval, corrected for how many pairs are
    judged; of several, the one with the lowest loss. The challenger is the best of the others. Raises ScoresError.
    """
    from fedsft_assets.evaluation.statistics.intervals import compare_pairs, score_jobs
    from fedsft_assets.evaluation.statistics.score_table import by_prompt
    from fedsft_assets.evaluation.statistics.verdicts import judge

    records = common_records(losses)
    records = records[records["first"]]
    trained = (records["model"] != BASE_MODEL).map({True: 1, False: None})
    shown = {model: _SHOWN.get(model, model) for model in digests}
    scores = by_prompt(records.assign(job=records["model"].map(shown), seed=trained))
    values = {model: estimate.value for model, estimate in score_jobs(scores).items()}
    jobs = sorted((model for model in digests if model not in _SHOWN), key=lambda job: (values[job], job))
    reigning = next((model for model in digests if model != BASE_MODEL and digests[model] == champion), None)
    rivals = [shown[BASE_MODEL], *([shown[reigning]] if reigning else [])]
    new = [job for job in jobs if digests[job] != champion]
    verdicts = judge(compare_pairs(scores, [(job, rival) for job in new for rival in rivals]))
    of_job = {job: [verdict for verdict in verdicts if verdict.job == job] for job in new}
    better = [job for job in new if all(verdict.outcome == "better" for verdict in of_job[job])]
    winner = better[0] if better else None
    reasons = {digests[job]: _reason(of_job[job], job, winner, values) for job in reversed(new)}
    if reigning:
        reasons[str(champion)] = (
            f"no longer the champion: {_sentences(of_job[winner])}"
            if winner
            else "stays the champion: no job is better beyond the interval"
        )
    first = digests[winner] if winner else champion
    others = [digests[job] for job in jobs if digests[job] != first]
    names = {digests[model]: shown[model] for model in [*jobs, *([reigning] if reigning else [])]}
    return Decision(first, others[0] if others else None, reasons, names)


def without_champion(decision: Decision, champion: str, why: str) -> Decision:
    """The decision that was made without the champion, as it could not be scored on the same records: it stays."""
    reasons = {digest: f"not compared with the champion, {why}; {said}" for digest, said in decision.reasons.items()}
    return replace(decision, champion=champion, challenger=decision.champion or decision.challenger, reasons=reasons)


def _reason(verdicts: list[Verdict], job: str, winner: str | None, values: Mapping[str, float]) -> str:
    if job == winner:
        return _sentences(verdicts)
    if short := [verdict for verdict in verdicts if verdict.outcome != "better"]:
        return _sentences(short)
    return f"{winner} has a lower test loss: {values[str(winner)]:.4f}, not {values[job]:.4f}; {_sentences(verdicts)}"


def _sentences(verdicts: list[Verdict]) -> str:
    return "; ".join(verdict.sentence for verdict in verdicts)
