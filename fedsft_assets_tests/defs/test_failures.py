"""What Dagster keeps of a step that failed: the words for a person, and no secret, whatever went wrong."""

import dagster as dg
import pytest

from fedsft_assets.defs.failures import as_dagster_failure


class _KnownError(ValueError):
    retryable = True


def _fails(error: Exception) -> dg.AssetsDefinition:
    @dg.asset
    def failing() -> None:
        with as_dagster_failure(_KnownError):
            raise error

    return failing


@pytest.mark.parametrize("kind", [_KnownError, RuntimeError])
def test_no_error_of_a_step_is_kept_with_a_secret(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "planted-3141")
    error = kind("planted-3141 at http://me:planted@host/?token=planted")
    error.__cause__ = OSError("planted-3141")
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([_fails(error)], instance=instance, raise_on_error=False)
        records = instance.get_records_for_run(result.run_id).records
    kept = [record.event_log_entry.to_json() for record in records]
    assert any("*** at http://***@host/?token=***" in text for text in kept if "STEP_FAILURE" in text)
    assert not any("planted" in text for text in kept)


def test_words_for_a_person_are_those_of_the_error_and_what_died_may_be_tried_again() -> None:
    with pytest.raises(dg.Failure) as failure, as_dagster_failure(_KnownError):
        raise _KnownError("what to do")
    assert (failure.value.description, failure.value.allow_retries) == ("what to do", True)
