"""Several launches of the same data at once, on file systems with odd manners: the same bytes for all, nobody crashes,
nothing is left.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import crashes
import pytest

from moai.core.fsops import Weather, look_at, names_in, read_regular

WEATHERS = ("", "late=0.3", "estale", "nolocks", "late=0.3,estale,nolocks")


def launch_together(data: Path, cache: Path, number: int, weather: str, way: str) -> list[str]:
    """Rank 0 and 1 of `number` launches, all at once. What each said; raises unless all of them end well."""
    running = []
    for launch in range(number):
        env = {
            **os.environ,
            "MOAI_TESTING": "1",
            "MOAI_WEATHER": weather,
            "MOAI_LAUNCH_ID": f"{launch}",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        for rank in ("0", "1"):
            words = crashes.command(data, cache, way)
            running.append(
                subprocess.Popen(
                    words,
                    cwd=crashes.ROOT,
                    env={**env, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    said = [process.communicate(timeout=crashes.ENDS_WITHIN)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n\n".join(said)
    return said


def check_round(data: Path, cache: Path, number: int, weather: str, way: str, undisturbed: dict[str, str]) -> None:
    said = launch_together(data, cache, number, weather, way)
    assert crashes.content(cache) == undisturbed
    assert len({text.splitlines()[-1] for text in said}) == 1, "all of them name the same directory"
    assert list((cache / "attempts").iterdir()) == []


@pytest.mark.parametrize("weather", [WEATHERS[0], WEATHERS[-1]])
def test_two_launches_at_once(weather: str, corpus: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    check_round(corpus, tmp_path / "cache", 2, weather, "serial", undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("weather", WEATHERS)
def test_fifty_rounds_of_launches_at_once(
    weather: str, corpus: Path, undisturbed: dict[str, str], tmp_path: Path, record: Callable[..., None]
) -> None:
    chance = random.Random(weather)
    for number in range(50):
        check_round(
            corpus,
            tmp_path / str(number),
            chance.choice((2, 3)),
            weather,
            chance.choice(("serial", "launch")),
            undisturbed,
        )
    record(
        f"2 or 3 launches at once, {weather or 'a local disk'}",
        50,
        "all the same bytes, one directory, nobody crashed, no attempt left",
    )


def test_the_weather_is_as_bad_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    late = Weather.of({"MOAI_TESTING": "1", "MOAI_WEATHER": "late=60"})
    assert late is not None
    with pytest.raises(FileNotFoundError):
        late.look(file)
    stale = Weather.of({"MOAI_TESTING": "1", "MOAI_WEATHER": "estale"})
    assert stale is not None
    with pytest.raises(OSError, match="Stale file handle"):
        stale.look(file)
    stale.look(file)
    assert Weather.of({"MOAI_WEATHER": "late=60"}) is None
    monkeypatch.setattr("moai.core.fsops._weather", Weather.of({"MOAI_TESTING": "1", "MOAI_WEATHER": "estale"}))
    assert read_regular(file, 10) == b"x"
    assert look_at(tmp_path).st_mode
    assert names_in(tmp_path) == ["file"]
    assert names_in(tmp_path / "absent") == []
