"""Exact bytes and parameters of safetensors files, from their headers alone.

The format is that of safetensors 0.5 (README, "Format"): eight bytes with the header's length, a
JSON object from names to dtype, shape and offsets, then the values without gaps. Nothing in a
file is trusted: what contradicts the file's size or itself makes one InputError.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeGuard

from kvcalc.errors import InputError, UnsupportedError
from kvcalc.units import shown
from kvcalc.weights._record import Weights

MAX_HEADER_BYTES: Final = 100_000_000
"""As safetensors itself allows."""

MAX_INDEX_BYTES: Final = 2**27
"""The largest published indices have about 20 MB."""

MAX_SHARDS: Final = 10_000
MAX_TENSORS: Final = 10_000_000
MAX_DIMENSIONS: Final = 16
MAX_ELEMENTS: Final = 2**50

_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}
"""Bits of an element (safetensors 0.5, `Dtype`)."""

_VALUES: Final = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "fp8",
    "F8_E5M2": "fp8",
}
"""Dtypes whose elements are parameters, by our names."""

_SCALES: Final = (
    "_scale_inv",
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".k_scale",
    ".v_scale",
    ".activation_scale",
)
"""How names of tensors end that hold scales, not parameters."""


_BITSANDBYTES: Final = (
    ".absmax",
    ".nested_absmax",
    ".quant_map",
    ".nested_quant_map",
    ".SCB",
    ".weight_format",
)
"""How names of bitsandbytes' tables and scales end (bitsandbytes 0.50.2, `QuantState.as_dict`)."""

_QUANT_STATE: Final = ".quant_state.bitsandbytes__"
"""What stands between a packed weight's name and its format in the name of its description."""

Headers = Mapping[str, Mapping[str, Any]]
"""Of each file by its name: the entries of its header, from tensors to dtype, shape, offsets."""


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def weights_of_files(folder: str | Path) -> Weights:
    """Bytes and parameters of `model.safetensors`, or of the shards of its index, in a folder.

    Every tensor is counted, encoders and modules of multi-token prediction included. Raises
    InputError for what is missing or damaged, UnsupportedError for files without weights.
    """
    path = Path(folder)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file():
        tensors = _indexed(path, index)
        what = f"headers of {len(set(_shards(index).values()))} files of {index.name}"
    elif single.is_file():
        tensors = _header(single)
        what = f"header of {single.name}"
    else:
        msg = f"{path} has no {single.name} and no {index.name}; give a folder that has one"
        raise InputError(msg)
    return _weights(tensors, what)


def weights_of_headers(headers: Headers, placed: Mapping[str, str], *, where: str) -> Weights:
    """Likewise, from headers that were read elsewhere; `placed` says in which file a tensor is."""
    read = {
        file: {name: _tensor(entry, name, file)[0] for name, entry in entries.items()}
        for file, entries in headers.items()
    }
    tensors = _joined(read, placed, where)
    files = f"headers of {len(headers)} files" if len(headers) > 1 else "header of 1 file"
    return _weights(tensors, f"{files} of {where}")


def _weights(tensors: Mapping[str, _Tensor], what: str) -> Weights:
    num_parameters, name, unknown = _parameters(tensors)
    notes = ["every tensor in the files is counted, encoders and further modules included"]
    if unknown:
        notes.append(f"how many parameters there are is not known: {unknown}")
    return Weights(
        num_parameters=num_parameters,
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        format=name,
        origin=f"{what}: {len(tensors):,} tensors",
        notes=tuple(notes),
        whole=True,
    )


def _indexed(folder: Path, index: Path) -> Mapping[str, _Tensor]:
    """The tensors of all shards, each where the index says it is."""
    placed = _shards(index)
    headers = {shard: _header(folder / shard) for shard in sorted(set(placed.values()))}
    return _joined(headers, placed, index)


def _joined(
    headers: Mapping[str, Mapping[str, _Tensor]], placed: Mapping[str, str], where: Path | str
) -> Mapping[str, _Tensor]:
    """The tensors of several files, each in the one that it is said to be in."""
    tensors: dict[str, _Tensor] = {}
    found: dict[str, str] = {}
    for shard, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                _fail(where, f"tensor {shown(name)} is in two of its files")
            tensors[name] = tensor
            found[name] = shard
        if len(tensors) > MAX_TENSORS:
            _fail(where, f"its files have more than {MAX_TENSORS:,} tensors")
    for name in placed.keys() | found.keys():
        if placed.get(name) != found.get(name):
            _fail(where, f"tensor {shown(name)} is not where it says")
    return tensors


