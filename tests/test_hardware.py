import datetime
from decimal import Decimal

import pytest

from kvcalc import hardware, strict_yaml
from kvcalc.errors import ConfigError, InputError

GIB = 2**30

GOOD = """\
name: NVIDIA Test 1
also: [test-1]
vendor: nvidia
architecture: null
compute_capability: "9.0"
memory_bytes: {value: 85899345920, source: "https://example.org", date: 2026-11-25}
usable_bytes: null
bandwidth_bytes_per_second: {value: 3350000000000, source: "https://example.org", date: 2026-11-25}
bf16_flops: null
fp16_flops: null
fp8_flops: null
int8_ops: null
fp4_flops: null
interconnect_bytes_per_second: null
pcie_bytes_per_second: null
power_watts: null
notes: null
"""


def figures(gpu):
    """The figures of a GPU that are known, by name."""
    named = {name: getattr(gpu, name) for name in hardware.FIGURES}
    return {name: figure for name, figure in named.items() if figure is not None}


def read(folder, text):
    """Read `text` as the file broken.yaml."""
    path = folder / "broken.yaml"
    path.write_text(text, "utf-8")
    return hardware.read_gpu(path)


@pytest.mark.parametrize("gpu_id", hardware.gpu_ids())
def test_every_file_loads_and_every_figure_says_where_it_stands(gpu_id):
    """Each file is complete and is read strictly; a figure has a source anyone can open, and a day.
    Only what CUDA tells may be left out, and there are neither own ids nor prices.
    """
    gpu = hardware.load_gpu(gpu_id)
    path = hardware.profiles_folder() / "gpus" / f"{gpu_id}.yaml"
    at = strict_yaml.record(
        *strict_yaml.read(path),
        [key for key in hardware.Gpu._fields[1:] if key not in {"cuda_bytes", "price_per_hour"}],
        optional=["cuda_bytes"],
    )
    for name in figures(gpu):
        figure = strict_yaml.record(*at[name], hardware.Figure._fields)
        assert strict_yaml.text(*figure["value"]).isdecimal()
    assert gpu.id == gpu_id == gpu_id.lower()
    assert gpu.vendor in {"nvidia", "amd", "intel", "google", "aws", "apple"}
    known = figures(gpu)
    assert "bandwidth_bytes_per_second" in known
    for name, figure in known.items():
        assert any(mark in figure.source for mark in ("pypi:", "github:", ".")), (name, figure)
        assert datetime.date(2026, 1, 1) <= figure.date


def test_there_are_accelerators_enough():
    """At least sixty accelerators of several vendors are described."""
    assert len(hardware.gpu_ids()) >= 60
    assert len({hardware.load_gpu(gpu_id).vendor for gpu_id in hardware.gpu_ids()}) >= 4


@pytest.mark.parametrize("gpu_id", hardware.gpu_ids())
def test_figures_are_of_a_credible_order(gpu_id):
    """A slip in a unit would show: bandwidth, memory, rates and power lie where hardware does."""
    known = {name: figure.value for name, figure in figures(hardware.load_gpu(gpu_id)).items()}
    assert 50 * 10**9 <= known["bandwidth_bytes_per_second"] <= 10**13
    memory = known.get("memory_bytes", known.get("usable_bytes", 8 * GIB))
    assert 6 * GIB <= memory <= 288 * GIB
    assert memory % 2**20 == 0
    assert 0.9 * memory <= known.get("usable_bytes", memory) <= memory
    for name in ("bf16_flops", "fp16_flops", "fp8_flops", "int8_ops", "fp4_flops"):
        assert 5 * 10**13 <= known.get(name, 10**14) <= 2 * 10**16, name
    assert known.get("bf16_flops", 0) <= known.get("fp8_flops", 10**17)
    assert known.get("fp8_flops", 0) <= known.get("fp4_flops", 10**17)
    for name in ("interconnect_bytes_per_second", "pcie_bytes_per_second"):
        assert 10**10 <= known.get(name, 10**10) <= 10**12, name
    assert 50 <= known.get("power_watts", 100) <= 1500


