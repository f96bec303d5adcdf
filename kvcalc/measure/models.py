"""Models to measure: from a checkpoint, with random weights from a config alone, or built in."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel

from kvcalc import sources
from kvcalc.config import class_defaults
from kvcalc.dtypes import FORMATS
from kvcalc.engines import load_engine
from kvcalc.errors import ConfigError, InputError, ModelNotFoundError, UnsupportedError
from kvcalc.families import Architecture, decoder_level, describe
from kvcalc.layers.mixed import CrossAttention
from kvcalc.measure import retrieval
from kvcalc.measure.held import LayerBytes, held_by_layer
from kvcalc.measure.record import free_memory, is_out_of_memory
from kvcalc.origin import Origin
from kvcalc.releases import transformers_version
from kvcalc.sources.hub import check_reachable
from kvcalc.sources.local import find_in_hf_cache
from kvcalc.strategies._running import feed
from kvcalc.units import format_bytes, shown

BUILT_IN = "built-in"
WIRED = "wired"

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TILE = 2**20


LeastCache = Callable[[Architecture, Origin, str], int]
"""The bytes of the smallest cache that is to be measured, for a dtype by name."""


def no_cache(architecture: Architecture, origin: Origin, dtype: str) -> int:
    """Nothing but the weights has to fit."""
    del architecture, origin, dtype
    return 0


class LoadedModel(NamedTuple):
    """A model on its device, and the architecture its cache is predicted from.

    `weights` is `checkpoint`, `random` or `wired` (the built-in model's); `place` is the folder or
    the repository of a checkpoint.
    """

    name: str
    model: PreTrainedModel
    architecture: Architecture
    origin: Origin
    weights: str
    dtype: str
    device: torch.device
    place: str | None = None

    @property
    def recalls(self) -> bool:
        """Whether it is the built-in model, which finds needles."""
        return self.weights == WIRED

    @property
    def takes_chunks(self) -> bool:
        """Whether a prompt may come in pieces: transformers' recurrent layers start anew when more
        than one token comes at once.
        """
        parts = (part for layer in self.architecture.layers for part in layer.parts())
        return not any(hasattr(part, "states") for part in parts)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        msg = f"unknown device {name[:40]!r}; choose auto, cpu or cuda"
        raise InputError(msg) from None
    if device.type not in ("cpu", "cuda"):
        msg = f"device {name[:40]!r} is not measured; choose auto, cpu or cuda"
        raise InputError(msg)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        msg = f"no {device} here: use --device cpu, or one of the GPUs that `nvidia-smi` lists"
        raise InputError(msg)
    return device


def load_model(
    model: str | None,
    *,
    weights: str,
    num_layers: int | None,
    dtype: str,
    device: torch.device,
    seed: int,
    revision: str | None,
    least_cache_bytes: LeastCache = no_cache,
) -> LoadedModel:
    """Load or build a model for measuring; None is the built-in one, whose knobs may follow its
    name: `built-in:num_kv_heads=1,head_dim=128`.

    `weights` is `checkpoint` or `random`; `num_layers` keeps only the first layers of a model with
    random weights; `least_cache_bytes` says what must fit beside them. Raises InputError for what
    cannot be found or does not fit in memory, and UnsupportedError for a model that is not sized,
    not part of transformers, or no decoder of tokens and a cache alone.
    """
    config: Mapping[str, Any]
    diffuse = False
    if model is None or model.partition(":")[0] == BUILT_IN:
        name = model or BUILT_IN
        knobs = _knobs(name)
        diffuse = bool(knobs.pop("diffuse", 0))
        config, weights = retrieval.retrieval_config(**knobs), WIRED
        origin = Origin(requested=name, resolved=name, kind="mapping", detail=name)
    else:
        config, origin = sources.resolve(model, revision=revision)
    if num_layers is not None and weights == "checkpoint":
        msg = "--layers builds a slice of a model, which needs --weights random"
        raise InputError(msg)
    decoder = _decoder_config(config)
    if num_layers is not None:
        decoder = _first_layers(decoder, num_layers)
    architecture = describe(decoder)
    dtype_name = _computed_in(architecture, dtype)
    load_engine("transformers").refuse(architecture, tp=1, pp=1)
    _check_decodes_alone(architecture)
    torch.manual_seed(seed)
    place = None
    try:
        if weights == WIRED:
            loaded: PreTrainedModel = retrieval.build(
                decoder, device, TORCH_DTYPES[dtype_name], diffuse=diffuse
            )
        elif weights == "random":
            cache_bytes = least_cache_bytes(architecture, origin, dtype_name)
            loaded = _random(decoder, origin, TORCH_DTYPES[dtype_name], device, cache_bytes)
        else:
            place = _weights_place(origin, revision)
            loaded = _checkpoint(place, TORCH_DTYPES[dtype_name], device, revision)
        loaded.eval()
        _check_keeps(loaded, architecture)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        msg = (
            f"{origin.resolved} does not fit in the memory of {device}; measure a slice of the "
            "layers with --weights random --layers N"
        )
        raise InputError(msg) from None
    return LoadedModel(
        origin.resolved, loaded, architecture, origin, weights, dtype_name, device, place
    )


def _computed_in(architecture: Architecture, dtype: str) -> str:
    """The name of the dtype to compute in, `auto` being the config's; InputError for another."""
    name = dtype
    if dtype == "auto":
        if isinstance(architecture.model_dtype, ConfigError):
            raise architecture.model_dtype
        name = str(architecture.model_dtype.value)
    if name not in TORCH_DTYPES:
        msg = f"--dtype {shown(dtype)} is no dtype to compute in; choose {', '.join(TORCH_DTYPES)}"
        raise InputError(msg)
    return name


def widest(model: PreTrainedModel, name: str) -> int | None:
    """A number of the decoder's configuration, of its layers the largest where they differ; None
    where it has none.
    """
    text: Any = model.config.get_text_config(decoder=True)
    differ = getattr(text, "is_heterogeneous", False)
    values: list[Any] = []
    for config in text.per_layer_config if differ else [text]:
        value = getattr(config, name, None)
        values += value if isinstance(value, list | tuple) else [value]
    return max((value for value in values if value), default=None)


def _check_keeps(model: PreTrainedModel, architecture: Architecture) -> None:
    """Run three tokens: raise UnsupportedError for a model that does not run on tokens alone, or
    that keeps something elsewhere than in the cache it is given.

    It is a GPU's first work, too, whose libraries keep memory for themselves from then on: no
    strategy's peak has that in it.
    """
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            feed(model, cache, tokens)
            feed(model, cache, tokens[:, :1])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        msg = (
            f"{type(model).__name__} does not decode from tokens and a cache alone "
            f"({type(error).__name__}: {_first_line(error)}); kvcalc size counts its cache"
        )
        raise UnsupportedError(msg) from None
    promised = load_engine("transformers").lay_out(architecture)
    held = held_by_layer(cache) + [LayerBytes(0, 0)] * len(promised)
    for index, (layer, found) in enumerate(zip(promised, held, strict=False)):
        if layer.num_bytes(tokens=3, batch=1, dtype=FORMATS["fp32"]) and not found.held_bytes:
            msg = (
                f"{type(model).__name__} keeps what layer {index} remembers elsewhere than in the "
                "cache it is given, so no strategy can be run; kvcalc size counts it"
            )
            raise UnsupportedError(msg)


_KNOBS = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "diffuse")


