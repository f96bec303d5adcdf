"""Accelerators as `profiles/gpus/` describes them: what a source vouches for, and nothing computed.

A figure without a source is None. Tensor rates are dense; memory is nominal, `usable_bytes` is what
nvidia-smi and its like report, `cuda_bytes` the total that CUDA or HIP tells a program. Transfer
rates are those of one GPU in one direction, and where GPUs have no link of their own, the
interconnect is the PCIe bus. Nothing here asks the machine it runs on.

A file of the user's own needs a name and what a driver says of the memory; a figure may stand there
plainly, `cuda_bytes: 47.5GiB`, and its source is then the file.
"""

import datetime
import difflib
import os.path
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvcalc.data import profiles_folder
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.strict_yaml import Fields, Node, Place, Scalar, items, read, record, text
from kvcalc.units import GIB, parse_bytes, shown

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


NEEDED = (
    "; a GPU needs a name, and cuda_bytes (total_memory in PyTorch) or usable_bytes (nvidia-smi): "
    "name: My GPU, cuda_bytes: 47.5GiB; kvcalc gpus l40s --yaml prints a whole file"
)
"""What a message on a user's file ends in."""

FIGURES = tuple(name for name, kind in Gpu.__annotations__.items() if kind == Figure | None)
"""The fields of a Gpu that are figures."""

_VENDOR = re.compile(r"^(nvidia|amd|intel) ")

_BRANDS = re.compile(
    r"\((r|tm)\)"
    r"|(?<![a-z])(nvidia|amd|intel|geforce|rtx|tesla|radeon|rx|instinct)(?![a-z])"
)
"""What a user may leave out of a name, or write beside it."""

_CHOOSE = "choose an id such as h100-sxm-80gb (kvcalc gpus lists all), or a YAML of your own"

_MOST_NAMED = 8


@cache
def gpu_ids() -> tuple[str, ...]:
    """Every accelerator that is described, in alphabetical order."""
    return tuple(sorted(path.stem for path in (profiles_folder() / "gpus").glob("*.yaml")))


@cache
def load_gpu(gpu_id: str) -> Gpu:
    """The accelerator of exactly that id."""
    if gpu_id not in gpu_ids():
        raise _unknown(gpu_id)
    return read_gpu(profiles_folder() / "gpus" / f"{gpu_id}.yaml")


def named_gpu(said: str) -> Gpu:
    """The accelerator of an id, of another name that can mean this one alone, or of a YAML file.

    Case, spaces and dashes do not count, nor do brands: `H100 SXM`, `rtx4090`, `NVIDIA L4`. Where
    no name is the whole of what is said, all its words must stand in one. InputError with those
    that it may be, or with what is near.
    """
    if not said.strip():
        msg = f"no GPU is named; {_CHOOSE}"
        raise InputError(msg)
    if is_file(said):
        return _own(file_path(said))
    dashed = re.sub(r"[\s_]+", "-", said.strip().lower())
    if dashed in gpu_ids():
        return load_gpu(dashed)
    found = _meant(said)
    if not found and _is_folder(said):
        msg = f"{said} is a folder, no GPU; {_CHOOSE}"
        raise InputError(msg)
    if not found:
        raise _unknown(said)
    if len(found) > 1:
        msg = f"GPU {shown(said)} is no single one; did you mean {_listed(found)}?"
        raise InputError(msg)
    return load_gpu(found[0])


def _meant(said: str) -> list[str]:
    """The ids of what a user may mean."""
    wanted = _words(said)
    written = _words_by_id()
    whole = [known for known, names in written.items() if wanted and wanted in names]
    if whole or not wanted:
        return whole
    joined = "".join(wanted)
    whole = [known for known, names in written.items() if joined in map("".join, names)]
    return whole or [
        known for known, names in written.items() if set(wanted) <= {*chain.from_iterable(names)}
    ]


