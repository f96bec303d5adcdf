"""From an architecture and a point (tokens, batch, dtype, engine, strategy) to exact bytes.

Everything is integer addition over the layers; no I/O. The result keeps what it was made of.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from kvcalc.config import FieldUse
from kvcalc.dtypes import COMPUTE_DTYPES, PAYLOAD_ONLY, StorageFormat, storage_format
from kvcalc.engines import Engine, Plan, Same, load_engine, read_options
from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.families import Architecture
from kvcalc.layers import Layer, Setting
from kvcalc.origin import Origin
from kvcalc.strategies import BASELINE, ChosenStrategy, load_strategy
from kvcalc.units import MAX_TOKENS, ceil_div, check_count, format_bytes

SCHEMA = "kvcalc.size/1"

INFERRED = "inferred"
"""The family of model types that nobody listed."""

MAX_BATCH = 2**31 - 1
MAX_RANKS = 2**16


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One layer's share. `bytes` is for all sequences and all ranks."""

    index: int
    kind: str
    bytes: int
    keeps: str


class LayerGroup(NamedTuple):
    """Layers that keep the same. Byte counts are for all ranks; `bytes_per_layer` and
    `total_bytes` for all sequences, `bytes_per_token` for one more token of one sequence.
    """

    kind: str
    indices: tuple[int, ...]
    keeps: str
    formula: str
    bytes_per_layer: int
    total_bytes: int
    bytes_per_token: int


class Segment(NamedTuple):
    """A stretch of lengths with one slope: bytes(n) = fixed_bytes + bytes_per_token × n.

    For one sequence, all ranks, from `from_tokens` up to the next segment.
    """

    from_tokens: int
    fixed_bytes: int
    bytes_per_token: int


