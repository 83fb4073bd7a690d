"""Documents and tokens: what is read, what is kept, and what is refused (law 7); without a network."""

import fcntl
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
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from documents import (
    BOS,
    DOCUMENTS,
    EOS,
    LONG,
    SPELLED_OUT,
    TEXTS,
    TOKENIZERS,
    batch_of,
    byte_tokenizer,
    load_all,
    make_config,
    make_corpus,
    texts_of,
    tokens_of,
    write_gzip,
    write_jsonl,
    write_lines,
    write_parquet,
)
from tokenizers import Tokenizer, models, processors
from torch import Tensor

import configs
import corpus
import parallel
import runtime.ranks
import train
from corpus import look, sources
from corpus import tokenizer as tokenizer_module
from corpus import tokens as tokens_module
from corpus.cache import remove_unfinished
from corpus.config import DataConfig
from corpus.sources import load_documents, stdlib_texts, validation_config
from corpus.tokenizer import SpecialTokens, load_tokenizer, special_tokens, train_tokenizer, vocabulary_size
from corpus.tokens import TokenFiles, batches_of, tokenize
from data import global_batches
from model import IGNORE_INDEX
from runtime.ranks import UserError

ROOT = Path(corpus.__file__).parent.parent
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> None:
    """A few dozen documents make several files of tokens, each of several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PART_DOCUMENTS", 60)
        patch.setattr(tokens_module, "BATCH_DOCUMENTS", 25)
        yield


@pytest.fixture(params=["pad", "pack"])
def layout(request) -> str:
    return request.param


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_written_out_in_a_document_are_text(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    config = make_config(write_jsonl(tmp_path / "a.jsonl", [SPELLED_OUT]))
    special = special_tokens(tokenizer, config)
    bos, *middle, eos = tokens_of(tokenize(config, tokenizer))
    assert (bos, eos) == (special.bos, special.eos)
    assert not {special.bos, special.eos, special.pad} & set(middle)
    assert tokenizer.decode(middle, skip_special_tokens=False) == SPELLED_OUT


@pytest.mark.parametrize("special", [True, False], ids=["special", "said to be ordinary"])
def test_brackets_written_out_are_text_whatever_the_tokenizers_file_says_of_them(tmp_path, special):
    content = json.loads(byte_tokenizer("[BOS]", "[EOS]", "[PAD]").to_str())
    for token in content["added_tokens"]:
        token["special"] = special
    tokenizer, text = Tokenizer.from_str(json.dumps(content)), "[BOS] a [EOS][PAD] [BOS"
    bos, *middle, eos = tokens_of(tokenize(make_config(write_jsonl(tmp_path / "a.jsonl", [text])), tokenizer))
    assert (bos, eos) == (0, 1) and not {0, 1, 2} & set(middle)
    assert tokenizer.decode(middle, skip_special_tokens=False) == text


def test_a_tokenizer_that_makes_eos_out_of_text_is_refused(tmp_path):
    """Like one whose EOS stands for unknown words too: law 3 would break without a word."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ["b"]))
    with pytest.raises(ValueError, match=r"makes its BOS or EOS, ids 0 and 0, out of .* data.bos_token and data.eos"):
        tokenize(config, tokenizer)


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
    plain = tokens_of(tokenize(meddling, byte_tokenizer(BOS, EOS)))
    assert tokens_of(tokenize(meddling, load_tokenizer(meddling))) == plain


def test_tokenizing_leaves_the_tokenizer_as_it_was(meddling):
    """Its JSON is part of the cache's key: a second call with the same object must find the same file."""
    tokenizer = load_tokenizer(meddling)
    assert tokenize(meddling, tokenizer) == tokenize(meddling, tokenizer)


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
    special = special_tokens(tokenizer, DataConfig(**config))
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
        special_tokens(byte_tokenizer(*has), DataConfig(**config))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_vocabulary_size_covers_the_largest_id():
    assert vocabulary_size(Tokenizer(models.WordLevel({"a": 0, "b": 41}, unk_token="a"))) == 42
    assert vocabulary_size(byte_tokenizer(BOS, EOS)) == 258


# ---------------------------------------------------------------------------------------------------------------------
# A trained tokenizer


