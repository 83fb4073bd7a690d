"""Documents that are made up, files of them, and tokenizers that are small: what the tests of the data begin with."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import corpus
from corpus.config import BOS_TOKENS, EOS_TOKENS, DataConfig
from corpus.tokenizer import train_tokenizer
from corpus.tokens import OnDisk, TokenFiles, tokenize
from data import Reader, Rows
from model import IGNORE_INDEX

BOS, EOS = BOS_TOKENS[0], EOS_TOKENS[0]
SEQ_LEN = 8
LONG = "".join(chr(33 + i * i % 89) for i in range(130 * SEQ_LEN))
SPELLED_OUT = f"{BOS} and <s></s><pad>{EOS}<|endoftext|>"
DOCUMENTS = [
    "",
    "a",
    "😀 é 漢字 👩‍👩‍👧 e\u0301 \ufeff",
    "a\0b\0\0",
    "\0",
    " ",
    "\t\n \r\n\u00a0\u2028\r",
    LONG,
    # at a byte a token, n - 1 = k * SEQ_LEN + d targets, EOS among them
    *("x" * (k * SEQ_LEN + d - 1) for k in (1, 2, 3) for d in (-1, 0, 1)),
    SPELLED_OUT,
    *(f"{i}" * (i % 7) for i in range(150)),
    "",
]
TEXTS = [f"document number {i}" for i in range(200)]


def byte_tokenizer(*special: str) -> Tokenizer:
    """A token a byte, and the given special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=0, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


TOKENIZERS = {
    "bos and eos": lambda: byte_tokenizer(BOS, EOS),
    "one for both": lambda: byte_tokenizer("<|endoftext|>"),
    "pad of its own": lambda: byte_tokenizer("<pad>", "<s>", "</s>"),
    "merges": lambda: train_tokenizer(DOCUMENTS, 400, 1),
}


def write_jsonl(path: Path, texts: list, column: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_gzip(path: Path, source: str) -> str:
    path.write_bytes(gzip.compress(Path(source).read_bytes()))
    return str(path)


def write_parquet(path: Path, texts: list, column: str = "text") -> str:
    datasets.Dataset.from_dict({"n": list(range(len(texts))), column: texts}).to_parquet(str(path))
    return str(path)


def write_lines(path: Path, lines: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode())
    return str(path)


def make_config(dataset: str, **changes) -> DataConfig:
    return DataConfig(**{"dataset": dataset, "seq_len": SEQ_LEN, "val_fraction": 0.0, **changes})


def make_corpus(config: DataConfig, tokenizer: Tokenizer) -> corpus.Corpus:
    return corpus.load_corpus(config, tokenizer, tokenize(config, tokenizer))


def load_all(config: DataConfig, tokenizer: Tokenizer) -> corpus.Corpus:
    return corpus.load_corpus(config, tokenizer, *corpus.tokenize_all(config, tokenizer))


def tokens_of(paths: list[Path]) -> list[int]:
    tokens = TokenFiles(paths)
    return tokens.read(0, int(tokens.document_starts[-1])).tolist()


def batch_of(rows: Rows, indices: Iterable[int]) -> tuple[Tensor, ...]:
    """As the loader makes it."""
    return Reader(OnDisk(rows)).__getitems__(list(indices))


def texts_of(rows: Rows, tokenizer: Tokenizer, eos: int) -> list[str]:
    """The documents, from nothing but the targets."""
    targets = batch_of(rows, range(len(rows)))[1]
    documents, tokens = [], []
    for token in targets[targets != IGNORE_INDEX].tolist():
        if token == eos:
            documents.append(tokenizer.decode(tokens, skip_special_tokens=False))
            tokens = []
        else:
            tokens.append(token)
    assert not tokens, "the last document does not end in EOS"
    return documents