def _shards(index: Path) -> Mapping[str, str]:
    """The index's map from tensors to plain file names beside it."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        _fail(index, f"it has more than {MAX_INDEX_BYTES:,} bytes")
    placed = _object(_read(index, 0, MAX_INDEX_BYTES), index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        _fail(index, "it has no weight_map")
    for shard in set(map(str, placed.values())):
        plain = shard.endswith(".safetensors") and len(shard) <= 255
        if not plain or any(part in shard for part in ("/", "\\", "\0", "..")):
            _fail(index, f"{shown(shard)} is no name of a safetensors file")
    if not all(isinstance(shard, str) for shard in placed.values()):
        _fail(index, "its weight_map does not map names to names")
    if len(set(placed.values())) > MAX_SHARDS:
        _fail(index, f"it names more than {MAX_SHARDS:,} files")
    return placed


def _header(path: Path) -> Mapping[str, _Tensor]:
    """The tensors of one file."""
    if not path.is_file():
        _fail(path, "it is missing, or is no file")
    size = path.stat().st_size
    if size < 8:
        _fail(path, "it is shorter than eight bytes")
    length = int.from_bytes(_read(path, 0, 8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        _fail(path, f"it says that its header has {length:,} bytes, more than there may be")
    entries = _object(_read(path, 8, length), path)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        _fail(path, f"it has more than {MAX_TENSORS:,} tensors")
    spans = []
    tensors = {}
    for name, entry in entries.items():
        tensor, begin = _tensor(entry, name, path)
        tensors[name] = tensor
        spans.append((begin, begin + tensor.num_bytes))
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            _fail(path, "its tensors overlap or have gaps")
        end = stop
    if 8 + length + end != size:
        _fail(path, f"its tensors end at byte {8 + length + end:,} of {size:,}")
    return tensors


def _tensor(entry: object, name: str, path: Path | str) -> tuple[_Tensor, int]:
    """One entry of a header, and where its bytes begin."""
    if not isinstance(entry, dict):
        _fail(path, f"tensor {shown(name)} is no object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        _fail(path, f"tensor {shown(name)} has dtype {shown(dtype)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        _fail(path, f"tensor {shown(name)} has shape {shown(shape)}")
    if not _counts(offsets) or len(offsets) != 2:
        _fail(path, f"tensor {shown(name)} has data_offsets {shown(offsets)}")
    elements = math.prod(shape)
    num_bytes, rest = divmod(elements * _BITS[dtype], 8)
    if elements > MAX_ELEMENTS or rest or offsets[1] - offsets[0] != num_bytes:
        _fail(path, f"tensor {shown(name)} has other bytes than its shape says")
    return _Tensor(dtype, tuple(shape), num_bytes), offsets[0]


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_ELEMENTS
        for item in value
    )


def _parameters(tensors: Mapping[str, _Tensor]) -> tuple[int, str, str]:
    """How many parameters the tensors hold, the format that holds most of them, and "".

    Where packed values leave open how many they are, there are 0 of format `packed`, and the last
    says why.
    """
    by_format: Counter[str] = Counter()
    states = dict(name.split(_QUANT_STATE, 1) for name in tensors if _QUANT_STATE in name)
    for name, tensor in tensors.items():
        if name in states:
            by_format[states[name]] += 2 * tensor.num_bytes
            continue
        held = _held(name, tensor, tensors)
        if held is None:
            return 0, "packed", f"tensor {shown(name)} of {tensor.dtype} is packed in another way"
        by_format[held[0]] += held[1]
    if not by_format.total():
        msg = "these files have no parameters; deciding field: their tensors' dtypes"
        raise UnsupportedError(msg)
    return by_format.total(), by_format.most_common(1)[0][0], ""


def _held(name: str, tensor: _Tensor, tensors: Mapping[str, _Tensor]) -> tuple[str, int] | None:
    """Format and number of the parameters in a tensor, none in scales; None when not known."""
    elements = math.prod(tensor.shape)
    stem, _, last = name.rpartition(".")
    is_bytes, is_words = tensor.dtype == "U8", tensor.dtype == "I32"
    if (
        name.endswith((*_SCALES, *_BITSANDBYTES))
        or _QUANT_STATE in name
        or last in ("qzeros", "g_idx", "scales")
        or (is_bytes and name.endswith("_scales"))
    ):
        return "", 0
    if tensor.dtype in _VALUES:
        return _VALUES[tensor.dtype], elements
    if tensor.dtype == "I8" and f"{stem}.SCB" in tensors:
        return "int8", elements
    is_nvfp4 = last == "weight" and f"{name}_scale_2" in tensors
    if is_bytes and (is_nvfp4 or name.endswith("_blocks")):
        return "nvfp4" if is_nvfp4 else "mxfp4", 2 * elements
    return _packed(stem, tensors, tensor) if last == "qweight" and is_words else None


def _packed(stem: str, tensors: Mapping[str, _Tensor], packed: _Tensor) -> tuple[str, int] | None:
    """AWQ packs outputs, GPTQ inputs; the shape of the scales tells how many bits a value has."""
    scales = tensors.get(f"{stem}.scales")
    index = tensors.get(f"{stem}.g_idx")
    if scales is not None and len(scales.shape) == len(packed.shape) == 2:
        outputs = scales.shape[1]
        if index is None:
            kind, values, words = "awq", outputs, packed.shape[1]
        else:
            kind, values, words = "gptq", math.prod(index.shape), packed.shape[0]
        for bits in (2, 4, 8):
            if words and values * bits == words * 32:
                return f"{kind}-int{bits}", math.prod(packed.shape) * 32 // bits
    return None


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        _fail(path, error.strerror or str(error))


def _object(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in some bytes; a name that stands twice makes it damaged."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _fail(path, f"its header is damaged ({str(error)[:80]})")
    if not isinstance(value, dict):
        _fail(path, "its header is no object")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a name stands in it twice"
        raise ValueError(msg)
    return found


def _fail(path: Path | str, why: str) -> NoReturn:
    msg = f"cannot read {path}: {why}"
    raise InputError(msg)
