"""Which machines serve so many requests: every GPU whose memory is known, in as few as fit."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvcalc import api
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.fitting import FitReport
from kvcalc.hardware import Gpu, gpu_ids, load_gpu

SCHEMA = "kvcalc.plan/1"

RANKS = (1, 2, 4, 8)
"""How many GPUs of a kind are tried, as tensor-parallel ranks."""


class Deployment(NamedTuple):
    """`tp` GPUs of a kind that hold the requests; `memory_bytes` is what their drivers report of
    all of them together, `fit` the report of each rank.
    """

    gpu: str
    tp: int
    kv_dtype: str
    memory_bytes: int
    fit: FitReport

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "gpu": self.gpu,
            "tp": self.tp,
            "kv_dtype": self.kv_dtype,
            "memory_bytes": self.memory_bytes,
            "fit": self.fit.to_dict(),
        }


def plan(
    model: str,
    *,
    reserve: str,
    gpus: Sequence[str] = (),
    kv_dtypes: Sequence[str] = ("auto", "fp8"),
    revision: str | None = None,
    **point: Any,  # noqa: ANN401 - parameters of `fit`
) -> list[Deployment]:
    """For each GPU and KV dtype the fewest ranks that hold the requests, least memory first.

    `gpus` are ids, none for all whose memory a driver has reported. Raises what `fit` raises for a
    model, an engine or a value that no deployment can take.
    """
    read = api.read_model(model, revision=revision)
    chosen = [load_gpu(gpu) for gpu in gpus or gpu_ids()]
    known = [gpu for gpu in chosen if gpu.usable_bytes]
    if not known:
        msg = "no driver's figure of the memory of these GPUs is known; choose others"
        raise InputError(msg)
    found: list[Deployment] = []
    refusals: list[UnsupportedError] = []
    for kv_dtype in kv_dtypes:
        for gpu in known:
            found += _fewest(read, gpu, kv_dtype, refusals, reserve=reserve, **point)
    if not found and len(refusals) == len(kv_dtypes) * len(known) * len(RANKS):
        raise refusals[0]
    return sorted(found, key=lambda one: (one.memory_bytes, one.tp, one.gpu, one.kv_dtype))


def _fewest(
    read: api.Model,
    gpu: Gpu,
    kv_dtype: str,
    refusals: list[UnsupportedError],
    **point: Any,  # noqa: ANN401
) -> Iterator[Deployment]:
    """The fewest ranks that hold the requests, if any of `RANKS` do."""
    for tp in RANKS:
        try:
            fit = api.fit(read, gpu=gpu.id, tp=tp, kv_dtype=kv_dtype, **point)
        except UnsupportedError as error:
            refusals.append(error)
            continue
        if fit.fits and gpu.usable_bytes:
            total = tp * gpu.usable_bytes.value
            yield Deployment(gpu.id, tp, fit.size.kv_dtype, total, fit)
            return
