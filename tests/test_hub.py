"""The real huggingface_hub, in a process of its own, against a Hub on the loopback interface."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

from kvcalc.sources.hub_limits import TIMEOUT_SECONDS
from kvcalc.sources.local import MAX_CONFIG_BYTES

TOKEN = "hf_ThisMustNeverBePrinted"  # noqa: S105
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "torch_dtype": "bfloat16",
}
BYTES_AT_1K = 1024 * 2 * 2 * (16 + 16) * 2


class Answer(NamedTuple):
    """One answer to a request for config.json; `hangs` sends nothing until the test is over.

    `headers` take the place of those that a Hub sends, or stand beside them. With `pause_seconds`
    the body comes a byte at a time, for ten seconds at most; `repeated` sends it as often.
    """

    status: int = 200
    error_code: str = ""
    body: bytes = json.dumps(CONFIG).encode()
    hangs: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    pause_seconds: float = 0
    repeated: int = 1


class Hub(ThreadingHTTPServer):
    """Gives its answers one after another, the last one for ever, and keeps the requests.

    `quantization` answers for hf_quant_config.json.
    """

    def __init__(self):
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [Answer()]
        self.quantization = Answer(404, "EntryNotFound")
        self.requests = []
        self.tokens = set()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        """Stop answering; the port refuses connections from now on."""
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Sends the headers that huggingface.co sends; anything but a model's file is not found."""

    def do_GET(self):
        """Answer GET and HEAD."""
        if "/resolve/" not in self.path:
            self.send_error(404)
            return
        self.server.requests.append((self.command, self.path))
        self.server.tokens.add(self.headers["Authorization"])
        answers = self.server.answers
        if self.path.endswith("/hf_quant_config.json"):
            answers = [self.server.quantization]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer.hangs:
            self.server.over.wait(30)
            return
        self.send_response(answer.status)
        if answer.error_code:
            self.send_header("X-Error-Code", answer.error_code)
        if answer.status >= 400:
            self.send_header("X-Error-Message", f"no access with {TOKEN}")
        usual = (
            {}
            if answer.status >= 400
            else {
                "ETag": f'"{hashlib.sha256(answer.body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
            }
        )
        usual |= {"Content-Length": str(len(answer.body)), **dict(answer.headers)}
        for name, value in usual.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(answer)

    def send_body(self, answer):
        """Send what the answer holds, until the other side has gone."""
        until = time.monotonic() + 10
        try:
            for _ in range(answer.repeated):
                pieces = [answer.body]
                if answer.pause_seconds:
                    pieces = [answer.body[at : at + 1] for at in range(len(answer.body))]
                for piece in pieces:
                    self.wfile.write(piece)
                    if self.server.over.wait(answer.pause_seconds) or time.monotonic() > until:
                        return
        except OSError:
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def hub():
    """A Hub that has every model."""
    server = Hub()
    yield server
    if not server.over.is_set():
        server.close()


