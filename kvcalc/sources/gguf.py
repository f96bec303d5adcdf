"""Reading a GGUF file's header: its keys and values, and the table of its tensors.

The format is that of ggml's `docs/gguf.md`, versions 2 and 3: a magic word, two counts, pairs of a
key and a typed value, then name, shape, type and place of each tensor. Nothing in the file is
trusted: every count and length is held against the bytes that are there, and one that lies makes
one ConfigError.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

from kvcalc.config import MAX_LAYERS
from kvcalc.errors import ConfigError
from kvcalc.units import ceil_div, shown

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

MAX_PAIRS: Final = 65_536
"""Published files have a few dozen."""

MAX_KEY_BYTES: Final = 65_535
"""As the format says."""

MAX_STRINGS: Final = 2**22
"""In all arrays together; the largest vocabularies and their merges are below a million."""

MAX_METADATA_BYTES: Final = 2**29
"""Published files have a few megabytes, nearly all of it vocabulary."""

MAX_TEXT_BYTES: Final = 1024
"""Longer strings (chat templates, licences) are passed over."""

MAX_TENSORS: Final = 2**20
"""Published files have a few thousand."""

MAX_DIMENSIONS: Final = 4
"""As ggml has them."""

MAX_ELEMENTS: Final = 2**50
ALIGNMENT: Final = 32
"""Where tensors begin, unless `general.alignment` says otherwise."""

_NUMBERS = {
    kind: struct.Struct("<" + letter)
    for kind, letter in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
"""Types of numbers: integers of 8 to 32 bits, float, bool, integers of 64 bits, double."""
_STRING = 8
_ARRAY = 9
_LENGTH = struct.Struct("<Q")
_WORD = struct.Struct("<I")

Result = TypeVar("Result")
Value = int | float | bool | str | tuple[int | float | bool, ...] | None


class Tensor(NamedTuple):
    """A line of the table: `shape` begins with the length of a row, `kind` is ggml's number of the
    type, `offset` where its bytes begin behind the header.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def num_elements(self) -> int:
        """Values of the tensor."""
        return math.prod(self.shape)


class Header(NamedTuple):
    """All that stands before the tensors' bytes, of which there are `data_bytes`."""

    pairs: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_bytes: int


def read_metadata(path: Path) -> Mapping[str, Value]:
    """The pairs of a GGUF file; ConfigError when it is none, or damaged."""
    return _mapped(path, lambda data: parse(data, name=str(path)))


def read_header(path: Path) -> Header:
    """The pairs and the table of a GGUF file; ConfigError when it is none, or damaged."""
    return _mapped(path, lambda data: parse_header(data, name=str(path)))


def _mapped(path: Path, action: Callable[[mmap.mmap], Result]) -> Result:
    try:
        if not path.is_file():
            msg = f"{path} is not a file; give a GGUF file"
            raise ConfigError(msg)
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return action(data)
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise ConfigError(msg) from None
    except ValueError:  # what mmap says of an empty file
        msg = f"{path} is empty"
        raise ConfigError(msg) from None


def parse(data: bytes | mmap.mmap, *, name: str) -> Mapping[str, Value]:
    """The pairs in the bytes of a file. Texts and numbers are kept, and arrays of at most a number
    for each layer; None stands for what is longer, and for arrays of strings.
    """
    return _pairs(_Reader(data, name))[0]


def parse_header(data: bytes | mmap.mmap, *, name: str) -> Header:
    """Likewise, with the table of tensors behind them."""
    reader = _Reader(data, name)
    pairs, count = _pairs(reader)
    if count > MAX_TENSORS:
        reader.fail(f"it says that it has {count:,} tensors, more than {MAX_TENSORS:,}")
    tensors = tuple(reader.tensor() for _ in range(count))
    if len({tensor.name for tensor in tensors}) != count:
        reader.fail("two of its tensors have one name")
    alignment = pairs.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        reader.fail(f"its general.alignment is {shown(alignment)}, no power of two")
    begin = ceil_div(reader.offset, alignment) * alignment
    return Header(pairs, tensors, alignment, max(len(data) - begin, 0))


