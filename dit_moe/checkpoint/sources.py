"""Where tensors come from: a mapping in memory, a torch file or a safetensors file, all read one tensor at a time.

Files are mapped into memory, so a tensor costs memory only once it is read. What was read stays in the process's
resident set until the mapping ends; to keep the sum of the file's pages and the growing model near one copy, a file is
mapped anew each time a fiftieth of it has been read.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError

CONFIG_ENTRY = "dit_moe.config"  # in a safetensors file's metadata: the configuration as JSON
WRAPPERS = ("ema", "model")  # the entries in which official files hold the state dict, the preferred one first
_WINDOW_SHARE, _MIN_WINDOW = 50, 16 * 2**20
_MAX_READERS, _READ_SIZE = 8, 2**20
_ZIP_MAGIC = b"PK\x03\x04"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
}  # fmt: skip


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is read; a dtype of None is one that no model has."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class MappingSource:
    """Tensors of a mapping in memory, flat or wrapped as official files are."""

    config: dict[str, object] | None = None

    def __init__(self, mapping: Mapping[str, object]) -> None:
        self._tensors = plain_tensors(unwrap(mapping))
        self.specs = tensor_specs(self._tensors)

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach()


class _FileSource:
    """A mapped file, mapped anew when a good part of it has been read."""

    config: dict[str, object] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = self._stat()
        self._window = max(_MIN_WINDOW, self._identity[0] // _WINDOW_SHARE)
        self._bytes_read = 0

    def _stat(self) -> tuple[int, ...]:
        stat = os.stat(self.path)
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _open(self) -> None:
        raise NotImplementedError

    def _get(self, key: str) -> Tensor:
        raise NotImplementedError

    def read(self, key: str) -> Tensor:
        """One tensor, backed by the mapped file: copy it and let go of it before reading on."""
        if self._bytes_read > self._window:
            if self._stat() != self._identity:
                raise CheckpointError(f"{self.path} was changed while it was being loaded")
            self._open()
            self._bytes_read = 0
        tensor = self._get(key)
        self._bytes_read += tensor.numel() * tensor.element_size()
        return tensor


class TorchSource(_FileSource):
    """A .pt or .pth file, unpickled with weights_only: no code in it can run."""

    def __init__(self, path: Path, verify: bool = True) -> None:
        super().__init__(path)
        self._mapped = _starts_with(path, _ZIP_MAGIC)  # files of torch < 1.6 cannot be mapped
        if self._mapped:
            _check_zip(path, verify)
        self._open()
        self.specs = tensor_specs(self._tensors)
        small = [key for key, tensor in self._tensors.items() if tensor.untyped_storage().nbytes() < _nbytes(tensor)]
        if small:
            raise CheckpointError(f"{path}: tensor {small[0]!r} claims more data than the file holds for it")

    def _open(self) -> None:
        self._tensors: dict[str, Tensor] = {}  # end the old mapping first
        self._tensors = plain_tensors(unwrap(_torch_load(self.path, self._mapped)))

    def read(self, key: str) -> Tensor:
        return super().read(key) if self._mapped else self._tensors[key]

    def _get(self, key: str) -> Tensor:
        return self._tensors[key]


class SafetensorsSource(_FileSource):
    """A .safetensors file: official keys, or our native format with its configuration in the metadata."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._open()
        self.config = _config_entry(path, self._file.metadata() or {})
        slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 (not a mapping)
        self.specs = {
            key: TensorSpec(tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for key, part in slices.items()
        }

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open  # here, so that other files load without the package

        self._file: Any = None
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} is no readable safetensors file: {error}") from error

    def _get(self, key: str) -> Tensor:
        return self._file.get_tensor(key)


Source = MappingSource | TorchSource | SafetensorsSource


