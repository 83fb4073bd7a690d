"""Documents in, micro-batches out.

The contract (laws 3 and 8 of this project):

- A document becomes `[BOS] tokens [EOS]`. Every token but BOS is a target exactly once an epoch, apart from the last
  incomplete global batch. Nothing is truncated: a long document becomes several rows.
- A row is seq_len inputs and, shifted by one, seq_len targets. Consecutive rows of a document (layout "pad") or of the
  stream of all documents (layout "pack") overlap by one token, so that no target falls between two rows. What is left
  of a row is padding on the right, whose targets are -100.
- Which rows make up the global batch of a step is a function of (seed, step) alone. How many ranks there are only
  decides how those rows are dealt out: TP peers get the same ones, DP ranks different ones.

The path of the data: source -> tokenizer -> one memory-mapped stream of tokens, made once per (documents, tokenizer) in
the cache of `datasets` -> `Rows`, which is arithmetic on document boundaries -> batches of row numbers -> loader. Where
no disk holds the corpus, stream.py does this file by file. `python data.py CONFIG` shows what comes out.

Shapes: B rows of a micro-batch, T = seq_len.
"""

import contextlib
import fcntl
import hashlib
import itertools
import math
import os
import sys
import sysconfig
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model import IGNORE_INDEX

if TYPE_CHECKING:  # importing it takes a second: only where it is used
    import datasets
    import pyarrow
    from tqdm import tqdm

