"""A corpus that no disk needs to hold: each file is tokenised just before training reaches it, and forgotten behind it.

The contract of data.py holds here too, with files in the place of documents:

- The files, in the order of their names, are permuted by (seed, epoch); `stream_files` of them after one another make
  a window, whose rows are permuted by (seed, epoch, window). The rows of an epoch are its windows end to end, and a
  step takes the next global batch of them, across the border of two windows where it must; an epoch drops its last
  incomplete one. Rows never cross files. So the rows of a step are a function of (seed, step) and of how many rows each
  file has: nothing else is there to be saved, however many ranks there are.
- These counts are kept beside the tokens and in every checkpoint: a machine that resumes a run reads no file that lies
  behind it.
- One process a node tokenises the window that training is in and the next one, no further. Ranks wait for a file until
  it is there; a file that cannot be read stops all ranks when its window comes up.

In the cache of `datasets`, for each run:

    stream-<key>/<version of the file>.arrow     its tokens; removed when no kept checkpoint needs them any more
                                      .rows      how many rows they make
                                      .error     why there are none; removed at the next start
"""

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

import data
from data import DataConfig, Rows, SpecialTokens, TokenStream

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Files:
    """The files of a corpus, what they are called in the cache, and what is needed to tokenise and to cut them."""

    config: DataConfig
    special: SpecialTokens
    tokenizer_json: str
    folder: Path
    addresses: list[str]
    versions: list[str]

    def path(self, file: int, suffix: str) -> Path:
        return self.folder / f"{self.versions[file]}.{suffix}"

    def rows(self, file: int) -> tuple[Rows, Rows | None]:
        """Of a file that is tokenised: for training, and, of the first one, for validation."""
        stream, config, held_out = TokenStream([self.path(file, "arrow")]), self.config, None
        documents = np.arange(len(stream.document_bytes))
        if file == 0 and holds_out(config):
            documents, held_out = data.hold_out(len(documents), config.val_fraction)

        def cut(documents: np.ndarray) -> Rows:
            shape = config.seq_len, config.layout, self.special.pad, config.document_mask
            return Rows(stream, np.sort(documents), *shape)

        return cut(documents), None if held_out is None else cut(held_out)

    def tokenize(self, file: int, ended: threading.Event | None = None) -> None:
        """Leave the tokens of a file and their number of rows, or the reason why there are none.

        SystemExit, with nothing but an unfinished file left, once `ended` is set.
        """

        def texts() -> Iterator[str | None]:
            for text in data.texts_of_file(self.addresses[file], self.config.text_column):
                if ended is not None and ended.is_set():
                    sys.exit()
                yield text

        if self.path(file, "rows").exists() and self.path(file, "arrow").exists():
            return
        try:
            if not self.path(file, "arrow").exists():
                tokenizer = data.without_rules(Tokenizer.from_str(self.tokenizer_json), self.special)
                data.write_tokens(self.path(file, "arrow"), texts(), tokenizer, self.special)
            rows = self.rows(file)[0]
            self.write(file, "rows", str(len(rows) if rows.num_targets else 0))
        except Exception as error:  # also what nobody thought of: the ranks wait for this file
            text = str(error) or repr(error)
            self.write(file, "error", text if self.addresses[file] in text else f"{self.addresses[file]}: {text}")

    def write(self, file: int, suffix: str, text: str) -> None:
        unfinished = self.folder / f".tmp-{uuid.uuid4().hex}"
        unfinished.write_text(text)
        unfinished.replace(self.path(file, suffix))

    def wait(self, file: int, process: multiprocessing.Process | None = None) -> int:
        """The number of rows of a file, once it is tokenised. Raises ValueError if it cannot be."""
        while not (self.path(file, "rows").exists() and self.path(file, "arrow").exists()):
            if self.path(file, "error").exists():
                raise ValueError(self.path(file, "error").read_text())
            if process is not None and not process.is_alive():
                raise ValueError(f"the process that tokenises ahead has died, exit code {process.exitcode}")
            time.sleep(POLL_SECONDS)
        return int(self.path(file, "rows").read_text())


def holds_out(config: DataConfig) -> bool:
    return config.val_fraction > 0 and data.validation_source(config) is None


