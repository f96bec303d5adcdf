"""`--gpu auto`: the GPUs of this machine, of which a stand-in for NVML's bindings tells."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import kvcalc
from kvcalc import cli
from kvcalc.device import choose_gpu, this_machine
from kvcalc.errors import InputError, MissingDependencyError
from kvcalc.hardware import load_gpu
from kvcalc.planning import plan
from kvcalc.units import GIB

H100 = "NVIDIA H100 80GB HBM3"
TOTAL, RESERVED = 81_559 * 2**20, 557 * 2**20
MODEL = "meta-llama/Llama-3-8B"


class NVMLError(Exception):
    """What the bindings raise."""

    def __init__(self, what="Not Supported"):
        super().__init__(what)


@pytest.fixture
def nvml(monkeypatch):
    """A machine with these boards: the name, and what else differs from an H100."""

    def machine(*boards, driver="550.54.15", missing=(), error=None):
        def init():
            if error:
                raise NVMLError(error)

        def memory(board, version=None):
            if version and "v2" in missing:
                raise NVMLError
            if "memory" in missing:
                raise NVMLError
            found = {"total": TOTAL, "used": 0, "free": 0} | board.get("memory", {})
            return SimpleNamespace(**found, **({"reserved": RESERVED} if version else {}))

        def mig(board):
            if "mig" not in board:
                raise NVMLError
            return board["mig"], board["mig"]

        module = ModuleType("pynvml")
        module.NVMLError = NVMLError
        module.nvmlMemory_v2 = 0x02000028
        module.nvmlInit = init
        module.nvmlShutdown = lambda: None
        module.nvmlDeviceGetCount = lambda: len(boards)
        module.nvmlDeviceGetHandleByIndex = lambda index: boards[index]
        module.nvmlDeviceGetName = lambda board: board.get("name", H100)
        module.nvmlDeviceGetMigMode = mig
        module.nvmlDeviceGetMemoryInfo = memory
        module.nvmlSystemGetDriverVersion = lambda: driver
        monkeypatch.setitem(sys.modules, "pynvml", module)

    return machine


def test_the_memory_is_nvmls_less_what_is_reserved(nvml):
    """The other figures are the catalogue's, and the source says what NVML's total was."""
    nvml({})
    gpu = choose_gpu("auto")
    known = load_gpu("h100-sxm-80gb")
    assert gpu.usable_bytes.value == TOTAL
    assert gpu.total_bytes.value == TOTAL - RESERVED
    assert gpu._replace(usable_bytes=known.usable_bytes, cuda_bytes=known.cuda_bytes) == known
    assert gpu.total_bytes.source == (
        "NVML of this machine: total 85,520,809,984 less 584,056,832 reserved, driver 550.54.15, "
        f"{gpu.cuda_bytes.date}"
    )


def test_a_driver_that_tells_the_total_alone_is_taken_by_its_word(nvml):
    """Without the second version of the query what CUDA sees less is estimated."""
    nvml({}, missing=["v2"])
    gpu = choose_gpu("auto")
    assert gpu.cuda_bytes is None
    assert gpu.total_bytes.value == TOTAL
    assert "total 85,520,809,984, driver" in gpu.total_bytes.source
    terms = [line.name for line in kvcalc.fit(MODEL, gpu="auto").budget]
    assert terms[:2] == ["device memory", "driver"]


def test_a_board_that_the_catalogue_does_not_know_has_its_memory_alone(nvml):
    """Its name is its id, and no other figure is made up."""
    nvml({"name": "NVIDIA Test 1"})
    gpu = choose_gpu("auto")
    assert gpu.id == gpu.name == "NVIDIA Test 1"
    assert gpu.total_bytes.value == TOTAL - RESERVED
    assert gpu.bandwidth_bytes_per_second is gpu.memory_bytes is None


def test_several_of_a_kind_serve_as_ranks(nvml):
    """There must be a GPU for each rank; the smallest of them counts."""
    nvml({}, {"memory": {"total": TOTAL - 2**20}})
    assert this_machine().num_gpus == 2
    assert choose_gpu("auto", ranks=2).total_bytes.value == TOTAL - RESERVED - 2**20
    with pytest.raises(InputError, match=r"2 × NVIDIA H100 80GB HBM3, fewer than the 4 ranks"):
        kvcalc.fit(MODEL, gpu="auto", reserve="1GiB", tp=2, pp=2)


@pytest.mark.parametrize(
    ("boards", "given", "reason"),
    [
        ([], {}, "NVML sees no GPU in this machine"),
        ([{}, {"name": "NVIDIA L4"}], {}, "different GPUs, NVIDIA H100 80GB HBM3, NVIDIA L4: choo"),
        ([{}], {"error": "Driver Not Loaded"}, "NVML: Driver Not Loaded; --gpu auto needs an NVI"),
        ([{}], {"missing": ["memory"]}, "NVML: Not Supported"),
        ([{"mig": 1}], {}, "NVIDIA H100 80GB HBM3 is in MIG mode: give --kv-memory"),
    ],
)
def test_a_machine_without_one_kind_of_gpu_is_told_in_a_line(nvml, boards, given, reason, capsys):
    """Bad input, with what to do instead."""
    nvml(*boards, **given)
    assert cli.run(["fit", MODEL, "--gpu", "auto", "--reserve", "1GiB"]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_board_whose_slices_are_off_is_whole(nvml):
    """MIG that is possible but off changes nothing."""
    nvml({"mig": 0})
    assert choose_gpu("auto").id == "h100-sxm-80gb"


def test_without_the_bindings_the_extra_is_named(monkeypatch):
    """What to install stands in the message."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kvcalc\[profile\]'"):
        choose_gpu("auto")


def test_fit_adds_up_the_memory_of_this_machine(nvml, capsys):
    """The first line of the budget is the driver's figure, with its source."""
    nvml({})
    assert cli.run(["fit", MODEL, "--gpu", "auto", "--reserve", "1GiB"]) == 0
    shown = capsys.readouterr().out
    assert f"{(TOTAL - RESERVED) / GIB:.3f}" in shown
    assert "device memory: NVML of this machine: total 85,520,809,984" in shown


def test_a_plan_takes_no_more_than_there_is(nvml):
    """Of this machine's GPUs not more are planned with than NVML sees."""
    nvml(*[{}] * 2)
    point = {"seq": "8k", "reserve": "2GiB", "gpus": ["auto"], "kv_dtypes": ["bf16"]}
    (found,) = plan(MODEL, concurrency=100, **point).deployments
    assert (found.gpu, found.num_gpus) == ("h100-sxm-80gb", 2)
    assert found.memory_bytes == 2 * (TOTAL - RESERVED)
    assert plan(MODEL, concurrency=200, **point).deployments == ()


@pytest.mark.parametrize("gpu", [5, b"auto", ["auto"]])
def test_what_is_no_name_is_no_gpu(gpu):
    """The library refuses another type by a message, not by a traceback."""
    with pytest.raises(InputError, match="gpu must be an id, a YAML file or auto"):
        kvcalc.fit(MODEL, gpu=gpu, reserve="1GiB")
