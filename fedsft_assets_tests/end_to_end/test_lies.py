"""A site of a real job that lies: the job ends with its name, the round and the cause, after one attempt."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.federation.events import Event, JobError
from fedsft_assets.federation.journal import Progress
from fedsft_assets.federation.launch import run_job
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current

pytestmark = pytest.mark.slow

LIAR = "site-2"
# What is found as `sitecustomize` changes the module of the trainer when that is imported, at one site.
_CHANGES_THE_TRAINER = """
import importlib.abc, importlib.util, sys

NAME = "fedsft_assets.federation.site_trainer"


def lie(trainer, result):
{lie}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            train = module.SiteTrainer.train

            def lying(trainer, received):
                result = train(trainer, received)
                if trainer.plan.site == {liar!r} and received.current_round == 1:
                    lie(trainer, result)
                return result

            module.SiteTrainer.train = lying

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("lie", "cause"),
    [
        ("result.meta['NUM_STEPS_CURRENT_ROUND'] = 10**12", "tokens: found 1000000000000, expected at most "),
        ("import numpy; result.meta['points'] = numpy.ones(3)", "points: found a ndarray: input should be a valid li"),
        ("import torch; result.params = {n: torch.ones(t.shape) for n, t in result.params.items()}", "its update has "),
        ("result.params['extra'] = [1.0]", "tensors differ from those|extra: found list"),
        (
            "trainer._tell('busy', [p for p in [trainer._step_point(__import__('types').SimpleNamespace("
            "round=9, step=1, samples=1, tokens=1, loss=0.5))]])",
            "a message: train_loss: round: found 10, expected abo",
        ),
        (
            "from fedsft_assets.federation.stream_contents import Contents; Contents.to_bytes = lambda _: b'{}'",
            "model.embedding.weight: its stream has no contents that can be read|",
        ),
    ],
    ids=["tokens", "types", "update", "list", "words", "stream"],
)
def test_lie_ends_the_job_at_once_and_is_the_first_thing_that_is_said(
    store: Store,
    build: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lie: str,
    cause: str,
) -> None:
    path = tmp_path / "liar"
    path.mkdir()
    (path / "sitecustomize.py").write_text(_CHANGES_THE_TRAINER.format(lie=f"    {lie}", liar=LIAR))
    monkeypatch.setenv("PYTHONPATH", str(path), prepend=":")
    job = build("fedavg", rounds=3, max_local_steps=1, max_evaluation_records=2)
    testing, told = split_file(current(store.combined), "testing"), deque[Event]()
    events = run_job(current(store.job_folder(job)), store.flare(job), testing, store.checkpoint(job))
    with pytest.raises(JobError) as error:
        told.extend(events)
    first = str(error.value).splitlines()[0]
    assert any(first.startswith(f"round 2: {LIAR}: {one}") for one in cause.split("|")), first
    assert not error.value.lost
    assert not any("started again" in event.text for event in told if isinstance(event, Progress))
