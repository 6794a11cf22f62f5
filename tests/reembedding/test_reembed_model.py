"""Real sentence-transformers models: the packaged all-MiniLM-L6-v2, and random ones that read 512 and 2,048 tokens."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_law

from moai.core.errors import ConfigError, DamagedError, MoaiError, SourceError
from moai.reembedding import search, versions
from moai.reembedding.build import build
from moai.reembedding.database import Database
from moai.reembedding.embed import OutOfMemory, TokenBudget, encode_all
from moai.reembedding.encoders import SentenceModel, device_of
from moai.reembedding.options import ReembedConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def reads(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Any:
    """`reads(512)`: a model with random weights that reads so many tokens, with the real model's tokenizer."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    def make(tokens: int) -> str:
        folder = tmp_path_factory.mktemp(f"reads{tokens}")
        torch.manual_seed(tokens)
        BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=tokens,
                vocab_size=30522,
            )
        ).save_pretrained(folder / "bert")
        AutoTokenizer.from_pretrained(minilm).save_pretrained(folder / "bert")
        transformer = Transformer(str(folder / "bert"), max_seq_length=tokens)
        SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean"), Normalize()], device="cpu").save(
            str(folder / "model")
        )
        return str(folder / "model")

    return make


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return tiny_law.make(tmp_path / "law.db", documents=1)


def reembed(db: Path, model: str, **changes: Any) -> Any:
    return build(
        ReembedConfig(
            db=str(db), model=model, **{"version_id": 5, "chunking_strategy": "dynamic", "device": "cpu", **changes}
        ),
        environ={"OMP_NUM_THREADS": "2"},
    )


def stored(db: Path, version_id: int) -> np.ndarray[Any, Any]:
    with Database.open(db) as database:
        return np.concatenate([vectors for _, vectors in search.pages(database, version_id)])


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Path:
    """The small database with the real model's vectors and, where there is faiss, an index of them; tests only read it,
    or copy it.
    """
    path = tiny_law.make(tmp_path_factory.mktemp("embedded") / "law.db", documents=1)
    report = reembed(path, minilm, faiss="flat" if importlib.util.find_spec("faiss") else None)
    assert (report.complete, report.active, report.counts["truncated"]) == (True, True, 0)
    return path


def test_vectors_are_those_that_sentence_transformers_gives(embedded: Path, minilm: str) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm, device="cpu")
    found = tiny_law.rows(
        embedded,
        "SELECT text, token_count, dim FROM text_chunks JOIN embeddings ON chunk_id = text_chunks.id WHERE "
        "embedding_version_id = 5 ORDER BY text_chunks.id",
    )
    ours, theirs = stored(embedded, 5), model.encode([str(row[0]) for row in found], normalize_embeddings=True)
    assert np.abs(ours - theirs).max() < 1e-5
    # tokenizer.json truncates at 128 by itself; what is counted is the whole chunk, what is embedded is up to the
    # model's 256.
    counts = [len(model.tokenizer(str(row[0]), truncation=False)["input_ids"]) for row in found]
    assert [row[1] for row in found] == counts
    assert 128 < max(counts) <= model.max_seq_length == 256


@pytest.mark.parametrize("tokens", [512, 2048])
def test_a_longer_reader_gets_longer_chunks(law: Path, reads: Any, tokens: int) -> None:
    tiny_law.change(
        law, "INSERT INTO case_paragraphs(case_id, para_index, text) VALUES(1, 9, ?)", (tiny_law.sentence(4, 9000),)
    )
    reembed(law, reads(tokens), chunking_strategy="hybrid", precision="float32")
    longest = int(
        str(tiny_law.rows(law, "SELECT max(token_count) FROM text_chunks WHERE embedding_version_id = 5")[0][0])
    )
    assert tokens * 0.8 < longest <= tokens or (tokens == 2048 and longest > 1000)
    assert tiny_law.rows(
        law, "SELECT count(*) FROM text_chunks WHERE embedding_version_id = 5 AND length(trim(text)) > 2500"
    ) == [(0,)]


