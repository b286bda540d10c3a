"""Tests of the scores against plain versions of the official evaluation scripts, written here."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli import UserError
from deploy import squad_scores
from squad_utils import SquadData, load_squad

COMMON = """
import re
import string


def normalize_answer(text):
    text = text.lower()
    text = "".join(letter for letter in text if letter not in set(string.punctuation))
    text = re.sub(r"\\b(a|an|the)\\b", " ", text)
    return " ".join(text.split())


def count_shared(guess, gold):
    gold, shared = list(gold), 0
    for word in guess:
        if word in gold:
            gold.remove(word)
            shared += 1
    return shared
"""
EVALUATE_V1 = (
    COMMON
    + """

def f1_score(guess, gold):
    guess, gold = normalize_answer(guess).split(), normalize_answer(gold).split()
    shared = count_shared(guess, gold)
    if shared == 0:
        return 0
    precision = 1.0 * shared / len(guess)
    recall = 1.0 * shared / len(gold)
    return (2 * precision * recall) / (precision + recall)


def evaluate(dataset, predictions):
    f1 = exact_match = total = 0
    for article in dataset:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                total += 1
                if qa["id"] not in predictions:
                    continue
                guess = predictions[qa["id"]]
                golds = [answer["text"] for answer in qa["answers"]]
                same = [normalize_answer(guess) == normalize_answer(gold) for gold in golds]
                exact_match += max(same)
                f1 += max([f1_score(guess, gold) for gold in golds])
    return {"exact_match": 100.0 * exact_match / total, "f1": 100.0 * f1 / total}
"""
)
EVALUATE_V2 = (
    COMMON
    + """

def compute_exact(gold, guess):
    return int(normalize_answer(gold) == normalize_answer(guess))


def compute_f1(gold, guess):
    gold, guess = normalize_answer(gold).split(), normalize_answer(guess).split()
    if len(gold) == 0 or len(guess) == 0:  # no answer: right only if both have none
        return int(gold == guess)
    shared = count_shared(guess, gold)
    if shared == 0:
        return 0
    precision = 1.0 * shared / len(guess)
    recall = 1.0 * shared / len(gold)
    return (2 * precision * recall) / (precision + recall)


def make_qid_to_has_ans(dataset):
    result = {}
    for article in dataset:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                result[qa["id"]] = bool(qa["answers"])
    return result


def get_raw_scores(dataset, preds):
    exact_scores, f1_scores = {}, {}
    for article in dataset:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                golds = [a["text"] for a in qa["answers"] if normalize_answer(a["text"])]
                if not golds:
                    golds = [""]
                if qa["id"] not in preds:
                    continue
                guess = preds[qa["id"]]
                exact_scores[qa["id"]] = max([compute_exact(gold, guess) for gold in golds])
                f1_scores[qa["id"]] = max([compute_f1(gold, guess) for gold in golds])
    return exact_scores, f1_scores


def apply_no_ans_threshold(scores, na_probs, qid_to_has_ans, na_prob_thresh):
    result = {}
    for qid in scores:
        if na_probs[qid] > na_prob_thresh:
            result[qid] = float(not qid_to_has_ans[qid])
        else:
            result[qid] = scores[qid]
    return result


def make_eval_dict(exact_scores, f1_scores, qid_list=None):
    if not qid_list:
        qid_list = list(exact_scores)
    total = len(qid_list)
    return {
        "exact": 100.0 * sum([exact_scores[qid] for qid in qid_list]) / total,
        "f1": 100.0 * sum([f1_scores[qid] for qid in qid_list]) / total,
        "total": total,
    }


def find_best_thresh(preds, scores, na_probs, qid_to_has_ans):
    current = 0
    for qid in qid_to_has_ans:
        if not qid_to_has_ans[qid]:
            current += 1
    best, best_thresh = current, 0.0
    for qid in sorted(na_probs, key=lambda qid: na_probs[qid]):
        if qid not in scores:
            continue
        if qid_to_has_ans[qid]:
            current += scores[qid]
        elif preds[qid]:
            current += -1
        if current > best:
            best, best_thresh = current, na_probs[qid]
    return 100.0 * best / len(scores), best_thresh


