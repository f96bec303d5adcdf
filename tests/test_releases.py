"""Releases of torch and transformers: which are promised, and what a user sees on them."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from kvcalc import cli, releases

ROOT = Path(__file__).parent.parent


def test_what_is_promised_is_what_is_checked():
    """pyproject.toml asks pip for the releases that kvcalc takes at run time."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = project["optional-dependencies"]["profile"]
    assert [wanted for wanted in asked if not wanted.startswith("nvidia")] == [
        releases.wanted(package) for package in releases.PROMISED
    ]


@pytest.mark.parametrize(
    ("package", "version", "wanted"),
    [
        ("transformers", "5.14.1", "transformers>=5.15,<6"),
        ("transformers", "6.0.0.dev0", "transformers>=5.15,<6"),
        ("transformers", "4.57.6", "transformers>=5.15,<6"),
        ("torch", "2.5.1+cu121", "torch>=2.6"),
    ],
)
def test_another_release_gets_one_line(package, version, wanted, monkeypatch, capsys):
    """Its name, and what to install: not a traceback of whatever fails first in it."""
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == package else real(name)
    )
    assert cli.run(["profile"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{package} {version} is not" in message
    assert f"pip install '{wanted}'" in message


def test_packages_that_do_not_go_together_get_one_line(tmp_path):
    """A transformers that does not import is no bug of kvcalc's."""
    broken = tmp_path / "transformers"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('tokenizers>=9 is required')\n")
    run = profile("--strategy", "dynamic", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "tokenizers>=9 is required" in run.stderr


def test_nothing_is_warned_of():
    """A profile says nothing on stderr: names that the installed release gave up are not used."""
    run = profile("--strategy", "all")
    assert run.returncode == 0
    assert run.stderr == ""


def profile(*arguments, **environment):
    """`kvcalc profile` of a short prompt, in a process of its own."""
    command = [sys.executable, "-m", "kvcalc", "profile", "--seq", "96", "--decode", "3"]
    return subprocess.run(
        [*command, "--repeats", "1", "--warmup", "0", "--device", "cpu", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
