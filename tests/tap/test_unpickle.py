"""Checkpoint files are read without running anything in them."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tap_llm.errors import InputError, MissingFileError
from tap_llm.tap.unpickle import read_concept_file, read_pickle, read_state_dict


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "float32": rng.standard_normal((3, 4)).astype(np.float32),
        "float16": rng.standard_normal((2, 3, 2)).astype(np.float16),
        "fortran": np.asfortranarray(rng.standard_normal((3, 5))),
        "transposed": rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(1, 2, 0),
        "int64": np.arange(6).reshape(2, 3),
        "bool": np.array([True, False]),
        "big_endian": np.arange(4, dtype=">f4"),
        "zero_dim": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
    }


class Evil:
    """Pickles to a call of os.system that would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_all_protocols_give_back_the_arrays(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "w.pkl", pickle.dumps(OrderedDict(arrays()), protocol=protocol))
    loaded = read_pickle(path)
    assert list(loaded) == list(arrays())
    for name, expected in arrays().items():
        np.testing.assert_array_equal(loaded[name], expected)
        assert loaded[name].dtype == expected.dtype and loaded[name].shape == expected.shape


@pytest.mark.parametrize(("new", "old"), [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
def test_module_paths_of_both_numpy_generations(tmp_path: Path, new: bytes, old: bytes) -> None:
    content = pickle.dumps({"a": np.arange(3.0)}, protocol=2)  # protocol 2 stores names as plain lines
    path = write(tmp_path / "w.pkl", content.replace(old, new))
    assert new in path.read_bytes()
    np.testing.assert_array_equal(read_pickle(path)["a"], np.arange(3.0))


def test_numpy_scalars(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pkl", pickle.dumps({"steps": np.int64(5)}))
    tensor = read_state_dict(path)["steps"]
    assert tensor.shape == () and tensor.item() == 5


def test_state_dict_tensors_are_native_and_writable(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pkl", pickle.dumps(arrays()))
    tensors = read_state_dict(path)
    tensors["float32"].zero_()  # must not fail or warn: these are not views of the file
    assert tensors["float16"].dtype == torch.float16 and tensors["zero_dim"].shape == ()
    assert tensors["big_endian"].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(tensors["transposed"].numpy(), arrays()["transposed"])


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    content = {"model": arrays(), "extra": Evil(marker)}
    path = write(tmp_path / "evil.pkl", pickle.dumps(content, protocol=protocol))
    with pytest.raises(InputError, match=r"evil\.pkl wants to use (posix|nt)\.system") as error:
        read_state_dict(path)
    assert "not run" in str(error.value) and "safetensors" in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy load", "numpy.testing._private.utils runstring",
                                  "torch._utils _rebuild_tensor_v2",
                                  "collections OrderedDict.fromkeys"])  # fmt: skip
def test_names_outside_the_list(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "evil.pkl", b"c" + name.replace(" ", "\n").encode() + b"\n(S'1'\ntR.")
    with pytest.raises(InputError, match=name.replace(" ", r"\.")):
        read_pickle(path)


def test_code_inside_torch_files(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"w": Evil(marker)}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth wants to use (posix|nt)\.system") as error:
        read_state_dict(tmp_path / "evil.pth")
    assert "weights_only" not in str(error.value) and not marker.exists()


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pkl", pickle.dumps({"a": np.array([{}, None], dtype=object)}))
    with pytest.raises(InputError, match="dtype 'O8'"):
        read_pickle(path)


def test_structured_arrays_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pkl", pickle.dumps({"a": np.zeros(2, dtype=[("x", "f4")])}))
    with pytest.raises(InputError, match="only plain numbers"):
        read_pickle(path)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.8, 0.999])
def test_truncated_files(tmp_path: Path, keep: float) -> None:
    content = pickle.dumps(arrays())
    path = write(tmp_path / "cut.pkl", content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=r"cut\.pkl is damaged.*download the file again"):
        read_state_dict(path)


def test_wrong_number_of_bytes(tmp_path: Path) -> None:
    content = pickle.dumps({"a": np.zeros(1000, np.float32)}, protocol=2)
    path = write(tmp_path / "w.pkl", content.replace(struct.pack("<H", 1000), struct.pack("<H", 999), 1))
    with pytest.raises(InputError, match="damaged"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x04", b"version https://git-lfs\n",
                                     b"PK\x03\x04junk",
                                     bytes(range(256))])  # fmt: skip
def test_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"w\.bin"):
        read_state_dict(write(tmp_path / "w.bin", content))


