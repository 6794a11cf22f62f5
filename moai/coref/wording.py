"""What a run says while it works, in Korean or English: `--lang`. People grep for 배치, 통과, 누적 and 속도."""

from __future__ import annotations

from typing import Any

LANGUAGES = ("ko", "en")
_TEXTS = {
    "ko": {
        "published": "이미 준비되어 있고 바뀐 것이 없습니다: {path}",
        "stays": "같은 내용이 이미 있어 그대로 둡니다: {path}",
        "stage 1": "[1/2] 배치 병렬 품질 필터링 ({workers} 워커)",
        "stage 2": "[2/2] 샘플 생성: 총 샘플 수: {number:,} | 배치 수: {files}개 (배치당 약 {each:,}개)",
        "merge": "배치 병합 중... (링크로, 복사하지 않고)",
        "saved": "저장 완료: {path}",
        "end": "샘플 수: {number:,} | 시간: {seconds:.1f}초 ({minutes:.1f}분) | "
        "샤드: {made}개 새로 만듦, {reused}개 재사용",
        "batch": "배치 {batch}/{batches}: 처리 중: {documents:,}{of} | 통과: {passed:,} | 후보: {found:,} | "
        "속도: {speed:,.0f} docs/s | 오류: {errors:,}{left} | 메모리: {parent:.2f} GB + 워커 {workers:.2f} GB",
        "left": " | 남은 시간: {clock}",
        "written": " → 배치 {batch} 완료: {number:,}개",
        "stage end": " → {passed:,}개 통과 | 누적: {passed:,}개 | 평균 속도: {speed:,.0f} docs/s",
        "losses": "처음 {number:,}개 문서에서 규칙별로 빠진 것:",
    },
    "en": {
        "published": "prepared already, and nothing changed: {path}",
        "stays": "the same content stands there already: {path}",
        "stage 1": "[1/2] judging documents ({workers} workers)",
        "stage 2": "[2/2] making samples: {number:,} in all | {files} batches of about {each:,}",
        "merge": "putting batches together (links, no copies)",
        "saved": "saved: {path}",
        "end": "{number:,} samples | {seconds:.1f} s ({minutes:.1f} min) | shards: {made} made, {reused} reused",
        "batch": "batch {batch}/{batches}: {documents:,}{of} | passed: {passed:,} | found: {found:,} | "
        "{speed:,.0f} docs/s | errors: {errors:,}{left} | memory: {parent:.2f} GB + workers {workers:.2f} GB",
        "left": " | {clock} left",
        "written": " -> batch {batch} done: {number:,}",
        "stage end": " -> {passed:,} passed | {speed:,.0f} docs/s on average",
        "losses": "lost in the first {number:,} documents, by rule:",
    },
}


def said(lang: str, what: str, **values: Any) -> str:
    """The line `what` in that language."""
    return _TEXTS[lang][what].format(**values)
