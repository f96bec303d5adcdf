"""Decoders whose layers differ from one another, or whose fields have shapes of their own."""

from collections.abc import Callable

from kvcalc.config import MAX_LAYERS
from kvcalc.units import shown
from kvcalc.weights import _attention as mix
from kvcalc.weights._feedforward import Experts, dense, mixture, sparse_layers
from kvcalc.weights._parts import MAX_EXPERTS, Parts, need, refuse


def _opt(parts: Parts) -> None:
    """OPT: learned positions with an offset of 2, embeddings that may be narrower."""
    fields = parts.fields
    need(fields, "word_embed_proj_dim", "do_layer_norm_before")
    narrow = fields.count("word_embed_proj_dim")
    if narrow != parts.width:
        raise refuse(fields, "word_embed_proj_dim", "narrower embeddings are not compared yet")
    for key in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        if fields.given(key) is False:
            raise refuse(fields, key, "not compared yet")
    parts.plain((fields.count("max_position_embeddings") + 2) * parts.width)
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        mix.attention(parts, qkv_bias=True, out_bias=True)
        dense(parts, fields.count("ffn_dim"), gated=False, bias=True)
        parts.plain(4 * parts.width)
    parts.plain(2 * parts.width)


def _falcon(parts: Parts) -> None:
    """Falcon: grouped or one KV head, and one or two norms of a parallel layer."""
    fields = parts.fields
    heads = fields.count("num_attention_heads")
    bias = fields.flag("bias")
    grouped = fields.flag("new_decoder_architecture")
    if grouped:
        kv_heads = fields.optional_count("num_kv_heads") or heads
        norms = fields.number("num_ln_in_parallel_attn", default=2)
    else:
        kv_heads = 1 if fields.flag("multi_query") else heads
        norms = 1 if fields.flag("parallel_attn") else 2
    wide = fields.optional_count("ffn_hidden_size") or 4 * parts.width
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        mix.attention(parts, qkv_bias=bias, out_bias=bias, kv_heads=kv_heads)
        dense(parts, wide, gated=False, bias=bias)
        parts.plain(2 * norms * parts.width)
    parts.plain(2 * parts.width)


def _dbrx(parts: Parts) -> None:
    """DBRX, whose numbers of attention and experts are in objects of their own."""
    fields = parts.fields
    attention, feed = fields.nested("attn_config"), fields.nested("ffn_config")
    if attention is None or feed is None:
        need(fields, "attn_config", "ffn_config")
        raise refuse(fields, "ffn_config", "no object")
    kv_heads = attention.count("kv_n_heads")
    num, width = feed.count("moe_num_experts", most=MAX_EXPERTS), feed.count("ffn_hidden_size")
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        mix.attention(parts, qkv_bias=False, out_bias=False, kv_heads=kv_heads)
        parts.linear("ffn.router.layer", num, parts.width, kept=True)
        for name in ("w1", "v1"):
            parts.experts(f"ffn.experts.{name}", width, parts.width, num, bias=False)
        parts.experts("ffn.experts.w2", parts.width, width, num, bias=False)
        parts.plain(2 * parts.width)
    parts.plain(parts.width)


def _mamba(parts: Parts) -> None:
    """Mamba and Falcon-Mamba."""
    fields = parts.fields
    need(fields, "use_conv_bias")
    if not fields.flag("use_conv_bias"):
        raise refuse(fields, "use_conv_bias", "not compared yet")
    inner = fields.count("intermediate_size")
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        bias = fields.flag("use_bias")
        mix.mamba1(
            parts,
            "mixer",
            inner,
            state="state_size",
            conv="conv_kernel",
            rank="time_step_rank",
            bias=bias,
        )
        parts.plain(parts.width)
    parts.plain(parts.width)


def _mamba2(parts: Parts) -> None:
    """Mamba-2 without attention."""
    fields = parts.fields
    need(fields, "use_conv_bias")
    heads = fields.count("num_heads")
    inner = heads * fields.count("head_dim")
    if inner != fields.count("expand") * parts.width:
        raise refuse(fields, "expand", "num_heads x head_dim is another width")
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        mix.mamba2(
            parts,
            name="mixer",
            inner=inner,
            heads=heads,
            groups=fields.count("n_groups"),
            state=fields.count("state_size"),
            conv=fields.count("conv_kernel"),
            conv_bias=fields.flag("use_conv_bias"),
            bias=fields.flag("use_bias"),
        )
        parts.plain(parts.width)
    parts.plain(parts.width)


