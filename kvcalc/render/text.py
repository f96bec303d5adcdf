"""Reports for a person at a terminal, with rich. Nothing here computes a byte."""

from collections.abc import Iterable, Mapping, Sequence
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcalc.fitting import FitReport
from kvcalc.planning import PlanReport
from kvcalc.sizing import SizeReport
from kvcalc.units import GIB, MAX_TOKENS, format_bytes

WIDTH = 500
"""Wider than any table: nothing is cut; a terminal folds long lines itself, a pipe keeps them."""


def console() -> Console:
    """A console that never styles numbers or reads markup in model names."""
    return Console(highlight=False, markup=False, emoji=False, width=WIDTH, soft_wrap=True)


_WORDS = frozenset(
    {
        "Model",
        "GPU",
        "GPUs",
        "Architecture",
        "Type",
        "Family",
        "Strategy",
        "Dtype",
        "Layers",
        "Kind",
        "Keeps for a token",
    }
)
"""Columns of words, to the left; all others hold numbers, to the right."""


def table(*columns: str) -> Table:
    """A plain table without lines."""
    new = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        new.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=True)
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
    title.append(f"  {report.seq_tokens:,} tokens × batch {report.batch:,}{_setting(report)}")
    out.print(title)
    out.print()
    ranks = report.tp * report.pp
    total = Text("KV cache   ")
    total.append(format_bytes(report.total_bytes), style="bold green")
    total.append(f"  {report.total_bytes:,} bytes  ({report.provenance})")
    out.print(total.append(f"  on all {ranks} ranks" if ranks > 1 else ""))
    if ranks > 1:
        size = f"{format_bytes(report.bytes_per_rank)}  {report.bytes_per_rank:,} bytes"
        out.print(f"per rank   {size}  (the largest)")
    for line in growth(report):
        out.print(line)
    for name, num_bytes in report.transients.items():
        label = name.removesuffix("_bytes").replace("_", " ")
        out.print(f"{label}: {format_bytes(num_bytes)}  {num_bytes:,} bytes")
    out.print()
    _print_layers(out, report)
    if explain:
        out.print()
        _print_formulas(out, report)
    _print_footer(out, report, report.notes)


def print_lengths(reports: Sequence[SizeReport]) -> None:
    """One model at a few lengths, for a user who named none."""
    first = reports[0]
    out = console()
    out.print(Text(first.origin.resolved + _setting(first, sep="  "), style="bold"))
    out.print()
    for line in growth(first):
        out.print(line)
    out.print()
    ranks = first.tp * first.pp > 1
    rows = table("Tokens", "KV cache", "Bytes", *(["Per rank"] if ranks else []))
    for report in reports:
        at_most = " (max)" if report.seq_tokens == report.max_tokens else ""
        rows.add_row(
            f"{report.seq_tokens:,}{at_most}",
            format_bytes(report.total_bytes),
            f"{report.total_bytes:,}",
            *([format_bytes(report.bytes_per_rank)] if ranks else []),
        )
    out.print(rows)
    _print_footer(out, first, [note for report in reports for note in report.notes])


def _print_footer(out: Console, report: SizeReport, notes: Iterable[str]) -> None:
    """Where a report comes from, and each note once."""
    out.print()
    for line in provenance(report):
        out.print(line, style="dim")
    for note in dict.fromkeys(notes):
        out.print(f"note: {note}", style="yellow")


