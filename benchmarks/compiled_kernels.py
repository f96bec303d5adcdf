"""What the kernels of static, int8, int4 and int2 cost an H200, as compiled: it needs no GPU.

    python benchmarks/compiled_kernels.py

A KV head of Llama-3-8B: four queries, bf16, group 32, of width 128 and of 64. For each kernel and
number of warps: registers and bytes spilled of a thread, shared memory of a program, and the
machine instructions of a warp in the loop over blocks, for each token of a KV head, beside those
that can be issued while the token's bytes are read. 16 bits are the rows of `static`. What is
compiled by default is marked.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcalc.strategies import _packed_attention, _packed_kernels, _plain_attention, _plain_kernels

H200 = GPUTarget("cuda", 90, 32)
BYTES_PER_SECOND, CLOCK, MULTIPROCESSORS = 4.3e12, 1.98e9, 132
"""Of an H200: the first measured, a copy; NVIDIA's highest clock."""

ISSUED_PER_CYCLE = 4
"""Instructions of a warp that a multiprocessor issues in a cycle, one for each of its quarters."""

GROUP, QUERIES = 32, 4
POINTERS = {
    **dict.fromkeys("key_levels value_levels".split(), "i32"),
    **dict.fromkeys("partial logsumexp".split(), "fp32"),
    **dict.fromkeys("query key_scales key_minima value_scales value_minima".split(), "bf16"),
    **dict.fromkeys("tail_keys tail_values keys values".split(), "bf16"),
    "counter": "i64",
}
"""What the kernels' pointers point to."""

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


class Compiled(NamedTuple):
    """What a kernel takes; `loop` is the number of instructions in its longest loop."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop: int


def compiled(kernel: triton.JITFunction, settings: dict[str, int]) -> Compiled:
    """A kernel for bf16, compiled for an H200; pointers and strides are multiples of 16, as Triton
    finds them when it is called.
    """
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in settings:
            signature[name] = "constexpr"
        elif name.isupper():
            message = f"{kernel.__name__} is not told {name}"
            raise ValueError(message)
        elif name == "scaling":
            signature[name] = "fp32"
        elif (pointed_to := POINTERS.get(name)) is None:
            signature[name] = "i32"
            if "_of_" in name:
                aligned[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = f"*{pointed_to}"
            aligned[position,] = [["tt.divisibility", 16]]
    arguments = {name: number for name, number in settings.items() if name in kernel.arg_names}
    options = {name: number for name, number in settings.items() if name not in arguments}
    made = triton.compile(
        ASTSource(kernel, signature, arguments, aligned), target=H200, options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run(
                [NVIDIA_TOOLS / "cuobjdump", option, file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Compiled(registers, stack, made.metadata.shared, longest_loop(code))


def longest_loop(code: str) -> int:
    """Instructions from where a jump back goes to, to the jump."""
    places = [int(address, 16) for address, _ in INSTRUCTION.findall(code)]
    jumps = [
        (int(address, 16), int(target[1], 16))
        for address, text in INSTRUCTION.findall(code)
        if (target := JUMP.search(text))
    ]
    return max(sum(target <= place <= jump for place in places) for jump, target in jumps)


def issued_while_read(bits: int, width: int) -> float:
    """Instructions of a warp that a multiprocessor issues while it reads a token of a KV head."""
    token_bytes = 2 * width * bits / 8 + (2 * (2 * 2 * width / GROUP) if bits < 16 else 0)
    cycles = token_bytes / (BYTES_PER_SECOND / CLOCK / MULTIPROCESSORS)
    return cycles * ISSUED_PER_CYCLE


def attention(bits: int, width: int) -> tuple[triton.JITFunction, dict[str, int], int]:
    """The kernel that attends to rows of so many bits, its settings, and the tokens of a block."""
    shape = {"queries": QUERIES, "key_dim": width, "value_dim": width, "element_bytes": 2}
    if bits == 16:
        settings = _plain_attention.constants(**shape)
        return _plain_kernels.attend_splits, settings, settings["BLOCK_TOKENS"]
    settings = _packed_attention.constants(bits=bits, group=GROUP, **shape)
    return _packed_kernels.attend_splits, settings, settings["BLOCK"]


def main() -> None:
    """One line for each way to compile."""
    print(f"Triton {triton.__version__}. Instructions: of a warp, for a token of a KV head.")
    row("width", "bits", "warps", "registers", "spilled", "shared", "instructions", "bytes allow")
    for width in (128, 64):
        for bits in (16, 8, 4, 2):
            kernel, settings, block_tokens = attention(bits, width)
            for warps in (1, 2, 4):
                made = compiled(kernel, settings | {"num_warps": warps})
                issued = made.loop * warps / block_tokens
                row(
                    width,
                    bits,
                    f"{warps}{'*' if warps == settings['num_warps'] else ''}",
                    *made[:3],
                    f"{issued:.1f}",
                    f"{issued_while_read(bits, width):.1f}",
                )


def row(*cells: object) -> None:
    """A line of the table."""
    print(*(f"{cell!s:>12}" for cell in cells))


if __name__ == "__main__":
    main()
