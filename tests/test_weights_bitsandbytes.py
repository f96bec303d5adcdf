"""bitsandbytes: bytes equal those of checkpoints that it wrote, and of published ones."""

import copy
import json
from collections import Counter

import pytest
from test_weights import SMALL as SIZES
from test_weights import saved

from kvcalc.config import ConfigFields
from kvcalc.errors import ConfigError, InputError, UnsupportedError
from kvcalc.sources import catalogue
from kvcalc.weights import _decoders, weights_of, weights_of_files
from kvcalc.weights._rules import ALL_LINEAR

SMALL = {
    "vocab_size": 100,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 200,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "head_dim": 32,
    "dtype": "bfloat16",
}
OWN = {
    "minicpm3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED = NF4 | {"bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
SOME = INT8 | {"llm_int8_skip_modules": ["model.layers.1.self_attn"]}

WRITTEN = [
    ("llama", False, NESTED, 197_736),
    ("llama", False, NF4, 195_072),
    ("llama", False, INT8, 311_694),
    ("llama", False, SOME, 346_907),
    ("llama", True, NESTED, 172_136),
    ("llama", True, INT8, 286_094),
    ("llama", True, SOME, 333_706),
    ("minicpm3", False, NESTED, 182_168),
    ("minicpm3", False, NF4, 175_808),
    ("minicpm3", False, SOME, 295_388),
    ("qwen3_5_text", False, NESTED, 200_564),
    ("qwen3_5_text", False, NF4, 196_912),
    ("qwen3_5_text", False, INT8, 314_207),
]
"""Bytes of the tensors that bitsandbytes 0.50.2 and transformers 5.23.0 wrote for these models: all
but the texts of `quant_state`, and with nested scales 4 for the mean that stands in each text.
`SOME` leaves out one attention, and thereby not the output head.
"""


@pytest.mark.parametrize(("model_type", "tied", "quantization", "num_bytes"), WRITTEN)
def test_bytes_are_those_of_written_checkpoints(model_type, tied, quantization, num_bytes):
    """Packed values, scales, tables and what is left out are counted as they were written."""
    fields = SMALL | OWN.get(model_type, {}) | {"tie_word_embeddings": tied}
    config = saved(model_type, fields)
    declared = {"quant_method": "bitsandbytes"} | quantization
    found = weights_of(config | {"quantization_config": declared})
    assert found.num_bytes == num_bytes
    assert found.num_parameters == weights_of(config).num_parameters
    assert found.format == ("int8" if "load_in_8bit" in quantization else "nf4")


PUBLISHED = {
    "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": (
        "5.70",
        {
            "model_type": "llama",
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "unsloth/Qwen2.5-7B-Instruct-bnb-4bit": (
        "5.55",
        {
            "model_type": "qwen2",
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
}
"""Sizes in GB of model.safetensors, as huggingface_hub shows them while it fetches the file."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_have_their_size(name):
    """A published file is its tensors, below 200 bytes of text a matrix, and a header of 256 kB."""
    size, fields = PUBLISHED[name]
    skipped = {"llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "merger"]}
    declared = {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "uint8"}
    config = fields | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    num_bytes = weights_of(config | {"quantization_config": declared | NESTED | skipped}).num_bytes
    most = num_bytes + 7 * fields["num_hidden_layers"] * 200 + 256_000
    assert f"{num_bytes / 1e9:.2f}" == f"{most / 1e9:.2f}" == size


TINY = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
ALL = [(256, 256)] * 4 + [(384, 256), (384, 256), (256, 384)]
KEPT = 2 * (2 * 100 * 256 + 5 * 256)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_four_bits_by_hand(kind, nested):
    """Two values a byte, a scale for 64 of them, a scale for 256 scales, and the tables."""
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    declared["bnb_4bit_use_double_quant"] = nested
    found = weights_of(TINY | {"quantization_config": declared})
    expected = KEPT
    for rows, columns in ALL * 2:
        scales = rows * columns // 64
        expected += rows * columns // 2 + 16 * 4
        expected += scales + 4 * -(-scales // 256) + 256 * 4 + 4 if nested else 4 * scales
    assert (found.num_bytes, found.format) == (expected, kind)
    assert "quant_state" in found.notes[-1]


@pytest.mark.parametrize(
    ("skipped", "num_left_out"),
    [(["lm_head"], 0), (["lm_head", "o_proj"], 2), (["lm_head", "model.layers.1"], 7)],
)
def test_modules_that_are_skipped_keep_two_bytes(skipped, num_left_out):
    """Names of modules and of what they are in are left out, and the head only when it is named."""
    declared = {"quant_method": "bitsandbytes"} | INT8
    whole = weights_of(TINY | {"quantization_config": declared}).num_bytes
    declared["llm_int8_skip_modules"] = skipped
    shapes = {0: [], 2: [(256, 256)] * 2, 7: ALL}[num_left_out]
    saved_bytes = sum(rows * columns - 4 * rows - 1 for rows, columns in shapes)
    assert weights_of(TINY | {"quantization_config": declared}).num_bytes == whole + saved_bytes
    declared["llm_int8_skip_modules"] = []
    head = weights_of(TINY | {"quantization_config": declared}).num_bytes
    assert head == whole - 100 * 256 + 4 * 100 + 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"load_in_4bit": False}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_quant_storage": "int64"}, "bnb_4bit_quant_storage"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"llm_int8_skip_modules": ["self_attn"]}, "llm_int8_skip_modules"),
        ({"llm_int8_skip_modules": ["layers.*"]}, "llm_int8_skip_modules"),
        ({"modules_to_not_convert": ["lm_head"]}, "llm_int8_skip_modules"),
    ],
)
def test_what_is_not_known_is_refused(change, field):
    """A config that leaves its bytes open, or that versions read in two ways, is refused."""
    declared = {"quant_method": "bitsandbytes"} | NF4 | change
    with pytest.raises(UnsupportedError, match=rf"deciding field: quantization_config\.{field}"):
        weights_of(TINY | {"quantization_config": declared})


@pytest.mark.parametrize("key", ["load_in_4bit", "bnb_4bit_use_double_quant", "load_in_8bit"])
@pytest.mark.parametrize("value", ["yes", 1, []])
def test_malformed_switches_are_config_errors(key, value):
    """A switch that is neither true nor false is told with its value."""
    declared = {"quant_method": "bitsandbytes"} | NF4 | {key: value}
    with pytest.raises(ConfigError, match=key):
        weights_of(TINY | {"quantization_config": declared})


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "qwen3_moe", "falcon"])
def test_fused_and_stacked_modules_are_refused(model_type):
    """A type whose class fuses projections or stacks experts has tables of another number."""
    entry = next(one for one in catalogue.entries() if one.config.get("model_type") == model_type)
    config = dict(entry.config) | {"torch_dtype": "bfloat16"}
    declared = {"quant_method": "bitsandbytes"} | NF4
    with pytest.raises(UnsupportedError, match=r"deciding field: "):
        weights_of(config | {"quantization_config": declared})


@pytest.mark.parametrize("model_type", sorted(ALL_LINEAR))
def test_linear_modules_are_those_of_the_class(model_type):
    """Each matrix that is quantised is one linear module of transformers' class, name by name."""
    import torch
    import transformers

    fields = SIZES | SMALL | OWN.get(model_type, {})
    config = saved(model_type, fields)
    given = {key: copy.deepcopy(config[key]) for key in config if key != "model_type"}
    built = transformers.AutoConfig.for_model(model_type, **given)
    with torch.device("meta"):
        if model_type.endswith(("vl_text", "2_vl_text")):
            names = {"qwen2_vl_text": "Qwen2VL", "qwen2_5_vl_text": "Qwen2_5_VL"}
            name = names.get(model_type, "Qwen3VL")
            module = model_type.removesuffix("_text")
            text = getattr(getattr(transformers.models, module), f"modeling_{module}")
            model = getattr(text, f"{name}TextModel")(built)
        else:
            model = transformers.AutoModelForCausalLM.from_config(built)
    theirs = Counter(
        (name.removeprefix("model."), module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name != "lm_head"
    )
    parts = _decoders.read(ConfigFields(config, model_type=model_type, prefix=""), tied=True)
    ours = Counter((one.name, one.rows, one.columns) for one in parts.matrices if not one.kept)
    assert ours == theirs


@pytest.mark.parametrize("nested", [True, False])
def test_files_of_four_bits_are_read(tmp_path, nested):
    """Packed values count twice, tables and scales not at all, and all their bytes do."""
    import torch
    from safetensors.torch import save_file

    state = json.dumps({"quant_type": "nf4", "shape": [64, 32]}).encode()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {
        name: torch.zeros(1024, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(32, dtype=torch.uint8 if nested else torch.float32),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(state), dtype=torch.uint8
        ),
        "model.norm.weight": torch.zeros(32, dtype=torch.bfloat16),
    }
    if nested:
        tensors[f"{name}.nested_absmax"] = torch.zeros(1)
        tensors[f"{name}.nested_quant_map"] = torch.zeros(256)
    save_file(tensors, tmp_path / "model.safetensors")
    found = weights_of_files(tmp_path)
    assert (found.num_parameters, found.format) == (64 * 32 + 32, "nf4")
    assert found.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_files_of_eight_bits_are_read(tmp_path):
    """Eight-bit values count once each, their scales and formats not at all."""
    import torch
    from safetensors.torch import save_file

    name = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{name}.weight": torch.zeros(64, 32, dtype=torch.int8),
        f"{name}.SCB": torch.zeros(64),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = weights_of_files(tmp_path)
    assert (found.num_parameters, found.format) == (64 * 32, "int8")
    assert found.num_bytes == 64 * 32 + 4 * 64 + 1


def test_values_must_fill_what_they_are_packed_into():
    """A matrix that does not fill the dtype of its storage is refused."""
    odd = TINY | {"intermediate_size": 385, "hidden_size": 130, "num_attention_heads": 13}
    declared = {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "float64"} | NF4
    with pytest.raises((UnsupportedError, InputError), match="bnb_4bit_quant_storage"):
        weights_of(odd | {"quantization_config": declared})
