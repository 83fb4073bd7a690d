"""Law 3 (no token is lost or repeated), law 8 (who sees which rows) and what data.py refuses; without a network."""

import fcntl
import gzip
import importlib.util
import json
import math
import multiprocessing as mp
import os
import pickle
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

import configs
import data
import parallel
import train
from data import DataConfig, SpecialTokens, deal, epoch_order, rows_of_step
from model import IGNORE_INDEX

pytestmark = pytest.mark.usefixtures("cache")

BOS, EOS = data.BOS_TOKENS[0], data.EOS_TOKENS[0]
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
    "merges": lambda: data.train_tokenizer(DOCUMENTS, 400, 1),
}


def write_jsonl(path: Path, texts: list, column: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def make_config(dataset: str, **changes) -> DataConfig:
    return DataConfig(**{"dataset": dataset, "seq_len": SEQ_LEN, "val_fraction": 0.0, **changes})


def make_corpus(config: DataConfig, tokenizer: Tokenizer) -> data.Corpus:
    return data.load_corpus(config, tokenizer, data.tokenize(config, tokenizer))


def tokens_of(paths: list[Path]) -> list[int]:
    stream = data.TokenStream(paths)
    return stream.read(0, int(stream.document_starts[-1])).tolist()


def texts_of(rows: data.Rows, tokenizer: Tokenizer, eos: int) -> list[str]:
    """The documents, from nothing but the targets."""
    targets = rows.__getitems__(range(len(rows)))[1]
    documents, tokens = [], []
    for token in targets[targets != IGNORE_INDEX].tolist():
        if token == eos:
            documents.append(tokenizer.decode(tokens, skip_special_tokens=False))
            tokens = []
        else:
            tokens.append(token)
    assert not tokens, "the last document does not end in EOS"
    return documents


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> None:
    """A few dozen documents make several files of tokens, each of several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PART_DOCUMENTS", 60)
        patch.setattr(data, "BATCH_DOCUMENTS", 25)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Law 3: documents become rows


@dataclass
class Case:
    layout: str
    seq_len: int
    tokenizer: Tokenizer
    special: SpecialTokens
    rows: data.Rows
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
    rows = corpus.train
    return Case(layout, request.param, tokenizer, corpus.special, rows, *rows.__getitems__(range(len(rows))))


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
    input_ids, targets, _ = case.rows.__getitems__(order)
    for i, row in enumerate(order):
        alone = case.input_ids[row], case.targets[row]
        empty = torch.full((case.seq_len,), case.special.pad), torch.full((case.seq_len,), IGNORE_INDEX)
        assert all(map(torch.equal, (input_ids[i], targets[i]), alone if row >= 0 else empty))


@pytest.mark.parametrize("num_targets", [1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, 100 * SEQ_LEN, 100 * SEQ_LEN + 1])
def test_a_document_takes_as_many_rows_as_its_targets_need(tmp_path, layout, num_targets):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ["x" * (num_targets - 1)]), layout=layout)
    rows = make_corpus(config, byte_tokenizer(BOS, EOS)).train
    assert len(rows) == math.ceil(num_targets / SEQ_LEN)
    targets = rows.__getitems__([len(rows) - 1])[1][0]
    assert (targets != IGNORE_INDEX).sum() == (num_targets - 1) % SEQ_LEN + 1


def test_a_document_larger_than_a_batch_is_whole_and_encoded_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH_BYTES", 1000)
    seen = as_if_killed(monkeypatch, after=1000)
    large = " ".join(map(str, range(20_000)))
    tokenizer, texts = byte_tokenizer(BOS, EOS), ["before", large, "after"]
    corpus = make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer)
    assert texts_of(corpus.train, tokenizer, corpus.special.eos) == texts
    assert sorted(seen) == sorted(texts)


def test_a_null_is_no_document_and_an_empty_text_is_one(tmp_path):
    texts = ["first", *[None] * 250, "", "last", None]  # whole chunks of the stream are empty
    tokenizer = byte_tokenizer(BOS, EOS)
    corpus = make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer)
    assert texts_of(corpus.train, tokenizer, corpus.special.eos) == ["first", "", "last"]


def test_a_stream_reads_the_same_across_chunks(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(350)]))
    stream = data.TokenStream(data.tokenize(config, byte_tokenizer(BOS, EOS)))
    whole = np.concatenate(stream.values)
    assert len(stream.values) > 2
    for border in stream.starts[1:-1]:
        for start, stop in [(border - 3, border), (border, border + 3), (border - 1, border + 1), (3, border + 1)]:
            assert stream.read(start, stop).tolist() == whole[start:stop].tolist()
    assert stream.read(0, len(whole)).tolist() == whole.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_written_out_in_a_document_are_text(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    config = make_config(write_jsonl(tmp_path / "a.jsonl", [SPELLED_OUT]))
    special = data.special_tokens(tokenizer, config)
    bos, *middle, eos = tokens_of(data.tokenize(config, tokenizer))
    assert (bos, eos) == (special.bos, special.eos)
    assert not {special.bos, special.eos, special.pad} & set(middle)
    assert tokenizer.decode(middle, skip_special_tokens=False) == SPELLED_OUT


@pytest.mark.parametrize("special", [True, False], ids=["special", "said to be ordinary"])
def test_brackets_written_out_are_text_whatever_the_tokenizers_file_says_of_them(tmp_path, special):
    content = json.loads(byte_tokenizer("[BOS]", "[EOS]", "[PAD]").to_str())
    for token in content["added_tokens"]:
        token["special"] = special
    tokenizer, text = Tokenizer.from_str(json.dumps(content)), "[BOS] a [EOS][PAD] [BOS"
    bos, *middle, eos = tokens_of(data.tokenize(make_config(write_jsonl(tmp_path / "a.jsonl", [text])), tokenizer))
    assert (bos, eos) == (0, 1) and not {0, 1, 2} & set(middle)
    assert tokenizer.decode(middle, skip_special_tokens=False) == text


def test_a_tokenizer_that_makes_eos_out_of_text_is_refused(tmp_path):
    """Like one whose EOS stands for unknown words too: law 3 would break without a word."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ["b"]))
    with pytest.raises(ValueError, match=r"makes its BOS or EOS, ids 0 and 0, out of .* data.bos_token and data.eos"):
        data.tokenize(config, tokenizer)


@pytest.fixture
def meddling(tmp_path) -> DataConfig:
    """DOCUMENTS, and a tokenizer.json that asks for special tokens, truncation and padding of its own."""
    tokenizer = byte_tokenizer(BOS, EOS)
    ids = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return make_config(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), tokenizer=str(tmp_path / "tokenizer.json"))


