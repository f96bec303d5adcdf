"""Formats whose config has groups of modules: compressed-tensors, and modelopt's mixed precision.

What is stored is what compressed-tensors 0.20.0 writes (compressors/*/base.py and
quantization/lifecycle/initialize.py) and NVIDIA's ModelOpt 0.47.0 (torch/export/moe_utils.py and
unified_export_hf.py: experts apart, each with scales of its own); a config chooses modules as
compressed-tensors' utils/match.py does.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeGuard

from kvcalc.units import ceil_div, shown
from kvcalc.weights._parts import Matrix, Parts
from kvcalc.weights._patterns import Pattern, parse
from kvcalc.weights._rules import (
    ALL_LINEAR,
    CACHE_SCALES,
    MAX_NAME,
    MAX_NAMES,
    SCALE,
    Quantization,
    Rule,
    below_decoder,
    elsewhere,
    unknown,
)

MAX_STEPS: Final = 1_000_000
"""Most letters of patterns, once for each name that they are held against: Kimi K2.5 needs 0.14
million.
"""

_BEFORE_LAYERS: Final = {
    False: ("model.",),
    True: ("model.", "language_model.model.", "model.language_model."),
}
_BEFORE_HEAD: Final = {False: ("",), True: ("", "language_model.")}
"""What may stand before the name of a layer, or of the output head: of a plain decoder, and of one
in a wrapper.
"""


class Scheme(NamedTuple):
    """What compressed-tensors stores for a module of a group: all of its tensors, in bytes."""

    name: str
    bits: int
    packed: bool
    """Whether values share words of 32 bits, with the matrix's shape beside them."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale, 0 for all of a side; None: one for the whole matrix."""
    whole_groups: bool
    scale_bytes: int
    zero_points: bool
    group_index: bool
    more_bytes: int
    """Scales of inputs, a scale of scales, and the shape."""

    def bytes_of(self, matrix: Matrix, declared: Quantization) -> int:
        """Bytes of one copy of a matrix."""
        rows, columns = matrix.rows, matrix.columns
        high, wide = self.block or (0, 0)
        if self.whole_groups and wide and columns % wide:
            why = f"{columns} inputs of {matrix.name} are no whole number of groups"
            raise unknown(declared, "config_groups", why)
        groups = ceil_div(columns, wide or columns)
        scales = ceil_div(rows, high or rows) * groups
        total = scales * self.scale_bytes + self.more_bytes
        total += 4 * columns if self.group_index else 0
        if self.packed:
            zeros = 4 * ceil_div(rows * self.bits, 32) * groups
            total += 4 * rows * ceil_div(columns * self.bits, 32)
        else:
            zeros = scales
            total += rows * columns * self.bits // 8
        return total + (zeros if self.zero_points else 0)


class Chooser:
    """Which rule a matrix has, by the groups of a config; None: it stays as it is."""

    def __init__(self, declared: Quantization, parts: Parts, value_bytes: int) -> None:
        self.declared = declared
        self.model_type = parts.fields.model_type
        self.nested = bool(parts.fields.prefix)
        self.tied = not any(matrix.name == "lm_head" for matrix in parts.matrices)
        self.value_bytes = value_bytes
        self.rules: list[Rule | Scheme] = []
        self.names: dict[str, int] = {}
        """The group of each module that is named, below the decoder."""

    def groups(self) -> list[Mapping[str, Any]]:
        """The config's groups."""
        groups = self.declared.data.get("config_groups")
        if not isinstance(groups, Mapping) or not 0 < len(groups) <= 100:
            raise unknown(self.declared, "config_groups", "this config has no groups of modules")
        if not all(isinstance(group, Mapping) for group in groups.values()):
            raise unknown(self.declared, "config_groups", "a group is no object")
        return list(groups.values())

    def targets(self, group: Mapping[str, Any]) -> list[str]:
        """What a group lists as its modules."""
        targets = group.get("targets")
        if not isinstance(targets, list | tuple) or not 0 < len(targets) <= MAX_NAMES:
            raise unknown(
                self.declared, "config_groups", "a group does not say which modules it has"
            )
        if not all(isinstance(target, str) and len(target) <= MAX_NAME for target in targets):
            raise unknown(self.declared, "config_groups", "a group's targets are no names")
        return list(targets)

    def name_all(self, index: int, names: list[str]) -> None:
        """Note the group of modules that are named."""
        for name in names:
            below = below_decoder(name)
            if self.names.setdefault(below, index) != index:
                raise unknown(self.declared, "config_groups", f"{shown(name)} is in two groups")