def test_search_by_index_and_by_brute_force_agree_and_a_rollback_stands(
    embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    from moai.reembedding.command import main

    law = tmp_path / "law.db"
    shutil.copy(embedded, law)
    shutil.copy(search.index_path(embedded, 5), search.index_path(law, 5))
    words = ["search", "--db", str(law), "--version-id", "5", "--query", "국민의 자유와 권리", "--device", "cpu"]
    main(words, {})
    indexed = capsys.readouterr().out.splitlines()
    with Database.open(law, writable=True) as db, db.transaction("test"):
        versions.note(db, 5, faiss=None)
    main(words, {})
    assert capsys.readouterr().out.splitlines() == indexed
    assert len(indexed) == 5
    main(["rollback", "--db", str(law), "--version-id", "5"], {})
    with pytest.raises(ConfigError, match="no active version"):
        main(["search", "--db", str(law), "--chunking-strategy", "dynamic", "--query", "x"], {})


def test_another_versions_index_is_found_out_and_a_long_question_is_cut(
    embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    from moai.reembedding.command import main

    law = tmp_path / "law.db"
    shutil.copy(embedded, law)
    shutil.copy(search.index_path(embedded, 5), search.index_path(law, 5))
    main(["search", "--db", str(law), "--version-id", "5", "--query", "국민의 자유 " * 2000, "--device", "cpu"], {})
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert "the model reads 256" in caplog.text
    tiny_law.change(law, "UPDATE text_chunks SET embedding_version_id = NULL WHERE embedding_version_id = 5")
    with pytest.raises(DamagedError, match=r"is none of version 5: this is another version's index; delete that file"):
        main(["search", "--db", str(law), "--version-id", "5", "--query", "국민의 자유", "--device", "cpu"], {})


def test_a_directory_with_half_a_model_is_one_line(law: Path, minilm: str, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(minilm, folder)
    weights = next(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SourceError, match=r"could not be loaded .*check that its directory is whole"):
        reembed(law, str(folder))


def test_bfloat16_stays_close_to_float32(embedded: Path, minilm: str) -> None:
    encoder = SentenceModel.find(minilm).open("bfloat16")
    few = "SELECT text FROM text_chunks WHERE embedding_version_id = 5 ORDER BY id LIMIT 2"  # slow where it is emulated
    rows = encoder.tokens.ids([str(row[0]).strip() for row in tiny_law.rows(embedded, few)])
    cosines = np.sum(stored(embedded, 5)[:2] * encode_all(encoder, rows, TokenBudget()), axis=1)
    assert 0.995 < cosines.min() < 0.999999


def test_the_same_model_elsewhere_is_the_same_and_another_weight_is_not(
    minilm: str, reads: Any, tmp_path: Path
) -> None:
    path = reads(512)
    shutil.copytree(path, tmp_path / "moved")
    assert SentenceModel.find(str(tmp_path / "moved")).revision == SentenceModel.find(path).revision
    weights = tmp_path / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert SentenceModel.find(str(tmp_path / "moved")).revision != SentenceModel.find(path).revision
    with pytest.raises(SourceError, match=r"neither config\.json"):
        SentenceModel.find(str(tmp_path))


def test_batches_by_length_give_the_vectors_of_single_rows(minilm: str) -> None:
    encoder = SentenceModel.find(minilm).open("float32")
    rows = encoder.tokens.ids([tiny_law.sentence(n, 10 + 12 * n) for n in range(10)])
    together = encode_all(encoder, rows, TokenBudget(2000))
    alone = np.concatenate([encoder.encode([row]) for row in rows])
    assert np.abs(together - alone).max() < 1e-5


def test_a_question_has_the_prompt_of_questions_and_a_document_that_of_documents(minilm: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from moai.reembedding.retrieval import query_vectors

    model = SentenceTransformer(minilm, device="cpu", prompts={"query": "query: ", "document": "passage: "})
    model.save(str(tmp_path / "prompts"))
    ours = SentenceModel.find(str(tmp_path / "prompts"))
    assert (
        np.abs(
            query_vectors(ours.open("float32"), ["국민의 자유"])[0]
            - model.encode_query("국민의 자유", normalize_embeddings=True)
        ).max()
        < 1e-5
    )
    encoder = ours.open("float32")
    document = encode_all(encoder, encoder.tokens.ids(["국민의 자유"]), TokenBudget())[0]
    assert np.abs(document - model.encode_document("국민의 자유", normalize_embeddings=True)).max() < 1e-5


def test_a_batch_that_does_not_fit_is_halved_until_it_does(minilm: str) -> None:
    encoder = tiny_law.HashingEncoder()

    class Tight:
        dim, tokens, batch_tokens, lanes = encoder.dim, encoder.tokens, 4000, 2

        def encode(self, rows: Any) -> Any:
            if sum(map(len, rows)) > 300:
                raise OutOfMemory
            return encoder.encode(rows)

    budget = TokenBudget()
    rows = [[1] * 50 for _ in range(40)]
    assert encode_all(Tight(), rows, budget).shape == (40, 16)
    assert budget.tokens is not None
    assert 50 <= budget.tokens <= 300
    with pytest.raises(MoaiError, match="one chunk of 400 tokens does not fit"):
        encode_all(Tight(), [[1] * 400], TokenBudget())


def test_a_backend_that_is_not_installed_names_the_package(law: Path, minilm: str) -> None:
    for backend, package in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(ConfigError, match=f"pip install {package}"):
                reembed(law, minilm, backend=backend)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_another_backend_gives_the_same_vectors(
    embedded: Path, law: Path, minilm: str, backend: str, tmp_path: Path
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[backend])
    reembed(law, minilm, activate=False, backend=backend, exports=str(tmp_path))
    assert np.sum(stored(embedded, 5) * stored(law, 5), axis=1).min() > 0.9999


def test_an_export_is_made_once_and_int8_is_refused_where_it_is_far_off(
    law: Path, minilm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    caplog.set_level("INFO")
    few: dict[str, Any] = {"backend": "onnx", "exports": str(tmp_path), "limit": 2}
    reembed(law, minilm, **few)
    assert "is taken from" not in caplog.text
    reembed(law, minilm, version_id=6, **few)
    assert "The exported model is taken from" in caplog.text
    assert len(list(tmp_path.rglob("model.onnx"))) == 1
    with pytest.raises(ConfigError, match=r"int8 is refused for .*: the least cosine .* below --min_cosine 0.995"):
        reembed(law, minilm, version_id=7, precision="int8", **few)


def test_the_guides_command_on_a_real_model_and_its_second_run(law: Path, minilm: str) -> None:
    reembed(law, minilm)
    flags = "--chunking-strategy dynamic --version-id 5 --doc-batch-size 300 --embedding-batch-size 1024"
    command = [sys.executable, "-X", "importtime", "scripts/migrations/re_embed_existing_data_optimized.py"]
    again = subprocess.run(
        [*command, "--db", str(law), *flags.split(), "--commit-interval", "5"],
        cwd=tiny_law.ROOT,
        env={"EMBEDDING_MODEL": minilm, "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "0 encode calls" in again.stdout, again.stderr
    assert "complete, active" in again.stdout
    imported = {
        line.rpartition("|")[2].strip() for line in again.stderr.splitlines() if line.startswith("import time:")
    }
    assert {"moai.reembedding.build"} <= imported
    assert not {"torch", "transformers", "sentence_transformers"} & imported


@pytest.mark.skipif(device_of("auto") != "cuda", reason="needs a CUDA device")
def test_a_gpu_gives_the_cpus_vectors(embedded: Path, law: Path, minilm: str) -> None:
    reembed(law, minilm, activate=False, device="cuda")
    assert np.sum(stored(embedded, 5) * stored(law, 5), axis=1).min() > 0.9999
