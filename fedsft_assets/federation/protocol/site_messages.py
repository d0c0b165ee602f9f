"""Typed messages from sites to a job's server, validated on arrival.

Messages do not name their sender: it is the client whose token NVFlare accepted. Invalid content raises ValueError
naming the field, what was found and what was expected; the caller adds site and round.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedsft_assets.federation.protocol.costs import COSTS_OF_A_SITE
from fedsft_assets.federation.protocol.messages import (
    FAILURE_KEY,
    FIRST_KEY,
    KIND_KEY,
    RECORDS_KEY,
    SAMPLES_KEY,
    TOKENS_KEY,
)
from fedsft_assets.federation.protocol.phases import phase_of
from fedsft_assets.federation.protocol.points import TRAIN_LOSS, VAL_LOSS, VAL_LOSS_LOCAL, Point
from fedsft_assets.specs.job import Precision
from fedsft_assets.specs.plan import LocalWork

_MOST = 2**53  # maximum of any count: exact as a float
_YEAR_2100 = 4_102_444_800.0  # seconds since the epoch
_MOST_CHARACTERS, _MOST_OF_A_TRACEBACK = 500, 20_000
_MOST_POINTS_AT_ONCE = 10_000
_SHOWN, _QUOTED = 80, 200  # characters of an invalid value shown


def _metric(name: str) -> str:
    if name not in (TRAIN_LOSS, VAL_LOSS, VAL_LOSS_LOCAL) and not _is_cost(name):
        raise ValueError("expected the name of a metric of this package")
    return name


def _is_cost(name: str) -> bool:
    return phase_of(name) is not None or name in COSTS_OF_A_SITE


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected a single line of printable characters")
    return text


Count = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]


class NotFiniteError(ValueError):
    """A loss is not finite: training has diverged; the site is not at fault."""


class _Message(BaseModel):
    """Strict types: no string for a number, no boolean for a count, no NumPy array for a list."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class PointMessage(_Message):
    """A point of the sending site's curve; see `points.Point`."""

    name: Annotated[str, AfterValidator(_metric)]
    value: float
    round: Count
    samples: Count
    step: Positive | None = None
    tokens: Positive | None = None
    time: Annotated[float, Field(ge=0, le=_YEAR_2100)]

    @property
    def measured(self) -> str:
        """The measurement as text for a message."""
        return f"{self.value:.6g} over {self.tokens} tokens"


class ReportMessage(_Message):
    """A site's progress report: a log line and its points.

    A resent message has the same `id`.
    """

    id: Annotated[str, Field(min_length=1, max_length=_SHOWN), AfterValidator(_one_line)]
    text: Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS), AfterValidator(_one_line)]
    points: Annotated[list[PointMessage], Field(max_length=_MOST_POINTS_AT_ONCE)]


class ScoreMessage(_Message):
    """A site's points at the end of a task: its score of the model it received."""

    points: list[PointMessage]

    def named(self, name: str) -> list[PointMessage]:
        return [point for point in self.points if point.name == name]


class UpdateMessage(ScoreMessage):
    """A site's result of a round: the metadata of its tensors, and its points.

    `tokens` and `samples` count what the round trained on, `records` the site's training records.
    """

    kind: Annotated[str, Field(max_length=_SHOWN)]
    tokens: Positive
    samples: Positive
    records: Positive
    first: Annotated[str, Field(max_length=200)] | None


