"""What is left of a GPU for the cache: held against what engines logged when they started."""

import datetime
import json
import statistics
from itertools import product

import pytest

import kvcalc
from kvcalc import api, cli
from kvcalc.budget.sglang import prefill_sizes
from kvcalc.budget.vllm import capture_sizes
from kvcalc.hardware import Figure, load_gpu
from kvcalc.units import GIB

H100 = "h100-sxm-80gb"

V19 = {"estimate_cudagraphs": False}
V11 = {"estimate_cudagraphs": False, "sampler_sort": True}

LOGGED = [
    # model, ranks, utilisation, options, GiB of activations and of available cache memory
    ("meta-llama/Llama-3.1-8B-Instruct", 1, 0.95, V19, 1.89, 58.11),
    ("meta-llama/Llama-3.1-8B-Instruct", 4, 0.95, V19, 1.89, None),
    ("Qwen/Qwen2.5-7B-Instruct", 1, 0.95, V19, 2.21, 58.53),
    ("Qwen/Qwen2.5-7B-Instruct", 2, 0.95, V19, 2.21, None),
    ("Qwen/Qwen3-8B", 1, 0.95, V19, 2.21, None),
    ("Qwen/Qwen3-14B", 1, 0.95, V19, 2.23, 45.34),
    ("microsoft/phi-4", 1, 0.95, V19, 1.52, None),
    ("google/gemma-2-2b-it", 1, 0.95, V19, 3.62, 66.47),
    ("google/gemma-3-4b-it", 1, 0.95, V19, 3.89, None),
    ("google/gemma-3-27b-it", 1, 0.95, V19, 3.99, None),
    ("openai/gpt-oss-20b", 2, 0.9, V19, 2.87, 59.32),
    ("Qwen/Qwen3-14B", 1, 0.95, V11, 5.64, 41.94),
    ("openai/gpt-oss-20b", 1, 0.9, V11, 7.38, 50.28),
    ("meta-llama/Llama-3.1-8B-Instruct", 1, 0.9, V11, 4.76, 51.38),
    ("Qwen/Qwen3-0.6B", 1, 0.9, V11, 5.56, 64.45),
    ("Qwen/Qwen3-32B", 1, 0.9, V11, 5.64, 4.45),
]
"""What vLLM 0.19.0 logged on an H100 (llm-d-planner d3121e05, accuracy/results/v0.19.0), and 0.15
and 0.11 (the same, and llm-d-benchmark 25933486, config_explorer): 8,192 tokens a step, 1,024
requests; the graphs came on top.
"""


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def nf4(*kept):
    """Bitsandbytes with double quantisation, but for the head and the modules named."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *kept],
    }


def step(tokens, requests, **options):
    """The options of a start."""
    return {"max_num_batched_tokens": tokens, "max_num_seqs": requests, **options}


BF16 = {"torch_dtype": "bfloat16"}

STARTED = [
    # model, what its config has else, GPU, GiB that CUDA told, share, printed GiB, the rest
    ("meta-llama/Llama-3.2-3B-Instruct", {}, "t4", 14.741, 0.89386, 6.22,
     {"options": step(2048, 192, **V11)}),
    ("meta-llama/Llama-3.1-8B-Instruct", {"quantization_config": nf4("model.layers.1.mlp")},
     "t4", 14.741, 0.5943, 2.39, {"options": step(1024, 160, **V11)}),
    ("mistralai/Mistral-7B-Instruct-v0.3", {"quantization_config": nf4()},
     "rtx-4090", 23.635, 0.5893, 9.53, {"options": step(1024, 224, **V11)}),
    ("microsoft/phi-4", {"quantization_config": nf4(), "model_type": "llama"},
     "t4", 14.741, 0.6952, 1.24, {"options": step(512, 128, **V11)}),
    ("Qwen/Qwen2.5-3B-Instruct",
     BF16 | {"tie_word_embeddings": True, "quantization_config": nf4(
         "model.layers.2.mlp", "model.layers.3.mlp", "model.layers.30.mlp")},
     "t4", 14.741, 0.4966, 4.01, {"options": step(1024, 192, **V11)}),
    ("meta-llama/Llama-3.2-1B-Instruct", {"quantization_config": FP8},
     "l4", 22.161, 0.866151, 17.2, {"options": step(2048, 288, **V11)}),
    ("Qwen/Qwen3-8B", {"quantization_config": FP8},
     "l4", 22.161, 0.866151, 8.98, {"options": step(2048, 224, **V11)}),
    ("Qwen/Qwen3-14B", {}, "a100-sxm-40gb", None, 0.9, 6.51, {"options": V11}),
    ("Qwen/Qwen3-235B-A22B", {"quantization_config": FP8},
     H100, None, 0.9, 8.11, {"tp": 4, "options": V11}),
    ("meta-llama/Llama-3.1-8B", {}, "rtx-a5000", None, 0.9, 5.29,
     {"options": V19 | {"enforce_eager": True}}),
    ("meta-llama/Llama-3.1-8B-Instruct", {}, H100, None, 0.9, 51.63, {"options": V11}),
    ("nvidia/Qwen3.6-35B-A3B-NVFP4", {"quantization_config": None},
     "gb10-dgx-spark", 119.63, 0.95, 47.55, {"options": step(2048, 256)}),
    ("nvidia/Qwen3.5-122B-A10B-NVFP4", {}, "jetson-agx-thor", 122.82, 0.85, 24.05,
     {"weights": "75.17 GiB", "kv_dtype": "fp8", "options": step(2048, 8, **V19)}),
    ("google/gemma-4-26B-A4B-it", BF16, "jetson-agx-thor", 122.82, 0.85, 51.62,
     {"kv_dtype": "fp8", "options": step(2048, 256, **V19)}),
    ("google/gemma-4-26B-A4B-it", BF16, "gb10-dgx-spark", 119.63, 0.8, 44.03,
     {"options": step(4096, 256)}),
    ("Qwen/Qwen3-235B-A22B", {"quantization_config": FP8},
     H100, None, 0.93, 16.47, {"engine": "sglang", "tp": 4}),
    ("Qwen/Qwen2.5-1.5B-Instruct", BF16, "gb10-dgx-spark", 119.63, 0.4, 41.67,
     {"engine": "sglang"}),
    ("Qwen/Qwen2.5-1.5B-Instruct", BF16, "gb10-dgx-spark", 119.63, 0.4, 41.45,
     {"engine": "sglang"}),
    ("google/gemma-4-31B-it", BF16 | {"quantization_config": AWQ},
     "rtx-3090", None, 0.92, 9.93, {"engine": "sglang", "tp": 2, "kv_dtype": "fp8"}),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", BF16 | {"tie_word_embeddings": True},
     "rtx-4070-super", None, 0.9, 9.06, {"engine": "tensorrt-llm"}),
]  # fmt: skip
"""Starts of vLLM 0.7 to 0.20, SGLang and TensorRT-LLM on nine kinds of device, with the memory that
they printed for the cache: unslothai/notebooks (T4, L4, 4090), vllm-project/vllm issues 21348 and
others, jethac/dgx-spark-hijinks and djangodevreng/dgx-spark-benchmarks (GB10).
"""


def started(model, own, gpu, total, share, rest):
    """What `fit` says of such a start."""
    config = dict(api.read_model(model).config) | own
    if "gemma-4-31B" in model:
        config["text_config"] = config["text_config"] | {"enable_moe_block": False}
    device = load_gpu(gpu)
    if total is not None:
        told = Figure(round(total * GIB), "the log", datetime.date(2026, 11, 26))
        device = device._replace(cuda_bytes=told)
    return kvcalc.fit(config, gpu=device, share=share, seq=512, **rest)


def budget_of(report):
    """The terms by their names, GiB taken away."""
    return {line.name.split(" /")[0]: line for line in report.budget}


@pytest.mark.parametrize(("model", "tp", "share", "options", "activations", "memory"), LOGGED)
def test_estimates_are_what_vllm_logged(model, tp, share, options, activations, memory):
    """Activations within 7 % and their range, the cache's memory within 2 % or 0.6 GiB, and its
    range.
    """
    report = kvcalc.fit(model, gpu=H100, share=share, tp=tp, seq=4096, options=options)
    term = budget_of(report)["activations"]
    assert -term.num_bytes / GIB == pytest.approx(activations, rel=0.07)
    assert term.least_bytes <= -activations * GIB <= term.most_bytes
    if memory is not None:
        assert report.available_bytes / GIB == pytest.approx(memory, rel=0.02, abs=0.6)
        least, most = report.available_range
        assert least <= memory * GIB <= most


def test_starts_on_many_devices_are_met():
    """Each of twenty is met within 10 %, half of them within 4 %."""
    errors = [
        started(model, own, gpu, total, share, rest).available_bytes / GIB / printed - 1
        for model, own, gpu, total, share, printed, rest in STARTED
    ]
    assert len(errors) == 20
    assert max(map(abs, errors)) <= 0.1
    assert statistics.median(map(abs, errors)) <= 0.04


def test_an_encoder_widens_the_range():
    """An excerpt of a config leaves the encoder out: vLLM's 19.53 GiB for Gemma 3 27B lie within
    the range, and files, which hold it, need no such term.
    """
    report = kvcalc.fit("google/gemma-3-27b-it", gpu=H100, share=0.95, seq=4096, options=V19)
    least, most = report.available_range
    assert least <= 19.53 * GIB <= report.available_bytes <= most
    assert budget_of(report)["encoder"].most_bytes == 0


def test_a_server_sets_options_by_the_device():
    """`vllm serve` samples 1,024 requests of 8,192 tokens on an H100, 256 of 2,048 on an L4; what
    the user says goes before that.
    """
    sources = {
        gpu: budget_of(kvcalc.fit("Qwen/Qwen3-0.6B", gpu=gpu, seq=4096))["activations"].source
        for gpu in (H100, "l4", "a100-sxm-80gb", "b200")
    }
    assert "8,192 tokens, 1,024" in sources[H100]
    assert "2,048 tokens, 256" in sources["l4"]
    assert "2,048 tokens, 256" in sources["a100-sxm-80gb"]
    assert "16,384 tokens, 1,024" in sources["b200"]
    told = kvcalc.fit("Qwen/Qwen3-0.6B", gpu=H100, seq=4096, options={"max_num_seqs": 64})
    assert "8,192 tokens, 64" in budget_of(told)["activations"].source


def test_captured_batches_are_those_that_vllm_logs():
    """Up to 512 there are 51, of which 35 hold 256 requests at most."""
    assert len(capture_sizes(512)) == 51
    assert sum(size <= 256 for size in capture_sizes(512)) == 35
    assert capture_sizes(16) == [1, 2, 4, 8, 16]


def test_sglangs_share_is_its_rule():
    """42, 50, 58 and 74 prefill graphs; 0.83 of an H100, and of a 4090 what 4,096 tokens, 48
    requests and 50 graphs leave. A share that is given goes before the rule.
    """
    assert [len(prefill_sizes(most)) for most in (2048, 4096, 8192, 16384)] == [42, 50, 58, 74]
    report = kvcalc.fit("meta-llama/Llama-3-8B", gpu=H100, engine="sglang", seq=4096)
    assert "mem_fraction_static 0.83:" in budget_of(report)["activations, graphs"].source
    small = kvcalc.fit("Qwen/Qwen3-0.6B", gpu="rtx-4090", engine="sglang", seq=4096)
    reserved = 512 + 1.5 * 4096 + 2 * 48 + 8 * 50 + 128
    share = round((24_564 - reserved) / 24_564, 3)
    assert f"mem_fraction_static {share}:" in budget_of(small)["activations, graphs"].source
    given = kvcalc.fit("Qwen/Qwen3-0.6B", gpu="rtx-4090", engine="sglang", share=0.5, seq=4096)
    assert given.available_bytes < small.available_bytes


@pytest.mark.parametrize(
    ("engine", "tp", "pp"),
    [
        *product(("vllm", "sglang", "tensorrt-llm"), (1, 2), (1, 3)),
        ("llama.cpp", 1, 1),
    ],
)
def test_estimates_have_a_range_and_say_their_rule(engine, tp, pp):
    """Every estimate lies within its range, says its rule, and the whole lies between the ends."""
    report = kvcalc.fit("Qwen/Qwen3-8B", gpu=H100, engine=engine, tp=tp, pp=pp, seq=4096)
    estimates = [line for line in report.budget if line.provenance == "estimate"]
    assert estimates
    for line in estimates:
        assert line.least_bytes <= line.num_bytes <= line.most_bytes < 0
        assert line.source
    least, most = report.available_range
    assert least < report.available_bytes < most
    ends = [sum(line.bounds[end] for line in report.budget) for end in (0, 1)]
    assert [least, most] == [max(end, 0) for end in ends]
    assert report.available_bytes == max(sum(line.num_bytes for line in report.budget), 0)
    fewest, largest = report.max_concurrency_range
    assert fewest <= report.max_concurrency <= largest


def test_what_is_known_has_no_range():
    """With memory that is given, or a reserve on one device whose total is known, nothing is
    estimated, and the answer is sure.
    """
    given = kvcalc.fit("Qwen/Qwen3-8B", kv_memory="30GiB", seq=4096)
    reserved = kvcalc.fit("Qwen/Qwen3-8B", gpu=H100, reserve="3GiB", seq=4096)
    for report in (given, reserved):
        assert report.sure
        assert report.available_range == (report.available_bytes,) * 2
        assert report.max_tokens_range == (report.max_tokens,) * 2


def test_a_stage_with_more_layers_is_counted():
    """61 layers in ten stages are seven in the longest, which carries more than a tenth."""
    report = kvcalc.fit(
        "deepseek-ai/DeepSeek-V3", gpu="a100-sxm-80gb", pp=10, seq=4096, reserve="2GiB"
    )
    weights = budget_of(report)["weights"]
    assert -weights.num_bytes > report.weights_bytes * 7 / 61 * 0.97
    assert weights.least_bytes < weights.num_bytes


def test_an_answer_that_estimates_leave_open_says_so(capsys, monkeypatch):
    """Between the ends of the range a deployment fits by the estimates alone."""
    monkeypatch.setenv("COLUMNS", "80")
    report = kvcalc.fit("Qwen/Qwen3-14B", gpu=H100, seq="8k")
    fewest, most = report.max_concurrency_range
    assert fewest < report.max_concurrency < most
    command = ["fit", "Qwen/Qwen3-14B", "--gpu", H100, "--seq", "8k", "--concurrency"]
    for concurrency, status, said in (
        (fewest, 0, "left\n"),
        (report.max_concurrency, 3, "left, but not if estimates are at their most"),
        (most, 3, "missing, but not if estimates are at their least"),
        (most + 1, 1, "missing\n"),
    ):
        assert cli.run([*command, str(concurrency)]) == status
        assert said in capsys.readouterr().out
    assert cli.run([*command, str(most), "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert shown["sure"] is False
    assert shown["max_concurrency_range"] == [fewest, most]


def test_what_cannot_be_estimated_is_refused():
    """Without a width that an estimate needs the reserve is asked for, and with it the rest goes
    on; an engine without a rule is refused.
    """
    config = dict(api.read_model("meta-llama/Llama-3-8B").config)
    del config["vocab_size"]
    with pytest.raises(kvcalc.KvcalcError):
        kvcalc.fit(config, gpu=H100, seq=4096)
    with pytest.raises(kvcalc.UnsupportedError, match="no driver's figure of the memory of apple"):
        kvcalc.fit("meta-llama/Llama-3-8B", gpu="apple-m1", seq=4096)
    with pytest.raises(kvcalc.UnsupportedError, match="engine model has no rule"):
        kvcalc.fit("meta-llama/Llama-3-8B", gpu=H100, engine="model", seq=4096)
    assert load_gpu(H100).total_bytes is not None
