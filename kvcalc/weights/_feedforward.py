"""The weights of feed-forward modules: dense ones, gated or not, and mixtures of experts."""

from typing import NamedTuple

from kvcalc.weights._parts import MAX_EXPERTS, Parts, need, refuse


class Experts(NamedTuple):
    """How a mixture is laid out: which fields hold its numbers, and what stands beside it.

    `layers` names the rule that says which layers have one: `all`, `first_dense` (DeepSeek),
    `step` (Qwen) or `interleaved` (Llama 4). `shared` is the field of a shared expert's width, or
    `n_shared_experts` of how many widths of a routed one it has. `correction` is True when the
    router's bias of the choice is kept as a buffer (arXiv:2408.15664).
    """

    num: str
    width: str
    layers: str = "all"
    shared: str = ""
    shared_gate: bool = False
    bias: bool = False
    correction: bool = False
    dense_width: str = "intermediate_size"
    name: str = "mlp"
    router: str = "gate"


def dense(
    parts: Parts, width: int, *, gated: bool = True, bias: bool = False, name: str = "mlp"
) -> None:
    """Up and down projections, and that of the gate where there is one (arXiv:2002.05202)."""
    for module in ("gate_proj", "up_proj") if gated else ("up_proj",):
        parts.linear(f"{name}.{module}", width, parts.width, bias=bias)
    parts.linear(f"{name}.down_proj", parts.width, width, bias=bias)


def mixture(parts: Parts, plan: Experts) -> None:
    """Router, routed and shared experts of one layer."""
    fields = parts.fields
    num = fields.count(plan.num, most=MAX_EXPERTS)
    width = fields.count(plan.width)
    name = plan.name
    parts.linear(f"{name}.{plan.router}", num, parts.width, bias=plan.bias, kept=True)
    for module in ("gate_proj", "up_proj"):
        parts.experts(f"{name}.experts.{module}", width, parts.width, num, bias=plan.bias)
    parts.experts(f"{name}.experts.down_proj", parts.width, width, num, bias=plan.bias)
    if plan.correction:
        parts.num_buffers += num
    if plan.shared == "n_shared_experts":
        shared = fields.number(plan.shared) * width
        module = f"{name}.shared_experts"
    else:
        shared = fields.number(plan.shared) if plan.shared else 0
        module = f"{name}.shared_expert"
    if shared:
        dense(parts, shared, name=module)
    if plan.shared_gate:
        parts.linear(f"{name}.shared_expert_gate", 1, parts.width, kept=True)


def sparse_layers(parts: Parts, plan: Experts) -> list[bool]:
    """For each layer, whether it has a mixture."""
    fields, layers = parts.fields, range(parts.num_layers)
    kinds = fields.names("mlp_layer_types") if plan.layers == "first_dense" else None
    if kinds is not None:
        if len(kinds) != len(layers) or set(kinds) - {"dense", "sparse"}:
            raise refuse(fields, "mlp_layer_types", "not dense or sparse, once for each layer")
        return [kind == "sparse" for kind in kinds]
    if plan.layers == "first_dense":
        if fields.number("moe_layer_freq", default=1) != 1:
            raise refuse(fields, "moe_layer_freq", "transformers has no such layers")
        if fields.get("first_k_dense_replace") is None:
            need(fields, "first_k_dense_replace")
        first = fields.number("first_k_dense_replace")
        return [index >= first for index in layers]
    if plan.layers == "step":
        step = fields.number("decoder_sparse_step", default=1)
        dense_layers = frozenset(fields.numbers("mlp_only_layers") or ())
        if not step:
            raise refuse(fields, "decoder_sparse_step", "a step of none")
        return [index not in dense_layers and (index + 1) % step == 0 for index in layers]
    if plan.layers == "interleaved":
        given = fields.numbers("moe_layers")
        named = None if given is None else frozenset(given)
        step = fields.count("interleave_moe_layer_step")
        return [
            index in named if named is not None else (index + 1) % step == 0 for index in layers
        ]
    return [True for _ in layers]
