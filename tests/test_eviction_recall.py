"""What evicting strategies still know: recall of the wired model is as published, in kind.

SnapKV keeps what the end of a prompt asks for and loses what it does not (arXiv:2404.14469; the
leaderboard of kvpress tells question-aware from question-unseen runs apart); windows keep what lies
in them, which is the budget's share of needles anywhere and all of those at the end.
"""

from functools import cache

import pytest
import torch

from kvcalc.families import describe
from kvcalc.measure import retrieval
from kvcalc.measure.feeds import needle_feed
from kvcalc.measure.models import WIRED, LoadedModel
from kvcalc.measure.peak import peak_memory
from kvcalc.measure.session import Session, few_objects, undisturbed
from kvcalc.measure.workload import Workload
from kvcalc.origin import Origin
from kvcalc.strategies import load_strategy

TOKENS, BATCH = 640, 4

SHARES = (25, 12.5, 6.25)

DEPTHS = [(place + 0.5) / 8 for place in range(8)]


@pytest.fixture(autouse=True, scope="module")
def few():
    """Each run collects garbage, which need not go through all that other tests have made."""
    with few_objects():
        yield


@cache
def wired(**knobs):
    """The wired model, as a profile loads it."""
    config = retrieval.retrieval_config(**knobs)
    origin = Origin(requested="built-in", resolved="built-in", kind="built-in", detail="")
    model = retrieval.build(config, "cpu")
    cpu = torch.device("cpu")
    return LoadedModel("built-in", model, describe(config), origin, WIRED, "fp32", cpu)


def recall(spec, *, depth=0.5, ask=True):
    """Fraction of prompts whose needle is found in the first decode step."""
    loaded, chosen = wired(), load_strategy(spec)
    workload = Workload(TOKENS, 1, BATCH, 1, 0, 0, depth=depth)
    feed = needle_feed(loaded, workload, ask=ask)
    with undisturbed(loaded, chosen):
        session = Session(loaded, chosen, workload)
        session.prefill(feed.prompt)
        return retrieval.recall(session.decode(feed.steps[0]), feed.answers)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_what_the_prompt_asks_for_is_found(name, share):
    """With the question in the prompt, recall is that of the full cache at a sixteenth of it."""
    assert recall(f"{name}:budget={share}%") == recall("dynamic") == 1


@pytest.mark.parametrize("share", [12.5, 6.25])
@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_what_comes_later_is_lost(name, share):
    """With a question that the prompt does not hold, the same strategies are near chance."""
    found = [recall(f"{name}:budget={share}%", depth=depth, ask=False) for depth in DEPTHS[1:-1]]
    assert sum(found) / len(found) <= 0.25
    assert recall("dynamic", ask=False) == 1


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["sink-window", "recency"])
def test_a_window_finds_its_share_of_needles(name, share):
    """A window finds the needles within it, about its share of those anywhere, and every needle at
    the end; a question in the prompt changes nothing.
    """
    spec = f"{name}:budget={share}%"
    found = sum(recall(spec, depth=depth) for depth in DEPTHS) / len(DEPTHS)
    assert abs(found - share / 100) <= 1 / len(DEPTHS)
    for ask in (True, False):
        assert recall(spec, depth=1, ask=ask) == 1


def test_a_prefill_that_compresses_peaks_below_the_full_cache():
    """A prefill of 4k tokens under SnapKV at an eighth peaks, all activations counted, below the
    bytes of the full cache alone.
    """
    loaded = wired(num_layers=8, num_kv_heads=8)
    workload = Workload(4096, 1, 1, 1, 0, 0, chunk=4096)
    feed = needle_feed(loaded, workload, ask=True)
    full_bytes = 8 * 8 * 4096 * 2 * 64 * 4
    peaks = {}
    for spec in ("dynamic", "snapkv:budget=12.5%"):
        chosen = load_strategy(spec)
        with undisturbed(loaded, chosen), peak_memory(loaded.device) as peak:
            Session(loaded, chosen, workload).prefill(feed.prompt)
        peaks[chosen.name] = peak.num_bytes
    assert peaks["snapkv"] < full_bytes < peaks["dynamic"]
