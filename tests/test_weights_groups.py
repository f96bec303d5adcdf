"""Weights whose config has groups of modules: what compressed-tensors and ModelOpt write."""

import contextlib
import copy
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcalc.errors import ConfigError, KvcalcError, UnsupportedError
from kvcalc.sources import resolve
from kvcalc.weights import _groups, weights_of, weights_of_files
from kvcalc.weights._patterns import parse

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
LOCAL = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": "local",
}


def scheme(form, kind, bits, strategy, inputs=None, **more):
    """A group of all linear modules; `more` are fields of its weights."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | more
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "format": form,
    }


def static(kind):
    """A scale of all inputs that the checkpoint holds."""
    return {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False}


W4A16 = scheme("pack-quantized", "int", 4, "group", group_size=32)
FP8 = scheme("float-quantized", "float", 8, "channel", TOKEN | {"type": "float"})
HEAD = ("lm_head",)
SOME = ("lm_head", "re:.*self_attn.*", r"re:model\.layers\.1\.mlp\.(gate|up)_proj")
LAST = ("re:.*lm_head$", r"re:.*layers\.\d+\.mlp\.down_proj$")

WRITTEN = [
    (W4A16, HEAD, "bfloat16", 686816),
    (W4A16, (), "bfloat16", 639728),
    (W4A16, SOME, "bfloat16", 1534528),
    (W4A16, LAST, "bfloat16", 969408),
    (W4A16, HEAD, "float32", 881888),
    (scheme("pack-quantized", "int", 4, "tensor"), SOME, "bfloat16", 1509960),
    (
        scheme("pack-quantized", "int", 4, "group", group_size=32, symmetric=False),
        HEAD,
        "bfloat16",
        702176,
    ),
    (scheme("pack-quantized", "int", 4, "channel"), HEAD, "bfloat16", 632544),
    (scheme("pack-quantized", "int", 4, "channel", symmetric=False), (), "bfloat16", 585520),
    (scheme("pack-quantized", "int", 8, "group", group_size=128), HEAD, "bfloat16", 1132256),
    (scheme("pack-quantized", "int", 8, "channel", symmetric=False), SOME, "bfloat16", 1710400),
    (scheme("int-quantized", "int", 8, "channel", TOKEN), HEAD, "bfloat16", 1123840),
    (
        scheme("int-quantized", "int", 8, "channel", TOKEN, symmetric=False),
        HEAD,
        "float16",
        1127424,
    ),
    (scheme("int-quantized", "int", 8, "tensor", static("int")), HEAD, "bfloat16", 1116728),
    (scheme("int-quantized", "int", 4, "group", TOKEN, group_size=64), LAST, "bfloat16", 1337856),
    (FP8, HEAD, "float32", 1264640),
    (scheme("float-quantized", "float", 8, "tensor", static("float")), (), "bfloat16", 1083964),
    (
        scheme("float-quantized", "float", 8, "block", block_structure=[100, 96]),
        HEAD,
        "bfloat16",
        1116936,
    ),
    (
        scheme("nvfp4-pack-quantized", "float", 4, "tensor_group", LOCAL, group_size=16),
        HEAD,
        "bfloat16",
        686704,
    ),
    (
        scheme("nvfp4-pack-quantized", "float", 4, "tensor_group", group_size=16),
        SOME,
        "bfloat16",
        1534480,
    ),
]
"""Bytes of the tensors that compressed-tensors 0.20.0 makes of a Llama of this shape."""


def declared(group, ignore=HEAD, **more):
    """The quantization_config of one group."""
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": group["format"],
        "ignore": list(ignore),
        "quantization_status": "compressed",
        "version": "0.20.0",
    } | more


def llama(quantization, dtype="bfloat16", **more):
    """A config with these weights."""
    return (
        {"model_type": "llama", "dtype": dtype, "quantization_config": quantization} | SHAPE | more
    )


@pytest.mark.parametrize(("group", "ignore", "dtype", "num_bytes"), WRITTEN)
def test_bytes_are_those_of_the_writer(group, ignore, dtype, num_bytes):
    """A config has the bytes that compressed-tensors wrote for the same one."""
    assert weights_of(llama(declared(group, ignore), dtype)).num_bytes == num_bytes


@pytest.mark.parametrize(("group", "ignore", "dtype", "num_bytes"), WRITTEN)
def test_the_writer_still_writes_them(group, ignore, dtype, num_bytes, tmp_path):
    """Where compressed-tensors is installed, its file has the bytes of the table above."""
    pytest.importorskip("compressed_tensors")
    import torch
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import save_file

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model = model.to(getattr(torch, dtype))
    written = copy.deepcopy(declared(group, ignore, quantization_status="frozen"))
    apply_quantization_config(model, QuantizationConfig.model_validate(written))
    for name, parameter in model.named_parameters():
        if name.endswith("scale"):
            parameter.data.fill_(0.01)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert weights_of_files(tmp_path).num_bytes == num_bytes


def test_order_of_inputs_has_a_number_for_each():
    """With actorder `group` each quantised matrix has an int32 for each of its inputs."""
    ordered = copy.deepcopy(W4A16)
    ordered["weights"]["actorder"] = "group"
    more = (
        weights_of(llama(declared(ordered))).num_bytes
        - weights_of(llama(declared(W4A16))).num_bytes
    )
    assert more == 2 * 4 * (4 * 256 + 2 * 256 + 384)


def test_groups_are_chosen_by_name_then_pattern_then_class():
    """The group that names a module has it, before one whose pattern does, before Linear."""
    eight = scheme("int-quantized", "int", 8, "channel", TOKEN)
    groups = {
        "all": W4A16,
        "pattern": eight | {"targets": ["re:.*self_attn.*"]},
        "name": FP8 | {"targets": ["model.layers.0.self_attn.q_proj"]},
    }
    mixed = declared(W4A16) | {"config_groups": groups, "format": "mixed-precision"}
    found = weights_of(llama(mixed))
    plain = 2 * (2 * 128 * 256 + 5 * 256)
    attention = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
    one_byte = 2 * sum(rows * columns + 2 * rows for rows, columns in attention.values())
    mlp = 2 * sum(
        rows * columns // 2 + 2 * rows * columns // 32 + 16
        for rows, columns in [(384, 256), (384, 256), (256, 384)]
    )
    assert found.num_bytes == plain + one_byte + mlp
    assert found.format == "int4+int8+fp8"
    assert "fp8 for 65,536 values" in found.origin


def test_kimi_k2_5_is_the_published_size():
    """Routed experts have four bits, a scale for 32 and two int32 of shape; all else is bf16. The
    same decoder as Kimi-K2-Thinking, whose files are published as 594 GB.
    """
    found = weights_of(resolve("moonshotai/Kimi-K2.5")[0])
    values = 7168 * 2048
    experts = 60 * 384 * 3
    quantised = experts * (values // 2 + values // 32 * 2 + 8)
    assert found.num_bytes == quantised + 2 * (found.num_parameters - experts * values)
    assert found.num_bytes == 594_205_812_736
    assert found.format == "int4"


def test_mixed_precision_is_the_published_size():
    """ModelOpt's groups name modules: with encoder and MTP module in bf16 the files are 3.06 times
    smaller, as the model card says.
    """
    config, _ = resolve("nvidia/Qwen3.6-35B-A3B-NVFP4")
    found = weights_of(config)
    assert found.num_bytes == 20_825_156_824
    assert found.format == "fp8+nvfp4"
    rest = 2 * (449_000_000 + 845_000_000)
    ratio = (2 * found.num_parameters + rest) / (found.num_bytes + rest)
    assert 3.05 < ratio < 3.08


def mixed(**more):
    """ModelOpt's mixed precision for a Llama."""
    kinds = {
        "a": ({"num_bits": 8}, ["model.layers.0.self_attn.q_proj", "lm_head"]),
        "b": ({"num_bits": 4, "group_size": 16}, ["model.layers.1.mlp.down_proj"]),
    }
    groups = {
        name: {
            "input_activations": {"dynamic": False, "type": "float"} | kind,
            "weights": {"dynamic": False, "type": "float"} | kind,
            "targets": targets,
        }
        for name, (kind, targets) in kinds.items()
    }
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "config_groups": groups,
    } | more