def test_the_tokenizers_own_rules_add_and_cut_nothing(meddling):
    plain = tokens_of(data.tokenize(meddling, byte_tokenizer(BOS, EOS)))
    assert tokens_of(data.tokenize(meddling, data.load_tokenizer(meddling))) == plain


def test_tokenizing_leaves_the_tokenizer_as_it_was(meddling):
    """Its JSON is part of the cache's key: a second call with the same object must find the same file."""
    tokenizer = data.load_tokenizer(meddling)
    assert data.tokenize(meddling, tokenizer) == data.tokenize(meddling, tokenizer)


@pytest.mark.parametrize(
    ("has", "config", "expected"),
    [
        (["<s>", "</s>"], {}, ("<s>", "</s>", "</s>")),
        (["<s>", "</s>", "<pad>"], {}, ("<s>", "</s>", "<pad>")),
        (["</s>", "<s>", EOS, BOS], {}, (BOS, EOS, EOS)),  # the order of the lists counts, not the tokenizer's
        (["<|endoftext|>"], {}, ("<|endoftext|>",) * 3),
        (["<s>", "[PAD]"], {}, ("<s>", "<s>", "[PAD]")),
        (["<s>", "</s>", "<a>", "<b>"], {"bos_token": "<a>", "eos_token": "<b>"}, ("<a>", "<b>", "<b>")),
        (["<s>", "</s>", "<a>"], {"eos_token": "<a>"}, ("<s>", "<a>", "<a>")),
        (["<a>"], {"eos_token": "<a>"}, ("<a>", "<a>", "<a>")),
        (["<a>"], {"bos_token": "<a>"}, ("<a>", "<a>", "<a>")),
        (["<s>", "</s>"], {"bos_token": "</s>"}, ("</s>", "</s>", "</s>")),
    ],
)
def test_special_tokens_are_the_configured_ones_else_the_first_known(has, config, expected):
    """Expected are BOS, EOS and pad; one that is missing is the other, and pad is EOS."""
    tokenizer = byte_tokenizer(*has)
    special = data.special_tokens(tokenizer, DataConfig(**config))
    assert special == SpecialTokens(*map(tokenizer.token_to_id, expected))


@pytest.mark.parametrize(
    ("has", "config", "words"),
    [
        (["<s>", "</s>"], {"bos_token": "<nope>"}, ["data.bos_token='<nope>'", "name a token"]),
        (["<s>", "</s>"], {"eos_token": "<nope>"}, ["data.eos_token='<nope>'", "name a token"]),
        (["<mine>"], {"tokenizer": "my.json"}, ["data.tokenizer='my.json'", BOS, "data.bos_token and data.eos_token"]),
    ],
)
def test_special_tokens_that_are_missing_are_refused_with_the_remedy(has, config, words):
    with pytest.raises(ValueError) as refusal:
        data.special_tokens(byte_tokenizer(*has), DataConfig(**config))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_vocabulary_size_covers_the_largest_id():
    assert data.vocabulary_size(Tokenizer(models.WordLevel({"a": 0, "b": 41}, unk_token="a"))) == 42
    assert data.vocabulary_size(byte_tokenizer(BOS, EOS)) == 258


# ---------------------------------------------------------------------------------------------------------------------
# A trained tokenizer


