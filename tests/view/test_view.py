"""`moai view`: what it shows of a prepared directory, and what it refuses. A real server, and a real browser if any."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
HOSTILE = [
    "<img src=x onerror=document.title='ran'>",
    "<script>document.title='ran'</script>",
    "</pre></main><svg onload=document.title='ran'>",
    "turned \u202e around",
    "nul \u0000 and bell \u0007",
    "javascript:alert(1) [a](javascript:alert(1))",
    "한글 👩‍👩‍👧 자모",
]


@dataclass
class Server:
    port: int
    token: str
    process: subprocess.Popen[str]

    def get(self, path: str, method: str = "GET", **headers: str | None) -> tuple[int, str, dict[str, str]]:
        """As the page asks, with the cookie; `None` leaves a header out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given: dict[str, str | None] = {"Cookie": f"moai_view_{self.port}={self.token}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers={name: value for name, value in given.items() if value is not None})
        with contextlib.closing(connection):
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}

    def look(self, path: str) -> Any:
        status, said, _ = self.get(path)
        assert status == 200, said
        return json.loads(said)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moai import prepare

    folder = tmp_path_factory.mktemp("viewed")
    texts = [f"{text} " + "and some words of a document. " * 20 for text in HOSTILE]
    lines = [json.dumps({"text": text}) for text in [*texts, "short", texts[0], "a long document of many rows, " * 90]]
    (folder / "<b>web<.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    made = prepare(
        dataset=str(folder / "<b>web<.jsonl"),
        tokenizer_path=str(ROOT / "tokenizers" / "demo"),
        seq_len=128,
        packing="bfd_split",
        num_proc=0,
        min_chars=10,
        max_bad_ratio=0.5,
        dedup="exact",
        cache_dir=str(folder / "cache"),
    )
    return made.path


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "moai", "view", str(directory), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{43})\n", process.stdout.readline())
    assert found
    yield Server(int(found[1]), found[2], process)
    process.terminate()
    assert process.wait(10) in (0, -15, 143)
    process.stdout.close()


def test_every_document_is_there_with_its_text_and_its_fate(server: Server) -> None:
    listed = server.look("/api/d/0/documents")
    assert listed["total"] == len(HOSTILE) + 3
    by_reason = {one["reason"]: one["number"] for one in listed["documents"]}
    assert {None, "length.short", "judged"} == set(by_reason)
    kept = [one["number"] for one in listed["documents"] if one["reason"] is None]
    texts = [server.look(f"/api/d/0/document?n={number}")["text"] for number in kept]
    assert sorted(text.partition(" and some")[0] for text in texts[:-1]) == sorted(HOSTILE)
    assert texts[-1].removesuffix("<|endoftext|>") == "a long document of many rows, " * 90
    copy = server.look(f"/api/d/0/document?n={by_reason['judged']}")
    assert copy["from"] == "record"
    assert json.loads(copy["text"])["text"].startswith("<img")
    stays = server.look(f"/api/d/0/document?n={copy['keeper']}")
    assert stays["text"].removesuffix("<|endoftext|>") == json.loads(copy["text"])["text"]
    assert server.look("/api/d/0/documents?reason=kept")["documents"] == [
        one for one in listed["documents"] if one["reason"] is None
    ]
    assert server.look(f"/api/d/0/near?n={kept[1]}&reason=kept") == {"next": kept[2], "previous": kept[0]}


def test_rows_lead_to_their_documents_and_back(server: Server) -> None:
    total = server.look("/api/home")[0]["rows"]
    found: dict[int, Counter[int]] = {}
    for number in range(total):
        for document in server.look(f"/api/d/0/row?n={number}")["documents"]:
            assert document["number"] is not None
            of = server.look(f"/api/d/0/document?n={document['number']}")
            assert document["torn"] or of["first_row"] == number
            ids = [token for piece in document["pieces"] for token in piece["ids"]]
            found.setdefault(document["number"], Counter()).update(ids)
    assert len(found) == len(HOSTILE) + 1
    for number, ids in found.items():
        pieces = server.look(f"/api/d/0/document?n={number}")["pieces_of"]
        assert ids == Counter(token for piece in pieces for token in piece["ids"])


