"""Tensors in *.safetensors files: eight bytes with the header's length, the header as JSON, then the tensors' bytes.

The format is read and written here, as it is that small, and torch's own reader and writer need a package more.
On the way in a file is mapped into memory: `place` takes a rank's slice, and only its pages are read.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from huggingface.config import fetch, read_json
from model import Llama, ModelConfig
from runtime.ranks import UserError
from runtime.storage import misfits, write_atomically

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LONGEST_HEADER = 100_000_000  # bytes, as the format has it
INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    start: int  # bytes
    end: int
    dtype: str
    shape: tuple[int, ...]

    def mapped(self) -> Tensor:
        """The tensor, whose pages are read when they are needed."""
        content = torch.from_file(str(self.path), size=self.end, dtype=torch.uint8)[self.start :]
        if self.start % DTYPES[self.dtype].itemsize:
            content = content.clone()
        return content.view(DTYPES[self.dtype]).view(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises UserError unless it is whole, and of floating-point numbers."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its {size:,} bytes do not hold the header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Stored(path, 8 + length + start, 8 + length + end, entry["dtype"], (*entry["shape"],))
            for name, entry in header.items()
            for start, end in [entry["data_offsets"]]
        }
        for name, stored in found.items():
            if stored.dtype not in DTYPES:
                raise ValueError(f"{name} is {stored.dtype}, which is no weight: it takes {', '.join(DTYPES)}")
            if stored.end - stored.start != math.prod(stored.shape) * DTYPES[stored.dtype].itemsize:
                raise ValueError(f"{name} has not as many bytes as its shape")
        if (end := max((stored.end for stored in found.values()), default=0)) != size:
            raise ValueError(f"{size:,} bytes instead of {end:,}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file of weights, or not whole: {error}") from error
    return found


def find(name: str, config: ModelConfig) -> dict[str, Stored]:
    """Every weight of `config`'s Llama in a folder, or from the Hub. Raises UserError, with all that differs."""
    weight_map = read_json(name, INDEX, optional=True).get("weight_map", {})
    named = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(file, str) and file == Path(file).name for file in named):
        raise UserError(f"checkpoint.init_from={name}: {INDEX} must name files beside it")
    by_file = {file: read_header(fetch(name, file)) for file in sorted(set(named)) or [ONE_FILE]}
    found = {key: stored for tensors in by_file.values() for key, stored in tensors.items()}
    for key in sorted(found.keys() | weight_map.keys() if weight_map else ()):
        if key not in by_file.get(weight_map.get(key, ""), {}):
            where = found[key].path.name if key in found else "no file"
            raise UserError(f"checkpoint.init_from={name}: {key} is in {where}, and in {INDEX} {weight_map.get(key)}")
    # positions, which transformers once wrote too
    found = {key: stored for key, stored in found.items() if not key.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):
        here = {key: tuple(parameter.shape) for key, parameter in Llama(config).named_parameters()}
    if lines := misfits({key: stored.shape for key, stored in found.items()}, here):
        raise UserError("\n".join([f"checkpoint.init_from={name} is not this Llama:", *lines]))
    return found


def fingerprint(found: dict[str, Stored]) -> str:
    """Of names, shapes and the small tensors, such as norms: nodes that hold different models hear of it."""
    digest = hashlib.sha256()
    for name, stored in sorted(found.items()):
        content = stored.mapped().view(torch.uint8).numpy().tobytes() if len(stored.shape) == 1 else b""
        digest.update(f"{name} {stored.dtype} {stored.shape} ".encode() + content)
    return digest.hexdigest()


def load(found: dict[str, Stored], model: nn.Module, place: Callable[[Tensor, Tensor], object]) -> None:
    """Write every parameter; `place(parameter, full)` keeps this rank's slice, as in `Llama.init_weights`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place(parameter, found[name].mapped())


def write_shards(folder: Path, names: list[list[str]], load: Callable[[list[str]], dict[str, Tensor]]) -> None:
    """Files model-0000x-of-0000y.safetensors and their index: `load` gives the tensors of one, contiguous, on a CPU."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    weight_map, total = {}, 0
    for number, shard in enumerate(names, 1):
        tensors, end = load(shard), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        path = folder / f"model-{number:05}-of-{len(names):05}.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.flatten().view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(shard, path.name)
        total += end
        del tensors, tensor  # before the next one's are there
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(index, indent=2))
