"""Exact bytes of a GGUF file's tensors, from the table in its header, over all parts of a split.

Types and their blocks are those of ggml's `enum ggml_type` and ggml-common.h (llama.cpp 01243c5),
of which gguf 0.19 has the same but for q8_1, a type of no file. Types that were taken out of the
format, and those of forks, are refused by their number.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from kvcalc.dtypes import StorageFormat
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.sources.gguf import Header, Tensor, Value, read_header
from kvcalc.units import ceil_div, shown
from kvcalc.weights import Weights

MAX_PARTS = 10_000

# Blocks are spelled as in ggml-common.h: 16-bit scales (and minima), small scales, high bits, bits.
TYPES: Mapping[int, StorageFormat] = MappingProxyType(
    {
        0: StorageFormat("fp32", 1, 4),
        1: StorageFormat("fp16", 1, 2),
        2: StorageFormat("q4_0", 32, 2 + 16),
        3: StorageFormat("q4_1", 32, 2 + 2 + 16),
        6: StorageFormat("q5_0", 32, 2 + 4 + 16),
        7: StorageFormat("q5_1", 32, 2 + 2 + 4 + 16),
        8: StorageFormat("q8_0", 32, 2 + 32),
        9: StorageFormat("q8_1", 32, 2 + 2 + 32),
        10: StorageFormat("q2_k", 256, 2 + 2 + 16 + 64),
        11: StorageFormat("q3_k", 256, 2 + 12 + 32 + 64),
        12: StorageFormat("q4_k", 256, 2 + 2 + 12 + 128),
        13: StorageFormat("q5_k", 256, 2 + 2 + 12 + 32 + 128),
        14: StorageFormat("q6_k", 256, 2 + 16 + 64 + 128),
        15: StorageFormat("q8_k", 256, 4 + 256 + 32),
        16: StorageFormat("iq2_xxs", 256, 2 + 64),
        17: StorageFormat("iq2_xs", 256, 2 + 8 + 64),
        18: StorageFormat("iq3_xxs", 256, 2 + 96),
        19: StorageFormat("iq1_s", 256, 2 + 16 + 32),
        20: StorageFormat("iq4_nl", 32, 2 + 16),
        21: StorageFormat("iq3_s", 256, 2 + 4 + 32 + 8 + 64),
        22: StorageFormat("iq2_s", 256, 2 + 8 + 8 + 64),
        23: StorageFormat("iq4_xs", 256, 2 + 2 + 4 + 128),
        24: StorageFormat("i8", 1, 1),
        25: StorageFormat("i16", 1, 2),
        26: StorageFormat("i32", 1, 4),
        27: StorageFormat("i64", 1, 8),
        28: StorageFormat("fp64", 1, 8),
        29: StorageFormat("iq1_m", 256, 8 + 16 + 32),
        30: StorageFormat("bf16", 1, 2),
        34: StorageFormat("tq1_0", 256, 2 + 4 + 48),
        35: StorageFormat("tq2_0", 256, 2 + 64),
        39: StorageFormat("mxfp4", 32, 1 + 16),
        40: StorageFormat("nvfp4", 64, 4 + 32),
        41: StorageFormat("q1_0", 128, 2 + 16),
        42: StorageFormat("q2_0", 64, 2 + 16),
    }
)
"""By ggml's number: a type's name, and elements and bytes of a block."""

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def weights_of_gguf(path: Path) -> Weights:
    """Bytes and parameters of all tensors of a GGUF file and, where it is split, of its parts.

    Raises InputError for a part that is missing or damaged, UnsupportedError for a type of tensor
    that ggml does not have.
    """
    first = read_header(path)
    parts = {path: first}
    count = first.pairs.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        parts = _parts(path, first, count)
    num_bytes, by_format = 0, Counter[str]()
    for file, header in parts.items():
        num_bytes += _data_bytes(file, header)
        for tensor in header.tensors:
            by_format[TYPES[tensor.kind].name] += tensor.num_elements
    if not by_format.total():
        msg = f"{path} has no tensors; give a GGUF file of a model"
        raise InputError(msg)
    tables = "tensor table" if len(parts) == 1 else f"tensor tables of {len(parts)} parts"
    num_tensors = sum(len(header.tensors) for header in parts.values())
    return Weights(
        num_parameters=by_format.total(),
        num_bytes=num_bytes,
        format=by_format.most_common(1)[0][0],
        origin=f"{tables} of {path.name}: {num_tensors:,} tensors",
        notes=("every tensor in the file is counted",),
        whole=True,
    )


def _parts(path: Path, first: Header, count: int) -> dict[Path, Header]:
    """The headers of all parts of a split, which lie beside the first under names of one kind."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count or count > MAX_PARTS:
        msg = (
            f"{path} is one of {count} parts, which kvcalc finds by names such as "
            f"model-00001-of-{count:05}.gguf; give the parts such names"
        )
        raise InputError(msg)
    parts = {}
    for number in range(1, count + 1):
        part = path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            msg = f"{part} is missing, one of {count} parts of the model; put it beside the others"
            raise InputError(msg)
        header = read_header(part)
        _check(part, "split.no", header.pairs.get("split.no"), number - 1)
        _check(part, "split.count", header.pairs.get("split.count"), count)
        parts[part] = header
    total = first.pairs.get("split.tensors.count")
    if total is not None:
        found = sum(len(header.tensors) for header in parts.values())
        _check(path, "split.tensors.count", total, found)
    return parts


def _check(path: Path, key: str, said: Value, wanted: int) -> None:
    if said != wanted:
        msg = f"{path} has {key} = {shown(said)} where its parts have {wanted:,}; fetch them anew"
        raise InputError(msg)


def _data_bytes(path: Path, header: Header) -> int:
    """Bytes of the tensors of one file, which must lie one behind another and in it (gguf.cpp)."""
    total, end = 0, 0
    for tensor in header.tensors:
        begin = ceil_div(end, header.alignment) * header.alignment
        num_bytes = _tensor_bytes(path, tensor)
        if tensor.offset != begin:
            _damaged(path, f"tensor {shown(tensor.name)} does not lie behind the one before it")
        end = begin + num_bytes
        if end > header.data_bytes:
            _damaged(path, f"it ends before its tensor {shown(tensor.name)} does")
        total += num_bytes
    return total


def _tensor_bytes(path: Path, tensor: Tensor) -> int:
    stored = TYPES.get(tensor.kind)
    if stored is None:
        msg = (
            f"tensor {shown(tensor.name)} of {path} is of ggml's type {tensor.kind}, whose size "
            "kvcalc does not know; give a file of other types"
        )
        raise UnsupportedError(msg)
    row = tensor.shape[0] if tensor.shape else 1
    if row % stored.block_elements:
        _damaged(path, f"rows of tensor {shown(tensor.name)} are no whole blocks of {stored.name}")
    return tensor.num_elements // stored.block_elements * stored.block_bytes


def _damaged(path: Path, why: str) -> None:
    msg = f"cannot read {path}: {why}; fetch it anew"
    raise InputError(msg)