def open_source(source: str | os.PathLike | Mapping[str, object], *, verify: bool = True) -> Source:
    """The source for a path (told apart by content, not by name) or a mapping.

    Raises:
        CheckpointError: the content is not readable, or refused.
        OSError: the file cannot be opened.
        TypeError: source is neither.
    """
    if isinstance(source, Mapping):
        return MappingSource(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: got {type(source).__name__}, expected a path or a mapping of tensors")
    path = Path(source)
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or (head[8:] == b"{" and not head.startswith(_ZIP_MAGIC)):
        return SafetensorsSource(path)
    return TorchSource(path, verify)


def unwrap(loaded: object) -> Mapping[str, object]:
    """The state dict inside what a file holds: its entry "ema", else "model", else the whole.

    Raises:
        CheckpointError: not a mapping, no string keys, or wrapped twice or ambiguously.
    """
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"expected a state dict, got {type(loaded).__name__}")
    for wrapper in WRAPPERS:
        if wrapper not in loaded:
            continue
        inner = loaded[wrapper]
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"entry {wrapper!r}: expected a state dict, got {type(inner).__name__}")
        if any(name in inner for name in WRAPPERS):
            raise CheckpointError(f"entry {wrapper!r} is itself wrapped in 'ema' or 'model': expected one wrapping")
        beside = sorted(str(key) for key, value in loaded.items() if isinstance(value, Tensor))
        if beside:
            raise CheckpointError(f"tensors lie beside the entry {wrapper!r} (such as {beside[0]!r}): which to load?")
        return inner
    return loaded


def plain_tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict, in which every key is a string and every value a plain tensor with data.

    Raises:
        CheckpointError: one is not.
    """
    tensors = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"expected strings as keys, got {key!r}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r}: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{key!r}: expected a dense tensor with data, got {value.layout} on {value.device}")
        tensors[key] = value
    return tensors


def tensor_specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Shapes and dtypes."""
    floats = set(_DTYPES.values())
    return {
        key: TensorSpec(tuple(tensor.shape), tensor.dtype if tensor.dtype in floats else None)
        for key, tensor in tensors.items()
    }


def _torch_load(path: Path, mapped: bool) -> object:
    # The official training script stores its arguments as an argparse.Namespace: plain data, and harmless to build.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} was refused by torch.load(weights_only=True), so nothing in it was run: it is corrupted or "
                f"holds Python objects other than tensors and plain containers ({_refused(error)})"
            ) from error
        except Exception as error:  # torch raises many types on damaged files
            raise CheckpointError(
                f"{path} is no readable torch file: {type(error).__name__}: {str(error).strip()[:300]}"
            ) from error


def _refused(error: Exception) -> str:
    """What torch refused, without its advice to load the file unsafely."""
    told = re.search(r"unsupported .*?(?=\.\s|\.$|\n|$)", str(error), re.IGNORECASE)
    return told[0] if told else type(error).__name__


def _check_zip(path: Path, verify: bool) -> None:
    """Check the zip directory and, with verify, each record's CRC-32, which torch does not check when it maps."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
        if verify and not packed:
            workers = min(_MAX_READERS, os.cpu_count() or 1)
            with ThreadPoolExecutor(workers) as pool:
                shares = [[record.filename for record in records[first::workers]] for first in range(workers)]
                list(pool.map(_read_records, [path] * workers, shares))
    except Exception as error:  # zipfile raises many types on damaged files
        raise CheckpointError(f"{path} is truncated or corrupted: {error}") from error
    if packed:
        raise CheckpointError(f"{path} is no torch file: its record {packed[0]!r} is compressed")


def _read_records(path: Path, names: list[str]) -> None:
    """Read records to their ends, where zipfile compares the checksums; it leaves the interpreter lock meanwhile."""
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(name) as record:
                while record.read(_READ_SIZE):
                    pass


def _config_entry(path: Path, metadata: Mapping[str, str]) -> dict[str, object] | None:
    if CONFIG_ENTRY not in metadata:
        return None
    try:
        config = json.loads(metadata[CONFIG_ENTRY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the configuration in the metadata is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: the configuration in the metadata is {type(config).__name__}, expected an object"
        )
    return config


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
