"""What training sees of the data: rows, their order, who gets which of them, and the loader.

The contract (laws 3 and 8 of this project):

- A document becomes `[BOS] tokens [EOS]`. Every token but BOS is a target exactly once an epoch, apart from the last
  incomplete global batch. Nothing is truncated: a long document becomes several rows.
- A row is seq_len inputs and, shifted by one, seq_len targets. Consecutive rows of a document (layout "pad") or of the
  stream of all documents (layout "pack") overlap by one token, so that no target falls between two rows. What is left
  of a row is padding on the right, whose targets are -100.
- Which rows make up the global batch of a step is a function of (seed, step) and of how many rows each file has. How
  many ranks there are only decides how those rows are dealt out: TP peers get the same ones, DP ranks different ones.

The path of the data:

1. documents        of a folder, of the Hub, ...                         corpus/sources.py
2. tokens on disk   files of documents end to end, written once          corpus/tokens.py, corpus/stream.py
3. rows             arithmetic on document boundaries                    `Rows`
4. order            a permutation of the rows for each epoch             `global_batches`
5. batches          dealt to the ranks, read ahead of time, on a device  `deal`, `batches`

A corpus on disk is a source of one file. A streamed one has many, which come and go. `python -m corpus.look CONFIG`
shows what comes out. Shapes: B rows of a micro-batch, T = seq_len.
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model import IGNORE_INDEX

Meet = Callable[[Callable[[], str | None]], None]  # waits until the function names nothing any more, on any rank
PADDING = -1  # the number of a row that is all padding: it fills the last batches of an evaluation
ROWS_OF_A_FILE = 2**32  # at most: the number of a row is file * ROWS_OF_A_FILE + its number within the file


class Tokens(Protocol):
    """Documents end to end: token i of document d is token document_starts[d] + i."""

    document_starts: np.ndarray  # one more than there are documents
    document_bytes: np.ndarray  # of the text of each

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32."""


