"""Accelerators as `profiles/gpus/` describes them: what a source vouches for, and nothing computed.

A figure without a source is None. Tensor rates are dense; memory is nominal, `usable_bytes` is what
a driver reported; transfer rates are those of one GPU in one direction, and where GPUs have no link
of their own, the interconnect is the PCIe bus. Nothing here asks the machine it runs on.
"""

import datetime
import difflib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvcalc.data import profiles_folder
from kvcalc.errors import ConfigError, InputError
from kvcalc.units import shown

if TYPE_CHECKING:
    from yaml import Node


class Figure(NamedTuple):
    """A number, where it stands, and the day it was taken down from there."""

    value: int
    source: str
    date: datetime.date


class Gpu(NamedTuple):
    """One accelerator; `name` is what its driver prints, where this product alone prints it."""

    id: str
    name: str
    also: tuple[str, ...]
    vendor: str
    architecture: str | None
    compute_capability: str | None
    memory_bytes: Figure | None
    usable_bytes: Figure | None
    bandwidth_bytes_per_second: Figure | None
    bf16_flops: Figure | None
    fp16_flops: Figure | None
    fp8_flops: Figure | None
    int8_ops: Figure | None
    fp4_flops: Figure | None
    interconnect_bytes_per_second: Figure | None
    pcie_bytes_per_second: Figure | None
    power_watts: Figure | None
    notes: str | None


FIGURES = tuple(name for name, kind in Gpu.__annotations__.items() if kind == Figure | None)
"""The fields of a Gpu that are figures."""

_TAG = "tag:yaml.org,2002:"
_VENDOR = re.compile(r"^(nvidia|amd|intel) ")


@cache
def gpu_ids() -> tuple[str, ...]:
    """Every accelerator that is described, in alphabetical order."""
    return tuple(sorted(path.stem for path in (profiles_folder() / "gpus").glob("*.yaml")))


@cache
def load_gpu(gpu_id: str) -> Gpu:
    """The accelerator of that id; InputError with the nearest ids if there is none."""
    if gpu_id not in gpu_ids():
        near = [known for known in gpu_ids() if known.startswith(gpu_id.strip().lower() or "?")]
        near += difflib.get_close_matches(gpu_id[:60].lower(), gpu_ids())
        hint = ", ".join(list(dict.fromkeys(near))[:5])
        msg = f"unknown GPU {shown(gpu_id)}; " + (
            f"did you mean {hint}?" if hint else "choose an id such as h100-sxm-80gb"
        )
        raise InputError(msg)
    return read_gpu(profiles_folder() / "gpus" / f"{gpu_id}.yaml")


def find_gpu(device_name: str) -> Gpu | None:
    """The accelerator that prints this name (`torch.cuda.get_device_name`, NVML), else None.

    The whole name must match, but for case, dashes and the vendor's name: `A100-SXM4-80GB` and
    `NVIDIA A100 SXM4 80GB` are one board, `NVIDIA A100-SXM4-80GB MIG 1g.10gb` is none we know.
    """
    gpu_id = _ids_by_name().get(_normal(device_name))
    return None if gpu_id is None else load_gpu(gpu_id)


@cache
def _ids_by_name() -> dict[str, str]:
    ids: dict[str, str] = {}
    for gpu in map(load_gpu, gpu_ids()):
        for name in (gpu.name, *gpu.also):
            other = ids.setdefault(_normal(name), gpu.id)
            if other != gpu.id:
                msg = f"{gpu.id}.yaml: the name {name!r} also stands in {other}.yaml"
                raise ConfigError(msg)
    return ids


def _normal(name: str) -> str:
    """`NVIDIA_A100-SXM4-80GB` → `a100 sxm4 80gb`; `Intel(R) Arc(TM) B580` → `arc b580`."""
    text = re.sub(r"\((r|tm)\)", "", name.casefold())
    return _VENDOR.sub("", re.sub(r"[\s_-]+", " ", text).strip())


