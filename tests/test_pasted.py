"""Command lines of serving engines, as people paste them."""

import pytest

import kvcalc
from kvcalc.engines import load_engine
from kvcalc.pasted import STARTS, Pasted, read_command

COMMANDS = {
    "vllm serve Qwen/Qwen3-32B --tensor-parallel-size 2 --max-model-len 40960 "
    "--kv-cache-dtype fp8 --gpu-memory-utilization 0.92": Pasted(
        "vllm",
        "Qwen/Qwen3-32B",
        {"tp": "2", "seq": "40960", "kv_dtype": "fp8"},
        {},
        {"gpu_memory_utilization": "0.92"},
    ),
    "HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=0,1 /usr/bin/python3.12 -m sglang.launch_server "
    "--model-path org/name --tp=2 --mem-fraction-static 0.8 --disable-radix-cache": Pasted(
        "sglang",
        "org/name",
        {"tp": "2"},
        {"disable_radix_cache": "true"},
        {"mem_fraction_static": "0.8"},
    ),
    "./build/bin/llama-server -m model.gguf -c 32768 -np 4 -ngl 99 -ctk q8_0 -fa on "
    "--swa-full": Pasted(
        "llama.cpp",
        "model.gguf",
        {},
        {
            "n_ctx": "32768",
            "n_seq_max": "4",
            "type_k": "q8_0",
            "flash_attn": "true",
            "swa_full": "true",
        },
        {},
    ),
    "trtllm-serve org/name --tp_size 2 \\\n --max_seq_len 8192": Pasted(
        "tensorrt-llm", "org/name", {"tp": "2", "seq": "8192"}, {}, {}
    ),
}


@pytest.mark.parametrize(("command", "said"), COMMANDS.items())
def test_a_command_says_what_it_says(command, said):
    """Model, size, options and budget are told apart; what does not concern the cache goes."""
    assert read_command(command) == said


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("vllm serve org/name --new-flag 3 --other", "--new-flag, --other"),
        ("vllm serve --port 80", "no model"),
        ("vllm serve org/name --max-model-len", "no value"),
        ('vllm serve "org/name', "cannot be read"),
        ("ollama run llama3", "begins with none of"),
        ("", "begins with none of"),
    ],
)
def test_what_is_not_understood_is_named(command, reason):
    """A flag that is neither translated nor harmless is named, and so is any other trouble."""
    with pytest.raises(kvcalc.InputError, match=reason):
        read_command(command)


def test_every_option_that_is_translated_exists():
    """Each flag's target is an option of its engine or a parameter of size."""
    for dialect in {id(dialect): dialect for _, dialect in STARTS}.values():
        options = load_engine(dialect.engine).OPTIONS
        assert not dialect.flags.keys() & dialect.harmless.keys()
        for target in dialect.flags.values():
            part, _, name = target.partition("=")[0].partition(".")
            assert part in {"model", "point", "options", "budget"}
            assert part != "options" or name in options, target
