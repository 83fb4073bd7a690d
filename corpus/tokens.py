"""Tokens on disk: every document is encoded once per (documents, tokenizer) on a machine, and mapped into memory.

In the cache of `datasets`:

    tokens-<key>/000000000000.arrow     `[BOS] tokens [EOS]` of each of the first PART_DOCUMENTS documents
                 000000020000.arrow     of the next ones
                 .tmp-*                 a file that is being written, or was when its process was killed
"""

import hashlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from corpus.cache import cache_folder, cache_key, remove_unfinished, written
from corpus.config import DataConfig
from corpus.sources import check_not_empty, load_documents
from corpus.tokenizer import SpecialTokens, special_tokens, without_rules
from data import Meet, Rows
from runtime.ranks import UserError

STREAM_VERSION = 2  # part of the cache key: raise it when the stored form changes
PART_DOCUMENTS = 20_000  # in a file of tokens
BATCH_DOCUMENTS, BATCH_BYTES = 2000, 2 * 2**20  # encoded at once: memory, some 30 times the bytes, against speed


def batches_of(texts: Iterable[str | None]) -> Iterator[tuple[list[str], list[int], int]]:
    """Texts, the bytes of each, and how many were read for them. Nulls are left out; a long text comes alone."""
    batch, num_bytes, total, read = [], [], 0, 0
    for text in texts:
        size = 0 if text is None else len(text.encode())
        if read and (total + size > BATCH_BYTES or read == BATCH_DOCUMENTS):
            yield batch, num_bytes, read
            batch, num_bytes, total, read = [], [], 0, 0
        total, read = total + size, read + 1
        if text is not None:
            batch.append(text)
            num_bytes.append(size)
    if read:
        yield batch, num_bytes, read


def encode_documents(texts: list[str], tokenizer: Tokenizer, special: SpecialTokens) -> tuple[np.ndarray, np.ndarray]:
    """`[BOS] tokens [EOS]` of each text, end to end, and where each starts. An empty text is `[BOS] [EOS]`.

    Tokenizers have opinions of their own about BOS and EOS: they are switched off, so that each comes once, from here.
    """
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # on all cores
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"the tokenizer cannot encode the documents: {error}") from error
    starts = np.cumsum([0, *(len(encoding) + 2 for encoding in encodings)])
    tokens = np.empty(starts[-1], dtype=np.int32)
    tokens[starts[:-1]], tokens[starts[1:] - 1] = special.bos, special.eos
    for encoding, start, stop in zip(encodings, starts[:-1], starts[1:], strict=True):
        tokens[start + 1 : stop - 1] = encoding.ids
    if np.count_nonzero((tokens == special.bos) | (tokens == special.eos)) != 2 * len(texts):
        raise UserError(
            f"the tokenizer makes its BOS or EOS, ids {special.bos} and {special.eos}, out of a document's text: "
            "name tokens that no text contains with data.bos_token and data.eos_token"
        )
    return tokens, starts


