"""What a quantised matrix takes, and what a `quantization_config` says of modules."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from kvcalc.errors import ConfigError, UnsupportedError
from kvcalc.units import ceil_div, shown
from kvcalc.weights._parts import Matrix

SCALE: Final = 4
"""Bytes of a scale in fp32."""

MAX_NAMES: Final = 100_000
"""Most names in a list of modules that stay as they are."""

MAX_NAME: Final = 500
"""Longest name or pattern of modules: published ones have below 100 letters."""

MAX_COMPARISONS: Final = 2_000_000
"""Most pairs of a module and a pattern with `*`: published configs have below 200,000."""


CACHE_SCALES: Final = ("scales of a quantised cache are not counted",)

LEFT_OUT: Final = ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers")
SKIPPED: Final = "llm_int8_skip_modules"
"""Fields that list modules which stay as they are."""


ALL_LINEAR: Final = frozenset(
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


def unknown(declared: "Quantization", key: str, why: str) -> UnsupportedError:
    """The error to raise for a format that is not known exactly."""
    msg = (
        f"the bytes of weights with quantization_config.{key} = {shown(declared.data.get(key))} "
        f"are not known exactly ({why}); give a folder of its safetensors files; "
        f"deciding field: quantization_config.{key}"
    )
    return UnsupportedError(msg)


class Quantization:
    """A `quantization_config`: what it says, and which modules it leaves out."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        left_out: list[str] = []
        for key in (*LEFT_OUT, SKIPPED):
            names = data.get(key)
            if names is None:
                continue
            is_list = isinstance(names, list | tuple) and len(names) <= MAX_NAMES
            if not is_list or not all(isinstance(name, str) for name in names):
                raise self.wrong(key, "a list of names")
            left_out += names
        for name in left_out:
            pattern = name.startswith("re:") and data.get("quant_method") != "compressed-tensors"
            if pattern or len(name) > MAX_NAME:
                raise unknown(self, "ignore", "kvcalc runs no regular expressions of a config")
        below = [below_decoder(name) for name in left_out if not name.startswith("re:")]
        self.patterns = [name for name in left_out if name.startswith("re:")]
        """Patterns of whole names, which compressed-tensors alone has."""
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
            raise unknown(self, key, "this config does not say it")
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
        if listed and self.data.get(SKIPPED):
            first_or_last = module.startswith(tuple(listed)) or module.endswith(tuple(listed))
            if not first_or_last:  # transformers 4 skips what stands below a bare `mlp`, 5 does not
                why = f"versions of transformers differ on whether it names {module}"
                raise unknown(self, SKIPPED, why)
        return bool(listed) or any(fnmatchcase(module, glob) for glob in self.globs)


_ELSEWHERE: Final = ("vis", "audio", "encoder", "speech", "talker", "mtp")
"""What stands in the names of parts beside the text decoder."""


def below_decoder(name: str) -> str:
    """A module's name without what stands before the decoder's layers, embedding or head."""
    before, found, after = name.partition("layers.")
    if found:
        ours = before[-1:] in ("", ".")
    else:
        before, _, after = name.rpartition(".")
        ours = after in ("embed_tokens", "lm_head")
    return found + after if ours and not elsewhere(before) else name


def elsewhere(name: str) -> bool:
    """Whether a name is of a part beside the text decoder (`mtp.layers.0`)."""
    return any(word in name for word in _ELSEWHERE)


class Rule(NamedTuple):
    """What a quantised matrix takes: all of its tensors in bytes, for one copy of it."""

    name: str
    values: tuple[int, int]
    """Elements of a block along a row, and bytes of their payload."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: the whole matrix has one. 0 is all of a side."""
    scale_bytes: int = SCALE
    more_bytes: int = 0
    """Bytes for the matrix beside payload and scales."""
    unsure_bytes: int = 0
    """How many of these some writers leave out."""
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

    def bytes_of(self, matrix: Matrix, declared: Quantization) -> int:
        """Bytes of one copy of a matrix."""
        elements, payload = self.values
        blocks, rest = divmod(matrix.columns, elements)
        group = self.block[1] if self.block and self.whole_groups else 0
        if rest or (group and matrix.columns % group):
            why = f"{matrix.columns} inputs of {matrix.name} are no whole number of blocks"
            raise unknown(declared, "quant_method", why)
        total = matrix.rows * blocks * payload + self.more_bytes
        if self.block is None:
            return total + self.scale_bytes
        rows = ceil_div(matrix.rows, self.block[0] or matrix.rows)
        columns = ceil_div(matrix.columns, self.block[1] or matrix.columns)
        total += rows * columns * self.scale_bytes
        if self.zero_points:
            if matrix.rows % 8:
                why = f"{matrix.rows} outputs of {matrix.name} do not fill words of eight"
                raise unknown(declared, "quant_method", why)
            total += rows * columns // 2
        return total + (4 * matrix.columns if self.group_index else 0)


def only_group(declared: Quantization) -> Mapping[str, Any]:
    """What the config's only group of modules, all linear ones, does with weights."""
    groups = declared.data.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise unknown(declared, "config_groups", "only one group is known")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("targets", ["Linear"]) != ["Linear"]:
        raise unknown(declared, "config_groups", "only a group of all linear modules is known")
    return weights
