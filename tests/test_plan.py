"""Plans: the fewest of each GPU that hold the requests."""

import json

import pytest

import kvcalc
from kvcalc import api, cli, planning
from kvcalc.errors import InputError, UnsupportedError
from kvcalc.hardware import gpu_ids, load_gpu, profiles_folder
from kvcalc.planning import read_prices

MODEL = "meta-llama/Llama-3-8B"
POINT = {"seq": "8k", "concurrency": 20}
LARGE = "meta-llama/Llama-3-70B"


def plan(model, **point):
    """The deployments of a plan."""
    return list(planning.plan(model, **point).deployments)


def fewest(model, gpu, most, **point):
    """The first tp × pp that fits, tried one after the other and without any bound."""
    for num_gpus in range(1, most + 1):
        for tp in range(num_gpus, 0, -1):
            if num_gpus % tp == 0 and 64 % tp == 0:  # Llama 3 70B has 64 query heads
                ranks = {"tp": tp, "pp": num_gpus // tp}
                try:
                    if kvcalc.fit(model, gpu=gpu, **ranks, **point).fits:
                        return ranks["tp"], ranks["pp"]
                except UnsupportedError:
                    continue
    return None


def test_the_fewest_ranks_that_fit_are_named():
    """Each deployment is the first that fits when all are tried in turn, and none that fits is
    left out; the least memory comes first. Beside stages stand the fewest ranks alone, if no more
    than twice as many.
    """
    point = {"seq": "8k", "concurrency": 16, "reserve": "2GiB"}
    found = plan(LARGE, kv_dtypes=("auto",), **point)
    named = {one.gpu: (one.tp, one.pp) for one in reversed(found)}
    assert len(found) > len(named) > 10
    beside = {one.gpu: one.tp for one in found if (one.tp, one.pp) != named[one.gpu]}
    assert len(beside) == len(found) - len(named)
    for gpu, (tp, pp) in named.items():
        alone = [
            one
            for one in (2, 4, 8)
            if tp * pp < one <= 2 * tp * pp
            and pp > 1
            and kvcalc.fit(LARGE, gpu=gpu, tp=one, **point).fits
        ]
        assert beside.get(gpu) == next(iter(alone), None), gpu
    for gpu in gpu_ids():
        expected = None
        if load_gpu(gpu).total_bytes:
            expected = fewest(LARGE, gpu, 8, **point)
        assert named.get(gpu) == expected, gpu
    assert any(one.pp > 1 for one in found)
    memory = [one.memory_bytes for one in found]
    assert memory == sorted(memory)
    for one in found:
        assert one.memory_bytes == one.num_gpus * load_gpu(one.gpu).total_bytes.value


def test_pipeline_stages_fill_in_where_ranks_do_not_divide():
    """Three GPUs are three stages, six are two ranks in three stages: 8 KV heads go into 1, 2, 4
    or 8. The ranks alone that do it stand beside.
    """
    point = {"gpus": ["h100-sxm-80gb"], "kv_dtypes": ["auto"], "seq": "8k", "reserve": "2GiB"}
    shapes = [
        (one.tp, one.pp)
        for concurrency in (1, 10, 40, 90)
        for one in plan(LARGE, concurrency=concurrency, **point)
    ]
    assert shapes == [(2, 1), (1, 3), (4, 1), (4, 1), (2, 3), (8, 1)]


def test_each_rank_has_whole_query_heads():
    """Qwen2.5 7B has 28 query heads and 4 KV heads: eight ranks would not divide the former."""
    point = {"gpus": ["t4"], "kv_dtypes": ["auto"], "seq": "32k", "reserve": "1GiB"}
    (found,) = plan("Qwen/Qwen2.5-7B-Instruct", concurrency=46, **point)
    assert (found.tp, found.pp) == (4, 2)


def test_more_gpus_are_tried_on_demand():
    """What eight GPUs do not hold, up to 64 may."""
    point = {"gpus": ["l4"], "kv_dtypes": ["fp8"], "seq": "8k", "reserve": "2GiB"}
    assert plan(LARGE, concurrency=32, **point) == []
    found, *_ = plan(LARGE, concurrency=32, max_gpus=64, **point)
    assert 8 < found.num_gpus <= 64
    fewer = fewest(
        LARGE,
        "l4",
        found.num_gpus,
        kv_dtype="fp8",
        concurrency=32,
        **{name: point[name] for name in ("seq", "reserve")},
    )
    assert fewer == (found.tp, found.pp)


def test_few_reports_are_worked_out_in_full(monkeypatch):
    """What cannot hold weights and cache is passed over: less than two fits for each deployment
    there is.
    """
    calls = []
    fit = api.fit

    def counted(*model, **point):
        calls.append(point)
        return fit(*model, **point)

    monkeypatch.setattr(api, "fit", counted)
    found = plan(LARGE, reserve="3GiB", seq="32k", concurrency=64)
    assert len(found) < len(calls) < 2 * len(found) + len(gpu_ids())


def test_a_smaller_cache_needs_no_more():
    """With an fp8 cache no GPU is needed more often than with one of 16 bits."""
    found = plan(MODEL, reserve="2GiB", gpus=["rtx-4090", "h100-sxm-80gb"], **POINT)
    needed = {(one.gpu, one.kv_dtype): one.num_gpus for one in found}
    assert needed["rtx-4090", "fp8"] <= needed["rtx-4090", "bf16"]
    assert needed["h100-sxm-80gb", "fp8"] <= needed["h100-sxm-80gb", "bf16"]


def test_a_gpu_or_a_dtype_that_is_named_twice_is_listed_once():
    """`auto` and `bf16` are one dtype here."""
    found = plan(MODEL, reserve="2GiB", gpus=["l4", "l4"], kv_dtypes=("auto", "bf16"), **POINT)
    assert len(found) == 1


def test_a_plan_is_printed_and_is_data(capsys, monkeypatch):
    """A table at 80 columns, whatever is listed, and one JSON object."""
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["plan", MODEL, "--seq", "8k", "--concurrency", "20", "--reserve", "2GiB"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "× rtx-pro-6000-blackwell-server" in shown
    assert max(map(len, shown.splitlines())) <= 80
    arguments += ["--gpu", "rtx-4090,h100-sxm-80gb"]
    assert cli.run(arguments) == 0
    assert "\n1 × h100-sxm-80gb    1×1  bf16  79.190 GiB  " in capsys.readouterr().out
    assert cli.run([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "kvcalc.plan/1"
    assert {one["gpu"] for one in data["deployments"]} == {"rtx-4090", "h100-sxm-80gb"}
    assert all(one["fit"]["fits"] for one in data["deployments"])
    assert all(one["num_gpus"] == one["tp"] * one["pp"] for one in data["deployments"])
    assert all(one["price_per_hour"] is None for one in data["deployments"])
    assert data["left_out"] == data["without_known_memory"] == []


PRICES = """\
currency: USD
per_gpu_hour:
  h100-sxm-80gb: 2.49
  rtx-4090: 0.40
"""


@pytest.fixture
def priced(tmp_path, capsys):
    """Run a plan with the prices of a text; the table's lines."""
    path = tmp_path / "prices.yaml"

    def run(text, gpus="rtx-4090,h100-sxm-80gb", *more):
        path.write_text(text, "utf-8")
        arguments = ["plan", MODEL, "--seq", "8k", "--concurrency", "20", "--reserve", "2GiB"]
        arguments += ["--gpu", gpus, "--kv-dtype", "auto", "--prices", str(path), *more]
        assert cli.run(arguments) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_prices_order_the_deployments_that_have_one(priced):
    """The deployment's price is that of all its GPUs. Rows without one stand last with a dash, by
    memory, and are counted below.
    """
    lines = priced(PRICES)
    assert lines[2].split() == "GPUs TP×PP KV Memory Per hour Holds".split()
    assert [line.split()[2] for line in lines[3:5]] == ["rtx-4090", "h100-sxm-80gb"]
    count = int(lines[3].split()[0])
    assert count > 1
    assert f"  {count * 0.4:.2f} USD  " in lines[3]
    assert "  2.49 USD  " in lines[4]
    dear = priced(PRICES.replace("0.40", "40"))
    assert [line.split()[2] for line in dear[3:5]] == ["h100-sxm-80gb", "rtx-4090"]
    partly = priced(PRICES.replace("rtx-4090: 0.40", "h200-nvl: 1"), "l4,rtx-4090,h100-sxm-80gb")
    memory = [line.split()[2] for line in partly[3:6]]
    assert memory == ["h100-sxm-80gb", "l4", "rtx-4090"]
    assert "       -  " in partly[4]
    assert "       -  " in partly[5]
    assert partly[-1] == "without a price: 2 of 3, last and ordered by memory"
    none = priced("currency: USD\nper_gpu_hour: {}\n")
    assert none[-1] == "none has a price: ordered by memory"
    assert "a price" not in " ".join(lines + dear)


def test_a_price_in_a_gpus_own_file_counts(priced, tmp_path):
    """The file's price is used, what the prices say of the file goes before; rows of each currency
    stand together by price.
    """
    own = tmp_path / "mine.yaml"
    text = (profiles_folder() / "gpus" / "h100-sxm-80gb.yaml").read_text("utf-8")
    own.write_text(text + "\nprice_per_hour: {value: 9, currency: EUR}\n", "utf-8")
    lines = priced(PRICES, f"rtx-4090,h100-sxm-80gb,l4,{own}")
    assert [line.split()[2] for line in lines[3:7]] == ["mine", "rtx-4090", "h100-sxm-80gb", "l4"]
    assert "9.00 EUR" in lines[3]
    assert " ".join(lines[-2:]) == (
        "prices in EUR and USD, each ordered by itself; without a price: 1 of 4, last and "
        "ordered by memory"
    )
    assert str(own) in " ".join(lines)
    (shown,) = json.loads("".join(priced(PRICES + "  mine.yaml: 1.5\n", str(own), "--json")))[
        "deployments"
    ]
    assert shown["price_per_hour"] == {
        "value": 1.5,
        "currency": "USD",
        "source": str(tmp_path / "prices.yaml"),
        "date": None,
    }


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        ("rtx-4090", "rtx4091", 4, "unknown GPU 'rtx4091'; did you mean rtx-4090"),
        ("rtx-4090", "h100", 4, "did you mean h100-nvl-94gb, h100-pcie-80gb or h100-sxm-80gb"),
        ("rtx-4090", "H100 SXM", 4, "the same GPU as above: h100-sxm-80gb"),
        ("rtx-4090", "./none.yaml", 4, "cannot read "),
        ("0.40", "-1", 4, "per_gpu_hour.rtx-4090: must be a price such as 2.49, not '-1'"),
        ("0.40", ".nan", 4, "not '.nan'"),
        ("0.40", "inf", 4, "not 'inf'"),
        ("0.40", "1e3", 4, "not '1e3'"),
        ("0.40", "1:30", 4, "not '1:30'"),
        ("0.40", "$2", 4, "not '$2'"),
        ("0.40", "true", 4, "not 'true'"),
        ("0.40", "", 4, "not empty"),
        ("0.40", "[1]", 4, "not a list"),
        ("0.40", "1234567", 4, "not '1234567'"),
        ("rtx-4090: 0.40", "h100-sxm-80gb: 1", 4, "duplicate key 'h100-sxm-80gb'; it stands in li"),
        ("USD", "dollars", 1, "currency: must be a currency such as USD, not 'dollars'"),
        (
            "currency: USD\n",
            "",
            1,
            "missing key 'currency'; such as currency: USD, per_gpu_hour: {h",
        ),
        ("currency: USD\n", "currency: USD\ncurrency: EUR\n", 2, "duplicate key 'currency'"),
        (
            "currency: USD\n",
            "currency: USD\nper_hour: 1\n",
            2,
            "unknown key 'per_hour' (perhaps per",
        ),
        ("per_gpu_hour:", "per_gpu_hour: 5\nx:", 3, "unknown key 'x'"),
        (PRICES, "", 1, "the file is empty; such as currency: USD, per_gpu_hour: {h"),
        (PRICES, "5", 1, "must be keys and values, not '5'; such as currency: USD, per_"),
        (
            PRICES,
            "- h100: 1",
            1,
            "must be keys and values, not a list; such as currency: USD, per_",
        ),
    ],
)
def test_wrong_prices_are_told_with_line_and_key(old, new, line, reason, tmp_path, capsys):
    """Whatever is not a price of a known GPU is bad input, in one line."""
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES.replace(old, new), "utf-8")
    assert cli.run(["plan", MODEL, "--reserve", "2GiB", "--prices", str(path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"kvcalc: {path}:{line}: ")
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_file_that_is_priced_twice_is_refused(tmp_path):
    """Two ways to write a path are one file."""
    (tmp_path / "my.yaml").write_text(
        (profiles_folder() / "gpus" / "l4.yaml").read_text("utf-8"), "utf-8"
    )
    path = tmp_path / "prices.yaml"
    path.write_text("currency: USD\nper_gpu_hour: {my.yaml: 1, ./my.yaml: 2}", "utf-8")
    with pytest.raises(InputError, match=r"prices\.yaml:2: .*the same GPU as above"):
        read_prices(path)


@pytest.fixture
def unsure(monkeypatch):
    """Make `fit` refuse where a function of GPU, tp and pp returns a text."""

    def make(refuses, error=InputError):
        fit = api.fit

        def refusing(*model, **point):
            if reason := refuses(point["gpu"].id, point["tp"], point["pp"]):
                raise error(reason)
            return fit(*model, **point)

        monkeypatch.setattr(api, "fit", refusing)

    return make


@pytest.mark.parametrize("error", [InputError, UnsupportedError])
def test_a_gpu_that_cannot_be_computed_is_left_out_and_told(unsure, error, capsys):
    """The others are planned with; where it is so of all, the reason is the answer."""
    unsure(lambda gpu, _tp, _pp: "its share depends" if gpu in {"a10", "l40"} else "", error)
    arguments = ["plan", MODEL, "--seq", "8k", "--reserve", "2GiB", "--gpu"]
    assert cli.run([*arguments, "a10,l40,l40s"]) == 0
    shown = capsys.readouterr().out
    assert "\n1 × l40s " in shown
    assert shown.endswith("\nleft out: a10, l40: its share depends\n")
    assert cli.run([*arguments, "a10,l40,l40s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == [
        {"gpus": ["a10", "l40"], "kv_dtypes": ["auto", "fp8"], "reason": "its share depends"}
    ]
    assert cli.run([*arguments, "a10,l40"]) == error.exit_code
    assert capsys.readouterr().err == "kvcalc: its share depends\n"


def test_a_number_of_gpus_that_cannot_be_computed_is_told_where_none_does(unsure, capsys):
    """A GPU that is too small alone, and not computed in numbers, is left out with the reason; a
    split that is refused beside one that is computed is no loss.
    """
    unsure(lambda _gpu, tp, pp: f"none of {tp} × {pp}" if tp * pp > 1 else "", UnsupportedError)
    arguments = ["plan", MODEL, "--seq", "8k", "--reserve", "2GiB", "--kv-dtype", "auto", "--gpu"]
    assert cli.run([*arguments, "t4,l40s"]) == 0
    assert capsys.readouterr().out.endswith("\nleft out: t4: none of 2 × 1\n")
    unsure(lambda _gpu, tp, _pp: "ranks" if tp > 1 else "", UnsupportedError)
    assert cli.run([*arguments, "t4"]) == 1
    assert "ranks" in capsys.readouterr().err


def test_a_dtype_that_an_engine_does_not_keep_is_told(capsys):
    """llama.cpp has no fp8: the plan is one of the other dtype."""
    arguments = ["plan", MODEL, "--seq", "8k", "--engine", "llama.cpp", "--gpu", "l40s,t4"]
    assert cli.run(arguments) == 0
    assert "\nleft out: --kv-dtype fp8: llama.cpp keeps a cache in " in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_gpu_without_bf16_has_a_cache_in_fp16_and_none_in_fp8(engine, capsys):
    """Before compute capability 8.0 the row of `auto` and `bf16` is that of fp16, and says so below
    the table; fp8 is left out there alone.
    """
    point = ["plan", MODEL, "--seq", "8k", "--engine", engine, "--reserve", "2GiB"]
    assert cli.run([*point, "--gpu", "t4,l4", "--kv-dtype", "auto,bf16,fp8"]) == 0
    *_, rows, told = capsys.readouterr().out.split("\n\n")
    kept = [(line.split()[2], line.split()[4]) for line in rows.splitlines()[1:]]
    assert sorted(kept) == [("l4", "bf16"), ("l4", "fp8"), ("t4", "fp16")]
    told = told.replace("\n", " ")
    assert " t4: before compute capability 8.0 an engine computes in fp16 (--dtype half)" in told
    assert " left out: t4 with --kv-dtype fp8: an fp8 cache needs compute capability 8.0 " in told
    in_fp16, *_ = plan(MODEL, engine=engine, gpus=["t4"], kv_dtypes=["fp16"], **POINT)
    computed, *_ = plan(MODEL, engine=engine, gpus=["t4"], kv_dtypes=["auto"], **POINT)
    assert computed.to_dict() == in_fp16.to_dict()
    assert cli.run([*point, "--gpu", "t4", "--kv-dtype", "fp8"]) == 3
    assert capsys.readouterr().err == "kvcalc: an fp8 cache needs compute capability 8.0\n"
    assert cli.run([*point, "--gpu", "l4"]) == 0
    assert "capability" not in capsys.readouterr().out


def test_a_model_whose_own_cache_is_fp8_is_not_planned_where_that_is_not_kept(capsys):
    """What `auto` means for the model decides, and so does what the engine keeps: llama.cpp has
    bf16 everywhere.
    """
    fp8 = ["plan", "nvidia/Qwen3-235B-A22B-NVFP4", "--seq", "8k", "--gpu", "t4,h100-sxm-80gb"]
    assert cli.run([*fp8, "--kv-dtype", "auto", "--max-gpus", "64"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "left out: t4: an fp8 cache needs compute capability 8.0" in shown
    point = {"seq": "4k", "gpus": ["t4", "l4"], "engine": "llama.cpp"}
    found = plan("Qwen/Qwen3-0.6B", kv_dtypes=["bf16"], reserve="1GiB", **point)
    assert {one.kv_dtype for one in found} == {"bf16"}


def test_tokens_beyond_the_models_own_maximum_are_told(capsys):
    """A line below the table, only where they are more."""
    point = ["plan", MODEL, "--gpu", "h100-sxm-80gb", "--reserve", "2GiB", "--seq"]
    assert cli.run([*point, "16k"]) == 0
    told = "\n16,384 tokens are beyond the model's own maximum of 8,192\n"
    assert told in capsys.readouterr().out
    assert cli.run([*point, "8k"]) == 0
    assert "maximum" not in capsys.readouterr().out


def test_a_plan_that_estimates_leave_open_says_so(capsys):
    """Where each row is marked the line below says it, and the status is 0."""
    point = ["plan", "Qwen/Qwen3-32B", "--seq", "32k", "--concurrency", "16", "--gpu"]
    assert cli.run([*point, "rtx-4090,l40s"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "; ?: not with all estimates at their most TP×PP" in shown
    assert cli.run([*point, "rtx-4090", "--max-gpus", "7"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "; ?: not with all estimates at their most, which is so of each row TP×PP" in shown


def test_no_more_stages_than_layers_are_tried():
    """A model of 32 layers is not split into more of them, whatever `max_gpus` allows."""
    point = {"seq": "1M", "gpus": ["rtx-4090"], "reserve": "2GiB", "max_gpus": 64}
    assert planning.plan(MODEL, concurrency=200, **point) == planning.PlanReport(())
    shapes = planning._Search(api.read_model(MODEL), {})._shapes(64)
    assert {pp for _, pp in shapes} == {*range(1, 33)}


def test_gpus_without_a_drivers_figure_are_counted(capsys):
    """A plan over all GPUs says how many are not in it; stages are explained where there are
    some.
    """
    without = [gpu for gpu in gpu_ids() if not load_gpu(gpu).total_bytes]
    arguments = ["plan", LARGE, "--seq", "8k", "--reserve", "2GiB", "--concurrency", "16"]
    assert cli.run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_known_memory"] == without
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    told = f"\nleft out: {len(without)} GPUs: no driver's figure of their memory\n"
    assert shown.endswith(told)
    assert "\nTP×PP: each layer is split over TP GPUs, " in shown
    assert cli.run([*arguments, "--gpu", "b200", "--kv-dtype", "auto"]) == 0
    assert "TP×PP:" not in capsys.readouterr().out


def test_a_gpu_goes_by_any_name_that_means_it_alone(capsys):
    """Two names of one GPU are one row."""
    found = plan(MODEL, gpus=["H100 SXM", "h100-sxm-80gb"], kv_dtypes=["auto"], **POINT)
    assert [one.gpu for one in found] == ["h100-sxm-80gb"]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ([MODEL, "--seq", "1M", "--concurrency", "200"], 1, "no GPU"),
        (["google/gemma-3n-E4B-it"], 3, "weights"),
        ([MODEL, "--gpu", "t5"], 2, "unknown GPU"),
        ([MODEL, "--gpu", "none.yaml"], 2, "cannot read none.yaml"),
        (
            [MODEL, "--gpu", "a40,apple-m1"],
            3,
            "is known; give fit --kv-memory, as the engine prints it, or a YAML with cuda_bytes: k",
        ),
        ([MODEL, "--kv-dtype", "auto,fp9"], 2, "unknown dtype 'fp9'"),
        ([MODEL, "--seq", "many"], 2, "--seq 'many'"),
        ([MODEL, "--option", "x=1"], 2, "no option 'x'"),
        ([MODEL, "--gpu", "h100"], 2, "h100-nvl-94gb, h100-pcie-80gb or h100-sxm-80gb"),
        ([MODEL, "--share", "2"], 2, "--share"),
        ([MODEL, "--max-gpus", "0"], 2, "--max-gpus must be at least 1"),
        ([MODEL, "--max-gpus", "65"], 2, "--max-gpus must be at most 64"),
        ([MODEL, "--prices", "none.yaml"], 2, "cannot read none.yaml"),
    ],
)
def test_where_nothing_serves_the_reason_is_told(arguments, status, reason, capsys):
    """Too much for any machine is a failed check; what no machine could take is refused."""
    assert cli.run(["plan", *arguments, "--reserve", "2GiB"]) == status
    said = capsys.readouterr()
    assert reason in said.err
    assert said.out == ""


def test_more_requests_than_a_server_runs_by_itself_are_asked_of_it(capsys):
    """The rows are those of vLLM with --max-num-seqs, which is told; a given option stands."""
    point = {"seq": "2k", "concurrency": 500, "gpus": ["l40s", "h100-sxm-80gb"]}
    report = planning.plan(MODEL, **point)
    assert report.max_num_seqs == ("l40s",)
    assert report.left_out == ()
    seqs = {one.gpu: one.fit.plan.options["max_num_seqs"] for one in report.deployments}
    assert seqs == {"l40s": 500, "h100-sxm-80gb": 1024}
    (told,) = report.remarks()
    assert told == "l40s: with --max-num-seqs 500, for the server runs fewer at once by itself"
    with pytest.raises(InputError, match="runs 300 requests at once"):
        planning.plan(MODEL, options={"max_num_seqs": 300}, **point)


def test_one_gpu_without_a_figure_leaves_the_others(capsys):
    """It is left out by name, in words and as data."""
    arguments = ["plan", MODEL, "--seq", "4k", "--gpu", "a40,h100-sxm-80gb"]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "1 × h100-sxm-80gb" in shown
    assert shown.endswith("left out: a40: no driver's figure of their memory\n")
    many = ["--gpu", "t4", "--max-gpus", "8", "--concurrency", "300", "--json"]
    assert cli.run(["plan", MODEL, "--seq", "256", "--gpu", "a40", *many]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["without_known_memory"] == ["a40"]
    assert told["in_fp16"] == told["max_num_seqs"] == ["t4"]