def test_training_a_tokenizer_twice_gives_the_same_one():
    texts = [f"{i * i} words, {i % 13} of them new {chr(200 + i)}" for i in range(400)]
    first, second = (data.train_tokenizer(texts, 600, 1) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert data.vocabulary_size(first) == 600


def test_a_trained_tokenizer_gives_any_text_back():
    tokenizer = data.train_tokenizer(["only ASCII was seen in training, " * 9] * 9, 300, 1)
    tokenizer.encode_special_tokens = True
    everything = "".join(chr(i) for i in (*range(0xD800), *range(0xE000, 0x11000), 0x1F600, 0x10FFFF))
    for text in (everything, *DOCUMENTS):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("letters", ["ab ", "漢字 "], ids=["one byte a letter", "three bytes a letter"])
def test_a_tokenizer_is_trained_on_no_more_mebibytes_than_asked(letters):
    enough = [letters * 100] * math.ceil(2**20 / len(letters.encode()) / 100)
    unseen = ["zebra quagga okapi"] * 2000
    trained = [data.train_tokenizer(texts, 300, 1) for texts in (enough, [*enough, *unseen], [*unseen, *enough])]
    assert trained[0].to_str() == trained[1].to_str()
    assert trained[0].to_str() != trained[2].to_str()


def test_a_tokenizer_is_trained_once_for_the_same_documents_and_size(tmp_path, monkeypatch, cache):
    file = tmp_path / "a.jsonl"
    config = make_config(write_jsonl(file, DOCUMENTS), tokenizer_vocab_size=300)
    first = data.load_tokenizer(config).to_str()
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_tokenizer", None)
        assert data.load_tokenizer(config).to_str() == first
    larger = make_config(str(file), tokenizer_vocab_size=320)
    assert data.vocabulary_size(data.load_tokenizer(larger)) == 320
    write_jsonl(file, [*DOCUMENTS, "other text " * 100])
    assert data.load_tokenizer(config).to_str() != first
    assert len(list(cache.glob("tokenizer-*"))) == 3, "one file each, and no unfinished one"


# ---------------------------------------------------------------------------------------------------------------------
# The cache of tokens


def files_of(cache: Path, pattern: str) -> list[Path]:
    return sorted(path for path in cache.rglob(pattern) if path.is_file())


def test_tokenizing_happens_once_for_the_same_documents_and_tokenizer(tmp_path, monkeypatch, cache):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    paths = data.tokenize(config, byte_tokenizer(BOS, EOS))
    written = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.setattr(data, "encode_documents", None)
    assert data.tokenize(config, byte_tokenizer(BOS, EOS)) == paths
    assert [path.stat().st_mtime_ns for path in paths] == written
    assert len(paths) == math.ceil(len(DOCUMENTS) / 60)
    assert files_of(cache / paths[0].parent.name, "*") == paths


def test_another_text_tokenizer_or_special_token_gives_another_file(tmp_path):
    file = tmp_path / "a.jsonl"
    config = make_config(write_jsonl(file, ["some text"]))
    tokenizer = byte_tokenizer("<s>", "</s>", "<a>")
    others = byte_tokenizer("<s>", "</s>", "<a>", "<b>"), byte_tokenizer("</s>", "<s>", "<a>")  # same ids, other ids
    paths = [data.tokenize(config, each) for each in (tokenizer, *others)]
    paths.append(data.tokenize(make_config(str(file), eos_token="<a>"), tokenizer))
    write_jsonl(file, ["same size"])
    paths.append(data.tokenize(config, tokenizer))
    assert len({path.parent for (path,) in paths}) == 5
    assert tokenizer.decode(tokens_of(paths[0])) == "some text"
    assert tokenizer.decode(tokens_of(paths[4])) == "same size"


def test_rows_of_another_length_or_layout_share_the_tokens(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    configs = [make_config(file), make_config(file, seq_len=32), make_config(file, layout="pack", val_fraction=0.5)]
    assert len({tuple(data.tokenize(config, byte_tokenizer(BOS, EOS))) for config in configs}) == 1


def test_splits_of_a_dataset_do_not_share_their_tokens(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "folder" / f"{split}.jsonl", [split])
    tokenizer = byte_tokenizer(BOS, EOS)
    for split in ("train", "test"):
        path = data.tokenize(make_config(str(tmp_path / "folder"), split=split), tokenizer)
        assert tokenizer.decode(tokens_of(path)) == split


def as_if_killed(monkeypatch, after: int) -> list[str]:
    """`encode_documents` stops the process after so many batches; returns the list of texts that it is given."""
    encode, seen, calls = data.encode_documents, [], []

    def encode_or_stop(texts, *arguments):
        calls.append(len(texts))
        if len(calls) > after:
            raise KeyboardInterrupt
        seen.extend(texts)
        return encode(texts, *arguments)

    monkeypatch.setattr(data, "encode_documents", encode_or_stop)
    return seen


def test_tokenizing_that_is_killed_goes_on_after_the_last_finished_part(tmp_path, monkeypatch):
    texts = [f"document {i}" for i in range(500)]
    config, tokenizer = make_config(write_jsonl(tmp_path / "a.jsonl", texts)), byte_tokenizer(BOS, EOS)
    with monkeypatch.context() as patch:
        as_if_killed(patch, after=10)
        with pytest.raises(KeyboardInterrupt):
            data.tokenize(config, tokenizer)
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    finished = {path: path.stat().st_mtime_ns for path in files_of(folder, "*.arrow")}
    assert [path.name for path in finished] == [f"{first:012d}.arrow" for first in (0, 60, 120)]
    (folder / ".tmp-of-a-killed-process").write_bytes(b"half")
    seen = as_if_killed(monkeypatch, after=1000)
    corpus = make_corpus(config, tokenizer)
    assert sorted(seen) == sorted(texts[180:])
    assert texts_of(corpus.train, tokenizer, corpus.special.eos) == texts
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files_of(folder, ".tmp-*") == []


def test_what_another_process_is_writing_stays(tmp_path):
    for name in ("of-a-killed-process", "of-a-living-one"):
        (tmp_path / f".tmp-{name}").write_bytes(b"half")
    (tmp_path / ".tmp-just-opened").touch()
    with (tmp_path / ".tmp-of-a-living-one").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        data.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.glob(".tmp-*")} == {".tmp-of-a-living-one", ".tmp-just-opened"}


def tokenize_in_a_process(cache: Path, config: DataConfig, start: Any) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    data.PART_DOCUMENTS = 60
    start.wait()
    data.tokenize(config, byte_tokenizer(BOS, EOS))


def test_processes_that_tokenize_the_same_at_the_same_time_do_not_disturb_each_other(tmp_path, cache):
    texts, spawn = [f"document {i}" for i in range(3000)], mp.get_context("spawn")
    config, start = make_config(write_jsonl(tmp_path / "a.jsonl", texts)), spawn.Barrier(2)
    data.load_documents(config)
    processes = [spawn.Process(target=tokenize_in_a_process, args=(cache, config, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "encode_documents", None)
        corpus = make_corpus(config, byte_tokenizer(BOS, EOS))
    assert texts_of(corpus.train, byte_tokenizer(BOS, EOS), corpus.special.eos) == texts
    assert len(files_of(cache, "*/0*.arrow")) == 50 and files_of(cache, ".tmp-*") == []


def test_documents_are_encoded_in_batches_of_limited_size(monkeypatch):
    monkeypatch.setattr(data, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(data, "BATCH_BYTES", 10)
    texts = ["é" * 4, "xx", "x", None, None, "y" * 50, "", "z", *[None] * 7, ""]
    batches = list(data.batches_of(texts))
    assert [batch for batch, _, _ in batches] == [["é" * 4, "xx"], ["x"], ["y" * 50], ["", "z"], [""]]
    assert [num_bytes for _, num_bytes, _ in batches] == [[8, 2], [1], [50], [0, 1], [0]]
    assert [read for *_, read in batches] == [2, 3, 1, 5, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Sources


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


ANY = ["one", "", "  ", "two\nlines é 😀"]  # what formats with rows can hold
LINES = ["one", "", "  ", "", "two é 😀", ""]  # an empty line is no document


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda f: write_jsonl(f / "a.jsonl", ANY), ANY),
        (lambda f: write_gzip(f / "b.jsonl.gz", write_jsonl(f / "a.jsonl", ANY)), ANY),
        (lambda f: write_parquet(f / "a.parquet", ANY), ANY),
        (lambda f: write_lines(f / "a.json", [json.dumps([{"text": text} for text in ANY])]), ANY),
        (lambda f: write_lines(f / "a.txt", LINES), ["one", "  ", "two é 😀"]),
        (lambda f: write_gzip(f / "b.txt.gz", write_lines(f / "a.txt", LINES)), ["one", "  ", "two é 😀"]),
    ],
    ids=["jsonl", "jsonl.gz", "parquet", "json", "txt", "txt.gz"],
)
def test_documents_of_a_file(tmp_path, write, expected):
    tokenizer, config = byte_tokenizer(BOS, EOS), make_config(write(tmp_path))
    assert list(data.load_documents(config)[0]["text"]) == expected
    assert texts_of(make_corpus(config, tokenizer).train, tokenizer, tokenizer.token_to_id(EOS)) == expected


@pytest.mark.parametrize("pattern", ["", "/*{}"], ids=["folder", "glob"])
@pytest.mark.parametrize(
    ("write", "suffix"), [(write_jsonl, ".jsonl"), (write_parquet, ".parquet"), (write_lines, ".txt")]
)
def test_documents_of_several_files(tmp_path, pattern, write, suffix):
    (tmp_path / "folder").mkdir()
    for name, texts in {"1": ["a", "", "b"], "2": ["c"]}.items():
        write(tmp_path / "folder" / (name + suffix), texts)
    documents, _ = data.load_documents(make_config(f"{tmp_path}/folder{pattern.format(suffix)}"))
    assert list(documents["text"]) == (["a", "b", "c"] if suffix == ".txt" else ["a", "", "b", "c"])


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_documents_of_another_column(tmp_path, write):
    file = write(tmp_path / f"a{'.parquet' if write is write_parquet else '.jsonl'}", ANY, "body")
    documents, _ = data.load_documents(make_config(file, text_column="body"))
    assert list(documents["text"]) == ANY


def test_two_columns_of_one_file_do_not_share_their_tokens(tmp_path):
    file, tokenizer = tmp_path / "a.jsonl", byte_tokenizer(BOS, EOS)
    file.write_text(json.dumps({"text": "of text", "body": "of body"}) + "\n")
    for column in ("text", "body"):
        path = data.tokenize(make_config(str(file), text_column=column), tokenizer)
        assert tokenizer.decode(tokens_of(path)) == f"of {column}"


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """What stands in for Python's standard library: `root` lies in a folder named test itself."""
    root = tmp_path / "test" / "lib"
    files = {"b.py": "b = 1\r\n", "a.py": "a = 'é'\n", "pkg/c.py": "", "pkg/tests/d.py": "d", "a/z.py": "z\0"}
    skipped = ["site-packages/x.py", "dist-packages/x.py", "test/x.py", "pkg/test/x.py", "pkg/site-packages/y/x.py"]
    for name, text in {**files, **dict.fromkeys([*skipped, "notes.txt", "c.pyc"], "skipped")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "pkg" / "latin.py").write_bytes("# é".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"stdlib": str(root)})
    return root


def test_stdlib_is_its_python_files_in_sorted_order_without_tests_and_packages(library):
    texts, not_utf8 = data.stdlib_documents()
    names = sorted(["a.py", "a/z.py", "b.py", "pkg/c.py", "pkg/tests/d.py"], key=lambda name: library / name)
    assert texts == [(library / name).read_bytes().decode() for name in names]
    assert not_utf8 == 1


def test_stdlib_says_how_many_files_it_skipped_and_is_another_data_set_when_a_file_changes(library, capsys):
    documents, identity = data.load_documents(DataConfig(dataset="stdlib"), show_skipped=True)
    assert list(documents["text"]) == data.stdlib_documents()[0]
    assert "skipped 1 files" in capsys.readouterr().err
    assert data.load_documents(DataConfig(dataset="stdlib"))[1] == identity
    assert capsys.readouterr().err == ""
    (library / "b.py").write_text("b = 2\n")
    assert data.load_documents(DataConfig(dataset="stdlib"))[1] != identity


# ---------------------------------------------------------------------------------------------------------------------
# Law 7: what is refused, with value, rule and remedy


def frame_of_zstandard(content: bytes) -> bytes:
    """One uncompressed block (RFC 8878), as there may be no package that writes it."""
    header = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(content)]) + header + content