class SizeReport(NamedTuple):
    """The exact size of a cache and what it was made of. All counts are bytes, all ranks unless
    a name says otherwise.

    - `total_bytes`: all sequences; `bytes_per_sequence`: one of them.
    - `bytes_per_rank`: the largest share that one rank keeps.
    - `bytes_per_token`: one more token of one sequence at this length (negative where a strategy
      packs its tail at that token).
    - `segments`: the whole line; empty when growth is not piecewise linear.
    - `transients`: states that pass, such as what a long prefill pins until the first decode step.
    """

    origin: Origin
    model_type: str
    family: str
    family_source: str
    engine: str
    engine_source: str
    strategy: str
    seq_tokens: int
    max_tokens: int
    batch: int
    tp: int
    pp: int
    kv_dtype: str
    kv_dtype_origin: str
    total_bytes: int
    bytes_per_rank: int
    bytes_per_sequence: int
    bytes_per_token: int
    groups: tuple[LayerGroup, ...]
    segments: tuple[Segment, ...]
    transients: Mapping[str, int]
    fields: tuple[FieldUse, ...]
    notes: tuple[str, ...]
    provenance: str = "exact"
    decode_tokens: int = 0

    @property
    def layers(self) -> tuple[LayerSize, ...]:
        """One entry for each decoder layer, in order."""
        sizes = [
            LayerSize(index, group.kind, group.bytes_per_layer, group.keeps)
            for group in self.groups
            for index in group.indices
        ]
        return tuple(sorted(sizes, key=lambda size: size.index))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; the schema is `kvcalc.size/1`."""
        return {
            "schema": SCHEMA,
            "model": self.origin.requested,
            "resolved_model": self.origin.resolved,
            "model_type": self.model_type,
            "family": self.family,
            "engine": self.engine,
            "strategy": self.strategy,
            "seq_tokens": self.seq_tokens,
            "decode_tokens": self.decode_tokens,
            "max_tokens": self.max_tokens,
            "batch": self.batch,
            "tp": self.tp,
            "pp": self.pp,
            "kv_dtype": self.kv_dtype,
            "kv_dtype_origin": self.kv_dtype_origin,
            "total_bytes": self.total_bytes,
            "bytes_per_rank": self.bytes_per_rank,
            "bytes_per_sequence": self.bytes_per_sequence,
            "bytes_per_token": self.bytes_per_token,
            "provenance": self.provenance,
            "segments": [segment._asdict() for segment in self.segments],
            "transients": dict(self.transients),
            "layers": [asdict(layer) for layer in self.layers],
            "rules": {"family": self.family_source, "engine": self.engine_source},
            "fields": [field._asdict() for field in self.fields],
            "source": {
                "kind": self.origin.kind,
                "detail": self.origin.detail,
                "completeness": self.origin.completeness,
            },
            "notes": list(self.notes),
        }


def size_architecture(
    architecture: Architecture,
    *,
    origin: Origin,
    seq_tokens: int,
    batch: int = 1,
    kv_dtype: str = "auto",
    engine: str = "model",
    strategy: str = BASELINE,
    tp: int = 1,
    pp: int = 1,
    encoder_tokens: int | None = None,
    mtp: int = 0,
    decode_tokens: int = 0,
    options: Mapping[str, Any] | None = None,
) -> SizeReport:
    """Size one point; `encoder_tokens` is the length of an encoder's output, `mtp` the number of
    multi-token-prediction layers that are counted. Of the `seq_tokens` the last `decode_tokens`
    came after the prompt, which some strategies compress. `options` are the engine's own.

    Raises InputError for a value out of range and UnsupportedError where the combination has no
    exact size.
    """
    check_count(decode_tokens, name="decode", least=0, most=seq_tokens - 1)
    plan, chosen, dtype_use = _plan(
        architecture, seq_tokens, batch, kv_dtype, engine, strategy, tp, pp, options or {}
    )
    runtime, dtype = load_engine(engine), plan.dtype
    setting = Setting(
        _compute_format(architecture, dtype),
        encoder_tokens,
        seq_tokens - decode_tokens if chosen.compresses else None,
    )
    predicted = _prediction_layers(architecture, engine, mtp)
    counted = architecture._replace(layers=architecture.layers + predicted) if mtp else architecture
    layers = _laid_out(counted, plan, engine)
    check_point = getattr(runtime, "check_point", None)
    if check_point is not None:
        check_point(counted, plan)
    stored, segments = _stored_layers(Same(layers), Same(chosen), setting, tp, dtype)
    groups = tuple(each.group(seq_tokens, batch) for each in stored)
    total_bytes = sum(group.total_bytes for group in groups)
    unsharded_bytes = sum(each.unsharded_bytes(seq_tokens, batch) for each in stored)
    return SizeReport(
        origin=origin,
        model_type=architecture.model_type,
        family=architecture.family,
        family_source=architecture.family_source,
        engine=engine,
        engine_source=runtime.source(),
        strategy=chosen.spec,
        seq_tokens=seq_tokens,
        max_tokens=architecture.max_tokens,
        batch=batch,
        tp=tp,
        pp=pp,
        kv_dtype=plan.kept_in,
        kv_dtype_origin=dtype_use.origin if plan.kept_in == dtype.name else "options of the engine",
        total_bytes=total_bytes,
        bytes_per_rank=_bytes_per_rank(stored, plan),
        bytes_per_sequence=_one_sequence(stored, seq_tokens),
        bytes_per_token=sum(group.bytes_per_token for group in groups),
        groups=groups,
        segments=segments,
        transients=MappingProxyType(
            runtime.transients(
                tuple(each.layer for each in stored for _ in each.indices),
                tokens=seq_tokens,
                batch=batch,
                dtype=dtype,
            )
        ),
        fields=architecture.fields,
        notes=(
            *origin.notes,
            *_inferred_note(architecture),
            *_prediction_note(architecture, mtp),
            *_payload_note(architecture, plan, runtime),
            *_notes(architecture, seq_tokens=seq_tokens, pp=pp),
            *_replication_note(total_bytes - unsharded_bytes),
        ),
        provenance="inferred from fields" if architecture.family == INFERRED else "exact",
        decode_tokens=decode_tokens,
    )


def rank_bytes(
    architecture: Architecture,
    *,
    kv_dtype: str,
    engine: str,
    tp: int,
    pp: int,
    options: Mapping[str, Any],
) -> tuple[Callable[[int, int], int], Plan]:
    """`SizeReport.bytes_per_rank` alone, of tokens and batch, for searches that ask for many, and
    the plan of one token, with all options.

    Raises, as does what it gives, what `size_architecture` raises.
    """
    plan, chosen, _ = _plan(architecture, 1, 1, kv_dtype, engine, BASELINE, tp, pp, options)
    setting = Setting(_compute_format(architecture, plan.dtype), None, None)
    layers = Same(_laid_out(architecture, plan, engine))
    stored, _ = _stored_layers(layers, Same(chosen), setting, tp, plan.dtype)
    check_point = getattr(load_engine(engine), "check_point", None)

    def of(tokens: int, batch: int) -> int:
        here = plan._replace(tokens=tokens, batch=batch)
        if check_point is not None:
            check_point(architecture, here)
        return _bytes_per_rank(stored, here)

    return of, plan


def _laid_out(architecture: Architecture, plan: Plan, engine: str) -> tuple[Layer, ...]:
    """The layers as the engine stores them, which are the same for every length and batch."""
    options = tuple(plan.options.items())
    return _lay_out(Same(architecture), engine, plan.dtype, plan.tp, plan.pp, options)


@lru_cache(maxsize=64)
def _lay_out(
    architecture: Same[Architecture],
    engine: str,
    dtype: StorageFormat,
    tp: int,
    pp: int,
    options: tuple[tuple[str, Any], ...],
) -> tuple[Layer, ...]:
    plan = Plan(1, 1, dtype, tp, pp, dict(options))
    return load_engine(engine).lay_out(architecture.it, plan)


def _plan(
    architecture: Architecture,
    seq_tokens: int,
    batch: int,
    kv_dtype: str,
    engine: str,
    strategy: str,
    tp: int,
    pp: int,
    options: Mapping[str, Any],
) -> tuple[Plan, ChosenStrategy, FieldUse]:
    """What was asked for, once it is known to be possible."""
    check_count(seq_tokens, name="seq", most=MAX_TOKENS)
    check_count(batch, name="batch", most=MAX_BATCH)
    check_count(tp, name="tp", most=MAX_RANKS)
    check_count(pp, name="pp", most=MAX_RANKS)
    runtime = load_engine(engine)
    chosen = load_strategy(strategy)
    _accept(Same(architecture), engine, tp, pp)
    if chosen.layers_share and pp > 1:
        msg = f"{chosen.name} lets the prompt spread the budget over the layers: leave --pp out"
        raise UnsupportedError(msg)
    dtype_use = _dtype(architecture, runtime, chosen, kv_dtype)
    dtype = storage_format(str(dtype_use.value))
    runtime.check_dtype(dtype)
    settings = read_options(engine, runtime.OPTIONS, options)
    return Plan(seq_tokens, batch, dtype, tp, pp, settings), chosen, dtype_use


@lru_cache(maxsize=64)
def _accept(architecture: Same[Architecture], engine: str, tp: int, pp: int) -> None:
    """Raise what the engine refuses; that it does not is remembered."""
    load_engine(engine).refuse(architecture.it, tp=tp, pp=pp)


class _StoredLayer(NamedTuple):
    """A stored layer, one rank's shard of it, and the places of the decoder layers like it."""

    layer: Layer
    shard: Layer
    indices: tuple[int, ...]
    tp: int
    dtype: StorageFormat

    def layer_bytes(self, tokens: int, batch: int = 1) -> int:
        """One of the layers, on all ranks."""
        return self.tp * self.shard.num_bytes(tokens=tokens, batch=batch, dtype=self.dtype)

    def unsharded_bytes(self, tokens: int, batch: int) -> int:
        """All of the layers, if one rank kept them."""
        one = self.layer.num_bytes(tokens=tokens, batch=batch, dtype=self.dtype)
        return len(self.indices) * one

    def group(self, tokens: int, batch: int) -> LayerGroup:
        """The layers at one point."""
        count = len(self.indices)
        per_layer = self.layer_bytes(tokens, batch)
        sequences = f"{batch:,} sequences × " if batch > 1 else ""
        ranks = f"{self.tp} ranks × " if self.tp > 1 else ""
        return LayerGroup(
            kind=self.layer.kind,
            indices=self.indices,
            keeps=self.layer.keeps(),
            formula=sequences + ranks + self.shard.formula(tokens=tokens, dtype=self.dtype),
            bytes_per_layer=per_layer,
            total_bytes=count * per_layer,
            bytes_per_token=count * (self.layer_bytes(tokens + 1) - self.layer_bytes(tokens)),
        )


