"""Flags of the engines' servers, as their documentation and sources have them: vllm 0.33, sglang
0.5.23, llama-server of August 2026 and trtllm-serve 1.2.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Doubt(NamedTuple):
    """What a flag says that kvcalc does not count, unless one of `settled` is given, parameters of
    `kvcalc.fit` or options of the engine, or its value matches `fine`.
    """

    about: str
    settled: tuple[str, ...] = ()
    fine: str = r"(?!)"


class Dialect(NamedTuple):
    """Flags of one engine's server, with hyphens. Values of `flags` are `point.seq`,
    `options.block_size` and the like, with `=true` where the flag alone says it; `model` is the
    flag of the model, which may stand alone. A doubtful flag that ends in `*` is a beginning.
    `release` is the one whose rules kvcalc has.
    """

    engine: str
    release: str
    model: str
    flags: Mapping[str, str]
    doubtful: Mapping[str, Doubt]
    harmless: Mapping[str, int | None]

    def doubt(self, flag: str) -> Doubt | None:
        """What is doubtful about a flag."""
        for name, doubt in self.doubtful.items():
            if flag == name or (name.endswith("*") and flag.startswith(name[:-1])):
                return doubt
        return None


def _harmless(alone: str, with_value: str, with_several: str = "") -> dict[str, int | None]:
    """How many values flags take; None for any number."""
    switches = alone.split()
    negated = [f"--no-{flag[2:]}" for flag in switches if flag.startswith("--")]
    return (
        dict.fromkeys([*switches, *negated], 0)
        | dict.fromkeys(with_value.split(), 1)
        | dict.fromkeys(with_several.split(), None)
    )


def _doubtful(*groups: tuple[str, Doubt]) -> dict[str, Doubt]:
    return {flag: doubt for flags, doubt in groups for flag in flags.split()}


_REPLICAS = Doubt(
    "each replica holds a cache of its own: give the command of one, without it; experts that are "
    "spread over replicas are not covered",
    fine="1",
)
_CONTEXT_PARALLEL = Doubt("ranks that share the tokens of a sequence are not covered", fine="1")
_OFFLOAD = Doubt(
    "some weights stay in the host's memory: give --weights without them",
    settled=("weights", "kv_memory"),
    fine=r"0(\.0*)?",
)
_ADAPTERS = Doubt(
    "adapters take memory beside the weights: give --reserve or --weights with theirs",
    settled=("reserve", "weights", "kv_memory"),
)
_OVERRIDES = Doubt(
    "it changes the config: leave it out, and give a config.json that says so as the model",
    fine=r"\{\s*\}",
)
_FILE = Doubt("the engine's file of settings is not read: write them as flags")
_WINDOWS = Doubt("it changes what layers with a window keep, which is not covered")
_CONNECTOR = Doubt(
    "blocks that move between servers or to the host need buffers, which are not covered: leave it "
    "out to size the cache without",
    fine=r"\{\s*\}|0(\.0*)?",
)
_LONGER = Doubt(
    "it changes the model's maximum: give --seq", settled=("seq", "n_ctx"), fine=r"none|\{\s*\}"
)
_QUANTISED = Doubt(
    "the weights are quantised at load: give --weights", settled=("weights", "kv_memory")
)
_DEVICE = Doubt("GPUs alone are covered", fine="auto|cuda|gpu")
_GRAPHS = Doubt(
    "it decides how many CUDA graphs there are: give --reserve, for all that is beside weights and "
    "cache",
    settled=("reserve", "kv_memory"),
)

VLLM = Dialect(
    engine="vllm",
    release="vLLM 0.33.0",
    model="--model",
    flags={
        "--tensor-parallel-size": "point.tp",
        "-tp": "point.tp",
        "--pipeline-parallel-size": "point.pp",
        "-pp": "point.pp",
        "--max-model-len": "options.max_model_len",
        "--kv-cache-dtype": "point.kv_dtype",
        "--block-size": "options.block_size",
        "--max-num-batched-tokens": "options.max_num_batched_tokens",
        "--max-num-seqs": "options.max_num_seqs",
        "--enforce-eager": "options.enforce_eager=true",
        "--no-enforce-eager": "options.enforce_eager=false",
        "--async-scheduling": "options.async_scheduling=true",
        "--no-async-scheduling": "options.async_scheduling=false",
        "--enable-prefix-caching": "options.enable_prefix_caching=true",
        "--no-enable-prefix-caching": "options.enable_prefix_caching=false",
        "--mamba-ssm-cache-dtype": "options.mamba_ssm_cache_dtype",
        "--gpu-memory-utilization": "budget.share",
        "--kv-cache-memory-bytes": "budget.kv_memory",
        "--dtype": "loading.dtype",
        "--quantization": "loading.quantization",
        "-q": "loading.quantization",
        "--revision": "point.revision",
    },
    doubtful=_doubtful(
        ("--data-parallel-* -dp -dpn -dpr -dpl -dpa -dpp -dpb -dph -dpe", _REPLICAS),
        (
            "--decode-context-parallel-size -dcp --prefill-context-parallel-size -pcp",
            _CONTEXT_PARALLEL,
        ),
        (
            "--speculative-* --num-speculative-tokens --spec-*",
            Doubt(
                "leave it out, and for drafts by the model's own layers give --option mtp=true "
                "--option num_speculative_tokens=N; a draft model's own cache is not covered"
            ),
        ),
        (
            "--num-gpu-blocks-override",
            Doubt(
                "the pool has so many blocks whatever is free: give their bytes as --kv-memory",
                settled=("kv_memory",),
            ),
        ),
        ("--cpu-offload-gb --offload-*", _OFFLOAD),
        ("--enable-lora --max-loras --max-lora-rank --lora-* --fully-sharded-loras", _ADAPTERS),
        ("--max-cpu-loras --default-mm-loras", _ADAPTERS),
        ("--hf-overrides --hf-config-path --model-loader-extra-config", _OVERRIDES),
        ("--config", _FILE),
        ("--disable-sliding-window --disable-hybrid-kv-cache-manager", _WINDOWS),
        ("--kv-transfer-config --kv-offloading-size --kv-offloading-backend", _CONNECTOR),
        ("--rope-scaling --rope-theta", _LONGER),
        ("--device", _DEVICE),
        ("--load-format", _QUANTISED._replace(fine="(?!bitsandbytes).*")),
        ("--cudagraph-capture-sizes --max-cudagraph-capture-size", _GRAPHS),
        ("--compilation-config -cc", _GRAPHS._replace(fine=r"(?!.*cudagraph).*")),
        (
            "-O --optimization-level",
            _GRAPHS._replace(fine=r'[23]|\{(?!.*cudagraph).*"level":\s*[23]\s*[,}].*'),
        ),
        (
            "--no-enable-chunked-prefill",
            Doubt(
                "steps are as long as prompts then: give --option max_num_batched_tokens=N",
                settled=("max_num_batched_tokens",),
            ),
        ),
        (
            "--attention-backend",
            Doubt(
                "it may decide the block: give --option block_size=N",
                settled=("block_size",),
                fine=r"(?i)flash_attn(_vllm_v1)?|flashinfer|triton_attn(_vllm_v1)?|flex_attention",
            ),
        ),
    ),
    harmless=_harmless(
        "--trust-remote-code --enable-auto-tool-choice --disable-log-requests "
        "--enable-chunked-prefill --enable-expert-parallel -ep --disable-log-stats "
        "--enable-log-requests --enable-log-outputs --disable-custom-all-reduce "
        "--skip-tokenizer-init --enable-prompt-embeds --disable-cascade-attn --use-tqdm-on-load "
        "--calculate-kv-scales --kv-cache-metrics --cudagraph-metrics --enable-mfu-metrics "
        "--enable-logging-iteration-details --aggregate-engine-logging --headless "
        "--enable-request-id-headers --disable-fastapi-docs --enable-prompt-tokens-details "
        "--enable-server-load-tracking --enable-force-include-usage --allow-credentials "
        "--return-tokens-as-token-ids --disable-uvicorn-access-log --enable-ssl-refresh "
        "--disable-frontend-multiprocessing --exclude-tools-when-tool-choice-none "
        "--enable-tokenizer-info-endpoint --enable-reasoning --enable-sleep-mode "
        "--use-v2-block-manager",
        "--host --port --uds --api-key --tokenizer --tokenizer-mode --tokenizer-revision "
        "--code-revision --seed --tool-call-parser --tool-parser-plugin --tool-server "
        "--reasoning-parser --reasoning-parser-plugin --chat-template "
        "--chat-template-content-format --default-chat-template-kwargs --response-role "
        "--uvicorn-log-level --log-config-file --max-log-len --root-path --ssl-keyfile "
        "--ssl-certfile --ssl-ca-certs --ssl-cert-reqs --download-dir --api-server-count "
        "--distributed-executor-backend --master-addr --master-port --nnodes -n --node-rank -r "
        "--generation-config --override-generation-config --limit-mm-per-prompt "
        "--media-io-kwargs --mm-processor-cache-gb --mm-processor-cache-type "
        "--allowed-local-media-path --config-format --swap-space --max-logprobs --logprobs-mode "
        "--safetensors-load-strategy --ignore-patterns --max-parallel-loading-workers "
        "--prefix-caching-hash-algo --scheduling-policy --stream-interval "
        "--max-num-partial-prefills --max-long-partial-prefills --long-prefill-token-threshold "
        "--structured-outputs-config --guided-decoding-backend --kv-events-config "
        "--otlp-traces-endpoint --collect-detailed-traces --kv-cache-metrics-sample "
        "--show-hidden-metrics-for-version",
        "--served-model-name --allowed-origins --allowed-methods --allowed-headers --middleware "
        "--allowed-media-domains --hf-token --logits-processors",
    ),
)

_FIXED_PAGE = Doubt(
    "it decides the page: give --option page_size=N",
    settled=("page_size",),
    fine="fa3|fa4|flashinfer|triton|torch_native|flex_attention",
)

SGLANG = Dialect(
    engine="sglang",
    release="SGLang 0.5.23",
    model="--model-path",
    flags={
        "--model": "model",
        "--tp": "point.tp",
        "--tp-size": "point.tp",
        "--tensor-parallel-size": "point.tp",
        "--pp": "point.pp",
        "--pp-size": "point.pp",
        "--pipeline-parallel-size": "point.pp",
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
        "--mem-fraction-static": "budget.share",
        "--dtype": "loading.dtype",
        "--quantization": "loading.quantization",
        "--revision": "point.revision",
    },
    doubtful=_doubtful(
        ("--dp --dp-size --data-parallel-size", _REPLICAS),
        ("--attn-cp-size --attention-context-parallel-size", _CONTEXT_PARALLEL),
        (
            "--speculative-* --enable-multi-layer-eagle",
            Doubt("what drafts take is not covered for sglang: leave it out to size without them"),
        ),
        ("--cpu-offload-gb --offload-*", _OFFLOAD),
        ("--enable-lora* --lora-* --max-lora* --max-loaded-loras", _ADAPTERS),
        ("--json-model-override-args --model-config-parser", _OVERRIDES),
        ("--config", _FILE),
        ("--disable-hybrid-swa-memory", _WINDOWS),
        ("--enable-hierarchical-cache --hicache-* --disaggregation-*", _CONNECTOR),
        ("--device", _DEVICE),
        ("--load-format", _QUANTISED._replace(fine="(?!bitsandbytes).*")),
        ("--torchao-config --modelopt-quant --quantize-and-serve", _QUANTISED),
        ("--attention-backend --decode-attention-backend --prefill-attention-backend", _FIXED_PAGE),
        (
            "--cuda-graph-max-bs --cuda-graph-bs --disable-cuda-graph* --enable-torch-compile",
            Doubt(
                "the default of mem_fraction_static depends on it: give --share, as it prints it",
                settled=("share", "kv_memory"),
            ),
        ),
        (
            "--mamba-scheduler-strategy",
            Doubt(
                "give --option enable_mamba_extra_buffer=true for extra_buffer, else false",
                settled=("enable_mamba_extra_buffer",),
                fine="auto",
            ),
        ),
    ),
    harmless=_harmless(
        "--trust-remote-code --enable-metrics --enable-dp-attention --skip-server-warmup "
        "--skip-tokenizer-init --disable-custom-all-reduce --log-requests --enable-cache-report "
        "--enable-p2p-check --enable-request-time-stats-logging --enable-priority-scheduling "
        "--show-time-cost --enable-trace --sleep-on-idle --enable-mfu-metrics "
        "--disable-outlines-disk-cache --disable-flashinfer-autotune --grpc-mode",
        "--host --port --api-key --admin-api-key --served-model-name --tokenizer-path "
        "--tokenizer-mode --tokenizer-worker-num --random-seed --tool-call-parser --tool-server "
        "--reasoning-parser --chat-template --hf-chat-template-name --completion-template "
        "--log-level --log-level-http --log-requests-level --log-requests-format "
        "--schedule-policy --schedule-conservativeness --max-queued-requests "
        "--max-prefill-tokens --sampling-backend --grammar-backend --sampling-defaults "
        "--preferred-sampling-params --stream-interval --decode-log-interval --download-dir "
        "--file-storage-path --fastapi-root-path --warmups --weight-version --nccl-port "
        "--dist-init-addr --nccl-init-addr --nnodes --node-rank --dist-timeout "
        "--watchdog-timeout --soft-watchdog-timeout --base-gpu-id --gpu-id-step --ep --ep-size "
        "--expert-parallel-size --load-balance-method --kv-events-config --otlp-traces-endpoint",
        "--log-requests-target",
    ),
)

_SEVERAL_GPUS = Doubt(
    "how unlike GPUs share the layers is not covered: give --kv-memory of all",
    settled=("kv_memory",),
    fine="none|layer",
)

LLAMA_CPP = Dialect(
    engine="llama.cpp",
    release="llama.cpp of llama-cpp-python 0.3.36",
    model="--model",
    flags={
        "-m": "model",
        "-hf": "model",
        "-hfr": "model",
        "--hf-repo": "model",
        "-c": "options.n_ctx",
        "--ctx-size": "options.n_ctx",
        "-np": "options.n_seq_max",
        "--parallel": "options.n_seq_max",
        "-b": "options.n_batch",
        "--batch-size": "options.n_batch",
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
        "-ngl": "loading.n_gpu_layers",
        "--gpu-layers": "loading.n_gpu_layers",
        "--n-gpu-layers": "loading.n_gpu_layers",
    },
    doubtful=_doubtful(
        (
            "-md --model-draft -hfd -hfrd --hf-repo-draft --spec-* --draft* -cd -ctkd -ctvd -ngld",
            Doubt("a draft's own cache is not covered: leave it out, and size the draft by itself"),
        ),
        ("-cmoe --cpu-moe -ncmoe --n-cpu-moe -ncffn --n-cpu-ffn", _OFFLOAD),
        ("-ot --override-tensor", _OFFLOAD),
        ("-nkvo --no-kv-offload", Doubt("a cache in the host's memory is not covered")),
        ("-sm --split-mode -ts --tensor-split --rpc", _SEVERAL_GPUS),
        ("-dev --device", _SEVERAL_GPUS._replace(fine="(?!none|cpu)[^,]+")),
        (
            "-mm --mmproj -mmu --mmproj-url",
            Doubt(
                "the projector takes memory beside the weights: give --reserve or --weights with "
                "its file's",
                settled=("reserve", "weights", "kv_memory"),
            ),
        ),
        ("--lora* --control-vector*", _ADAPTERS),
        ("--override-kv", _OVERRIDES),
        ("--rope-* --yarn-*", _LONGER),
    ),
    harmless=_harmless(
        "--jinja --mmap --mlock --metrics --cont-batching -cb -nocb --webui --ui --verbose "
        "-v --log-disable --warmup --slots --props --context-shift --offline --perf --escape -e "
        "--check-tensors --no-mmproj --mmproj-auto --log-prefix --log-timestamps --cache-prompt "
        "--reuse-port --special -sp --repack -nr",
        "--host --port --path --api-key --api-key-file --api-prefix -a --alias -t --threads -tb "
        "--threads-batch --threads-http --prio --poll --numa -s --seed --temp --temperature "
        "--top-k --top-p --min-p --typical --samplers --repeat-penalty --repeat-last-n "
        "--presence-penalty --frequency-penalty --keep -n --predict --n-predict -mg --main-gpu "
        "--chat-template --chat-template-file --chat-template-kwargs --reasoning-format "
        "--reasoning-budget --reasoning-effort -to --timeout -hff --hf-file -hft --hf-token "
        "--cache-reuse -cram --cache-ram -ctxcp --ctx-checkpoints --swa-checkpoints "
        "--slot-save-path --slot-prompt-similarity -sps --media-path --log-file --log-verbosity "
        "--verbosity -lv --ssl-key-file --ssl-cert-file",
        "--log-colors",
    ),
)

TENSORRT_LLM = Dialect(
    engine="tensorrt-llm",
    release="TensorRT-LLM 1.2",
    model="--model",
    flags={
        "--tp-size": "point.tp",
        "--tensor-parallel-size": "point.tp",
        "--pp-size": "point.pp",
        "--pipeline-parallel-size": "point.pp",
        "--max-seq-len": "point.seq",
        "--max-batch-size": "budget.max_requests",
        "--kv-cache-dtype": "point.kv_dtype",
        "--kv-cache-free-gpu-memory-fraction": "budget.share",
        "--free-gpu-memory-fraction": "budget.share",
        "--revision": "point.revision",
        "--hf-revision": "point.revision",
    },
    doubtful=_doubtful(
        ("--enable-attention-dp", _REPLICAS),
        ("--context-parallel-size --cp-size", _CONTEXT_PARALLEL),
        ("--extra-llm-api-options --config", _FILE),
        ("--backend", Doubt("the PyTorch backend alone is covered", fine="pytorch")),
        ("--max-beam-width", Doubt("what beams keep is not covered", fine="1")),
        (
            "--max-num-tokens",
            Doubt(
                "activations of other steps than 8,192 tokens are not known: give --reserve",
                settled=("reserve", "kv_memory"),
                fine="8192",
            ),
        ),
    ),
    harmless=_harmless(
        "--trust-remote-code --enable-chunked-prefill --fail-fast-on-attention-window-too-large "
        "--no-telemetry",
        "--host --port --tokenizer --custom-tokenizer --custom-module-dirs --log-level "
        "--ep-size --moe-expert-parallel-size --gpus-per-node "
        "--reasoning-parser --tool-parser --served-model-name --num-postprocess-workers "
        "--chat-template --media-io-kwargs --otlp-traces-endpoint",
    ),
)

STARTS: tuple[tuple[tuple[str, ...], Dialect], ...] = (
    (("vllm", "serve"), VLLM),
    (("-m", "vllm.entrypoints.openai.api_server"), VLLM),
    (("-m", "vllm.entrypoints.cli.main", "serve"), VLLM),
    (("-m", "sglang.launch_server"), SGLANG),
    (("sglang", "serve"), SGLANG),
    (("llama-server",), LLAMA_CPP),
    (("trtllm-serve", "serve"), TENSORRT_LLM),
    (("trtllm-serve",), TENSORRT_LLM),
)
"""How commands begin; the longer ones first."""

IMAGES: tuple[tuple[re.Pattern[str], Dialect], ...] = (
    (re.compile(r"(\S+/)?vllm/vllm-openai[\w-]*([:@]\S*)?"), VLLM),
    (re.compile(r"(\S+/)?(ggml-org|ggerganov)/llama\.cpp:server\S*"), LLAMA_CPP),
)
"""Container images whose arguments are the server's."""

TAGGED = re.compile(
    r"(?:\S+/)?(?:vllm/vllm-openai[\w-]*|lmsysorg/sglang|nvidia/tensorrt-llm/[\w-]+|"
    r"(?:ggml-org|ggerganov)/llama\.cpp):(?:[\w-]*-)?(v?\d+\.\d[\w.]*|b\d+)(?:[-@]\S*)?"
)
"""Images whose tag names a release."""