def find_all_best_thresh(main_eval, preds, exact_raw, f1_raw, na_probs, qid_to_has_ans):
    best_exact, exact_thresh = find_best_thresh(preds, exact_raw, na_probs, qid_to_has_ans)
    best_f1, f1_thresh = find_best_thresh(preds, f1_raw, na_probs, qid_to_has_ans)
    main_eval["best_exact"] = best_exact
    main_eval["best_exact_thresh"] = exact_thresh
    main_eval["best_f1"] = best_f1
    main_eval["best_f1_thresh"] = f1_thresh
"""
)
WORDS = ["a", "the", "an", "The", "cat", "Cat", "cats", "dog.", "U.S.", "-", "!", "1,000", "1000"]
WORDS += ["東京", "Café", "other", "theatre", "an-", "\u00a0x", "\n", "İ", "_"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The evaluation script of each version, as a file."""
    folder = tmp_path_factory.mktemp("scripts")
    for version, source in (("1.1", EVALUATE_V1), ("2.0", EVALUATE_V2)):
        (folder / f"evaluate-v{version}.py").write_text(source, encoding="utf-8")
    return {version: folder / f"evaluate-v{version}.py" for version in ("1.1", "2.0")}


@pytest.fixture(scope="module")
def official(scripts: dict[str, Path]) -> dict[str, ModuleType]:
    """The evaluation scripts of both versions, loaded without the product's help."""
    modules = {}
    for version, path in scripts.items():
        spec = importlib.util.spec_from_file_location(f"official_{version[0]}", path)
        modules[version] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[version])
    return modules


def v2_figures(
    script: ModuleType, articles: list, predictions: dict[str, str], no_answer: dict[str, float]
) -> dict[str, float]:
    """What the v2.0 script's main finds, under our names."""
    exact, f1 = script.get_raw_scores(articles, predictions)
    found: dict[str, Any] = {}
    has_answer = script.make_qid_to_has_ans(articles)
    script.find_all_best_thresh(found, predictions, exact, f1, no_answer, has_answer)
    return {
        "exact_match": found["best_exact"],
        "f1": found["best_f1"],
        "exact_match_threshold": found["best_exact_thresh"],
        "f1_threshold": found["best_f1_thresh"],
    }


def phrase(rng: random.Random, most: int = 5) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def random_case(
    seed: int, version_2: bool
) -> tuple[list[dict], dict[str, str], dict[str, float], set[str]]:
    """Articles, predictions (some empty, some missing), no-answer scores (some equal)."""
    rng = random.Random(seed)
    articles, predictions, no_answer = [], {}, {}
    missing = set()
    for a in range(3):
        paragraphs = []
        for p in range(3):
            qas = []
            for q in range(rng.randint(1, 6)):
                name = f"{a}-{p}-{q}"
                count = 0 if version_2 and rng.random() < 0.4 else rng.randint(1, 4)
                answers = [{"text": phrase(rng), "answer_start": 0} for _ in range(count)]
                qas.append({"id": name, "question": "?", "answers": answers})
                kind = rng.random()
                if kind < 0.1:
                    missing.add(name)
                elif kind < 0.2:
                    predictions[name] = rng.choice(["", " ", "the", "!"])
                elif kind < 0.5 and answers:
                    predictions[name] = rng.choice(answers)["text"].upper() + "."
                else:
                    predictions[name] = phrase(rng)
                no_answer[name] = rng.choice([0.0, 0.5, 1.0, rng.random(), 10 * rng.random()])
            paragraphs.append({"context": "", "qas": qas})
        articles.append({"title": "", "paragraphs": paragraphs})
    return articles, predictions, no_answer, missing


# ------------------------------------------------------------------------------------------------
# Random predictions


@pytest.mark.parametrize("version_2", [False, True])
def test_random_scores_are_the_official_ones(
    official: dict[str, ModuleType], version_2: bool
) -> None:
    """Equal to the last digit, on 100 sets of random predictions, missing and empty ones too."""
    seen = set()
    for seed in range(100):
        articles, predictions, no_answer, missing = random_case(seed, version_2)
        if not version_2:
            expected = official["1.1"].evaluate(articles, predictions)
            assert squad_scores.score_v1(articles, predictions) == expected
        expected = v2_figures(official["2.0"], articles, predictions, no_answer)
        assert squad_scores.score_v2(articles, predictions, no_answer) == expected
        seen.add((expected["f1_threshold"] != expected["exact_match_threshold"], bool(missing)))
    assert (False, True) in seen
    assert not version_2 or (True, True) in seen


