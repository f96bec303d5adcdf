"""The deployment that a server's command line describes, as parameters of `kvcalc.fit`."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvcalc.api import Model, read_model
from kvcalc.budget import read_share
from kvcalc.config import FieldUse
from kvcalc.dtypes import storage_format
from kvcalc.engines import load_engine, read_options
from kvcalc.errors import InputError
from kvcalc.families import decoder_level
from kvcalc.pasted import Pasted, read_command
from kvcalc.sizing import MAX_BATCH, MAX_RANKS
from kvcalc.units import check_count, parse_bytes, parse_tokens, shown

_COUNTS = {"tp": MAX_RANKS, "pp": MAX_RANKS, "max_requests": MAX_BATCH}


def pasted_deployment(
    command: str,
    **given: Any,  # noqa: ANN401 - parameters of `fit`
) -> tuple[str, dict[str, Any], list[str]]:
    """The model of a server's command line, the other parameters of `fit`, and notes; what is
    `given` beside it goes before what it says.

    Raises InputError for what the command says and nothing counts, unless what is given settles it.
    """
    pasted = read_command(command)
    _check_typed(pasted)
    said: dict[str, Any] = {"engine": pasted.engine, **pasted.point, **pasted.budget}
    said |= {name: int(said[name]) for name in _COUNTS if name in said}
    told = {name: value for name, value in pasted.options.items() if value != "auto"}
    options = {**told, **(given.pop("options", None) or {})}
    given = {name: value for name, value in given.items() if value is not None}
    in_its_place = given.keys() & {"gpu", "reserve", "weights"}
    if "kv_memory" in said and "kv_memory" not in given and in_its_place:
        flag = pasted.typed["kv_memory"]
        msg = f"--from: {flag} says how much there is: leave --gpu, --reserve and --weights out"
        raise InputError(msg)
    deployment = {**said, **given, "options": options}
    if "seq" not in deployment and "max_model_len" in options:
        deployment["seq"] = options["max_model_len"]
    if "seq" not in deployment and pasted.options.get("n_ctx", "0") != "0":
        deployment["seq"] = _slot_tokens(options, given.get("concurrency", 1))
    for doubt in pasted.doubts:
        if not set(doubt.settled) & (deployment.keys() | options.keys()):
            raise InputError(doubt.about)
    notes = [*pasted.notes, *_bound(pasted, deployment, _longest(pasted, deployment))]
    asked, most = deployment.get("concurrency", 1), deployment.get("max_requests", MAX_BATCH)
    if asked > most:
        flag = pasted.typed["max_requests"]
        msg = f"--concurrency {asked:,}: the pasted server runs {most:,} at once, its {flag}"
        raise InputError(msg)
    if pasted.loading:
        deployment |= _loaded(pasted, deployment)
    return pasted.model, deployment, notes


def _bound(pasted: Pasted, deployment: dict[str, Any], longest: int) -> Iterator[str]:
    """Give a deployment the longest request that its server takes, with notes on it."""
    options = deployment["options"]
    if pasted.options.get("max_model_len") == "auto":
        yield "--from: vLLM fits --max-model-len to the memory; what it says is for --seq"
    elif longest and pasted.engine != "vllm":
        deployment["max_seq"] = longest
    elif longest and "max_model_len" not in options:
        options["max_model_len"] = longest
        if "seq" in deployment:
            about = f"vLLM starts if one request of {longest:,} tokens fits"
            yield f"--from: without --max-model-len {about}"


def _check_typed(pasted: Pasted) -> None:
    """Raise InputError, which names the flag, for a value that cannot be."""
    known = load_engine(pasted.engine).OPTIONS
    parts = (pasted.point, pasted.options, pasted.budget, pasted.loading)
    for name, value in [item for part in parts for item in part.items()]:
        flag = pasted.typed[name]
        try:
            if name in _COUNTS:
                _count(value, name=flag, most=_COUNTS[name])
            elif name == "seq":
                parse_tokens(value, name=flag)
            elif name == "share":
                read_share(value, option=flag)
            elif name == "kv_memory":
                parse_bytes(value, name=flag)
            elif value == "auto":
                continue
            elif name in ("dtype", "kv_dtype"):
                storage_format(value)
            elif name in known:
                read_options(pasted.engine, known, {name: value})
        except InputError as error:
            said = str(error).replace(f"{pasted.engine} option {name}", flag)
            msg = f"--from: {said if flag in said else f'{flag}: {said}'}"
            raise InputError(msg) from None


def _longest(pasted: Pasted, deployment: Mapping[str, Any]) -> int:
    """The longest request that a server takes, by its command or else its model; 0 where neither
    says it, or the engine looks at it with all of them (llama.cpp).

    Raises InputError for one that is longer.
    """
    said = deployment["options"].get("max_model_len", pasted.point.get("seq"))
    changed = any("seq" in doubt.settled for doubt in pasted.doubts)
    if pasted.engine == "llama.cpp" or (said is None and changed):
        return 0
    if said is None:
        model = read_model(pasted.model, revision=deployment.get("revision"))
        longest = model.architecture.max_tokens
    else:
        longest = parse_tokens(said, name="max_model_len")
    asked = parse_tokens(deployment.get("seq", longest or 1))
    if 0 < longest < asked:
        flag = pasted.typed.get("max_model_len") or pasted.typed.get("seq") or "max_model_len"
        whose = "the model's own maximum" if said is None else f"its {flag}"
        msg = f"--seq {asked:,}: the pasted server takes no more than {longest:,} tokens, {whose}"
        raise InputError(msg)
    return longest


def _slot_tokens(options: Mapping[str, Any], concurrency: int) -> int:
    """What llama-server's context has for one request."""
    slots = options.get("n_seq_max", concurrency)
    if options.get("kv_unified") == "true":
        slots = 1
    cells = parse_tokens(options["n_ctx"], name="n_ctx")
    return cells // parse_tokens(slots, name="n_seq_max")


