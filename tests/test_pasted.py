"""Command lines of serving engines, as people paste them."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcalc
from kvcalc import cli
from kvcalc.engines import load_engine
from kvcalc.pasted import MAX_CHARACTERS, Pasted, command_text, read_command
from kvcalc.pasted._flags import STARTS
from kvcalc.pasted.deployment import pasted_deployment
from kvcalc.units import GIB

MODEL = "meta-llama/Llama-3-8B"
SERVE = f"vllm serve {MODEL} --max-model-len 8192"

COMMANDS = {
    "vllm serve Qwen/Qwen3-32B --tensor-parallel-size 2 --max-model-len 40960 "
    "--kv-cache-dtype fp8 --gpu-memory-utilization 0.92": Pasted(
        "vllm",
        "Qwen/Qwen3-32B",
        {"tp": "2", "kv_dtype": "fp8"},
        {"max_model_len": "40960"},
        {"share": "0.92"},
        {},
        [],
        {},
        [],
    ),
    "vllm serve org/name --tensor_parallel_size=2 --max-model-len 32k --kv_cache_dtype auto "
    "--max-num-batched-tokens 8K --kv-cache-memory-bytes 20G --dtype half -q awq -O3 -O 2 "
    "--swap-space 4 --no-enable-log-requests --served-model-name a b --seed -1 "
    "--compilation-config '{\"level\": 3}' --limit-mm-per-prompt.image 2": Pasted(
        "vllm",
        "org/name",
        {"tp": "2", "kv_dtype": "auto"},
        {"max_model_len": "32000", "max_num_batched_tokens": "8192"},
        {"kv_memory": str(20 * GIB)},
        {"dtype": "half", "quantization": "awq"},
        [],
        {},
        [],
    ),
    "HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=0,1 /usr/bin/python3.12 -m sglang.launch_server "
    "--model-path org/name --tp=2 --mem-fraction-static 0.8 --disable-radix-cache": Pasted(
        "sglang",
        "org/name",
        {"tp": "2"},
        {"disable_radix_cache": "true"},
        {"share": "0.8"},
        {},
        [],
        {},
        [],
    ),
    "./build/bin/llama-server -m model.gguf -c 32768 -np 4 -fa -ngl 99 -ctk q8_0 "
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
        {"n_gpu_layers": "99"},
        [],
        {},
        [],
    ),
    "trtllm-serve org/name --tp_size 2 \\\n --max_seq_len 8192 --max_batch_size 64": Pasted(
        "tensorrt-llm",
        "org/name",
        {"tp": "2", "seq": "8192"},
        {},
        {"max_requests": "64"},
        {},
        [],
        {},
        [],
    ),
}


@pytest.mark.parametrize(("command", "said"), COMMANDS.items())
def test_a_command_says_what_it_says(command, said):
    """Model, size, options and budget are told apart; what does not concern the cache goes."""
    assert read_command(command)._replace(typed={}) == said


@pytest.mark.parametrize(
    "text",
    [
        "sudo -E nohup env A=b uv run vllm serve org/name -tp 2 > log.txt 2>&1 &",
        "#!/bin/sh\nset -e\nexport N=2 M=org/name  # don't\nexec vllm serve $M -tp ${N}\n",
        "vllm serve org/name \\\r\n  -tp 2 2>> 'a log' | tee x; echo done",
        'ARGS="--max-model-len 8192 -tp 2"; vllm serve org/name $ARGS',
        "ARGS=--enforce-eager; ARGS+=' -tp 2'\nEXTRA=\nvllm serve org/name ${ARGS} $EXTRA",
        "N=${N:-2}; vllm serve ${MODEL:=org/name} -tp $N --port ${PORT-80}",
        "MODEL=org/name; vllm serve ${MODEL:-other} -tp 2",
        "\ufeffvllm serve org/name -tp 2",
        'cd "$(dirname "$0")"; export D=`pwd`; L=(a b) # $(\nvllm serve org/name --port $(p) -tp 2',
        "A='vllm serve org/name'; exec $A -tp 2",
        "bash -lc 'cd /srv && vllm serve org/name -tp 2'",
        "docker run -p 80:80 --name llama-server vllm/vllm-openai:v0.9 --model org/name -tp 2",
        "docker run lmsysorg/sglang python3 -m sglang.launch_server --model org/name --tp 2",
        "sglang serve --model-path org/name --log-level '#1' --tp 2",
        "mpirun -n 2 trtllm-llmapi-launch trtllm-serve org/name --tp_size 2",
    ],
)
def test_a_wrapped_command_is_found(text):
    """Wrappers, containers, comments, redirections and variables of a script change nothing."""
    found = read_command(text)
    assert (found.model, found.point, found.doubts) == ("org/name", {"tp": "2"}, [])


def test_arguments_of_the_image_of_llama_cpp_are_its_servers():
    """The image needs no name of a program."""
    found = read_command("docker run ghcr.io/ggml-org/llama.cpp:server-cuda -m a.gguf -c 512")
    assert (found.engine, found.model) == ("llama.cpp", "a.gguf")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("vllm serve org/name --new-flag 3 --other", "--new-flag, --other"),
        ("vllm serve org/name --tensor-paralel-size 2", "did you mean --tensor-parallel-size"),
        ("vllm serve --port 80", "names none"),
        ("vllm serve org/name other", "names several"),
        ("vllm serve org/name --max-model-len", "no value"),
        ("vllm serve org/name --max-model-len --port 80", "no value"),
        ("vllm serve org/name --max-model-len 1.5K", "did you mean 1.5k"),
        ("vllm serve $MODEL", "is a variable"),
        ("vllm serve org/name\n  -tp 2", "lack a"),
        ("vllm serve org/a & sglang serve --model org/b", "2 servers' commands"),
        ("LLAMA_ARG_CTX_SIZE=512 llama-server -m a.gguf", "LLAMA_ARG_CTX_SIZE"),
        ('vllm serve "org/name', "cannot be read"),
        ("ollama run llama3", "no server's command"),
        ("serve.sh", "no such file"),
        ("", "no server's command"),
        (
            "vllm serve org/name -tp $(nvidia-smi -L | wc -l) --port 8",
            r"-tp '\$\(…\)': what a shell",
        ),
        ("vllm serve org/name --max-model-len $((8 * 1024))", "paste the command as the shell"),
        ("N=`nproc`; vllm serve org/name -tp $N", "paste the command as the shell"),
        ("A=(--max-model-len 8192\n-tp 2)\nvllm serve org/a ${A[@]}", "arrays are not read"),
        ("$(which vllm) serve org/name", "paste the command as the shell"),
        ("ARGS='-tp 2'; vllm serve org/name \"$ARGS\"", "do not concern the cache"),
        ("command: >\n  vllm serve org/name\n  --max-model-len 8192", "YAML.*'command:'"),
        ('services:\n  a:\n    command: ["vllm", "serve", "org/name"]', "YAML.*paste the"),
        ("- vllm\n- serve\n- org/name", "YAML.*paste the"),
        ('["vllm", "serve", "org/name"]', "JSON.*paste the"),
        ('FROM a\nCMD ["vllm", "serve", "org/name"]', "lists.*paste the"),
        (f"A={'a' * 9999}; vllm serve $A$A$A$A$A$A$A", "with its variables filled in"),
        ("vllm serve a " * MAX_CHARACTERS, "more than 65,536 characters"),
    ],
)
def test_what_is_not_understood_is_named(command, reason):
    """A flag that is neither translated nor harmless is named, and so is any other trouble."""
    with pytest.raises(kvcalc.InputError, match=reason):
        read_command(command)


WORDS = st.sampled_from(
    [
        *"\\'\"#$<>&|;()\n -=.{}*`[@]",
        *("$(", "A=(", "${A:-", "$A", "A=", "vllm serve ", "-tp ", "-O", "--dtype ", "--dp", "\0"),
    ]
)


@given(st.lists(WORDS | st.text(max_size=4), max_size=40).map("".join))
def test_any_text_is_read_or_refused_in_one_line(text):
    """Whatever is pasted, it is a command or an error of one line."""
    try:
        said = read_command(text).engine
    except kvcalc.InputError as error:
        said = str(error)
    assert said
    assert said.isprintable()


@pytest.mark.parametrize(
    ("flags", "settled", "reason"),
    [
        ("-dp 8", None, "each replica"),
        ("--speculative-config '{}'", None, "--option mtp=true"),
        ("--decode-context-parallel-size 2", None, "share the tokens"),
        ("--hf-overrides '{\"a\": 1}'", None, "config.json"),
        ("--config a.yaml", None, "not read"),
        ("--cpu-offload-gb 10", {"weights": "10GB"}, "give --weights"),
        ("--enable-lora --max-loras 4", {"reserve": "4GiB"}, "adapters"),
        ("--num-gpu-blocks-override 9", {"kv_memory": "1GiB"}, "--kv-memory"),
        ("-O0", {"reserve": "4GiB"}, "CUDA graphs"),
        ("--no-enable-chunked-prefill", {"options": {"max_num_batched_tokens": "8192"}}, "steps"),
        ("--quantization fp8", {"weights": "9GB"}, "quantised at load"),
        ("--dtype float32", {"weights": "33GB"}, "counted in bf16"),
    ],
)
def test_a_flag_that_decides_the_result_is_not_passed_over(flags, settled, reason):
    """It is refused in its own words, unless an option says what it decides."""
    with pytest.raises(kvcalc.InputError, match=reason):
        pasted_deployment(f"{SERVE} {flags}", gpu="h100-sxm-80gb")
    if settled:
        assert pasted_deployment(f"{SERVE} {flags}", **settled)[0] == MODEL


@pytest.mark.parametrize(
    "value",
    ["-dp 1", "--cpu-offload-gb 0", "-q none", "--dtype auto", "--mamba-ssm-cache-dtype auto"],
)
def test_a_value_that_changes_nothing_is_taken(value):
    """What a flag would do is what counts, not the flag."""
    assert pasted_deployment(f"{SERVE} {value}")[1]["seq"] == "8192"


def test_a_quantisation_that_the_config_declares_is_no_news():
    """Its weights are counted so; another one is refused."""
    model = "Qwen/Qwen3-30B-A3B-FP8"
    assert pasted_deployment(f"vllm serve {model} --quantization fp8")[0] == model
    with pytest.raises(kvcalc.InputError, match="declares fp8"):
        pasted_deployment(f"vllm serve {model} --quantization awq")


def test_the_dtype_is_that_of_the_cache():
    """`--dtype` decides the KV dtype unless the cache has one of its own."""
    assert pasted_deployment(f"{SERVE} --dtype half")[1]["kv_dtype"] == "fp16"
    deployment = pasted_deployment(f"{SERVE} --dtype half --kv-cache-dtype fp8")[1]
    assert deployment["kv_dtype"] == "fp8"
    assert pasted_deployment(f"{SERVE} --dtype half", kv_dtype="bf16")[1]["kv_dtype"] == "bf16"


def test_the_memory_that_a_command_gives_its_cache_counts(capsys):
    """`--kv-cache-memory-bytes` is all there is, and no GPU beside it is passed over."""
    command = f"{SERVE} --kv-cache-memory-bytes 20G"
    assert cli.run(["fit", "--from", command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache_bytes_per_rank"] == 20 * GIB
    with pytest.raises(kvcalc.InputError, match=r"--kv-cache-memory-bytes says.* leave --gpu"):
        pasted_deployment(command, gpu="l4")
    assert pasted_deployment(command, kv_memory="4GiB")[1]["kv_memory"] == "4GiB"


@pytest.mark.parametrize(
    ("flags", "longest"),
    [("--max-model-len 6K", 6144), ("", 8192), ("--max-model-len 6K --max-num-seqs 64", 6144)],
)
def test_a_shorter_request_leaves_vllm_its_own_longest(flags, longest):
    """What vLLM prints is for its `--max-model-len`, else the model's maximum, not `--seq`."""
    command = f"vllm serve {MODEL} {flags}"
    model, deployment, notes = pasted_deployment(command, seq="4k", kv_memory="20GiB")
    assert [("one request of 8,192" in note) for note in notes] == ([] if flags else [True])
    short = kvcalc.fit(model, **deployment)
    long = kvcalc.fit(model, seq=longest, kv_memory="20GiB")
    assert (short.seq_tokens, short.printed) == (4096, long.printed)
    model, deployment, _ = pasted_deployment(command, kv_memory="20GiB")
    assert kvcalc.fit(model, **deployment).seq_tokens == longest


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (SERVE, "--seq 9,000: .* 8,192 tokens, its --max-model-len"),
        (f"vllm serve {MODEL}", "8,192 tokens, the model's own maximum"),
        (f"vllm serve {MODEL} --max-model-len auto", "8,192 tokens, the model's own maximum"),
        (f"sglang serve --model {MODEL} --context-length 8000", "its --context-length"),
        (f"sglang serve --model {MODEL}", "the model's own maximum"),
        (f"trtllm-serve {MODEL} --max_seq_len 8000", "8,000 tokens, its --max-seq-len"),
        (f"llama-server -m {MODEL} -c 16384 -np 2", "do not hold 1 × 9,000 tokens"),
    ],
)
def test_a_request_is_no_longer_than_the_server_takes(command, reason):
    """A longer `--seq` is refused, by what bounds it."""

    def refused():
        model, deployment, _ = pasted_deployment(command, seq=9000, kv_memory="20GiB")
        kvcalc.fit(model, **deployment)

    with pytest.raises(kvcalc.InputError, match=reason):
        refused()


