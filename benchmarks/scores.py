"""Measure scores that compare: calibration, F1 among several paragraphs, and no answer.

    python -m benchmarks.scores --model=DIR --squad_data=DEV --output_dir=DIR

Each question is asked of its own paragraph and of others that BM25 ranks high and that do not hold
its answer. The shared score, a softmax over the spans of all windows read, is compared with the
probability of a span in its window alone. Needs no torch. The logits of each window are
kept in the output folder, so the same command again goes on after a stop.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import squad_utils
from cli import ArgumentParser, UserError, number, run_main
from deploy.documents import Paragraph
from deploy.runtime import PRECISIONS, OnnxModel, Runtime, load_exported
from deploy.search import SHAPES, Words, build_index
from deploy.settings import QA
from deploy.squad_scores import exact_match, f1
from squad_utils import SquadData, Windows

RANKED = 3  # times as many paragraphs are ranked as are read: some hold the answer
BINS = 10  # of the calibration error


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, action="append", help="output folder of a QA model; repeatable")
    add("--squad_data", required=True, help="SQuAD file with the questions and paragraphs")
    add("--extra_contexts", help="SQuAD file whose paragraphs are read as well")
    add("--output_dir", required=True, help="folder of the logits and of scores.json")
    add("--questions", type=number(int, 2), default=1_000_000, help="ask so many, drawn at random")
    add("--paragraphs", type=number(int, 1), nargs="+", default=[1, 5, 20], help="to read")
    add("--runtime_precision", choices=PRECISIONS, default="f32")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# What is read


@dataclass(frozen=True)
class Reading:
    """The pairs of a question and a paragraph; a question's own paragraph comes first.

    Attributes:
        asked: int64 [questions], indices into the data.
        half: bool [questions], whether the question's article is of the half that is fitted to.
        first: int64 [questions + 1]; question i has the pairs first[i] .. first[i + 1].
        pairs: one "question" per pair, for `cut_windows`.
    """

    data: SquadData
    asked: np.ndarray
    half: np.ndarray
    first: np.ndarray
    pairs: SquadData


def make_reading(args: argparse.Namespace, words: Words) -> Reading:
    """Draw the questions, and find the other paragraphs of each."""
    data = squad_utils.load_squad(args.squad_data, "--squad_data")
    texts = list(data.contexts)
    if args.extra_contexts:
        texts += squad_utils.load_squad(args.extra_contexts, "--extra_contexts").contexts
    index = build_index([Paragraph(text, "", None, 0) for text in texts], words, "bm25")
    rng, count = np.random.default_rng(0), max(args.paragraphs)
    asked = np.sort(rng.permutation(np.flatnonzero(data.answerable))[: args.questions])
    sizes = [sum(len(each["qas"]) for each in a["paragraphs"]) for a in data.articles]
    article = np.repeat(np.arange(len(sizes)), sizes)
    fitted = rng.permutation(len(sizes)) < len(sizes) / 2
    golds = data.all_answers
    contexts: list[str] = []
    first = [0]
    for q in tqdm(asked, desc="finding paragraphs", disable=None):
        own = data.contexts[data.context_of[q]]
        answers = [text.casefold() for text in golds[q]]
        contexts.append(own)
        for found in index.nearest(data.questions[q], RANKED * count):
            text = found.paragraph.text
            lacks = not any(answer in text.casefold() for answer in answers)
            if lacks and text not in own and len(contexts) - first[-1] <= count:
                contexts.append(text)
        first.append(len(contexts))
    of = np.repeat(asked, np.diff(first))
    number_of = np.arange(len(contexts), dtype=np.int32)
    pairs = SquadData(
        path=data.path,
        articles=[],
        contexts=contexts,
        ids=[str(i) for i in number_of],
        questions=[data.questions[q] for q in of],
        context_of=number_of,
        answers=[[] for _ in contexts],
        answerable=np.zeros(len(contexts), bool),
        version_2=True,
        sha256=data.sha256,
    )
    return Reading(data, asked, fitted[article[asked]], np.array(first), pairs)


def read_logits(model: OnnxModel, windows: Windows, path: str) -> list[np.ndarray]:
    """The start and end logits of each window, float32 [2, length]; computed ones are in a file."""
    lengths = windows.total_lengths
    ends = np.cumsum(lengths) * 8  # bytes
    longest = model.settings.lengths["max_seq_length"]
    shapes = [n for n in SHAPES if n < longest] + [longest]
    infer = functools.lru_cache(model.compile)
    with open(path, "ab") as file:
        done = int(np.searchsorted(ends, file.tell(), side="right"))
        file.truncate(int(ends[done - 1]) if done else 0)
        for w in tqdm(range(done, len(windows)), "reading", len(windows), initial=done):
            shape = shapes[int(np.searchsorted(shapes, lengths[w]))]
            batch = squad_utils.make_batch(windows, np.array([w]), shape)
            found = np.concatenate(infer(shape)(batch)).astype(np.float32)
            if not np.isfinite(found[:, : lengths[w]]).all():
                raise UserError(f"--model: {model.path} gives numbers that are not finite")
            file.write(found[:, : lengths[w]].tobytes())
    flat = np.fromfile(path, np.float32)
    return [part.reshape(2, -1) for part in np.split(flat, ends[:-1] // 4)]


# ------------------------------------------------------------------------------------------------
# Scores


class Scored:
    """The logits of all windows, and what both scores make of them."""

    def __init__(self, reading: Reading, windows: Windows, logits: list[np.ndarray], most: int):
        self.reading, self.windows, self.logits, self.most = reading, windows, logits, most

    def spans(self, w: int, own: bool, temperature: float) -> tuple[int, int, float, float]:
        """First and last token, log odds, and `total` of a window's best span."""
        windows, rows = self.windows, np.array([w])
        start, end, odds, total = squad_utils.best_spans(
            self.logits[w][:1],
            self.logits[w][1:],
            windows.total_lengths[rows],
            windows.context_at[rows],
            self.most,
            own=windows.own[rows] if own else None,
            temperature=temperature,
        )
        return int(start[0]), int(end[0]), float(odds[0]), float(total[0])

    def best(self, way: str) -> tuple[np.ndarray, list[str]]:
        """The value and the text of each pair's best span.

        Args:
            way: "shared" gives log odds against [CLS], "logits" the sum of both logits, "window"
                the log-probability in the window.
        """
        windows = self.windows
        value = np.full(len(self.reading.pairs.ids), -np.inf)
        texts = [""] * len(value)
        for w, pair in enumerate(windows.question):
            first, last, mine, _ = self.spans(w, way != "window", 1.0)
            if not np.isfinite(mine):
                continue
            if way != "shared":
                mine += float(self.logits[w][:, 0].sum())
            if way == "window":
                mine -= float(np.logaddexp.reduce(self.logits[w], axis=1).sum())
            if mine > value[pair]:
                value[pair] = mine
                shift = int(windows.first[w] - windows.context_at[w])
                offsets = windows.contexts.offsets_of(windows.context_of[pair])
                begin, end = offsets[first + shift, 0], offsets[last + shift, 1]
                texts[pair] = self.reading.pairs.contexts[pair][begin:end]
        return value, texts

    def totals(self, pairs: np.ndarray, temperature: float) -> np.ndarray:
        """The `total` of each of the pairs, float64 [all pairs]; -inf for the others."""
        found = np.full(len(self.reading.pairs.ids), -np.inf)
        for w in np.flatnonzero(np.isin(self.windows.question, pairs)):
            pair = self.windows.question[w]
            found[pair] = np.logaddexp(found[pair], self.spans(w, True, temperature)[3])
        return found


