"""Profiling a model under several strategies: counted one by one, then timed in turns.

Timed runs alternate (A B C A B C), so that what disturbs the machine for a while disturbs all of
them alike. A row is complete after the last round. Where a row must not wait for the others, each
strategy is counted and timed before the next.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvcalc.dtypes import FORMATS
from kvcalc.engines import load_engine
from kvcalc.errors import (
    KvcalcError,
    OutputError,
    UnsupportedError,
)
from kvcalc.families import Architecture
from kvcalc.measure.counted import count
from kvcalc.measure.feeds import Feed, choose_feed, needle_feed
from kvcalc.measure.fidelity import fidelity
from kvcalc.measure.interrupt import interrupts
from kvcalc.measure.light import achieved, expected_tpot, speed_of_light
from kvcalc.measure.models import LeastCache, LoadedModel, load_model, no_cache, pick_device
from kvcalc.measure.peak import estimated_peaks, full_bytes
from kvcalc.measure.record import RowFile, claimed, conditions, free_memory
from kvcalc.measure.retrieval import recall
from kvcalc.measure.row import (
    exit_status,
    explanations,
    headlines,
    mark_front,
    new_row,
    ratios,
    went_wrong,
)
from kvcalc.measure.session import Session, few_objects, release, undisturbed
from kvcalc.measure.timed import Run, summed_up, time_once
from kvcalc.measure.workload import Workload
from kvcalc.origin import Origin
from kvcalc.sizing import SizeReport, size_architecture
from kvcalc.strategies import BASELINE, ChosenStrategy, load_strategy
from kvcalc.units import format_bytes

SCHEMA = "kvcalc.profile/1"

__all__ = [
    "SCHEMA",
    "RowFile",
    "claimed",
    "exit_status",
    "interrupts",
    "least_cache",
    "load_model",
    "no_cache",
    "pick_device",
    "profile",
]

Tell = Callable[[str], None]


def print_nothing(what: str) -> None:
    """The `tell` of a caller who does not care."""
    del what


class Entry(NamedTuple):
    """A strategy, the point it is measured at, its row so far and its timed runs."""

    chosen: ChosenStrategy
    point: dict[str, Any]
    row: dict[str, Any]
    runs: list[Run]

    @property
    def going(self) -> bool:
        """Whether there is something left to time."""
        return self.row["status"] in ("ok", "mismatch")


def profile(
    loaded: LoadedModel,
    strategies: Sequence[ChosenStrategy],
    workload: Workload,
    *,
    text: Path | None = None,
    file: RowFile | None = None,
    force: bool = False,
    in_turns: bool = True,
    tell: Tell = print_nothing,
) -> Iterator[dict[str, Any]]:
    """Measure the strategies; a row is in `file` before it is yielded.

    With `in_turns` their timed runs alternate, and all rows come at the end, the Pareto front
    marked; else each row comes when its strategy is done.

    The model is fed a `text` of the user's, else a needle in filler where it is the built-in one,
    else random tokens.

    `tell` is called with what is being measured. A row that cannot be written is yielded all the
    same, and the OutputError follows; so are the rows of a run that is interrupted, as far as they
    got.
    """
    if workload.chunk is None:
        workload = workload._replace(chunk=piece_that_fits(loaded, strategies, workload))
    about = conditions(loaded.device)
    entries = [
        _entry(loaded, chosen, workload, strategies[:place], text, file, about)
        for place, chosen in enumerate(strategies)
    ]
    feed: Feed | None = None
    full: Tensor | None = None
    for some in [entries] if in_turns else [[entry] for entry in entries]:
        try:
            with few_objects():
                feed = feed or choose_feed(loaded, workload, text)
                full = _count_all(
                    loaded, some, workload, feed, full, file=file, force=force, tell=tell
                )
                _time_all(loaded, some, workload, feed, file=file, tell=tell)
        except BaseException:
            yield from _broken_off(some, workload, entries[0])
            raise
        rows = [_finished(entry, workload, entries[0]) for entry in some]
        if in_turns:
            mark_front(rows)
        for entry, row in zip(some, rows, strict=True):
            try:
                if file is not None and file.row(entry.point) is None:
                    file.append(row)
            finally:
                yield row
    if file is not None:
        file.close()


def _broken_off(
    entries: Sequence[Entry], workload: Workload, first: Entry
) -> Iterator[dict[str, Any]]:
    """The rows of a run that was interrupted, as far as they got."""
    for entry in entries:
        if entry.row["held_bytes"] is not None:
            row = _finished(entry, workload, first)
            if row["status"] == "ok" and len(entry.runs) < workload.repeats:
                row["status"] = "interrupted"
                row["reason"] = f"after {len(entry.runs)} of {workload.repeats} timed runs"
            yield row


def predict(loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> SizeReport:
    """The promise that the measurement is held against."""
    return _predict(loaded.architecture, loaded.origin, loaded.dtype, chosen, workload)


def _predict(
    architecture: Architecture,
    origin: Origin,
    dtype: str,
    chosen: ChosenStrategy,
    workload: Workload,
) -> SizeReport:
    return size_architecture(
        architecture,
        origin=origin,
        seq_tokens=workload.total_tokens,
        decode_tokens=workload.decode_tokens,
        batch=workload.batch,
        kv_dtype=dtype,
        engine="transformers",
        strategy=chosen.spec,
    )


SMALLEST_PIECE = 512


def piece_that_fits(
    loaded: LoadedModel, strategies: Sequence[ChosenStrategy], workload: Workload
) -> int:
    """The tokens of a prompt that go in at once: all of them where the estimated peaks of all
    strategies fit in what is free, else a half, a quarter and so on: a later piece costs more than
    the same tokens at the end of a whole.
    """
    free_bytes = free_memory(loaded.device)
    piece = workload.prompt_tokens
    while piece > SMALLEST_PIECE:
        point = workload._replace(chunk=piece)
        peaks = []
        for chosen in strategies:
            try:
                predicted = predict(loaded, chosen, point)
            except KvcalcError:
                continue
            peaks.append(estimated_peaks(loaded, point, chosen, predicted)["prefill_bytes"])
        if max(peaks, default=0) <= free_bytes:
            return piece
        piece = -(-piece // 2)
    return piece


def least_cache(strategies: Sequence[ChosenStrategy], workload: Workload) -> LeastCache:
    """What the smallest cache of these strategies takes, those left out that do not apply."""

    def least(architecture: Architecture, origin: Origin, dtype: str) -> int:
        sizes = []
        for chosen in strategies:
            try:
                report = _predict(architecture, origin, dtype, chosen, workload)
            except KvcalcError:
                continue
            sizes.append(report.total_bytes)
        return min(sizes, default=0)

    return least


def _entry(
    loaded: LoadedModel,
    chosen: ChosenStrategy,
    workload: Workload,
    before: Sequence[ChosenStrategy],
    text: Path | None,
    file: RowFile | None,
    about: Mapping[str, Any],
) -> Entry:
    """A new row, or the one that `file` has already."""
    settings = {
        "model_type": loaded.architecture.model_type,
        "num_layers": len(loaded.architecture.layers),
        "weights": loaded.weights,
        "dtype": loaded.dtype,
        "attention": loaded.model.config._attn_implementation,  # noqa: SLF001 - its only name
        **workload._asdict(),
        "text": str(text) if text else None,
        "chunk": workload.piece_tokens if loaded.takes_chunks else workload.prompt_tokens,
    }
    point = {
        "model": loaded.name,
        "strategy": chosen.spec,
        "copy": before.count(chosen),
        **settings,
        **{key: about[key] for key in ("torch", "transformers", "device", "threads")},
    }
    known = file.row(point) if file else None
    row = new_row(loaded.name, chosen, point, {**about, **settings}) | (known or {})
    runs = []
    for part in file.parts(point) if file and not known else []:
        if "counted" in part:
            row |= part["counted"]
        elif "run" in part:
            runs.append(Run(*part["run"]))
    return Entry(chosen, point, row, runs)


def _count_all(
    loaded: LoadedModel,
    entries: Sequence[Entry],
    workload: Workload,
    feed: Feed,
    full: Tensor | None,
    *,
    file: RowFile | None,
    force: bool,
    tell: Tell,
) -> Tensor | None:
    """Bytes, peaks and logits of each strategy that has none yet; returns the logits of the full
    cache, as they were given or as they had to be found.
    """
    missing = [entry for entry in entries if entry.row["held_bytes"] is None]
    if not missing:
        return full
    if full is None and not any(entry.chosen.name == BASELINE for entry in missing):
        tell(f"{BASELINE}: the answers of the full cache")
        full = _full_logits(loaded, workload, feed)
    for entry in missing:
        tell(f"{entry.chosen.spec}: counting bytes")
        with _guarded(entry, loaded):
            predicted = predict(loaded, entry.chosen, workload)
            entry.row["predicted_bytes"] = predicted.total_bytes
            if not force:
                _refuse_what_cannot_fit(loaded, predicted)
            counted = count(loaded, entry.chosen, workload, feed, predicted)
            entry.row.update(counted.fields)
            if entry.chosen.name == BASELINE:
                full = counted.logits
            fields = dict(counted.fields)
            fields["predicted_bytes"] = predicted.total_bytes
            fields["estimated_peaks"] = estimated_peaks(loaded, workload, entry.chosen, predicted)
            fields["notes"] = explanations(counted.fields)
            fields["figures"] = entry.chosen.figures(
                load_engine("transformers").lay_out(loaded.architecture),
                tokens=workload.total_tokens,
                batch=workload.batch,
                dtype=FORMATS[loaded.dtype],
            )
            fields["speed_of_light"] = speed_of_light(
                loaded,
                workload,
                # All that is stored, unless the strategy says that it reads a part.
                fields["figures"].get("traffic_bytes", predicted.total_bytes),
                recomputes=entry.chosen.recomputes,
                copied_bytes=0
                if entry.chosen.recomputes
                else entry.chosen.copies * full_bytes(loaded, workload),
            )
            if full is not None:
                fields["fidelity"] = fidelity(counted.logits, full, feed)
            if feed.answers is not None:
                fields["needle_recall"] = {
                    "query_aware": recall(counted.logits[1], feed.answers),
                    "question_unseen": _recall_unseen(loaded, entry.chosen, workload),
                }
            entry.row.update(fields)
            if file is not None:
                file.append_part(entry.point, counted=fields)
        release(loaded.device)
    return full


def _recall_unseen(loaded: LoadedModel, chosen: ChosenStrategy, workload: Workload) -> float | None:
    """Recall where the prompt does not hold the question, which comes after any compression."""
    feed = needle_feed(loaded, workload, ask=False)
    with undisturbed(loaded, chosen):
        session = Session(loaded, chosen, workload)
        session.prefill(feed.prompt)
        logits = session.decode(feed.steps[0])
    return None if feed.answers is None else recall(logits, feed.answers)


def _full_logits(loaded: LoadedModel, workload: Workload, feed: Feed) -> Tensor | None:
    """The full cache's answers where it is not among the strategies; None when it cannot run."""
    chosen = load_strategy(BASELINE)
    try:
        return count(loaded, chosen, workload, feed, predict(loaded, chosen, workload)).logits
    except (KvcalcError, RuntimeError, MemoryError):
        return None
    finally:
        release(loaded.device)


