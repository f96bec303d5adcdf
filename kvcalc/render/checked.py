"""A check's report: as a table, JUnit XML, GitHub annotations and a step summary.

Plain strings without rich, which would cost more than the check itself.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any

from kvcalc.checking import FIGURES, Change, CheckReport, Outcome, Result
from kvcalc.errors import OutputError
from kvcalc.render import data
from kvcalc.strict_yaml import Place
from kvcalc.units import format_bytes

_COLUMNS = ("Deployment", "Verdict", "Needed", "Memory", "Headroom", "Max conc.", "KV/token")


def publish(report: CheckReport, *, json: bool, junit: Path | None, out: Path | None) -> None:
    """Print a report, write the files that are asked for, and tell GitHub when it runs there.

    Annotations go to standard error, where a runner reads them, too: standard output is data.
    """
    written = [_write(junit, junit_xml(report), "w")] if junit else []
    if out is not None:
        written.append(_write(out, data.json_text(report.to_dict()), "w"))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        written.append(_write(Path(summary), step_summary(report), "a"))
    if json:
        data.write_json(report.to_dict())
    else:
        sys.stdout.write(told(report))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        sys.stderr.writelines(f"{line}\n" for line in annotations(report))
    sys.stderr.writelines(f"kvcalc: {' '.join(line.split())}\n" for line in _errors(report))
    if any(written):
        raise OutputError("; ".join(filter(None, written)))


def _write(path: Path, what: str, mode: str) -> str:
    """Write a file; returns why that cannot be done, so that the others and the screen are not
    lost.
    """
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(what)
    except (OSError, ValueError) as error:
        return f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
    return ""


def told(report: CheckReport) -> str:
    """The report for a person: a line for each deployment, then what does not hold."""
    lines: list[str] = []
    if report.results:
        rows = [_COLUMNS, *(_cells(result) for result in report.results)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            left = (cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
            right = (cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
            lines.append("  ".join((*left, *right)).rstrip())
        lines.append("")
        said = [
            (_place(result, outcome), result, broken(result, outcome))
            for result, outcome in _failures(report)
        ]
        said += [(one.deployment.place, one, f"note: {one.note}") for one in _noted(report)]
        lines += [
            f"{place.file}:{place.line}: {result.deployment.name}: {text}"
            for place, result, text in said
        ]
        lines += [""] * bool(said)
    if report.changes is not None:
        lines += [*change_lines(report.changes), ""]
    lines.append(verdict(report))
    return "\n".join(lines) + "\n"


def _cells(result: Result) -> tuple[str, ...]:
    figures = result.figures
    name = result.deployment.name
    if not figures:
        return (name, result.status, *["-"] * 5)
    per_token = figures["kv_bytes_per_token"]
    return (
        name,
        result.status,
        format_bytes(_whole(figures["needed"])),
        format_bytes(_whole(figures["kv_memory"])),
        _headroom(figures),
        f"{_whole(figures['max_concurrency']):,}",
        "-" if per_token is None else format_bytes(per_token),
    )


def _headroom(figures: Mapping[str, int | bool | None]) -> str:
    memory, headroom = figures["kv_memory"], _whole(figures["headroom"])
    return _percent(Fraction(headroom, memory)) if memory else format_bytes(headroom)


def _whole(value: int | bool | None) -> int:
    return int(value or 0)


def _percent(part: Fraction) -> str:
    """Rounded down, so that what does not hold does not look as if it did."""
    tenths = part * 1000 // 1
    return f"{'-' if tenths < 0 else ''}{abs(tenths) // 10}.{abs(tenths) % 10}%"


def broken(result: Result, outcome: Outcome) -> str:
    """What does not hold, and what was found: `max_concurrency >= 24 does not hold: 9`."""
    return f"{outcome.requirement.text} {found(result, outcome)}"


def found(result: Result, outcome: Outcome) -> str:
    """What became of a requirement, and what it was held against."""
    figure = outcome.requirement.figure
    if outcome.ends is not None:
        worst, best = (_value(figure, end) for end in outcome.ends)
        given = result.deployment.given
        more = [key for key in ("reserve", "weights") if key not in given]
        hint = f"; give {' or '.join(more)} to decide" if more else ""
        return f"is open: {worst} to {best} as estimates range{hint}"
    headroom = _whole(result.figures["headroom"])
    if figure in ("fits", "headroom") and headroom >= 0 and not result.figures["fits"]:
        if result.facts["engine"] == "vllm":
            return "does not hold: vLLM does not start for max_model_len, or needs a block more"
        return "does not hold: the engine's pools hold less than the memory (kvcalc fit)"
    if figure == "fits":
        return f"does not hold: {format_bytes(-headroom)} missing on each rank"
    return f"does not hold: {_value(figure, outcome.found)}"


def _value(figure: str, value: int | Fraction) -> str:
    kind = FIGURES[figure].kind
    if isinstance(value, Fraction):
        return _percent(value)
    if kind == "flag":
        return "yes" if value else "no"
    return f"{value:,}" if kind == "count" else f"{format_bytes(value)}, {value:,} bytes"


def verdict(report: CheckReport) -> str:
    """How many deployments there are, and what became of them."""
    statuses = [result.status for result in report.results]
    counted = {name: statuses.count(name) for name in ("holds", "fails", "open", "refused", "bad")}
    counted["bad file"] = len(report.errors)
    words = {
        "holds": ("holds", "hold"),
        "fails": ("fails", "fail"),
        "refused": ("is refused", "are refused"),
        "open": ("is open", "are open"),
        "bad": ("is bad", "are bad"),
        "bad file": ("bad file", "bad files"),
    }
    told_of = ", ".join(
        f"{count} {words[name][count != 1]}" for name, count in counted.items() if count
    )
    return f"{len(statuses)} deployment{'s' * (len(statuses) != 1)}: {told_of}"


def _failures(report: CheckReport) -> Iterator[tuple[Result, Outcome]]:
    """What does not hold, or is left open."""
    for result in report.results:
        for outcome in result.outcomes:
            if outcome.ends is not None or not outcome.holds:
                yield result, outcome


def _noted(report: CheckReport) -> Iterator[Result]:
    return (result for result in report.results if result.note)


def _place(result: Result, outcome: Outcome) -> Place:
    """Where to look: at the requirement, or at the deployment when the defaults require it."""
    place = outcome.requirement.place
    own = place.path.startswith(result.deployment.place.path)
    return place if own else result.deployment.place


def _errors(report: CheckReport) -> Iterator[str]:
    """Bad files and deployments, each with its place."""
    for _, error in report.errors:
        yield str(error)
    for result in report.results:
        if result.error is not None and result.error_place is not None:
            yield f"{result.error_place}: {result.error}"


# Changes


def change_lines(changes: Sequence[Change]) -> list[str]:
    """One line for each deployment that changed."""
    lines = [
        f"{change.name}: {change.said or ', '.join(_changed(change.figures))}" for change in changes
    ]
    return ["changed since the baseline:", *lines] if lines else ["nothing changed"]


def _changed(figures: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    """`KV per token 128 → 256 KiB`, what others follow from first."""
    for name in dict.fromkeys(("kv_bytes_per_token", "max_concurrency", *FIGURES)):
        if name in figures:
            yield f"{FIGURES[name].label} {_pair(FIGURES[name].kind, *figures[name])}"


def _pair(kind: str, old: Any, new: Any) -> str:  # noqa: ANN401 - of a JSON file
    if kind == "flag":
        yes = {True: "yes", False: "no"}
        return f"{yes.get(old, '-')} → {yes.get(new, '-')}"
    counts = [isinstance(value, int) and not isinstance(value, bool) for value in (old, new)]
    if kind == "count" or not all(counts):
        return " → ".join(
            "-" if not counted else f"{value:,}" if kind == "count" else format_bytes(value)
            for value, counted in zip((old, new), counts, strict=True)
        )
    (was, unit), (now, other) = format_bytes(old).split(), format_bytes(new).split()
    if (was, unit) == (now, other):
        return f"{old:,} → {new:,} B"
    was, now = (text.rstrip("0").rstrip(".") if "." in text else text for text in (was, now))
    return f"{was} → {now} {unit}" if unit == other else f"{was} {unit} → {now} {other}"


# JUnit


def junit_xml(report: CheckReport) -> str:
    """A suite for each file, a case for each requirement; errors are cases of their own."""
    suites: dict[str, list[str]] = {}
    counts: dict[str, list[int]] = {}

    def case(file: str, where: str, name: str, body: str = "") -> None:
        head = f"    <testcase classname={_attribute(where)} name={_attribute(name)}"
        suites.setdefault(file, []).append(f"{head}>{body}</testcase>" if body else f"{head}/>")
        count = counts.setdefault(file, [0, 0, 0])
        for index, counted in enumerate((True, "<failure" in body, "<error" in body)):
            count[index] += counted

    for place, error in report.errors:
        case(place.file, place.file, "file", _problem("error", str(error), "bad"))
    for result in report.results:
        file, name = result.deployment.place.file, result.deployment.name
        if result.error is not None:
            said = f"{result.error_place}: {result.error}"
            case(file, name, "figures", _problem("error", said, result.status))
        for outcome in result.outcomes:
            body = ""
            if outcome.ends is not None:
                body = _problem("error", broken(result, outcome), "open")
            elif not outcome.holds:
                body = _problem("failure", broken(result, outcome), "fails")
            case(file, name, outcome.requirement.text, body)
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>"]
    for file, cases in suites.items():
        tests, failures, errors = counts[file]
        lines.append(
            f'  <testsuite name={_attribute(file)} tests="{tests}" failures="{failures}" '
            f'errors="{errors}">'
        )
        lines += [*cases, "  </testsuite>"]
    return "\n".join([*lines, "</testsuites>"]) + "\n"


def _problem(kind: str, message: str, status: str) -> str:
    text = escape(_printable(message), quote=False)
    return f"<{kind} message={_attribute(message)} type={_attribute(status)}>{text}</{kind}>"


def _attribute(value: str) -> str:
    return f'"{escape(_printable(value))}"'


def _printable(value: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(sign if sign.isprintable() else " " for sign in value)


# GitHub


def annotations(report: CheckReport) -> Iterator[str]:
    """A workflow command for each thing that is wrong, or a note; GitHub shows it at the line."""
    for place, error in report.errors:
        yield _annotation(place.file, place.line, "kvcalc check", str(error))
    for result in report.results:
        title = f"kvcalc check: {result.deployment.name}"
        if result.error is not None and result.error_place is not None:
            place = result.error_place
            yield _annotation(place.file, place.line, title, str(result.error))
        for _, outcome in _failures(report._replace(results=(result,))):
            place = _place(result, outcome)
            yield _annotation(place.file, place.line, title, broken(result, outcome))
        if result.note:
            place = result.deployment.place
            yield _annotation(place.file, place.line, title, result.note, level="notice")


def _annotation(file: str, line: int, title: str, message: str, level: str = "error") -> str:
    def data_of(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    def property_of(text: str) -> str:
        return data_of(text).replace(":", "%3A").replace(",", "%2C")

    where = f"file={property_of(file)},line={line},title={property_of(title)}"
    return f"::{level} {where}::{data_of(message)}"


def step_summary(report: CheckReport) -> str:
    """The report as Markdown."""
    lines = [f"### kvcalc check: {verdict(report)}", ""]
    if report.results:
        lines += [_row(_COLUMNS), "|---|---|---:|---:|---:|---:|---:|"]
        lines += [_row(_cells(result)) for result in report.results]
        lines.append("")
    said = [
        f"**{_plain(result.deployment.name)}**: `{outcome.requirement.text}` "
        f"{found(result, outcome)}"
        for result, outcome in _failures(report)
    ]
    said += [_plain(line) for line in _errors(report)]
    said += [f"{_plain(one.deployment.name)}: {_plain(one.note)}" for one in _noted(report)]
    lines += [f"- {line}" for line in said] + [""] * bool(said)
    if report.changes is not None:
        first, *rest = change_lines(report.changes)
        lines += [first[0].upper() + first[1:], ""]
        lines += [f"- {_plain(line)}" for line in rest] + [""] * bool(rest)
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """A text as Markdown shows it, without making anything of it."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + sign if sign in "\\`*_[]|" else sign for sign in text)