BOS_TOKENS = ["<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "<|bos|>"]
EOS_TOKENS = ["<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|eos|>"]
PAD_TOKENS = ["<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"]
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
STREAM_VERSION = 2  # part of the cache key: raise it when the stored form changes
PART_DOCUMENTS = 20_000  # in a file of tokens
BATCH_DOCUMENTS, BATCH_BYTES = 2000, 2 * 2**20  # encoded at once: memory, some 30 times the bytes, against speed


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes rows."""

    dataset: Annotated[
        str, 'documents: "stdlib" (Python\'s own), a Hub id, or a path to .txt (a document a line), .jsonl or .parquet'
    ] = "stdlib"
    subset: Annotated[str, "the Hub's name of a part of the dataset"] = ""
    split: Annotated[str, "the Hub's name of a split"] = "train"
    text_column: Annotated[str, "the column that holds a document's text"] = "text"
    tokenizer: Annotated[str, '"train" = byte-level BPE on the documents; a path to tokenizer.json; a Hub id'] = "train"
    tokenizer_vocab_size: Annotated[int, "size of a trained tokenizer"] = 4096
    tokenizer_train_mib: Annotated[int, "train the tokenizer on this much text, from the first document on (MiB)"] = 64
    bos_token: Annotated[str, f'"" = the first of {" ".join(BOS_TOKENS)} that the tokenizer has'] = ""
    eos_token: Annotated[str, f'"" = the first of {" ".join(EOS_TOKENS)} that the tokenizer has'] = ""
    seq_len: Annotated[int, "inputs and targets in a row"] = 256
    layout: Annotated[Literal["pad", "pack"], "rows of one document, padded; or documents end to end, cut"] = "pad"
    document_mask: Annotated[bool, "packed documents do not see each other, and positions count from 0 in each"] = False
    val_fraction: Annotated[
        float, "share of the documents held out for validation; 0 = none; a validation set named below replaces it"
    ] = 0.01
    val_dataset: Annotated[str, 'validation documents, named like data.dataset, same column; "" = data.dataset'] = ""
    val_subset: Annotated[str, 'subset of val_dataset; "" = data.subset if val_dataset is "", else none'] = ""
    val_split: Annotated[str, 'split of the validation documents; "" = data.split'] = ""
    streaming: Annotated[
        bool, "read the files of data.dataset as training reaches them and keep no copy; val_fraction is of the first"
    ] = False
    stream_files: Annotated[int, "files whose rows are shuffled together when streaming"] = 4
    num_workers: Annotated[int, "loader processes per rank; 0 = load in the training process"] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Source


def stdlib_documents() -> tuple[list[str], int]:
    """Every .py file of the running interpreter's standard library in sorted order, and how many were not UTF-8."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped_folders = {"site-packages", "dist-packages", "test"}
    texts, unreadable = [], 0
    for path in sorted(root.rglob("*.py")):
        if skipped_folders.isdisjoint(path.relative_to(root).parts):
            try:
                texts.append(path.read_bytes().decode("utf-8"))
            except UnicodeDecodeError:
                unreadable += 1
    return texts, unreadable


def builder_of(path: str) -> str | None:
    """The builder of `datasets` that reads files of this name."""
    suffixes = Path(path).suffixes[-2:]
    return BUILDERS.get(suffixes[0] if suffixes[1:] == [".gz"] else "".join(suffixes[-1:]))


def not_loaded(config: DataConfig, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    return ValueError(
        f"data.dataset={config.dataset!r} cannot be loaded: {str(cause) or type(cause).__name__}\n"
        f'it must be "stdlib", a path to {", ".join(BUILDERS)} with at least one document, or the id of a dataset '
        "on the Hub, with its data.subset and data.split"
    )


def load_documents(config: DataConfig, show_skipped: bool = False) -> tuple["datasets.Dataset", str]:
    """The documents and a string that identifies them. Raises ValueError for what a user can get wrong."""
    import datasets

    datasets.disable_progress_bars()  # one bar of our own instead
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised, and said once
    if config.dataset == "stdlib":
        texts, not_utf8 = stdlib_documents()
        if not_utf8 and show_skipped:
            print(f"stdlib: skipped {not_utf8} files that are not UTF-8", file=sys.stderr)
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return datasets.Dataset.from_dict({"text": texts}), digest
    path, builder = Path(config.dataset), builder_of(config.dataset)
    if builder and path.is_file() and path.stat().st_size == 0:
        check_not_empty(config, 0)
    try:
        if builder:
            documents = datasets.load_dataset(builder, data_files=config.dataset, split="train")
        else:
            documents = datasets.load_dataset(config.dataset, config.subset or None, split=config.split)
    except Exception as error:  # of many kinds, all about the data
        raise not_loaded(config, error) from error
    if documents.builder_name == "text":  # empty lines separate documents and are none themselves
        filled = documents.filter(lambda texts: [bool(text) for text in texts], input_columns="text", batched=True)
        return filled, documents._fingerprint
    if config.text_column not in documents.column_names:
        raise ValueError(
            f"data.text_column={config.text_column!r} is not a column of {config.dataset}: "
            f"it has {', '.join(documents.column_names)}"
        )
    dtype = getattr(documents.features[config.text_column], "dtype", "nested")
    if dtype not in ("string", "large_string") and len(documents) > 0:
        raise ValueError(f"data.text_column={config.text_column!r} holds {dtype}, not text: name a column of strings")
    if config.text_column != "text":
        documents = documents.select_columns(config.text_column).rename_column(config.text_column, "text")
    return documents.select_columns("text"), f"{documents._fingerprint}/{config.text_column}"


def source_files(config: DataConfig) -> list[str]:
    """Paths or addresses of the dataset's files in the order of their names, for streaming. Raises ValueError."""
    import datasets

    builder = builder_of(config.dataset)
    try:
        if builder:
            files = datasets.load_dataset_builder(builder, data_files=config.dataset).config.data_files["train"]
        else:
            found = datasets.load_dataset_builder(config.dataset, config.subset or None).config.data_files or {}
            if config.split not in found:
                raise ValueError(f"data.split={config.split!r} is not one of {', '.join(map(str, found))}")
            files = found[config.split]
        if not files:
            raise ValueError("there is no such file")
    except Exception as error:  # of many kinds, all about the data
        raise not_loaded(config, error) from error
    unknown = [file for file in files if builder_of(file) is None]
    if unknown:
        raise ValueError(
            f"data.streaming=true reads {', '.join(BUILDERS)}, also as .gz, but {config.dataset} has {unknown[0]}: "
            "set it to false"
        )
    return sorted(files)


def file_version(file: str) -> str:
    """Another one when a local file changes; the address of a file of the Hub names its revision."""
    path = Path(file)
    size_and_time = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ()
    return cache_key(file, *size_and_time)


def texts_of_file(file: str, text_column: str) -> Iterator[str | None]:
    """The documents of one file, read as they are asked for. Raises ValueError."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path, builder = Path(file), builder_of(file)

    def tables() -> Iterator["pyarrow.Table"]:
        if path.is_file() and path.stat().st_size == 0:  # a file may be empty; `datasets` stumbles over it
            return
        documents = datasets.load_dataset(builder, data_files=[file], split="train", streaming=True)
        for table in documents.with_format("arrow").iter(100):
            column = "text" if builder == "text" else text_column
            if column not in table.column_names:
                raise ValueError(f"data.text_column={text_column!r} is none of its {', '.join(table.column_names)}")
            if str(table[column].type) not in ("string", "large_string", "null"):
                raise ValueError(f"data.text_column={text_column!r} holds {table[column].type}, not text")
            yield table.select([column])

    try:
        for text in texts_of(tables()):
            yield text or None if builder == "text" else text  # as in load_documents
    except Exception as error:  # of many kinds, all about the data
        raise ValueError(f"{file} cannot be read: {error}: replace it; the same command then goes on") from error


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def cache_folder() -> Path:
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def train_tokenizer(texts: Iterable[str], vocab_size: int, train_mib: int) -> Tokenizer:
    """Byte-level BPE (arXiv:1508.07909, on bytes as in GPT-2) with a BOS and an EOS token."""

    def until_enough() -> Iterator[str]:
        left = train_mib * 2**20
        for text in texts:
            if left <= 0:
                return
            if text:
                left -= len(text.encode())
                yield text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKENS[0], EOS_TOKENS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(until_enough(), trainer)
    return tokenizer


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """Train (once per documents and size, then from the cache), read, or download. Raises ValueError."""
    if config.tokenizer == "train":
        if config.streaming:
            files = source_files(config)
            texts = itertools.chain.from_iterable(texts_of_file(file, config.text_column) for file in files)
            identity = [config.text_column, *map(file_version, files)]
        else:
            documents, identity = load_documents(config)
            texts = texts_of(documents.with_format("arrow").iter(100))
        key = cache_key("tokenizer", identity, config.tokenizer_vocab_size, config.tokenizer_train_mib)
        path = cache_folder() / f"tokenizer-{key}.json"
        if not path.exists():
            tokenizer = train_tokenizer(texts, config.tokenizer_vocab_size, config.tokenizer_train_mib)
            unfinished = path.with_suffix(f".{os.getpid()}")
            tokenizer.save(str(unfinished))
            unfinished.replace(path)
        return Tokenizer.from_file(str(path))
    is_file = config.tokenizer.endswith(".json") or Path(config.tokenizer).exists()
    try:
        return Tokenizer.from_file(config.tokenizer) if is_file else Tokenizer.from_pretrained(config.tokenizer)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} cannot be loaded: {error}\n"
            'it must be "train", a path to a tokenizer.json, or the id of a model on the Hub that has one'
        ) from error


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. `pad` is only ever an input behind EOS, with target -100, so its value does not matter."""

    bos: int
    eos: int
    pad: int


def special_tokens(tokenizer: Tokenizer, config: DataConfig) -> SpecialTokens:
    """The configured tokens, or the first known ones; a tokenizer with only one of the two uses it for both."""

    def find(key: str, name: str, known: list[str]) -> int | None:
        if name and tokenizer.token_to_id(name) is None:
            raise ValueError(f"data.{key}={name!r} is not in the tokenizer: name a token that it has")
        return next((i for i in map(tokenizer.token_to_id, [name] if name else known) if i is not None), None)

    bos = find("bos_token", config.bos_token, BOS_TOKENS)
    eos = find("eos_token", config.eos_token, EOS_TOKENS)
    if bos is None and eos is None:
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} has none of {' '.join(BOS_TOKENS + EOS_TOKENS)}: "
            "name its tokens with data.bos_token and data.eos_token"
        )
    bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    pad = find("pad_token", "", PAD_TOKENS)
    return SpecialTokens(bos, eos, eos if pad is None else pad)