def _unknown(said: str) -> InputError:
    """The error for a name that is none, with what begins alike, has a model's number in common, or
    differs by a slip.
    """
    wanted = _words(said[:60])
    joined = "".join(wanted)
    written = _words_by_id()
    begins = [
        known
        for known, names in written.items()
        if len(joined) > 1 and any("".join(name).startswith(joined) for name in names)
    ]
    models = {word for word in wanted if re.search(r"\d", word) and not re.search(r"\dgi?b$", word)}
    alike: list[str] = []
    if models:
        common = {
            known: len(set(wanted) & words)
            for known, names in written.items()
            if models & (words := {*chain.from_iterable(names)})
        }
        alike = [known for known, count in common.items() if count == max(common.values())]
    by_name = {"".join(_words(known)): known for known in written}
    slips = [by_name[one] for one in difflib.get_close_matches(joined, by_name, cutoff=0.75)]
    near = begins or alike or slips
    return InputError(
        f"unknown GPU {shown(said)}; " + (f"did you mean {_listed(near)}?" if near else _CHOOSE)
    )


def _listed(ids: list[str]) -> str:
    """`l4, l40 or l40s`."""
    if len(ids) > _MOST_NAMED:
        return f"{', '.join(ids[:_MOST_NAMED])} or {len(ids) - _MOST_NAMED} more"
    return " or ".join(filter(None, (", ".join(ids[:-1]), ids[-1])))


def _words(name: str) -> tuple[str, ...]:
    """`NVIDIA A100-SXM4-80GB` → a100, sxm4, 80gb; `RTX4090` → 4090."""
    return tuple(re.findall(r"[a-z0-9+]+", _BRANDS.sub(" ", name.casefold())))


@cache
def _words_by_id() -> dict[str, list[tuple[str, ...]]]:
    """The words of each accelerator's id and names."""
    return {
        gpu.id: [_words(name) for name in (gpu.id, gpu.name, *gpu.also)]
        for gpu in map(load_gpu, gpu_ids())
    }


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


def is_file(said: str) -> bool:
    """Whether a GPU is named by its file."""
    return said.endswith((".yaml", ".yml")) and not _is_folder(said)


def file_path(said: str) -> Path:
    """The path of such a file, `~` being the user's own folder."""
    return Path(os.path.expanduser(said))  # noqa: PTH111 - nobody's folder stays as it is


def _is_folder(said: str) -> bool:
    return os.path.isdir(said)  # noqa: PTH112 - any name: too long, with a NUL


def no_figure(*gpus: str) -> UnsupportedError:
    """The error for GPUs whose memory no driver is known to have told, with what to do."""
    return UnsupportedError(
        f"no driver's figure of the memory of {', '.join(gpus)} is known; give fit --kv-memory, as "
        f"the engine prints it, or a YAML with cuda_bytes: kvcalc gpus {gpus[0]} --yaml"
    )


def gpu_yaml(said: str) -> str:
    """The file of an accelerator as a start for one of the user's own, which reads as the same."""
    if not said:
        msg = "--yaml prints one GPU: kvcalc gpus l40s --yaml"
        raise InputError(msg)
    gpu = named_gpu(said)
    path = file_path(said) if is_file(said) else profiles_folder() / f"gpus/{gpu.id}.yaml"
    lines = [f"# {gpu.id}, as a start for a file of your own: --gpu mine.yaml"]
    lines.append("# Needed are name and cuda_bytes or usable_bytes; a figure may be plain: 47.5GiB")
    if gpu.total_bytes is None:
        lines.append("# No driver's figure is known here: give usable_bytes or cuda_bytes")
    return "\n".join((*lines, path.read_text("utf-8")))


def _own(path: Path) -> Gpu:
    """A user's file, which must say what a driver says of the memory."""
    gpu = read_gpu(path)
    if gpu.total_bytes is None:
        msg = f"{path}:1: neither cuda_bytes nor usable_bytes{NEEDED}"
        raise InputError(msg)
    return gpu