@pytest.fixture
def kvcalc(hub, tmp_path):
    """Run `kvcalc size` against the hub, with an empty cache and a token that never shows."""

    def size(*arguments, timeout=20, **environment):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "KVCALC_"))
            and not name.lower().endswith("_proxy")
        }
        done = subprocess.run(
            [sys.executable, "-m", "kvcalc", "size", *arguments, "--seq", "1k", "--json"],
            env={
                **kept,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_TOKEN": TOKEN,
                **environment,
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    return size


def complaint(done):
    """The one line of a run that must have failed for bad input."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvcalc: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("revision", "asked"), [(None, "main"), ("v1.0", "v1.0"), ("refs/pr/1", "refs%2Fpr%2F1")]
)
def test_a_model_is_fetched_once(hub, kvcalc, revision, asked):
    """A model is fetched with the user's token, and from then on served by the local cache."""
    arguments = ["org/name", *(["--revision", revision] if revision else [])]
    first = kvcalc(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    report = json.loads(first.stdout)
    assert report["total_bytes"] == BYTES_AT_1K
    assert report["source"]["kind"] == "hub"
    assert f"at {revision or 'main'} ({COMMIT[:12]})" in report["source"]["detail"]
    assert ("GET", f"/org/name/resolve/{asked}/config.json") in hub.requests
    assert {path for _, path in hub.requests} == {
        f"/org/name/resolve/{asked}/config.json",
        f"/org/name/resolve/{COMMIT}/hf_quant_config.json",
    }
    assert hub.tokens == {f"Bearer {TOKEN}"}

    hub.close()
    second = kvcalc(*arguments)
    assert (second.returncode, second.stderr) == (0, "")
    report = json.loads(second.stdout)
    assert report["total_bytes"] == BYTES_AT_1K
    assert report["source"]["kind"] == "hf-cache"
    assert COMMIT in report["source"]["detail"]


@pytest.mark.parametrize(
    ("answer", "arguments", "said"),
    [
        pytest.param(
            Answer(403, "GatedRepo"), [], ["org/name is gated", "hf auth login"], id="gated"
        ),
        pytest.param(
            Answer(401, "GatedRepo"), [], ["org/name is gated", "hf auth login"], id="gated, 401"
        ),
        pytest.param(
            Answer(401, "RepoNotFound"),
            [],
            ["no model org/name on the Hub", "private", "hf auth login", "kvcalc models"],
            id="no repository, 401",
        ),
        pytest.param(
            Answer(404, "RepoNotFound"),
            [],
            ["no model org/name on the Hub", "kvcalc models"],
            id="no repository, 404",
        ),
        pytest.param(
            Answer(404, "RevisionNotFound"),
            ["--revision", "v9"],
            ["org/name has no revision 'v9'", "--revision"],
            id="no revision",
        ),
        pytest.param(
            Answer(404, "EntryNotFound"),
            [],
            ["org/name has no config.json", "give a config.json"],
            id="no config.json",
        ),
        pytest.param(
            Answer(403), [], ["refused access to org/name (403)", "hf auth login"], id="forbidden"
        ),
        pytest.param(Answer(body=b"<html>"), [], ["is not JSON"], id="no JSON"),
        pytest.param(Answer(body=b"[]"), [], ["not a JSON object"], id="no object"),
    ],
)
def test_an_answer_that_will_not_change(hub, kvcalc, answer, arguments, said):
    """Each refusal of the Hub has its own sentence with the remedy, and is not tried again."""
    hub.answers = [answer]
    line = complaint(kvcalc("org/name", *arguments))
    assert [words for words in said if words not in line] == []
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert [method for method, _ in hub.requests].count("HEAD") == (1 if answer.status > 200 else 2)


QUANTIZATION = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": []},
}


def test_a_quantisation_beside_the_config_is_fetched(hub, kvcalc):
    """hf_quant_config.json of the same commit is fetched, kept, and decides the KV dtype."""
    hub.quantization = Answer(body=json.dumps(QUANTIZATION).encode())
    for kind in ("hub", "hf-cache"):
        done = kvcalc("org/name")
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        assert report["source"]["kind"] == kind
        assert report["total_bytes"] == BYTES_AT_1K // 2
        assert any("hf_quant_config.json" in note for note in report["notes"])
        hub.close()


def test_a_config_that_says_its_quantisation_asks_for_no_other(hub, kvcalc):
    """One request less where config.json has a quantization_config of its own."""
    own = CONFIG | {"quantization_config": {"quant_method": "fp8"}}
    hub.answers = [Answer(body=json.dumps(own).encode())]
    done = kvcalc("org/name")
    assert json.loads(done.stdout)["total_bytes"] == BYTES_AT_1K
    assert all(path.endswith("/config.json") for _, path in hub.requests)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(503), "answered 503"),
        (Answer(body=b"<html>"), "hf_quant_config.json is not JSON"),
        (Answer(body=b"[]"), "not a JSON object"),
        (Answer(body=b"{}"), "has no quant_algo"),
    ],
)
def test_a_quantisation_that_cannot_be_read_is_one_line(hub, kvcalc, answer, said):
    """Trouble with hf_quant_config.json ends like that with config.json; nothing is guessed."""
    hub.quantization = answer
    assert said in complaint(kvcalc("org/name"))


def test_a_mirror_that_names_no_code_has_no_such_file(hub, kvcalc):
    """Any 404 for hf_quant_config.json means that there is none."""
    hub.quantization = Answer(404)
    done = kvcalc("org/name")
    assert json.loads(done.stdout)["total_bytes"] == BYTES_AT_1K


