"""The library's verbs: what `import kvcalc` offers, and what each command calls."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import product
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcalc import sources
from kvcalc.config import ConfigFields
from kvcalc.engines import engine_names, load_engine, read_options
from kvcalc.errors import InputError, KvcalcError, UnsupportedError
from kvcalc.families import Architecture, decoder_level, describe
from kvcalc.origin import Origin
from kvcalc.sizing import MAX_BATCH, MAX_RANKS, Segment, SizeReport, size_architecture
from kvcalc.sources import catalogue
from kvcalc.strategies import ALL, ChosenStrategy, load_strategy, strategy_names
from kvcalc.units import MAX_TOKENS, check_count, parse_bytes, parse_tokens, shown

if TYPE_CHECKING:
    from kvcalc.fitting import FitReport
    from kvcalc.hardware import Gpu
    from kvcalc.weights import Weights

TABLE_SCHEMA = "kvcalc.size-table/1"

_LENGTHS = (4096, 32_768, 131_072)


class Model(NamedTuple):
    """A model that has been read; every verb takes it in place of a name, and reads nothing."""

    architecture: Architecture
    origin: Origin
    config: Mapping[str, Any]


class SizeTable(NamedTuple):
    """Reports of several points, and the models that could not be sized with the reason."""

    reports: tuple[SizeReport, ...]
    errors: tuple[tuple[str, KvcalcError], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; the schema is `kvcalc.size-table/1`."""
        return {
            "schema": TABLE_SCHEMA,
            "reports": [report.to_dict() for report in self.reports],
            "errors": [
                {"model": model, "exit_code": error.exit_code, "message": str(error)}
                for model, error in self.errors
            ],
        }


def size(
    model: str | PathLike[str] | Mapping[str, Any],
    *,
    seq: int | str,
    batch: int = 1,
    kv_dtype: str = "auto",
    engine: str = "model",
    strategy: str = "dynamic",
    tp: int = 1,
    pp: int = 1,
    encoder_seq: int | str | None = None,
    mtp: int = 0,
    decode: int = 0,
    options: Mapping[str, Any] | None = None,
) -> SizeReport:
    """The exact size of a model's KV cache.

    `model` is a catalogue name, a path (config.json or model folder), a Hugging Face id, the parsed
    config itself, or a transformers configuration object; `seq` counts the tokens of each of
    `batch` sequences (`"128k"` is 131,072). `engine` says whose layout is counted (`model`: what
    the architecture must keep), `strategy` how the cache is compressed, `tp` and `pp` over how many
    ranks it is spread. `encoder_seq` is the length of an encoder's output, whose K and V cross
    attention keeps; `mtp` counts that many multi-token-prediction layers. `decode` tokens came
    after the `seq` tokens of the prompt, which some strategies compress. `options` are those of
    the engine, named as it names them.

    Raises a KvcalcError: InputError and its children for what cannot be read, UnsupportedError
    where no exact size is known.
    """
    architecture, origin, _ = read_model(model)
    return size_point(
        architecture,
        origin,
        seq=seq,
        batch=batch,
        kv_dtype=kv_dtype,
        engine=engine,
        strategy=strategy,
        tp=tp,
        pp=pp,
        encoder_seq=encoder_seq,
        mtp=mtp,
        decode=decode,
        options=options,
    )