@pytest.fixture
def broken(tmp_path, monkeypatch) -> None:
    """The current folder holds files that cannot be used, or not in every way."""
    monkeypatch.chdir(tmp_path)
    files = {"empty.txt": b"", "blank.txt": b"\n\n\n", "empty.jsonl": b"", "latin.txt": "é".encode("latin-1")}
    files |= {"not.jsonl": b"{not", "not.parquet": b"not", "lists.jsonl": b'{"text": ["a"]}\n', "a.rtf": b"text"}
    files |= {"latin.jsonl": b'{"text": "a"}\n{"text": "\xe9"}\n', "half.jsonl": b'{"text": "a \\ud800 b"}\n'}
    files |= {"mixed.jsonl": b'{"text": "a"}\n{"text": 3}\n', "torn.jsonl": b'{"text": "a"}\n{"text": "b"'}
    files |= {"folder/a.jsonl": b'{"text": "a"}\n', "a.jsonl.zst": frame_of_zstandard(b'{"text": "a"}\n')}
    for folder in ("folder", "bare"):
        Path(folder).mkdir()
    for name, content in files.items():
        Path(name).write_bytes(content)
    write_parquet(Path("a.parquet"), ["a"])
    write_parquet(Path("empty.parquet"), [])
    nulls = datasets.Dataset.from_dict({"text": [None]}, features=datasets.Features({"text": datasets.Value("string")}))
    nulls.to_parquet("nulls.parquet")
    nulls.save_to_disk("saved")


