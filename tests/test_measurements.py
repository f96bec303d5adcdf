"""Measured records of real model shapes, held against what is predicted today."""

import json

import pytest

import kvcalc
from kvcalc.data import profiles_folder
from kvcalc.measure.row import ROW_SCHEMA

RECORDS = [
    record
    for path in sorted((profiles_folder() / "measurements").glob("*.jsonl"))
    for record in map(json.loads, path.read_text("utf-8").splitlines())
    if record["schema"] == ROW_SCHEMA and record["held_bytes"] is not None
]
"""Rows that ran out of memory, and what is told of a machine and its kernels, hold nothing."""


def spec(record):
    """The strategy as a user would write it."""
    parameters = ",".join(f"{key}={value}" for key, value in record["parameters"].items())
    return record["strategy"] + (f":{parameters}" if parameters else "")


def test_many_shapes_were_measured():
    """At least ten published shapes, by name, among them windows and latents."""
    assert len({record["model"] for record in RECORDS}) >= 10
    types = {record["conditions"]["model_type"] for record in RECORDS}
    assert types >= {"llama", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3"}


@pytest.mark.parametrize(
    "record", RECORDS, ids=lambda record: f"{record['model']}-{record['strategy']}"
)
def test_measured_layers_are_still_predicted(record):
    """Each layer's measured bytes are those of the whole published model's layer today."""
    conditions = record["conditions"]
    assert record["status"] == "ok"
    report = kvcalc.size(
        record["model"],
        seq=conditions["prompt_tokens"] + conditions["decode_tokens"],
        batch=conditions["batch"],
        kv_dtype=conditions["dtype"],
        engine="transformers",
        strategy=spec(record),
    )
    measured = [layer["held_bytes"] for layer in record["layers"]]
    assert [layer.bytes for layer in report.layers[: len(measured)]] == measured
    assert record["held_bytes"] == sum(measured)
