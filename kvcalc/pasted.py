"""The command line of a serving engine, as somebody pastes it: which model it serves, and what of
it decides the size of the cache.

A flag is translated, known to change nothing about the cache, or named in an error: none is guessed
past. Flags of vllm 0.33, sglang 0.5.23, llama-server of August 2026 and trtllm-serve 1.2.
"""

import shlex
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvcalc.errors import InputError
from kvcalc.units import shown


class Pasted(NamedTuple):
    """What a command line says. `point` holds parameters of `kvcalc.size` by name, `options` those
    of the engine, `budget` what decides how much memory its cache gets.
    """

    engine: str
    model: str
    point: dict[str, str]
    options: dict[str, str]
    budget: dict[str, str]


class _Dialect(NamedTuple):
    """Flags of one engine's server. Values are `point.seq`, `options.block_size` and the like, with
    `=true` where the flag alone says it; `model` is the flag of the model, which may stand alone.
    """

    engine: str
    model: str
    flags: Mapping[str, str]
    harmless: Mapping[str, int]


def _harmless(alone: str, with_value: str) -> dict[str, int]:
    """Flags that take no value and such as take one."""
    return dict.fromkeys(alone.split(), 0) | dict.fromkeys(with_value.split(), 1)


VLLM = _Dialect(
    engine="vllm",
    model="--model",
    flags={
        "--tensor-parallel-size": "point.tp",
        "-tp": "point.tp",
        "--pipeline-parallel-size": "point.pp",
        "-pp": "point.pp",
        "--max-model-len": "point.seq",
        "--kv-cache-dtype": "point.kv_dtype",
        "--block-size": "options.block_size",
        "--max-num-batched-tokens": "options.max_num_batched_tokens",
        "--max-num-seqs": "options.max_num_seqs",
        "--enforce-eager": "options.enforce_eager=true",
        "--async-scheduling": "options.async_scheduling=true",
        "--no-async-scheduling": "options.async_scheduling=false",
        "--enable-prefix-caching": "options.enable_prefix_caching=true",
        "--no-enable-prefix-caching": "options.enable_prefix_caching=false",
        "--mamba-ssm-cache-dtype": "options.mamba_ssm_cache_dtype",
        "--gpu-memory-utilization": "budget.gpu_memory_utilization",
        "--kv-cache-memory-bytes": "budget.kv_cache_memory_bytes",
        "--revision": "point.revision",
    },
    harmless=_harmless(
        "--trust-remote-code --enable-auto-tool-choice --disable-log-requests "
        "--enable-chunked-prefill --no-enable-chunked-prefill --enable-expert-parallel "
        "--disable-log-stats --enable-log-requests",
        "--host --port --api-key --served-model-name --dtype --tokenizer --seed "
        "--tool-call-parser --reasoning-parser --chat-template --uvicorn-log-level --download-dir "
        "--quantization -q --load-format --distributed-executor-backend --generation-config "
        "--limit-mm-per-prompt --config-format --tokenizer-mode",
    ),
)

SGLANG = _Dialect(
    engine="sglang",
    model="--model-path",
    flags={
        "--model": "model",
        "--tp": "point.tp",
        "--tp-size": "point.tp",
        "--tensor-parallel-size": "point.tp",
        "--pp-size": "point.pp",
        "--context-length": "point.seq",
        "--kv-cache-dtype": "point.kv_dtype",
        "--page-size": "options.page_size",
        "--max-total-tokens": "options.max_total_tokens",
        "--max-running-requests": "options.max_running_requests",
        "--swa-full-tokens-ratio": "options.swa_full_tokens_ratio",
        "--chunked-prefill-size": "options.chunked_prefill_size",
        "--max-mamba-cache-size": "options.max_mamba_cache_size",
        "--mamba-full-memory-ratio": "options.mamba_full_memory_ratio",
        "--mamba-ssm-dtype": "options.mamba_ssm_dtype",
        "--disable-radix-cache": "options.disable_radix_cache=true",
        "--mem-fraction-static": "budget.mem_fraction_static",
        "--revision": "point.revision",
    },
    harmless=_harmless(
        "--trust-remote-code --enable-metrics --disable-cuda-graph --enable-torch-compile "
        "--enable-dp-attention --skip-server-warmup",
        "--host --port --api-key --served-model-name --dtype --tokenizer-path --random-seed "
        "--attention-backend --tool-call-parser --reasoning-parser --chat-template --log-level "
        "--quantization --load-format --schedule-policy --cuda-graph-max-bs --download-dir",
    ),
)

