"""llama.cpp takes the cache that it is asked for: what is there for it is what the rest leaves.

Its compute buffer holds, for a micro-batch, the logits of every token and the widest layer
(src/llama-context.cpp, graph_reserve); with flash attention no score matrix is in it.
"""

from kvcalc.budget._terms import (
    BudgetLine,
    Question,
    device_lines,
    encoder_lines,
    read_share,
    reserve_line,
    share_line,
    taken,
    weights_line,
)
from kvcalc.units import GIB

VALUE_BYTES = 4
"""Activations are float32."""


def lines(question: Question) -> list[BudgetLine]:
    """The terms of one rank's cache memory."""
    terms = [*device_lines(question), weights_line(question), *encoder_lines(question)]
    decoder = question.decoder
    if question.reserve_bytes is not None or decoder is None:
        terms.append(reserve_line(question))
    else:
        batch = question.options["n_ubatch"]
        widest = max(decoder.mlp_width, decoder.expert_width * decoder.experts_per_token)
        about = batch * (decoder.vocabulary + 4 * decoder.width + 2 * widest) * VALUE_BYTES
        rule = f"compute buffer of {batch:,} tokens: logits and a layer; half to twice as much"
        terms.append(taken("activations", about, about / 2, 2 * about, rule))
        rule = "CUDA context and kernels: 0.3 to 0.8 GiB in logs"
        terms.append(taken("context", GIB // 2, 0.3 * GIB, 0.8 * GIB, rule))
    if question.share is None:
        return terms
    share = read_share(question.share)
    return [*terms, share_line(terms, question, share, f"{float(share):g}", up=False)]