def _pairs(reader: "_Reader") -> tuple[Mapping[str, Value], int]:
    """The pairs, and how many tensors the file says that it has."""
    data = reader.data
    if data[:4] != MAGIC:
        reader.fail(f"it begins with {bytes(data[:4])!r}, not {MAGIC!r}")
    reader.offset = 4
    version = reader.number(_WORD)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        which = "written for big-endian machines" if swapped else f"of version {version}"
        reader.fail(f"it is {which}, not of version 2 or 3")
    num_tensors: int = reader.number(_LENGTH)
    count = reader.number(_LENGTH)
    if count > MAX_PAIRS:
        reader.fail(f"it says that it has {count:,} keys, more than {MAX_PAIRS:,}")
    pairs: dict[str, Value] = {}
    for _ in range(count):
        key = reader.text(MAX_KEY_BYTES)
        if key is None:
            reader.fail("a key of it is too long")
        if key in pairs:
            reader.fail(f"it has the key {shown(key)} twice")
        pairs[key] = reader.value(key)
    return pairs, num_tensors


class _Reader:
    """Takes values off the bytes, one after another."""

    def __init__(self, data: bytes | mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.offset = 0
        self.size = min(len(data), MAX_METADATA_BYTES)
        self.strings = 0

    def fail(self, why: str) -> NoReturn:
        """Raise the one error that there is."""
        msg = f"{self.name} is no GGUF file that can be read: {why}"
        raise ConfigError(msg)

    def skip(self, num_bytes: int) -> int:
        """Go past as many bytes; where they begin."""
        start = self.offset
        if num_bytes > self.size - start:
            self.fail(f"it is cut off, or a length in it is wrong (at byte {start:,})")
        self.offset = start + num_bytes
        return start

    def number(self, form: struct.Struct) -> Any:  # noqa: ANN401 - as the form says
        """One number."""
        return form.unpack_from(self.data, self.skip(form.size))[0]

    def text(self, most: int) -> str | None:
        """A string; None when it is longer than `most` bytes."""
        length = self.number(_LENGTH)
        start = self.skip(length)
        if length > most:
            return None
        return self.data[start : self.offset].decode("utf-8", errors="replace")

    def value(self, key: str) -> Value:
        """A value of the type that stands before it."""
        kind = self.number(_WORD)
        if kind in _NUMBERS:
            number: int | float | bool = self.number(_NUMBERS[kind])
            return number
        if kind == _STRING:
            return self.text(MAX_TEXT_BYTES)
        if kind != _ARRAY:
            self.fail(f"{shown(key)} is of type {kind}, which the format does not have")
        return self._array(key)

    def tensor(self) -> Tensor:
        """A line of the table of tensors."""
        name = self.text(MAX_KEY_BYTES)
        if name is None:
            self.fail("the name of a tensor is too long")
        dimensions = self.number(_WORD)
        if dimensions > MAX_DIMENSIONS:
            self.fail(f"tensor {shown(name)} has {dimensions:,} dimensions")
        shape = tuple(self.number(_LENGTH) for _ in range(dimensions))
        tensor = Tensor(name, shape, self.number(_WORD), self.number(_LENGTH))
        if tensor.num_elements > MAX_ELEMENTS:
            self.fail(f"tensor {shown(name)} has the shape {shown(shape)}")
        return tensor

    def _array(self, key: str) -> Value:
        kind, count = self.number(_WORD), self.number(_LENGTH)
        if kind == _STRING:
            self._pass_strings(key, count)
            return None
        if kind not in _NUMBERS:
            what = "arrays in it" if kind == _ARRAY else f"values of type {kind}"
            self.fail(f"{shown(key)} is an array with {what}")
        form = _NUMBERS[kind]
        start = self.skip(count * form.size)
        if count > MAX_LAYERS:
            return None
        return struct.unpack_from(f"<{count}{form.format[-1]}", self.data, start)

    def _pass_strings(self, key: str, count: int) -> None:
        """Pass over an array of strings."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            self.fail(f"{shown(key)} says that it has {count:,} strings")
        data, offset, last = self.data, self.offset, self.size - _LENGTH.size
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            if offset > last:
                break
            offset += _LENGTH.size + unpack(data, offset)[0]
        else:
            self.skip(offset - self.offset)
            return
        self.fail(f"it is cut off in {shown(key)}")