def without_rules(tokenizer: Tokenizer, special: SpecialTokens) -> Tokenizer:
    """A copy that pads nothing, cuts nothing, and takes "<|begin_of_text|>" written out in a text for text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    for token in {special.bos, special.eos, special.pad}:  # some files do not say that they are special
        tokenizer.add_special_tokens([AddedToken(tokenizer.id_to_token(token), special=True)])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest id + 1: ids may have gaps, so the number of tokens is not enough."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def check_not_empty(config: DataConfig, documents: int) -> None:
    if documents == 0:
        raise ValueError(f"data.dataset={config.dataset!r} holds no documents: name one with at least one document")


def texts_of(tables: Iterable["pyarrow.Table"], first: int = 0) -> Iterator[str | None]:
    """What the only column holds, one text after the other: no more than one becomes a Python string.

    `first` is the number of the first one, for the ValueError about text that is not UTF-8.
    """
    for table in tables:
        for number, text in enumerate(table[0], start=first):
            try:
                yield text.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"document {number} (from 0) is not UTF-8, {error}: convert or remove it") from error
        first += len(table)


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
        raise ValueError(f"the tokenizer cannot encode the documents: {error}") from error
    starts = np.cumsum([0, *(len(encoding) + 2 for encoding in encodings)])
    tokens = np.empty(starts[-1], dtype=np.int32)
    tokens[starts[:-1]], tokens[starts[1:] - 1] = special.bos, special.eos
    for encoding, start, stop in zip(encodings, starts[:-1], starts[1:], strict=True):
        tokens[start + 1 : stop - 1] = encoding.ids
    if np.count_nonzero((tokens == special.bos) | (tokens == special.eos)) != 2 * len(texts):
        raise ValueError(
            f"the tokenizer makes its BOS or EOS, ids {special.bos} and {special.eos}, out of a document's text: "
            "name tokens that no text contains with data.bos_token and data.eos_token"
        )
    return tokens, starts


def remove_unfinished(folder: Path) -> None:
    """Files that a killed process was writing. One that is still being written is locked by its writer, and stays."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_size > 0:  # else its writer may be about to lock it
                path.unlink()


