"""Files that are something else than they are called, by their first bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from moai.core.errors import TooManyBadRecords
from moai.sources.discover import Input, discover
from moai.sources.mistaken import without_mistaken

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{4:064d}\nsize 1037962819\n"
S3 = "<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
HTML = "<!DOCTYPE html>\n<html><head><title>{}</title></head><body>text</body></html>"
GOOD = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(5))
MISTAKEN = {
    "lfs": (LFS, "a Git LFS pointer: run `git lfs pull`"),
    "annex": ("/annex/objects/SHA256E-s10--aa.jsonl\n", "a git-annex pointer: run `git annex get`"),
    "s3": (S3, "an error page of a server: AccessDenied; fetch the file again"),
    "azure": ("\ufeff<Error>\n<Code>AuthenticationFailed</Code>", "an error page of a server: AuthenticationFailed"),
    "html": (HTML.format("404 Not Found"), "an HTML page: 404 Not Found; fetch the file again"),
    "login": ("\n" + HTML.format("Sign in"), "an HTML page: Sign in"),
    "github": ("404: Not Found", "an answer of a server: 404: Not Found"),
    "hub": ('{"error":"Repository not found"}', 'an answer of a server: {"error":"Repository not found"}'),
    "api": ('{"message": "Not Found", "documentation_url": "https://x", "status": "404"}', "an answer of a server"),
    "django": ('{"detail":"Authentication credentials were not provided.","code":403}', "an answer of a server"),
}
DATA = {
    "one.jsonl": '{"message": "a good day", "type": "greeting"}\n',
    "chat.json": '{"messages": [], "code": 3}',
    "a.txt": "version https of all\n",
    "b.txt": "404 days later it ended, and nobody knew that it would.\n",
    "c.txt": '<?xml version="1.0"?><article>text</article>',
    "d.csv": "error,text\n1,2\n",
    "e.jsonl": '{"error": "x", "text": "a log line"}\n',
}


def inputs(folder: Path, files: dict[str, str]) -> list[Input]:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [given for name in files for given in discover(str(folder / name))]


@pytest.mark.parametrize("ending", ["jsonl", "json", "txt", "csv", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("what", MISTAKEN)
def test_pointers_and_error_pages_are_called_what_they_are(tmp_path: Path, what: str, ending: str) -> None:
    text, said = MISTAKEN[what]
    given = inputs(tmp_path / "data", {"good.jsonl": GOOD, f"bad.{ending}": text})
    with pytest.raises(TooManyBadRecords) as failed:
        without_mistaken(given, 0.4, flag="--max_bad_files")
    assert f"1 of 2 files hold no data: bad.{ending} is {said}" in str(failed.value)
    assert str(failed.value).endswith("--max_bad_files 0.5")
    with pytest.raises(TooManyBadRecords, match="nothing is left of it"):
        without_mistaken(given, 0.5)


def test_data_that_looks_like_them_is_data(tmp_path: Path) -> None:
    given = tuple(inputs(tmp_path / "data", DATA))
    assert without_mistaken(given, 0) == given
    folder = tmp_path / "pages"
    inputs(folder, {f"{n}.txt": HTML.format(f"My page {n}") for n in range(3)})  # texts that are pages, all of them
    assert without_mistaken(discover(str(folder)), 0) == tuple(discover(str(folder)))
    (folder / "z.txt").write_text("text\n")
    with pytest.raises(TooManyBadRecords, match=r"3 of 4 files hold no data: 0\.txt is an HTML page"):
        without_mistaken(discover(str(folder)), 0)


def test_a_share_that_is_allowed_leaves_them_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs(tmp_path / "data", {f"{n}.txt": LFS if n in (2, 3) else S3 if n == 5 else "words\n" for n in range(10)})
    (given,) = discover(str(tmp_path / "data"))
    with caplog.at_level(logging.WARNING), pytest.raises(TooManyBadRecords):
        without_mistaken([given], 0.29)
    (left,) = without_mistaken([given], 0.3)
    assert [file.name for file in left.files] == [f"{n}.txt" for n in (0, 1, 4, 6, 7, 8, 9)]
    assert left.bad == {"a Git LFS pointer": ("2.txt", "3.txt"), "an error page of a server": ("5.txt",)}
    assert "3 of 10 files hold no data: 2.txt is a Git LFS pointer" in caplog.text