def print_comparison(reports: Sequence[SizeReport]) -> None:
    """Several points side by side; a column that never differs is said once above."""
    out = console()
    same = reports[0]
    varies = {
        "Tokens": len({report.seq_tokens for report in reports}) > 1,
        "Batch": len({report.batch for report in reports}) > 1,
        "Dtype": len({report.kv_dtype for report in reports}) > 1,
        "Engine": len({report.engine for report in reports}) > 1,
    }
    said = [
        "" if varies["Tokens"] else f"{same.seq_tokens:,} tokens",
        "" if varies["Batch"] else f"batch {same.batch:,}",
        _setting(same, dtype=not varies["Dtype"], engine=not varies["Engine"], sep=""),
    ]
    models = {report.origin.resolved for report in reports}
    if varies["Engine"] and len(models) == 1:
        said.insert(0, same.origin.resolved)
        models.clear()
    title = ", ".join(filter(None, said))
    out.print(f"KV cache: {title}" if title else "KV cache", style="bold")
    out.print()
    shown = [name for name, differs in varies.items() if differs]
    ranks = same.tp * same.pp > 1
    rows = table(
        *["Model"] * bool(models),
        *shown,
        "KV cache",
        *(["Per rank"] if ranks else []),
        "Bytes",
        "B/token",
    )
    for report in reports:
        cells = {
            "Tokens": f"{report.seq_tokens:,}",
            "Batch": f"{report.batch:,}",
            "Dtype": report.kv_dtype,
            "Engine": report.engine,
        }
        rows.add_row(
            *[report.origin.resolved] * bool(models),
            *(cells[name] for name in shown),
            format_bytes(report.total_bytes),
            *([format_bytes(report.bytes_per_rank)] if ranks else []),
            f"{report.total_bytes:,}",
            per_token(report),
        )
    out.print(rows)
    if varies["Engine"]:
        out.print()
        for engine, source in {report.engine: report.engine_source for report in reports}.items():
            print_folded(out, f"{engine:<14}", source, "dim")
    notes = [
        f"{report.origin.resolved}: {note}"
        for report in reports
        for note in report.notes
        if note not in report.origin.notes  # the table shows what a name resolved to
    ]
    if notes:
        out.print()
    for note in dict.fromkeys(notes):
        out.print(f"note: {note}", style="yellow")


def print_fit(report: FitReport, changes: Sequence[str]) -> None:
    """The memory, what is asked of it, the most that it holds, and which `changes` would do."""
    out = console()
    size = report.size
    title = Text(size.origin.resolved, style="bold")
    title.append(f"  {report.concurrency:,} × {size.seq_tokens:,} tokens{_setting(size)}")
    out.print(title)
    out.print()
    rank = " of each rank" if size.tp * size.pp > 1 else ""
    if len(report.budget) > 1:
        rows = table("Memory" + rank, "GiB", "Range", "is")
        for term in report.budget:
            least, most = (end / GIB for end in term.bounds)
            between = f"{least:.2f} to {most:.2f}" if least != most else ""
            rows.add_row(term.name, f"{term.num_bytes / GIB:.3f}", between, term.provenance)
        out.print(rows)
        out.print()
    lines = {
        f"cache memory{rank}": _both(report.available_bytes),
        f"needed{rank}": _both(report.needed_bytes),
        "": "",
        "most requests": f"{report.max_concurrency:,}{_between(report.max_concurrency_range)} of "
        f"{size.seq_tokens:,} tokens at once{_bounded(report)}",
        "longest sequence": f"{_tokens(report)} tokens for "
        f"{report.concurrency:,} at once{_own_maximum(report)}",
    }
    widest = max(map(len, lines)) + 2
    for label, said in lines.items():
        if label:
            print_folded(out, label.ljust(widest), said)
        else:
            out.print(Text(" " * widest).append_text(_verdict(report)))
    if changes:
        print_folded(out, "would fit with".ljust(widest), ", or ".join(changes), "bold")
    elif not report.fits:
        print_folded(out, "would fit".ljust(widest), "by no single change: see kvcalc plan")
    if report.printed:
        figures = ", ".join(f"{name} {_printed(value)}" for name, value in report.printed.items())
        print_folded(out, "engine says".ljust(widest), figures)
    out.print()
    _print_sources(out, report)


def _print_sources(out: Console, report: FitReport) -> None:
    """Where each term and the cache's bytes come from."""
    size = report.size
    for term in report.budget if len(report.budget) > 1 else ():
        print_folded(out, f"{term.name}: ", term.source, "dim")
    for line in provenance(size):
        label, _, told = line.partition(":")
        print_folded(out, f"{label}: ", told.strip(), "dim")
    weights = (f"weights: {one}" for one in report.weights_notes)
    for note in dict.fromkeys((*size.notes, *report.notes, *weights)):
        print_folded(out, "note: ", note, "yellow")


def _own_maximum(report: FitReport) -> str:
    """A word where memory holds more than the model was made for."""
    own = report.size.max_tokens
    if report.max_tokens == MAX_TOKENS:
        return ""
    return f"; the model's own maximum is {own:,}" if 0 < own < report.max_tokens else ""


def _bounded(report: FitReport) -> str:
    """A word where the server takes no more requests, whatever memory there is."""
    if report.max_concurrency == report.plan.options.get("max_num_seqs"):
        return ", which is max_num_seqs"
    return ", the server's most" if report.max_concurrency == report.limits[1] else ""