@pytest.mark.parametrize("seed", range(20))
def test_normalisation_is_the_official_one(official: dict[str, ModuleType], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choices([*"aAnNthe THE.,'’-_ \n\t", "\u00a0", "İ", "ß", "東"], k=12))
        assert squad_scores.normalize_answer(text) == official["1.1"].normalize_answer(text)


# ------------------------------------------------------------------------------------------------
# The user's script


def as_file(path: Path, articles: list[dict]) -> SquadData:
    """Write articles as a SQuAD file, their answers standing in the contexts, and load it."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                for answer in qa["answers"]:
                    if not answer["text"].strip():  # in a file that is no answer
                        answer["text"] = "!"
                    answer["answer_start"] = len(paragraph["context"])
                    paragraph["context"] += answer["text"] + " "
    path.write_text(json.dumps({"version": "", "data": articles}), encoding="utf-8")
    return load_squad(str(path), "--squad_dev_data")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("version,version_2", [("1.1", False), ("2.0", True)])
def test_a_script_gives_the_figures_of_the_own_scorer(
    scripts: dict[str, Path], tmp_path: Path, version: str, version_2: bool, seed: int
) -> None:
    """The very same figures from the file's script and without it, for both versions."""
    articles, predictions, no_answer, _ = random_case(seed, version_2)
    data = as_file(tmp_path / "dev.json", articles)
    assert data.version_2 == version_2
    by_script = squad_scores.load_scorer(str(scripts[version]), data)
    built_in = squad_scores.load_scorer(None, data)
    figures = built_in(data, predictions, no_answer)
    assert by_script(data, predictions, no_answer) == figures
    assert all(type(figure) in (int, float) for figure in figures.values())
    keys = {"f1", "exact_match"}
    assert set(figures) == (keys | {"f1_threshold", "exact_match_threshold"} if version_2 else keys)


def test_the_v2_script_on_v1_data(scripts: dict[str, Path], tmp_path: Path) -> None:
    """With answers to all questions the best threshold takes none back: v1.1's figures."""
    articles, predictions, no_answer, _ = random_case(3, False)
    for article in articles:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                predictions.setdefault(qa["id"], "")
                for answer in qa["answers"]:
                    answer["text"] += " word"  # v2.0 takes an answer of articles alone as none
    data = as_file(tmp_path / "dev.json", articles)
    by_script = squad_scores.load_scorer(str(scripts["2.0"]), data)(data, predictions, no_answer)
    own = squad_scores.built_in_scorer(data, predictions, no_answer)
    assert by_script["f1"] == pytest.approx(own["f1"], abs=1e-9)
    assert by_script["exact_match"] == pytest.approx(own["exact_match"], abs=1e-9)


@pytest.mark.parametrize(
    "source,message",
    [
        ("def other(): pass", "neither evaluate"),
        ("def get_raw_scores(): pass", "missing: make_qid_to_has_ans"),
        ("def evaluate(:", "does not load"),
        ("raise SystemExit(1)", "does not load"),
        ("import no_such_module_x", "no_such_module_x"),
        ("evaluate = 3", "neither evaluate"),
    ],
)
def test_a_wrong_script_is_a_user_error(tmp_path: Path, source: str, message: str) -> None:
    """One line that names the flag and the file."""
    data = as_file(tmp_path / "dev.json", random_case(0, False)[0])
    script = tmp_path / "evaluate.py"
    script.write_text(source)
    with pytest.raises(UserError, match=message) as error:
        squad_scores.load_scorer(str(script), data)
    assert "--squad_eval_script" in str(error.value) and str(script) in str(error.value)
    assert "\n" not in str(error.value)


