"""Exact and near duplicates, against references that compare every pair."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import guardrails
from sdpo.data.filters import duplicates
from sdpo.data.filters.duplicates import (
    SKETCH,
    earlier_equal,
    earlier_similar,
    fingerprints,
    sketches,
)


def test_fingerprints_see_words_but_not_case_or_space():
    a, b, c, d = fingerprints(["Hello  World", " hello\nworld ", "helloworld", "hello world!"])
    assert (a == b).all() and (a != c).any() and (a != d).any()
    assert fingerprints([]).shape == (0, 2)
    assert a.dtype == np.uint64


def test_earlier_equal_against_a_dictionary(seed):
    rows = np.random.default_rng(seed).integers(0, 6, (500, 2)).astype(np.uint64)
    first: dict[tuple, int] = {}
    expected = [first.setdefault(tuple(row), i) for i, row in enumerate(rows.tolist())]
    expected = [-1 if j == i else j for i, j in enumerate(expected)]
    assert earlier_equal(rows).tolist() == expected


def test_sketches_estimate_the_jaccard_index(seed):
    pairs = guardrails.pairs(400, seed)
    first = sketches([pair.texts[0] for pair in pairs])
    second = sketches([pair.texts[1] for pair in pairs])
    truth = np.array([pair.similarity for pair in pairs])
    error = (first == second).mean(axis=1) - truth
    deviation = np.sqrt(truth * (1 - truth) / SKETCH)
    assert (np.abs(error) <= 4.5 * deviation + 1e-9).all()
    assert abs(error.mean()) < 0.01


def test_sketches_do_not_depend_on_neighbours_or_the_process():
    texts = [f"text number {i} has some words, and {i} more" * (i % 5) for i in range(70)]
    together = sketches(texts)
    alone = np.concatenate([sketches([text]) for text in texts])
    assert (together == alone).all()
    module, env = duplicates.__name__, {"PYTHONHASHSEED": "77"}
    code = f"from {module} import sketches; print(sketches({texts[:4]!r}).sum())"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert int(out.stdout) == together[:4].sum(), out.stderr


def test_short_texts_are_told_apart_and_order_matters():
    texts = ["", "a", "b", "a b", "b a", "a b c", "c b a", "!!!", "???", "你", "好"]
    rows = sketches(texts)
    assert sketches([]).shape == (0, SKETCH)
    for i in range(len(texts)):
        for j in range(i):
            assert (rows[i] == rows[j]).mean() < 0.5, (texts[i], texts[j])


def test_scripts_without_spaces_are_read_by_character():
    assert duplicates.split_words("Abc 你好ab世") == ["abc", "你", "好", "ab", "世"]
    text = "".join(chr(0x4E00 + 13 * i) for i in range(200))
    edited = text[:100] + "的" + text[101:]
    assert earlier_similar(sketches([text, edited])).tolist() == [-1, 0]
    thai = sketches(["ที่นี่มีแมวสองตัว" * 3, "อีกเรื่องหนึ่งไม่เหมือน" * 3])
    assert earlier_similar(thai).tolist() == [-1, -1]


def test_ascii_and_other_texts_are_split_alike():
    text = "Don't stop_me, now: 3.14 (or) x=y\tz\x1cq"
    assert duplicates.split_words(text) == duplicates.split_words(text + " é")[:-1]


def brute_force(rows: np.ndarray, threshold: float) -> list[int]:
    """Every row against all that stay; the earliest similar one."""
    kept, answer = [], []
    for i, row in enumerate(rows):
        similar = [j for j in kept if (row == rows[j]).mean() >= threshold]
        answer.append(similar[0] if similar else -1)
        if not similar:
            kept.append(i)
    return answer


def families(seed: int, count: int = 60, size: int = 5) -> np.ndarray:
    """Sketches in families; members differ from the first of theirs in a few places."""
    random_ = np.random.default_rng(seed)
    firsts = random_.integers(0, 2**32, (count, SKETCH), dtype=np.uint32)
    rows = np.repeat(firsts, size, axis=0)
    changed = random_.random(rows.shape) < random_.choice([0.0, 0.02, 0.06, 0.4], (len(rows), 1))
    rows[changed] = random_.integers(0, 2**32, int(changed.sum()), dtype=np.uint32)
    return rows[random_.permutation(len(rows))]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_earlier_similar_against_every_pair(seed, threshold):
    rows = families(seed)
    expected = np.array(brute_force(rows, threshold))
    answer = earlier_similar(rows, threshold)
    assert (expected >= 0).sum() > 20
    assert ((answer >= 0) == (expected >= 0)).mean() > 0.98
    assert (answer == expected).mean() > 0.97
    later = np.flatnonzero(answer >= 0)
    assert (answer[later] < later).all()
    assert (answer[answer[later]] == -1).all(), "they are duplicates of rows that stay"
    assert ((rows[later] == rows[answer[later]]).mean(axis=1) >= threshold).all()


def test_a_drifting_chain_is_cut(seed):
    random_ = np.random.default_rng(seed)
    rows = [random_.integers(0, 2**32, SKETCH, dtype=np.uint32)]
    for step in range(11):  # 4 places differ from the row before, and in the end all from the first
        rows.append(rows[-1].copy())
        rows[-1][4 * step : 4 * step + 4] += 1
    answer = earlier_similar(np.stack(rows))
    assert answer.tolist() == brute_force(np.stack(rows), 0.8)
    assert answer.tolist()[:5] == [-1, 0, 0, 0, -1]


def test_a_threshold_is_a_similarity():
    rows = sketches(["a"])
    for threshold in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            earlier_similar(rows, threshold)
    assert earlier_similar(sketches([])).tolist() == earlier_equal(fingerprints([])).tolist() == []
    assert earlier_similar(rows).tolist() == [-1]


def test_pairs_at_the_threshold_become_candidates():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
        width = duplicates._band_width(threshold)
        assert 1 - (1 - threshold**width) ** (SKETCH // width) > 0.99
    assert duplicates._band_width(0.8) == 4


def test_generated_near_duplicates_are_caught_and_templates_are_not():
    by_similarity, by_edit = guardrails.duplicate_rates(guardrails.pairs(1200, 1))
    for low in ("1.00", "0.95", "0.90"):
        assert by_similarity[low]["caught"] >= 0.99 * by_similarity[low]["pairs"] > 50
    assert by_similarity["0.85"]["caught"] >= 0.8 * by_similarity["0.85"]["pairs"]
    for low in ("0.50", "0.00"):
        assert by_similarity[low]["caught"] == 0 < by_similarity[low]["pairs"]
    assert by_edit["none: only a template"]["caught"] == 0
    for edit in ("case and white space", "punctuation"):
        assert by_edit[edit]["caught"] == by_edit[edit]["pairs"]


def test_the_reference_counts_shingles_by_hand():
    assert guardrails.jaccard("a b c d", "A, b c e") == 1 / 3
    assert guardrails.jaccard("a", "a!") == 1