def read_gpu(path: Path) -> Gpu:
    """Read one file strictly; ConfigError with file and key for what is not as it should be,
    InputError for a file that cannot be read.

    The nodes of the YAML are read as they were written and never constructed: no tag can run code,
    and `no`, `1:30`, `010` and `3.35e12` do not turn into something else on the way.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is four times as fast
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=loader)
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}; kvcalc gpus lists the ids there are"
        raise InputError(msg) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path.name}: not YAML: {' '.join(str(error).split())}"
        raise ConfigError(msg) from None
    fields = _fields(root, path.name, Gpu._fields[1:])
    where = {key: f"{path.name}: {key}" for key in fields}

    def text_or_none(key: str) -> str | None:
        return None if _is_null(fields[key]) else _text(fields[key], where[key])

    figures = {
        key: None if _is_null(fields[key]) else _figure(fields[key], where[key]) for key in FIGURES
    }
    return Gpu(
        id=path.stem,
        name=_text(fields["name"], where["name"]),
        also=_texts(fields["also"], where["also"]),
        vendor=_text(fields["vendor"], where["vendor"]),
        architecture=text_or_none("architecture"),
        compute_capability=text_or_none("compute_capability"),
        notes=text_or_none("notes"),
        **figures,
    )


def _figure(node: "Node", where: str) -> Figure:
    fields = _fields(node, where, Figure._fields)
    return Figure(
        value=_whole(fields["value"], f"{where}.value"),
        source=_text(fields["source"], f"{where}.source"),
        date=_date(fields["date"], f"{where}.date"),
    )


def _fields(node: "Node | None", where: str, keys: tuple[str, ...]) -> "dict[str, Node]":
    """The values of a mapping that has exactly these keys, each once."""
    if node is None or node.tag != f"{_TAG}map":
        raise _wrong(node, where, "keys and values")
    fields: dict[str, Node] = {}
    for key_node, value in node.value:
        key = _text(key_node, f"{where}: a key")
        if key in fields:
            msg = f"{where}: duplicate key {shown(key)}"
            raise ConfigError(msg)
        if key not in keys:
            msg = f"{where}: unknown key {shown(key)}; the keys are {', '.join(keys)}"
            raise ConfigError(msg)
        fields[key] = value
    if missing := [key for key in keys if key not in fields]:
        msg = f"{where}: missing key {missing[0]!r}"
        raise ConfigError(msg)
    return fields


def _is_null(node: "Node") -> bool:
    return node.tag == f"{_TAG}null"


def _text(node: "Node", where: str) -> str:
    if node.tag != f"{_TAG}str" or not node.value.strip():
        raise _wrong(node, where, "text")
    return str(node.value)


def _texts(node: "Node", where: str) -> tuple[str, ...]:
    if node.tag != f"{_TAG}seq":
        raise _wrong(node, where, "a list of texts")
    return tuple(_text(item, where) for item in node.value)


def _whole(node: "Node", where: str) -> int:
    """A positive decimal integer, as PyYAML and every other reader of YAML understand it."""
    if node.tag != f"{_TAG}int" or not re.fullmatch(r"[1-9][0-9]{0,19}", node.value):
        raise _wrong(node, where, "a positive whole number in decimal digits")
    return int(node.value)


def _date(node: "Node", where: str) -> datetime.date:
    if node.tag == f"{_TAG}timestamp" and re.fullmatch(r"\d{4}-\d\d-\d\d", node.value):
        try:
            return datetime.date.fromisoformat(node.value)
        except ValueError:
            pass  # the thirtieth of February
    raise _wrong(node, where, "a date such as 2026-11-25")


def _wrong(node: "Node | None", where: str, wanted: str) -> ConfigError:
    """The error for a node of another kind: where it stands, and what as YAML understands it."""
    if node is None:
        return ConfigError(f"{where}: must be {wanted}, not empty")
    found = shown(node.value) if isinstance(node.value, str) else "several values"
    kind = node.tag.removeprefix(_TAG)
    return ConfigError(f"{where}: must be {wanted}, not {found} (to YAML: {kind})")
