"""Sizes that others printed, graded: engine logs, published figures, and arithmetic by hand on
published facts. What was measured here stands in `profiles/measurements`, under test elsewhere.
"""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvcalc
from kvcalc.sizing import SizeReport
from kvcalc.units import GIB, KIB, MIB

GOLDEN = Path(__file__).with_name("golden.json")

GRADES = {"engine log", "published figure", "hand arithmetic"}
NO_ADDRESS = "a public log of llama.cpp, mainline of September 2026, whose address was not kept"
UNITS = {"B": 1, "kB": 1000, "KiB": KIB, "MiB": MIB, "GiB": GIB, "tokens": 1}


class Case(NamedTuple):
    """One printed number and the point it was printed for.

    `printed`, `tolerance` and `pool_gib` are decimal text, as the source has them. `pool_gib` is
    the memory of a `tokens_in_pool` case and of no other; `family` is the family module's name.
    """

    id: str
    family: str
    grade: str
    model: str
    seq_tokens: int
    batch: int
    kv_dtype: str
    tp: int
    quantity: str
    printed: str
    unit: str
    tolerance: str
    source: str
    note: str
    pool_gib: str = ""

    def size(self) -> SizeReport:
        """The report of this case's point."""
        return kvcalc.size(
            self.model,
            seq=self.seq_tokens,
            batch=self.batch,
            kv_dtype=self.kv_dtype,
            tp=self.tp,
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    if len(counts) < len(pairs):
        msg = f"duplicate key in {pairs}"
        raise ValueError(msg)
    return dict(pairs)


def read_cases(text: str) -> list[Case]:
    """Read golden.json; an unknown, missing or duplicate key is an error."""
    return [Case(**record) for record in json.loads(text, object_pairs_hook=_without_duplicates)]


CASES = read_cases(GOLDEN.read_text(encoding="utf-8"))


KINDS = {"full_layers_bytes": "full_attention", "state_layers_bytes": "linear_attention"}
"""Quantities that count the layers of one kind."""


def bytes_of(report: SizeReport, kind: str) -> int:
    """Bytes of the layers of a kind."""
    return sum(group.total_bytes for group in report.groups if group.kind == kind)


def quantity(case: Case, report: SizeReport) -> int:
    """The number that the source printed, by kvcalc."""
    if case.quantity == "tokens_in_pool":
        return int(Fraction(case.pool_gib) * GIB) // report.bytes_per_token
    if case.quantity in KINDS:
        return bytes_of(report, KINDS[case.quantity])
    assert case.quantity in {"total_bytes", "bytes_per_token", "bytes_per_rank"}
    return int(getattr(report, case.quantity))


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_size_is_what_the_source_printed(case):
    """The exact number lies within the printed digits of the source."""
    report = case.size()
    got = Fraction(quantity(case, report), UNITS[case.unit])
    assert abs(got - Fraction(case.printed)) <= Fraction(case.tolerance), (
        f"{float(got)} {case.unit}, but {case.source} has {case.printed} ± {case.tolerance}"
    )
    assert report.family == case.family


def test_evidence_is_broad_and_graded():
    """There are enough cases of each family, every one graded, sourced and explained."""
    assert sum(case.grade != "hand arithmetic" for case in CASES) >= 25
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.grade for case in CASES} <= GRADES
    families = Counter(case.family for case in CASES)
    assert {"mha", "delta", "mamba_hybrid"} <= families.keys()
    assert min(families[name] for name in ("full", "sliding", "mla")) >= 4
    for case in CASES:
        assert "https://" in case.source or case.source == NO_ADDRESS
        assert case.note.endswith(".")
        assert case.kv_dtype != "auto"
        assert bool(case.pool_gib) == (case.quantity == "tokens_in_pool") == (case.unit == "tokens")


def test_some_evidence_is_beyond_the_window():
    """At least four cases are long enough that window layers have stopped growing."""
    beyond = [
        case.id
        for case in CASES
        if any(
            group.kind == "sliding_attention" and group.bytes_per_token == 0
            for group in case.size().groups
        )
    ]
    assert len(beyond) >= 4


@pytest.mark.parametrize("line", ['[{"surprise": 1}]', '[{"id": "a", "id": "b"}]', "[{}]"])
def test_golden_file_is_read_strictly(line):
    """An unknown, a duplicate or a missing key is an error."""
    with pytest.raises((TypeError, ValueError)):
        read_cases(line)