def test_training_a_tokenizer_twice_gives_the_same_one():
    texts = [f"{i * i} words, {i % 13} of them new {chr(200 + i)}" for i in range(400)]
    first, second = (train_tokenizer(texts, 600, 1) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert vocabulary_size(first) == 600


def test_a_trained_tokenizer_gives_any_text_back():
    tokenizer = train_tokenizer(["only ASCII was seen in training, " * 9] * 9, 300, 1)
    tokenizer.encode_special_tokens = True
    everything = "".join(chr(i) for i in (*range(0xD800), *range(0xE000, 0x11000), 0x1F600, 0x10FFFF))
    for text in (everything, *DOCUMENTS):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("letters", ["ab ", "漢字 "], ids=["one byte a letter", "three bytes a letter"])
def test_a_tokenizer_is_trained_on_no_more_mebibytes_than_asked(letters):
    enough = [letters * 100] * math.ceil(2**20 / len(letters.encode()) / 100)
    unseen = ["zebra quagga okapi"] * 2000
    trained = [train_tokenizer(texts, 300, 1) for texts in (enough, [*enough, *unseen], [*unseen, *enough])]
    assert trained[0].to_str() == trained[1].to_str()
    assert trained[0].to_str() != trained[2].to_str()


def test_a_tokenizer_is_trained_once_for_the_same_documents_and_size(tmp_path, monkeypatch, cache):
    file = tmp_path / "a.jsonl"
    config = make_config(write_jsonl(file, DOCUMENTS), tokenizer_vocab_size=300)
    first = load_tokenizer(config).to_str()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "train_tokenizer", None)
        assert load_tokenizer(config).to_str() == first
    larger = make_config(str(file), tokenizer_vocab_size=320)
    assert vocabulary_size(load_tokenizer(larger)) == 320
    write_jsonl(file, [*DOCUMENTS, "other text " * 100])
    assert load_tokenizer(config).to_str() != first
    assert len(list(cache.glob("tokenizer-*"))) == 3, "one file each, and no unfinished one"


# ---------------------------------------------------------------------------------------------------------------------
# The cache of tokens


def files_of(cache: Path, pattern: str) -> list[Path]:
    return sorted(path for path in cache.rglob(pattern) if path.is_file())


def test_tokenizing_happens_once_for_the_same_documents_and_tokenizer(tmp_path, monkeypatch, cache):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    paths = tokenize(config, byte_tokenizer(BOS, EOS))
    written = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.setattr(tokens_module, "encode_documents", None)
    assert tokenize(config, byte_tokenizer(BOS, EOS)) == paths
    assert [path.stat().st_mtime_ns for path in paths] == written
    assert len(paths) == math.ceil(len(DOCUMENTS) / 60)
    assert files_of(cache / paths[0].parent.name, "*") == paths


def test_another_text_tokenizer_or_special_token_gives_another_file(tmp_path):
    file = tmp_path / "a.jsonl"
    config = make_config(write_jsonl(file, ["some text"]))
    tokenizer = byte_tokenizer("<s>", "</s>", "<a>")
    others = byte_tokenizer("<s>", "</s>", "<a>", "<b>"), byte_tokenizer("</s>", "<s>", "<a>")  # same ids, other ids
    paths = [tokenize(config, each) for each in (tokenizer, *others)]
    paths.append(tokenize(make_config(str(file), eos_token="<a>"), tokenizer))
    write_jsonl(file, ["same size"])
    paths.append(tokenize(config, tokenizer))
    assert len({path.parent for (path,) in paths}) == 5
    assert tokenizer.decode(tokens_of(paths[0])) == "some text"
    assert tokenizer.decode(tokens_of(paths[4])) == "same size"


