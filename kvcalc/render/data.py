"""Reports as JSON, CSV and Markdown, written straight to standard output."""

import io
import json
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from kvcalc.sizing import SizeReport
from kvcalc.units import format_bytes

_CSV_COLUMNS = (
    "model",
    "resolved_model",
    "model_type",
    "family",
    "engine",
    "strategy",
    "kv_dtype",
    "seq_tokens",
    "batch",
    "tp",
    "pp",
    "total_bytes",
    "bytes_per_rank",
    "bytes_per_sequence",
    "bytes_per_token",
    "provenance",
)


def json_text(data: dict[str, Any]) -> str:
    """One JSON object and a newline."""
    return json.dumps(data, indent=2) + "\n"


def write_json(data: dict[str, Any]) -> None:
    """One JSON object and a newline."""
    write(json_text(data))


def write(text: str) -> None:
    """Data is written whole or not at all: Ctrl-C waits for the end of it."""
    here = threading.current_thread() is threading.main_thread()  # no signal arrives elsewhere
    if not here or not callable(signal.getsignal(signal.SIGINT)):  # or it is ignored
        sys.stdout.write(text)
        return
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def write_csv(reports: Sequence[SizeReport]) -> None:
    """A header and one row for each report; byte counts are integers."""
    import csv

    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for report in reports:
        data = report.to_dict()
        writer.writerow([data[column] for column in _CSV_COLUMNS])
    write(lines.getvalue())


def write_markdown(reports: Sequence[SizeReport]) -> None:
    """A pipe table, one row for each report."""
    lines = [
        "| model | tokens | batch | dtype | strategy | engine | ranks | cache | bytes | per rank |",
        "|---|---:|---:|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {report.origin.resolved.replace('|', chr(92) + '|')} | {report.seq_tokens:,} "
        f"| {report.batch} | {report.kv_dtype} | {report.strategy} | {report.engine} "
        f"| {report.tp} × {report.pp} | {format_bytes(report.total_bytes)} "
        f"| {report.total_bytes:,} | {format_bytes(report.bytes_per_rank)} |"
        for report in reports
    ]
    write("\n".join(lines) + "\n")
