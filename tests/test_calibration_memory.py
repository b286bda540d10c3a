"""The memory of calibration does not grow with the number of windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from transformers import BertConfig, BertForQuestionAnswering

from bert.attention import fuse_attention
from int8.calibration import calibrate, check_scope
from int8.settings import read_nncf_config

torch.set_num_threads(1)
bert = BertConfig(hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=512, vocab_size=64)
model = fuse_attention(BertForQuestionAnswering(bert), separate_products=True).eval()
config = read_nncf_config("nncf_config.json")
check_scope(config, model)
names = "input_ids", "attention_mask", "token_type_ids"
sample = {name: torch.ones(1, 512, dtype=torch.long) for name in names}
pages = []


def note():
    with open("/proc/self/statm") as file:
        pages.append(int(file.read().split()[1]))


calibrate(model, config, [sample] * 48, note)
passes = pages[:48], pages[48:96]  # for SmoothQuant, then for the ranges and the biases
print(max(4096 * (each[-1] - each[4]) / 1e6 for each in passes))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to read memory")
def test_windows_do_not_stay_in_memory() -> None:
    """In a process of its own: in another, free memory would hide it."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    megabytes = float(done.stdout.splitlines()[-1])
    assert megabytes < 170  # over 450 for these 44 windows if they stay