def fit(
    model: str | PathLike[str] | Mapping[str, Any] | Model,
    *,
    kv_memory: int | str | None = None,
    gpu: "str | Gpu | None" = None,
    share: float | str | None = None,
    reserve: int | str | None = None,
    weights: int | str | None = None,
    seq: int | str | None = None,
    concurrency: int = 1,
    engine: str = "vllm",
    kv_dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    options: Mapping[str, Any] | None = None,
    revision: str | None = None,
    max_seq: int = MAX_TOKENS,
    max_requests: int = MAX_BATCH,
) -> "FitReport":
    """What an engine holds in the memory that each rank has for its cache.

    `model` and the engine's parameters are those of `size`. The memory is `kv_memory` in bytes
    (`"20GiB"`), as vLLM prints it ("Available KV cache memory"), or what is left of each `gpu` (an
    id of `kvcalc gpus`, a YAML file, or `auto`): the engine's `share`, less the weights (counted,
    or `weights` in bytes), less a `reserve` for activations, context and graphs, which are
    estimated without one. Options that the engine's server sets by the device are set so. Without
    `seq` the model's own maximum is meant. `max_seq` and `max_requests` are the most tokens of a
    request, and requests at once, that the server takes. Raises what `size` raises.
    """
    from kvcalc.budget import BudgetLine, engine_defaults, gpu_budget
    from kvcalc.fitting import fit_architecture

    read = read_model(model, revision=revision)
    architecture, origin, config = read
    if seq is None and not architecture.max_tokens:
        msg = f"{origin.requested} does not say its longest sequence; give --seq"
        raise InputError(msg)
    check_count(tp, name="tp", most=MAX_RANKS)
    check_count(pp, name="pp", most=MAX_RANKS)
    if tp > 1 and (heads := attention_heads(read)) % tp:
        msg = (
            f"engines give each rank whole query heads, and {heads} are no multiple of --tp {tp}; "
            "deciding field: num_attention_heads"
        )
        raise UnsupportedError(msg)
    counted = None
    notes: tuple[str, ...] = ()
    told = dict(options or {})
    if kv_memory is not None:
        if gpu is not None or reserve is not None or weights is not None:
            msg = "--kv-memory says how much there is: leave --gpu, --reserve and --weights out"
            raise InputError(msg)
        if str(kv_memory).rpartition(":")[2].strip().startswith(("-", "0 ", "0.0 ", "0.00 ")):
            msg = (
                "--kv-memory: the engine had nothing left for its cache; it needs a larger share, "
                "more ranks or another GPU"
            )
            raise InputError(msg)
        given = parse_bytes(kv_memory, name="--kv-memory")
        lines: tuple[BudgetLine, ...] = (BudgetLine("KV cache", given, "asked for", ""),)
    elif gpu is None:
        msg = "give --gpu (kvcalc gpus lists ids), or --kv-memory, as the engine prints it"
        raise InputError(msg)
    else:
        from kvcalc.device import IN_FP16, choose_gpu, kept_dtype

        load_engine(engine)
        device = choose_gpu(gpu, ranks=tp * pp)
        kept = kept_dtype(device, engine, kv_dtype, architecture)
        notes = () if kept == kv_dtype else (f"{device.id}: {IN_FP16}",)
        kv_dtype = kept
        told = {**engine_defaults(engine, device), **told}
        counted = _weights(read, weights)
        lines = gpu_budget(
            device,
            counted,
            config=config,
            engine=engine,
            tp=tp,
            pp=pp,
            share=None if share is None else str(share),
            reserve_bytes=None if reserve is None else parse_bytes(reserve, name="--reserve"),
            options=read_options(engine, load_engine(engine).OPTIONS, told),
        )
    return fit_architecture(
        architecture,
        origin=origin,
        budget=lines,
        weights=counted,
        seq_tokens=parse_tokens(seq) if seq is not None else architecture.max_tokens,
        concurrency=concurrency,
        engine=engine,
        kv_dtype=kv_dtype,
        tp=tp,
        pp=pp,
        options=told,
        max_seq=max_seq,
        max_requests=max_requests,
        notes=notes,
    )


def _weights(model: Model, given: int | str | None) -> "Weights":
    """The weights' bytes: those that are given, else counted."""
    from kvcalc.budget import ASKED
    from kvcalc.sources.checkpoint import weights_of_model
    from kvcalc.weights import Weights

    if given is not None:
        return Weights(0, parse_bytes(given, name="--weights"), ASKED, "--weights")
    try:
        return weights_of_model(model.config, model.origin)
    except UnsupportedError as error:
        msg = f"{error}; or give the weights, --weights 140GB"
        raise UnsupportedError(msg) from None


