"""A site of a real job that lies: the job ends with its name, the round and the cause, after one attempt."""

import textwrap
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current

pytestmark = pytest.mark.slow

LIAR = "site-2"
# What is found as `sitecustomize` changes a module of the liar's when that is imported.
_CHANGES = """
import importlib.abc, importlib.util, sys

NAME, LIAR = {name!r}, {liar!r}


def change(module):
{change}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""
_TRAINER, _TRAINER_LIES = (
    "fedsft_assets.federation.site.trainer",
    """
train = module.SiteTrainer.train

def lying(trainer, received):
    result = train(trainer, received)
    if trainer.plan.site == LIAR and received.current_round == 1:
        {lie}
    return result

module.SiteTrainer.train = lying
""",
)
_SITE, _SITE_LIES = (
    "nvflare.private.fed.client.communicator",
    """
from nvflare.fuel.f3.cellnet import cell
submit, encode = module.Communicator.submit_update, cell.encode_payload

def lying(self, project_name, token, ssid, fl_ctx, client_name, shareable, *others, **more):
    self.sent = getattr(self, "sent", 0) + 1
    if client_name == LIAR and self.sent == 2:
        {lie}
    return submit(self, project_name, token, ssid, fl_ctx, client_name, shareable, *others, **more)

module.Communicator.submit_update = lying
""",
)


def _lying(place: Path, module: str, lies: str, lie: str) -> str:
    """The folder to have on PYTHONPATH."""
    place.mkdir()
    change = textwrap.indent(lies.format(lie=lie), "    ")
    (place / "sitecustomize.py").write_text(_CHANGES.format(name=module, liar=LIAR, change=change))
    return str(place)


@pytest.mark.parametrize(
    ("lie", "cause"),
    [
        ("result.meta['NUM_STEPS_CURRENT_ROUND'] = 10**12", "tokens: found 1000000000000, expected at most "),
        (
            "import numpy; result.meta['records'] = numpy.ones(3)",
            "records: found a ndarray: input should be a valid in",
        ),
        (
            "import torch; result.params = {n: torch.ones(t.shape) for n, t in result.params.items()}",
            "the norm of its update is ",
        ),
        ("result.params['extra'] = [1.0]", "tensors differ from those|extra: found list"),
        (
            "trainer._tell('busy', [p for p in [trainer._step_point(__import__('types').SimpleNamespace("
            "round=9, step=1, samples=1, tokens=1, loss=0.5))]])",
            "a message: train_loss: round: found 10, expected 2",
        ),
        (
            "from fedsft_assets.federation.transport import header; header.StreamHeader.to_bytes = lambda _: b'{}'",
            "model.embedding.weight: the header of its stream is invalid|",
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
    monkeypatch.setenv("PYTHONPATH", _lying(tmp_path / "liar", _TRAINER, _TRAINER_LIES, lie), prepend=":")
    first = _first_line_of_what_ends_it(store, build)
    assert any(first.startswith(f"round 2: {LIAR}: {one}") for one in cause.split("|")), first


@pytest.mark.parametrize(
    ("lie", "cause"),
    [
        (
            "class Odd: pass\n"
            "        from nvflare.fuel.utils import fobs\n"
            "        fobs.register_data_classes(Odd)\n"
            "        shareable['odd'] = Odd()",
            "it cannot be decoded: Type 'sitecustomize.",
        ),
        (
            "cell.encode_payload = lambda message, *a, **k: (message.payload is shareable"
            " and setattr(message, 'payload', [1, 2])) or encode(message, *a, **k)",
            "it is a list without NVFlare's result headers",
        ),
    ],
    ids=["type", "list"],
)
def test_result_that_nvflare_cannot_read_ends_the_job_as_any_other_lie(
    store: Store, build: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str, cause: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", _lying(tmp_path / "liar", _SITE, _SITE_LIES, lie), prepend=":")
    first = _first_line_of_what_ends_it(store, build)
    assert first.startswith(f"round 2: {LIAR}: its result is unreadable: {cause}"), first


def _first_line_of_what_ends_it(store: Store, build: Callable[..., str]) -> str:
    """Of a job that ends after one attempt, and is not to be tried again."""
    job = build("fedavg", rounds=3, max_local_steps=1, max_evaluation_records=2)
    testing, told = split_file(current(store.combined), "testing"), deque[Event]()
    events = run_job(current(store.job_folder(job)), store.flare(job), testing, store.checkpoint(job))
    with pytest.raises(JobError) as error:
        told.extend(events)
    assert not error.value.retryable
    assert not any("restarted" in event.text for event in told if isinstance(event, Progress))
    return str(error.value).splitlines()[0]
