"""Bytes of weights in the format that a checkpoint declares, block scales included.

What a quantiser stores beside the values is that of its own writer: DeepSeek's and Qwen's fp8,
AutoAWQ 0.2 (GEMM layout), AutoGPTQ 0.7, gpt-oss' mxfp4, ModelOpt 0.31's nvfp4, bitsandbytes 0.50.2
and compressed-tensors 0.20.0. What a config leaves open is refused.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from kvcalc.dtypes import COMPUTE_DTYPES, storage_format
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.units import ceil_div, shown
from kvcalc.weights._groups import CompressedTensors, MixedPrecision
from kvcalc.weights._parts import Matrix, Parts
from kvcalc.weights._rules import (
    ALL_LINEAR,
    CACHE_SCALES,
    LEFT_OUT,
    MAX_COMPARISONS,
    SCALE,
    SKIPPED,
    Quantization,
    Rule,
    only_group,
    unknown,
)


class Stored(NamedTuple):
    """Bytes of all weights, the format's name, the rule in one line, and remarks.

    `least_bytes` is not None where writers differ, and they may be that little.
    """

    num_bytes: int
    name: str
    rule: str
    notes: tuple[str, ...] = ()
    least_bytes: int | None = None


def stored(config: Mapping[str, Any], parts: Parts, *, wanted: str | None) -> Stored:
    """The bytes in the declared format, or in the plain one that is wanted."""
    if wanted is not None:
        name = _dtype(wanted)
        if not name:
            choices = ", ".join(COMPUTE_DTYPES)
            msg = f"dtype {shown(wanted)} is no plain dtype of weights; choose {choices}"
            raise InputError(msg)
        return _plain(parts, name, "as asked for")
    levels = (config, parts.fields.data)
    found = [
        level["quantization_config"]
        for level in levels
        if level.get("quantization_config") is not None
    ]
    if not found:
        for other in _OTHER_FIELDS:
            if any(level.get(other) is not None for level in levels):
                msg = (
                    f"weights are quantised as config field {other} says, which kvcalc does not "
                    f"read; give a folder of its safetensors files; deciding field: {other}"
                )
                raise UnsupportedError(msg)
        key, name = _declared_dtype(config, parts)
        return _plain(parts, name, f"by config field {key}")
    quantization = found[0]
    if not isinstance(quantization, Mapping):
        msg = f"config field quantization_config is {shown(quantization)}, not an object"
        raise ConfigError(msg)
    return _quantised(config, parts, Quantization(quantization))


def _plain(parts: Parts, name: str, rule: str) -> Stored:
    return Stored(parts.num_parameters * _value_bytes(name), name, f"{name} {rule}")


def _value_bytes(name: str) -> int:
    return storage_format(name).block_bytes


_OTHER_FIELDS: Final = ("compression_config", "quantization")
"""Where compressed-tensors before 0.6 and MLX write how weights are quantised."""


def _dtype(value: object) -> str:
    """The name of a plain dtype; empty where it is none."""
    try:
        name = storage_format(value).name if isinstance(value, str) else ""
    except InputError:
        name = ""
    return name if name in COMPUTE_DTYPES else ""


def _declared_dtype(config: Mapping[str, Any], parts: Parts) -> tuple[str, str]:
    """The dtype of what is not quantised: the whole config's before the text part's."""
    for level, prefix in ((config, ""), (parts.fields.data, parts.fields.prefix)):
        for key in ("dtype", "torch_dtype"):
            value = level.get(key)
            if value is not None and value != "auto":
                name = _dtype(value)
                if not name:
                    msg = (
                        f"config field {prefix}{key} {shown(value)} is no plain dtype of weights "
                        f"({', '.join(COMPUTE_DTYPES)}); correct it, or give --weights"
                    )
                    raise ConfigError(msg)
                return prefix + key, name
    msg = (
        "this config names no dtype of its weights; give a config.json that says torch_dtype; "
        "deciding field: dtype"
    )
    raise UnsupportedError(msg)


def _quantised(config: Mapping[str, Any], parts: Parts, declared: Quantization) -> Stored:
    """The sum over all matrices, those that the method touches by its rule."""
    if parts.indexed:
        raise unknown(declared, "quant_method", "which modules of the indexer it has differs")
    if len(declared.globs) * len(parts.matrices) > MAX_COMPARISONS:
        raise unknown(declared, "ignore", "too many patterns")
    method = (declared.data.get("quant_method"), declared.data.get("quant_algo"))
    chooser: MixedPrecision | CompressedTensors | _OneRule
    if method == ("modelopt", "MIXED_PRECISION"):
        key, dtype = _declared_dtype(config, parts)
        chooser = MixedPrecision(declared, parts, _value_bytes(dtype))
    elif method == ("compressed-tensors", None):
        key, dtype = _declared_dtype(config, parts)
        chooser = CompressedTensors(declared, parts, _value_bytes(dtype))
    else:
        rule = _rule(declared, parts.fields.model_type)
        key, dtype = ("quant_method", "bf16") if rule is _MXFP4 else _declared_dtype(config, parts)
        if rule.scales_in_dtype and _value_bytes(dtype) != rule.scale_bytes:
            raise unknown(declared, "quant_method", f"scales of {dtype} have not been seen")
        chooser = _OneRule(declared, rule)
    value_bytes = _value_bytes(dtype)
    total = value_bytes * parts.num_plain
    unsure = 0
    quantised = dict.fromkeys((each.name for each in chooser.rules), 0)
    for matrix in parts.matrices:
        total += value_bytes * matrix.bias * matrix.copies
        found = chooser.rule_of(matrix)
        if found is None:
            total += value_bytes * matrix.num_values
        else:
            total += matrix.copies * found.bytes_of(matrix, declared)
            unsure += matrix.copies * found.unsure_bytes if isinstance(found, Rule) else 0
            quantised[found.name] += matrix.num_values
    counted = ", ".join(f"{name} for {count:,} values" for name, count in quantised.items())
    line = f"{counted}, else {dtype} by {key}"
    least = total - unsure if unsure else None
    return Stored(total, "+".join(quantised), line, chooser.notes, least)


class _OneRule:
    """The same rule for all matrices that a method touches and a config does not leave out."""

    def __init__(self, declared: Quantization, rule: "Rule | _Running") -> None:
        self.declared, self.rule = declared, rule
        self.rules, self.notes = [rule], rule.notes

    def rule_of(self, matrix: Matrix) -> "Rule | _Running | None":
        """The rule of a matrix; None: it stays as it is."""
        rule = self.rule
        if rule is _MXFP4:
            applies = matrix.expert
        else:
            applies = not matrix.kept or (rule.head and matrix.name == "lm_head")
        if not applies or self.declared.leaves_out(matrix.name):
            return None
        if matrix.expert and rule.dense_only:
            raise unknown(self.declared, "quant_method", "experts are stored in several ways")
        return rule


def _rule(declared: Quantization, model_type: str) -> "Rule | _Running":
    """The rule of the method that the config names."""
    method, algorithm = declared.data.get("quant_method"), declared.data.get("quant_algo")
    rule: Rule | _Running
    match (method, algorithm):
        case ("modelopt", "NVFP4"):
            rule = _nvfp4(declared)
        case ("modelopt" | None, "FP8"):
            rule = _fp8_per_tensor(declared)
        case ("fp8", None):
            rule = _fp8_blocks(declared)
        case ("mxfp4", None) if model_type == "gpt_oss":
            rule = _MXFP4
        case ("awq" | "gptq", None):
            rule = _int4(declared, method)
        case ("bitsandbytes", None):
            rule = _bitsandbytes(declared, model_type)
        case _:
            key = "quant_algo" if algorithm is not None else "quant_method"
            raise unknown(declared, key, "kvcalc has no rule for it")
    return rule


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
    scale_bytes: int = SCALE
    dense_only: bool = True
    scales_in_dtype: bool = False

    def bytes_of(self, matrix: Matrix, declared: Quantization) -> int:
        """Bytes of one copy of a matrix."""
        values = matrix.rows * matrix.columns
        if values % (2 * self.storage_bytes):
            why = f"the {values} values of {matrix.name} do not fill what they are packed into"
            raise unknown(declared, "bnb_4bit_quant_storage", why)
        blocks = ceil_div(values, 64)
        total = values // 2 + 16 * SCALE
        if not self.nested:
            return total + blocks * SCALE
        return total + blocks + (ceil_div(blocks, 256) + 256 + 1) * SCALE


_MXFP4 = Rule("mxfp4", (32, 16), (1, 32), scale_bytes=1)
"""gpt-oss (openai/gpt-oss, model card): experts alone, an 8-bit scale for 32 values of a row."""


def _fp8_blocks(declared: Quantization) -> Rule:
    """DeepSeek-V3's fp8 (arXiv:2412.19437, section 3.3): `weight_scale_inv` in fp32 for blocks."""
    block = declared.data.get("weight_block_size")
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(isinstance(side, int) and 0 < side <= 2**20 for side in block)
    ):
        raise unknown(declared, "weight_block_size", "only scales of blocks are known")
    if declared.data.get("activation_scheme", "dynamic") != "dynamic":
        raise unknown(declared, "activation_scheme", "scales of inputs are stored in several ways")
    return Rule("fp8", (1, 1), (block[0], block[1]), whole_groups=False)


