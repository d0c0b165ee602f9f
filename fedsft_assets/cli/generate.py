"""The command `fedsft-generate`: answers of a checkpoint in a terminal, as they come.

Standard output gets the answers and nothing else; all that is said about them goes to standard error.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.home import close_home
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import Settings
from fedsft_assets.specs.model_preset import model_preset
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import Store, archive_file
from fedsft_assets.versions import CURRENT, current

if TYPE_CHECKING:
    from fedsft_assets.model.language_model import LanguageModel
    from fedsft_assets.model.text_generation import ChatTurn

_BASE_MODEL = "base_model"
_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended
_CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")


@dataclass
class Conversation:
    """A model, how it answers, and, if it chats, what was said so far."""

    model: "LanguageModel"
    settings: GenerationSettings
    chat: bool
    turns: "list[ChatTurn]" = field(default_factory=list)

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Hand the model's answer to `write` in pieces, then return it; how far it came is part of the conversation.

        Raises ModelError, and what `write` raises.
        """
        from fedsft_assets.model.text_generation import ChatTurn, chat_tokens, plain_tokens, prompt_room, stream

        model = self.model
        turns = [*self.turns, ChatTurn("user", text)]
        if self.chat:
            tokens = chat_tokens(model.tokenizer, turns, prompt_room(model.lm, self.settings))
        else:
            tokens = plain_tokens(model.text_encoder, text, model.prompt_template)
        pieces: list[str] = []

        def keep_and_write(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        try:
            with model.evaluating():
                stream(model.lm, model.tokenizer, tokens, self.settings, keep_and_write)
        finally:
            self.turns = [*turns, ChatTurn("assistant", "".join(pieces))]
        return "".join(pieces)


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    try:
        settings = GenerationSettings(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
        prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt or []]
    except UnicodeDecodeError as error:
        parser.error(f"--prompt -: standard input is not text: {error}")
    except ModelError as error:
        parser.error(f"--{str(error).replace('_', '-', 2)}")
    if not settings.temperature and (settings.top_k or settings.top_p < 1):
        parser.error("--top-k and --top-p are for sampling; give a --temperature above 0")
    if not all(prompt.strip() for prompt in prompts):
        parser.error("--prompt: is blank; give it some text")
    try:
        here = Settings()
        os.environ.update(home_environment(here.home))
        close_home(here.home)
        archive = find_archive(args.checkpoint, here.store, here.model)
        _talk(archive, settings, args.chat, prompts, args.interactive)
    except (ModelError, SpecError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the answers has enough of them; the interpreter would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_archive(checkpoint: str, store: Store, preset: str) -> Path:
    """The archive that `checkpoint` means: a file, a checkpoint's folder, the name of a job, or `base_model`.

    Raises ModelError that names what there is.
    """
    path = Path(checkpoint).expanduser()
    for file in (path, path / MODEL_FILE):
        if file.is_file():
            return file
    there_are = {
        found.parent.name: found.resolve() / MODEL_FILE for found in store.home.glob(f"checkpoints/*/{CURRENT}")
    }
    base_models = store.base_model(model_preset(preset).name)
    if (base_models / CURRENT).exists():
        there_are[_BASE_MODEL] = archive_file(current(base_models))
    if checkpoint in there_are:
        return there_are[checkpoint]
    base = [_BASE_MODEL] if _BASE_MODEL in there_are else []
    jobs = sorted(there_are.keys() - {_BASE_MODEL})
    there = f"there are {', '.join(base + jobs)}" if base + jobs else "there is none yet; run 'fedsft study' first"
    raise ModelError(f"--checkpoint: {checkpoint!r} is no file and no checkpoint in {store.home}; {there}")


def _parser() -> argparse.ArgumentParser:
    defaults = GenerationSettings()
    parser = argparse.ArgumentParser(prog="fedsft-generate", description="Ask a checkpoint, and read as it answers.")
    parser.add_argument("--checkpoint", required=True, help="a .nemo archive, the name of a job, or 'base_model'")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="what to ask; may be repeated; '-' reads standard input")
    asked.add_argument("--interactive", action="store_true", help="ask again and again")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="with the tokenizer's chat template instead of the prompt template of training",
    )
    how = parser.add_argument_group("how it answers")
    how.add_argument("--max-new-tokens", type=int, default=256, help="an answer is cut there (%(default)s)")
    how.add_argument("--temperature", type=float, default=defaults.temperature, help="0, the default, is greedy")
    how.add_argument("--top-k", type=int, default=defaults.top_k, help="sample from so many tokens; 0 is all")
    how.add_argument("--top-p", type=float, default=defaults.top_p, help="sample from this share of probability")
    how.add_argument("--seed", type=int, help="makes sampled answers repeat")
    return parser


def _talk(archive: Path, settings: GenerationSettings, chat: bool, prompts: list[str], interactive: bool) -> None:
    from fedsft_assets.model.language_model import LanguageModel

    model = LanguageModel.load(archive)
    for number, prompt in enumerate(prompts):
        if number:
            _write("\n")
        _write_answer(Conversation(model, settings, chat), prompt)
        _write("\n")
    if interactive:
        _say(f"{archive}: Ctrl-C stops an answer, an empty line or Ctrl-D ends.")
        _interact(Conversation(model, settings, chat))


def _interact(conversation: Conversation) -> None:
    """Ask and answer until the person has no more questions; arrow keys bring back earlier ones."""
    import readline  # noqa: F401 input() then has a history

    while True:
        try:
            text = _ask()
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("")
            continue
        if not text.strip():
            return
        try:
            _write_answer(conversation, text)
        except KeyboardInterrupt:
            pass
        except ModelError as error:
            _say(str(error))
            continue
        _write("\n")


def _write_answer(conversation: Conversation, text: str) -> None:
    if not conversation.answer(text, _write):
        _say("(the model ended its answer before any text)")


def _ask() -> str:
    """One line of a person. The line editor needs to know the prompt, unless what it writes is not for a terminal."""
    if sys.stdout.isatty():
        return input("> ")
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _write(text: str) -> None:
    """On a terminal, a model's control characters are shown as such: they could do anything to it."""
    print(_CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
