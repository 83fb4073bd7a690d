"""Documents: what `data.dataset` may name, and how each kind is read.

    "stdlib"          the running interpreter's standard library
    a.jsonl, *.txt    files whose names say what they are (READ), a glob pattern among them
    anything else     a folder of such files, or the id of a dataset on the Hub

Whoever asks for documents, to tokenise them, to train a tokenizer, to stream or to look at them, asks the table SOURCES
at the end of this file. A new kind is one entry there, before the last one; a new format of files is one in READ.
"""

import hashlib
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from corpus.cache import cache_key
from corpus.config import DataConfig
from runtime.ranks import UserError

READ = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # the builder of `datasets` for each


@dataclass
class Documents:
    """On this disk. Their order is part of their identity."""

    table: Any  # a datasets.Dataset of one column, the texts; a null is no document
    identity: str  # part of the key of whatever is made of them
    note: str = ""  # what a person should hear

    def __len__(self) -> int:
        return len(self.table)

    def texts(self, first: int, stop: int) -> Iterator[str | None]:
        """Of the documents [first, stop). Raises UserError for what is not UTF-8."""
        return texts_of(self.table.select(range(first, stop)).with_format("arrow").iter(100), first)


@dataclass(frozen=True)
class Source:
    """A kind of documents: an entry of SOURCES. Its functions raise UserError."""

    is_named_by: Callable[[str], bool]  # this data.dataset
    load: Callable[[DataConfig], Documents]
    files: Callable[[DataConfig], list[str]]  # paths or addresses, to be streamed; stdlib has none, only its name
    has_parts: bool  # which data.subset and data.split may name


# ---------------------------------------------------------------------------------------------------------------------
# What the rest asks


def entry(dataset: str) -> Source:
    return next(source for source in SOURCES if source.is_named_by(dataset))


def source_of(config: DataConfig) -> Source:
    """The entry for data.dataset. Raises UserError if a part is named of what has none."""
    source = entry(config.dataset)
    for key, value, default in (("subset", config.subset, ""), ("split", config.split, "train")):
        if value != default and not source.has_parts:
            raise UserError(
                f"data.{key}={value!r} with data.dataset={config.dataset!r}, which has no {key}s: leave it out, or "
                "name a folder or a dataset on the Hub that has them"
            )
    return source


def load_documents(config: DataConfig) -> Documents:
    """The documents, converted to Arrow by `datasets` if need be. Raises UserError for what a user can get wrong."""
    return source_of(config).load(config)


def stream_files(config: DataConfig) -> list[str]:
    """Paths or addresses of the dataset's files in the order of their names, for streaming. Raises UserError."""
    files = source_of(config).files(config)
    unknown = [file for file in files if builder_of(file) is None]
    if unknown:
        raise UserError(
            f"data.streaming=true reads {', '.join(READ)}, also as .gz, but {config.dataset} has {unknown[0]}: "
            "set it to false, or convert them"
        )
    return sorted(files)


def all_texts(config: DataConfig) -> tuple[Iterator[str | None], Any]:
    """The texts of all documents, read as they are asked for, and what identifies them. Raises UserError."""
    if not config.streaming:
        documents = load_documents(config)
        return documents.texts(0, len(documents)), documents.identity
    files = stream_files(config)
    texts = chain.from_iterable(texts_of_file(file, config.text_column) for file in files)
    return texts, [config.text_column, *map(file_version, files)]


def validation_config(config: DataConfig) -> DataConfig | None:
    """The validation documents as if they were a dataset of their own, or None when they are held out."""
    if not (config.val_dataset or config.val_subset or config.val_split):
        return None
    dataset = config.val_dataset or config.dataset
    subset = config.val_subset or ("" if config.val_dataset else config.subset)
    split = config.val_split or (config.split if entry(dataset).has_parts else "train")
    own = replace(config, dataset=dataset, subset=subset, split=split, val_dataset="", val_subset="", val_split="")
    return replace(own, val_fraction=0.0, streaming=False)