def _fp8_per_tensor(declared: Quantization) -> Rule:
    """ModelOpt's fp8: `weight_scale` and `input_scale`, one fp32 each."""
    if declared.data.get("ignore") is None and declared.data.get("exclude_modules") is None:
        raise unknown(declared, "ignore", "this config does not say what it leaves out")
    return Rule("fp8", (1, 1), None, more_bytes=SCALE, notes=CACHE_SCALES)


def _nvfp4(declared: Quantization) -> Rule:
    """ModelOpt's nvfp4: an fp8 scale for 16 values, `weight_scale_2` and `input_scale` in fp32."""
    if declared.data.get("ignore") is None and declared.data.get("exclude_modules") is None:
        raise unknown(declared, "ignore", "this config does not say what it leaves out")
    if declared.data.get("config_groups") is None and "group_size" in declared.data:
        if declared.count("group_size") != 16:  # hf_quant_config.json has no groups of modules
            raise unknown(declared, "group_size", "only groups of 16 are known")
    else:
        weights = only_group(declared)
        if weights.get("num_bits") != 4 or weights.get("group_size") != 16:
            raise unknown(declared, "config_groups", "only 4 bits in groups of 16 are known")
    return Rule("nvfp4", (2, 1), (1, 16), scale_bytes=1, more_bytes=2 * SCALE, notes=CACHE_SCALES)


