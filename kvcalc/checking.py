"""Deployments that a YAML file names, and what is required of them: `kvcalc check`.

A file is read strictly (`kvcalc.strict_yaml`), each deployment is fitted by `kvcalc.api.fit`, and
each requirement is compared in whole numbers or fractions, never in rounded ones. Nothing is
printed here. Whatever is wrong names its file, line and key.
"""

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc import api
from kvcalc.data import profiles_folder
from kvcalc.device import AUTO
from kvcalc.dtypes import storage_format
from kvcalc.engines import load_engine, read_options
from kvcalc.errors import (
    ConfigError,
    GatedModelError,
    HubUnavailableError,
    InputError,
    KvcalcError,
    ModelNotFoundError,
    OutputError,
    UnsupportedError,
)
from kvcalc.fitting import FitReport
from kvcalc.hardware import file_path, is_file, named_gpu
from kvcalc.layers import FullAttention, LatentAttention
from kvcalc.layers.mixed import IndexKeys, NoCache
from kvcalc.sizing import MAX_BATCH, MAX_RANKS, beyond_maximum, rank_bytes
from kvcalc.sources.local import SUFFIXES
from kvcalc.strict_yaml import (
    Fields,
    Node,
    Place,
    PlacedError,
    did_you_mean,
    fields,
    items,
    read,
    text,
)
from kvcalc.units import check_count, parse_bytes, parse_tokens, shown

SCHEMA = "kvcalc.check/1"
MAX_BASELINE_BYTES = 64 * 2**20

STARTER = "kvcalc.yaml"
"""What `--init` writes when no file is named."""


class Figure(NamedTuple):
    """A figure that can be required: `kind` is `flag`, `bytes`, `bytes or share` or `count`."""

    kind: str
    label: str
    about: str


FIGURES: Mapping[str, Figure] = {
    "fits": Figure("flag", "fits", "the workload fits into the cache's memory"),
    "headroom": Figure(
        "bytes or share", "headroom", "what is left of it on each rank, in bytes or percent of it"
    ),
    "max_concurrency": Figure("count", "max concurrency", "most requests of the sequence at once"),
    "max_tokens": Figure("count", "longest sequence", "longest sequence at the concurrency"),
    "kv_bytes_per_token": Figure(
        "bytes",
        "KV per token",
        "one more token of one sequence, as the architecture must keep it, on all ranks together",
    ),
    "needed": Figure("bytes", "needed", "what the workload's cache takes on each rank"),
    "kv_memory": Figure("bytes", "memory", "what each rank has for its cache"),
    "weights": Figure("bytes", "weights", "the model's weights, on all ranks together"),
}
"""What a requirement may be about."""

_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}

KEYS: Mapping[str, str] = {
    "model": "catalogue name, Hugging Face id, or a config.json or folder beside this file",
    "revision": "branch, tag or commit on the Hub",
    "kv_memory": "memory of each rank for its cache, as the engine prints it: 30GiB",
    "gpu": "an id that kvcalc gpus lists, or a YAML beside this file; else kv_memory",
    "share": "the engine's share of the GPU; else its default",
    "reserve": "what activations, context and graphs take of each GPU: 3GiB; else estimated",
    "weights": "bytes of the model's weights on all ranks: 140GB; else counted",
    "count": "GPUs of the deployment: tp × pp",
    "engine": "whose rules; else vllm",
    "options": "the engine's own options",
    "kv_dtype": "auto, bf16, fp8, q8_0",
    "tp": "tensor-parallel ranks; else count ÷ pp",
    "pp": "pipeline stages; else 1",
    "workload": "what is asked of it at once",
    "require": "what must hold",
}
WORKLOAD_KEYS: Mapping[str, str] = {
    "sequence": "tokens of a request: 32k; else the model's maximum",
    "concurrency": "requests at once; else 1",
    "prefix_share": "the part of a sequence that all requests share: 50%",
}
TOP_KEYS: Mapping[str, str] = {
    "defaults": "what every deployment has that does not say otherwise",
    "deployments": "by name",
}
_Figures = dict[str, int | bool | None]

FREE = "x-"
"""How top-level keys begin that only hold anchors."""


class Requirement(NamedTuple):
    """`figure comparison bound`; the bound is bytes, a count, a part of the memory, or True."""

    place: Place
    text: str
    figure: str
    comparison: str
    bound: int | Fraction


