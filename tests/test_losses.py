"""Tests of the losses against values computed by hand, and of their mean over a step."""

from __future__ import annotations

import contextlib
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertTokenizerFast

import squad_utils
from bert.attention import fuse_attention
from squad_utils import Windows
from tasks import qa
from tasks.hidden_states import state_errors
from tasks.qa import LogitsLoss, QaLoss, answer_loss, log_probabilities, soft_cross_entropy
from training.passes import StepGradient

LN2, LN3 = log(2), log(3)
FAKE_RUN = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext))


def outputs(start: list[list[float]], end: list[list[float]], states: list | None = None):
    return SimpleNamespace(
        start_logits=torch.tensor(start),
        end_logits=torch.tensor(end),
        hidden_states=None if states is None else [torch.tensor(state) for state in states],
    )


class Fixed(nn.Module):
    """A model that gives the same outputs for whatever it is asked."""

    def __init__(self, given: SimpleNamespace) -> None:
        super().__init__()
        self.given, self.asked_for_states = given, None

    def forward(self, output_hidden_states: bool = False, **_: Tensor) -> SimpleNamespace:
        self.asked_for_states = output_hidden_states
        return self.given


def inputs(mask: list[list[int]], targets: list[list[int]]) -> dict[str, Tensor]:
    attention_mask = torch.tensor(mask)
    names = ("input_ids", "token_type_ids", "position_ids")
    return {
        **{name: torch.zeros_like(attention_mask) for name in names},
        "attention_mask": attention_mask,
        "targets": torch.tensor(targets),
    }


# ------------------------------------------------------------------------------------------------
# By hand

# Logits ln 2, 0, 0 are probabilities 1/2, 1/4, 1/4; the fourth position is padding.
MASK = [[1, 1, 1, 0], [1, 1, 1, 0]]
START = [[LN2, 0.0, 0.0, 90.0], [0.0, 0.0, LN2, 90.0]]  # 1/2 1/4 1/4 and 1/4 1/4 1/2
END = [[0.0, LN2, 0.0, 90.0], [0.0, 0.0, 0.0, 90.0]]  # 1/4 1/2 1/4 and 1/3 1/3 1/3
TARGETS = [[0, 2], [1, 0]]


def test_log_probabilities_leave_padding_out() -> None:
    found = log_probabilities(outputs(START, END), torch.tensor(MASK)).exp()
    expected = [
        [[1 / 2, 1 / 4, 1 / 4, 0], [1 / 4, 1 / 4, 1 / 2, 0]],
        [[1 / 4, 1 / 2, 1 / 4, 0], [1 / 3, 1 / 3, 1 / 3, 0]],
    ]
    assert found.tolist() == pytest.approx(np.array(expected), abs=1e-6)
    half = outputs(START, END)
    half.start_logits, half.end_logits = half.start_logits.bfloat16(), half.end_logits.bfloat16()
    assert log_probabilities(half, torch.tensor(MASK)).dtype == torch.float32


def test_answer_loss_by_hand() -> None:
    """Row 0: (-ln 1/2 - ln 1/4) / 2 = 3/2 ln 2. Row 1: (-ln 1/4 - ln 1/3) / 2."""
    log_probs = log_probabilities(outputs(START, END), torch.tensor(MASK))
    found = answer_loss(log_probs, torch.tensor(TARGETS))
    assert found.tolist() == pytest.approx([1.5 * LN2, (2 * LN2 + LN3) / 2], abs=1e-6)


def test_soft_cross_entropy_by_hand() -> None:
    """Teacher's START and END against a student with the rows exchanged.

    Row 0: start 1/2 ln 4 + 1/4 ln 4 + 1/4 ln 2 = 7/4 ln 2; end ln 3 whatever the teacher says.
    Row 1: start 1/4 ln 2 + 1/4 ln 4 + 1/2 ln 4 = 7/4 ln 2; end (ln 4 + ln 2 + ln 4) / 3 = 5/3 ln 2.
    """
    mask = torch.tensor(MASK)
    teacher = log_probabilities(outputs(START, END), mask)
    student = log_probabilities(outputs(START[::-1], END[::-1]), mask).requires_grad_()
    found = soft_cross_entropy(student, teacher)
    row_0, row_1 = (1.75 * LN2 + LN3) / 2, (1.75 * LN2 + 5 / 3 * LN2) / 2
    assert found.tolist() == pytest.approx([row_0, row_1], abs=1e-6)
    found.sum().backward()
    assert student.grad.isfinite().all()