class MixedPrecision(Chooser):
    """ModelOpt's MIXED_PRECISION: each module by the group that names it (`…mlp.experts` names all
    matrices of the experts), or by its own entry in `quantized_layers` where there are no groups;
    fp8 or nvfp4; others keep the model's dtype.
    """

    def __init__(self, declared: Quantization, parts: Parts, value_bytes: int) -> None:
        super().__init__(declared, parts, value_bytes)
        self.notes: tuple[str, ...] = CACHE_SCALES
        key = "config_groups"
        if declared.data.get(key) is None and declared.data.get("quantized_layers") is not None:
            key = "quantized_layers"
            self._read_layers({matrix.name: matrix.copies for matrix in parts.matrices})
        else:
            for index, group in enumerate(self.groups()):
                self.rules.append(self._rule(group))
                self.name_all(index, self.targets(group))
        known = {self._name(matrix) for matrix in parts.matrices}
        known |= {matrix.name for matrix in parts.matrices}
        for name in self.names:
            if name not in known and not elsewhere(name):
                raise unknown(self.declared, key, f"{shown(name)} is no module that is known here")

    def _read_layers(self, copies: Mapping[str, int]) -> None:
        """Names with a format each. Experts have one each, too: all of a layer must have the same,
        of which `copies` says how many there are.
        """
        layers = condensed(self.declared.data["quantized_layers"])
        if layers is None:
            why = "only names with a format each, and all experts of a layer alike, are known"
            raise unknown(self.declared, "quantized_layers", why)
        indices: dict[tuple[object, object], int] = {}
        for name, (entry, experts) in layers.items():
            below = below_decoder(name)
            if experts not in (0, copies.get(below, experts)):
                why = f"of {shown(name)} some experts are left out"
                raise unknown(self.declared, "quantized_layers", why)
            kind = entry.get("quant_algo"), entry.get("group_size")
            rule = _LAYER_RULES.get(kind) if all(map(_is_plain, kind)) else None
            if rule is None:
                why = "only FP8, and NVFP4 and W4A16_NVFP4 in groups of 16 are known"
                raise unknown(self.declared, "quantized_layers", why)
            if kind not in indices:
                indices[kind] = len(self.rules)
                self.rules.append(rule)
                self.notes += rule.notes
            if self.names.setdefault(below, indices[kind]) != indices[kind]:
                raise unknown(self.declared, "quantized_layers", f"{shown(name)} has two formats")

    @staticmethod
    def _name(matrix: Matrix) -> str:
        """The module that a group names for a matrix."""
        return matrix.name.rpartition(".")[0] if matrix.expert else matrix.name

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        inputs, weights = group.get("input_activations"), group.get("weights")
        if not isinstance(inputs, Mapping) or inputs.get("dynamic") is not False:
            raise unknown(self.declared, "config_groups", "only static scales of inputs are known")
        kind = _kind(weights) if isinstance(weights, Mapping) else None
        if kind == ("float", 8, None):
            return _FP8
        if kind == ("float", 4, 16):
            return _NVFP4
        raise unknown(
            self.declared, "config_groups", "only fp8 and nvfp4 in groups of 16 are known"
        )

    def rule_of(self, matrix: Matrix) -> Rule | Scheme | None:
        """The rule of a matrix."""
        index = self.names.get(matrix.name, self.names.get(self._name(matrix)))
        if index is None:
            return None
        if self.declared.leaves_out(matrix.name):
            raise unknown(
                self.declared, "ignore", f"a group has {matrix.name}, which this list leaves out"
            )
        return self.rules[index]


_FP8: Final = Rule("fp8", (1, 1), None, more_bytes=SCALE)
_NVFP4: Final = Rule("nvfp4", (2, 1), (1, 16), scale_bytes=1, more_bytes=2 * SCALE)
_LAYER_RULES: Final[Mapping[tuple[object, object], Rule]] = {
    ("FP8", None): _FP8,
    ("NVFP4", 16): _NVFP4,
    ("W4A16_NVFP4", 16): _NVFP4._replace(
        unsure_bytes=SCALE,
        notes=(
            "scales of the inputs of W4A16 matrices, which some writers leave out, are counted",
        ),
    ),
}
"""By `quant_algo` and `group_size`. ModelOpt writes `input_scale` where inputs are quantised, and
W4A16 says that they are not; published files (Qwen3.6-35B-A3B-NVFP4) have it all the same.
"""

