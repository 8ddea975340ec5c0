"""The built package, installed where nothing else is, and used from another folder."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*words, **options):
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, **options).stdout


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path, text_file):
    """It holds what is not code as well; a run is trained, continued and measured with nothing of the checkout."""
    source = tmp_path / "source"
    run("git", "clone", "--quiet", ROOT, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert "mtpd_jax/evaluation/page.html" in zipfile.ZipFile(wheel).namelist()
    # An environment of its own, in the versions that are pinned: what is asked for is what the wheel asks for.
    python = tmp_path / "environment" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "environment")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "requirements.txt", wheel)
    small = {
        "data.source": "text", "data.paths": (text_file,), "data.validation_fraction": 0.2, "data.shuffle_window": 8,
        "model.vocabulary_size": 300, "model.width": 32, "model.layers": 1, "model.query_heads": 2,
        "model.kv_heads": 1, "model.head_size": 16, "model.mlp_width": 32, "model.context": 64,
        "training.steps": 2, "training.batch_size": 4, "training.sequence_length": 32, "optimizer.warmup_steps": 1,
        "evaluation.documents": 2, "mesh.data": 1,
    }  # fmt: skip
    (tmp_path / "config.py").write_text(
        "from configs import base\nfrom mtpd_jax.editing import change\n\n"
        f"def get_config():\n    config = base.get_config()\n    change(config, {small!r})\n    return config\n"
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    away = {"cwd": tmp_path, "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}}
    module = (python, "-m")
    run(*module, "mtpd_jax.train", "--config=config.py", "--workdir=run", **away)
    run(
        *module, "mtpd_jax.generate", "--workdir=run", "--prompt=the cat", "--max_new_tokens=4", "--json=a.json", **away
    )
    report = ("--prompts=prompts.jsonl", "--max_new_tokens=4", "--html=page.html")
    run(*module, "mtpd_jax.evaluate", "--workdir=run", *report, **away)
    assert len(json.loads((tmp_path / "a.json").read_text())["tokens"]) == 4
    assert "the cat" in (tmp_path / "page.html").read_text()
    where = run(python, "-c", "import mtpd_jax; print(mtpd_jax.__file__)", **away)
    assert where.startswith(str(tmp_path / "environment"))