def _nemotron_h(parts: Parts) -> None:
    """Nemotron-H (arXiv:2504.03624): each layer is Mamba-2, attention, an MLP or a mixture."""
    fields = parts.fields
    need(fields, "use_conv_bias")
    heads = fields.count("mamba_num_heads")
    bias, mlp_bias = fields.flag("use_bias"), fields.flag("mlp_bias")
    for index, kind in enumerate(_nemotron_kinds(parts)):
        parts.layer = f"layers.{index}."
        if kind == "mamba":
            mix.mamba2(
                parts,
                name="mixer",
                inner=heads * fields.count("mamba_head_dim"),
                heads=heads,
                groups=fields.count("n_groups"),
                state=fields.count("ssm_state_size"),
                conv=fields.count("conv_kernel"),
                conv_bias=fields.flag("use_conv_bias"),
                bias=bias,
            )
        elif kind == "attention":
            mix.attention(parts, qkv_bias=False, out_bias=False)
        elif kind == "mlp":
            width = fields.count("intermediate_size")
            dense(parts, width, gated=False, bias=mlp_bias, name="mixer")
        else:
            _nemotron_mixture(parts)
        parts.plain(parts.width)
    parts.plain(parts.width)


def _nemotron_kinds(parts: Parts) -> list[str]:
    """Each layer's kind, from a string with a letter for each or from a list of names."""
    fields = parts.fields
    names = fields.names("layers_block_type")
    key = "layers_block_type" if names is not None else "hybrid_override_pattern"
    if names is not None:
        as_saved = {"linear_attention": "mamba", "full_attention": "attention"}
        kinds = [as_saved.get(name, name) for name in names]
    else:
        need(fields, key)
        letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
        kinds = [letters.get(letter, "") for letter in str(fields.get(key))]
        if fields.given("num_hidden_layers") is not None and len(kinds) != parts.num_layers:
            raise refuse(fields, key, "not one letter for each layer")
    if len(kinds) > MAX_LAYERS or set(kinds) - {"mamba", "attention", "mlp", "moe"}:
        raise refuse(fields, key, "not Mamba, attention, MLP or mixture, once for each layer")
    return kinds


def _nemotron_mixture(parts: Parts) -> None:
    """Ungated experts, which may work on a narrower latent, and a shared one of its own width."""
    fields = parts.fields
    need(fields, "moe_shared_expert_intermediate_size")
    if fields.flag("mlp_bias") or fields.number("n_shared_experts", default=1) != 1:
        raise refuse(fields, "n_shared_experts", "other mixtures are not compared yet")
    num = fields.count("n_routed_experts", most=MAX_EXPERTS)
    width = fields.count("moe_intermediate_size")
    latent = fields.optional_count("moe_latent_size")
    parts.linear("mixer.gate", num, parts.width, kept=True)
    parts.num_buffers += num
    parts.experts("mixer.experts.up_proj", width, latent or parts.width, num, bias=False)
    parts.experts("mixer.experts.down_proj", latent or parts.width, width, num, bias=False)
    shared = fields.count("moe_shared_expert_intermediate_size")
    dense(parts, shared, gated=False, name="mixer.shared_experts")
    if latent:
        parts.linear("mixer.fc1_latent_proj", latent, parts.width)
        parts.linear("mixer.fc2_latent_proj", parts.width, latent)