def test_rows_of_another_length_or_layout_share_the_tokens(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    configs = [make_config(file), make_config(file, seq_len=32), make_config(file, layout="pack", val_fraction=0.5)]
    assert len({tuple(tokenize(config, byte_tokenizer(BOS, EOS))) for config in configs}) == 1


def test_splits_of_a_dataset_do_not_share_their_tokens(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "folder" / f"{split}.jsonl", [split])
    tokenizer = byte_tokenizer(BOS, EOS)
    for split in ("train", "test"):
        path = tokenize(make_config(str(tmp_path / "folder"), split=split), tokenizer)
        assert tokenizer.decode(tokens_of(path)) == split


def as_if_killed(monkeypatch, after: int) -> list[str]:
    """`encode_documents` stops the process after so many batches; returns the list of texts that it is given."""
    encode, seen, calls = tokens_module.encode_documents, [], []

    def encode_or_stop(texts, *arguments):
        calls.append(len(texts))
        if len(calls) > after:
            raise KeyboardInterrupt
        seen.extend(texts)
        return encode(texts, *arguments)

    monkeypatch.setattr(tokens_module, "encode_documents", encode_or_stop)
    return seen


def test_tokenizing_that_is_killed_goes_on_after_the_last_finished_part(tmp_path, monkeypatch):
    texts = [f"document {i}" for i in range(500)]
    config, tokenizer = make_config(write_jsonl(tmp_path / "a.jsonl", texts)), byte_tokenizer(BOS, EOS)
    with monkeypatch.context() as patch:
        as_if_killed(patch, after=10)
        with pytest.raises(KeyboardInterrupt):
            tokenize(config, tokenizer)
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    finished = {path: path.stat().st_mtime_ns for path in files_of(folder, "*.arrow")}
    assert [path.name for path in finished] == [f"{first:012d}.arrow" for first in (0, 60, 120)]
    (folder / ".tmp-of-a-killed-process").write_bytes(b"half")
    seen = as_if_killed(monkeypatch, after=1000)
    corpus = make_corpus(config, tokenizer)
    assert sorted(seen) == sorted(texts[180:])
    assert texts_of(corpus.source.rows, tokenizer, corpus.special.eos) == texts
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert files_of(folder, ".tmp-*") == []


def test_what_another_process_is_writing_stays(tmp_path):
    for name in ("of-a-killed-process", "of-a-living-one"):
        (tmp_path / f".tmp-{name}").write_bytes(b"half")
    (tmp_path / ".tmp-just-opened").touch()
    with (tmp_path / ".tmp-of-a-living-one").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.glob(".tmp-*")} == {".tmp-of-a-living-one", ".tmp-just-opened"}


def test_a_file_that_is_complete_is_nobodys_leftover_before_it_has_its_name(tmp_path, monkeypatch):
    """Another process that starts just now removes what is left behind and not locked."""
    texts, replace = ["one", "two"], Path.replace

    def replace_or_be_removed(path: Path, target: Path) -> Path:
        remove_unfinished(path.parent)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_or_be_removed)
    corpus = make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", texts)), byte_tokenizer(BOS, EOS))
    assert texts_of(corpus.source.rows, byte_tokenizer(BOS, EOS), corpus.special.eos) == texts


def tokenize_in_a_process(cache: Path, config: DataConfig, start: Any) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    tokens_module.PART_DOCUMENTS = 60
    start.wait()
    tokenize(config, byte_tokenizer(BOS, EOS))


