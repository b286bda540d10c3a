"""Tests of pack_and_distill.py: its stages, its folder, a run that is killed, wrong input."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from calls import (
    call,
    error_line,
    records,
    run_in_two,
    started,
    state_step,
    states,
    wait_for,
)
from conftest import ROOT, command_of, run, run_flags
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, BertModel

import bert_pack
import pack_and_distill
from bert.attention import fuse_attention
from bert_pack import PackCfg, pack
from tasks import TASKS, QaTask, hidden_states
from tasks.qa import QaEvaluation
from training import loop
from training.passes import Batches
from training.run import Run
from training.stage import warm_up, warm_up_linear_decay

PLAN = ["embeddings", "grow 1", "grow 2", "feed-forward", "heads", "final"]


@pytest.fixture(scope="module")
def reference(teacher: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    done = run(
        command_of("pack_and_distill", teacher, few, folder), fresh=True
    )  # no other run of it is
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


def trained(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [r for r in records(folder) if r["stage"] == stage and "evaluation" not in r]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------
# A whole run


def test_stages_run_in_their_order_and_length(reference: Path) -> None:
    seen = list(dict.fromkeys(r["stage"] for r in records(reference)))
    assert seen == ["teacher", "packed", *PLAN, "merged"]
    windows = metrics(reference)["counts"]["train_windows"]
    an_epoch = math.ceil(windows / 4)
    lengths = [len(trained(reference, stage)) for stage in PLAN]
    quarter = math.ceil(an_epoch / 4)
    assert lengths == [quarter] * 3 + [an_epoch] * 2 + [math.ceil(windows / 8)]
    for stage in PLAN[:5]:
        assert {r["learning_rate"] for r in trained(reference, stage)} == {1e-3}
    rates = [r["learning_rate"] for r in trained(reference, "final")]
    total = len(rates)
    assert rates == pytest.approx([2e-3 * (1 - step / total) for step in range(total)])


def test_losses_are_of_the_states_of_their_stage(reference: Path) -> None:
    def named(stage: str) -> set[str]:
        return {k for k in trained(reference, stage)[0] if k.startswith("state_")}

    assert named("embeddings") == {"state_0"}
    assert named("grow 1") == {"state_0", "state_1"}
    for stage in PLAN[2:]:
        assert named(stage) == {"state_0", "state_1", "state_2"}


def test_folder(reference: Path, teacher: Path) -> None:
    names = {path.name for path in reference.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "curves.png",
        "metrics.json",
        "metrics.jsonl",
        "model.onnx",
        "model.safetensors",
        "predictions.json",
        "reader.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "unmerged",
        "vocab.txt",
    }
    merged = json.loads((reference / "config.json").read_text())
    unmerged = json.loads((reference / "unmerged" / "config.json").read_text())
    assert (merged["model_type"], merged["merged"]) == ("packed_bert", True)
    assert (unmerged["model_type"], unmerged["merged"]) == ("packed_bert", False)
    assert merged["num_attention_heads"] == unmerged["num_attention_heads"] == 2
    card = (reference / "README.md").read_text()
    assert "  --stages=embeddings,grow,feed-forward,heads,final \\\n" in card
    # What no stage trains is the teacher's still.
    weights, originals = (
        load_file(folder / "model.safetensors") for folder in (reference / "unmerged", teacher)
    )
    same = [n for n in weights if n in originals and torch.equal(weights[n], originals[n])]
    assert sorted(same) == [
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.embeddings.word_embeddings.weight",
        "qa_outputs.bias",
        "qa_outputs.weight",
    ]


def test_table_and_sizes(reference: Path) -> None:
    figures = metrics(reference)
    rows = {row["stage"]: row for row in figures["stages"]}
    assert list(rows) == ["teacher", "packed", *PLAN, "unmerged", "merged"]
    for name in ("teacher", "packed", "embeddings", "feed-forward", "heads", "final"):
        assert {"f1", "exact_match"} <= rows[name].keys()
    assert rows["merged"]["f1"] == rows["unmerged"]["f1"] == figures["f1"]
    weights = load_file(reference / "model.safetensors")
    assert figures["sizes"]["student"]["parameters"] == sum(w.numel() for w in weights.values())
    size = (reference / "model.onnx").stat().st_size
    assert figures["onnx_bytes"] == size
    assert 0 < figures["sizes"]["student"]["gops"] < figures["sizes"]["teacher"]["gops"]
    stdout = (reference.parent / "stdout").read_text()
    assert "stage 2/6 grow 1 step" in stdout and "for all stages" in stdout
    assert f"student: {figures['parameters'] / 1e6:.2f} M parameters" in stdout


def test_scripts_load_the_folder(
    reference: Path, teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    article = tmp_path / "article.txt"
    article.write_text("The harbour was built by Ada Brook in 1907. It is of stone.")
    question = "--question=Who built the harbour?"
    done = run([sys.executable, str(ROOT / "ask.py"), f"--model={reference}",
                f"--context={article}", question, "--json"], fresh=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"]
    # Fine-tuning alone takes what is deployed; a teacher's states need the maps.
    for name, flags in {
        "plain": (),
        "taught": ("--supervision_weight=0.1", f"--model_teacher={teacher}"),
    }.items():
        out = tmp_path / name
        command = command_of("train_qa", reference, few, out, "--num_train_epochs=0.2", *flags)
        assert call(command) == 0, capfd.readouterr().err
        model = AutoModelForQuestionAnswering.from_pretrained(out)
        assert model.config.merged
        assert (out / "unmerged").exists() == (name == "taught")


def test_file_reshapes(reference: Path) -> None:
    """As the Open Model Zoo's demos do it, to a question's length and to batches."""
    core = openvino.Core()
    model = AutoModelForQuestionAnswering.from_pretrained(reference).eval()
    for shape in ((1, 32), (8, 128)):
        network = core.read_model(reference / "model.onnx")
        network.reshape({each.any_name: list(shape) for each in network.inputs})
        compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        lengths = torch.arange(shape[0])[:, None] + shape[1] // 2
        ids = torch.randint(5, 200, shape, generator=torch.Generator().manual_seed(0))
        batch = {
            "input_ids": ids,
            "attention_mask": (torch.arange(shape[1]) < lengths).long(),
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(shape[1]).expand(shape).clone(),
        }
        with torch.no_grad():
            expected = model(**batch).start_logits
        got = torch.from_numpy(compiled({k: v.numpy() for k, v in batch.items()})["output_s"])
        real = batch["attention_mask"].bool()
        assert (got - expected)[real].abs().max() < 1e-4, shape


def test_distillation_goes_on(
    reference: Path, teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    flags = (f"--model_student={reference}", "--stages=final", "--max_steps_per_stage=2")
    assert call(command_of("pack_and_distill", teacher, few, out, *flags)) == 0, (
        capfd.readouterr().err
    )
    stdout = capfd.readouterr().out
    assert "is packed: distillation goes on" in stdout
    packed = next(r for r in records(out) if r["stage"] == "packed")
    assert packed["f1"] == pytest.approx(metrics(reference)["f1"])
    assert len(trained(out, "final")) == 2
    assert metrics(out)["sizes"]["student"]["parameters"] == metrics(reference)["parameters"]


@pytest.mark.parametrize("after", [70.0, 80.0])
def test_the_start_is_kept_if_training_only_harms(
    after: float,
    reference: Path,
    teacher: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """The scores are made up: a model of two layers has none to lose."""
    scores = iter([90.0, 80.0, *[after] * 9])  # of the teacher, the start, and what follows
    evaluate = QaEvaluation.__call__

    def scored(self: QaEvaluation, *given: Any, **named: Any) -> dict[str, float]:
        return {**evaluate(self, *given, **named), "f1": next(scores)}

    monkeypatch.setattr(QaEvaluation, "__call__", scored)
    out, start = tmp_path / "out", reference / "unmerged"
    flags = (f"--model_student={start}", "--stages=final", "--max_steps_per_stage=2")
    command = command_of("pack_and_distill", teacher, few, out, *flags)
    assert call(command) == 0, capfd.readouterr().err
    stage = "packed, step 0" if after < 80 else "final, step 2"  # as good is good enough
    assert f"kept: {stage}, the best on dev" in capfd.readouterr().out
    kept, given = (load_file(f / "model.safetensors") for f in (out / "unmerged", start))
    assert all(torch.equal(kept[name], given[name]) for name in given) == (after < 80)


@pytest.mark.slow
def test_heads_go_at_once_where_no_stage_is_for_it(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = command_of(
        "pack_and_distill", teacher, few, out, "--stages=feed-forward", "--max_steps_per_stage=2"
    )
    assert call(command) == 0, capfd.readouterr().err
    assert "measuring the importance of heads" in capfd.readouterr().out
    assert json.loads((out / "config.json").read_text())["num_attention_heads"] == 2


def test_random_start_is_behind_and_learns(
    teacher: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = command_of(
        "pack_and_distill", teacher, few, out, "--pack_start=random", "--stages=grow,feed-forward"
    )
    assert call(command) == 0, capfd.readouterr().err
    for stage in ("grow 1", "grow 2"):
        losses = [trained(folder, stage)[0]["loss"] for folder in (reference, out)]
        assert losses[0] < 0.6 * losses[1], stage
    learned = [record["loss"] for record in trained(out, "feed-forward")]
    assert learned[-1] < 0.85 * trained(out, "grow 2")[0]["loss"]


@pytest.mark.slow
def test_pack_emb_0_and_other_shapes(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    cfg = "--pack_cfg=num_hidden_layers:1,ff_iter_num:0,num_attention_heads:4,hidden_size:8,"
    command = command_of(
        "pack_and_distill",
        teacher,
        few,
        out,
        cfg + "pack_emb:0,hidden_act:relu",
        "--max_steps_per_stage=1",
    )
    assert call(command) == 0, capfd.readouterr().err
    rows = {row["stage"]: row for row in metrics(out)["stages"]}
    assert rows["merged"]["f1"] == rows["unmerged"]["f1"]


# ------------------------------------------------------------------------------------------------
# Parts


def test_only_the_first_layers_run(teacher: Path) -> None:
    model = fuse_attention(BertForQuestionAnswering.from_pretrained(teacher).eval())
    student = pack(model, PackCfg(2, 2, 4, 16, 1), start="random")
    called: list[str] = []
    for name, module in [
        *((f"teacher {i}", layer) for i, layer in enumerate(model.bert.encoder.layer)),
        *((f"student {i}", layer) for i, layer in enumerate(student.bert.layers)),
    ]:
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    ids = torch.arange(5, 17)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(12)[None],
    }

    class Run:
        accelerator = Accelerator(cpu=True)

    expected = model.bert(**inputs, output_hidden_states=True).hidden_states
    mine = student(**inputs, output_hidden_states=True).hidden_states
    for k in range(3):
        called.clear()
        weights = (0.5,) * (k + 1)
        losses = hidden_states.StateLoss(Run, model, 2, weights)(student, inputs)
        assert sorted(called) == sorted(
            f"{who} {i}" for who in ("student", "teacher") for i in range(k)
        )
        for i in range(k + 1):
            error = (mine[i] - expected[i]).square().mean()
            assert float(losses[f"state_{i}"]) == pytest.approx(0.5 * float(error), rel=1e-4)


def test_final_stage_weights_states() -> None:
    class Arguments:
        stages = ("final",)
        loss_weight_alpha, num_train_epochs, learning_rate = 1.5, 1, 1e-3
        total_train_batch_size = per_gpu_train_batch_size = 4
        learning_rate_for_tune, total_train_batch_size_for_tune = 1e-3, 8
        max_steps_per_stage = warm_up_steps = passes = None

    (part,) = pack_and_distill.plan_stages(Arguments, 2, QaTask)
    assert part.weights == pytest.approx((1 / 4.75, 1.5 / 4.75, 2.25 / 4.75))


# ------------------------------------------------------------------------------------------------
# --passes


def arguments(monkeypatch: pytest.MonkeyPatch, *flags: str) -> argparse.Namespace:
    command = command_of("pack_and_distill", Path("model"), Path("data"), Path("out"))
    planned = (
        "--num_train_epochs",
        "--total_train_batch_size_for_tune",
        "--learning_rate_for_tune",
    )
    argv = [*(c for c in command[1:] if not c.startswith(planned)), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    return pack_and_distill.parse_arguments()


PASSES = {"embeddings": 0.0, "grow": 0.2, "feed-forward": 0.1, "heads": 0.3, "final": 0.4}


@pytest.mark.parametrize("extra", [0.0, 1.0])
def test_the_plan_spends_its_passes(extra: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of each stage, times the part of its layers that run, over those of the file."""
    monkeypatch.setattr(pack_and_distill, "PASSES", PASSES)
    args = arguments(monkeypatch, "--passes=3", f"--extra_pairs={extra}")
    plan = pack_and_distill.plan_stages(args, 4, QaTask)
    examples = round(64_000 * (1 + extra))
    spent: dict[str, float] = {}
    for part in plan:
        size = part.stage.total_batch_size
        windows = part.stage.total_steps(-(-examples // size)) * size
        name = part.stage.name.split()[0]
        spent[name] = spent.get(name, 0.0) + windows / 64_000 * part.num_layers / 4
    expected = {name: 3 * share for name, share in PASSES.items()}
    assert spent == pytest.approx(expected, rel=3e-3)
    text = pack_and_distill.describe_plan(plan, args, examples)
    assert "--passes=3, each of 64,000 windows or texts; learning rates rise over 40 steps" in text
    assert "\n  heads: 0.90 passes, 14,400 steps of 4, learning rate 0.001\n" in text


def test_the_shares_of_the_plan_are_whole() -> None:
    assert sum(pack_and_distill.PASSES.values()) == pytest.approx(1)
    assert set(pack_and_distill.PASSES) <= set(pack_and_distill.STAGES)


def test_the_plan_sets_other_flags_where_they_are_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = pack_and_distill.PASSES_FLAGS
    args = arguments(monkeypatch, "--passes=5")
    assert {name: getattr(args, name) for name in planned} == planned
    given = arguments(monkeypatch, "--passes=5", "--warm_up_steps=7")
    assert vars(given) == {**vars(args), "warm_up_steps": 7}
    rated = arguments(monkeypatch, "--passes=5", "--learning_rate_for_tune=3e-3")
    for task in TASKS:
        (*_, final) = pack_and_distill.plan_stages(args, 4, task)
        assert final.stage.learning_rate == task.packing_rate
        (*_, final) = pack_and_distill.plan_stages(rated, 4, task)
        assert final.stage.learning_rate == 3e-3
    assert arguments(monkeypatch).warm_up_steps is None


def test_passes_run_their_plan(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Beside a second teacher, with extra pairs; and the card has a command that says the same."""
    out = tmp_path / "out"
    texts = tmp_path / "texts.txt"
    texts.write_text("The lake was dug by hand.\n\nIts water is clear and cold.\n")
    flags = ("--passes=1.25", "--extra_pairs=1", f"--extra_texts={texts}", "--pack_start=random")
    flags = (*flags, "--logits_weight=0.1")
    command = command_of("pack_and_distill", teacher, few, out, *flags)
    command = [flag for flag in command if not flag.startswith("--num_train_epochs")]
    command.append(f"--model_teacher={teacher},{teacher}")
    assert call(command) == 0, capfd.readouterr().err
    windows = metrics(out)["counts"]["train_windows"]
    assert metrics(out)["counts"]["extra_windows"] == windows
    assert f"--passes=1.25, each of {windows:,} windows" in capfd.readouterr().out
    stages = list(dict.fromkeys(r["stage"] for r in records(out)))
    assert stages == ["teacher", "packed", "heads", "final", "merged"]
    final = trained(out, "final")
    assert len(final) == pytest.approx(0.8 * 1.25 * windows / 8, abs=1)
    assert "logits" not in trained(out, "heads")[0]
    # The same teacher twice is that teacher: soft targets with no error of their own.
    assert {"state_0", "state_1", "state_2", "logits"} <= final[0].keys()
    assert final[0]["loss"] == pytest.approx(
        sum(v for k, v in final[0].items() if k.startswith("state_") or k == "logits")
    )
    card = (out / "README.md").read_text()
    assert "--passes=1.25" in card and "--stages" not in card
    assert f"--model_teacher={teacher},{teacher} " in card


def test_the_final_stage_learns_the_teachers_logits_by_default(reference: Path) -> None:
    assert "logits" in trained(reference, "final")[0]


def test_warm_up_is_the_first_hundredth() -> None:
    factors = [warm_up(step, 1000) for step in range(1000)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(factors[9:]) == {1.0}
    assert warm_up(0, 50) == 1.0
    assert warm_up_linear_decay(500, 1000) == 0.5
    assert warm_up(0, 1000, steps=4) == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["embeddings", "grow"])
def test_heads_go_by_importance_without_their_stage(
    stages: str, teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    choose = bert_pack.HeadImportance.most_important

    def spy(self: bert_pack.HeadImportance, heads: int) -> Any:
        seen.append(self.mean.clone())
        return choose(self, heads)

    monkeypatch.setattr(bert_pack.HeadImportance, "most_important", spy)
    flags = (f"--stages={stages}", "--max_steps_per_stage=1")
    assert call(command_of("pack_and_distill", teacher, few, tmp_path / "out", *flags)) == 0
    assert seen and (seen[0] > 0).all()


@pytest.mark.slow
def test_head_is_that_of_the_teacher(teacher: Path, few: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    model = BertForQuestionAnswering.from_pretrained(teacher)
    torch.nn.init.normal_(model.qa_outputs.weight)
    model.save_pretrained(other)
    out = tmp_path / "out"
    flags = (f"--model_teacher={other}", "--stages=final", "--max_steps_per_stage=1")
    assert call(command_of("pack_and_distill", teacher, few, out, *flags)) == 0
    weights = load_file(out / "unmerged" / "model.safetensors")
    assert torch.equal(weights["qa_outputs.weight"], model.qa_outputs.weight)


@contextmanager
def a_run(accelerator: Accelerator, folder: Path, save_minutes: float) -> Iterator[Run]:
    """A new run that logs each step; what it does with signals ends with it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield Run(accelerator, run_flags(folder, save_minutes), {}, "new")
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# Precision


def test_every_stage_is_cast_and_no_evaluation(tmp_path: Path) -> None:
    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cast.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"error": model(batch["x"])[:, 0].square()}

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        before = len(cast)
        model(torch.ones(1, 1))
        evaluated.extend(cast[before:])
        del cast[before:]
        return {"f1": 0.0}

    cast: list[bool] = []
    evaluated: list[bool] = []
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before, in FP32
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        with a_run(accelerator, tmp_path, save_minutes=60.0) as running:
            model = Model(1, 1)
            for name in ("first", "second"):
                stage = loop.Stage(name, 1, 1e-3, 1, 1, warm_up)
                loop.train(running, model, stage, Line(), loss, evaluate)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert cast == [True] * 120
    assert evaluated == [False, False]


# ------------------------------------------------------------------------------------------------
# Divergence


class Line(Batches):
    """Batches of one number each, for a model of one weight."""

    def steps(self, epoch: int) -> list[Any]:
        import numpy as np

        return [np.array([i]) for i in range(60)]

    def tokens(self, chosen: Any) -> Any:
        return chosen * 0 + 1

    def batch(self, epoch: int, chosen: Any) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(1, 1), "attention_mask": torch.ones(1, 1)}


@pytest.mark.parametrize("kind", ["nan", "grows"])
def test_diverging_run_goes_back(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = torch.nn.Linear(1, 1)
    seen: list[float] = []
    bad = {"left": 30}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        value = (model(batch["x"])[:, 0] - 3.0).square() + 1.0
        seen.append(model.weight.item())
        if len(seen) > 25 and bad["left"]:
            bad["left"] = 0 if kind == "nan" else bad["left"] - 1
            return {"error": value * (math.nan if kind == "nan" else 4.0)}
        return {"error": value}

    accelerator = Accelerator(cpu=True)
    with a_run(accelerator, tmp_path, save_minutes=60.0) as running:
        stage = loop.Stage("test", 1, 1e-2, 1, 1, warm_up, goes_back=True)
        loop.train(running, model, stage, Line(), loss)
    warnings = [x for x in capfd.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert warnings and all("going back to step 0, with" in line for line in warnings)
    log = records(tmp_path)
    assert [r["step"] for r in log] == list(range(1, 61))
    assert log[-1]["learning_rate"] == 1e-2 * 0.5 ** len(warnings)
    assert seen[25 : 25 + 40].count(seen[0]) >= 1  # from the very weights of the start


def diverges(divergence: loop.Divergence, losses: list[float], rates: list[float]) -> bool:
    """Whether one of the steps with these losses and learning rates is found to diverge."""
    pairs = zip(losses, rates, strict=True)
    return any(divergence.found(loss, rate) for loss, rate in pairs)


def test_short_and_long_texts_are_no_divergence() -> None:
    """One batch of short texts first, then ones that are harder; later all get worse."""
    divergence = loop.Divergence()
    divergence.mark_good()
    assert not diverges(divergence, [0.4] + [1.2, 1.3] * 30, [1e-3] * 61)
    divergence.mark_good()
    assert diverges(divergence, [2.4] * loop.RECENT_STEPS, [1e-3] * loop.RECENT_STEPS)


RISING = [1e-3 * step / 40 for step in range(1, 41)]  # learning rates


def test_a_rise_with_the_learning_rate_is_no_divergence() -> None:
    """The loss of a trained model rises with the rate; later it counts from the full rate."""
    divergence = loop.Divergence()
    rates = RISING + [1e-3 * (1 - step / 1000) for step in range(60)]
    losses = [0.4 + 0.004 * step for step in range(40)] + [0.56] * 25 + [0.7] * 35
    assert not diverges(divergence, losses, rates)
    assert divergence.good == pytest.approx(0.56)
    assert diverges(divergence, [0.85] * 20, [9e-4] * 20)


def test_a_rise_by_more_than_half_diverges_while_the_learning_rate_rises() -> None:
    losses = [0.4] * 20 + [0.4 + 0.03 * step for step in range(20)]
    assert diverges(loop.Divergence(), losses, RISING)


@pytest.mark.parametrize("save_minutes", [0.0, 60.0])
def test_a_slow_divergence_goes_back_however_often_states_are_saved(
    save_minutes: float, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The loss grows by 2% a step until the run goes back, and falls from there on."""
    seen: list[float] = []
    grows = {"now": True}

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        value = model(batch["x"])[:, 0].exp()
        if seen and value.item() < seen[-1]:
            grows["now"] = False
        seen.append(value.item())
        return {"error": 2 * value.detach() - value if grows["now"] else value}

    model = torch.nn.Linear(1, 1)
    with a_run(Accelerator(cpu=True), tmp_path, save_minutes) as running:
        stage = loop.Stage("test", 1, 0.02, 1, 1, lambda step, total: 1.0, goes_back=True)
        loop.train(running, model, stage, Line(), loss)
    assert "going back to step" in capfd.readouterr().err
    log = records(tmp_path)
    assert [r["step"] for r in log] == list(range(1, 61))
    losses = [r["loss"] for r in log]
    assert max(losses) < 2 * loop.DIVERGED * sum(losses[:20]) / 20
    assert losses[-20:] == sorted(losses[-20:], reverse=True)


def test_a_bad_newest_state_is_left_for_the_one_before_it(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """With a state saved after each step, the one that fails is always the newest."""

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss.calls += 1
        value = model(batch["x"])[:, 0].square() + 1.0
        return {"error": value * math.nan if loss.calls == 10 else value}

    loss.calls = 0
    with a_run(Accelerator(cpu=True), tmp_path, save_minutes=0.0) as running:
        stage = loop.Stage("test", 1, 1e-2, 1, 1, warm_up, goes_back=True)
        loop.train(running, torch.nn.Linear(1, 1), stage, Line(), loss)
    assert "at step 10 the loss is nan; going back to step 8" in capfd.readouterr().err
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 61))
    assert records(tmp_path)[-1]["learning_rate"] == 0.5e-2


def test_a_run_that_diverges_for_good_is_an_error(tmp_path: Path) -> None:
    from cli import UserError

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss.calls += 1
        value = model(batch["x"])[:, 0].square() + 1.0
        return {"error": value if loss.calls < 5 else value * math.nan}

    loss.calls = 0
    with a_run(Accelerator(cpu=True), tmp_path, save_minutes=60.0) as running:
        stage = loop.Stage("test", 1, 1e-2, 1, 1, goes_back=True)
        with pytest.raises(UserError, match="the loss is nan"):
            loop.train(running, torch.nn.Linear(1, 1), stage, Line(), loss)


# ------------------------------------------------------------------------------------------------
# Killed, and several processes


def story(folder: Path) -> list[tuple]:
    keys = ("stage", "step", "loss", "state_0", "learning_rate", "evaluation", "f1")
    return [tuple(record.get(key) for key in keys) for record in records(folder)]


def newest_stage(out: Path) -> str:
    found = states(out)
    if not found:
        return ""
    try:
        path = out / "checkpoints" / found[-1] / "position.json"
        return json.loads(path.read_text())["stage"]
    except (OSError, ValueError):
        return ""


def test_killed_in_every_stage(
    teacher: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = command_of("pack_and_distill", teacher, few, out, "--save_minutes=0")
    for stage in ("embeddings", "grow 2", "feed-forward", "heads", "final"):
        with started(command) as process:
            wait_for(process, lambda stage=stage: newest_stage(out) == stage)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(timeout=60) == -signal.SIGKILL
        assert not (out / "metrics.json").exists()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "of final, saved in" in done.stdout
    assert "packing: " not in done.stdout
    assert story(out) == story(reference)
    for name in ("model.safetensors", "unmerged/model.safetensors", "predictions.json"):
        assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    assert not (out / "checkpoints").exists()


def test_stopped_at_a_stage_border(
    teacher: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    # The newest state is the last of the stage before the heads are removed.
    out = tmp_path / "out"
    command = command_of("pack_and_distill", teacher, few, out, "--save_minutes=60")
    with started(command) as process:
        wait_for(process, lambda: newest_stage(out) == "heads")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert newest_stage(out) == "heads" and state_step(out) == 0
    shutil.rmtree(out / "checkpoints" / states(out)[-1])
    assert newest_stage(out) == "feed-forward"
    assert call(command) == 0, capfd.readouterr().err
    assert story(out) == story(reference)
    name = "unmerged/model.safetensors"
    assert (out / name).read_bytes() == (reference / name).read_bytes()


@pytest.mark.slow
def test_two_processes_are_as_one(teacher: Path, few: Path, tmp_path: Path) -> None:
    flags = ("--per_gpu_train_batch_size=2", "--num_train_epochs=0.5", "--learning_rate=3e-4")
    outs = [tmp_path / name for name in ("one", "two")]
    done = run(command_of("pack_and_distill", teacher, few, outs[0], *flags))
    assert done.returncode == 0, done.stderr
    run_in_two(command_of("pack_and_distill", teacher, few, outs[1], *flags))
    one, two = map(records, outs)
    assert [(r["stage"], r["step"]) for r in one] == [(r["stage"], r["step"]) for r in two]
    for mine, theirs in zip(one, two, strict=True):
        for key in ("loss", "learning_rate", "f1"):
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=2e-3), (key, mine["stage"])


# ------------------------------------------------------------------------------------------------
# Wrong input


@pytest.fixture
def wrong(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> Callable[..., str]:
    """A function that runs the script with flags and returns its error line."""

    def check(*flags: str) -> str:
        out = tmp_path / "out"
        capfd.readouterr()
        assert call(command_of("pack_and_distill", teacher, few, out, *flags)) == 2
        assert states(out) == []
        return error_line(capfd.readouterr().err)

    return check


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--pack_cfg=hiden_size:8", "did you mean hidden_size?"),
        ("--pack_cfg=num_hidden_layers:3,hidden_size:16,num_attention_heads:2", "over the 2"),
        ("--stages=embedings", "the stages are embeddings,grow,feed-forward,heads,final"),
        ("--stages=", "the stages are"),
        ("--stages=final,final", "given twice"),
        ("--pack_cfg=ff_iter_num:1000000", "at least 0 and at most 64"),
        (f"--pack_cfg=hidden_size:{'9' * 5000}", "whole number"),
        ("--loss_weight_alpha=0", "--loss_weight_alpha"),
        ("--loss_weight_alpha=1e30", "--loss_weight_alpha"),
        ("--num_train_epochs=0", "--num_train_epochs"),
        ("--max_steps_per_stage=0", "--max_steps_per_stage"),
        ("--pack_start=nowhere", "--pack_start"),
        ("--eval_extra_contexts=dev.json", "is for embedding models"),
        ("--embedding_weight=1", "is for embedding models"),
        ("--embedding_weight=-1", "--embedding_weight"),
        ("--logits_weight=-1", "--logits_weight"),
        ("--logits_temperature=0", "--logits_temperature"),
        ("--passes=5", "--num_train_epochs: --passes=5 plans that"),
        ("--passes=0", "--passes"),
        ("--extra_pairs=-1", "--extra_pairs"),
        ("--extra_pairs=1", "has a second context; give --extra_texts"),  # of articles of one each
        ("--extra_texts=README.md", "--extra_texts needs --extra_pairs"),
        ("--extra_texts=,", "has an empty name"),
        ("--model_teacher=,", "has an empty name"),
    ],
)
def test_wrong_flag(wrong: Callable[..., str], flag: str, said: str) -> None:
    assert said in wrong(flag)


def test_model_of_no_task(wrong: Callable[..., str], teacher: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(teacher, plain)
    BertModel.from_pretrained(teacher).save_pretrained(plain)
    for flag in ("--model_student", "--model_teacher"):
        line = wrong(f"{flag}={plain}")
        assert flag in line and "BertModel" in line and "train_qa.py" in line


def test_flags_of_stages_that_do_not_run(
    wrong: Callable[..., str], reference: Path, teacher: Path, few: Path, tmp_path: Path
) -> None:
    line = wrong("--stages=heads", "--embedding_weight=1")
    assert "is for embedding models" in line
    for flag in ("--logits_weight=1", "--logits_temperature=2"):
        assert f"{flag[:-2]} counts in the final stage" in wrong("--stages=heads", flag)
    line = wrong("--logits_weight=0", "--logits_temperature=2")
    assert "--logits_temperature does nothing with --logits_weight=0" in line
    cfg = "--pack_cfg=num_hidden_layers:2,ff_iter_num:2,num_attention_heads:2,hidden_size:16"
    line = wrong(f"--model_student={reference}", cfg, "--pack_start=random")
    assert f"--pack_start: {reference} is packed" in line
    flags = ("--stages=embeddings", "--max_steps_per_stage=1")
    other = "--total_train_batch_size_for_tune=6"  # of the final stage
    assert (
        call(command_of("pack_and_distill", teacher, few, tmp_path / "heads", *flags, other)) == 0
    )


def test_model_inside_the_output_folder(
    wrong: Callable[..., str], reference: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(reference, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    flags = (f"--model_student={folder / 'unmerged'}", f"--output_dir={folder}")
    assert "--model_student lies in it" in wrong(*flags, "--overwrite_output_dir")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_vocabulary(wrong: Callable[..., str], teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"!"', '"@!@"'))
    assert "another vocabulary" in wrong(f"--model_teacher={other}")


def test_packed_otherwise(wrong: Callable[..., str], reference: Path) -> None:
    line = wrong(
        f"--model_student={reference}",
        "--pack_cfg=num_hidden_layers:2,ff_iter_num:4,num_attention_heads:2,hidden_size:16",
    )
    assert "was packed with ff_iter_num:2, not ff_iter_num:4" in line


def test_packed_teacher(wrong: Callable[..., str], reference: Path) -> None:
    assert "is packed; give the model" in wrong(f"--model_teacher={reference}")


def test_several_teachers(
    wrong: Callable[..., str], teacher: Path, base: Path, tmp_path: Path
) -> None:
    several = f"--model_teacher={teacher},{teacher}"
    assert "the logits are averaged, which only" in wrong(several, "--logits_weight=0")
    line = wrong(several, "--stages=heads", "--logits_weight=0.1")
    assert "--logits_weight counts in the final stage" in line
    assert "averaged, which only" in wrong(several, "--stages=heads")
    assert f"{base} is BertModel" in wrong(f"--model_teacher={teacher},{base}")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"!"', '"@!@"'))
    line = wrong(f"--model_teacher={teacher},{other}", "--logits_weight=0.1")
    assert f"--model_teacher: {other} has another vocabulary" in line


def test_merged_alone(wrong: Callable[..., str], reference: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(reference, merged)
    shutil.rmtree(merged / "unmerged")
    assert "merged" in wrong(f"--model_student={merged}")
