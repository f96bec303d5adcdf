"""What fits into the memory that an engine has for its cache: requests, tokens, and the headroom.

Bytes are those of `kvcalc.sizing`; the largest that fits is found by bisection, since more tokens
or requests never take less. How much memory there is, is worked out in `kvcalc.budget`, or known.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from math import inf
from typing import TYPE_CHECKING, Any

from kvcalc.budget import BudgetLine
from kvcalc.engines import Plan, Same, load_engine
from kvcalc.errors import InputError
from kvcalc.families import Architecture
from kvcalc.origin import Origin
from kvcalc.sizing import MAX_BATCH, SizeReport, rank_bytes, size_architecture
from kvcalc.units import MAX_TOKENS, check_count

if TYPE_CHECKING:
    from kvcalc.weights import Weights

SCHEMA = "kvcalc.fit/1"


@dataclass(frozen=True, eq=False)
class FitReport:
    """What one rank's memory for the cache holds. Bytes are of one rank, the most loaded one.

    - `needed_bytes` for `concurrency` requests of `seq_tokens` tokens (`needed_for` any tokens and
      requests), and `headroom_bytes` beyond them, negative where they do not fit, by as much as the
      weights do not fit, too;
    - `max_concurrency`: most requests of `seq_tokens` at once; `max_tokens`: the longest sequence
      for each of `concurrency` requests (0 where none fits);
    - `printed`: what the engine itself says of such a pool, by its own names;
    - `budget`: the terms that `available_bytes` is the sum of, and `weights_bytes` the model's
      weights on all ranks, None where they are not among them or assumed in part, `weights_notes`
      what to know of them;
    - `limits`: the most tokens of a request, and requests at once, that its server takes; `notes`:
      what else to know;
    - each `_range`: the least and the most, where terms are estimates; both the same where not.

    What takes a search is looked for when it is asked for.
    """

    origin: Origin
    engine: str
    plan: Plan
    budget: tuple[BudgetLine, ...]
    weights_bytes: int | None
    weights_notes: tuple[str, ...]
    limits: tuple[int, int]
    notes: tuple[str, ...]
    needed_bytes: int
    needed_for: Callable[[int, int], int]
    _architecture: Architecture
    _point: Mapping[str, Any]
    _holds: Callable[[Architecture, Plan, int, int], bool] | None

    @property
    def concurrency(self) -> int:
        """Requests at once."""
        return self.plan.batch

    @property
    def seq_tokens(self) -> int:
        """Tokens of each."""
        return self.plan.tokens

    @property
    def kv_dtype(self) -> str:
        """What the cache is kept in."""
        return self.plan.kept_in

    @property
    def available_bytes(self) -> int:
        """What the budget leaves for the cache; nothing, where it comes to less."""
        return max(self.balance_bytes, 0)

    @cached_property
    def available_range(self) -> tuple[int, int]:
        """What it leaves at least and at most, all estimates being as bad, or as good."""
        least, most = self.balance_range
        return max(least, 0), max(most, 0)

    @cached_property
    def size(self) -> SizeReport:
        """The cache of the requests, layer by layer."""
        return size_architecture(
            self._architecture,
            origin=self.origin,
            seq_tokens=self.seq_tokens,
            batch=self.concurrency,
            **self._point,
        )

    @cached_property
    def printed(self) -> Mapping[str, int | float | bool]:
        """What the engine says."""
        room = getattr(load_engine(self.engine), "room", None)
        return room(self._architecture, self.plan, self.available_bytes) if room else {}

    @cached_property
    def max_concurrency(self) -> int:
        """Most requests."""
        return self._most_requests(self.available_bytes)

    @cached_property
    def max_concurrency_range(self) -> tuple[int, int]:
        """Most requests, at least and at most."""
        return self._range(self.max_concurrency, self._most_requests)

    @cached_property
    def max_tokens(self) -> int:
        """Most tokens."""
        return self._most_tokens(self.available_bytes)

    @cached_property
    def max_tokens_range(self) -> tuple[int, int]:
        """Most tokens, at least and at most."""
        return self._range(self.max_tokens, self._most_tokens)

    def _range(self, central: int, most: Callable[[int], int]) -> tuple[int, int]:
        if self.available_range == (self.available_bytes,) * 2:
            return central, central
        least, largest = map(most, self.available_range)
        return least, largest

    def _most_requests(self, memory: int) -> int:
        tokens, batch = self.seq_tokens, self.concurrency
        limit = self.limits[1]
        return _largest(lambda most: self._takes(tokens, most, memory), memory, limit, batch, 1)

    def _most_tokens(self, memory: int) -> int:
        tokens, batch = self.seq_tokens, self.concurrency
        limit = self.limits[0]
        return _largest(lambda most: self._takes(most, batch, memory), memory, limit, tokens, 16)

    def fits_in(self, memory: int, needed_bytes: int | None = None) -> bool:
        """Whether so much memory holds the requests, or as many that need so many bytes."""
        needed = self.needed_bytes if needed_bytes is None else needed_bytes
        return self._fit(self.plan, needed, memory)

    def _fit(self, plan: Plan, needed: int, memory: int) -> bool:
        """Pools that the engine makes of the memory must have room for them, too."""
        if needed > memory:
            return False
        return self._holds is None or self._holds(self._architecture, plan, needed, memory)

    def _takes(self, tokens: int, batch: int, memory: int) -> float:
        """Bytes that so many take; no end of them where they are fewer than the memory and yet do
        not fit, or an option of the user's has no room for them.
        """
        try:
            needed = self.needed_for(tokens, batch)
        except InputError:
            return inf
        if needed > memory or self._holds is None:
            return needed
        plan = self.plan._replace(tokens=tokens, batch=batch)
        return needed if self._fit(plan, needed, memory) else inf

    @cached_property
    def fits(self) -> bool:
        """Whether the requests fit at once, by the estimates as they stand."""
        return self.fits_in(self.available_bytes)

    @cached_property
    def sure(self) -> bool:
        """Whether that is so wherever in their ranges the estimates lie."""
        return all(self.fits_in(end) == self.fits for end in self.available_range)

    @property
    def balance_range(self) -> tuple[int, int]:
        """What the budget comes to at least and at most: below zero where weights do not fit."""
        least, most = (sum(line.bounds[end] for line in self.budget) for end in (0, 1))
        return least, most

    @property
    def balance_bytes(self) -> int:
        """What the budget comes to."""
        return sum(line.num_bytes for line in self.budget)

    @property
    def headroom_bytes(self) -> int:
        """What is left beside them."""
        return self.balance_bytes - self.needed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; the schema is `kvcalc.fit/1`."""
        return {
            "schema": SCHEMA,
            "model": self.origin.requested,
            "resolved_model": self.origin.resolved,
            "engine": self.engine,
            "kv_dtype": self.kv_dtype,
            "tp": self.plan.tp,
            "pp": self.plan.pp,
            "seq_tokens": self.seq_tokens,
            "concurrency": self.concurrency,
            "kv_cache_bytes_per_rank": self.available_bytes,
            "budget": [line._asdict() for line in self.budget],
            "weights_bytes": self.weights_bytes,
            "weights_notes": self.weights_notes,
            "notes": self.notes,
            "kv_cache_bytes_per_rank_range": self.available_range,
            "fits": self.fits,
            "sure": self.sure,
            "needed_bytes": self.needed_bytes,
            "headroom_bytes": self.headroom_bytes,
            "max_concurrency": self.max_concurrency,
            "max_concurrency_range": self.max_concurrency_range,
            "max_tokens": self.max_tokens,
            "max_tokens_range": self.max_tokens_range,
            "printed": dict(self.printed),
        }