@pytest.mark.parametrize(
    ("gpu_id", "memory_gib", "bandwidth", "bf16_flops"),
    [
        ("h100-sxm-80gb", 80, 3.35e12, 989.4e12),
        ("h100-pcie-80gb", 80, 2.0e12, 756.5e12),
        ("h200-sxm-141gb", 141, 4.8e12, 989.4e12),
        ("a100-sxm-80gb", 80, 2.039e12, 312e12),
        ("a100-pcie-80gb", 80, 1.935e12, 312e12),
        ("a100-sxm-40gb", 40, 1.555e12, 312e12),
        ("a100-pcie-40gb", 40, 1.555e12, 312e12),
        ("b200", 180, 7.7e12, 2250e12),
        ("l4", 24, 300e9, 121e12),
        ("l40s", 48, 864e9, 362.05e12),
        ("a10", 24, 600e9, 125e12),
        ("rtx-4090", 24, 1008e9, None),
        ("rtx-5090", 32, 1792e9, None),
        ("rtx-3090", 24, 936e9, None),
        ("t4", 16, 320e9, None),
        ("mi300x", 192, 5.3e12, 1307e12),
    ],
)
def test_well_known_figures_are_those_of_the_data_sheets(gpu_id, memory_gib, bandwidth, bf16_flops):
    """What the manufacturers publish stands in the files, but for a source's rounding."""
    gpu = hardware.load_gpu(gpu_id)
    assert gpu.memory_bytes.value == memory_gib * GIB
    assert gpu.bandwidth_bytes_per_second.value == pytest.approx(bandwidth, rel=1e-3)
    if bf16_flops is None:
        assert gpu.bf16_flops is None
    else:
        assert gpu.bf16_flops.value == pytest.approx(bf16_flops, rel=6e-3)


def test_figures_are_exact_integers():
    """3.35 TB/s is 3,350,000,000,000 bytes, 989.4 TFLOPS and 81,559 MiB are whole numbers too."""
    gpu = hardware.load_gpu("h100-sxm-80gb")
    assert gpu.bandwidth_bytes_per_second.value == 3_350_000_000_000
    assert gpu.bf16_flops.value == 989_400_000_000_000
    assert gpu.usable_bytes.value == 81_559 * 2**20
    values = [
        figure.value
        for gpu_id in hardware.gpu_ids()
        for figure in figures(hardware.load_gpu(gpu_id)).values()
    ]
    assert {type(value) for value in values} == {int}


@pytest.mark.parametrize(
    ("device_name", "gpu_id"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("A100-SXM-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA H200", "h200-sxm-141gb"),
        ("NVIDIA H20", "h20-96gb"),
        ("NVIDIA H20-3e", "h20-141gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Intel(R) Arc(TM) B580 Graphics", "arc-b580"),
        ("  nvidia_h100_80gb_hbm3 ", "h100-sxm-80gb"),
    ],
)
def test_a_driver_name_finds_its_board(device_name, gpu_id):
    """What torch and NVML print finds the one file of that board."""
    assert hardware.find_gpu(device_name).id == gpu_id


@pytest.mark.parametrize(
    "device_name",
    [
        "",
        "NVIDIA",
        "NVIDIA A100",
        "NVIDIA H100",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4060 Ti",  # 8 GB or 16 GB
        "NVIDIA GeForce RTX 3060",  # 8 GB or 12 GB
        "NVIDIA GeForce RTX 4070",  # GDDR6X or GDDR6
        "AMD Instinct MI250X",  # one of its two dies
        "Intel(R) Arc(TM) A770 Graphics",  # 8 GB or 16 GB
        "Apple M3 Max",  # 300 or 400 GB/s
    ],
)
def test_a_name_that_leaves_the_board_open_finds_none(device_name):
    """Neither a part of a name, nor a slice of a board, nor a name two boards share is matched."""
    assert hardware.find_gpu(device_name) is None


def test_every_name_leads_back_to_its_own_file():
    """No two files share a name, in whatever way it is written."""
    for gpu in map(hardware.load_gpu, hardware.gpu_ids()):
        for name in (gpu.name, *gpu.also):
            assert hardware.find_gpu(name.upper().replace("-", " ")).id == gpu.id


def test_a_name_in_two_files_is_refused(tmp_path, monkeypatch):
    """A name that would lead to two boards is an error that names both files."""
    (tmp_path / "gpus").mkdir()
    (tmp_path / "gpus" / "one.yaml").write_text(GOOD, "utf-8")
    (tmp_path / "gpus" / "two.yaml").write_text(GOOD, "utf-8")
    caches = (hardware.gpu_ids, hardware.load_gpu, hardware._ids_by_name, hardware._words_by_id)
    monkeypatch.setattr(hardware, "profiles_folder", lambda: tmp_path)
    try:
        for cached in caches:
            cached.cache_clear()
        with pytest.raises(ConfigError, match=r"two\.yaml: the name 'NVIDIA Test 1'.*one\.yaml"):
            hardware.find_gpu("NVIDIA Test 1")
    finally:
        for cached in caches:
            cached.cache_clear()


