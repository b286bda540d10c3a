"""What a finished run tells people: curves of all losses, a card that says how its model loads."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calls import curves
from huggingface_hub import ModelCard
from transformers import AutoModelForQuestionAnswering, BertConfig

from bert.embedding import AutoModelForEmbedding
from bert.packed import PackedBertConfig
from int8 import quantizers
from training import results

SPEED = {"examples_per_second": 9.0, "tokens_per_second": 99.0, "padding": 0.1}
TIMES = {"seconds": 1.0, "seconds_left": 2.0, "seconds_left_all": 3.0}


def record(stage: str, step: int, **losses: float) -> dict[str, Any]:
    """One of training, as the log has it."""
    total = {"loss": sum(losses.values()), **losses}
    return {"stage": stage, "step": step, "epoch": 0.1, **total, "learning_rate": 1e-3,
            **SPEED, **TIMES}  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "drawn"),
    [
        ([{"triplet": 1.0, "in_batch": 2.0}], ["triplet", "in_batch", "loss"]),
        ([{"state_0": 1.0}, {"state_0": 1.0, "state_1": 0.5}], ["state_0", "state_1", "loss"]),
        ([{"a_new_one": 1.0, "answer": 2.0}], ["a_new_one", "answer", "loss"]),
        ([{"triplet": 1.0}], ["loss"]),  # which is the same curve
    ],
)
def test_curves_show_each_loss_of_the_log_and_nothing_else(
    parts: list[dict[str, float]], drawn: list[str], tmp_path: Path
) -> None:
    log = [{"stage": "teacher", "step": 0, "evaluation": True, "mrr": 80.0}]
    for i, losses in enumerate(parts):
        log += [record(f"stage {i}", step, **losses) for step in (1, 2)]
        log.append({"stage": f"stage {i}", "step": 2, "evaluation": True, "mrr": 50.0 + i})
    lines = [json.dumps(each) + "\n" for each in log]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    found = curves(tmp_path, {"mrr": "MRR"})
    assert sorted(found) == sorted([*drawn, "MRR", "teacher's MRR"])
    assert (tmp_path / "curves.png").exists()


def card(tmp_path: Path, config: Any, auto_class: Any, **metrics: Any) -> str:
    """The card of a model of this configuration."""
    part = results.TaskCard("Title", "question-answering", {"F1": 1.5, "questions": 7}, "O.", "I.")
    task = SimpleNamespace(
        args=SimpleNamespace(squad_train_data="data/train.json", model_student="some/bert"),
        auto_class=auto_class,
        card=lambda figures: part,
    )
    packed = isinstance(config, PackedBertConfig)
    result = SimpleNamespace(packed=packed, figures={}, made="fine-tuned on")
    told = {
        "arguments": {"max_seq_length_c": 384, "model_student": "some/bert"},
        "parameters": 1_500_000,
        "train_seconds": 90.0,
        "precision": "bf16",
        "onnx_check": {"passed": True, "difference": 2e-6},
        **metrics,
    }
    results.write_card(str(tmp_path), task, result, told)
    return (tmp_path / "README.md").read_text()


def test_the_head_of_a_card_is_read_by_the_hub_and_its_body_has_the_figures(tmp_path: Path) -> None:
    text = card(tmp_path, BertConfig(), AutoModelForQuestionAnswering)
    head = ModelCard.load(tmp_path / "README.md").data
    assert (head.pipeline_tag, head.library_name) == ("question-answering", "transformers")
    assert set(head.tags) == {"bert", "question-answering", "squad", "onnx", "openvino"}
    for line in (
        "Title: `some/bert` fine-tuned on\n`train.json`.\n",
        "|---|---|\n| F1 | 1.5 |\n| questions | 7 |\n| parameters | 1.50 M |\n",
        "| training time | 1.5 min |\n| precision of training | bf16 |\n\n## Use\n",
        "OpenVINO (`ovc model.onnx`). Inputs\n",
        "[1, 384]; O.\n",
        "from the PyTorch model by at most 2.0e-06. In\n",
        "\nI.\n\n## Training\n```\npython3 ",
        "  --squad_train_data=data/train.json \\\n  --model_student=some/bert\n```\n",
    ):
        assert line in text
    assert "{{" not in text and "{%" not in text


class AutoModelOfAnotherTask:
    """Of a module of ours, as that of embeddings is."""


@pytest.mark.parametrize(
    ("config", "auto_class", "imports"),
    [
        (BertConfig(), AutoModelForQuestionAnswering, ["transformers"]),
        (PackedBertConfig(), AutoModelForQuestionAnswering, ["bert_pack", "transformers"]),
        (BertConfig(), AutoModelForEmbedding, ["bert.embedding", "transformers"]),
        (PackedBertConfig(), AutoModelForEmbedding, ["bert.embedding", "transformers"]),
        (PackedBertConfig(), AutoModelOfAnotherTask, [__name__, "transformers"]),
    ],
)
def test_a_card_imports_what_its_model_needs(
    tmp_path: Path, config: Any, auto_class: Any, imports: list[str]
) -> None:
    text = card(tmp_path, config, auto_class)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.parse(code).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert found == imports
    assert f'model = {auto_class.__name__}.from_pretrained("{tmp_path}")\n' in code


def test_a_card_tells_of_quantizers_and_of_a_file_that_failed(tmp_path: Path) -> None:
    failed = {"passed": False, "difference": None}
    (tmp_path / quantizers.QUANTIZERS).write_text(json.dumps({quantizers.PLAIN_WEIGHTS: True}))
    text = card(tmp_path, BertConfig(), AutoModelForQuestionAnswering, int8=[1], onnx_check=failed)
    assert "quantizers.safetensors" in text and "--model_student=<this folder>` loads" in text
    assert "is a plain model in FP32" in text
    assert "```python" not in text
    assert "`model.failed.onnx` is NOT the same model: it has failed its check. Inputs\n" in text
    assert "from the PyTorch model by a value that is not a number. In\n" in text
    right = {"passed": True, "difference": 0.0}
    text = card(tmp_path, BertConfig(), AutoModelForQuestionAnswering, int8=[1], onnx_check=right)
    assert "by 0.0e+00 standard deviations of its outputs on average, layer by layer. In\n" in text