MUST_BE = 'it must be "stdlib"'
NOTHING = "(no documents|at least one document|empty)"
ZSTANDARD = importlib.util.find_spec("zstandard")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": "nope.txt"}, MUST_BE),
        ({"dataset": "nope"}, MUST_BE),
        ({"dataset": "nope*.jsonl"}, MUST_BE),
        ({"dataset": "bare"}, MUST_BE),
        ({"dataset": "some/corpus"}, MUST_BE),  # of the Hub, which is out of reach
        ({"dataset": "saved"}, MUST_BE),
        ({"dataset": "a.rtf"}, MUST_BE),
        ({"dataset": ""}, MUST_BE),
        ({"dataset": "empty.txt"}, NOTHING),
        ({"dataset": "blank.txt"}, NOTHING),
        ({"dataset": "empty.jsonl"}, NOTHING),
        ({"dataset": "empty.parquet"}, NOTHING),
        ({"dataset": "nulls.parquet"}, NOTHING),
        ({"dataset": "latin.txt"}, "(?i:utf.?8)"),
        ({"dataset": "latin.jsonl"}, r"document 1 \(from 0\) is not UTF-8.*convert or remove"),
        ({"dataset": "half.jsonl"}, "surrogate"),
        ({"dataset": "torn.jsonl"}, "JSON"),
        ({"dataset": "not.jsonl"}, "JSON"),
        ({"dataset": "not.parquet"}, "(?i:parquet file)"),
        ({"dataset": "folder", "split": "nope"}, "nope.*train"),
        ({"dataset": "folder", "subset": "nope"}, "nope.*default"),
        ({"text_column": "body", "dataset": "a.parquet"}, "a.parquet.* n, text"),
        ({"text_column": "n", "dataset": "a.parquet"}, "int64, not text: name a column of strings"),
        ({"text_column": "text", "dataset": "mixed.jsonl"}, "not text: name a column of strings"),
        ({"text_column": "text", "dataset": "lists.jsonl"}, "not text: name a column of strings"),
        pytest.param(
            {"dataset": "a.jsonl.zst"}, "zst", marks=pytest.mark.skipif(bool(ZSTANDARD), reason="can be read")
        ),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_documents_that_cannot_be_used_are_refused_by_name(broken, config, message):
    """The message starts with the first key of `config` and its value."""
    key, value = next(iter(config.items()))
    with pytest.raises(ValueError, match=rf"(?s)^data\.{key}='?{re.escape(value)}'?.*{message}"):
        make_corpus(make_config(**config, val_fraction=0.01), byte_tokenizer(BOS, EOS))