def test_processes_that_tokenize_the_same_at_the_same_time_do_not_disturb_each_other(tmp_path, cache):
    texts, spawn = [f"document {i}" for i in range(3000)], mp.get_context("spawn")
    config, start = make_config(write_jsonl(tmp_path / "a.jsonl", texts)), spawn.Barrier(2)
    load_documents(config)
    processes = [spawn.Process(target=tokenize_in_a_process, args=(cache, config, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "encode_documents", None)
        corpus = make_corpus(config, byte_tokenizer(BOS, EOS))
    assert texts_of(corpus.source.rows, byte_tokenizer(BOS, EOS), corpus.special.eos) == texts
    assert len(files_of(cache, "*/0*.arrow")) == 50 and files_of(cache, ".tmp-*") == []


def test_documents_are_encoded_in_batches_of_limited_size(monkeypatch):
    monkeypatch.setattr(tokens_module, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(tokens_module, "BATCH_BYTES", 10)
    texts = ["é" * 4, "xx", "x", None, None, "y" * 50, "", "z", *[None] * 7, ""]
    batches = list(batches_of(texts))
    assert [batch for batch, _, _ in batches] == [["é" * 4, "xx"], ["x"], ["y" * 50], ["", "z"], [""]]
    assert [num_bytes for _, num_bytes, _ in batches] == [[8, 2], [1], [50], [0, 1], [0]]
    assert [read for *_, read in batches] == [2, 3, 1, 5, 5]


def test_a_document_larger_than_a_batch_is_whole_and_encoded_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "BATCH_BYTES", 1000)
    seen = as_if_killed(monkeypatch, after=1000)
    large = " ".join(map(str, range(20_000)))
    tokenizer, texts = byte_tokenizer(BOS, EOS), ["before", large, "after"]
    corpus = make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer)
    assert texts_of(corpus.source.rows, tokenizer, corpus.special.eos) == texts
    assert sorted(seen) == sorted(texts)


def test_a_null_is_no_document_and_an_empty_text_is_one(tmp_path):
    texts = ["first", *[None] * 250, "", "last", None]  # whole chunks of the stream are empty
    tokenizer = byte_tokenizer(BOS, EOS)
    corpus = make_corpus(make_config(write_jsonl(tmp_path / "a.jsonl", texts)), tokenizer)
    assert texts_of(corpus.source.rows, tokenizer, corpus.special.eos) == ["first", "", "last"]


def test_a_stream_reads_the_same_across_chunks(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(350)]))
    stream = TokenFiles(tokenize(config, byte_tokenizer(BOS, EOS)))
    whole = np.concatenate(stream.values)
    assert len(stream.values) > 2
    for border in stream.starts[1:-1]:
        for start, stop in [(border - 3, border), (border, border + 3), (border - 1, border + 1), (3, border + 1)]:
            assert stream.read(start, stop).tolist() == whole[start:stop].tolist()
    assert stream.read(0, len(whole)).tolist() == whole.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def all_of(documents: sources.Documents) -> list:
    return list(documents.texts(0, len(documents)))


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
    assert all_of(load_documents(config)) == expected
    assert texts_of(make_corpus(config, tokenizer).source.rows, tokenizer, tokenizer.token_to_id(EOS)) == expected


@pytest.mark.parametrize("pattern", ["", "/*{}"], ids=["folder", "glob"])
@pytest.mark.parametrize(
    ("write", "suffix"), [(write_jsonl, ".jsonl"), (write_parquet, ".parquet"), (write_lines, ".txt")]
)
def test_documents_of_several_files(tmp_path, pattern, write, suffix):
    (tmp_path / "folder").mkdir()
    for name, texts in {"1": ["a", "", "b"], "2": ["c"]}.items():
        write(tmp_path / "folder" / (name + suffix), texts)
    documents = load_documents(make_config(f"{tmp_path}/folder{pattern.format(suffix)}"))
    assert all_of(documents) == (["a", "b", "c"] if suffix == ".txt" else ["a", "", "b", "c"])


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_documents_of_another_column(tmp_path, write):
    file = write(tmp_path / f"a{'.parquet' if write is write_parquet else '.jsonl'}", ANY, "body")
    assert all_of(load_documents(make_config(file, text_column="body"))) == ANY


def test_two_columns_of_one_file_do_not_share_their_tokens(tmp_path):
    file, tokenizer = tmp_path / "a.jsonl", byte_tokenizer(BOS, EOS)
    file.write_text(json.dumps({"text": "of text", "body": "of body"}) + "\n")
    for column in ("text", "body"):
        path = tokenize(make_config(str(file), text_column=column), tokenizer)
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
    texts, not_utf8 = stdlib_texts()
    names = sorted(["a.py", "a/z.py", "b.py", "pkg/c.py", "pkg/tests/d.py"], key=lambda name: library / name)
    assert texts == [(library / name).read_bytes().decode() for name in names]
    assert not_utf8 == 1


