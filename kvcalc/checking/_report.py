"""What is checked, what is found, and the report of both: shared by the other files here."""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from kvcalc.errors import InputError, KvcalcError, UnsupportedError
from kvcalc.strict_yaml import Place

SCHEMA = "kvcalc.check/1"


class Figure(NamedTuple):
    """A figure that can be required: `kind` is `flag`, `bytes`, `bytes or share` or `count`."""

    kind: str
    label: str
    about: str


FIGURES: Mapping[str, Figure] = {
    "fits": Figure("flag", "fits", "the workload fits into the cache's memory"),
    "headroom": Figure(
        "bytes or share", "headroom", "what is left of it on each rank, in bytes or percent of it"
    ),
    "max_concurrency": Figure("count", "max concurrency", "most requests of the sequence at once"),
    "max_tokens": Figure("count", "longest sequence", "longest sequence at the concurrency"),
    "kv_bytes_per_token": Figure(
        "bytes",
        "KV per token",
        "one more token of one sequence, as the architecture must keep it, on all ranks together",
    ),
    "needed": Figure("bytes", "needed", "what the workload's cache takes on each rank"),
    "kv_memory": Figure("bytes", "memory", "what each rank has for its cache"),
    "weights": Figure("bytes", "weights", "the model's weights, on all ranks together"),
}
"""What a requirement may be about."""


class Requirement(NamedTuple):
    """`figure comparison bound`; the bound is bytes, a count, a part of the memory, or True."""

    place: Place
    text: str
    figure: str
    comparison: str
    bound: int | Fraction


class Deployment(NamedTuple):
    """What a file says of one: `given` goes to `api.fit` by name."""

    name: str
    place: Place
    model: str
    model_place: Place
    gpu: str
    given: Mapping[str, Any]
    prefix_share: Fraction
    requirements: tuple[Requirement, ...]


class Outcome(NamedTuple):
    """Whether a requirement holds, and what was found: bytes, a count, a part, or a truth. Where
    estimates leave that open, `ends` are what would be found with them at their worst and best.
    """

    requirement: Requirement
    holds: bool
    found: int | Fraction
    ends: tuple[int | Fraction, int | Fraction] | None = None


class Result(NamedTuple):
    """A deployment's figures (None: not known) and outcomes, or the error, and the place it is
    about; `note` is what makes nothing fail.
    """

    deployment: Deployment
    figures: Mapping[str, int | bool | None]
    facts: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    error: KvcalcError | None = None
    error_place: Place | None = None
    note: str = ""

    @property
    def status(self) -> str:
        """`holds`, `fails`, `open` (estimates do not decide it), `refused` (no exact size) or
        `bad` (the model or an option).
        """
        if self.error is not None:
            return "refused" if isinstance(self.error, UnsupportedError) else "bad"
        if any(outcome.ends is None and not outcome.holds for outcome in self.outcomes):
            return "fails"
        return "open" if any(outcome.ends for outcome in self.outcomes) else "holds"

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return {
            "file": self.deployment.place.file,
            "line": self.deployment.place.line,
            "name": self.deployment.name,
            "model": self.deployment.model,
            "status": self.status,
            **self.facts,
            "figures": dict(self.figures),
            "requirements": [
                {
                    "line": outcome.requirement.place.line,
                    "text": outcome.requirement.text,
                    "holds": outcome.holds if outcome.ends is None else None,
                    "found": float(outcome.found)
                    if isinstance(outcome.found, Fraction)
                    else outcome.found,
                    "ends": outcome.ends and [float(end) for end in outcome.ends],
                }
                for outcome in self.outcomes
            ],
            "note": self.note,
            "error": None
            if self.error is None
            else {"exit_code": self.error.exit_code, "message": str(self.error)},
        }


class Change(NamedTuple):
    """What became of a deployment since the baseline; `figures` are pairs of old and new."""

    file: str
    name: str
    figures: Mapping[str, tuple[Any, Any]]
    said: str = ""


class CheckReport(NamedTuple):
    """Everything that was checked; `errors` are files that cannot be read, with the place."""

    results: tuple[Result, ...]
    errors: tuple[tuple[Place, InputError], ...]
    changes: tuple[Change, ...] | None = None

    @property
    def exit_code(self) -> int:
        """The worst: 2 for a bad file or model, 1 for what does not hold, 3 for what has no exact
        size or is left open by estimates.
        """
        statuses = {result.status for result in self.results}
        if self.errors or "bad" in statuses:
            return 2
        if "fails" in statuses:
            return 1
        return 3 if statuses & {"refused", "open"} else 0

    def files(self) -> Iterator[Path]:
        """The files that models and GPUs are of, where they are given by path."""
        for result in self.results:
            model = Path(result.deployment.model)
            yield from (model, model / "config.json", Path(result.deployment.gpu))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data; the schema is `kvcalc.check/1`."""
        told: dict[str, Any] = {
            "schema": SCHEMA,
            "exit_code": self.exit_code,
            "deployments": [result.to_dict() for result in self.results],
            "errors": [
                {"file": place.file, "line": place.line, "message": str(error)}
                for place, error in self.errors
            ],
        }
        if self.changes is not None:
            told["changes"] = [
                {
                    "file": change.file,
                    "name": change.name,
                    "said": change.said,
                    "figures": {
                        name: {"old": old, "new": new}
                        for name, (old, new) in change.figures.items()
                    },
                }
                for change in self.changes
            ]
        return told
