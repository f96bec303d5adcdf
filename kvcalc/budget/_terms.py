"""The terms of a memory budget, and what each engine's rules are asked."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcalc.errors import InputError
from kvcalc.units import MIB, ceil_div, shown

if TYPE_CHECKING:
    from kvcalc.budget._decoder import Decoder
    from kvcalc.hardware import Gpu
    from kvcalc.weights import Weights

ESTIMATE = "estimate"
ASKED = "asked for"
"""The format of weights whose bytes the user gives."""

UNIFIED = ("gb10", "thor", "orin")
"""In names of devices whose memory is the host's, too: what the system and its page cache take
counts as taken by the engine.
"""

USUAL_ENCODER = 550_000_000
"""Parameters: SigLIP so400m has 0.43, those of Qwen 2.5 VL and Gemma 4 0.6 billion."""


class BudgetLine(NamedTuple):
    """One term of the sum: `num_bytes` is negative where it is taken away.

    `provenance` is `driver`, `engine rule`, `exact`, `estimate` or `asked for`; `source` says on
    whose authority. An estimate lies between `least_bytes` and `most_bytes`.
    """

    name: str
    num_bytes: int
    provenance: str
    source: str
    least_bytes: int | None = None
    most_bytes: int | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most that it may be."""
        if self.least_bytes is None or self.most_bytes is None:
            return self.num_bytes, self.num_bytes
        return self.least_bytes, self.most_bytes


class Question(NamedTuple):
    """What an engine's rule is asked: the device, what is to run on it, on how many ranks.

    `decoder` is None where a `reserve_bytes` takes the place of estimates; `options` are the
    engine's own, all of them.
    """

    gpu: "Gpu"
    weights: "Weights"
    decoder: "Decoder | None"
    tp: int
    pp: int
    share: str | None
    reserve_bytes: int | None
    options: Mapping[str, Any]

    @property
    def ranks(self) -> int:
        """How many GPUs it takes."""
        return self.tp * self.pp

    @property
    def unified(self) -> bool:
        """Whether the device's memory is the host's."""
        return any(word in self.gpu.name.lower() for word in UNIFIED)

    @property
    def linked(self) -> bool:
        """Whether GPUs of this kind have a link that is faster than the bus."""
        link, bus = self.gpu.interconnect_bytes_per_second, self.gpu.pcie_bytes_per_second
        return link is not None and bus is not None and link.value > bus.value


def taken(name: str, about: int, least: float, most: float, source: str) -> BudgetLine:
    """What is estimated to be taken away: about so many bytes, at least and at most so many."""
    return BudgetLine(name, -about, ESTIMATE, source, -round(most), -round(least))


def device_lines(question: Question) -> list[BudgetLine]:
    """What engines take their share of: the total that CUDA or HIP tells them.

    nvidia-smi and NVML tell more, what the driver keeps for itself included: 451 MiB more on a T4,
    469 on an H100, 729 on a B200, 668 on an A100 80GB.
    """
    gpu = question.gpu
    if gpu.cuda_bytes is not None:
        return [BudgetLine("device memory", gpu.cuda_bytes.value, "driver", gpu.cuda_bytes.source)]
    figure = gpu.usable_bytes
    assert figure is not None  # noqa: S101 - gpu_budget refuses before
    lines = [BudgetLine("device memory", figure.value, "driver", figure.source)]
    if gpu.vendor == "nvidia" and question.reserve_bytes is None:
        kept = 430 * MIB + figure.value // 600
        rule = "430 MiB + 1/600: nvidia-smi's total less cudaMemGetInfo's, as nine kinds print them"
        lines.append(taken("driver", kept, 0.75 * kept, 1.6 * kept, rule))
    return lines