def test_random_damage_is_always_one_clear_error(tmp_path: Path) -> None:
    content = bytearray(pickle.dumps({"a": np.arange(50), "b": [1, "x"]}, protocol=4))
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] = rng.integers(256)
        path = write(tmp_path / "w.pkl", bytes(damaged))
        try:
            read_pickle(path)
        except InputError as error:
            assert "w.pkl" in str(error)


def test_empty_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        read_pickle(write(tmp_path / "w.pkl", b""))
    with pytest.raises(MissingFileError, match="no file"):
        read_state_dict(tmp_path / "absent.pkl")
    with pytest.raises(InputError, match="is a folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {}, "text", {"a": np.zeros(2), "b": "text"}, {3: np.zeros(2)}])
def test_other_contents(tmp_path: Path, content: Any) -> None:
    with pytest.raises(InputError, match=r"not a dict of weights|not an array of numbers"):
        read_state_dict(write(tmp_path / "w.pkl", pickle.dumps(content)))


def test_one_block_of_bytes_cannot_serve_many_arrays(tmp_path: Path) -> None:
    raw = bytes(10_000)

    class Repeated:
        def __reduce__(self) -> tuple[Any, ...]:
            return np._core.numeric._frombuffer, (raw, np.dtype("f4"), (2500,), "C")  # type: ignore[attr-defined]

    path = write(tmp_path / "bomb.pkl", pickle.dumps({str(i): Repeated() for i in range(20)}))
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match="larger than the file"):
        read_pickle(path)


def test_expanded_torch_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="larger than the file"):
        read_state_dict(tmp_path / "bomb.pth")


def test_huge_memo_index_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bomb.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(InputError, match="memory slot"):
        read_pickle(path)


def test_nested_references_stay_linear(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(100):  # 2 ** 100 leaves if followed naively
        nested = [nested, nested]
    assert len(read_pickle(write(tmp_path / "w.pkl", pickle.dumps(nested)))) == 2


def test_persistent_ids_are_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return "elsewhere" if isinstance(obj, float) else None

    buffer = io.BytesIO()
    Pickler(buffer).dump({"a": 1.5})
    with pytest.raises(InputError, match="persistent id"):
        read_pickle(write(tmp_path / "w.pkl", buffer.getvalue()))


def test_a_pickle_cannot_tamper_with_the_reader(tmp_path: Path) -> None:
    poison = b"cnumpy.core.multiarray\n_reconstruct\n(N}S'__defaults__'\n(I1\ntstb."
    with pytest.raises(InputError):
        read_pickle(write(tmp_path / "evil.pkl", poison))
    good = write(tmp_path / "w.pkl", pickle.dumps({"a": np.arange(3)}))
    assert read_pickle(good)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("kind", ["pkl", "pth", "safetensors"])
def test_kinds_and_wrappers(tmp_path: Path, wrapper: str | None, kind: str) -> None:
    path, tensors = tmp_path / f"weights.{kind}", {"module.a": torch.arange(6.0).view(2, 3)}
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pth":
        torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, path)
    else:
        named = {name: tensor.numpy() for name, tensor in tensors.items()}
        path.write_bytes(pickle.dumps({wrapper: named, "epoch": 3} if wrapper else named))
    loaded = read_state_dict(path)
    assert list(loaded) == ["a"] and torch.equal(loaded["a"], torch.arange(6.0).view(2, 3))


def test_damaged_safetensors_and_old_torch_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "w.safetensors")
    content = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"cut\.safetensors is not a usable"):
        read_state_dict(write(tmp_path / "cut.safetensors", content[:-50]))
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before 1\.6"):
        read_state_dict(tmp_path / "old.pth")


def test_concept_file(tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = write(tmp_path / "c.pkl", pickle.dumps([weights, ["a", "b", "c"]]))
    loaded, names = read_concept_file(path)
    assert names == ["a", "b", "c"] and loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, weights)
    for other in ({"a": weights}, [weights], [["a"], weights], [1, 2]):
        with pytest.raises(InputError, match="not a concept file"):
            read_concept_file(write(tmp_path / "d.pkl", pickle.dumps(other)))


def test_a_picture_is_no_checkpoint(tmp_path: Path) -> None:
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"<html>"):
        path = write(tmp_path / "tap.pkl", start + bytes(100))
        with pytest.raises(InputError, match=r"tap\.pkl is no checkpoint: it starts with") as caught:
            read_state_dict(path)
        assert "persistent" not in str(caught.value)