def test_where_scaling_changes_the_maximum_the_models_own_bounds_nothing():
    """The server's longest request is not known then."""
    command = f"vllm serve {MODEL} --rope-scaling '{{\"factor\": 4}}'"
    assert "max_model_len" not in pasted_deployment(command, seq="16k")[1]["options"]


@pytest.mark.parametrize("value", ["auto", "-1"])
def test_a_length_that_vllm_fits_is_left_to_it(value):
    """No longest request is set, and a note says what is printed instead."""
    command = f"vllm serve {MODEL} --max-model-len {value}"
    _, deployment, notes = pasted_deployment(command)
    assert "max_model_len" not in deployment["options"]
    assert "seq" not in deployment
    assert "fits --max-model-len" in notes[0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization must be"),
        ("-tp two", "-tp 'two' is not"),
        ("--pipeline-parallel-size 0", "--pipeline-parallel-size must be at least 1"),
        ("--max-model-len x", "--max-model-len 'x' is no"),
        ("--kv-cache-memory-bytes x", "--kv-cache-memory-bytes 'x'"),
        ("--kv-cache-dtype x", "--kv-cache-dtype: unknown dtype 'x'"),
        ("--block_size x", "--block-size 'x' is no"),
        ("--max-num-seqs -1", "--max-num-seqs '-1' is no"),
        ("--dtype x", "--dtype: unknown dtype 'x'"),
    ],
)
def test_an_error_names_the_flag_that_was_typed(flags, reason):
    """Options of kvcalc's that nobody wrote are not named."""
    with pytest.raises(kvcalc.InputError, match=f"^--from: {reason}"):
        pasted_deployment(f"vllm serve {MODEL} {flags}", gpu="l4")


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("vllm/vllm-openai:v0.10.1", "the image is v0.10.1; the rules are those of vLLM 0.33.0"),
        ("vllm/vllm-openai:v0.33.0", ""),
        ("vllm/vllm-openai:latest", ""),
        ("vllm/vllm-openai:nightly", ""),
        ("vllm/vllm-openai@sha256:0123", ""),
        (
            "a.b:80/lmsysorg/sglang:v0.4.9.post2-cu126 sglang serve",
            "v0.4.9.post2; .* SGLang 0.5.23",
        ),
        ("nvcr.io/nvidia/tensorrt-llm/release:1.0.0rc3 trtllm-serve", "1.0.0rc3; .* 1.2"),
        ("nvcr.io/nvidia/tensorrt-llm/release:1.2.1 trtllm-serve", ""),
        ("ghcr.io/ggml-org/llama.cpp:server-cuda-b4567", "b4567; .* llama-cpp-python 0.3.36"),
    ],
)
def test_another_release_in_an_image_is_told(image, told, capsys):
    """The rules are those of one release; on standard error stands which, if the tag is another."""
    command = f"docker run {image} --model {MODEL}"
    assert cli.run(["fit", "--from", command, "--kv-memory", "20GiB", "--json"]) == 0
    said = capsys.readouterr().err
    assert re.fullmatch(f"kvcalc: --from: .*{told}\n" if told else "", said)


