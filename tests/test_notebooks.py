"""The notebooks, run from their first cell to their last with small sizes."""

import json
import os
import pathlib
import re
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
    # And nothing of the machine that ran it.
    shown = json.dumps([output for cell in code for output in cell.outputs])
    assert (
        not re.search(r"[\s\"'>](/[a-z]+){2}", re.sub(r"image/(png|svg\+xml)\": \"[^\"]*\"", "", shown))
        and "Warning" not in shown
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_is_in_the_reference(path):
    """A name itself, or the module that is imported whole by some of its names."""
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    reference = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for module, names in re.findall(r"^from (mtpd_jax[\w.]*) import (.+)$", code, re.MULTILINE):
        for name in names.split(", "):
            assert any(f"{one}.".startswith(f"{module}.{name}.") for one in reference), f"{module}.{name}"


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


@pytest.mark.slow
def test_post_hoc_heads_for_your_model(model, text_file, tmp_path, monkeypatch):
    parameters = {
        "MODEL": str(model), "TEXT": text_file, "WORK": "work", "STEPS": 8, "BATCH": 4, "LENGTH": 64,
        "DRAFTS": 2, "PROMPTS": 8, "PROMPT_CHARACTERS": 12, "NEW_TOKENS": 8,
    }  # fmt: skip
    notebook = executed(ROOT / "notebooks" / "posthoc.ipynb", parameters, tmp_path, monkeypatch)
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert (
        "identical to plain decoding: True" in printed and printed.count("image/png") == 3 and "Counts(ok=32" in printed
    )


@pytest.mark.slow
def test_one_model_three_ways_to_write_faster(model, text_file, tmp_path, monkeypatch):
    parameters = {
        "MODEL": str(model), "TEXT": text_file, "WORK": "work", "STEPS": 8, "BATCH": 4, "LENGTH": 64,
        "DRAFTS": 2, "SLOTS": 3, "PROMPTS": 6, "PROMPT_CHARACTERS": 12, "NEW_TOKENS": 8, "CONFIDENCES": (0.01, 0.9),
    }  # fmt: skip
    notebook = executed(ROOT / "notebooks" / "three_ways.ipynb", parameters, tmp_path, monkeypatch)
    printed = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "same text as plain: True" in printed and printed.count("image/png") == 4


TINY = {"STEPS": 4, "BATCH": 4, "LENGTH": 32, "WIDTH": 32, "LAYERS": 1}


def pictures(notebook):
    return json.dumps([cell.get("outputs", []) for cell in notebook.cells]).count("image/png")


def printed_by(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_where_the_time_goes(tmp_path, monkeypatch):
    parameters = {"MODELS": {"32 x 1": (64, 1)}, "HEADS": 2, "NEW_TOKENS": 8, "TURNS": 1, "ROWS": (1, 2)}
    parameters["ACCEPTANCE"] = (0.8, 0.6)
    assert pictures(executed(ROOT / "notebooks" / "where_the_time_goes.ipynb", parameters, tmp_path, monkeypatch)) == 4


def test_first_steps(tmp_path, monkeypatch):
    parameters = {**TINY, "WORK": "work", "HEADS": 2, "PROMPTS": 2, "NEW_TOKENS": 6, "LENGTH": 64}
    notebook = executed(ROOT / "notebooks" / "first_steps.ipynb", parameters, tmp_path, monkeypatch)
    assert pictures(notebook) == 2 and "identical to plain decoding: True" in printed_by(notebook)
    shown = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert shown.count("no colour: main head") == 2  # two texts


@pytest.mark.slow
def test_what_heads_learn(tmp_path, monkeypatch):
    parameters = {**TINY, "WORK": "work", "HEADS": 2, "TEXTS": 2, "POSITIONS": 2}
    notebook = executed(ROOT / "notebooks" / "what_heads_learn.ipynb", parameters, tmp_path, monkeypatch)
    assert pictures(notebook) == 4 and "of the mass" in printed_by(notebook)


@pytest.mark.slow
def test_extension(tmp_path, monkeypatch):
    parameters = {**TINY, "WORK": "work", "HEADS": 1, "LONGER": (2, 4), "EXTENSION_STEPS": 3, "PROMPTS": 2}
    parameters |= {"NEW_TOKENS": 4, "LENGTH": 128}
    notebook = executed(ROOT / "notebooks" / "extension.ipynb", parameters, tmp_path, monkeypatch)
    assert pictures(notebook) == 2 and "the backbone is unchanged: True" in printed_by(notebook)
    assert "texts equal plain decoding's: True" in printed_by(notebook)


@pytest.mark.slow
def test_the_objective(tmp_path, monkeypatch):
    parameters = {**TINY, "WORK": "work", "HEADS": 2, "SEEDS": (0,), "BETAS": (0.0, 1.0), "TOP_NS": (8,)}
    parameters["DIVERGENCES"] = ("forward", "tv")
    notebook = executed(ROOT / "notebooks" / "objective.ipynb", parameters, tmp_path, monkeypatch)
    assert pictures(notebook) == 2 and "7 rows" in printed_by(notebook)


@pytest.mark.slow
def test_sharding(tmp_path, monkeypatch):
    meshes = {"one device": (1, 1, 1), "fsdp 8": (1, 8, 1), "data 8": (8, 1, 1)}
    parameters = {**TINY, "WORK": "work", "HEADS": 1, "BATCH": 8, "MESHES": meshes}
    notebook = executed(ROOT / "notebooks" / "sharding.ipynb", parameters, tmp_path, monkeypatch)
    assert pictures(notebook) == 3
    (difference,) = re.findall(r"largest relative difference: (\S+)", printed_by(notebook))
    assert 0 < float(difference) < 1e-3
    assert "8 True" in printed_by(notebook)


def test_every_notebook_is_run():
    """By a test of its own, above."""
    text = pathlib.Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in NOTEBOOKS) and len(NOTEBOOKS) >= 8
