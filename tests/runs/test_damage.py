"""What is read is what was written: flipped bits, other configs and tokenizers, lost checkpoints and broken lines."""

import errno
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mtpd_jax import evaluate, generate, train
from mtpd_jax.config import MeshConfig
from mtpd_jax.data.files import json_digest
from mtpd_jax.run import open_run
from mtpd_jax.runs import digests as digests_module
from mtpd_jax.runs.digests import digests_of
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.state import DivergedError
from tests.builders import replace, tiny_config
from tests.runs.runs import comparable, lines, restored


@pytest.fixture(scope="module")
def run_config(text_file):
    return tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=8, checkpoint__every_steps=4, mesh__data=1,
        training__batch_size=2, evaluation__every_steps=8, evaluation__documents=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(run_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("damage") / "whole"
    assert train.run(run_config, str(workdir)).finished
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def array_files(workdir, step):
    return sorted(file for file in (workdir / "checkpoints" / str(step) / "parameters").rglob("*") if file.is_file())


def change_weights(monkeypatch, change):
    """Changes what is restored after it was read, as bits do that flip where no library looks."""
    real = digests_module._on_host

    def changed(leaf):
        return real(change(leaf)) if leaf.ndim > 1 else real(leaf)

    monkeypatch.setattr(digests_module, "_on_host", changed)


def test_digests_are_those_of_bits_and_places(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(16, 8, 3)).astype(np.float32)

    def digest(array):
        return digests_of({"a": {"b": jnp.asarray(array)}})[0]["a/b"]

    first = digest(values)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, expert=1))
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    leaf = jax.device_put(values, sharding)
    on_devices, finite = digests_module._on_devices(leaf)
    assert "".join(f"{half:08x}" for half in jax.device_get(on_devices)) == first and finite
    others = {first, digest(values[::-1]), digest(values.swapaxes(1, 2)), digest(values.reshape(16, 24)[:, ::-1])}
    for bit in range(32):
        bits = values.view(np.uint32).copy()
        bits[3, 2, 1] ^= np.uint32(1 << bit)
        others.add(digest(bits.view(np.float32)))
    assert len(others) == 36
    monkeypatch.setattr(digests_module, "_AT_ONCE", 7)
    assert digest(values) == first
    for kind in (jnp.bfloat16, jnp.int32):
        array = jnp.asarray(values * 100).astype(kind)
        sums, _ = digests_module._on_devices(array)
        assert digests_module._on_host(array)[0] == [int(half) for half in sums]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(number, monkeypatch):
    tree = {"a": jnp.zeros(3), "b": {"c": jnp.zeros((2, 2)).at[1, 0].set(number), "d": jnp.arange(3)}}
    for at_once in (1 << 20, 1):
        monkeypatch.setattr(digests_module, "_AT_ONCE", at_once)
        assert digests_of(tree)[1] == "b/c"
    assert not digests_module._on_devices(tree["b"]["c"])[1]
    assert digests_of({"a": tree["a"]})[1] is None