def _gemma4(parts: Parts) -> None:
    """Gemma 4 without per-layer inputs: global layers have heads of their own, whose K may be V,
    and a mixture may stand beside the MLP.
    """
    fields = parts.fields
    need(fields, "enable_moe_block", "layer_types")
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if fields.number(key):
            raise refuse(fields, key, "not compared yet")
    if fields.flag("attention_bias"):
        raise refuse(fields, "attention_bias", "not compared yet")
    kinds = fields.names("layer_types") or ()
    if len(kinds) != parts.num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise refuse(fields, "layer_types", "not full or sliding, once for each layer")
    heads = fields.count("num_attention_heads")
    for index, kind in enumerate(kinds):
        parts.layer = f"layers.{index}."
        size, kv_heads = fields.count("head_dim"), fields.count("num_key_value_heads")
        same = kind == "full_attention" and fields.flag("attention_k_eq_v")
        if kind == "full_attention":
            size = fields.optional_count("global_head_dim") or size
        if same:
            kv_heads = fields.optional_count("num_global_key_value_heads") or kv_heads
        parts.linear("self_attn.q_proj", heads * size, parts.width)
        for name in ("k_proj",) if same else ("k_proj", "v_proj"):
            parts.linear(f"self_attn.{name}", kv_heads * size, parts.width)
        parts.linear("self_attn.o_proj", parts.width, heads * size)
        parts.plain(2 * size, 4 * parts.width)
        dense(parts, fields.count("intermediate_size"))
        parts.num_buffers += 1
        if fields.flag("enable_moe_block"):
            _gemma4_experts(parts)
    parts.plain(parts.width)


def _gemma4_experts(parts: Parts) -> None:
    """A mixture beside an MLP: scales of the router's input and of experts, and three norms."""
    fields = parts.fields
    num = fields.count("num_experts", most=MAX_EXPERTS)
    width = fields.count("moe_intermediate_size")
    parts.linear("router.proj", num, parts.width, kept=True)
    parts.plain(parts.width, num, 3 * parts.width)
    for name in ("gate_proj", "up_proj"):
        parts.experts(f"experts.{name}", width, parts.width, num, bias=False)
    parts.experts("experts.down_proj", parts.width, width, num, bias=False)


def _bamba(parts: Parts) -> None:
    """Bamba: Mamba-2 in most layers, attention in those that are named, MLPs in all."""
    fields = parts.fields
    need(fields, "attn_layer_indices")
    attending = frozenset(fields.numbers("attn_layer_indices") or ())
    heads = fields.count("mamba_n_heads")
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        if index in attending:
            mix.attention(parts, qkv_bias="attention_bias", out_bias="attention_bias")
        else:
            _mamba2_of(parts, heads=heads, inner=fields.count("mamba_expand") * parts.width)
        width = fields.count("intermediate_size")
        dense(parts, width, bias=fields.flag("mlp_bias"), name="feed_forward")
        parts.plain(2 * parts.width)
    parts.plain(parts.width)


def _falcon_h1(parts: Parts) -> None:
    """Falcon-H1 (arXiv:2507.22448): attention and Mamba-2 side by side in every layer."""
    fields = parts.fields
    need(fields, "mamba_rms_norm", "projectors_bias")
    heads = fields.count("mamba_n_heads")
    inner = fields.optional_count("mamba_d_ssm") or fields.count("mamba_expand") * parts.width
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        _mamba2_of(parts, heads=heads, inner=inner, norm=fields.flag("mamba_rms_norm"))
        if fields.flag("projectors_bias") != fields.flag("mamba_proj_bias"):
            raise refuse(fields, "projectors_bias", "not compared yet")
        mix.attention(parts, qkv_bias="attention_bias", out_bias="attention_bias")
        width = fields.count("intermediate_size")
        dense(parts, width, bias=fields.flag("mlp_bias"), name="feed_forward")
        parts.plain(2 * parts.width)
    parts.plain(parts.width)


def _granite_hybrid(parts: Parts) -> None:
    """Granite 4 without routed experts: Mamba-2 or attention, then an MLP."""
    fields = parts.fields
    kinds = fields.names("layer_types") or fields.names("layers_block_type")
    if kinds is None or len(kinds) != parts.num_layers:
        raise refuse(fields, "layer_types", "not one kind for each layer")
    if fields.number("num_local_experts"):
        raise refuse(fields, "num_local_experts", "its experts are not compared yet")
    heads = fields.count("mamba_n_heads")
    for index, kind in enumerate(kinds):
        parts.layer = f"layers.{index}."
        if kind in ("attention", "full_attention"):
            mix.attention(parts, qkv_bias="attention_bias", out_bias="attention_bias")
        elif kind in ("mamba", "linear_attention"):
            _mamba2_of(parts, heads=heads, inner=fields.count("mamba_expand") * parts.width)
        else:
            raise refuse(fields, "layer_types", f"no such kind as {shown(kind)}")
        dense(parts, fields.count("shared_intermediate_size"), name="shared_mlp")
        parts.plain(2 * parts.width)
    parts.plain(parts.width)


