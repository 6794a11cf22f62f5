"""`Prefetch`: reading, encoding and writing beside each other, bounded, in order, and no thread outlives its
end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from moai.core.errors import Interrupted
from moai.reembedding.prefetch import Prefetch, Seconds


def numbers(count: int, seen: list[int] | None = None) -> Iterator[int]:
    for number in range(count):
        if seen is not None:
            seen.append(number)
        yield number


def test_order_is_kept_through_two_stages() -> None:
    doubled = (2 * number for number in Prefetch(numbers(500)))
    assert list(Prefetch(doubled, depth=3)) == [2 * number for number in range(500)]


def test_a_slow_consumer_holds_the_producer_back() -> None:
    """`depth` wait in the queue, one in the producer's hand; a pool's imap would have pulled all of them."""
    seen: list[int] = []
    stage = Prefetch(numbers(10_000, seen), depth=2)
    assert next(stage) == 0
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    threading.Event().wait(0.3)  # time in which an unbounded producer would have run away
    assert len(seen) == 4
    stage.close()


def test_stages_run_beside_each_other() -> None:
    """The consumer waits inside its turn for the producer's next one: without a second thread that would be for
    ever.
    """
    made = [threading.Event() for _ in range(3)]

    def produce() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    for number in Prefetch(produce()):
        if number + 1 < len(made):
            assert made[number + 1].wait(timeout=10)


def test_an_error_comes_out_behind_what_was_made_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    stage = Prefetch(Prefetch(failing()))
    assert [next(stage), next(stage)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(stage)


def test_closing_it_ends_every_thread_and_closes_the_source() -> None:
    before, closed = threading.active_count(), []

    def endless() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.append(threading.current_thread().name)

    inner = Prefetch(endless())
    outer = Prefetch(number + 1 for number in inner)
    for number in outer:
        if number > 10:
            break
    outer.close()
    inner.close()
    deadline = time.monotonic() + 10
    while (threading.active_count() > before or not closed) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert threading.active_count() == before
    assert closed == ["prefetch"]


def test_after_a_stop_what_is_made_is_given_and_nobody_waits_for_what_takes_long() -> None:
    stop, over = threading.Event(), threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        yield 2
        over.wait(timeout=60)

    stage = Prefetch(slow(), stop=stop)
    assert next(stage) == 1
    deadline = time.monotonic() + 10
    while stage._ready.empty() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    stop.set()
    assert list(stage.rest(within_seconds=0.5))[:1] == [2]
    with pytest.raises(Interrupted):
        next(stage)
    stage.close(within_seconds=0.1)
    over.set()


def test_while_it_waits_it_has_time_for_a_heartbeat() -> None:
    beaten = threading.Event()

    def slow() -> Iterator[int]:
        assert beaten.wait(timeout=10)
        yield 1

    assert list(Prefetch(slow(), idle=beaten.set, idle_seconds=0.01)) == [1]


def test_seconds_of_a_stage_leave_out_the_stages_inside_it() -> None:
    seconds = Seconds()
    began = time.monotonic()
    with seconds.of("outer"):
        with seconds.of("inner"):
            threading.Event().wait(0.2)
        threading.Event().wait(0.01)
    whole = time.monotonic() - began
    assert seconds.by_stage["inner"] >= 0.2
    assert 0.01 <= seconds.by_stage["outer"] <= whole - seconds.by_stage["inner"] + 0.001