def test_stdlib_says_how_many_files_it_skipped_and_is_another_data_set_when_a_file_changes(library, capsys):
    config, tokenizer = DataConfig(dataset="stdlib"), byte_tokenizer(BOS, EOS)
    documents = load_documents(config)
    assert all_of(documents) == stdlib_texts()[0]
    tokenize(config, tokenizer, show_progress=True)
    assert "skipped 1 files" in capsys.readouterr().err
    tokenize(config, tokenizer)
    assert load_documents(config).identity == documents.identity
    assert capsys.readouterr().err == ""
    (library / "b.py").write_text("b = 2\n")
    assert load_documents(config).identity != documents.identity


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": "a.parquet", "subset": "part"},
            "data.subset='part' with data.dataset='a.parquet', which has no sub",
        ),
        (
            {"dataset": "a.parquet", "split": "test"},
            "data.split='test' with data.dataset='a.parquet', which has no spl",
        ),
        ({"dataset": "folder/*.jsonl", "split": "test"}, "data.split='test' with data.dataset='folder/"),
        (
            {"dataset": "folder/*.jsonl", "split": "test", "streaming": True},
            "data.split='test' with data.dataset='fold",
        ),
        ({"dataset": "stdlib", "split": "test"}, "data.split='test' with data.dataset='stdlib', which has no splits"),
        (
            {"dataset": "stdlib", "subset": "part"},
            "data.subset='part' with data.dataset='stdlib', which has no subsets",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_part_of_what_has_no_parts_is_refused_by_whoever_asks_for_documents(broken, changes, message):
    """It would be ignored: the run would train on all of it. Before anything is tokenised or trained."""
    config = make_config(**changes, tokenizer_vocab_size=300)
    for ask in (load_tokenizer, sources.all_texts, lambda config: tokenize(config, byte_tokenizer(BOS, EOS))):
        with pytest.raises(UserError, match=f"^{re.escape(message)}.*: leave it out, or name a folder"):
            ask(config)
    with pytest.raises(UserError, match=message.partition("='")[0]):
        sources.stream_files(config)


@pytest.mark.parametrize(("name", "has"), [("a.md", "it has .md"), ("README", "it has README"), (None, "it has none")])
def test_a_folder_of_files_that_nobody_reads_says_what_is_read(tmp_path, name, has):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    if name:
        (tmp_path / "notes" / "deep" / name).write_text("# a heading")
    folder = str(tmp_path / "notes")
    with pytest.raises(UserError) as error:
        load_documents(make_config(folder))
    said = f"data.dataset={folder!r} cannot be loaded: no file of this folder is read, {has}"
    first, second = str(error.value).split("\n")
    assert first == said and all(suffix in second for suffix in (".txt", ".jsonl", ".json", ".parquet"))


@pytest.mark.parametrize("error", [datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError])
def test_a_hub_id_that_cannot_be_fetched_is_refused_by_name(monkeypatch, error):
    def unreachable(*_, **__):
        raise error("out of reach")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"data\.dataset='some/corpus' cannot be loaded: out of reach\nit must be"):
        load_documents(make_config("some/corpus"))


def test_a_tokenizer_of_the_hub_that_is_out_of_reach_is_refused_by_name():
    with pytest.raises(ValueError, match=r"(?s)^data.tokenizer='some/model' cannot be loaded: .*it must be"):
        load_tokenizer(DataConfig(tokenizer="some/model"))


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON", '{"model": {"type": "Nope"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"(?s)data.tokenizer=.*tokenizer.json' cannot be loaded: .*it must be"):
        load_tokenizer(DataConfig(tokenizer=str(file)))


# ---------------------------------------------------------------------------------------------------------------------
# Validation split


@pytest.mark.parametrize("fraction", [0.005, 0.25, 0.5, 0.995])
def test_validation_and_training_share_no_document_and_lose_none(tmp_path, layout, fraction):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_fraction=fraction, layout=layout)
    tokenizer = byte_tokenizer(BOS, EOS)
    corpus = make_corpus(config, tokenizer)
    train, held_out = (
        texts_of(rows, tokenizer, corpus.special.eos) for rows in (corpus.source.rows, corpus.validation.rows)
    )
    assert len(held_out) == round(200 * fraction)
    assert sorted(train + held_out) == sorted(TEXTS)
    for rows, texts in ((corpus.source.rows, train), (corpus.validation.rows, held_out)):
        assert rows.num_bytes == sum(map(len, texts))
        assert rows.num_targets == sum(len(text) + 1 for text in texts)


def test_validation_is_spread_over_the_documents_and_the_same_in_every_run(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), val_fraction=0.25)
    tokenizer, splits = byte_tokenizer(BOS, EOS), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        corpus = make_corpus(config, tokenizer)
        splits.append(texts_of(corpus.validation.rows, tokenizer, corpus.special.eos))
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


