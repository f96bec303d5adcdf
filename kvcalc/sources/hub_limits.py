"""What may be asked of a Hub, which need not be the real one: so many seconds in all, so many bytes
an answer, and plain words where huggingface_hub makes paths of them.
"""

import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from kvcalc.errors import HubUnavailableError, InputError
from kvcalc.units import shown

Result = TypeVar("Result")

TIMEOUT = "KVCALC_HUB_TIMEOUT"
TIMEOUT_SECONDS = 25
"""A whole question: asking, downloading a config, and whatever is tried again."""

_WORD = r'(?:W/)?"?\w[\w.:+=-]{0,127}"?'
"""A commit (40 hexadecimal digits) or an ETag (`"abc"`, `W/"abc-12"`), in ASCII."""

_NAMING = ("X-Repo-Commit", "X-Linked-ETag", "ETag")
_LENGTHS = ("X-Linked-Size", "Content-Length")


def timeout_seconds() -> int:
    """Seconds that a question may take in all; InputError for a setting that is none."""
    said = os.environ.get(TIMEOUT) or str(TIMEOUT_SECONDS)
    if not re.fullmatch(r"[1-9][0-9]{0,4}", said.strip()):
        msg = f"{TIMEOUT} {shown(said)} is no number of seconds from 1: correct it, or unset it"
        raise InputError(msg)
    return int(said)


def within_time(action: Callable[[float], Result], model: str) -> Result:
    """What `action` returns or raises, within the time that is allowed; it is told when that ends,
    in seconds of `time.monotonic`.

    A thread of its own is given up, since a timeout of huggingface_hub's is that of one read: a
    body that trickles never meets it. Raises HubUnavailableError.
    """
    limit_seconds = timeout_seconds()
    ended: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    deadline = time.monotonic() + limit_seconds

    def run() -> None:
        try:
            ended.put((action(deadline), None))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = ended.get(timeout=limit_seconds)
    except queue.Empty:
        raise _too_slow(model, limit_seconds) from None
    if error is not None:
        raise error
    found: Result = result
    return found


@contextmanager
def bounded_answers(model: str, *, most_bytes: int, deadline: float) -> Iterator[None]:
    """Every answer to huggingface_hub is bounded while it is read, and its header fields are
    checked: longer ones, later ones and odd ones raise HubUnavailableError.

    Before its release 1.0, which speaks through requests, only `check_header` bounds an answer.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session = get_session()
    hooks = getattr(session, "event_hooks", None)
    if hooks is None:
        yield
        return

    def ask(request: Any) -> None:  # noqa: ANN401 - of httpx, or of what follows it
        if time.monotonic() > deadline:
            raise _too_slow(model, timeout_seconds())
        request.headers["Accept-Encoding"] = "identity"  # no few bytes that become many

    def look(response: Any) -> None:  # noqa: ANN401 - likewise
        fields = response.headers
        heads = response.request.method == "HEAD"
        check_header(model, fields, names=_NAMING if heads else (), most_bytes=most_bytes)
        if not heads and fields.get("Content-Encoding", "identity") != "identity":
            raise _unusable(model, "is compressed, which was not asked for")
        fields.pop("X-Xet-Hash", None)  # another client would fetch it, by its own limits
        response.stream = _bounded_stream(
            response, model=model, most_bytes=most_bytes, deadline=deadline
        )

    session.event_hooks = {
        "request": [*hooks["request"], ask],
        "response": [*hooks["response"], look],
    }
    try:
        yield
    finally:
        session.event_hooks = hooks


def check_header(model: str, fields: Any, *, names: tuple[str, ...], most_bytes: int) -> None:  # noqa: ANN401 - a mapping of any case
    """Raise HubUnavailableError for an answer that says it is longer than `most_bytes`, or whose
    fields of these `names`, of which paths are made, are no plain words.
    """
    for name in names:
        said = fields.get(name)
        if said is not None and not re.fullmatch(_WORD, said, re.ASCII):
            raise _unusable(model, f"has {name} {shown(said)}, which is no plain word")
    for name in _LENGTHS:
        said = str(fields.get(name) or "")
        if re.fullmatch(r"[0-9]+", said, re.ASCII) and (len(said) > 18 or int(said) > most_bytes):
            raise _too_large(model, most_bytes)


def _bounded_stream(response: Any, *, model: str, most_bytes: int, deadline: float) -> Any:  # noqa: ANN401 - of httpx
    """The body of an answer, chunk by chunk as it comes, within the bounds."""
    stream = response.stream
    kind: Any = sys.modules[type(response).__module__.partition(".")[0]].SyncByteStream

    class Bounded(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            come_bytes = 0
            for chunk in stream:
                come_bytes += len(chunk)
                if come_bytes > most_bytes:
                    raise _too_large(model, most_bytes)
                if time.monotonic() > deadline:
                    raise _too_slow(model, timeout_seconds())
                yield chunk

        def close(self) -> None:
            stream.close()

    return Bounded()


def _too_large(model: str, most_bytes: int) -> HubUnavailableError:
    return _unusable(model, f"is larger than {most_bytes:,} bytes, which no such file is")


def _unusable(model: str, what: str) -> HubUnavailableError:
    return HubUnavailableError(
        f"the Hub's answer for {model} {what}: check HF_ENDPOINT, or give a config.json file"
    )


def _too_slow(model: str, limit_seconds: int) -> HubUnavailableError:
    return HubUnavailableError(
        f"the Hub did not answer for {model} in {limit_seconds} seconds: try again, raise "
        f"{TIMEOUT}, or give a config.json file"
    )
