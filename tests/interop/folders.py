"""Folders of models, changed."""

import safetensors.numpy


def retensor(folder, change):
    """Changes what model.safetensors holds."""
    path = folder / "model.safetensors"
    tensors = {name: value.copy() for name, value in safetensors.numpy.load_file(path).items()}
    change(tensors)
    path.unlink()
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
