"""The server with arbitrary requests and damaged experiments: an expected status and a one-line error, never 500."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.evidence import Evidence
from tests.input.strategies import KINDS, Damaged, at_most, damaged_json, some_of_each, try_all
from tests.input.test_names_and_links import HOSTILE, LINKS, SECRET, link_out
from tests.page.conftest import TRAIT, attention, logit_lens, projection, write, write_experiment
from tests.page.test_comparisons import OTHER, comparison
from tlcapture.page.contents import RESOURCES
from tlcapture.page.server import listen, page_app, serve

VALID = {"experiment": "exp", "prompt_set": "odd", "prompt_id": "1", "category": "style", "name": "odd",
        "component": "residual", "token": "1", "other": OTHER, "layer": "1", "head": "mean",
        "source": "exp"}  # fmt: skip
ODD = [*HOSTILE, "exp", "odd", "1", "2", "3", "-1", "1e3", "99999999999999999999", "9" * 5000, "0x1", "1.0", "attn_out",
       "style", "raw", "%00", "%2e%2e%2f", "..%2f..%2f", "%ff", "%ed%a0%80", "?x", "#x", "a&b", "\uff11"]  # fmt: skip
SEGMENTS = st.sampled_from(ODD) | st.text(max_size=8)
HOST = "127.0.0.1:8765"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_experiment(tmp_path / "root")
    write(root / "experiments" / "exp" / "analysis" / "compare" / OTHER / "odd" / "1.json", comparison(1))
    return root


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(page_app(root), base_url=f"http://{HOST}")


def encoded(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


def check(client: TestClient, path: str, method: str = "GET") -> int:
    """The response has an expected status and the security headers; a refusal is JSON with a one-line message."""
    answer = client.request(method, f"http://{HOST}{path}")
    assert answer.status_code in (200, 400, 403, 404, 405, 422), (path, answer.status_code)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert SECRET not in answer.text
    assert "Traceback" not in answer.text
    if answer.headers.get("content-type", "").startswith("application/json") and method == "GET":
        content = answer.json()
        if answer.status_code != 200:
            assert set(content) == {"what"}
            assert len(content["what"].splitlines()) == 1
    return answer.status_code


def test_every_route_with_arbitrary_names(client: TestClient, evidence: Evidence) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=at_most(250), deadline=None, database=None)
    @given(st.sampled_from(sorted(RESOURCES)), st.data())
    def attempt(resource: str, data: st.DataObject) -> None:
        changed = data.draw(st.dictionaries(st.sampled_from(sorted(VALID)), SEGMENTS, max_size=2))
        values = {name: encoded(text) for name, text in {**VALID, **changed}.items()}
        status = check(client, f"/api/{RESOURCES[resource].format(**values)}")
        assert changed or status == (422 if resource == "contributions" else 200)  # its raw file is none
        counts[str(status)] += 1

    attempt()
    for status, count in counts.items():
        evidence.tried("server, paths of its API", f"status {status}", count)


@pytest.mark.parametrize("resource", sorted(RESOURCES))
def test_names_with_null_characters(client: TestClient, resource: str) -> None:
    for name in VALID:
        check(client, f"/api/{RESOURCES[resource].format(**{**VALID, name: '%00'})}")


def test_any_path_gets_a_valid_answer(client: TestClient, evidence: Evidence) -> None:
    @settings(max_examples=at_most(150), deadline=None, database=None)
    @given(st.lists(SEGMENTS | st.sampled_from(["api", "static", "sets", "main.js"]), max_size=7), st.booleans())
    def attempt(parts: list[str], raw: bool) -> None:
        made = "/".join(encoded(part) if not raw else quote(encoded(part), safe="%") for part in parts)
        check(client, f"/{made}")

    attempt()
    evidence.tried("server, any path", "GET", at_most(150))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "CONNECT", "X"])
def test_methods_that_write_are_refused(client: TestClient, evidence: Evidence, method: str) -> None:
    for path in (
        "/",
        "/plotly.js",
        "/static/main.js",
        *(f"/api/{path.format(**VALID)}" for path in RESOURCES.values()),
    ):
        takes_notes = method == "POST" and path.endswith("/notes")  # from the page itself alone
        assert check(client, path, method) == (403 if takes_notes else 405)
        evidence.tried("server, methods that write", method)


def test_head_is_supported(client: TestClient) -> None:
    assert client.head("/api/experiments").status_code == 200
    assert client.head("/api/experiments").content == b""


FILES = {
    f"inference/{TRAIT}/residual_stream/odd/1.json": projection(1),
    "analysis/per_token/odd/1_attention.json": attention(),
    "analysis/per_token/odd/1_logit_lens.json": logit_lens(),
    f"analysis/compare/{OTHER}/odd/1.json": comparison(1),
    f"extraction/{TRAIT}/vectors/metadata.json": {"extraction_model": "m", "num_layers": 3, "methods": ["probe"],
                                                  "layers": [0, 1, 2]},
    "extraction/extraction_evaluation.json": {"all_results": [{"trait": TRAIT, "method": "probe", "layer": 1,
                                                               "val_effect_size": 1.5, "val_auroc": 0.9}]},
    f"steering/{TRAIT}/results.json": {"baseline": {"trait_mean": 50.0, "coherence_mean": 100.0}, "runs": [
        {"config": {"layers": [1], "methods": ["probe"], "coefficients": [0.1]},
         "result": {"trait_mean": 60.0, "coherence_mean": 90.0}}]},
}  # fmt: skip
ASKED = [f"/api/{path.format(**VALID)}" for path in RESOURCES.values()]


# `test_json_files` covers the readers on all kinds of damage; these tests cover the server.
@pytest.mark.parametrize(("name", "kind"), some_of_each(FILES, KINDS, 5))
def test_every_resource_over_damaged_files(
    client: TestClient, root: Path, evidence: Evidence, name: str, kind: str
) -> None:
    def attempt(file: Damaged) -> None:
        file.put(root / "experiments" / "exp" / name)
        for path in ASKED:
            check(client, path)

    try_all(evidence, f"server over {name.split('/')[-1]}", damaged_json(FILES[name], kind), attempt, examples=2)


def test_an_additional_field_that_is_nested_too_deeply(client: TestClient, root: Path, evidence: Evidence) -> None:
    for name, content in FILES.items():
        nested = json.dumps({**content, "further": "@"}).replace('"@"', "[" * 900 + "]" * 900)
        (root / "experiments" / "exp" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "experiments" / "exp" / name).write_text(nested)
    as_they_are = {RESOURCES[name].format(**VALID) for name in ("vectors", "comparison", "contributions")}
    assert {path for path in ASKED if check(client, path) == 422} == {f"/api/{path}" for path in as_they_are}
    evidence.tried("server, deep nesting", "an extra field", len(FILES))


@pytest.mark.parametrize("name", [*sorted(FILES), "inference/raw/residual/odd/1.pt", "config.json"])
def test_a_folder_in_place_of_a_file(client: TestClient, root: Path, evidence: Evidence, name: str) -> None:
    path = root / "experiments" / "exp" / name
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    for asked in ASKED:
        check(client, asked)
        evidence.tried("server, a folder where a file is expected", name.split("/")[-1])


def test_a_pipe_in_place_of_a_file_does_not_block(client: TestClient, root: Path, evidence: Evidence) -> None:
    import os

    for name in FILES:
        path = root / "experiments" / "exp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        for asked in ASKED:
            check(client, asked)
            evidence.tried("server, a pipe where a file is expected", name.split("/")[-1])


@pytest.mark.parametrize("where", LINKS)
def test_no_response_contains_a_secret_behind_a_link(
    client: TestClient, root: Path, tmp_path: Path, evidence: Evidence, where: str
) -> None:
    outside = write_experiment(tmp_path / "outside") / "experiments" / "exp"
    for path in outside.rglob("*.json"):
        path.write_text(path.read_text().replace("<b>bold</b>", SECRET).replace('"tiny"', f'"{SECRET}"'))
    link_out(root, outside, where)
    for asked in ASKED:
        check(client, asked)
        evidence.tried("server, links out of the experiment", "GET")


def test_files_outside_of_the_experiments_are_not_served(client: TestClient, root: Path, evidence: Evidence) -> None:
    (root / "secret.json").write_text(f'{{"a": "{SECRET}"}}')
    (root / "experiments" / "secret.json").write_text(f'{{"a": "{SECRET}"}}')
    ways = [
        "secret.json",
        "../secret.json",
        "..%2fsecret.json",
        "%2e%2e/secret.json",
        "....//secret.json",
        "..%5csecret",
    ]
    for way in ways:
        for prefix in ("/", "/api/", "/static/", "/api/exp/", "/api/exp/sets/", "/api/exp/sets/odd/"):
            check(client, f"{prefix}{way}")
            evidence.tried("server, any path", "to a secret file")


# -- hosts, and the real server over a socket ----------------------------------------------------------

BAD_HOSTS = [
    "evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1:8765.evil",
    "evil.example:127.0.0.1", "127.0.0.1:x", "127.0.0.1@evil.example", "evil.example@127.0.0.1", "127.0.0.1:80@evil",
    "localhost.", "127.0.0.1.", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "[::1]", "[::1]:8765",
    "[::ffff:127.0.0.1]", "", " ", "127.0.0.1 evil.example", "127.0.0.1,evil.example", "127.0.0.1/evil.example",
    "127.0.0.1\\evil.example", "127.0.0.1#evil", "127.0.0.1?evil", "127.0.0.1;evil", "xn--127-0", "LOCALHOST.EVIL",
    "www.localhost",
]  # fmt: skip


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_another_host_header_is_refused(client: TestClient, evidence: Evidence, host: str) -> None:
    answer = client.get("/api/experiments", headers={"Host": host})
    assert answer.status_code == 400
    assert "exp" not in answer.text.replace("expected", "")
    assert "content-security-policy" in answer.headers
    evidence.tried("server, Host headers", "refused")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8765", "localhost", "localhost:1", "LOCALHOST:8765"])
def test_loopback_host_names_are_accepted(client: TestClient, evidence: Evidence, host: str) -> None:
    assert client.get("/api/experiments", headers={"Host": host}).status_code == 200
    evidence.tried("server, Host headers", "answered")


@pytest.fixture
def port(root: Path) -> int:
    """The real server, in a daemon thread."""
    listening = listen(None)
    threading.Thread(target=serve, args=(root, listening), daemon=True).start()
    return listening.getsockname()[1]


_END = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
INVALID_REQUESTS = [
    b"", b"\0\0\0", b"GET", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", b"\x16\x03\x01\x02\0",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /api/experiments HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
    b"GET /api/experiments HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
    b"GET http://evil/api/experiments HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
    b"GET /../../etc/passwd" + _END, b"GET /api/%2e%2e/sets/%00" + _END, b"GET /api/\xff\xfe" + _END,
    b"GET /" + b"a" * 100_000 + _END,
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
]  # fmt: skip


def raw_answer(port: int, request: bytes) -> bytes:
    """The response; the server may close the connection if the request is too long."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(request)
        if not request.endswith(b"\r\n\r\n"):
            connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            received += piece
    return received


def test_the_real_server_listens_on_loopback_only_and_survives_invalid_requests(port: int, evidence: Evidence) -> None:
    assert b'"exp"' in raw_answer(port, b"GET /api/experiments" + _END)
    own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in [*own, "127.0.0.2"]:
        with socket.socket() as other:
            assert other.connect_ex((address, port))
        evidence.tried("server, other addresses of the machine", "refused")
    for request in INVALID_REQUESTS:
        answer = raw_answer(port, request)
        assert not answer or answer.split(b" ")[1] in (b"200", b"400", b"404", b"405", b"422"), answer[:80]
        assert b"root:" not in answer
        if b"evil" in request:
            assert b'"exp"' not in answer
        evidence.tried("server, over a socket", "malformed requests")
    assert b'"exp"' in raw_answer(port, b"GET /api/experiments" + _END)
