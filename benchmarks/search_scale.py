"""Search at scale: an index of many paragraphs, and the memory of the retrieval metrics.

    python -m benchmarks.search_scale --model_emb=DIR --squad_data=TRAIN

The paragraphs are the file's contexts, and halves of them if there are too few.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time

from cli import ArgumentParser, UserError, number, run_main
from deploy.documents import read_paragraphs
from deploy.runtime import PRECISIONS, Runtime
from deploy.search import SEARCHES, build_index, load_embedder
from squad_utils import load_squad


def peak_gb() -> float:
    """The peak memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def index_and_ask(folder: str, path: str, count: int, runtime: Runtime) -> None:
    """Seconds to index `count` paragraphs; for each way to search, those to open the index again
    and, median, to search it."""
    data = load_squad(path, "--squad_data")
    contexts = [" ".join(text.split()) for text in dict.fromkeys(data.contexts)]
    for text in list(contexts):
        words = text.split()
        half = len(words) // 2
        contexts += [" ".join(words[:half]), " ".join(words[half:])]
    if len(contexts) < count:
        raise UserError(f"--squad_data: {path} gives {len(contexts)} paragraphs, not {count}")
    embedder = load_embedder(folder, runtime)
    with tempfile.TemporaryDirectory() as texts:
        with open(os.path.join(texts, "all.txt"), "w", encoding="utf-8") as file:
            file.write("\n\n".join(contexts[:count]))
        began = time.perf_counter()
        paragraphs = read_paragraphs([texts])
        build_index(paragraphs, embedder, "dense")
        print(f"{len(paragraphs):,} paragraphs indexed in {time.perf_counter() - began:.0f} s")
        for method in SEARCHES:
            began = time.perf_counter()
            index = build_index(read_paragraphs([texts]), embedder, method)
            opened = time.perf_counter() - began
            times = []
            for question in data.questions[:100]:
                start = time.perf_counter()
                index.nearest(question, 20)
                times.append(time.perf_counter() - start)
            asked = statistics.median(times) * 1000
            print(f"{method:6}: opened again in {opened:.2f} s, a question in {asked:.1f} ms")


def metrics_memory(questions: int, contexts: int, width: int) -> None:
    """The peak memory of the ranks beyond the vectors; one block of questions shows it."""
    import torch

    from tasks.embedding import ranks

    generator = torch.Generator().manual_seed(0)
    of_contexts = torch.randn(contexts, width, generator=generator)
    of_questions = torch.randn(questions, width, generator=generator)
    own = torch.randint(contexts, (questions,), generator=generator)
    before, began = peak_gb(), time.perf_counter()
    ranks(of_questions, of_contexts, own)
    vectors = (of_contexts.nbytes + of_questions.nbytes) / 1e9
    print(f"ranks of {questions:,} questions among {contexts:,} contexts of width {width}:")
    print(f"{time.perf_counter() - began:.0f} s, vectors {vectors:.2f} GB,")
    print(f"peak {peak_gb() - before:.2f} GB more than with the vectors alone")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    positive = number(int, 1)
    add("--model_emb", required=True, help="output folder of train_qcemb.py")
    add("--squad_data", required=True, help="SQuAD JSON")
    add("--paragraphs", type=positive, default=10_000)
    add("--runtime", choices=("openvino", "onnxruntime"), default="openvino")
    add("--runtime_precision", choices=PRECISIONS, default="f32")
    add("--questions", type=positive, default=2048, help="of the memory measurement")
    add("--contexts", type=positive, default=1_000_000)
    add("--width", type=positive, default=1024)
    args = parser.parse_args()
    runtime = Runtime(args.runtime, args.runtime_precision)
    index_and_ask(args.model_emb, args.squad_data, args.paragraphs, runtime)
    metrics_memory(args.questions, args.contexts, args.width)


if __name__ == "__main__":
    run_main(main)
