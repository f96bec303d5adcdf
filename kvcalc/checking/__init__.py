"""Deployments that a YAML file names, and what is required of them: `kvcalc check`.

A file is read strictly (`kvcalc.strict_yaml`), each deployment is fitted by `kvcalc.api.fit`, and
each requirement is compared in whole numbers or fractions, never in rounded ones. Nothing is
printed here. Whatever is wrong names its file, line and key.
"""

from collections.abc import Sequence
from pathlib import Path

from kvcalc.checking._baseline import changes_since, read_baseline
from kvcalc.checking._file import STARTER, json_schema, read_checks, write_starter
from kvcalc.checking._report import FIGURES, Change, CheckReport, Deployment, Outcome, Result
from kvcalc.checking._run import Runs
from kvcalc.errors import InputError
from kvcalc.strict_yaml import Place, PlacedError

__all__ = [
    "FIGURES",
    "STARTER",
    "Change",
    "CheckReport",
    "Deployment",
    "Outcome",
    "Result",
    "check",
    "json_schema",
    "read_checks",
    "write_starter",
]


def check(
    files: Sequence[Path], *, baseline: Path | None = None, every_figure: bool = True
) -> CheckReport:
    """Check the deployments of these files, and tell them from those of an earlier run's JSON.

    With `every_figure` false the longest sequence is looked for only where something is required
    of it.
    What is wrong with a file or a deployment stands in the report; InputError is raised for a
    baseline that is none.
    """
    old = read_baseline(baseline) if baseline else None
    results: list[Result] = []
    errors: list[tuple[Place, InputError]] = []
    runs = Runs(every_figure=every_figure)
    for file in dict.fromkeys(files):
        try:
            deployments = read_checks(file)
        except InputError as error:
            place = error.place if isinstance(error, PlacedError) else Place(file.as_posix(), 1)
            errors.append((place, error))
            continue
        results += [runs.result(deployment) for deployment in deployments]
    changes = None if old is None else tuple(changes_since(old, results))
    return CheckReport(tuple(results), tuple(errors), changes)