def test_what_was_set_aside_is_listed(server: Server) -> None:
    found = server.look("/api/d/0/quarantine")
    assert found["listed"] == 1
    assert found["records"][0]["file"] == "<b>web<.jsonl"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/d/0/document?n=99", 404),
        ("/api/d/0/document?n=x", 404),
        ("/api/d/0/document", 404),
        ("/api/d/0/secrets", 404),
        ("/api/d/1/documents", 404),
        ("/api/d/..%2f..%2fetc/documents", 404),
        ("/static/../server.py", 404),
        ("/static/%2e%2e%2fserver.py", 404),
        ("/static/index.html", 404),
    ],
)
def test_what_is_not_there_is_one_line(server: Server, path: str, status: int) -> None:
    found, said, _ = server.get(path)
    assert found == status
    assert "Traceback" not in said
    assert said.count("\n") <= 1


@pytest.mark.parametrize(
    ("status", "how"),
    [
        (403, {"Cookie": None}),
        (403, {"Cookie": "moai_view_1=x"}),
        (400, {"Host": "evil.example:80"}),
        (400, {"Host": ""}),
        (403, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"Sec_Fetch_Site": "same-site"}),
        (403, {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}),
    ],
)
def test_whoever_does_not_come_from_the_page_is_refused(server: Server, status: int, how: dict[str, Any]) -> None:
    found, said, headers = server.get("/api/home", **how)
    assert found == status
    assert "tokens" not in said
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_only_reads(server: Server, method: str) -> None:
    assert server.get("/api/home", method)[0] == 403


def test_a_link_from_elsewhere_opens_a_page_without_data(server: Server) -> None:
    found, said, _ = server.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")
    assert found == 200
    assert "tokens" not in said


def test_the_token_goes_into_a_cookie_and_out_of_the_address(server: Server) -> None:
    found, _, headers = server.get(f"/d/0/row/1?token={server.token}&x=1", Cookie=None)
    assert (found, headers["location"]) == (303, "/d/0/row/1?x=1")
    assert "HttpOnly; SameSite=Strict" in headers["set-cookie"]
    assert server.get("/?token=wrong", Cookie=None)[0] == 403
    assert server.get(f"//evil.example/?token={server.token}", Cookie=None)[2]["location"] == "/evil.example/"


def test_every_answer_forbids_scripts_and_keeps_nothing(server: Server) -> None:
    for path in ("/", "/static/app.js", "/api/home", "/api/d/0/documents"):
        headers = server.get(path)[2]
        assert "trusted-types 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    page = (ROOT / "moai/view/static/index.html").read_text()
    assert not re.findall(r"https?://", page + (ROOT / "moai/view/static/style.css").read_text())
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script())


def script() -> str:
    return (ROOT / "moai/view/static/app.js").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "--i-know"),
        (["--port", "70000"], "from 0 to 65,535"),
        (["{nowhere}"], "nowhere"),
    ],
)
def test_what_it_does_not_serve_is_one_line(directory: Path, tmp_path: Path, words: list[str], said: str) -> None:
    given = [word.format(nowhere=tmp_path / "nowhere") for word in words]
    command = [sys.executable, "-m", "moai", "view", str(directory), "--no-browser", *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode not in (0, 1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed (Debian: apt install chromium)")
def test_hostile_text_is_text_in_a_browser(server: Server, tmp_path: Path) -> None:
    assert CHROMIUM
    for path in ("/d/0/documents", "/d/0/row/0", "/d/0/document/0", "/", "/d/0/quarantine"):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
        asked = f"http://127.0.0.1:{server.port}{path}?token={server.token}"
        done = subprocess.run(
            [*command, "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", asked],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        assert f'data-ready="{path}"' in done.stdout, path
        assert "<title>ran" not in done.stdout
        assert "onerror=" not in re.sub(r">[^<]*<", "><", done.stdout), path
        assert "Refused to" not in done.stderr, path
        if path == "/d/0/documents":
            assert "U+202E" in done.stdout
            assert "&lt;img src=x" in done.stdout
            assert "\u202e" not in done.stdout