def write_tokens(
    path: Path, texts: Iterable[str | None], tokenizer: Tokenizer, special: SpecialTokens, bar: Any = None
) -> None:
    """An Arrow file of the encoded texts, under a name of its own until it is complete. `tokenizer` has no rules.

    Two batches are encoded at once, so that one keeps the cores busy while the other's ids pass through Python. Memory
    holds those two and the one that is being written, whatever the number of texts.
    """
    import pyarrow as pa

    def encode(batch: list[str], num_bytes: list[int], read: int) -> tuple[pa.RecordBatch, int]:
        tokens, starts = encode_documents(batch, tokenizer, special)
        documents = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(tokens))
        return pa.record_batch([documents, pa.array(num_bytes, pa.int64())], schema), read

    def write_oldest() -> None:
        batch, read = under_way.popleft().result()
        writer.write(batch)
        if bar is not None:
            bar.update(read)

    schema, under_way = pa.schema({"input_ids": pa.list_(pa.int32()), "num_bytes": pa.int64()}), deque()
    with ThreadPoolExecutor(2) as pool, written(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches_of(texts):
            under_way.append(pool.submit(encode, *batch))
            if len(under_way) > 2:
                write_oldest()
        while under_way:
            write_oldest()


def tokenize(config: DataConfig, tokenizer: Tokenizer, show_progress: bool = False) -> list[Path]:
    """Encode every document, unless that has been done; returns the files that hold them. Raises UserError.

    A process that is killed loses one file at most, and the next goes on from there. The first rank of each node calls
    this, the others map the files.
    """
    from tqdm import tqdm

    special, documents = special_tokens(tokenizer, config), load_documents(config)
    if documents.note and show_progress:
        print(documents.note, file=sys.stderr)
    check_not_empty(config, len(documents))
    key = cache_key(STREAM_VERSION, PART_DOCUMENTS, documents.identity, tokenizer.to_str(), special.bos, special.eos)
    folder = cache_folder() / f"tokens-{key}"
    firsts = range(0, len(documents), PART_DOCUMENTS)
    paths = [folder / f"{first:012d}.arrow" for first in firsts]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    tokenizer = without_rules(tokenizer, special)
    with tqdm(total=len(documents), desc="tokenize", unit=" documents", leave=False, disable=not show_progress) as bar:
        for first, path in zip(firsts, paths, strict=True):
            stop = min(first + PART_DOCUMENTS, len(documents))
            if path.exists():  # from before a kill, or from another process
                bar.update(stop - first)
                continue
            try:
                write_tokens(path, documents.texts(first, stop), tokenizer, special, bar)
            except UserError as error:
                raise UserError(f"data.dataset={config.dataset!r}: {error}") from error
    return paths


class TokenFiles:
    """All documents of some Arrow files end to end, memory-mapped: reading costs no more than the tokens read."""

    def __init__(self, paths: list[Path]):
        import pyarrow as pa

        self.paths, self.values, lengths, num_bytes = paths, [], [[0]], []
        for path in paths:
            with pa.memory_map(str(path)) as file:  # what is mapped stays so after the file is closed
                for batch in pa.ipc.open_stream(file):
                    documents = batch["input_ids"]
                    self.values.append(documents.values.to_numpy())
                    lengths.append(np.diff(documents.offsets.to_numpy()))
                    num_bytes.append(batch["num_bytes"].to_numpy())
        self.starts = np.cumsum([0] + [len(values) for values in self.values])
        # token i of document d is token document_starts[d] + i of them all
        self.document_starts = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        self.document_bytes = np.concatenate([np.zeros(0, np.int64), *num_bytes])

    def __reduce__(self):  # a loader worker maps the files again instead of receiving a copy of them
        return TokenFiles, (self.paths,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32."""
        first, last = np.searchsorted(self.starts, (start + 1, stop)) - 1  # the chunks of the first and the last token
        chunks = zip(self.starts[first : last + 1], self.values[first : last + 1], strict=True)
        return np.concatenate([values[max(0, start - own) : stop - own] for own, values in chunks])

    def fingerprint(self) -> str:
        """Changes when a document is added, lost, moved, gets another length or, in a sample, another beginning."""
        digest = hashlib.sha256(self.document_starts.tobytes())
        count = len(self.document_starts) - 1
        for start in self.document_starts[np.linspace(0, count - 1, min(count, 4096), dtype=np.int64)]:
            digest.update(self.read(start, min(start + 4096, self.document_starts[-1])).tobytes())
        return digest.hexdigest()[:32]


class OnDisk:
    """A source of one file (see `data.Source`): rows whose tokens lie on this disk, all of them shuffled together."""

    window = first_window = 0

    def __init__(self, rows: Rows):
        self.rows = rows
        self.counts: list[int | None] = [len(rows)]

    def __str__(self) -> str:
        return f"{len(self.rows):,} training rows"

    def prepare(self, files: list[int], upcoming: list[int], step: int, meet: Meet) -> list[int]:
        return [len(self.rows) for _ in files]

    def open(self, file: int) -> Rows:
        return self.rows

    def names(self, rows: Tensor) -> list[int]:
        return rows.tolist()


def cut(tokens: TokenFiles, config: DataConfig, special: SpecialTokens, share: float) -> tuple[OnDisk, OnDisk | None]:
    """Rows for training and, of a share of the documents that is above 0, for validation. Raises UserError.

    Documents that are held out are a function of (their number, share) alone: not of the seed, so runs compare.
    """
    shape, count = (config.seq_len, config.layout, special.pad, config.document_mask), len(tokens.document_bytes)

    def rows(documents: np.ndarray) -> OnDisk:
        return OnDisk(Rows(tokens, np.sort(documents), *shape))

    if share == 0:
        return rows(np.arange(count)), None
    held_out = round(count * share)
    if not 0 < held_out < count:
        raise UserError(
            f"data.val_fraction={share} of {count} documents holds out {held_out} and leaves {count - held_out} for "
            "training: both need at least one, or set it to 0"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return rows(order[held_out:]), rows(order[:held_out])
