"""Bytes of weights in the format that a checkpoint declares, block scales included.

What a quantiser stores beside the values is that of its own writer: DeepSeek's and Qwen's fp8,
AutoAWQ 0.2 (GEMM layout), AutoGPTQ 0.7, gpt-oss' mxfp4, ModelOpt 0.31's nvfp4 and bitsandbytes
0.50.2. What a config leaves open is refused.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from kvcalc.dtypes import COMPUTE_DTYPES, storage_format
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.units import ceil_div, shown
from kvcalc.weights._parts import Matrix, Parts

_SCALE: Final = 4
"""Bytes of a scale in fp32."""

MAX_NAMES: Final = 100_000
"""Most names in a list of modules that stay as they are."""

MAX_COMPARISONS: Final = 2_000_000
"""Most pairs of a module and a pattern with `*`: published configs have below 200,000."""


_LEFT_OUT: Final = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
_SKIPPED: Final = "llm_int8_skip_modules"
"""Fields that list modules which stay as they are."""


class Stored(NamedTuple):
    """Bytes of all weights, the format's name, the rule in one line, and remarks."""

    num_bytes: int
    name: str
    rule: str
    notes: tuple[str, ...] = ()


def stored(config: Mapping[str, Any], parts: Parts, *, wanted: str | None) -> Stored:
    """The bytes in the declared format, or in the plain one that is wanted."""
    if wanted is not None:
        return _plain(parts, _dtype(wanted, "dtype"), "as asked for")
    found = [
        level["quantization_config"]
        for level in (config, parts.fields.data)
        if level.get("quantization_config") is not None
    ]
    if not found:
        key, name = _declared_dtype(config, parts)
        return _plain(parts, name, f"by config field {key}")
    quantization = found[0]
    if not isinstance(quantization, Mapping):
        msg = f"config field quantization_config is {shown(quantization)}, not an object"
        raise ConfigError(msg)
    return _quantised(config, parts, _Quantization(quantization))


def _plain(parts: Parts, name: str, rule: str) -> Stored:
    return Stored(parts.num_parameters * _value_bytes(name), name, f"{name} {rule}")


def _value_bytes(name: str) -> int:
    return storage_format(name).block_bytes


def _dtype(value: object, key: str) -> str:
    try:
        name = storage_format(value).name if isinstance(value, str) else ""
    except InputError:
        name = ""
    if name not in COMPUTE_DTYPES:
        msg = (
            f"{key} {shown(value)} is no plain dtype of weights; choose {', '.join(COMPUTE_DTYPES)}"
        )
        raise InputError(msg)
    return name


def _declared_dtype(config: Mapping[str, Any], parts: Parts) -> tuple[str, str]:
    """The dtype of what is not quantised: the whole config's before the text part's."""
    for level, prefix in ((config, ""), (parts.fields.data, parts.fields.prefix)):
        for key in ("dtype", "torch_dtype"):
            value = level.get(key)
            if value is not None and value != "auto":
                return prefix + key, _dtype(value, f"config field {prefix}{key}")
    msg = "this config names no dtype of its weights; give one; deciding field: dtype"
    raise UnsupportedError(msg)


def _unknown(declared: "_Quantization", key: str, why: str) -> UnsupportedError:
    """The error to raise for a format that is not known exactly."""
    msg = (
        f"the bytes of weights with quantization_config.{key} = {shown(declared.data.get(key))} "
        f"are not known exactly ({why}); give a plain dtype or a folder of safetensors files; "
        f"deciding field: quantization_config.{key}"
    )
    return UnsupportedError(msg)