LLAMA_CPP = _Dialect(
    engine="llama.cpp",
    model="--model",
    flags={
        "-m": "model",
        "-hf": "model",
        "--hf-repo": "model",
        "-c": "options.n_ctx",
        "--ctx-size": "options.n_ctx",
        "-np": "options.n_seq_max",
        "--parallel": "options.n_seq_max",
        "-ub": "options.n_ubatch",
        "--ubatch-size": "options.n_ubatch",
        "-ctk": "options.type_k",
        "--cache-type-k": "options.type_k",
        "-ctv": "options.type_v",
        "--cache-type-v": "options.type_v",
        "-kvu": "options.kv_unified=true",
        "--kv-unified": "options.kv_unified=true",
        "-no-kvu": "options.kv_unified=false",
        "--no-kv-unified": "options.kv_unified=false",
        "--swa-full": "options.swa_full=true",
        "-fa": "options.flash_attn",
        "--flash-attn": "options.flash_attn",
    },
    harmless=_harmless(
        "--jinja --no-mmap --mlock --metrics --cont-batching -cb --no-webui --verbose -v",
        "--host --port --api-key -a --alias -t --threads -tb --threads-batch -ngl --gpu-layers "
        "--n-gpu-layers -b --batch-size -s --seed --temp --top-k --top-p --min-p -n --predict "
        "-sm --split-mode -ts --tensor-split -mg --main-gpu --chat-template -to --timeout -hff "
        "--hf-file --mmproj --n-cpu-moe -ncmoe --override-tensor -ot --cache-reuse",
    ),
)

TENSORRT_LLM = _Dialect(
    engine="tensorrt-llm",
    model="--model",
    flags={
        "--tp_size": "point.tp",
        "--pp_size": "point.pp",
        "--max_seq_len": "point.seq",
        "--max_batch_size": "point.batch",
        "--kv_cache_free_gpu_memory_fraction": "budget.free_gpu_memory_fraction",
        "--free_gpu_memory_fraction": "budget.free_gpu_memory_fraction",
        "--revision": "point.revision",
    },
    harmless=_harmless(
        "--trust_remote_code",
        "--host --port --backend --tokenizer --log_level --max_num_tokens --max_beam_width "
        "--reasoning_parser --tool_parser --served_model_name --num_postprocess_workers",
    ),
)

STARTS: tuple[tuple[tuple[str, ...], _Dialect], ...] = (
    (("vllm", "serve"), VLLM),
    (("python", "-m", "vllm.entrypoints.openai.api_server"), VLLM),
    (("python", "-m", "sglang.launch_server"), SGLANG),
    (("sglang", "serve"), SGLANG),
    (("llama-server",), LLAMA_CPP),
    (("trtllm-serve", "serve"), TENSORRT_LLM),
    (("trtllm-serve",), TENSORRT_LLM),
)
"""How commands begin; the longer ones first."""

_WORDS = {"on": "true", "off": "false", "auto": "true"}


def read_command(text: str) -> Pasted:
    """What a server's command line says about its cache.

    Raises InputError for a command that is none of those known, a flag that is neither translated
    nor known to be harmless, one without its value, and a command without a model.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        msg = f"--from {shown(text)} cannot be read: {error}"
        raise InputError(msg) from None
    while words and "=" in words[0] and not words[0].startswith("-"):  # environment variables
        words = words[1:]
    dialect, rest = _dialect(words)
    found = Pasted(dialect.engine, "", {}, {}, {})
    model = ""
    for flag, value in _flags(dialect, rest):
        target = "model" if flag in ("", dialect.model) else dialect.flags[flag]
        target, _, fixed = target.partition("=")
        if target == "model":
            model = value
            continue
        part, _, name = target.partition(".")
        getattr(found, part)[name] = fixed or _WORDS.get(value, value)
    if not model:
        msg = f"--from {shown(text)} names no model"
        raise InputError(msg)
    return found._replace(model=model)


def _dialect(words: list[str]) -> tuple[_Dialect, list[str]]:
    """Whose command it is, and what comes after its beginning."""
    plain = [words[0].rpartition("/")[2], *words[1:]] if words else []
    if plain and plain[0].startswith("python"):
        plain[0] = "python"
    for start, dialect in STARTS:
        if tuple(plain[: len(start)]) == start:
            return dialect, plain[len(start) :]
    known = ", ".join(" ".join(start) for start, _ in STARTS)
    msg = f"--from {shown(' '.join(words))} begins with none of: {known}"
    raise InputError(msg)


def _flags(dialect: _Dialect, words: list[str]) -> Iterator[tuple[str, str]]:
    """Flags that count with their values; the model alone comes with an empty flag."""
    unknown: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            yield "", word
        elif flag in dialect.harmless:
            if dialect.harmless[flag] and not equals:
                next(rest, None)
        elif flag == dialect.model or flag in dialect.flags:
            alone = "=" in dialect.flags.get(flag, "")
            if not alone and not equals:
                following = next(rest, None)
                if following is None:
                    msg = f"--from: {flag} has no value"
                    raise InputError(msg)
                value = following
            yield flag, value
        else:
            unknown.append(flag)
    if unknown:
        msg = (
            f"--from: flags of {dialect.engine} that kvcalc does not know: {', '.join(unknown)}; "
            "leave out those that do not concern the cache"
        )
        raise InputError(msg)