def _time_all(
    loaded: LoadedModel,
    entries: Sequence[Entry],
    workload: Workload,
    feed: Feed,
    *,
    file: RowFile | None,
    tell: Tell,
) -> None:
    """Warm up each strategy, then time all of them round by round."""
    waiting = [
        entry
        for entry in entries
        if entry.going and entry.row["tpot_seconds"] is None and len(entry.runs) < workload.repeats
    ]
    for entry in waiting:
        for number in range(workload.warmup):
            tell(f"{entry.chosen.spec}: warm-up {number + 1}")
            with _guarded(entry, loaded):
                time_once(loaded, entry.chosen, workload, feed)
    for number in range(workload.repeats):
        for entry in waiting:
            if not entry.going or len(entry.runs) > number:
                continue
            tell(f"{entry.chosen.spec}: run {number + 1} of {workload.repeats}")
            with _guarded(entry, loaded):
                run = time_once(loaded, entry.chosen, workload, feed)
                entry.runs.append(run)
                if file is not None:
                    file.append_part(entry.point, run=run)


@contextmanager
def _guarded(entry: Entry, loaded: LoadedModel) -> Iterator[None]:
    """What goes wrong in one strategy becomes its row's status and costs no other."""
    try:
        yield
    except OutputError:  # the disk's fault, and nothing can be kept any more
        raise
    except Exception as error:  # noqa: BLE001 - whatever a strategy may raise
        status, reason = went_wrong(error, entry.row)
        if entry.row["status"] == "mismatch":  # found before: the graver news stays first
            status, reason = "mismatch", f"{entry.row['reason']}; then {reason}"
        entry.row.update(status=status, reason=reason)
        entry.runs.clear()
        release(loaded.device)