def _dtype(
    architecture: Architecture, runtime: Engine, chosen: ChosenStrategy, requested: str
) -> FieldUse:
    """The storage format and why: the user's, or `auto`.

    Strategies other than the baseline start from the model's dtype: a KV quantisation that the
    checkpoint declares is for serving engines.
    """
    if requested.strip().lower() != "auto":
        return FieldUse("kv_dtype", storage_format(requested).name, "asked for")
    use = runtime.auto_dtype(architecture) if chosen.name == BASELINE else architecture.model_dtype
    if isinstance(use, ConfigError):
        raise use
    return use


def _prediction_layers(architecture: Architecture, engine: str, mtp: int) -> tuple[Layer, ...]:
    """The prediction layers that are to be counted."""
    if check_count(mtp, name="mtp", least=0, most=MAX_RANKS) == 0:
        return ()
    if engine == "transformers":
        msg = "transformers keeps no cache for prediction layers; use --engine model for --mtp"
        raise UnsupportedError(msg)
    return architecture.prediction.layers(mtp, architecture.model_type)


def _inferred_note(architecture: Architecture) -> Iterator[str]:
    if architecture.family == INFERRED:
        yield f"no family knows model_type {architecture.model_type!r}: sized by its fields alone"


def _prediction_note(architecture: Architecture, mtp: int) -> Iterator[str]:
    field, declared, _ = architecture.prediction
    if mtp:
        yield f"multi-token prediction counted: {mtp} of {declared} layers ({field})"
    elif declared:
        yield f"multi-token prediction not counted ({field}={declared})"