def attention_heads(model: Model) -> int:
    """Query heads of the decoder; 0, which any number divides, where there is no one number."""
    level = decoder_level(model.config)
    fields = ConfigFields(level.config, model_type=level.model_type, prefix=level.prefix)
    heads = fields.get("num_attention_heads")
    return heads if isinstance(heads, int) else 0


def changes_that_fit(
    model: Model,
    report: "FitReport",
    **deployment: Any,  # noqa: ANN401 - parameters of `fit`
) -> list[str]:
    """Single changes, as options, by which a deployment that does not fit would, wherever in their
    ranges estimates lie.

    A maximum no longer than the requests, a smaller KV dtype, the fewest ranks of a power of two
    and the smallest GPU of the vendor's are tried; the longest sequence and the most requests are
    known. Empty where none is enough.
    """

    def first(changes: Iterable[tuple[str, Any]]) -> list[str]:
        """The first of the changes of one option that does."""
        for option, value in changes:
            try:
                tried = fit(model, **{**deployment, option.replace("-", "_"): value})
            except KvcalcError:  # an engine or a model that cannot
                continue
            if tried.fits and tried.sure:
                return [f"--{option} {value}"]
        return []

    found = _shorter_maximum(model, report, deployment) + first([("kv-dtype", "fp8")])
    if "gpu" in deployment:
        found += first(("tp", 2**power) for power in range(1, 7) if 2**power > report.plan.tp)
        found += first(("gpu", gpu.id) for gpu in _larger_gpus(deployment["gpu"]))
    longest = report.max_tokens_range[0]
    if own := report.size.max_tokens:
        longest = min(longest, own)
    if 0 < longest < report.seq_tokens:
        found.append(f"--seq {longest}")
    elif not longest:
        found += _shorter_requests(model, report, deployment)
    if report.max_concurrency_range[0]:
        found.append(f"--concurrency {report.max_concurrency_range[0]}")
    return found


def _shorter_maximum(model: Model, report: "FitReport", deployment: Mapping[str, Any]) -> list[str]:
    """A maximum that vLLM would start for, where it does not for its own, and hold the requests."""
    shorter = report.seq_tokens
    if (report.plan.options.get("max_model_len") or 0) <= shorter:
        return []
    options = {**(deployment.get("options") or {}), "max_model_len": shorter}
    tried = fit(model, **{**deployment, "options": options})
    return [f"--option max_model_len={shorter}"] if tried.fits and tried.sure else []


_FIXED = ("max_model_len", "n_ctx")
"""Options that say beforehand how long requests are, so that shorter ones alone help nothing:
vLLM's of one, llama.cpp's of all at once.
"""


def _shorter_requests(
    model: Model, report: "FitReport", deployment: Mapping[str, Any]
) -> list[str]:
    """The longest requests for which a server starts that does not for its fixed length."""
    options = dict(deployment.get("options") or {})
    for name in _FIXED:
        if not options.pop(name, None):
            continue
        with suppress(KvcalcError):  # an engine or a model that cannot
            free = fit(model, **{**deployment, "options": options, "seq": 1})
            longest = min(free.max_tokens_range[0], report.seq_tokens - 1)
            length = longest * (report.concurrency if name == "n_ctx" else 1)
            fixed = {**deployment, "options": {**options, name: length}, "seq": longest}
            tried = fit(model, **fixed)
            if tried.fits and tried.sure:
                return [f"--seq {longest} --option {name}={length}"]
    return []


def _larger_gpus(gpu: "str | Gpu") -> "list[Gpu]":
    """Those of the same vendor with more memory, the least first."""
    from kvcalc.device import choose_gpu
    from kvcalc.hardware import gpu_ids, load_gpu

    own = choose_gpu(gpu)
    least = own.total_bytes.value if own.total_bytes else 0
    sized = [
        (one.total_bytes.value, one)
        for one in map(load_gpu, gpu_ids())
        if one.total_bytes and one.vendor == own.vendor
    ]
    return [one for total, one in sorted(sized, key=lambda pair: pair[0]) if total > least]


