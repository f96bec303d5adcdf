"""Reports for a person at a terminal, with rich. Nothing here computes a byte."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from kvcalc.sizing import SizeReport
from kvcalc.units import format_bytes


def console(*, stderr: bool = False) -> Console:
    """A console that never styles numbers or reads markup in model names."""
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


_WORDS = frozenset(
    {"Model", "Type", "Family", "Strategy", "Dtype", "Layers", "Kind", "Keeps for a token"}
)
"""Columns of words, to the left; all others hold numbers, to the right."""


def table(*columns: str) -> Table:
    """A plain table without lines."""
    new = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        new.add_column(column, justify="left" if column in _WORDS else "right", overflow="fold")
    return new


def print_sizes(reports: Sequence[SizeReport], *, explain: bool, lengths: bool) -> None:
    """One report in full, one model at the usual `lengths`, or a comparison; with `explain` every
    report in full.
    """
    if explain or len(reports) == 1:
        for report in reports:
            print_report(report, explain=explain)
    elif lengths and len({report.origin for report in reports}) == 1:
        print_lengths(reports)
    else:
        print_comparison(reports)


def print_report(report: SizeReport, *, explain: bool = False) -> None:
    """One model at one point: the total, the growth, the layers, and where it all comes from."""
    out = console()
    title = Text(report.origin.resolved, style="bold")
    title.append(f"  {_point(report)}", style="not bold")
    out.print(title, soft_wrap=True)
    out.print()
    total = Text("KV cache   ")
    total.append(format_bytes(report.total_bytes), style="bold green")
    total.append(f"  {report.total_bytes:,} bytes  ({report.provenance})")
    out.print(total, soft_wrap=True)
    if report.tp * report.pp > 1:
        out.print(
            f"per rank   {format_bytes(report.bytes_per_rank)}  {report.bytes_per_rank:,} bytes"
            f"  (tp {report.tp}, pp {report.pp})",
            soft_wrap=True,
        )
    for line in growth(report):
        out.print(line, soft_wrap=True)
    for name, num_bytes in report.transients.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        out.print(f"{label}: {format_bytes(num_bytes)}  {num_bytes:,} bytes", soft_wrap=True)
    out.print()
    out.print(_layer_table(report))
    if explain:
        out.print()
        _print_formulas(out, report)
    out.print()
    for line in provenance(report):
        out.print(line, soft_wrap=True, style="dim")
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True, style="yellow")


def print_lengths(reports: Sequence[SizeReport]) -> None:
    """One model at a few lengths, for a user who named none."""
    first = reports[0]
    out = console()
    out.print(Text(f"{first.origin.resolved}  {first.kv_dtype}", style="bold"), soft_wrap=True)
    out.print()
    for line in growth(first):
        out.print(line, soft_wrap=True)
    out.print()
    rows = table("Tokens", "KV cache", "Bytes")
    for report in reports:
        at_most = " (max)" if report.seq_tokens == report.max_tokens else ""
        rows.add_row(
            f"{report.seq_tokens:,}{at_most}",
            format_bytes(report.total_bytes),
            f"{report.total_bytes:,}",
        )
    out.print(rows)
    out.print()
    for line in provenance(first):
        out.print(line, soft_wrap=True, style="dim")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        out.print(f"note: {note}", soft_wrap=True, style="yellow")


def print_comparison(reports: Sequence[SizeReport]) -> None:
    """Several points side by side; a column that never differs is said once above."""
    out = console()
    varies = {
        "Tokens": len({report.seq_tokens for report in reports}) > 1,
        "Batch": len({report.batch for report in reports}) > 1,
        "Dtype": len({report.kv_dtype for report in reports}) > 1,
        "Rank": any(report.tp * report.pp > 1 for report in reports),
    }
    same = reports[0]
    said = [
        f"{same.seq_tokens:,} tokens" if not varies["Tokens"] else "",
        f"batch {same.batch}" if not varies["Batch"] else "",
        same.kv_dtype if not varies["Dtype"] else "",
        same.strategy if same.strategy != "dynamic" else "",
        f"engine {same.engine}" if same.engine != "model" else "",
    ]
    out.print("KV cache at " + ", ".join(filter(None, said)), style="bold", soft_wrap=True)
    out.print()
    shown = [name for name, differs in varies.items() if differs and name != "Rank"]
    rank = ["Per rank"] if varies["Rank"] else []
    rows = table("Model", *shown, "KV cache", *rank, "Bytes", "B/token")
    for report in reports:
        cells = {
            "Tokens": f"{report.seq_tokens:,}",
            "Batch": f"{report.batch:,}",
            "Dtype": report.kv_dtype,
        }
        rows.add_row(
            report.origin.resolved,
            *(cells[name] for name in shown),
            format_bytes(report.total_bytes),
            *([format_bytes(report.bytes_per_rank)] if rank else []),
            f"{report.total_bytes:,}",
            f"{report.bytes_per_token:,}",
        )
    out.print(rows)
    out.print()
    notes = [
        note if report.origin.resolved in note else f"{report.origin.resolved}: {note}"
        for report in reports
        for note in report.notes
    ]
    for note in dict.fromkeys(notes):
        out.print(f"note: {note}", soft_wrap=True, style="yellow")


def growth(report: SizeReport) -> Iterable[str]:
    """The line a sequence grows along: its slope, its fixed part, and where they change."""
    if not report.segments:
        yield (
            f"growth     in steps; {report.bytes_per_token:,} bytes for the next token, "
            f"{report.bytes_per_sequence / report.seq_tokens:,.1f} on average so far"
        )
        return
    label = "growth"
    for segment, following in zip(report.segments, (*report.segments[1:], None), strict=True):
        reach = f"up to {following.from_tokens:,} tokens" if following else ""
        if segment.from_tokens and not following:
            reach = f"beyond {segment.from_tokens:,} tokens"
        fixed = f" + {segment.fixed_bytes:,} bytes fixed" if segment.fixed_bytes else ""
        yield f"{label:<10} {segment.bytes_per_token:,} bytes per token{fixed} {reach}".rstrip()
        label = ""


def provenance(report: SizeReport) -> Iterable[str]:
    """What was counted, by which rule, from which config and which of its fields."""
    yield f"counts:   {report.engine_source}"
    yield f"rule:     {report.family_source}"
    yield f"config:   {report.origin.kind}: {report.origin.detail} ({report.origin.completeness})"
    given = [f"{use.key}={_short(use.value)}" for use in report.fields if use.origin == "config"]
    yield f"fields:   {', '.join(given)}"
    by_default: dict[str, list[str]] = {}
    for use in report.fields:
        if use.origin != "config":
            by_default.setdefault(use.origin, []).append(f"{use.key}={_short(use.value)}")
    for origin, fields in by_default.items():
        yield f"defaults: {', '.join(fields)}: {origin}"
    yield f"dtype:    {report.kv_dtype}: {report.kv_dtype_origin}"


def _point(report: SizeReport) -> str:
    parts = [f"{report.seq_tokens:,} tokens × batch {report.batch:,}", report.kv_dtype]
    if report.strategy != "dynamic":
        parts.append(report.strategy)
    if report.engine != "model":
        parts.append(f"engine {report.engine}")
    return ", ".join(parts)


def _layer_table(report: SizeReport) -> Table:
    rows = table("Layers", "Kind", "Keeps for a token", "B/token", "Bytes")
    for group in report.groups:
        rows.add_row(
            str(len(group.indices)),
            group.kind,
            group.keeps,
            f"{group.bytes_per_token:,}",
            format_bytes(group.total_bytes),
        )
    return rows


def _print_formulas(out: Console, report: SizeReport) -> None:
    for group in report.groups:
        count = len(group.indices)
        out.print(f"{count} × {group.kind}, layers {_spans(group.indices)}", style="bold")
        out.print(f"  each {group.formula} = {group.bytes_per_layer:,} B", soft_wrap=True)
        out.print(
            f"  {count} × {group.bytes_per_layer:,} B = {group.total_bytes:,} B", soft_wrap=True
        )


def _spans(indices: tuple[int, ...]) -> str:
    """`0-4, 6-10, …`: consecutive indices as spans, at most six of them."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and spans[-1][1] == index - 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:6]]
    return ", ".join(shown) + (", …" if len(spans) > 6 else "")


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"[{len(value)} entries]"
    text = "null" if value is None else str(value)
    return text if len(text) <= 32 else text[:31] + "…"


