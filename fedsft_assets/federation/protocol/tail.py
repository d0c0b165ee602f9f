"""Following a text file that another process appends to."""

from pathlib import Path


def whole_lines(content: bytes) -> bytes:
    """What is complete of lines that were read while somebody appends: none that is torn.

    Whoever makes room first writes zeros there; a reader may see them, and what was appended after them since.
    """
    written = content.partition(b"\0")[0]
    return written[: written.rfind(b"\n") + 1]


class Tail:
    """Hands out each whole line of a file once; the file may not be there yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """`offset` is the byte to begin at; it grows with what is handed out."""
        self.path, self.offset = path, offset

    def new_lines(self) -> list[str]:
        """Lines since the last call, without their ends; an unfinished last line is left for the next call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole = whole_lines(file.read())
        self.offset += len(whole)
        return whole.decode(errors="replace").splitlines()

    def end(self, lines: int) -> str:
        """The last lines of the file as it is now."""
        if not self.path.exists():
            return ""
        return "\n".join(self.path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