def calibration_error(scores: np.ndarray, right: np.ndarray) -> float:
    """The mean difference between scores and shares of right answers, over BINS bins, in percent.

    Weighted by the answers in a bin (expected calibration error; Guo et al., 2017).
    """
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, scores - right, BINS)
    return float(100 * np.abs(gaps).sum() / len(scores))


def separation(with_answer: np.ndarray, without: np.ndarray) -> float:
    """How often a question with an answer scores above one without, in percent; 50 is chance."""
    order = np.sort(without)
    below = np.searchsorted(order, with_answer, "left") + np.searchsorted(
        order, with_answer, "right"
    )
    return float(100 * below.mean() / 2 / len(without))


def measure(scored: Scored, counts: list[int], threshold: float) -> list[dict[str, float | str]]:
    """A row of figures for each score and number of paragraphs.

    Args:
        threshold: the no-answer score above which there is no answer.
    """
    reading, every = scored.reading, scored.reading.data.all_answers
    golds = [every[q] for q in reading.asked]
    first, last, fit = reading.first[:-1], reading.first[1:], reading.half
    others = np.flatnonzero(last > first + 1)  # questions with another paragraph

    def is_right(texts: list[str], pairs: np.ndarray) -> np.ndarray:
        found = zip(pairs, golds, strict=True)
        return np.array([any(exact_match(texts[p], gold) for gold in some) for p, some in found])

    odds, texts = scored.best("shared")
    own = first[fit]

    def scores(temperature: float) -> np.ndarray:
        totals = scored.totals(own, temperature)[own]
        return squad_utils.span_scores(odds[own], totals, temperature)

    temperature = squad_utils.fit_temperature(scores, is_right(texts, first)[fit])
    totals = scored.totals(np.arange(len(odds)), temperature)
    rows: list[dict[str, float | str]] = []
    ways = {way: scored.best(way) for way in ("window", "logits")} | {"shared": (odds, texts)}
    for name, (value, answers) in ways.items():
        for count in counts:
            read = [slice(a, min(a + count, z)) for a, z in zip(first, last, strict=True)]
            chosen = first + np.array([value[some].argmax() for some in read])
            without = [slice(first[q] + 1, min(first[q] + 1 + count, last[q])) for q in others]
            lacking = np.array([value[some].max() for some in without])
            if name == "shared":
                total = np.array([np.logaddexp.reduce(totals[some]) for some in read])
                shown = squad_utils.span_scores(value[chosen], total, temperature)
                told = -lacking > np.log(threshold), -value[chosen] > np.log(threshold)
            else:
                shown, told = np.exp(np.minimum(value[chosen], 0)), (np.zeros(1), np.zeros(1))
            right, pairs = is_right(answers, chosen), zip(chosen, golds, strict=True)
            overlap = [max(f1(answers[pair], gold) for gold in some) for pair, some in pairs]
            row: dict[str, float | str] = {
                "score": name,
                "paragraphs": count,
                "f1": 100 * float(np.mean(overlap)),
                "exact_match": 100 * float(right.mean()),
                "separation": separation(value[chosen], lacking),
                "told_none": 100 * float(told[0].mean()),
                "wrongly_told_none": 100 * float(told[1].mean()),
            }
            if name != "logits":  # which are no probabilities
                row["calibration_error"] = calibration_error(shown[~fit], right[~fit])
            rows.append(row | ({"temperature": temperature} if name == "shared" else {}))
    return rows


