"""What is done to a running job, and when: moments over its whole life, from a seeded list for each execution."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from typing import TypeVar

SITE_TIMEOUT = 20.0  # seconds, of the campaign's jobs; a freeze lasts longer
_T = TypeVar("_T")


class Target(StrEnum):
    """What is hit. A parent is NVFlare's process that lives from job to job."""

    WORKER = "worker"
    SUPERVISOR = "supervisor"
    SERVER = "server"
    """The process of the job at the server."""
    SITE = "site"
    """The process of the job at a site."""
    TRAINER = "trainer"
    FORK_SERVER = "fork server"
    SERVER_PARENT = "server parent"
    SITE_PARENT = "site parent"
    SITE_PARENTS = "all site parents"
    PARENTS = "all parents"
    SERVER_MACHINE = "server machine"
    """All processes at the server, with what would start them again."""
    SITE_MACHINE = "site machine"
    EVERYTHING = "everything"
    """All processes of the job and of its runtime, the worker too."""

    @property
    def described(self) -> str:
        several = self in (Target.SITE_PARENTS, Target.PARENTS, Target.EVERYTHING)
        return str(self) if several else f"the {self}"


class Kind(StrEnum):
    KILL = "kill"
    FREEZE = "freeze"
    """SIGSTOP, and SIGCONT after longer than `site_timeout`."""
    STOP = "stop"
    """By the kit's stop_fl.sh, and later its start.sh."""
    ABSENCE = "absence"
    """It is not there when the attempt begins."""


class When(StrEnum):
    """The moment that a fault waits for; what its `amount` is."""

    BEFORE = "before the start"
    START = "after the start"
    """Seconds since the attempt began."""
    SUBMISSION = "while the job is submitted"
    """Seconds since the submission was written down, which is before the server has it."""
    TRAINING = "by what is written down"
    """Lines in the server's journal since the attempt began."""
    TRANSFER = "while a result arrives"
    """Seconds since a site's result began to arrive at the server."""
    AVERAGING = "while a round ends"
    """Seconds since the server had all results of a round, before the next global model is on its disk."""
    SAVING = "while a global model is written"
    """Seconds since the file was begun."""
    CHECKPOINT = "while the checkpoint is made"
    """Seconds since the server was done."""
    REGISTRATION = "while the checkpoint is registered"
    """Seconds since the checkpoint was there."""
    NEXT = "after the fault before"
    """Seconds."""


@dataclass(frozen=True)
class Fault:
    """`pick`, from 0 to 1, chooses among several that are this target; it is frozen or away for `seconds`."""

    target: Target
    kind: Kind
    when: When
    amount: float = 0.0
    seconds: float = 0.0
    pick: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.kind} of {self.target.described}{lasting}, {self.when} ({self.amount:.2f})"


@dataclass(frozen=True)
class Place:
    """A runtime as the list of faults sees it: what can be done to whom, and how long things take."""

    faults: dict[tuple[Target, Kind], float]
    """With how often each is chosen."""
    seconds_to_start: float
    seconds_to_end: float
    """From the server's last word to the end of the attempt."""
    operated: bool = False
    """Whether it is for others to start again what is gone."""

    def only(self, target: str | None, kind: str | None) -> "Place":
        """The same with faults of this target and this kind alone. Raises ValueError if there are none."""
        faults = {
            one: often for one, often in self.faults.items() if target in (None, one[0]) and kind in (None, one[1])
        }
        if not faults:
            known = ", ".join(sorted({f"{kind} of {target.described}" for target, kind in self.faults}))
            raise ValueError(f"no {kind or 'fault'} of {target or 'anything'}; there are: {known}")
        return replace(self, faults=faults)


def _each(targets: dict[Target, float], *kinds: Kind) -> dict[tuple[Target, Kind], float]:
    """Kills are chosen twice as often as anything else: a freeze takes its time."""
    return {(t, kind): targets[t] * (2 if kind == Kind.KILL else 1) for t, kind in product(targets, kinds)}


