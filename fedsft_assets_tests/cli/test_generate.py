"""The command `fedsft-generate`: what goes to which stream, how it ends, and a person at a terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsft_assets.cli.generate import Conversation, find_archive, write_answer
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.text_generation import ChatTurn, chat_tokens, complete, plain_tokens
from fedsft_assets.model.tokenizer.tiny import EOS, tiny_tokenizer
from fedsft_assets.settings import PROJECT
from fedsft_assets.store import Store, archive_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
SETTINGS = GenerationSettings(max_new_tokens=12)
SHORT, LONG = ("--max-new-tokens", "12"), ("--max-new-tokens", "16000")
_LONGEST_WAIT = 300
_PRESSES, _BETWEEN_PRESSES = 20, 5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the checkpoint of one job: a random model that answers until its wide window is full."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    bpe = tiny_tokenizer(["Why is the sky blue? Because it is, and it is not. " * 3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        **{"vocab_size": len(tokenizer), "n_positions": 1 << 15, "n_layer": 1, "n_embd": 32, "n_head": 2},
        **{"bos_token_id": eos, "eos_token_id": eos},
    )
    lm = GPT2LMHeadModel(config)
    with torch.no_grad():
        lm.transformer.wte.weight[eos] = 0.0
    store = Store(tmp_path_factory.mktemp("home"))
    with made_current(store.checkpoint("endless")) as folder:
        LanguageModel.wrap(lm, tokenizer, max_length=256).save(folder / MODEL_FILE)
    return store.home


@pytest.fixture(scope="module")
def model(home: Path) -> LanguageModel:
    return LanguageModel.load(current(Store(home).checkpoint("endless")) / MODEL_FILE)


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "FEDSFT_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TERM": "dumb"}


@pytest.fixture
def command(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedsft_assets.cli.generate", *arguments],
            env=environment,
            cwd=PROJECT,
            text=True,
            capture_output=True,
            input=stdin,
            check=False,
        )

    return run


def _answer(model: LanguageModel, text: str, settings: GenerationSettings = SETTINGS) -> str:
    tokens = plain_tokens(model.text_encoder, text, model.prompt_template)
    return complete(model.lm.eval(), model.tokenizer, [tokens], settings)[0]


@pytest.mark.slow
def test_standard_output_has_the_answers_and_nothing_else(
    command: Callable[..., subprocess.CompletedProcess[str]], model: LanguageModel
) -> None:
    asked = ("--prompt", "Why?", "--prompt", "-", *SHORT)
    done = command("--checkpoint", "endless", *asked, stdin="Is it blue?")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{_answer(model, 'Why?')}\n\n{_answer(model, 'Is it blue?')}\n"


@pytest.mark.slow
def test_sampling_and_chat_are_asked_for_by_options(
    command: Callable[..., subprocess.CompletedProcess[str]], home: Path, model: LanguageModel
) -> None:
    how = ("--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed", "3", *SHORT)
    archive = current(Store(home).checkpoint("endless")) / MODEL_FILE
    done = command("--checkpoint", str(archive), "--chat", "--prompt", "Why?", *how)
    settings = GenerationSettings(12, temperature=1.5, top_k=40, top_p=0.9, seed=3)
    tokens = chat_tokens(model.tokenizer, [ChatTurn("user", "Why?")])
    assert done.stdout == complete(model.lm.eval(), model.tokenizer, [tokens], settings)[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "a"), "--checkpoint"),
        (("--checkpoint", "endless"), "one of the arguments --prompt --interactive is required"),
        (("--checkpoint", "endless", "--prompt", "a", "--interactive"), "not allowed with argument --prompt"),
        (("--checkpoint", "endless", "--prompt", " "), "--prompt: is blank"),
        (("--checkpoint", "endless", "--prompt", "-"), "--prompt: is blank"),
        (("--checkpoint", "endless", "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens: expected 1 or more"),
        (("--checkpoint", "endless", "--prompt", "a", "--top-p", "2"), "--top-p: expected more than 0 and at most 1"),
        (("--checkpoint", "endless", "--prompt", "a", "--top-k", "5"), "give a --temperature above 0"),
    ],
)
def test_wrong_usage_is_said_on_standard_error(
    command: Callable[..., subprocess.CompletedProcess[str]], arguments: tuple[str, ...], said: str
) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: fedsft-generate")
    assert said in done.stderr.splitlines()[-1]


def test_missing_checkpoint_is_said_with_those_that_there_are(
    command: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    done = command("--checkpoint", "fedavg", "--prompt", "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (f"--checkpoint: 'fedavg' is neither a file nor a checkpoint in {home}; available: endless\n")


def test_nothing_heavy_is_loaded_before_the_usage_is_right(environment: dict[str, str]) -> None:
    script = (
        "import sys\nfrom fedsft_assets.cli.generate import main\n"
        "sys.argv = ['fedsft-generate', '--checkpoint', 'fedavg', '--prompt', 'a']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert 'fedavg' in str(end.code)\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=PROJECT, text=True, capture_output=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "fedsft_assets" in loaded
    assert not loaded & {"torch", "transformers", "nemo", "lightning", "dagster", "tokenizers", "numpy"}


@pytest.mark.slow
def test_answers_need_no_nemo(environment: dict[str, str]) -> None:
    script = (
        "import sys\nfrom fedsft_assets.cli.generate import main\n"
        "sys.argv = ['fedsft-generate', '--checkpoint', 'endless', '--prompt', 'a', '--max-new-tokens', '1']\n"
        "main()\nprint(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=PROJECT, text=True, capture_output=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "torch" in loaded
    assert not loaded & {"nemo", "lightning", "dagster", "nvflare", "mlflow"}


def _endless_answer(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedsft_assets.cli.generate", *("--checkpoint", "endless", "--prompt", "Why?"), *LONG],
        env=environment,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_the_command(environment: dict[str, str]) -> None:
    process = _endless_answer(environment)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.slow
def test_ctrl_c_ends_the_command(environment: dict[str, str]) -> None:
    process = _endless_answer(environment)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (errors, process.returncode) == (b"", 130)


class _Terminal:
    """A person at a terminal, who types and reads."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedsft_assets.cli.generate", *arguments],
            env=environment,
            cwd=PROJECT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509 it execs at once
        )
        os.close(theirs)
        self._unread = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def read_until(self, text: str) -> str:
        """What there is to read up to `text`, and that too. Fails with what was there if it does not come."""
        while text not in self._unread:
            ready, _, _ = select.select([self._ours], [], [], _LONGEST_WAIT)
            assert ready, f"no {text!r} after {self._unread!r}"
            self._unread += self._read()
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def press_until(self, key: str, text: str) -> None:
        """Press a key, and again where nothing comes of it.

        Python's line editor misses a signal that comes after it has shown its prompt and before it waits for a key.
        """
        for _ in range(_PRESSES):
            self.type(key)
            if select.select([self._ours], [], [], _BETWEEN_PRESSES)[0]:
                break
        self.read_until(text)

    def read_rest(self) -> str:
        with suppress(OSError):  # what Linux says once the other end is closed
            while more := self._read():
                self._unread += more
        return self._unread

    def _read(self) -> str:
        return os.read(self._ours, 1 << 16).decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _take_terminal() -> None:
    """Make the pty the new session's own, so that Ctrl-C on it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(environment: dict[str, str]) -> Iterator[Callable[..., _Terminal]]:
    opened: list[_Terminal] = []

    def start(*arguments: str) -> _Terminal:
        opened.append(_Terminal(environment, *arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.slow
def test_a_person_asks_stops_an_answer_asks_the_same_again_and_leaves(
    terminal: Callable[..., _Terminal], model: LanguageModel
) -> None:
    person = terminal("--checkpoint", "endless", "--interactive", *LONG)
    assert "Ctrl-C stops an answer" in person.read_until("> ")
    beginning = _answer(model, "Why?")[:8]
    for keys in ("Why?\r", "\x1b[A\r"):  # the second is the arrow key for the line before
        person.type(keys)
        person.read_until("Why?")
        person.read_until(beginning)
        person.type("\x03")
        person.read_until("\n> ")
    person.press_until("\x03", "\n> ")
    person.type("\x04")
    rest = person.read_rest()
    assert person.process.wait() == 0
    assert "Traceback" not in rest


@pytest.mark.slow
def test_an_empty_line_ends_the_conversation_too(terminal: Callable[..., _Terminal], model: LanguageModel) -> None:
    person = terminal("--checkpoint", "endless", "--interactive", *SHORT)
    person.read_until("> ")
    person.type("Why?\r")
    person.read_until("Why?\r\n")
    assert person.read_until("\r\n> ").removesuffix("\r\n> ") == _answer(model, "Why?")
    person.type("\r")
    person.read_rest()
    assert person.process.wait() == 0


@pytest.mark.slow
def test_questions_can_come_from_a_file_and_answers_go_to_another(
    command: Callable[..., subprocess.CompletedProcess[str]], model: LanguageModel
) -> None:
    done = command("--checkpoint", "endless", "--interactive", *SHORT, stdin="Why?\nIs it?\n")
    assert done.returncode == 0
    assert done.stdout == f"{_answer(model, 'Why?')}\n{_answer(model, 'Is it?')}\n"


def test_an_answer_without_text_is_explained(model: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    silent = LanguageModel.wrap(model.lm, model.tokenizer, max_length=256)
    silent.lm.generation_config.eos_token_id = list(range(len(model.tokenizer)))
    write_answer(Conversation(silent, SETTINGS, chat=False), "Why?")
    assert capsys.readouterr() == ("", "(the answer is empty)\n")


def test_a_chat_remembers_what_was_said(model: LanguageModel) -> None:
    conversation = Conversation(model, SETTINGS, chat=True)
    pieces: list[str] = []
    first = conversation.answer("Why?", pieces.append)
    assert first == "".join(pieces)
    second = conversation.answer("And then?", pieces.append)
    assert first
    turns = [ChatTurn("user", "Why?"), ChatTurn("assistant", first), ChatTurn("user", "And then?")]
    tokens = chat_tokens(model.tokenizer, turns)
    assert [second] == complete(model.lm.eval(), model.tokenizer, [tokens], SETTINGS)
    assert conversation.turns == [*turns, ChatTurn("assistant", second)]


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_came(model: LanguageModel) -> None:
    conversation = Conversation(model, SETTINGS, chat=True)
    pieces: list[str] = []

    def stop_at_the_second(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("Why?", stop_at_the_second)
    assert conversation.turns == [ChatTurn("user", "Why?"), ChatTurn("assistant", "".join(pieces))]


def test_a_message_that_is_too_long_is_not_part_of_the_conversation(model: LanguageModel) -> None:
    conversation = Conversation(model, SETTINGS, chat=True)
    with pytest.raises(ModelError, match="last message alone"):
        conversation.answer("blue? " * 40_000, print)
    assert conversation.turns == []
    assert conversation.answer("Why?", print)


def test_a_checkpoint_is_a_file_a_folder_a_job_or_the_base_model(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ModelError, match="none exists yet; run 'fedsft study' first"):
        find_archive("fedavg", store, "tiny")
    with made_current(store.checkpoint("fedavg")) as folder:
        (folder / MODEL_FILE).touch()
    with made_current(store.base_model("tiny")) as folder:
        (folder / "tiny.nemo").touch()
    archive, base = current(store.checkpoint("fedavg")) / MODEL_FILE, archive_file(current(store.base_model("tiny")))
    assert find_archive(str(archive), store, "tiny") == archive
    assert find_archive(str(archive.parent), store, "tiny") == archive
    assert find_archive("fedavg", store, "tiny") == archive
    assert find_archive("base_model", store, "tiny") == base
    for unknown in ("dolly", "../fedavg", str(tmp_path)):
        with pytest.raises(ModelError, match=r"is neither a file nor a checkpoint .* available: base_model, fedavg$"):
            find_archive(unknown, store, "tiny")
