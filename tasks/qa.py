"""Extractive QA as a task: its windows, batches, losses and evaluation."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import (
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import ModelOutput

import squad_utils
from bert.model_folder import AutoClass, special_ids
from cli import UserError, warn
from deploy import onnx_file
from deploy.squad_scores import Scorer, load_scorer
from squad_utils import SquadData, Windows
from tasks.extra_pairs import ExtraBatches, Pool, check_articles, read_texts
from tasks.hidden_states import OutputLoss, summed_errors
from tasks.task import Rows, Task
from training.passes import Batches, BatchesByLength, LossFunction, as_tensors, to_device
from training.results import TaskCard
from training.run import Run
from training.states import write_json

LOGITS_TEMPERATURE = 1.0  # the default of --logits_temperature


# ------------------------------------------------------------------------------------------------
# The task


def check_lengths(args: argparse.Namespace) -> None:
    """Check that a context fits beside the longest question; warn of a longer --doc_stride.

    Raises:
        UserError: there is no room for a context.
    """
    room = args.max_seq_length_c - args.max_seq_length_q - 3
    if room < 1:
        raise UserError(
            f"--max_seq_length_c={args.max_seq_length_c} is too short: a question of"
            f" --max_seq_length_q={args.max_seq_length_q}, 3 special tokens and a context need at"
            f" least {args.max_seq_length_q + 4}"
        )
    if room < args.doc_stride:
        warn(
            f"--doc_stride={args.doc_stride} is more than the {room} context tokens beside a long"
            " question: such windows start closer, so that they leave no gap"
        )


class QaTask(Task):
    """Extractive QA: windows, and the answers in them.

    Attributes:
        train_windows, dev_windows: set by `tokenize`.
        num_extra: windows that --extra_pairs adds to each epoch, set by `tokenize`.
    """

    auto_class: ClassVar[AutoClass] = AutoModelForQuestionAnswering
    architectures: ClassVar[tuple[str, ...]] = (
        "BertForQuestionAnswering",
        "PackedBertForQuestionAnswering",
    )
    best_by = "f1"
    score_names: ClassVar[dict[str, str]] = {"f1": "F1", "exact_match": "exact match"}
    outputs = onnx_file.Outputs(
        ("start_logits", "end_logits"), onnx_file.QA_OUTPUTS, per_token=True
    )
    train_windows: Windows
    dev_windows: Windows
    evaluation: QaEvaluation

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the files that the flags name.

        Raises:
            UserError: a file cannot be used, or a window has no room for a context.
        """
        check_lengths(args)
        super().__init__(args)
        paths = getattr(args, "extra_texts", None)
        self.extra_texts = read_texts(paths, self.dev_data.contexts) if paths else []
        if not self.train_data.answerable.all() and self.dev_data.answerable.all():
            warn(
                "only --squad_train_data has questions without an answer: no threshold can be"
                " fitted on --squad_dev_data, so ask.py will not tell that a text has no answer"
            )
        if getattr(args, "extra_pairs", 0.0) and not paths:
            check_articles(self.train_data)
        self.scorer = load_scorer(args.squad_eval_script, self.dev_data)

    def hashes(self) -> dict[str, str]:
        texts = "\0".join(self.extra_texts).encode()
        own = {"sha256_texts": hashlib.sha256(texts).hexdigest()[:16]} if texts else {}
        return {**super().hashes(), **own}

    def tokenize(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Cut both files into windows.

        Raises:
            UserError: there is nothing to train on.
        """
        lengths = (self.args.max_seq_length_q, self.args.max_seq_length_c, self.args.doc_stride)
        self.train_windows = make_windows(self.train_data, tokenizer, *lengths, for_training=True)
        self.dev_windows = make_windows(self.dev_data, tokenizer, *lengths, for_training=False)
        self.train_rows, self.dev_rows = rows_of(self.train_windows), rows_of(self.dev_windows)
        if not len(self.train_windows):
            raise UserError(
                f"--squad_train_data: none of the answers in {self.train_data.path} is in its"
                " context at answer_start, so there is nothing to learn"
            )
        warn_of_long_answers(
            {"training": self.train_windows, "dev": self.dev_windows},
            self.args.max_answer_length,
            self.args.max_seq_length_c,
        )
        self.num_extra = 0
        if factor := getattr(self.args, "extra_pairs", 0.0):
            self.num_extra = max(1, round(factor * len(self.train_windows)))
            texts = squad_utils.tokenize(
                tokenizer.backend_tokenizer, self.extra_texts, False, "tokenising texts"
            )
            room = self.args.max_seq_length_c - 3 - self.train_windows.questions.lengths
            self.pool = Pool.of(self.train_data, self.train_windows, texts, room)

    def make_evaluation(self, run: Run) -> QaEvaluation:
        args = self.args
        size, longest = args.per_gpu_eval_batch_size, args.max_answer_length
        self.evaluation = QaEvaluation(
            run, self.dev_data, self.dev_windows, self.scorer, size, longest
        )
        return self.evaluation

    def batches(self, step_size: int) -> QaBatches | ExtraBatches:
        """Batches of windows; with extra pairs they have no targets."""
        windows, seed = self.train_windows, self.args.seed
        if self.num_extra:
            return ExtraBatches(windows, self.pool, self.num_extra, step_size, seed)
        return QaBatches(windows, step_size, seed)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.permutation(len(self.train_windows))[:count]

    def fine_tuning(
        self, run: Run, teacher: PreTrainedModel | None, state_maps: nn.ModuleList | None
    ) -> tuple[LossFunction, Batches]:
        """`QaLoss`, and batches of all windows."""
        args = self.args
        if not self.train_data.answerable.any():
            raise UserError(
                f"--squad_train_data: no question of {self.train_data.path} has an answer, so there"
                " is nothing to learn"
            )
        loss = QaLoss(run, teacher, args.kd_weight, args.supervision_weight, state_maps)
        return loss, self.batches(args.total_train_batch_size)

    def output_loss(self, run: Run, teachers: Sequence[PreTrainedModel]) -> OutputLoss | None:
        """`LogitsLoss`, by --logits_weight and --logits_temperature."""
        weight, temperature = self.args.logits_weight, self.args.logits_temperature
        temperature = LOGITS_TEMPERATURE if temperature is None else temperature
        return LogitsLoss(run, teachers, weight, temperature) if weight else None

    @property
    def num_examples(self) -> int:
        return len(self.train_windows) + self.num_extra

    def describe(self) -> str:
        extra = f" and {self.num_extra:,} more in each epoch" if self.num_extra else ""
        return (
            f"{len(self.train_data.ids):,} questions in {len(self.train_windows):,} windows{extra}"
            f" to train on, {len(self.dev_data.ids):,} to evaluate on"
        )

    def counts(self) -> dict[str, int]:
        return {
            "train_questions": len(self.train_data.ids),
            "train_windows": len(self.train_windows),
            "extra_windows": self.num_extra,
            "dev_questions": len(self.dev_data.ids),
            "dev_windows": len(self.dev_windows),
        }

    def write_answers(self) -> None:
        folder = self.args.output_dir
        write_json(os.path.join(folder, "predictions.json"), self.evaluation.predictions)
        if self.dev_data.version_2:
            path = os.path.join(folder, "no_answer_scores.json")
            write_json(path, self.evaluation.no_answer_scores)

    def card(self, figures: Mapping[str, float]) -> TaskCard:
        args, counts = self.args, self.counts()
        return TaskCard(
            title="Extractive question answering",
            tag="question-answering",
            rows={
                f"F1 on `{os.path.basename(args.squad_dev_data)}`": f"{figures['f1']:.2f}",
                "exact match": f"{figures['exact_match']:.2f}",
                "dev questions": counts["dev_questions"],
                "training questions": counts["train_questions"],
            },
            outputs="outputs\n`output_s` and `output_e`, the logits of the answer's first and last"
            f" token, float32 [1, {args.max_seq_length_c}].",
            inputs="The input is `[CLS] question [SEP] context [SEP]`, token types 0 and 1;"
            f" questions are cut\nto {args.max_seq_length_q} tokens, and contexts that do not fit"
            f" are covered by windows {args.doc_stride} tokens apart.",
        )

    def reader_settings(self, figures: Mapping[str, float]) -> dict[str, float | None]:
        """Lengths, and the no-answer score over which a SQuAD 2.0 model gives no answer."""
        return {
            "max_query_length": self.args.max_seq_length_q,
            "max_seq_length": self.args.max_seq_length_c,
            "doc_stride": self.args.doc_stride,
            "max_answer_length": self.args.max_answer_length,
            "null_threshold": figures.get("f1_threshold"),
        }


# ------------------------------------------------------------------------------------------------
# Batches


def make_windows(
    data: SquadData,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length_q: int,
    max_seq_length_c: int,
    doc_stride: int,
    for_training: bool,
) -> Windows:
    """Tokenise a SQuAD file and cut it into windows; squad_utils explains the arguments."""
    tokens = squad_utils.tokenize_squad(data, tokenizer.backend_tokenizer, max_seq_length_q)
    return squad_utils.cut_windows(
        data, tokens, special_ids(tokenizer), max_seq_length_c, doc_stride, for_training
    )


def warn_of_long_answers(windows: dict[str, Windows], longest: int, max_seq_length_c: int) -> None:
    """Warn of answers longer than `longest` tokens, with their number per file."""
    lengths = {name: each.answer_tokens @ [-1, 1] + 1 for name, each in windows.items()}
    every = np.sort(np.concatenate(list(lengths.values())))
    if not len(every) or every[-1] <= longest:
        return
    counts = " and ".join(
        f"{(each > longest).sum():,} of {len(each):,} {name} answers"
        for name, each in lengths.items()
    )
    enough = every[-(-len(every) * 99 // 100) - 1]
    over = f", but --max_seq_length_c={max_seq_length_c} is too short for that"
    warn(
        f"{counts} have over --max_answer_length={longest} tokens and are never found; {enough}"
        f" covers 99% of all{over if enough > max_seq_length_c - 3 else ''}"
    )


def rows_of(windows: Windows) -> Rows:
    """Windows as the rows of a task."""
    return Rows(windows.total_lengths, functools.partial(squad_utils.make_batch, windows))


class QaBatches(BatchesByLength):
    """Batches of windows with the spans to learn."""

    def __init__(self, windows: Windows, step_size: int, seed: int) -> None:
        super().__init__(windows.total_lengths, step_size, seed)
        self.windows = windows
        self._targets = functools.lru_cache(maxsize=1)(self._draw_targets)

    def _draw_targets(self, epoch: int) -> np.ndarray:
        # A stream of its own: the order of the windows must not depend on the answers.
        return squad_utils.targets(self.windows, np.random.default_rng([self.seed, epoch, 1]))

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs [B, L], and `targets` [B, 2]: positions of the answer's first and last token."""
        arrays = squad_utils.make_batch(self.windows, chosen)
        return as_tensors({**arrays, "targets": self._targets(epoch)[chosen]})


# ------------------------------------------------------------------------------------------------
# The loss


class QaOutput(Protocol):
    """The outputs of a QA model: logits [B, L], and hidden states if asked for."""

    start_logits: Tensor
    end_logits: Tensor
    hidden_states: Sequence[Tensor]


def forward(model: nn.Module, batch: dict[str, Tensor], hidden_states: bool = False) -> QaOutput:
    """The model's outputs for a batch, without its targets."""
    inputs = {name: batch[name] for name in squad_utils.INPUTS}
    return model(**inputs, output_hidden_states=hidden_states)


def stacked(outputs: QaOutput) -> Tensor:
    """Logits of start and end, float32 [2, B, L]."""
    return torch.stack([outputs.start_logits, outputs.end_logits]).float()


def log_softmax(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Log-softmax of logits [2, B, L] over the tokens of each window, without padding."""
    return F.log_softmax(logits.masked_fill(attention_mask == 0, float("-inf")), dim=-1)


def log_probabilities(outputs: QaOutput, attention_mask: Tensor) -> Tensor:
    """`log_softmax` of a model's logits: [2, B, L], start and end."""
    return log_softmax(stacked(outputs), attention_mask)


class QaLoss:
    """The losses of QA fine-tuning, [B] each.

    - `answer`: cross-entropy of the answer's start and end, mean of both;
    - `distillation`, with a teacher: kd_weight x soft cross-entropy between the teacher's and the
      student's distributions (temperature 1; Hinton et al., 2015), mean of start and end;
    - `hidden_states`, with a teacher: supervision_weight x squared error of hidden states, summed
      over pairs of states.
    """

    def __init__(
        self,
        run: Run,
        teacher: nn.Module | None,
        kd_weight: float,
        supervision_weight: float,
        state_maps: nn.ModuleList | None = None,
    ) -> None:
        """`state_maps` map the states of a merged student to the teacher's size."""
        self.run, self.teacher, self.state_maps = run, teacher, state_maps
        self.kd_weight, self.supervision_weight = kd_weight, supervision_weight

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        outputs = forward(model, batch, hidden_states=self.teacher is not None)
        log_probs = log_probabilities(outputs, mask)
        losses = {"answer": answer_loss(log_probs, batch["targets"])}
        if self.teacher is not None:
            with torch.no_grad(), self.run.accelerator.autocast():
                taught = forward(self.teacher, batch, hidden_states=True)
            distillation = soft_cross_entropy(log_probs, log_probabilities(taught, mask))
            losses["distillation"] = self.kd_weight * distillation
            states, target = outputs.hidden_states, taught.hidden_states
            errors = summed_errors(states, target, mask, self.state_maps, self.run.accelerator)
            losses["hidden_states"] = self.supervision_weight * errors
        return losses


def answer_loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    """[B]: mean of -log p(start) and -log p(end); log_probs [2, B, L], targets [B, 2]."""
    return -log_probs.gather(2, targets.T[:, :, None])[:, :, 0].mean(dim=0)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """[B]: -sum over positions of p_teacher log p_student, mean of start and end.

    Both are log-probabilities [2, B, L], -inf at padding.
    """
    finite = student.masked_fill(student == float("-inf"), 0.0)  # p_teacher is 0 there
    return -(teacher.exp() * finite).sum(dim=2).mean(dim=0)


class LogitsLoss:
    """The error of start and end logits in distillation, as `logits` [B].

    It is weight x T^2 x (H(p, q) - H(p)), mean of start and end. p is the softmax, over the tokens
    of a window, of the teachers' mean logits divided by T; q is the same for the student. H(p, q)
    is the soft cross-entropy (Hinton et al., 2015). Its gradient falls with 1/T^2, and the factor
    T^2 undoes this (their section 2). Subtracting H(p), the entropy of p, changes no gradient and
    makes the loss 0 where both agree, so that the loop sees a divergence at a high T too.
    """

    def __init__(
        self,
        run: Run,
        teachers: Sequence[PreTrainedModel],
        weight: float,
        temperature: float,
    ) -> None:
        """The calls' `state` is the last state of the first teacher."""
        self.run, self.weight, self.temperature = run, weight, temperature
        self.first, *self.others = cast("Sequence[BertForQuestionAnswering]", teachers)

    def __call__(
        self, outputs: ModelOutput, state: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mask = batch["attention_mask"]
        with torch.no_grad(), self.run.accelerator.autocast():
            taught = self.first.qa_outputs(state).float().permute(2, 0, 1)
            for teacher in self.others:
                taught = taught + stacked(forward(teacher, batch))
        taught = log_softmax(taught / (len(self.others) + 1) / self.temperature, mask)
        learned = log_softmax(stacked(cast(QaOutput, outputs)) / self.temperature, mask)
        error = soft_cross_entropy(learned, taught) - soft_cross_entropy(taught, taught)
        return {"logits": self.weight * self.temperature**2 * error}


# ------------------------------------------------------------------------------------------------
# Evaluation


class QaEvaluation:
    """F1 and exact match on a SQuAD file; all processes share the work.

    Attributes:
        predictions: from question ids to answers, after a call; "" if the no-answer score is over
            the threshold with the best F1 (SQuAD 2.0).
        no_answer_scores: from question ids to P(no answer) / P(best span).
    """

    def __init__(
        self,
        run: Run,
        data: SquadData,
        windows: Windows,
        scorer: Scorer,
        batch_size: int,
        max_answer_length: int = squad_utils.MAX_ANSWER_LENGTH,
    ) -> None:
        self.run, self.data, self.windows, self.scorer = run, data, windows, scorer
        self.batch_size, self.max_answer_length = batch_size, max_answer_length
        self.predictions: dict[str, str] = {}
        self.no_answer_scores: dict[str, float] = {}

    def __call__(self, model: nn.Module, fp32: bool = False) -> dict[str, float]:
        """Figures of the scorer, `f1` and `exact_match` in percent; see `stage.Evaluation`."""
        accelerator = self.run.accelerator
        answers = squad_utils.Answers(self.data, self.windows, self.max_answer_length)
        # Longest first: a batch that does not fit in memory fails at once.
        order = np.argsort(-self.windows.total_lengths, kind="stable")
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        model.eval()
        for chosen in batches[accelerator.process_index :: accelerator.num_processes]:
            self.run.stop_if_asked()
            batch = as_tensors(squad_utils.make_batch(self.windows, chosen))
            cast = contextlib.nullcontext() if fp32 else accelerator.autocast()
            with torch.inference_mode(), cast:
                outputs = forward(model, to_device(batch, accelerator.device))
            start, end = outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()
            answers.add(chosen, start.numpy(), end.numpy())
        if accelerator.num_processes > 1:
            answers.merge(gather_object(answers.found()))
        self.no_answer_scores = answers.no_answer_scores()
        self.predictions = answers.texts()
        figures = self.scorer(self.data, self.predictions, self.no_answer_scores)
        if "f1_threshold" in figures:
            self.predictions = {
                name: "" if self.no_answer_scores[name] > figures["f1_threshold"] else text
                for name, text in self.predictions.items()
            }
        return figures
