"""Law 3 (no token is lost or repeated) and law 8 (who sees which rows), from tokens on; without a network."""

import ast
import inspect
import itertools
import math
import multiprocessing as mp
import pickle
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from documents import (
    BOS,
    DOCUMENTS,
    EOS,
    LONG,
    SEQ_LEN,
    TOKENIZERS,
    batch_of,
    byte_tokenizer,
    make_config,
    make_corpus,
    texts_of,
    tokens_of,
    write_jsonl,
)
from tokenizers import Tokenizer
from torch import Tensor

import corpus.stream  # noqa: F401 - looked up by its name
import data
from corpus import tokens as tokens_module
from corpus.tokenizer import SpecialTokens
from corpus.tokens import OnDisk, TokenFiles, tokenize
from data import ROWS_OF_A_FILE, Rows, deal, global_batches, permutation
from model import IGNORE_INDEX

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> None:
    """A few dozen documents make several files of tokens, each of several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PART_DOCUMENTS", 60)
        patch.setattr(tokens_module, "BATCH_DOCUMENTS", 25)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Law 3: documents become rows


@dataclass
class Case:
    layout: str
    seq_len: int
    tokenizer: Tokenizer
    special: SpecialTokens
    rows: Rows
    input_ids: Tensor
    targets: Tensor
    positions: Tensor

    @property
    def real(self) -> Tensor:
        return self.targets != IGNORE_INDEX


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer_name(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["pad", "pack"])
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[SEQ_LEN, 1], ids=lambda seq_len: f"seq_len {seq_len}")
def case(request, layout, tokenizer_name, tmp_path_factory) -> Case:
    """DOCUMENTS as rows, all of them."""
    folder, tokenizer = tmp_path_factory.mktemp("case"), TOKENIZERS[tokenizer_name]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        changes = {"layout": layout, "seq_len": request.param, "document_mask": True}
        corpus = make_corpus(make_config(write_jsonl(folder / "a.jsonl", DOCUMENTS), **changes), tokenizer)
    rows = corpus.source.rows
    return Case(layout, request.param, tokenizer, corpus.special, rows, *batch_of(rows, range(len(rows))))


def test_targets_are_every_document_whole_and_once(case):
    """Each ends in one EOS. A BOS among the targets, a lost or a repeated token would not decode to the same texts."""
    assert texts_of(case.rows, case.tokenizer, case.special.eos) == DOCUMENTS


def test_input_of_a_target_is_the_token_before_it_and_bos_for_the_first(case):
    targets, bos = case.targets[case.real], torch.tensor([case.special.bos])
    after_eos = torch.where(targets[:-1] == case.special.eos, bos, targets[:-1])
    assert torch.equal(case.input_ids[case.real], torch.cat((bos, after_eos)))


def test_bos_starts_each_document_once_and_is_never_a_target(case):
    special, targets = case.special, case.targets
    if special.bos == special.eos:  # then it is a target as EOS, once a document
        assert (targets == special.bos).sum() == len(DOCUMENTS)
    else:
        assert (targets == special.bos).sum() == 0
        assert (case.input_ids == special.bos).sum() == len(DOCUMENTS)


def test_consecutive_rows_overlap_by_one_token(case):
    last_targets, next_inputs = case.targets[:-1, -1], case.input_ids[1:, 0]
    if case.layout == "pad":
        continued = (last_targets != IGNORE_INDEX) & (last_targets != case.special.eos)
    else:  # the stream goes on in every row; a last target that is a BOS is masked
        continued = torch.ones_like(last_targets, dtype=torch.bool)
    expected = last_targets.masked_fill(last_targets == IGNORE_INDEX, case.special.bos)
    assert continued.sum() >= 40
    assert torch.equal(next_inputs[continued], expected[continued])


def test_pads_are_on_the_right_and_no_targets(case):
    real, pads = case.real, case.input_ids == case.special.pad
    if case.layout == "pad":
        assert real[:, 0].all(), "a row without a target"
        assert not (real[:, 1:] & ~real[:, :-1]).any()
        assert pads[~real].all()
        return
    used = int(real.sum()) + len(DOCUMENTS) - 1  # the first BOS is no target of anything
    real, pads = real.flatten(), pads.flatten()
    assert len(real) - used < case.seq_len, "packed rows have padding in the last one only"
    assert pads[used:].all()
    assert not real[used:].any()
    before_bos = case.input_ids.flatten().roll(-1)[:used] == case.special.bos
    assert before_bos[~real[:used]].all(), "only a BOS is no target"


def test_rows_are_int64_and_as_few_as_possible(case):
    assert case.input_ids.shape == case.targets.shape == (len(case.rows), case.seq_len)
    assert case.input_ids.dtype == case.targets.dtype == torch.int64
    ends = (case.targets[case.real] == case.special.eos).nonzero().flatten().tolist()
    lengths = [end - start for start, end in zip([-1, *ends], ends, strict=False)]  # targets of each document
    if case.layout == "pad":
        assert len(case.rows) == sum(math.ceil(length / case.seq_len) for length in lengths)
    else:
        assert len(case.rows) == math.ceil((sum(lengths) + len(DOCUMENTS) - 1) / case.seq_len)


def test_positions_count_from_0_at_each_bos_and_at_the_start_of_a_row(case):
    """A BOS stands behind what is no target, and so does a pad, which may be the same token."""
    used = case.real.flatten().nonzero().max() + 1
    is_bos = ((case.input_ids == case.special.bos) & ~case.real.roll(1, 1)).flatten()
    is_bos[used:] = False
    is_bos = is_bos.view(case.input_ids.shape) & (case.layout == "pack")
    expected = torch.zeros_like(case.input_ids)
    for i in range(1, case.seq_len):
        expected[:, i] = torch.where(is_bos[:, i], 0, expected[:, i - 1] + 1)
    assert torch.equal(case.positions, expected)
    if case.layout == "pack" and case.seq_len > 1:
        assert is_bos[:, 1:].sum() > 100


def test_counts_for_bits_per_byte_are_those_of_the_rows(case):
    assert case.rows.num_targets == case.real.sum()
    assert case.rows.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_batches_hold_the_rows_that_were_asked_for_and_row_minus_one_is_all_padding(case):
    order = [len(case.rows) - 1, -1, 0, 3, 0]
    input_ids, targets, _ = batch_of(case.rows, order)
    for i, row in enumerate(order):
        alone = case.input_ids[row], case.targets[row]
        empty = torch.full((case.seq_len,), case.special.pad), torch.full((case.seq_len,), IGNORE_INDEX)
        assert all(map(torch.equal, (input_ids[i], targets[i]), alone if row >= 0 else empty))


@pytest.mark.parametrize("num_targets", [1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 100 * SEQ_LEN, 100 * SEQ_LEN + 1])
def test_a_document_takes_as_many_rows_as_its_targets_need(tmp_path, layout, num_targets):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ["x" * (num_targets - 1)]), layout=layout)
    rows = make_corpus(config, byte_tokenizer(BOS, EOS)).source.rows
    assert len(rows) == math.ceil(num_targets / SEQ_LEN)
    targets = batch_of(rows, [len(rows) - 1])[1][0]
    assert (targets != IGNORE_INDEX).sum() == (num_targets - 1) % SEQ_LEN + 1


def test_the_drawing_of_two_documents_of_ten_tokens_is_what_comes_out(layout):
    """The one in the docstring of `Rows`."""
    letters = "BabcdEBxyE"
    tokens = SimpleNamespace(
        document_starts=np.array([0, 6, 10]),
        document_bytes=np.array([4, 2]),
        read=lambda start, stop: np.array([*map(ord, letters[start:stop])], dtype=np.int32),
    )
    rows = Rows(tokens, np.array([0, 1]), seq_len=4, layout=layout, pad=ord("."), document_mask=True)
    drawing = [line.split() for line in Rows.__doc__.splitlines() if line.split() and line.split()[0].isdigit()]
    assert len(drawing) == len(rows) == 3
    for number, line in enumerate(drawing):
        assert line[0] == line[9] == str(number)
        inputs, targets, positions = (array.tolist() for array in rows.row(number))
        found = [["." if token == IGNORE_INDEX else chr(token) for token in array] for array in (inputs, targets)]
        if layout == "pad":
            assert found == [line[1:5], line[5:9]]
        else:
            assert [*found, [*map(str, positions)]] == [line[10:14], line[14:18], line[18:22]]


# ---------------------------------------------------------------------------------------------------------------------
# Order, and law 8


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


class Known:
    """A source whose files have been counted: only what the order asks for. `window` as in `data.Source`."""

    def __init__(self, counts: list[int], window: int = 0, known: bool = True, first_window: int = 0):
        self.all_counts, self.window, self.asked = counts, window, []
        self.first_window = first_window or window
        self.counts = list(counts) if known else [None] * len(counts)

    def prepare(self, files: list[int], upcoming: list[int], step: int, meet: data.Meet) -> list[int]:
        meet(lambda: None)
        self.asked.append((files, upcoming, step))
        for file in files:
            self.counts[file] = self.all_counts[file]
        return [self.all_counts[file] for file in files]


def rows_of_step(step: int, num_rows: int, size: int, seed: int) -> Tensor:
    return next(global_batches(Known([num_rows]), step, size, seed))


def epoch_rows(num_rows: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    steps = num_rows // size
    first = epoch * steps + 1
    return [rows_of_step(step, num_rows, size, seed).tolist() for step in range(first, first + steps)]


@pytest.mark.parametrize(("num_rows", "size"), [(100, 8), (96, 8), (8, 8), (15, 8), (7, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_takes_each_row_once_and_drops_less_than_a_global_batch(num_rows, size, epoch):
    rows = flat(epoch_rows(num_rows, size, 0, epoch))
    assert len(rows) == len(set(rows)) == num_rows - num_rows % size
    assert set(rows) <= set(range(num_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(permutation(100, seed, epoch).tolist()) for seed in (0, 1, 12) for epoch in (0, 1, 2)]
    orders.append(tuple(range(100)))
    orders += [tuple(flat(epoch_rows(100, 10, seed, epoch))) for seed, epoch in ((0, 5), (1, 4))]
    assert len(set(orders)) == len(orders)


def test_rows_of_a_step_are_a_function_of_its_arguments_alone():
    before = [rows_of_step(step, 50, 8, 7).tolist() for step in range(1, 20)]
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    backwards = [rows_of_step(step, 50, 8, 7).tolist() for step in range(19, 0, -1)]
    assert backwards[::-1] == before
    assert torch.equal(torch.get_rng_state(), state), "it draws from the global generator"


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ((1, 10, 4, 0), [5, 6, 7, 3]),
        ((2, 10, 4, 0), [9, 2, 4, 8]),
        ((3, 10, 4, 0), [8, 0, 2, 9]),
        ((4, 10, 4, 7), [0, 6, 5, 4]),
        ((5, 23, 5, 1), [18, 16, 15, 5, 7]),
    ],
)
def test_the_order_of_a_corpus_on_disk_is_that_of_commit_cc6ef64(arguments, rows):
    """(step, rows, global batch, seed); computed there, so that runs of then go on with the same rows."""
    assert rows_of_step(*arguments).tolist() == rows


@pytest.mark.parametrize(
    ("counts", "window", "size", "seed", "first_step", "rows"),
    [
        ([3, 0, 5, 2, 1], 2, 2, 0, 1, "00 01  02 20  40 22  21 24  23 30  22 20"),
        ([3, 0, 5, 2, 1], 2, 3, 5, 5, "22 01 02  21 23 31  21 00 24  22 23 01  20 02 40  22 40 24"),
        ([4, 3], 5, 2, 0, 1, "11 02  01 12  10 00  10 02  11 00  03 12"),  # a single window
        ([7], 4, 3, 3, 2, "00 03 06  05 06 01  02 00 04  00 06 02  01 04 05  06 05 04"),  # a single file
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_the_order_of_a_streamed_corpus_is_that_of_commit_cc6ef64(counts, window, size, seed, first_step, rows, known):
    """Each row as file and number, six steps; computed there. Whether all rows are counted when it starts or not."""
    found = islice(global_batches(Known(counts, window, known), first_step, size, seed), 6)
    places = [[divmod(row, ROWS_OF_A_FILE) for row in batch.tolist()] for batch in found]
    assert places == [[(int(file), int(row)) for file, row in step.split()] for step in rows.split("  ")]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_smaller_first_window_comes_once_and_later_epochs_have_whole_ones(size):
    counts = [3, 0, 5, 2, 1, 4, 2]
    source = Known(counts, window=3, known=False, first_window=1)
    found = [
        number for rows in islice(global_batches(source, 1, size, 0), 2 * (17 // size)) for number in rows.tolist()
    ]
    order = permutation(len(counts), 0, 0).tolist()
    assert [files for files, *_ in source.asked[:3]] == [order[:1], order[1:4], order[4:7]]
    again = permutation(len(counts), 0, 1).tolist()
    assert [files for files, *_ in source.asked[3:5]] == [again[:3], again[3:6]]
    everything = [file * ROWS_OF_A_FILE + row for file, count in enumerate(counts) for row in range(count)]
    epoch = found[: 17 // size * size]
    assert len(set(epoch)) == len(epoch) and set(epoch) <= set(everything)
    for step in (1, 17 // size, 17 // size + 1):
        resumed = Known(counts, window=3, known=False, first_window=1)
        assert next(global_batches(resumed, step, size, 0)).tolist() == found[(step - 1) * size : step * size]


def test_all_ranks_meet_where_a_window_begins_and_nowhere_else():
    met, source = [], Known([3, 0, 5, 2, 1], window=2, known=False)
    rows = global_batches(source, 1, 2, 0, meet=met.append)
    assert met == [], "nobody is waited for before rows are asked for"
    for _ in range(12):
        next(rows)
        assert len(met) == len(source.asked)


def test_a_window_is_prepared_once_and_with_the_first_step_that_takes_rows_of_it():
    source = Known([3, 0, 5, 2, 1], window=2, known=False)
    for step, batch in enumerate(islice(global_batches(source, 1, 2, 0), 12), start=1):
        files = {row // ROWS_OF_A_FILE for row in batch.tolist()}
        prepared = {file for asked, _, first in source.asked for file in asked if first <= step}
        assert files <= prepared
    steps = [step for *_, step in source.asked]
    assert steps == sorted(steps) and len(source.asked) == len(set(map(str, source.asked)))
    for (_, upcoming, _), (files, _, _) in itertools.pairwise(source.asked):
        assert files == upcoming, "what is asked for next was said to come"


@pytest.mark.parametrize("window", [0, 2])
def test_rows_of_a_step_that_is_done_are_found_again_and_a_source_that_is_ahead_is_not_disturbed(window):
    """As the report of skipped steps asks for them, while the loader is further: over the first two epochs."""
    source = Known([3, 0, 5, 2, 1], window, known=False)
    ahead, before = global_batches(source, 1, 2, 0), []
    for step in range(1, 12):
        before.append(next(ahead).tolist())
        asked, counts = list(source.asked), list(source.counts)
        for earlier in {1, step // 2 + 1, step}:
            assert data.rows_of_step(source, earlier, 2, 0).tolist() == before[earlier - 1]
        assert (source.asked, source.counts) == (asked, counts)
    assert before == [batch.tolist() for batch in islice(global_batches(Known([3, 0, 5, 2, 1], window), 1, 2, 0), 11)]


MESHES = [(1, 24), (1, 1), (2, 3), (2, 12), (3, 4), (4, 6), (4, 1), (24, 1)]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), MESHES)
def test_dp_ranks_share_out_the_global_batch_whatever_the_mesh(dp_size, micro_batch_size):
    for step in (1, 2, 5):
        rows = rows_of_step(step, 100, 24, seed=3)
        dealt = [deal(rows, micro_batch_size, dp_rank, dp_size) for dp_rank in range(dp_size)]
        assert {len(batches) for batches in dealt} == {24 // (dp_size * micro_batch_size)}
        assert {len(batch) for batches in dealt for batch in batches} == {micro_batch_size}
        of_ranks = [set(flat(batches)) for batches in dealt]
        assert sum(map(len, of_ranks)) == 24, "two DP ranks see the same row"
        assert set().union(*of_ranks) == set(rows.tolist())


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), MESHES)
@pytest.mark.parametrize("num_rows", [1, 23, 24, 25, 71])
def test_evaluation_takes_each_row_once_on_as_many_batches_as_every_rank(num_rows, dp_size, micro_batch_size):
    order = permutation(num_rows, 0, 0)
    dealt = [deal(order, micro_batch_size, dp_rank, dp_size) for dp_rank in range(dp_size)]
    counts = Counter(flat(map(flat, dealt)))
    padding = counts.pop(-1, 0)
    assert counts == Counter(range(num_rows))
    assert padding < dp_size * micro_batch_size
    assert len({len(batches) for batches in dealt}) == 1, "a rank would wait for ever"
    assert {len(batch) for batches in dealt for batch in batches} == {micro_batch_size}


# ---------------------------------------------------------------------------------------------------------------------
# Loader


def test_a_stream_travels_to_a_worker_as_its_path(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", [LONG] * 50))
    paths = tokenize(config, byte_tokenizer(BOS, EOS))
    sent = pickle.dumps(TokenFiles(paths))
    assert len(sent) < 1000
    stream = pickle.loads(sent)
    assert stream.read(0, 100).tolist() == tokens_of(paths)[:100]


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2, "layout": "pack", "document_mask": True}])
def test_the_loader_gives_the_batches_in_the_order_asked_for(tmp_path, changes):
    """With workers as without: what a run sees does not depend on how it is loaded."""
    config = make_config(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), **changes)
    rows = make_corpus(config, byte_tokenizer(BOS, EOS)).source.rows
    batches = [permutation(len(rows), 0, epoch)[:3].tolist() for epoch in range(8)] + [[-1, 0], [5]]
    loader = data.make_loader(OnDisk(rows), iter(batches), config.num_workers, torch.device("cpu"))
    loaded = list(loader)
    expected = [batch_of(rows, batch) for batch in batches]
    assert len(loaded) == len(expected)
    for got, wanted in zip(loaded, expected, strict=True):
        assert all(map(torch.equal, got, wanted))


def test_the_loader_pins_memory_for_a_gpu_only():
    assert not data.make_loader(range(1), [[0]], 0, torch.device("cpu")).pin_memory
    assert data.make_loader(range(1), [[0]], 0, torch.device("cuda", 1)).pin_memory


def batches_of(source: OnDisk, first_step: int, last_step: int, dp_rank: int = 0, dp_size: int = 1, workers: int = 0):
    """Global batches of 6 rows in micro-batches of 3."""
    return data.batches(source, first_step, last_step, 6, 3, 7, dp_rank, dp_size, workers, torch.device("cpu"))


@pytest.fixture
def source(tmp_path) -> OnDisk:
    """23 rows: three steps of 6 rows are an epoch."""
    texts = [chr(ord("a") + i) for i in range(23)]
    return make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", texts)), byte_tokenizer(BOS, EOS)).source


def test_batches_are_those_of_the_steps_asked_for_dealt_to_the_rank(source):
    assert len(source.rows) == 23
    every = [
        [batch_of(source.rows, rows) for rows in deal(rows_of_step(step, 23, 6, 7), 3, 0, 1)] for step in range(1, 8)
    ]
    for first, last in ((1, 7), (5, 5), (3, 6)):
        with batches_of(source, first, last) as batches:
            found = list(batches)
        expected = list(chain.from_iterable(every[first - 1 : last]))
        assert len(found) == len(expected) == 2 * (last - first + 1)
        for got, wanted in zip(found, expected, strict=True):
            assert all(map(torch.equal, got, wanted))
    for dp_rank in (0, 1):
        with batches_of(source, 1, 7, dp_rank, dp_size=2) as batches:
            for step, got in zip(every, batches, strict=True):
                assert all(map(torch.equal, got, step[dp_rank]))


@pytest.mark.parametrize("error", [None, KeyError])
def test_leaving_ends_the_workers_although_the_batches_are_still_held(source, error):
    held, started, others = None, time.monotonic(), set(mp.active_children())
    try:
        with batches_of(source, 1, 1000, workers=2) as batches:
            assert set(mp.active_children()) == others, "they start with the first batch"
            next(batches)
            held = batches
            assert len(set(mp.active_children()) - others) == 2
            if error:
                raise error
    except KeyError:
        assert error
    assert set(mp.active_children()) <= others and held is not None
    assert time.monotonic() - started < 60


def test_python_data_py_says_where_a_look_at_the_data_is():
    result = subprocess.run([sys.executable, data.__file__], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert "python -m corpus.look" in result.stderr


@pytest.mark.parametrize("source", ["corpus.tokens.OnDisk", "corpus.stream.Stream"])
def test_a_source_has_what_training_asks_for_and_no_method_that_does_nothing(source):
    """A method that a kind of source does not need is a sign that the protocol is not theirs in common."""
    module, name = source.rsplit(".", 1)
    kind = getattr(sys.modules[module], name)
    asked = {name for name, value in vars(data.Source).items() if callable(value) and not name.startswith("_")}
    assert asked == {"prepare", "open", "names"}
    for method in (getattr(kind, name) for name in (*asked, "__str__")):
        body = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0].body
        said = [statement for statement in body if not isinstance(statement, ast.Pass)]
        said = [each for each in said if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
        assert said and ast.unparse(said[0]) not in ("return", "return None")