class _Quantization:
    """A `quantization_config`: what it says, and which modules it leaves out."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        left_out: list[str] = []
        for key in (*_LEFT_OUT, _SKIPPED):
            names = data.get(key)
            if names is None:
                continue
            is_list = isinstance(names, list | tuple) and len(names) <= MAX_NAMES
            if not is_list or not all(isinstance(name, str) for name in names):
                raise self.wrong(key, "a list of names")
            left_out += names
        for name in left_out:
            if name.startswith("re:") or len(name) > 500:
                raise _unknown(self, "ignore", "kvcalc runs no regular expressions of a config")
        below = [_below_decoder(name) for name in left_out]
        self.names = frozenset(name for name in below if "*" not in name)
        self.globs = [name for name in below if "*" in name]

    def wrong(self, key: str, wanted: str) -> ConfigError:
        """The error for a field that holds something else."""
        msg = f"config field quantization_config.{key} is {shown(self.data.get(key))}, not {wanted}"
        return ConfigError(msg)

    def count(self, key: str) -> int:
        """A whole number that the config must say."""
        value = self.data.get(key)
        if value is None:
            raise _unknown(self, key, "this config does not say it")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 2**20:
            raise self.wrong(key, "a whole number")
        return value

    def flag(self, key: str) -> bool:
        """True or false; false where the config does not say it."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def leaves_out(self, module: str) -> bool:
        """Whether a module below the decoder stays as it is: it, one that it is in, or one part
        of its name, is listed (`gate` is `layers.3.mlp.gate`, not `gate_proj`).
        """
        pieces = module.split(".")
        ends = range(1, len(pieces) + 1)
        spans = (".".join(pieces[start:end]) for end in ends for start in range(end))
        listed = [span for span in spans if span in self.names]
        if listed and self.data.get(_SKIPPED):
            first_or_last = module.startswith(tuple(listed)) or module.endswith(tuple(listed))
            if not first_or_last:  # transformers 4 skips what stands below a bare `mlp`, 5 does not
                why = f"versions of transformers differ on whether it names {module}"
                raise _unknown(self, _SKIPPED, why)
        return bool(listed) or any(fnmatchcase(module, glob) for glob in self.globs)


def _below_decoder(name: str) -> str:
    """A module's name without what stands before the decoder's layers."""
    before, found, after = name.partition("layers.")
    return f"layers.{after}" if found and before[-1:] in ("", ".") else name


def _quantised(config: Mapping[str, Any], parts: Parts, declared: _Quantization) -> Stored:
    """The sum over all matrices, those that the method touches by its rule."""
    if parts.indexed:
        raise _unknown(declared, "quant_method", "which modules of the indexer it has differs")
    if len(declared.globs) * len(parts.matrices) > MAX_COMPARISONS:
        raise _unknown(declared, "ignore", "too many patterns")
    rule = _rule(declared, parts.fields.model_type)
    if rule is _MXFP4:
        key, dtype = "quant_method", "bf16"
    else:
        key, dtype = _declared_dtype(config, parts)
    value_bytes = _value_bytes(dtype)
    if rule.scales_in_dtype and value_bytes != rule.scale_bytes:
        raise _unknown(declared, "quant_method", f"scales of {dtype} have not been seen")
    total = value_bytes * parts.num_plain
    num_quantised = 0
    for matrix in parts.matrices:
        total += value_bytes * matrix.bias * matrix.copies
        if rule is _MXFP4:
            applies = matrix.expert
        else:
            applies = not matrix.kept or (rule.head and matrix.name == "lm_head")
        if not applies or declared.leaves_out(matrix.name):
            total += value_bytes * matrix.num_values
        else:
            if matrix.expert and rule.dense_only:
                raise _unknown(declared, "quant_method", "experts are stored in several ways")
            total += matrix.copies * rule.bytes_of(matrix, declared)
            num_quantised += matrix.num_values
    line = f"{rule.name} for {num_quantised:,} values, else {dtype} by {key}"
    return Stored(total, rule.name, line, rule.notes)


def _rule(declared: _Quantization, model_type: str) -> "_Rule | _Running":
    """The rule of the method that the config names."""
    method, algorithm = declared.data.get("quant_method"), declared.data.get("quant_algo")
    rule: _Rule | _Running
    match (method, algorithm):
        case ("modelopt", "NVFP4"):
            rule = _nvfp4(declared)
        case ("modelopt" | None, "FP8"):
            rule = _fp8_per_tensor(declared)
        case ("fp8", None):
            rule = _fp8_blocks(declared)
        case ("compressed-tensors", None):
            rule = _fp8_channels(declared)
        case ("mxfp4", None) if model_type == "gpt_oss":
            rule = _MXFP4
        case ("awq" | "gptq", None):
            rule = _int4(declared, method)
        case ("bitsandbytes", None):
            rule = _bitsandbytes(declared, model_type)
        case _:
            key = "quant_algo" if algorithm is not None else "quant_method"
            raise _unknown(declared, key, "kvcalc has no rule for it")
    return rule


