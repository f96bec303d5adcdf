"""CPU time of `kvcalc size … --json` against `python -c "import typer"`, interleaved runs.

    python benchmarks/startup.py [RUNS]

Prints the median of each and their ratio; the project holds the ratio at or below 1.35.
"""

import compileall
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import kvcalc

BASELINE = [sys.executable, "-c", "import typer"]
KVCALC = str(Path(sys.executable).parent / "kvcalc")
COMMAND = [
    KVCALC,
    *("size", "meta-llama/Llama-3-8B", "--seq", "128k", "--json"),
]


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Interleave the two, so that a busy machine slows both."""
    # An installer compiles what it installs; a checkout may not have been.
    compileall.compile_dir(Path(kvcalc.__file__).parent, quiet=1)
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for command in (BASELINE, COMMAND):  # compiles bytecode, warms the disk cache
        cpu_seconds(command)
    pairs = [(cpu_seconds(BASELINE), cpu_seconds(COMMAND)) for _ in range(runs)]
    baseline = statistics.median(pair[0] for pair in pairs)
    command = statistics.median(pair[1] for pair in pairs)
    print(f"import typer        {baseline * 1000:7.1f} ms")
    print(f"kvcalc size --json  {command * 1000:7.1f} ms")
    print(f"ratio               {command / baseline:7.2f}   (median of {runs} interleaved runs)")


if __name__ == "__main__":
    main()
