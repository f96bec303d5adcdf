"""Measurement records: the conditions of a run, and appending rows to a file as they finish."""

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kvcalc
from kvcalc.errors import OutputError


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


class RowFile:
    """An append-only file of JSON lines; each row is on disk when `append` returns.

    Raises OutputError when made for a path that cannot be written; nothing is left there then, or
    when no row follows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        existed = path.exists()
        self._write("")
        if not existed:
            path.unlink()

    def append(self, row: dict[str, Any]) -> None:
        """Add one row. Raises OutputError when it cannot be written."""
        self._write(json.dumps(row) + "\n")

    def _write(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            msg = f"cannot write to {self.path}: {error.strerror}; choose another --out"
            raise OutputError(msg) from None


def available_memory() -> int:
    """Bytes that this process may still take: what the kernel can free, within the cgroup."""
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
        return Path(path).read_text(encoding="utf-8").splitlines()
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
    facts = {"processor": properties.name, "memory_bytes": properties.total_memory}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        facts |= {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_limit_milliwatts": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle),
            "used_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        }
    except Exception as error:  # noqa: BLE001 - conditions are context, never a reason to fail
        facts["driver"] = f"not readable ({type(error).__name__})"
    return facts


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
