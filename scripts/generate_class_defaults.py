"""Write `profiles/class_defaults.jsonl` from the installed transformers' configuration classes.

Run it after an upgrade of transformers: `python scripts/generate_class_defaults.py`.
A test compares the file with the installed version and says when it is out of step.
"""

import dataclasses
import json
from pathlib import Path

from sizing_fields import NESTED, SIZING_FIELDS

TARGET = Path(__file__).parent.parent / "profiles" / "class_defaults.jsonl"


def describe(config_class: type) -> dict[str, object]:
    """Defaults, aliases and text part of one configuration class, sizing fields only."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(config_class)
        if field.name in SIZING_FIELDS - NESTED - {"dtype", "torch_dtype"}
        and isinstance(field.default, int | str | list | dict)
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
    spec = getattr(config_class, "sub_configs_defaults", {}).get("text_config")
    text_class = getattr(spec, "config_class", (config_class.sub_configs or {}).get("text_config"))
    text_type = getattr(spec, "model_type", None) or getattr(text_class, "model_type", "")
    if text_type:
        entry["text"] = text_type
    return entry


def tabulate() -> list[str]:
    """The lines of the file: the version, then one model type a line, so that a diff reads well."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    records = [{"transformers": transformers.__version__}]
    records += [
        {"model_type": name} | describe(CONFIG_MAPPING[name])
        for name in sorted(CONFIG_MAPPING_NAMES)
    ]
    return [json.dumps(record) for record in records]


def main() -> None:
    """Write the table."""
    TARGET.write_text("\n".join(tabulate()) + "\n", "utf-8")


if __name__ == "__main__":
    main()
