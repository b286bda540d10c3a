"""Extractive QA as a task for the training loop: its data, its loss, its evaluation, its export."""

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
from deploy.onnx_file import QA_OUTPUTS
from squad_utils import SquadData, Windows
from tasks.extra_pairs import ExtraBatches, Pool, check_articles, read_texts
from tasks.hidden_states import OutputLoss, state_errors
from tasks.squad_scores import Scorer, load_scorer
from tasks.task import Rows, Task
from training.passes import Batches, LossFunction, to_device
from training.results import TaskCard
from training.run import Run
from training.states import write_json

# Of the logits' error beside that of the states, where the flags do not say otherwise.
LOGITS_WEIGHT, LOGITS_TEMPERATURE = 0.1, 1.0


# ------------------------------------------------------------------------------------------------
# The task as the scripts see it


def check_lengths(args: argparse.Namespace) -> None:
    """Check that a context has room beside the longest question; warn of a stride that does not.

    Raises:
        UserError: it has none.
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
    """Extractive QA for a script: windows, and the answers in them.

    Attributes:
        train_windows, dev_windows: after `tokenize`.
        num_extra: windows that --extra_pairs adds to each epoch, after `tokenize`.
    """

    auto_class: ClassVar[AutoClass] = AutoModelForQuestionAnswering
    architectures: ClassVar[tuple[str, ...]] = (
        "BertForQuestionAnswering",
        "PackedBertForQuestionAnswering",
    )
    best_by = "f1"
    score_names: ClassVar[dict[str, str]] = {"f1": "F1", "exact_match": "exact match"}
    outputs = onnx_file.Outputs(("start_logits", "end_logits"), QA_OUTPUTS, per_token=True)
    train_windows: Windows
    dev_windows: Windows
    evaluation: QaEvaluation

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the files that args names.

        Raises:
            UserError: one of them is not what it should be, or a window has no room for a context.
        """
        check_lengths(args)
        super().__init__(args)
        paths = getattr(args, "extra_texts", None)
        self.extra_texts = read_texts(paths, self.dev_data.contexts) if paths else []
        if not self.train_data.answerable.all() and self.dev_data.answerable.all():
            warn(
                "--squad_train_data has questions without an answer, --squad_dev_data has none: no"
                " threshold can be fitted, so ask.py will not tell that a text has no answer"
            )
        if getattr(args, "extra_pairs", 0.0) and not paths:
            check_articles(self.train_data)
        self.scorer = load_scorer(args.squad_eval_script, self.dev_data)

    def hashes(self) -> dict[str, str]:
        """What tells the data from other files of the same name."""
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
        factor, self.num_extra = getattr(self.args, "extra_pairs", 0.0), 0
        if factor:
            self.num_extra = max(1, round(factor * len(self.train_windows)))
            texts = squad_utils.tokenize(
                tokenizer.backend_tokenizer, self.extra_texts, False, "tokenising texts"
            )
            room = self.args.max_seq_length_c - 3 - self.train_windows.questions.lengths
            self.pool = Pool.of(self.train_data, self.train_windows, texts, room)

    def make_evaluation(self, run: Run) -> QaEvaluation:
        """The evaluation on the dev file."""
        size = self.args.per_gpu_eval_batch_size
        self.evaluation = QaEvaluation(
            run, self.dev_data, self.dev_windows, self.scorer, size, self.args.max_answer_length
        )
        return self.evaluation

    def batches(self, step_size: int) -> QaBatches | ExtraBatches:
        """Batches of the training file; with extra pairs they have no targets."""
        if self.num_extra:
            pool, seed = self.pool, self.args.seed
            return ExtraBatches(self.train_windows, pool, self.num_extra, step_size, seed)
        return QaBatches(self.train_windows, step_size, self.args.seed)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` random windows."""
        return rng.permutation(len(self.train_windows))[:count]

    def fine_tuning(
        self, run: Run, teacher: PreTrainedModel | None, state_maps: nn.ModuleList | None
    ) -> tuple[LossFunction, Batches]:
        """The loss of answers, and of a teacher's distributions and states; all windows."""
        args = self.args
        if not self.train_data.answerable.any():
            raise UserError(
                f"--squad_train_data: no question of {self.train_data.path} has an answer, so there"
                " is nothing to learn"
            )
        loss = QaLoss(run, teacher, args.kd_weight, args.supervision_weight, state_maps)
        return loss, self.batches(args.total_train_batch_size)

    def output_loss(self, run: Run, teachers: Sequence[PreTrainedModel]) -> OutputLoss | None:
        """The error of the logits, by --logits_weight and --logits_temperature."""
        weight, temperature = self.args.logits_weight, self.args.logits_temperature
        weight = LOGITS_WEIGHT if weight is None else weight
        temperature = LOGITS_TEMPERATURE if temperature is None else temperature
        return LogitsLoss(run, teachers, weight, temperature) if weight else None

    def train_rows(self) -> Rows:
        """The training windows."""
        return rows_of(self.train_windows)

    def dev_rows(self) -> Rows:
        """The dev windows."""
        return rows_of(self.dev_windows)

    @property
    def num_examples(self) -> int:
        """Examples of an epoch of `batches`."""
        return len(self.train_windows) + self.num_extra

    def describe(self) -> str:
        """One line on the data."""
        extra = f" and {self.num_extra:,} more in each epoch" if self.num_extra else ""
        return (
            f"{len(self.train_data.ids):,} questions in {len(self.train_windows):,} windows{extra}"
            f" to train on, {len(self.dev_data.ids):,} to evaluate on"
        )

    def counts(self) -> dict[str, int]:
        """For metrics.json."""
        return {
            "train_questions": len(self.train_data.ids),
            "train_windows": len(self.train_windows),
            "extra_windows": self.num_extra,
            "dev_questions": len(self.dev_data.ids),
            "dev_windows": len(self.dev_windows),
        }

    def write_answers(self) -> None:
        """Write the answers of the last evaluation to the output folder."""
        folder = self.args.output_dir
        write_json(os.path.join(folder, "predictions.json"), self.evaluation.predictions)
        if self.dev_data.version_2:
            path = os.path.join(folder, "no_answer_scores.json")
            write_json(path, self.evaluation.no_answer_scores)

    def card(self, figures: Mapping[str, float]) -> TaskCard:
        """Its part of the model card."""
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
        """Lengths, and the threshold of SQuAD 2.0 over which there is no answer."""
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
    """Tokenise a SQuAD file and cut it into windows (squad_utils has the meanings)."""
    tokens = squad_utils.tokenize_squad(data, tokenizer.backend_tokenizer, max_seq_length_q)
    return squad_utils.cut_windows(
        data, tokens, special_ids(tokenizer), max_seq_length_c, doc_stride, for_training
    )


def warn_of_long_answers(windows: dict[str, Windows], longest: int, max_seq_length_c: int) -> None:
    """Count the answers that are longer than `longest` tokens, by the file that they are of."""
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
    """Windows as a task's rows."""
    return Rows(windows.total_lengths, functools.partial(squad_utils.make_batch, windows))


class QaBatches(Batches):
    """Batches of windows and the spans to learn, for `loop.train`."""

    def __init__(self, windows: Windows, step_size: int, seed: int) -> None:
        self.windows, self.step_size, self.seed = windows, step_size, seed
        self._targets = functools.lru_cache(maxsize=1)(self._draw_targets)

    def _draw_targets(self, epoch: int) -> np.ndarray:
        # Its own stream: the order of the windows must not depend on the answers.
        return squad_utils.targets(self.windows, np.random.default_rng([self.seed, epoch, 1]))

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The windows of each optimisation step of an epoch."""
        lengths = self.windows.total_lengths
        return squad_utils.plan_steps(lengths, self.step_size, self.seed, epoch)

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """Tokens of each window, int64 [len(chosen)]."""
        return self.windows.total_lengths[chosen]

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs [B, L], and `targets` [B, 2]: positions of the answer's first and last token."""
        arrays = squad_utils.make_batch(self.windows, chosen)
        arrays["targets"] = self._targets(epoch)[chosen]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------
# The loss


class QaOutput(Protocol):
    """What a QA model gives: logits [B, L], and hidden states where they were asked for."""

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
    """Log-softmax over the tokens of each window, padding excluded: [2, B, L], as the logits."""
    return F.log_softmax(logits.masked_fill(attention_mask == 0, float("-inf")), dim=-1)


def log_probabilities(outputs: QaOutput, attention_mask: Tensor) -> Tensor:
    """`log_softmax` of a model's logits: [2, B, L], start and end."""
    return log_softmax(stacked(outputs), attention_mask)


class QaLoss:
    """The losses of QA fine-tuning, each [B].

    - `answer`: cross-entropy of the answer's start and end, mean of both;
    - with a teacher, `kd_weight` x soft cross-entropy between its distributions and the student's
      (temperature 1; Hinton et al., 2015), mean of start and end, as `distillation`, and
      `supervision_weight` x the squared error of hidden states, as `hidden_states`.
    """

    def __init__(
        self,
        run: Run,
        teacher: nn.Module | None,
        kd_weight: float,
        supervision_weight: float,
        state_maps: nn.ModuleList | None = None,
    ) -> None:
        """`state_maps` take the states of a merged student to the size of the teacher's."""
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
            teacher_log_probs = log_probabilities(taught, mask)
            losses["distillation"] = self.kd_weight * soft_cross_entropy(
                log_probs, teacher_log_probs
            )
            states = outputs.hidden_states
            if self.state_maps is not None:
                with self.run.accelerator.autocast():
                    states = [m(s) for m, s in zip(self.state_maps, states, strict=True)]
            losses["hidden_states"] = self.supervision_weight * state_errors(
                states, taught.hidden_states, mask
            ).sum(dim=0)
        return losses


def answer_loss(log_probs: Tensor, targets: Tensor) -> Tensor:
    """[B]: mean of -log p(start) and -log p(end); log_probs [2, B, L], targets [B, 2]."""
    return -log_probs.gather(2, targets.T[:, :, None])[:, :, 0].mean(dim=0)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """[B]: -sum over positions of p_teacher log p_student, mean of start and end.

    Both are log-probabilities [2, B, L], -inf at padding.
    """
    finite = student.masked_fill(student == float("-inf"), 0.0)  # where p_teacher is 0 too
    return -(teacher.exp() * finite).sum(dim=2).mean(dim=0)


class LogitsLoss:
    """How far start and end are from the teachers', as `logits` [B], beside the error of states.

    weight x T^2 x (H(p, q) - H(p)), mean of start and end. p is the softmax of the teachers' logits
    over T, q that of the student's, over the tokens of a window. H(p, q) is their soft
    cross-entropy (Hinton et al., 2015); its gradient falls with 1/T^2, and the factor T^2 undoes
    that (their section 2). H(p), p's entropy, has no gradient: less it, the loss is 0 where both
    agree, so the loop sees a divergence at a high T too. Several teachers' logits are averaged.
    """

    def __init__(
        self,
        run: Run,
        teachers: Sequence[PreTrainedModel],
        weight: float,
        temperature: float,
    ) -> None:
        """The first of the teachers is the one whose last state is given."""
        self.run, self.weight, self.temperature = run, weight, temperature
        self.first, *self.others = cast("Sequence[BertForQuestionAnswering]", teachers)

    def __call__(
        self, outputs: ModelOutput, state: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Arguments of `hidden_states.OutputLoss`."""
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
# Evaluation and export


class QaEvaluation:
    """F1 and exact match on a SQuAD file, shared among all processes.

    Attributes:
        predictions: question id -> answer, of the last call ("" where no answer is more probable
            than the threshold that SQuAD 2.0 scores best at).
        no_answer_scores: question id -> probability of no answer over that of the best span.
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
        """Figures of the scorer: `f1` and `exact_match`, in percent.

        Args:
            fp32: compute in FP32 whatever the run's precision is.
        """
        accelerator = self.run.accelerator
        answers = squad_utils.Answers(self.data, self.windows, self.max_answer_length)
        # Longest first: what does not fit in memory fails at once.
        order = np.argsort(-self.windows.total_lengths, kind="stable")
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        model.eval()
        for chosen in batches[accelerator.process_index :: accelerator.num_processes]:
            self.run.stop_if_asked()
            arrays = squad_utils.make_batch(self.windows, chosen)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
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
