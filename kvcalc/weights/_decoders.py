"""From a decoder's fields to its parts: a table of what model types have, and their exceptions.

A type stands here only after the sum of its parameters was equal to that of transformers' own
class, built without memory; `tests/test_weights.py` holds every one against it.
"""

from typing import NamedTuple

from kvcalc.config import ConfigFields
from kvcalc.errors import UnsupportedError
from kvcalc.units import shown
from kvcalc.weights import _attention as mix
from kvcalc.weights._attention import Rule
from kvcalc.weights._feedforward import Experts, dense, mixture, sparse_layers
from kvcalc.weights._own import OWN
from kvcalc.weights._parts import Parts, need, refuse, switch


class Plan(NamedTuple):
    """What the layers of a type have.

    `norm` is how many vectors a norm has (0: OLMo's has none, 1: a weight, 2: weight and bias),
    `norms` how many norms a layer has. `qk` is `mix.attention`'s `norms`, `latent` says that
    attention is latent, `grouped` that it may have fewer KV heads. `needs` are fields that a
    config must say itself.
    """

    qkv_bias: Rule = False
    out_bias: Rule = False
    qk: str = ""
    latent: bool = False
    grouped: bool = True
    norm: int = 1
    norms: int = 2
    gated: bool = True
    mlp_bias: Rule = False
    experts: Experts | None = None
    head_bias: Rule = False
    needs: tuple[str, ...] = ()


_LLAMA = Plan("attention_bias", "attention_bias", mlp_bias="mlp_bias")
_BIASED = Plan("attention_bias", "attention_bias")
_QWEN2 = Plan(qkv_bias=True)
_QWEN3 = _BIASED._replace(qk="head")
_QWEN3_MOE = _QWEN3._replace(experts=Experts("num_experts", "moe_intermediate_size", "step"))
_ALL_BIASED = Plan(True, True, grouped=False, norm=2, gated=False, mlp_bias=True)
_DEEPSEEK = Experts(
    "n_routed_experts",
    "moe_intermediate_size",
    "first_dense",
    shared="n_shared_experts",
    correction=True,
)
_MLA = Plan(latent=True, experts=_DEEPSEEK)

PLANS = {
    "apertus": _BIASED._replace(qk="head", gated=False),
    "bloom": _ALL_BIASED,
    "cohere": _BIASED._replace(norms=1),
    "deepseek_v2": _MLA._replace(experts=_DEEPSEEK._replace(correction=False)),
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots1": _QWEN3._replace(experts=_DEEPSEEK),
    "ernie4_5": Plan("use_bias", "use_bias", mlp_bias="use_bias"),
    "exaone4": Plan(qk="head"),
    "gemma": _BIASED,
    "gemma2": _BIASED._replace(norms=4),
    "gemma3_text": _QWEN3._replace(norms=4),
    "glm": Plan("attention_bias"),
    "glm4": Plan("attention_bias", norms=4),
    "glm4_moe": Plan("attention_bias", experts=_DEEPSEEK),
    "glm4_moe_lite": _MLA,
    "glm4v_text": Plan(qkv_bias=True, norms=4),
    "glm_moe_dsa": _MLA,
    "gpt2": _ALL_BIASED,
    "gpt_bigcode": _ALL_BIASED,
    "gpt_neox": _ALL_BIASED._replace(qkv_bias="attention_bias", out_bias="attention_bias"),
    "gpt_oss": _BIASED._replace(
        experts=Experts("num_local_experts", "intermediate_size", bias=True, router="router")
    ),
    "gptj": Plan(grouped=False, norm=2, norms=1, gated=False, mlp_bias=True, head_bias=True),
    "granite": _LLAMA,
    "helium": Plan("attention_bias", mlp_bias="mlp_bias"),
    "kimi_k2": _MLA,
    "llama": _LLAMA,
    "llama4_text": _BIASED._replace(
        experts=Experts(
            "num_local_experts",
            "intermediate_size",
            "interleaved",
            shared="intermediate_size",
            dense_width="intermediate_size_mlp",
            name="feed_forward",
            router="router",
        )
    ),
    "minicpm3": Plan(latent=True, mlp_bias="mlp_bias"),
    "minimax_m2": Plan(
        qk="full",
        experts=Experts(
            "num_local_experts", "intermediate_size", correction=True, name="block_sparse_moe"
        ),
    ),
    "ministral": Plan(),
    "ministral3": Plan(),
    "mistral": Plan(),
    "mixtral": Plan(
        experts=Experts("num_local_experts", "intermediate_size", name="block_sparse_moe")
    ),
    "mpt": Plan(grouped=False, gated=False),
    "nemotron": _BIASED._replace(norm=2, gated=False, mlp_bias="mlp_bias"),
    "olmo": _BIASED._replace(norm=0),
    "olmo2": _BIASED._replace(qk="full"),
    "olmo3": _BIASED._replace(qk="full"),
    "olmoe": _BIASED._replace(qk="full", experts=Experts("num_experts", "intermediate_size")),
    "phi": _ALL_BIASED._replace(grouped=True, norms=1, head_bias=True, needs=("qk_layernorm",)),
    "phi3": Plan(),
    "phimoe": _BIASED._replace(
        norm=2,
        experts=Experts("num_local_experts", "intermediate_size"),
        head_bias="lm_head_bias",
        needs=("lm_head_bias",),
    ),
    "qwen2": _QWEN2,
    "qwen2_5_omni_text": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_moe": Plan(
        "qkv_bias",
        experts=Experts(
            "num_experts",
            "moe_intermediate_size",
            "step",
            shared="shared_expert_intermediate_size",
            shared_gate=True,
        ),
    ),
    "qwen2_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "qwen3_vl_text": _QWEN3,
    "seed_oss": Plan(
        "attention_bias", "attention_out_bias", mlp_bias="mlp_bias", needs=("attention_out_bias",)
    ),
    "smollm3": _LLAMA,
    "solar_open": Plan("attention_bias", experts=_DEEPSEEK._replace(layers="all")),
    "stablelm": Plan("use_qkv_bias", norm=2, needs=("use_qkv_bias",)),
    "starcoder2": Plan("use_bias", "use_bias", norm=2, gated=False, mlp_bias="use_bias"),
}


