"""A corpus that no disk needs to hold: each file is tokenised just before training reaches it, and forgotten behind it.

The contract of data.py holds here too, with files in the place of documents:

- The files, in the order of their names, are permuted by (seed, epoch); `stream_files` of them after one another make
  a window, whose rows are permuted by (seed, epoch, window). Rows never cross files. So the rows of a step are a
  function of (seed, step) and of how many rows each file has: nothing else is there to be saved, however many ranks.
- These counts are kept beside the tokens and in every checkpoint: a machine that resumes a run reads no file that lies
  behind it.
- One process a node tokenises the window that training is in and the next one, no further. A file that cannot be read
  is tried again, less and less often, until its window is due, and once more then. At a window's border all ranks wait
  together until every node has its files; one that has failed by then stops the run, which saves.

In the cache of `datasets`, for each run:

    stream-<key>/<version of the file>.arrow     its tokens; removed when none of the newest checkpoints needs them
                                      .rows      how many rows they make
                                      .error     the step that it was due for (0: none yet), and why there are none
"""

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from corpus import sources
from corpus.cache import cache_folder, cache_key, remove_unfinished, written
from corpus.config import DataConfig
from corpus.tokenizer import SpecialTokens, special_tokens, without_rules
from corpus.tokens import STREAM_VERSION, OnDisk, TokenFiles, cut, tokenize, write_tokens
from data import ROWS_OF_A_FILE, Meet, Rows
from runtime.ranks import UserError, signals_held

MOST_PATIENT_SECONDS = 60  # between two attempts at a file
NICENESS = 10  # of the process that tokenises ahead: the ranks of the node come first


@functools.lru_cache(maxsize=1)
def encoder(tokenizer_json: str, special: SpecialTokens) -> Tokenizer:
    """One for all files: what a tokenizer has taken to encode, it does not give back when it is gone (0.23)."""
    return without_rules(Tokenizer.from_str(tokenizer_json), special)


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

    def tokenize(
        self, file: int, tokenizer_json: str, ended: threading.Event | None = None, due: int = 0, bar: Any = None
    ) -> bool:
        """Leave the tokens of a file and their number of rows, or the reason why there are none, and `due`.

        This is the step that waits for the file, or 0. Returns whether it is tokenised now. SystemExit, with nothing
        but an unfinished file left, once `ended` is set.
        """

        def texts() -> Iterator[str | None]:
            for text in sources.texts_of_file(self.addresses[file], self.config.text_column):
                if ended is not None and ended.is_set():
                    sys.exit()
                yield text

        if self.is_tokenized(file):
            return True
        try:
            if not self.path(file, "arrow").exists():
                tokenizer = encoder(tokenizer_json, self.special)
                write_tokens(self.path(file, "arrow"), texts(), tokenizer, self.special, bar)
            rows = self.cut(file)[0].rows
            self.write(file, "rows", str(len(rows) if rows.num_targets else 0))
            return True
        except Exception as error:  # also what nobody thought of: the ranks wait for this file
            text = str(error) or repr(error)
            text = text if self.addresses[file] in text else f"{self.addresses[file]}: {text}"
            self.write(file, "error", f"{due}\n{text}")
            return False

    def is_tokenized(self, file: int) -> bool:
        return self.path(file, "rows").exists() and self.path(file, "arrow").exists()

    def write(self, file: int, suffix: str, text: str) -> None:
        with written(self.path(file, suffix)) as whole:
            whole.write(text.encode())

    def rows(self, file: int, due: int = 0) -> int | None:
        """The number of rows of a file; None as long as it is not tokenised, and may still be.

        Raises UserError when it could not be read although it was due: for step `due` or a later one.
        """
        if self.is_tokenized(file):
            return int(self.path(file, "rows").read_text())
        if self.path(file, "error").exists():
            tried_for, text = self.path(file, "error").read_text().split("\n", 1)
            if int(tried_for) >= due:
                raise UserError(text)
        return None

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


def tokenize_ahead(files: Files, tokenizer_json: str, requests: Connection, threads: int) -> None:
    """The process of a node that tokenises what it was last told to, until training closes the pipe or dies.

    It is told a step, the files that this step waits for, and those to come. What fails is tried again, after a pause
    that doubles, and at once when it is due.
    """
    os.nice(NICENESS)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # before `tokenizers` starts them
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for training, which may still save
        signal.signal(number, signal.SIG_IGN)
    waiting, ended = queue.SimpleQueue(), threading.Event()

    def receive() -> None:
        with contextlib.suppress(EOFError):
            while True:
                waiting.put(requests.recv())
        ended.set()
        waiting.put((0, [], []))

    threading.Thread(target=receive, daemon=True).start()
    step, due, upcoming = 0, [], []
    pauses: dict[int, float] = {}  # of the files that have failed: the seconds that the last one took
    again: defaultdict[int, float] = defaultdict(float)  # and when each is tried next; the others at once, so first
    while not ended.is_set():
        missing = [file for file in (*due, *upcoming) if not files.is_tokenized(file)]
        file = min(missing, key=again.__getitem__, default=None)
        try:
            step, due, upcoming = waiting.get(timeout=None if file is None else max(0, again[file] - time.monotonic()))
            for number in due:
                again.pop(number, None)
        except queue.Empty:  # it is time for the file
            if file is not None and not files.tokenize(file, tokenizer_json, ended, step if file in due else 0):
                pauses[file] = min(2 * pauses.get(file, 0.5), MOST_PATIENT_SECONDS)
                again[file] = time.monotonic() + pauses[file]


