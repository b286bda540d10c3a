"""Measure training on one GPU: its share of the peak rate, the Trainer's speed, whole commands.

    python -m benchmarks.gpu --minutes=9 --output_dir=models/gpu-figures

Run it from the repository's root. It needs no network: the models have BERT-large's shape and
random weights, and the data is generated. `gpu.json` and `gpu.md` in the output folder are written
after each part. The same command again measures the parts that are missing there or have failed, so
the work can be split. `--dry-run` runs all parts with tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import gpu_steps
from benchmarks.gpu_commands import COMMANDS, run_command
from benchmarks.gpu_timing import REAL, TINY, Bench
from cli import ArgumentParser, UserError, number, run_main, warn
from training import passes
from training.states import write_json

STARTED = time.monotonic()
PATIENCE = 4  # a part is stopped after so many times its estimate


@dataclass(frozen=True)
class Part:
    """A part: the function that measures it, and its rough time on an H100 in seconds."""

    measure: Callable[[Bench], dict[str, Any]]
    seconds: float


PARTS = {
    "peak": Part(gpu_steps.measure_peak, 10),
    "fine_tuning": Part(gpu_steps.measure_fine_tuning, 25),
    "plain_passes": Part(gpu_steps.measure_plain_passes, 15),
    "trainer": Part(gpu_steps.measure_trainer, 20),
    "distillation": Part(gpu_steps.measure_distillation, 20),
    "int8": Part(gpu_steps.measure_int8, 30),
    "embeddings": Part(gpu_steps.measure_embeddings, 100),
    "trainer_compiled": Part(gpu_steps.measure_trainer_compiled, 120),
}
COMMAND_SECONDS = {"qa1": 75, "qa2": 150, "qa3": 100, "emb1": 75, "emb2": 150, "emb3": 100,
                   "squad_qa": 60, "squad_packed": 120, "squad_int8": 120}  # fmt: skip
PARTS |= {
    name: Part(functools.partial(run_command, name=name), seconds)
    for name, seconds in COMMAND_SECONDS.items()
}
GROUPS = {
    "commands": [name for name in COMMANDS if not name.startswith("squad")],
    "squad": [name for name in COMMANDS if name.startswith("squad")],
}


class PartTimeout(Exception):
    """A part takes much longer than estimated."""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output_dir", required=True, help="folder for gpu.json, gpu.md, logs and profiles")
    add("--minutes", type=number(float, 0, low_open=True), default=60.0, help="for this call")
    add("--only", help=f"comma-separated parts: {', '.join([*PARTS, *GROUPS])} (default: all)")
    add("--work_dir", default="models/gpu", help="folder for models that commands make")
    add("--model", help="folder of a small pretrained BERT for the squad parts, else left out")
    add("--squad_train_data", help="SQuAD JSON for the squad parts")
    add("--squad_dev_data", help="SQuAD JSON for the squad parts")
    add("--profile", action="store_true", help="the most expensive kernels of three parts too")
    add("--dry-run", action="store_true", help="tiny models on the CPU; the figures mean nothing")
    return parser.parse_args()


def chosen_parts(args: argparse.Namespace) -> list[str]:
    """The parts to measure, in the order of PARTS, with `peak`, which others need.

    Raises:
        UserError: --only names no part, or the squad parts lack their model or data.
    """
    given = bool(args.model and args.squad_train_data and args.squad_dev_data)
    names = [name for name in PARTS if given or args.dry_run or name not in GROUPS["squad"]]
    if not args.only:
        return names
    asked = {"peak"}
    for name in args.only.split(","):
        if name not in PARTS and name not in GROUPS:
            raise UserError(f"--only: {name!r} is not one of {', '.join([*PARTS, *GROUPS])}")
        asked.update(GROUPS.get(name, [name]))
    if asked - set(names):
        raise UserError("--only: squad needs --model, --squad_train_data and --squad_dev_data")
    return [name for name in names if name in asked]


def describe_machine(args: argparse.Namespace) -> dict[str, Any]:
    """The card, its memory and versions, which all figures of one file must share."""
    machine: dict[str, Any] = {"card": "none: a dry run on a CPU", "torch": torch.__version__}
    machine |= {"python": sys.version.split()[0], "transformers": transformers.__version__}
    if not args.dry_run:
        properties = torch.cuda.get_device_properties(0)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        machine |= {"card": properties.name, "memory_gigabytes": properties.total_memory / 1e9}
        machine |= {"cuda": torch.version.cuda, "precision": "bf16" if native else "fp16"}
    return machine


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """The figures of a part, or its error."""

    def give_up(*_: Any) -> None:
        raise PartTimeout(f"given up after {PATIENCE} times its estimate")

    part, began = PARTS[name], time.monotonic()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(int(PATIENCE * part.seconds))
    try:
        figures = part.measure(bench)
    except Exception:
        figures = {"error": "\n".join(traceback.format_exc().strip().splitlines()[-20:])}
    finally:
        signal.alarm(0)
    return {**figures, "seconds_of_part": time.monotonic() - began}


def table(machine: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """All figures as Markdown."""
    lines = [shown(machine), "", "| part | figure | value |", "|---|---|---|"]
    for name, figures in parts.items():
        for key, value in figures.items():
            text = shown(value) if key != "error" else f"`{value.splitlines()[-1][:200]}`"
            lines.append(f"| {name} | {key.replace('_', ' ')} | {text} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value, or several with their names, as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def main() -> None:
    args = parse_arguments()
    names = chosen_parts(args)
    # One GPU for all parts, and no access to the hub; set before a library reads them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.dry_run:
        torch.set_num_threads(1)  # for tiny models, more threads only wait
        os.environ["OMP_NUM_THREADS"] = "1"
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here; --dry-run goes through all parts on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends commands too
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    machine, parts, path = describe_machine(args), {}, folder / "gpu.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["machine"] != machine:
            raise UserError(
                f"--output_dir: {path} has figures of {shown(earlier['machine'])}, this is"
                f" {shown(machine)}; choose another folder"
            )
        parts = earlier["parts"]
    passes.COMPILE_OPERATIONS = 0.0  # a few steps, measured as those of a long stage
    bench = Bench(
        args=args,
        sizes=TINY if args.dry_run else REAL,
        device="cpu" if args.dry_run else "cuda",
        precision=machine.get("precision", "fp32"),
        parts=parts,
    )
    for name in names:
        if "error" not in parts.get(name, {"error": ""}):
            continue
        left = 60 * args.minutes - (time.monotonic() - STARTED)
        if left < PARTS[name].seconds:
            warn(f"{name} takes about {PARTS[name].seconds:.0f} s and {left:.0f} s are left: it and"
                 " what follows are for another call")  # fmt: skip
            break
        print(f"-- {name}", flush=True)
        parts[name] = measure(bench, name)
        parts = bench.parts = {each: parts[each] for each in PARTS if each in parts}
        write_json(str(path), {"machine": machine, "parts": parts})
        (folder / "gpu.md").write_text(table(machine, parts), encoding="utf-8")
        for key, value in parts[name].items():
            print(f"{key}: {shown(value)}", flush=True)
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