class Rows:
    """Chosen documents of one file of tokens, cut into rows.

    Two documents of ten tokens, B for BOS and E for EOS, with seq_len 4. A dot is padding, or no target:

        B a b c d E | B x y E

        layout "pad"                      layout "pack"
        row   inputs     targets          row   inputs     targets    positions with document_mask
        0     B a b c    a b c d          0     B a b c    a b c d    0 1 2 3
        1     d . . .    E . . .          1     d E B x    E . x y    0 1 0 1
        2     B x y .    x y E .          2     y . . .    E . . .    0 1 2 3

    All that is stored are the boundaries of documents, 24 bytes each at most.
    """

    def __init__(self, tokens: Tokens, documents: np.ndarray, seq_len: int, layout: str, pad: int, document_mask: bool):
        self.tokens, self.seq_len, self.pad, self.document_mask = tokens, seq_len, pad, document_mask
        self.origins = tokens.document_starts[documents]  # where each lies in the file
        lengths = tokens.document_starts[documents + 1] - self.origins
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # of the chosen documents, laid end to end
        # rows never cross the border of a piece: a document when padding, everything when packing
        self.pieces = self.starts if layout == "pad" else self.starts[[0, -1]]
        self.first_rows = np.concatenate([[0], np.cumsum(-(-(np.diff(self.pieces) - 1) // seq_len))])
        self.num_bytes = int(tokens.document_bytes[documents].sum())
        self.num_targets = int(lengths.sum()) - len(documents)  # every token but BOS

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def cut(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """At most seq_len + 1 tokens, and which of them start a document."""
        piece = np.searchsorted(self.first_rows, index, side="right") - 1
        start = self.pieces[piece] + (index - self.first_rows[piece]) * self.seq_len
        stop = min(start + self.seq_len + 1, self.pieces[piece + 1])
        first = np.searchsorted(self.starts, start, side="right") - 1
        last = np.searchsorted(self.starts, stop, side="left")
        tokens, is_bos = [], np.zeros(stop - start, dtype=bool)
        for document in range(first, last):
            low, high = max(start, self.starts[document]), min(stop, self.starts[document + 1])
            shift = self.origins[document] - self.starts[document]
            tokens.append(self.tokens.read(low + shift, high + shift))
            is_bos[low - start] = low == self.starts[document]
        return np.concatenate(tokens), is_bos

    def row(self, index: int) -> tuple[np.ndarray, ...]:
        """(input_ids, targets), each (T,) int64; with document_mask also positions.

        These say where each token stands in its document, or in the part of it that the row holds.
        """
        input_ids = np.full(self.seq_len, self.pad, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        starts = np.zeros(self.seq_len, dtype=np.int64)  # where the document that is read began
        if index != PADDING:
            tokens, is_bos = self.cut(index)
            used = len(tokens) - 1
            input_ids[:used] = tokens[:-1]
            targets[:used] = np.where(is_bos[1:], IGNORE_INDEX, tokens[1:])
            starts[:used] = np.where(is_bos[:-1], np.arange(used), 0)
        if not self.document_mask:
            return input_ids, targets
        return input_ids, targets, np.arange(self.seq_len) - np.maximum.accumulate(starts)


# ---------------------------------------------------------------------------------------------------------------------
# Order: which rows a step trains on, and who gets which of them


class Source(Protocol):
    """Files of tokens, as training sees them: whether all are there, or come one after the other."""

    window: int  # files whose rows are shuffled together; 0 = all of them
    first_window: int  # and the first of the first epoch, which may be fewer: training waits for them
    counts: list[int | None]  # rows of each file, as far as they are known

    def prepare(self, files: list[int], upcoming: list[int], step: int, meet: Meet) -> list[int]:
        """The rows of each of `files`, whose tokens can be read from now on: all ranks `meet` until all have them.

        `step` is the first that takes rows of them; `upcoming` are asked for next.
        """

    def open(self, file: int) -> Rows:
        """The rows of a file that is prepared. Loader workers call this on copies."""

    def names(self, rows: Tensor) -> list:
        """What a person finds the rows by."""

    def __str__(self) -> str:
        """How much there is, as in "1,234 training rows"."""


def permutation(count: int, *key: int) -> Tensor:
    """A function of its arguments alone (8 bytes a row)."""
    mixed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
    return torch.randperm(count, generator=generator)


def windows(source: Source, seed: int, epoch: int) -> list[tuple[list[int], tuple[int, ...]]]:
    """The files of each window of an epoch, and the key that its rows are permuted by."""
    files = permutation(len(source.counts), seed, epoch).tolist()
    if source.window == 0:
        return [(files, (seed, epoch))]
    first = source.window if epoch else source.first_window
    borders = pairwise([0, *range(first, len(files), source.window), len(files)])
    return [(files[start:stop], (seed, epoch, window)) for window, (start, stop) in enumerate(borders)]


def shuffled(files: list[int], counts: list[int], key: tuple[int, ...]) -> Tensor:
    """The numbers of all rows of a window."""
    order = permutation(sum(counts), *key)
    if len(files) == 1:  # which may have all rows of a corpus: no second table
        return order.add_(files[0] * ROWS_OF_A_FILE)
    numbers = [file * ROWS_OF_A_FILE + torch.arange(count) for file, count in zip(files, counts, strict=True)]
    return torch.cat(numbers)[order]


def alone(lacking: Callable[[], str | None]) -> None:
    """The `Meet` of one process."""
    while lacking():
        time.sleep(0.05)


def global_batches(
    source: Source, first_step: int, size: int, seed: int, meet: Meet | None = alone
) -> Iterator[Tensor]:
    """The rows (size,) of each step from first_step on, steps being counted from 1.

    Files are permuted and so are the rows of each window. The rows of an epoch are its windows end to end, and a step
    takes the next `size` of them, across the border of two windows where it must; an epoch drops its last incomplete
    global batch. All ranks call for a step alike, as they `meet` where a window begins; None: training has been there,
    so that nothing is prepared.
    """
    step = first_step
    while True:
        known = [count for count in source.counts if count is not None]
        # while not all counts are known this is the first epoch, or the way to its end is walked once
        all_known = len(known) == len(source.counts)
        epoch, batch = divmod(step - 1, sum(known) // size) if all_known else (0, step - 1)
        to_skip, rows = batch * size, torch.empty(0, dtype=torch.int64)
        ahead = [*windows(source, seed, epoch), windows(source, seed, epoch + 1)[0]]
        for (files, key), (upcoming, _) in pairwise(ahead):
            counts = [count for file in files if (count := source.counts[file]) is not None]
            if len(counts) < len(files) or to_skip < sum(counts):
                counts = source.prepare(files, upcoming, step, meet) if meet else counts
                rows = torch.cat((rows, shuffled(files, counts, key)[to_skip:]))
            to_skip = max(0, to_skip - sum(counts))
            while len(rows) >= size:
                yield rows[:size]
                step, rows = step + 1, rows[size:]


def rows_of_step(source: Source, step: int, size: int, seed: int) -> Tensor:
    """The rows (size,) of a step that `global_batches` has given out already. Disturbs nothing."""
    return next(global_batches(source, step, size, seed, meet=None))


def deal(rows: Tensor, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """This dp rank's micro-batches of a global batch (law 8); the last ones may hold PADDING."""
    missing = -len(rows) % (micro_batch_size * dp_size)
    rows = torch.cat((rows, rows.new_full((missing,), PADDING)))
    return rows.view(-1, dp_size, micro_batch_size)[:, dp_rank].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Loader


class Reader(Dataset):
    """Micro-batches by the numbers of their rows."""

    def __init__(self, source: Source):
        self.source = source

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, ...]:
        """(input_ids, targets), each (B, T) int64; with document_mask also positions."""
        places = [(0, PADDING) if number == PADDING else divmod(number, ROWS_OF_A_FILE) for number in numbers]
        rows = [self.source.open(file).row(row) for file, row in places]
        return tuple(torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True))


def make_loader(
    source: Source, micro_batches: Iterable[list[int]], num_workers: int, device: torch.device
) -> DataLoader:
    """Batches as `Reader` makes them, in the given order, prepared ahead by worker processes if there are any.

    Workers are spawned, not forked: by now this process has threads, which a fork would leave behind with their locks.
    """
    return DataLoader(
        Reader(source),
        batch_sampler=micro_batches,
        num_workers=num_workers,
        collate_fn=tuple,  # `Reader` makes whole batches already
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn" if num_workers else None,
    )


@contextlib.contextmanager
def batches(
    source: Source,
    first_step: int,
    last_step: int,
    global_batch_size: int,
    micro_batch_size: int,
    seed: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
    device: torch.device,
    meet: Meet = alone,
    starting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Iterator[tuple[Tensor, ...]]]:
    """This rank's micro-batches from first_step to last_step, on `device`: (B, T) each, as from `Reader`.

    Loader workers start with the first batch, within `starting`, and end when it is left, which waits for no other
    rank. What goes wrong with a source (see its `prepare`) is raised where the next batch is asked for.
    """
    steps = islice(global_batches(source, first_step, global_batch_size, seed, meet), last_step - first_step + 1)
    micro_batches = (batch for rows in steps for batch in deal(rows, micro_batch_size, dp_rank, dp_size))
    loader = make_loader(source, micro_batches, num_workers, device)

    def read() -> Generator[tuple[Tensor, ...]]:
        with starting():
            batches = iter(loader)
        try:
            yield from (tuple(tensor.to(device, non_blocking=True) for tensor in batch) for batch in batches)
        finally:
            if num_workers:
                batches._shutdown_workers()  # there is no public name for it, and others may still hold the iterator

    with contextlib.closing(read()) as batches:
        yield batches


if __name__ == "__main__":
    sys.exit("a look at the data: python -m corpus.look CONFIG.toml [--section.key=value ...]")