def write_tokens(
    path: Path, texts: Iterable[str | None], tokenizer: Tokenizer, special: SpecialTokens, bar: "tqdm | None" = None
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

    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "num_bytes": pa.int64()})
    unfinished, under_way = path.with_name(f".tmp-{uuid.uuid4().hex}"), deque()
    with ThreadPoolExecutor(2) as pool, unfinished.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        with contextlib.suppress(OSError):  # there are file systems without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        for batch in batches_of(texts):
            under_way.append(pool.submit(encode, *batch))
            if len(under_way) > 2:
                write_oldest()
        while under_way:
            write_oldest()
    unfinished.rename(path)


def tokenize(config: DataConfig, tokenizer: Tokenizer, show_progress: bool = False) -> list[Path]:
    """Encode every document, once per (documents, tokenizer) on a machine; returns the Arrow files that hold them.

    Each file holds PART_DOCUMENTS documents: a process that is killed loses one at most, and the next goes on from
    there. The first rank of each node calls this, the others map the files. Raises ValueError.
    """
    from tqdm import tqdm

    special = special_tokens(tokenizer, config)
    documents, identity = load_documents(config, show_skipped=show_progress)
    check_not_empty(config, len(documents))
    key = cache_key(STREAM_VERSION, PART_DOCUMENTS, identity, tokenizer.to_str(), special.bos, special.eos)
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
            part = range(first, min(first + PART_DOCUMENTS, len(documents)))
            if path.exists():  # from before a kill, or from another process
                bar.update(len(part))
            else:
                try:
                    tables = documents.select(part).with_format("arrow").iter(100)
                    write_tokens(path, texts_of(tables, first), tokenizer, special, bar)
                except ValueError as error:
                    raise ValueError(f"data.dataset={config.dataset!r}: {error}") from error
    return paths