def test_a_validation_set_of_its_own_leaves_all_documents_to_training(tmp_path, layout):
    """Also with a val_fraction, which it replaces."""
    others, tokenizer = [f"other document {i}" for i in range(30)], byte_tokenizer(BOS, EOS)
    others_file = write_jsonl(tmp_path / "b.jsonl", others)
    config = val_config(tmp_path, val_dataset=others_file, val_fraction=0.5, layout=layout)
    corpus = load_all(config, tokenizer)
    assert texts_of(corpus.source.rows, tokenizer, corpus.special.eos) == TEXTS
    assert texts_of(corpus.validation.rows, tokenizer, corpus.special.eos) == others
    assert corpus.validation.rows.num_bytes == sum(map(len, others))


def test_a_validation_set_can_be_another_split_of_the_same_dataset(tmp_path):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "folder" / f"{split}.jsonl", [split])
    tokenizer = byte_tokenizer(BOS, EOS)
    corpus = load_all(make_config(str(tmp_path / "folder"), val_split="validation"), tokenizer)
    texts = [texts_of(rows, tokenizer, corpus.special.eos) for rows in (corpus.source.rows, corpus.validation.rows)]
    assert texts == [["train"], ["validation"]]


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({}, None),
        ({"val_dataset": "b"}, ("b", "", "train")),
        ({"val_dataset": "b", "val_subset": "c", "val_split": "test"}, ("b", "c", "test")),
        ({"val_split": "test"}, ("a", "s", "test")),
        ({"val_subset": "c"}, ("a", "c", "train")),
        ({"split": "all", "val_subset": "c"}, ("a", "c", "all")),
        ({"split": "all", "val_dataset": "b.jsonl"}, ("b.jsonl", "", "train")),  # a file has no splits
    ],
)
def test_what_is_not_said_of_the_validation_set_is_the_training_sets(config, source):
    found = validation_config(DataConfig(dataset="a", subset="s", **config))
    assert (found and (found.dataset, found.subset, found.split)) == source


