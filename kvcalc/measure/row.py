"""One row of a profile: its fields, what they say when something went wrong, and the ratios."""

import math
from collections.abc import Mapping, Sequence
from operator import le
from typing import Any

import torch

from kvcalc.errors import EXIT_BUG, KvcalcError, PredictionBrokenError, UnsupportedError
from kvcalc.measure.record import is_out_of_memory
from kvcalc.strategies import ChosenStrategy

ROW_SCHEMA = "kvcalc.profile-row/1"


def new_row(
    model: str, chosen: ChosenStrategy, point: dict[str, Any], conditions: dict[str, Any]
) -> dict[str, Any]:
    """A row of which nothing is measured yet."""
    return {
        "schema": ROW_SCHEMA,
        "model": model,
        "strategy": chosen.name,
        "parameters": chosen.plain_parameters,
        "status": "ok",
        "reason": "",
        "predicted_bytes": None,
        "held_bytes": None,
        "logical_bytes": None,
        "after_prefill_bytes": None,
        "prefill_peak_bytes": None,
        "decode_peak_bytes": None,
        "peak_bytes": None,
        "estimated_peaks": None,
        "ttft_seconds": None,
        "first_decode_seconds": None,
        "tpot_seconds": None,
        "tokens_per_second": None,
        "decode_mode": None,
        "attention": {},
        "busy_seconds": None,
        "energy_joules_per_token": None,
        "state": {},
        "throttled": [],
        "fidelity": None,
        "needle_recall": None,
        "speed_of_light": None,
        "ratio_to_dynamic": None,
        "on_pareto_front": None,
        "headlines": [],
        "layers_share": chosen.layers_share,
        "layers": [],
        "notes": [],
        "figures": {},
        "observed": {},
        "point": point,
        "conditions": conditions,
    }


_LACKING = ("not implemented for '", "Could not run '", "not currently implemented for")
"""What torch says of an operation that it has not, for a dtype or a device."""


def went_wrong(error: Exception, row: Mapping[str, Any]) -> tuple[str, str]:
    """Status and reason for what a strategy raised."""
    if isinstance(error, KvcalcError):
        return "refused", str(error)
    if is_out_of_memory(error):
        predicted = row["predicted_bytes"]
        cache = f"the cache alone takes {predicted:,} bytes; " if predicted else ""
        return "out_of_memory", f"{cache}use a shorter --seq, a smaller --batch, or --layers N"
    told = " ".join(str(error).split())
    if any(words in told for words in _LACKING):
        return "refused", f"torch {torch.__version__} has no such operation here: {told:.200}"
    return "failed", f"{type(error).__name__}: {told:.200}"


def explanations(fields: Mapping[str, Any]) -> list[str]:
    """Why the bytes held are not those of the tensors, where they differ."""
    notes = []
    if fields["after_prefill_bytes"] > fields["held_bytes"]:
        notes.append(
            f"after the prefill {fields['after_prefill_bytes']:,} bytes were alive: window layers "
            "are views of the whole piece until the first decode step"
        )
    if fields["held_bytes"] > fields["logical_bytes"]:
        notes.append(
            f"its tensors show {fields['logical_bytes']:,} bytes: some are views of larger storages"
        )
    return notes


def ratios(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any] | None:
    """Figures over those of the baseline; times are `alike` when they differ by no more than both
    spreads together.
    """
    if not baseline["held_bytes"]:
        return None
    found: dict[str, Any] = {
        "held": row["held_bytes"] / baseline["held_bytes"],
        "peak": row["peak_bytes"] / baseline["peak_bytes"],
    }
    for name in ("ttft", "tpot"):
        mine, other = row[f"{name}_seconds"], baseline[f"{name}_seconds"]
        if mine and other:
            found[name] = mine["median"] / other["median"]
            difference = abs(mine["median"] - other["median"])
            found[f"{name}_alike"] = difference <= mine["spread"] + other["spread"]
    return found


RATIO_OF = {"bytes": "held", "peak": "peak", "ttft": "ttft", "tpot": "tpot"}
"""The ratio that a headline's `measures` stands for."""


def headlines(
    chosen: ChosenStrategy, ratio_to_dynamic: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """What is promised of the strategy, each with the ratio to dynamic that was `measured`, None
    where it is another quantity or nothing was. Nobody promises anything of a pair.
    """
    if chosen.then:
        return []
    found = ratio_to_dynamic or {}
    return [
        {**headline._asdict(), "measured": found.get(RATIO_OF.get(headline.measures, ""))}
        for headline in chosen.strategy.ABOUT.headlines
    ]


def mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Set `on_pareto_front` of the rows that take part, as those do which are ok, hold anything and
    were compared with the full cache.

    What counts is held bytes, mean KL and, of the built-in model, the part of the needles missed,
    with the question in the prompt and unseen; of each less is better. A row is on the front unless
    another one is no worse in all of these and better in one. A cache that holds nothing buys its
    bytes with time alone, and would beat every other.
    """
    costs = [_costs(row) for row in rows]
    for row, mine in zip(rows, costs, strict=True):
        if mine:
            row["on_pareto_front"] = not any(
                other and other != mine and all(map(le, other, mine)) for other in costs
            )


def _costs(row: Mapping[str, Any]) -> tuple[float, ...] | None:
    """What `mark_front` compares, None for a row that takes no part."""
    fidelity, needle = row["fidelity"], row["needle_recall"]
    if row["status"] != "ok" or not row["held_bytes"] or not fidelity:
        return None
    costs = (
        row["held_bytes"],
        fidelity["kl_mean"],
        *(1 - part for part in (needle or {}).values()),
    )
    return costs if all(map(math.isfinite, costs)) else None


def exit_status(rows: Sequence[Mapping[str, Any]]) -> int:
    """0 when every row is ok, else that of the gravest: too little memory is 1, a failure 70, a
    refusal 3.

    Raises PredictionBrokenError when a row held other bytes than predicted.
    """
    found = [row["status"] for row in rows]
    if "mismatch" in found:
        broken = found.count("mismatch")
        msg = f"{broken} of {len(rows)} strategies held other bytes than predicted"
        raise PredictionBrokenError(msg)
    if "out_of_memory" in found:
        return PredictionBrokenError.exit_code
    if "failed" in found:
        return EXIT_BUG
    return UnsupportedError.exit_code if "refused" in found else 0
