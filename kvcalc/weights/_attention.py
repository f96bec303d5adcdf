"""The weights of what mixes tokens: attention, latent attention, Mamba and gated delta rules.

Shapes are those of transformers 5.23.0's modeling files; names in messages and skip lists too.
"""

from kvcalc.units import ceil_div
from kvcalc.weights._parts import Parts, head_values, refuse, switch

Rule = bool | str
"""A constant, or the name of the field that switches it on."""


def attention(
    parts: Parts,
    *,
    qkv_bias: Rule,
    out_bias: Rule,
    norms: str = "",
    gate: bool = False,
    kv_heads: int = 0,
) -> None:
    """Q, K, V and output projections of grouped heads (arXiv:2305.13245).

    `norms` of q and k: `head` has one value for each of a head's, `full` one for each of all
    heads'. `kv_heads` is given where another field than `num_key_value_heads` says it. With `gate`
    the query projection has a gate of its own size (Qwen3-Next).
    """
    fields = parts.fields
    heads = fields.count("num_attention_heads")
    kv_heads = kv_heads or fields.optional_count("num_key_value_heads") or heads
    size = head_values(fields, parts.width, heads)
    with_bias = switch(fields, qkv_bias)
    queries = heads * size * (2 if gate else 1)
    parts.linear("self_attn.q_proj", queries, parts.width, bias=with_bias)
    for name in ("k_proj", "v_proj"):
        parts.linear(f"self_attn.{name}", kv_heads * size, parts.width, bias=with_bias)
    parts.linear("self_attn.o_proj", parts.width, heads * size, bias=switch(fields, out_bias))
    if norms:
        parts.plain(2 * size if norms == "head" else (heads + kv_heads) * size)


def latent(parts: Parts) -> None:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1)."""
    fields = parts.fields
    heads = fields.count("num_attention_heads")
    if fields.get("kv_lora_rank") is None:
        raise refuse(fields, "kv_lora_rank", "its attention is not latent")
    rank = fields.count("kv_lora_rank")
    rotary = fields.count("qk_rope_head_dim")
    nope = fields.count("qk_nope_head_dim")
    if fields.model_type == "minicpm3" and fields.get("v_head_dim") is None:
        values = parts.width // heads
    else:
        values = fields.count("v_head_dim")
    bias = fields.flag("attention_bias")
    query_rank = fields.optional_count("q_lora_rank")
    queries = heads * (nope + rotary)
    if query_rank is None:
        parts.linear("self_attn.q_proj", queries, parts.width)
    else:
        parts.linear("self_attn.q_a_proj", query_rank, parts.width, bias=bias)
        parts.plain(query_rank)
        parts.linear("self_attn.q_b_proj", queries, query_rank)
    parts.linear("self_attn.kv_a_proj_with_mqa", rank + rotary, parts.width, bias=bias)
    parts.plain(rank)
    parts.linear("self_attn.kv_b_proj", heads * (nope + values), rank)
    parts.linear("self_attn.o_proj", parts.width, heads * values, bias=bias)


def indexer(parts: Parts) -> None:
    """The lightning indexer of DeepSeek-V3.2; its key norm has weight and bias."""
    fields = parts.fields
    heads, size = fields.count("index_n_heads"), fields.count("index_head_dim")
    parts.indexed = True
    parts.linear("self_attn.indexer.wq_b", heads * size, fields.count("q_lora_rank"))
    parts.linear("self_attn.indexer.wk", size, parts.width)
    parts.linear("self_attn.indexer.weights_proj", heads, parts.width, kept=True)
    parts.plain(2 * size)


def mamba1(
    parts: Parts, name: str, inner: int, *, state: str, conv: str, rank: str, bias: bool
) -> int:
    """Mamba (arXiv:2312.00752): input-dependent B, C and step sizes; `inner` channels. Returns
    the rank of the steps. `state`, `conv` and `rank` are the fields of those numbers.
    """
    fields = parts.fields
    size = fields.count(state)
    steps = ceil_div(parts.width, 16) if fields.get(rank) == "auto" else fields.count(rank)
    parts.linear(f"{name}.in_proj", 2 * inner, parts.width, bias=bias)
    parts.plain(inner * fields.count(conv) + inner)
    parts.linear(f"{name}.x_proj", steps + 2 * size, inner)
    parts.linear(f"{name}.dt_proj", inner, steps, bias=True)
    parts.plain(inner * size, inner)
    parts.linear(f"{name}.out_proj", parts.width, inner, bias=bias)
    return steps


def mamba2(
    parts: Parts,
    *,
    name: str,
    inner: int,
    heads: int,
    groups: int,
    state: int,
    conv: int,
    conv_bias: bool,
    bias: bool,
    norm: bool = True,
) -> None:
    """Mamba-2 (arXiv:2405.21060): A, D and a step bias for each head, one convolution over the
    inner values, B and C, and a gated norm.
    """
    channels = inner + 2 * groups * state
    parts.linear(f"{name}.in_proj", inner + channels + heads, parts.width, bias=bias)
    parts.plain(channels * (conv + (1 if conv_bias else 0)), 3 * heads, inner if norm else 0)
    parts.linear(f"{name}.out_proj", parts.width, inner, bias=bias)


def delta(parts: Parts, *, fused: bool) -> None:
    """A gated delta rule (arXiv:2412.06464) as in Qwen3-Next; Qwen3.5 has its inputs apart."""
    fields = parts.fields
    key_heads = fields.count("linear_num_key_heads")
    value_heads = fields.count("linear_num_value_heads")
    size = fields.count("linear_value_head_dim")
    keys, values = key_heads * fields.count("linear_key_head_dim"), value_heads * size
    if fused:
        parts.linear("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, parts.width)
        parts.linear("linear_attn.in_proj_ba", 2 * value_heads, parts.width)
    else:
        parts.linear("linear_attn.in_proj_qkv", 2 * keys + values, parts.width)
        parts.linear("linear_attn.in_proj_z", values, parts.width)
        for name in ("in_proj_b", "in_proj_a"):
            parts.linear(f"linear_attn.{name}", value_heads, parts.width)
    parts.plain((2 * keys + values) * fields.count("linear_conv_kernel_dim"))
    parts.plain(2 * value_heads, size)
    parts.linear("linear_attn.out_proj", parts.width, values)