def print_models(rows: Sequence[Mapping[str, Any]], *, pattern: str) -> None:
    """The catalogue's entries, and how many of them are sized."""
    out = console()
    shown = table("Model", "Type", "Family", "Layers", "Max tokens", "B/token", "+ fixed")
    for row in rows:
        shown.add_row(
            row["name"],
            row["model_type"],
            row["family"] or "refused",
            str(row["layers"] or ""),
            f"{row['max_tokens']:,}" if row["max_tokens"] else "",
            f"{row['bytes_per_token']:,}" if not row["refused"] else "",
            format_bytes(row["fixed_bytes"]) if row["fixed_bytes"] else "",
        )
    if rows:
        out.print(shown)
        out.print()
    sized = sum(not row["refused"] for row in rows)
    matching = f" matching {pattern!r}" if pattern else ""
    count = f"{len(rows)} model{'s' * (len(rows) != 1)}"
    out.print(f"{count}{matching}, {sized} of them sized", style="dim", soft_wrap=True)


def print_strategies(rows: Sequence[Mapping[str, Any]]) -> None:
    """Each strategy in a few lines."""
    out = console()
    for row in rows:
        defaults = ",".join(f"{key}={value}" for key, value in row["parameters"].items())
        out.print(Text(row["name"] + (f":{defaults}" if defaults else ""), style="bold"))
        out.print(f"  {row['summary']}", soft_wrap=True)
        out.print(
            f"  works on {row['works_on']}; source: {row['source']}", soft_wrap=True, style="dim"
        )