def show(model: str, rows: list[dict[str, float | str]]) -> None:
    print(f"\n{model}")
    print("score   paragraphs     F1     EM  calibration error  separation  told none  (wrongly)")
    for row in rows:
        print(
            f"{row['score']:6}  {row['paragraphs']:10}  {row['f1']:5.2f}  {row['exact_match']:5.2f}"
            f"  {row.get('calibration_error', np.nan):17.1f}  {row['separation']:10.1f}"
            f"  {row['told_none']:9.1f}  {row['wrongly_told_none']:9.1f}"
        )


def main() -> None:
    args = parse_arguments()
    os.makedirs(args.output_dir, exist_ok=True)
    record: dict[str, list[dict[str, float | str]]] = {}
    for folder in args.model:
        model = load_exported(folder, "--model", QA, Runtime("auto", args.runtime_precision))
        lengths = model.settings.lengths
        length, asked = lengths["max_seq_length"], lengths["max_query_length"]
        reading = make_reading(args, Words(model.tokenizer, length - asked - 3))
        contexts, questions = squad_utils.tokenize_squad(reading.pairs, model.tokenizer, asked)
        windows = squad_utils.cut_windows(
            reading.pairs, (contexts, questions), model.settings.special, length,
            lengths["doc_stride"], for_training=False,
        )  # fmt: skip
        with open(model.path, "rb") as file:
            key = hashlib.file_digest(file, "sha256")
        key.update(windows.rows.tobytes() + contexts.ids.tobytes() + model.arithmetic.encode())
        path = os.path.join(args.output_dir, f"{key.hexdigest()[:16]}.logits")
        logits = read_logits(model, windows, path)
        scored = Scored(reading, windows, logits, lengths["max_answer_length"])
        threshold = model.settings.null_threshold
        rows = measure(scored, args.paragraphs, np.inf if threshold is None else threshold)
        record[folder] = rows
        show(folder, rows)
        with open(os.path.join(args.output_dir, "scores.json"), "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    run_main(main)
