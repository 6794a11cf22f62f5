"""Killed at every named place of a preparation, a second run ends with the same bytes, and repeats no more than was in
flight.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import crashes
import pytest
from stamps import wait_until_stamps_prove

SAMPLED = 3
"""Places of each way in the default run; all of them with --long."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = crashes.write_corpus(tmp_path_factory.mktemp("crashes") / "data")
    wait_until_stamps_prove(data)  # or the first run would remember fewer digests than later ones
    return data


@pytest.fixture(scope="session")
def undisturbed(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, str], dict[str, int]]]:
    """Of a way: what it publishes, and the places it passes."""
    known: dict[str, tuple[dict[str, str], dict[str, int]]] = {}

    def of(way: str) -> tuple[dict[str, str], dict[str, int]]:
        if way not in known:
            folder = tmp_path_factory.mktemp(way)
            ran = crashes.run(corpus, folder / "cache", way, folder / "points")
            assert not any(ran.codes), ran.said
            known[way] = crashes.content(folder / "cache"), dict(crashes.places(folder / "points"))
        return known[way]

    return of


def armed(places: dict[str, int], actions: tuple[str, ...]) -> list[str]:
    return [
        f"{name}:{number}={action}"
        for name, times in sorted(places.items())
        for number in range(1, times + 1)
        for action in actions
    ]


@pytest.mark.parametrize("way", crashes.WAYS)
def test_every_way_gives_the_same_bytes_and_passes_every_place(
    way: str, undisturbed: Callable[[str], tuple[dict[str, str], dict[str, int]]]
) -> None:
    content, places = undisturbed(way)
    assert content == undisturbed("serial")[0]
    assert places["shard.begin"] == places["receipt.commit"] >= 5
    assert {
        "file.publish",
        "file.published",
        "directory.publish",
        "directory.published",
        "dataset.manifest",
        "plan.note",
        "status.end",
    } <= places.keys()


@pytest.mark.parametrize("way", crashes.WAYS)
def test_a_sample_of_kills(
    way: str, corpus: Path, undisturbed: Callable[[str], tuple[dict[str, str], dict[str, int]]], tmp_path: Path
) -> None:
    content, places = undisturbed(way)
    wanted = random.Random(way).sample(armed(places, ("kill", "enospc")), SAMPLED)
    outcomes = [
        crashes.crash(corpus, tmp_path / str(n), way, one, content, places["shard.begin"])
        for n, one in enumerate(wanted)
        if (tmp_path / str(n)).mkdir() is None
    ]
    assert sum(outcome.killed for outcome in outcomes) >= SAMPLED - 1
    assert sum(outcome.again for outcome in outcomes) >= 1  # of workers that were killed the driver takes care itself


@pytest.mark.long
@pytest.mark.parametrize("action", ["kill", "exit", "raise", "enospc"])
@pytest.mark.parametrize("way", crashes.WAYS)
def test_every_kill(
    way: str,
    action: str,
    corpus: Path,
    undisturbed: Callable[[str], tuple[dict[str, str], dict[str, int]]],
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    content, places = undisturbed(way)
    killed = again = redone = 0
    wanted = armed(places, (action,))
    for number, one in enumerate(wanted):
        (tmp_path / str(number)).mkdir()
        outcome = crashes.crash(corpus, tmp_path / str(number), way, one, content, places["shard.begin"])
        killed, again, redone = killed + outcome.killed, again + outcome.again, max(redone, outcome.redone)
    record(
        f"{action} at every failpoint, {way}",
        len(wanted),
        f"{killed} taken, {again} needed a second run, all {len(wanted)} the same bytes; at most {redone} shards begun "
        f"again",
    )
