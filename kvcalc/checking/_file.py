"""The YAML: its keys, how it is read, what starts one, and its JSON Schema."""

import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc.checking._report import FIGURES, Deployment, Requirement
from kvcalc.data import profiles_folder
from kvcalc.device import AUTO
from kvcalc.dtypes import storage_format
from kvcalc.engines import load_engine, read_options
from kvcalc.errors import InputError, OutputError
from kvcalc.hardware import file_path, is_file, named_gpu
from kvcalc.sizing import MAX_BATCH, MAX_RANKS
from kvcalc.sources.local import SUFFIXES
from kvcalc.strict_yaml import Fields, Node, Place, did_you_mean, fields, items, read, text
from kvcalc.units import check_count, parse_bytes, parse_tokens, shown

STARTER = "kvcalc.yaml"
"""What `--init` writes when no file is named."""

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

FREE = "x-"
"""How top-level keys begin that only hold anchors."""


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
    beside = os.path.join(folder, path)  # noqa: PTH118 - any name: too long, with a NUL
    if path.is_absolute() or model.startswith("~"):
        return model
    return str(folder / path) if is_file or os.path.exists(beside) else model  # noqa: PTH110


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
        *others, last = [f"{said}{unit}" for unit in _units(said, name)]
        msg = f"{shown(said)} has no unit: write {', '.join(others)}{' or ' * bool(others)}{last}"
        raise InputError(msg)
    return parse_bytes(said, name=name)


def _units(said: str, name: str) -> tuple[str, ...]:
    """Those that a number may have been meant in."""
    if len(said.partition(".")[0].replace("_", "")) > 7:
        return ("B",)
    return ("B", "KiB") if name == _SMALL else ("GiB", "GB", "B")


def _share(said: str) -> Fraction:
    if not re.fullmatch(r"-?[0-9]{1,4}(\.[0-9]{1,6})?\s*%", said):
        msg = f"{shown(said)} is no part; write 50%"
        raise InputError(msg)
    return Fraction(said.rstrip("% ")) / 100


def _requirement(place: Place, node: Node) -> Requirement:
    said = text(place, node, wanted="a requirement such as headroom >= 10%")
    return Requirement(place, " ".join(said.split()), *_placed(place, _asked, said))


_SMALL = "kv_bytes_per_token"
"""The figure that is no gigabytes."""


def _example(name: str) -> str:
    return "128 KiB" if name == _SMALL else "20 GiB"


@cache
def _asked(said: str) -> tuple[str, str, int | Fraction]:
    """The figure, the comparison and the bound of a requirement."""
    match = re.fullmatch(r"([\w-]+)\s*(?:(>=|<=|==|>|<)\s*(\S.*))?", said)
    name = match[1] if match else said.split(maxsplit=1)[0]
    if name not in FIGURES:
        msg = f"unknown requirement {shown(name)}{did_you_mean(name, FIGURES)}"
        raise InputError(msg)
    kind = FIGURES[name].kind
    if match is None or (match[2] is None) != (kind == "flag"):
        wanted = {"count": f"{name} >= 24", "bytes": f"{name} <= {_example(name)}", "flag": name}
        example = wanted.get(kind, f"{name} >= 10%")
        msg = f"{shown(said)} is no requirement; write {example}"
        raise InputError(msg)
    if kind == "flag":
        return name, "==", True
    if kind == "count":
        return name, match[2], _tokens(match[3], name)
    if not match[3].endswith("%"):
        return name, match[2], _bytes(match[3], name)
    if kind == "bytes":
        msg = f"{name} is a number of bytes, not a part: write {_example(name)}"
        raise InputError(msg)
    return name, match[2], _share(match[3])


def write_starter(path: Path) -> None:
    """Write a commented file to start from; a file that is there is not touched."""
    starter = (profiles_folder() / "checks" / "starter.yaml").read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter)
    except FileExistsError:
        msg = f"{path} is there already and stays as it is; name another FILE"
        raise OutputError(msg) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        msg = f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
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
