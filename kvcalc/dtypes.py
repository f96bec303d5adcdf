"""Storage formats of cache elements as integer pairs (elements in a block, bytes of a block)."""

from typing import NamedTuple

from kvcalc.errors import InputError, UnsupportedError


class StorageFormat(NamedTuple):
    """How elements are stored: every `block_elements` consecutive ones take `block_bytes`."""

    name: str
    block_elements: int
    block_bytes: int

    def row_bytes(self, num_elements: int) -> int:
        """Bytes of one token's row of `num_elements` values.

        Raises UnsupportedError when the row is not a whole number of blocks.
        """
        blocks, rest = divmod(num_elements, self.block_elements)
        if rest:
            msg = (
                f"a row of {num_elements} values is not a whole number of {self.name} blocks of "
                f"{self.block_elements}; choose another --kv-dtype"
            )
            raise UnsupportedError(msg)
        return blocks * self.block_bytes


# Plain types hold values only. int8, int4 and int2 here count the payload alone, as an engine with
# scales elsewhere would; `--strategy int4` counts scales, zero points and the unquantised tail.
# GGML blocks are those of ggml-common.h (llama.cpp b6800): the sum is scale (+ minimum) + payload.
# nvfp4 and mxfp4 carry one 8-bit scale for 16 and 32 values (OCP MX 1.0, section 5.3).
FORMATS = {
    fmt.name: fmt
    for fmt in (
        StorageFormat("fp32", 1, 4),
        StorageFormat("bf16", 1, 2),
        StorageFormat("fp16", 1, 2),
        StorageFormat("fp8", 1, 1),
        StorageFormat("int8", 1, 1),
        StorageFormat("int4", 2, 1),
        StorageFormat("int2", 4, 1),
        StorageFormat("nvfp4", 16, 8 + 1),
        StorageFormat("mxfp4", 32, 16 + 1),
        StorageFormat("q8_0", 32, 2 + 32),
        StorageFormat("q5_1", 32, 2 + 2 + 4 + 16),
        StorageFormat("q5_0", 32, 2 + 4 + 16),
        StorageFormat("q4_1", 32, 2 + 2 + 16),
        StorageFormat("q4_0", 32, 2 + 16),
        StorageFormat("iq4_nl", 32, 2 + 16),
    )
}

PAYLOAD_ONLY = ("fp8", "int8", "int4", "int2")
"""Formats without block scales of their own; an engine may keep scales elsewhere."""

COMPUTE_DTYPES = ("fp32", "bf16", "fp16")
"""What models compute in, and so what a cache holds that nobody quantised."""

ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "f32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "f16": "fp16",
    "float8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


def storage_format(name: str) -> StorageFormat:
    """The format of that name or common alias (`bfloat16`, `fp8_e4m3`); InputError if unknown."""
    key = name.strip().lower().removeprefix("torch.")
    try:
        return FORMATS[ALIASES.get(key, key)]
    except KeyError:
        msg = f"unknown dtype {name[:40]!r}; choose auto, {', '.join(FORMATS)}"
        raise InputError(msg) from None
