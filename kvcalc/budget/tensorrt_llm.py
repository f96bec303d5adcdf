"""TensorRT-LLM: a share of what weights, a trial step and the rest of the process leave.

`free_gpu_memory_fraction` × (total - peak of a dry run of `max_num_tokens` tokens, with all that is
not PyTorch's) (tensorrt_llm/_torch/pyexecutor/_util.py). Few logs print the terms: the ranges are
wide.
"""

from kvcalc.budget._terms import (
    BudgetLine,
    Question,
    device_lines,
    encoder_lines,
    expert_bytes,
    forward_bytes,
    read_share,
    reserve_line,
    share_line,
    taken,
    weights_line,
)
from kvcalc.units import GIB

OPTION = "free_gpu_memory_fraction"
DEFAULT = "0.9"
SOURCE = "TensorRT-LLM _torch/pyexecutor/_util.py"

STEP_TOKENS = 8192
"""`max_num_tokens` of trtllm-serve."""


def lines(question: Question) -> list[BudgetLine]:
    """The terms of one rank's cache memory."""
    terms = [*device_lines(question), weights_line(question), *encoder_lines(question)]
    decoder = question.decoder
    if question.reserve_bytes is not None or decoder is None:
        terms.append(reserve_line(question))
    else:
        step = forward_bytes(decoder, tokens=STEP_TOKENS, tp=question.tp)
        step += expert_bytes(decoder, tokens=STEP_TOKENS, tp=question.tp)
        rule = f"a step of {STEP_TOKENS:,} tokens: half of it to twice as much"
        terms.append(taken("activations", step, step / 2, 2 * step, rule))
        outside = GIB if question.ranks == 1 else 2 * GIB
        rule = "CUDA context, graphs and NCCL: half of it to twice as much"
        terms.append(taken("outside PyTorch", outside, outside / 2, 2 * outside, rule))
    share = read_share(question.share or DEFAULT)
    said = f"{OPTION} {float(share):g}" + (f", {SOURCE}" if question.share is None else "")
    return [*terms, share_line(terms, question, share, said, up=False)]
