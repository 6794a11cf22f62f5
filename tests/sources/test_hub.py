"""Directories laid out like a Hub dataset, resolved by `datasets`, and names that are neither."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from test_sources import ROOT

_HUB = """
    import sys
    from moai.pretraining.options import DataConfig
    from moai.pretraining.recipe import prepare
    import datasets
    datasets.disable_progress_bars()
    for name in sys.argv[3:]:
        try:
            column = "txt" if "tables" in name else None
            config = DataConfig(
                dataset=(name,), text_column=column, tokenizer_path=sys.argv[1], cache_dir=sys.argv[2], num_proc=0
            )
            prepared = prepare(config, origins={})
            source = prepared.content["sources"][0]
            print(prepared.content["documents"], source["kind"], source["origin"].get("split"))
        except Exception as error:
            print(type(error).__name__, str(error))
"""


def test_configurations_and_splits_of_a_local_hub_layout_are_resolved_by_datasets(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    hub = tmp_path / "hub"
    (hub / "ko").mkdir(parents=True)
    readme = """\
        ---
        configs:
        - config_name: ko
          data_files:
          - split: train
            path: "ko/train-*.parquet"
          - split: test
            path: ko/test.parquet
        - config_name: en
          data_files: "en/*.parquet"
        ---
        words
    """
    (hub / "README.md").write_text(textwrap.dedent(readme))
    for number in range(2):
        pq.write_table(pa.table({"text": [f"t {number}"] * 5}), hub / "ko" / f"train-0000{number}.parquet")
    pq.write_table(pa.table({"text": ["test"] * 3}), hub / "ko" / "test.parquet")
    (tmp_path / "tables").mkdir()
    with tarfile.open(tmp_path / "tables" / "shard.tar", "w") as tar:  # which datasets reads and moai does not
        for number in range(7):
            (tmp_path / f"{number}.txt").write_text(f"row {number}")
            tar.add(tmp_path / f"{number}.txt", f"{number}.txt")
    names = [f"{hub}:ko", f"{hub}:ko@test", f"{tmp_path / 'tables'}:default@train", f"{hub}:absent", f"{hub}:ko@absent"]
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_HUB), str(tokenizer_dir), str(tmp_path / "cache"), *names],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    said = ended.stdout.splitlines()
    assert said[:3] == ["10 parquet train", "3 parquet test", "7 arrow train"], ended.stderr
    assert said[3].startswith("SourceError")
    assert "absent" in said[3]
    assert said[4].startswith("SourceError")
    assert "holds the splits train, test; name one" in said[4]
    assert list((tmp_path / "hf").rglob("*.arrow"))


def test_a_name_that_is_no_path_and_not_on_the_hub_says_so(
    tmp_path: Path, tokenizer_dir: Path, start_moai: Callable[..., Any]
) -> None:
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    ended = start_moai(
        "prepare",
        "--dataset",
        "nobody/nothing",
        "--tokenizer_path",
        tokenizer_dir,
        "--cache_dir",
        tmp_path / "cache",
        env=offline,
    )
    assert ended.returncode == 66
    assert "nobody/nothing: neither a path here nor a dataset that the Hub gives" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