def _knobs(name: str) -> dict[str, int]:
    """Knobs of the built-in model; InputError for an unknown one or no whole number."""
    knobs: dict[str, int] = {}
    for item in filter(None, name.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in _KNOBS or not re.fullmatch(r"[0-9]{1,4}", value):
            msg = f"the built-in model has no {shown(item)}; its knobs: {', '.join(_KNOBS)}"
            raise InputError(msg)
        knobs[key] = int(value)
    heads, kv_heads = knobs.get("num_heads", 8), knobs.get("num_kv_heads", 2)
    if not kv_heads or heads % kv_heads:
        msg = f"the built-in model's {heads} num_heads are no multiple of {kv_heads} num_kv_heads"
        raise InputError(msg)
    return knobs


def _decoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's own config, with the dtype of the whole and without quantisation."""
    level = decoder_level(config)
    decoder = {**level.config, "model_type": level.model_type}
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None:
            decoder[key] = config[key]
    for key in ("quantization_config", "auto_map"):
        decoder.pop(key, None)
    return decoder


def _first_layers(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The config of a model that has only the first `count` of the layers."""
    whole = len(describe(config).layers)
    if not 1 <= count <= whole:
        msg = f"--layers must be from 1 to {whole}, the layers of this model, not {count}"
        raise InputError(msg)
    defaults = class_defaults(str(config["model_type"]))
    aliases = defaults.aliases if defaults else {}
    own_name = aliases.get("num_hidden_layers", "num_hidden_layers")
    key = own_name if own_name in config else "num_hidden_layers"
    shortened = {**config, key: count}
    if isinstance(config.get("layer_types"), list):
        shortened["layer_types"] = config["layer_types"][:count]
    return shortened


def _random(
    config: Mapping[str, Any],
    origin: Origin,
    dtype: torch.dtype,
    device: torch.device,
    cache_bytes: int,
) -> PreTrainedModel:
    if origin.completeness == "partial":
        msg = (
            f"{origin.resolved}: its config here is partial and does not say the shape of the "
            "weights; give the whole config.json to build it with random weights"
        )
        raise InputError(msg)
    hf_config = _hf_config(config)
    if type(hf_config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001 - no other list
        msg = (
            "profile runs what AutoModelForCausalLM builds, and transformers "
            f"{transformers_version()} has no such class for model_type {config['model_type']!r}; "
            "kvcalc size and kvcalc fit take it"
        )
        raise UnsupportedError(msg)
    try:
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        msg = (
            f"transformers {transformers_version()} cannot build model_type "
            f"{config['model_type']!r} from this config: {_first_line(error)}"
        )
        raise InputError(msg) from None
    need_bytes = sum(tensor.numel() for tensor in shapes.parameters()) * dtype.itemsize
    _check_room(need_bytes, cache_bytes, device)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    model.tie_weights()
    _fill(model)
    return cast("PreTrainedModel", model)


def _fill(model: PreTrainedModel) -> None:
    """Small random weights, ones for norms: a model that computes, made at memory speed.

    One tile of noise is laid over each tensor; drawing every weight would take minutes for
    billions of them and change no byte or time.
    """
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() < 2 and not name.endswith("bias"):
            flat.fill_(1)
            continue
        tile = 0.02 * torch.randn(min(_TILE, flat.numel()), device=flat.device)
        for start in range(0, flat.numel(), _TILE):
            part = flat[start : start + _TILE]
            part.copy_(tile[: part.numel()])


def _check_decodes_alone(architecture: Architecture) -> None:
    """Raise UnsupportedError for a decoder that attends to an encoder, whose output it has not."""
    parts = (part for layer in architecture.layers for part in layer.parts())
    if any(isinstance(part, CrossAttention) for part in parts):
        msg = (
            f"profile runs decoders alone, and model_type {architecture.model_type!r} attends to "
            "an encoder's output; kvcalc size --encoder-seq N counts both"
        )
        raise UnsupportedError(msg)


def _hf_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    fields = {
        key: value
        for key, value in config.items()
        if key not in ("model_type", "dtype", "torch_dtype")
    }
    try:
        made = AutoConfig.for_model(config["model_type"], **fields)
    except Exception as error:  # noqa: BLE001 - whatever a configuration class raises
        msg = f"transformers does not take this config: {_first_line(error)}"
        raise InputError(msg) from None
    # A published padding token may lie outside a reduced vocabulary; which it is decides nothing.
    padding, words = getattr(made, "pad_token_id", None), getattr(made, "vocab_size", None)
    if isinstance(padding, int) and isinstance(words, int) and not -words <= padding < words:
        made.pad_token_id = 0
    return made


def _check_room(weights_bytes: int, cache_bytes: int, device: torch.device) -> None:
    """Raise InputError before anything is made when weights and cache are more than is free."""
    free_bytes = free_memory(device)
    if weights_bytes + cache_bytes > free_bytes:
        cache = f" and a cache of {format_bytes(cache_bytes)}" if cache_bytes else ""
        remedy = " or a smaller --batch (--force tries all the same)" if cache_bytes else ""
        msg = (
            f"weights of {format_bytes(weights_bytes)}{cache} do not fit in the "
            f"{format_bytes(free_bytes)} free on {device}; measure a slice of the layers with "
            f"--layers N{remedy}"
        )
        raise InputError(msg)


def _checkpoint(
    place: str, dtype: torch.dtype, device: torch.device, revision: str | None
) -> PreTrainedModel:
    """Weights from a local folder or the Hub; a repository's own code is never run."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            dtype=dtype,
            revision=revision or "main",
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        missing = sorted(report["missing_keys"])
        if not missing:
            return cast("PreTrainedModel", model.to(device))
        reason = f"{len(missing)} weights are missing, {missing[0]} among them"
    except Exception as error:  # noqa: BLE001 - libraries below raise their own kinds
        reason = _first_line(error)
    msg = f"cannot load {place} ({reason}); --weights random builds it from its config alone"
    raise ModelNotFoundError(msg)


def _weights_place(origin: Origin, revision: str | None) -> str:
    """A folder that holds weights, or a repository on the Hub that answers."""
    if origin.kind == "file":
        return str(Path(origin.detail).parent)
    cached = find_in_hf_cache(origin.resolved, revision=revision or "main")
    if cached is not None and any(cached.parent.glob("*.safetensors")):
        return str(cached.parent)
    check_reachable(
        origin.resolved,
        revision=revision,
        hint=" Or add --weights random to build it from its config alone.",
    )
    return origin.resolved


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{lines[0]:.160}"