class Deployment(NamedTuple):
    """What a file says of one: `given` goes to `api.fit` by name."""

    name: str
    place: Place
    model: str
    model_place: Place
    gpu: str
    given: Mapping[str, Any]
    prefix_share: Fraction
    requirements: tuple[Requirement, ...]


class Outcome(NamedTuple):
    """Whether a requirement holds, and what was found: bytes, a count, a part, or a truth. Where
    estimates leave that open, `ends` are what would be found with them at their worst and best.
    """

    requirement: Requirement
    holds: bool
    found: int | Fraction
    ends: tuple[int | Fraction, int | Fraction] | None = None


class Result(NamedTuple):
    """A deployment's figures (None: not known) and outcomes, or the error, and the place it is
    about; `note` is what makes nothing fail.
    """

    deployment: Deployment
    figures: Mapping[str, int | bool | None]
    facts: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    error: KvcalcError | None = None
    error_place: Place | None = None
    note: str = ""

    @property
    def status(self) -> str:
        """`holds`, `fails`, `open` (estimates do not decide it), `refused` (no exact size) or
        `bad` (the model or an option).
        """
        if self.error is not None:
            return "refused" if isinstance(self.error, UnsupportedError) else "bad"
        if any(outcome.ends is None and not outcome.holds for outcome in self.outcomes):
            return "fails"
        return "open" if any(outcome.ends for outcome in self.outcomes) else "holds"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return {
            "file": self.deployment.place.file,
            "line": self.deployment.place.line,
            "name": self.deployment.name,
            "model": self.deployment.model,
            "status": self.status,
            **self.facts,
            "figures": dict(self.figures),
            "requirements": [
                {
                    "line": outcome.requirement.place.line,
                    "text": outcome.requirement.text,
                    "holds": outcome.holds if outcome.ends is None else None,
                    "found": float(outcome.found)
                    if isinstance(outcome.found, Fraction)
                    else outcome.found,
                    "ends": outcome.ends and [float(end) for end in outcome.ends],
                }
                for outcome in self.outcomes
            ],
            "note": self.note,
            "error": None
            if self.error is None
            else {"exit_code": self.error.exit_code, "message": str(self.error)},
        }


class Change(NamedTuple):
    """What became of a deployment since the baseline; `figures` are pairs of old and new."""

    file: str
    name: str
    figures: Mapping[str, tuple[Any, Any]]
    said: str = ""


