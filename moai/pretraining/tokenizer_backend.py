"""Which tokenizer backend a preparation uses, by proof; and what becomes of one that was wrong.

A record under `<cache>/distrusted` says that a backend gave other ids than the reference with a tokenizer: in this
cache it is not used for it again, and what it made counts as not made. Choosing only reads them; who prepares writes
them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moai.cache.ledger import Ledger
from moai.core.errors import BackendDisagrees, BackendRefused, ConfigError
from moai.core.files import canonical_json, digest_json, make_way, write_atomic
from moai.core.fsops import read_regular
from moai.engine.run import Done
from moai.pretraining.options import DataConfig
from moai.tokenizers.backends import AUTOMATIC, BACKENDS, Backend, Reference, first_difference, is_installed, make
from moai.tokenizers.differing_strings import probes
from moai.tokenizers.load import TokenizerSpec
from moai.tokenizers.spelling import Spelling

_MOST_BYTES = 1 << 16
SAMPLE_CHARS = 60_000
"""Characters of the data itself that both backends encode before the first shard."""


@dataclass(frozen=True)
class Wrong:
    """A backend, named as in the receipts of what it made, and the ids that it got wrong."""

    made_by: Mapping[str, str]
    because: str

    @property
    def name(self) -> str:
        return name_of(self.made_by)


@dataclass(frozen=True)
class Proof:
    """Called where shards are worked on: on another machine than the one that chose, the backend is proven anew."""

    backend: Backend
    reference: Reference
    version: str
    machine: str

    def __call__(self) -> None:
        """Raises ConfigError for another version, BackendDisagrees for other ids."""
        if self.machine != platform.node():
            self._prove()

    @functools.cache  # noqa: B019 (once a process)
    def _prove(self) -> None:
        made_by = self.backend.made_by()
        if made_by["version"] != self.version:
            raise ConfigError(
                f"{platform.node()} has {name_of(made_by)}, {self.machine} has {self.version}: install one version on "
                f"every node"
            )
        if not isinstance(self.backend, Reference) and (
            found := first_difference(self.backend, self.reference, list(probes(self.reference.special_tokens())))
        ):
            raise BackendDisagrees(f"on {platform.node()}: {found}")


@dataclass(frozen=True)
class Chosen:
    """The backend to use, the reference that looks after it, why it was chosen, and what was found wrong on the way."""

    backend: Backend
    reference: Reference
    reason: str
    wrong: Wrong | None = None

    def __str__(self) -> str:
        return f"tokenizer backend = {name_of(self.backend.made_by())}: {self.reason}"

    @property
    def proof(self) -> Proof:
        return Proof(self.backend, self.reference, self.backend.made_by()["version"], platform.node())

    def without(self, wrong: Wrong) -> Chosen:
        """The reference instead of a backend that was wrong."""
        return Chosen(self.reference, self.reference, f"{wrong.name} gave other ids ({wrong.because})", wrong)


def choose(
    config: DataConfig, spec: TokenizerSpec, known: Sequence[Wrong], sample: Sequence[str], threads: int | None = None
) -> Chosen:
    """The backend that was asked for, or the automatic one, if it agrees with the reference on the probes and on a
    sample of the data.

    known    what was wrong before
    threads  of one call to it, where that is decided
    Raises ConfigError when a backend was named that is not installed.
    """
    reference = Reference(spec=spec, split_special_tokens=config.split_special_tokens)
    name = AUTOMATIC if config.tokenizer_backend == "auto" else config.tokenizer_backend
    if name == "tokenizers":
        return Chosen(reference, reference, "set")
    if config.data_format == "chat" and isinstance(why := Spelling.of(spec.path, spec.digest), str):
        return Chosen(reference, reference, f"{why}, so it alone tells where in a conversation a token stands")
    if not is_installed(name):
        package = BACKENDS[name].package
        if config.tokenizer_backend != "auto":
            raise ConfigError(
                f"--tokenizer_backend {name}: the package {package} is not installed (pip install {package}); install "
                f"it, or take auto"
            )
        return Chosen(reference, reference, f"{name} is not installed (pip install {package})")
    fast = make(name, spec, split_special_tokens=config.split_special_tokens, threads=threads)
    before = next((wrong for wrong in known if wrong.made_by == fast.made_by()), None)
    if before:
        return Chosen(reference, reference, f"{before.name} was wrong before ({before.because})")
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(fast.load)  # takes as long as all the rest here, and not the interpreter's lock
        texts = [*probes(reference.special_tokens()), *sample]
        try:
            loading.result()
            found = first_difference(fast, reference, texts)
        except BackendRefused as refusal:
            return Chosen(reference, reference, str(refusal))
    chosen = Chosen(
        fast,
        reference,
        f"{'found' if config.tokenizer_backend == 'auto' else 'set'}, and equal to the reference on {len(texts):,} "
        f"probes",
    )
    return chosen.without(Wrong(fast.made_by(), found)) if found else chosen


def distrusted(cache: Path) -> list[Wrong]:
    """What was wrong before in this cache. A record that a crash cut is none: the backend will be found wrong again."""
    records = []
    for path in sorted((cache / "distrusted").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(read_regular(path, _MOST_BYTES))
            made_by = {name: str(record["made_by"][name]) for name in ("tokenizer", "version", "tokenizer_sha256")}
            records.append(Wrong(made_by, str(record["because"])))
    return records


def distrust(cache: Path, wrong: Wrong) -> int:
    """Take down that a backend was wrong, and forget every shard it made here. Returns how many those were.

    It is taken down even if there are none: a published directory may have outlived its shards.
    """
    file = cache / "distrusted" / f"{digest_json(wrong.made_by)[:40]}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    make_way(file)
    write_atomic(file, canonical_json({"made_by": wrong.made_by, "because": wrong.because}))
    return forget(cache, wrong)


def forget(cache: Path, wrong: Wrong) -> int:
    return Ledger(cache).forget(lambda receipt: receipt.made_by == wrong.made_by)


def backends_of(done: Sequence[Done]) -> list[str]:
    """The backends that made these shards, for a manifest."""
    return sorted({name_of(one.receipt.made_by) for one in done})


def name_of(made_by: Mapping[str, str]) -> str:
    return f"{made_by['tokenizer']} {made_by['version']}"
