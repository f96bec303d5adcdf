"""Settings of the whole test run."""

import os
from collections import Counter

import pytest

# No test may reach the Hub; the ones about it talk to a server of their own in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def pytest_configure() -> None:
    """Tiny models have no room for published token ids; their warnings say only that."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def pytest_addoption(parser) -> None:
    """`--full` runs every length, batch and dtype of the conformance suite."""
    parser.addoption("--full", action="store_true", help="every point of the conformance suite")


_OUTCOMES: dict[tuple[str, str], str] = {}


@pytest.fixture
def record_conformance():
    """Note what became of a model type, for the table at the end of the run."""

    def record(mapping, model_type, outcome):
        _OUTCOMES[mapping, model_type] = outcome

    return record


def pytest_terminal_summary(terminalreporter) -> None:
    """The conformance table: model types of each mapping, by outcome."""
    if not _OUTCOMES:
        return
    terminalreporter.section("conformance with transformers")
    for mapping in sorted({mapping for mapping, _ in _OUTCOMES}):
        here = {name: outcome for (place, name), outcome in _OUTCOMES.items() if place == mapping}
        counts = Counter(here.values())
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        terminalreporter.write_line(f"{mapping}: {len(here)} types: {told}")
        for name, outcome in sorted(here.items()):
            if outcome != "exact":
                terminalreporter.write_line(f"  {name}: {outcome}")