def _tokens(report: FitReport) -> str:
    if report.max_tokens == MAX_TOKENS:
        return "any number of"
    return f"{report.max_tokens:,}{_between(report.max_tokens_range)}"


def _verdict(report: FitReport) -> Text:
    """Whether it fits, by how much, and whether the estimates leave that open."""
    fits, headroom = report.fits, report.headroom_bytes
    verdict = Text("fits" if fits else "does not fit", "bold green" if fits else "bold red")
    over = "left" if headroom >= 0 else "missing"
    verdict.append(f"  {format_bytes(abs(headroom))} {over}", style="default")
    if not fits and headroom >= 0:
        starts = (report.printed or {}).get("starts", True)
        why = "the engine's pools below hold less" if starts else "the engine does not start"
        verdict.append(f", but {why}", style="default")
    if not report.sure:
        other = "most" if fits else "least"
        verdict.append(f", but not if estimates are at their {other}", style="bold yellow")
    return verdict


def _between(bounds: tuple[int, int]) -> str:
    least, most = bounds
    return "" if least == most else f" ({least:,} to {most:,})"


STAGES = (
    "TP×PP: each layer is split over TP GPUs, the layers over PP stages that a token passes one "
    "after the other; where up to twice the GPUs do without stages, they are listed, too"
)


def print_plan(report: PlanReport) -> None:
    """One line for each, in their order; prices take the place of the headroom."""
    out = console()
    deployments = report.deployments
    size = deployments[0].fit.size
    title = Text(size.origin.resolved, style="bold")
    title.append(
        f"  {deployments[0].fit.concurrency:,} × {size.seq_tokens:,} tokens, engine {size.engine}"
    )
    out.print(title)
    out.print()
    priced = any(one.price_per_hour for one in deployments)
    rows = table("GPUs", "TP×PP", "KV", "Memory", "Per hour" if priced else "Headroom", "Holds")
    for one in deployments:
        price = one.price_per_hour
        rows.add_row(
            f"{one.num_gpus} × {one.gpu}",
            f"{one.tp}×{one.pp}",
            one.kv_dtype,
            format_bytes(one.memory_bytes),
            (f"{price.value:,.2f} {price.currency}" if price else "-")
            if priced
            else format_bytes(one.fit.headroom_bytes),
            f"{'' if one.fit.sure else '? '}{one.fit.max_concurrency:,}",
        )
    out.print(rows)
    out.print()
    of_each = "" if priced else ", headroom of each"
    told = f"memory is of all, as drivers report it{of_each}; holds: most such requests at once"
    if not all(one.fit.sure for one in deployments):
        marked = "" if any(one.fit.sure for one in deployments) else ", which is so of each row"
        told += f"; ?: not with all estimates at their most{marked}"
    print_folded(out, "", told, "dim")
    if 0 < size.max_tokens < size.seq_tokens:
        beyond = f"beyond the model's own maximum of {size.max_tokens:,}"
        print_folded(out, "", f"{size.seq_tokens:,} tokens are {beyond}", "yellow")
    if any(one.pp > 1 for one in deployments):
        print_folded(out, "", STAGES, "dim")
    terms: dict[str, dict[str, None]] = {}
    for one in deployments:
        for term in one.fit.budget:
            name = term.name.partition(" / ")[0]  # weights / 2 ranks
            terms.setdefault(name, {})[term.provenance] = None
    budget = [f"{name} ({' or '.join(provenances)})" for name, provenances in terms.items()]
    print_folded(out, "", f"each GPU: {', '.join(budget)}", "dim")
    if priced:
        sources = {one.price_per_hour.source: None for one in deployments if one.price_per_hour}
        print_folded(out, "", f"prices are yours: {', '.join(sources)}", "dim")
    for remark in report.remarks():
        print_folded(out, "", remark, "dim")


def _both(num_bytes: int) -> str:
    return f"{format_bytes(num_bytes)}  {num_bytes:,} bytes"