def _refuse_what_cannot_fit(loaded: LoadedModel, predicted: SizeReport) -> None:
    """Raise UnsupportedError before anything is run when the cache alone is larger than what is
    free.
    """
    free_bytes = free_memory(loaded.device)
    if predicted.total_bytes > free_bytes:
        msg = (
            f"the cache alone takes {format_bytes(predicted.total_bytes)} and "
            f"{format_bytes(free_bytes)} are free on {loaded.device}; use a shorter --seq or a "
            "smaller --batch (--force tries all the same)"
        )
        raise UnsupportedError(msg)


def _finished(entry: Entry, workload: Workload, first: Entry) -> dict[str, Any]:
    """The row with times over its runs, the fractions of the ceilings, the ratios and what was
    promised.
    """
    row = entry.row
    if row["tpot_seconds"] is None and entry.runs and entry.going:
        row |= summed_up(entry.runs, batch=workload.batch)
        row["speed_of_light"] |= achieved(row["speed_of_light"], row)
        row["speed_of_light"]["expected_tpot_seconds"] = expected_tpot(
            row["speed_of_light"], row["decode_mode"]
        )
    if first.chosen.name == BASELINE and row["held_bytes"] is not None:
        row["ratio_to_dynamic"] = ratios(row, first.row)
    row["headlines"] = headlines(entry.chosen, row["ratio_to_dynamic"])
    return row
