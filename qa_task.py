"""Extractive QA as a task for the training loop: its data, its loss, its evaluation, its export."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering

import onnx_utils
import squad_utils
from model_utils import hidden_state_loss, load_model, special_ids
from run_utils import Run
from squad_scores import Scorer
from squad_utils import SquadData, Windows
from train_utils import to_device

CHECKED_WINDOWS = 8  # on which the exported file is compared with PyTorch


def make_windows(
    data: SquadData,
    tokenizer: Any,
    max_seq_length_q: int,
    max_seq_length_c: int,
    doc_stride: int,
    for_training: bool,
) -> Windows:
    """Tokenise a SQuAD file and cut it into windows (squad_utils has the meanings)."""
    contexts, questions = squad_utils.tokenize_squad(
        data, tokenizer.backend_tokenizer, max_seq_length_q
    )
    return squad_utils.cut_windows(
        data,
        contexts,
        questions,
        special_ids(tokenizer),
        max_seq_length_c,
        doc_stride,
        for_training,
    )


class QaBatches:
    """Batches of windows and the spans to learn, for `train_utils.train`."""

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

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs [B, L], and `targets` [B, 2]: positions of the answer's first and last token."""
        arrays = squad_utils.make_batch(self.windows, chosen)
        arrays["targets"] = self._targets(epoch)[chosen]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------
# The loss


def forward(model: nn.Module, batch: dict[str, Tensor], hidden_states: bool = False) -> Any:
    """The model's outputs for a batch, without its targets."""
    inputs = {name: batch[name] for name in onnx_utils.INPUTS}
    return model(**inputs, output_hidden_states=hidden_states)


def log_probabilities(outputs: Any, attention_mask: Tensor) -> Tensor:
    """Log-softmax over the tokens of each window, padding excluded: [2, B, L], start and end."""
    logits = torch.stack([outputs.start_logits, outputs.end_logits]).float()
    return F.log_softmax(logits.masked_fill(attention_mask == 0, float("-inf")), dim=-1)


class QaLoss:
    """The losses of QA fine-tuning, each [B].

    - `answer`: cross-entropy of the answer's start and end, mean of both;
    - with a teacher, `kd_weight` x soft cross-entropy between its distributions and the student's
      (temperature 1; Hinton et al., 2015), mean of start and end, as `distillation`, and
      `supervision_weight` x the squared error of hidden states, as `hidden_states`.
    """

    def __init__(
        self, run: Run, teacher: nn.Module | None, kd_weight: float, supervision_weight: float
    ) -> None:
        self.run, self.teacher = run, teacher
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
            losses["hidden_states"] = self.supervision_weight * hidden_state_loss(
                outputs.hidden_states, taught.hidden_states, mask
            )
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
        self, run: Run, data: SquadData, windows: Windows, scorer: Scorer, batch_size: int
    ) -> None:
        self.run, self.data, self.windows, self.scorer = run, data, windows, scorer
        self.batch_size = batch_size
        self.predictions: dict[str, str] = {}
        self.no_answer_scores: dict[str, float] = {}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Figures of the scorer: `f1` and `exact_match`, in percent."""
        accelerator = self.run.accelerator
        answers = squad_utils.Answers(self.data, self.windows)
        # Longest first: what does not fit in memory fails at once.
        order = np.argsort(-self.windows.total_lengths, kind="stable")
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        model.eval()
        for chosen in batches[accelerator.process_index :: accelerator.num_processes]:
            self.run.stop_if_asked()
            arrays = squad_utils.make_batch(self.windows, chosen)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            with torch.inference_mode(), accelerator.autocast():
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


def export(output_dir: str, windows: Windows, max_seq_length_c: int) -> float:
    """Export the checkpoint in output_dir to model.onnx beside it; see `onnx_utils.export_onnx`.

    It is the saved checkpoint that is exported, so the check covers saving and loading too.
    """
    model = load_model(output_dir, "--output_dir", AutoModelForQuestionAnswering, quiet=True)
    model.set_attn_implementation("eager")
    # Spread over the lengths: the longest window and the shortest are both among them.
    by_length = np.argsort(windows.total_lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(by_length) - 1, CHECKED_WINDOWS).astype(int)]
    return onnx_utils.export_onnx(
        onnx_utils.QaGraph(model),
        os.path.join(output_dir, "model.onnx"),
        [squad_utils.make_batch(windows, w[None], pad_to=max_seq_length_c) for w in chosen],
        onnx_utils.QA_OUTPUTS,
        max_seq_length_c,
    )
