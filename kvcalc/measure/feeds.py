"""What models are fed: random tokens, a needle in filler, or a text of the user's."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcalc.errors import InputError
from kvcalc.measure import retrieval
from kvcalc.measure.models import LoadedModel
from kvcalc.measure.workload import Workload


class Feed(NamedTuple):
    """A `prompt` [batch, prompt_tokens] and the decode `steps`, each [batch, 1].

    `answers` [batch] is what the first step should be answered with, None where nobody knows;
    `is_text` says that each token is worth predicting from those before it.
    """

    prompt: Tensor
    steps: tuple[Tensor, ...]
    answers: Tensor | None = None
    is_text: bool = False


def choose_feed(loaded: LoadedModel, workload: Workload, text: Path | None) -> Feed:
    """The user's text, else a needle for the built-in model, else random tokens."""
    if text is not None:
        return text_feed(loaded, workload, text)
    if loaded.recalls and workload.prompt_tokens >= retrieval.QUIET_TOKENS + 3:
        return needle_feed(loaded, workload, ask=True)
    return random_feed(loaded, workload)


def random_feed(loaded: LoadedModel, workload: Workload) -> Feed:
    """Random tokens of the model's vocabulary, the same for the same seed."""
    embeddings: Any = loaded.model.get_input_embeddings()
    generator = torch.Generator().manual_seed(workload.seed)
    shape = (workload.batch, workload.total_tokens)
    tokens = torch.randint(embeddings.num_embeddings, shape, generator=generator)
    return Feed(*_split(tokens.to(loaded.device), workload))


def needle_feed(loaded: LoadedModel, workload: Workload, *, ask: bool) -> Feed:
    """A needle at the workload's depth; its key is the first step, filler tokens are the others.

    With `ask` the key ends the prompt, too: a strategy that looks at the last tokens sees it.
    """
    needle = retrieval.prompt(
        prompt_tokens=workload.prompt_tokens,
        batch=workload.batch,
        seed=workload.seed,
        depth=workload.depth,
        ask=ask,
    )
    generator = torch.Generator().manual_seed(workload.seed)
    fillers = torch.tensor(retrieval.FILLERS)
    shape = (workload.batch, workload.decode_tokens - 1)
    rest = fillers[torch.randint(len(fillers), shape, generator=generator)]
    steps = torch.cat([needle.question, rest], dim=1).to(loaded.device)
    return Feed(needle.tokens.to(loaded.device), tuple(steps.split(1, dim=1)), needle.answer)


def text_feed(loaded: LoadedModel, workload: Workload, path: Path) -> Feed:
    """Successive stretches of a text, one for each sequence, in the model's own tokens.

    Raises InputError for a text that cannot be read or is too short, and for a model without a
    tokenizer.
    """
    if loaded.place is None:
        msg = "--text needs the tokenizer of a checkpoint; random and built-in weights have none"
        raise InputError(msg)
    from transformers import AutoTokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        msg = f"cannot read the text {path}: {getattr(error, 'strerror', None) or error}"
        raise InputError(msg) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(loaded.place, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - libraries below raise their own kinds
        msg = f"{loaded.place} has no tokenizer that can be loaded ({type(error).__name__})"
        raise InputError(msg) from None
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    needed = workload.batch * workload.total_tokens
    if len(tokens) < needed:
        msg = (
            f"{path} has {len(tokens):,} tokens; {workload.batch} × {workload.total_tokens:,} are "
            "needed: give a longer text or a shorter --seq"
        )
        raise InputError(msg)
    rows = tokens[:needed].view(workload.batch, -1).to(loaded.device)
    return Feed(*_split(rows, workload), is_text=True)


def _split(tokens: Tensor, workload: Workload) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A row of tokens [batch, prompt + decode] as a prompt and its steps."""
    prompt, rest = tokens.split([workload.prompt_tokens, workload.decode_tokens], dim=1)
    return prompt, tuple(rest.split(1, dim=1))