def validation_source(config: DataConfig) -> DataConfig | None:
    """The validation documents as if they were a dataset of their own, or None when they are held out."""
    if not (config.val_dataset or config.val_subset or config.val_split):
        return None
    subset = config.val_subset or ("" if config.val_dataset else config.subset)
    dataset, split = config.val_dataset or config.dataset, config.val_split or config.split
    own = replace(config, dataset=dataset, subset=subset, split=split, val_dataset="", val_subset="", val_split="")
    return replace(own, val_fraction=0.0, streaming=False)


def tokenize_all(config: DataConfig, tokenizer: Tokenizer, show_progress: bool = False) -> list[list[Path]]:
    """`tokenize` of the training documents and, where they have a source of their own, of the validation documents."""
    paths, source = [tokenize(config, tokenizer, show_progress)], validation_source(config)
    if source is not None:
        try:
            paths.append(tokenize(source, tokenizer, show_progress))
        except ValueError as error:
            raise ValueError(f"the validation set that data.val_* name: {error}") from error
        if paths[0] == paths[1]:
            raise ValueError(
                f"data.val_dataset={config.val_dataset!r}, data.val_subset={config.val_subset!r} and data.val_split="
                f"{config.val_split!r} name the training documents: name others, or none and set data.val_fraction"
            )
    return paths