_FOUR_TIMES = frozenset({"bloom", "gpt2", "gpt_bigcode", "gptj", "mpt"})
"""Types whose feed-forward width is four times the model's unless `n_inner` says otherwise."""

_INDEXED = frozenset({"deepseek_v32", "glm_moe_dsa"})


def read(fields: ConfigFields, *, tied: bool) -> Parts:
    """The parts of a decoder; UnsupportedError for a type or variant that is not known exactly."""
    own = OWN.get(fields.model_type)
    plan = PLANS.get(fields.model_type)
    if own is None and plan is None:
        msg = (
            f"the weights of model_type {shown(fields.model_type)} are not known exactly; give a "
            f"folder of safetensors files; deciding field: {fields.prefix}model_type"
        )
        raise UnsupportedError(msg)
    parts = Parts(fields)
    rows = fields.count("vocab_size")
    parts.linear("embed_tokens", rows, parts.width, kept=True)
    if own is not None:
        own(parts)
    elif plan is not None:
        need(fields, *plan.needs)
        _planned(parts, plan)
        if switch(fields, plan.head_bias):
            parts.plain(rows)
    parts.layer = ""
    if not tied:
        parts.linear("lm_head", rows, parts.width, kept=True)
    return parts


def _planned(parts: Parts, plan: Plan) -> None:
    """A decoder whose layers are all built to one plan."""
    fields = parts.fields
    plan, norms = _variant(parts, plan)
    sparse = sparse_layers(parts, plan.experts) if plan.experts else [False] * parts.num_layers
    for index, is_sparse in enumerate(sparse):
        parts.layer = f"layers.{index}."
        if plan.latent:
            mix.latent(parts)
        else:
            mix.attention(
                parts,
                qkv_bias=plan.qkv_bias,
                out_bias=plan.out_bias,
                norms=plan.qk,
                kv_heads=0 if plan.grouped else _kv_heads(fields),
            )
        if fields.model_type in _INDEXED and _has_indexer(fields, index):
            mix.indexer(parts)
        if plan.experts and is_sparse:
            mixture(parts, plan.experts)
        else:
            name = plan.experts.name if plan.experts else "mlp"
            dense(
                parts,
                _dense_width(parts, plan),
                gated=plan.gated,
                bias=switch(fields, plan.mlp_bias),
                name=name,
            )
        parts.plain(norms * plan.norm * parts.width)
        if fields.model_type == "gpt_oss":
            parts.plain(fields.count("num_attention_heads"))  # attention sinks
        elif fields.model_type == "apertus":
            parts.plain(2)  # alpha_p and alpha_n of xIELU
    parts.plain(plan.norm * parts.width)


def _variant(parts: Parts, plan: Plan) -> tuple[Plan, int]:
    """The plan as this config has it, and how many norms a layer has; counts what stands beside
    the layers.
    """
    fields = parts.fields
    norms = plan.norms
    match fields.model_type:
        case "gpt2" | "gpt_bigcode":
            parts.plain(fields.count("n_positions") * parts.width)
        case "bloom":
            parts.plain(2 * parts.width)  # a norm of the embeddings
        case "glm4_moe" if fields.flag("use_qk_norm"):
            plan = plan._replace(qk="head")
        case "helium" if (
            fields.count("num_attention_heads") * fields.count("head_dim") != parts.width
        ):
            raise refuse(fields, "head_dim", "the heads are not as wide as the model")
        case "cohere" if fields.flag("use_qk_norm"):
            plan = plan._replace(qk="full")
        case "deepseek_v2" if fields.flag("mlp_bias"):
            raise refuse(fields, "mlp_bias", "not compared yet")
        case "phi" | "stablelm" if fields.flag("qk_layernorm"):
            raise refuse(fields, "qk_layernorm", "not compared yet")
        case "stablelm" if fields.flag("use_parallel_residual"):
            norms = 1
    return plan, norms


def _kv_heads(fields: ConfigFields) -> int:
    """KV heads where no field says their number: one, or as many as query heads."""
    one = fields.model_type == "gpt_bigcode" and fields.flag("multi_query")
    return 1 if one else fields.count("num_attention_heads")


def _dense_width(parts: Parts, plan: Plan) -> int:
    fields = parts.fields
    if fields.model_type in _FOUR_TIMES:
        wider = None if fields.model_type in ("bloom", "mpt") else fields.optional_count("n_inner")
        return wider or 4 * parts.width
    return fields.count(plan.experts.dense_width if plan.experts else "intermediate_size")


def _has_indexer(fields: ConfigFields, index: int) -> bool:
    """Whether a layer chooses tokens itself; GLM-5.2's `shared` ones take another's choice."""
    kinds = fields.names("indexer_types")
    if kinds is None:
        return True
    if index >= len(kinds) or kinds[index] not in ("full", "shared"):
        raise refuse(fields, "indexer_types", "not full or shared, once for each layer")
    return kinds[index] == "full"
