"""SGLang: a share of what is free before the weights are loaded, less the weights.

`mem_fraction_static` covers weights and pools; activations and graphs live in the rest (SGLang
0.5.23 mem_cache/kv_cache_configurator.py). Its default leaves what a sum over the device's class
says (arg_groups/memory_hook.py, server_args.py `_handle_gpu_memory_settings`): a rule, no
estimate, for what the engine reads of nvidia-smi.
"""

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from kvcalc.budget._terms import (
    ESTIMATE,
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
from kvcalc.errors import InputError
from kvcalc.units import GIB, MIB

if TYPE_CHECKING:
    from kvcalc.hardware import Gpu

OPTION = "mem_fraction_static"

CLASSES = (
    (20, 2048, 8, 8),
    (35, 4096, 48, 160),
    (60, 4096, 32, 160),
    (90, 8192, 256, 512),
    (160, 8192, 256, 512),
)
"""Below so many GiB: chunk of prefill, and largest batch of a decode graph below and from 4 ranks.
"""

USUAL_PART = Fraction(95, 100)
SMALLEST_PART, LARGEST_PART = USUAL_PART * Fraction(8, 10), USUAL_PART * Fraction(105, 100)
"""What of the share models with an encoder take, by its size (adjust_mem_fraction_for_vlm)."""

LARGEST_CLASS = (16384, 512, 512)
MANY_RANKS = 4


def defaults(gpu: "Gpu", total_bytes: int) -> dict[str, Any]:
    """What the server takes on this device where nothing is said."""
    del gpu
    chunk, _, _ = _class(total_bytes)
    return {"chunked_prefill_size": chunk}


def _class(total_bytes: int) -> tuple[int, int, int]:
    for gib, chunk, few, many in CLASSES:
        if total_bytes < gib * GIB:
            return chunk, few, many
    return LARGEST_CLASS


def lines(question: Question) -> list[BudgetLine]:
    """The terms of one rank's cache memory."""
    terms = device_lines(question)
    if question.reserve_bytes is None:
        terms.append(_context(question))
    share, said = _share(question)
    rest = share_line(terms, question, share, said, up=True)._replace(name="activations, graphs")
    decoder = question.decoder
    if question.share is None and decoder and decoder.encoder and not decoder.encoder.known:
        # Of what size the encoder is decides the share, between these.
        low, high = (
            share_line(terms, question, share * part, said, up=True).bounds
            for part in (SMALLEST_PART / USUAL_PART, LARGEST_PART / USUAL_PART)
        )
        rest = rest._replace(provenance=ESTIMATE, least_bytes=low[0], most_bytes=high[1])
    terms.append(rest)
    terms += [weights_line(question), *encoder_lines(question)]
    return terms if question.reserve_bytes is None else [*terms, reserve_line(question)]


def _context(question: Question) -> BudgetLine:
    """What is gone when loading begins ("Load weight begin. avail mem")."""
    if question.unified:
        rule = "what the host has taken of the same memory: 7.4 and 7.7 GiB in logs"
        return taken("context", 5 * GIB, GIB, 9 * GIB, rule)
    if question.tp > 1 and question.linked:
        rule = "CUDA context and NCCL over NVLink: 1.4 to 4.5 GiB in logs"
        return taken("context", 18 * GIB // 10, 1.4 * GIB, 4.5 * GIB, rule)
    rule = "CUDA context, and NCCL over PCIe: 0.4 to 1 GiB in logs"
    return taken("context", 6 * GIB // 10, 0.4 * GIB, 1.2 * GIB, rule)


def _share(question: Question) -> tuple[Fraction, str]:
    if question.share:
        given = read_share(question.share)
        return given, f"{OPTION} {float(given):g}"
    decoder = question.decoder
    figure = question.gpu.usable_bytes or question.gpu.cuda_bytes
    if figure is None or decoder is None:
        msg = f"the default of {OPTION} depends on the machine: give --share, as it prints it"
        raise InputError(msg)
    total = figure.value // MIB
    chunk, few, many = _class(figure.value)
    chunk = question.options["chunked_prefill_size"] or chunk
    batch = many if question.tp >= MANY_RANKS else few
    graphs = 2 * batch + (1536 if decoder.latent else 8 * len(prefill_sizes(chunk)))
    reserved = 512 + 1.5 * max(chunk, 2048) + graphs + 128 * question.ranks
    if total > 60 * 1024:
        reserved = max(reserved, 10240)
    share = round((total - reserved) / total, 3)
    said = f"{OPTION} {share}: {reserved:,.0f} of {total:,} MiB are for activations and graphs"
    if decoder.encoder:
        part = float(USUAL_PART)
        if decoder.encoder.known:
            size = decoder.encoder.layers * decoder.encoder.width**2 / (24 * 1024**2)
            part *= min(max(1 - 0.1 * (size - 1), 0.8), 1.05)
        share *= part
        said = f"{OPTION} {share:.3f}: the encoder's part, and {reserved:,.0f} of {total:,} MiB"
    return Fraction(share).limit_denominator(10**6), said


def prefill_sizes(largest: int) -> list[int]:
    """The batches of prefill that are captured."""
    sizes = [*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64)]
    sizes += [*range(1280, 4097, 256), *range(4608, largest + 1, 512)]
    return [size for size in sizes if size <= largest]
