"""What fits into the memory that an engine has for its cache: requests, tokens, and the headroom.

Bytes are those of `kvcalc.sizing`; the largest that fits is found by bisection, since more tokens
or requests never take less. How much memory a GPU leaves for the cache is not said here: the engine
prints it, or the user knows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvcalc.dtypes import storage_format
from kvcalc.engines import Plan, load_engine, read_options
from kvcalc.errors import InputError
from kvcalc.families import Architecture
from kvcalc.origin import Origin
from kvcalc.sizing import MAX_BATCH, SizeReport, size_architecture
from kvcalc.units import MAX_TOKENS, check_count

SCHEMA = "kvcalc.fit/1"


class FitReport(NamedTuple):
    """What one rank's memory for the cache holds. Bytes are of one rank, the most loaded one.

    - `needed_bytes` for `concurrency` requests of `seq_tokens` tokens, and `headroom_bytes` beyond
      them, negative where they do not fit;
    - `max_concurrency`: most requests of `seq_tokens` at once; `max_tokens`: the longest sequence
      for each of `concurrency` requests (0 where none fits);
    - `printed`: what the engine itself says of such a pool, by its own names.
    """

    size: SizeReport
    available_bytes: int
    available_origin: str
    concurrency: int
    needed_bytes: int
    max_concurrency: int
    max_tokens: int
    printed: Mapping[str, int | float | bool]

    @property
    def fits(self) -> bool:
        """Whether the requests fit at once."""
        return self.needed_bytes <= self.available_bytes

    @property
    def headroom_bytes(self) -> int:
        """What is left beside them."""
        return self.available_bytes - self.needed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; the schema is `kvcalc.fit/1`."""
        return {
            "schema": SCHEMA,
            "model": self.size.origin.requested,
            "resolved_model": self.size.origin.resolved,
            "engine": self.size.engine,
            "kv_dtype": self.size.kv_dtype,
            "tp": self.size.tp,
            "pp": self.size.pp,
            "seq_tokens": self.size.seq_tokens,
            "concurrency": self.concurrency,
            "budget": {
                "kv_cache_bytes_per_rank": self.available_bytes,
                "origin": self.available_origin,
            },
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "headroom_bytes": self.headroom_bytes,
            "max_concurrency": self.max_concurrency,
            "max_tokens": self.max_tokens,
            "printed": dict(self.printed),
        }


def fit_architecture(
    architecture: Architecture,
    *,
    origin: Origin,
    available_bytes: int,
    available_origin: str,
    seq_tokens: int,
    concurrency: int = 1,
    engine: str = "vllm",
    kv_dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    options: Mapping[str, Any] | None = None,
) -> FitReport:
    """What `available_bytes` of each rank hold.

    Raises InputError for a value out of range and UnsupportedError where the engine has no exact
    size for the model.
    """
    check_count(concurrency, name="concurrency", most=MAX_BATCH)

    def size(tokens: int, batch: int) -> SizeReport:
        return size_architecture(
            architecture,
            origin=origin,
            seq_tokens=tokens,
            batch=batch,
            kv_dtype=kv_dtype,
            engine=engine,
            tp=tp,
            pp=pp,
            options=options,
        )

    def fits(tokens: int, batch: int) -> bool:
        try:
            return size(tokens, batch).bytes_per_rank <= available_bytes
        except InputError:  # an option of the user's bounds what there is room for
            return False

    report = size(seq_tokens, concurrency)
    runtime = load_engine(engine)
    plan = Plan(
        seq_tokens,
        concurrency,
        storage_format(report.kv_dtype),
        tp,
        pp,
        read_options(engine, runtime.OPTIONS, options or {}),
    )
    room = getattr(runtime, "room", None)
    return FitReport(
        size=report,
        available_bytes=available_bytes,
        available_origin=available_origin,
        concurrency=concurrency,
        needed_bytes=report.bytes_per_rank,
        max_concurrency=_largest(lambda batch: fits(seq_tokens, batch), MAX_BATCH),
        max_tokens=_largest(lambda tokens: fits(tokens, concurrency), MAX_TOKENS),
        printed=room(architecture, plan, available_bytes) if room else {},
    )


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `holds` is true; it is for all below. 0 if none."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