class CheckReport(NamedTuple):
    """Everything that was checked; `errors` are files that cannot be read, with the place."""

    results: tuple[Result, ...]
    errors: tuple[tuple[Place, InputError], ...]
    changes: tuple[Change, ...] | None = None

    @property
    def exit_code(self) -> int:
        """The worst: 2 for a bad file or model, 1 for what does not hold, 3 for what has no exact
        size or is left open by estimates.
        """
        statuses = {result.status for result in self.results}
        if self.errors or "bad" in statuses:
            return 2
        if "fails" in statuses:
            return 1
        return 3 if statuses & {"refused", "open"} else 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; the schema is `kvcalc.check/1`."""
        told: dict[str, Any] = {
            "schema": SCHEMA,
            "exit_code": self.exit_code,
            "deployments": [result.to_dict() for result in self.results],
            "errors": [
                {"file": place.file, "line": place.line, "message": str(error)}
                for place, error in self.errors
            ],
        }
        if self.changes is not None:
            told["changes"] = [
                {
                    "file": change.file,
                    "name": change.name,
                    "said": change.said,
                    "figures": {
                        name: {"old": old, "new": new}
                        for name, (old, new) in change.figures.items()
                    },
                }
                for change in self.changes
            ]
        return told


def check(
    files: Sequence[Path], *, baseline: Path | None = None, every_figure: bool = True
) -> CheckReport:
    """Check the deployments of these files, and tell them from those of an earlier run's JSON.

    With `every_figure` false the longest sequence is looked for only where something is required
    of it.
    What is wrong with a file or a deployment stands in the report; InputError is raised for a
    baseline that is none.
    """
    old = read_baseline(baseline) if baseline else None
    results: list[Result] = []
    errors: list[tuple[Place, InputError]] = []
    runs = _Runs(every_figure=every_figure)
    for file in dict.fromkeys(files):
        try:
            deployments = read_checks(file)
        except InputError as error:
            place = error.place if isinstance(error, PlacedError) else Place(file.as_posix(), 1)
            errors.append((place, error))
            continue
        results += [runs.result(deployment) for deployment in deployments]
    changes = None if old is None else tuple(_changes(old, results))
    return CheckReport(tuple(results), tuple(errors), changes)


# Reading


def read_checks(path: Path) -> tuple[Deployment, ...]:
    """The deployments of a file, in its order; InputError with line and key for what is wrong."""
    place, root = read(path)
    defaults: _Layer | None = None
    named: tuple[Place, Node] | None = None
    own = root
    if isinstance(root, Fields):
        own = Fields(
            root.line, {key: at for key, at in root.all.items() if not key.startswith(FREE)}
        )
    for key, here, node in fields(place, own, TOP_KEYS):
        if key == "deployments":
            named = (here, node)
        else:
            defaults = _layer(here, node)
    if named is None:
        msg = "missing key 'deployments'"
        raise place.wrong(msg)
    deployments = tuple(
        _deployment(name, here, node, defaults) for name, here, node in fields(*named)
    )
    if not deployments:
        msg = "there are none"
        raise named[0].wrong(msg)
    return deployments


_Given = dict[str, tuple[Place, Node]]


class _Layer(NamedTuple):
    """What one place says of a deployment: its keys, those of its workload, and what it requires
    of each figure.
    """

    given: _Given
    workload: _Given
    required: Mapping[str, Sequence[Requirement]]


def _layer(place: Place, node: Node) -> _Layer:
    given = {key: (at, value) for key, at, value in fields(place, node, KEYS)}
    workload: _Given = {}
    if "workload" in given:
        workload = {
            key: (at, value) for key, at, value in fields(*given["workload"], WORKLOAD_KEYS)
        }
    required: dict[str, list[Requirement]] = {}
    if "require" in given:
        for at, item in items(*given["require"]):
            requirement = _requirement(at, item)
            required.setdefault(requirement.figure, []).append(requirement)
    return _Layer(given, workload, required)


def _layers(place: Place, node: Node, defaults: _Layer | None) -> Iterator[_Layer]:
    """What is said of a deployment, the weakest first: defaults, what it merges, its own keys."""
    if defaults is not None:
        yield defaults
    if isinstance(node, Fields) and node.merged:
        yield _layer(place, Fields(node.line, node.merged))
        node = Fields(node.line, node.own)
    yield _layer(place, node)


def _deployment(name: str, place: Place, node: Node, defaults: _Layer | None) -> Deployment:
    given: _Given = {}
    workload: _Given = {}
    required: dict[str, Sequence[Requirement]] = {}
    for layer in _layers(place, node, defaults):
        _override(given, layer.given)
        workload |= layer.workload
        required |= layer.required
    if "model" not in given:
        msg = "missing key 'model'"
        raise place.wrong(msg)
    if not ("kv_memory" in given or "gpu" in given):
        msg = "missing key 'gpu' (kvcalc gpus lists ids), or 'kv_memory' (30GiB)"
        raise place.wrong(msg)
    if not required:
        msg = "nothing is required of it; at least: require: [fits]"
        raise place.wrong(msg)
    model_place, model_node = given["model"]
    point, prefix_share = _point(given, workload)
    return Deployment(
        name=name,
        place=place,
        model=_beside(place.file, text(model_place, model_node)),
        model_place=model_place,
        gpu=str(point.get("gpu", "")),
        given=point,
        prefix_share=prefix_share,
        requirements=tuple(one for several in required.values() for one in several),
    )


_REPLACED = {
    "kv_memory": ("gpu", "share", "reserve", "weights"),
    "gpu": ("kv_memory",),
    "count": ("tp",),
}
"""What a stronger layer's key makes void of a weaker one's."""


def _override(given: _Given, layer: _Given) -> None:
    """Take a stronger layer's keys; one that says where memory comes from drops a weaker's word."""
    if "kv_memory" in layer and "gpu" in layer:
        msg = "beside gpu: one of the two says how much memory"
        raise layer["kv_memory"][0].wrong(msg)
    for one, others in _REPLACED.items():
        if one in layer:
            for other in others:
                given.pop(other, None)
    if "engine" in layer and "options" not in layer and "engine" in given:
        given.pop("options", None)  # they were another engine's
    given.update(layer)


@cache
def _beside(file: str, model: str) -> str:
    """A model's path counts from the file that names it."""
    folder, path = Path(file).parent, Path(model)
    is_file = model.startswith(".") or model.endswith(SUFFIXES)
    if path.is_absolute() or model.startswith("~"):
        return model
    return str(folder / path) if is_file or (folder / path).exists() else model


