"""The server: loopback only, a strict content security policy, one-line errors."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.page.conftest import TOKENS
from tlcapture.errors import InputError
from tlcapture.page.assets import SCRIPTS
from tlcapture.page.server import listen, page_app


@pytest.fixture
def client(page_root: Path) -> TestClient:
    return TestClient(page_app(page_root), base_url="http://127.0.0.1:8765")


def test_every_response_has_the_security_headers(client: TestClient) -> None:
    for path in ("/", "/static/main.js", "/api/experiments", "/api/exp/sets/none", "/nowhere"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_and_its_scripts_are_served_locally(client: TestClient) -> None:
    page = client.get("/").text
    assert "//" not in page.replace("<!doctype html>", "")
    for name in SCRIPTS:
        assert f'src="static/{name}"' in page
        assert client.get(f"/static/{name}").headers["content-type"].startswith("text/javascript")
    assert client.get("/plotly.js").text.lstrip().startswith("/**")


def test_another_host_name_is_refused(page_root: Path) -> None:
    other = TestClient(page_app(page_root), base_url="http://evil.example:8765")
    assert other.get("/api/experiments").status_code == 400


def test_resources_are_json(client: TestClient) -> None:
    assert client.get("/api/experiments").json()[0]["name"] == "exp"
    assert client.get("/api/exp/sets/odd/1").json()["tokens"] == TOKENS
    assert client.get("/api/exp/sets/odd/1/attention/2").json()["context_size"] == 3
    assert client.get("/api/exp/vectors/style/odd").json()["trait"] == "style/odd"


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("nix/sets/odd", 404, "no experiment 'nix'"),
        ("exp/sets/odd/1/attention/99", 404, "has no token 99"),
        ("exp/sets/odd/1/attention/one", 404, "expected a number"),
        ("exp/sets/odd/1/layers/style/odd/nix", 404, "no component 'nix'"),
        ("%2e%2e/sets/odd", 404, "not a safe file name"),
    ],
)
def test_a_refused_request_is_a_one_line_error(client: TestClient, path: str, status: int, expected: str) -> None:
    answer = client.get(f"/api/{path}")
    assert answer.status_code == status
    assert expected in answer.json()["what"]
    assert "\n" not in answer.json()["what"]


def test_missing_data_is_not_a_failure(client: TestClient) -> None:
    answer = client.get("/api/exp/sets/odd/2/lens")
    assert answer.status_code == 200
    assert answer.json()["absent"]["what"] == "no logit lens of this prompt"


@pytest.mark.parametrize(
    "content", ["[]", '{"attention": [{"token_idx": 1}]}', "\x00", '[{"token_idx": 1}, {"token_idx": 1']
)
def test_a_damaged_file_is_a_one_line_error(client: TestClient, page_root: Path, content: str) -> None:
    folder = page_root / "experiments" / "exp" / "analysis" / "per_token" / "odd"
    (folder / "1_logit_lens.json").write_text(content)
    answer = client.get("/api/exp/sets/odd/1/lens")
    assert answer.status_code in (200, 422)
    assert answer.status_code == 200 or answer.json()["what"]


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2fserver.py", "main.py"])
def test_only_the_files_of_the_page_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_a_port_in_use_is_an_error_unless_it_is_the_default() -> None:
    with listen(None) as first, listen(None) as second:
        assert first.getsockname()[0] == second.getsockname()[0] == "127.0.0.1"
        used = second.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {used}"):
            listen(used)
    assert first.family == socket.AF_INET
