"""vLLM: a share of all memory, less what a trial step took and what CUDA graphs will take.

`gpu_memory_utilization` × total, rounded up, less the weights, less the peak of a step of
`max_num_batched_tokens` with a sampled token for each of `max_num_seqs` requests, less what is not
PyTorch's, and since 0.21 less the estimate of the graphs (vLLM 0.33.0 v1/worker/gpu_worker.py,
utils/mem_utils.py). The CUDA context was there before and counts among what is left to others.

Estimates follow 53 starts that vLLM logged on an H100, 12 of them in full (llm-d-planner d3121e05,
vLLM 0.19.0; llm-d-benchmark config_explorer, vLLM 0.11), and 20 on other devices: the sampler's
peak is 14.4 B for each request and word of the vocabulary, and 37.9 B before 0.17, where a sort of
the whole vocabulary took part. That is within 4 % for 30 of the 41 dense models among them; the
others have encoders (up to 11 % more), compute in float32 or are stages that do not sample.
"""

from typing import TYPE_CHECKING, Any

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
from kvcalc.units import GIB, MIB, ceil_div

if TYPE_CHECKING:
    from kvcalc.budget._decoder import Decoder
    from kvcalc.hardware import Gpu

OPTION = "gpu_memory_utilization"
DEFAULT = "0.92"
SOURCE = "vLLM 0.33.0 config/cache.py"

LARGE_BYTES, LARGEST_BYTES = 70 * GIB, 160 * GIB
"""From where on `vllm serve` takes longer steps (engine/arg_utils.py, get_batch_defaults)."""

CONSTANT_BYTES = 64 * MIB
"""Workspaces of cuBLAS and the like that are left when a step is over."""

HOPPER = 9
"""Compute capability of the first devices whose attention kernels take more."""

GRAPH_BYTES = 256 * 1024
"""Of one graph and layer: 0.17 to 0.46 MiB in 12 logs."""


def defaults(gpu: "Gpu", total_bytes: int) -> dict[str, Any]:
    """What the server takes on this device where nothing is said."""
    large = total_bytes >= LARGE_BYTES and "a100" not in gpu.name.lower()
    tokens = 16384 if total_bytes >= LARGEST_BYTES else 8192
    return {
        "max_num_batched_tokens": tokens if large else 2048,
        "max_num_seqs": 1024 if large else 256,
    }


def lines(question: Question) -> list[BudgetLine]:
    """The terms of one rank's cache memory."""
    terms = device_lines(question)
    share = read_share(question.share or DEFAULT)
    said = f"{OPTION} {float(share):g}" + (f", {SOURCE}" if question.share is None else "")
    terms.append(share_line(terms, question, share, said, up=True))
    decoder = question.decoder
    terms += [weights_line(question), *encoder_lines(question)]
    if decoder is not None:
        terms += _padding(question, decoder)
    if question.reserve_bytes is not None or decoder is None:
        return [*terms, reserve_line(question)]
    terms += [_activations(question, decoder), _outside(question)]
    if not question.options["enforce_eager"] and question.options["estimate_cudagraphs"]:
        terms.append(_graphs(question, decoder))
    return terms


def _activations(question: Question, decoder: "Decoder") -> BudgetLine:
    options = question.options
    tokens = options["max_num_batched_tokens"]
    requests = min(options["max_num_seqs"], tokens)
    step = tokens * decoder.width * decoder.value_bytes
    per_word = 379 if options["sampler_sort"] else 144
    sampler = requests * decoder.vocabulary * per_word // 10 + step
    forward = forward_bytes(decoder, tokens=tokens, tp=question.tp)
    experts = expert_bytes(decoder, tokens=tokens, tp=question.tp)
    images = 2 * step if decoder.encoder else 0
    about = max(sampler, forward) + experts + images + CONSTANT_BYTES
    rule = (
        f"a step of {tokens:,} tokens, {requests:,} requests of which are sampled: {per_word / 10} "
        f"B for each and for each of {decoder.vocabulary:,} words; ± 15 %"
    )
    most = 1.15 * about
    if decoder.encoder:
        most += GIB
        rule += ", and up to 1 GiB of the encoder's"
    return taken("activations", about, 0.85 * about, most, rule)


def _padding(question: Question, decoder: "Decoder") -> list[BudgetLine]:
    """Experts in mxfp4 are loaded with one width a multiple of 256: gpt-oss' 2,880 as 3,072."""
    padded = ceil_div(decoder.expert_width, 256) * 256
    if not decoder.packed_experts or padded == decoder.expert_width:
        return []
    more = decoder.expert_values * (padded - decoder.expert_width) // decoder.expert_width
    about = more * 17 // 32 // question.ranks
    rule = f"experts of {decoder.expert_width:,} as {padded:,} in one width; kernels differ"
    return [taken("padding of experts", about, 0, 2.2 * about, rule)]


def _outside(question: Question) -> BudgetLine:
    if question.unified:
        rule = "and the host's page cache, where memory is the host's: 0.2 to 5 GiB in logs"
        return taken("outside PyTorch", 2 * GIB, 0.2 * GIB, 5.5 * GIB, rule)
    if question.tp == 1:
        since = (question.gpu.compute_capability or "0").split(".")[0]
        about = GIB // 4 if int(since) >= HOPPER else GIB // 20
        rule = "of one rank: 0.13 to 0.46 GiB in logs of Hopper and Blackwell, else 0.01 to 0.1"
        return taken("outside PyTorch", about, about / 5, 2 * about, rule)
    if question.linked:
        rule = "NCCL and all-reduce buffers over NVLink: 0.5 to 2.3 GiB in logs, 2.1 since 0.18"
        return taken("outside PyTorch", 21 * GIB // 10, 0.5 * GIB, 2.3 * GIB, rule)
    rule = "NCCL over PCIe: 0.1 to 1 GiB in logs"
    return taken("outside PyTorch", 3 * GIB // 10, 0.1 * GIB, GIB, rule)


def _graphs(question: Question, decoder: "Decoder") -> BudgetLine:
    options = question.options
    drafted = 1 + options["num_speculative_tokens"]
    decoded = options["max_num_seqs"] * drafted
    sizes = capture_sizes(min(2 * decoded, 512, options["max_num_batched_tokens"]))
    graphs = len(sizes) + sum(size <= decoded for size in sizes)
    layers = decoder.stage_layers(question.pp)
    about = graphs * layers * GRAPH_BYTES
    rule = f"{graphs} graphs of {layers} layers at 0.25 MiB: 0.17 to 0.46 in logs"
    return taken("CUDA graphs", about, 0.65 * about, 1.85 * about, rule)


def capture_sizes(largest: int) -> list[int]:
    """The batches that are captured, up to the largest (config/vllm.py, _set_cudagraph_sizes)."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return [size for size in sizes if size <= largest]