_EXPERT: Final = re.compile(r"(.{1,400}\.experts)\.(0|[1-9]\d{0,5})\.(\w{1,80})")


def condensed(layers: object) -> dict[str, tuple[Mapping[str, Any], int]] | None:
    """What `quantized_layers` says of each module, with all experts of a layer (`…experts.up_proj`)
    as one, and their number, else 0. None where it is no such field, or experts differ.
    """
    if not isinstance(layers, Mapping) or not 0 < len(layers) <= MAX_NAMES:
        return None
    found: dict[str, Mapping[str, Any]] = {}
    experts: dict[str, set[int]] = {}
    for name, entry in layers.items():
        if not isinstance(name, str) or len(name) > MAX_NAME or not isinstance(entry, Mapping):
            return None
        expert = _EXPERT.fullmatch(name)
        key = f"{expert[1]}.{expert[3]}" if expert else name
        if (key in found) != (expert is not None and key in experts):
            return None
        if found.setdefault(key, entry) != entry:
            return None
        if expert:
            experts.setdefault(key, set()).add(int(expert[2]))
    if any(max(numbers) >= len(numbers) for numbers in experts.values()):
        return None
    return {name: (entry, len(experts.get(name, ()))) for name, entry in found.items()}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int)


def _kind(weights: Mapping[str, Any]) -> tuple[object, object, object]:
    return weights.get("type"), weights.get("num_bits"), weights.get("group_size")