def _mamba2_of(parts: Parts, *, heads: int, inner: int, norm: bool = True) -> None:
    """Mamba-2 with the field names of Bamba."""
    fields = parts.fields
    need(fields, "mamba_conv_bias", "mamba_proj_bias")
    mix.mamba2(
        parts,
        name="mamba",
        inner=inner,
        heads=heads,
        groups=fields.count("mamba_n_groups"),
        state=fields.count("mamba_d_state"),
        conv=fields.count("mamba_d_conv"),
        conv_bias=fields.flag("mamba_conv_bias"),
        bias=fields.flag("mamba_proj_bias"),
        norm=norm,
    )


def _gated_delta(parts: Parts) -> None:
    """Qwen3-Next and Qwen3.5: gated delta rules, and gated attention in every fourth layer."""
    fields = parts.fields
    kinds = fields.names("layer_types")
    if kinds is None:
        interval = fields.count("full_attention_interval")
        kinds = tuple(
            "linear_attention" if (index + 1) % interval else "full_attention"
            for index in range(parts.num_layers)
        )
    if len(kinds) != parts.num_layers or set(kinds) - {"linear_attention", "full_attention"}:
        raise refuse(fields, "layer_types", "not one kind for each layer")
    plan = None
    if fields.model_type != "qwen3_5_text":
        rule = "step" if fields.model_type == "qwen3_next" else "all"
        plan = Experts(
            "num_experts",
            "moe_intermediate_size",
            rule,
            shared="shared_expert_intermediate_size",
            shared_gate=True,
        )
    sparse = sparse_layers(parts, plan) if plan else [False] * parts.num_layers
    for index, kind in enumerate(kinds):
        parts.layer = f"layers.{index}."
        if kind == "linear_attention":
            mix.delta(parts, fused=fields.model_type == "qwen3_next")
        else:
            bias = "attention_bias"
            mix.attention(parts, qkv_bias=bias, out_bias=bias, norms="head", gate=True)
        if plan and sparse[index]:
            mixture(parts, plan)
        else:
            dense(parts, fields.count("intermediate_size"))
        parts.plain(2 * parts.width)
    parts.plain(parts.width)


def _jamba(parts: Parts) -> None:
    """Jamba (arXiv:2403.19887): Mamba with norms of B, C and steps; experts in every other."""
    fields = parts.fields
    need(fields, "mamba_conv_bias", "mamba_proj_bias", "mamba_dt_rank")
    need(fields, "attn_layer_period", "expert_layer_period")
    if not fields.flag("mamba_conv_bias") or fields.flag("mamba_proj_bias"):
        raise refuse(fields, "mamba_conv_bias", "other biases are not compared yet")
    inner = fields.count("mamba_expand") * parts.width
    plan = Experts("num_experts", "intermediate_size", name="feed_forward", router="router")
    for index in range(parts.num_layers):
        parts.layer = f"layers.{index}."
        period, offset = fields.count("attn_layer_period"), fields.number("attn_layer_offset")
        if index % period == offset:
            mix.attention(parts, qkv_bias=False, out_bias=False)
        else:
            steps = mix.mamba1(
                parts,
                "mamba",
                inner,
                state="mamba_d_state",
                conv="mamba_d_conv",
                rank="mamba_dt_rank",
                bias=False,
            )
            parts.plain(steps, 2 * fields.count("mamba_d_state"))
        period, offset = fields.count("expert_layer_period"), fields.number("expert_layer_offset")
        if fields.count("num_experts") > 1 and index % period == offset:
            mixture(parts, plan)
        else:
            dense(parts, fields.count("intermediate_size"), name="feed_forward")
        parts.plain(2 * parts.width)
    parts.plain(parts.width)


OWN: dict[str, Callable[[Parts], None]] = {
    "bamba": _bamba,
    "dbrx": _dbrx,
    "falcon": _falcon,
    "falcon_h1": _falcon_h1,
    "falcon_mamba": _mamba,
    "granitemoehybrid": _granite_hybrid,
    "gemma4_text": _gemma4,
    "jamba": _jamba,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "nemotron_h": _nemotron_h,
    "opt": _opt,
    "qwen3_5_moe_text": _gated_delta,
    "qwen3_5_text": _gated_delta,
    "qwen3_next": _gated_delta,
}
"""Types whose layers differ from one another, or whose fields have shapes of their own."""