def tokenize_ahead(files: Files, requests: Connection) -> None:
    """The process of a node that tokenises what it is told to, until training closes the pipe or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for training, which may still save
        signal.signal(number, signal.SIG_IGN)
    waiting, ended = queue.SimpleQueue(), threading.Event()

    def receive() -> None:
        with contextlib.suppress(EOFError):
            while True:
                waiting.put(requests.recv())
        ended.set()
        waiting.put([])

    threading.Thread(target=receive, daemon=True).start()
    while not ended.is_set():
        for file in waiting.get():
            files.tokenize(file, ended)


class StreamRows(Dataset):
    """The rows of all files. A row's number is file << 32 | its number within the file."""

    def __init__(self, files: Files):
        self.files = files
        self.counts: list[int | None] = [None] * len(files.addresses)  # rows of each file, as far as they are known
        self.opened: dict[int, Rows] = {}
        self.used: list[list] = []  # [the last step that may take rows of it, files] of each window
        self.upcoming: list[int] = []
        self.process, self.leads_node = None, True

    def __str__(self) -> str:
        return f"{len(self.counts):,} files, in rows"

    def __reduce__(self):  # a loader worker opens the files itself
        return StreamRows, (self.files,)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = [self.open(index >> 32).__getitems__([index & 0xFFFFFFFF]) for index in indices]
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def open(self, file: int) -> Rows:
        if file not in self.opened:
            if len(self.opened) > 2 * self.files.config.stream_files:  # a batch has rows of two windows at most, mostly
                self.opened.pop(next(iter(self.opened)))
            self.opened[file] = self.files.rows(file)[0]
        return self.opened[file]

    def start(self, counts: list[int | None] | None, leads_node: bool) -> None:
        """`counts` come from the checkpoint. The rank that leads its node starts the process that tokenises ahead."""
        for file in range(len(self.counts)):
            path, recorded = self.files.path(file, "rows"), counts[file] if counts else None
            self.counts[file] = int(path.read_text()) if recorded is None and path.exists() else recorded
        self.leads_node = leads_node
        if not leads_node:
            return
        spawn = multiprocessing.get_context("spawn")
        receiver, self.requests = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=tokenize_ahead, args=(self.files, receiver), daemon=True)
        self.process.start()
        receiver.close()
        Finalize(self, stop, (self.process, self.requests, self.files.folder), exitpriority=10)

    def prepare(self, files: list[int], upcoming: list[int]) -> None:
        """Wait until the files of a window are tokenised; `upcoming` are tokenised next."""
        self.upcoming = upcoming
        self.used.append([math.inf, files])
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):  # `wait` says that it has died
                self.requests.send([*files, *upcoming])
        for file in files:
            count = self.files.wait(file, self.process)
            if self.counts[file] not in (None, count):
                raise ValueError(
                    f"{self.files.addresses[file]} makes {count:,} rows now, and made {self.counts[file]:,} earlier in "
                    "this run: put the file back as it was"
                )
            self.counts[file] = count

    def windows(self, seed: int, epoch: int) -> list[list[int]]:
        order, size = data.permutation(len(self.counts), seed, epoch).tolist(), self.files.config.stream_files
        return [order[first : first + size] for first in range(0, len(order), size)]

    def global_batches(self, first_step: int, size: int, seed: int) -> Iterator[Tensor]:
        """The rows (size,) of each step from first_step on; waits for files. Raises ValueError, on all ranks alike."""
        step = first_step
        while True:
            known = None not in self.counts
            if known and sum(self.counts) < size:
                raise ValueError(
                    f"data.dataset={self.files.config.dataset} has {sum(self.counts)} training rows, fewer than "
                    f"train.global_batch_size={size}: lower it or add documents"
                )
            # while not all counts are known this is the first epoch, or the way to its end is walked once
            epoch, batch = divmod(step - 1, sum(self.counts) // size) if known else (0, step - 1)
            windows = self.windows(seed, epoch)
            to_skip, rows = batch * size, torch.empty(0, dtype=torch.int64)
            for window, (files, upcoming) in enumerate(pairwise([*windows, self.windows(seed, epoch + 1)[0]])):
                if any(self.counts[file] is None for file in files) or to_skip < self.rows_in(files):
                    self.prepare(files, upcoming)
                    numbers = torch.cat([(file << 32) + torch.arange(self.counts[file]) for file in files])
                    numbers = numbers[data.permutation(len(numbers), seed, epoch, window)]
                    rows = torch.cat((rows, numbers[to_skip:]))
                to_skip = max(0, to_skip - self.rows_in(files))
                while len(rows) >= size:
                    yield rows[:size]
                    step, rows = step + 1, rows[size:]
                if self.used:
                    self.used[-1][0] = step

    def names(self, rows: Tensor) -> list[str]:
        return [f"{self.files.addresses[row >> 32]}:{row & 0xFFFFFFFF}" for row in rows.tolist()]

    def rows_in(self, files: list[int]) -> int:
        return sum(self.counts[file] for file in files)

    def forget(self, step: int) -> None:
        """Remove the tokens that no resume from `step` or later needs, once a node."""
        if not self.leads_node:
            return
        self.used = [[last, files] for last, files in self.used if last > step]
        needed = {file for _, files in self.used for file in files} | {*self.upcoming, 0}  # 0: may hold the validation
        needed = {self.files.path(file, "arrow") for file in needed}
        for path in self.files.folder.glob("*.arrow"):
            if path not in needed:
                path.unlink(missing_ok=True)


def stop(process: multiprocessing.Process, requests: Connection, folder: Path) -> None:
    requests.close()
    process.join(timeout=10)
    process.kill()  # a huge document may keep it longer
    data.remove_unfinished(folder)


def prepare(config: DataConfig, tokenizer: Tokenizer, run_dir: Path) -> tuple[Files, list | None]:
    """On the first rank of each node, before training: what the corpus consists of, and the validation documents.

    These are those of `val_dataset`, or held out from the first file. Raises ValueError.
    """
    special, validation = data.special_tokens(tokenizer, config), data.validation_source(config)
    addresses = data.source_files(config)
    cut = (config.text_column, special, config.seq_len, config.layout, config.val_fraction * holds_out(config))
    key = data.cache_key(data.STREAM_VERSION, str(run_dir.absolute()), tokenizer.to_str(), cut)
    folder = data.cache_folder() / f"stream-{key}"
    folder.mkdir(exist_ok=True)
    data.remove_unfinished(folder)
    for error in folder.glob("*.error"):  # the file may have been replaced
        error.unlink(missing_ok=True)
    versions = [data.file_version(address) for address in addresses]
    files = Files(config, special, tokenizer.to_str(), folder, addresses, versions)
    if validation is None:
        if holds_out(config):
            files.tokenize(0)
            files.wait(0)
        return files, None
    if not set(addresses).isdisjoint(data.source_files(validation)):
        raise ValueError(
            f"data.val_dataset={config.val_dataset!r} and data.val_split={config.val_split!r} name files of the "
            "training documents: name others, or none and set data.val_fraction"
        )
    return files, data.tokenize(validation, tokenizer)


def load_corpus(config: DataConfig, tokenizer: Tokenizer, files: Files, val_paths: list[Path] | None) -> data.Corpus:
    """What `prepare` found, on every rank. The fingerprint is of the names: a broken file may be replaced."""
    validation = None
    if val_paths is not None:
        source = data.validation_source(config)
        validation = data.load_corpus(source, tokenizer, val_paths).train
    elif holds_out(config):
        validation = files.rows(0)[1]
    names = [address.split("/") for address in files.addresses]
    start = len(os.path.commonprefix([name[:-1] for name in names]))  # noqa: RUF071 - of lists, so by whole folders
    names = [name[start:] for name in names]
    fingerprint = data.cache_key(names, validation and validation.stream.fingerprint())
    return data.Corpus(files.special, StreamRows(files), validation, fingerprint)


def first_corpus(config: DataConfig, tokenizer: Tokenizer, run_dir: Path) -> tuple[data.Corpus, str]:
    """The first file that has rows, as a corpus to be looked at, and its name. Raises ValueError."""
    files, _ = prepare(config, tokenizer, run_dir)
    for file, address in enumerate(files.addresses):
        files.tokenize(file)
        if files.wait(file):
            return data.Corpus(files.special, *files.rows(file), fingerprint=""), address
    raise ValueError(f"data.dataset={config.dataset!r} holds no documents: name one with at least one document")
