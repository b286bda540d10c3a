"""INT8 with each weight_range: the file computed exactly, and in each runtime of this machine.

    python -m benchmarks.weight_ranges --model=FP32_DIR --squad_train_data=TRAIN \
        --squad_dev_data=DEV --output_dir=DIR [--epochs=0.1 --learning_rate=5e-5] \
        [--nncf_config=nncf_config.json]

For each range it calibrates by train_qa.py or train_qcemb.py, trains the result further, and runs
both files over dev. The score is F1, or the share of questions whose own context is among the 5
nearest. "Same" is the share of questions whose answer (or nearest context) is that of the exact
computation. Some always differ, since no two programs add in the same order. To show how many, the
model is compared with itself after its first LayerNorm's gains are changed by 1e-6. "From FP32" is
the mean difference between the outputs of the exact file and of the FP32 file, in standard
deviations. Results that results.json already has are not computed again.

`ONEDNN_MAX_CPU_ISA=AVX2` in the environment shows OpenVINO's numbers on a CPU without VNNI.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cli import ArgumentParser, number, run_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

RANGES = ("full", "half", "pairs")
DISTANCES = 100  # inputs on which an INT8 file is compared with the FP32 one
MOVED = 1e-6  # relative change of LayerNorm's gains; FP32 resolves 1.2e-7

Infer = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]


def quantize(args: Any, script: str, weight_range: str) -> dict[str, str]:
    """The folders of the model calibrated, and then trained, with a range; made once."""
    os.makedirs(args.output_dir, exist_ok=True)
    with open(args.nncf_config, encoding="utf-8") as file:
        settings = {**json.load(file), "weight_range": weight_range}
    path = os.path.join(args.output_dir, f"{weight_range}.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(settings, file)
    folders = {
        kind: os.path.join(args.output_dir, f"{weight_range}-{kind}")
        for kind in ("calibrated", "trained")
    }
    shared = [
        f"--squad_train_data={args.squad_train_data}",
        f"--squad_dev_data={args.squad_dev_data}",
        "--per_gpu_train_batch_size=32",
        "--per_gpu_eval_batch_size=32",
        "--keep=last",
    ]
    if script == "train_qcemb.py":
        shared += ["--loss_cfg=triplet_num:0,in_batch:1", "--hnm_num=32", "--hnm_batch_size=32"]
    calibrate = ["--quantizer_epochs=0", "--num_train_epochs=0", "--max_drop=100"]
    calibrate.append(f"--nncf_config={path}")
    train = [f"--num_train_epochs={args.epochs}", f"--learning_rate={args.learning_rate}"]
    for model, kind, flags in (
        (args.model, "calibrated", calibrate),
        (folders["calibrated"], "trained", train),
    ):
        command = [f"--model_student={model}", f"--output_dir={folders[kind]}", *shared, *flags]
        subprocess.run([sys.executable, os.path.join(ROOT, script), *command], check=True)
    return folders


# ------------------------------------------------------------------------------------------------
# Ways to run a model


def in_pytorch(folder: str, moved: float = 0.0) -> Infer:
    """The checkpoint with its quantizers; `moved` changes its embedding LayerNorm's gains."""
    import torch

    from bert.model_folder import load_model, open_model
    from deploy import onnx_file
    from tasks import EmbeddingTask, QaTask

    opened = open_model(folder, "--model")
    embeds = "Embedding" in opened.architecture
    model = load_model(opened, auto_class(embeds), quiet=True).eval()
    gains = model.bert.embeddings.LayerNorm.weight.data
    gains.mul_(1 + moved * torch.randn(gains.shape, generator=torch.Generator().manual_seed(0)))
    outputs = (EmbeddingTask if embeds else QaTask).outputs
    graph = onnx_file.ExportedGraph(model, outputs)

    def run(feed: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return [each.numpy() for each in graph(*map(torch.from_numpy, feed.values()))]

    return run


def in_onnxruntime(path: str, exact: bool) -> Infer:
    """The file at any length; `exact` runs it without integer kernels."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    length = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim[1:]:
            if dim.dim_value == length:
                dim.dim_param = "length"
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1" if exact else "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feed: session.run(None, feed)


def in_openvino(path: str) -> Infer:
    """The file at any length, in f32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({each.any_name: [1, -1] for each in model.inputs})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feed: list(compiled(feed).values())


def auto_class(embeds: bool) -> Any:
    """The class that loads a model."""
    if embeds:
        from bert.embedding import AutoModelForEmbedding

        return AutoModelForEmbedding
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering


# ------------------------------------------------------------------------------------------------
# A model's results on dev


class Reading:
    """Dev questions for a reader: F1, and whether two sets of answers are the same."""

    score = "F1"

    def __init__(self, folder: str, dev: str) -> None:
        import squad_utils
        from bert.model_folder import open_model
        from deploy.squad_scores import load_scorer
        from tasks import qa

        self.utils = squad_utils
        self.data = squad_utils.load_squad(dev, "--squad_dev_data")
        tokenizer = open_model(folder, "--model").tokenizer
        self.windows = qa.make_windows(self.data, tokenizer, 64, 384, 128, for_training=False)
        self.scorer = load_scorer(None, self.data)

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """The inputs of each window."""
        from squad_utils import INPUTS

        for window, total in enumerate(self.windows.total_lengths):
            length = min(-(-int(total) // 64) * 64, 384)
            arrays = self.utils.make_batch(self.windows, np.array([window]), pad_to=length)
            yield {name: arrays[name] for name in INPUTS}

    def __call__(self, infer: Infer) -> dict[str, str]:
        """Question id -> answer."""
        answers = self.utils.Answers(self.data, self.windows)
        for window, feed in enumerate(self.feeds()):
            answers.add(np.array([window]), *infer(feed))
        return answers.texts()

    def found_in(self, folder: str) -> dict[str, str]:
        """The answers that the run has saved in its folder, which are PyTorch's."""
        with open(os.path.join(folder, "predictions.json"), encoding="utf-8") as file:
            return json.load(file)

    def figure(self, found: dict[str, str]) -> float:
        """F1, in percent."""
        return self.scorer(self.data, found, {})["f1"]

    def same(self, found: dict[str, str], reference: dict[str, str]) -> float:
        """Share of questions, in percent."""
        from deploy.squad_scores import exact_match

        return 100 * float(np.mean([exact_match(found[key], reference[key]) for key in reference]))


class Searching:
    """Dev questions for an embedder: top 5, and whether the nearest contexts are the same."""

    score = "top 5"

    def __init__(self, folder: str, dev: str) -> None:
        import squad_utils
        from bert.model_folder import open_model
        from tasks import texts

        data = squad_utils.load_squad(dev, "--squad_dev_data")
        tokenizer = open_model(folder, "--model").tokenizer
        self.pairs = texts.make_pairs(data, tokenizer, 32, 384)

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """The inputs of each question, then of each context."""
        from squad_utils import INPUTS

        for texts in (self.pairs.questions, self.pairs.contexts):
            for i, total in enumerate(texts.total_lengths):
                length = min(-(-int(total) // 32) * 32, 384)
                arrays = texts.batch(np.array([i]), pad_to=length)
                yield {name: arrays[name] for name in INPUTS}

    def __call__(self, infer: Infer) -> np.ndarray:
        """Distances [questions, contexts]."""
        vectors = np.stack([np.asarray(infer(feed)[0])[0] for feed in self.feeds()])
        q, c = np.split(vectors.astype(np.float64), [len(self.pairs.questions)])
        q = q[self.pairs.question]
        return np.sqrt(np.maximum((q * q).sum(1)[:, None] + (c * c).sum(1) - 2 * q @ c.T, 0))

    def found_in(self, folder: str) -> None:
        """Nothing: a run leaves no vectors."""

    def figure(self, distances: np.ndarray) -> float:
        """Share of questions whose own context is among the 5 nearest, in percent."""
        own = distances[np.arange(len(distances)), self.pairs.context]
        return 100 * float(np.mean((distances < own[:, None]).sum(1) < 5))

    def same(self, found: np.ndarray, reference: np.ndarray) -> float:
        """Share of questions with the same nearest context, in percent."""
        return 100 * float(np.mean(found.argmin(1) == reference.argmin(1)))


def from_fp32(dev: Reading | Searching, file: str, fp32: str) -> float:
    """Mean difference between the outputs of two files in standard deviations, over DISTANCES."""
    first, second = (in_onnxruntime(each, exact=True) for each in (file, fp32))
    differences = []
    for feed in itertools.islice(dev.feeds(), DISTANCES):
        for mine, theirs in zip(first(feed), second(feed), strict=True):
            differences.append(np.abs(mine - theirs).mean() / np.std(theirs))
    return float(np.mean(differences))


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="output folder of an FP32 model")
    add("--squad_train_data", required=True)
    add("--squad_dev_data", required=True)
    add("--output_dir", required=True)
    add("--nncf_config", default=os.path.join(ROOT, "nncf_config.json"))
    add("--epochs", type=number(float, 0), default=0.1, help="of training after calibration")
    add("--learning_rate", type=number(float, 0), default=5e-5)
    add("--ranges", default=",".join(RANGES))
    args = parser.parse_args()

    from bert.model_folder import open_model
    from deploy.cpu import this_cpu

    embeds = "Embedding" in open_model(args.model, "--model").architecture
    dev = (Searching if embeds else Reading)(args.model, args.squad_dev_data)
    path = os.path.join(args.output_dir, "results.json")
    rows: dict[str, Any] = {}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    for weight_range in args.ranges.split(","):
        script = "train_qcemb.py" if embeds else "train_qa.py"
        for kind, folder in quantize(args, script, weight_range).items():
            file = os.path.join(folder, "model.onnx")
            exact = dev(in_onnxruntime(file, exact=True))
            ways: dict[str, Callable[[], Infer]] = {
                "PyTorch": lambda folder=folder: in_pytorch(folder),
                "PyTorch moved": lambda folder=folder: in_pytorch(folder, MOVED),
                "ONNX Runtime": lambda file=file: in_onnxruntime(file, exact=False),
                "OpenVINO f32": lambda file=file: in_openvino(file),
            }
            if isa:  # of the others nothing changes
                ways = {"OpenVINO f32": ways["OpenVINO f32"]}
            elif (weight_range, kind) != ("pairs", "trained"):  # told once: it takes long
                del ways["PyTorch moved"]
            row = rows.setdefault(f"{weight_range} {kind}", {})
            row.setdefault("exact", {dev.score: dev.figure(exact)})
            if "from FP32" not in row["exact"]:
                row["exact"]["from FP32"] = from_fp32(dev, file, f"{args.model}/model.onnx")
            for name, make in ways.items():
                if (f"{name}, {isa}" if isa else name) in row:
                    continue
                found = dev.found_in(folder) if name == "PyTorch" else None
                found = dev(make()) if found is None else found
                key = f"{name}, {isa}" if isa else name
                row[key] = {dev.score: dev.figure(found), "same": dev.same(found, exact)}
                if name == "PyTorch moved":  # against PyTorch, not against the file
                    reference = dev.found_in(folder)
                    reference = dev(in_pytorch(folder)) if reference is None else reference
                    row[key]["same"] = dev.same(found, reference)
            print(f"{weight_range} {kind}: {row}", flush=True)
            with open(path, "w", encoding="utf-8") as out:
                json.dump(rows, out, indent=1)
    print(f"\n{this_cpu()}; {dev.score}, and answers as those of exact arithmetic in %")
    for name, row in rows.items():
        cells = [f"{way} {e[dev.score]:.2f}" + (f" / {e['same']:.1f}" if "same" in e else "")
                 for way, e in row.items()]  # fmt: skip
        print(f"{name:18} " + "; ".join(cells))


if __name__ == "__main__":
    run_main(main)
