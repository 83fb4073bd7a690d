"""Speed and memory of `corpus.tokens.tokenize`: `python benchmarks/tokenization.py`.

Speed is the tokens per second of `write_tokens`, Arrow file included, against `encode_batch` of `tokenizers` on
the same texts, in turns. Memory is what a process holds beyond what it held before, while it tokenises a corpus that
is larger, the same texts over and over. Pages of mapped files do not count: the kernel takes them back when it must.
"""

import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from tokenizers import Tokenizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from corpus.config import DataConfig
from corpus.sources import load_documents, stdlib_texts
from corpus.tokenizer import load_tokenizer, special_tokens, without_rules
from corpus.tokens import TokenFiles, tokenize, write_tokens

ROUNDS, CORPUS_MIB = 7, 384


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def held_mib() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 2**10


def peak_mib(work: Callable[[], object]) -> float:
    """The most that was held at any time during `work`, beyond what was held before."""
    before, samples, done = held_mib(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            samples.append(held_mib() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    work()
    done.set()
    sampler.join()
    return max(samples)


def tokenize_large(folder: str, tokenizer_json: str) -> None:
    """In a process of its own, so that no memory is there to be used again."""
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    corpus, size = Path(folder) / "corpus.jsonl", 0
    with corpus.open("w") as file:
        texts, _ = stdlib_texts()
        while size < CORPUS_MIB * 2**20:
            size += sum(file.write(json.dumps({"text": text}) + "\n") for text in texts)
    config = DataConfig(dataset=str(corpus))
    load_documents(config)  # `datasets` converts it, within a memory of its own
    del texts
    peak = peak_mib(lambda: tokenize(config, Tokenizer.from_str(tokenizer_json), show_progress=True))
    print(f"memory             {peak:.0f} MiB at most for a corpus of {size / 2**20:.0f} MiB")


def main() -> None:
    texts, _ = stdlib_texts()
    config = DataConfig()
    tokenizer = load_tokenizer(config)
    special = special_tokens(tokenizer, config)
    plain = without_rules(tokenizer, special)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.arrow"
        ours, theirs = [], []
        for _ in tqdm(range(ROUNDS), desc="rounds", leave=False):
            ours.append(seconds(lambda: write_tokens(path, texts, plain, special)))
            theirs.append(seconds(lambda: plain.encode_batch(texts, add_special_tokens=False)))
        tokens = int(TokenFiles([path]).document_starts[-1])
        for name, times in (("write_tokens", ours), ("encode_batch", theirs)):
            low, middle, high = (tokens / t / 1e6 for t in (max(times), statistics.median(times), min(times)))
            print(f"{name:<18} {middle:.2f} million tokens/s ({low:.2f} to {high:.2f}), {ROUNDS} rounds in turns")
        ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
        print(f"ratio              {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        process = multiprocessing.get_context("spawn").Process(target=tokenize_large, args=(folder, tokenizer.to_str()))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
