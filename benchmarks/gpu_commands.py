"""The parts of benchmarks/gpu.py that run whole commands, as a user does."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel, BertTokenizerFast

from benchmarks.gpu_timing import ROOT, Bench
from examples import make_sample

LENGTHS = "--max_seq_length_q={} --max_seq_length_c=384 --per_gpu_eval_batch_size={}"
PACK_CFG = "--pack_cfg=num_hidden_layers:{},ff_iter_num:4,num_attention_heads:{},hidden_size:{}," \
           "pack_emb:1,hidden_act:orig"  # fmt: skip
SIX_PACK = PACK_CFG.format(12, 8, 512) + " --loss_weight_alpha=1.5"
TAUGHT = "--freeze_list=none --supervision_weight=0.02 --nncf_config=nncf_config.json"
MINING = "--hnm_batch_size=8 --hnm_hist_num=32 --hnm_num=256"
# The README's six commands with little data and few steps, and a small model on all of SQuAD.
# {name}: the folder with another command's results; {base}: BERT-large's shape; {model}: --model.
COMMANDS = {
    "qa1": "train_qa.py --model_student={base} --freeze_list=embedding --supervision_weight=0"
    " --learning_rate=3e-5 --per_gpu_train_batch_size=2 --total_train_batch_size=48 "
    + LENGTHS.format(64, 16),
    "qa2": "pack_and_distill.py --model_student={qa1} --model_teacher={qa1} --learning_rate=5e-4"
    " --learning_rate_for_tune=10e-4 --per_gpu_train_batch_size=4 --total_train_batch_size=32"
    f" --total_train_batch_size_for_tune=64 {SIX_PACK} " + LENGTHS.format(64, 32),
    "qa3": "train_qa.py --model_student={qa2} --model_teacher={qa1} --kd_weight=1"
    f" --learning_rate=1e-4 --per_gpu_train_batch_size=8 --total_train_batch_size=32 {TAUGHT} "
    + LENGTHS.format(64, 16),
    "emb1": "train_qcemb.py --model_student={base} --model_teacher={base} --freeze_list=embedding"
    " --supervision_weight=0.02 --loss_cfg=triplet_num:1,emb_loss:none --learning_rate=3e-5"
    f" --per_gpu_train_batch_size=2 --total_train_batch_size=32 {MINING} " + LENGTHS.format(32, 16),
    "emb2": "pack_and_distill.py --model_student={emb1} --model_teacher={emb1}"
    " --learning_rate=3e-4 --learning_rate_for_tune=3e-4 --per_gpu_train_batch_size=4"
    f" --total_train_batch_size=32 --total_train_batch_size_for_tune=32 {SIX_PACK} "
    + LENGTHS.format(32, 32),
    "emb3": "train_qcemb.py --model_student={emb2} --model_teacher={emb1}"
    " --loss_cfg=triplet_num:1,emb_loss:L2 --learning_rate=3e-5 --per_gpu_train_batch_size=8"
    f" --total_train_batch_size=32 {TAUGHT} {MINING} " + LENGTHS.format(32, 16),
    "squad_qa": "train_qa.py --model_student={model} --freeze_list=embedding --learning_rate=2e-4"
    " --num_train_epochs=2 --per_gpu_train_batch_size=32 " + LENGTHS.format(64, 64),
    "squad_packed": "pack_and_distill.py --model_student={squad_qa} --model_teacher={squad_qa}"
    " --stages=heads,final --num_train_epochs=2 --warm_up_steps=40 --learning_rate_for_tune=5e-4"
    " --logits_weight=0.1"
    " --per_gpu_train_batch_size=32 --total_train_batch_size_for_tune=32 " + LENGTHS.format(64, 64),
    "squad_int8": "train_qa.py --model_student={squad_packed} --model_teacher={squad_qa}"
    " --quantizer_epochs=0 --num_train_epochs=0.4 --learning_rate=2e-4"
    f" --per_gpu_train_batch_size=32 {TAUGHT} " + LENGTHS.format(64, 64),
}
SCORES = ("f1", "exact_match", "mrr", "train_seconds", "parameters", "onnx_bytes")


def make_base(bench: Bench, folder: Path, data: Path) -> None:
    """A model of the large shape with random weights, and a vocabulary of the data's words."""
    words: Counter[str] = Counter()
    for article in json.loads((data / "train-v1.1.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            words.update(paragraph["context"].lower().split())
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    vocabulary += [word for word, _ in words.most_common(1000) if word.isalpha() and len(word) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{each}\n" for each in vocabulary), encoding="utf-8")
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    bench.make(BertModel, bench.config()).save_pretrained(folder)


def run_command(bench: Bench, name: str) -> dict[str, Any]:
    """Run one of COMMANDS as a process, after the commands whose results it needs and lacks."""
    args, sizes = bench.args, bench.sizes
    work_dir = Path(args.work_dir).resolve() / ("dry" if args.dry_run else "real")
    data, base = work_dir / "data", work_dir / "base"
    if not (data / "dev-v1.1.json").exists():
        counts = [f"--num_train={sizes.questions}", f"--num_dev={max(8, sizes.questions // 4)}"]
        make_sample.main([*counts, f"--output_dir={data}"])
    if not (base / "model.safetensors").exists():
        make_base(bench, base, data)
    folders = {each: str(work_dir / each) for each in COMMANDS}
    of_squad = name.startswith("squad")
    for needed in re.findall(r"\{(\w+)\}", COMMANDS[name]):
        if "error" in bench.parts.get(needed, {}):
            raise RuntimeError(f"{needed}, whose model it reads, has failed")
        if needed in folders and not os.path.exists(Path(folders[needed]) / "metrics.json"):
            run_command(bench, needed)
    train_data, dev_data = data / "train-v1.1.json", data / "dev-v1.1.json"
    if of_squad and args.model:
        train_data, dev_data = map(os.path.abspath, (args.squad_train_data, args.squad_dev_data))
    command = (
        COMMANDS[name]
        .format(base=base, model=os.path.abspath(args.model or base), **folders)
        .split()
    )
    command += [f"--output_dir={folders[name]}", "--overwrite_output_dir"]
    command += [f"--squad_train_data={train_data}", f"--squad_dev_data={dev_data}"]
    packs = command[0] == "pack_and_distill.py"
    if not of_squad:
        command += ["--num_train_epochs=1"] + ["--max_steps_per_stage=2"] * packs
    if packs and (of_squad or args.dry_run):
        config = json.loads((Path(args.model or base) / "config.json").read_text())
        keys = ("num_hidden_layers", "num_attention_heads", "hidden_size")
        layers, heads, hidden = (config[key] for key in keys)
        command.append(PACK_CFG.format(layers, heads // 2, hidden // 2))
    if args.dry_run:
        command += ["--max_seq_length_q=24", "--max_seq_length_c=96", "--doc_stride=48"]
        command += ["--num_train_epochs=0.5", "--no_cuda", "--precision=fp32"]
        command += ["--stages=final"] * packs + ["--quantizer_epochs=0"] * (name[-1] in "38")
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    log_path, began = Path(args.output_dir) / f"{name}.log", time.monotonic()
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that it has left, if any
            process.wait()
    seconds = time.monotonic() - began
    if process.returncode:
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError(f"exit code {process.returncode}\n" + "\n".join(tail))
    metrics = json.loads((Path(folders[name]) / "metrics.json").read_text(encoding="utf-8"))
    figures = {"exit_code": 0, "seconds": seconds, "minutes": seconds / 60}
    figures["export_passed"] = metrics["onnx_check"]["passed"]
    figures["export_difference"] = metrics["onnx_check"]["difference"]
    figures |= {key: metrics[key] for key in SCORES if key in metrics}
    if bench.device == "cuda":
        figures["peak_gigabytes"] = metrics["gpu"]["peak_bytes"] / 1e9
    return figures