def _printed(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def per_token(report: SizeReport) -> str:
    """Bytes of one more token; where growth is a staircase, the average so far."""
    if report.segments:
        return f"{report.bytes_per_token:,}"
    return f"~{report.bytes_per_sequence // report.seq_tokens:,}"


def growth(report: SizeReport) -> Iterable[str]:
    """The line one sequence grows along: its slope, its fixed part, and where they change."""
    whose = " per sequence" if report.batch > 1 else ""
    if report.tp * report.pp > 1:
        whose += ", on all ranks" if whose else " on all ranks"
    if not report.segments:
        average = report.bytes_per_sequence // report.seq_tokens
        yield (
            f"growth     in steps; {report.bytes_per_token:,} bytes for the next token, "
            f"{average:,} on average so far{whose}"
        )
        return
    label = "growth"
    for segment, following in zip(report.segments, (*report.segments[1:], None), strict=True):
        reach = f" up to {following.from_tokens:,} tokens" if following else ""
        if segment.from_tokens and not following:
            reach = f" beyond {segment.from_tokens:,} tokens"
        fixed = f" + {segment.fixed_bytes:,} bytes fixed" if segment.fixed_bytes else ""
        yield f"{label:<10} {segment.bytes_per_token:,} bytes per token{fixed}{whose}{reach}"
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


def _setting(
    report: SizeReport, *, dtype: bool = True, engine: bool = True, sep: str = ", "
) -> str:
    """What else was asked for: dtype, strategy, engine, ranks."""
    parts = [
        report.kv_dtype if dtype else "",
        report.strategy if report.strategy != "dynamic" else "",
        f"engine {report.engine}" if engine and report.engine != "model" else "",
        f"tp {report.tp}" if report.tp > 1 else "",
        f"pp {report.pp}" if report.pp > 1 else "",
    ]
    said = ", ".join(filter(None, parts))
    return sep + said if said else ""


def _print_layers(out: Console, report: SizeReport) -> None:
    """A line for each group; on a terminal what is kept, which may be long, folds in its column."""
    rows = table("Layers", "Kind", "Keeps for a token", "B/token", "Bytes")
    rows.columns[2].no_wrap = False
    for group in report.groups:
        rows.add_row(
            str(len(group.indices)),
            group.kind,
            group.keeps,
            f"{group.bytes_per_token:,}",
            format_bytes(group.total_bytes),
        )
    out.print(rows, width=get_terminal_size().columns if out.is_terminal else None)


def _print_formulas(out: Console, report: SizeReport) -> None:
    for group in report.groups:
        count = len(group.indices)
        out.print(f"{count} × {group.kind}, layers {_spans(group.indices)}", style="bold")
        out.print(f"  each {group.formula} = {group.bytes_per_layer:,} B")
        out.print(f"  {count} × {group.bytes_per_layer:,} B = {group.total_bytes:,} B")


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
    """The catalogue's entries, and how many of them are sized, in 80 columns: a name for which
    there is no room has a line of its own.
    """
    out = console()
    told = [
        (
            row["family"],
            row["kv_dtype"],
            f"{row['max_tokens']:,}" if row["max_tokens"] else "",
            f"{row['bytes_per_token']:,}",
        )
        for row in rows
        if not row["refused"]
    ]
    head = ("Family", "Dtype", "Max tokens", "B/token")
    family, dtype, tokens, per_token = (
        max(map(len, cells)) for cells in zip(head, *told, strict=True)
    )
    room = 80 - sum((family, dtype, tokens, per_token)) - 4 * len("  ")
    names = [row["name"] for row in rows]
    widest = max((len(name) for name in names if len(name) <= room), default=len("Model"))

    def line(name: str, cells: Sequence[str]) -> str:
        label, kind, maximum, cost = cells
        told = f"{label:<{family}}  {kind:<{dtype}}  {maximum:>{tokens}}  {cost:>{per_token}}"
        return f"{name:<{widest}}  {told}"

    sized = iter(told)
    if rows:
        out.print(line("Model", head), style="bold")
    for row in rows:
        name = row["name"]
        if len(name) > widest:
            out.print(name)
            name = ""
        if row["refused"]:
            out.print(f"{name:<{widest}}  refused: {row['model_type']}")
        else:
            out.print(line(name, next(sized)))
    if rows:
        out.print()
    matching = f" matching {pattern!r}" if pattern else ""
    count = f"{len(rows)} model{'s' * (len(rows) != 1)}"
    out.print(f"{count}{matching}, {len(told)} of them sized", style="dim")


def print_gpus(rows: Sequence[Mapping[str, Any]], *, pattern: str) -> None:
    """The accelerators with the figures that decide a cache's size and speed."""
    out = console()
    shown = table("GPU", "Architecture", "GiB", "Usable", "GB/s", "BF16", "W")
    for row in rows:
        memory, cuda, usable, bandwidth, flops, power = (
            row[name]["value"] if row[name] else None
            for name in (
                "memory_bytes",
                "cuda_bytes",
                "usable_bytes",
                "bandwidth_bytes_per_second",
                "bf16_flops",
                "power_watts",
            )
        )
        total = cuda or usable
        shown.add_row(
            row["id"],
            row["architecture"] or "",
            f"{memory / GIB:g}" if memory else "",
            f"{total / GIB:.2f}" if total else "-",
            f"{bandwidth / 1e9:,.0f}" if bandwidth else "",
            f"{flops / 1e12:.1f}".removesuffix(".0") if flops else "",
            str(power or ""),
        )
    if rows:
        out.print(shown)
        out.print()
        told = "GiB: nominal; Usable: what a driver tells, from which fit and plan start"
        if not all(row["cuda_bytes"] or row["usable_bytes"] for row in rows):
            told += " (-: not known, they need a YAML of your own)"
        print_folded(out, "", f"{told}; BF16: dense TFLOPS", "dim")
    matching = f" matching {pattern!r}" if pattern else ""
    count = f"{len(rows)} accelerator{'s' * (len(rows) != 1)}"
    out.print(f"{count}{matching}; --json gives each figure's source and date", style="dim")


def print_strategies(rows: Sequence[Mapping[str, Any]]) -> None:
    """One strategy, or the two of a pair, in full; more of them in a line or two each."""
    out = console()
    if len(rows) > 2:
        _list_strategies(out, rows)
        return
    if len(rows) == 2:
        one, other = rows
        out.print(f"{one['name']}+{other['name']}", style="bold", end="")
        out.print(f"  {other['name']} stores what {one['name']} keeps")
    for row in rows:
        if len(rows) == 2:
            out.print()
        _tell_strategy(out, row)
    if any(headline["measures"] for row in rows for headline in row["headlines"]):
        out.print()
        note = "like for like is the quantity; model, device and length are the claim's own"
        out.print(note, style="dim")


def _list_strategies(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Name and summary, and how to learn more."""
    widest = max(len(row["name"]) for row in rows)
    for row in rows:
        print_folded(out, row["name"].ljust(widest + 2), row["summary"])
    out.print()
    keep, store = (
        ", ".join(row["name"] for row in rows if row[ability]) for ability in ("composes", "stores")
    )
    print_folded(out, "", f"A+B, where B stores what A keeps: A of {keep}; B of {store}", "dim")
    out.print(f"{len(rows)} strategies; kvcalc strategies NAME tells about one", style="dim")


def _tell_strategy(out: Console, row: Mapping[str, Any]) -> None:
    """Everything about a strategy, and what is claimed of it."""
    defaults = ",".join(f"{key}={value}" for key, value in row["parameters"].items())
    out.print(row["name"] + (f":{defaults}" if defaults else ""), style="bold")
    print_folded(out, "  ", row["summary"])
    choices = "; ".join(f"{key}: {' or '.join(words)}" for key, words in row["choices"].items())
    for label, told in (
        ("keeps", row["keeps"]),
        ("formula", row["formula"]),
        ("evicts", row["evicts"]),
        ("needs", row["needs"]),
        ("works on", row["works_on"]),
        ("limits", row["limits"]),
        ("choices", choices),
        ("source", row["source"]),
    ):
        if told:
            print_folded(out, f"  {label:<9} ", told)
    label = "claims"
    for headline in row["headlines"]:
        print_folded(out, f"  {label:<9} ", f"{headline['claim']}: {headline['conditions']}")
        print_folded(out, " " * 14, like_for_like(headline), "dim")
        label = ""


QUANTITIES = {
    "bytes": "bytes held",
    "peak": "peak",
    "ttft": "TTFT",
    "tpot": "TPOT",
}
"""What a headline's `measures` is called."""


def like_for_like(headline: Mapping[str, Any]) -> str:
    """What of a profile a claim can be held against, and why not or with what reserve."""
    said = "another quantity"
    if headline["measures"]:
        said = f"like for like with {QUANTITIES[headline['measures']]} in a profile"
    return ": ".join(filter(None, (said, headline["remark"])))


def print_folded(out: Console, label: str, told: str, style: str = "") -> None:
    """A label, and beside it a text that folds in its column at the width of the terminal."""
    width = min(max(get_terminal_size().columns, 40), 100) - len(label)
    for line in wrap(told, width, break_on_hyphens=False):
        out.print(Text.assemble((label, "bold"), (line, style)))
        label = " " * len(label)
