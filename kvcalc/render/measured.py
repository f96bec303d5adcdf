"""A profile for a person at a terminal, with rich: what was held, the times, and under what
conditions. Nothing here computes a byte.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from textwrap import shorten
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kvcalc.render.text import QUANTITIES, console, like_for_like, print_folded, table
from kvcalc.strategies import BASELINE
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
    """What was kept and what it cost, what was held against what, what is claimed of the
    strategies, and the conditions.

    Rows stand below the baseline, those that hold most first; what was refused comes last.
    """
    out = console()
    about = rows[0]["conditions"]
    out.print(
        f"{rows[0]['model']}  {about['num_layers']} layers, {about['weights']} weights, "
        f"{about['dtype']}, {about['prompt_tokens']:,} + {about['decode_tokens']:,} tokens × "
        f"batch {about['batch']}",
        style="bold",
    )
    out.print()
    named = sorted(zip(_labels(rows), rows, strict=True), key=_place)
    needle = any(row["needle_recall"] for row in rows)
    for columns, cells in (
        ((*_KEPT, *(_NEEDLE if needle else _TOP1)), _what_is_kept),
        (_TIMES, _times),
    ):
        shown = table("Strategy", *columns)
        for label, row in named:
            if row["held_bytes"] is not None and row["status"] != "refused":
                shown.add_row(label + " *" * bool(row["on_pareto_front"]), *cells(row))
        if shown.rows:
            out.print(shown)
            out.print()
    if any(row["on_pareto_front"] for row in rows):
        recall = " and needle recall" if needle else ""
        print_folded(
            out,
            "* ",
            f"on the Pareto front of held bytes, KL{recall}: no other row is as good in all of "
            "them and better in one (rows that hold nothing take no part)",
            "dim",
        )
        out.print()
    briefly = sum(row["status"] == "refused" for row in rows) > 1
    for label, row in named:
        _print_proof(out, label, row, briefly=briefly)
    _print_headlines(out, named)
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


def _place(named: tuple[str, Mapping[str, Any]]) -> tuple[bool, bool, int]:
    """The baseline, then what holds most; last what was refused."""
    row = named[1]
    return row["status"] == "refused", row["strategy"] != BASELINE, -(row["held_bytes"] or 0)


def _print_proof(out: Console, label: str, row: Mapping[str, Any], *, briefly: bool) -> None:
    """What a row held against its promise, or what went wrong; a refusal may be cut to a line."""
    if row["status"] == "refused" and briefly:
        reason = row["reason"]
        told = f"refused: {reason}" if reason.startswith(label) else f"refused: {label}: {reason}"
        out.print(
            shorten(told, min(get_terminal_size().columns, 100), placeholder=" …"), style="dim"
        )
    elif row["status"] == "refused":
        out.print(f"{label}: refused: {row['reason']}", style="yellow")
    elif row["status"] != "ok":
        out.print(f"{label}: {row['status']}: {row['reason']}", style="bold red")
    else:
        figures = "".join(
            f"; {name.removesuffix('_bytes')} {count:,} bytes"
            for name, count in row["figures"].items()
        )
        where = f"in all {len(row['layers'])} layers"
        if row["layers_share"]:
            where += " together, not in each"
        out.print(
            f"{label}: predicted = held = {row['held_bytes']:,} bytes {where}{figures}",
            style="green",
        )
        observed = ", ".join(
            f"{name.replace('_', ' ')} {value:,.4g}" for name, value in row["observed"].items()
        )
        if observed:
            print_folded(out, "  ", f"observed: {observed}", "dim")
    if row["fidelity"] and row["fidelity"].get("perplexity_interval"):
        print_folded(out, "  ", _perplexity(row["fidelity"]), "dim")
    for note in row["notes"]:
        out.print(f"  {note}", style="dim")


def _perplexity(fidelity: Mapping[str, Any]) -> str:
    """Perplexity and its ratio to the full cache's, with their intervals."""
    low, high = fidelity["perplexity_interval"]
    ratio_low, ratio_high = fidelity["perplexity_ratio_interval"]
    alike = ", no difference" * fidelity["perplexity_alike"]
    return (
        f"perplexity {fidelity['perplexity']:,.4g} (95 %: {low:,.4g} to {high:,.4g}), "
        f"{fidelity['perplexity_ratio']:.4g}× the full cache's ({ratio_low:.4g} to "
        f"{ratio_high:.4g}{alike})"
    )


