"""Which tokenizer backend a preparation uses, by proof; and what becomes of one that was wrong.

`<cache>/distrusted/<backend>-<version>-<tokenizer>.json` says that a backend gave other ids than the reference with this
tokenizer: in this cache it is not used for it again, and what it made counts as not made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.backends import AUTOMATIC, BACKENDS, Backend, Reference, first_difference, is_installed, make
from moai.engine.ledger import Ledger
from moai.engine.run import Done
from moai.errors import BackendRefused, ConfigError
from moai.files import canonical_json, write_atomic
from moai.probes import probes
from moai.recipes.options import DataConfig
from moai.tokenizer import TokenizerSpec

logger = logging.getLogger(__name__)

SAMPLE_CHARS = 60_000
"""Characters of the data itself that both backends encode before the first shard."""


@dataclass(frozen=True)
class Chosen:
    """The backend to use, the reference that looks after it, and why it was chosen."""

    backend: Backend
    reference: Reference
    reason: str

    def __str__(self) -> str:
        return f"tokenizer backend = {name_of(self.backend.made_by())}: {self.reason}"


def choose(config: DataConfig, spec: TokenizerSpec, cache: Path, sample: Callable[[], Sequence[str]], *, threads: int | None = None) -> Chosen:
    """The backend that was asked for, or the automatic one, if it agrees with the reference on the probes and on a sample of the data.

    threads  of one call to it, where that is decided
    Raises ConfigError when a backend was named that is not installed.
    """
    for file in (cache / "distrusted").glob("[!.]*.json"):  # whoever took that down may have been stopped before it forgot the shards
        forget(cache, {key: value for key, value in json.loads(file.read_bytes()).items() if key != "because"})
    reference = Reference(spec=spec, split_special_tokens=config.split_special_tokens)
    name = AUTOMATIC if config.tokenizer_backend == "auto" else config.tokenizer_backend
    if name == "tokenizers":
        return Chosen(reference, reference, "set")
    if not is_installed(name):
        package = BACKENDS[name].package
        if config.tokenizer_backend != "auto":
            raise ConfigError(f"--tokenizer_backend {name}: the package {package} is not installed (pip install {package}); install it, or take auto")
        return Chosen(reference, reference, f"{name} is not installed (pip install {package})")
    fast = make(name, spec, split_special_tokens=config.split_special_tokens, threads=threads)
    if why := _distrust(cache, fast.made_by()):
        return Chosen(reference, reference, f"{name_of(fast.made_by())} was wrong before ({why})")
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(fast.load)  # takes as long as all the rest here, and not the interpreter's lock
        texts = [*probes(reference.special_tokens()), *sample()]
        try:
            loading.result()
        except BackendRefused as refusal:
            return Chosen(reference, reference, str(refusal))
    found = first_difference(fast, reference, texts)
    if found:
        logger.warning("%s is not used, it differs from tokenizers: %s", name_of(fast.made_by()), found)
        if made := distrust(cache, fast.made_by(), found):  # taken down in any case: a published directory may have outlived its shards
            logger.warning("The %d shards it made here are made anew", made)
        return Chosen(reference, reference, f"{name_of(fast.made_by())} differs from it")
    return Chosen(fast, reference, f"{'found' if config.tokenizer_backend == 'auto' else 'set'}, and equal to the reference on {len(texts):,} probes")


def distrust(cache: Path, made_by: Mapping[str, str], because: str) -> int:
    """Take down that a backend was wrong, and forget every shard it made here. Returns how many those were."""
    file = _file(cache, made_by)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, canonical_json({**made_by, "because": because}))
    return forget(cache, made_by)


def forget(cache: Path, made_by: Mapping[str, str]) -> int:
    return Ledger(cache).forget(lambda receipt: dict(receipt.made_by) == dict(made_by))


def distrusted_in(cache: Path, names: Sequence[str], tokenizer: TokenizerSpec) -> str | None:
    """The first of the backends, named as in a manifest, that was wrong before with this tokenizer."""
    known = {path.stem for path in (cache / "distrusted").glob("*.json")}
    return next((name for name in names if f"{name.replace(' ', '-')}-{tokenizer.digest[:16]}" in known), None)


def backends_of(done: Sequence[Done]) -> list[str]:
    """The backends that made these shards, for a manifest."""
    return sorted({name_of(one.receipt.made_by) for one in done})


def name_of(made_by: Mapping[str, str]) -> str:
    return f"{made_by['tokenizer']} {made_by['version']}"


def _distrust(cache: Path, made_by: Mapping[str, str]) -> str | None:
    try:
        record: dict[str, Any] = json.loads(_file(cache, made_by).read_bytes())
    except FileNotFoundError:
        return None
    return str(record["because"])


def _file(cache: Path, made_by: Mapping[str, str]) -> Path:
    return cache / "distrusted" / f"{made_by['tokenizer']}-{made_by['version']}-{made_by['tokenizer_sha256']}.json"
