"""The command `fedsft-generate`: stream a checkpoint's answers to the terminal.

Only answers go to standard output; everything else goes to standard error.
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
_INTERRUPTED = 130  # a shell's exit code for Ctrl-C
_CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")


@dataclass
class Conversation:
    """A model with its generation settings and, in chat mode, the turns so far."""

    model: "LanguageModel"
    settings: GenerationSettings
    chat: bool
    turns: "list[ChatTurn]" = field(default_factory=list)

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """Stream the model's answer to `write` and return it; a partial answer stays in the conversation.

        Raises ModelError, and any error of `write`.
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
        parser.error("--prompt: is blank; expected some text")
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
        # The reader closed the pipe; avoid a second error when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_archive(checkpoint: str, store: Store, preset: str) -> Path:
    """Resolve `checkpoint` to an archive: a file, a checkpoint's folder, the name of a job, or `base_model`.

    Raises ModelError listing what is available.
    """
    path = Path(checkpoint).expanduser()
    for file in (path, path / MODEL_FILE):
        if file.is_file():
            return file
    available = {
        found.parent.name: found.resolve() / MODEL_FILE for found in store.home.glob(f"checkpoints/*/{CURRENT}")
    }
    base_models = store.base_model(model_preset(preset).name)
    if (base_models / CURRENT).exists():
        available[_BASE_MODEL] = archive_file(current(base_models))
    if checkpoint in available:
        return available[checkpoint]
    base = [_BASE_MODEL] if _BASE_MODEL in available else []
    jobs = sorted(available.keys() - {_BASE_MODEL})
    hint = f"available: {', '.join(base + jobs)}" if base + jobs else "none exists yet; run 'fedsft study' first"
    raise ModelError(f"--checkpoint: {checkpoint!r} is neither a file nor a checkpoint in {store.home}; {hint}")


def _parser() -> argparse.ArgumentParser:
    defaults = GenerationSettings()
    parser = argparse.ArgumentParser(prog="fedsft-generate", description="Ask a checkpoint and stream its answers.")
    parser.add_argument("--checkpoint", required=True, help="a .nemo archive, the name of a job, or 'base_model'")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", help="what to ask; may be repeated; '-' reads standard input")
    asked.add_argument("--interactive", action="store_true", help="ask repeatedly")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="use the tokenizer's chat template instead of the prompt template of training",
    )
    how = parser.add_argument_group("generation")
    how.add_argument("--max-new-tokens", type=int, default=256, help="maximum length of an answer (%(default)s)")
    how.add_argument("--temperature", type=float, default=defaults.temperature, help="0, the default, is greedy")
    how.add_argument(
        "--top-k", type=int, default=defaults.top_k, help="sample from the K most likely tokens; 0 means all"
    )
    how.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        help="sample from the most likely tokens with this total probability",
    )
    how.add_argument("--seed", type=int, help="makes sampled answers reproducible")
    return parser


def _talk(archive: Path, settings: GenerationSettings, chat: bool, prompts: list[str], interactive: bool) -> None:
    from fedsft_assets.model.language_model import LanguageModel

    model = LanguageModel.load(archive)
    for number, prompt in enumerate(prompts):
        if number:
            _write("\n")
        write_answer(Conversation(model, settings, chat), prompt)
        _write("\n")
    if interactive:
        _say(f"{archive}: Ctrl-C stops an answer; an empty line or Ctrl-D exits.")
        _interact(Conversation(model, settings, chat))


def _interact(conversation: Conversation) -> None:
    """Answer questions until an empty line; arrow keys recall earlier ones."""
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
            write_answer(conversation, text)
        except KeyboardInterrupt:
            pass
        except ModelError as error:
            _say(str(error))
            continue
        _write("\n")


def write_answer(conversation: Conversation, text: str) -> None:
    """Stream the answer to standard output, with a note on standard error if it is empty."""
    if not conversation.answer(text, _write):
        _say("(the answer is empty)")


def _ask() -> str:
    """Read a line from the user. The line editor must know the prompt, unless standard output is not a terminal."""
    if sys.stdout.isatty():
        return input("> ")
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _write(text: str) -> None:
    """Write text, replacing control characters on a terminal, where they could be harmful."""
    print(_CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
