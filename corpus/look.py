"""A look at the data: `python -m corpus.look [CONFIG.toml] [--section.key=value ...]`.

It prints what a run of this configuration would train on, in numbers, and its first rows.
"""

import math
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import configs
from corpus import Corpus, load_corpus, tokenize_all
from corpus.config import DataConfig
from corpus.stream import first_rows
from corpus.tokenizer import load_tokenizer, special_tokens
from data import Rows, permutation
from model import IGNORE_INDEX
from runtime.ranks import UserError


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines of a bar chart: how many lengths lie between two powers of two."""
    counts = np.bincount(np.floor(np.log2(lengths)).astype(int))
    first = np.flatnonzero(counts)[0]
    bars = ["#" * math.ceil(36 * count / counts.max()) for count in counts]
    lines = [f"{2**i:>12,} to {2 ** (i + 1) - 1:>11,} {counts[i]:>12,}  {bars[i]}" for i in range(first, len(counts))]
    return [line.rstrip() for line in lines]


def row_as_text(rows: Rows, index: int, tokenizer: Tokenizer, most: int = 480) -> str:
    """A row's inputs, and its last target: special tokens by name, the middle of a long row left out."""
    input_ids, targets = rows.row(index)[:2]
    real = int(np.flatnonzero(targets != IGNORE_INDEX)[-1]) + 1
    inputs = tokenizer.decode(input_ids[:real].tolist(), skip_special_tokens=False)
    if len(inputs) > most:
        inputs = f"{inputs[: most // 2]} [... {len(inputs) - most:,} characters ...] {inputs[-most // 2 :]}"
    padding = f" [{len(targets) - real} x padding]" if real < len(targets) else ""
    last = tokenizer.decode([int(targets[real - 1])], skip_special_tokens=False)
    text = f"row {index}: {inputs} -> {last}{padding}"
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")


def describe(config: DataConfig, corpus: Corpus, global_batch_size: int, seed: int) -> str:
    """What a run trains on: numbers, and the first rows. Reads every token. `corpus` lies on the disk."""
    rows = corpus.source.open(0)
    lengths = np.diff(rows.starts)
    steps, left_over = divmod(len(rows), global_batch_size)
    dropped = permutation(len(rows), seed, 0)[len(rows) - left_over :].tolist()
    lost = sum(np.count_nonzero(rows.row(row)[1] != IGNORE_INDEX) for row in dropped)
    positions = len(rows) * config.seq_len
    masked = len(lengths) - 1 if config.layout == "pack" else 0  # each BOS but the first is some input's next token
    vocabulary, stop, block = corpus.vocabulary, int(rows.tokens.document_starts[-1]), 2**24
    blocks = (rows.tokens.read(start, min(start + block, stop)) for start in range(0, stop, block))
    used = np.count_nonzero(np.sum([np.bincount(tokens, minlength=vocabulary) for tokens in blocks], axis=0))
    held_out = corpus.validation.open(0) if corpus.validation else None
    lines = [
        f"documents    {len(lengths):,}, {rows.num_bytes / 2**20:,.1f} MiB of text",
        f"tokens       {rows.num_targets:,} targets, {rows.num_bytes / rows.num_targets:.2f} bytes each",
        f"rows         {len(rows):,} of {config.seq_len:,} tokens, layout {config.layout}",
        f"padding      {1 - (rows.num_targets + masked) / positions:.2%} of the positions",
        f"epoch        {steps:,} steps of {global_batch_size:,} rows; {left_over:,} rows are left over, with {lost:,} "
        f"targets ({lost / rows.num_targets:.2%})",
        f"vocabulary   {used:,} of {vocabulary:,} tokens occur ({used / vocabulary:.1%})",
        f"validation   {len(held_out):,} rows, {held_out.num_targets:,} targets" if held_out else "validation   none",
        "",
        f"{'tokens in a document':>27} {'documents':>12}",
        *histogram(lengths),
    ]
    ending = next(row for row in range(len(rows)) if corpus.special.eos in rows.row(row)[1])
    for index in sorted({0, min(1, len(rows) - 1), ending}):  # the first ones, and the first with an end
        text = row_as_text(rows, index, corpus.tokenizer)
        lines += ["", *(text[start : start + 80] for start in range(0, len(text), 80))]
    return "\n".join(lines)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(configs.help_text().replace("[torchrun ...] train.py", "python -m corpus.look"))
        return
    try:
        one_rank = [*sys.argv[1:], "--parallel.tp=1", "--parallel.dp_replicate=1"]
        config = configs.load(one_rank, world=1)  # wherever: the model need not fit here
        tokenizer = load_tokenizer(config.data)
        if config.data.streaming:
            source, validation, file = first_rows(config.data, tokenizer, Path(config.run.dir))
            special = special_tokens(tokenizer, config.data)
            corpus = Corpus(tokenizer, special, source, validation, fingerprint="", num_rows=len(source.rows))
            print(f"of {file} alone, as data.streaming=true:")
        else:
            corpus = load_corpus(config.data, tokenizer, *tokenize_all(config.data, tokenizer, show_progress=True))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(describe(config.data, corpus, config.train.global_batch_size, config.train.seed))


if __name__ == "__main__":
    main()
