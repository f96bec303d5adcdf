"""A profile for a person at a terminal, with rich: what was held, the times, and under what
conditions. Nothing here computes a byte.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kvcalc.render.text import console, table
from kvcalc.units import format_bytes


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is going on, on standard error when that is a terminal.

    It draws when it is called and at no other time: an animation would disturb what is timed.
    """
    out = Console(stderr=True)
    if not out.is_terminal:
        yield _show_nothing
        return
    with Live(console=out, auto_refresh=False, transient=True) as live:
        yield lambda what: live.update(Text(what), refresh=True)


def _show_nothing(what: str) -> None:
    """Where nobody watches."""
    del what


def print_profile(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row for each strategy, then what was held against what, and the conditions."""
    out = console()
    about = rows[0]["conditions"]
    out.print(
        f"{rows[0]['model']}  {about['num_layers']} layers, {about['weights']} weights, "
        f"{about['dtype']}, {about['prompt_tokens']:,} + {about['decode_tokens']:,} tokens × "
        f"batch {about['batch']}",
        style="bold",
    )
    out.print()
    labels = _labels(rows)
    named = [*zip(labels, rows, strict=True)]
    for columns, cells in (
        ((*_KEPT, *_NEEDLE * any(row["needle_recall"] for row in rows)), _what_is_kept),
        (_TIMES, _times),
    ):
        shown = table("Strategy", *columns)
        for label, row in named:
            if row["held_bytes"] is not None and row["status"] != "refused":
                shown.add_row(label, *cells(row))
        if shown.rows:
            out.print(shown)
            out.print()
    for label, row in named:
        if row["status"] == "ok":
            figures = "".join(
                f"; {name.removesuffix('_bytes')} {count:,} bytes"
                for name, count in row["figures"].items()
            )
            out.print(
                f"{label}: predicted = held = {row['held_bytes']:,} bytes in all "
                f"{len(row['layers'])} layers{figures}",
                style="green",
            )
        else:
            out.print(f"{label}: {row['status']}: {row['reason']}", style="bold red")
        for note in row["notes"]:
            out.print(f"  {note}", style="dim")
    _print_light(out, rows[0])
    runs = f"median of {about['repeats']} runs ± interquartile range"
    out.print(
        f"{about['device']} ({about['hardware']['processor']}), torch {about['torch']}, "
        f"transformers {about['transformers']}; "
        f"{'one run' if about['repeats'] == 1 else runs}; peak above the weights",
        style="dim",
    )
    cores = about["hardware"].get("cores", 0)
    if about["load_average"] > cores / 2 > 0:
        out.print(
            f"note: load average {about['load_average']} on {cores} cores before the first run: "
            "times are disturbed, bytes are not",
            style="yellow",
        )


def _print_light(out: Console, row: Mapping[str, Any]) -> None:
    """What the device could do at most for the first strategy, and how far it got."""
    light = row["speed_of_light"]
    if light and "compute_fraction" in light:
        out.print(
            f"speed of light for {row['strategy']}: TTFT {light['ttft_seconds'] * 1000:,.2f} ms, "
            f"TPOT {light['tpot_seconds'] * 1000:,.2f} ms; reached {light['compute_fraction']:.0%} "
            f"of compute and {light['bandwidth_fraction']:.0%} of bandwidth "
            f"({light['ceilings']['source']})",
            style="dim",
        )


_KEPT = ("Held", "vs dyn.", "Peak", "KL", "top-1")
_NEEDLE = ("needle", "unseen")
_TIMES = ("TTFT ms", "vs dyn.", "TPOT ms", "p90", "vs dyn.", "tok/s")


def _what_is_kept(row: Mapping[str, Any]) -> Iterator[str]:
    """The cells of `_KEPT` and `_NEEDLE`."""
    ratios, fidelity = row["ratio_to_dynamic"], row["fidelity"]
    yield format_bytes(row["held_bytes"])
    yield f"{ratios['held']:.3f}×" if ratios else ""
    yield format_bytes(row["peak_bytes"])
    yield f"{fidelity['kl_mean']:.1e}" if fidelity else ""
    yield f"{fidelity['top1_agreement']:.0%}" if fidelity else ""
    if row["needle_recall"]:
        yield f"{row['needle_recall']['query_aware']:.0%}"
        yield f"{row['needle_recall']['question_unseen']:.0%}"


def _times(row: Mapping[str, Any]) -> Iterator[str]:
    """The cells of `_TIMES`; ≈ stands before a ratio that the spreads may explain."""
    if row["tpot_seconds"] is None:
        return
    ratios = row["ratio_to_dynamic"] or {}

    def ratio(name: str) -> str:
        if name not in ratios:
            return ""
        return f"{'≈' * ratios[f'{name}_alike']}{ratios[name]:.2f}×"

    yield _milliseconds(row["ttft_seconds"])
    yield ratio("ttft")
    yield _milliseconds(row["tpot_seconds"])
    yield f"{row['tpot_seconds']['p90'] * 1000:,.2f}"
    yield ratio("tpot")
    yield f"{row['tokens_per_second']:,.0f}"


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row's strategy, with its parameters where a strategy stands there twice, and a number
    where the very same does.
    """
    names = [row["strategy"] for row in rows]
    labels: list[str] = []
    for name, row in zip(names, rows, strict=True):
        parameters = ",".join(f"{key}={value}" for key, value in row["parameters"].items())
        label = f"{name}:{parameters}" if names.count(name) > 1 and parameters else name
        before = sum(other.partition(" #")[0] == label for other in labels)
        labels.append(f"{label} #{before + 1}" if before else label)
    return labels


def _milliseconds(timing: Mapping[str, Any]) -> str:
    median = f"{timing['median'] * 1000:,.2f}"
    if len(timing["runs"]) == 1:
        return median
    return f"{median} ± {timing['spread'] * 1000:,.2f}"
