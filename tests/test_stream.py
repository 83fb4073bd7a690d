"""Streaming: laws 1, 2, 3 and 7 for a corpus that is read file by file; without a network."""

import contextlib
import json
import math
import multiprocessing as mp
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path

import pytest
from documents import BOS, EOS, byte_tokenizer, texts_of, write_gzip, write_jsonl, write_lines, write_parquet
from test_train import Lab, assert_close, facts, kill, ranks_of, without_bars

import configs
import corpus as corpus_module
import data
from corpus import sources, stream
from corpus import tokens as tokens_module
from corpus.config import DataConfig
from corpus.tokenizer import load_tokenizer, special_tokens
from data import permutation
from model import IGNORE_INDEX
from runtime import ranks as runtime_ranks
from runtime.ranks import UserError

pytestmark = pytest.mark.usefixtures("cache")

SEQ_LEN = 8
TEXTS = [  # of files that are uneven: empty, without documents, of empty documents, of one long one
    [],
    ["a", "bb", ""],
    ["".join(chr(33 + i * i % 89) for i in range(130))],
    [None, None],
    ["", ""],
    [f"{i}" * (i % 13) for i in range(40)],
    ["x" * SEQ_LEN, "y" * (SEQ_LEN - 1), "z" * (SEQ_LEN - 2)],
]