def size_point(
    architecture: Architecture,
    origin: Origin,
    *,
    seq: int | str,
    encoder_seq: int | str | None = None,
    decode: int = 0,
    **point: Any,  # noqa: ANN401 - passed on by name
) -> SizeReport:
    """Like `size`, for a model that has been read already."""
    for name in ("kv_dtype", "engine", "strategy"):
        if not isinstance(point.get(name, ""), str):
            msg = f"{name} must be a name, not {shown(point[name])}"
            raise InputError(msg)
    encoder_tokens = None
    if encoder_seq is not None:
        parts = (part for layer in architecture.layers for part in layer.parts())
        if not any(part.kind == "cross_attention" for part in parts):
            msg = f"{origin.requested} is a decoder without cross attention; leave encoder_seq out"
            raise UnsupportedError(msg)
        encoder_tokens = parse_tokens(encoder_seq, name="--encoder-seq")
    return size_architecture(
        architecture,
        origin=origin,
        seq_tokens=parse_tokens(seq) + check_count(decode, name="decode", least=0, most=MAX_TOKENS),
        decode_tokens=decode,
        encoder_tokens=encoder_tokens,
        **point,
    )


def read_model(
    model: str | PathLike[str] | Mapping[str, Any] | Model, *, revision: str | None = None
) -> Model:
    """Find a model's config and read it into an Architecture."""
    if isinstance(model, Model):
        return model
    if isinstance(model, PathLike):
        model = fspath(model)
    if hasattr(model, "to_dict"):  # a transformers configuration
        model = model.to_dict()
    if not isinstance(model, str | Mapping):
        msg = f"model must be a name, a path or a config, not {shown(model)}"
        raise InputError(msg)
    config, origin = sources.resolve(model, revision=revision)
    return Model(describe(config), origin, config)


def size_table(
    models: Sequence[str],
    *,
    seqs: Sequence[str],
    batches: Sequence[int],
    kv_dtypes: Sequence[str],
    engines: Sequence[str] = ("model",),
    revision: str | None = None,
    **point: Any,  # noqa: ANN401 - passed on by name
) -> SizeTable:
    """Every combination, model by model; what cannot be sized leaves its error, the rest goes on.

    Without `seqs` each model is sized at a few lengths up to its own maximum.
    """
    reports: list[SizeReport] = []
    errors: list[tuple[str, KvcalcError]] = []
    for model in models:
        try:
            architecture, origin, _ = read_model(model, revision=revision)
        except KvcalcError as error:
            errors.append((model, error))
            continue
        lengths: Sequence[int | str] = seqs or default_lengths(architecture.max_tokens)
        for seq, batch, kv_dtype, engine in product(lengths, batches, kv_dtypes, engines):
            own: dict[str, Any] = {
                "seq": seq,
                "batch": batch,
                "kv_dtype": kv_dtype,
                "engine": engine,
            }
            try:
                reports.append(size_point(architecture, origin, **own, **point))
            except KvcalcError as error:
                errors.append((f"{model} in {engine}" if len(engines) > 1 else model, error))
    errors = list({(model, str(error)): (model, error) for model, error in errors}.values())
    return SizeTable(tuple(reports), tuple(errors))


def engines(names: Sequence[str]) -> Sequence[str]:
    """The engines of these names: `all` stands for every engine, no name for `model`."""
    return engine_names() if ALL in names else names or ("model",)


def engine_options(items: Sequence[str]) -> dict[str, str]:
    """Options written as `name=value`; InputError for anything else."""
    options = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            msg = f"--option {shown(item)} is not name=value"
            raise InputError(msg)
        options[name.strip()] = value.strip()
    return options


def default_lengths(max_tokens: int) -> tuple[int, ...]:
    """A few lengths to show when the user names none: up to the model's maximum, and it last."""
    if not max_tokens:
        return _LENGTHS
    return (*(length for length in _LENGTHS if length < max_tokens), max_tokens)


