"""Measurement records: the conditions of a run, and appending rows to a file as they finish."""

import datetime
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kvcalc
from kvcalc.errors import OutputError
from kvcalc.measure import nvml


def conditions(device: torch.device) -> dict[str, Any]:
    """What a timing depends on besides the model: hardware, versions, commit, load, time."""
    return {
        "kvcalc": kvcalc.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def claimed(device: torch.device) -> Iterator[bool]:
    """Whether this is the only profile on a device; it is told to others until the end."""
    with _locked(
        Path(tempfile.gettempdir()) / f"kvcalc-profile-{device.type}{device.index or 0}.lock"
    ) as alone:
        yield alone


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody else has this lock; it is kept from others until the end."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(path.open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        except OSError:  # somebody else's file: nobody can tell
            alone = True
        yield alone


class RowFile:
    """An append-only file of JSON lines; a row is on disk when `append` returns.

    What is measured before a row is complete stands in a file beside it, PATH.parts, until `close`:
    a run that was killed goes on from there. With `resume` the rows and parts that are there
    already are found by `row` and `parts`.

    Raises OutputError when made for a path that cannot be written, or that another profile is
    writing; nothing is left there then, or when no row follows.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self._parts_path = path.with_name(path.name + ".parts")
        self._rows: dict[str, dict[str, Any]] = {}
        self._parts: dict[str, list[dict[str, Any]]] = {}
        self._lock = _only_writer(path)
        target = Path(os.path.realpath(path))  # a link may lead to what is not there yet
        existed = os.path.exists(target)  # noqa: PTH110 - any name: one that is too long
        self._write(path, "")
        if not existed:
            target.unlink()
        if resume:
            for row in _read_lines(path):
                if row.get("status") == "ok" and "point" in row:
                    self._rows[_key(row["point"])] = row
            for part in _read_lines(self._parts_path):
                if _is_part(part):
                    self._parts.setdefault(_key(part["point"]), []).append(part)
        else:
            self._forget_parts()

    def row(self, point: dict[str, Any]) -> dict[str, Any] | None:
        """The finished row of a point."""
        return self._rows.get(_key(point))

    def parts(self, point: dict[str, Any]) -> list[dict[str, Any]]:
        """What had been measured of a point when its run ended."""
        return self._parts.get(_key(point), [])

    def append(self, row: dict[str, Any]) -> None:
        """Add one row. Raises OutputError when it cannot be written."""
        self._write(self.path, json.dumps(row) + "\n")

    def append_part(self, point: dict[str, Any], **part: object) -> None:
        """Add a part of a row to come."""
        self._write(self._parts_path, json.dumps({"point": point, **part}) + "\n")

    def close(self) -> None:
        """All rows are written: their parts are not needed any more."""
        self._forget_parts()
        self._lock.close()

    def _forget_parts(self) -> None:
        try:
            self._parts_path.unlink(missing_ok=True)
        except OSError as error:
            msg = f"cannot remove {self._parts_path}: {error.strerror}; choose another --out"
            raise OutputError(msg) from None

    def _write(self, path: Path, text: str) -> None:
        try:
            with path.open("ab+") as file:
                # A line that a kill tore stays alone.
                if text and file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    text = text if file.read(1) == b"\n" else "\n" + text
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            msg = f"cannot write to {path}: {error.strerror}; choose another --out"
            raise OutputError(msg) from None


def _only_writer(path: Path) -> ExitStack:
    """What keeps others from writing a file of rows, and its parts, until it is closed or gone."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    with ExitStack() as stack:
        alone = stack.enter_context(_locked(Path(tempfile.gettempdir()) / f"kvcalc-rows-{name}"))
        if not alone:
            msg = f"another profile is writing {path}: wait for it, or choose another --out"
            raise OutputError(msg)
        return stack.pop_all()


def _key(point: dict[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def _is_part(part: dict[str, Any]) -> bool:
    """Whether a line is what `append_part` wrote of a count or a run, as far as it is read."""
    run = part.get("run", [0.0, []])
    whole = isinstance(run, list) and len(run) >= 2 and isinstance(run[1], list)
    return whole and "point" in part and isinstance(part.get("counted", {}), dict)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, without a line that was torn or damaged."""
    for line in _lines(str(path)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no more; on CPUs torch says so in words alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "not enough memory" in text


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on the CPU what the kernel can free, within the
    cgroup.
    """
    if device.type == "cuda":
        free_bytes: int = torch.cuda.mem_get_info(device)[0]
        return free_bytes
    available = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = [int(line.split()[1]) * 1024]
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        available.append(int(limit[0]) - int(used[0]))
    return min(available)


def _lines(path: str) -> list[str]:
    """The lines of a file of the kernel's; none when it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _commit() -> str:
    """The commit of the checkout that is running, with `+` when it was changed; "" elsewhere."""
    root = Path(kvcalc.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(  # noqa: S603 - a fixed command
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return _gpu(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    """What torch knows of the GPU, and what its driver says of its clocks and power."""
    properties = torch.cuda.get_device_properties(device)
    known = {"processor": properties.name, "memory_bytes": properties.total_memory}
    return known | nvml.facts(device)


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
