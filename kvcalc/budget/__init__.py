"""The memory that an engine leaves for its cache on a GPU, line by line, each with what it is.

What a driver reports, what an engine's rule says and what weights take is known. What activations,
CUDA context and graphs take is estimated by a rule with a range, or the user gives it, as the
engine's log has it. Each module here is one engine's rules, with the upstream files they follow.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from kvcalc.budget._terms import ASKED, BudgetLine, Question, read_share
from kvcalc.errors import UnsupportedError

if TYPE_CHECKING:
    from kvcalc.hardware import Gpu
    from kvcalc.weights import Weights

__all__ = ["ASKED", "BudgetLine", "engine_defaults", "gpu_budget", "read_share"]

MODULES: Mapping[str, str] = {
    "vllm": "vllm",
    "sglang": "sglang",
    "tensorrt-llm": "tensorrt_llm",
    "llama.cpp": "llama_cpp",
}


class Rules(Protocol):
    """What a module of this package offers. Where the server sets options by the device, it also
    has `defaults(gpu, total_bytes)`: those options, where nothing is said.
    """

    @staticmethod
    def lines(question: Question) -> list[BudgetLine]:
        """The terms of one rank's cache memory."""


def gpu_budget(
    gpu: "Gpu",
    weights: "Weights",
    *,
    config: Mapping[str, Any],
    engine: str,
    tp: int,
    pp: int,
    share: str | None,
    reserve_bytes: int | None,
    options: Mapping[str, Any],
) -> tuple[BudgetLine, ...]:
    """The terms of one rank's memory for its cache, which is their sum.

    Without `reserve_bytes` what activations, context and graphs take is estimated; `options` are
    the engine's own, all of them. Raises InputError for a share that is none or must be given, and
    UnsupportedError for an engine without a rule, a GPU whose memory no driver printed, and a
    config that does not say what an estimate needs.
    """
    from kvcalc.budget._decoder import read_decoder

    rules = _rules(engine)
    total_bytes(gpu)
    try:
        decoder = read_decoder(config)
    except UnsupportedError:
        if reserve_bytes is None:
            raise
        decoder = None
    question = Question(gpu, weights, decoder, tp, pp, share, reserve_bytes, options)
    return tuple(rules.lines(question))


def engine_defaults(engine: str, gpu: "Gpu") -> dict[str, Any]:
    """Options that an engine's server sets by the device it finds, where nothing is said."""
    defaults = getattr(_rules(engine), "defaults", None)
    told: dict[str, Any] = defaults(gpu, total_bytes(gpu)) if defaults else {}
    return told


def total_bytes(gpu: "Gpu") -> int:
    """What a driver says the device has; UnsupportedError where none is known to have said it."""
    figure = gpu.total_bytes
    if figure is None:
        from kvcalc.hardware import no_figure

        raise no_figure(gpu.id)
    return figure.value


def _rules(engine: str) -> Rules:
    if engine not in MODULES:
        msg = f"engine {engine} has no rule for a GPU's memory; choose {', '.join(MODULES)}"
        raise UnsupportedError(msg)
    return cast("Rules", importlib.import_module(f"{__name__}.{MODULES[engine]}"))