def _count(value: str, *, name: str, most: int) -> int:
    """A number of ranks or requests as a command line has it."""
    if not value.isdecimal() or len(value) > len(str(most)):
        what = "ranks" if most == MAX_RANKS else "requests"
        msg = f"{name} {shown(value)} is not a number of {what}"
        raise InputError(msg)
    return check_count(int(value), name=name, most=most)


def _loaded(pasted: Pasted, deployment: Mapping[str, Any]) -> dict[str, Any]:
    """The KV dtype, where a server's `--dtype` decides it.

    Raises InputError where weights are loaded in another format than the config declares, unless
    their bytes are given, and where some layers are not on the GPU.
    """
    model = read_model(pasted.model, revision=deployment.get("revision"))
    dtype, own = pasted.loading.get("dtype", "auto"), model.architecture.model_dtype
    layers, there = len(model.architecture.layers), pasted.loading.get("n_gpu_layers", "all")
    if there.isdecimal() and int(there[:9]) < layers:
        msg = f"--from: {there[:9]} of {layers} layers on the GPU; a part of them is not covered"
        raise InputError(msg)
    wanted = storage_format("bf16" if dtype == "auto" else dtype)
    if deployment.keys().isdisjoint({"weights", "kv_memory"}):
        declared = _quantisation(model)
        method = pasted.loading.get("quantization", declared).lower().replace("-", "_")
        alike = declared and (method.startswith(declared) or declared.startswith(method))
        if method not in ("none", declared) and not alike:
            msg = f"--from: --quantization {shown(method)} where the config declares "
            msg += f"{declared or 'none'}: weights are quantised at load, give --weights"
            raise InputError(msg)
        says = str(own.value) if isinstance(own, FieldUse) else "bf16"
        if dtype != "auto" and storage_format(says).block_bytes != wanted.block_bytes:
            msg = f"--from: --dtype {dtype} where weights are counted in {says}: give --weights"
            raise InputError(msg)
    auto = load_engine(pasted.engine).auto_dtype(model.architecture)
    follows = dtype != "auto" and deployment.get("kv_dtype", "auto") == "auto" and auto == own
    return {"kv_dtype": wanted.name} if follows else {}


def _quantisation(model: Model) -> str:
    """The method by which a config says that its weights are quantised; empty without one."""
    for level in (model.config, decoder_level(model.config).config):
        for key in ("quantization_config", "compression_config"):
            if isinstance(declared := level.get(key), Mapping):
                return str(declared.get("quant_method", "modelopt")).lower().replace("-", "_")
    return ""