def test_mixed_precision_by_hand():
    """fp8 has two fp32 scales, nvfp4 an fp8 one for 16 values besides; unnamed modules are bf16."""
    plain = weights_of(llama(None)).num_bytes
    eight = 256 * 256 + 128 * 256
    four = 256 * 384
    expected = plain - 2 * (eight + four) + eight + 2 * 8 + four // 2 + four // 16 + 8
    assert weights_of(llama(mixed())).num_bytes == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"targets": ["model.layers.7.self_attn.q_proj"]}, "config_groups"),
        ({"targets": ["model.layers.0.self_attn"]}, "config_groups"),
        ({"targets": ["model.layers.1.mlp.down_proj"]}, "config_groups"),
        ({"targets": []}, "config_groups"),
        ({"targets": [7]}, "config_groups"),
        ({"targets": None}, "config_groups"),
        ({"input_activations": None}, "config_groups"),
        ({"weights": {"num_bits": 8, "type": "int"}}, "config_groups"),
        ({"weights": None}, "config_groups"),
    ],
)
def test_mixed_precision_that_is_not_known_is_refused(change, field):
    """A group that names no module of the decoder, or one of another group, is refused."""
    quantization = mixed()
    quantization["config_groups"]["a"] |= change
    with pytest.raises(UnsupportedError, match=rf"deciding field: quantization_config\.{field}$"):
        weights_of(llama(quantization))


