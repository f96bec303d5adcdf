"""Running one cache strategy on a model: bytes first, then times, held against the prediction.

A run feeds a prompt of random tokens in one prefill, then single tokens that are fixed beforehand,
so that every strategy does the same work. Bytes and peak come from a run of their own, since
tracing slows it down; times from repeated runs after warm-up. The device is synchronised before and
after the prefill, after the first decode step, which is timed apart too, and after the last one.
"""

import gc
import importlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from kvcalc.errors import KvcalcError
from kvcalc.measure.held import LayerBytes, held_by_layer
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.peak import peak_memory
from kvcalc.measure.workload import Workload
from kvcalc.sizing import SizeReport, size_architecture
from kvcalc.strategies import BASELINE, ChosenStrategy, load_strategy

ROW_SCHEMA = "kvcalc.profile-row/1"


class Timing(NamedTuple):
    """Seconds of one repetition: the prefill, the first decode step, and all decode steps."""

    prefill_seconds: float
    first_decode_seconds: float
    decode_seconds: float


def measure(
    loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """One row: what was predicted, what was held, and how long it took.

    Never raises for what goes wrong in the strategy itself: `status` and `reason` say it.
    """
    row = _empty_row(loaded, chosen, workload, conditions)
    try:
        predicted = predict(loaded, chosen, workload)
        row["predicted_bytes"] = predicted.total_bytes
        row |= _measured_bytes(loaded, chosen, workload, predicted)
        baseline = predict(loaded, load_strategy(BASELINE), workload).total_bytes
        row["ratio_to_dynamic"] = {"held": row["held_bytes"] / baseline}
        row |= _measured_times(loaded, chosen, workload)
    except Exception as error:  # noqa: BLE001 - one strategy's failure must not cost the others
        status, reason = _went_wrong(error, row)
        if row["status"] == "mismatch":  # found before: the graver news stays first
            status, reason = "mismatch", f"{row['reason']}; then {reason}"
        row |= {"status": status, "reason": reason}
    finally:
        _release(loaded.device)
    return row


def _went_wrong(error: Exception, row: Mapping[str, Any]) -> tuple[str, str]:
    if isinstance(error, KvcalcError):
        return "refused", str(error)
    if _is_out_of_memory(error):
        predicted = row["predicted_bytes"]
        cache = f"the cache alone takes {predicted:,} bytes; " if predicted else ""
        return "out_of_memory", f"{cache}use a shorter --seq, a smaller --batch, or --layers N"
    return "failed", f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def predict(loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> SizeReport:
    """The promise that the measurement is held against."""
    return size_architecture(
        loaded.architecture,
        origin=loaded.origin,
        seq_tokens=workload.total_tokens,
        batch=workload.batch,
        kv_dtype=loaded.dtype,
        engine="transformers",
        strategy=chosen.spec,
    )


def add_ratios(row: dict[str, Any], baseline: Mapping[str, Any] | None) -> None:
    """Complete `ratio_to_dynamic` of a finished row, when the baseline was measured, too."""
    if baseline is None or row["tpot_seconds"] is None or baseline["tpot_seconds"] is None:
        return
    row["ratio_to_dynamic"] |= {
        "peak": row["peak_bytes"] / baseline["peak_bytes"],
        "ttft": row["ttft_seconds"]["median"] / baseline["ttft_seconds"]["median"],
        "tpot": row["tpot_seconds"]["median"] / baseline["tpot_seconds"]["median"],
    }


def _empty_row(
    loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema": ROW_SCHEMA,
        "model": loaded.name,
        "strategy": chosen.name,
        "parameters": dict(chosen.parameters),
        "status": "ok",
        "reason": "",
        "predicted_bytes": None,
        "held_bytes": None,
        "logical_bytes": None,
        "after_prefill_bytes": None,
        "peak_bytes": None,
        "ttft_seconds": None,
        "first_decode_seconds": None,
        "tpot_seconds": None,
        "tokens_per_second": None,
        "ratio_to_dynamic": None,
        "layers": [],
        "conditions": {
            **conditions,
            "model_type": loaded.architecture.model_type,
            "num_layers": len(loaded.architecture.layers),
            "weights": loaded.weights,
            "dtype": loaded.dtype,
            "attention": loaded.model.config._attn_implementation,  # noqa: SLF001 - its only name
            **workload._asdict(),
        },
    }


def _measured_bytes(
    loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload, predicted: SizeReport
) -> dict[str, Any]:
    """Held and logical bytes after the last decode step, and the peak on the way there."""
    with _quiet(), peak_memory(loaded.device) as peak:
        cache = _new_cache(loaded, chosen, workload)
        prompt, steps = _tokens(loaded, workload)
        _forward(loaded, prompt, cache)
        after_prefill = sum(layer.held_bytes for layer in held_by_layer(cache))
        for step in steps:
            _forward(loaded, step, cache)
        held = held_by_layer(cache)
        del cache
    layers = _compare(predicted, held)
    wrong = [layer for layer in layers if layer["predicted_bytes"] != layer["held_bytes"]]
    result: dict[str, Any] = {
        "held_bytes": sum(layer.held_bytes for layer in held),
        "logical_bytes": sum(layer.logical_bytes for layer in held),
        "after_prefill_bytes": after_prefill,
        "peak_bytes": peak.num_bytes,
        "layers": layers,
    }
    if wrong:
        first = wrong[0]
        result["status"] = "mismatch"
        result["reason"] = (
            f"{len(wrong)} of {len(layers)} layers hold other bytes than predicted; "
            f"layer {first['index']}: {first['predicted_bytes']:,} predicted, "
            f"{first['held_bytes']:,} held"
        )
    return result


def _compare(predicted: SizeReport, held: Sequence[LayerBytes]) -> list[dict[str, int]]:
    """Per layer; a layer on one side only counts as 0 bytes on the other."""
    promised = [layer.bytes for layer in predicted.layers]
    count = max(len(promised), len(held))
    promised += [0] * (count - len(promised))
    found = [layer.held_bytes for layer in held] + [0] * (count - len(held))
    return [
        {"index": index, "predicted_bytes": promise, "held_bytes": fact}
        for index, (promise, fact) in enumerate(zip(promised, found, strict=True))
    ]


def _measured_times(
    loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload
) -> dict[str, Any]:
    """TTFT and TPOT over the repetitions that follow the warm-up."""
    with _quiet():
        for _ in range(workload.warmup):
            _time_once(loaded, chosen, workload)
        timings = [_time_once(loaded, chosen, workload) for _ in range(workload.repeats)]
    tpot = _summary([timing.decode_seconds / workload.decode_tokens for timing in timings])
    return {
        "ttft_seconds": _summary([timing.prefill_seconds for timing in timings]),
        "first_decode_seconds": _summary([timing.first_decode_seconds for timing in timings]),
        "tpot_seconds": tpot,
        "tokens_per_second": workload.batch / tpot["median"],
    }


def _time_once(loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> Timing:
    cache = _new_cache(loaded, chosen, workload)
    prompt, steps = _tokens(loaded, workload)
    marks = [_now(loaded.device)]
    _forward(loaded, prompt, cache)
    marks.append(_now(loaded.device))
    _forward(loaded, steps[0], cache)
    marks.append(_now(loaded.device))
    for step in steps[1:]:
        _forward(loaded, step, cache)
    marks.append(_now(loaded.device))
    start, prefilled, first, last = marks
    return Timing(prefilled - start, first - prefilled, last - prefilled)


@contextmanager
def _quiet() -> Iterator[None]:
    """No autograd, and no garbage collection in the middle of a phase."""
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        gc.enable()


def _new_cache(loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> Cache:
    module = importlib.import_module(f"{chosen.module}.cache")
    cache: Cache = module.build(
        loaded.model.config,
        capacity_tokens=workload.total_tokens,
        parameters=chosen.parameters,
    )
    return cache


def _tokens(loaded: LoadedModel, workload: Workload) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The prompt [batch, prompt_tokens] and the fixed decode steps [batch, 1]."""
    embeddings: Any = loaded.model.get_input_embeddings()
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.batch, workload.total_tokens)
    tokens = torch.randint(embeddings.num_embeddings, shape, generator=generator).to(loaded.device)
    prompt, rest = tokens.split([workload.prompt_tokens, workload.decode_tokens], dim=1)
    return prompt, list(rest.split(1, dim=1))


def _forward(loaded: LoadedModel, tokens: torch.Tensor, cache: Cache) -> None:
    loaded.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, and as spread the interquartile range."""
    quartiles = [values[0]] * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "spread": quartiles[2] - quartiles[0],
        "min": min(values),
        "max": max(values),
        "runs": list(values),
    }


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "can't allocate memory" in text or "not enough memory" in text


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