@pytest.mark.parametrize(
    "command",
    [
        f"{SERVE} --max-num-seqs 64",
        f"sglang serve --model {MODEL} --context-length 8192 --max-running-requests 64",
        f"trtllm-serve {MODEL} --max_seq_len 8192 --max_batch_size 64",
    ],
)
def test_a_limit_is_not_the_load(command):
    """How many requests an engine takes at once does not say how many there are."""
    model, deployment, _ = pasted_deployment(command, kv_memory="40GiB")
    assert kvcalc.fit(model, **deployment).concurrency == 1


def test_slots_of_llama_server_share_its_context():
    """A request may be as long as its part of `-c`, unless the slots' cells are one."""
    command = f"llama-server -m {MODEL} -c 32768 -np 4"
    assert pasted_deployment(command)[1]["seq"] == 8192
    assert pasted_deployment(f"{command} -kvu")[1]["seq"] == 32768
    with pytest.raises(kvcalc.InputError, match="20 of 32 layers"):
        pasted_deployment(f"{command} -ngl 20")


def test_a_command_is_read_from_a_file_or_standard_input(tmp_path, monkeypatch):
    """`--from` takes a script's name, and `-` for what is piped in."""
    script = tmp_path / "serve it.sh"
    script.write_text(SERVE)
    assert command_text(str(script)) == command_text(SERVE) == SERVE
    monkeypatch.setattr("sys.stdin", io.StringIO(SERVE))
    assert command_text("-") == SERVE
    script.write_bytes(b"\xff\xfe")
    with pytest.raises(kvcalc.InputError, match="as a script"):
        command_text(str(script))
    script.write_text(SERVE, encoding="utf-8-sig")
    assert command_text(str(script)) == SERVE


