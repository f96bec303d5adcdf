"""Accelerators as `profiles/gpus/` describes them: what a source vouches for, and nothing computed.

A figure without a source is None. Tensor rates are dense; memory is nominal, `usable_bytes` is what
nvidia-smi and its like report, `cuda_bytes` the total that CUDA or HIP tells a program. Transfer
rates are those of one GPU in one direction, and where GPUs have no link of their own, the
interconnect is the PCIe bus. Nothing here asks the machine it runs on.
"""

import datetime
import difflib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvcalc.data import profiles_folder
from kvcalc.errors import ConfigError, InputError
from kvcalc.strict_yaml import Node, Place, Scalar, items, read, record, text
from kvcalc.units import shown

if TYPE_CHECKING:
    from decimal import Decimal


class Figure(NamedTuple):
    """A number, where it stands, and the day it was taken down from there."""

    value: int
    source: str
    date: datetime.date


class Price(NamedTuple):
    """What a user pays for an hour of one GPU, and where that stands; none is bundled."""

    value: "Decimal"
    currency: str
    source: str
    date: datetime.date | None = None


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
    cuda_bytes: Figure | None = None
    price_per_hour: Price | None = None

    @property
    def total_bytes(self) -> Figure | None:
        """What a driver says that there is, as a program is told where that is known."""
        return self.cuda_bytes or self.usable_bytes


OPTIONAL = ("cuda_bytes", "price_per_hour")

FIGURES = tuple(name for name, kind in Gpu.__annotations__.items() if kind == Figure | None)
"""The fields of a Gpu that are figures."""

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


def named_gpu(said: str) -> Gpu:
    """The accelerator of an id, or of a YAML file written like those of `profiles/gpus/`."""
    return read_gpu(Path(said).expanduser()) if is_file(said) else load_gpu(said)


def is_file(said: str) -> bool:
    """Whether a GPU is named by its file."""
    return said.endswith((".yaml", ".yml"))


def read_gpu(path: Path) -> Gpu:
    """Read one file strictly; InputError with file, line and key for what is not as it should be,
    and for a file that cannot be read. Only a user's own file has a price.
    """
    place, root = read(path, remedy="; kvcalc gpus lists the ids there are")
    needed = [name for name in Gpu._fields[1:] if name not in OPTIONAL]
    at = record(place, root, needed, optional=OPTIONAL)

    given = {
        key: (here, node)
        for key, (here, node) in at.items()
        if not (isinstance(node, Scalar) and node.is_null)
    }

    def text_or_none(key: str) -> str | None:
        return text(*given[key]) if key in given else None

    return Gpu(
        id=path.stem,
        name=text(*at["name"]),
        also=tuple(text(*item) for item in items(*at["also"])),
        vendor=text(*at["vendor"]),
        architecture=text_or_none("architecture"),
        compute_capability=text_or_none("compute_capability"),
        notes=text_or_none("notes"),
        price_per_hour=_price(*given["price_per_hour"]) if "price_per_hour" in given else None,
        **{key: _figure(*given[key]) if key in given else None for key in FIGURES},
    )


def read_amount(place: Place, node: Node) -> "Decimal":
    """A price as it is written: 2.49. There is none below zero, and none of a million."""
    from decimal import Decimal

    said = text(place, node, wanted="a price such as 2.49")
    if not re.fullmatch(r"(0|[1-9][0-9]{0,5})(\.[0-9]{1,6})?", said):
        msg = f"must be a price such as 2.49, not {shown(said)}"
        raise place.wrong(msg)
    return Decimal(said)


def read_currency(place: Place, node: Node) -> str:
    """A currency's three letters (ISO 4217)."""
    said = text(place, node)
    if not re.fullmatch(r"[A-Z]{3}", said):
        msg = f"must be a currency such as USD, not {shown(said)}"
        raise place.wrong(msg)
    return said


def _price(place: Place, node: Node) -> Price:
    at = record(place, node, ("value", "currency"), optional=("source", "date"))
    return Price(
        value=read_amount(*at["value"]),
        currency=read_currency(*at["currency"]),
        source=text(*at["source"]) if "source" in at else place.file,
        date=_date(*at["date"]) if "date" in at else None,
    )


def _figure(place: Place, node: Node) -> Figure:
    at = record(place, node, Figure._fields)
    return Figure(_whole(*at["value"]), text(*at["source"]), _date(*at["date"]))


def _whole(place: Place, node: Node) -> int:
    """A positive decimal integer, as PyYAML and every other reader of YAML understand it."""
    said = text(place, node, wanted=(wanted := "a positive whole number in decimal digits"))
    if not re.fullmatch(r"[1-9][0-9]{0,19}", said):
        msg = f"must be {wanted}, not {shown(said)}"
        raise place.wrong(msg)
    return int(said)


def _date(place: Place, node: Node) -> datetime.date:
    said = text(place, node, wanted=(wanted := "a date such as 2026-11-25"))
    if re.fullmatch(r"\d{4}-\d\d-\d\d", said):
        try:
            return datetime.date.fromisoformat(said)
        except ValueError:
            pass  # the thirtieth of February
    msg = f"must be {wanted}, not {shown(said)}"
    raise place.wrong(msg)
