"""However a command's streams end, it ends with its own status, and loses nothing that it can tell.

Each test runs the command line as a process of its own, since the streams are the process's.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

BAD, FAILS, REFUSED, INTERRUPTED = 2, 1, 3, 130

LLAMA = "meta-llama/Meta-Llama-3-8B"
CHECK = f"""
deployments:
  chat:
    model: {LLAMA}
    kv_memory: 1GiB
    workload: {{sequence: 8k, concurrency: 2}}
    require: [fits]
"""
COMMANDS = [
    (["check", "kvcalc.yaml"], FAILS),
    (["check", "kvcalc.yaml", "--json"], FAILS),
    (["fit", LLAMA, "--kv-memory", "1GiB", "--seq", "128k"], FAILS),
    (["fit", LLAMA, "--kv-memory", "1GiB", "--seq", "128k", "--json"], FAILS),
    (["plan", LLAMA, "--seq", "1M", "--concurrency", "1000", "--gpu", "l4"], FAILS),
    (["size", LLAMA, "no/such/model", "--seq", "8k"], BAD),
    (["size", LLAMA, "no/such/model", "--seq", "8k", "--csv"], BAD),
    (["size", LLAMA, "no/such/model", "--seq", "8k", "--markdown"], BAD),
    (["size", LLAMA, "--seq", "8k", "--tp", "3"], REFUSED),
    (["size", LLAMA, "--batch", "x"], BAD),
    (["fit", "--from", "-"], BAD),
    (["frobnicate"], BAD),
    (["models"], 0),
    (["models", "--json"], 0),
    (["gpus", "l40s", "--yaml"], 0),
    (["strategies", "snapkv"], 0),
    (["size", "--help"], 0),
]


@pytest.fixture
def start(tmp_path):
    """Start kvcalc in a folder with a check that fails."""
    (tmp_path / "kvcalc.yaml").write_text(CHECK)

    def run(*arguments, redirect="", **streams):
        command = [sys.executable, "-m", "kvcalc", *arguments]
        return subprocess.run(
            ["sh", "-c", f'exec "$@" {redirect}', "sh", *command],
            cwd=tmp_path,
            check=False,
            timeout=60,
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": -1, "stderr": -1, **streams},
        )

    return run


def without_reader():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(("command", "status"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_reader_who_leaves_changes_no_status(command, status, stream, start):
    """Whoever stops reading standard output or error, the status is that of the command."""
    pipe = without_reader()
    done = start(*command, **{stream: pipe})
    os.close(pipe)
    assert done.returncode == status
    assert "Traceback" not in (done.stderr or "")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("command", "status"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_stream_that_is_closed_changes_no_status(command, status, redirect, start):
    """Neither does a stream that was closed before, nor a standard error that takes nothing."""
    done = start(*command, redirect=redirect)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("redirect", [">/dev/full", "1</dev/null"])
@pytest.mark.parametrize("command", [["models"], ["check", "--json"], ["--help"]], ids=repr)
def test_a_standard_output_that_takes_nothing_is_told(command, redirect, start):
    """A full disk, or a standard output that was opened for reading, is told in one line."""
    done = start(*command, redirect=redirect)
    assert done.returncode == BAD
    assert done.stderr.startswith("kvcalc: cannot write the output: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("redirect", [">&-", "1>/dev/full", ""])
def test_files_are_written_whatever_becomes_of_the_screen(redirect, start, tmp_path):
    """A check whose output nobody takes still writes its files."""
    pipe = without_reader()
    streams = {} if redirect else {"stdout": pipe}
    start("check", "--out", "out.json", "--junit", "junit.xml", redirect=redirect, **streams)
    os.close(pipe)
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == FAILS
    assert (tmp_path / "junit.xml").read_text().endswith("</testsuites>\n")


def test_a_file_that_cannot_be_written_costs_nothing_else(start, tmp_path):
    """Where one file cannot be written the others are, and the screen shows the report."""
    done = start("check", "--junit", "nowhere/junit.xml", "--out", "out.json")
    assert done.returncode == BAD
    assert "1 deployment: 1 fails" in done.stdout
    assert "kvcalc: cannot write nowhere/junit.xml: No such file or directory\n" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == FAILS


def test_files_do_not_take_the_place_of_a_closed_stream(start, tmp_path):
    """With every stream closed, what is told on them does not land in the file that is written."""
    start("check", "--out", "out.json", redirect="<&- >&- 2>&-")
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == FAILS


def test_a_pipe_that_does_not_wait_is_waited_for():
    """A standard output that is set not to block (by Node, for one) gets everything."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command = [sys.executable, "-m", "kvcalc", "models", "--json"]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:  # noqa: PTH123 - a descriptor
            told = pipe.read()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert len(told) > 2**16  # more than a pipe holds
    assert json.loads(told)["schema"] == "kvcalc.models/1"


@pytest.mark.parametrize("module", ["typer", "kvcalc.api", "kvcalc.render.data"])
def test_an_interrupt_while_it_loads(module, tmp_path):
    """Ctrl-C ends kvcalc with its own status and one line, while its parts are loaded, too."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, os, signal, sys\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    search = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "kvcalc", "size", LLAMA, "--seq", "8k", "--json"],
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (INTERRUPTED, "")
    assert done.stderr == "kvcalc: interrupted\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_leaves_no_half_of_an_object(ignored):
    """Ctrl-C while JSON is written waits for its end; one that is ignored stays so."""
    started = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"] if ignored else []
    command = [*started, sys.executable, "-m", "kvcalc", "models", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        told = process.stdout.read(1)  # it is writing, and the pipe does not hold all
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        told += process.stdout.read()
        complaint = process.stderr.read()
    assert json.loads(told)["schema"] == "kvcalc.models/1"
    assert process.returncode == (0 if ignored else INTERRUPTED)
    assert complaint == (b"" if ignored else b"kvcalc: interrupted\n")