class CompressedTensors(Chooser):
    """All linear modules that a group's targets choose and `ignore` does not.

    A name is a whole one, a pattern (`re:`) matches from the beginning of one. What stands before
    the decoder's layers differs between versions of a wrapper, so that a pattern that depends on it
    is refused.
    """

    def __init__(self, declared: Quantization, parts: Parts, value_bytes: int) -> None:
        super().__init__(declared, parts, value_bytes)
        data = declared.data
        if self.model_type not in ALL_LINEAR | {"kimi_k2"}:
            raise unknown(
                self.declared, "quant_method", f"the linear modules of {shown(self.model_type)}"
            )
        if data.get("ignore") is None:
            raise unknown(self.declared, "ignore", "this config does not say what it leaves out")
        if data.get("quantization_status") not in (None, "compressed", "frozen"):
            raise unknown(self.declared, "quantization_status", "only compressed weights are known")
        sparsity = data.get("sparsity_config") or {"format": "dense"}
        if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
            raise unknown(
                self.declared, "sparsity_config", "sparse weights are stored in several ways"
            )
        if data.get("transform_config"):
            raise unknown(self.declared, "transform_config", "transforms have weights of their own")
        self.notes = CACHE_SCALES if data.get("kv_cache_scheme") is not None else ()
        self.ignored = [self._pattern(text, "ignore") for text in declared.patterns]
        self.steps = 0
        self.numbers: dict[tuple[str, int], list[int]] = {}
        self.patterns: list[tuple[Pattern, int]] = []
        self.linear: list[int] = []
        """Groups of all linear modules."""
        for index, group in enumerate(self.groups()):
            self.rules.append(self._scheme(group))
            self._choose(index, self.targets(group))
        self.each_expert = any(".experts." in name for name in {*declared.names, *self.names})
        if self.tied and not self._ignores(Matrix("lm_head", 1, 1)):
            raise unknown(self.declared, "ignore", "the output head is tied and not left out")

    def _choose(self, index: int, targets: list[str]) -> None:
        for target in targets:
            if target.startswith("re:"):
                self.patterns.append((self._pattern(target, "config_groups"), index))
            elif target == "Linear":
                self.linear.append(index)
            elif "." in target or target == "lm_head":
                self.name_all(index, [target])
            else:
                raise unknown(
                    self.declared,
                    "config_groups",
                    "only Linear, names and patterns are known as targets",
                )

    def _pattern(self, text: str, key: str) -> Pattern:
        pattern = parse(text.removeprefix("re:"))
        if pattern is None:
            why = f"of regular expressions kvcalc reads simple ones alone, not {shown(text)}"
            raise unknown(self.declared, key, why)
        return pattern

    def rule_of(self, matrix: Matrix) -> Rule | Scheme | None:
        """The rule of a matrix: names come before patterns, patterns before classes."""
        if matrix.kept and matrix.name not in ("lm_head", "embed_tokens"):
            return None  # a router, which is no linear module in kimi_k2
        tiers: list[set[int]] = [
            self._named(matrix),
            {
                index
                for pattern, index in self.patterns
                if self._matches(pattern, matrix, "config_groups")
            },
            set(self.linear) if matrix.name != "embed_tokens" else set(),
        ]
        chosen = next((tier for tier in tiers if tier), None)
        if chosen is None or self._ignores(matrix):
            return None
        if len(chosen) > 1 or matrix.name == "embed_tokens":
            raise unknown(
                self.declared,
                "config_groups",
                f"the groups' targets leave open what {matrix.name} is",
            )
        return self.rules[chosen.pop()]

    def _named(self, matrix: Matrix) -> set[int]:
        if not self.names:
            return set()
        found = {self.names.get(name, -1) for name in self._names_of(matrix)}
        if len(found) > 1:
            raise unknown(
                self.declared,
                "config_groups",
                f"copies of {matrix.name} are stored in several ways",
            )
        return found - {-1}

    def _names_of(self, matrix: Matrix) -> Iterable[str]:
        """Names of a matrix's modules: of every expert, where the config names any."""
        numbers = range(matrix.copies if self.each_expert else 1)
        self._step(len(numbers))
        return _full_names(matrix, numbers)

    def _ignores(self, matrix: Matrix) -> bool:
        names = self.declared.names
        listed = {name in names for name in self._names_of(matrix)}
        if len(listed) > 1:
            raise unknown(self.declared, "ignore", f"it names some copies of {matrix.name}")
        if listed == {True} or any(
            self._matches(pattern, matrix, "ignore") for pattern in self.ignored
        ):
            return True
        if "Linear" in names or self.declared.leaves_out(matrix.name):
            raise unknown(self.declared, "ignore", f"it names {matrix.name} only in part")
        return False

    def _matches(self, pattern: Pattern, matrix: Matrix, key: str) -> bool:
        """Whether a pattern matches a matrix's module, whatever stands before its name."""
        if matrix.name == "lm_head":
            before = _BEFORE_HEAD[self.nested]
        else:
            before = _BEFORE_LAYERS[self.nested]
        answers = set()
        numbers = self._numbers(pattern.digits, matrix.copies) if matrix.expert else ()
        for name in _full_names(matrix, numbers):
            for prefix in before:
                self._step(1 + len(pattern.text))
                answers.add(pattern.matches(prefix + name))
        if len(answers) > 1:
            what = f"whether {shown(pattern.text)} matches {matrix.name}"
            raise unknown(self.declared, key, f"{what} depends on the expert or on a prefix")
        return answers.pop()

    def _numbers(self, digits: str, copies: int) -> Iterable[int]:
        """An expert of each kind that a pattern with these digits can tell apart."""
        if (digits, copies) not in self.numbers:
            self._step(copies)
            alike = str.maketrans(dict.fromkeys(set("0123456789") - set(digits), "x"))
            kinds = {str(number).translate(alike): number for number in range(copies)}
            self.numbers[digits, copies] = list(kinds.values())
        return self.numbers[digits, copies]

    def _step(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise unknown(self.declared, "ignore", "too many patterns")

    def _scheme(self, group: Mapping[str, Any]) -> Scheme:
        """What a group stores for a module."""
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise unknown(
                self.declared, "config_groups", "a group does not say what it does with weights"
            )
        if group.get("output_activations") is not None:
            raise unknown(self.declared, "config_groups", "scales of outputs are not known")
        if weights.get("dynamic", False) is not False:
            raise unknown(self.declared, "config_groups", "weights cannot have dynamic scales")
        form = group.get("format") or self.declared.data.get("format")
        key = "config_groups" if group.get("format") else "format"
        name, payload = self._values(form, weights, key)
        block = self._block(weights, form)
        symmetric = weights.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise unknown(self.declared, "config_groups", "symmetric is neither true nor false")
        packed = form == "pack-quantized"
        if not symmetric:
            self._check_zero_points(form, block)
        more_bytes = self._input_bytes(group.get("input_activations"))
        if packed:  # `weight_shape`: int64, and int32 in Moonshot's own checkpoints (of no version)
            moonshot = self.model_type == "kimi_k2" and self.declared.data.get("version") is None
            more_bytes += 8 if moonshot else 16
        four = form == "nvfp4-pack-quantized"
        return Scheme(
            name,
            payload,
            packed,
            block,
            whole_groups=weights.get("strategy") != "block",
            scale_bytes=1 if four else self.value_bytes,
            zero_points=not symmetric,
            group_index=self._ordered(weights, form),
            more_bytes=more_bytes + (SCALE if four else 0),
        )

    def _values(self, form: object, weights: Mapping[str, Any], key: str) -> tuple[str, int]:
        """The format's name, and bits of a stored value."""
        bits = weights.get("num_bits")
        if isinstance(bits, bool) or bits not in (4, 8):
            raise unknown(self.declared, "config_groups", "only 4 and 8 bits are known")
        scales = weights.get("scale_dtype")
        match (form, weights.get("type"), bits):
            case ("pack-quantized", "int", _) if scales is None:
                return f"int{bits}", bits
            case ("int-quantized", "int", _) if scales is None:
                return "int8", 8  # four bits, too, have a byte each here
            case ("float-quantized", "float", 8) if scales is None:
                return "fp8", 8
            case ("nvfp4-pack-quantized", "float", 4) if scales in (None, "torch.float8_e4m3fn"):
                return "nvfp4", 4
        raise unknown(self.declared, key, "no such format of weights is known")

    def _block(self, weights: Mapping[str, Any], form: object) -> tuple[int, int] | None:
        """Rows and columns that share a scale."""
        size, structure = weights.get("group_size"), weights.get("block_structure")
        strategy = weights.get("strategy")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        four = form == "nvfp4-pack-quantized"
        match strategy:
            case "tensor" if size is None and not four:
                return None
            case "channel" if size in (None, -1) and not four:
                return (1, 0)
            case "group" if _is_size(size) and form in ("pack-quantized", "int-quantized"):
                return (1, size)
            case "tensor_group" if four and size == 16:
                return (1, 16)
            case "block" if form == "float-quantized" and size is None:
                if isinstance(structure, list | tuple) and len(structure) == 2:
                    rows, columns = structure
                    if _is_size(rows) and _is_size(columns):
                        return (rows, columns)
        raise unknown(
            self.declared, "config_groups", "no such strategy of scales is known for this format"
        )

    def _check_zero_points(self, form: object, block: tuple[int, int] | None) -> None:
        """Zero points of packed values are packed as well since compressed-tensors 0.9.4."""
        if block is None or form not in ("pack-quantized", "int-quantized"):
            raise unknown(
                self.declared, "config_groups", "zero points of this format are not known"
            )
        version = str(self.declared.data.get("version", ""))
        numbers = [int(part) for part in version.split(".")[:3] if part.isdecimal()]
        if form == "pack-quantized" and numbers < [0, 9, 4]:
            raise unknown(
                self.declared, "version", "versions before 0.9.4 store zero points in another way"
            )

    def _input_bytes(self, inputs: object) -> int:
        """Bytes of a module's scales of inputs."""
        if inputs is None:
            return 0
        if not isinstance(inputs, Mapping):
            raise unknown(self.declared, "config_groups", "input_activations is no object")
        dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy")
        if dynamic is True:
            return 0
        if dynamic == "local" and strategy == "tensor_group":
            return SCALE  # input_global_scale
        alone = strategy in (None, "tensor") and inputs.get("group_size") is None
        if dynamic is False and alone and inputs.get("symmetric", True) is True:
            return self.value_bytes
        raise unknown(self.declared, "config_groups", "no such scales of inputs are known")

    def _ordered(self, weights: Mapping[str, Any], form: object) -> bool:
        """Whether inputs are ordered, and each has the number of its group (`weight_g_idx`)."""
        order = weights.get("actorder")
        if order in (None, False, "weight", "static"):
            return False
        if order in ("group", "dynamic") and form == "pack-quantized":
            return True
        raise unknown(self.declared, "config_groups", "no such order of inputs is known")


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**20


def _full_names(matrix: Matrix, numbers: Iterable[int]) -> Iterator[str]:
    """Names of a matrix's modules below the decoder: of experts, those of these numbers."""
    if not matrix.expert:
        yield matrix.name
        return
    before, _, name = matrix.name.rpartition(".")
    for number in numbers:
        yield f"{before}.{number}.{name}"