_STORAGE: Final = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def _bitsandbytes(declared: Quantization, model_type: str) -> "Rule | _Running":
    """Four or eight bits of bitsandbytes 0.50.2 (nn/modules.py), as transformers 5.23.0 applies it.

    All linear modules but those that `llm_int8_skip_modules` names, or without that list but the
    output head. What a config leaves out has BitsAndBytesConfig's default.
    """
    data = declared.data
    if model_type not in ALL_LINEAR:
        raise unknown(declared, "quant_method", f"the linear modules of {shown(model_type)}")
    if declared.flag("llm_int8_has_fp16_weight"):
        raise unknown(declared, "llm_int8_has_fp16_weight", "then values are not of 8 bits")
    skipped = data.get(SKIPPED)
    plain = all(name.replace(".", "").isidentifier() for name in skipped or ())
    if not plain or any(data.get(key) for key in LEFT_OUT):
        raise unknown(declared, SKIPPED, "only names of modules are known")
    head = skipped is not None
    if declared.flag("load_in_8bit"):
        return Rule(
            "int8", (1, 1), (1, 0), more_bytes=1, dense_only=True, head=head, whole_groups=False
        )
    if not declared.flag("load_in_4bit"):
        raise unknown(declared, "load_in_4bit", "neither 4 nor 8 bits")
    name = data.get("bnb_4bit_quant_type", "fp4")
    if name not in ("nf4", "fp4"):
        raise unknown(declared, "bnb_4bit_quant_type", "only nf4 and fp4 are known")
    storage = data.get("bnb_4bit_quant_storage", "uint8")
    if not isinstance(storage, str) or storage not in _STORAGE:
        raise unknown(declared, "bnb_4bit_quant_storage", "no such dtype is known")
    return _Running(
        name,
        nested=declared.flag("bnb_4bit_use_double_quant"),
        storage_bytes=_STORAGE[storage],
        head=head,
        notes=("the texts of quant_state, which no GPU holds, are not counted",),
    )


def _int4(declared: Quantization, method: str) -> Rule:
    """AWQ and GPTQ: eight values in a word, a 2-byte scale and a 4-bit zero point for a group of
    inputs and an output.
    """
    if declared.count("bits") != 4:
        raise unknown(declared, "bits", "only 4 bits are known")
    data = declared.data
    if method == "awq" and (
        str(data.get("version", "")).lower() != "gemm" or data.get("zero_point") is not True
    ):
        raise unknown(declared, "version", "only GEMM with zero points is known")
    if method == "gptq" and data.get("checkpoint_format", "gptq") != "gptq":
        raise unknown(declared, "checkpoint_format", "only gptq is known")
    size = 0 if data.get("group_size") == -1 else declared.count("group_size")
    notes = ("biases of zeros, which some writers add, are not counted",)
    return Rule(
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