def fit_architecture(
    architecture: Architecture,
    *,
    origin: Origin,
    budget: tuple[BudgetLine, ...],
    seq_tokens: int,
    concurrency: int = 1,
    engine: str = "vllm",
    kv_dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    options: Mapping[str, Any] | None = None,
    weights: "Weights | None" = None,
    max_seq: int = MAX_TOKENS,
    max_requests: int = MAX_BATCH,
    notes: tuple[str, ...] = (),
) -> FitReport:
    """What the memory that the `budget` leaves each rank holds, of a server that takes up to
    `max_seq` tokens of a request and up to `max_requests` at once.

    Raises InputError for a value out of range and UnsupportedError where the engine has no exact
    size for the model.
    """
    check_count(seq_tokens, name="seq", most=max_seq)
    check_count(concurrency, name="concurrency", most=max_requests)
    point: dict[str, Any] = {
        "kv_dtype": kv_dtype,
        "engine": engine,
        "tp": tp,
        "pp": pp,
        "options": options or {},
    }
    needed_by, plan = _rank_bytes(architecture, point)
    return FitReport(
        origin=origin,
        engine=engine,
        plan=plan._replace(tokens=seq_tokens, batch=concurrency),
        budget=budget,
        weights_bytes=weights.num_bytes if weights and weights.least_bytes is None else None,
        weights_notes=weights.notes if weights else (),
        limits=(max_seq, max_requests),
        notes=notes,
        needed_bytes=needed_by(seq_tokens, concurrency),
        needed_for=needed_by,
        _architecture=architecture,
        _point=point,
        _holds=getattr(load_engine(engine), "holds", None),
    )


def _rank_bytes(
    architecture: Architecture, point: Mapping[str, Any]
) -> tuple[Callable[[int, int], int], Plan]:
    """Prepared once for deployments that differ in length, requests or memory alone."""
    options = tuple(point["options"].items())
    rest = tuple((name, value) for name, value in point.items() if name != "options")
    try:
        hash((rest, options))
    except TypeError:  # what is refused below, by name
        return rank_bytes(architecture, **point)
    return _prepared(Same(architecture), rest, options)


@lru_cache(maxsize=64)
def _prepared(
    architecture: Same[Architecture],
    rest: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
) -> tuple[Callable[[int, int], int], Plan]:
    return rank_bytes(architecture.it, **dict(rest), options=dict(options))


def _largest(
    takes: Callable[[int], float], available: int, most: int, first: int, step: int
) -> int:
    """The largest number up to `most` that takes no more than is available; 0 if none.

    `takes` never falls. Looked for near where `_straight` leads, then farther and farther away, a
    `step` at first, and then by bisection.
    """
    takes = cache(takes)
    if takes(most) <= available:  # windows alone
        return most
    here = _straight(takes, available, most, first, step)
    low, high = 0, most
    if takes(here) <= available:
        low = here
        while low + step < high and takes(low + step) <= available:
            low, step = low + step, step * 2
        high = min(high, low + step)
    else:
        high = here
        while high - step > low and takes(high - step) > available:
            high, step = high - step, step * 2
        low = max(low, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        if takes(middle) <= available:
            low = middle
        else:
            high = middle
    return low


def _straight(
    takes: Callable[[int], float], available: int, most: int, first: int, step: int
) -> int:
    """Where what is available is taken, if bytes are straight: the line through 0 and `first`,
    then through the last two points, until it leads no farther than a `step`.
    """
    here, before, before_takes = first, 0, 0.0
    for _ in range(4):
        here_takes = takes(here)
        rise = here_takes - before_takes
        if not 0 < abs(rise) < inf:
            break
        line = here + (available - here_takes) * (here - before) / rise
        here, before, before_takes = int(min(max(line, 1), most)), here, here_takes
        if abs(here - before) <= step:
            break
    return here