class _Rule(NamedTuple):
    """What a quantised matrix takes: all of its tensors in bytes, for one copy of it."""

    name: str
    values: tuple[int, int]
    """Elements of a block along a row, and bytes of their payload."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: the whole matrix has one. 0 is all of a side."""
    scale_bytes: int = _SCALE
    more_bytes: int = 0
    """Bytes for the matrix beside payload and scales."""
    whole_groups: bool = True
    """Whether the columns of a matrix must be a whole number of blocks."""
    zero_points: bool = False
    """Whether each scale has a zero point of four bits, eight in a word."""
    group_index: bool = False
    """Whether each input channel has the number of its group, four bytes (`g_idx`)."""
    dense_only: bool = False
    scales_in_dtype: bool = False
    head: bool = False
    """Whether the output head is one of the matrices that may be quantised."""
    notes: tuple[str, ...] = ()

    def bytes_of(self, matrix: Matrix, declared: _Quantization) -> int:
        """Bytes of one copy of a matrix."""
        elements, payload = self.values
        blocks, rest = divmod(matrix.columns, elements)
        group = self.block[1] if self.block and self.whole_groups else 0
        if rest or (group and matrix.columns % group):
            why = f"{matrix.columns} inputs of {matrix.name} are no whole number of blocks"
            raise _unknown(declared, "quant_method", why)
        total = matrix.rows * blocks * payload + self.more_bytes
        if self.block is None:
            return total + self.scale_bytes
        rows = ceil_div(matrix.rows, self.block[0] or matrix.rows)
        columns = ceil_div(matrix.columns, self.block[1] or matrix.columns)
        total += rows * columns * self.scale_bytes
        if self.zero_points:
            if matrix.rows % 8:
                why = f"{matrix.rows} outputs of {matrix.name} do not fill words of eight"
                raise _unknown(declared, "quant_method", why)
            total += rows * columns // 2
        return total + (4 * matrix.columns if self.group_index else 0)


class _Running(NamedTuple):
    """Four bits of bitsandbytes (functional.py, `quantize_4bit`, `QuantState.as_dict`).

    Blocks of 64 values run on from row to row of a matrix, each with an fp32 scale. With `nested`
    scales these have 8 bits, in blocks of 256 with an fp32 scale, about an fp32 mean. Tables of 16
    and 256 fp32 values stand beside them.
    """

    name: str
    nested: bool
    storage_bytes: int
    """Bytes of the dtype that packed values are stored as."""
    head: bool
    notes: tuple[str, ...]
    scale_bytes: int = _SCALE
    dense_only: bool = True
    scales_in_dtype: bool = False

    def bytes_of(self, matrix: Matrix, declared: _Quantization) -> int:
        """Bytes of one copy of a matrix."""
        values = matrix.rows * matrix.columns
        if values % (2 * self.storage_bytes):
            why = f"the {values} values of {matrix.name} do not fill what they are packed into"
            raise _unknown(declared, "bnb_4bit_quant_storage", why)
        blocks = ceil_div(values, 64)
        total = values // 2 + 16 * _SCALE
        if not self.nested:
            return total + blocks * _SCALE
        return total + blocks + (ceil_div(blocks, 256) + 256 + 1) * _SCALE


_MXFP4 = _Rule("mxfp4", (32, 16), (1, 32), scale_bytes=1)
"""gpt-oss (openai/gpt-oss, model card): experts alone, an 8-bit scale for 32 values of a row."""


def _fp8_blocks(declared: _Quantization) -> _Rule:
    """DeepSeek-V3's fp8 (arXiv:2412.19437, section 3.3): `weight_scale_inv` in fp32 for blocks."""
    block = declared.data.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(side, int) and 0 < side <= 2**20 for side in block)
    ):
        raise _unknown(declared, "weight_block_size", "only scales of blocks are known")
    if declared.data.get("activation_scheme", "dynamic") != "dynamic":
        raise _unknown(declared, "activation_scheme", "scales of inputs are stored in several ways")
    return _Rule("fp8", (1, 1), (block[0], block[1]), whole_groups=False)


def _fp8_per_tensor(declared: _Quantization) -> _Rule:
    """ModelOpt's fp8: `weight_scale` and `input_scale`, one fp32 each."""
    if declared.data.get("ignore") is None and declared.data.get("exclude_modules") is None:
        raise _unknown(declared, "ignore", "this config does not say what it leaves out")
    return _Rule("fp8", (1, 1), None, more_bytes=_SCALE, notes=_WITHOUT_CACHE_SCALES)


def _nvfp4(declared: _Quantization) -> _Rule:
    """ModelOpt's nvfp4: an fp8 scale for 16 values, `weight_scale_2` and `input_scale` in fp32."""
    if declared.data.get("ignore") is None and declared.data.get("exclude_modules") is None:
        raise _unknown(declared, "ignore", "this config does not say what it leaves out")
    weights = _only_group(declared)
    if weights.get("num_bits") != 4 or weights.get("group_size") != 16:
        raise _unknown(declared, "config_groups", "only 4 bits in groups of 16 are known")
    return _Rule(
        "nvfp4", (2, 1), (1, 16), scale_bytes=1, more_bytes=2 * _SCALE, notes=_WITHOUT_CACHE_SCALES
    )