def test_a_module_both_named_and_left_out_is_refused():
    """Two fields that contradict each other decide nothing."""
    with pytest.raises(UnsupportedError, match=r"deciding field: quantization_config\.ignore$"):
        weights_of(llama(mixed(ignore=["model.layers.1*"])))


MOE = {
    "model_type": "mixtral",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
UP = "model.layers.1.block_sparse_moe.experts"
FOUR = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
LAYERS = {
    "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
    "lm_head": {"quant_algo": "NVFP4", "group_size": 16},
    **{f"{UP}.{number}.up_proj": FOUR for number in range(3)},
}


def layered(layers):
    """A mixture of experts whose modules have a format each."""
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    return MOE | {"quantization_config": quantization | {"quantized_layers": layers}}


def test_formats_of_each_module_by_hand():
    """`quantized_layers` says a format for each module; whether W4A16 has a scale of its inputs is
    open, so that four bytes of each such matrix are a range.
    """
    eight, four, head = 256 * 256, 3 * 384 * 256, 512 * 256
    expected = weights_of(MOE).num_bytes - 2 * (eight + four + head)
    expected += eight + 8 + (four + head) // 2 + (four + head) // 16 + 8 + 3 * 8
    found = weights_of(layered(LAYERS))
    assert (found.num_bytes, found.least_bytes) == (expected, expected - 3 * 4)
    assert any("W4A16" in note for note in found.notes)
    sure = LAYERS | {name: FOUR | {"quant_algo": "NVFP4"} for name in LAYERS if UP in name}
    assert (
        weights_of(layered(sure))[1:]
        == found._replace(notes=found.notes[:-1], least_bytes=None)[1:]
    )


def test_all_experts_of_a_layer_may_stand_in_one_line():
    """What the catalogue keeps of `quantized_layers` is weighed as the whole of it."""
    from kvcalc.weights._groups import condensed

    fewer = {name: entry for name, (entry, _) in condensed(LAYERS).items()}
    assert len(fewer) == 3
    assert f"{UP}.up_proj" in fewer
    assert weights_of(layered(fewer)) == weights_of(layered(LAYERS))


@pytest.mark.parametrize(
    "layers",
    [
        7,
        [],
        {},
        {"lm_head": "FP8"},
        {"lm_head": {}},
        {"lm_head": {"quant_algo": "FP8", "group_size": 128}},
        {"lm_head": {"quant_algo": "NVFP4", "group_size": 32}},
        {"lm_head": {"quant_algo": ["NVFP4"], "group_size": 16}},
        {"lm_head": {"quant_algo": "MXFP8"}},
        {"model.layers.0.self_attn": {"quant_algo": "FP8"}},
        {"model.layers.2.self_attn.q_proj": {"quant_algo": "FP8"}},
        {"lm_head": {"quant_algo": "FP8"}, "model.lm_head": FOUR},
        {f"{UP}.{number}.up_proj": FOUR for number in range(2)},
        {f"{UP}.{number}.up_proj": FOUR for number in range(4)},
        {f"{UP}.{number}.up_proj": FOUR for number in (0, 2)},
        LAYERS | {f"{UP}.2.up_proj": {"quant_algo": "FP8"}},
        LAYERS | {f"{UP}.up_proj": FOUR},
        {f"{UP}.up_proj": FOUR} | LAYERS,
        {"a" * 501: FOUR},
    ],
)
def test_formats_of_modules_that_are_not_known_are_refused(layers):
    """Other formats, modules of other names and experts that differ are refused."""
    with pytest.raises(UnsupportedError, match=r"field: quantization_config\.quantized_layers$"):
        weights_of(layered(layers))


def test_names_of_other_parts_are_no_layers():
    """`mtp.layers.0` and a vision tower's layers leave the decoder's layer 0 as it was."""
    block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    names = ["mtp.layers.0*", "vision_tower.encoder.layers.0.self_attn.q_proj"]
    whole = weights_of(llama(block)).num_bytes
    assert weights_of(llama(block | {"ignore": names})).num_bytes == whole


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ignore": None}, "ignore"),
        ({"ignore": ["lm_head", "q_proj"]}, "ignore"),
        ({"ignore": ["lm_head", "model.layers.0.self_attn"]}, "ignore"),
        ({"ignore": ["lm_head", "model.layers.*"]}, "ignore"),
        ({"ignore": ["Linear"]}, "ignore"),
        ({"ignore": ["re:(a+)+$"]}, "ignore"),
        ({"ignore": ["re:" + "a" * 500]}, "ignore"),
        ({"format": "sparse-24-bitmask"}, "format"),
        ({"format": "mixed-precision"}, "format"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"quantization_status": "calibration"}, "quantization_status"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"a": 1}}, "config_groups"),
        ({"config_groups": {"a": W4A16, "b": FP8}}, "config_groups"),
    ],
)
def test_fields_that_leave_bytes_open_are_refused(change, field):
    """A field that is unknown, wrong or contradicted is refused, and named."""
    group = {key: value for key, value in W4A16.items() if key != "format"}
    quantization = declared(W4A16) | {"config_groups": {"group_0": group}} | change
    with pytest.raises(UnsupportedError, match=rf"deciding field: quantization_config\.{field}$"):
        weights_of(llama(quantization))


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 3},
        {"num_bits": True},
        {"type": "float"},
        {"dynamic": True},
        {"strategy": "channel"},
        {"strategy": "tensor"},
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "row"},
        {"strategy": ["group"]},
        {"group_size": 0},
        {"group_size": 96},
        {"group_size": "32"},
        {"group_size": [32]},
        {"strategy": None, "group_size": [32]},
        {"symmetric": 1},
        {"actorder": True},
        {"scale_dtype": "torch.uint8"},
    ],
)
def test_weights_that_are_not_known_are_refused(weights):
    """Bits, strategies and sizes that do not belong together are refused."""
    group = copy.deepcopy(W4A16)
    group["weights"] |= weights
    with pytest.raises(UnsupportedError, match=r"deciding field: quantization_config\."):
        weights_of(llama(declared(group)))