def with_progress(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows as they come, with a bar on standard error when that is a terminal."""
    out = console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(names[0], total=len(names))
        for done, row in enumerate(rows, start=1):
            progress.update(task, completed=done, description=names[min(done, len(names) - 1)])
            yield row


def print_profile(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row for each strategy, then what was held against what, and the conditions."""
    out = console()
    about = rows[0]["conditions"]
    out.print(
        f"{rows[0]['model']}  {about['num_layers']} layers, {about['weights']} weights, "
        f"{about['dtype']}, {about['prompt_tokens']:,} + {about['decode_tokens']:,} tokens × "
        f"batch {about['batch']}",
        style="bold",
        soft_wrap=True,
    )
    out.print()
    shown = table("Strategy", "Held", "vs dyn.", "Peak", "TTFT ms", "TPOT ms", "tok/s")
    for row in rows:
        if row["status"] in ("ok", "mismatch"):
            shown.add_row(
                row["strategy"],
                format_bytes(row["held_bytes"]),
                f"{row['predicted_ratio_to_dynamic']:.3f}×",
                format_bytes(row["peak_bytes"]),
                _milliseconds(row["ttft_seconds"]),
                _milliseconds(row["tpot_seconds"]),
                f"{row['tokens_per_second']:,.0f}",
            )
        else:
            shown.add_row(row["strategy"], row["status"].replace("_", " "))
    out.print(shown)
    out.print()
    for row in rows:
        if row["status"] == "ok":
            out.print(
                f"{row['strategy']}: predicted = held = {row['held_bytes']:,} bytes in all "
                f"{len(row['layers'])} layers",
                style="green",
                soft_wrap=True,
            )
        else:
            out.print(
                f"{row['strategy']}: {row['status']}: {row['reason']}",
                style="bold red",
                soft_wrap=True,
            )
    hardware = about["hardware"]["processor"]
    out.print(
        f"{about['device']} ({hardware}), torch {about['torch']}, transformers "
        f"{about['transformers']}; median of {about['repeats']} runs ± interquartile range",
        style="dim",
        soft_wrap=True,
    )


def _milliseconds(timing: Mapping[str, float]) -> str:
    return f"{timing['median'] * 1000:,.2f} ± {timing['spread'] * 1000:,.2f}"