def test_every_id_and_name_finds_its_gpu():
    """Ids, names and other names are taken in any case, with or without spaces, dashes and the
    maker's name.
    """
    for gpu in map(hardware.load_gpu, hardware.gpu_ids()):
        for name in (gpu.id, gpu.name, *gpu.also):
            for said in (name, name.upper(), name.replace("-", " "), f" {name.replace(' ', '_')} "):
                assert hardware.named_gpu(said) == gpu, said


@pytest.mark.parametrize(
    ("said", "gpu_id"),
    [
        ("RTX-4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("4070 super", "rtx-4070-super"),
        ("RTX 5060 Ti", "rtx-5060-ti-16gb"),
        ("h100-sxm", "h100-sxm-80gb"),
        ("H100SXM", "h100-sxm-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("H200", "h200-sxm-141gb"),
        ("nvidia l4", "l4"),
        ("L40S", "l40s"),
        ("DGX Spark", "gb10-dgx-spark"),
        ("MI300X", "mi300x"),
    ],
)
def test_what_users_call_a_gpu_finds_it(said, gpu_id):
    """Brands may be left out; a part of a name will do where one GPU alone has it."""
    assert hardware.named_gpu(said).id == gpu_id


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ("h100", "h100-nvl-94gb, h100-pcie-80gb or h100-sxm-80gb"),
        ("H100 80GB", "h100-pcie-80gb or h100-sxm-80gb"),
        ("A100-SXM", "a100-sxm-40gb or a100-sxm-80gb"),
        ("RTX 4060 Ti", "rtx-4060-ti-16gb or rtx-4060-ti-8gb"),
        ("RTX PRO 6000", "rtx-pro-6000-blackwell or rtx-pro-6000-blackwell-server"),
    ],
)
def test_a_name_of_several_lists_exactly_those(said, ids):
    """Nothing is guessed: the message names them all and no other."""
    with pytest.raises(InputError, match="no single one") as caught:
        hardware.named_gpu(said)
    assert str(caught.value) == f"GPU {said!r} is no single one; did you mean {ids}?"