def _fp8_channels(declared: _Quantization) -> _Rule:
    """compressed-tensors' fp8 with a scale for each output channel, in the model's dtype."""
    if declared.data.get("format") != "float-quantized":
        raise _unknown(declared, "format", "only float-quantized is known")
    if declared.data.get("ignore") is None:
        raise _unknown(declared, "ignore", "this config does not say what it leaves out")
    weights = _only_group(declared)
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    if kind != ("float", 8, "channel"):
        raise _unknown(declared, "config_groups", "only fp8 with scales of channels is known")
    return _Rule("fp8", (1, 1), (1, 0), scale_bytes=2, dense_only=True, scales_in_dtype=True)


_STORAGE: Final = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

_ALL_LINEAR: Final = frozenset(
    {
        "apertus",
        "cohere",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "helium",
        "llama",
        "minicpm3",
        "ministral",
        "ministral3",
        "mistral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_5_text",
        "qwen3_vl_text",
        "seed_oss",
        "smollm3",
        "stablelm",
    }
)
"""Types whose class in transformers 5.23.0 has exactly our matrices as `torch.nn.Linear`, under our
names and none of them fused or stacked: each has tables of its own.
"""


def _bitsandbytes(declared: _Quantization, model_type: str) -> "_Rule | _Running":
    """Four or eight bits of bitsandbytes 0.50.2 (nn/modules.py), as transformers 5.23.0 applies it.

    All linear modules but those that `llm_int8_skip_modules` names, or without that list but the
    output head. What a config leaves out has BitsAndBytesConfig's default.
    """
    data = declared.data
    if model_type not in _ALL_LINEAR:
        raise _unknown(declared, "quant_method", f"the linear modules of {shown(model_type)}")
    if declared.flag("llm_int8_has_fp16_weight"):
        raise _unknown(declared, "llm_int8_has_fp16_weight", "then values are not of 8 bits")
    skipped = data.get(_SKIPPED)
    plain = all(name.replace(".", "").isidentifier() for name in skipped or ())
    if not plain or any(data.get(key) for key in _LEFT_OUT):
        raise _unknown(declared, _SKIPPED, "only names of modules are known")
    head = skipped is not None
    if declared.flag("load_in_8bit"):
        return _Rule(
            "int8", (1, 1), (1, 0), more_bytes=1, dense_only=True, head=head, whole_groups=False
        )
    if not declared.flag("load_in_4bit"):
        raise _unknown(declared, "load_in_4bit", "neither 4 nor 8 bits")
    name = data.get("bnb_4bit_quant_type", "fp4")
    if name not in ("nf4", "fp4"):
        raise _unknown(declared, "bnb_4bit_quant_type", "only nf4 and fp4 are known")
    storage = data.get("bnb_4bit_quant_storage", "uint8")
    if not isinstance(storage, str) or storage not in _STORAGE:
        raise _unknown(declared, "bnb_4bit_quant_storage", "no such dtype is known")
    return _Running(
        name,
        nested=declared.flag("bnb_4bit_use_double_quant"),
        storage_bytes=_STORAGE[storage],
        head=head,
        notes=("the texts of quant_state, which no GPU holds, are not counted",),
    )


def _only_group(declared: _Quantization) -> Mapping[str, Any]:
    """What the config's only group of modules, all linear ones, does with weights."""
    groups = declared.data.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise _unknown(declared, "config_groups", "only one group is known")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("targets", ["Linear"]) != ["Linear"]:
        raise _unknown(declared, "config_groups", "only a group of all linear modules is known")
    return weights


def _int4(declared: _Quantization, method: str) -> _Rule:
    """AWQ and GPTQ: eight values in a word, a 2-byte scale and a 4-bit zero point for a group of
    inputs and an output.
    """
    if declared.count("bits") != 4:
        raise _unknown(declared, "bits", "only 4 bits are known")
    data = declared.data
    if method == "awq" and (
        str(data.get("version", "")).lower() != "gemm" or data.get("zero_point") is not True
    ):
        raise _unknown(declared, "version", "only GEMM with zero points is known")
    if method == "gptq" and data.get("checkpoint_format", "gptq") != "gptq":
        raise _unknown(declared, "checkpoint_format", "only gptq is known")
    size = 0 if data.get("group_size") == -1 else declared.count("group_size")
    notes = ("biases of zeros, which some writers add, are not counted",)
    return _Rule(
        f"{method}-int4",
        (8, 4),
        (1, size),
        scale_bytes=2,
        zero_points=True,
        group_index=method == "gptq",
        dense_only=True,
        scales_in_dtype=True,
        notes=notes if method == "gptq" else (),
    )


_WITHOUT_CACHE_SCALES = ("scales of a quantised cache are not counted",)