def test_a_misspelt_name_is_corrected(hub, kvcalc):
    """When the Hub has no such model, a catalogue name that is close to it is suggested."""
    hub.answers = [Answer(404, "RepoNotFound")]
    line = complaint(kvcalc("meta-llama/Meta-Lama-3-8B"))
    assert "Did you mean meta-llama/Meta-Llama-3-8B" in line


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, ["rate limit", "wait some minutes", "hf auth login"]),
        (503, ["answered 503", "try again later", "config.json"]),
    ],
)
def test_an_answer_that_may_change(hub, kvcalc, status, said):
    """A busy Hub is asked three times before its trouble is told."""
    hub.answers = [Answer(status)]
    line = complaint(kvcalc("org/name"))
    assert [words for words in said if words not in line] == []
    assert len(hub.requests) == 3


def test_trouble_that_passes(hub, kvcalc):
    """Two server errors before the answer are not noticed."""
    hub.answers = [Answer(503), Answer(503), Answer()]
    done = kvcalc("org/name")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["total_bytes"] == BYTES_AT_1K


def test_no_connection(hub, kvcalc):
    """A Hub that cannot be reached is told with the two ways out."""
    hub.close()
    line = complaint(kvcalc("org/name"))
    assert "cannot reach the Hub for org/name" in line
    assert "go online, or give a config.json file" in line


def test_a_hub_that_hangs(hub, kvcalc):
    """A Hub that accepts a request and never answers is given up after HF_HUB_ETAG_TIMEOUT."""
    hub.answers = [Answer(hangs=True)]
    line = complaint(kvcalc("org/name", timeout=9, HF_HUB_ETAG_TIMEOUT="1"))
    assert "cannot reach the Hub for org/name" in line


def test_offline(hub, kvcalc):
    """With HF_HUB_OFFLINE nothing is asked, and the message says which variable to unset."""
    line = complaint(kvcalc("org/name", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set: unset it, or give a config.json file" in line
    assert hub.requests == []


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "127.0.0.1"}, "HF_ENDPOINT"),
        ({"HF_ENDPOINT": "http://["}, "HF_ENDPOINT"),
        ({"HF_ENDPOINT": "http://127.0.0.1:99999"}, "HF_ENDPOINT"),
        ({"HF_TOKEN": "hf_sécret"}, "HF_TOKEN"),
        ({"HF_HUB_ETAG_TIMEOUT": "soon"}, "HF_HUB_ETAG_TIMEOUT 'soon'"),
        ({"HF_HUB_ETAG_TIMEOUT": "-1"}, "HF_HUB_ETAG_TIMEOUT '-1'"),
        ({"HF_HUB_ETAG_TIMEOUT": "9" * 30}, "HF_HUB_ETAG_TIMEOUT '999"),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "1.5"}, "HF_HUB_DOWNLOAD_TIMEOUT '1.5'"),
        ({"HTTP_PROXY": "socks9://x"}, "HTTP_PROXY"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be(hub, kvcalc, environment, said):
    """A broken setting of huggingface_hub is named, instead of blaming the network."""
    line = complaint(kvcalc("org/name", **environment))
    assert said in line
    assert "sécret" not in line
    assert hub.requests == []


@pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be(hub, kvcalc, tmp_path, name):
    """A cache in the home of an unknown user, or behind links that go round in circles, is told
    before anything is asked; where no cache is needed it harms nothing.
    """
    (tmp_path / "round").symlink_to("about")
    (tmp_path / "about").symlink_to("round")
    others = {"HF_HOME": ""} if name == "XDG_CACHE_HOME" else {}
    for value in ("~nobody-has-this-name/x", str(tmp_path / "round")):
        assert name in complaint(kvcalc("org/name", **others, **{name: value}))
        assert kvcalc("llama-3-8b", **others, **{name: value}).returncode == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    "location",
    ["http://[", "http://127.0.0.1:99999/x", "ftp://127.0.0.1/x", "http://", "//[", "\x80", ":"],
)
@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_that_leads_nowhere(hub, kvcalc, location, status):
    """A redirect to what is no address is trouble of the Hub, told in one line."""
    hub.answers = [Answer(status, headers=(("Location", location),))]
    line = complaint(kvcalc("org/name", timeout=40))
    assert "org/name" in line
    assert "config.json" in line


