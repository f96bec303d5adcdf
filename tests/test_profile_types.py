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

WORKLOAD = Workload(9, 2, batch=1, repeats=1, warmup=0, seed=0)


@pytest.mark.parametrize(("mapping", "model_type"), sorted(zoo.model_types()))
def test_every_type_is_profiled_or_refused(mapping, model_type, tmp_path):
    """Its growing and its static cache hold what is predicted, whatever its config looks like;
    what cannot be run alone is refused before anything is measured, and nothing else fails.
    """
    if (mapping, model_type) in zoo.NOT_BUILDABLE:
        pytest.skip(zoo.NOT_BUILDABLE[mapping, model_type])
    try:
        case = next(iter(zoo.cases(mapping, model_type)))
    except (StrictDataclassError, TypeError, ValueError) as error:
        pytest.skip(f"this release makes no configuration without its parts: {error}"[:99])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(case.config))
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
    rows = list(profile(loaded, load_strategies(["dynamic,static"]), WORKLOAD))
    assert rows[0]["status"] == "ok", rows[0]["reason"]
    assert rows[1]["status"] in ("ok", "refused"), rows[1]["reason"]
