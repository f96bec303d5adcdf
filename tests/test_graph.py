"""Decode steps to be captured: on the CPU, with a stand-in for capture that is as strict."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import build, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from kvcalc.measure import graph
from kvcalc.measure.graph import GraphedDecode, decode_mode, why_eager
from kvcalc.strategies import load_strategy

PROMPT, STEPS = 7, 5

NOT_CAPTURABLE = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "lift_fresh"}
"""Operations that wait for the device, or copy numbers to it from memory that is not pinned."""


class AsStrictAsCapture(TorchDispatchMode):
    """Refuses what a capturing CUDA stream refuses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Look at an operation before it is run."""
        name = func.overloadpacket.__name__
        if name in NOT_CAPTURABLE:
            msg = f"operation not permitted when stream is capturing: {name}\nmore"
            raise RuntimeError(msg)
        return func(*args, **(kwargs or {}))


def strict_capture(step, rewind):
    """Runs the step once as capture would, and undoes it; repeating is running it."""
    with AsStrictAsCapture():
        step()
    rewind()
    return step


def decoded(model, *, capture=None, graphed=True, batch=2):
    """Logits of STEPS steps after a prompt in a static cache with no row to spare, and how."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 64, (batch, PROMPT + STEPS), generator=generator)
    prompt, *steps = tokens.to(model.device).split([PROMPT] + [1] * STEPS, dim=1)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS)
    with torch.inference_mode():
        arguments = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        last = model(input_ids=prompt, **arguments).logits[:, -1]
        if graphed:
            decode = GraphedDecode(model, cache, last, capture=capture)
            return torch.stack([decode.step(step) for step in steps]), decode.mode
        logits = [model(input_ids=step, **arguments).logits[:, -1] for step in steps]
    return torch.stack(logits), None


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
}


LONGROPE_ON_DEVICE = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.21"),
    reason="before 5.21 longrope_frequency_update reads the position back to decide in Python",
)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        pytest.param("llama", {"rope_parameters": LONGROPE}, marks=LONGROPE_ON_DEVICE),
        ("qwen3", {}),
        ("gemma", {}),
        ("olmo2", {}),
        ("granite", {}),
        ("mixtral", {"sliding_window": None}),
        ("deepseek_v3", {}),
    ],
)
def test_repeated_steps_are_those_of_an_eager_static_cache(model_type, overrides):
    """A step reads nothing back from the device and makes nothing of host numbers, so that it can
    be captured; repeating it gives the logits of eager steps, and every row of the cache is used.
    """
    model = build(tiny_config(model_type, **overrides))
    found, mode = decoded(model, capture=strict_capture)
    assert mode == "CUDA graph"
    expected, _ = decoded(model, graphed=False)
    assert torch.equal(found, expected)


def test_logits_are_the_callers_own():
    """The next step does not overwrite them."""
    found, _ = decoded(build(tiny_config("llama")), capture=strict_capture)
    assert len({float(step[0, 0]) for step in found}) == STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, nothing is captured")
@pytest.mark.parametrize(
    "rope_parameters", [None, pytest.param(LONGROPE, marks=LONGROPE_ON_DEVICE)]
)
def test_replayed_steps_are_those_of_an_eager_static_cache(rope_parameters):
    """On a GPU, by a real graph."""
    model = build(tiny_config("llama", rope_parameters=rope_parameters)).to("cuda")
    found, mode = decoded(model)
    assert mode == "CUDA graph"
    expected, _ = decoded(model, graphed=False)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_step_that_cannot_be_captured_is_run_eagerly():
    """Dynamic RoPE reads the position; the reason is told in one line and nothing was lost."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = build(tiny_config("llama", rope_parameters=rope))
    found, mode = decoded(model, capture=strict_capture)
    assert mode.startswith("eager (capture failed: operation not permitted")
    assert "\n" not in mode
    assert torch.equal(found, decoded(model, graphed=False)[0])


def test_a_capture_that_breaks_off_leaves_the_cache_as_it_was():
    """Also when steps had run before."""

    def broken(step, rewind):
        step()
        msg = "out of memory"
        raise RuntimeError(msg)

    model = build(tiny_config("llama"))
    found, mode = decoded(model, capture=broken)
    assert mode == "eager (capture failed: out of memory)"
    assert torch.equal(found, decoded(model, graphed=False)[0])


def test_without_cuda_steps_are_eager():
    """Nothing is captured on a CPU: replaying a CUDA graph there would do nothing."""
    model = build(tiny_config("llama"))
    found, mode = decoded(model)
    assert mode == "eager (no CUDA on cpu)"
    assert torch.equal(found, decoded(model, graphed=False)[0])


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3_next", "mistral"])
def test_layers_that_count_in_python_are_not_captured(model_type):
    """Windows and states are eager, whatever would capture them."""
    model = build(tiny_config(model_type))
    found, mode = decoded(model, capture=pytest.fail)
    assert mode.startswith("eager (")
    assert torch.equal(found, decoded(model, graphed=False)[0])


def test_the_mode_is_known_beforehand(monkeypatch):
    """It names what stands in the way: the strategy, the device, the model or its layers."""
    cpu, cuda = (
        SimpleNamespace(model=build(tiny_config("llama")), device=torch.device(name))
        for name in ("cpu", "cuda")
    )
    assert decode_mode(cpu, load_strategy("int4")) == (
        "eager (the cache of int4 is not written in place)"
    )
    assert decode_mode(cpu, load_strategy("static")) == "eager (no CUDA on cpu)"
    assert decode_mode(cuda, load_strategy("static")) == graph.GRAPH
    cache = StaticCache(config=cuda.model.config, max_cache_len=1)
    monkeypatch.setattr(type(cuda.model), "_can_compile_fullgraph", False)
    assert why_eager(cuda.model, cache) == "LlamaForCausalLM decides on values in Python"


def test_capture_warms_up_on_its_own_stream_and_captures_once(monkeypatch):
    """The order of calls on CUDA: warm-up steps, each undone, then one step into the graph."""
    calls = []

    class Stand:
        def __init__(self, name="stream"):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            calls.append(f"enter {self.name}")

        def __exit__(self, *error):
            calls.append(f"leave {self.name}")

        def replay(self):
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stand)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stand("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Stand("graph"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: graph)
    replay = graph.cuda_capture(lambda: calls.append("step"), lambda: calls.append("rewind"))
    replay()
    assert calls == [
        *("stream waits for current", "enter stream"),
        *["step", "rewind"] * graph.WARM_UPS,
        *("leave stream", "current waits for stream"),
        *("enter graph", "step", "leave graph", "replay"),
    ]
