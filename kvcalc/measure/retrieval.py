"""A Llama whose weights are set by hand so that it recalls the value that followed a key.

Random weights show how much a cache holds, these show what it still knows. Prompts hold pairs of a
key token and a value token among filler. Shown a key again, the model predicts its value, which it
can only read from the keys and values of that place: an induction circuit of two layers (Olsson et
al. 2022, arXiv:2209.11895).

The residual stream has seven blocks of 16 numbers:

    CODE     which key or filler a token is: one of 128 codes of ±1, any two of which agree in at
             most 10 places; zero for values
    SEEK     what a token looks for: its own CODE; fillers at a quarter of the size, so that they
             look around and do not stare
    PREV     the CODE of the token before, written by layer 0
    VALUE    which value a token is, in the same codes; zero for keys and fillers
    ANSWER   the VALUE that layer 1 found; the language-model head reads nothing else
    SCRATCH  what all other heads write; nothing reads it
    FLAGS    is a key, is a value, a constant 1, and a ballast that brings every embedding to the
             norm √width, at which RMSNorm changes nothing; what layers add later shrinks it little

Layer 0, KV head 0 attends to the token before. Its queries and keys are constant, so its score
depends on the distance alone. RoPE turns pair j, dims j and j + head_dim / 2, by
theta^(-2j / head_dim) radians per token. The query is turned back by one token in the faster half
of the pairs: Σ cos(frequency × (distance - 1)) is largest at distance 1.

Layer 1, KV head 0 matches the query's SEEK with PREV, and queries that are keys prefer tokens that
are values. So the place after an earlier mention of the key counts only if a value stands there,
and a key may be asked for twice. It uses the nine slowest pairs, which turn by less than one radian
in 131,072 tokens: distance hardly matters. One channel of its keys is large and constant and meets
only zeros in queries; real keys have such channels too (KIVI, arXiv:2402.02750, section 3), and
they are why coarse quantisation per token fails.

All other heads attend to tokens like the own one, nearby first, or to everything almost evenly
(`diffuse`). The MLPs are zero.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from kvcalc.errors import InputError
from kvcalc.units import ceil_div

BLOCK = 16
CODE, SEEK, PREV, VALUE, ANSWER, SCRATCH, FLAGS = (
    slice(BLOCK * i, BLOCK * (i + 1)) for i in range(7)
)
IS_KEY, IS_VALUE, ONE, BALLAST = range(FLAGS.start, FLAGS.start + 4)

START = 0
FILLERS, KEYS, VALUES = range(1, 64), range(64, 128), range(128, 256)
"""Token ids; 0 starts every prompt."""

QUIET_TOKENS = 32
"""The last tokens of a prompt hold no pair, so that an observation window sees filler only."""

_GENERATORS = (0x3F, 0x1C7, 0x64B, 0xA95, 0x304D, 0x5096, 0x9257)
"""Basis of a linear binary code of length 16 with 128 words at distance 6 or more."""

_THETA = 1e12
_PREVIOUS_SCORE = 320.0  # of the token before; 8 or more pairs share it
_MATCH_SCORE = 28.0  # of a key with itself; different keys reach a quarter
_VALUE_SCORE = 14.0  # on top, of a value
_LARGE_CHANNEL = 12.0  # times the size of the channels that carry a code
_ALIKE_SCORE = 3.0  # of a token with itself, in the heads that take no part
_LOGIT = 32.0


class Needle(NamedTuple):
    """Prompts, and what is asked after them. Token ids; `position` counts from 0."""

    tokens: Tensor
    """[batch, prompt_tokens]; each row has its own key, value, other pairs and filler."""
    question: Tensor
    """[batch, 1]: the key, to be fed as the first decode step."""
    answer: Tensor
    """[batch]: the value, which the model must predict after the question."""
    position: int
    """Where the value stands in every row of `tokens`; its key stands just before it."""


class _Head(NamedTuple):
    """One KV head and the query heads that share it.

    `output` is [width, head_dim], the others are [head_dim, width].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


