"""Reading checkpoint files that other people made, without running anything that is inside them.

Official TAP files are pickles. A pickle is a program: loading one the usual way can run any command. Here a
pickle may hold numbers, strings, lists, dicts and plain numeric arrays; everything else is refused before it
is executed. NumPy's own constructors never see the file: small stand-ins rebuild the arrays from its bytes.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, MissingFileError

_WRAPPERS = ("model", "state_dict")  # training scripts like to put the weights one level deeper
_MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT")
_PICKLE_STARTS = b"\x80(}]c"  # protocol 2 and later; before that a mark, a dict, a list, or an object's class
_PERSISTENT_IDS = ("PERSID", "BINPERSID")
_LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_WAY_OUT = "download the file again, or save the weights as .safetensors where you trust them"
# What damaged or hostile bytes make the unpickling machinery raise.
_DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError,
           OverflowError, MemoryError, RecursionError)  # fmt: skip


class _DType:
    """Stand-in for `numpy.dtype` in a pickle: a plain boolean, integer or float type."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", code):
            raise InputError(f"holds an array of dtype {str(code)!r}; only plain numbers are accepted")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, byte_order, subdtype, names, fields = state[:5]
        if not (subdtype is names is fields is None):
            raise InputError("holds an array with structured elements; only plain numbers are accepted")
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stand-in for `numpy.ndarray` in a pickle; `value` is the array once its state has been read."""

    def __init__(self, count_bytes: Callable[[int], None]) -> None:
        self.count_bytes = count_bytes
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.fill(raw, dtype, shape, "F" if is_fortran else "C")

    def fill(self, raw: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> None:
        """Take the array from its bytes; the bytes must be exactly as many as the shape needs."""
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as strings
        self.count_bytes(len(raw))
        self.value = np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


class _NumericUnpickler(pickle.Unpickler):
    """Unpickler with a closed list of names; they give bound methods, which a pickle cannot tamper with."""

    def __init__(self, file: Any, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self.bytes_left = size
        self.allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _DType,
            ("_codecs", "encode"): self._encode,
            ("__builtin__", "bytes"): self._no_bytes,  # how protocols below 3 write empty bytes
        }
        for core in ("numpy.core", "numpy._core"):
            self.allowed[f"{core}.multiarray", "_reconstruct"] = self._reconstruct
            self.allowed[f"{core}.multiarray", "scalar"] = self._scalar
            self.allowed[f"{core}.numeric", "_frombuffer"] = self._frombuffer

    def find_class(self, module: str, name: str) -> Any:
        """Only the names that numeric arrays need; anything else is refused, so it cannot be called."""
        if (module, name) not in self.allowed:
            raise InputError(f"wants to use {module}.{name}, which is not plain numeric data; it was not run")
        return self.allowed[module, name]

    def count_bytes(self, count: int) -> None:
        """Arrays cannot be larger together than the file: one block of bytes may not serve many arrays."""
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise InputError("declares arrays larger than the file itself")

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise InputError(f"encodes bytes as {encoding!r}, which NumPy never does")
        return text.encode("latin1")

    def _no_bytes(self) -> bytes:
        return b""

    def _reconstruct(self, subtype: Any, shape: Any, kind: Any) -> _Array:
        return _Array(self.count_bytes)  # NumPy pickles an empty array here, its contents follow as state

    def _scalar(self, dtype: _DType, raw: bytes | str) -> _Array:
        return self._frombuffer(raw, dtype, (), "C")

    def _frombuffer(self, raw: Any, dtype: _DType, shape: Any, order: str, axis_order: Any = None) -> _Array:
        array = _Array(self.count_bytes)
        array.fill(raw, dtype, shape, "C" if order == "K" else order)
        if axis_order is not None and array.value is not None:
            array.value = array.value.transpose(axis_order)
        return array


def _check_opcodes(file: Any) -> None:
    """Refuse what could exhaust memory or reach outside, before a single instruction is executed."""
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name in _PERSISTENT_IDS:
            raise InputError("refers to data outside the file (a persistent id)")
        if opcode.name in _MEMO_WRITES and argument is not None and int(argument) > (position or 0):
            raise InputError(f"is damaged: memory slot {argument} at byte {position}")


def _numbers(value: Any, seen: dict[int, Any]) -> Any:
    """Replace array stand-ins by arrays in nested containers; `seen` keeps shared ones from multiplying."""
    if isinstance(value, _Array):
        if value.value is None:
            raise InputError("holds an array without contents")
        return value.value
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        mapping = seen[id(value)] = {}
        mapping.update((key, _numbers(item, seen)) for key, item in value.items())
        return mapping
    if isinstance(value, (list, tuple)):
        sequence = seen[id(value)] = []
        sequence.extend(_numbers(item, seen) for item in value)
        return sequence
    return value


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the checkpoint file itself")
    if not path.is_file():
        raise MissingFileError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; {_WAY_OUT}")
    return path


def read_pickle(path: str | Path) -> Any:
    """Read a pickle of numbers, strings, lists, dicts and NumPy arrays; nothing in it is executed.

    Pickles of any protocol and of NumPy 1 (`numpy.core`) or 2 (`numpy._core`) are read.

    Args:
        path: the file.

    Returns:
        The object; arrays are read-only, tuples become lists.

    Raises:
        InputError: the file is damaged, or wants anything but plain numeric data (the message names it).
        MissingFileError: there is no such file.
    """
    path = _existing_file(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if view[0] not in _PICKLE_STARTS:
            raise InputError(f"{path} is no checkpoint: it starts with {view[:4]!r}, unlike any file of weights")
        try:
            _check_opcodes(view)
            view.seek(0)
            return _numbers(_NumericUnpickler(view, len(view)).load(), {})
        except InputError as error:
            raise InputError(f"{path} {error}; {_WAY_OUT}") from None
        except _DAMAGE as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{path} is damaged or not a pickle ({reason}); {_WAY_OUT}") from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, with advice on how to switch the protection off
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        refused = f"wants to use {found[1]}, which was not run" if found else None
        reason = refused or "is damaged or holds more than tensors"
        raise InputError(f"{path} {reason}; {_WAY_OUT}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a usable safetensors file ({error}); download it again") from None


def _read_any(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # safetensors: 8 bytes with the length of a JSON header, then the header
        return _read_safetensors(path)
    return _read_torch(path) if start[:2] == b"PK" else read_pickle(path)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray):
        return None
    native = value.astype(value.dtype.newbyteorder("="), copy=True)  # the view on the file is read-only
    return torch.from_numpy(np.ascontiguousarray(native).reshape(value.shape))


def _check_total_size(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Zero strides, or one storage behind many tensors, would grow without bound when converted."""
    distinct = {(value.data_ptr(), tuple(value.shape)): value.nbytes for value in tensors.values()}
    if sum(distinct.values()) > path.stat().st_size:
        raise InputError(f"{path} declares tensors larger than the file itself; {_WAY_OUT}")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a `.pkl`, `.pth`/`.pt` or `.safetensors` file; the kind is told from its contents.

    Weights wrapped as `{"model": …}` or `{"state_dict": …}` and names that start with `module.` are freed.

    Args:
        path: the file.

    Returns:
        Name to tensor, on the CPU, in the stored dtype.

    Raises:
        InputError: the file is damaged, holds something else than named arrays, or code.
        MissingFileError: there is no such file.
    """
    path = _existing_file(path)
    content = _read_any(path)
    if isinstance(content, int) and content == _LEGACY_TORCH_MAGIC:
        raise InputError(f"{path} was written by PyTorch before 1.6; save it again as .safetensors")
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds {_kind(content)}, not a dict of weights; {_WAY_OUT}")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        tensor = _tensor(value)
        if tensor is None or not isinstance(name, str):
            raise InputError(f"{path}: entry {name!r} is {_kind(value)}, not an array of numbers; {_WAY_OUT}")
        tensors[name.removeprefix("module.")] = tensor
    _check_total_size(path, tensors)
    return tensors


def read_concept_file(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Read an official concept file: a pickled list of weights and names.

    Args:
        path: the `.pkl` file.

    Returns:
        Weights (E, K) float32, one column per concept, and the K names.

    Raises:
        InputError: the file is damaged, unsafe, or something else than such a list.
        MissingFileError: there is no such file.
    """
    content = read_pickle(path)
    is_pair = isinstance(content, (list, tuple)) and len(content) == 2
    weights, names = content if is_pair else (None, None)
    if not isinstance(weights, np.ndarray) or not isinstance(names, (list, tuple)):
        found = _kind(content)
        raise InputError(f"{path} is not a concept file: expected a list [weights, names], got {found}")
    return weights.astype(np.float32), list(names)


def _kind(value: Any) -> str:
    is_empty = value is None or (isinstance(value, dict) and not value)
    return "nothing" if is_empty else f"a {type(value).__name__}"


__all__ = ["read_concept_file", "read_pickle", "read_state_dict"]