def test_a_damaged_checkpoint_is_passed_over(run_config, whole, copy, capsys):
    """For the one before, with a line; it is kept, and training ends where it would have."""
    before = generate.run(str(whole), ["the cat"], max_new_tokens=8, checkpoint=4)[0].tokens
    for file in array_files(copy, 8):
        flip(file, file.stat().st_size // 2)
    capsys.readouterr()
    assert generate.run(str(copy), ["the cat"], max_new_tokens=8)[0].tokens == before
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "damaged: 8 (" in said and "step 4 is used instead" in said
    assert open_run(str(copy)).step == 4
    assert train.run(run_config, str(copy)).finished
    said = capsys.readouterr().err
    assert "resuming from step 4 of 8" in said and "damaged: 8 (" in said
    assert (copy / "set_aside" / "8" / "parameters").is_dir()
    assert restored(copy, run_config)[1]["digests"] == restored(whole, run_config)[1]["digests"]
    assert comparable(copy) == comparable(whole)


def test_one_bit_of_one_weight_is_noticed(whole, monkeypatch):
    """Also where the storage does not notice."""

    def flipped(leaf):
        bits = np.asarray(leaf).view(np.uint32).copy()
        bits.flat[-1] ^= 1
        return jnp.asarray(bits.view(np.float32))

    change_weights(monkeypatch, flipped)
    with pytest.raises(
        ValueError, match=r"step 8: parameters/\S+ is not what was written; step 4: parameters/\S+ is not"
    ):
        open_run(str(whole))


def test_weights_that_are_not_finite_are_neither_written_nor_read(run_config, whole, tmp_path, monkeypatch):
    poison = lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan)  # noqa: E731
    with monkeypatch.context() as patch:
        change_weights(patch, poison)
        with pytest.raises(DivergedError, match=r"step 4: \S+/\S+ is not finite any more; there is no checkpoint"):
            train.run(run_config, str(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    real = digests_module._on_host
    monkeypatch.setattr(digests_module, "_on_host", lambda leaf: (real(leaf)[0], False))
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        open_run(str(whole))


def test_a_checkpoint_can_be_chosen(run_config, whole, copy):
    opened = open_run(str(copy), checkpoint=4)
    assert opened.step == 4
    np.testing.assert_array_equal(
        opened.parameters["embedding"], restored(whole, run_config, 4)[0].parameters["embedding"]
    )
    with pytest.raises(ValueError, match=r"checkpoint = 5: .* has 4, 8"):
        evaluate.run(str(copy), split_name="validation", checkpoint=5)
    with pytest.raises(ValueError, match=r"checkpoint = 5: .* has 4, 8"):
        train.run(run_config, str(copy), checkpoint=5)
    assert train.run(run_config, str(copy), checkpoint=4).finished
    assert (copy / "set_aside" / "8").is_dir()
    assert (copy / "set_aside" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert restored(copy, run_config)[1]["digests"] == restored(whole, run_config)[1]["digests"]
    for file in array_files(copy, 4):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint that can be used: step 4: not readable"):
        open_run(str(copy), checkpoint=4)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        ValueError("UNAVAILABLE: no route to the bucket"),
        ValueError("Failed to read [os_error_code='5']"),
    ],
    ids=str,
)
def test_what_cannot_be_read_now_is_not_damaged(run_config, copy, monkeypatch, error):
    """A network that is gone for a minute must not send a run back, and its newest checkpoint away."""
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", lambda *_, **__: (_ for _ in ()).throw(error))
        for use in (lambda: open_run(str(copy)), lambda: train.run(run_config, str(copy))):
            with pytest.raises(OSError, match=r"checkpoints/8: cannot be read now \("):
                use()
    assert not (copy / "set_aside").exists()
    assert open_run(str(copy)).step == 8


def test_a_folder_of_checkpoints_may_lie_on_another_disk(run_config, copy, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if pathlib.Path(elsewhere).stat().st_dev == copy.stat().st_dev:
            pytest.skip("/dev/shm is no other disk here")
        shutil.move(copy / "checkpoints", f"{elsewhere}/checkpoints")
        (copy / "checkpoints").symlink_to(f"{elsewhere}/checkpoints")
        for file in array_files(copy, 8):
            file.write_bytes(b"")
        assert train.run(run_config, str(copy)).finished
        assert (copy / "set_aside" / "8" / "parameters").is_dir() and open_run(str(copy)).step == 8


def test_a_record_that_was_changed_is_no_record(copy):
    """A digit of a counter would move the place in the data."""
    for step in (4, 8):
        file = copy / "checkpoints" / str(step) / "progress" / "metadata"
        record = json.loads(file.read_text())
        file.write_text(json.dumps({**record, "tokens": record["tokens"] + 1}))
    with pytest.raises(ValueError, match="step 8: its record is not what was written"):
        open_run(str(copy))


def test_a_record_of_before_there_were_digests_is_read(copy):
    """It has neither these nor a seal, nor what came with them; nothing else is taken for one."""
    for step in (4, 8):
        file = copy / "checkpoints" / str(step) / "progress" / "metadata"
        record = json.loads(file.read_text())
        old = {name: record[name] for name in ("config", "versions", "data", "tokens", "seconds")}
        file.write_text(json.dumps(old if step == 8 else {**old, "digests": record["digests"]}))
    assert open_run(str(copy)).step == 8
    with pytest.raises(ValueError, match="step 4: its record is not what was written"):
        open_run(str(copy), 4)


def test_a_run_is_read_on_other_devices_than_it_was_trained_on(copy):
    """Whose attention kernel is not here."""
    for file in [copy / "config.json", *copy.glob("checkpoints/*/progress/metadata")]:
        file.write_text(file.read_text().replace('"attention": "auto"', '"attention": "splash"'))
        if file.name == "metadata":
            record = {name: value for name, value in json.loads(file.read_text()).items() if name != "sha256"}
            file.write_text(json.dumps({"sha256": json_digest(record), **record}))
    run = open_run(str(copy))
    assert run.config.model.attention == "splash" and run.trained.model.config.attention == "dense"


def test_a_config_that_was_changed_is_named_and_no_checkpoint_blamed(run_config, copy):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config["model"]["mlp_width"] = 64
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: model\.mlp_width is not what .*has to be put back") as error:
        open_run(str(copy))
    assert "delete" not in str(error.value) and "damaged" not in str(error.value)
    with pytest.raises(ValueError, match=r"config\.json: model\.mlp_width is not what"):
        train.run(replace(run_config, model__mlp_width=64), str(copy))
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["4", "8"]


def test_another_tokenizer_is_refused(run_config, copy):
    """Two ids swapped: every text would be another."""
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    for use in (lambda: open_run(str(copy)), lambda: train.run(run_config, str(copy))):
        with pytest.raises(ValueError, match=r"tokenizer\.json: not the tokenizer that the run was trained with"):
            use()
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        train.run(run_config, str(copy))
    assert not file.exists()


def test_checkpoints_that_are_gone_are_missed(run_config, whole, copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    assert train.run(run_config, str(copy)).finished
    said = capsys.readouterr().err
    assert "no checkpoint is there, so that the run begins anew" in said and str(copy / "set_aside") in said
    assert (copy / "set_aside" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert comparable(copy) == comparable(whole)


def test_broken_lines_of_metrics_are_put_aside_and_the_others_kept(run_config, whole, copy, capsys):
    good = (copy / "metrics.jsonl").read_text().splitlines()
    broken = [good[0], "3", good[0][:20], '{"loss": 1.0}', '{"step": "5"}', "[" * 100_000, '"\\ud800"', *good[1:]]
    content = "\n".join(broken).encode() + b"\n\xff\n"
    (copy / "metrics.jsonl").write_bytes(content)
    train.run(run_config, str(copy))
    assert "7 lines that are no metrics" in capsys.readouterr().err
    assert comparable(copy) == comparable(whole)
    assert (copy / "set_aside" / "metrics.jsonl").read_bytes() == content
    train.run(run_config, str(copy))
    assert "no metrics" not in capsys.readouterr().err
    assert len(lines(copy)) == len(good)