def _compute_format(architecture: Architecture, dtype: StorageFormat) -> StorageFormat:
    """What states are kept in that have no format of their own: the cache's when the model can
    compute in it, else the model's.
    """
    if dtype.name in COMPUTE_DTYPES:
        return dtype
    use = architecture.model_dtype
    if isinstance(use, ConfigError):
        raise use
    return storage_format(str(use.value))


@lru_cache(maxsize=64)
def _stored_layers(
    layers: Same[tuple[Layer, ...]],
    chosen: Same[ChosenStrategy],
    setting: Setting,
    tp: int,
    dtype: StorageFormat,
) -> tuple[tuple[_StoredLayer, ...], tuple[Segment, ...]]:
    """Each distinct layer as it is stored, in the order of its first place, and their growth.

    It is the same for every length, and remembered: a sweep goes over many.
    """
    chosen.it.check(layers.it)
    # Families repeat one object, and so it is bound once: telling objects apart first spares
    # comparing every layer.
    bound: dict[int, Layer] = {}
    for layer in layers.it:
        if id(layer) not in bound:
            bound[id(layer)] = layer.bind(setting)
    applied = chosen.it.apply_all([bound[id(layer)] for layer in layers.it])
    objects: dict[int, tuple[Layer, list[int]]] = {}
    for index, layer in enumerate(applied):
        found = objects.get(id(layer))
        if found is None:
            objects[id(layer)] = (layer, [index])
        else:
            found[1].append(index)
    places: dict[Layer, list[int]] = {}
    for layer, indices in objects.values():
        places.setdefault(layer, []).extend(indices)
    stored = []
    for layer, indices in places.items():
        indices.sort()
        held = layer.bind(setting)
        stored.append(_StoredLayer(held, held.shard(tp), tuple(indices), tp, dtype))
    return tuple(stored), _segments(stored)


def _one_sequence(stored: Sequence[_StoredLayer], tokens: int) -> int:
    return sum(len(each.indices) * each.layer_bytes(tokens) for each in stored)


def _bytes_per_rank(stored: Sequence[_StoredLayer], plan: Plan) -> int:
    """The largest pipeline stage's share, on each of its tensor-parallel ranks.

    Stages are contiguous and differ by one layer at most, the longer ones first.
    """
    sizes = [each.layer_bytes(plan.tokens, plan.batch) for each in stored]
    if plan.pp == 1:
        total = sum(len(each.indices) * size for each, size in zip(stored, sizes, strict=True))
        return total // plan.tp
    placed = sorted(
        (index, size) for each, size in zip(stored, sizes, strict=True) for index in each.indices
    )
    if plan.pp > len(placed):
        msg = f"--pp {plan.pp} is more stages than the model has layers ({len(placed)})"
        raise UnsupportedError(msg)
    stages = []
    start = 0
    for stage in range(plan.pp):
        end = start + ceil_div(len(placed) - start, plan.pp - stage)
        stages.append(sum(num_bytes for _, num_bytes in placed[start:end]))
        start = end
    return max(stages) // plan.tp


def _segments(stored: Sequence[_StoredLayer]) -> tuple[Segment, ...]:
    """The straight stretches of the growth of one sequence, or () when there is a staircase."""
    starts = {0}
    for each in stored:
        breakpoints = each.layer.breakpoints()
        if breakpoints is None:
            return ()
        starts.update(breakpoints)
    segments = []
    for start in sorted(starts):
        here = _one_sequence(stored, start)
        slope = _one_sequence(stored, start + 1) - here
        segments.append(Segment(start, here - slope * start, slope))
    return tuple(segments)


def _payload_note(architecture: Architecture, plan: Plan, engine: Engine) -> Iterator[str]:
    counts_scales = getattr(engine, "counts_scales", None)
    if plan.dtype.name not in PAYLOAD_ONLY or (counts_scales and counts_scales(architecture, plan)):
        return
    yield f"{plan.dtype.name} counts the payload alone, without scales"


def _notes(architecture: Architecture, *, seq_tokens: int, pp: int) -> Iterator[str]:
    if beyond := beyond_maximum(architecture, seq_tokens):
        yield beyond
    if len(architecture.layers) % pp:
        longer = ceil_div(len(architecture.layers), pp)
        yield f"pipeline stages of {longer} layers, then of {longer - 1}"


def beyond_maximum(architecture: Architecture, seq_tokens: int) -> str:
    """A note of more tokens than the model was made for; empty where they are not."""
    if 0 < architecture.max_tokens < seq_tokens:
        return (
            f"{seq_tokens:,} tokens is beyond the model's own maximum of "
            f"{architecture.max_tokens:,}"
        )
    return ""


def _replication_note(stored_more: int) -> Iterator[str]:
    if stored_more > 0:
        yield f"tensor parallelism stores {format_bytes(stored_more)} more than one rank would"
