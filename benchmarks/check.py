"""CPU time of `kvcalc check` on 200 deployments against one, interleaved runs.

    python benchmarks/check.py [RUNS]

Of the 200 no two are alike: eight models, each length and each memory its own. Prints the median
of each and their ratio; the project holds the ratio at or below 1.5.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from startup import KVCALC, cpu_seconds

MODELS = """
meta-llama/Llama-3-8B Qwen/Qwen3-8B Qwen/Qwen2.5-72B mistralai/Mistral-7B-v0.1
google/gemma-3-27b-it deepseek-ai/DeepSeek-V3 Qwen/Qwen3-30B-A3B-Base openai/gpt-oss-20b
""".split()

DEPLOYMENT = """
  service-{i}:
    model: {model}
    kv_memory: {memory}MiB
    workload: {{sequence: {seq}, concurrency: {concurrency}}}
    require: [fits, headroom >= 1%, max_concurrency >= 1]
"""


def file_of(count: int, path: Path) -> Path:
    """A file of so many deployments, all of which hold."""
    deployments = (
        DEPLOYMENT.format(
            i=i,
            model=MODELS[i % len(MODELS)],
            memory=80_000 + 100 * i,
            seq=4096 + 16 * i,
            concurrency=1 + i % 7,
        )
        for i in range(count)
    )
    path.write_text("deployments:" + "".join(deployments), encoding="utf-8")
    return path


def main() -> None:
    """Interleave the two, so that a busy machine slows both."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        one, many = (
            [KVCALC, "check", str(file_of(count, Path(folder) / f"{count}.yaml"))]
            for count in (1, 200)
        )
        for command in (one, many):  # compiles bytecode, warms the disk cache
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        pairs = [(cpu_seconds(one), cpu_seconds(many)) for _ in range(runs)]
    baseline = statistics.median(pair[0] for pair in pairs)
    command = statistics.median(pair[1] for pair in pairs)
    print(f"one deployment   {baseline * 1000:7.1f} ms")
    print(f"200 deployments  {command * 1000:7.1f} ms")
    print(f"ratio            {command / baseline:7.2f}   (median of {runs} interleaved runs)")


if __name__ == "__main__":
    main()
