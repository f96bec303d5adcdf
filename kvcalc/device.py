"""Which GPU is meant: an id, a file, or `auto`, the one of this machine as NVML describes it."""

import datetime
from typing import TYPE_CHECKING, NamedTuple

from kvcalc.config import FieldUse
from kvcalc.dtypes import storage_format
from kvcalc.engines import load_engine
from kvcalc.errors import InputError, MissingDependencyError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.hardware import FIGURES, Figure, Gpu, find_gpu, named_gpu
from kvcalc.units import shown

if TYPE_CHECKING:
    from types import ModuleType

AUTO = "auto"

_NO_BF16 = ("vllm", "sglang")
"""Engines that do not compute in bf16, nor keep a cache in fp8, before compute capability 8.0.

vLLM refuses bf16 there and names `--dtype half`; SGLang takes fp16 itself. Of vLLM's attention
FlashInfer takes an fp8 cache from 8.0 on (7.5 before v0.24.0), Triton from 8.9 on
(v1/attention/backends/flashinfer.py and triton_attn.py; vllm-project/vllm#45375, #47549).
"""

IN_FP16 = "before compute capability 8.0 an engine computes in fp16 (--dtype half), not in bf16"

AMPERE = 8
"""The compute capability since which there is bf16."""

_ELSE = "else name an id of kvcalc gpus"


class Machine(NamedTuple):
    """The GPUs of a machine, which are all of one kind."""

    gpu: Gpu
    num_gpus: int


class _Board(NamedTuple):
    name: str
    total_bytes: int
    reserved_bytes: int | None


def kept_dtype(gpu: Gpu, engine: str, kv_dtype: str, architecture: Architecture) -> str:
    """The dtype to ask for on a GPU: fp16 where it does not compute in bf16; UnsupportedError where
    it keeps no fp8.
    """
    if engine not in _NO_BF16 or not gpu.compute_capability:
        return kv_dtype
    if int(gpu.compute_capability.partition(".")[0]) >= AMPERE:
        return kv_dtype
    name = kv_dtype.strip().lower()
    if name == "auto":
        use = load_engine(engine).auto_dtype(architecture)
        name = str(use.value) if isinstance(use, FieldUse) else name
    if name != "auto":
        name = storage_format(name).name
    if name == "fp8":
        msg = "an fp8 cache needs compute capability 8.0"
        raise UnsupportedError(msg)
    return "fp16" if name == "bf16" else kv_dtype


def choose_gpu(said: str | Gpu, *, ranks: int = 1) -> Gpu:
    """The GPU of an id, a YAML file or `auto`, where the machine must have one for each rank."""
    if isinstance(said, Gpu):
        return said
    if not isinstance(said, str):
        msg = f"gpu must be an id, a YAML file or auto, not {shown(said)}"
        raise InputError(msg)
    if said != AUTO:
        return named_gpu(said)
    machine = this_machine()
    if ranks > machine.num_gpus:
        msg = (
            f"this machine has {machine.num_gpus} × {machine.gpu.name}, fewer than the {ranks} "
            f"ranks of --tp × --pp; {_ELSE}"
        )
        raise InputError(msg)
    return machine.gpu


def this_machine() -> Machine:
    """All GPUs that NVML sees, whatever CUDA_VISIBLE_DEVICES says.

    `usable_bytes` is NVML's total, which is that of the board; `cuda_bytes` is what of it driver
    and firmware do not keep: "Device memory (in bytes) reserved for system use" (nvmlMemory_v2_t in
    nvml.h, https://docs.nvidia.com/deploy/nvml-api/api/structnvmlMemory__v2__t.html). Drivers
    before 510 tell the total alone. The other figures are those of the catalogue, where it knows
    the name.

    Raises InputError where there is no NVML, no GPU, or no single kind of it.
    """
    boards, driver = _ask_nvml()
    kinds = sorted({board.name for board in boards})
    if not kinds:
        msg = f"NVML sees no GPU in this machine; {_ELSE}"
        raise InputError(msg)
    if len(kinds) > 1:
        msg = f"this machine has different GPUs, {', '.join(kinds)}: choose by an id of kvcalc gpus"
        raise InputError(msg)
    least = min(boards, key=lambda board: board.total_bytes - (board.reserved_bytes or 0))
    today = datetime.datetime.now(tz=datetime.UTC).astimezone().date()
    said = f"NVML of this machine: total {least.total_bytes:,}"
    usable = Figure(least.total_bytes, f"{said}, driver {driver}, {today}", today)
    cuda = None
    if least.reserved_bytes is not None:
        source = f"{said} less {least.reserved_bytes:,} reserved, driver {driver}, {today}"
        cuda = Figure(least.total_bytes - least.reserved_bytes, source, today)
    gpu = find_gpu(least.name) or _unknown(least.name)
    return Machine(gpu._replace(usable_bytes=usable, cuda_bytes=cuda), len(boards))


def _unknown(name: str) -> Gpu:
    """A GPU of which nothing but the name is known."""
    return Gpu(
        id=name,
        name=name,
        also=(),
        vendor="nvidia",
        architecture=None,
        compute_capability=None,
        notes=None,
        **dict.fromkeys(FIGURES),
    )


def _ask_nvml() -> tuple[list[_Board], str]:
    """Every board, and the driver's version."""
    try:
        import pynvml
    except ImportError:
        msg = f"--gpu auto needs NVML's bindings: pip install 'kvcalc[profile]'; {_ELSE}"
        raise MissingDependencyError(msg) from None
    try:
        pynvml.nvmlInit()
        try:
            boards = [_board(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
            return boards, str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        msg = f"NVML: {error}; --gpu auto needs an NVIDIA GPU and its driver; {_ELSE}"
        raise InputError(msg) from None


def _board(nvml: "ModuleType", index: int) -> _Board:
    """One board; InputError for one that is cut into slices, whose own memory engines see."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = str(nvml.nvmlDeviceGetName(handle))
    try:
        sliced = nvml.nvmlDeviceGetMigMode(handle)[0]
    except nvml.NVMLError:  # a board that cannot be
        sliced = 0
    if sliced:
        msg = f"{name} is in MIG mode: give --kv-memory, as the engine prints it"
        raise InputError(msg)
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:  # a driver before 510
        return _Board(name, int(nvml.nvmlDeviceGetMemoryInfo(handle).total), None)
    return _Board(name, int(memory.total), int(memory.reserved))
