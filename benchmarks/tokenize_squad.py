"""Seconds and peak memory from a SQuAD file, repeated several times, to windows."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time

from tokenizers import Tokenizer

import squad_utils
from cli import ArgumentParser, number, read_text, run_main


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder with tokenizer.json")
    add("--squad_data", required=True, help="SQuAD JSON")
    add("--times", type=number(int, 1), default=3, help="how often the file is repeated")
    args = parser.parse_args()

    root = json.loads(read_text(args.squad_data, "--squad_data"))
    root["data"] *= args.times
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(root, file)
        file.flush()
        del root
        began = time.perf_counter()
        data = squad_utils.load_squad(file.name, "--squad_data")
    tokenizer = Tokenizer.from_file(os.path.join(args.model, "tokenizer.json"))
    loaded = time.perf_counter()
    contexts, questions = squad_utils.tokenize_squad(data, tokenizer, max_seq_length_q=64)
    special = squad_utils.SpecialIds(*map(tokenizer.token_to_id, ("[CLS]", "[SEP]", "[PAD]")))
    windows = squad_utils.cut_windows(data, (contexts, questions), special, 384, 128, True)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{len(data.ids):,} questions, {len(windows):,} windows")
    print(f"reading and checking    {loaded - began:.1f} s")
    print(f"tokenising and cutting  {done - loaded:.1f} s")
    print(f"peak memory             {peak:.2f} GB")


if __name__ == "__main__":
    run_main(main)
