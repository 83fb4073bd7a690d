"""The share of computed tokens that is real, padded and packed: `python benchmarks/real_tokens.py [CONFIG.toml] ...`.

Arithmetic on document lengths: of the configured data, and of short documents, geometrically distributed around 100
tokens. The rest is padding, and with packed rows the last token of each document, whose next one is a BOS.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import configs
from corpus.tokenizer import load_tokenizer
from corpus.tokens import TokenFiles, tokenize
from data import Rows, Tokens


def real_share(tokens: Tokens, seq_len: int, layout: str) -> float:
    """Real targets / computed positions, over all rows of all documents."""
    every = np.arange(len(tokens.document_starts) - 1)
    rows = Rows(tokens, every, seq_len, layout, pad=0, document_mask=False)
    return rows.num_targets / (len(rows) * seq_len)


def short_documents(count: int = 100_000, mean: int = 100) -> Tokens:
    """As much of the tokens as `Rows` counts with; a document has at least BOS, EOS and one between."""
    lengths = 2 + np.random.default_rng(0).geometric(1 / (mean - 2), count)
    return SimpleNamespace(document_starts=np.append(0, lengths.cumsum()), document_bytes=np.zeros(count, np.int64))


def main() -> None:
    config = configs.load(sys.argv[1:]).data
    tokens = TokenFiles(tokenize(config, load_tokenizer(config)))
    print("| documents | mean tokens | seq_len | pad | pack |\n| --- | --- | --- | --- | --- |")
    for name, documents in ((config.dataset, tokens), ("short", short_documents())):
        for seq_len in (256, 2048, 8192):
            shares = [f"{real_share(documents, seq_len, layout):.1%}" for layout in ("pad", "pack")]
            mean = f"{np.diff(documents.document_starts).mean():,.0f}"
            print("| " + " | ".join([name, mean, f"{seq_len:,}", *shares]) + " |")


if __name__ == "__main__":
    main()
