"""``train --dry_run``: what it says is what training does, and nothing is left behind."""

import dataclasses
import io
import json
import pathlib

import jax
import pytest
import rich.console

from mtpd_jax import frontdoor, train
from mtpd_jax.data.pipeline import TrainingData
from mtpd_jax.data.sources import open_source
from mtpd_jax.dry_run import dry_run, show
from mtpd_jax.methods.method import method_of
from mtpd_jax.runs.workdir import open_workdir
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import initial_state
from tests.builders import tiny_config


@pytest.fixture
def small(text_file):
    """A small config on the shared text."""
    return tiny_config(data__source="text", data__paths=(text_file,), training__steps=3)


def test_a_new_run(small, text_file, tmp_path):
    found = dry_run(small, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    # Sizes are those of the state that training makes.
    config = small
    state = initial_state(method_of(config, make_mesh(config.mesh)), make_optimizer(config))
    leaves = jax.tree.leaves(state)
    assert found.state_bytes == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert found.trained == sum(leaf.size for leaf in jax.tree.leaves(state.parameters)) and found.frozen == 0
    assert sum(found.parameters.values()) == found.trained
    assert found.flops_per_step == found.flops_per_token * found.tokens_per_step
    assert found.temporary_bytes is not None and found.temporary_bytes > 0
    assert (found.step, found.steps) == (0, config.training.steps)
    # Rows are whole, and their segments are parts of documents, cut where a row ends and nowhere else.
    assert len(found.rows) == config.training.batch_size
    end = config.tokenizer.end_token
    documents = pathlib.Path(text_file).read_text().split(config.data.separator)
    for row in found.rows:
        assert sum(segment.tokens for segment in row) == config.training.sequence_length
        for segment in row:
            assert any(segment.text in one + end for one in documents)
        assert all(segment.text.endswith(end) for segment in row[:-1])
        assert all(any((one + end).startswith(segment.text) for one in documents) for segment in row[1:])
    assert any(len(row) > 1 for row in found.rows)


@pytest.mark.parametrize(("checkpoint", "step"), [pytest.param("newest", 3, marks=pytest.mark.slow), (1, 1)])
def test_a_run_that_goes_on_is_given_its_next_batch(small, tmp_path, checkpoint, step):
    small = dataclasses.replace(small, checkpoint=dataclasses.replace(small.checkpoint, every_steps=1, keep=3))
    train.run(small, str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    longer = dataclasses.replace(small, training=dataclasses.replace(small.training, steps=6))
    found = dry_run(longer, str(tmp_path / "run"), checkpoint)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert (found.step, found.steps) == (step, 6)
    with pytest.raises(ValueError, match="checkpoint = 4: .* has 1, 2, 3"):
        dry_run(longer, str(tmp_path / "run"), 4)
    # The stream from its beginning, with the tokenizer of the run.
    folder = open_workdir(str(tmp_path / "run"))
    tokenizer = folder.read_tokenizer(longer)
    with TrainingData(longer, open_source(longer.data), tokenizer) as data:
        following = [next(data) for _ in range(step + 1)][-1]
    texts = ["".join(segment.text for segment in row) for row in found.rows]
    rows = following.tokens.reshape(-1, longer.training.sequence_length)
    assert texts == [tokenizer.decode(row, special=True) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "fields", "said"),
    [
        ("posthoc", {"heads__num_heads": 2}, "heads 1 to 2"),
        ("standalone", {"heads__num_heads": 0, "objective__k_max": 4, "objective__regions": 4}, "spans of 2 to 4"),
        ("extension", {"heads__num_heads": 3}, "head 3 on top of"),
    ],
)
def test_every_method_says_what_it_trains_and_what_stays_as_it_is(mode, fields, said, text_file, tmp_path):
    """On a mesh, too; a run that is made after it has as many parameters."""
    common = {
        "data__source": "text",
        "data__paths": (text_file,),
        "training__steps": 3,
        "mesh__fsdp": 2,
        "mesh__data": 2,
    }
    heads = 2 if mode == "extension" else 0
    train.run(tiny_config(**common, heads__num_heads=heads), str(tmp_path / "source"))
    config = tiny_config(**common, objective__mode=mode, objective__source=str(tmp_path / "source"), **fields)
    found = dry_run(config, str(tmp_path / "run"))
    assert said in found.trains and not (tmp_path / "run").exists()
    assert found.frozen > 0 and 0 < found.state_bytes < found.device_bytes
    assert train.run(config, str(tmp_path / "run")).parameters == found.trained + found.frozen


def test_what_training_refuses_is_refused(small, tmp_path):
    config = small.to_dict()
    config["mesh"]["data"] = 3
    with pytest.raises(ValueError, match="mesh"):
        dry_run(config, str(tmp_path / "run"))


def test_memory_is_added_up_and_compared_with_the_device(small, text_file, tmp_path):
    found = dry_run(small, str(tmp_path / "run"))
    together = found.state_bytes + found.temporary_bytes
    for device, said in ((together, ""), (together - 1, ": DOES NOT FIT")):
        console = rich.console.Console(width=120, file=io.StringIO())
        show(console, dataclasses.replace(found, device_bytes=device))
        (line,) = [line for line in console.file.getvalue().splitlines() if "together" in line]
        assert line.split("together")[1].strip() == f"{together / 2**20:,.1f} MiB{said}"


@pytest.fixture
def config_file(tmp_path, small):
    """A config file that says what the fixture says."""
    tree = json.dumps(small.to_dict())
    (tmp_path / "tiny.py").write_text(
        f"import json, ml_collections\ndef get_config(): return ml_collections.ConfigDict(json.loads({tree!r}))\n"
    )
    return tmp_path / "tiny.py"


def test_the_command(monkeypatch, capsys, config_file, tmp_path):
    file = tmp_path / "dry.json"

    def call(*more):
        arguments = ["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *more]
        monkeypatch.setattr("sys.argv", arguments)
        return frontdoor.status_of(train.main), *capsys.readouterr()

    status, output, said = call("--dry_run", f"--json={file}")
    assert status == 0 and "nothing was created" in output and "FLOPs per token" in output and "compiling" in said
    assert set(json.loads(file.read_text())) >= {"parameters", "flops_per_token", "state_bytes", "rows"}
    assert not (tmp_path / "run").exists()
    status, _, errors = call(f"--json={file}")
    assert status == 2 and "--dry_run" in errors and not (tmp_path / "run").exists()
    for flag in ("--break_lock", "--backbone=somewhere"):
        status, _, errors = call("--dry_run", flag)
        assert status == 2 and f"{flag.partition('=')[0]}: expected none with --dry_run" in errors
