"""`train.py --prepared DIR [DIR ...]`: training where neither raw data nor cache nor the tokenizer's own directory is.

    directories = open_all(config.prepared)                      # checked against their manifests
    data = settings(directories, data, origins, config)     # what they were prepared with; no flag may differ
    prepared = joined(directories)                               # the rows of all, source by source

The digest of one directory is that of its content, as in the cache: a run that was begun on raw data goes on from the
directory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from moai.core import resources
from moai.core.distributed import Ranks, Report, build_once
from moai.core.errors import ConfigError, DamagedError
from moai.core.files import digest_json
from moai.core.stores import is_url
from moai.prepared.manifest import HELD_OUT, MANIFEST, Prepared
from moai.prepared.stored import fetch
from moai.pretraining.options import DataConfig
from moai.tokenizers.load import digest_of, find_tokenizer
from moai.training.arguments import TrainConfig
from moai.training.steps import wish_of

logger = logging.getLogger(__name__)

_ALIKE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "tokenizer": lambda content: {
        name: content["tokenizer"][name] for name in ("tokenizer_sha256", "eos_id", "bos_id")
    },
    "seq_len": lambda content: content["seq_len"],
    "data_format": lambda content: content["config"].get("data_format", "text"),
    "columns": lambda content: ", ".join(f"{column['name']} {column['type']}" for column in content["columns"]),
    "chat template": lambda content: content.get("chat", {}).get("template"),
}
"""What directories that are trained on together have in common."""


def open_all(paths: Sequence[str]) -> list[Prepared]:
    """Every directory, checked. Raises DamagedError, naming the file; ConfigError where they do not go together."""
    opened = [_open(Path(path).expanduser().absolute()) for path in paths]
    for other in opened[1:]:
        for name, of in _ALIKE.items():
            here, there = of(opened[0].content), of(other.content)
            if here != there:
                raise ConfigError(
                    f"--prepared: {opened[0].path} and {other.path} do not go together: {name} {_short(here)} there, "
                    f"{_short(there)} here; prepare them alike"
                )
    twice = [str(path) for path, times in Counter(one.path.resolve() for one in opened).items() if times > 1]
    if twice:
        raise ConfigError(f"--prepared: {twice[0]} is named twice; --mixture gives a source more weight")
    return opened


def fetched(paths: Sequence[str], data: DataConfig, here: Ranks, environ: Mapping[str, str]) -> list[str]:
    """The paths, with what lies in a store fetched into the cache: once a node, or once where all nodes share it."""
    urls = [path for path in paths if is_url(path)]
    if not urls:
        return list(paths)
    cache = Path(data.cache_dir).expanduser().absolute()

    def all_of_them(report: Report) -> dict[str, Any]:
        return {"fetched": {url: str(fetch(url, cache, report)) for url in urls}}

    found = build_once(
        all_of_them,
        ranks=here,
        cache=cache,
        scope=data.cache_scope,
        stall_timeout=data.stall_timeout,
        environ=environ,
        what="-fetched",
    )["fetched"]
    return [found.get(path, path) for path in paths]


def _open(path: Path) -> Prepared:
    try:
        return Prepared.open(path)
    except DamagedError as error:
        if path.is_dir() and not (path / MANIFEST).exists():
            raise DamagedError(f"{error}; raw data is named by --dataset") from error
        raise


def settings(
    directories: Sequence[Prepared], data: DataConfig, origins: Mapping[str, str], config: TrainConfig
) -> DataConfig:
    """The data settings that these directories were made with. Raises ConfigError where a flag, file or variable says
    something else.
    """
    for prepared in directories:
        _refuse_others(prepared, data, origins)
    content = directories[0].content
    made_as = content["config"].get("data_format", "text")
    if made_as != ("chat" if config.mode == "sft" else "text"):
        raise ConfigError(
            f"mode = {config.mode}: {directories[0].path} was prepared with data_format {made_as}; --mode "
            f"{'sft' if made_as == 'chat' else 'pretrain'} learns from it"
        )
    if config.eval_dataset and content["transforms"] and not data.transforms:
        raise ConfigError(
            f"eval_dataset: {directories[0].path} was prepared with transforms; name them with --transforms, so that "
            f"evaluation data passes them too"
        )
    known = {f.name for f in fields(DataConfig) if f.metadata["affects_output"]}
    said = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in content["config"].items()
        if name in known
    }
    own = {
        "dataset": tuple(str(one.path) for one in directories),
        "dataset_config": None,
        "tokenizer_path": str(directories[0].path),
        "eos_token": content["tokenizer"]["eos_token"],
        "eval_ratio": 0.0,
        "held_out": False,
    }
    return replace(data, **{**said, **own})


def joined(directories: Sequence[Prepared], *, memory_mode: str = "balanced") -> Prepared:
    """One set of rows. Sources of the same name in several directories are called DIRECTORY/NAME. Raises ConfigError
    where those are equal too.
    """
    if len(directories) == 1:
        return replace(directories[0], memory_mode=memory_mode)
    names = _names(directories)
    manifest = _joined(directories, names)
    held_out = [one.held_out for one in directories if one.held_out]
    if held_out:
        manifest[HELD_OUT] = _joined(held_out, {**names, **{side.path: names[side.path.parent] for side in held_out}})
    return Prepared(directories[0].path, manifest, memory_mode)


def memory_mode(data: DataConfig, here: Ranks, environ: Mapping[str, str]) -> str:
    """How much memory reading may cost, as `prepare` would choose it where the directories lie."""
    chosen = resources.plan(
        resources.detect(Path(str(data.dataset[0])), environ=environ),
        num_proc=0,
        num_proc_origin="what is prepared",
        local_world_size=here.local_world_size,
        ranks_wait=True,
        memory_mode=data.memory_mode,
        shard_bytes=data.shard_bytes,
        batch_size=data.dataset_batch_size,
        environ=environ,
    )
    return str(chosen.memory_mode.value)


def check_mixture(config: TrainConfig, prepared: Iterable[Prepared]) -> None:
    """Raises ConfigError for names of sources that are not there, before torch is loaded."""
    if wish := wish_of(config)[0]:
        for one in prepared:
            wish.check_names([source["name"] for source in one.content["sources"]])


def log(directories: Sequence[Prepared], *, evaluates: bool) -> None:
    for one in directories:
        content, aside = one.content, one.held_out
        held_out = f", {aside.content['rows']:,} held out" if aside else ""
        rows = f"{content['rows']:,} rows of {content['seq_len']}"
        logger.info("Prepared data %s: %s, content %s%s", one.path, rows, one.content_digest[:16], held_out)
        if evaluates and content["config"].get("eval_ratio") and not aside:
            logger.warning(
                "%s has no held-out side, so nothing is evaluated on it; `moai prepare --save_to` keeps both", one.path
            )


def _refuse_others(prepared: Prepared, data: DataConfig, origins: Mapping[str, str]) -> None:
    content, given = prepared.content, [name for name, origin in origins.items() if origin != "default"]
    said: dict[str, Any] = {**content["config"], "transforms": content["transforms"]}
    for f in fields(DataConfig):
        if f.name not in given or f.name not in said:
            continue
        value, there = getattr(data, f.name), said[f.name]
        if isinstance(value, tuple):
            value = [part.identity() if f.name == "transforms" else part for part in value]
        if value not in (there, content["tokenizer"]["eos_token"] if f.name == "eos_token" else there):
            raise _refusal(f.name, _short(value), origins, prepared, _short(there))
    if "dataset" in given:
        inputs = list(dict.fromkeys(prepared.manifest["run"].get("inputs", ())))
        if not {Path(str(spec)).name for spec in data.dataset} >= {Path(str(spec)).name for spec in inputs}:
            raise _refusal("dataset", " ".join(map(str, data.dataset)), origins, prepared, " ".join(map(str, inputs)))
    if "tokenizer_path" in given:
        _check_tokenizer(prepared, data.tokenizer_path, origins)
    if "chat_template" in given and data.chat_template:
        source, made_with = Path(data.chat_template).expanduser(), content.get("chat", {}).get("template", {})
        if source.is_file() and source.read_text(encoding="utf-8", errors="replace") != made_with.get("source"):
            raise _refusal("chat_template", data.chat_template, origins, prepared, "another template")


def _check_tokenizer(prepared: Prepared, path: str, origins: Mapping[str, str]) -> None:
    """The directory has its own; one that is named as well must be the same, if it is here."""
    if not Path(path).expanduser().exists():
        logger.info("tokenizer_path = %s: is not here, and not needed; %s has its tokenizer", path, prepared.path)
        return
    found, own = digest_of(find_tokenizer(path)), prepared.content["tokenizer_digest"]
    if found != own:
        raise _refusal("tokenizer_path", f"{path} ({found[:16]})", origins, prepared, f"the tokenizer {own[:16]}")


def _refusal(name: str, value: str, origins: Mapping[str, str], prepared: Prepared, said: str) -> ConfigError:
    return ConfigError(
        f"{name} = {value} ({origins[name]}): {prepared.path} was prepared with {said}; leave {name} away, or prepare "
        f"again with it"
    )


def _names(directories: Sequence[Prepared]) -> dict[Path, dict[str, str]]:
    """Of each directory, what its sources are called from here on."""
    times = Counter(source["name"] for one in directories for source in one.content["sources"])
    names = {
        one.path: {
            name: name if times[name] == 1 else f"{one.path.name}/{name}"
            for name in (source["name"] for source in one.content["sources"])
        }
        for one in directories
    }
    name, number = Counter(name for of in names.values() for name in of.values()).most_common(1)[0]
    if number > 1:
        raise ConfigError(f"--prepared: {number} sources are called {name}; rename one of the directories")
    return names


def _joined(sides: Sequence[Prepared], names: Mapping[Path, Mapping[str, str]]) -> dict[str, Any]:
    """A manifest of all; its files are named by their paths."""
    shards: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    total, records, nulls = Counter[str](), Counter[str](), Counter[str]()
    for side in sides:
        content, called = side.content, names[side.path]
        total.update({name: content[name] for name in ("rows", "tokens", "documents")})
        records.update(content["records"])
        nulls.update(content.get("nulls", {}))
        sources += ({**source, "name": called[source["name"]]} for source in content["sources"])
        for shard in content["shards"]:
            documents = {**shard["documents_file"], "file": str(side.path / shard["documents_file"]["file"])}
            file = str(side.path / shard["file"]) if shard["file"] else None
            shards.append({**shard, "source": called[shard["source"]], "file": file, "documents_file": documents})
    first = sides[0].content
    content = {
        **first,
        **total,
        "shards": shards,
        "files": [],
        "sources": sources,
        "vocab_size": max(side.content["vocab_size"] for side in sides),
        "packing": ", ".join(dict.fromkeys(side.content["packing"] for side in sides)),
        "records": dict(+records),
        "nulls": dict(+nulls),
        "fill_rate": round(total["tokens"] / max(1, total["rows"] * first["seq_len"]), 6),
    }
    return {"content": content, "content_digest": digest_json([side.content_digest for side in sides]), "run": {}}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:100] + "…"
