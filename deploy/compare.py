"""Output folders side by side: quality, size, operations and speed on this machine. No torch.

    python -m deploy.compare FOLDER... [--json FILE] [--picture FILE.png]

Each folder is a row of a Markdown table. All files are timed in turns at one length, the shortest
of their --max_seq_length_c.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cli
from cli import UserError
from deploy import timing
from deploy.cpu import this_cpu

SCORES = {"f1": "F1", "top_1": "top 1", "top_5": "top 5"}  # key of metrics.json -> table head
DRAWN = ("f1", "top_1")  # of SCORES, one per task
MARKERS = dict(zip(timing.WAYS, "os^", strict=True))


@dataclass(frozen=True)
class Row:
    """A folder.

    Attributes:
        scores: in %, by the keys of SCORES that its task has.
        gops: 1e9 operations of linear layers and attention, a multiplication with its addition
            counted as 2; None without OpenVINO, which finds them.
        megabytes: the size of model.onnx in 1e6 bytes.
        milliseconds: by `timing.WAYS`; ways that do not run the file are left out.
    """

    folder: str
    scores: dict[str, float]
    parameters: int
    gops: float | None
    megabytes: float
    milliseconds: dict[str, float]


def compare(
    folders: Sequence[str], rounds: int = timing.ROUNDS, seconds: float = float("inf")
) -> tuple[list[Row], int]:
    """One row per folder, and the number of tokens at which all files were timed.

    Raises:
        UserError: a folder lacks model.onnx or metrics.json, or no runtime runs its file.
    """

    def failed(folder: str, way: str, error: Exception) -> None:
        cli.warn(f"{folder} does not run in {way}: {cli.first_line(error)}")

    metrics = [_metrics(folder) for folder in folders]
    length = min(each["arguments"]["max_seq_length_c"] for each in metrics)
    paths = {folder: os.path.join(folder, "model.onnx") for folder in folders}
    found = timing.time_files(paths, length, rounds, seconds, failed)
    rows = []
    for folder, figures in zip(folders, metrics, strict=True):
        path = paths[folder]
        if not found[folder]:
            raise UserError(f"{path}: no runtime on this machine runs it")
        scores = {key: figures[key] for key in SCORES if key in figures}
        size, count = os.path.getsize(path) / 1e6, figures["parameters"]
        rows.append(Row(folder, scores, count, gops(path, length), size, found[folder]))
    return rows, length


def _metrics(folder: str) -> dict[str, Any]:
    """metrics.json of an output folder."""
    metrics = cli.read_object(os.path.join(folder, "metrics.json"), "FOLDER")
    try:
        metrics["parameters"], metrics["arguments"]["max_seq_length_c"]
    except (KeyError, TypeError):
        raise UserError(f"FOLDER: {folder}/metrics.json is not that of an output folder") from None
    if not os.path.isfile(os.path.join(folder, "model.onnx")):
        raise UserError(f"FOLDER: {folder} has no model.onnx; every run leaves one at its end")
    return metrics


def gops(path: str, length: int) -> float | None:
    """The 1e9 operations in a file's matrix products at 1 x `length`; None without OpenVINO."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino  # need not be installed

    model = openvino.Core().read_model(path)
    model.reshape({each.any_name: [1, length] for each in model.inputs})
    total = 0
    for product in model.get_ops():
        if product.get_type_name() == "MatMul":
            transposed = product.get_attributes()["transpose_a"]
            inner = product.input(0).get_shape()[-2 if transposed else -1]
            total += 2 * inner * math.prod(product.output(0).get_shape())
    return total / 1e9


def table(rows: Sequence[Row], length: int) -> str:
    """A Markdown table of all rows."""
    scores = {key: name for key, name in SCORES.items() if any(key in row.scores for row in rows)}
    head = ["folder", *scores.values(), "M parameters", f"GOps at 1 x {length}", "MB"]
    head += [f"{way}, ms" for way in timing.WAYS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row.folder]
        cells += [f"{row.scores[key]:.2f}" if key in row.scores else "" for key in scores]
        cells.append(f"{row.parameters / 1e6:.2f}")
        cells += ["" if row.gops is None else f"{row.gops:.2f}", f"{row.megabytes:.1f}"]
        for way in timing.WAYS:
            taken = row.milliseconds
            cells.append(f"{taken[way]:.1f}" if way in taken else "does not run")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], length: int, path: str) -> None:
    """Draw quality over latency: F1 or top 1, one point per folder and way to run its file.

    Each task has a panel of its own.
    """
    import matplotlib  # half a second, which only a picture needs

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # after the backend is chosen
    from matplotlib import ticker  # as matplotlib

    keys = [key for key in DRAWN if any(key in row.scores for row in rows)]
    figure, panels = plt.subplots(
        len(keys), 1, figsize=(8, 5 * len(keys)), squeeze=False, layout="constrained"
    )
    for key, axes in zip(keys, panels[:, 0], strict=True):
        shown = [row for row in rows if key in row.scores]
        for place, row in enumerate(shown):
            color = f"C{place % 10}"
            points = sorted((taken, way) for way, taken in row.milliseconds.items())
            score = row.scores[key]
            axes.plot([taken for taken, _ in points], [score] * len(points), color=color, alpha=0.4)
            for taken, way in points:
                axes.plot(taken, score, MARKERS[way], color=color)
            name = os.path.basename(os.path.abspath(row.folder))
            axes.annotate(
                name, (points[0][0], score), textcoords="offset points", xytext=(0, 7), fontsize=8
            )
        for way, marker in MARKERS.items():
            axes.plot([], [], marker, color="grey", label=way)
        axes.set(xscale="log", xlabel=f"ms for {length} tokens", ylabel=f"{SCORES[key]} on dev, %")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(str(this_cpu()), fontsize=9)
        axes.margins(x=0.1, y=0.2)
        axes.grid(alpha=0.3, which="both")
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = cli.ArgumentParser(
        prog="python -m deploy.compare", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="output folders, each with its model.onnx")
    add("--rounds", type=cli.number(int, 1, 1000), default=timing.ROUNDS,
        help="rounds of timing, in each of which every file has its turn")  # fmt: skip
    add("--json", metavar="FILE", help="write the rows to this file")
    add("--picture", metavar="FILE.png", help="draw quality over latency in this file")
    args = parser.parse_args()
    if args.picture and not args.picture.endswith(".png"):
        raise UserError(f"--picture: {args.picture} does not end in .png")
    for flag, path in (("--json", args.json), ("--picture", args.picture)):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"{flag}: no such folder: {os.path.dirname(path)}")
    rows, length = compare([folder.rstrip("/") or "/" for folder in args.folders], args.rounds)
    if args.json:
        record = {"cpu": str(this_cpu()), "tokens": length, "rows": [asdict(row) for row in rows]}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    if args.picture:
        draw(rows, length, args.picture)
    print(table(rows, length))


if __name__ == "__main__":
    cli.run_main(main)
