"""Following a text file that another process appends to."""

from pathlib import Path


def whole_lines(content: bytes) -> bytes:
    """The complete lines of a file that is being appended to.

    A writer that reserves space writes zeros first; readers may see them, followed by later data.
    """
    written = content.partition(b"\0")[0]
    return written[: written.rfind(b"\n") + 1]


class Tail:
    """Returns each complete line of a file once; the file need not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """`offset` is the byte to start at; it advances with the lines returned."""
        self.path, self.offset = path, offset

    def new_lines(self) -> list[str]:
        """Lines since the last call, without line endings; an incomplete last line is left for the next call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole = whole_lines(file.read())
        self.offset += len(whole)
        return whole.decode(errors="replace").splitlines()

    def end(self, lines: int) -> str:
        """The last `lines` lines of the file."""
        if not self.path.exists():
            return ""
        return "\n".join(self.path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
