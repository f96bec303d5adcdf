"""The laws of the repository: what may import what, what is public, and that the README is true."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import test_conformance
import zoo

import kvcalc
from kvcalc import api, checking, cli, hardware
from kvcalc.data import profiles_folder
from kvcalc.strategies import load_strategy, strategy_names

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvcalc"
README = (ROOT / "README.md").read_text("utf-8")

HEAVY = {"torch", "transformers", "huggingface_hub", "numpy", "yaml", "pynvml", "pydantic", "rich"}


def modules_after(code):
    """Top-level modules that are loaded after running `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_kvcalc_loads_nothing_heavy():
    """`import kvcalc` brings in the standard library only."""
    assert not modules_after("import kvcalc") & (HEAVY | {"typer"})


@pytest.mark.parametrize("model", ["meta-llama/Llama-3-8B", "local"])
def test_sizing_loads_nothing_heavy(model, tmp_path):
    """`size --json` of a catalogued or local model loads no framework, no hub client, no rich."""
    if model == "local":
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "llama"}))
        model = str(path)
    arguments = ["size", model, "--seq", "128k", "--json"]
    assert not modules_after(f"from kvcalc.cli import run; run({arguments!r})") & HEAVY


RANKS = (
    ("errors",),
    ("units", "data", "streams"),
    ("dtypes", "origin", "releases", "strict_yaml"),
    ("layers", "config"),
    ("families", "strategies"),
    ("engines", "hardware"),
    ("weights", "device"),
    ("budget",),
    ("sizing",),
    ("fitting",),
    ("sources",),
    ("api",),
    ("checking", "pasted", "planning"),
    ("__init__",),
    ("measure",),
    ("render",),
    ("cli",),
    ("__main__",),
)
"""The parts of the package, in the order in which they may import each other: only earlier ones."""

ORDER = {name: rank for rank, names in enumerate(RANKS) for name in names}


def part_of(path):
    """The part of the package that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_parts(path):
    """Parts of kvcalc that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "kvcalc":
            for name in node.names:
                yield name.name if name.name in ORDER else "__init__"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcalc."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name == "kvcalc":
                    yield "__init__"


def test_imports_point_one_way():
    """A part of the package imports itself and earlier parts only."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for imported in imported_parts(path)
        if imported != part_of(path) and ORDER[imported] >= ORDER[part_of(path)]
    ]
    assert wrong == []


def test_the_public_surface_is_exact():
    """`__all__` is sorted, and everything public in the package's namespace stands in it."""
    assert kvcalc.__all__ == sorted(kvcalc.__all__)
    public = {
        name
        for name, value in vars(kvcalc).items()
        if not name.startswith("_") and not isinstance(value, type(os))
    }
    assert public | set(kvcalc._LATER) == set(kvcalc.__all__)  # loaded when they are asked for
    assert isinstance(kvcalc.FitReport, type)
    assert kvcalc.size is api.size
    with pytest.raises(AttributeError, match="no attribute 'fitReport'"):
        _ = kvcalc.fitReport


def test_every_strategy_has_promise_and_proof():
    """Each strategy's folder holds its parameters and a running cache, and says its source."""
    for name in strategy_names():
        folder = PACKAGE / "strategies" / name.replace("-", "_")
        assert (folder / "cache.py").is_file()
        strategy = load_strategy(name).strategy
        assert all((strategy.SUMMARY, strategy.SOURCE, strategy.WORKS_ON, *strategy.ABOUT[:-1]))


def test_every_profile_file_is_read():
    """Every shipped file parses: JSON, JSON lines, the YAML of GPUs and checks, and no other
    kind.
    """
    for path in profiles_folder().rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".jsonl":
            for line in path.read_text("utf-8").splitlines():
                json.loads(line)
        elif path.suffix == ".yaml" and path.parent == profiles_folder() / "gpus":
            hardware.read_gpu(path)
        elif path.suffix == ".yaml" and path.parent == profiles_folder() / "checks":
            checking.read_checks(path)
        else:
            assert path.is_dir() or path.name == "README.md", path


def console_blocks():
    """README's console blocks: pairs of a kvcalc command and the output that stands below it."""
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, output = command.partition("\n")
            yield line, output.rstrip()


@pytest.mark.parametrize(("line", "output"), console_blocks())
def test_readme_commands_print_what_readme_says(line, output, capsys, monkeypatch):
    """Each console block of the README is run at 80 columns, and its output compared."""
    monkeypatch.setenv("COLUMNS", "80")
    program, *arguments = line.split()
    assert program == "kvcalc"
    cli.run(arguments)
    printed = capsys.readouterr()
    lines = [one.rstrip() for one in (printed.out + printed.err).splitlines()]
    assert "\n".join(lines).rstrip() == output


def test_readme_python_is_true():
    """README's Python example runs, and its prompts print what stands below them."""
    import doctest

    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(block.group(1), {}, "README", "README.md", 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
    assert doctest.testmod(kvcalc).failed == 0


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(command, capsys, monkeypatch):
    """Each command explains itself and every option at 80 columns, and README mentions it."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"kvcalc {command}" in README
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "…" not in shown.replace("q8_0, …", "")


def test_nothing_names_a_path_outside():
    """No file of the project refers to a folder beside it."""
    done = subprocess.run(
        ["git", "grep", "-nIF", "-e", "../" + "shared", "-e", "../." + "library"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 128:
        pytest.skip("not in a git checkout")
    assert (done.returncode, done.stdout) == (1, "")


def test_readme_counts_are_those_of_the_tree():
    """How many cases, types and models README speaks of is counted here."""
    grades = Counter(case["grade"] for case in json.loads((ROOT / "tests/golden.json").read_text()))
    exact = sum(
        pair not in test_conformance.NOT_SIZED.keys() | zoo.NOT_BUILDABLE.keys()
        for pair in zoo.model_types()
    )
    models = api.list_models()
    measured = {
        json.loads(line)["model"]
        for path in (profiles_folder() / "measurements").glob("*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    }
    sized = sum(not model["refused"] for model in models)
    for words in (
        f"{sum(grades.values())} golden cases",
        f"printed ({grades['engine log']})",
        f"publish ({grades['published figure']})",
        f"arithmetic by hand ({grades['hand arithmetic']})",
        f"{exact} of the {len(zoo.model_types()) - len(zoo.NOT_BUILDABLE)}",
        f"**{len(models)} models**",
        f"{sized} of them are sized",
        f"{len(measured)} published models were built",
    ):
        assert words in " ".join(README.split())