@contextmanager
def errors_name_validation() -> Iterator[None]:
    """Messages speak of data.dataset, and the user has named it data.val_dataset."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the validation set that data.val_* name: {error}") from error


def holds_out_training(config: DataConfig) -> UserError:
    """For a validation set that has documents, or files, of the training set."""
    named = f"data.val_dataset={config.val_dataset!r}, data.val_subset={config.val_subset!r} and data.val_split="
    remedy = "name others, or none and set data.val_fraction"
    return UserError(f"{named}{config.val_split!r} name training documents: {remedy}")


def check_not_empty(config: DataConfig, documents: int) -> None:
    if documents == 0:
        raise UserError(f"data.dataset={config.dataset!r} holds no documents: name one with at least one document")


def texts_of(tables: Iterable, first: int = 0) -> Iterator[str | None]:
    """What the only column of Arrow tables holds: no more than one text at a time becomes a Python string.

    `first` is the number of the first one, for the UserError about text that is not UTF-8.
    """
    for table in tables:
        for number, text in enumerate(table[0], start=first):
            try:
                yield text.as_py()
            except UnicodeDecodeError as error:
                raise UserError(f"document {number} (from 0) is not UTF-8, {error}: convert or remove it") from error
        first += len(table)


# ---------------------------------------------------------------------------------------------------------------------
# The standard library


def stdlib_texts() -> tuple[list[str], int]:
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


def load_stdlib(config: DataConfig) -> Documents:
    texts, not_utf8 = stdlib_texts()
    table = quiet_datasets().Dataset.from_dict({"text": texts})
    note = f"stdlib: skipped {not_utf8} files that are not UTF-8" if not_utf8 else ""
    return Documents(table, hashlib.sha256("\0".join(texts).encode()).hexdigest(), note)


# ---------------------------------------------------------------------------------------------------------------------
# Files, folders and the Hub: what `datasets` reads


def quiet_datasets() -> Any:
    import datasets  # takes a second: only where it is used

    datasets.disable_progress_bars()  # one bar of our own instead
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised, and said once
    return datasets


def builder_of(path: str) -> str | None:
    """The builder of `datasets` that reads files of this name."""
    suffixes = Path(path).suffixes[-2:]
    return READ.get(suffixes[0] if suffixes[1:] == [".gz"] else "".join(suffixes[-1:]))


@contextmanager
def errors_name_dataset(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of many kinds, all about the data
        cause, folder = error.__cause__ or error, Path(config.dataset)
        reason = str(cause) or type(cause).__name__
        if isinstance(cause, FileNotFoundError) and config.dataset and folder.is_dir():
            paths = (path for path in folder.rglob("*") if path.is_file())
            names = sorted({path.suffix or path.name for path in islice(paths, 10_000)})
            reason = f"no file of this folder is read, it has {', '.join(names[:10]) or 'none'}"
        raise UserError(
            f"data.dataset={config.dataset!r} cannot be loaded: {reason}\n"
            f'it must be "stdlib", a path to {", ".join(READ)} with at least one document, a folder of such files, or '
            "the id of a dataset on the Hub, with its data.subset and data.split"
        ) from error


def as_datasets_says(config: DataConfig) -> tuple[dict[str, Any], str]:
    """Arguments of its functions, and the split."""
    if builder := builder_of(config.dataset):
        return {"path": builder, "data_files": config.dataset}, "train"
    return {"path": config.dataset, "name": config.subset or None}, config.split


def load_with_datasets(config: DataConfig) -> Documents:
    datasets, path, column = quiet_datasets(), Path(config.dataset), config.text_column
    if path.is_file() and path.stat().st_size == 0:
        check_not_empty(config, 0)
    with errors_name_dataset(config):
        arguments, split = as_datasets_says(config)
        table = datasets.load_dataset(**arguments, split=split)
    if table.builder_name == "text":  # empty lines separate documents and are none themselves
        filled = table.filter(lambda texts: [bool(text) for text in texts], input_columns="text", batched=True)
        return Documents(filled, table._fingerprint)
    if column not in table.column_names:
        columns = ", ".join(table.column_names)
        raise UserError(f"data.text_column={column!r} is not a column of {config.dataset}: it has {columns}")
    dtype = getattr(table.features[column], "dtype", "nested")
    if dtype not in ("string", "large_string") and len(table) > 0:
        raise UserError(f"data.text_column={column!r} holds {dtype}, not text: name a column of strings")
    if column != "text":  # part of its fingerprint
        table = table.select_columns(column).rename_column(column, "text")
    return Documents(table.select_columns("text"), f"{table._fingerprint}/{column}")


def files_with_datasets(config: DataConfig) -> list[str]:
    with errors_name_dataset(config):
        arguments, split = as_datasets_says(config)
        found = quiet_datasets().load_dataset_builder(**arguments).config.data_files or {}
        if split not in found:
            raise ValueError(f"data.split={split!r} is not one of {', '.join(map(str, found))}")
        if not found[split]:
            raise ValueError("there is no such file")
        return found[split]


def file_version(file: str) -> str:
    """Another one when a local file changes; the address of a file of the Hub names its revision."""
    path = Path(file)
    size_and_time = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ()
    return cache_key(file, *size_and_time)


def texts_of_file(file: str, text_column: str) -> Iterator[str | None]:
    """The documents of one file, read as they are asked for. Raises UserError."""
    datasets, path, builder = quiet_datasets(), Path(file), builder_of(file)
    column = "text" if builder == "text" else text_column

    def tables() -> Iterator:
        if path.is_file() and path.stat().st_size == 0:  # a file may be empty; `datasets` stumbles over it
            return
        with tempfile.TemporaryDirectory() as locks:  # it leaves one for each file, and nothing else
            found = datasets.load_dataset(builder, data_files=[file], split="train", streaming=True, cache_dir=locks)
        for table in found.with_format("arrow").iter(100):
            if column not in table.column_names:
                raise UserError(f"data.text_column={text_column!r} is none of its {', '.join(table.column_names)}")
            if str(table[column].type) not in ("string", "large_string", "null"):
                raise UserError(f"data.text_column={text_column!r} holds {table[column].type}, not text")
            yield table.select([column])

    try:
        for text in texts_of(tables()):
            yield text or None if builder == "text" else text  # as in `load_with_datasets`
    except Exception as error:  # of many kinds, all about the data
        raise UserError(f"{file} cannot be read: {error}: replace it; the same command then goes on") from error


SOURCES = (  # the first one that is named counts
    Source(lambda name: name == "stdlib", load_stdlib, files=lambda config: ["stdlib"], has_parts=False),
    Source(lambda name: builder_of(name) is not None, load_with_datasets, files_with_datasets, has_parts=False),
    Source(lambda name: True, load_with_datasets, files_with_datasets, has_parts=True),
)