def _point(given: _Given, workload: _Given) -> tuple[dict[str, Any], Fraction]:
    """What `api.fit` is to be given, each value checked where it stands, and the prefix share."""
    readers: dict[str, Callable[[str], Any]] = {
        "revision": str,
        "gpu": lambda said: _gpu(said, given["gpu"][0].file),
        "kv_memory": lambda said: _bytes(said, "kv_memory"),
        "share": _gpu_share,
        "reserve": lambda said: _bytes(said, "reserve"),
        "weights": lambda said: _bytes(said, "weights"),
        "engine": lambda said: said if load_engine(said) else "",
        "kv_dtype": lambda said: said if said == "auto" else storage_format(said).name,
        "tp": _rank_count,
        "pp": _rank_count,
        "count": _rank_count,
        "sequence": lambda said: _tokens(said, "sequence"),
        "concurrency": _request_count,
        "prefix_share": _prefix_share,
    }
    point = {
        key: _placed(place, readers[key], text(place, node))
        for key, (place, node) in (given | workload).items()
        if key in readers
    }
    if "sequence" in point:
        point["seq"] = point.pop("sequence")
    if "count" in point:
        ranks, pp = point.pop("count"), point.get("pp", 1)
        tp = point.setdefault("tp", max(ranks // pp, 1))
        if tp * pp != ranks:
            msg = f"{ranks} GPUs are not tp {tp} × pp {pp}; name one replica's GPUs"
            raise given["count"][0].wrong(msg)
    if "options" in given:
        point["options"] = _options(*given["options"], engine=point.get("engine", "vllm"))
    return point, point.pop("prefix_share", Fraction(0))


def _options(place: Place, node: Node, *, engine: str) -> dict[str, str]:
    """An engine's own options, as text, each of them one that it has."""
    known = load_engine(engine).OPTIONS
    options: dict[str, str] = {}
    for key, at, value in fields(place, node):
        options[key] = text(at, value)
        try:
            read_options(engine, known, {key: options[key]})
        except InputError as error:
            raise at.wrong(str(error)) from None
    return options


def _gpu(said: str, file: str) -> str:
    """A GPU that is known; a path counts from the file that names it."""
    if said == AUTO:
        msg = "auto would depend on the machine that checks: name an id of kvcalc gpus, or a YAML"
        raise InputError(msg)
    named = str(Path(file).parent / file_path(said)) if is_file(said) else said
    named_gpu(named)
    return named


def _rank_count(said: str) -> int:
    if not re.fullmatch(r"[1-9][0-9_]{0,9}", said):
        msg = f"must be a whole number from 1, not {shown(said)}"
        raise InputError(msg)
    return check_count(int(said), name="the number", most=MAX_RANKS)


def _request_count(said: str) -> int:
    return check_count(_tokens(said, "concurrency"), name="concurrency", most=MAX_BATCH)


def _gpu_share(said: str) -> str:
    """As the engine's option has it: 0.9."""
    if not re.fullmatch(r"0?\.[0-9]{1,6}|1(\.0{1,6})?", said):
        msg = f"must be a part such as 0.9, not {shown(said)}"
        raise InputError(msg)
    return said


def _prefix_share(said: str) -> Fraction:
    share = _share(said)
    if not 0 <= share < 1:
        msg = f"must be from 0% to under 100%, not {shown(said)}"
        raise InputError(msg)
    return share


def _placed(place: Place, reader: Callable[[str], Any], said: str) -> Any:  # noqa: ANN401 - of reader
    """Read a text; what is wrong with it is said with the place."""
    try:
        return reader(said)
    except InputError as error:
        raise place.wrong(str(error)) from None


def _tokens(said: str, name: str) -> int:
    if re.match(r"0[0-9_]", said):
        msg = f"{shown(said)} begins with 0: octal or decimal?"
        raise InputError(msg)
    return parse_tokens(said, name=name)


def _bytes(said: str, name: str) -> int:
    if re.fullmatch(r"[0-9_.]+", said):
        msg = f"{shown(said)} has no unit: write {said}GiB, {said}GB or {said}B"
        raise InputError(msg)
    return parse_bytes(said, name=name)


def _share(said: str) -> Fraction:
    if not re.fullmatch(r"-?[0-9]{1,4}(\.[0-9]{1,6})?\s*%", said):
        msg = f"{shown(said)} is no part; write 50%"
        raise InputError(msg)
    return Fraction(said.rstrip("% ")) / 100


def _requirement(place: Place, node: Node) -> Requirement:
    said = text(place, node, wanted="a requirement such as headroom >= 10%")
    match = re.fullmatch(r"([\w-]+)\s*(?:(>=|<=|==|>|<)\s*(\S.*))?", said)
    name = match[1] if match else said.split()[0]
    if name not in FIGURES:
        msg = f"unknown requirement {shown(name)}{did_you_mean(name, FIGURES)}"
        raise place.wrong(msg)
    kind = FIGURES[name].kind
    if match is None or (match[2] is None) != (kind == "flag"):
        wanted = {"count": f"{name} >= 24", "bytes": f"{name} <= 20 GiB", "flag": name}
        example = wanted.get(kind, f"{name} >= 10%")
        msg = f"{shown(said)} is no requirement; write {example}"
        raise place.wrong(msg)
    bound: int | Fraction = True
    if kind == "count":
        bound = _placed(place, lambda value: _tokens(value, name), match[3])
    elif kind != "flag" and match[3].endswith("%"):
        if kind == "bytes":
            msg = f"{name} is a number of bytes, not a part: write 20 GiB"
            raise place.wrong(msg)
        bound = _placed(place, _share, match[3])
    elif kind != "flag":
        bound = _placed(place, lambda value: _bytes(value, name), match[3])
    return Requirement(place, " ".join(said.split()), name, match[2] or "==", bound)


# Running


class _Runs:
    """Reads each model once, and fits alike deployments once."""

    def __init__(self, *, every_figure: bool) -> None:
        self._every_figure = every_figure
        self._models: dict[tuple[str, str | None], Any] = {}
        self._fits: dict[str, FitReport | KvcalcError] = {}
        self._taken: dict[tuple[Any, ...], Callable[[int, int], int]] = {}

    def result(self, deployment: Deployment) -> Result:
        """Fit a deployment and hold it to its requirements."""
        try:
            model = self._model(deployment)
            report = self._fit(deployment, model)
            figures, *ends = self._figures(deployment, model, report)
            outcomes = tuple(_outcome(one, figures, ends) for one in deployment.requirements)
        except KvcalcError as error:
            about_model = (
                ModelNotFoundError,
                ConfigError,
                GatedModelError,
                HubUnavailableError,
                UnsupportedError,
            )
            place = deployment.model_place if isinstance(error, about_model) else deployment.place
            if isinstance(error, PlacedError):
                place = error.place
            return Result(deployment, {}, {}, (), error, place)
        facts = {
            "resolved_model": report.origin.resolved,
            "gpu": deployment.gpu or None,
            "engine": report.engine,
            "kv_dtype": report.kv_dtype,
            "tp": report.plan.tp,
            "pp": report.plan.pp,
            "seq_tokens": report.seq_tokens,
            "concurrency": report.concurrency,
            "prefix_share": float(deployment.prefix_share),
        }
        note = beyond_maximum(model.architecture, report.seq_tokens)
        return Result(deployment, figures, facts, outcomes, note=note)

    def _model(self, deployment: Deployment) -> api.Model:
        key = (deployment.model, deployment.given.get("revision"))
        if key not in self._models:
            try:
                self._models[key] = api.read_model(key[0], revision=key[1])
            except KvcalcError as error:
                self._models[key] = error
        found = self._models[key]
        if isinstance(found, KvcalcError):
            raise found
        model: api.Model = found
        return model

    def _fit(self, deployment: Deployment, model: api.Model) -> FitReport:
        given = {name: value for name, value in deployment.given.items() if name != "revision"}
        key = json.dumps([deployment.model, deployment.given], sort_keys=True)
        if key not in self._fits:
            try:
                self._fits[key] = api.fit(model, **given)
            except KvcalcError as error:
                self._fits[key] = error
        found = self._fits[key]
        if isinstance(found, KvcalcError):
            raise found
        return found

    def _figures(
        self, deployment: Deployment, model: api.Model, report: FitReport
    ) -> list[_Figures]:
        """The figures, and where terms are estimates, what they are at worst and at best."""
        fixed = {
            "kv_bytes_per_token": self._bytes_per_token(deployment, model, report),
            "weights": report.weights_bytes,
        }
        shared = _shared_bytes(deployment, model, report) if deployment.prefix_share else None
        ends = () if report.balance_range == (report.balance_bytes,) * 2 else (0, 1)
        longest = self._every_figure or any(
            requirement.figure == "max_tokens" for requirement in deployment.requirements
        )
        return [_at(report, end, shared, longest=longest) | fixed for end in (None, *ends)]

    def _bytes_per_token(
        self, deployment: Deployment, model: api.Model, report: FitReport
    ) -> int | None:
        key = (deployment.model, deployment.given.get("revision"), report.kv_dtype)
        tokens = report.seq_tokens
        try:
            if key not in self._taken:
                self._taken[key], _ = rank_bytes(
                    model.architecture,
                    kv_dtype=report.kv_dtype,
                    engine="model",
                    tp=1,
                    pp=1,
                    options={},
                )
            taken = self._taken[key]
            return taken(tokens + 1, 1) - taken(tokens, 1)
        except KvcalcError:  # what it needs (an encoder's length) is not asked here
            return None


def _at(
    report: FitReport, end: int | None, shared: tuple[int, int] | None, *, longest: bool
) -> _Figures:
    """The figures that depend on how much memory there is: as it is estimated, or at an `end` of
    its range; `shared` are one sequence's bytes and those of them that all share.
    """
    balance = report.balance_bytes if end is None else report.balance_range[end]
    needed, available = report.needed_bytes, max(balance, 0)
    tokens: int | None = None
    if shared is None:
        most = report.max_concurrency if end is None else report.max_concurrency_range[end]
        if longest:
            tokens = report.max_tokens if end is None else report.max_tokens_range[end]
    else:
        one, common = shared

        def needs(requests: int) -> int:
            return requests * one - (requests - 1) * common

        needed = needs(report.concurrency)
        most = min((available - common) // (one - common), MAX_BATCH) if available >= one else 0
        while most and not report.fits_in(available, needs(most)):  # beside a block never used
            most -= 1
    return {
        "fits": report.fits_in(available, needed),
        "headroom": balance - needed,
        "max_concurrency": most,
        "max_tokens": tokens,
        "needed": needed,
        "kv_memory": available,
    }


def _shared_bytes(deployment: Deployment, model: api.Model, report: FitReport) -> tuple[int, int]:
    """Bytes on a rank of one sequence, and those of its blocks that all requests share.

    vLLM's prefix caching shares whole blocks, so that C requests of S tokens, once the prefix is
    cached, take C × blocks(S) - (C - 1) × (prefix // block) (get_computed_blocks of
    v1/core/kv_cache_manager.py: full blocks alone, and not the last token's). Windows and states
    keep other blocks, drafts give up the last shared one, and other engines share by other rules:
    refused.
    """
    parts = [part for layer in model.architecture.layers for part in layer.parts()]
    plain = all(
        isinstance(part, FullAttention | LatentAttention | IndexKeys | NoCache) for part in parts
    )
    told = report.plan.options
    reasons = {
        f"engine {report.engine}": report.engine != "vllm",
        "windows or states": not plain,
        "prefix caching off": told.get("enable_prefix_caching") is False,
        "drafted tokens": bool(told.get("num_speculative_tokens") or told.get("mtp")),
    }
    for why, holds in reasons.items():
        if holds:
            msg = f"prefix_share is exact for vllm and full attention alone, not for {why}"
            raise UnsupportedError(msg)
    from kvcalc.engines.vllm import pool

    block = pool(model.architecture, report.plan).block_size
    prefix = int(report.seq_tokens * deployment.prefix_share) // block * block
    shared = report.needed_for(prefix, 1) if prefix else 0
    return report.needed_for(report.seq_tokens, 1), shared


def _outcome(requirement: Requirement, figures: _Figures, ends: Sequence[_Figures]) -> Outcome:
    compare = _COMPARISONS[requirement.comparison]
    found, *outer = (_found(requirement, one) for one in (figures, *ends))
    holds = compare(found, requirement.bound)
    decided = all(compare(end, requirement.bound) == holds for end in outer)
    return Outcome(requirement, holds, found, None if decided else (outer[0], outer[1]))


def _found(requirement: Requirement, figures: _Figures) -> int | Fraction:
    found = figures[requirement.figure]
    if found is None:
        msg = f"{requirement.text}: that figure is not known for this deployment"
        raise UnsupportedError(msg)
    if isinstance(requirement.bound, Fraction):
        memory = figures["kv_memory"]
        return Fraction(found, memory) if memory else Fraction(-1)
    return found


# Comparing with an earlier run


def read_baseline(path: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The deployments of an earlier `kvcalc check --json`, by file and name."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BASELINE_BYTES + 1)
        data = json.loads(raw) if len(raw) <= MAX_BASELINE_BYTES else None
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise InputError(msg) from None
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and data.get("schema") == SCHEMA:
        try:
            return {
                (str(one["file"]), str(one["name"])): dict(one["figures"])
                for one in data["deployments"]
            }
        except (KeyError, TypeError, ValueError):
            pass
    msg = f"{path} is not what kvcalc check --json prints ({SCHEMA})"
    raise InputError(msg)


def _changes(
    old: Mapping[tuple[str, str], Mapping[str, Any]], results: Sequence[Result]
) -> Iterator[Change]:
    """Every figure that differs, deployments that are new, and those that are gone.

    A deployment is known by its file and name; by its name alone where that is the only one, since
    a file may be named by another path.
    """
    names = Counter(name for _, name in old)
    own = Counter(result.deployment.name for result in results)
    by_name = {name: (file, name) for file, name in old if names[name] == own[name] == 1}
    seen = set()
    for result in results:
        key = (result.deployment.place.file, result.deployment.name)
        found = key if key in old else by_name.get(key[1], key)
        seen.add(found)
        before = old.get(found)
        if before is None or not result.figures:
            if before != {} or result.figures:
                yield Change(*key, {}, "new" if before is None else f"now {result.status}")
            continue
        figures = {
            name: (before.get(name), result.figures.get(name))
            for name in FIGURES
            if before.get(name) != result.figures.get(name)
        }
        if figures:
            yield Change(*key, figures)
    for key in old:
        if key not in seen:
            yield Change(*key, {}, "gone")


# What helps to write a file


def write_starter(path: Path) -> None:
    """Write a commented file to start from; a file that is there is not touched."""
    starter = (profiles_folder() / "checks" / "starter.yaml").read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter)
    except FileExistsError:
        msg = f"{path} is there already and stays as it is; name another FILE"
        raise OutputError(msg) from None
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise OutputError(msg) from None


def json_schema() -> dict[str, Any]:
    """A JSON Schema of the YAML, from which editors complete it."""
    one_or_text = {"type": ["string", "integer"]}
    workload = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            key: {**one_or_text, "description": about} for key, about in WORKLOAD_KEYS.items()
        },
    }
    names = "|".join(name for name, figure in FIGURES.items() if figure.kind != "flag")
    require = {
        "type": "string",
        "anyOf": [
            {"enum": [name for name, figure in FIGURES.items() if figure.kind == "flag"]},
            {"pattern": rf"^({names})\s*(>=|<=|==|>|<)\s*\S.*$"},
        ],
        "description": "; ".join(f"{name}: {figure.about}" for name, figure in FIGURES.items()),
    }
    own: dict[str, dict[str, Any]] = {
        "options": {
            "type": "object",
            "additionalProperties": {"type": ["string", "integer", "number", "boolean"]},
        },
        "workload": workload,
        "require": {"oneOf": [require, {"type": "array", "items": require}]},
    }
    whole = {"type": "integer", "minimum": 1}
    own |= {"count": whole, "tp": whole, "pp": whole}
    deployment = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            key: {**own.get(key, {"type": "string"}), "description": about}
            for key, about in KEYS.items()
        },
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "kvcalc check",
        "type": "object",
        "required": ["deployments"],
        "additionalProperties": False,
        "patternProperties": {f"^{FREE}": {}},
        "properties": {
            "defaults": {**deployment, "description": TOP_KEYS["defaults"]},
            "deployments": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": deployment,
                "description": TOP_KEYS["deployments"],
            },
        },
    }
