"""A corpus that no disk needs to hold: each file is tokenised just before training reaches it, and forgotten behind it.

The contract of data.py holds here too, with files in the place of documents:

- The files, in the order of their names, are permuted by (seed, epoch); `stream_files` of them after one another make
  a window, whose rows are permuted by (seed, epoch, window). Rows never cross files. So the rows of a step are a
  function of (seed, step) and of how many rows each file has: nothing else is there to be saved, however many ranks.
- These counts are kept beside the tokens and in every checkpoint: a machine that resumes a run reads no file that lies
  behind it.
- One process a node tokenises the window that training is in and the next one, no further. Ranks wait for a file until
  it is there; a file that cannot be read stops all ranks when its window comes up.

In the cache of `datasets`, for each run:

    stream-<key>/<version of the file>.arrow     its tokens; removed when none of the newest checkpoints needs them
                                      .rows      how many rows they make
                                      .error     why there are none; removed at the next start
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from corpus import sources
from corpus.cache import cache_folder, cache_key, remove_unfinished, unfinished
from corpus.config import DataConfig
from corpus.tokenizer import SpecialTokens, special_tokens, without_rules
from corpus.tokens import STREAM_VERSION, OnDisk, TokenFiles, cut, tokenize, write_tokens
from data import ROWS_OF_A_FILE, Rows
from runtime.ranks import UserError, signals_held

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Files:
    """The files of a corpus, what they are called in the cache of this node, and how they are cut."""

    config: DataConfig
    special: SpecialTokens
    addresses: list[str]
    folder: Path
    versions: list[str]

    def path(self, file: int, suffix: str) -> Path:
        return self.folder / f"{self.versions[file]}.{suffix}"

    def tokens(self, file: int) -> TokenFiles:
        """Of a file that is tokenised."""
        return TokenFiles([self.path(file, "arrow")])

    def cut(self, file: int) -> tuple[OnDisk, OnDisk | None]:
        """Of a file that is tokenised: for training, and, of the first one, for validation."""
        return cut(self.tokens(file), self.config, self.special, held_out_share(self.config) if file == 0 else 0.0)

    def tokenize(self, file: int, tokenizer_json: str, ended: threading.Event | None = None) -> None:
        """Leave the tokens of a file and their number of rows, or the reason why there are none.

        SystemExit, with nothing but an unfinished file left, once `ended` is set.
        """

        def texts() -> Iterator[str | None]:
            for text in sources.texts_of_file(self.addresses[file], self.config.text_column):
                if ended is not None and ended.is_set():
                    sys.exit()
                yield text

        if self.is_tokenized(file):
            return
        try:
            if not self.path(file, "arrow").exists():
                tokenizer = without_rules(Tokenizer.from_str(tokenizer_json), self.special)
                write_tokens(self.path(file, "arrow"), texts(), tokenizer, self.special)
            rows = self.cut(file)[0].rows
            self.write(file, "rows", str(len(rows) if rows.num_targets else 0))
        except Exception as error:  # also what nobody thought of: the ranks wait for this file
            text = str(error) or repr(error)
            self.write(file, "error", text if self.addresses[file] in text else f"{self.addresses[file]}: {text}")

    def is_tokenized(self, file: int) -> bool:
        return self.path(file, "rows").exists() and self.path(file, "arrow").exists()

    def write(self, file: int, suffix: str, text: str) -> None:
        writing = unfinished(self.folder)
        writing.write_text(text)
        writing.replace(self.path(file, suffix))

    def wait(self, file: int, process: BaseProcess | None = None) -> int:
        """The number of rows of a file, once it is tokenised. Raises UserError if it cannot be.

        Where `process` has died, the other ranks of the node hear that from here.
        """
        while not self.is_tokenized(file):
            if self.path(file, "error").exists():
                raise UserError(self.path(file, "error").read_text())
            if process is not None and not process.is_alive() and not self.is_tokenized(file):
                self.write(file, "error", f"the process that tokenises ahead has died, exit code {process.exitcode}")
            time.sleep(POLL_SECONDS)
        return int(self.path(file, "rows").read_text())

    def known_counts(self, recorded: list[int | None] | None) -> list[int | None]:
        """The rows of each file, as far as a checkpoint or the cache knows them."""
        counts: list[int | None] = [None] * len(self.addresses)
        if recorded is not None and len(recorded) == len(counts):  # else it is of other files, as will be said
            counts = [*recorded]
        for file, path in enumerate(self.path(file, "rows") for file in range(len(counts))):
            if counts[file] is None and path.exists():
                counts[file] = int(path.read_text())
        return counts


def held_out_share(config: DataConfig) -> float:
    """Of the documents of the first file."""
    return config.val_fraction if sources.validation_config(config) is None else 0.0


def tokenize_ahead(files: Files, tokenizer_json: str, requests: Connection) -> None:
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
            files.tokenize(file, tokenizer_json, ended)


class Ahead:
    """What the leader of a node does for it: have files tokenised before they are needed, and forget them behind.

    `oldest_step` is asked from which step on the run may have to be resumed; 0 means from its beginning.
    """

    def __init__(self, files: Files, tokenizer_json: str, oldest_step: Callable[[], int]):
        self.files, self.tokenizer_json, self.oldest_step = files, tokenizer_json, oldest_step
        self.windows: list[tuple[int, list[int]]] = []  # the first step that may take rows of each, and its files
        self.requested: list[int] = []  # most recently
        self.process: BaseProcess | None = None

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        receiver, self.requests = spawn.Pipe(duplex=False)
        arguments = self.files, self.tokenizer_json, receiver
        self.process = spawn.Process(target=tokenize_ahead, args=arguments, daemon=True)
        with signals_held():
            self.process.start()
        receiver.close()
        # also if nobody calls `stop`: a process that ends waits for those that it has started
        self.finalize = Finalize(self, stop, (self.process, self.requests, self.files.folder), exitpriority=10)

    def stop(self) -> None:
        """What was asked for and is not there will not come: whoever on this node waits for it is told."""
        if self.process is not None:
            self.finalize()
            for file in (file for file in self.requested if not self.files.is_tokenized(file)):
                self.files.write(file, "error", "the rank that leads this node has ended")

    def request(self, files: list[int], upcoming: list[int], step: int) -> None:
        """A window and the next one, in the order of the steps that need them."""
        if self.process is None:
            self.start()
        self.windows.append((step, files))
        self.requested = [*files, *upcoming]
        with contextlib.suppress(BrokenPipeError):  # `wait` says that it has died
            self.requests.send([*files, *upcoming])
        self.forget(upcoming)

    def forget(self, upcoming: list[int]) -> None:
        """Remove the tokens that no resume from the oldest checkpoint or a later one needs."""
        oldest = self.oldest_step()
        if oldest == 0 or self.windows[0][0] > oldest + 1:  # this process does not know all windows that one needs
            return
        while len(self.windows) > 1 and self.windows[1][0] <= oldest:
            self.windows.pop(0)
        files = {file for _, files in self.windows for file in files} | {*upcoming, 0}  # 0: may hold the validation
        needed = {self.files.path(file, "arrow") for file in files}
        for path in self.files.folder.glob("*.arrow"):
            if path not in needed:
                path.unlink(missing_ok=True)


def stop(process: BaseProcess, requests: Connection, folder: Path) -> None:
    requests.close()
    process.join(timeout=10)
    process.kill()  # a huge document may keep it longer
    remove_unfinished(folder)


class Stream:
    """A source of many files (see `data.Source`). The rank that leads its node has the files tokenised ahead."""

    def __init__(self, files: Files, counts: list[int | None], global_batch_size: int, ahead: Ahead | None = None):
        self.files, self.counts, self.global_batch_size, self.ahead = files, counts, global_batch_size, ahead
        self.window = files.config.stream_files
        self.opened: dict[int, Rows] = {}

    def __str__(self) -> str:
        return f"{len(self.counts):,} files, in rows"

    def __reduce__(self):  # a loader worker opens the files itself
        return Stream, (self.files, self.counts, self.global_batch_size)

    def prepare(self, files: list[int], upcoming: list[int], step: int) -> list[int]:
        """Raises UserError, on all ranks of a node alike."""
        if self.ahead is not None:
            self.ahead.request(files, upcoming, step)
        process = None if self.ahead is None else self.ahead.process
        found = [self.files.wait(file, process) for file in files]
        for file, count in zip(files, found, strict=True):
            if (earlier := self.counts[file]) not in (None, count):
                raise UserError(
                    f"{self.files.addresses[file]} makes {count:,} rows now, and made {earlier:,} earlier in "
                    "this run: put the file back as it was"
                )
            self.counts[file] = count
        self.check_enough()
        return found

    def check_enough(self) -> None:
        known = [count for count in self.counts if count is not None]
        if len(known) == len(self.counts) and sum(known) < self.global_batch_size:
            raise UserError(
                f"data.dataset={self.files.config.dataset} has {sum(known)} training rows, fewer than "
                f"train.global_batch_size={self.global_batch_size}: lower it or add documents"
            )

    def open(self, file: int) -> Rows:
        if file not in self.opened:
            if len(self.opened) > 2 * self.window:  # a batch has rows of two windows at most, mostly
                self.opened.pop(next(iter(self.opened)))
            self.opened[file] = self.files.cut(file)[0].rows
        return self.opened[file]

    def names(self, rows: Tensor) -> list[str]:
        places = (divmod(number, ROWS_OF_A_FILE) for number in rows.tolist())
        return [f"{self.files.addresses[file]}:{row}" for file, row in places]


def prepare(
    config: DataConfig, tokenizer: Tokenizer, run_dir: Path, addresses: list[str]
) -> tuple[Path, list[str], list[Path] | None]:
    """On the first rank of each node: folder and versions of the files there, and the validation documents.

    These are those of `val_dataset`; held out, they are of the first file. Raises UserError.
    """
    special, validation = special_tokens(tokenizer, config), sources.validation_config(config)
    shape = (config.text_column, special, config.seq_len, config.layout, held_out_share(config))
    key = cache_key(STREAM_VERSION, str(run_dir.absolute()), tokenizer.to_str(), shape)
    folder = cache_folder() / f"stream-{key}"
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    for error in folder.glob("*.error"):  # the file may have been replaced
        error.unlink(missing_ok=True)
    versions = [sources.file_version(address) for address in addresses]
    if validation is None:
        if config.val_fraction > 0:
            files = Files(config, special, addresses, folder, versions)
            files.tokenize(0, tokenizer.to_str())
            files.wait(0)
        return folder, versions, None
    with sources.errors_name_validation():
        find = sources.source_of(validation).files
        used_twice = set() if find is None else set(addresses) & set(find(validation))
        paths = [] if used_twice else tokenize(validation, tokenizer)
    if used_twice:
        raise UserError(
            f"data.val_dataset={config.val_dataset!r} and data.val_split={config.val_split!r} name files of the "
            "training documents: name others, or none and set data.val_fraction"
        )
    return folder, versions, paths


def names_of(addresses: list[str]) -> list[list[str]]:
    """What tells a corpus from another one, whatever folder it lies in: a broken file may be replaced."""
    names = [address.split("/") for address in addresses]
    start = len(os.path.commonprefix([name[:-1] for name in names]))  # noqa: RUF071 - of lists, so by whole folders
    return [name[start:] for name in names]


def first_rows(config: DataConfig, tokenizer: Tokenizer, run_dir: Path) -> tuple[OnDisk, OnDisk | None, str]:
    """The first file that has rows, to be looked at: for training, for validation, and its name. Raises UserError."""
    addresses = sources.stream_files(config)
    folder, versions, _ = prepare(config, tokenizer, run_dir, addresses)
    files = Files(config, special_tokens(tokenizer, config), addresses, folder, versions)
    for file, address in enumerate(files.addresses):
        files.tokenize(file, tokenizer.to_str())
        if files.wait(file):
            return *files.cut(file), address
    raise UserError(f"data.dataset={config.dataset!r} holds no documents: name one with at least one document")