@pytest.mark.parametrize("error", [datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError])
def test_a_hub_id_that_cannot_be_fetched_is_refused_by_name(monkeypatch, error):
    def unreachable(*_, **__):
        raise error("out of reach")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"data\.dataset='some/corpus' cannot be loaded: out of reach\nit must be"):
        data.load_documents(make_config("some/corpus"))


def test_a_tokenizer_of_the_hub_that_is_out_of_reach_is_refused_by_name():
    with pytest.raises(ValueError, match=r"(?s)^data.tokenizer='some/model' cannot be loaded: .*it must be"):
        data.load_tokenizer(DataConfig(tokenizer="some/model"))


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON", '{"model": {"type": "Nope"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"(?s)data.tokenizer=.*tokenizer.json' cannot be loaded: .*it must be"):
        data.load_tokenizer(DataConfig(tokenizer=str(file)))


# ---------------------------------------------------------------------------------------------------------------------
# Order, and law 8


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


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
    orders = [tuple(epoch_order(100, seed, epoch).tolist()) for seed in (0, 1, 12) for epoch in (0, 1, 2)]
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
    order = epoch_order(num_rows, 0, 0)
    dealt = [deal(order, micro_batch_size, dp_rank, dp_size) for dp_rank in range(dp_size)]
    counts = Counter(flat(map(flat, dealt)))
    padding = counts.pop(-1, 0)
    assert counts == Counter(range(num_rows))
    assert padding < dp_size * micro_batch_size
    assert len({len(batches) for batches in dealt}) == 1, "a rank would wait for ever"
    assert {len(batch) for batches in dealt for batch in batches} == {micro_batch_size}


# ---------------------------------------------------------------------------------------------------------------------
# Validation split


TEXTS = [f"document number {i}" for i in range(200)]


@pytest.mark.parametrize("fraction", [0.005, 0.25, 0.5, 0.995])
def test_validation_and_training_share_no_document_and_lose_none(tmp_path, layout, fraction):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_fraction=fraction, layout=layout)
    tokenizer = byte_tokenizer(BOS, EOS)
    corpus = make_corpus(config, tokenizer)
    train, held_out = (texts_of(rows, tokenizer, corpus.special.eos) for rows in (corpus.train, corpus.validation))
    assert len(held_out) == round(200 * fraction)
    assert sorted(train + held_out) == sorted(TEXTS)
    for rows, texts in ((corpus.train, train), (corpus.validation, held_out)):
        assert rows.num_bytes == sum(map(len, texts))
        assert rows.num_targets == sum(len(text) + 1 for text in texts)


def test_validation_is_spread_over_the_documents_and_the_same_in_every_run(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_fraction=0.25)
    tokenizer, splits = byte_tokenizer(BOS, EOS), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        corpus = make_corpus(config, tokenizer)
        splits.append(texts_of(corpus.validation, tokenizer, corpus.special.eos))
    assert splits[0] == splits[1]
    assert splits[0] not in (TEXTS[:50], TEXTS[-50:])


def test_no_validation_without_a_share(tmp_path):
    assert make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS)), byte_tokenizer(BOS)).validation is None


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_share_that_leaves_one_side_empty_is_refused(tmp_path, fraction):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_fraction=fraction)
    with pytest.raises(ValueError, match=rf"data.val_fraction={fraction} of 200 documents .* set it to 0"):
        make_corpus(config, byte_tokenizer(BOS, EOS))


def val_config(tmp_path: Path, **changes) -> DataConfig:
    return make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), **changes)


def load_all(config: DataConfig, tokenizer: Tokenizer) -> data.Corpus:
    return data.load_corpus(config, tokenizer, *data.tokenize_all(config, tokenizer))


