"""The speed of light: how fast a phase could be if the device did nothing but what must be done.

Prefill is bound by arithmetic, a decode step by reading all weights and the cache once. The
ceilings are what a copy and a matrix product reach here; the published figures of a known GPU, of
which some nine and eight tenths can be reached, stand beside them. What is counted: two operations
for each weight and token, and causal attention (arXiv:2205.14135, section 3.1, counts alike); reads
of the embedding table are left out.
"""

import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel

from kvcalc.hardware import find_gpu
from kvcalc.measure.models import TORCH_DTYPES, LoadedModel, widest
from kvcalc.measure.record import free_memory
from kvcalc.measure.workload import Workload

_PROBE_BYTES, _PROBE_SIDE = {"cpu": 2**27, "cuda": 2**31}, {"cpu": 1024, "cuda": 8192}
"""Large enough that on a GPU neither its L2 nor a launch has a part in it."""

_PROBE_SECONDS = 0.15


class Ceilings(NamedTuple):
    """What a device can do at most, and who says so."""

    bytes_per_second: float
    flops_per_second: float
    source: str


class Work(NamedTuple):
    """What one step must do: bytes to read, and floating-point operations."""

    num_bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of reading and computing, as if they overlapped wholly."""
        reading = self.num_bytes / ceilings.bytes_per_second
        return max(reading, self.flops / ceilings.flops_per_second)


def speed_of_light(
    loaded: LoadedModel,
    workload: Workload,
    cache_bytes: int,
    *,
    recomputes: bool,
    copied_bytes: int = 0,
) -> dict[str, Any]:
    """The least TTFT and TPOT, and what they follow from.

    `cache_bytes` is what the last decode step reads of the cache, `copied_bytes` what it makes anew
    of it before attention reads that.
    """
    ceilings = device_ceilings(loaded.device, loaded.dtype)
    published = published_ceilings(loaded.device, loaded.dtype)
    prefill = prefill_work(loaded, workload.prompt_tokens, workload.batch)
    if recomputes:
        decode = prefill_work(loaded, workload.total_tokens, workload.batch)
    else:
        decode = decode_work(loaded, workload, cache_bytes)
    return {
        "ttft_seconds": prefill.seconds(ceilings),
        "tpot_seconds": decode.seconds(ceilings),
        "prefill": prefill._asdict(),
        "decode": decode._asdict(),
        "copied_bytes": copied_bytes,
        "ceilings": ceilings._asdict(),
        "published": published._asdict() if published else None,
    }


def expected_tpot(light: Mapping[str, Any], mode: str) -> float:
    """Seconds of a step as its strategy runs: besides what must be read, what is made anew is read,
    written, and read by attention, unless a fused attention reads the cache itself. Launching is
    not in it.
    """
    decode = Work(**light["decode"])
    if "fused" not in mode:
        copied_bytes = light.get("copied_bytes", 0)  # which a part of an older file lacks
        decode = decode._replace(num_bytes=decode.num_bytes + 2 * copied_bytes)
    return decode.seconds(Ceilings(**light["ceilings"]))


def achieved(light: dict[str, Any], row: dict[str, Any]) -> dict[str, float]:
    """The fraction of the ceilings that was reached: of compute in prefill, of bandwidth in a
    decode step; of published ones, too, where they are known.
    """
    ttft, tpot = row["ttft_seconds"]["median"], row["tpot_seconds"]["median"]
    found = {}
    for prefix, ceilings in (("", light["ceilings"]), ("published_", light.get("published"))):
        if ceilings:
            flops, num_bytes = light["prefill"]["flops"], light["decode"]["num_bytes"]
            found[f"{prefix}compute_fraction"] = flops / ttft / ceilings["flops_per_second"]
            found[f"{prefix}bandwidth_fraction"] = num_bytes / tpot / ceilings["bytes_per_second"]
    return found


def prefill_work(loaded: LoadedModel, tokens: int, batch: int) -> Work:
    """One pass over `tokens` tokens of each sequence; the head sees the last of them only."""
    weights = _matrices(loaded.model)
    head = weights.pop("head", 0)
    experts = weights.pop("experts", 0)
    per_token = sum(weights.values()) + int(experts * _active_fraction(loaded.model.config))
    attention = sum(_attention_flops(loaded, layer, tokens) for layer in loaded.architecture.layers)
    flops = batch * (2 * per_token * tokens + 2 * head + attention)
    width = TORCH_DTYPES[loaded.dtype].itemsize
    return Work((sum(weights.values()) + head + experts) * width, flops)


def decode_work(loaded: LoadedModel, workload: Workload, cache_bytes: int) -> Work:
    """One token of each sequence: every weight that it uses, and the cache, are read once.

    Its attention is bound by that reading and adds no operations here.
    """
    weights = _matrices(loaded.model)
    experts = weights.pop("experts", 0)
    active = _active_fraction(loaded.model.config)
    used = min(1.0, workload.batch * active)
    per_token = sum(weights.values()) + int(experts * active)
    read = sum(weights.values()) + int(experts * used)
    flops = workload.batch * 2 * per_token
    return Work(read * TORCH_DTYPES[loaded.dtype].itemsize + cache_bytes, flops)


def _matrices(model: PreTrainedModel) -> dict[str, int]:
    """Weights that a token is multiplied with: of the output head, of experts, and of the rest."""
    counts: dict[str, int] = {}
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter is table.weight or parameter is head.weight:
            continue
        kind = "experts" if ".experts." in name else "rest"
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    counts["head"] = head.weight.numel()
    return counts


def _active_fraction(config: Any) -> float:  # noqa: ANN401 - a transformers configuration
    """The part of the experts that a token is sent to."""
    text = config.get_text_config(decoder=True)
    chosen = getattr(text, "num_experts_per_tok", None)
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        total = getattr(text, key, None)
        if chosen and total:
            return float(chosen / total)
    return 1.0


def _attention_flops(loaded: LoadedModel, layer: Any, tokens: int) -> int:  # noqa: ANN401
    """Scores and weighted sums of one sequence: each query sees the tokens before it that are
    kept, so about half of them where none is dropped.
    """
    heads = widest(loaded.model, "num_attention_heads") or 0
    flops = 0
    for part in layer.parts():
        if not hasattr(part, "rows"):
            continue
        kept = part.tokens_kept(tokens)
        pairs = kept * (kept + 1) // 2 + (tokens - kept) * kept
        heads_of = part.expanded() if hasattr(part, "expanded") else part  # latents are expanded
        _, key_dim, value_dim = heads_of.rows()
        flops += 2 * heads * pairs * (key_dim + (value_dim or key_dim))
    return flops


def published_ceilings(device: torch.device, dtype: str) -> Ceilings | None:
    """The figures of a known GPU at 16 bits."""
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu and dtype != "fp32" and gpu.bandwidth_bytes_per_second and gpu.bf16_flops:
            bandwidth, flops = gpu.bandwidth_bytes_per_second.value, gpu.bf16_flops.value
            if bandwidth and flops:
                return Ceilings(bandwidth, flops, f"published figures of {gpu.name}")
    return None


@cache
def device_ceilings(device: torch.device, dtype: str) -> Ceilings:
    """What a copy and a product of random matrices reach: with ones a GPU multiplies faster."""
    kind, side = TORCH_DTYPES[dtype], _PROBE_SIDE[device.type]
    num_bytes = min(_PROBE_BYTES[device.type], free_memory(device) // 4)
    source = torch.empty(num_bytes // kind.itemsize, dtype=kind, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_seconds = _best(partial(target.copy_, source), device)
    del source, target
    square = torch.randn(side, side, dtype=kind, device=device)
    result = torch.empty_like(square)
    product_seconds = _best(partial(torch.mm, square, square, out=result), device)
    return Ceilings(
        2 * num_bytes / copy_seconds,
        2 * side**3 / product_seconds,
        f"measured here: a copy of {num_bytes // 2**20} MiB and a {side}² product",
    )


def _best(action: Any, device: torch.device) -> float:  # noqa: ANN401 - any callable
    """The shortest of the repetitions that fit in a moment, the first left out."""
    times: list[float] = []
    action()
    end = time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < end or not times:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