class RoundLimits(BaseModel):
    """Limits that the job sets for every site's messages in a round.

    `records` is the number of training records per site, None if only the site knows; every site scores models on
    `validation_records` records. `max_length` is the maximum record length in tokens; `precision` is that of scoring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    work: LocalWork
    precision: Precision
    max_length: int
    validation_records: int
    records: dict[str, int | None]

    def report(self, content: Any, number: int) -> ReportMessage:
        """Parse a site's JSON progress report during round `number` (0-based)."""
        if not isinstance(content, str):
            raise ValueError(f"found {_shown(content)}, expected JSON")
        try:
            message = ReportMessage.model_validate_json(content)
        except ValidationError as error:
            raise ValueError(_explained(error)) from error
        _check_values(message.points)
        for point in message.points:
            now = round_of(point.name, number)
            # Reports of a slow site may arrive after the next round has started.
            _require(now - 1 <= point.round <= now, point.name, "round", point.round, f"{now}")
        return message

    def score(self, points: list[PointMessage], number: int, records: int | None) -> ScoreMessage:
        """Check the score of the model after `number` rounds; `records` is the site's record count, if known."""
        score = ScoreMessage(points=points)
        self._check_score(score, number, None if records is None else self.work.samples(records) * number)
        _require_only(score, (VAL_LOSS,))
        return score

    def update(
        self, meta: Mapping[str, Any], points: list[PointMessage], number: int, records: int | None
    ) -> UpdateMessage:
        """Check the result of round `number` (0-based); `records` is the site's record count, if known."""
        try:
            update = UpdateMessage.model_validate(
                {
                    "kind": meta.get(KIND_KEY),
                    "tokens": meta.get(TOKENS_KEY),
                    "samples": meta.get(SAMPLES_KEY),
                    "records": meta.get(RECORDS_KEY),
                    "first": meta.get(FIRST_KEY),
                    "points": points,
                }
            )
        except ValidationError as error:
            raise ValueError(_explained(error)) from error
        if records is not None:
            _require(update.records == records, "records", None, update.records, f"{records}")
        samples = self.work.samples(update.records)
        of_round = f"{samples} in a round of {update.records} records"
        _require(update.samples == samples, "samples", None, update.samples, of_round)
        most = samples * self.max_length
        _require(update.tokens <= most, "tokens", None, update.tokens, f"at most {most} in {samples} records")
        self._check_score(update, number, samples * number)
        (local,) = _exactly(update, VAL_LOSS_LOCAL, 1)
        self._check_point(local, number + 1, samples * (number + 1))
        self._check_steps(update, number, samples)
        _require_only(update, (VAL_LOSS, VAL_LOSS_LOCAL, TRAIN_LOSS))
        return update

    def _check_score(self, score: ScoreMessage, number: int, samples: int | None) -> None:
        (point,) = _exactly(score, VAL_LOSS, 1)
        self._check_point(point, number, samples)

    def _check_point(self, point: PointMessage, round: int, samples: int | None) -> None:
        """Check a mean loss over the common validation records."""
        _require(point.round == round, point.name, "round", point.round, f"{round}")
        _require(point.step is None, point.name, "step", point.step, "none")
        if samples is not None:
            _require(point.samples == samples, point.name, "samples", point.samples, f"{samples}")
        self._check_tokens(point, self.validation_records)

    def _check_tokens(self, point: PointMessage, records: int) -> None:
        most = records * self.max_length
        within = point.tokens is not None and point.tokens <= most
        _require(within, point.name, "tokens", point.tokens, f"1 to {most} in {records} records")

    def _check_steps(self, update: UpdateMessage, number: int, samples: int) -> None:
        steps = _exactly(update, TRAIN_LOSS, self.work.steps(update.records))
        before = samples * number
        for step, point in enumerate(steps, start=1):
            _require(point.step == step, TRAIN_LOSS, "step", point.step, f"{step} (steps are in order)")
            _require(point.round == number + 1, TRAIN_LOSS, "round", point.round, f"{number + 1}")
            more = before < point.samples <= before + self.work.batch_size
            _require(more, TRAIN_LOSS, "samples", point.samples, f"up to {self.work.batch_size} more than {before}")
            self._check_tokens(point, point.samples - before)
            before = point.samples
        _require(
            before == samples * (number + 1),
            TRAIN_LOSS,
            "samples",
            before,
            f"{samples * (number + 1)} in the last step",
        )
        tokens = sum(point.tokens or 0 for point in steps)
        _require(tokens == update.tokens, "tokens", None, update.tokens, f"{tokens}, the sum of its steps")


def round_of(metric: str, number: int) -> int:
    """Number of finished rounds behind a metric measured in round `number` (0-based)."""
    return number + 1 if metric in (TRAIN_LOSS, VAL_LOSS_LOCAL) else number


def points_of(site: str, messages: Sequence[PointMessage]) -> list[Point]:
    """Points of the site that sent the messages."""
    return [
        Point(one.name, one.value, one.round, one.samples, site, one.step, one.tokens, one.time) for one in messages
    ]


def failure_of(meta: Mapping[str, Any]) -> str | None:
    """The (end of the) traceback of a failed trainer, or None if the result is not a failure."""
    text = meta.get(FAILURE_KEY)
    if text is None:
        return None
    if not isinstance(text, str) or not text:
        raise ValueError(f"{FAILURE_KEY}: found {_shown(text)}, expected a traceback")
    kept = text[-_MOST_OF_A_TRACEBACK:]
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in kept)


def _explained(error: ValidationError) -> str:
    """Format the first validation error."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    return f"{field}: found {_shown(problem['input'])}: {text[:1].lower()}{text[1:]}".removeprefix(": ")


def quoted(words: object, most: int = _QUOTED) -> str:
    """Untrusted text, such as an error message, made printable and cut to `most` characters."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in str(words))
    return text if len(text) <= most else f"{text[:most]}…"


def _shown(found: object) -> str:
    """A short one-line description of a value."""
    text = repr(found) if isinstance(found, bool | int | float | str) or found is None else f"a {type(found).__name__}"
    return quoted(text, _SHOWN)


def _require(right: bool, name: str, field: str | None, found: object, expected: str) -> None:
    if not right:
        raise ValueError(f"{name}{f': {field}' if field else ''}: found {_shown(found)}, expected {expected}")


def _check_values(points: Sequence[PointMessage]) -> None:
    for point in points:
        _require(not point.value < 0, point.name, None, point.value, "a number that is not negative")
        if not math.isfinite(point.value):
            raise NotFiniteError(f"{point.name}: found {point.value}, expected a finite number")


def _exactly(score: ScoreMessage, name: str, count: int) -> list[PointMessage]:
    points = score.named(name)
    _require(len(points) == count, name, None, f"{len(points)} points", f"{count}")
    return points


def _require_only(score: ScoreMessage, losses: Sequence[str]) -> None:
    """Allow only these losses, and at most one point per phase and other cost."""
    names = [point.name for point in score.points if point.name not in losses]
    for name in names:
        _require(_is_cost(name), name, None, "a point", "none in this task")
        _require(names.count(name) == 1, name, None, f"{names.count(name)} points", "1")
