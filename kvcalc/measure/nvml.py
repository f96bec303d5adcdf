"""What NVIDIA's management library says of a GPU: clocks, power, energy and throttling.

All of it is context for a measurement: where NVML or a figure is missing the answer is empty, and
nothing fails.
"""

from functools import cache
from typing import Any

import torch

_THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""Bits of nvmlClocksEventReasons (nvml.h 12.560) that slow a GPU down against its will."""


@cache
def _handle(device: torch.device) -> tuple[Any, Any] | None:
    """The library and its handle of a device."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except Exception:  # noqa: BLE001 - no library, no driver, no permission
        return None


def _ask(device: torch.device, question: str, *arguments: Any) -> Any:  # noqa: ANN401
    """One of NVML's answers, None when it has none."""
    found = _handle(device)
    if found is None:
        return None
    library, handle = found
    try:
        return getattr(library, question)(handle, *arguments)
    except Exception:  # noqa: BLE001 - not supported by this GPU
        return None


def facts(device: torch.device) -> dict[str, Any]:
    """The driver, the power limit, and the memory that all processes use."""
    memory = _ask(device, "nvmlDeviceGetMemoryInfo")
    found = _handle(device)
    return {
        "driver": found[0].nvmlSystemGetDriverVersion() if found else None,
        "power_limit_milliwatts": _ask(device, "nvmlDeviceGetEnforcedPowerLimit"),
        "used_bytes": memory.used if memory else None,
    }


def energy_joules(device: torch.device) -> float | None:
    """What the GPU has used since its driver was loaded."""
    millijoules = _ask(device, "nvmlDeviceGetTotalEnergyConsumption")
    return None if millijoules is None else millijoules / 1000


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power, temperature and why the GPU runs below its clocks, at this moment: to be asked
    while it works, for an idle GPU lowers its clocks. Empty where nobody knows.
    """
    if _handle(device) is None:
        return {}
    bits = _ask(device, "nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return {
        "sm_clock_mhz": _ask(device, "nvmlDeviceGetClockInfo", 1),
        "memory_clock_mhz": _ask(device, "nvmlDeviceGetClockInfo", 2),
        "power_milliwatts": _ask(device, "nvmlDeviceGetPowerUsage"),
        "temperature_celsius": _ask(device, "nvmlDeviceGetTemperature", 0),
        "throttled": [name for bit, name in _THROTTLING.items() if bits & bit],
    }