def _print_headlines(out: Console, named: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Each claim with its conditions, and below it what was measured here."""
    told = [(label, row) for label, row in named if row["headlines"] and row["status"] == "ok"]
    if not told:
        return
    out.print()
    out.print("headlines: what is claimed, and what was measured here", style="bold")
    widest = max(len(label) for label, _ in told) + 2
    for label, row in told:
        start = label.ljust(widest)
        for headline in row["headlines"]:
            print_folded(out, start, f"{headline['claim']}: {headline['conditions']}")
            print_folded(out, " " * (widest + 2), _held_against(headline, row), "dim")
            start = " " * widest
    out.print()


def _held_against(headline: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What was measured of the quantity that a claim is about."""
    measures, ratio = headline["measures"], headline["measured"]
    if not measures:
        return like_for_like(headline)
    if ratio is None:
        here = "not measured here"
    else:
        alike = "≈" * (row["ratio_to_dynamic"] or {}).get(f"{measures}_alike", False)
        change = f"{1 / ratio:.3g}× less" if 0 < ratio < 1 else f"{ratio:.3g}× as much"
        here = f"{alike}{ratio:.3f}× {BASELINE}'s, {change}"
    remark = f"; {headline['remark']}" if headline["remark"] else ""
    return f"{QUANTITIES[measures]} here: {here}{remark}"


def _print_light(out: Console, row: Mapping[str, Any]) -> None:
    """What the device could do at most for the first strategy, and how far it got."""
    light = row["speed_of_light"]
    if light and "compute_fraction" in light:
        beside = ""
        if light.get("published"):
            beside += (
                f"; {light['published_compute_fraction']:.0%} and "
                f"{light['published_bandwidth_fraction']:.0%} of {light['published']['source']}"
            )
        if row.get("busy_seconds") is not None:
            beside += f"; the device was busy for {row['busy_seconds'] * 1000:,.2f} ms of a step"
        out.print(
            f"speed of light for {row['strategy']}: TTFT {light['ttft_seconds'] * 1000:,.2f} ms, "
            f"TPOT {light['tpot_seconds'] * 1000:,.2f} ms; reached {light['compute_fraction']:.0%} "
            f"of compute and {light['bandwidth_fraction']:.0%} of bandwidth "
            f"({light['ceilings']['source']}){beside}",
            style="dim",
        )


_KEPT = ("Held", "vs dyn", "Peak", "vs dyn", "KL")
_NEEDLE, _TOP1 = ("needle", "unseen"), ("top-1",)
_TIMES = ("TTFT ms", "vs dyn", "TPOT ms", "p90", "vs dyn", "tok/s")


def _what_is_kept(row: Mapping[str, Any]) -> Iterator[str]:
    """The cells of `_KEPT`, and of `_NEEDLE` or `_TOP1`."""
    ratios, fidelity = row["ratio_to_dynamic"], row["fidelity"]
    yield format_bytes(row["held_bytes"])
    yield f"{ratios['held']:.3f}×" if ratios else ""
    yield format_bytes(row["peak_bytes"])
    yield f"{ratios['peak']:.2f}×" if ratios else ""
    yield _exponent(fidelity["kl_mean"]) if fidelity else ""
    if row["needle_recall"]:
        yield f"{row['needle_recall']['query_aware']:.0%}"
        yield f"{row['needle_recall']['question_unseen']:.0%}"
    elif fidelity:
        yield f"{fidelity['top1_agreement']:.0%}"


def _exponent(value: float) -> str:
    """`1.2e-03`, and 0 as it is."""
    return f"{value:.1e}" if value else "0"


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
    yield _rounded(row["tpot_seconds"]["p90"] * 1000)
    yield ratio("tpot")
    yield f"{row['tokens_per_second']:,.0f}"


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row's strategy, with the parameters that differ where a strategy stands there twice, and
    a number where the very same does.
    """
    labels: list[str] = []
    for row in rows:
        alike = [other["parameters"] for other in rows if other["strategy"] == row["strategy"]]
        differing = [
            f"{key}={value}"
            for key, value in row["parameters"].items()
            if any(parameters.get(key) != value for parameters in alike)
        ]
        label = ":".join(filter(None, (row["strategy"], ",".join(differing))))
        before = sum(other.partition(" #")[0] == label for other in labels)
        labels.append(f"{label} #{before + 1}" if before else label)
    return labels


def _milliseconds(timing: Mapping[str, Any]) -> str:
    median, spread = timing["median"] * 1000, timing["spread"] * 1000
    if len(timing["runs"]) == 1:
        return _rounded(median)
    return f"{_rounded(median)} ± {_rounded(spread, like=median)}"


def _rounded(value: float, *, like: float | None = None) -> str:
    """Two decimals, fewer for hundreds and thousands; a spread has those of its median."""
    size = value if like is None else like
    return f"{value:,.{2 if size < 100 else 1 if size < 1000 else 0}f}"
