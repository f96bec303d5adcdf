"""Where a config is found: which source answers first, and how the answer says so."""

import json
import os
import subprocess
import sys
import threading

import pytest

import kvcalc
from kvcalc import sources
from kvcalc.cli import run
from kvcalc.sources import catalogue

LLAMA = "meta-llama/Meta-Llama-3-8B"
OTHER_LAYERS = 5
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub_cache(monkeypatch, tmp_path):
    """An empty Hugging Face cache, and no hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def config(**changes):
    """Llama 3 8B with a number of layers that the catalogue's entry does not have."""
    return {**catalogue.find(LLAMA).config, "num_hidden_layers": OTHER_LAYERS, **changes}


def write(folder, **changes):
    """Put a config.json into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    return folder


def cached(hub_cache, model, *, ref="main", commit=COMMIT):
    """Put a model into the cache as huggingface_hub lays it out."""
    repository = hub_cache / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return write(repository / "snapshots" / commit)


def sized(capsys, *arguments):
    """The JSON that `kvcalc size` prints for these arguments."""
    status = run(["size", *map(str, arguments), "--seq", "4k", "--json"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return json.loads(out)


def plain_file(folder):
    """A config.json by any name."""
    return (write(folder) / "config.json").rename(folder / "llama.json")


def weights_file(folder):
    """A weights file beside a config.json."""
    (write(folder) / "model-00001-of-00002.safetensors").write_bytes(b"")
    return folder / "model-00001-of-00002.safetensors"


def repository_folder(folder):
    """A repository of the Hugging Face cache, with its one snapshot."""
    cached(folder, "org/name")
    return folder / "models--org--name"


@pytest.mark.parametrize("build", [plain_file, write, weights_file, repository_folder])
def test_paths_that_stand_for_a_config(capsys, tmp_path, build):
    """A file, a model folder, a weights file and a cached repository are all read."""
    path = build(tmp_path / "somewhere")
    report = sized(capsys, path)
    assert len(report["layers"]) == OTHER_LAYERS
    assert report["source"]["kind"] == "file"
    assert report["source"]["detail"].startswith(str(tmp_path / "somewhere"))
    assert report["source"]["detail"].endswith(".json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_read(capsys, tmp_path):
    """A config that another program writes (`<(…)`, /dev/stdin) is a file like any other."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(json.dumps(config()),), daemon=True)
    writer.start()
    report = sized(capsys, pipe)
    writer.join(timeout=5)
    assert len(report["layers"]) == OTHER_LAYERS


def test_a_repository_of_several_snapshots_is_no_model(tmp_path):
    """With two snapshots the user must say which one, and is shown how."""
    for commit in ("a" * 40, "b" * 40):
        cached(tmp_path, "org/name", commit=commit)
    with pytest.raises(kvcalc.ModelNotFoundError, match=f"2 snapshots.*snapshots/{'b' * 40}"):
        kvcalc.size(str(tmp_path / "models--org--name"), seq=1)


@pytest.mark.parametrize("name", ["gpt2", LLAMA])
def test_a_path_comes_before_the_catalogue(capsys, tmp_path, name):
    """A folder here that is named like a catalogue entry is the one that is meant."""
    write(tmp_path / name)
    report = sized(capsys, name)
    assert len(report["layers"]) == OTHER_LAYERS
    assert report["source"]["kind"] == "file"


def test_the_catalogue_comes_before_the_cache(capsys, hub_cache):
    """A catalogue name gives the same answer whatever this machine has downloaded."""
    cached(hub_cache, LLAMA)
    report = sized(capsys, LLAMA)
    assert len(report["layers"]) == 32
    assert report["source"]["kind"] == "catalogue"
    entry = catalogue.find(LLAMA)
    assert report["source"]["detail"] == f"{entry.source}, {entry.date}"
    assert report["source"]["completeness"] == entry.completeness


@pytest.mark.parametrize("revision", ["v2", COMMIT])
def test_a_revision_goes_past_the_catalogue(capsys, hub_cache, revision):
    """A catalogue entry has no revisions, so the cache answers for a branch, tag or commit."""
    snapshot = cached(hub_cache, LLAMA, ref="v2")
    report = sized(capsys, LLAMA, "--revision", revision)
    assert len(report["layers"]) == OTHER_LAYERS
    assert report["source"]["kind"] == "hf-cache"
    assert report["source"]["detail"] == str(snapshot / "config.json")


def test_a_revision_that_is_not_cached_is_asked_of_the_hub(hub_cache):
    """A cached main branch does not stand in for another revision."""
    cached(hub_cache, LLAMA)
    with pytest.raises(kvcalc.HubUnavailableError):
        sources.resolve(LLAMA, revision="v2")