def times(factor: float, rows: list[list[float]]) -> list[list[float]]:
    return (factor * torch.tensor(rows)).tolist()


@pytest.mark.parametrize("teachers", [1, 2])
def test_logits_of_a_temperature_by_hand(teachers: int) -> None:
    """Teacher's 2 START and 2 END at T = 2, against a student with the rows exchanged: as above,
    less the entropy of the teacher's, of row 0 3/2 ln 2 twice, of row 1 3/2 ln 2 and ln 3.

    One of two teachers gives 0 and the other twice as much: their mean is that of one.
    """
    mask = torch.tensor(MASK)
    of_first = torch.tensor([times(2, START), times(2, END)]).permute(1, 2, 0)
    given = [SimpleNamespace(qa_outputs=lambda state: of_first * (2 - teachers) + state)]
    if teachers == 2:
        given.append(Fixed(outputs(times(4, START), times(4, END))))
    student = outputs(times(2, START[::-1]), times(2, END[::-1]))
    logits = (student.start_logits, student.end_logits)
    for each in logits:
        each.requires_grad_()
    loss = LogitsLoss(FAKE_RUN, given, weight=0.5, temperature=2.0)
    batch = inputs(MASK, TARGETS)
    found = loss(student, torch.zeros(2, 4, 2), batch)
    row_0 = (1.75 * LN2 + LN3 - 3 * LN2) / 2
    row_1 = ((1.75 + 5 / 3) * LN2 - 1.5 * LN2 - LN3) / 2
    assert found["logits"].tolist() == pytest.approx([2 * row_0, 2 * row_1], abs=1e-6)
    found["logits"].sum().backward()
    for each in logits:
        assert each.grad.isfinite().all() and each.grad.abs().sum() > 0
        assert not each.grad[mask == 0].any()
    same = loss(outputs(times(2, START), times(2, END)), torch.zeros(2, 4, 2), batch)
    assert same["logits"].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_soft_cross_entropy_is_least_at_the_teacher() -> None:
    """Its gradient with respect to the student's logits is 0 where both distributions agree."""
    mask = torch.tensor(MASK)
    teacher = outputs(START, END)
    student = outputs(START, END)
    for logits in (student.start_logits, student.end_logits):
        logits.requires_grad_()
    soft_cross_entropy(
        log_probabilities(student, mask), log_probabilities(teacher, mask)
    ).sum().backward()
    for logits in (student.start_logits, student.end_logits):
        assert logits.grad.abs().max() < 1e-6