def test_a_directory_and_nothing_are_called_so(tmp_path, monkeypatch):
    """No command is looked for in what cannot have one."""
    with pytest.raises(kvcalc.InputError, match="is a directory"):
        command_text(str(tmp_path))
    empty = tmp_path / "empty.sh"
    empty.write_text("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for argument in (str(empty), "-", ""):
        with pytest.raises(kvcalc.InputError, match="is empty"):
            command_text(argument)


def test_every_option_that_is_translated_exists():
    """Each flag's target is an option of its engine or a parameter of size."""
    for dialect in {id(dialect): dialect for _, dialect in STARTS}.values():
        options = load_engine(dialect.engine).OPTIONS
        assert dialect.release.split()[-1] in load_engine(dialect.engine).source()
        assert not dialect.flags.keys() & dialect.harmless.keys()
        assert not [flag for flag in dialect.flags if dialect.doubt(flag)]
        doubtful = [flag for flag in dialect.harmless if dialect.doubt(flag)]
        assert set(doubtful) <= {"--no-enable-chunked-prefill"}
        for target in dialect.flags.values():
            part, _, name = target.partition("=")[0].partition(".")
            assert part in {"model", "point", "options", "budget", "loading"}
            assert part != "options" or name in options, target
        for doubt in dialect.doubtful.values():
            known = {"weights", "reserve", "kv_memory", "share", "seq", *options, "n_ctx"}
            assert set(doubt.settled) <= known


@pytest.mark.parametrize(
    ("command", "longest", "most"),
    [
        ("trtllm-serve Qwen/Qwen3-8B --max_seq_len 8192 --max_batch_size 16", 8192, 16),
        ("sglang serve --model Qwen/Qwen3-8B --context-length 16384", 16384, None),
        ("sglang serve --model Qwen/Qwen3-8B", 40960, None),
    ],
)
def test_what_a_server_takes_bounds_what_fits(command, longest, most):
    """Memory for more is of no use: the same command would refuse it."""
    model, deployment, _ = pasted_deployment(command, seq="4k", kv_memory="70GiB")
    report = kvcalc.fit(model, **deployment)
    assert report.max_tokens == longest
    if most:
        assert report.max_concurrency == most
        with pytest.raises(kvcalc.InputError, match="concurrency"):
            kvcalc.fit(model, **deployment | {"concurrency": most + 1})


def test_a_file_on_the_hub_by_its_type_is_not_looked_for():
    """llama-server's `-hf org/name:QUANT` names a GGUF that is not here."""
    with pytest.raises(kvcalc.InputError, match=r"download it, and give -m FILE\.gguf"):
        read_command("llama-server -hf Qwen/Qwen3-8B-GGUF:Q4_K_M -c 32768")