def test_a_validation_set_of_its_own_leaves_all_documents_to_training(tmp_path, layout):
    """Also with a val_fraction, which it replaces."""
    others, tokenizer = [f"other document {i}" for i in range(30)], byte_tokenizer(BOS, EOS)
    others_file = write_jsonl(tmp_path / "b.jsonl", others)
    config = val_config(tmp_path, val_dataset=others_file, val_fraction=0.5, layout=layout)
    corpus = load_all(config, tokenizer)
    assert texts_of(corpus.train, tokenizer, corpus.special.eos) == TEXTS
    assert texts_of(corpus.validation, tokenizer, corpus.special.eos) == others
    assert corpus.validation.num_bytes == sum(map(len, others))


def test_a_validation_set_can_be_another_split_of_the_same_dataset(tmp_path):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "folder" / f"{split}.jsonl", [split])
    tokenizer = byte_tokenizer(BOS, EOS)
    corpus = load_all(make_config(str(tmp_path / "folder"), val_split="validation"), tokenizer)
    texts = [texts_of(rows, tokenizer, corpus.special.eos) for rows in (corpus.train, corpus.validation)]
    assert texts == [["train"], ["validation"]]


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({}, None),
        ({"val_dataset": "b"}, ("b", "", "train")),
        ({"val_dataset": "b", "val_subset": "c", "val_split": "test"}, ("b", "c", "test")),
        ({"val_split": "test"}, ("a", "s", "test")),
        ({"val_subset": "c"}, ("a", "c", "train")),
    ],
)
def test_what_is_not_said_of_the_validation_set_is_the_training_sets(config, source):
    found = data.validation_source(DataConfig(dataset="a", subset="s", **config))
    assert (found and (found.dataset, found.subset, found.split)) == source


def test_the_fingerprint_tells_one_validation_set_from_another_and_from_none(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "bc"]
    configs = [val_config(tmp_path, val_dataset=file) for file in ("", *files)]
    assert len({load_all(config, byte_tokenizer(BOS, EOS)).fingerprint for config in configs}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_dataset": "nope.jsonl"}, r"validation set that data.val_\* name: data.dataset='nope.jsonl' cannot be"),
        ({"val_dataset": "{folder}/a.jsonl"}, "name the training documents"),
        ({"val_split": "test"}, "name the training documents"),  # a single file has one split only
        ({"val_dataset": "{folder}/empty.jsonl"}, "validation documents are empty, all of them"),
    ],
)
def test_a_validation_set_that_is_none_is_refused(tmp_path, changes, message):
    write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    changes = {key: value.format(folder=tmp_path) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        load_all(val_config(tmp_path, **changes), byte_tokenizer(BOS, EOS))


class PaysByTheByte(torch.nn.Module):
    """Its loss is 2 bits for every byte of text, however the text is cut into tokens; EOS is free."""

    def __init__(self, tokenizer: Tokenizer, eos: int):
        super().__init__()
        pieces = [tokenizer.decode([i]) if i != eos else "" for i in range(data.vocabulary_size(tokenizer))]
        self.cost = torch.tensor([2 * math.log(2) * len(piece) for piece in pieces], dtype=torch.float64)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return self.cost[targets[targets != IGNORE_INDEX]].sum()


def evaluate_with(tokenizer_json: str, config: DataConfig, cache: str) -> dict[str, float]:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    corpus, device = load_all(config, tokenizer), torch.device("cpu")
    settings = configs.Config(data=config, train=configs.TrainConfig(global_batch_size=6, micro_batch_size=3))
    mesh = parallel.build_mesh(parallel.ParallelConfig(tp=1), device)
    return train.evaluate(PaysByTheByte(tokenizer, corpus.special.eos), mesh, settings, corpus.validation, device)


def test_bits_per_byte_compare_between_tokenizers(tmp_path, ranks, cache, layout):
    """A model that pays 2 bits a byte gets 2, while its loss per token depends on the tokenizer and is no measure."""
    config = val_config(tmp_path, val_fraction=0.25, layout=layout)
    tokenizers = byte_tokenizer(BOS, EOS), data.train_tokenizer(TEXTS, 300, 1)
    coarse, fine = (ranks(2, evaluate_with, each.to_str(), config, str(cache))[0] for each in tokenizers)
    assert coarse["val_bits_per_byte"] == pytest.approx(2.0, rel=1e-9)  # sums of float64
    assert fine["val_bits_per_byte"] == pytest.approx(2.0, rel=1e-9)
    assert abs(coarse["val_loss"] / fine["val_loss"] - 1) > 0.2


def test_the_fingerprint_changes_with_the_documents(tmp_path):
    variants = [["a", "bb", "c"], ["a", "bb"], ["bb", "a", "c"], ["a", "bb", "ccc"], ["a", "bb", "c", ""]]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", texts) for i, texts in enumerate(variants)]
    fingerprints = [make_corpus(make_config(file), byte_tokenizer(BOS, EOS)).fingerprint for file in files]
    assert len(set(fingerprints)) == len(variants)
    assert make_corpus(make_config(files[0], seq_len=64), byte_tokenizer(BOS, EOS)).fingerprint == fingerprints[0]


# ---------------------------------------------------------------------------------------------------------------------
# Loader


def test_a_stream_travels_to_a_worker_as_its_path(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", [LONG] * 50))
    paths = data.tokenize(config, byte_tokenizer(BOS, EOS))
    sent = pickle.dumps(data.TokenStream(paths))
    assert len(sent) < 1000
    stream = pickle.loads(sent)
    assert stream.read(0, 100).tolist() == tokens_of(paths)[:100]


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2, "layout": "pack", "document_mask": True}])
def test_the_loader_gives_the_batches_in_the_order_asked_for(tmp_path, changes):
    """With workers as without: what a run sees does not depend on how it is loaded."""
    config = make_config(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), **changes)
    rows = make_corpus(config, byte_tokenizer(BOS, EOS)).train
    batches = [epoch_order(len(rows), 0, epoch)[:3].tolist() for epoch in range(8)] + [[-1, 0], [5]]
    loaded = list(data.make_loader(rows, iter(batches), config.num_workers, torch.device("cpu")))
    expected = [rows.__getitems__(batch) for batch in batches]
    assert len(loaded) == len(expected)
    for got, wanted in zip(loaded, expected, strict=True):
        assert all(map(torch.equal, got, wanted))