def test_the_fingerprint_tells_one_validation_set_from_another_and_from_none(tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name]) for name in "bc"]
    configs = [val_config(tmp_path, val_dataset=file) for file in ("", *files)]
    assert len({load_all(config, byte_tokenizer(BOS, EOS)).fingerprint for config in configs}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_dataset": "nope.jsonl"}, r"validation set that data.val_\* name: data.dataset='nope.jsonl' cannot be"),
        ({"val_dataset": "{folder}/a.jsonl"}, "name training documents"),
        ({"val_split": "test"}, r"validation set .* name: data.split='test' with .*a.jsonl', which has no splits"),
        ({"val_subset": "part"}, r"validation set .* name: data.subset='part' with .*, which has no subsets"),
        ({"val_dataset": "{folder}/b.jsonl", "val_split": "test"}, "data.split='test' with .*b.jsonl', which has no"),
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
        pieces = [tokenizer.decode([i]) if i != eos else "" for i in range(vocabulary_size(tokenizer))]
        self.rope = torch.zeros(0)  # evaluation asks for its device
        self.cost = torch.tensor([2 * math.log(2) * len(piece) for piece in pieces], dtype=torch.float64)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        return self.cost[targets[targets != IGNORE_INDEX]].sum()


def evaluate_with(tokenizer_json: str, config: DataConfig, cache: str) -> dict[str, float]:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    found, device = load_all(config, tokenizer), torch.device("cpu")
    settings = configs.TrainConfig(global_batch_size=6, micro_batch_size=3)
    mesh, model = (
        parallel.build_mesh(parallel.ParallelConfig(tp=1), device),
        PaysByTheByte(tokenizer, found.special.eos),
    )
    return train.evaluate(model, mesh, settings, found.validation, lambda: False)


def test_bits_per_byte_compare_between_tokenizers(tmp_path, ranks, cache, layout):
    """A model that pays 2 bits a byte gets 2, while its loss per token depends on the tokenizer and is no measure."""
    config = val_config(tmp_path, val_fraction=0.25, layout=layout)
    tokenizers = byte_tokenizer(BOS, EOS), train_tokenizer(TEXTS, 300, 1)
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
# As training opens it: all ranks together


def open_and_look(cache: str, config: DataConfig, run_dir: str, tokenizer_json: Path | None = None) -> dict:
    """What a rank sees, and the largest object that was gathered or broadcast."""
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    sizes, gather = [], dist.all_gather_object

    def listen(values: list, value: Any, *arguments: Any, **more: Any) -> None:
        sizes.append(len(pickle.dumps(value)))
        gather(values, value, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", listen)
        try:
            with corpus.opened(config, Path(run_dir), 4, None, lambda: 0, tokenizer_json) as found:
                return {
                    "tokenizer": found.tokenizer_json,
                    "vocabulary": found.vocabulary,
                    "fingerprint": found.fingerprint,
                    "num_rows": found.num_rows,
                    "counts": found.source.counts,
                    "validation": found.validation and len(found.validation.open(0)),
                    "gathered": max(sizes),
                }
        except UserError as error:
            return {"error": str(error)}


@pytest.mark.parametrize("streaming", [False, True])
def test_all_ranks_open_the_same_corpus_and_no_tokenizer_is_gathered(tmp_path, ranks, cache, streaming):
    """What each rank gathers from all others grows with their number: a tokenizer may have 10 MB."""
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer_vocab_size=300, val_fraction=0.25)
    config.streaming = streaming
    found = ranks(2, open_and_look, str(cache), config, str(tmp_path / "run"))
    assert found[0] == found[1]
    assert (found[0]["vocabulary"], found[0]["num_rows"]) == (300, None if streaming else found[0]["counts"][0])
    assert found[0]["tokenizer"] == load_tokenizer(config).to_str() and len(found[0]["tokenizer"]) > 3000
    assert found[0]["validation"] > 0
    assert found[0]["gathered"] < 1000
    assert not (tmp_path / "run").exists(), "nothing is written into the run directory"


def test_a_run_keeps_the_tokenizer_that_it_has_trained(tmp_path, ranks, cache):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer_vocab_size=300)
    recorded = train_tokenizer(["something else"] * 9, 280, 1).to_str()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(recorded)
    own = tmp_path / "run" / "tokenizer.json"
    assert ranks(1, open_and_look, str(cache), config, str(tmp_path / "run"), own)[0]["tokenizer"] == recorded
    # one that no checkpoint belongs to may be of other documents, or of another size
    assert ranks(1, open_and_look, str(cache), config, str(tmp_path / "run"))[0]["tokenizer"] != recorded


def test_what_is_wrong_with_the_data_is_said_on_all_ranks_alike(tmp_path, ranks, cache):
    config = make_config(str(tmp_path / "nope.jsonl"))
    errors = ranks(2, open_and_look, str(cache), config, str(tmp_path / "run"))
    assert errors[0] == errors[1] and "nope.jsonl' cannot be loaded" in errors[0]["error"]


