"""Killed at the named places of all phases of judging, a second run ends with the same documents and bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import crashes
import pytest
from stamps import wait_until_stamps_prove

pytest.importorskip("rensa")
pytest.importorskip("numba")
SAMPLED = 1
"""Places in the default run; all of them with --long."""
Undisturbed = Callable[[str], tuple[dict[str, str], dict[str, int]]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, five shards, of which a third are near copies across both."""
    path, rng = tmp_path_factory.mktemp("judged") / "data", random.Random(7)
    path.mkdir()
    texts = [" ".join(f"w{rng.randrange(9000)}" for _ in range(100)) for _ in range(90)]
    texts += [text.replace(text.split()[50], "other") for text in texts[:40]]
    rng.shuffle(texts)
    for name, some in (("a", texts[:50]), ("b", texts[50:])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    wait_until_stamps_prove(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    known: dict[str, tuple[dict[str, str], dict[str, int]]] = {}

    def of(way: str) -> tuple[dict[str, str], dict[str, int]]:
        if way not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            ran = crashes.run(corpus, folder / "cache", way, folder / "points")
            assert not any(ran.codes), ran.said
            known[way] = crashes.content(folder / "cache"), dict(crashes.places(folder / "points"))
        return known[way]

    return of


def killed(way: str, corpus: Path, undisturbed: Undisturbed, folder: Path, number: int | None) -> int:
    """At so many places of all phases, or at all. Returns how often it took a second run."""
    content, places = undisturbed(way)
    assert content == undisturbed("judged")[0]
    assert {"stage.decided", "quality.decided", "receipt.commit"} <= places.keys()
    armed = [f"{name}:{at}=kill" for name, times in sorted(places.items()) for at in range(1, times + 1)]
    again = 0
    for place in armed if number is None else random.Random(way).sample(armed, number):
        own = folder / place.replace("=", "-")
        own.mkdir()
        outcome = crashes.crash(corpus, own, way, place, content, places["shard.begin"])
        again += outcome.again
    return again


def test_a_sample_of_kills_while_judging(corpus: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    assert json.loads(undisturbed("judged")[0]["manifest.json"])["records"]["kept"] == 90
    assert killed("judged", corpus, undisturbed, tmp_path, SAMPLED) >= 1


@pytest.mark.long
@pytest.mark.parametrize("way", crashes.JUDGED)
def test_every_kill_while_judging(way: str, corpus: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    assert killed(way, corpus, undisturbed, tmp_path, None) > 50