class TokenStream:
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
        # token i of document d is token document_starts[d] + i of the stream
        self.document_starts = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        self.document_bytes = np.concatenate([np.zeros(0, np.int64), *num_bytes])

    def __reduce__(self):  # a loader worker maps the files again instead of receiving a copy of them
        return TokenStream, (self.paths,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32."""
        pieces = []
        while start < stop:
            chunk = np.searchsorted(self.starts, start, side="right") - 1
            end = min(stop, self.starts[chunk + 1])
            pieces.append(self.values[chunk][start - self.starts[chunk] : end - self.starts[chunk]])
            start = end
        return np.concatenate(pieces)

    def fingerprint(self) -> str:
        """Changes when a document is added, lost, moved, gets another length or, in a sample, another beginning."""
        digest = hashlib.sha256(self.document_starts.tobytes())
        count = len(self.document_starts) - 1
        for start in self.document_starts[np.linspace(0, count - 1, min(count, 4096), dtype=np.int64)]:
            digest.update(self.read(start, min(start + 4096, self.document_starts[-1])).tobytes())
        return digest.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Rows(Dataset):
    """Chosen documents of a stream, cut into rows; all it stores is document boundaries, 24 bytes each at most.

    `rows[[i, j, ...]]` through `__getitems__` gives (input_ids, targets), both (B, T) int64, and with document_mask
    `positions` of that shape: where each token stands in its document, or in the part of it that the row holds. Row -1
    is all padding: it fills the last batch of an evaluation.
    """

    def __init__(
        self, stream: TokenStream, documents: np.ndarray, seq_len: int, layout: str, pad: int, document_mask: bool
    ):
        self.stream, self.seq_len, self.pad, self.document_mask = stream, seq_len, pad, document_mask
        self.sources = stream.document_starts[documents]
        lengths = stream.document_starts[documents + 1] - self.sources
        self.starts = np.concatenate([[0], np.cumsum(lengths)])  # of the chosen documents, laid end to end
        # rows never cross the border of a piece: a document when padding, everything when packing
        self.pieces = self.starts if layout == "pad" else self.starts[[0, -1]]
        self.first_rows = np.concatenate([[0], np.cumsum(-(-(np.diff(self.pieces) - 1) // seq_len))])
        self.num_bytes = int(stream.document_bytes[documents].sum())
        self.num_targets = int(lengths.sum()) - len(documents)  # every token but BOS

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __str__(self) -> str:
        return f"{len(self):,} training rows"

    def global_batches(self, first_step: int, size: int, seed: int) -> Iterator[Tensor]:
        """The rows (size,) of each step from first_step on."""
        return (rows_of_step(step, len(self), size, seed) for step in itertools.count(first_step))

    def names(self, rows: Tensor) -> list[int]:
        """What a person finds the rows by."""
        return rows.tolist()

    # What stream.StreamRows has to do, and a corpus that lies on the disk has not
    counts = None

    def start(self, counts: None, leads_node: bool) -> None:
        pass

    def forget(self, step: int) -> None:
        pass

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """At most seq_len + 1 tokens, and which of them start a document."""
        piece = np.searchsorted(self.first_rows, index, side="right") - 1
        start = self.pieces[piece] + (index - self.first_rows[piece]) * self.seq_len
        stop = min(start + self.seq_len + 1, self.pieces[piece + 1])
        first = np.searchsorted(self.starts, start, side="right") - 1
        last = np.searchsorted(self.starts, stop, side="left")
        tokens, is_bos = [], np.zeros(stop - start, dtype=bool)
        for document in range(first, last):
            low, high = max(start, self.starts[document]), min(stop, self.starts[document + 1])
            shift = self.sources[document] - self.starts[document]
            tokens.append(self.stream.read(low + shift, high + shift))
            is_bos[low - start] = low == self.starts[document]
        return np.concatenate(tokens), is_bos

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        input_ids = np.full((len(indices), self.seq_len), self.pad, dtype=np.int64)
        targets = np.full((len(indices), self.seq_len), IGNORE_INDEX, dtype=np.int64)
        starts = np.zeros((len(indices), self.seq_len), dtype=np.int64)  # where the document that is read began
        for i, index in enumerate(indices):
            if index >= 0:
                tokens, is_bos = self.row(index)
                input_ids[i, : len(tokens) - 1] = tokens[:-1]
                targets[i, : len(tokens) - 1] = np.where(is_bos[1:], IGNORE_INDEX, tokens[1:])
                starts[i, : len(tokens) - 1] = np.where(is_bos[:-1], np.arange(len(tokens) - 1), 0)
        positions = np.arange(self.seq_len) - np.maximum.accumulate(starts, axis=1)
        arrays = (input_ids, targets, positions) if self.document_mask else (input_ids, targets)
        return tuple(map(torch.from_numpy, arrays))


@dataclass
class Corpus:
    """What training needs to know of the data. Raises ValueError where there is nothing to validate on."""

    special: SpecialTokens
    train: Rows  # when streaming, stream.StreamRows
    validation: Rows | None
    fingerprint: str

    def __post_init__(self):
        if self.validation and self.validation.num_bytes == 0:  # bits per byte would divide by it
            raise ValueError("the validation documents are empty, all of them: raise data.val_fraction or name others")


def load_corpus(
    config: DataConfig, tokenizer: Tokenizer, paths: list[Path], val_paths: list[Path] | None = None
) -> Corpus:
    """Map what `tokenize_all` wrote and cut it into rows. Raises ValueError.

    Documents that are held out are a function of (their number, val_fraction) alone: not of the seed, so runs compare.
    """
    special = special_tokens(tokenizer, config)

    def rows(stream: TokenStream, documents: np.ndarray) -> Rows:
        return Rows(stream, np.sort(documents), config.seq_len, config.layout, special.pad, config.document_mask)

    def all_documents(stream: TokenStream, source: DataConfig) -> np.ndarray:
        check_not_empty(source, len(stream.document_bytes))  # null texts are none
        return np.arange(len(stream.document_bytes))

    stream = TokenStream(paths)
    documents, fingerprint, validation = all_documents(stream, config), stream.fingerprint(), None
    if val_paths is not None:
        val_stream = TokenStream(val_paths)
        validation = rows(val_stream, all_documents(val_stream, validation_source(config)))
        fingerprint = cache_key(fingerprint, val_stream.fingerprint())
    elif config.val_fraction > 0:
        documents, held_out = hold_out(len(documents), config.val_fraction)
        validation = rows(stream, held_out)
    return Corpus(special, rows(stream, documents), validation, fingerprint)


def hold_out(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Documents for training and for validation. Raises ValueError."""
    held_out = round(count * share)
    if not 0 < held_out < count:
        raise ValueError(
            f"data.val_fraction={share} of {count} documents holds out {held_out} and leaves {count - held_out} for "
            "training: both need at least one, or set it to 0"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return order[held_out:], order[:held_out]


# ---------------------------------------------------------------------------------------------------------------------
# Order: which rows a step trains on, and who gets which of them


def permutation(count: int, *key: int) -> Tensor:
    """A function of its arguments alone."""
    mixed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
    return torch.randperm(count, generator=generator)


@lru_cache(maxsize=2)  # one for training, one for evaluation
def epoch_order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """A permutation of all rows (8 bytes a row)."""
    return permutation(num_rows, seed, epoch)


def rows_of_step(step: int, num_rows: int, global_batch_size: int, seed: int) -> Tensor:
    """Rows (global_batch_size,) of a step, counted from 1; an epoch drops its last incomplete global batch."""
    epoch, batch = divmod(step - 1, num_rows // global_batch_size)
    return epoch_order(num_rows, seed, epoch)[batch * global_batch_size : (batch + 1) * global_batch_size]


def deal(rows: Tensor, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """This dp rank's micro-batches of a global batch; the last ones may hold -1, the row that is all padding."""
    missing = -len(rows) % (micro_batch_size * dp_size)
    rows = torch.cat((rows, rows.new_full((missing,), -1)))
    return rows.view(-1, dp_size, micro_batch_size)[:, dp_rank].tolist()


def make_loader(rows: Rows, micro_batches: Iterable[list[int]], num_workers: int, device: torch.device) -> DataLoader:
    """Batches as `Rows` makes them, in the given order, prepared ahead by worker processes if there are any.

    Workers are spawned, not forked: by now this process has threads, which a fork would leave behind with their locks.
    """
    return DataLoader(
        rows,
        batch_sampler=micro_batches,
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=device.type == "cuda",
        multiprocessing_context="spawn" if num_workers else None,
    )


def as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`Rows.__getitems__` makes whole batches already; a lambda could not be sent to a spawned worker."""
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# A look at the data: python data.py [CONFIG.toml] [--section.key=value ...]


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines of a bar chart: how many lengths lie between two powers of two."""
    counts = np.bincount(np.floor(np.log2(lengths)).astype(int))
    first = np.flatnonzero(counts)[0]
    bars = ["#" * math.ceil(36 * count / counts.max()) for count in counts]
    lines = [f"{2**i:>12,} to {2 ** (i + 1) - 1:>11,} {counts[i]:>12,}  {bars[i]}" for i in range(first, len(counts))]
    return [line.rstrip() for line in lines]


def row_as_text(rows: Rows, index: int, tokenizer: Tokenizer, most: int = 480) -> str:
    """A row's inputs, and its last target: special tokens by name, the middle of a long row left out."""
    input_ids, targets = (tensor[0] for tensor in rows.__getitems__([index]))
    real = int((targets != IGNORE_INDEX).nonzero()[-1]) + 1
    inputs = tokenizer.decode(input_ids[:real].tolist(), skip_special_tokens=False)
    if len(inputs) > most:
        inputs = f"{inputs[: most // 2]} [... {len(inputs) - most:,} characters ...] {inputs[-most // 2 :]}"
    padding = f" [{len(targets) - real} x padding]" if real < len(targets) else ""
    last = tokenizer.decode([int(targets[real - 1])], skip_special_tokens=False)
    text = f"row {index}: {inputs} -> {last}{padding}"
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")


def describe(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, global_batch_size: int, seed: int) -> str:
    """What a run trains on: numbers, and the first rows. Reads every token."""
    rows, stream = corpus.train, corpus.train.stream
    lengths = np.diff(rows.starts)
    steps, left_over = divmod(len(rows), global_batch_size)
    dropped = epoch_order(len(rows), seed, epoch=0)[len(rows) - left_over :].tolist()
    lost = sum(int((rows.__getitems__([row])[1] != IGNORE_INDEX).sum()) for row in dropped)
    positions = len(rows) * config.seq_len
    masked = len(lengths) - 1 if config.layout == "pack" else 0  # each BOS but the first is some input's next token
    vocabulary = vocabulary_size(tokenizer)
    used = np.count_nonzero(sum(np.bincount(values, minlength=vocabulary) for values in stream.values))
    held_out = corpus.validation
    lines = [
        f"documents    {len(lengths):,}, {rows.num_bytes / 2**20:,.1f} MiB of text",
        f"tokens       {rows.num_targets:,} targets, {rows.num_bytes / rows.num_targets:.2f} bytes each",
        f"rows         {len(rows):,} of {config.seq_len:,} tokens, layout {config.layout}",
        f"padding      {1 - (rows.num_targets + masked) / positions:.2%} of the positions",
        f"epoch        {steps:,} steps of {global_batch_size:,} rows; {left_over:,} rows are left over, with {lost:,} "
        f"targets ({lost / rows.num_targets:.2%})",
        f"vocabulary   {used:,} of {vocabulary:,} tokens occur ({used / vocabulary:.1%})",
        f"validation   {len(held_out):,} rows, {held_out.num_targets:,} targets" if held_out else "validation   none",
        "",
        f"{'tokens in a document':>27} {'documents':>12}",
        *histogram(lengths),
    ]
    ending = next(row for row in range(len(rows)) if corpus.special.eos in rows.__getitems__([row])[1])
    for index in sorted({0, min(1, len(rows) - 1), ending}):  # the first ones, and the first with an end
        text = row_as_text(rows, index, tokenizer)
        lines += ["", *(text[start : start + 80] for start in range(0, len(text), 80))]
    return "\n".join(lines)


def main() -> None:
    """Everything is used from the modules as others import them: this one, run as a script, is a second copy."""
    import configs
    import data
    import parallel
    import stream

    if {"-h", "--help"} & set(sys.argv):
        print(configs.help_text().replace("[torchrun ...] train.py", "data.py"))
        return
    try:
        config = configs.load([*sys.argv[1:], "--parallel.tp=1", "--parallel.dp_replicate=1"])  # this is one process
        tokenizer = data.load_tokenizer(config.data)
        if config.data.streaming:
            corpus, file = stream.first_corpus(config.data, tokenizer, Path(config.run.dir))
            print(f"of {file} alone, as data.streaming=true:")
        else:
            paths = data.tokenize_all(config.data, tokenizer, show_progress=True)
            corpus = data.load_corpus(config.data, tokenizer, *paths)
    except (ValueError, OSError) as error:
        parallel.stop_all_ranks(str(error))
    print(data.describe(config.data, corpus, tokenizer, config.train.global_batch_size, config.train.seed))


if __name__ == "__main__":
    main()
