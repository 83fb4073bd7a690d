"""What loading costs a rank that trains on 100,000 tokens a second: `python benchmarks/loader.py`.

The consumer sleeps for as long as a step on its batch would take, as a process does that waits for its GPU. The share
is the time spent waiting for the next batch, as `data_seconds` is in metrics.jsonl, in all of the time; the start of
the workers, before the first batch, stands apart.
"""

import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from corpus import Corpus, load_corpus, tokenize_all
from corpus.config import DataConfig
from corpus.tokenizer import load_tokenizer
from data import make_loader, permutation

TOKENS_PER_SECOND, SEQ_LEN, ROWS, BATCHES = 100_000, 2048, 4, 60


def measure(config: DataConfig, corpus: Corpus) -> tuple[float, float, float]:
    """Seconds to the first batch, then the mean seconds of one batch and their share."""
    order = itertools.cycle(permutation(len(corpus.source.open(0)), 0, 0).tolist())
    batches = ([next(order) for _ in range(ROWS)] for _ in range(BATCHES + 1))
    start = time.perf_counter()
    loader = iter(make_loader(corpus.source, batches, config.num_workers, torch.device("cpu")))
    next(loader)
    first, waited = time.perf_counter() - start, 0.0
    start = time.perf_counter()
    for _ in range(BATCHES):
        time.sleep(ROWS * SEQ_LEN / TOKENS_PER_SECOND)
        before = time.perf_counter()
        next(loader)
        waited += time.perf_counter() - before
    return first, waited / BATCHES, waited / (time.perf_counter() - start)


def main() -> None:
    print(f"{ROWS} rows of {SEQ_LEN} tokens a batch, {BATCHES} batches")
    for layout, num_workers in itertools.product(("pad", "pack"), (0, 2)):
        config = DataConfig(seq_len=SEQ_LEN, layout=layout, num_workers=num_workers)
        tokenizer = load_tokenizer(config)
        corpus = load_corpus(config, tokenizer, *tokenize_all(config, tokenizer))
        first, mean, share = measure(config, corpus)
        print(f"{layout:<4}  {num_workers} workers: {share:.2%} ({mean * 1e3:.2f} ms a batch; the first {first:.2f} s)")


if __name__ == "__main__":
    main()