@pytest.fixture(params=["pad", "pack"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def corpus(tmp_path) -> Path:
    for i, texts in enumerate(TEXTS):
        write_jsonl(tmp_path / "corpus" / f"{i}.jsonl", texts)
    return tmp_path / "corpus"


def make_config(dataset: Path | str, **changes) -> DataConfig:
    values = {"dataset": str(dataset), "seq_len": SEQ_LEN, "val_fraction": 0.0, "streaming": True, "stream_files": 3}
    return DataConfig(**{**values, **changes})


class Now(stream.Ahead):
    """Does itself, and at once, what the process of a node does ahead."""

    def start(self) -> None:
        self.requests = self

    def send(self, request: tuple[int, list[int], list[int]]) -> None:
        step, files, upcoming = request
        for file in files:
            self.files.tokenize(file, self.tokenizer_json, due=step)
        for file in upcoming:
            self.files.tokenize(file, self.tokenizer_json)


def find_files(config: DataConfig, run_dir: str = "run") -> stream.Files:
    addresses, tokenizer = sources.stream_files(config), byte_tokenizer(BOS, EOS)
    folder, versions, _ = stream.prepare(config, tokenizer, Path(run_dir), addresses)
    return stream.Files(config, special_tokens(tokenizer, config), addresses, folder, versions)


def tokenize(files: stream.Files, file: int, *ended: threading.Event) -> bool:
    return files.tokenize(file, byte_tokenizer(BOS, EOS).to_str(), *ended)


def open_stream(config: DataConfig, run_dir: str = "run", size: int = 1, oldest_step=lambda: 0) -> stream.Stream:
    files = find_files(config, run_dir)
    ahead = Now(files, byte_tokenizer(BOS, EOS).to_str(), oldest_step)
    return stream.Stream(files, files.known_counts(None), size, ahead)


def batches(rows: stream.Stream, size: int = 4, first_step: int = 1, seed: int = 0, counts=None) -> Iterator[list[int]]:
    rows.counts = rows.files.known_counts(counts)
    for batch in data.global_batches(rows, first_step, size, seed):
        yield batch.tolist()


def epoch_of(rows: stream.Stream, size: int, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    """The global batches of an epoch."""
    everything = batches(rows, size, seed=seed)
    next(everything)
    for file in range(len(rows.counts)):
        tokenize(rows.files, file)
    steps = sum(rows.files.rows(file) for file in range(len(rows.counts))) // size
    return list(islice(batches(rows, size, seed=seed), epoch * steps, (epoch + 1) * steps))


def load(config: DataConfig, run_dir: str = "run") -> corpus_module.Corpus:
    """As every rank loads what its node has prepared."""
    tokenizer, addresses = byte_tokenizer(BOS, EOS), sources.stream_files(config)
    folder, versions, val_paths = stream.prepare(config, tokenizer, Path(run_dir), addresses)
    files = stream.Files(config, special_tokens(tokenizer, config), addresses, folder, versions)
    ahead = Now(files, tokenizer.to_str(), lambda: 10**9)
    source = stream.Stream(files, files.known_counts(None), 1, ahead)
    return corpus_module.load_stream(config, tokenizer, source, val_paths)


# ---------------------------------------------------------------------------------------------------------------------
# Law 3


@pytest.mark.parametrize("stream_files", [1, 3, 100])
def test_an_epoch_has_every_row_of_every_file_once_and_rows_have_every_token(corpus, layout, stream_files):
    rows = open_stream(make_config(corpus, layout=layout, stream_files=stream_files))
    epochs = [list(chain.from_iterable(epoch_of(rows, 1, epoch))) for epoch in (0, 1)]
    everything = [file << 32 | row for file, count in enumerate(rows.counts) for row in range(count)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == everything
    found = Counter()
    for file, texts in enumerate(TEXTS):
        expected = [text for text in texts if text is not None]
        assert not expected or texts_of(rows.open(file), byte_tokenizer(BOS, EOS), rows.files.special.eos) == expected
        found.update("".join(expected))
    targets = data.Reader(rows).__getitems__(everything)[1]
    targets = targets[targets != IGNORE_INDEX]
    eos = rows.files.special.eos
    assert (targets == eos).sum() == sum(text is not None for text in chain.from_iterable(TEXTS))
    assert Counter(byte_tokenizer(BOS, EOS).decode(targets[targets != eos].tolist())) == found


def test_rows_of_a_window_are_those_of_its_files_and_steps_go_across_its_border(corpus):
    rows = open_stream(make_config(corpus))
    taken = list(chain.from_iterable(epoch_of(rows, 1)))
    order = permutation(len(TEXTS), 0, 0).tolist()
    start = 0
    for window in (order[:3], order[3:6], order[6:]):
        count = sum(rows.counts[file] for file in window)
        files = [number >> 32 for number in taken[start : start + count]]
        assert set(files) <= set(window)
        changes = sum(before != after for before, after in pairwise(files))
        assert count < 10 or len(set(files)) == 1 or changes >= len(window), "its files come one after the other"
        start += count
    assert [*chain.from_iterable(epoch_of(rows, 5))] == taken[: len(taken) // 5 * 5], "an epoch drops less than a batch"


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("known", ["nothing", "manifest", "checkpoint"])
def test_the_rows_of_a_step_do_not_depend_on_where_a_run_was_resumed(corpus, size, known):
    """Over three epochs; whether the counts of the files come from nowhere, from the cache or from a checkpoint."""
    config = make_config(corpus)
    reference = open_stream(config)
    steps = 3 * (len(list(chain.from_iterable(epoch_of(reference, 1)))) // size)
    expected = list(islice(batches(reference, size), steps + 3))
    for first_step in range(1, steps + 1, math.ceil(steps / 7)):
        if known == "nothing":
            shutil.rmtree(reference.files.folder)
        resumed = open_stream(config, "other" if known == "checkpoint" else "run")
        counts = reference.counts if known == "checkpoint" else None
        found = list(islice(batches(resumed, size, first_step, counts=counts), 3))
        assert found == expected[first_step - 1 : first_step + 2]


def test_what_lies_behind_is_not_read_again_when_the_checkpoint_has_its_counts(corpus, monkeypatch):
    reference = open_stream(make_config(corpus))
    steps = len(epoch_of(reference, 4))
    resumed, read = open_stream(make_config(corpus), "other"), []
    texts_of_file = sources.texts_of_file
    monkeypatch.setattr(
        sources, "texts_of_file", lambda *arguments: read.append(arguments) or texts_of_file(*arguments)
    )
    next(batches(resumed, 4, first_step=steps, counts=reference.counts))
    behind = {*permutation(len(TEXTS), 0, 0)[:3].tolist()} - {*permutation(len(TEXTS), 0, 1)[:3].tolist()}
    assert behind and {Path(address).name for address, _ in read}.isdisjoint(f"{file}.jsonl" for file in behind)


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 24), (2, 3), (4, 6), (24, 1)])
def test_dp_ranks_share_out_a_step_whatever_the_mesh_also_with_more_ranks_than_files(corpus, dp_size, micro_batch_size):
    for rows in islice(data.global_batches(open_stream(make_config(corpus)), 1, 24, 0), 5):
        dealt = [data.deal(rows, micro_batch_size, dp_rank, dp_size) for dp_rank in range(dp_size)]
        of_ranks = [set(chain.from_iterable(batches)) for batches in dealt]
        assert sum(map(len, of_ranks)) == 24 and set().union(*of_ranks) == set(rows.tolist())


def test_epochs_and_seeds_have_orders_of_their_own(corpus):
    rows = open_stream(make_config(corpus))
    orders = [tuple(chain.from_iterable(epoch_of(rows, 1, epoch, seed))) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == len(orders)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_the_disk_holds_the_windows_in_use_and_no_more(tmp_path):
    for i in range(40):
        write_jsonl(tmp_path / "many" / f"{i:02d}.jsonl", [f"{i} {j}" for j in range(i % 4 + 1)])
    oldest, most = 0, 0
    rows = open_stream(make_config(tmp_path / "many", stream_files=2), oldest_step=lambda: oldest)
    for step, batch in enumerate(islice(batches(rows, 3), 150), start=1):
        data.Reader(rows).__getitems__(batch)
        most = max(most, len(list(rows.files.folder.glob("*.arrow"))))
        if step % 5 == 0:  # a checkpoint every 5 steps, of which the two newest are kept
            oldest = max(0, step - 5)
    # 10 steps of 3 rows reach over at most 10 windows, of 3 rows at least, and as many are used until the next of them
    # is asked for; then that one and the next window, and the first file
    assert most <= 2 * (10 + 5 + 1) + 2 + 1 < 40
    assert len(list(rows.files.folder.glob("*.rows"))) == 40


@pytest.mark.parametrize("size", [4, 9])
def test_what_a_resume_from_the_oldest_kept_checkpoint_needs_is_still_there(corpus, monkeypatch, size):
    config = make_config(corpus, stream_files=2)
    for oldest in range(1, 12):
        expected = []
        oldest_step = lambda oldest=oldest, done=expected: min(oldest, len(done))  # noqa: E731
        rows = open_stream(config, f"run{oldest}", oldest_step=oldest_step)
        for batch in islice(batches(rows, size), oldest + 6):
            expected.append(batch)
        with monkeypatch.context() as patch:
            patch.setattr(data.time, "sleep", None)  # nobody would tokenise what it waited for
            resumed = stream.Stream(rows.files, rows.counts, 1)
            assert list(islice(batches(resumed, size, oldest + 1, counts=rows.counts), 3)) == expected[oldest:][:3]


def test_a_start_removes_nothing_that_an_older_checkpoint_than_its_own_needs(corpus):
    """The windows of the steps between the two are known to no one any more."""
    config, oldest = make_config(corpus, stream_files=1), 3
    before = open_stream(config)
    expected = list(islice(batches(before, 4), 12))
    kept = set(before.files.folder.glob("*.arrow"))
    resumed = open_stream(config, oldest_step=lambda: oldest)
    assert next(batches(resumed, 4, first_step=9)) == expected[8]
    assert set(before.files.folder.glob("*.arrow")) == kept
    oldest = 8  # the older one is gone
    again = open_stream(config, oldest_step=lambda: oldest)
    assert next(batches(again, 4, first_step=9)) == expected[8]
    assert set(before.files.folder.glob("*.arrow")) < kept


def test_a_file_that_is_cut_off_is_not_taken_for_a_whole_one(corpus, monkeypatch):
    config = make_config(corpus)
    rows = open_stream(config)
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "encode_documents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokenize(rows.files, 5)
    ended = threading.Event()
    ended.set()
    with pytest.raises(SystemExit):
        tokenize(rows.files, 5, ended)
    assert not any(rows.files.path(5, suffix).exists() for suffix in ("arrow", "rows", "error"))
    (rows.files.folder / ".tmp-of-a-killed-process").write_bytes(b"half")
    again = open_stream(config)
    assert list(rows.files.folder.glob(".tmp-*")) == []
    tokenize(again.files, 5)
    assert texts_of(again.open(5), byte_tokenizer(BOS, EOS), again.files.special.eos) == TEXTS[5]


def test_a_file_that_has_changed_in_the_middle_of_a_run_is_refused(corpus):
    config = make_config(corpus)
    counts = open_stream(config)
    epoch_of(counts, 4)
    write_jsonl(corpus / "5.jsonl", ["other text"] * 99)
    changed = open_stream(config, "resumed")
    with pytest.raises(ValueError, match=r"5.jsonl makes 198 rows now, and made \d+ earlier .* put the file back"):
        list(islice(batches(changed, 4, counts=counts.counts), 40))


def test_training_waits_for_a_file_that_is_not_ready_and_no_longer_than_its_process_lives(corpus):
    rows, started = open_stream(make_config(corpus)), time.monotonic()
    rows.ahead.send = lambda request: None
    timer = threading.Timer(0.4, tokenize, (rows.files, 5))
    timer.start()
    assert rows.prepare([5], [], 1, data.alone)[0] > 0 and time.monotonic() - started >= 0.4
    timer.join()
    rows.ahead.process = mp.get_context("spawn").Process(target=os.getpid)
    rows.ahead.process.start()
    rows.ahead.process.join()
    with pytest.raises(UserError, match="process that tokenises ahead has died, exit code 0"):
        rows.prepare([6], [], 2, data.alone)


def test_what_is_waited_for_is_told_by_name_and_how_much_is_there(corpus):
    rows, told = open_stream(make_config(corpus)), []
    rows.ahead.send = lambda request: tokenize(rows.files, 1)

    def meet(lacking) -> None:
        told.append(lacking())
        tokenize(rows.files, 2)
        told.append(lacking())

    rows.prepare([1, 2], [], 1, meet)
    assert told == [f"{corpus}/2.jsonl, 1 of the 2 files of its window are there", None]


def test_what_goes_wrong_with_a_file_is_said_with_its_name(corpus, monkeypatch):
    files = open_stream(make_config(corpus)).files
    with monkeypatch.context() as patch:
        patch.setattr(tokens_module, "encode_documents", lambda *_: 1 / 0)
        assert not tokenize(files, 5)
    with pytest.raises(UserError, match=r"corpus/5.jsonl: division by zero"):
        files.rows(5)
    assert files.rows(5, due=1) is None, "it was not due yet, and will be tried again"
    assert tokenize(files, 5) and files.rows(5) > 0, "as here"
    files.path(5, "error").write_text("0\nold")
    assert open_stream(make_config(corpus)).files.path(5, "error").exists() is False, "the next start tries again"


def test_files_leave_nothing_behind_but_their_tokens_and_share_a_tokenizer(corpus, cache):
    """A tokenizer keeps the memory that it has taken, and `datasets` leaves a lock for each file that it has opened."""
    files = open_stream(make_config(corpus)).files
    before = {path.name for path in files.folder.parent.iterdir()}
    stream.encoder.cache_clear()
    for file in range(len(TEXTS)):
        assert tokenize(files, file)
    assert stream.encoder.cache_info().misses == 1
    assert {path.name for path in files.folder.parent.iterdir()} == before
    assert {path.suffix for path in files.folder.iterdir()} == {".arrow", ".rows"}


def test_attempts_that_fail_leave_nothing_behind(corpus):
    (corpus / "6.jsonl").write_bytes(b'{"text": "a"}\n' * 3000 + b"{")
    files = open_stream(make_config(corpus)).files
    for _ in range(2):
        assert not tokenize(files, 6)
    assert {path.name for path in files.folder.iterdir()} == {f"{files.versions[6]}.error"}


def counts_on_two_nodes(config: DataConfig, folder: str) -> list[int | None]:
    """Each with a cache of its own; that of rank 1 knows a file that is empty from an earlier start."""
    import datasets
    import torch.distributed as dist

    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder) / str(rank))
        patch.setattr(runtime_ranks.socket, "gethostname", lambda: f"node {rank}")
        patch.setattr(corpus_module, "tokenizer_of_run", lambda *_: byte_tokenizer(BOS, EOS))
        if rank == 1:
            tokenize(find_files(config), 0)
        with corpus_module.opened(config, Path("run"), 1, None, lambda: 0) as found:
            return found.source.counts


def test_what_is_known_of_the_files_is_the_same_on_all_nodes(corpus, ranks, tmp_path):
    """Or one would wait with the others where a window begins, and another not."""
    counts = ranks(2, counts_on_two_nodes, make_config(corpus), str(tmp_path / "caches"))
    assert counts == [[None] * len(TEXTS)] * 2


def start_ahead(files: stream.Files, threads: int = 1) -> stream.Ahead:
    return stream.Ahead(files, byte_tokenizer(BOS, EOS).to_str(), lambda: 0, threads)


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def test_a_file_that_is_broken_is_tried_again_before_it_is_due_and_once_more_when_it_is(corpus):
    whole = (corpus / "5.jsonl").read_bytes()
    (corpus / "5.jsonl").write_bytes(whole[:-3])
    (corpus / "6.jsonl").write_bytes(b"{")
    rows = open_stream(make_config(corpus))
    rows.ahead = ahead = start_ahead(rows.files)
    try:
        rows.prepare([1], [5, 6, 2], 1, data.alone)
        until(lambda: rows.files.path(5, "error").exists() and rows.files.path(2, "rows").exists())
        assert rows.files.path(5, "error").read_text().startswith("0\n"), "the ones behind it did not wait for it"
        (corpus / "5.jsonl").write_bytes(whole)
        until(lambda: rows.files.is_tokenized(5))  # without being asked
        assert rows.prepare([5], [6], 3, data.alone)[0] > 0
        with pytest.raises(UserError, match=r"6.jsonl cannot be read"):
            rows.prepare([6], [], 7, data.alone)
        assert rows.files.path(6, "error").read_text().startswith("7\n"), "it was tried when it was due"
    finally:
        ahead.stop()


def test_attempts_at_a_broken_file_come_less_and_less_often(corpus, monkeypatch):
    (corpus / "6.jsonl").write_bytes(b"{")
    files, attempts, clock = open_stream(make_config(corpus)).files, [], [0.0]

    class Queue(queue.SimpleQueue):
        """Time passes when the process waits for what it is told."""

        def get(self, block=True, timeout=None):
            if timeout is None:
                return super().get()
            clock[0] += timeout
            if clock[0] > 300:
                ours.close()
                return super().get()
            raise queue.Empty

    tokenize_file = stream.Files.tokenize

    def note(self, file, *arguments) -> bool:
        attempts.append(clock[0])
        return tokenize_file(self, file, *arguments)

    monkeypatch.setattr(stream.Files, "tokenize", note)
    monkeypatch.setattr(stream.queue, "SimpleQueue", Queue)
    monkeypatch.setattr(stream.time, "monotonic", lambda: clock[0])
    for name in ("nice", "environ"):
        monkeypatch.setattr(stream.os, name, {} if name == "environ" else lambda niceness: None)
    monkeypatch.setattr(stream.signal, "signal", lambda *_: None)
    theirs, ours = mp.Pipe(duplex=False)
    ours.send((1, [], [6]))
    stream.tokenize_ahead(files, byte_tokenizer(BOS, EOS).to_str(), theirs, 1)
    pauses = [after - before for before, after in pairwise(attempts)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60] and set(pauses[7:]) == {60}


def test_the_process_that_tokenizes_ahead_stands_back_behind_the_trainers_of_its_node(corpus):
    """A lower priority, and no more threads than it is given."""
    tasks = []
    for threads in (1, 3):
        shutil.rmtree(open_stream(make_config(corpus)).files.folder)
        files = open_stream(make_config(corpus)).files
        ahead = start_ahead(files, threads)
        ahead.request([5], [], 1)
        try:
            until(lambda files=files: files.is_tokenized(5))
            pid = ahead.process.pid
            assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + stream.NICENESS)
            tasks.append(len(list(Path(f"/proc/{pid}/task").iterdir())))
        finally:
            ahead.stop()
    assert tasks[1] - tasks[0] == 2


def live_for_a_while(files: stream.Files, pipe) -> None:
    """A parent that starts the process of a node, says which, and then hangs."""
    ahead = start_ahead(files)
    ahead.request([5], [], 1)
    pipe.send(ahead.process.pid)
    time.sleep(600)


def is_alive(pid: int) -> bool:
    """A zombie, which nobody in a container may have waited for, is not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_the_process_that_tokenizes_ahead_ignores_signals_and_ends_with_training(corpus):
    files = open_stream(make_config(corpus)).files
    ours, theirs = mp.Pipe()
    parent = mp.get_context("spawn").Process(target=live_for_a_while, args=(files, theirs))
    parent.start()
    pid = ours.recv()
    until(lambda: files.is_tokenized(5))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    time.sleep(0.3)
    assert is_alive(pid)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


# ---------------------------------------------------------------------------------------------------------------------
# Validation, tokenizer, sources


def test_validation_documents_are_of_the_first_file_and_in_no_training_row(tmp_path, layout):
    texts = [f"document {i}" for i in range(20)]
    for name in "ab":
        write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", [f"{name} {text}" for text in texts])
    config, tokenizer = make_config(tmp_path / "corpus", layout=layout, val_fraction=0.25), byte_tokenizer(BOS, EOS)
    found, files = load(config), find_files(config)
    rows = found.validation.open(0), found.source.open(0)
    held_out, first = (texts_of(each, tokenizer, found.special.eos) for each in rows)
    assert len(held_out) == 5 and sorted(held_out + first) == sorted(f"a {text}" for text in texts)
    tokenize(files, 1)
    assert texts_of(found.source.open(1), tokenizer, found.special.eos) == [f"b {text}" for text in texts]
    assert files.rows(0) == len(found.source.open(0)), "the rows of the first file are counted without them"
    found.source.prepare([1], [1], 1, data.alone)
    found.source.prepare([1], [1], 10, data.alone)
    assert files.path(0, "arrow").exists(), "the validation rows are read from it"


def test_a_validation_set_of_its_own_leaves_every_document_to_training(tmp_path, corpus):
    others = write_jsonl(tmp_path / "others.jsonl", ["other 1", "other 2"])
    config = make_config(corpus, val_dataset=others, val_fraction=0.5)
    tokenizer, found = byte_tokenizer(BOS, EOS), load(config)
    assert texts_of(found.validation.open(0), tokenizer, found.special.eos) == ["other 1", "other 2"]
    tokenize(found.source.files, 1)
    assert texts_of(found.source.open(1), tokenizer, found.special.eos) == TEXTS[1]


def test_the_tokenizer_is_trained_on_the_first_files_and_no_more_are_read(tmp_path, monkeypatch):
    for name, letters in (("a", "ab "), ("b", "cd "), ("c", "zebra ")):
        write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", [letters * 100_000] * 4)
    texts_of_file, read = sources.texts_of_file, []
    monkeypatch.setattr(
        sources, "texts_of_file", lambda *arguments: read.append(arguments) or texts_of_file(*arguments)
    )
    config = make_config(tmp_path / "corpus", tokenizer_vocab_size=300, tokenizer_train_mib=2)
    trained = load_tokenizer(config)
    assert [Path(file).name for file, _ in read] == ["a.jsonl", "b.jsonl"]
    assert load_tokenizer(config).to_str() == trained.to_str() and len(read) == 2, "once, then from the cache"


ANY = ["one", "", "  ", "two\nlines é 😀", None]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda f: write_jsonl(f / "a.jsonl", ANY), ANY),
        (lambda f: write_gzip(f / "a.jsonl.gz", write_jsonl(f / "b", ANY)), ANY),
        (lambda f: write_parquet(f / "a.parquet", ANY), ANY),
        (lambda f: write_lines(f / "a.txt", ["one", "", "two é", ""]), ["one", None, "two é"]),
        (lambda f: write_lines(f / "a.txt", []), []),
        (lambda f: write_jsonl(f / "a.jsonl", []), []),
    ],
    ids=["jsonl", "jsonl.gz", "parquet", "txt", "empty txt", "empty jsonl"],
)
def test_documents_of_a_file_and_of_its_folder_are_the_same(tmp_path, write, expected):
    (tmp_path / "folder").mkdir()
    file = write(tmp_path / "folder")
    (tmp_path / "folder" / "b").unlink(missing_ok=True)
    assert list(sources.texts_of_file(file, "text")) == expected
    pattern = str(tmp_path / "folder" / "*") + "".join(Path(file).suffixes)
    assert sources.stream_files(make_config(file)) == sources.stream_files(make_config(pattern)) == [file]
    if expected:
        assert sources.stream_files(make_config(tmp_path / "folder")) == [file]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "JSON parse error"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "UTF-8"),
        ("a.jsonl", b'{"body": "a"}\n', r"data.text_column='text' is none of its body"),
        ("a.jsonl", b'{"text": 3}\n', r"data.text_column='text' holds int64, not text"),
        ("a.jsonl.gz", b"no gzip", "(?i)gzip"),
        ("a.parquet", b"PAR1 junk", "(?i)parquet"),
        ("a.txt", b"\xe9\n", "(?i)utf.?8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))} cannot be read: .*: replace it") as error:
        list(sources.texts_of_file(str(tmp_path / name), "text"))
    assert re.search(message, str(error.value)), error.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nope"}, "data.dataset='nope' cannot be loaded"),
        ({"dataset": "nope*.jsonl"}, r"cannot be loaded"),
        ({"split": "test"}, "data.split='test' is not one of train"),
        ({"dataset": "{folder}/table"}, r"data.streaming=true reads .txt.*a.csv: set it to false"),
        ({"val_dataset": "{folder}/corpus/5.jsonl"}, "name training documents"),
        ({"val_fraction": 0.5}, "data.val_fraction=0.5 of 0 documents"),
        (
            {"dataset": "{folder}/corpus/1.jsonl", "global_batch_size": 99},
            "3 training rows, fewer than .*=99: lower it",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, corpus, changes, message):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.csv").write_text("text\na\n")
    size = changes.pop("global_batch_size", 4)
    changes = {
        key: str(value).format(folder=tmp_path) if key != "val_fraction" else value for key, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        next(batches(open_stream(make_config(**{"dataset": corpus, **changes}), size=size), size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.steps=0"], "train.steps=0 with data.streaming=true: .* give the steps"),
        (["--data.stream_files=0"], "data.stream_files=0 is below 1"),
        (["--data.dataset=stdlib"], "data.streaming=true reads files, .*stdlib"),
    ],
)
def test_a_configuration_that_cannot_stream_is_refused(arguments, message):
    with pytest.raises(configs.ConfigError, match=message):
        configs.load(["--data.dataset=a.jsonl", "--data.streaming=true", *arguments])


# ---------------------------------------------------------------------------------------------------------------------
# The command line from end to end

SABOTEUR = Path(__file__).parent / "saboteur.py"
STEPS, EVERY = 20, 4
STREAMING = f"""
data.stream_files=2 data.val_fraction=0.3 train.steps={STEPS} checkpoint.every={EVERY} train.eval_every=0
""".split()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    """As in test_train, with documents in files that are uneven and take three epochs for the run."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.documents = lab.folder / "corpus"
    words, generator = ["def", "return", "x", "(y)", "naïve", "日本", "🙂", "+"], random.Random(0)
    for i, count in enumerate((9, 0, 7, 1, 12, 18)):
        lengths = generator.choices([0, 1, 5, 12, 60], k=count)
        texts = [" ".join(generator.choices(words, k=length)) for length in lengths]
        write_jsonl(lab.documents / f"{i}.jsonl", texts)
    return lab


def arguments(run_dir: Path, *more: str) -> list[str]:
    return [f"--run.dir={run_dir}", "--data.streaming=true", *(f"--{argument}" for argument in STREAMING), *more]


@pytest.fixture(scope="module")
def reference(lab) -> Path:
    run_dir = lab.folder / "reference"
    result = lab.run_to_end(*arguments(run_dir))
    assert without_bars(result.stderr) == ""
    state = json.loads((run_dir / f"checkpoints/step_{STEPS:08d}/state.json").read_text())
    assert None not in state["rows_of_files"] and sum(state["rows_of_files"]) * 2 < STEPS * 8, "two epochs at least"
    return run_dir


def test_four_ranks_on_two_axes_compute_what_one_rank_does(lab, reference):
    run_dir = lab.folder / "four"
    result = lab.run_to_end(*arguments(run_dir, "--parallel.tp=2"), ranks=4)
    assert without_bars(result.stderr) == ""
    assert_close(facts(run_dir), facts(reference))


def test_resume_after_two_kills_is_bitwise_identical_with_a_worker_and_without_the_cache(lab, reference):
    run_dir = lab.folder / "killed"
    checkpoints, command = run_dir / "checkpoints", arguments(run_dir, "--data.num_workers=1")
    for step in (EVERY, 2 * EVERY):
        lab.run_and_kill(*command, when=(checkpoints / f"step_{step:08d}").exists)
    assert not (checkpoints / f"step_{STEPS:08d}").exists(), "killed too late to tell anything"
    shutil.rmtree(lab.folder / "hf")
    result = lab.run_to_end(*command)
    assert without_bars(result.stderr) == ""
    assert f"resumed from {checkpoints}/step_0000" in result.stdout
    assert facts(run_dir) == facts(reference)


@pytest.mark.parametrize(("ranks", "suffix"), [(1, ".jsonl"), (2, ".parquet")])
def test_a_broken_file_stops_the_run_which_saves_and_goes_on_once_it_is_replaced(lab, reference, ranks, suffix):
    run_dir, folder = lab.folder / f"broken{suffix}", lab.folder / f"corpus_{suffix[1:]}"
    folder.mkdir()
    for file in lab.documents.iterdir():
        if suffix == ".parquet":
            texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
            write_parquet(folder / f"{file.stem}.parquet", texts)
        else:
            shutil.copy(file, folder)
    broken = folder / f"{permutation(6, 0, 0)[-1]}{suffix}"  # in the last window
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 3 // 4])
    # a tokenizer of its own would be trained on all files of so small a corpus, and would find the broken one
    command = arguments(run_dir, f"--data.dataset={folder}", f"--data.tokenizer={reference}/tokenizer.json")
    command += ["--checkpoint.every=0", "--parallel.tp=1"]
    told = []

    def listen(process: subprocess.Popen) -> None:
        told.extend((time.monotonic(), line) for line in process.stderr)

    result = lab.run(*command, ranks=ranks, meanwhile=listen)
    errors = "".join(line for _, line in told)
    assert result.returncode == (2 if ranks == 1 else 1), errors
    assert len(re.findall("(?m)^error: ", errors)) == 1 and str(broken) in errors
    assert "replace it; the same command then goes on" in errors
    assert 'train.py", line' not in errors and (ranks > 1 or "Traceback" not in errors)
    seconds = time.monotonic() - next(when for when, line in told if line.startswith("error: "))
    assert seconds < 20, "the silent ranks do not keep torchrun waiting for 30"
    (saved,) = (run_dir / "checkpoints").glob("step_*")  # in the middle of the run, and only by the stop
    assert f"stopped at step {int(saved.name[5:])}\n" in result.stdout
    assert facts(run_dir)[-1]["step"] == int(saved.name[5:]), "no step was lost"
    broken.write_bytes(content)
    result = lab.run_to_end(*command, ranks=ranks)
    assert "resumed from" in result.stdout
    assert_close(facts(run_dir), facts(reference))


def process_ahead(process: subprocess.Popen) -> int:
    """The one that tokenises, of a run of two ranks. Loader workers are started in the same way, but are not niced."""
    leader = ranks_of(process.pid)[0]
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    started = (int(pid) for pid, parent, args in rows if int(parent) == leader and "spawn_main" in args)
    (pid,) = (p for p in started if os.getpriority(os.PRIO_PROCESS, p) > os.getpriority(os.PRIO_PROCESS, leader))
    return pid


@contextlib.contextmanager
def held(pid: int) -> Iterator[Callable[[], None]]:
    """A process that stands still, until it is let go, or at the end: it would outlive a run, with its pipe open."""

    def let_go() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    try:
        yield let_go
    finally:
        let_go()


@pytest.mark.parametrize("stopped", [False, True], ids=["it comes", "the run is stopped"])
def test_waiting_for_a_file_is_no_hang_and_lets_signals_through(lab, reference, stopped):
    """The process that tokenises is held for longer than the time-out and the 5 seconds after it.

    That is in the first step. A worker has asked for rows of the second one by then, all of them in the first window,
    so that nobody has asked for the last window yet.
    """
    counts = json.loads((reference / f"checkpoints/step_{STEPS:08d}/state.json").read_text())["rows_of_files"]
    assert sum(counts[file] for file in data.permutation(len(counts), 0, 0)[:2]) >= 2 * 8
    run_dir = lab.folder / f"waiting_{stopped}"
    command = arguments(run_dir, "--parallel.tp=1", "--parallel.timeout_seconds=2", "--checkpoint.every=0")
    command += ["--data.num_workers=1"] if stopped else []  # which asks ahead: in the middle of a step
    for path in lab.cwd.iterdir():
        path.unlink()
    process = lab.start(*command, ranks=2, script=(SABOTEUR, "wait@forward=1:0"))
    try:
        until((lab.cwd / "waiting-0").exists, 200)
        with held(process_ahead(process)) as let_go:
            (lab.cwd / "go").touch()
            told = ""
            while not re.search(r"[1-9]\d*/20 .*waits for", told):  # later than for the first window
                told += (more := os.read(process.stderr.fileno(), 2**16).decode())
                assert more, told
            time.sleep(9)
            assert process.poll() is None
            if stopped:
                os.kill(ranks_of(process.pid)[1], signal.SIGUSR1)
            else:
                let_go()
            output, errors = process.communicate(timeout=200)
    finally:
        kill(process)
    assert process.returncode == 0, errors
    assert re.search(rf"waits for {lab.documents}/\d.jsonl, [01] of the 2 files", told + errors)
    if stopped:
        assert re.search(r"stopped at step \d+\n$", output)
        assert "resumed from" in lab.run_to_end(*command, ranks=2).stdout
    assert_close(facts(run_dir), facts(reference))


def test_another_list_of_files_is_another_run(lab, reference):
    extra = lab.documents / "9.jsonl"
    try:
        write_jsonl(extra, ["one more"])
        result = lab.run(*arguments(reference, "--train.steps=30"))
    finally:
        extra.unlink()
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(r"(?s)error: .*another run:\n +data: '\w+' there, '\w+' now\n", result.stderr)