def retrieval_config(
    *, num_layers: int = 4, num_heads: int = 8, num_kv_heads: int = 2, head_dim: int = 64
) -> dict[str, Any]:
    """The config.json of a model that `build` can wire."""
    return {
        "model_type": "llama",
        "vocab_size": VALUES.stop,
        "hidden_size": ceil_div(FLAGS.stop, num_heads) * num_heads,
        "intermediate_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
        "bos_token_id": START,
        "eos_token_id": None,
        "dtype": "float32",
    }


def build(
    config: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    diffuse: bool = False,
) -> LlamaForCausalLM:
    """The wired model of a `retrieval_config`, the same every time.

    With `diffuse` the heads that take no part in recalling attend almost evenly. Raises InputError
    for a config that is too small for the wiring.
    """
    layers, head_dim = int(config["num_hidden_layers"]), int(config["head_dim"])
    if layers < 2 or head_dim < 32 or head_dim % 4:
        msg = (
            f"{layers} layers with heads of {head_dim} cannot be wired for retrieval; "
            "take at least 2 layers, and heads of 32 or more in steps of 4"
        )
        raise InputError(msg)
    fields = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    with no_init_weights(), torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1 if "norm" in name else 0)
    codes, width = _codes(), int(config["hidden_size"])
    model.model.embed_tokens.weight.data[:] = _embeddings(codes, width)
    model.lm_head.weight.data[VALUES.start :, ANSWER] = (_LOGIT / BLOCK * codes).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    kv_heads = int(config["num_key_value_heads"])
    for index, layer in enumerate(model.model.layers):
        for kv_head in range(kv_heads):
            if kv_head == 0 and index == 0:
                head = _previous(head_dim, width)
            elif kv_head == 0 and index == 1:
                head = _match(head_dim, width)
            else:
                head = _alike(head_dim, width, generator, share=1 / (layers * kv_heads))
                if diffuse:
                    head = head._replace(query=head.query / 50)
            _set(layer.self_attn, kv_head, kv_heads, head)
    return cast("LlamaForCausalLM", model.eval())