_ANYWHERE = {Target.WORKER: 2.0, Target.SUPERVISOR: 2.0, Target.SERVER: 2.0, Target.SITE: 1.0, Target.TRAINER: 2.0}
_ALIVE_BETWEEN_JOBS = {Target.SERVER_PARENT: 2.0, Target.SITE_PARENT: 2.0, Target.PARENTS: 1.0}
PLACES = {
    "simulator": Place(
        _each({**_ANYWHERE, Target.FORK_SERVER: 1.0, Target.EVERYTHING: 1.0}, Kind.KILL, Kind.FREEZE), 7.0, 6.0
    ),
    "poc": Place(
        _each(
            {**_ANYWHERE, **_ALIVE_BETWEEN_JOBS, Target.SITE_PARENTS: 1.0, Target.EVERYTHING: 1.0},
            *(Kind.KILL, Kind.FREEZE),
        ),
        *(20.0, 12.0),
    ),
    "production": Place(
        {
            **_each({**_ANYWHERE, **_ALIVE_BETWEEN_JOBS, Target.EVERYTHING: 0.5}, Kind.KILL, Kind.FREEZE),
            **_each({Target.SERVER_MACHINE: 1.0, Target.SITE_MACHINE: 2.0}, Kind.KILL),
            **_each({Target.SERVER_PARENT: 1.0, Target.SITE_PARENT: 2.0}, Kind.STOP),
            **_each({Target.SITE_MACHINE: 3.0}, Kind.ABSENCE),
        },
        *(15.0, 12.0),
        operated=True,
    ),
}
_AWAY_WHEN_KILLED = (Target.SERVER_MACHINE, Target.SITE_MACHINE, Target.EVERYTHING)
_MOMENTS = {
    When.START: 6,
    When.SUBMISSION: 1,
    When.TRAINING: 6,
    When.TRANSFER: 2,
    When.AVERAGING: 3,
    When.SAVING: 1,
    When.CHECKPOINT: 1,
    When.REGISTRATION: 1,
}
_AT_THE_STUDY = (Target.SUPERVISOR, Target.WORKER)
_ONLY = {  # whoever is hit by then still has something to lose
    When.SUBMISSION: (*_AT_THE_STUDY, Target.SERVER_PARENT, Target.PARENTS, Target.SERVER_MACHINE, Target.EVERYTHING),
    When.CHECKPOINT: (*_AT_THE_STUDY, Target.SERVER_PARENT, Target.PARENTS, Target.SERVER_MACHINE, Target.EVERYTHING),
    When.REGISTRATION: (Target.WORKER, Target.EVERYTHING),
}
_MOST_LINES = 60
_MOST_FAULTS = 6  # in one execution
_ONE_MORE = 0.5  # the chance that an attempt has one fault more
_SOON = 0.5  # the chance that it comes soon after the one before, and not at a moment of its own


@dataclass(frozen=True)
class Plan:
    """`count` faults of one execution; for each attempt, what is done in it, in that order."""

    count: int
    attempts: Iterator[list[Fault]]


def plan(place: Place, seed: str) -> Plan:
    """The same for the same seed."""
    chance = random.Random(seed)
    return Plan(chance.randint(1, _MOST_FAULTS), _attempts(place, chance))


def _attempts(place: Place, chance: random.Random) -> Iterator[list[Fault]]:
    while True:
        faults = [_at_some_moment(place, chance)]
        while chance.random() < _ONE_MORE:
            faults.append(_soon(place, chance) if chance.random() < _SOON else _at_some_moment(place, chance))
        yield sorted(faults, key=lambda fault: fault.when != When.BEFORE)


def _soon(place: Place, chance: random.Random) -> Fault:
    target, kind = _choice(place.faults, chance)
    if kind == Kind.ABSENCE:
        return _fault(place, target, kind, When.BEFORE, 0.0, chance)
    return _fault(place, target, kind, When.NEXT, chance.uniform(0.0, 2.0), chance)


def _at_some_moment(place: Place, chance: random.Random) -> Fault:
    target, kind = _choice(place.faults, chance)
    if kind == Kind.ABSENCE:
        return _fault(place, target, kind, When.BEFORE, 0.0, chance)
    possible = {when: often for when, often in _MOMENTS.items() if target in _ONLY.get(when, (target,))}
    when = _choice(possible, chance)
    match when:
        case When.START:
            amount = chance.uniform(0.0, place.seconds_to_start)
        case When.SUBMISSION:
            amount = chance.uniform(0.0, 1.0)
        case When.TRAINING:
            amount = chance.randint(1, _MOST_LINES)
        case When.CHECKPOINT:
            amount = chance.uniform(0.0, place.seconds_to_end)
        case _:
            amount = chance.choice((0.0, chance.uniform(0.0, 0.3)))
    return _fault(place, target, kind, when, amount, chance)


def _fault(place: Place, target: Target, kind: Kind, when: When, amount: float, chance: random.Random) -> Fault:
    seconds = chance.uniform(1.1, 1.6) if kind == Kind.FREEZE else chance.uniform(0.0, 2.0)
    lasts = kind != Kind.KILL or (place.operated and target in _AWAY_WHEN_KILLED)
    return Fault(target, kind, when, amount, seconds * SITE_TIMEOUT if lasts else 0.0, chance.random())


def _choice(weights: Mapping[_T, float], chance: random.Random) -> _T:
    (chosen,) = chance.choices(list(weights), [float(weight) for weight in weights.values()])
    return chosen
