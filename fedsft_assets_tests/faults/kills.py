"""What is killed in an attempt, and when: moments over its whole life, from a seeded list without an end."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

WORKER, SUPERVISOR, SERVER, SITE, TRAINER = "worker", "supervisor", "server", "site", "trainer"
FORK_SERVER = "fork server"


class When(StrEnum):
    """The moment that a kill waits for; what its `amount` is."""

    START = "after the start"
    """Seconds since the attempt began."""
    SUBMISSION = "while the job is submitted"
    """Seconds since the submission was written down, which is before the server has it."""
    LINES = "by what is written down"
    """Lines in the server's journal since the attempt began."""
    RESULT = "while a result arrives"
    """Seconds since a site's result began to arrive at the server."""
    ROUND = "while a round ends"
    """Seconds since the server had all results of a round, before the next global model is on its disk."""
    CHECKPOINT = "while the checkpoint is made"
    """Seconds since the server was done."""
    REGISTRATION = "while the checkpoint is registered"
    """Seconds since the checkpoint was there."""
    NEXT = "after the kill before"
    """Seconds."""


@dataclass(frozen=True)
class Kill:
    """`pick`, from 0 to 1, chooses among several processes that are this victim."""

    victim: str
    when: When
    amount: float
    pick: float = 0.0

    def __str__(self) -> str:
        return f"the {self.victim} {self.when} ({self.amount:.2f})"


@dataclass(frozen=True)
class Place:
    """A runtime as the list of kills sees it: who is there to be killed, and how long things take."""

    victims: dict[str, float]
    """With how often each is chosen."""
    seconds_to_start: float
    seconds_to_end: float
    """From the server's last word to the end of the attempt."""


PLACES = {
    "simulator": Place({WORKER: 2, SUPERVISOR: 2, SERVER: 3, SITE: 1, TRAINER: 3, FORK_SERVER: 1}, 7.0, 6.0),
    "poc": Place({WORKER: 3, SUPERVISOR: 4, SERVER: 2, SITE: 1, TRAINER: 2}, 20.0, 12.0),
}
_MOMENTS = {
    When.START: 6,
    When.SUBMISSION: 1,
    When.LINES: 6,
    When.RESULT: 2,
    When.ROUND: 3,
    When.CHECKPOINT: 1,
    When.REGISTRATION: 1,
}
_ONLY = {  # whoever else is there by then
    When.SUBMISSION: (SUPERVISOR, WORKER),
    When.CHECKPOINT: (SUPERVISOR, WORKER),
    When.REGISTRATION: (WORKER,),
}
_MOST_LINES = 60
_ONE_MORE = 0.6  # the chance that an attempt has one kill more
_SOON = 0.5  # the chance that it comes soon after the one before, and not at a moment of its own


def random_kills(place: Place, seed: int) -> Iterator[list[Kill]]:
    """For each attempt, what is killed in it, in that order."""
    chance = random.Random(seed)
    while True:
        kills = [_at_some_moment(place, chance)]
        while chance.random() < _ONE_MORE:
            kills.append(_soon(place, chance) if chance.random() < _SOON else _at_some_moment(place, chance))
        yield kills


def _soon(place: Place, chance: random.Random) -> Kill:
    return Kill(_choice(place.victims, chance), When.NEXT, chance.uniform(0.0, 2.0), chance.random())


def _at_some_moment(place: Place, chance: random.Random) -> Kill:
    when = When(_choice(_MOMENTS, chance))
    victim = chance.choice(_ONLY[when]) if when in _ONLY else _choice(place.victims, chance)
    match when:
        case When.START:
            amount = chance.uniform(0.0, place.seconds_to_start)
        case When.SUBMISSION:
            amount = chance.uniform(0.0, 1.0)
        case When.LINES:
            amount = chance.randint(1, _MOST_LINES)
        case When.CHECKPOINT:
            amount = chance.uniform(0.0, place.seconds_to_end)
        case _:
            amount = chance.choice((0.0, chance.uniform(0.0, 0.3)))
    return Kill(victim, when, amount, chance.random())


def _choice(weights: dict[str, float] | dict[When, int], chance: random.Random) -> str:
    (chosen,) = chance.choices(list(weights), [float(weight) for weight in weights.values()])
    return str(chosen)