def timed(kvcalc, **environment):
    """The complaint of a run, and the seconds that it took."""
    began = time.monotonic()
    line = complaint(kvcalc("org/name", timeout=60, **environment))
    return line, time.monotonic() - began


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(pause_seconds=0.05, repeated=9), id="trickles"),
        pytest.param(Answer(pause_seconds=9), id="stops"),
        pytest.param(Answer(hangs=True), id="never begins"),
        pytest.param(Answer(503, headers=(("Retry-After", "99"),)), id="is busy"),
    ],
)
@pytest.mark.parametrize("first", [Answer(), None], ids=["body", "all"])
def test_a_download_ends_in_time(hub, kvcalc, answer, first):
    """However a Hub delays its answer, kvcalc is done in the time that is allowed."""
    hub.answers = [first, answer] if first else [answer]
    line, seconds = timed(kvcalc, KVCALC_HUB_TIMEOUT="2")
    assert "org/name" in line
    assert "config.json" in line
    assert seconds < 2 + 4  # and what Python and huggingface_hub take to start


def test_the_time_of_a_download_is_told_and_checked(hub, kvcalc):
    """The message names the variable that allows more, and a value that is none is refused."""
    hub.answers = [Answer(hangs=True)]
    line, _ = timed(kvcalc, KVCALC_HUB_TIMEOUT="1")
    assert "in 1 seconds: try again, raise KVCALC_HUB_TIMEOUT" in line
    asked = len(hub.requests)
    for value in ("0", "-1", "soon", "1.5", "9" * 30):
        assert f"KVCALC_HUB_TIMEOUT '{value[:20]}" in timed(kvcalc, KVCALC_HUB_TIMEOUT=value)[0]
    assert len(hub.requests) == asked


def test_a_download_takes_under_half_a_minute_by_default():
    """Without the variable a Hub has less than 30 seconds in all."""
    assert TIMEOUT_SECONDS < 30


LARGE = str(MAX_CONFIG_BYTES + 1)


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([Answer(headers=(("Content-Length", LARGE),))], id="as HEAD says"),
        pytest.param([Answer(headers=(("X-Linked-Size", LARGE),))], id="as another field says"),
        pytest.param([Answer(headers=(("Content-Length", "9" * 15),))], id="petabytes"),
        pytest.param(
            [
                Answer(),
                Answer(),
                Answer(body=b" " * 2**20, repeated=17, headers=(("Content-Length", LARGE),)),
            ],
            id="as GET says",
        ),
        pytest.param(
            [
                Answer(headers=(("Content-Length", ""), ("Transfer-Encoding", "identity"))),
                Answer(headers=(("Content-Length", ""),)),
                Answer(body=b" " * 2**20, repeated=40, headers=(("Content-Length", ""),)),
            ],
            id="as nobody says",
        ),
    ],
)
def test_a_download_that_is_too_large(hub, kvcalc, tmp_path, answers):
    """A config larger than any is refused, by what the Hub says of it or while it is read."""
    hub.answers = answers
    line, _ = timed(kvcalc)
    assert "larger than 16,777,216 bytes" in line
    kept = sum(path.stat().st_size for path in (tmp_path / "hf").rglob("*") if path.is_file())
    assert kept <= MAX_CONFIG_BYTES


def test_a_body_that_is_compressed(hub, kvcalc):
    """What would be larger unpacked than it was on the way is not asked for, and not taken."""
    hub.answers = [Answer(), Answer(), Answer(headers=(("Content-Encoding", "gzip"),))]
    assert "is compressed" in timed(kvcalc)[0]


@pytest.mark.parametrize("name", ["X-Repo-Commit", "ETag", "X-Linked-ETag"])
@pytest.mark.parametrize("value", ["../../../outside", '"a/b"', "..", "a b", "x" * 300, "\xe9"])
def test_a_header_field_that_is_no_word(hub, kvcalc, tmp_path, name, value):
    """Fields that huggingface_hub makes paths of are plain words, or nothing is written."""
    hub.answers = [Answer(headers=((name, value),))]
    line, _ = timed(kvcalc)
    assert "org/name" in line
    assert "no plain word" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