def prompt(*, prompt_tokens: int, batch: int, seed: int, depth: float, ask: bool = True) -> Needle:
    """Random prompts with one needle and up to 31 other pairs, all keys and values different.

    A pair stands in tokens 1 and 2, or 3 and 4, and so on; the needle is the pair at the fraction
    `depth` of these places. With `ask` the prompt ends with the needle's key, otherwise with
    filler. Raises InputError for a prompt without a place or a depth outside 0..1.
    """
    places = (prompt_tokens - 1 - QUIET_TOKENS) // 2
    if places < 1 or not 0 <= depth <= 1:
        msg = (
            f"no needle fits into {prompt_tokens} tokens at depth {depth}; "
            f"take at least {QUIET_TOKENS + 3} tokens and a depth from 0 to 1"
        )
        raise InputError(msg)
    needle, pairs = round(depth * (places - 1)), 1 + min(31, places // 8)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FILLERS.start, FILLERS.stop, (batch, prompt_tokens), generator=generator)
    tokens[:, 0] = START
    for row in tokens:
        order = torch.randperm(places, generator=generator)
        place = torch.cat([torch.tensor([needle]), order[order != needle]])[:pairs]
        row[1 + 2 * place] = KEYS.start + torch.randperm(len(KEYS), generator=generator)[:pairs]
        row[2 + 2 * place] = VALUES.start + torch.randperm(len(VALUES), generator=generator)[:pairs]
    position = 2 + 2 * needle
    question, answer = tokens[:, position - 1, None].clone(), tokens[:, position].clone()
    if ask:
        tokens[:, -1:] = question
    return Needle(tokens, question, answer, position)


def recall(logits: Tensor, answer: Tensor) -> float:
    """Fraction of the rows of `logits` [batch, vocabulary] that are largest at `answer` [batch]."""
    return (logits.argmax(-1) == answer.to(logits.device)).double().mean().item()


def _previous(head_dim: int, width: int) -> _Head:
    """Attends to the token before and writes its CODE into PREV."""
    head = _copying(head_dim, width, CODE, PREV)
    pairs = torch.arange(head_dim // 4)
    radians = _THETA ** (-2 * pairs.double() / head_dim)
    size = math.sqrt(_PREVIOUS_SCORE * math.sqrt(head_dim) / len(pairs))
    head.query[pairs, ONE] = (size * radians.cos()).float()
    head.query[pairs + head_dim // 2, ONE] = (-size * radians.sin()).float()
    head.key[pairs, ONE] = size
    return head


def _match(head_dim: int, width: int) -> _Head:
    """Attends to a value whose PREV is the query's SEEK and writes it into ANSWER."""
    head = _copying(head_dim, width, VALUE, ANSWER)
    half = head_dim // 2
    slow = [*range(half - 8, half), *range(head_dim - 8, head_dim)]
    size = math.sqrt(_MATCH_SCORE * math.sqrt(head_dim) / BLOCK)
    head.query[slow, SEEK] = head.key[slow, PREV] = size * torch.eye(BLOCK)
    flag_size = math.sqrt(_VALUE_SCORE * math.sqrt(head_dim))
    head.query[half - 9, IS_KEY] = head.key[half - 9, IS_VALUE] = flag_size
    head.key[half - 10, ONE] = _LARGE_CHANNEL * size
    return head


def _alike(head_dim: int, width: int, generator: torch.Generator, *, share: float) -> _Head:
    """Attends to tokens of like CODE, nearby first, and writes `share` of them into SCRATCH."""
    head = _copying(head_dim, width, CODE, SCRATCH)
    mix = torch.randn(head_dim, BLOCK, generator=generator) / math.sqrt(head_dim)
    size = math.sqrt(_ALIKE_SCORE * math.sqrt(head_dim) / BLOCK)
    head.query[:, CODE] = head.key[:, CODE] = size * mix
    return head._replace(output=share * head.output)


def _copying(head_dim: int, width: int, source: slice, target: slice) -> _Head:
    """A head that does not choose yet and copies one block of what it attends to into another."""
    query, key, value = torch.zeros(3, head_dim, width)
    head = _Head(query, key, value, torch.zeros(width, head_dim))
    head.value[:BLOCK, source] = head.output[target, :BLOCK] = torch.eye(BLOCK)
    return head


def _set(attention: Any, kv_head: int, kv_heads: int, head: _Head) -> None:  # noqa: ANN401
    """Put a head into a layer; the query heads that share it write equal parts."""
    head_dim, width = head.query.shape
    queries = attention.q_proj.weight.data.view(kv_heads, -1, head_dim, width)
    queries[kv_head] = head.query
    attention.k_proj.weight.data.view(kv_heads, head_dim, width)[kv_head] = head.key
    attention.v_proj.weight.data.view(kv_heads, head_dim, width)[kv_head] = head.value
    outputs = attention.o_proj.weight.data.view(width, kv_heads, -1, head_dim)
    outputs[:, kv_head] = head.output[:, None] / queries.shape[1]


def _codes() -> Tensor:
    """[128, 16] of ±1; two rows agree in at most 10 places.

    Shuffled: half of a linear code in its own order has a place in which all rows agree, by which
    all fillers would know all keys.
    """
    words = [0]
    for generator in _GENERATORS:
        words += [word ^ generator for word in words]
    bits = torch.tensor(words)[:, None] >> torch.arange(BLOCK) & 1
    return (1.0 - 2.0 * bits)[
        torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    ]


def _embeddings(codes: Tensor, width: int) -> Tensor:
    """[256, width], each row of norm √width."""
    rows = torch.zeros(VALUES.stop, width)
    rows[: VALUES.start, CODE] = rows[: VALUES.start, SEEK] = codes
    rows[: KEYS.start, SEEK] /= 4
    rows[VALUES, VALUE] = codes
    rows[KEYS, IS_KEY] = 1
    rows[VALUES, IS_VALUE] = 1
    rows[:, ONE] = 1
    rows[:, BALLAST] = (width - rows.square().sum(1)).sqrt()
    return rows