class Ahead:
    """What the leader of a node does for it: have files tokenised before they are needed, and forget them behind.

    `oldest_step` is asked from which step on the run may have to be resumed; 0 means from its beginning. `threads` are
    those that tokenise.
    """

    def __init__(self, files: Files, tokenizer_json: str, oldest_step: Callable[[], int], threads: int = 1):
        self.files, self.tokenizer_json, self.oldest_step, self.threads = files, tokenizer_json, oldest_step, threads
        self.windows: list[tuple[int, list[int]]] = []  # the first step that may take rows of each, and its files
        self.process: BaseProcess | None = None

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        receiver, self.requests = spawn.Pipe(duplex=False)
        arguments = self.files, self.tokenizer_json, receiver, self.threads
        self.process = spawn.Process(target=tokenize_ahead, args=arguments, daemon=True)
        with signals_held():
            self.process.start()
        receiver.close()
        # also if nobody calls `stop`: a process that ends waits for those that it has started
        self.finalize = Finalize(self, stop, (self.process, self.requests, self.files.folder), exitpriority=10)

    def stop(self) -> None:
        if self.process is not None:
            self.finalize()

    def check(self) -> None:
        """Raises UserError when nobody tokenises any more."""
        if self.process is not None and not self.process.is_alive():
            raise UserError(
                f"the process that tokenises ahead has died, exit code {self.process.exitcode} (-9: killed, as when "
                "memory runs out): the same command goes on"
            )

    def request(self, files: list[int], upcoming: list[int], step: int) -> None:
        """A window and the next one, in the order of the steps that need them."""
        if self.process is None:
            self.start()
        self.windows.append((step, files))
        with contextlib.suppress(BrokenPipeError):  # `check` says that it has died
            self.requests.send((step, files, upcoming))
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
        for path in {*self.files.folder.glob("*.arrow")} - needed:
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
        self.first_window = files.config.stream_first_files or self.window
        self.most_opened = 2 * max(self.window, self.first_window)  # a batch has rows of two windows at most, mostly
        self.opened: dict[int, Rows] = {}

    def __str__(self) -> str:
        return f"{len(self.counts):,} files, in rows"

    def __reduce__(self):  # a loader worker opens the files itself
        return Stream, (self.files, self.counts, self.global_batch_size)

    def prepare(self, files: list[int], upcoming: list[int], step: int, meet: Meet) -> list[int]:
        def lacking() -> str | None:
            there = {file: count for file in files if (count := self.files.rows(file, step)) is not None}
            missing = [self.files.addresses[file] for file in files if file not in there]
            if missing:
                if self.ahead is not None:
                    self.ahead.check()
                return f"{missing[0]}, {len(there)} of the {len(files)} files of its window are there"
            for file, count in there.items():
                if (earlier := self.counts[file]) not in (None, count):
                    raise UserError(
                        f"{self.files.addresses[file]} makes {count:,} rows now, and made {earlier:,} earlier in "
                        "this run: put the file back as it was"
                    )
                self.counts[file] = count
            self.check_enough()
            return None

        if self.ahead is not None:
            self.ahead.request(files, upcoming, step)
        meet(lacking)
        return [count for file in files if (count := self.counts[file]) is not None]

    def check_enough(self) -> None:
        known = [count for count in self.counts if count is not None]
        if len(known) == len(self.counts) and sum(known) < self.global_batch_size:
            raise UserError(
                f"data.dataset={self.files.config.dataset} has {sum(known)} training rows, fewer than "
                f"train.global_batch_size={self.global_batch_size}: lower it or add documents"
            )

    def open(self, file: int) -> Rows:
        if file not in self.opened:
            if len(self.opened) > self.most_opened:
                self.opened.pop(next(iter(self.opened)))
            self.opened[file] = self.files.cut(file)[0].rows
        return self.opened[file]

    def names(self, rows: Tensor) -> list[str]:
        places = (divmod(number, ROWS_OF_A_FILE) for number in rows.tolist())
        return [f"{self.files.addresses[file]}:{row}" for file, row in places]


def prepare(
    config: DataConfig, tokenizer: Tokenizer, run_dir: Path, addresses: list[str], show_progress: bool = False
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
            # said after a while only, as the file may be small, or there already
            with tqdm(desc="tokenize", unit="doc", delay=5, dynamic_ncols=True, disable=not show_progress) as bar:
                files.tokenize(0, tokenizer.to_str(), bar=bar)
            files.rows(0)  # raises what went wrong
        return folder, versions, None
    with sources.errors_name_validation():
        if set(addresses).isdisjoint(sources.source_of(validation).files(validation)):
            return folder, versions, tokenize(validation, tokenizer, show_progress)
    raise sources.holds_out_training(config)


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
        if files.rows(file):
            return *files.cut(file), address
    raise UserError(f"data.dataset={config.dataset!r} holds no documents: name one with at least one document")