# Two tokens and one of padding, hidden size 2; the student's 2 states pair with 0 and 2 of 3.
STATE_MASK = [[1, 1, 0]]
STUDENT_STATES = [[[[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]], [[[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]]]
TEACHER_STATES = [
    [[[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]],
    [[[70.0, 70.0], [70.0, 70.0], [70.0, 70.0]]],
    [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]],
]


def test_state_errors_by_hand() -> None:
    """Pair 0-0: ((1 + 4)/2 + (0 + 4)/2) / 2 = 9/4. Pair 1-2: (0 + (4 + 0)/2) / 2 = 1. Sum 13/4."""
    student, teacher = (
        [torch.tensor(s) for s in states] for states in (STUDENT_STATES, TEACHER_STATES)
    )
    found = state_errors(student, teacher, torch.tensor(STATE_MASK)).sum(dim=0)
    assert found.tolist() == pytest.approx([3.25])


@pytest.mark.parametrize(
    "student,teacher,pairs",
    [
        (3, 3, [0, 1, 2]),
        (2, 13, [0, 12]),
        (5, 13, [0, 3, 6, 9, 12]),
        (4, 6, [0, 1, 3, 5]),  # floor of 0, 5/3, 10/3, 5
        (7, 25, [0, 4, 8, 12, 16, 20, 24]),
        (5, 3, [0, 0, 1, 1, 2]),  # floor of 0, 1/2, 1, 3/2, 2
    ],
)
def test_pairs_of_hidden_states(student: int, teacher: int, pairs: list[int]) -> None:
    """Loss 0 where student state i is the teacher's pairs[i], and only there."""
    mask = torch.ones(1, 2)
    taught = [torch.full((1, 2, 3), float(j)) for j in range(teacher)]
    right = [torch.full((1, 2, 3), float(pair)) for pair in pairs]
    assert len(right) == student
    assert state_errors(right, taught, mask).sum(dim=0).tolist() == [0.0]
    for i in range(student):
        wrong = [state + 0.5 * (i == k) for k, state in enumerate(right)]
        assert state_errors(wrong, taught, mask).sum(dim=0).tolist() == pytest.approx([0.25])


def test_qa_loss_by_hand() -> None:
    """The three losses with their weights; without a teacher the answer's alone."""
    student = Fixed(outputs([START[0][:3]], [END[0][:3]], STUDENT_STATES))
    teacher = Fixed(outputs([START[1][:3]], [END[1][:3]], TEACHER_STATES))
    batch = inputs(STATE_MASK, [[0, 1]])
    # With two tokens: student 2/3 1/3 and 1/3 2/3, teacher 1/2 1/2 and 1/2 1/2.
    answer = (log(3 / 2) + log(3 / 2)) / 2
    soft = (log(3 / 2) + log(3)) / 2
    found = QaLoss(FAKE_RUN, teacher, 2.0, 4.0)(student, batch)
    assert set(found) == {"answer", "distillation", "hidden_states"}
    assert found["answer"].tolist() == pytest.approx([answer])
    assert found["distillation"].tolist() == pytest.approx([2 * soft])
    assert found["hidden_states"].tolist() == pytest.approx([4 * 3.25])
    assert student.asked_for_states and teacher.asked_for_states
    alone = QaLoss(FAKE_RUN, None, 2.0, 4.0)(student, batch)
    assert set(alone) == {"answer"} and alone["answer"].tolist() == pytest.approx([answer])
    assert student.asked_for_states is False


def test_shared_losses_by_hand() -> None:
    """Three questions: one whose answer two windows hold, one without an answer, one alone."""
    weight = torch.tensor(  # exp(logit - that of [CLS]); 0 is padding
        [[1, 1, 2, 3], [1, 2, 5, 0], [1, 4, 1, 1], [1, 3, 1, 0], [1, 2, 6, 1]], dtype=torch.double
    )
    shift = torch.arange(5.0)[:, None]  # the same for all tokens of a window: changes nothing
    mask = (weight > 0).long()
    log_probs = qa.log_softmax(torch.stack([weight.log() + shift] * 2), mask)
    targets = torch.tensor([[3, 2], [1, 1], [0, 0], [0, 0], [2, 3]])
    groups = torch.tensor([[0, 1, 2], [3, 5, 5], [4, 5, 5]])
    found = qa.shared_losses(log_probs, targets, groups)
    total = 1 + 6 + 7 + 6
    answer = [
        -(log((3 + 2) / total) + log((2 + 2) / total)) / 2,
        -log(1 / (1 + 4)),
        -(log(6 / 10) + log(1 / 10)) / 2,
    ]
    assert found["answer"].tolist() == pytest.approx(answer)
    assert found["no_answer"].tolist() == pytest.approx([log(1 + 6), 0, 0])
    alone = qa.answer_loss(log_probs, targets)
    assert alone[[3, 4]].tolist() == pytest.approx(answer[1:])


def test_shared_losses_have_finite_gradients() -> None:
    """With padding, windows that are missing, and questions without an answer."""
    logits = torch.randn(2, 3, 8, generator=torch.manual_seed(0)).requires_grad_()
    mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).long()
    targets, groups = torch.tensor([[4, 5], [0, 0], [0, 0]]), torch.tensor([[0, 1], [2, 3]])
    losses = qa.shared_losses(qa.log_softmax(logits, mask), targets, groups)
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum(dim=(0, 2)).min() > 0.1


# ------------------------------------------------------------------------------------------------
# With a real model


@pytest.fixture(scope="module")
def windows(tiny_bert: Path, sample: Path) -> Windows:
    data = squad_utils.load_squad(str(sample / "train-v1.1.json"), "--squad_train_data")
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    return qa.make_windows(data, tokenizer, 16, 96, 32, for_training=True)


@pytest.fixture
def models(tiny_bert: Path) -> tuple[nn.Module, nn.Module]:
    """A student and a teacher with other weights, both with fused attention, without dropout."""
    student, teacher = (BertForQuestionAnswering.from_pretrained(tiny_bert) for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    teacher.requires_grad_(False)
    return fuse_attention(student).eval(), fuse_attention(teacher).eval()


def test_losses_do_not_depend_on_padding(
    models: tuple[nn.Module, nn.Module], windows: Windows
) -> None:
    """The same values in a batch, alone, and padded to 128."""
    student, teacher = models
    loss = QaLoss(FAKE_RUN, teacher, 0.7, 0.3)
    order = np.argsort(windows.total_lengths)
    chosen = order[np.linspace(0, len(order) - 1, 5).astype(int)]
    targets = torch.from_numpy(squad_utils.targets(windows, np.random.default_rng(0)))

    def losses(rows: np.ndarray, pad_to: int | None) -> dict[str, Tensor]:
        arrays = squad_utils.make_batch(windows, rows, pad_to)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            return loss(student, {**batch, "targets": targets[rows]})

    together, wide = losses(chosen, None), losses(chosen, 128)
    alone = [losses(row[None], None) for row in chosen]
    assert set(together) == {"answer", "distillation", "hidden_states"}
    for name, value in together.items():
        assert value.shape == (5,) and value.std() > 1e-4
        assert wide[name].tolist() == pytest.approx(value.tolist(), abs=1e-5)
        assert [float(each[name]) for each in alone] == pytest.approx(value.tolist(), abs=1e-5)


def test_the_teacher_gets_no_gradient(
    models: tuple[nn.Module, nn.Module], windows: Windows
) -> None:
    """Not even one whose parameters require it; all of the student gets one."""
    student, teacher = models
    teacher.requires_grad_(True)
    batch = qa.QaBatches(windows, 4, 0).batch(0, np.arange(4))
    losses = QaLoss(FAKE_RUN, teacher, 1.0, 1.0)(student, batch)
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_step_does_not_depend_on_the_micro_batch_size(
    accelerator: Accelerator, models: tuple[nn.Module, nn.Module], windows: Windows
) -> None:
    """7 windows in micro-batches of 1, 2, 3, 7 or 50: same loss, same gradient.

    They are the mean over the windows, computed here one by one.
    """
    student, teacher = models
    batches = qa.QaBatches(windows, 7, 0)
    loss = QaLoss(SimpleNamespace(accelerator=accelerator), teacher, 0.5, 0.5)
    order = np.argsort(windows.total_lengths)
    chosen = order[np.linspace(0, len(order) - 1, 7).astype(int)]
    expected = {"answer": 0.0, "distillation": 0.0, "hidden_states": 0.0}
    for row in chosen:
        each = loss(student, batches.batch(0, row[None]))
        (sum(each.values()) / 7).sum().backward()
        for name, value in each.items():
            expected[name] += float(value) / 7
    gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert gradient.norm() > 1e-2
    for size in (1, 2, 3, 7, 50):
        student.zero_grad()
        step = StepGradient(accelerator, student, batches, loss, size)
        values = step(0, chosen).tolist()
        sums = dict(zip(step.names, values, strict=True))
        for name, value in expected.items():
            assert sums[name] == pytest.approx(value, abs=1e-5)
        assert sums["tokens"] == windows.total_lengths[chosen].sum()
        found = torch.cat([p.grad.flatten() for p in student.parameters()])
        assert torch.allclose(found, gradient, atol=1e-5)
