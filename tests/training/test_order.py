"""The order of rows as a function of position alone, and how a mixture shares positions out among sources."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai.core.errors import ConfigError
from moai.training.mixture import Mixture, MixtureFlags, Shares
from moai.training.order import Order, Permutation, Sampler, Source, sources_of

SOURCES = (
    Source("ko", 0, (500, 700, 300), 1500 * 100),
    Source("en", 1500, (400,), 400 * 200),
    Source("code", 1900, (60, 50), 110 * 50),
)
FIRSTS = (0, 1500, 1900)


def wish(**flags: object) -> MixtureFlags:
    asked: dict[str, object] = {"mixture": (), "stages": (), "epochs": (), "by": "examples", "temperature": 1.0}
    parsed = MixtureFlags.parse(**asked | flags)  # type: ignore[arg-type]
    assert parsed is not None
    return parsed


def mixed(planned_rows: int = 10_000, seed: int = 7, **flags: object) -> Order:
    return Order(SOURCES, seed, mixture=Mixture.of(wish(**flags).resolve(SOURCES, planned_rows), seed))


def which(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(FIRSTS, rows, "right") - 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 4097])
def test_a_permutation_holds_every_number_once(n: int) -> None:
    for key in "abcdefgh":
        assert sorted(Permutation(n, key)(np.arange(n))) == list(range(n))


def test_all_permutations_of_few_come_about_equally_often() -> None:
    """Of 4 there are 24: 2,400 keys give each some 100 times (standard deviation 10)."""
    found = [tuple(Permutation(4, str(key))(np.arange(4)).tolist()) for key in range(2400)]
    counts = [found.count(permutation) for permutation in itertools.permutations(range(4))]
    assert min(counts) > 50
    assert max(counts) < 150


def test_neighbours_are_torn_apart() -> None:
    """The mean distance of two random numbers below n is n / 3."""
    there = Permutation(10_000, "key")(np.arange(10_000))
    assert 0.31 < np.abs(np.diff(there)).mean() / 10_000 < 0.36
    assert abs(np.corrcoef(np.arange(10_000), there)[0, 1]) < 0.03


def test_one_element_of_a_large_permutation_needs_no_others() -> None:
    there = Permutation(10**12, "key")(np.array([0, 1, 10**12 - 1]))
    assert len(set(there.tolist())) == 3
    assert 0 <= there.min() <= there.max() < 10**12


@pytest.mark.parametrize("window", [0, 1, 2, 3, 99])
def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(window: int) -> None:
    order = Order(SOURCES, 42, window)
    epochs = order.rows_at(np.arange(3 * order.rows)).reshape(3, order.rows)
    for epoch in epochs:
        assert sorted(epoch) == list(range(order.rows))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(epochs[0], Order(SOURCES, 43, window).rows_at(np.arange(order.rows)))


def test_a_window_is_finished_before_the_next_begins() -> None:
    order = Order((Source("one", 0, (10,) * 12, 0),), 1, window=3)
    shards = order.rows_at(np.arange(120)).reshape(4, 30) // 10
    assert [len(set(window)) for window in shards.tolist()] == [3] * 4
    assert len({shard for window in shards.tolist() for shard in set(window)}) == 12
    assert all(len(set(window[:10])) > 1 for window in shards.tolist()), "rows of its shards are mixed"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"mixture": ("ko=5", "en=3", "code=2")},
        {"temperature": 3.0, "stages": ("0.3:ko=1",), "epochs": ("code=2.5",)},
    ],
)
def test_a_position_gives_the_same_row_however_it_is_asked_for(flags: dict[str, object]) -> None:
    order = mixed(**flags) if flags else Order(SOURCES, 7)
    rows = order.rows_at(np.arange(9000))
    assert list(itertools.islice(Sampler(order), 9000)) == rows.tolist()
    for position in (0, 1, 17, 1023, 1024, 4095, 4096, 5000, 8999):
        assert order.rows_at(np.array([position])) == [rows[position]]
        assert (
            list(itertools.islice(Sampler(order, position), 5))
            == order.rows_at(np.arange(position, position + 5)).tolist()
        )
    shuffled = np.random.default_rng(0).permutation(9000)
    assert np.array_equal(order.rows_at(shuffled), rows[shuffled])


@pytest.mark.parametrize("position", [0, 1, 777, 2010, 2011, 5000, 9000])
@pytest.mark.parametrize(
    "flags",
    [{}, {"mixture": ("ko=5", "en=3", "code=2")}, {"stages": ("0.3:ko=1", "0.5:en=1,code=1"), "epochs": ("code=2.5",)}],
)
def test_what_is_consumed_is_what_came_before(flags: dict[str, object], position: int) -> None:
    order = mixed(**flags) if flags else Order(SOURCES, 7)
    counts = np.bincount(which(order.rows_at(np.arange(position))), minlength=3)
    assert order.consumed(position) == dict(zip(("ko", "en", "code"), counts.tolist()))


def test_weights_are_met_in_every_block_by_rows_and_by_tokens() -> None:
    rows = which(mixed(mixture=("ko=5", "en=3", "code=2")).rows_at(np.arange(10_240)))
    assert np.abs(np.bincount(rows[:1024]) / 1024 - [0.5, 0.3, 0.2]).max() < 1e-3
    assert np.abs(np.bincount(rows) / 10_240 - [0.5, 0.3, 0.2]).max() < 1e-3
    by_tokens = which(mixed(mixture=("ko=5", "en=3", "code=2"), by="tokens").rows_at(np.arange(10_240)))
    tokens = np.bincount(by_tokens) * [100, 200, 50]
    assert np.abs(tokens / tokens.sum() - [0.5, 0.3, 0.2]).max() < 2e-3


def test_temperature_moves_natural_shares_towards_equal_ones() -> None:
    shares = wish(temperature=2.0).resolve(SOURCES, 0).stages[0][1]
    roots = np.sqrt([1500, 400, 110])
    assert np.allclose(shares, roots / roots.sum())
    assert np.allclose(wish(temperature=1e9).resolve(SOURCES, 0).stages[0][1], 1 / 3, atol=1e-6)


def test_each_source_keeps_its_own_order_and_epochs_inside_a_mixture() -> None:
    order = mixed(mixture=("ko=1", "en=1", "code=1"))
    rows = order.rows_at(np.arange(6000))
    for number, source in enumerate(SOURCES):
        mine = rows[which(rows) == number]
        for start in range(0, len(mine) - source.rows, source.rows):
            assert sorted(mine[start : start + source.rows] - source.first) == list(range(source.rows))


def test_a_limit_of_epochs_is_exact_and_the_others_go_on() -> None:
    order = mixed(mixture=("ko=1", "en=1", "code=1"), epochs=("en=1.5", "code=3"))
    assert order.total is None
    assert order.consumed(50_000) == {"ko": 50_000 - 600 - 330, "en": 600, "code": 330}
    ended = mixed(mixture=("ko=1", "en=1", "code=1"), epochs=("ko=2", "en=1.5", "code=3"))
    assert ended.total == 3000 + 600 + 330
    rows = list(Sampler(ended))
    assert np.bincount(which(np.array(rows))).tolist() == [3000, 600, 330]
    assert set(np.bincount(rows[:], minlength=2010)[:1500]) == {2}


def test_stages_change_the_weights_at_their_row() -> None:
    order = mixed(planned_rows=10_000, mixture=("ko=1",), stages=("0.25:en=1", "0.8:ko=1,en=1"))
    rows = which(order.rows_at(np.arange(12_000)))
    assert set(rows[:2500]) == {0}
    assert set(rows[2500:8000]) == {1}
    assert abs(np.mean(rows[8000:] == 0) - 0.5) < 0.01


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    limits=st.lists(st.sampled_from([None, 0.5, 1, 2.25]), min_size=3, max_size=3),
    cuts=st.lists(st.floats(0.05, 0.95), max_size=2, unique=True).map(sorted),
    seed=st.integers(0, 5),
)
def test_any_mixture_is_whole(weights: list[int], limits: list[float | None], cuts: list[float], seed: int) -> None:
    names = ("ko", "en", "code")
    turned = [
        ",".join(f"{name}={weights[(index + number + 1) % 3]}" for index, name in enumerate(names))
        for number in range(len(cuts))
    ]
    order = mixed(
        planned_rows=4000,
        seed=seed,
        mixture=[f"{name}={weight}" for name, weight in zip(names, weights)],
        stages=[f"{cut}:{text}" for cut, text in zip(cuts, turned)],
        epochs=[f"{name}={limit}" for name, limit in zip(names, limits) if limit],
    )
    end = min(5000, order.total or 5000)
    rows = order.rows_at(np.arange(end))
    for source, limit, number in zip(SOURCES, limits, range(3)):
        times = np.bincount(rows[which(rows) == number] - source.first, minlength=source.rows)
        assert times.max() - times.min() <= 1, "an epoch of a source ends before its next begins"
        assert limit is None or times.sum() <= limit * source.rows
    assert sum(order.consumed(end).values()) == end


def test_a_checkpoint_keeps_the_shares_exactly() -> None:
    shares = wish(mixture=("ko=1", "en=0.3333"), stages=("0.1:code=1",), epochs=("ko=1.5",), by="tokens").resolve(
        SOURCES, 12_345
    )
    assert Shares.from_json(json.loads(json.dumps(shares.to_json()))) == shares


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mixture": ("ko",)}, "mixture = 'ko': expected NAME=NUMBER"),
        ({"mixture": ("ko=x",)}, "'x' is no number"),
        ({"mixture": ("ko=-1",)}, "must be 0 or more"),
        ({"mixture": ("ko=nan",)}, "must be 0 or more"),
        ({"mixture": ("ko=1", "ko=2")}, "names 'ko' twice"),
        ({"mixture": ("ko=0", "en=0")}, "every number is 0"),
        ({"mixture": ("kr=1",)}, "mixture names 'kr', which is none of the sources: ko, en, code"),
        ({"epochs": ("kr=1",)}, "mixture_epochs names 'kr'"),
        ({"mixture": ("ko=1",), "epochs": ("ko=1e-9",)}, "mixture_epochs = ko=1e-09: not one row may be taken"),
        ({"stages": ("0.5:kr=1",)}, "mixture_stages names 'kr'"),
        ({"stages": ("ko=1",)}, "'ko=1' is no number"),
        ({"stages": ("1.5:ko=1",)}, "a share of the run between 0 and 1"),
        ({"stages": ("0.5:ko=1", "0.5:en=1")}, "at or before the stage in front of it"),
    ],
)
def test_a_wrong_mixture_names_the_flag_and_the_way_out(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        wish(**flags).resolve(SOURCES, 100)
    assert message in str(refused.value)


@pytest.mark.parametrize("limited", [("ko=1",), ()])
def test_a_limit_that_leaves_no_row_is_refused(limited: tuple[str, ...]) -> None:
    epochs = tuple(f"{source.name}=1e-9" for source in SOURCES)
    with pytest.raises(ConfigError, match="not one row may be taken"):
        wish(mixture=limited, epochs=epochs).resolve(SOURCES, 100)


def test_the_most_uneven_weights_are_still_numbers() -> None:
    """Powers and quotients that no float holds: the largest weight is left."""
    for flags in (
        {"temperature": 1e-4},
        {"mixture": ("ko=0.2", "en=0.1"), "temperature": 1e-4},
        {"mixture": ("ko=1", "en=1e-320")},
    ):
        shares = wish(**flags).resolve(SOURCES, 100)
        assert sum(shares.stages[0][1]) == pytest.approx(1)
        assert max(shares.stages[0][1]) == pytest.approx(1)
        Mixture.of(shares, 1).place(np.arange(10))


def test_no_flag_is_no_mixture() -> None:
    assert MixtureFlags.parse(mixture=(), stages=(), epochs=(), by="tokens", temperature=1.0) is None


def test_the_sources_of_a_manifest() -> None:
    shards = [
        {"source": "a", "rows": 3, "tokens": 30},
        {"source": "a", "rows": 0, "tokens": 0},
        {"source": "b", "rows": 2, "tokens": 9},
        {"source": "c", "rows": 0, "tokens": 0},
    ]
    assert sources_of(shards) == (Source("a", 0, (3,), 30), Source("b", 3, (2,), 9))
