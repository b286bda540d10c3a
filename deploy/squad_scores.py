"""F1 and exact match of SQuAD answers: a built-in scorer, and the user's evaluation script.

Both follow the definitions of the SQuAD authors (Rajpurkar et al., 2016 and 2018). A scorer is a
function of the data, the predictions (from question ids to answers) and the no-answer scores (from
question ids to P(no answer) / P(best span)). Its figures are percentages.
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from cli import UserError, read_text
from squad_utils import ArticleRecord, SquadData

Scorer = Callable[[SquadData, dict[str, str], dict[str, float]], dict[str, float]]

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and the articles a, an, the; single spaces."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, truth: str) -> bool:
    """Whether both texts are equal after normalisation."""
    return normalize_answer(prediction) == normalize_answer(truth)


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, with repetitions; 0 .. 1."""
    predicted, true = normalize_answer(prediction).split(), normalize_answer(truth).split()
    shared = sum((Counter(predicted) & Counter(true)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(true)
    return 2 * precision * recall / (precision + recall)


def _questions(articles: Sequence[ArticleRecord]) -> Iterator[tuple[str, list[str]]]:
    """(id, gold answer texts) of every question, in the file's order."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield qa["id"], [answer["text"] for answer in qa["answers"]]


def score_v1(articles: Sequence[ArticleRecord], predictions: dict[str, str]) -> dict[str, float]:
    """SQuAD 1.1: the best of a question's gold answers counts; a missing prediction counts 0.

    Returns:
        {"f1": percent, "exact_match": percent}, equal to `evaluate` of evaluate-v1.1.py.
    """
    every = list(_questions(articles))
    found = [(predictions[name], gold) for name, gold in every if name in predictions]
    exact_sum = sum(max(exact_match(guess, text) for text in gold) for guess, gold in found)
    f1_sum = sum(max(f1(guess, text) for text in gold) for guess, gold in found)
    return {"exact_match": 100.0 * exact_sum / len(every), "f1": 100.0 * f1_sum / len(every)}


def score_v2(
    articles: Sequence[ArticleRecord],
    predictions: dict[str, str],
    no_answer: dict[str, float],
) -> dict[str, float]:
    """SQuAD 2.0: as 1.1, but "" is right for a question without an answer.

    A no-answer score over a threshold replaces the answer by "". F1 and exact match have each the
    threshold that is best on these predictions.

    Returns:
        f1, exact_match: percent at their best thresholds; f1_threshold, exact_match_threshold.
    """
    has_answer = {name: bool(gold) for name, gold in _questions(articles)}
    exact_raw, f1_raw = {}, {}
    for name, texts in _questions(articles):
        gold = [text for text in texts if normalize_answer(text)] or [""]
        if name in predictions:
            guess = predictions[name]
            exact_raw[name] = max(exact_match(guess, text) for text in gold)
            f1_raw[name] = max(
                f1(guess, text)
                if normalize_answer(guess) and text
                else float(normalize_answer(guess) == text)
                for text in gold
            )
    result = {}
    for key, raw in (("exact_match", exact_raw), ("f1", f1_raw)):
        # Start from "" for all; then let answers in, by rising no-answer score.
        best = score = float(sum(not has for has in has_answer.values()))
        threshold = 0.0
        for name in sorted(no_answer, key=no_answer.__getitem__):
            if name not in raw:
                continue
            if has_answer[name]:
                score += raw[name]
            elif predictions[name]:
                score -= 1
            if score > best:
                best, threshold = score, no_answer[name]
        result[key], result[f"{key}_threshold"] = 100.0 * best / len(raw), threshold
    return result


def built_in_scorer(
    data: SquadData, predictions: dict[str, str], no_answer: dict[str, float]
) -> dict[str, float]:
    """`score_v2` for data with unanswerable questions, else `score_v1`."""
    if data.version_2:
        return score_v2(data.articles, predictions, no_answer)
    return score_v1(data.articles, predictions)


V2_FUNCTIONS = (
    "get_raw_scores",
    "make_qid_to_has_ans",
    "apply_no_ans_threshold",
    "make_eval_dict",
    "find_all_best_thresh",
)


def load_scorer(script: str | None, data: SquadData) -> Scorer:
    """The scorer of the user's script, or `built_in_scorer`.

    Args:
        script: an official evaluate-v1.1.py or evaluate-v2.0.py, or None for the built-in scorer.

    Raises:
        UserError: the script is missing or fails, it has the functions of neither version, or it
            is v1.1's and `data` has unanswerable questions.
    """
    if script is None:
        return built_in_scorer
    flag = "--squad_eval_script"
    read_text(script, flag)
    spec = importlib.util.spec_from_file_location("squad_eval_script", script)
    if spec is None or spec.loader is None:
        raise UserError(f"{flag}: {script} is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag}: {script} does not load: {error!r}") from None
    if all(callable(getattr(module, name, None)) for name in V2_FUNCTIONS):
        return _tried(script, data, lambda *found: _score_by_v2_script(module, *found))
    if not callable(getattr(module, "evaluate", None)):
        missing = [name for name in V2_FUNCTIONS if not hasattr(module, name)]
        raise UserError(
            f"{flag}: {script} has neither evaluate (SQuAD 1.1) nor all functions of SQuAD 2.0"
            f" (missing: {', '.join(missing)})"
        )
    if data.version_2:
        raise UserError(
            f"{flag}: {script} is for SQuAD 1.1, but {data.path} is SQuAD 2.0 (it has questions"
            " without an answer): give evaluate-v2.0.py, or leave the flag out"
        )

    def score(
        data: SquadData, predictions: dict[str, str], _: dict[str, float]
    ) -> dict[str, float]:
        result = module.evaluate(data.articles, predictions)
        return {"exact_match": float(result["exact_match"]), "f1": float(result["f1"])}

    return _tried(script, data, score)


def _tried(script: str, data: SquadData, scorer: Scorer) -> Scorer:
    """The scorer, after a try on empty answers: a script must not fail after an epoch."""
    try:
        scorer(data, dict.fromkeys(data.ids, ""), dict.fromkeys(data.ids, 0.0))
    except Exception as error:
        raise UserError(
            f"--squad_eval_script: {script} does not score {data.path}: {error!r}"
        ) from None
    return scorer


def _score_by_v2_script(
    script: ModuleType, data: SquadData, predictions: dict[str, str], no_answer: dict[str, float]
) -> dict[str, float]:
    exact_raw, f1_raw = script.get_raw_scores(data.articles, predictions)
    has_answer = script.make_qid_to_has_ans(data.articles)
    at_even_odds = [  # threshold 1: "" wins if no answer is more probable
        script.apply_no_ans_threshold(raw, no_answer, has_answer, 1.0)
        for raw in (exact_raw, f1_raw)
    ]
    result = script.make_eval_dict(*at_even_odds)
    script.find_all_best_thresh(result, predictions, exact_raw, f1_raw, no_answer, has_answer)
    return {
        "exact_match": float(result["best_exact"]),
        "f1": float(result["best_f1"]),
        "exact_match_threshold": float(result["best_exact_thresh"]),
        "f1_threshold": float(result["best_f1_thresh"]),
    }