def list_models(words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Catalogue entries in whose name, other names, model type or family each word occurs;
    `refused` stands for the entries that no family claims.
    """
    other_names: dict[str, list[str]] = {}
    for alias, name in catalogue.aliases().items():
        other_names.setdefault(name, []).append(alias)
    wanted = [word.lower() for word in words]
    rows = []
    for entry in catalogue.entries():
        row = {
            "name": entry.name,
            "model_type": entry.config.get("model_type", ""),
            "also": other_names.get(entry.name, []),
            **_sized(entry.config),
            "completeness": entry.completeness,
            "source": entry.source,
            "date": entry.date,
        }
        also = (row["family"] or "refused", row["model_type"], *row["also"])
        searched = " ".join((row["name"], *also)).lower()
        if all(word in searched for word in wanted):
            rows.append(row)
    return rows


def list_gpus(words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Accelerators in whose id, names, vendor or architecture each word occurs; a figure is a
    value with its source and date, or None where nothing vouches for it.
    """
    from kvcalc.hardware import FIGURES, gpu_ids, load_gpu

    wanted = [word.lower() for word in words]
    rows = []
    for gpu in map(load_gpu, gpu_ids()):
        searched = " ".join((gpu.id, gpu.name, *gpu.also, gpu.vendor, gpu.architecture or ""))
        if not all(word in searched.lower() for word in wanted):
            continue
        row = gpu._asdict()
        for name in FIGURES:
            figure = row[name]
            row[name] = figure and {**figure._asdict(), "date": figure.date.isoformat()}
        rows.append(row)
    return rows


def _sized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Family and cost of a catalogue entry once its windows are full, or why it is refused."""
    facts = {
        "family": "",
        "kv_dtype": "",
        "layers": 0,
        "max_tokens": 0,
        "bytes_per_token": 0,
        "fixed_bytes": 0,
    }
    try:
        architecture = describe(config)
        origin = Origin(requested="", resolved="", kind="catalogue", detail="")
        report = size_architecture(architecture, origin=origin, seq_tokens=1, encoder_tokens=1)
    except KvcalcError as error:
        return facts | {"refused": str(error)}
    last = report.segments[-1] if report.segments else Segment(0, 0, report.bytes_per_token)
    return {
        "family": architecture.family,
        "kv_dtype": report.kv_dtype,
        "layers": len(architecture.layers),
        "max_tokens": architecture.max_tokens,
        "bytes_per_token": last.bytes_per_token,
        "fixed_bytes": last.fixed_bytes,
        "refused": "",
    }


def list_strategies(name: str = "") -> list[dict[str, Any]]:
    """What there is to know about each strategy, or about the one named; of a pair (`snapkv+int4`)
    about both.

    `parameters` are defaults, `choices` the words of those that are one of several. A headline is
    what a paper or project promises; `measures` is what of a profile (`bytes`, `peak`, `ttft`,
    `tpot`, `fidelity`) is the same quantity, "" where nothing is.
    """
    names: Sequence[str] = strategy_names()
    if name:
        named = load_strategy(name)
        names = [one.own_name for one in (named, named.then) if one]
    return [_told(load_strategy(one)) for one in names]


def _told(chosen: ChosenStrategy) -> dict[str, Any]:
    """A strategy with its defaults, as JSON has it."""
    strategy = chosen.strategy
    choices = {
        key: [str(word) for word in type(value)]
        for key, value in strategy.PARAMETERS.items()
        if isinstance(value, StrEnum)
    }
    return {
        "name": chosen.name,
        "summary": strategy.SUMMARY,
        **strategy.ABOUT._asdict(),
        "works_on": strategy.WORKS_ON,
        "parameters": chosen.plain_parameters,
        "choices": choices,
        "composes": bool(getattr(strategy, "COMPOSES", False)),
        "stores": bool(getattr(strategy, "STORES", False)),
        "source": strategy.SOURCE,
        "headlines": [headline._asdict() for headline in strategy.ABOUT.headlines],
    }