def test_scripts_that_do_not_fit(scripts: dict[str, Path], tmp_path: Path) -> None:
    """v1.1's script for v2.0 data, a missing file and a file that is not *.py."""
    data = as_file(tmp_path / "dev.json", random_case(0, True)[0])
    with pytest.raises(UserError, match=r"is for SQuAD 1\.1"):
        squad_scores.load_scorer(str(scripts["1.1"]), data)
    with pytest.raises(UserError, match="no such file"):
        squad_scores.load_scorer(str(tmp_path / "none.py"), data)
    (tmp_path / "evaluate.txt").write_text(EVALUATE_V2)
    with pytest.raises(UserError, match="not a Python file"):
        squad_scores.load_scorer(str(tmp_path / "evaluate.txt"), data)


# ------------------------------------------------------------------------------------------------
# Known figures


@pytest.mark.parametrize(
    "prediction,truth,f1,exact",
    [
        ("The Cat!", "cat", 1.0, True),
        ("a  cat,\nsat", "the cat sat.", 1.0, True),
        ("U.S.", "us", 1.0, True),
        ("well-known", "well known", 0.0, False),  # punctuation goes, no space comes
        ("theatre", "atre", 0.0, False),  # an article is a whole word
        ("cat dog", "cat bird", 0.5, False),  # 1 of 2 and 1 of 2
        ("cat", "cat sat on", 0.5, False),  # 1 of 1 and 1 of 3
        ("cat cat cat dog", "cat cat bird mouse", 0.5, False),  # 2 of 4: repeats count
        ("cat cat", "cat", 2 / 3, False),
        ("dog", "cat", 0.0, False),
        ("", "cat", 0.0, False),
    ],
)
def test_known_answers(prediction: str, truth: str, f1: float, exact: bool) -> None:
    assert squad_scores.f1(prediction, truth) == pytest.approx(f1, abs=1e-15)
    assert squad_scores.exact_match(prediction, truth) is exact


def articles_of(answers: dict[str, list[str]]) -> list[dict]:
    qas = [
        {"id": name, "answers": [{"text": text} for text in texts]}
        for name, texts in answers.items()
    ]
    return [{"paragraphs": [{"qas": qas}]}]


def test_known_v1_figures() -> None:
    """Right, half right by the better of two answers, empty, missing: F1 1.5 and EM 1 of 4."""
    articles = articles_of({"a": ["cat"], "b": ["no", "cat bird"], "c": ["cat"], "d": ["cat"]})
    predictions = {"a": "The cat.", "b": "cat dog", "c": "", "other": "cat"}
    assert squad_scores.score_v1(articles, predictions) == {"f1": 37.5, "exact_match": 25.0}
    assert squad_scores.score_v1(articles, {}) == {"f1": 0.0, "exact_match": 0.0}


def test_known_v2_figures() -> None:
    """a right, b half right, c wrongly answered, d rightly not, by rising no-answer score.

    Nothing answered: 2 (c, d). With a: 3. With b: F1 3.5, EM 3. With c: one less. Of 4.
    """
    articles = articles_of({"a": ["cat"], "b": ["cat bird"], "c": [], "d": []})
    predictions = {"a": "cat", "b": "cat dog", "c": "dog", "d": ""}
    no_answer = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    assert squad_scores.score_v2(articles, predictions, no_answer) == {
        "f1": 87.5,
        "f1_threshold": 0.2,
        "exact_match": 75.0,
        "exact_match_threshold": 0.1,
    }
    no_answer = {"a": 0.4, "b": 0.3, "c": 0.1, "d": 0.2}  # the wrong one most certain
    assert squad_scores.score_v2(articles, predictions, no_answer) == {
        "f1": 62.5,  # 2 - 1 + 0.5 + 1
        "f1_threshold": 0.4,
        "exact_match": 50.0,  # 2 - 1 + 0 + 1 is no better than nothing answered
        "exact_match_threshold": 0.0,
    }


def test_an_answer_of_articles_alone_is_none_in_v2() -> None:
    """Its text normalises to nothing, so the empty prediction is right; v1.1 has F1 0, EM 1."""
    articles = articles_of({"a": ["The"], "b": ["cat"]})
    predictions, no_answer = {"a": "", "b": "dog"}, {"a": 0.1, "b": 0.2}
    v2 = squad_scores.score_v2(articles, predictions, no_answer)
    assert (v2["f1"], v2["exact_match"]) == (50.0, 50.0)
    assert squad_scores.score_v1(articles, predictions) == {"f1": 0.0, "exact_match": 50.0}
