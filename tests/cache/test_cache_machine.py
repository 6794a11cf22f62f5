"""One cache under everything that happens to caches, in any order: what comes out of it is right, or an error of moai
says why not.

Steps: preparations under three configurations, ended anywhere by an error; bytes changed, files cut, removed, exchanged
and copied over one another, FIFOs and links in their places; garbage; input that changes; gc, verify, repair. What is
right is known from an undisturbed preparation of the same input in a fresh cache.

What is promised is modelled exactly. A directory opens if its manifest is the one that was written and its files have
their sizes; so a byte that was changed in place, in a published file, is found by `verify` and mended by `repair`, but
passes `open`. Nothing else passes: no receipt, no finished shard, no digest of a range that was damaged ever leads to
other data in a new directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disturbed_cache import (
    CONFIGS,
    INPUT,
    ODD,
    TOKENIZER,
    VARIANTS,
    Input,
    Records,
    Reference,
    armed,
    input_bytes,
    odd,
    places_passed,
    prepare,
    reference,
    regular,
)
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from moai.cache.gc.collect import GcConfig, collect
from moai.core import failpoints, files
from moai.core.errors import ConfigError, DamagedError, MoaiError, StorageError
from moai.prepared.manifest import MANIFEST, Prepared
from moai.prepared.verify import verify
from moai.pretraining import recipe as pretraining
from moai.pretraining.repair import repair

AREAS = (
    "datasets/*/*",
    "datasets/*/manifest.json",
    "shards/*.arrow",
    "shards/*.json",
    "shards/*.bad.jsonl",
    "ranges/*/*",
    "plans/*",
    "**/*",
)
"""Where damage is done, each as likely as the others; the last is all of it."""
FOLDERS = ("datasets", "datasets/*", "shards", "ranges", "plans", "transforms", "**/*")

End = tuple[int, str] | None
ENDS: st.SearchStrategy[End] = st.none() | st.tuples(st.integers(0, 199), st.sampled_from(["raise", "enospc"]))
"""Where a command is ended by an error: the number of a failpoint that it passes, and the error."""


class Cache(RuleBasedStateMachine):
    """`known` directories by name, `manifests` as they were written, `flipped` published files that were changed in
    place since.
    """

    places: dict[str, list[tuple[str, int]]] = {}  # noqa: RUF012  of each command, the failpoints it passes
    steps = 0
    outcomes: dict[str, int] = {}  # noqa: RUF012  counted over all examples

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="moai-machine-"))
        self.cache = self.root / "cache"
        (self.root / "data").mkdir()
        self.state: Input = ("absent",) * len(INPUT)
        for file in INPUT:
            self._write_input(file, "a bad line" if file == "b.jsonl" else "whole")
        self.known: dict[str, Reference] = {}
        self.manifests: dict[str, bytes] = {}
        self.flipped: set[Path] = set()
        self.current: str | None = None
        """The directory that the newest plan leads to, while neither plans nor input changed."""
        self.last = "A"

    def teardown(self) -> None:
        try:
            self._prepare(self.last, heed=True)
            self.all_directories_are_right_or_do_not_open()
            self._publish_again()
            self.all_directories_are_right_or_do_not_open()
        finally:
            shutil.rmtree(self.root)

    # ---- steps

    @initialize(name=st.sampled_from(sorted(CONFIGS)))
    def first_launch(self, name: str) -> None:
        self._count("prepare")
        self._prepare(name, heed=False)

    @rule(name=st.none() | st.sampled_from(sorted(CONFIGS)), heed=st.booleans(), end=ENDS)
    def prepare(self, name: str | None, heed: bool, end: End) -> None:
        """Without a name, a second launch of what was prepared last."""
        with self._ended("prepare", end):
            self._prepare(name or self.last, heed=heed and not end)

    @rule(
        area=st.sampled_from(AREAS),
        number=st.integers(0, 999),
        at=st.integers(0, 10**6),
        bits=st.integers(1, 255) | st.sampled_from([1, 2, 4, 8, 16]),
    )
    def change_a_byte(self, area: str, number: int, at: int, bits: int) -> None:
        if path := self._file(area, number):
            self._count("byte changed")
            data = bytearray(path.read_bytes())
            if data:
                data[at % len(data)] ^= bits
                with open(path, "r+b") as file:  # in place: whatever else links the file is damaged too
                    file.write(data)
                self._notice_flip(path)

    @rule(area=st.sampled_from(AREAS), number=st.integers(0, 999), share=st.floats(0, 1))
    def truncate(self, area: str, number: int, share: float) -> None:
        if path := self._file(area, number):
            self._count("file cut")
            os.truncate(path, int(path.stat().st_size * share))

    @rule(area=st.sampled_from(AREAS), number=st.integers(0, 999))
    def delete_a_file(self, area: str, number: int) -> None:
        if path := self._file(area, number):
            self._count("file deleted")
            path.unlink()

    @rule(area=st.sampled_from(AREAS), number=st.integers(0, 999), kind=st.sampled_from(ODD))
    def put_something_odd(self, area: str, number: int, kind: str) -> None:
        if path := self._file(area, number):
            self._count("odd file")
            note(f"{kind} instead")
            odd(path, kind)

    @rule(area=st.sampled_from(AREAS[:-1]), numbers=st.tuples(st.integers(0, 999), st.integers(0, 999)))
    def copy_over_another(self, area: str, numbers: tuple[int, int]) -> None:
        one, other = (self._file(area, number) for number in numbers)
        if one and other and one != other:
            self._count("file copied over another")
            data = one.read_bytes()
            other.unlink()
            other.write_bytes(data)
            self.flipped |= {other} if self._is_published(other) else set()

    @rule(
        area=st.sampled_from((*AREAS[:-1], "datasets/*")), numbers=st.tuples(st.integers(0, 999), st.integers(0, 999))
    )
    def exchange(self, area: str, numbers: tuple[int, int]) -> None:
        """Files, or whole directories."""
        one, other = (self._file(area, number, Path.exists) for number in numbers)
        if one and other and one != other and one.is_dir() == other.is_dir():
            self._count("exchanged")
            aside = self.root / "aside"
            one.rename(aside)
            other.rename(one)
            aside.rename(other)
            self.flipped |= {path for path in (one, other) if self._is_published(path)}

    @rule(folders=st.sampled_from(FOLDERS), number=st.integers(0, 999))
    def delete_a_directory(self, folders: str, number: int) -> None:
        found = sorted(path for path in self.cache.glob(folders) if path.is_dir())
        if found:
            self._count("directory deleted")
            path = found[number % len(found)]
            note(f"deleted {path.relative_to(self.cache)}")
            self._touches_plans(path)
            shutil.rmtree(path)

    @rule()
    def publish_again(self) -> None:
        self._count("published anew from finished shards")
        self._publish_again()

    @rule(
        folder=st.sampled_from(
            [
                "",
                "shards",
                "ranges/ab",
                "plans",
                "transforms",
                "datasets",
                "attempts",
                "locks",
                "uses",
                "launches",
                "distrusted",
                "in",
            ]
        ),
        name=st.sampled_from(["garbage", "garbage.json", "garbage.arrow", "garbage.bad.jsonl", ".garbage.json.tmp"]),
        data=st.sampled_from(
            [
                b"",
                b"{}",
                b"[1]",
                b"null",
                b'{"version": 1}',
                b'{"fields": {}}',
                b'{"made_by": {}, "because": ""}',
                b"\xff\x00" * 50,
                b"[" * 3000,
            ]
        ),
    )
    def garbage(self, folder: str, name: str, data: bytes) -> None:
        """`in`: into a published directory."""
        published = self._published()
        place = published[0] if folder == "in" and published else self.cache / folder
        if place.is_dir():
            self._count("garbage")
            (place / name).write_bytes(data)

    @rule(file=st.sampled_from(INPUT), variant=st.sampled_from(VARIANTS), old_time=st.booleans())
    def change_input(self, file: str, variant: str, old_time: bool) -> None:
        self._count("input changed")
        path = self.root / "data" / file
        before = path.stat().st_mtime_ns if path.exists() else None
        self._write_input(file, variant)
        if old_time and before is not None and path.exists():
            os.utime(path, ns=(before, before))
        self.current = None

    @precondition(lambda self: self.cache.exists())
    @rule(max_bytes=st.none() | st.integers(0, 2_000_000), end=ENDS)
    def gc(self, max_bytes: int | None, end: End) -> None:
        """Wherever it ends, no record is lost that serves a shard which stays; where it does not end early, no other is
        left.
        """
        before, said = Records.remembered(self.cache), ["kept      all: ended by an error"]
        with self._ended("gc", end):
            said = self._gc(max_bytes)
        needed, left = Records.of_shards(self.cache), Records.remembered(self.cache)
        assert before.within(needed) == left.within(needed)
        assert any(line.startswith("kept") for line in said) or left == left.within(needed)

    @rule()
    def verify(self) -> None:
        self._count("verify")
        for directory in self._published():
            said = list(verify(directory, full=True))
            whole = self._opens(directory) and self._differing(directory) == [] and self._unlisted(directory) == []
            assert all(check.ok for check in said) == whole, said

    @rule(number=st.integers(0, 9), end=ENDS)
    def repair(self, number: int, end: End) -> None:
        with self._ended("repair", end):
            self._repair(number)

    # ---- what must hold after each of them

    @invariant()
    def all_directories_are_right_or_do_not_open(self) -> None:
        published = self._published()
        for gone in self.manifests.keys() - {directory.name for directory in published}:
            self._forget(gone)
        for directory in published:
            assert directory.name in self.known, f"{directory.name}: no input gives this"
            if directory.name not in self.manifests:
                self.manifests[directory.name] = regular(directory / MANIFEST) or b""
            if not self._opens(directory):
                with pytest.raises(DamagedError):
                    Prepared.open(directory)
                continue
            assert Prepared.open(directory).content == self.known[directory.name].content
            differing = {directory / name for name in self._differing(directory)}
            assert differing <= self.flipped, "other bytes, and nobody changed them there"
            self.flipped -= {path for path in self.flipped if path.parent == directory} - differing

    # ---- how

    def _prepare(self, name: str, *, heed: bool) -> None:
        """Exactly what is right; an error only where nothing is to be prepared or the directory itself is damaged. With
        `heed`, do then as it says.
        """
        self.last = name
        right = reference(self.state, name)
        if right is None:
            with pytest.raises(MoaiError):
                prepare(self.root, name)
            self.outcomes["nothing to prepare"] = self.outcomes.get("nothing to prepare", 0) + 1
            return
        self.known[right.name] = right
        directory = self.cache / "datasets" / right.name
        damaged = directory.exists() and not self._opens(directory)
        prepared, refused = None, None
        try:
            prepared = prepare(self.root, name)
        except DamagedError as error:
            refused = str(error)
        if refused is not None:
            assert damaged, refused
            assert re.search(rf"{directory}.*remove .* and prepare again", refused)
            self.outcomes["refused"] = self.outcomes.get("refused", 0) + 1
            if not heed:
                return
            shutil.rmtree(directory)
            self._forget(directory.name)
            prepared = prepare(self.root, name)
        assert prepared is not None
        assert prepared.path == directory
        assert prepared.content == right.content
        self.current = right.name
        kind = "found" if prepared.manifest["run"]["shards_made"] == 0 else "made"
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1

    def _publish_again(self) -> None:
        """What may be deleted, is: all then follows from finished shards and remembered digests, whatever has become of
        them.
        """
        for folder in ("datasets", "plans"):
            shutil.rmtree(self.cache / folder, ignore_errors=True)
        for name in list(self.manifests):
            self._forget(name)
        self.current = None
        self._prepare(self.last, heed=False)

    def _gc(self, max_bytes: int | None) -> list[str]:
        said = ["kept      all: there is no cache"]
        before = {directory.name for directory in self._published()}
        with contextlib.ExitStack() as stack:
            if not (self.cache / "shards").exists() and not (self.cache / "datasets").exists():
                stack.enter_context(pytest.raises(ConfigError, match="holds no cache"))
            said = list(collect(GcConfig(cache_dir=str(self.cache), older_than=0.0, max_bytes=max_bytes)))
        if max_bytes is None and self.current in before:
            assert (self.cache / "datasets" / str(self.current)).exists(), "in no way superseded"
        return said

    def _repair(self, number: int) -> None:
        published = self._published()
        if not published:
            return
        directory = published[number % len(published)]
        before = {name: regular(directory / name) for name in os.listdir(directory)}
        right = self.known[directory.name]
        readable = before.get(MANIFEST) == self.manifests[directory.name] and not any(
            (directory / name).is_dir() for name in before
        )
        can = readable and any(
            made and made.name == directory.name for made in (reference(self.state, name) for name in CONFIGS)
        )
        failed = None
        try:
            list(repair(directory, tokenizer_path=TOKENIZER))
        except MoaiError as error:
            failed = error
        if failed is None:
            assert self._differing(directory) == []
            return
        assert not can or failpoints._armed, f"its input is there: {failed}"
        for name, data in right.files.items():
            assert regular(directory / name) in (before.get(name), data)

    @contextlib.contextmanager
    def _ended(self, command: str, end: End) -> Iterator[None]:
        """A command that is ended by an error where `end` says."""
        self._count(f"{command}, ended by an error" if end else command)
        if not end:
            yield
            return
        place, action = self.places[command][end[0] % len(self.places[command])], end[1]
        note(f"{action} at {place}")
        with armed(place, action):
            try:
                yield
            except OSError as error:
                if not isinstance(error, StorageError) and (error.errno, action) != (errno.EIO, "raise"):
                    raise

    def _forget(self, name: str) -> None:
        """A directory is gone: what comes in its place must be whole."""
        del self.manifests[name]
        self.flipped = {path for path in self.flipped if path.parent.name != name}

    def _count(self, step: str) -> None:
        type(self).steps += 1
        self.outcomes[step] = self.outcomes.get(step, 0) + 1

    def _write_input(self, file: str, variant: str) -> None:
        path, data = self.root / "data" / file, input_bytes(file, variant)
        if data is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(data)
        self.state = tuple(variant if name == file else old for name, old in zip(INPUT, self.state))

    def _file(self, area: str, number: int, wanted: Callable[[Path], bool] = Path.is_file) -> Path | None:
        """One of the cache's files, by content, so that names which follow from times do not matter."""
        found = [path for path in self.cache.glob(area) if wanted(path) and not path.is_symlink()]
        if not found:
            return None
        found.sort(key=lambda path: (path.parent.relative_to(self.cache).parts[:1], path.stat().st_size, path.name))
        path = found[number % len(found)]
        note(f"{path.relative_to(self.cache)}")
        self._touches_plans(path)
        return path

    def _touches_plans(self, path: Path) -> None:
        if "plans" in path.relative_to(self.cache).parts:
            self.current = None

    def _notice_flip(self, path: Path) -> None:
        self.flipped.update(
            other for directory in self._published() for other in directory.iterdir() if other.samefile(path)
        )

    def _is_published(self, path: Path) -> bool:
        return path.parent.parent == self.cache / "datasets"

    def _published(self) -> list[Path]:
        """Directories with a name that moai may have given."""
        folder = self.cache / "datasets"
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def _opens(self, directory: Path) -> bool:
        """As promised: the manifest as it was written, and every file of its size."""
        found = {name: regular(directory / name) for name in (*self.known[directory.name].files, MANIFEST)}
        if None in found.values():
            return False
        manifest = found.pop(MANIFEST)
        return manifest == self.manifests.get(directory.name, manifest) and all(
            len(found[name] or b"") == len(data) for name, data in self.known[directory.name].files.items()
        )

    def _differing(self, directory: Path) -> list[str]:
        return [name for name, data in self.known[directory.name].files.items() if regular(directory / name) != data]

    def _unlisted(self, directory: Path) -> list[str]:
        return sorted(set(os.listdir(directory)) - self.known[directory.name].files.keys() - {MANIFEST})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Cache]]:
    """The machine in a small world: stamps prove something after 50 ms, power never fails, no other host is waited for,
    and a launch ends with its step.
    """
    monkeypatch.setattr(files, "_RACY_NS", 50_000_000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(pretraining, "FIRST_SIGN_SECONDS", 0.0)
    monkeypatch.setattr(pretraining, "note_use", lambda cache, directory: None)
    Cache.places, Cache.steps, Cache.outcomes = places_passed(), 0, {}

    def run(*, examples: int, steps: int) -> type[Cache]:
        run_state_machine_as_test(
            Cache, settings=settings(max_examples=examples, stateful_step_count=steps, phases=[Phase.generate])
        )  # so few steps need no shrinking
        return Cache

    return run


def test_a_cache_gives_what_is_right_or_an_error_whatever_befalls_it(machine: Callable[..., type[Cache]]) -> None:
    ran = machine(examples=settings().max_examples // 4, steps=12)
    assert ran.steps > settings().max_examples
    assert {"made", "found"} <= ran.outcomes.keys()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_thousand_steps(machine: Callable[..., type[Cache]], record: Callable[..., None]) -> None:
    ran = machine(examples=110, steps=25)
    assert ran.steps >= 2000
    said = ", ".join(f"{number:,} {step}" for step, number in sorted(ran.outcomes.items()))
    record(
        "a cache disturbed at random (stateful machine)",
        ran.steps,
        f"nothing but the right bytes or an error of moai: {said}",
    )
