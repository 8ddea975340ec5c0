"""A folder of safetensors files, whose tensors are read one at a time. Nothing else is ever opened: no pickle."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  or NumPy would not know bfloat16
import numpy as np
import safetensors

from mtpd_jax.data.files import read_json

INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# What others keep weights in, and what runs code when it is opened.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file.

    Attributes:
      file: which.
      shape, dtype: as its header says.
    """

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str


class TensorFolder:
    """The tensors of a folder, by name.

    Args:
      folder: that holds them.
      files: those that are read; None: as the index says, or the single file that there is.

    Raises:
      ValueError: there are none, a file is damaged or missing, or the index does not say what is in the files.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str] | None = None):
        self._folder = folder
        self.tensors: Mapping[str, Tensor]
        if files is not None:
            self.tensors = {name: tensor for file in files for name, tensor in _headers(folder / file)}
        else:
            self.tensors = self._indexed() if (folder / INDEX).exists() else self._single()
            if (folder / INDEX).exists() and (folder / _SINGLE).exists():
                raise ValueError(f"{folder}: holds both {INDEX} and {_SINGLE}: one of them is left over from before")

    def _single(self) -> dict[str, Tensor]:
        path = self._folder / _SINGLE
        if path.exists():
            return dict(_headers(path))
        pickles = sorted(found.name for pattern in _PICKLES for found in self._folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{self._folder}: holds {pickles[0]}, a pickle, which may run code when it is opened and is not; "
                f"expected {_SINGLE}: save the model with safetensors"
            )
        raise ValueError(f"{self._folder}: holds neither {_SINGLE} nor {INDEX}")

    def _indexed(self) -> dict[str, Tensor]:
        index = self._folder / INDEX
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise ValueError(f"{index}: expected a weight_map from names to files")
        elsewhere = [file for file in named.values() if pathlib.Path(file).name != file]
        if elsewhere:
            raise ValueError(f"{index}: {elsewhere[0]!r}: expected the name of a file in the same folder")
        found: dict[str, Tensor] = {}
        for file in sorted(set(named.values())):
            for name, tensor in _headers(self._folder / file):
                if named.get(name) != file:
                    says = f"in {named[name]}" if name in named else "nowhere"
                    raise ValueError(f"{index}: {name} is in {file}, and the index says {says}")
                found[name] = tensor
        missing = sorted(named.keys() - found.keys())
        if missing:
            raise ValueError(f"{index}: {missing[0]} is not in {named[missing[0]]}")
        return found

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
          ValueError: it is of a kind of number that NumPy does not know, or the file was damaged meanwhile.
        """
        tensor = self.tensors[name]
        try:
            with _open(tensor.file) as file:
                return file.get_tensor(name)
        except (safetensors.SafetensorError, TypeError, AttributeError) as error:
            raise ValueError(f"{tensor.file}: {name} of {tensor.dtype} is not readable ({error})") from error


def _headers(path: pathlib.Path) -> Iterator[tuple[str, Tensor]]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            part = file.get_slice(name)
            yield name, Tensor(path, tuple(part.get_shape()), str(part.get_dtype()))


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, "np")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged, or no safetensors file ({error})") from error
