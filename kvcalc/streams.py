"""The standard streams of the command line: a reader that leaves, a disk that is full or a stream
that was closed changes no exit status, and signs that a terminal lacks are spelled out.
"""

import codecs
import io
import os
import select
import sys
from typing import Any, TextIO

from kvcalc.errors import OutputError

_PLAIN = {"×": "x", "±": "+/-", "≥": ">=", "…": "..."}


def take_over() -> None:
    """Put streams of our own kind in the place of the standard ones, till the end."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # closed by the caller: no file that is opened later may take its place
    os.close(spare)
    codecs.register_error("plain", _plain)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115 - till the end
    sys.stdout = _text_output(sys.stdout, 1)
    sys.stderr = _text_output(sys.stderr, 2)


class _Output(io.FileIO):
    """Standard output or error. What its reader left unread is dropped, and so is what standard
    error cannot take: the command goes on, writes its files, and ends with its own status.

    OutputError where standard output cannot be written (a full disk).
    """

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        try:
            while (written := super().write(data)) is None:  # a full pipe that does not block
                select.select([], [self], [])
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1:
                msg = f"cannot write the output: {error.strerror}"
                raise OutputError(msg) from None
            return len(data)
        return written


def _text_output(stream: TextIO | None, number: int) -> TextIO:
    """A standard stream as before, of our own kind; of one that was closed, one to nowhere."""
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="plain",
        line_buffering=stream is not None and (stream.line_buffering or stream.write_through),
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Spell out the signs that a terminal's encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in signs), error.end
