"""The hub: what arrives, what stays after a break, and which errors say what to do."""

import hashlib
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from fedsft_assets.data.sources.hub import HubFiles, Timing, download, resolve
from fedsft_assets.data.sources.hub_request import HubError
from fedsft_assets.process_env import home_environment
from fedsft_assets_tests.data.hub_server import HubServer, Trouble, commit_of, git_digest

PROJECT = Path(__file__).resolve().parents[3]
MADE_UP = "lab/made-up"
LARGE = "data/large file.parquet"  # a redirect to the store, named by its SHA-256
SMALL = "notes.jsonl"  # served by the hub itself, named by git's SHA-1
PINNED = "0123456789abcdef0123456789abcdef01234567"
FOR_EVER = math.inf
AT_ONCE = Timing(waits=(0, 0, 0, 0))

Pull = Callable[..., HubFiles]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The made-up repository."""
    return _repository(tmp_path / "made-up", seed=0)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({MADE_UP: folder}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def area(tmp_path: Path) -> Path:
    return tmp_path / "area"


@pytest.fixture
def pull(server: HubServer, area: Path, caplog: pytest.LogCaptureFixture) -> Pull:
    """Downloads files of the made-up repository from the server into the area."""
    assert os.environ["HF_ENDPOINT"] == server.url
    caplog.set_level(logging.INFO, "fedsft_assets")

    def pull(*files: str, revision: str = PINNED, timing: Timing = AT_ONCE) -> HubFiles:
        return download(MADE_UP, revision, files, area, timing=timing)

    return pull


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process one that was started in offline mode."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _plain_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings or session of another test or this machine, and nothing written to a home."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(constants, name, name.endswith("TELEMETRY"))
    close_session()
    yield
    close_session()
    assert list(home.iterdir()) == []


def _repository(folder: Path, seed: int) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / LARGE).write_bytes(hashlib.shake_256(b"%d" % seed).digest(1_500_000))
    (folder / SMALL).write_text(f'{{"seed": {seed}}}\n')
    return folder


def _python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs this code."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def _said_by(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate()
    assert process.returncode == 0
    return said


@pytest.mark.parametrize(
    ("repository", "sample", "files"),
    [
        ("tatsu-lab/alpaca", "alpaca", ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"]),
        ("databricks/databricks-dolly-15k", "databricks-dolly-15k", ["databricks-dolly-15k.jsonl"]),
        (
            "OpenAssistant/oasst1",
            "oasst1",
            [
                "data/train-00000-of-00001-b42a775f407cee45.parquet",
                "data/validation-00000-of-00001-134b8fd0c89408b6.parquet",
            ],
        ),
    ],
)
def test_published_files_arrive_as_they_are_at_the_commit_that_a_branch_stands_for(
    repository: str, sample: str, files: list[str], real_samples: Path, area: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer({repository: real_samples / sample}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        served = download(repository, "main", files, area)
    assert served.commit == commit_of(repository)
    assert served.paths == [area / served.commit / file for file in files]
    assert [path.read_bytes() for path in served.paths] == [
        (real_samples / sample / file).read_bytes() for file in files
    ]


def test_only_what_is_asked_for_is_written_and_only_in_the_area(
    pull: Pull, area: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pull(SMALL)
    seen = [path.relative_to(area).as_posix() for path in area.rglob("*") if path.is_file()]
    assert sorted(seen) == [".hub/files/" + f"{PINNED}/{SMALL}.json", ".hub/lock", f"{PINNED}/{SMALL}"]
    assert capfd.readouterr() == ("", "")


def test_a_model_repository_is_another_than_the_dataset_of_its_name(tmp_path: Path, area: Path) -> None:
    model = _repository(tmp_path / "model", seed=7)
    with HubServer({}, models={MADE_UP: model}) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", server.url)
        served = download(MADE_UP, "main", [LARGE], area, kind="model")
        assert resolve(MADE_UP, "main", kind="model") == served.commit
        with pytest.raises(HubError, match=r"datasets/lab/made-up: revision main: .*no such repository"):
            download(MADE_UP, "main", [LARGE], area)
    assert served.paths[0].read_bytes() == (model / LARGE).read_bytes()


def test_an_empty_file_arrives(pull: Pull, folder: Path) -> None:
    (folder / SMALL).write_bytes(b"")
    assert pull(SMALL).paths[0].read_bytes() == b""


@pytest.mark.parametrize("hidden", [{"X-Linked-Size"}, {"X-Linked-Size", "Content-Length"}])
def test_a_hub_behind_a_proxy_that_hides_the_size_serves_too(
    server: HubServer, pull: Pull, folder: Path, hidden: set[str]
) -> None:
    server.hidden = hidden
    server.troubles.append(Trouble(SMALL, cut_at=5))
    assert [path.read_bytes() for path in pull(SMALL, LARGE).paths] == [
        (folder / SMALL).read_bytes(),
        (folder / LARGE).read_bytes(),
    ]
    assert server.ranges(SMALL) == [None, "bytes=5-"]


def test_files_of_two_revisions_are_kept_apart(server: HubServer, pull: Pull, folder: Path, tmp_path: Path) -> None:
    old = pull(SMALL, LARGE, revision="main")
    newer = _repository(tmp_path / "newer", seed=1)
    server.push(MADE_UP, newer)
    new = pull(SMALL, LARGE, revision="main")
    for served, origin in ((old, folder), (new, newer)):
        assert [path.read_bytes() for path in served.paths] == [
            (origin / SMALL).read_bytes(),
            (origin / LARGE).read_bytes(),
        ]


def test_a_file_that_a_new_commit_left_as_it_was_is_neither_transferred_nor_stored_again(
    server: HubServer, pull: Pull, folder: Path
) -> None:
    old = pull(LARGE, revision="main")
    server.push(MADE_UP, folder)
    new = pull(LARGE, revision="main")
    assert new.commit != old.commit
    assert server.ranges(LARGE) == [None]
    assert new.paths[0].samefile(old.paths[0])


@pytest.mark.usefixtures("server")
def test_memory_does_not_grow_with_the_file(folder: Path, area: Path) -> None:
    with (folder / "huge.nemo").open("wb") as file:
        file.truncate(150_000_000)
    grown = _said_by(
        _python(f"""
            from resource import RUSAGE_SELF, getrusage
            from pathlib import Path
            from fedsft_assets.data.sources.hub import download
            def pull(file):
                download("{MADE_UP}", "{PINNED}", [file], Path("{area}"))
                return getrusage(RUSAGE_SELF).ru_maxrss
            before = pull("{LARGE}")
            print(pull("huge.nemo") - before)
        """)
    )
    assert int(grown) < 30_000  # kB


def test_a_full_commit_whose_files_are_here_needs_no_request(server: HubServer, pull: Pull) -> None:
    first = pull(SMALL, LARGE)
    server.requests.clear()
    assert pull(SMALL, LARGE) == first
    assert server.requests == []


def test_a_branch_whose_files_are_here_is_only_looked_up(server: HubServer, pull: Pull) -> None:
    first = pull(SMALL, LARGE, revision="main")
    server.requests.clear()
    assert pull(SMALL, LARGE, revision="main") == first
    assert [request.path for request in server.requests] == [f"/api/datasets/{MADE_UP}/revision/main"]


@pytest.mark.parametrize("damage", ["truncated", "modified", "removed"])
@pytest.mark.parametrize("file", [SMALL, LARGE])
def test_a_damaged_file_is_noticed_and_brought_again(
    server: HubServer, pull: Pull, folder: Path, file: str, damage: str
) -> None:
    path = pull(SMALL, LARGE).paths[[SMALL, LARGE].index(file)]
    content, before = path.read_bytes(), path.stat()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else b"#" + content[1:])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    server.requests.clear()
    pull(SMALL, LARGE)
    assert path.read_bytes() == (folder / file).read_bytes()
    assert {request.path.rpartition("/")[2] for request in server.requests} == {Path(file).name}


def test_a_file_stays_until_a_whole_one_replaces_it(server: HubServer, pull: Pull) -> None:
    path = pull(LARGE).paths[0]
    path.write_bytes(b"what was here")
    for trouble in (Trouble(LARGE, times=FOR_EVER, cut_at=1000), Trouble(LARGE, times=FOR_EVER, wrong=True)):
        server.troubles[:] = [trouble]
        with pytest.raises(HubError):
            pull(LARGE)
        assert path.read_bytes() == b"what was here"


def test_a_record_that_a_crash_left_unreadable_costs_no_transfer(server: HubServer, pull: Pull, area: Path) -> None:
    first = pull(LARGE)
    (area / f".hub/files/{PINNED}/{LARGE}.json").write_bytes(b"")
    assert pull(LARGE) == first
    assert server.ranges(LARGE) == [None]


def test_progress_is_logged_as_often_as_wanted_and_at_the_end(pull: Pull, caplog: pytest.LogCaptureFixture) -> None:
    pull(LARGE, timing=Timing(progress=0))
    assert len(caplog.messages) > 5
    assert all(line.startswith(f"{MADE_UP} · {LARGE}: ") and line.endswith(" of 1.5 MB") for line in caplog.messages)
    assert caplog.messages[-1] == f"{MADE_UP} · {LARGE}: 1.5 of 1.5 MB"


def test_a_fast_transfer_is_one_line(pull: Pull, caplog: pytest.LogCaptureFixture) -> None:
    pull(LARGE)
    assert caplog.messages == [f"{MADE_UP} · {LARGE}: 1.5 of 1.5 MB"]


def test_one_call_goes_on_where_the_transfer_was_cut(
    server: HubServer, pull: Pull, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.troubles += [Trouble(LARGE, cut_at=400_000), Trouble(LARGE, cut_at=900_000)]
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()
    assert server.ranges(LARGE) == [None, "bytes=400000-", "bytes=900000-"]
    assert f"{MADE_UP} · {LARGE}: resuming at 0.4 of 1.5 MB" in caplog.messages


def test_transfers_that_each_bring_something_are_not_counted_as_failures(
    server: HubServer, pull: Pull, folder: Path
) -> None:
    server.troubles += [Trouble(LARGE, cut_at=100_000 * number) for number in range(1, 13)]
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()


def test_when_attempts_are_used_up_the_next_call_asks_for_the_rest(
    server: HubServer, pull: Pull, folder: Path, area: Path
) -> None:
    server.troubles += [Trouble(LARGE, times=FOR_EVER, cut_at=700_000)]
    with pytest.raises(HubError, match=rf"revision {PINNED}: {LARGE}: peer closed .*in a row: 5\); start again"):
        pull(LARGE)
    assert not (area / PINNED / LARGE).exists()
    server.troubles.clear()
    server.requests.clear()
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()
    assert server.ranges(LARGE) == ["bytes=700000-"]


def test_what_arrived_before_a_kill_is_not_asked_for_again(
    server: HubServer, pull: Pull, folder: Path, area: Path
) -> None:
    server.troubles += [Trouble(LARGE, pause=0.15)]
    process = _python(f"""
        import logging, sys
        from pathlib import Path
        from fedsft_assets.data.sources.hub import Timing, download
        logging.basicConfig(stream=sys.stdout)
        logging.getLogger("fedsft_assets").setLevel("INFO")
        download("{MADE_UP}", "{PINNED}", ["{LARGE}"], Path("{area}"), timing=Timing(progress=0))
    """)
    assert process.stdout
    assert " of 1.5 MB" in process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    part = area / ".hub/parts" / LARGE / hashlib.sha256((folder / LARGE).read_bytes()).hexdigest()
    arrived = part.stat().st_size
    assert 0 < arrived < 1_500_000
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()
    assert server.ranges(LARGE) == [None, f"bytes={arrived}-"]


def test_a_server_that_sends_everything_whatever_is_asked_does_no_harm(
    server: HubServer, pull: Pull, folder: Path
) -> None:
    server.troubles += [Trouble(LARGE, cut_at=400_000), Trouble(LARGE, times=FOR_EVER, whole=True)]
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()
    assert server.ranges(LARGE) == [None, "bytes=400000-"]


def test_a_short_page_in_place_of_the_bytes_is_not_waited_out_for_ever(server: HubServer, pull: Pull) -> None:
    server.troubles += [Trouble("/store/", times=FOR_EVER, status=200)]
    with pytest.raises(HubError, match=rf"{LARGE}: the transfer ended after 20 of 1500000 bytes \(.* in a row: 5\)"):
        pull(LARGE)


def test_bytes_that_were_all_here_before_a_kill_do_no_harm_when_the_size_is_not_known(
    server: HubServer, pull: Pull, folder: Path, area: Path
) -> None:
    server.hidden = {"X-Linked-Size", "Content-Length"}
    part = area / ".hub/parts" / LARGE / hashlib.sha256((folder / LARGE).read_bytes()).hexdigest()
    part.parent.mkdir(parents=True)
    part.write_bytes((folder / LARGE).read_bytes())
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()


@pytest.mark.parametrize("size", [1_000_000, 1_500_000, 2_000_000])
def test_bad_bytes_of_an_earlier_call_are_replaced(pull: Pull, folder: Path, area: Path, size: int) -> None:
    part = area / ".hub/parts" / LARGE / hashlib.sha256((folder / LARGE).read_bytes()).hexdigest()
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(size))
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()
    assert not part.exists()


def test_what_arrived_of_an_older_content_is_removed(server: HubServer, pull: Pull, tmp_path: Path, area: Path) -> None:
    server.troubles += [Trouble(LARGE, times=5, cut_at=700_000)]
    with pytest.raises(HubError):
        pull(LARGE, revision="main")
    newer = _repository(tmp_path / "newer", seed=1)
    server.push(MADE_UP, newer)
    assert pull(LARGE, revision="main").paths[0].read_bytes() == (newer / LARGE).read_bytes()
    assert [path for path in (area / ".hub/parts").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("method", "match"), [("GET", "/api/datasets/"), ("HEAD", LARGE), ("GET", LARGE)])
def test_a_hub_that_is_briefly_unwell_is_asked_again(
    server: HubServer, pull: Pull, folder: Path, caplog: pytest.LogCaptureFixture, method: str, match: str
) -> None:
    server.troubles += [Trouble(match, method, times=2, status=503)]
    assert pull(LARGE, revision="main").paths[0].read_bytes() == (folder / LARGE).read_bytes()
    assert sum("127.0.0.1 answered 503 Service Unavailable; retrying in 0 s" in line for line in caplog.messages) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_unwell_is_named_with_its_answer(server: HubServer, pull: Pull, status: int) -> None:
    server.troubles += [Trouble(LARGE, "HEAD", times=FOR_EVER, status=status)]
    with pytest.raises(HubError, match=rf"{LARGE}: 127\.0\.0\.1 answered {status} .*in a row: 5\); start again later"):
        pull(LARGE)
    assert len(server.requests) == 5


def test_the_wait_that_the_hub_asks_for_is_kept(
    server: HubServer, pull: Pull, caplog: pytest.LogCaptureFixture
) -> None:
    server.troubles += [Trouble(LARGE, status=429, headers={"Retry-After": "1"})]
    pull(LARGE)
    assert caplog.messages[0].endswith("answered 429 Too Many Requests and asks to wait 1 s; retrying in 1 s")


def test_a_wait_that_nobody_would_sit_out_is_an_error_at_once(server: HubServer, pull: Pull) -> None:
    server.troubles += [Trouble(LARGE, times=FOR_EVER, status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(
        HubError, match=r"answered 429 .* asks to wait 3600 s .*; start again later; .* or set HF_TOKEN"
    ):
        pull(LARGE)
    assert len([request for request in server.requests if request.method == "GET"]) == 1


@pytest.mark.parametrize("file", [SMALL, LARGE])
def test_wrong_bytes_are_thrown_away_and_asked_for_once_more_from_zero(
    server: HubServer, pull: Pull, folder: Path, file: str
) -> None:
    server.troubles += [Trouble(file, wrong=True)]
    assert pull(file).paths[0].read_bytes() == (folder / file).read_bytes()
    assert server.ranges(file) == [None, None]


@pytest.mark.parametrize("file", [SMALL, LARGE])
def test_bytes_that_stay_wrong_are_refused_with_both_digests(
    server: HubServer, pull: Pull, folder: Path, area: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    content = (folder / file).read_bytes()
    wrong = bytes(byte ^ 1 for byte in content)
    found, named = (
        (git_digest(wrong), git_digest(content))
        if file == SMALL
        else (hashlib.sha256(wrong).hexdigest(), hashlib.sha256(content).hexdigest())
    )
    server.troubles += [Trouble(file, times=FOR_EVER, wrong=True)]
    with pytest.raises(
        HubError, match=rf"{file}: has digest {found}, expected {named} from the hub; the partial file was"
    ):
        pull(file)
    assert len(server.ranges(file)) == 2
    assert [path.name for path in area.rglob("*") if path.is_file()] == ["lock"]
    assert caplog.text.count("restarting download; partial file discarded") == 1


def test_git_and_sha256_digests_are_those_of_the_world(pull: Pull, folder: Path, area: Path) -> None:
    (folder / SMALL).write_bytes(b"hello\n")
    (folder / LARGE).write_bytes(b"hello\n")
    pull(SMALL, LARGE)
    records = [(area / f".hub/files/{PINNED}/{file}.json").read_text() for file in (SMALL, LARGE)]
    assert "ce013625030ba8dba906f756967f9e9ca394464a" in records[0]  # echo hello | git hash-object --stdin
    assert "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03" in records[1]  # … | sha256sum


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"ETag": '"5f3759df"', "X-Repo-Commit": PINNED},
        {"ETag": f'"{"a" * 40}"'},
    ],
)
def test_an_answer_without_the_commit_and_a_digest_is_not_taken_for_a_hub(
    server: HubServer, pull: Pull, headers: dict[str, str]
) -> None:
    server.troubles += [Trouble(SMALL, "HEAD", status=200, headers=headers)]
    with pytest.raises(HubError, match=rf"{SMALL}: expected a file of commit {PINNED} .* HF_ENDPOINT is a hub"):
        pull(SMALL)


def test_a_mirror_may_serve_a_commit_under_one_of_its_own_and_that_is_logged(
    server: HubServer, pull: Pull, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = (folder / SMALL).read_bytes()
    headers = {"ETag": f'"{git_digest(content)}"', "X-Repo-Commit": "b" * 40, "X-Linked-Size": str(len(content))}
    server.troubles += [Trouble(SMALL, "HEAD", status=200, headers=headers)]
    assert pull(SMALL).paths[0].read_bytes() == content
    assert any(f"requested commit {PINNED}, served as {'b' * 40}" in line for line in caplog.messages)


def test_a_page_in_place_of_a_commit_is_not_taken_for_a_hub(server: HubServer, pull: Pull) -> None:
    server.troubles += [Trouble("/api/", status=200)]
    with pytest.raises(HubError, match=r"returned no commit, found '<html>trouble</html>'; check HF_ENDPOINT"):
        pull(SMALL, revision="main")


def test_endpoint_and_token_count_as_they_are_at_the_call(
    server: HubServer, pull: Pull, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull(SMALL)
    with HubServer({MADE_UP: folder}) as private:
        private.token = "hf_secret"
        monkeypatch.setenv("HF_ENDPOINT", f"{private.url}/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert resolve(MADE_UP, "main") == commit_of(MADE_UP)
        pull(SMALL, LARGE)
    assert not [request for request in server.requests if request.authorization or "large" in request.path]


def test_the_token_does_not_go_to_the_store(server: HubServer, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(LARGE)
    sent = {(request.path.split("/")[1], request.authorization) for request in server.requests}
    assert sent == {("datasets", "Bearer hf_secret"), ("store", None)}


def test_a_process_that_started_offline_takes_what_is_here_and_sends_no_request(
    server: HubServer, pull: Pull, area: Path
) -> None:
    pull(SMALL)
    server.requests.clear()
    said = _said_by(
        _python(
            f"""
            from pathlib import Path
            from fedsft_assets.data.sources.hub import download
            print(download("{MADE_UP}", "{PINNED}", ["{SMALL}"], Path("{area}")).commit)
            """,
            HF_HUB_OFFLINE="yes",
        )
    )
    assert (said.strip(), server.requests) == (PINNED, [])


def test_a_process_of_a_home_requests_nothing_but_the_files(server: HubServer, area: Path, tmp_path: Path) -> None:
    _said_by(
        _python(
            f"""
            from pathlib import Path
            from fedsft_assets.data.sources.hub import download
            download("{MADE_UP}", "main", ["{SMALL}"], Path("{area}"))
            """,
            **home_environment(tmp_path / "study"),
        )
    )
    assert {request.path.split("/")[-1] for request in server.requests} == {"main", SMALL}
    assert not (tmp_path / "study").exists()


def test_importing_it_imports_neither_the_hub_library_nor_anything_heavy() -> None:
    said = _said_by(_python("import sys, fedsft_assets.data.sources.hub; print(*sys.modules)"))
    assert not {"huggingface_hub", "httpx2", "torch", "dagster", "pyarrow"} & set(said.split())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("HF_ENDPOINT", "hub.example", "HF_ENDPOINT: 'hub.example' is not a URL"),
        ("HF_TOKEN", "hf_a\u2026b", "HF_TOKEN: has characters that no token has; copy it again"),
        ("HTTP_PROXY", "gopher://x", "cannot connect: .*gopher.*; check the proxy variables"),
        ("SSL_CERT_FILE", "/nowhere", "cannot connect: .*; check the proxy variables and SSL_CERT_FILE"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(
    pull: Pull, monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(HubError, match=message):
        pull(SMALL)


def test_password_of_a_mirror_opens_it_and_is_shown_nowhere(
    server: HubServer,
    pull: Pull,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted-3141")
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("://", "://me:mirror-3141@"))
    server.troubles += [Trouble(SMALL, "HEAD", status=503), Trouble(SMALL, cut_at=5)]
    assert pull(SMALL).commit == PINNED
    with pytest.raises(HubError) as missing:
        pull("no-such-file")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:mirror-3141@127.0.0.1:1")
    with pytest.raises(HubError) as down:
        pull(LARGE)
    said = [*caplog.messages, *capfd.readouterr()]
    for error in (missing.value, down.value):
        one: BaseException | None = error
        while one is not None:
            said += [str(one), repr(one)]
            one = one.__cause__
    assert sum("retrying" in text for text in said) == 6
    assert not any(secret in text for text in said for secret in ("mirror-3141", "hf_planted-3141"))


def test_an_endpoint_that_is_elsewhere_is_named_and_the_token_does_not_follow(
    server: HubServer, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.troubles += [Trouble(SMALL, "HEAD", status=302, headers={"Location": f"{server.store}/elsewhere"})]
    with pytest.raises(HubError, match=r"found commit None and ETag '' at localhost; check that HF_ENDPOINT is a hub"):
        pull(SMALL)
    assert len(server.requests) == 1


@pytest.mark.parametrize("revision", [PINNED, "main"])
def test_files_that_are_here_are_used_without_a_request(
    server: HubServer, pull: Pull, go_offline: Callable[[], None], revision: str
) -> None:
    first = pull(SMALL, LARGE, revision=revision)
    server.requests.clear()
    go_offline()
    assert pull(LARGE, SMALL, revision=revision).paths == first.paths[::-1]
    assert server.requests == []


def test_files_that_are_not_here_whole_are_named(
    server: HubServer, pull: Pull, area: Path, go_offline: Callable[[], None]
) -> None:
    pull(SMALL, LARGE, revision="main").paths[1].write_bytes(b"damaged")
    server.requests.clear()
    go_offline()
    with pytest.raises(HubError, match=rf"is set, and {area} has no complete {LARGE}, README\.md; unset HF_HUB"):
        pull(SMALL, LARGE, "README.md", revision="main")
    assert server.requests == []


def test_a_branch_stands_for_its_newest_commit_of_which_every_file_is_here(
    server: HubServer, pull: Pull, tmp_path: Path, go_offline: Callable[[], None]
) -> None:
    old = pull(SMALL, LARGE, revision="main")
    server.push(MADE_UP, _repository(tmp_path / "newer", seed=1))
    new = pull(SMALL, revision="main")
    server.troubles += [Trouble(LARGE, times=FOR_EVER, cut_at=1000)]
    with pytest.raises(HubError):
        pull(SMALL, LARGE, revision="main")
    go_offline()
    assert pull(SMALL, revision="main") == new
    assert pull(SMALL, LARGE, revision="main") == old


def test_a_branch_of_another_repository_in_the_same_area_is_not_meant(
    pull: Pull, area: Path, go_offline: Callable[[], None]
) -> None:
    pull(SMALL, revision="main")
    go_offline()
    with pytest.raises(HubError, match=rf"datasets/lab/other: revision main: .* has no complete {SMALL}"):
        download("lab/other", "main", [SMALL], area)


def test_a_branch_is_not_resolved_and_a_commit_is(server: HubServer, go_offline: Callable[[], None]) -> None:
    go_offline()
    assert resolve(MADE_UP, PINNED) == PINNED
    with pytest.raises(HubError, match="revision main: HF_HUB_OFFLINE is set, so it cannot be looked up"):
        resolve(MADE_UP, "main")
    assert server.requests == []


def test_without_a_token_the_advice_is_to_set_one(server: HubServer, pull: Pull) -> None:
    server.token = "hf_secret"
    with pytest.raises(HubError, match=r"answered 401 .*HF_TOKEN is not set; correct the name, or set HF_TOKEN to"):
        pull(SMALL)


def test_with_a_token_the_advice_is_to_check_it(server: HubServer, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match=r"answered 401 .*HF_TOKEN is set but grants no access; .* a valid tok") as info:
        pull(SMALL)
    assert "hf_expired" not in str(info.value)


@pytest.mark.parametrize(("token", "status"), [("is not set", 401), ("is set but grants no access", 403)])
def test_gated_access_asks_for_the_terms_and_a_token_that_has_accepted_them(
    server: HubServer, pull: Pull, monkeypatch: pytest.MonkeyPatch, token: str, status: int
) -> None:
    server.gated = True
    if status == 403:
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = (
        rf"answered {status} .*: access is gated, and HF_TOKEN {token}; accept its terms at .*lab/made-up, and set"
    )
    with pytest.raises(HubError, match=message):
        pull(SMALL)


def test_a_store_that_refuses_is_not_taken_for_a_hub_that_does(server: HubServer, pull: Pull) -> None:
    server.troubles += [Trouble("/store/", status=403)]
    with pytest.raises(HubError, match=rf"{LARGE}: localhost answered 403 Forbidden; see .*lab/made-up, then"):
        pull(LARGE)


@pytest.mark.usefixtures("server")
def test_a_missing_repository_is_named(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with pytest.raises(HubError, match=r"/datasets/lab/gone: revision main: there is no such dataset repository"):
        download("lab/gone", "main", [SMALL], area)


def test_a_missing_revision_is_named(pull: Pull) -> None:
    with pytest.raises(HubError, match=r"revision feature/x: the repository has no such revision"):
        pull(SMALL, revision="feature/x")


def test_a_missing_file_is_named(pull: Pull) -> None:
    with pytest.raises(HubError, match=rf"revision {PINNED}: gone\.jsonl: the repository has no such file"):
        pull(SMALL, "gone.jsonl")


@pytest.mark.parametrize("repository", ["datasets/lab/made-up", "lab made-up", "lab/a--b"])
def test_a_name_that_no_repository_has_is_refused(server: HubServer, area: Path, repository: str) -> None:
    with pytest.raises(HubError, match="is not a valid repository name"):
        download(repository, "main", [SMALL], area)
    assert server.requests == []


@pytest.mark.parametrize("file", ["../outside", "/etc/passwd", "data//x", "data/../../x", ""])
def test_a_path_that_leads_out_of_the_area_is_refused(server: HubServer, pull: Pull, file: str) -> None:
    with pytest.raises(HubError, match="is not a path inside a repository"):
        pull(file)
    assert server.requests == []


def test_a_hub_that_refuses_connections_is_named(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer({}) as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    message = rf"revision main: .*Connection refused .* check the network, .*HF_ENDPOINT \({gone.url}\)"
    with pytest.raises(HubError, match=message):
        resolve(MADE_UP, "main")
    with pytest.raises(HubError, match=message):
        download(MADE_UP, "main", [SMALL], area)


def test_a_host_that_no_one_knows_is_named(pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    with pytest.raises(HubError, match=r"check the network, .*HF_ENDPOINT \(http://no-such-host\.invalid\)"):
        pull(SMALL)


def test_a_full_disk_is_said_and_leaves_nothing_under_the_files_name(pull: Pull, folder: Path, area: Path) -> None:
    part = area / ".hub/parts" / LARGE / hashlib.sha256((folder / LARGE).read_bytes()).hexdigest()
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(
        HubError, match=rf"{area} cannot be used: No space left on device; free some disk space, then start"
    ):
        pull(LARGE)
    assert not (area / PINNED).exists()
    part.unlink()
    assert pull(LARGE).paths[0].read_bytes() == (folder / LARGE).read_bytes()


def test_an_area_that_cannot_be_a_folder_is_said(pull: Pull, area: Path) -> None:
    area.write_text("a file")
    with pytest.raises(HubError, match=rf"{area} cannot be used: .*; make it a writable folder"):
        pull(SMALL)


def test_the_second_waits_and_takes_what_the_first_brought(
    server: HubServer, pull: Pull, folder: Path, area: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.troubles += [Trouble(LARGE, times=FOR_EVER, pause=0.02)]
    served: list[HubFiles] = []
    calls = [threading.Thread(target=lambda: served.append(pull(LARGE))) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert [files.paths[0].read_bytes() for files in served] == [(folder / LARGE).read_bytes()] * 2
    assert server.ranges(LARGE) == [None]
    assert f"waiting for another download into {area}" in caplog.messages
