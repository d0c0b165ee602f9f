"""What is a secret is known by its name and in a URL, and no text that is redacted has one."""

import pytest

from fedsft_assets.credentials import (
    credentials_in,
    has_credentials,
    is_secret_name,
    redact,
    redact_error,
    redacted,
    without_credentials,
)


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"),
        *("AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS", "WANDB_API_KEY", "OPENAI_API_KEY", "MYSQL_PWD"),
        *("MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "SENTRY_DSN", "db_password", "NVFLARE_JOB_AUTH_TOKEN"),
        *("MLFLOW_FLASK_SERVER_SECRET_KEY", "MY_APIKEY", "SSHPASSWORD"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "FEDSFT_PASS_ENVIRONMENT", "FEDSFT_HOME", "PYTHONPATH"),
        *("FEDSFT_JOB_MARK", "MLFLOW_TRACKING_URI", "PYTHONHASHSEED", "OMP_NUM_THREADS", "KMP_AFFINITY"),
    ],
)
def test_other_names_are_none(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("url", "public", "credentials"),
    [
        ("http://tracking:5000/path", "http://tracking:5000/path", None),
        ("http://me:secret@tracking:5000/path", "http://tracking:5000/path", ("me", "secret")),
        ("https://me:p%40ss%2Fword@host", "https://host", ("me", "p@ss/word")),
        ("https://me:p@ss@host/a@b", "https://host/a@b", ("me", "p@ss")),
        ("https://only-a-token@host/", "https://host/", ("only-a-token", "")),
        ("http://host:5000/a@b", "http://host:5000/a@b", None),
        ("postgresql://me:se/c#r?t@db:5432/mlflow", "postgresql://db:5432/mlflow", ("me", "se/c#r?t")),
        ("mysql+pymysql://me:secret@db/x?charset=utf8", "mysql+pymysql://db/x?charset=utf8", ("me", "secret")),
        ("postgresql://db/x?user=me&password=secret", "postgresql://db/x?user=me", None),
        ("http://host/?token=secret", "http://host/", None),
        ("sqlite:////home/a@b:c@d/mlflow.db", "sqlite:////home/a@b:c@d/mlflow.db", None),
        ("databricks://profile", "databricks://profile", None),
    ],
)
def test_urls_without_what_opens_them(url: str, public: str, credentials: tuple[str, str] | None) -> None:
    assert without_credentials(url) == public
    assert credentials_in(url) == credentials
    assert has_credentials(url) == (url != public)
    assert without_credentials(public) == public


def test_no_secret_of_the_environment_is_left_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a/to ken+1")
    monkeypatch.setenv("A_DATABASE", "postgresql://me:pass%40word@db/x")
    monkeypatch.setenv("SHORT_KEY", "no")
    monkeypatch.setenv("all_proxy", "me:proxy-word@host:3128")
    said = (
        "no: 'a/to ken+1', a%2Fto%20ken%2B1, a/to%20ken%2B1 and a%2Fto+ken%2B1 of pass@word and pass%40word, as Basic"
        " bWU6cGFzc0B3b3Jk, proxy-word"
    )
    assert redact(said) == "no: '***', ***, *** and *** of *** and ***, as Basic ***, ***"


def test_what_urls_say_by_themselves_is_hidden_wherever_they_stand() -> None:
    assert redact("cannot reach 'http://me:secret@host:1/x': url: /y?a=1&api_key=abc (refused)") == (
        "cannot reach 'http://***@host:1/x': url: /y?a=1&api_key=*** (refused)"
    )
    plain = (
        "/home/me@work:x/jobs/a.yaml: sites.site-2.dataset: 'doly' is not a training dataset;"
        " expected one of alpaca, http://host/a@b"
    )
    assert redact(plain) == plain


def test_errors_and_what_they_came_from_say_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "the-token")

    class TellingError(Exception):
        def __init__(self, message: str) -> None:
            self.message = message
            super().__init__(message, 3)

    error = TellingError("with the-token")
    error.__cause__ = FileNotFoundError(2, "No such file", "http://me:secret@host/x")
    redact_error(error)
    assert (error.args, error.message) == (("with ***", 3), "with ***")
    assert str(error.__cause__) == "[Errno 2] No such file: 'http://***@host/x'"


def test_a_function_or_a_block_can_be_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "the-token")

    @redacted()
    def fails() -> None:
        raise ValueError("with the-token")

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^with \*\*\*$"):
            fails()
