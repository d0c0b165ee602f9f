"""The aliases in MLflow's registry follow a decision: once, as decided, and when the server is back."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.store import Store
from fedsft_assets.tracking import CHALLENGER, CHAMPION, Outbox, Tracking
from fedsft_assets.tracking.promotion import DECISION_TAG, Promotion, Promotions
from fedsft_assets_tests.tracking.examples import finish, track
from fedsft_assets_tests.tracking.server import HOST, Proxy, TrackingServer, unused_port

MODEL = "fedsft-tiny"
PROMOTION = Promotion(MODEL, "s" * 64, None, "b", "a", {"a": "a is worse", "b": "b is better"})
NOWHERE = Tracking(f"http://{HOST}:{unused_port()}", patience=0.1)


def _register(tracking: Tracking, *digests: str) -> None:
    client = tracking.client()
    client.create_registered_model(MODEL)
    for digest in digests:
        tags = {"digest": digest, "archive": f"/home/checkpoints/job/{digest}/model.nemo"}
        client.create_model_version(MODEL, f"s3://models/{digest}", tags=tags, await_creation_for=0)


def _aliases(tracking: Tracking) -> dict[str, str]:
    return {alias: str(version) for alias, version in tracking.client().get_registered_model(MODEL).aliases.items()}


def _reasons(tracking: Tracking) -> dict[str, str]:
    found = tracking.client().search_model_versions(f"name = '{MODEL}'")
    return {version.tags["digest"]: version.tags.get(DECISION_TAG, "") for version in found}


def _deliver(tracking: Tracking, store: Store, *promotions: Promotion) -> None:
    for promotion in promotions:
        Promotions(store.outbox).put(promotion)
        assert Outbox(store.outbox).deliver(tracking) == []
    assert Outbox(store.outbox).is_empty


def test_aliases_and_reasons_are_as_decided(tracking: Tracking, store: Store) -> None:
    _register(tracking, "a", "b", "c")
    assert Promotions(store.outbox).champion(tracking, MODEL) is None
    _deliver(tracking, store, PROMOTION)
    assert _aliases(tracking) == {CHAMPION: "2", CHALLENGER: "1"}
    split = " [split ssssssssssss]"
    assert _reasons(tracking) == {"a": f"a is worse{split}", "b": f"b is better{split}", "c": ""}
    champion = Promotions(store.outbox).champion(tracking, MODEL)
    assert champion is not None
    assert (champion.version, champion.digest) == ("2", "b")
    _deliver(tracking, store, Promotion(MODEL, "s" * 64, "b", "c", None, {"c": "c is better"}))
    assert _aliases(tracking) == {CHAMPION: "3"}


def test_of_versions_with_the_same_weights_the_newest_is_meant_and_the_champion_stays_where_it_is(
    tracking: Tracking, store: Store
) -> None:
    _register(tracking, "b", "a", "b")
    _deliver(tracking, store, PROMOTION)
    assert _aliases(tracking) == {CHAMPION: "3", CHALLENGER: "2"}
    tracking.client().set_registered_model_alias(MODEL, CHAMPION, "1")
    _deliver(tracking, store, replace(PROMOTION, over="b"))
    assert _aliases(tracking) == {CHAMPION: "1", CHALLENGER: "2"}


def test_champion_that_was_set_meanwhile_is_not_replaced(tracking: Tracking, store: Store) -> None:
    _register(tracking, "a", "b", "c")
    tracking.client().set_registered_model_alias(MODEL, CHAMPION, "3")
    _deliver(tracking, store, PROMOTION)
    assert _aliases(tracking) == {CHAMPION: "3", CHALLENGER: "2"}
    assert "compare again" in _reasons(tracking)["b"]


def test_decision_waits_for_the_checkpoints_that_it_is_about(
    tracking: Tracking, store: Store, checkpoint: Path
) -> None:
    with track(NOWHERE, store) as job:
        finish(job, checkpoint)
    outbox = Outbox(store.outbox)
    waits = outbox.get(outbox.entries()[0])
    assert waits is not None
    assert waits.ending.registration is not None
    digest = waits.ending.registration.digest
    Promotions(store.outbox).put(replace(PROMOTION, champion=digest, challenger=None, reasons={digest: "better"}))
    (left,) = outbox.deliver_promotions(tracking)
    assert "not registered yet" in left.reason
    assert outbox.deliver(tracking) == []  # the checkpoint first, then the decision
    assert _aliases(tracking) == {CHAMPION: "1"}
    assert outbox.is_empty


@pytest.mark.slow
def test_decision_is_delivered_when_the_server_is_back(running_server: TrackingServer, store: Store) -> None:
    tracking, outbox = Tracking(running_server.url), Outbox(store.outbox)
    _register(tracking, "a", "b", "c")
    tracking.client().set_registered_model_alias(MODEL, CHAMPION, "3")
    known = Promotions(store.outbox).champion(tracking, MODEL)
    assert Promotions(store.outbox).champion(NOWHERE, MODEL) == known  # as it was known
    Promotions(store.outbox).put(replace(PROMOTION, over="c"))
    (left,) = outbox.deliver(NOWHERE)
    assert left.job == MODEL
    assert not outbox.is_empty
    assert outbox.deliver(tracking) == []
    assert _aliases(tracking) == {CHAMPION: "2", CHALLENGER: "1"}


@pytest.mark.slow
def test_lost_answers_change_nothing(running_server: TrackingServer, store: Store) -> None:
    """Each change is made; the first, fourth and so on of each kind is never answered."""
    tracking, outbox, seen = Tracking(running_server.url), Outbox(store.outbox), dict[str, int]()
    _register(tracking, "a", "b")

    def forward(line: str) -> str:
        seen[line] = seen.get(line, 0) + 1
        return "drop" if seen[line] % 3 == 1 and not line.startswith("GET ") else "pass"

    Promotions(store.outbox).put(PROMOTION)
    with Proxy(running_server.port, forward) as proxy:
        while outbox.deliver(Tracking(proxy.url)):
            assert len(proxy.requests) < 100
    assert _aliases(tracking) == {CHAMPION: "2", CHALLENGER: "1"}


def test_later_decision_takes_the_place_of_one_that_waits(tracking: Tracking, store: Store) -> None:
    _register(tracking, "a", "b", "c")
    Promotions(store.outbox).put(PROMOTION)
    _deliver(tracking, store, replace(PROMOTION, champion="c", reasons={"c": "c is better"}))
    assert _aliases(tracking) == {CHAMPION: "3", CHALLENGER: "1"}
