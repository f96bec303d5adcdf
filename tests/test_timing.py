"""The method of timing, on a clock that the tests set; and what a killed profile leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from kvcalc import cli
from kvcalc.errors import InputError, OutputError
from kvcalc.measure import models, profile, timed
from kvcalc.measure.busy import covered
from kvcalc.measure.interrupt import interrupts
from kvcalc.measure.light import expected_tpot
from kvcalc.measure.peak import estimated_peaks
from kvcalc.measure.record import RowFile, claimed
from kvcalc.measure.session import Session
from kvcalc.measure.workload import Workload, checked_workload
from kvcalc.strategies import load_strategy

POINT = Workload(prompt_tokens=24, decode_tokens=6, batch=1, repeats=7, warmup=1, seed=0)


@pytest.fixture(scope="module")
def loaded():
    """The built-in model on the CPU."""
    return models.load_model(
        None,
        weights="checkpoint",
        num_layers=None,
        dtype="fp32",
        device=torch.device("cpu"),
        seed=0,
        revision=None,
    )


@pytest.fixture
def costs(monkeypatch):
    """Milliseconds that a forward pass of a strategy takes, give or take 2 %; also the order of
    the sessions.
    """
    chosen_costs: dict[str, float] = {}
    order: list[str] = []
    noise = random.Random(0)  # noqa: S311 - no secret
    now = [0]

    class Priced(Session):
        def __init__(self, loaded, chosen, workload):
            super().__init__(loaded, chosen, workload)
            self._name = chosen.name
            order.append(chosen.name)

        def _forward(self, tokens):
            now[0] += int(chosen_costs[self._name] * 1e6 * noise.uniform(0.98, 1.02))
            return super()._forward(tokens)

    monkeypatch.setattr(timed, "Session", Priced)
    monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))
    return chosen_costs, order


def test_one_strategy_twice_is_alike_and_a_slower_one_is_not(loaded, costs):
    """The same strategy twice differs by no more than its spread; one that takes 20 % longer is
    told apart.
    """
    prices, order = costs
    prices |= {"dynamic": 10.0, "int8": 12.0}
    chosen = [load_strategy(spec) for spec in ("dynamic", "dynamic", "int8")]
    first, again, slower = profile.profile(loaded, chosen, POINT)
    assert slower["status"] == "ok", slower["reason"]
    assert again["ratio_to_dynamic"]["tpot_alike"]
    assert again["ratio_to_dynamic"]["tpot"] == pytest.approx(1, abs=0.02)
    assert not slower["ratio_to_dynamic"]["tpot_alike"]
    assert slower["ratio_to_dynamic"]["tpot"] == pytest.approx(1.2, abs=0.03)
    assert not slower["ratio_to_dynamic"]["ttft_alike"]
    assert first["tpot_seconds"]["median"] == pytest.approx(0.010, rel=0.02)
    assert first["tpot_seconds"]["p90"] <= first["tpot_seconds"]["max"] <= 0.0102
    assert order == ["dynamic", "dynamic", "int8"] * (1 + POINT.repeats)


def test_the_first_decode_step_is_apart():
    """A slow first step is in its own figure and not in TPOT, whose p90 and max see every other."""
    runs = [timed.Run(1.0, [0.5, 0.1, 0.1, 0.3]), timed.Run(2.0, [0.7, 0.1, 0.1, 0.1])]
    summed = timed.summed_up(runs, batch=2)
    assert summed["ttft_seconds"]["median"] == 1.5
    assert summed["first_decode_seconds"]["median"] == pytest.approx(0.6)
    assert summed["tpot_seconds"]["median"] == summed["tpot_seconds"]["min"] == 0.1
    assert summed["tpot_seconds"]["p90"] == summed["tpot_seconds"]["max"] == 0.3
    assert summed["tokens_per_second"] == 20
    only = timed.summed_up([timed.Run(1.0, [0.5])], batch=1)
    assert only["tpot_seconds"]["median"] == 0.5


def lines(path):
    """The JSON objects of a file; a torn last line is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def test_a_killed_profile_loses_the_run_in_flight_only(tmp_path):
    """After kill -9 all finished runs are on disk, and `--resume` measures only what is missing."""
    out = tmp_path / "rows.jsonl"
    parts_path = tmp_path / "rows.jsonl.parts"
    small = ["--seq", "32", "--decode", "4", "--warmup", "0", "--device", "cpu"]
    command = ["profile", *small, "--repeats", "300", "--strategy", "dynamic", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcalc", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(lines(parts_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    parts = lines(parts_path)
    assert not out.exists()
    assert "counted" in parts[0]
    with parts_path.open("a") as file:
        file.write('{"point": {"torn')
    done = [part["run"] for part in parts if "run" in part]
    assert len(done) >= 3
    # The second run asks for as many runs as there are, and two more.
    point = parts[0]["point"] | {"repeats": len(done) + 2}
    parts_path.write_text(
        "".join(json.dumps(part | {"point": point}) + "\n" for part in parts) + '{"torn'
    )
    command[command.index("300")] = str(len(done) + 2)
    resumed = subprocess.run(
        [sys.executable, "-m", "kvcalc", *command, "--resume", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(resumed.stdout)["rows"]
    assert row["ttft_seconds"]["runs"][: len(done)] == [run[0] for run in done]
    assert len(row["ttft_seconds"]["runs"]) == len(done) + 2
    assert lines(out) == [row]
    assert not parts_path.exists()
    again = subprocess.run(
        [sys.executable, "-m", "kvcalc", *command, "--resume", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(again.stdout)["rows"] == [row]
    assert lines(out) == [row]


def test_a_torn_line_stays_alone(tmp_path):
    """A row appended after a line that a kill tore starts a line of its own."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"whole": 1}\n{"torn')
    RowFile(path).append({"whole": 2})
    assert lines(path) == [{"whole": 1}, {"whole": 2}]


def test_a_damaged_file_is_gone_on_with(tmp_path):
    """`--resume` takes the whole lines of a file that is damaged, and lets the others lie."""
    path = tmp_path / "rows.jsonl"
    whole = {"point": {"model": "a"}, "status": "ok"}
    part = {"point": {"model": "b"}, "run": [0.1, [0.2]]}
    damage = b'\xff\xfe\0\n[1, 2]\n"text"\n{}\n{"point": {"model": "b"}, "run": 3}\n'
    damage += b'{"run": [0.1, [0.2]]}\n{"point": {"model": "b"}, "counted": 3}\n' + b"[" * 100_000
    for one, line in ((path, whole), (tmp_path / "rows.jsonl.parts", part)):
        one.write_bytes(damage + b"\n" + json.dumps(line).encode() + b"\n" + damage)
    before = path.read_bytes()
    file = RowFile(path, resume=True)
    assert file.row(whole["point"]) == whole
    assert file.parts(part["point"]) == [part]
    assert path.read_bytes() == before


def test_a_link_to_what_is_not_there(tmp_path):
    """Rows go where a link leads; where none follows, the link is as it was."""
    path, target = tmp_path / "rows.jsonl", tmp_path / "target.jsonl"
    path.symlink_to(target)
    file = RowFile(path)
    assert path.is_symlink()
    assert not target.exists()
    file.append({"whole": 1})
    assert lines(target) == [{"whole": 1}]
    lost = tmp_path / "lost.jsonl"
    lost.symlink_to(tmp_path / "no-folder" / "target.jsonl")
    with pytest.raises(OutputError, match="cannot write to "):
        RowFile(lost)
    assert lost.is_symlink()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "link.jsonl"])
def test_a_file_that_another_profile_writes(tmp_path, name, resume):
    """Nobody else starts on a file, by no name of it, and its parts stay, until it is closed."""
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    file = RowFile(tmp_path / "rows.jsonl")
    file.append_part({"model": "a"}, counted={})
    with pytest.raises(OutputError, match="another profile is writing"):
        RowFile(tmp_path / name, resume=resume)
    assert len(lines(tmp_path / "rows.jsonl.parts")) == 1
    file.close()
    RowFile(tmp_path / name, resume=resume)


def test_what_cannot_fit_is_refused_before_it_runs(loaded, monkeypatch):
    """A cache larger than the free memory is not tried, unless forced; smaller ones are."""
    monkeypatch.setattr(profile, "free_memory", lambda device: 100_000)
    chosen = [load_strategy("dynamic"), load_strategy("int2:group=8,residual=0")]
    workload = POINT._replace(repeats=1, warmup=0)
    dynamic, int2 = profile.profile(loaded, chosen, workload)
    assert dynamic["status"] == "refused"
    assert "--force" in dynamic["reason"]
    assert int2["status"] == "ok"
    assert int2["fidelity"] is None  # the full cache, which it is held against, cannot run
    forced = next(iter(profile.profile(loaded, chosen[:1], workload, force=True)))
    assert forced["status"] == "ok"


def test_ctrl_c_waits_for_the_run_in_flight_and_twice_does_not(capsys, request):
    """The first interrupt is seen between runs, the second at once."""
    # A shell may have started this with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with interrupts() as check:
        check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_two_profiles_on_one_device_know_of_each_other(monkeypatch, tmp_path):
    """The second one is told that it is not alone; when the first has ended it is."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cpu = torch.device("cpu")
    with claimed(cpu) as first:
        assert first
        with claimed(cpu) as second:
            assert not second
    with claimed(cpu) as third:
        assert third


def test_a_long_prompt_comes_in_pieces(loaded):
    """A prompt in pieces leaves the same cache and answers, and peaks lower."""
    whole = POINT._replace(prompt_tokens=2048, decode_tokens=2, repeats=1, warmup=0)
    chosen = [load_strategy("dynamic")]
    (once,) = profile.profile(loaded, chosen, whole)
    (pieces,) = profile.profile(loaded, chosen, whole._replace(chunk=256))
    assert pieces["held_bytes"] == once["held_bytes"] == pieces["predicted_bytes"]
    assert pieces["prefill_peak_bytes"] < 0.8 * once["prefill_peak_bytes"]
    assert pieces["conditions"]["chunk"] == 256


@pytest.mark.parametrize(("name", "value"), [("chunk", "0"), ("repeats", 0), ("warmup", -1)])
def test_a_workload_that_cannot_be(name, value):
    """Counts out of range are refused by name."""
    given = {"seq": "8", "decode": 1, "batch": 1, "repeats": 1, "warmup": 0, "seed": 0}
    with pytest.raises(InputError, match=f"--{name}"):
        checked_workload(**{**given, "chunk": "8k", name: value})


def test_resume_needs_a_file(capsys):
    """`--resume` without `--out` has nothing to go on with."""
    assert cli.run(["profile", "--resume"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0),
        ([(5, 9)], 4),
        ([(0, 4), (3, 6)], 6),
        ([(3, 6), (0, 4), (10, 11), (1, 2)], 7),
    ],
)
def test_a_device_is_busy_while_anything_runs(spans, length):
    """Kernels that overlap count once, in whatever order they are told."""
    assert covered(spans) == length


class Repeating:
    """A session whose steps take 10 ms, and can be repeated a number of times."""

    mode = "eager"

    def __init__(self, now, repeats):
        self._now, self._repeats = now, repeats

    def prefill(self, prompt):
        """Nothing to see."""

    def prepare_decode(self, logits):
        """Nothing to do."""

    def decode(self, step):
        """Takes 10 ms."""
        self._now[0] += 10_000_000

    def repeat_step(self):
        """Takes 10 ms, too."""
        self._repeats -= 1
        self._now[0] += 10_000_000 * (self._repeats >= 0)
        return self._repeats >= 0


@pytest.mark.parametrize(
    ("steps", "repeats", "joules"), [(6, 0, None), (60, 0, 3.0), (6, 100, 3.0), (6, 10, None)]
)
def test_energy_is_told_of_what_lasts(loaded, monkeypatch, steps, repeats, joules):
    """300 W for 10 ms a step are 3 J, where the steps or their repetitions last half a second;
    a shorter stretch has no figure.
    """
    now = [0]
    monkeypatch.setattr(timed, "Session", lambda *_: Repeating(now, repeats))
    monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))
    monkeypatch.setattr(timed.nvml, "energy_joules", lambda device: 7 + 300 * now[0] / 1e9)
    feed = SimpleNamespace(prompt=None, steps=[None] * steps)
    run = timed.time_once(loaded, load_strategy("dynamic"), POINT, feed)
    assert run.joules == (joules if joules is None else pytest.approx(joules))
    assert run.step_seconds == pytest.approx([0.01] * steps)


def test_a_prompt_comes_in_pieces_where_it_would_not_fit_whole(loaded, monkeypatch):
    """Whole by default; where less memory is free, in halves, quarters and so on."""
    long = POINT._replace(prompt_tokens=4096, decode_tokens=2)
    chosen = [load_strategy("dynamic")]
    assert profile.piece_that_fits(loaded, chosen, long) == 4096
    whole = profile.predict(loaded, chosen[0], long)
    peak = estimated_peaks(loaded, long, chosen[0], whole)["prefill_bytes"]
    monkeypatch.setattr(profile, "free_memory", lambda device: peak - 1)
    assert profile.piece_that_fits(loaded, chosen, long) == 2048
    monkeypatch.setattr(profile, "free_memory", lambda device: 0)
    assert profile.piece_that_fits(loaded, chosen, long) == profile.SMALLEST_PIECE


def test_a_step_is_expected_to_take_what_its_strategy_moves():
    """What is copied before attention reads it is read and written, but for a fused attention."""
    ceilings = {"bytes_per_second": 1e9, "flops_per_second": 1e12, "source": ""}
    light = {
        "ceilings": ceilings,
        "decode": {"num_bytes": 3_000_000, "flops": 5},
        "copied_bytes": 2_000_000,
    }
    assert expected_tpot(light, "eager") == pytest.approx(0.007)
    assert expected_tpot(light, "eager, fused attention") == pytest.approx(0.003)