@pytest.mark.parametrize(
    ("said", "suggestion"),
    [
        ("rtx4091", "; did you mean rtx-4090?"),
        ("rtx4060ti", "; did you mean rtx-4060-ti-16gb or rtx-4060-ti-8gb?"),
        ("mi300", "; did you mean mi300x?"),
        ("a100-sxm-64gb", "; did you mean a100-sxm-40gb or a100-sxm-80gb?"),
        ("NVIDIA GeForce RTX 4090 D", "; did you mean rtx-4090?"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "; did you mean a100-sxm-80gb?"),
        ("zzz", "; choose an id such as"),
        ("h900-80gb", "; choose an id such as"),
        ("../class_defaults", "; choose an id such as"),
        ("rtx", "; choose an id such as"),
        ("h" * 100, "; choose an id such as"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(said, suggestion):
    """A name that is none is an input error of one short line that suggests what was meant, and
    nothing that has only a size of memory in common.
    """
    with pytest.raises(InputError, match="unknown GPU") as caught:
        hardware.named_gpu(said)
    message = str(caught.value)
    assert suggestion in message
    assert "\n" not in message
    assert len(message) < 250
    with pytest.raises(InputError, match="unknown GPU"):
        hardware.load_gpu(said)


def test_a_good_file_is_read(tmp_path):
    """The file that the malformed ones are made of is itself in order."""
    gpu = read(tmp_path, GOOD)
    assert gpu.memory_bytes == (80 * GIB, "https://example.org", datetime.date(2026, 11, 25))
    assert gpu.also == ("test-1",)
    assert gpu.usable_bytes is None


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("", "^no GPU is named; choose an id such as"),
        (" ", "^no GPU is named; choose an id such as"),
        (".", r"^\. is a folder, no GPU; choose an id such as"),
        ("made.yaml", r"^made\.yaml is a folder, no GPU; choose"),
        ("none.yaml", r"^cannot read none\.yaml: No such file"),
        ("~nobody-at-all/none.yaml", "^cannot read ~nobody-at-all/none.yaml: No such file"),
    ],
)
def test_what_names_no_gpu_at_all_is_told(tmp_path, monkeypatch, said, complaint):
    """Nothing, a folder, and a file that is not there are input errors in clear words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.yaml").mkdir()
    with pytest.raises(InputError, match=complaint):
        hardware.named_gpu(said)


@pytest.mark.parametrize(
    ("old", "new", "line", "complaint"),
    [
        ("notes: null", "notes: null\ncolour: red", 18, "unknown key 'colour'"),
        (
            "notes: null",
            "memory: 48GB",
            17,
            r"'memory' \(perhaps memory_bytes\); a GPU needs a name",
        ),
        ("name: NVIDIA Test 1\n", "", 1, "missing key 'name'; a GPU needs a name, and cuda_bytes"),
        ("notes: null", "id: my gpu!", 17, "id: must be a name such as my-gpu, not 'my gpu!'"),
        ('"9.0"', "Hopper", 5, "compute_capability: must be a compute capability such as 8.9"),
        ("notes: null", "notes: null\nvendor: amd", 18, "duplicate key 'vendor'.* line 3"),
        ("value: 85899345920, ", "", 6, "memory_bytes: missing key 'value'"),
        ("{value: 85899345920", "{value: 1, value: 85899345920", 6, "memory_bytes: duplicate key"),
        ("{value: 85899345920", "{unit: B, value: 1", 6, "memory_bytes: unknown key 'unit'"),
        ("3350000000000", "3.35e12", 8, "bandwidth_bytes_per_second.value: must be a number of b"),
        ("3350000000000", "3.35e+12", 8, r"not '3.35e\+12'"),
        ("85899345920", "1:30", 6, "memory_bytes.value: .*'1:30'"),
        ("85899345920", "0x10", 6, "memory_bytes.value: .*'0x10'"),
        ("85899345920", "010", 6, "memory_bytes.value: .*'010'"),
        ("85899345920", "-1", 6, "memory_bytes.value: .*'-1'"),
        ("85899345920", "0", 6, "memory_bytes.value: .*'0'"),
        ("85899345920", "true", 6, "memory_bytes.value: .*'true'"),
        ("85899345920", "null", 6, "memory_bytes.value: .*not empty"),
        ("85899345920", "[1]", 6, "memory_bytes.value: .*not a list"),
        ("85899345920", "9" * 30, 6, "memory_bytes.value: must be"),
        (
            "usable_bytes: null",
            "usable_bytes: 48",
            7,
            "usable_bytes: '48' is less than 1 GiB: must b",
        ),
        (
            "usable_bytes: null",
            "usable_bytes: 0GiB",
            7,
            "usable_bytes: must be a number of bytes suc",
        ),
        ("usable_bytes: null", "usable_bytes: 48GiB/s", 7, "not '48GiB/s'"),
        (
            "usable_bytes: null",
            "usable_bytes: 81GiB",
            7,
            "usable_bytes: 86,973,087,744 is more than memory_bytes, 85,899,345,920",
        ),
        (
            "usable_bytes: null",
            "usable_bytes: 78GiB\ncuda_bytes: {value: 79GiB}",
            8,
            "cuda_bytes: 84,825,604,096 is more than usable_bytes, 83,751,862,272",
        ),
        ("usable_bytes: null", "cuda_bytes: 81GiB", 7, "cuda_bytes: 86,.* than memory_bytes, 85,"),
        (
            "usable_bytes: null",
            "usable_bytes: 48 gigs",
            7,
            "such as 47.5GiB or 51002736640, not '48",
        ),
        ("usable_bytes: null", "usable_bytes: [1]", 7, "usable_bytes: must be .*, not a list"),
        (
            "power_watts: null",
            "power_watts: 700W",
            16,
            "power_watts: must be a positive whole number",
        ),
        ("vendor: nvidia", "vendor: ' '", 3, "vendor: must be text"),
        ("name: NVIDIA Test 1", "name: null", 1, "name: must be text"),
        ("also: [test-1]", "also: {a: 1}", 2, "also: must be a list"),
        ("also: [test-1]", "also: [[1]]", 2, r"also\[0\]: must be text"),
        ("2026-11-25}\nus", "yesterday}\nus", 6, "memory_bytes.date: must be a date"),
        ("2026-11-25}\nus", "2026-02-30}\nus", 6, "memory_bytes.date: must be a date"),
        ("2026-11-25}\nus", "2026-11-25 10:00:00}\nus", 6, "memory_bytes.date: must be a date"),
        ("notes: null", "? [notes]\n: null", 17, "a key must be text"),
        ("notes: null", "notes: *nothing", 17, "no anchor &nothing"),
        ("notes: null", "notes: null\n---\nname: x", 18, "a second document"),
        ("notes: null", "notes: [", 18, "not YAML: "),
        ("notes: null", "notes: null\nprice_per_hour: 2", 18, "price_per_hour: must be keys and v"),
        ("notes: null", "notes: null\nprice_per_hour: {value: 2}", 18, "missing key 'currency'"),
        (
            "notes: null",
            "notes: null\nprice_per_hour: {value: -2, currency: USD}",
            18,
            "price_per_hour.value: must be a price such as 2.49, not '-2'",
        ),
        (
            "notes: null",
            "notes: null\nprice_per_hour: {value: 2, currency: $}",
            18,
            "price_per_hour.currency: must be a currency such as USD",
        ),
        (GOOD, "", 1, "the file is empty"),
        (GOOD, "- a list", 1, "must be keys and values, not a list"),
    ],
)
def test_a_malformed_file_is_refused_with_line_and_key(tmp_path, old, new, line, complaint):
    """What is unknown, missing, twice or of another type is one line naming file, line and key."""
    assert old in GOOD
    with pytest.raises(InputError, match=complaint) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'broken.yaml'}:{line}: ")
    assert "\n" not in message
    assert len(message) < 600


def test_what_yaml_would_turn_into_something_else_stays_as_written(tmp_path):
    """`9.0` is a capability, not a float, and `no` is text."""
    text = GOOD.replace('"9.0"', "9.0").replace("vendor: nvidia", "vendor: no")
    assert read(tmp_path, text)[3:6] == ("no", None, "9.0")


def test_a_users_file_needs_a_name_and_a_drivers_figure(tmp_path):
    """Two lines will do; what is left out is unknown, and a plain figure has the file as its source
    and the day of it.
    """
    path = tmp_path / "mine.yaml"
    path.write_text("name: My GPU\ncuda_bytes: 47.5GiB\n", "utf-8")
    gpu = hardware.named_gpu(str(path))
    today = datetime.datetime.fromtimestamp(path.stat().st_mtime, tz=datetime.UTC).date()
    assert gpu.total_bytes == (47 * GIB + GIB // 2, str(path), today)
    assert (gpu.id, gpu.vendor, gpu.also) == ("mine", "nvidia", ())
    assert set(figures(gpu)) == {"cuda_bytes"}
    text = "name: AMD Thing\nusable_bytes: {value: 48GB}\nid: thing\n"
    path.write_text(
        text + "bandwidth_bytes_per_second: 864GB/s\nbf16_flops: 181000000000000", "utf-8"
    )
    gpu = hardware.named_gpu(str(path))
    assert gpu.total_bytes == (48 * 10**9, str(path), today)
    assert (gpu.id, gpu.vendor) == ("thing", "amd")
    assert gpu.bandwidth_bytes_per_second.value == 864 * 10**9
    assert gpu.bf16_flops.value == 181 * 10**12
    path.write_text("name: My GPU\nmemory_bytes: 48GiB\nusable_bytes: null\n", "utf-8")
    with pytest.raises(InputError, match=r"mine\.yaml:1: neither cuda_bytes nor usable_bytes; a G"):
        hardware.named_gpu(str(path))


def test_a_users_file_may_have_a_price(tmp_path):
    """A price is a decimal number as it was written; source and date may be left out. No bundled
    file has one.
    """
    text = GOOD + "price_per_hour: {value: 2.49, currency: EUR, source: offer, date: 2026-11-25}"
    day = datetime.date(2026, 11, 25)
    assert read(tmp_path, text).price_per_hour == (Decimal("2.49"), "EUR", "offer", day)
    price = read(tmp_path, GOOD + "price_per_hour: {value: 0.80, currency: EUR}").price_per_hour
    assert price == (Decimal("0.8"), "EUR", str(tmp_path / "broken.yaml"), None)
    assert read(tmp_path, GOOD + "price_per_hour: null").price_per_hour is None
    for gpu in map(hardware.load_gpu, hardware.gpu_ids()):
        assert gpu.price_per_hour is None


def test_a_tag_runs_no_code(tmp_path):
    """A tag that asks for a Python object is refused by name, and nothing is called."""
    victim = tmp_path / "called"
    tag = f"!!python/object/apply:pathlib.Path.touch [{str(victim)!r}]"
    with pytest.raises(InputError, match=r"broken\.yaml:17: notes: .*python/object/apply"):
        read(tmp_path, GOOD.replace("notes: null", f"notes: {tag}"))
    assert not victim.exists()


def test_bytes_that_are_no_text_are_refused(tmp_path):
    """A file that is not UTF-8 is an error with its name, no traceback."""
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match=r"broken\.yaml:1: not text in UTF-8"):
        hardware.read_gpu(path)


def test_without_libyaml_the_files_read_the_same(tmp_path, monkeypatch):
    """Where PyYAML comes without libyaml, its own loader gives the same."""
    import yaml

    path = hardware.profiles_folder() / "gpus" / "h100-sxm-80gb.yaml"
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert hardware.read_gpu(path) == hardware.load_gpu("h100-sxm-80gb")
