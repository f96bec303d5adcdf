"""The bundled catalogue and the table of class defaults, held against transformers itself."""

import json

import pytest
from transformers import AutoConfig, __version__
from transformers.cache_utils import get_layer_types_and_kwargs

import kvcalc
from kvcalc.config import class_defaults
from kvcalc.data import profiles_folder
from kvcalc.families import decoder_level, describe
from kvcalc.layers import LatentAttention, SlidingAttention
from kvcalc.sources import catalogue

ENTRIES = {entry.name: entry for entry in catalogue.entries()}


def decoder_type(config):
    """Model type of the level that describes the decoder; "" when no family claims it."""
    try:
        return decoder_level(config).model_type
    except kvcalc.UnsupportedError:
        return ""


def sized(name, **point):
    """The entry's report; an encoder's output of 512 tokens where the model attends to one."""
    try:
        return kvcalc.size(name, **point)
    except kvcalc.InputError:
        return kvcalc.size(name, encoder_seq=512, **point)


def is_refused(name):
    """Whether no exact size is known for an entry."""
    try:
        sized(name, seq=1024)
    except kvcalc.UnsupportedError:
        return True
    return False


def is_plain(config):
    """Whether transformers has the decoder's class, it lies at the top or in `text_config`, and its
    layers are plain, window or latent attention.
    """
    known = class_defaults(decoder_type(config))
    return (
        known is not None
        and known.in_transformers
        and decoder_level(config).prefix in ("", "text_config.")
        and (decoder_level(config).prefix or config["model_type"] == decoder_type(config))
        and describe(config).family in ("full", "mha", "sliding", "mla")
    )


SIZED = sorted(name for name in ENTRIES if not is_refused(name))


def test_the_catalogue_is_whole():
    """Hundreds of models, each with a source and a date, most of them sized."""
    assert len(ENTRIES) >= 385
    assert len(SIZED) >= 340
    for entry in ENTRIES.values():
        assert entry.source
        assert entry.date.startswith("20")
        assert entry.completeness in ("verbatim", "partial")


@pytest.mark.parametrize("name", SIZED)
def test_every_entry_of_the_families_is_sized(name):
    """An entry whose model type a family claims has a size at its own maximum and at 128k."""
    report = sized(name, seq="128k")
    assert report.total_bytes == sum(layer.bytes for layer in report.layers)
    assert (report.total_bytes > 0) == any("nothing" not in layer.keeps for layer in report.layers)


def test_partial_entries_state_their_own_geometry():
    """Depth and width rest on no class default where the source gives only some fields."""
    geometry = ("num_hidden_layers", "num_attention_heads", "hidden_size", "kv_lora_rank")
    for name in SIZED:
        if ENTRIES[name].completeness == "partial":
            for use in describe(ENTRIES[name].config).fields:
                assert use.origin == "config" or not use.key.endswith(geometry), name


def test_other_entries_are_refused_with_their_deciding_field():
    """What no family claims is refused, naming the field that decides, and never crashes."""
    for name in ENTRIES.keys() - set(SIZED):
        with pytest.raises(kvcalc.UnsupportedError, match="deciding field"):
            kvcalc.size(name, seq=1024)


@pytest.mark.parametrize(
    "name",
    [name for name in SIZED if is_plain(ENTRIES[name].config)],
)
def test_transformers_reads_an_entry_the_same_way(name):
    """Transformers' own configuration class finds the same layers, windows, heads and widths."""
    config = dict(ENTRIES[name].config)
    for key in ("quantization_config", "auto_map"):
        config.pop(key, None)
    text = config.get("text_config")
    if isinstance(text, dict):
        config = text | {"model_type": decoder_type(config)}
    model_type = config.pop("model_type")
    if config.get("max_position_embeddings", 0) is None:  # ours for "the source does not say"
        del config["max_position_embeddings"]
    theirs = AutoConfig.for_model(model_type, **config)
    kinds, settings = get_layer_types_and_kwargs(theirs)
    layers = describe(ENTRIES[name].config).layers
    assert len(layers) == len(kinds)
    for layer, kind, kwargs in zip(layers, kinds, settings, strict=True):
        assert isinstance(layer, SlidingAttention) == (kind == "sliding_attention")
        if isinstance(layer, SlidingAttention):
            assert layer.window == kwargs["sliding_window"]
        if isinstance(layer, LatentAttention):
            assert layer.rows() == (1, theirs.kv_lora_rank, theirs.qk_rope_head_dim)
            continue
        heads = theirs.num_attention_heads
        width = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
        kv_heads = getattr(theirs, "num_key_value_heads", None) or heads
        assert layer.rows() == (kv_heads, width, width)


def test_aliases_lead_to_entries():
    """Every other name is in lower case and stands for an entry."""
    for alias, name in catalogue.aliases().items():
        assert alias == alias.lower()
        assert name in ENTRIES


def test_class_defaults_are_those_of_the_installed_transformers():
    """The table equals what the script would write from the transformers that is installed."""
    lines = (profiles_folder() / "class_defaults.jsonl").read_text("utf-8").splitlines()
    tabulated = json.loads(lines[0])["transformers"]
    if tabulated != __version__:
        pytest.skip(
            f"the table is of transformers {tabulated}, installed is {__version__}: run "
            "python scripts/generate_class_defaults.py"
        )
    generate = pytest.importorskip("generate_class_defaults")
    assert generate.tabulate() == lines
