"""The notebooks, run from their first cell to their last with small sizes."""

import json
import os
import pathlib
import sys

import pytest

from mtpd_jax import train
from mtpd_jax.conversion import to_hf
from tests.builders import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
RUNNER = ROOT / ".cache" / "notebooks"
sys.path.append(str(RUNNER))
nbclient = pytest.importorskip("nbclient", reason="what runs notebooks is not installed")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(path, parameters, folder, monkeypatch):
    """A notebook with other values in the cell of its parameters; it has to have that cell, and to use all of them."""
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = {line.split("=")[0].strip() for line in tagged[0].source.splitlines() if "=" in line}
    assert {name for group in names for name in group.split(", ")} >= set(parameters)
    tagged[0].source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    # A process of its own, which has the runner's packages behind its own.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(RUNNER)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("JUPYTER_PATH", str(RUNNER / "share" / "jupyter"))
    where = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_opens_anywhere_and_was_run(path):
    """Its first cell installs; all of it was run in order; what it uses of the package is public."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert "._" not in "".join(cell.source for cell in code)


@pytest.fixture(scope="module")
def model(text_file, tmp_path_factory):
    """A small model as a folder of Hugging Face's libraries."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(
        data__source="text", data__paths=(text_file,), heads__num_heads=0, training__sequence_length=64,
        training__steps=10, mesh__data=1,
    )  # fmt: skip
    train.run(config, str(folder / "run"))
    to_hf(str(folder / "run"), str(folder / "backbone"), format="backbone")
    return folder / "backbone"


def test_post_hoc_heads_for_your_model(model, text_file, tmp_path, monkeypatch):
    parameters = {
        "MODEL": str(model), "TEXT": text_file, "WORK": "work", "STEPS": 8, "BATCH": 4, "LENGTH": 64,
        "DRAFTS": 2, "PROMPTS": 8, "PROMPT_CHARACTERS": 12, "NEW_TOKENS": 8,
    }  # fmt: skip
    notebook = executed(ROOT / "notebooks" / "posthoc.ipynb", parameters, tmp_path, monkeypatch)
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "identical: True" in printed and "image/png" in printed and "Counts(ok=32" in printed


@pytest.mark.slow
def test_one_model_three_ways_to_write_faster(model, text_file, tmp_path, monkeypatch):
    parameters = {
        "MODEL": str(model), "TEXT": text_file, "WORK": "work", "STEPS": 8, "BATCH": 4, "LENGTH": 64,
        "DRAFTS": 2, "SLOTS": 3, "PROMPTS": 6, "PROMPT_CHARACTERS": 12, "NEW_TOKENS": 8, "CONFIDENCES": (0.01, 0.9),
    }  # fmt: skip
    notebook = executed(ROOT / "notebooks" / "three_ways.ipynb", parameters, tmp_path, monkeypatch)
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "LOSSY confident 3 at 0.01" in printed and "the same text as plain: True" in printed
    assert printed.count("image/png") == 3
