"""Weights from where they are: folders, GGUF files, the local cache, the Hub, else the config."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from gguf_files import BASE, encode, pairs_of, string
from hypothesis import given
from hypothesis import strategies as st

import kvcalc
from kvcalc.cli import run
from kvcalc.errors import ConfigError, InputError, KvcalcError, UnsupportedError
from kvcalc.sources import gguf, resolve
from kvcalc.sources.checkpoint import weights_of_model
from kvcalc.sources.gguf_weights import TYPES, weights_of_gguf
from kvcalc.weights import _files, weights_of

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NUM_PARAMETERS = weights_of(CONFIG).num_parameters
MORE = 1000
"""Bytes that the files here hold beside the decoder's, so that one can tell where a sum is from."""


def tensors(**changes):
    """The decoder's values and a tensor of an image encoder, by name."""
    import torch

    whole = {
        "model.weight": torch.zeros(NUM_PARAMETERS, dtype=torch.bfloat16),
        "vision_tower.weight": torch.zeros(MORE // 2, dtype=torch.bfloat16),
    }
    return whole | changes


FILE_BYTES = 2 * NUM_PARAMETERS + MORE


def save(folder, *, shards=1, config=CONFIG, more=None):
    """A model folder as transformers writes it, in one file or with an index; returns it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        added = {name: torch.zeros(shape) for name, shape in (more or {}).items()}
        save_file(tensors(**added), folder / "model.safetensors")
        return folder
    placed = {}
    for number, (name, value) in enumerate(tensors().items(), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({name: value}, folder / file)
        placed[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def found(model):
    """The weights of a model as `fit` takes them."""
    return weights_of_model(*resolve(str(model)))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """The local cache of these tests is theirs, and empty."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("given", ["folder", "config.json", "a file of it"])
def test_a_folder_counts_as_its_files(tmp_path, shards, given):
    """A folder, its config or a file of it is answered by what lies in its safetensors files."""
    folder = save(tmp_path / "model", shards=shards)
    files = sorted(folder.glob("*.safetensors"))
    model = {"folder": folder, "config.json": folder / "config.json", "a file of it": files[0]}[
        given
    ]
    weights = found(model)
    assert weights.num_bytes == FILE_BYTES
    assert weights.num_parameters == NUM_PARAMETERS + MORE // 2
    assert "safetensors" in weights.origin


def test_a_lone_config_is_computed(tmp_path):
    """A config without files beside it, or of another name than theirs, is computed from."""
    folder = save(tmp_path / "model")
    other = folder / "other.json"
    shutil.copy(folder / "config.json", other)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    for model in (folder, other):
        assert found(model) == weights_of(CONFIG)


def test_a_folder_that_misses_a_shard_is_refused(tmp_path):
    """A missing shard of a folder that was given is one line that names it."""
    folder = save(tmp_path / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: it is missing"):
        found(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors and no model"):
        found(folder)


def test_a_cut_off_file_is_refused(tmp_path, capsys):
    """A file that was not fetched whole ends `fit` with one line and status 2."""
    folder = save(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run(["fit", str(folder), "--gpu", "h100-sxm-80gb", "--reserve", "2GiB"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "its tensors end at byte" in told.replace("\n", " ")


def test_fit_takes_the_files_bytes(tmp_path):
    """`fit` takes what the files hold off the GPU's memory, and says that they are its source."""
    report = kvcalc.fit(save(tmp_path / "model"), gpu="h100-sxm-80gb", reserve="2GiB", seq=512)
    assert report.weights_bytes == FILE_BYTES
    (line,) = [line for line in report.budget if line.name == "weights"]
    assert (line.num_bytes, line.provenance) == (-FILE_BYTES, "exact")
    assert line.source == "header of model.safetensors: 2 tensors"


def test_headers_are_read_once_while_files_stay(tmp_path, monkeypatch):
    """Asking again reads no header, unless a file has changed."""
    folder = save(tmp_path / "model")
    assert found(folder).num_bytes == FILE_BYTES
    with monkeypatch.context() as patched:
        patched.setattr(_files, "_header", None)
        assert found(folder).num_bytes == FILE_BYTES
    save(folder, more={"b.weight": (7, 9)})
    assert found(folder).num_bytes == FILE_BYTES + 4 * 63


def test_packing_that_nobody_knows_has_exact_bytes(tmp_path):
    """Bytes are exact, though how many parameters a format packs into them is not known."""
    import torch
    from safetensors.torch import save_file

    folder = save(tmp_path / "model")
    packed = {"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32)}
    save_file(tensors(**packed), folder / "model.safetensors")
    weights = found(folder)
    assert (weights.num_bytes, weights.format) == (FILE_BYTES + 64, "packed")
    assert weights.num_parameters == 0
    assert any("a.weight_packed" in note for note in weights.notes)


@pytest.mark.parametrize("level", ["", "text_config"])
def test_layers_of_multi_token_prediction_are_mentioned(tmp_path, level):
    """Files are counted as they are, with a word on the modules that engines may leave out."""
    mtp = CONFIG | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    config = {"model_type": "llava", "text_config": mtp} if level else mtp
    folder = save(tmp_path / "model", config=config)
    weights = weights_of_model(config, resolve(str(folder))[1])
    assert weights.num_bytes == FILE_BYTES
    assert any("multi-token prediction" in note for note in weights.notes)


# GGUF


def table(shapes, *, alignment=32, data=True, shift=0):
    """A table of tensors, given as name to type and shape, and zeros for their bytes."""
    lines, end = b"", 0
    for name, (kind, shape) in shapes.items():
        begin = -(-end // alignment) * alignment + shift
        lines += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, begin)
        stored = TYPES.get(kind)
        elements = 1
        for length in shape:
            elements *= length
        end = begin + (elements // stored.block_elements * stored.block_bytes if stored else 0)
    return lines, bytes(end) if data else b""


SHAPES = {
    "token_embd.weight": (12, (256, 100)),
    "blk.0.attn_q.weight": (2, (256, 256)),
    "blk.0.attn_norm.weight": (0, (255,)),
    "blk.0.ffn_gate_exps.weight": (39, (256, 64, 3)),
    "v.patch_embd.weight": (1, (14, 14, 3, 5)),
    "one": (30, ()),
}
SIZES = (100 * 144, 256 * 8 * 18, 255 * 4, 64 * 3 * 8 * 17, 14 * 14 * 3 * 5 * 2, 2)


def write_gguf(path, shapes=SHAPES, *, alignment=None, pairs=None, **more):
    """A GGUF file of a small Llama with these tensors; returns its path."""
    pairs = pairs_of("llama", BASE) if pairs is None else pairs
    if alignment:
        pairs = pairs | {"general.alignment": alignment}
    lines, data = table(shapes, alignment=alignment or 32, **more)
    head = encode(pairs, tensors=len(shapes)) + lines
    path.write_bytes(head + bytes(-len(head) % (alignment or 32)) + data)
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_gguf_file_counts_as_its_tensors(tmp_path, alignment):
    """Blocks of all tensors of the table are added up, whatever type each is of."""
    path = write_gguf(tmp_path / "model.gguf", alignment=alignment)
    weights = found(path)
    assert weights.num_bytes == sum(SIZES)
    assert weights.format == "q4_0"
    assert weights.origin == "tensor table of model.gguf: 6 tensors"
    report = kvcalc.fit(path, gpu="h100-sxm-80gb", reserve="2GiB", engine="llama.cpp", seq=512)
    assert report.weights_bytes == sum(SIZES)


def test_a_gguf_file_is_fitted_as_llama_cpp_runs_it(tmp_path, capsys):
    """Without an engine's name a GGUF is llama.cpp's, with the estimates of its own buffers."""
    path = write_gguf(tmp_path / "model.gguf")
    assert run(["fit", str(path), "--gpu", "rtx-5090", "--seq", "512", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engine"] == "llama.cpp"
    assert report["weights_bytes"] == sum(SIZES)


GGUF_0_19 = {
    "fp32": (1, 4), "fp16": (1, 2), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22),
    "q5_1": (32, 24), "q8_0": (32, 34), "q2_k": (256, 84), "q3_k": (256, 110),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210), "q8_k": (256, 292),
    "iq2_xxs": (256, 66), "iq2_xs": (256, 74), "iq3_xxs": (256, 98), "iq1_s": (256, 50),
    "iq4_nl": (32, 18), "iq3_s": (256, 110), "iq2_s": (256, 82), "iq4_xs": (256, 136),
    "i8": (1, 1), "i16": (1, 2), "i32": (1, 4), "i64": (1, 8), "fp64": (1, 8),
    "iq1_m": (256, 56), "bf16": (1, 2), "tq1_0": (256, 54), "tq2_0": (256, 66),
    "mxfp4": (32, 17), "nvfp4": (64, 36), "q1_0": (128, 18),
}  # fmt: skip
"""`GGML_QUANT_SIZES` of the package gguf 0.19.0; its q8_1 of 40 bytes is ggml's of before 2024."""


def test_types_are_ggmls():
    """Elements and bytes of a block are those that the package gguf has."""
    ours = {stored.name: tuple(stored[1:]) for stored in TYPES.values()}
    assert ours == GGUF_0_19 | {"q8_1": (32, 36), "q2_0": (64, 18)}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_counts_whole_blocks(tmp_path, kind):
    """Three rows of two blocks are six blocks; a row that is no whole number of them is damage."""
    stored = TYPES[kind]
    path = write_gguf(tmp_path / "a.gguf", {"a": (kind, (2 * stored.block_elements, 3))})
    assert weights_of_gguf(path).num_bytes == 6 * stored.block_bytes
    if stored.block_elements > 1:
        path = write_gguf(tmp_path / "b.gguf", {"a": (kind, (stored.block_elements + 1, 3))})
        with pytest.raises(InputError, match=f"no whole blocks of {stored.name}"):
            weights_of_gguf(path)


@pytest.mark.parametrize("kind", [4, 31, 38, 43, 2**32 - 1])
def test_types_that_ggml_does_not_have_are_refused(tmp_path, kind):
    """A type that was removed, or of a fork, is refused by its number."""
    path = write_gguf(tmp_path / "a.gguf", {"a": (kind, (256,))})
    with pytest.raises(UnsupportedError, match=f"type {kind}, whose size"):
        weights_of_gguf(path)


def split(folder, *, parts=3, **changes):
    """A model of as many parts, a tensor in each but the first, which has keys alone."""
    names = [folder / f"m-{number:05}-of-{parts:05}.gguf" for number in range(1, parts + 1)]
    for number, path in enumerate(names):
        own = {"split.no": number, "split.count": parts, "split.tensors.count": parts - 1}
        pairs = (pairs_of("llama", BASE) if number == 0 else {}) | own | changes
        write_gguf(path, {f"t{number}": (8, (64, number))} if number else {}, pairs=pairs)
    return names


def test_parts_of_a_split_are_added_up(tmp_path):
    """The first part stands for all, which must lie beside it."""
    first, *_ = split(tmp_path)
    weights = found(first)
    assert weights.num_bytes == 2 * 34 * (1 + 2)
    assert weights.origin == f"tensor tables of 3 parts of {first.name}: 2 tensors"


def test_a_split_that_is_not_whole_is_refused(tmp_path):
    """A missing part is named; parts that say another thing than their names are told."""
    names = split(tmp_path)
    names[2].rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf is missing, one of 3 parts"):
        found(names[0])
    shutil.copy(names[1], names[2])
    with pytest.raises(InputError, match=r"split\.no = 1 where its parts have 2"):
        found(names[0])
    split(tmp_path, **{"split.tensors.count": 7})
    with pytest.raises(InputError, match=r"split\.tensors\.count = 7 where its parts have 2"):
        found(names[0])
    shutil.copy(names[0], tmp_path / "other.gguf")
    with pytest.raises(InputError, match="one of 3 parts, which kvcalc finds by names"):
        found(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("shapes", "more", "said"),
    [
        (SHAPES, {"data": False}, "it ends before its tensor 'token_embd.weight' does"),
        ({"a": (0, (8,))}, {"shift": 32}, "does not lie behind the one before it"),
        ({"a": (0, (2**40, 2**40))}, {"data": False}, "has the shape"),
        ({"a": (0, (1, 1, 1, 1, 1))}, {}, "has 5 dimensions"),
        ({}, {}, "has no tensors"),
    ],
)
def test_tables_that_lie_are_one_line(tmp_path, shapes, more, said):
    """A file that is cut off, or whose table contradicts itself or ggml, is told in one line."""
    path = write_gguf(tmp_path / "model.gguf", shapes, **more)
    with pytest.raises(InputError, match=re.escape(said)) as raised:
        weights_of_gguf(path)
    assert "\n" not in str(raised.value)


def test_tables_are_cut_off_and_doubled(tmp_path):
    """The header ends in the table, has a name twice, or is aligned to no power of two."""
    whole = write_gguf(tmp_path / "model.gguf").read_bytes()
    pairs = pairs_of("llama", BASE)
    lines, _ = table({"a": (0, (8,))})
    bad = {
        "cut off": whole[: len(encode(pairs)) + 20],
        "two of its tensors": encode(pairs, tensors=2) + 2 * lines,
        "no power of two": encode(pairs | {"general.alignment": 3}, tensors=1) + lines,
        "more than": encode(pairs, tensors=2**30) + lines,
    }
    for said, data in bad.items():
        with pytest.raises(ConfigError, match=said):
            gguf.parse_header(data, name="x")


@given(st.data())
def test_flipped_bytes_of_a_table_are_errors_or_answers(tmp_path_factory, data):
    """No change of bytes in a table makes anything but an answer or an error of ours."""
    path = write_gguf(tmp_path_factory.mktemp("flipped") / "model.gguf", {"a": (2, (64, 2))})
    content = bytearray(path.read_bytes())
    begin = len(encode(pairs_of("llama", BASE)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(begin, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(KvcalcError):
        assert weights_of_gguf(path).num_bytes <= len(content)


# the local Hugging Face cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home, name, **how):
    """A repository in the cache, with blobs and links as huggingface_hub lays it out."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    blobs, snapshot = repository / "blobs", repository / "snapshots" / COMMIT
    save(blobs, **how)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shards", [1, 2])
def test_a_cached_model_counts_as_its_files(tmp_path, shards):
    """A model that was fetched is answered by the files of its snapshot."""
    cached(tmp_path / "hf", "org/name", shards=shards)
    assert resolve("org/name")[1].kind == "hf-cache"
    assert found("org/name").num_bytes == FILE_BYTES


def test_a_catalogued_model_that_is_cached_counts_as_its_files(tmp_path):
    """The catalogue has the config; the files in the cache have the bytes."""
    name = "Qwen/Qwen3-4B"
    computed = found(name)
    cached(tmp_path / "hf", name)
    assert resolve(name)[1].kind == "catalogue"
    assert found(name).num_bytes == FILE_BYTES != computed.num_bytes


@pytest.mark.parametrize("shards", [1, 2])
def test_a_snapshot_that_is_not_whole_is_computed(tmp_path, shards):
    """Where a file of the snapshot is missing, its config answers, and the origin says why."""
    snapshot = cached(tmp_path / "hf", "org/name", shards=shards)
    max(snapshot.glob("*.safetensors")).resolve().unlink()
    weights = found("org/name")
    assert weights.num_bytes == 2 * NUM_PARAMETERS
    assert weights.origin.startswith("computed, as the cached files are not complete: sum over")
    assert "safetensors" in weights.notes[-1]


def test_a_snapshot_without_weights_is_computed(tmp_path):
    """A config alone in the cache is computed from, and nothing more is said."""
    snapshot = cached(tmp_path / "hf", "org/name")
    (snapshot / "model.safetensors").unlink()
    assert found("org/name") == weights_of(CONFIG)


def test_the_cache_is_read_without_the_hubs_client(tmp_path):
    """Weights in the cache, in a folder and in a GGUF file load no client, torch or numpy."""
    cached(tmp_path / "hf", "org/name")
    path = write_gguf(tmp_path / "model.gguf")
    script = (
        "import sys, kvcalc\n"
        f"for model in ('org/name', {str(path)!r}):\n"
        "    kvcalc.fit(model, gpu='h100-sxm-80gb', reserve='2GiB', seq=512)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"} & loaded


# the Hub

TOKEN = "hf_ThisMustNeverBePrinted"  # noqa: S105


class Handler(BaseHTTPRequestHandler):
    """Serves a folder as the Hub serves a repository, ranges included, and keeps the requests."""

    def do_GET(self):
        """Answer GET and HEAD."""
        name = self.path.rpartition("/")[2]
        asked = self.headers["Range"]
        self.server.requests.append((self.command, self.path, asked))
        status = self.server.statuses.get(name, 200)
        path = self.server.folder / name
        if "/resolve/" not in self.path or not path.is_file():
            status = 404
        body = path.read_bytes() if status == 200 else b"no"
        total = len(body)
        if status == 200 and asked:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups()
            body = body[int(first) : int(last) + 1]
            status = 206
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Code", {404: "EntryNotFound"}.get(status, ""))
            self.send_header("X-Error-Message", f"no access with {TOKEN}")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.server.sent[name] = self.server.sent.get(name, 0) + len(body)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def hub(tmp_path):
    """A Hub of one repository: the folder that the test saves."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.statuses, server.requests, server.sent = tmp_path / "repo", {}, [], {}
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fit(hub, tmp_path):
    """Run `kvcalc fit` against the hub, with an empty cache and a token that never shows."""

    def run_it(model="org/name", *more, code=0):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "KVCALC_"))
            and not name.lower().endswith("_proxy")
        }
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
        }
        point = ["--gpu", "h100-sxm-80gb", "--reserve", "2GiB", "--seq", "512", "--json", *more]
        done = subprocess.run(
            [sys.executable, "-m", "kvcalc", "fit", model, *point],
            env=kept | own,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert TOKEN not in done.stdout + done.stderr
        assert done.returncode == code, done.stderr
        if code in (0, 1):
            assert done.stderr == ""
            return json.loads(done.stdout)
        assert done.stderr.startswith("kvcalc: ")
        assert done.stderr.count("\n") == 1
        return done.stderr

    return run_it


def source(report):
    """What the line of the weights names as its source."""
    (line,) = [line for line in report["budget"] if line["name"] == "weights"]
    return line["source"]


@pytest.mark.parametrize("shards", [1, 2])
def test_the_hub_is_asked_for_headers(hub, fit, shards):
    """Of a repository whose config was just fetched, headers are read and no values."""
    save(hub.folder, shards=shards)
    report = fit()
    assert report["weights_bytes"] == FILE_BYTES
    files = "header of 1 file" if shards == 1 else "headers of 2 files"
    assert source(report) == f"{files} of org/name on the Hub: 2 tensors"
    fetched = [
        (path, asked) for method, path, asked in hub.requests
        if method == "GET" and path.endswith(".safetensors")
    ]  # fmt: skip
    assert len(fetched) == shards
    assert all(asked == "bytes=0-100000" for _, asked in fetched)
    assert all(f"/resolve/{COMMIT}/" in path for path, _ in fetched)
    hub.requests.clear()
    assert fit()["weights_bytes"] == 2 * NUM_PARAMETERS  # the config is cached now, no file is
    assert hub.requests == []


def test_a_repository_of_other_files_is_computed(hub, fit):
    """Where a repository has no safetensors files, the config answers, and the origin says so."""
    save(hub.folder)
    (hub.folder / "model.safetensors").unlink()
    report = fit()
    assert report["weights_bytes"] == 2 * NUM_PARAMETERS
    assert source(report).startswith("computed, as the repository has no safetensors files: ")


def test_what_does_not_fit_is_asked_once(hub, fit):
    """The changes that are tried where nothing fits take the bytes that the Hub told first."""
    save(hub.folder)
    report = fit("org/name", "--reserve", "79GiB", code=1)
    assert report["weights_bytes"] == FILE_BYTES
    ranged = [
        asked for _, path, asked in hub.requests if asked and path.endswith("model.safetensors")
    ]
    assert len(ranged) == 1


def test_trouble_of_the_hub_is_one_line(hub, fit):
    """A missing shard, a damaged header, a forbidden file and a busy Hub are one line each."""
    save(hub.folder, shards=2)
    shard = hub.folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    assert "lacks safetensors files that its index names" in fit(code=2)
    for data, said in (
        (b"123", "headers that cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "headers that cannot be read"),
        (content.replace(b"BF16", b"BF17"), "has dtype"),
    ):
        shutil.rmtree(hub.folder.parent / "hf")
        shard.write_bytes(data)
        assert said in fit(code=2)
    for status, said in ((403, "refused access to org/name (403)"), (503, "answered 503")):
        shutil.rmtree(hub.folder.parent / "hf")
        hub.statuses = {shard.name: status}
        assert said in fit(code=2)
    shutil.rmtree(hub.folder.parent / "hf")
    (hub.folder / "model.safetensors.index.json").write_text("{}")
    assert "index names no files" in fit(code=2)


def test_a_catalogued_model_asks_nobody(hub, fit):
    """A model of the catalogue is computed, and the Hub hears nothing of it."""
    save(hub.folder)
    assert fit("Qwen/Qwen3-4B", code=0)["weights_bytes"] == found("Qwen/Qwen3-4B").num_bytes
    assert hub.requests == []