@pytest.mark.parametrize(
    "change",
    [
        {"output_activations": static("int")},
        {"input_activations": static("int") | {"strategy": "group", "group_size": 128}},
        {"input_activations": static("int") | {"symmetric": False}},
        {"input_activations": "int8"},
        {"targets": ["Embedding"]},
        {"targets": ["re:.*"]},
        {"targets": ["re:.*[ab]"]},
        {"targets": "Linear"},
    ],
)
def test_groups_that_are_not_known_are_refused(change):
    """Scales of outputs, unknown targets and one that has the embedding are refused."""
    with pytest.raises(UnsupportedError, match=r"deciding field: quantization_config\."):
        weights_of(llama(declared(W4A16 | change)))


def test_old_zero_points_are_refused():
    """Packed zero points are known of versions that pack them alone."""
    group = scheme("pack-quantized", "int", 4, "channel", symmetric=False)
    for version in ("0.9.3", "0.9", "x", None, [0, 20]):
        with pytest.raises(UnsupportedError, match=r"deciding field: quantization_config\.version"):
            weights_of(llama(declared(group, version=version)))


def test_tied_heads_must_be_left_out():
    """A head that is the embedding would be stored twice if it were quantised."""
    tied = {"tie_word_embeddings": True}
    found = weights_of(llama(declared(W4A16), **tied))
    assert found.num_bytes == 686816 - 2 * 128 * 256
    with pytest.raises(UnsupportedError, match="tied and not left out"):
        weights_of(llama(declared(W4A16, ()), **tied))


def test_mixtures_that_transformers_fuses_are_refused():
    """`Linear` says nothing of experts that are linear modules in some versions only."""
    config, _ = resolve("Qwen/Qwen3-30B-A3B-FP8")
    with pytest.raises(UnsupportedError, match="linear modules of 'qwen3_moe'"):
        weights_of(config | {"quantization_config": declared(W4A16)})


def kimi(ignore):
    """Kimi K2.5's bytes with another list of what is left out."""
    config = copy.deepcopy(resolve("moonshotai/Kimi-K2.5")[0])
    config["text_config"]["quantization_config"]["ignore"] = ["lm_head", *ignore]
    return weights_of(config)


def test_patterns_see_each_expert():
    """A pattern holds for all experts of a matrix or is refused, as is one that needs a prefix."""
    all_but = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.(gate|up|down)_proj"]
    whole = kimi(all_but).num_bytes
    assert kimi([*all_but, r"re:.*experts\.\d+\.nothing"]).num_bytes == whole
    down = kimi([*all_but, r"re:.*layers\.1\.mlp\.experts\.\d+\.down_proj"]).num_bytes
    values = 7168 * 2048
    assert down - whole == 384 * (2 * values - values // 2 - values // 16 - 8)
    for pattern in (r"re:.*layers\.1\.mlp\.experts\.7\.down_proj", r"re:.*experts\...\.down_proj"):
        with pytest.raises(UnsupportedError, match="depends on"):
            kimi([*all_but, pattern])
    with pytest.raises(UnsupportedError, match="depends on"):
        kimi([*all_but, r"re:model\.layers\.1\..*"])
    with pytest.raises(UnsupportedError, match="some copies"):
        kimi([*all_but, "language_model.model.layers.1.mlp.experts.7.down_proj"])


WORDS = st.text(st.sampled_from("ab1_-"), min_size=1, max_size=3) | st.just(r"a\.b")
PIECES = st.one_of(
    WORDS,
    st.sampled_from([".", ".*", r"\d+", r"\."]),
    st.lists(WORDS, min_size=1, max_size=3).map(lambda words: f"({'|'.join(words)})"),
    st.lists(WORDS, min_size=1, max_size=3).map(lambda words: f"(?:{'|'.join(words)})"),
)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["", "^"]),
    st.lists(PIECES, max_size=6).map("".join),
    st.sampled_from(["", "$"]),
    st.text(st.sampled_from("ab1_-."), max_size=12),
)
@example("", r".*mlp\.(gate|up)_proj.*", "", "model.layers.3.mlp.up_proj")
@example("", r".*layers\.\d+\.q$", "", "model.layers.31.q")
def test_patterns_match_as_regular_expressions_do(start, middle, end, name):
    """A pattern that is read matches exactly the names that `re.match` finds it in."""
    pattern = parse(start + middle + end)
    assert pattern is not None
    assert pattern.matches(name) == (re.match(pattern.text, name) is not None)


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from(r"ab1.*+?()[]{}|\d^$-:"), max_size=12), st.text("ab1.", max_size=8))
def test_what_is_read_is_read_rightly(text, name):
    """Any text is refused or means what it means as a regular expression."""
    pattern = parse(text)
    if pattern is not None:
        assert pattern.matches(name) == (re.match(text, name) is not None)


@pytest.mark.parametrize(
    "text",
    r"(a+)+ (a*)*b .*? .*+ .+ a|b (a|(b)) (a|b)* [ab] a{2} \w (a \1 a$b a^ (?i)a (|a) () (?=a) \d "
    r"\d+? $$ é".split(),
)
def test_other_regular_expressions_are_not_read(text):
    """What may mean more than a few pieces is no pattern."""
    assert parse(text) is None


@pytest.mark.parametrize(
    "pattern",
    [
        "re:" + ".*" * 240 + "x",
        "re:" + ".*a" * 160,
        "re:" + r"\d+" * 160,
        "re:" + ".*(" + "|".join(["model"] * 80) + ")",
        r"re:.*\d+.*(a|aa|aaa|aaaa).*0",
    ],
)
@pytest.mark.parametrize("times", [1, 1000, 100_000])
def test_hostile_patterns_are_bounded(pattern, times):
    """No list of patterns keeps kvcalc busy for long, in a model with many experts and layers."""
    start = time.process_time()
    try:
        kimi([pattern] * times)
    except UnsupportedError:
        pass
    except ConfigError:
        assert times == 100_000
    assert time.process_time() - start < 30


@pytest.mark.parametrize("targets", [["re:"] * 100_000, [f"re:{n}" for n in range(100_000)]])
def test_hostile_targets_are_bounded(targets):
    """Targets are counted as patterns of `ignore` are."""
    start = time.process_time()
    with contextlib.suppress(KvcalcError):
        weights_of(llama(declared(W4A16 | {"targets": targets}), num_hidden_layers=10_000))
    assert time.process_time() - start < 30


@pytest.mark.parametrize("ignore", [[], ["model.layers.1.mlp.experts.7.up_proj"], ["re:.*1"]])
def test_hostile_sizes_are_bounded(ignore):
    """Nor do as many experts and layers as a config may have."""
    config = copy.deepcopy(resolve("moonshotai/Kimi-K2.5")[0])
    config["text_config"] |= {"num_hidden_layers": 10_000, "n_routed_experts": 100_000}
    config["text_config"]["quantization_config"]["ignore"] = ["lm_head", *ignore]
    start = time.process_time()
    with contextlib.suppress(KvcalcError):
        weights_of(config)
    assert time.process_time() - start < 30


def test_steps_are_counted(monkeypatch):
    """Patterns end in a refusal once they were held against too many names."""
    monkeypatch.setattr(_groups, "MAX_STEPS", 100)
    with pytest.raises(UnsupportedError, match="too many patterns"):
        kimi(["re:.*self_attn.*"])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 40)
    | st.sampled_from(["Linear", "re:.*", "int", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["weights", "targets", "num_bits"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["quantization", "group", "weights", "inputs"]),
    st.sampled_from(
        [
            *declared(W4A16),
            *W4A16,
            *W4A16["weights"],
            *LOCAL,
            *("actorder", "block_structure", "scale_dtype", "sparsity_config"),
            *("output_activations", "kv_cache_scheme", "transform_config"),
        ]
    ),
    JSON,
    st.sampled_from(["compressed", "mixed"]),
)
def test_malformed_fields_are_kvcalc_errors(level, key, value, method):
    """Whatever a field of any level holds, the answer is a record or an error of ours."""
    quantization = copy.deepcopy(declared(W4A16 | {"input_activations": dict(LOCAL)}))
    if method == "mixed":
        quantization = mixed()
    group = next(iter(quantization["config_groups"].values()))
    levels = {"quantization": quantization, "group": group, "weights": group["weights"]}
    levels.get(level, group["input_activations"])[key] = value
    with contextlib.suppress(KvcalcError):
        assert weights_of(llama(quantization)).num_bytes > 0