def read_gpu(path: Path) -> Gpu:
    """Read one file strictly; InputError with file, line and key for what is not as it should be,
    and for a file that cannot be read. All but the name may be left out; only a user's own file has
    a price, or an id that is not its file's name.
    """
    place, root = read(path, remedy="; kvcalc gpus lists the ids there are")
    optional = [key for key in Gpu._fields if key != "name"]
    at = record(place, root, ["name"], optional=optional, remedy=NEEDED)

    given = {
        key: (here, node)
        for key, (here, node) in at.items()
        if not (isinstance(node, Scalar) and node.is_null)
    }

    def text_or_none(key: str) -> str | None:
        return text(*given[key]) if key in given else None

    name = text(*at["name"])
    read_figures = {key: _figure(key, *given[key]) if key in given else None for key in FIGURES}
    _check_order(read_figures, given)
    return Gpu(
        id=_id(*given["id"]) if "id" in given else path.stem,
        name=name,
        also=tuple(text(*item) for item in items(*given["also"])) if "also" in given else (),
        vendor=text_or_none("vendor") or _vendor(name),
        architecture=text_or_none("architecture"),
        compute_capability=_capability(*given["compute_capability"])
        if "compute_capability" in given
        else None,
        notes=text_or_none("notes"),
        price_per_hour=_price(*given["price_per_hour"]) if "price_per_hour" in given else None,
        **read_figures,
    )


def _check_order(
    figures: Mapping[str, Figure | None], given: Mapping[str, tuple[Place, Node]]
) -> None:
    """A program is told no more than nvidia-smi, and that no more than there is."""
    known = [
        (key, figure)
        for key in ("cuda_bytes", "usable_bytes", "memory_bytes")
        if (figure := figures[key])
    ]
    for (key, less), (other, more) in pairwise(known):
        if less.value > more.value:
            msg = f"{less.value:,} is more than {other}, {more.value:,}"
            raise given[key][0].wrong(msg)


def _id(place: Place, node: Node) -> str:
    said = text(place, node)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}", said):
        msg = (
            f"must be a name such as my-gpu, not {shown(said)}; without one the file's name counts"
        )
        raise place.wrong(msg)
    return said


def _vendor(name: str) -> str:
    """Whose a GPU is, by its name; NVIDIA's where that does not say it."""
    found = re.search(r"\b(nvidia|amd|intel)\b", name.casefold())
    return found[1] if found else "nvidia"


def _capability(place: Place, node: Node) -> str:
    said = text(place, node)
    if not re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,2}", said):
        msg = f"must be a compute capability such as 8.9, not {shown(said)}"
        raise place.wrong(msg)
    return said


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


def _figure(key: str, place: Place, node: Node) -> Figure:
    """A number with its source and date, or without: then it is the file's, as it was written."""
    if not isinstance(node, Fields):
        return Figure(_number(key, place, node), place.file, _written(place))
    at = record(place, node, ["value"], optional=("source", "date"))
    return Figure(
        _number(key, *at["value"]),
        text(*at["source"]) if "source" in at else place.file,
        _date(*at["date"]) if "date" in at else _written(place),
    )


def _number(key: str, place: Place, node: Node) -> int:
    """A positive decimal integer, as PyYAML and every other reader of YAML understand it; bytes may
    have a unit.
    """
    wanted = "a positive whole number in decimal digits"
    per_second = "/s" * key.endswith("_per_second")
    if "bytes" in key:
        wanted = f"a number of bytes such as 47.5GiB{per_second} or 51002736640"
    said = text(place, node, wanted=wanted)
    number = 0
    if re.fullmatch(r"[1-9][0-9]{0,19}", said):
        number = int(said)
    elif "bytes" in key and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})? ?[KMGT]i?B(/s)?", said):
        with suppress(InputError):  # nothing at all
            number = parse_bytes(said.removesuffix(per_second), name=key)
    if not number:
        msg = f"must be {wanted}, not {shown(said)}"
        raise place.wrong(msg)
    if key.endswith("_bytes") and number < GIB:
        msg = f"{shown(said)} is less than 1 GiB: must be {wanted}"
        raise place.wrong(msg)
    return number


def _written(place: Place) -> datetime.date:
    """The day on which a file was last changed."""
    changed = Path(place.file).stat().st_mtime
    return datetime.datetime.fromtimestamp(changed, tz=datetime.UTC).date()


def _date(place: Place, node: Node) -> datetime.date:
    said = text(place, node, wanted=(wanted := "a date such as 2026-11-25"))
    if re.fullmatch(r"\d{4}-\d\d-\d\d", said):
        try:
            return datetime.date.fromisoformat(said)
        except ValueError:
            pass  # the thirtieth of February
    msg = f"must be {wanted}, not {shown(said)}"
    raise place.wrong(msg)