def weights_line(question: Question) -> BudgetLine:
    """One rank's weights: its part, and what ranks repeat or stages have more of."""
    weights, ranks = question.weights, question.ranks
    lowest = weights.num_bytes if weights.least_bytes is None else weights.least_bytes
    if ranks == 1 and weights.least_bytes is None:
        provenance = "asked for" if weights.format == ASKED else "exact"
        return BudgetLine("weights", -weights.num_bytes, provenance, weights.origin)
    if ranks == 1:
        return taken("weights", weights.num_bytes, lowest, weights.num_bytes, weights.origin)
    part = ceil_div(weights.num_bytes, ranks)
    decoder = question.decoder
    if decoder is not None and question.pp > 1:
        embedding = decoder.vocabulary * decoder.width * decoder.value_bytes
        layers = weights.num_bytes - embedding * (1 if decoder.tied else 2)
        stage = max(layers, 0) * decoder.stage_layers(question.pp) // decoder.layers + embedding
        part = max(part, ceil_div(stage, question.tp))
    least = part * lowest / max(weights.num_bytes, 1)
    rule = f"a rank's part; what ranks repeat is up to 3 % more: {weights.origin}"
    return taken(f"weights / {ranks} ranks", part, least, part * 1.03, rule)


def encoder_lines(question: Question) -> list[BudgetLine]:
    """The weights of an encoder of images or sound, which those of a decoder leave out."""
    decoder, weights = question.decoder, question.weights
    if decoder is None or decoder.encoder is None or weights.whole:
        return []
    encoder = decoder.encoder
    about = encoder.num_values * decoder.value_bytes
    if not encoder.known:
        about = USUAL_ENCODER * decoder.value_bytes
        rule = "left out by an excerpt of a config: none, or up to 2 billion parameters"
        return [taken("encoder", about, 0, 2 * 10**9 * decoder.value_bytes, rule)]
    rule = (
        f"{encoder.layers} layers of {encoder.width:,}, whole on every rank: half of it to twice "
        "as much"
    )
    return [taken("encoder", about, about / 2, 2 * about, rule)]


def share_line(
    terms: Sequence[BudgetLine], question: Question, share: Fraction, said: str, *, up: bool
) -> BudgetLine:
    """What is left to others of the sum of the terms, of which the engine takes a share, rounded
    `up` or down; what is `said` of it. Where the sum is an estimate, so is this, by as much.
    """
    rounded = ceil if up else floor
    about, least, most = (
        rounded(max(left, 0) * share) - max(left, 0)
        for left in (
            sum(term.num_bytes for term in terms),
            *(sum(term.bounds[end] for term in terms) for end in (0, 1)),
        )
    )
    provenance = "asked for" if question.share else "engine rule"
    line = BudgetLine("left to others", about, provenance, said)
    return line if least == most else line._replace(least_bytes=least, most_bytes=most)


def reserve_line(question: Question) -> BudgetLine:
    """What the user says that all the rest takes."""
    num_bytes = question.reserve_bytes or 0
    return BudgetLine("reserve", -num_bytes, "asked for", "activations, context and graphs")


def read_share(said: str, *, option: str = "--share") -> Fraction:
    """A part of the whole; InputError for what is none."""
    try:
        fraction = Fraction(said.strip())
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction <= 1:
        msg = f"{option} must be above 0 and at most 1, not {shown(said)}"
        raise InputError(msg)
    return fraction


def forward_bytes(decoder: "Decoder", *, tokens: int, tp: int) -> int:
    """The peak of a layer's forward pass: hidden states four times over, gate, up and their
    product; routed experts work in a buffer of their own.
    """
    widest = 4 * decoder.width + 3 * ceil_div(decoder.mlp_width, tp)
    return tokens * widest * decoder.value_bytes


def expert_bytes(decoder: "Decoder", *, tokens: int, tp: int) -> int:
    """The buffers of routed experts: for each of a token's the larger of gate with up and the
    output, and the product.
    """
    if decoder.packed_experts:
        return 0
    width = ceil_div(decoder.expert_width, tp)
    values = max(2 * width, decoder.width if width else 0) + width
    return tokens * decoder.experts_per_token * values * decoder.value_bytes
