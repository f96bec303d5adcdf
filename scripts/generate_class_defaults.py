"""Write `profiles/class_defaults.jsonl` from the installed transformers' configuration classes.

Run it after an upgrade of transformers: `python scripts/generate_class_defaults.py`.
A test compares the file with the installed version and says when it is out of step.
"""

import dataclasses
import json
from pathlib import Path

from sizing_fields import NESTED, SIZING_FIELDS, keep_sizing_fields

DECODER_KEYS = ("text_config", "decoder", "thinker_config", "vlm_config", "generator")

TARGET = Path(__file__).parent.parent / "profiles" / "class_defaults.jsonl"


def describe(config_class: type) -> dict[str, object]:
    """Defaults, aliases and text part of one configuration class, sizing fields only."""
    defaults = {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in dataclasses.fields(config_class)
        if field.name in SIZING_FIELDS - NESTED - {"dtype", "torch_dtype"}
        and isinstance(field.default, int | float | str | list | tuple | dict)
        and field.default is not False
    }
    entry: dict[str, object] = {
        "class": config_class.__name__,
        "defaults": dict(sorted(defaults.items())),
    }
    aliases = {
        standard: own
        for standard, own in (config_class.attribute_map or {}).items()
        if standard in SIZING_FIELDS
    }
    if aliases:
        entry["aliases"] = aliases
    decoder = nested_decoder(config_class)
    if decoder:
        entry["decoder"] = decoder
    return entry


def nested_decoder(config_class: type) -> dict[str, object] | None:
    """Where a composite class keeps the configuration of its decoder, None for others."""
    from transformers import AutoConfig

    specs = config_class.sub_configs_defaults
    key = next((name for name in DECODER_KEYS if name in specs), None)
    if key is None:
        return None
    spec = specs[key]
    return {
        "key": key,
        "model_type": spec.model_type,
        "fixed": spec.config_class is not AutoConfig,
        "values": keep_sizing_fields(spec.init_kwargs),
    }


def encoders() -> set[str]:
    """Model types with masked-language or image-classification models, and none that generates."""
    from transformers.models.auto import modeling_auto

    def types(*words: str) -> set[str]:
        return {
            model_type
            for name, mapping in vars(modeling_auto).items()
            if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES")
            if any(word in name for word in words)
            for model_type in mapping
        }

    return types("MASKED_LM", "IMAGE_CLASSIFICATION") - types(
        "CAUSAL", "TEXT_TO", "IMAGE_TEXT", "SEQ_2_SEQ", "2_SEQ", "MULTIMODAL", "SEQ_TO_SEQ", "CTC"
    )


def tabulate() -> list[str]:
    """The lines of the file: the version, then one model type a line, so that a diff reads well."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    records = [{"transformers": transformers.__version__}]
    without_cache = encoders()
    records += [
        {"model_type": name}
        | describe(CONFIG_MAPPING[name])
        | ({"generates": False} if name in without_cache else {})
        for name in sorted(CONFIG_MAPPING_NAMES)
    ]
    return [json.dumps(record) for record in records]


def main() -> None:
    """Write the table."""
    TARGET.write_text("\n".join(tabulate()) + "\n", "utf-8")


if __name__ == "__main__":
    main()
