"""The memory that an engine leaves for its cache on a GPU, line by line, each with what it is.

What a driver reports, what an engine's rule says and what weights take is known. What activations,
CUDA context and graphs take is not worked out here: the user gives it, as the engine's log has it.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from kvcalc.errors import InputError, UnsupportedError
from kvcalc.units import ceil_div, shown

if TYPE_CHECKING:
    from fractions import Fraction

    from kvcalc.hardware import Gpu
    from kvcalc.weights import Weights


class BudgetLine(NamedTuple):
    """One term of the sum: `num_bytes` is negative where it is taken away.

    `provenance` is `driver`, `engine rule`, `exact`, `estimate` or `asked for`; `source` says on
    whose authority.
    """

    name: str
    num_bytes: int
    provenance: str
    source: str


class Share(NamedTuple):
    """How an engine bounds itself: its option, the default (None: it depends on too much), and
    whether it is a share of all memory or of what weights and activations leave.
    """

    option: str
    default: str | None
    of_what_is_left: bool
    source: str


SHARES: Mapping[str, Share] = {
    "vllm": Share("gpu_memory_utilization", "0.92", False, "vLLM 0.33.0 config/cache.py"),
    "sglang": Share("mem_fraction_static", None, False, "SGLang 0.5.23 kv_cache_configurator.py"),
    "tensorrt-llm": Share("free_gpu_memory_fraction", "0.9", True, "TensorRT-LLM _util.py"),
    "llama.cpp": Share("", "1", True, "llama.cpp takes what it is asked for"),
}


def gpu_budget(
    gpu: "Gpu",
    weights: "Weights",
    *,
    engine: str,
    ranks: int,
    share: str | None,
    reserve_bytes: int,
) -> tuple[BudgetLine, ...]:
    """The terms of one rank's memory for its cache, which is their sum; the last is none of them
    where there is nothing left.

    Raises InputError for a share that is none or must be given, and UnsupportedError for an engine
    without a rule and a GPU whose memory no driver printed.
    """
    rule = SHARES.get(engine)
    if rule is None:
        msg = f"engine {engine} has no rule for a GPU's memory; choose {', '.join(SHARES)}"
        raise UnsupportedError(msg)
    if gpu.usable_bytes is None:
        msg = (
            f"no driver's figure of the memory of {gpu.id} is known; give --kv-memory, as the "
            "engine prints it"
        )
        raise UnsupportedError(msg)
    fraction = _fraction(rule, share)
    total = gpu.usable_bytes.value
    said = f"{rule.option} {share or rule.default}" if rule.option else rule.source
    given = "asked for" if share else "engine rule"
    lines = [BudgetLine("device memory", total, "driver", gpu.usable_bytes.source)]
    taken = [
        BudgetLine(
            "weights" if ranks == 1 else f"weights / {ranks} ranks",
            -ceil_div(weights.num_bytes, ranks),
            "exact" if ranks == 1 else "estimate",
            weights.origin if ranks == 1 else f"what ranks repeat is not counted: {weights.origin}",
        ),
        BudgetLine("reserve", -reserve_bytes, "asked for", "activations, context and graphs"),
    ]
    if rule.of_what_is_left:
        left = total + sum(line.num_bytes for line in taken)
        kept = int(left * fraction)
        share_line = BudgetLine("left to others", kept - left, given, said)
        return (*lines, *taken, *[share_line] * (kept != left))
    asked = ceil(total * fraction)
    return (*lines, BudgetLine("left to others", asked - total, given, said), *taken)


def available(lines: Sequence[BudgetLine]) -> int:
    """What the lines leave; nothing, where they leave less."""
    return max(sum(line.num_bytes for line in lines), 0)


def _fraction(rule: Share, share: str | None) -> "Fraction":
    from fractions import Fraction

    text = share or rule.default
    if text is None:
        msg = f"the default of {rule.option} depends on the machine: give --share, as it prints it"
        raise InputError(msg)
    try:
        fraction = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        msg = f"--share must be above 0 and at most 1, not {shown(share)}"
        raise InputError(msg)
    return fraction
