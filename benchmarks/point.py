"""Time of sizing one point of a model that is loaded, beside `json.loads` of its config.

    python benchmarks/point.py [NUMBER]

Prints both in microseconds, the best of five series, and their ratio; the project wants 100 µs at
most for a point.
"""

import json
import sys
import timeit

from kvcalc import api
from kvcalc.families import Architecture
from kvcalc.origin import Origin
from kvcalc.sources import catalogue

MODELS = (
    "meta-llama/Meta-Llama-3-8B",
    "google/gemma-3-27b-it",
    "deepseek-ai/DeepSeek-V3",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
)


def main() -> None:
    """One line for each model."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(f"{'model':<44} {'point':>8} {'json':>8} {'ratio':>7}")
    for name in MODELS:
        entry = catalogue.find(name)
        architecture, origin, _ = api.read_model(name)
        text = json.dumps(dict(entry.config)) if entry else "{}"

        def point(architecture: Architecture = architecture, origin: Origin = origin) -> None:
            api.size_point(architecture, origin, seq=131_072)

        def parse(text: str = text) -> None:
            json.loads(text)

        times = [
            min(timeit.repeat(action, number=number, repeat=5)) / number * 1e6
            for action in (point, parse)
        ]
        print(f"{name:<44} {times[0]:5.1f} µs {times[1]:5.1f} µs {times[0] / times[1]:6.1f}×")


if __name__ == "__main__":
    main()