def of_another_text(cache: str, folder: str) -> str:
    """Each rank as if it were a node of its own, with its own documents under the same name."""
    datasets.config.HF_DATASETS_CACHE = Path(cache) / str(dist.get_rank())
    os.chdir(Path(folder) / str(dist.get_rank()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.ranks, "node_leaders", lambda: [0, 1])
        try:
            with corpus.opened(make_config("a.jsonl", tokenizer_vocab_size=300), Path("run"), 4, None, lambda: 0):
                return "opened"
        except UserError as error:
            return str(error)
        finally:
            os.chdir(folder)


def test_nodes_with_other_documents_are_refused(tmp_path, ranks, cache):
    for rank, texts in enumerate((TEXTS, [*TEXTS, "one more"])):
        write_jsonl(tmp_path / str(rank) / "a.jsonl", texts)
    said = "data.dataset=a.jsonl is not the same on all nodes: copy it from one"
    assert ranks(2, of_another_text, str(cache), str(tmp_path)) == [said] * 2


def test_a_tokenizers_json_is_the_same_after_it_was_read():
    """It is recorded, compared and part of keys of the cache: on one rank written, on the others read first."""
    for make in TOKENIZERS.values():
        text = make().to_str()
        assert Tokenizer.from_str(text).to_str() == text


# ---------------------------------------------------------------------------------------------------------------------
# A look at the data


def test_the_statistics_are_those_of_the_rows(tmp_path, layout):
    texts = [*TEXTS, "", LONG]
    config = val_config(tmp_path, layout=layout)
    config.dataset = write_jsonl(tmp_path / "b.jsonl", texts)
    corpus = make_corpus(config, byte_tokenizer(BOS, EOS))
    lines = look.describe(config, corpus, global_batch_size=7, seed=3).splitlines()
    numbers = {line.split()[0]: re.findall(r"[\d.,]+\d|\d", line) for line in lines[:7]}
    rows = corpus.source.rows
    input_ids, targets = batch_of(rows, range(len(rows)))
    real, steps = targets != IGNORE_INDEX, len(rows) // 7
    kept = torch.cat([*islice(global_batches(corpus.source, 1, 7, seed=3), steps)])
    lost = int(real.sum() - real[kept].sum())
    # what lies behind the last target of a row is padding, but for a BOS that the next row starts with
    padding = sum(int(row.flip(0).int().argmax()) for row in real)
    padding -= int((~real[:-1, -1] & (input_ids[1:, 0] == corpus.special.bos)).sum()) if layout == "pack" else 0
    assert numbers["documents"][0] == str(len(texts))
    assert numbers["tokens"][0] == f"{int(real.sum()):,}"
    assert numbers["rows"][0] == str(len(corpus.source.rows))
    assert float(numbers["padding"][0]) == pytest.approx(100 * padding / real.numel(), abs=0.006)
    assert numbers["epoch"][:4] == [str(len(kept) // 7), "7", str(len(corpus.source.rows) - len(kept)), str(lost)]
    assert numbers["vocabulary"][:2] == [str(len(set("".join(texts))) + 2), "258"]
    histogram = {int(low.replace(",", "")): int(count) for low, _, _, count, *_ in map(str.split, lines[9:19])}
    assert histogram == {2**i: sum(2**i <= len(text) + 2 < 2 ** (i + 1) for text in texts) for i in range(1, 11)}


def test_rows_are_shown_with_bos_eos_and_padding(tmp_path):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ["0123456789", "a\nb"]))
    tokenizer = byte_tokenizer(BOS, EOS)
    rows = make_corpus(config, tokenizer).source.rows
    assert [look.row_as_text(rows, row, tokenizer) for row in range(3)] == [
        f"row 0: {BOS}0123456 -> 7",
        f"row 1: 789 -> {EOS} [5 x padding]",
        f"row 2: {BOS}a↵b -> {EOS} [4 x padding]",
    ]
    assert look.row_as_text(rows, 1, tokenizer, most=2) == f"row 1: 7 [... 1 characters ...] 9 -> {EOS} [5 x padding]"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--data.dataset={folder}/a.jsonl"], 0, ["documents    198,", "row 0: <|begin_of_text|>document"]),
        (
            ["--data.dataset={folder}/a.jsonl", "--data.streaming=true", "--train.steps=100"],
            0,
            ["of {folder}/a.jsonl alone", "documents    198,", "validation   2 rows"],
        ),
        (["--data.dataset={folder}/a.jsonl", "--model.hidden_size=1000000000"], 0, ["documents    198,"]),
        (["--data.dataset={folder}/nope.jsonl"], 2, ["error: data.dataset='{folder}/nope.jsonl' cannot be loaded"]),
        (["--data.seqlen=4"], 2, ["error: data.seqlen: there is no such key: did you mean data.seq_len?"]),
        (["--help"], 0, ["usage: python -m corpus.look [CONFIG.toml]", "--data.val_dataset"]),
    ],
    ids=["documents", "streaming", "model of another machine", "no such documents", "no such key", "help"],
)
def test_the_command_line_shows_the_data_or_one_message(tmp_path, arguments, status, words):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-m", "corpus.look", *(argument.format(folder=tmp_path) for argument in arguments)]
    command += ["--data.tokenizer_vocab_size=300", f"--run.dir={tmp_path}/run"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    text = result.stdout if status == 0 else result.stderr
    assert all(word.format(folder=tmp_path) in text for word in words)
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()
