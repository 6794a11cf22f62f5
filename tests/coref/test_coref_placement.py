"""Labels decode to the name, particles keep their tokens, and every window holds antecedent and mask; for WordPiece and
byte-level tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coref_corpus import FIRMS, PEOPLE, PLACES, byte_level, news, wordpiece
from hypothesis import given
from hypothesis import strategies as st

from moai.core.errors import TokenizerError
from moai.coref.entities import Candidate
from moai.coref.mlm_tokens import MlmTokenizer, load_mlm_tokenizer
from moai.coref.pieces import Pieces
from moai.coref.placement import Edit, Placed, Placement, Spans
from moai.tokenizers.load import digest_of


@pytest.fixture(scope="module", params=["wordpiece", "byte_level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> MlmTokenizer:
    folder = tmp_path_factory.mktemp("tokenizers") / request.param
    return load_mlm_tokenizer(
        str(wordpiece(folder) if request.param == "wordpiece" else byte_level(folder, tokenizer_dir))
    )


def encode(tokenizer: MlmTokenizer, text: str) -> tuple[list[int], Spans]:
    ids, _, spans = tokenizer.reference.encode_with_offsets([text])
    return ids.tolist(), Spans.of(spans)


def pairs(text: str) -> list[Candidate]:
    found = []
    for name in (*PEOPLE, *PLACES, *FIRMS):
        starts = [place for place in range(len(text)) if text.startswith(name, place)]
        found += [Candidate(name, starts[0], start) for start in starts[1:]]
    return found


def test_mask_and_ends_are_found(tokenizer: MlmTokenizer) -> None:
    assert tokenizer.mask_token in ("[MASK]", "<mask>")
    ends = (len(tokenizer.prefix), len(tokenizer.suffix))
    assert ends == ((1, 1) if tokenizer.mask_token == "[MASK]" else (0, 0))
    assert tokenizer.room(64) == 64 - sum(ends)


def test_a_tokenizer_without_a_mask_is_refused_with_the_way_out(tokenizer_dir: Path) -> None:
    with pytest.raises(TokenizerError, match=r"\[MASK\].*<mask>.*--mask-token"):
        load_mlm_tokenizer(str(tokenizer_dir))
    assert load_mlm_tokenizer(str(tokenizer_dir), "<unk>").mask_token == "<unk>"


@pytest.mark.parametrize("seq_len", [160, 2048])
def test_labels_decode_to_the_name_and_windows_hold_both(tokenizer: MlmTokenizer, seq_len: int) -> None:
    placement = Placement(room=tokenizer.room(seq_len), unknown_id=tokenizer.unknown_id)
    placed = exact = refused = 0
    for seed in range(15):
        text = news(seed)
        ids, spans = encode(tokenizer, text)
        for candidate in pairs(text):
            found = placement.place(candidate, text, ids, spans)
            if isinstance(found, str):
                assert found == "window"
                begin, end = (
                    spans.covering(place, place + len(candidate.entity))
                    for place in (candidate.antecedent, candidate.mention)
                )
                assert begin is not None
                assert end is not None
                assert end[1] - begin[0] > placement.room
                refused += 1
                continue
            placed += 1
            exact += found.exact
            first, end = found.window
            assert end - first <= tokenizer.room(seq_len)
            assert first <= found.antecedent[0] < found.antecedent[1] <= found.mask.begin < found.mask.end <= end
            label = tokenizer.reference.decode(list(found.mask.name)).strip().replace(" ", "")
            assert (
                (label == candidate.entity)
                if found.exact
                else (candidate.entity in label and label != candidate.entity)
            )
            assert candidate.entity in tokenizer.reference.decode(ids[slice(*found.antecedent)]).replace(" ", "")
    assert placed > 50
    assert exact > placed // 2
    assert (refused > 0) is (seq_len == 160)


def test_particles_keep_the_tokens_they_have_in_running_text(tmp_path: Path) -> None:
    tokenizer = load_mlm_tokenizer(str(wordpiece(tmp_path / "wp")))
    text = "서울은 크다. 한국은행은 서울에 있다. 한국은행은 오래되었다."
    ids, spans = encode(tokenizer, text)
    found = Placement(room=99).place(Candidate("한국은행", text.index("한국"), text.rindex("한국")), text, ids, spans)
    assert isinstance(found, Placed)
    assert (
        tokenizer.reference.decode(ids[found.mask.end : found.mask.end + 1]) == "##은"
    )  # a textual mask would make it a word: 은
    assert len(found.mask.name) == 3  # 한 ##국 ##은행


def test_a_mention_that_ends_inside_a_token_is_widened_and_marked() -> None:
    text = "서울은 먼 곳이고 가을의 서울이다"
    spans = Spans([0, 4, 6, 10, 14], [3, 5, 9, 13, 17])
    ids = [0, 1, 2, 3, 4]
    candidate = Candidate("서울", 0, 14)
    found = Placement(room=9).place(candidate, text, ids, spans)
    assert isinstance(found, Placed)
    assert (found.mask, found.exact) == (Edit(4, 5, (4,)), False)
    assert Placement(room=9, skip_widened=True).place(candidate, text, ids, spans) == "widened"
    assert Placement(room=9, mode="single").place(candidate, text, ids, spans) == "single"
    assert (
        Placement(room=9, unknown_id=0).place(candidate, text, ids, spans) == "unknown"
    )  # the antecedent cannot be read
    assert Placement(room=4).place(candidate, text, ids, spans) == "window"
    assert Placement(room=9).place(Candidate("서울", 0, 40), text, ids, spans) == "untokenized"


def test_white_space_in_a_token_is_no_widening_and_halves_of_characters_go_together() -> None:
    text = "서울 곳 서울"
    spans = Spans([0, 2, 4, 5, 6], [2, 4, 6, 6, 7])  # " 서" begins at the space; 서's last byte is a token of its own
    found = Placement(room=9).place(Candidate("서울", 0, 5), text, [0, 1, 2, 3, 4], spans)
    assert isinstance(found, Placed)
    assert (found.mask, found.exact) == (Edit(2, 5, (2, 3, 4)), True)


def test_mode_single_takes_mentions_of_one_token_only(tmp_path: Path) -> None:
    tokenizer = load_mlm_tokenizer(str(wordpiece(tmp_path / "wp")))
    text = "서울은 크고 부산은 따뜻하다. 서울에는 사람이 많고 부산에는 바다가 있다."
    ids, spans = encode(tokenizer, text)
    single = Placement(room=99, mode="single")
    assert isinstance(single.place(Candidate("서울", 0, text.rindex("서울")), text, ids, spans), Placed)
    assert single.place(Candidate("부산", text.index("부산"), text.rindex("부산")), text, ids, spans) == "single"


# --- exact masks, and copies that are hidden --------------------------------------------------------------------------


def exact(tokenizer: MlmTokenizer, room: int = 999, **options: Any) -> Placement:
    return Placement(room=room, pieces=Pieces(tokenizer.spec.path, tokenizer.spec.digest), **options)


def edited(tokenizer: MlmTokenizer, ids: list[int], edit: Edit) -> str:
    """The text around the edit with ⟦⟧ about what is asked for."""
    decode = tokenizer.reference.decode
    name = decode(list(edit.name)).replace("##", "").replace(" ", "")
    before = decode([*ids[: edit.begin], *edit.before]).replace("##", "").replace(" ", "")
    behind = decode([*edit.behind, *ids[edit.end :]]).replace("##", "").replace(" ", "")
    return f"{before}⟦{name}⟧{behind}"


def test_a_piece_that_holds_name_and_particle_is_split(tokenizer: MlmTokenizer) -> None:
    """Every name, particle and place in running text: the mask is the name, whatever the pieces are."""
    widened = 0
    for particle in ("의", "은", "는", "이", "을", "에서", "과", ""):
        for name in (*PEOPLE, *PLACES, *FIRMS):
            text = f"{name}은 시장을 설명했다. 다시 {name}{particle} 크게 늘었다."
            ids, spans = encode(tokenizer, text)
            candidate = Candidate(name, 0, text.rindex(name))
            wide = Placement(room=999).place(candidate, text, ids, spans)
            widened += isinstance(wide, Placed) and not wide.exact
            found = exact(tokenizer).place(candidate, text, ids, spans)
            assert isinstance(found, Placed), (name, particle, found)
            assert found.exact
            wanted = f"{text[: candidate.mention]}⟦{name}⟧{text[candidate.behind :]}".replace(" ", "")
            assert edited(tokenizer, ids, found.mask) == wanted
    assert widened > 0  # not vacuous: some pieces did hold a particle


@pytest.mark.parametrize(
    ("pieces", "token", "halves", "wanted"),
    [
        (["일", "##본의", "##본", "##의"], "##본의", ("본", "의"), (["##본"], ["##의"])),
        (["일본의", "일본", "##의"], "일본의", ("일본", "의"), (["일본"], ["##의"])),
        (["북일본", "북", "##일", "##본"], "북일본", ("북", "일본"), (["북"], ["##일", "##본"])),
        (["일본의", "일본"], "일본의", ("일본", "의"), None),  # no way to spell what is left
        (["japan의", "japan", "##의"], "japan의", ("Japan", "의"), None),  # lower-cased: the text's letters are others
    ],
)
def test_halves_are_spelled_as_the_vocabulary_does(
    tmp_path: Path, pieces: list[str], token: str, halves: tuple[str, str], wanted: tuple[list[str], list[str]] | None
) -> None:
    from tokenizers import Tokenizer, models

    ids = {piece: number for number, piece in enumerate(["[UNK]", *pieces])}
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordPiece(ids, unk_token="[UNK]")).save(str(file))
    found = Pieces(str(file), digest_of(file)).split(ids[token], *halves)
    assert found == (wanted and tuple([ids[piece] for piece in half] for half in wanted))


def test_a_piece_that_cannot_be_split_is_not_used() -> None:
    class Unsplit(Pieces):
        def split(self, token: int, left: str, right: str) -> None:
            return None

    text = "서울은 먼 곳이고 가을의 서울이다"
    spans = Spans([0, 4, 6, 10, 14], [3, 5, 9, 13, 17])
    place = Placement(room=9, pieces=Unsplit("", "")).place
    assert place(Candidate("서울", 0, 14), text, [0, 1, 2, 3, 4], spans) == "widened"


def test_hidden_copies_leave_antecedent_and_mask_alone_and_fit_the_window(tokenizer: MlmTokenizer) -> None:
    text = "서울은 크다. 서울역은 낡았다. 서울의 봄은 짧고 서울의 가을은 맑다. 나는 서울을 떠났다."
    starts = [place for place in range(len(text)) if text.startswith("서울", place)]
    copies = ((starts[1], starts[1] + 3, False), *((start, start + 2, True) for start in (starts[3], starts[4])))
    ids, spans = encode(tokenizer, text)
    placement = exact(tokenizer, hide_copies=True)
    found = placement.place(Candidate("서울", 0, starts[2], copies=copies), text, ids, spans)
    assert isinstance(found, Placed)
    assert len(found.hidden) == 3
    hidden = [tokenizer.reference.decode(list(edit.name)).replace("##", "").replace(" ", "") for edit in found.hidden]
    assert hidden == ["서울역", "서울", "서울"]
    for room in range(2, len(ids)):
        small = exact(tokenizer, room=room, hide_copies=True).place(
            Candidate("서울", 0, starts[2], copies=copies), text, ids, spans
        )
        if isinstance(small, Placed):
            first, end = small.window
            growth = small.mask.growth + sum(edit.growth for edit in small.hidden)
            assert end - first + growth <= room
            assert all(first <= edit.begin and edit.end <= end for edit in small.hidden)
            reach = [edit for edit in found.hidden if edit.begin < end and first < edit.end]
            assert list(small.hidden) == reach  # none is cut in two, and none is left in sight


@given(st.lists(st.integers(1, 4), min_size=2, max_size=40), st.data())
def test_windows_fit_hold_both_and_use_the_room(widths: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(widths)
    spans = Spans((ends - widths).tolist(), ends.tolist())
    antecedent = data.draw(st.integers(0, len(widths) - 2))
    mask = data.draw(st.integers(antecedent + 1, len(widths) - 1))
    room = data.draw(st.integers(1, len(widths) + 2))
    found = Placement(room=room).around(
        Candidate("가", 0, 0), spans, (antecedent, antecedent + 1), Edit(mask, mask + 1, (0,)), True
    )
    if mask + 1 - antecedent > room:
        assert found == "window"
        return
    assert isinstance(found, Placed)
    first, end = found.window
    assert 0 <= first <= antecedent
    assert mask < end <= len(widths)
    assert end - first == min(room, len(widths))
    before, behind = antecedent - first, end - (mask + 1)
    assert abs(before - behind) <= 1 or (first == 0 and before < behind) or (end == len(widths) and behind < before)
