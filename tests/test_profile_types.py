"""Every model type that transformers generates with is profiled, or refused with a reason."""

import json

import pytest
import torch
import zoo
from huggingface_hub.errors import StrictDataclassError

from kvcalc.errors import UnsupportedError
from kvcalc.measure.models import load_model
from kvcalc.measure.profile import profile
from kvcalc.measure.workload import Workload
from kvcalc.strategies import load_strategies

STRATEGIES = "dynamic,static,snapkv:budget=64,window=2"
"""The last keeps all of so short a prompt, and attends through a function of ours."""

WORKLOAD = Workload(9, 2, batch=1, repeats=1, warmup=0, seed=0)


def picking_all(config):
    """With an indexer that picks all tokens: among equals it would pick by chance."""
    found = {
        key: picking_all(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return found | ({"index_topk": 64} if "index_topk" in found else {})


@pytest.mark.parametrize(("mapping", "model_type"), sorted(zoo.model_types()))
def test_every_type_is_profiled_or_refused(mapping, model_type, tmp_path):
    """Its growing cache holds what is predicted, whatever its config looks like, and so do one in
    place and one that evicts nothing, with the same answers; what cannot be run alone is refused
    before anything is measured, and nothing else fails.
    """
    if (mapping, model_type) in zoo.NOT_BUILDABLE:
        pytest.skip(zoo.NOT_BUILDABLE[mapping, model_type])
    try:
        case = next(iter(zoo.cases(mapping, model_type)))
    except (StrictDataclassError, TypeError, ValueError) as error:
        pytest.skip(f"this release makes no configuration without its parts: {error}"[:99])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(picking_all(case.config)))
    try:
        loaded = load_model(
            str(path),
            weights="random",
            num_layers=None,
            dtype="fp32",
            device=torch.device("cpu"),
            seed=0,
            revision=None,
        )
    except UnsupportedError as error:
        pytest.skip(str(error))
    full, *others = profile(loaded, load_strategies([STRATEGIES]), WORKLOAD)
    assert full["status"] == "ok", full["reason"]
    for row in others:
        assert row["status"] in ("ok", "refused"), row["reason"]
        if row["status"] == "ok":
            assert row["fidelity"]["max_logit_difference"] < 1e-4, row["strategy"]