def test_the_loader_pins_memory_for_a_gpu_only():
    assert not data.make_loader(range(1), [[0]], 0, torch.device("cpu")).pin_memory
    assert data.make_loader(range(1), [[0]], 0, torch.device("cuda", 1)).pin_memory


# ---------------------------------------------------------------------------------------------------------------------
# A look at the data


def test_the_statistics_are_those_of_the_rows(tmp_path, layout):
    texts = [*TEXTS, "", LONG]
    config = val_config(tmp_path, layout=layout)
    config.dataset = write_jsonl(tmp_path / "b.jsonl", texts)
    corpus = make_corpus(config, byte_tokenizer(BOS, EOS))
    lines = data.describe(config, corpus, byte_tokenizer(BOS, EOS), global_batch_size=7, seed=3).splitlines()
    numbers = {line.split()[0]: re.findall(r"[\d.,]+\d|\d", line) for line in lines[:7]}
    input_ids, targets = corpus.train.__getitems__(range(len(corpus.train)))
    real = targets != IGNORE_INDEX
    kept = flat(epoch_rows(len(corpus.train), 7, seed=3, epoch=0))
    lost = int(real.sum() - real[kept].sum())
    # what lies behind the last target of a row is padding, but for a BOS that the next row starts with
    padding = sum(int(row.flip(0).int().argmax()) for row in real)
    padding -= int((~real[:-1, -1] & (input_ids[1:, 0] == corpus.special.bos)).sum()) if layout == "pack" else 0
    assert numbers["documents"][0] == str(len(texts))
    assert numbers["tokens"][0] == f"{int(real.sum()):,}"
    assert numbers["rows"][0] == str(len(corpus.train))
    assert float(numbers["padding"][0]) == pytest.approx(100 * padding / real.numel(), abs=0.006)
    assert numbers["epoch"][:4] == [str(len(kept) // 7), "7", str(len(corpus.train) - len(kept)), str(lost)]
    assert numbers["vocabulary"][:2] == [str(len(set("".join(texts))) + 2), "258"]
    histogram = {int(low.replace(",", "")): int(count) for low, _, _, count, *_ in map(str.split, lines[9:19])}
    assert histogram == {2**i: sum(2**i <= len(text) + 2 < 2 ** (i + 1) for text in texts) for i in range(1, 11)}


def test_rows_are_shown_with_bos_eos_and_padding(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ["0123456789", "a\nb"]))
    tokenizer = byte_tokenizer(BOS, EOS)
    rows = make_corpus(config, tokenizer).train
    assert [data.row_as_text(rows, row, tokenizer) for row in range(3)] == [
        f"row 0: {BOS}0123456 -> 7",
        f"row 1: 789 -> {EOS} [5 x padding]",
        f"row 2: {BOS}a↵b -> {EOS} [4 x padding]",
    ]
    assert data.row_as_text(rows, 1, tokenizer, most=2) == f"row 1: 7 [... 1 characters ...] 9 -> {EOS} [5 x padding]"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--data.dataset={folder}/a.jsonl"], 0, ["documents    198,", "row 0: <|begin_of_text|>document"]),
        (
            ["--data.dataset={folder}/a.jsonl", "--data.streaming=true", "--train.steps=100"],
            0,
            ["of {folder}/a.jsonl alone", "documents    198,", "validation   2 rows"],
        ),
        (["--data.dataset={folder}/nope.jsonl"], 2, ["error: data.dataset='{folder}/nope.jsonl' cannot be loaded"]),
        (["--data.seqlen=4"], 2, ["error: data.seqlen: there is no such key: did you mean data.seq_len?"]),
        (["--help"], 0, ["usage: data.py [CONFIG.toml]", "--data.val_dataset"]),
    ],
    ids=["documents", "streaming", "no such documents", "no such key", "help"],
)
def test_the_command_line_shows_the_data_or_one_message(tmp_path, arguments, status, words):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, data.__file__, *(argument.format(folder=tmp_path) for argument in arguments)]
    command += ["--data.tokenizer_vocab_size=300", f"--run.dir={tmp_path}/run"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    text = result.stdout if status == 0 else result.stderr
    assert all(word.format(folder=tmp_path) in text for word in words)
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()
