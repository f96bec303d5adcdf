"""Profiling a model under several strategies, row by row."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvcalc.errors import EXIT_BUG, PredictionBrokenError, UnsupportedError
from kvcalc.measure.models import LoadedModel, load_model, pick_device
from kvcalc.measure.record import RowFile, conditions
from kvcalc.measure.run import add_ratios, measure
from kvcalc.measure.workload import Workload
from kvcalc.strategies import BASELINE, ChosenStrategy

SCHEMA = "kvcalc.profile/1"

__all__ = ["SCHEMA", "RowFile", "exit_status", "load_model", "pick_device", "profile"]


def profile(
    loaded: LoadedModel,
    strategies: Sequence[ChosenStrategy],
    workload: Workload,
    *,
    file: RowFile | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure each strategy in turn; a row is in `file` before it is yielded.

    A row that cannot be written is yielded all the same, and the OutputError follows.
    """
    baseline = None
    for chosen in strategies:
        row = measure(loaded, chosen, workload, conditions(loaded.device))
        if chosen.name == BASELINE:
            baseline = row
        add_ratios(row, baseline)
        try:
            if file is not None:
                file.append(row)
        finally:
            yield row


def exit_status(rows: Sequence[Mapping[str, Any]]) -> int:
    """0 when every row is ok, else that of the gravest: too little memory is 1, a failure 70, a
    refusal 3.

    Raises PredictionBrokenError when a row held other bytes than predicted.
    """
    found = [row["status"] for row in rows]
    if "mismatch" in found:
        count = found.count("mismatch")
        msg = f"{count} of {len(rows)} strategies held other bytes than predicted"
        raise PredictionBrokenError(msg)
    if "out_of_memory" in found:
        return PredictionBrokenError.exit_code
    if "failed" in found:
        return EXIT_BUG
    return UnsupportedError.exit_code if "refused" in found else 0
