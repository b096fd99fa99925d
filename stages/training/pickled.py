"""The tensors of a file that torch.save wrote beside objects of other programs, as Lightning's checkpoints hold them; nothing in it is run.

Such a file is a zip of one pickle and the raw bytes of each tensor. A pickle is a program that names classes and functions to call, and
whoever may name any can run anything. Here five names mean something (a table, a tensor, a parameter, an ordered dict, the type of a
storage), all of them ours; every other name is the class `Inert`, whose instances take whatever is done to them and do nothing.
"""

import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.errors import DataError

MAX_PICKLE_BYTES = 256 * 1024 * 1024  # of names and shapes; weights are outside of it
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class Inert:
    """What a class or a function of another program becomes, and what it gives: something of which nothing comes."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __new__(cls, *arguments: object, **keywords: object) -> "Inert":
        return object.__new__(cls)

    def __call__(self, *arguments: object, **keywords: object) -> "Inert":
        return Inert()

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass


class Table(dict[Any, Any]):
    """An ordered dict, without the attributes that a pickle could set on one."""

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class StorageType:
    """`torch.FloatStorage` and its like, as far as a name goes."""

    dtype: torch.dtype

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Stored:
    """A tensor that is described and not yet read."""

    key: str
    dtype: torch.dtype
    numel: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: object) -> None:
        pass


class _TensorOf(Inert):
    """`torch._utils._rebuild_tensor_v2`."""

    def __new__(cls, storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *rest: Any) -> Any:
        if not isinstance(storage, Stored) or not all(isinstance(part, tuple) for part in (size, stride)) or len(size) != len(stride):
            raise pickle.UnpicklingError("a tensor without storage, size and stride")
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise pickle.UnpicklingError("a tensor whose size is no list of numbers")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= storage.numel:
            raise pickle.UnpicklingError(f"a tensor {size} of a storage of {storage.numel:,} numbers")
        return Stored(storage.key, storage.dtype, storage.numel, offset, size, stride)


class _ParameterOf(Inert):
    """`torch._utils._rebuild_parameter`: the tensor in it."""

    def __new__(cls, data: Any = None, *rest: Any) -> Any:
        return data


class _Reader(pickle.Unpickler):
    """Names become what the module's first lines say; bytes of a tensor become a `Stored`."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return StorageType(STORAGES[name])
        known = {
            "collections.OrderedDict": Table,
            "torch._utils._rebuild_tensor_v2": _TensorOf,
            "torch._utils._rebuild_parameter": _ParameterOf,
            "torch._utils._rebuild_parameter_with_state": _ParameterOf,
        }
        return known.get(f"{module}.{name}", Inert)

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("something beside the pickle that is no storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, StorageType):  # of numbers that are not read, such as complex ones
            return Inert()
        if not (isinstance(key, str) and type(numel) is int and 0 <= numel < 2**62):
            raise pickle.UnpicklingError("a storage without a name and a length")
        return Stored(key, kind.dtype, numel, 0, (numel,), (1,))


def read_beside_objects(path: Path) -> Any:
    """What the file holds, tensors as `Stored` and everything foreign as `Inert`. DataError where it is damaged or no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
            if archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
                raise DataError(f"{path}: its table of contents has more than {MAX_PICKLE_BYTES:,} bytes")
            with archive.open(name) as file:
                return _Reader(file).load()
    except DataError:
        raise
    except Exception as error:  # bytes of strangers: pickle raises what its instructions happen to run into
        raise DataError(
            f"{path}: cannot be read as weights ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None


def fetch(path: Path, stored: Mapping[str, Stored], device: str = "cpu") -> dict[str, Tensor]:
    """The described tensors of a file, read. device: "meta" for their shapes alone. DataError where bytes are missing."""
    if device == "meta":
        return {name: torch.empty(one.size, dtype=one.dtype, device="meta") for name, one in stored.items()}
    storages: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).partition("/")[0]
            if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
                raise DataError(f"{path}: its numbers are big-endian, which is not read")
            for one in stored.values():
                if one.key not in storages:
                    member = archive.getinfo(f"{root}/data/{one.key}")
                    if member.file_size != one.numel * one.dtype.itemsize or member.compress_size < member.file_size:
                        raise DataError(f"{path}: {member.filename} has {member.file_size:,} bytes, its table says {one.numel:,} numbers")
                    data = bytearray(archive.read(member))
                    storages[one.key] = torch.frombuffer(data, dtype=one.dtype) if data else torch.empty(0, dtype=one.dtype)
        return {
            name: storages[one.key].view(one.dtype).as_strided(one.size, one.stride, one.offset)
            if one.numel
            else torch.empty(one.size, dtype=one.dtype)
            for name, one in stored.items()
        }
    except (zipfile.BadZipFile, KeyError, StopIteration, RuntimeError, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise DataError(
            f"{path}: cannot be read as weights ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