@pytest.mark.parametrize("source", ["catalogue", "file", "hf-cache"])
def test_local_sources_do_not_import_huggingface_hub(hub_cache, tmp_path, source):
    """What is on this machine is read without the quarter second that huggingface_hub takes."""
    cached(hub_cache, "org/name")
    model = {"catalogue": LLAMA, "file": str(write(tmp_path / "m")), "hf-cache": "org/name"}[source]
    script = (
        "import sys; from kvcalc.cli import run;"
        f"status = run(['size', {model!r}, '--seq', '4k', '--json']);"
        "sys.exit(99 if 'huggingface_hub' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["source"]["kind"] == source


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$HOME/hf"},
        {"HF_HOME": "/hf", "XDG_CACHE_HOME": "/xdg"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/hf"},
        {"HF_HUB_CACHE": "$HOME/new", "HUGGINGFACE_HUB_CACHE": "/old"},
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_keeps_it(environment):
    """The cache folder is the one that huggingface_hub itself takes from its variables."""
    script = (
        "from huggingface_hub.constants import HF_HUB_CACHE; from kvcalc.sources import local;"
        "print(local.hf_cache_folder()); print(HF_HUB_CACHE)"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "HOME": "/home/someone", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = done.stdout.splitlines()
    assert ours == theirs


@pytest.mark.parametrize(
    ("typed", "published"),
    [
        ("META-LLAMA/meta-llama-3-8b", LLAMA),
        ("meta-llama-3-8b", LLAMA),
        ("Meta-Llama-3-8B", LLAMA),
        ("meta-llama/Llama-3-8B", LLAMA),
        ("Llama-3-8B", LLAMA),
        ("gpt2", "openai-community/gpt2"),
        ("KIMI-K2", "moonshotai/Kimi-K2-Instruct"),
    ],
)
def test_other_ways_to_write_a_name(capsys, typed, published):
    """Any case, a bare name and a common alias mean the published model."""
    report = sized(capsys, typed)
    assert report["model"] == typed
    assert report["resolved_model"] == published
    assert report["total_bytes"] == sized(capsys, published)["total_bytes"]


def test_an_alias_is_told(capsys):
    """The output of an alias names the published model that was sized."""
    assert run(["size", "meta-llama/Llama-3-8B", "--seq", "128k"]) == 0
    out = capsys.readouterr().out
    assert f"meta-llama/Llama-3-8B is published as {LLAMA}" in out
    assert "17,179,869,184 bytes" in out


def test_every_alias_stands_for_an_entry():
    """No alias points to a model that the catalogue lacks, and none hides an entry."""
    names = {name.lower() for name in catalogue.names()}
    assert [alias for alias, name in catalogue.aliases().items() if name.lower() not in names] == []
    assert [
        alias for alias in catalogue.aliases() if alias in names or alias.lower() != alias
    ] == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("meta-llama/Meta-Lama-3-8B", LLAMA),
        ("Qwen/Qwen2.5-7B-Instrct", "Qwen/Qwen2.5-7B-Instruct"),
        ("deepseek/DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
        ("gemma-3-27b", "google/gemma-3-27b-it"),
    ],
)
def test_the_likeliest_suggestion_comes_first(typed, meant):
    """A misspelt name, a wrong organisation or a missing suffix suggests the right model first."""
    assert catalogue.suggestions(typed)[0] == meant


def test_nothing_like_it_suggests_nothing():
    """A name unlike any other gets no suggestion."""
    assert catalogue.suggestions("zzzzzz/qqqqqq") == []


def test_one_config_however_it_is_given(capsys, tmp_path):
    """Name, file, mapping and the text part of a wrapper give the same bytes and layers."""
    name = "google/gemma-3-1b-it"
    config = catalogue.find(name).config
    wrapper = {"model_type": "gemma3", "text_config": config}
    for stem, content in (("plain", config), ("wrapped", wrapper)):
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    reports = [
        sized(capsys, name),
        sized(capsys, tmp_path / "plain.json"),
        sized(capsys, tmp_path / "wrapped.json"),
        kvcalc.size(config, seq=4096).to_dict(),
        kvcalc.size(wrapper, seq="4k").to_dict(),
    ]
    assert [report["source"]["kind"] for report in reports] == [
        "catalogue",
        "file",
        "file",
        "mapping",
        "mapping",
    ]
    for report in reports[1:]:
        for key in ("total_bytes", "layers", "segments", "kv_dtype", "max_tokens"):
            assert report[key] == reports[0][key]
    assert reports[0]["total_bytes"] == (4 * 4096 + 22 * 512) * 2 * 256 * 2


def test_models_lists_what_matches(capsys):
    """A filter finds names, model types and families in any case, as JSON and as a table."""
    assert run(["models", "GEMMA3_text", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema"] == "kvcalc.models/1"
    assert {row["name"] for row in listed["models"]} >= {"google/gemma-3-1b-it"}
    assert {row["model_type"] for row in listed["models"]} == {"gemma3_text"}

    assert run(["models", "meta-llama-3-8b"]) == 0
    out, err = capsys.readouterr()
    assert LLAMA in out
    assert "gemma" not in out
    assert err == ""


def test_models_lists_everything_and_nothing(capsys):
    """Without a filter each entry is listed once; a filter that matches none lists none."""
    assert run(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["name"] for row in rows] == list(catalogue.names())
    assert all(bool(row["refused"]) != bool(row["layers"]) for row in rows)

    assert run(["models", "zzzzzz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == []
