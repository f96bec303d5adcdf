"""What a decoder is made of, as far as the bytes of its weights depend on it."""

from typing import Final, NamedTuple

from kvcalc.config import MAX_LAYERS, ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.units import shown

MAX_EXPERTS: Final = 100_000
"""Most experts of a layer: published models have hundreds."""


class Matrix(NamedTuple):
    """A weight of `rows` (out) by `columns` (in) values, `copies` times, with `bias` values each.

    `name` is its module's below the decoder (`layers.0.self_attn.q_proj`). `kept` is True for
    what no published quantisation touches: embeddings, head, routers, gates.
    """

    name: str
    rows: int
    columns: int
    copies: int = 1
    bias: int = 0
    kept: bool = False
    expert: bool = False

    @property
    def num_values(self) -> int:
        """Values of the weight itself, in all its copies."""
        return self.rows * self.columns * self.copies


class Parts:
    """Collects the matrices of a decoder and the sum of its other parameters."""

    def __init__(self, fields: ConfigFields) -> None:
        self.fields = fields
        self.width = fields.count("hidden_size")
        """Values of a hidden state."""
        self.matrices: list[Matrix] = []
        self.num_plain = 0
        """Parameters of norms, convolutions and vectors, which stay in the model's dtype."""
        self.num_buffers = 0
        """Values that checkpoints hold and transformers does not call parameters."""
        self.indexed = False
        """Whether layers have the indexer of DeepSeek's sparse attention."""
        self.layer = ""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.fields.count("num_hidden_layers", most=MAX_LAYERS)

    def linear(
        self, name: str, rows: int, columns: int, *, bias: bool = False, kept: bool = False
    ) -> None:
        """One linear module of the present layer."""
        bias_values = rows if bias else 0
        self.matrices.append(
            Matrix(f"{self.layer}{name}", rows, columns, 1, bias_values, kept=kept)
        )

    def experts(self, name: str, rows: int, columns: int, copies: int, *, bias: bool) -> None:
        """One linear module of each routed expert."""
        bias_values = rows if bias else 0
        self.matrices.append(
            Matrix(f"{self.layer}{name}", rows, columns, copies, bias_values, expert=True)
        )

    def plain(self, *counts: int) -> None:
        """Parameters that no quantisation touches."""
        self.num_plain += sum(counts)

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self.num_plain + sum(
            matrix.num_values + matrix.bias * matrix.copies for matrix in self.matrices
        )


def switch(fields: ConfigFields, rule: bool | str) -> bool:
    """A constant, or the flag of the field that the rule names."""
    return fields.flag(rule) if isinstance(rule, str) else rule


def head_values(fields: ConfigFields, width: int, heads: int) -> int:
    """Values of a head: `head_dim`, else `width / heads` rounded down, as transformers does.

    Nemotron-H's own files name the field `attention_head_dim`.
    """
    if fields.given("head_dim") is None and fields.given("attention_head_dim") is not None:
        return fields.count("attention_head_dim")
    return fields.optional_count("head_dim") or width // heads


def need(fields: ConfigFields, *keys: str) -> None:
    """Refuse a config that does not say what decides these weights.

    Class defaults are no answer here: published models differ from them, and excerpts of configs
    leave the fields out.
    """
    for key in keys:
        if fields.given(key) is None:
            msg = (
                f"the weights of {shown(fields.model_type)} depend on {fields.prefix}{key}, which "
                f"this config does not say; give the whole config.json; deciding field: {key}"
            )
            raise UnsupportedError(msg)


def refuse(fields: ConfigFields, key: str, why: str) -> UnsupportedError:
    """The error to raise for weights that are not known exactly."""
    value = shown(fields.given(key))
    msg = (
        f"the weights of {shown(fields.model_type)} with {fields.prefix}{key} = {value} are not "
        f"known exactly ({why}); deciding field: {key}"
    )
    return UnsupportedError(msg)
