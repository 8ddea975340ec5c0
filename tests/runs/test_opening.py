"""Opening a run: parameters alone, on as many devices as it takes, in one line of a notebook."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mtpd_jax
from mtpd_jax import train
from mtpd_jax.config import Config, MeshConfig
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.sampling import Sampling
from mtpd_jax.evaluation.scoring import TextScore, TextSums
from mtpd_jax.runs.opening import load_run
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training import feasibility
from mtpd_jax.training.feasibility import devices_per_copy
from tests.builders import method_on, replace, tiny_config
from tests.runs.runs import restored


def texts_of(run, number=6):
    return [text for text, _ in zip(run.trained.held_out_documents(), range(number), strict=False)]


def untimed(continuations):
    return [dataclasses.replace(one, seconds=0.0) for one in continuations]


def test_a_notebook_needs_one_line(workdir):
    """What comes out is what the commands write: texts, scores, likelihoods."""
    run = mtpd_jax.open_run(str(workdir))
    assert isinstance(run, mtpd_jax.Run) and isinstance(run.config, mtpd_jax.Config) and run.step == 10
    one, two = run.generate(["the cat", "a dog ran by"], max_new_tokens=8, heads=2, compare=True)
    assert one.identical and one.lossless and one.text == run.tokenizer.decode(one.tokens)
    together = run.generate(["the cat", "a dog ran by"], max_new_tokens=8, heads=2, batch_size=2)
    assert [found.tokens for found in together] == [one.tokens, two.tokens]
    copied = run.generate(["the cat"], max_new_tokens=8, heads=3, drafter="lookup")[0]
    assert copied.tokens == one.tokens
    texts = texts_of(run)
    scored = run.score(texts, batch_size=4)
    score = TextScore.of(sum((text.sums() for text in scored), TextSums.nothing(2)))
    assert score.tokens == sum(len(run.tokenizer.encode(text)) for text in texts)
    (likelihood,) = run.loglikelihoods([""], [texts[0][:40]])
    assert likelihood.nats < 0 and likelihood.tokens == len(run.tokenizer.encode(texts[0][:40]))
    assert run.scorer(4) is run.scorer(4) and run.decoder is run.decoder  # compiled once


def test_a_text_ends_before_its_stop_string(workdir):
    run = mtpd_jax.open_run(str(workdir))
    whole = run.generate(["the cat"], max_new_tokens=20)[0]
    stop = whole.text[5:8]
    cut = run.generate(["the cat"], max_new_tokens=20, stop=[stop, "never"])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and stop in run.tokenizer.decode(cut.tokens)
    for bad in ("text", [""], [3]):
        with pytest.raises(ValueError, match="stop"):
            run.generate(["the cat"], stop=bad)


def test_any_of_a_models_end_tokens_ends_a_text(workdir, tmp_path):
    """Said in the config, which may be changed later, of a tokenizer that has it."""
    shutil.copytree(workdir, tmp_path / "run")
    whole = mtpd_jax.open_run(str(workdir)).generate(["the cat"], max_new_tokens=20)[0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    vocabulary = json.loads((tmp_path / "run" / "tokenizer.json").read_text())["model"]["vocab"]
    name = next(token for token, id in vocabulary.items() if id == whole.tokens[-1])
    config["tokenizer"]["more_end_tokens"] = [name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    cut = mtpd_jax.open_run(str(tmp_path / "run")).generate(["the cat"], max_new_tokens=20)[0]
    assert cut.tokens == whole.tokens[: whole.tokens.index(whole.tokens[-1]) + 1] != ()
    config["tokenizer"]["more_end_tokens"] = ["<|nothing|>"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.tokenizer.more_end_tokens = '<\|nothing\|>': not in the tokenizer"):
        mtpd_jax.open_run(str(tmp_path / "run")).generate(["the cat"])


def test_public_names_import_nothing_else():
    program = "import mtpd_jax, sys; assert 'jax' not in sys.modules; from mtpd_jax import Config; " \
              "assert not [name for name in sys.modules if name.startswith('mtpd_jax.decoding')]; Config; " \
              "assert set(mtpd_jax.__all__) == {'Config', 'Run', 'Sampling', 'open_run'}; mtpd_jax.nothing"  # fmt: skip
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "AttributeError: module 'mtpd_jax' has no attribute 'nothing'" in found.stderr


def test_a_batch_has_at_least_one_row(workdir):
    run = mtpd_jax.open_run(str(workdir))
    for use in (run.score, lambda texts, batch_size: run.generate(texts, batch_size=batch_size, max_new_tokens=4)):
        with pytest.raises(ValueError, match="batch_size = 0: expected at least one"):
            use(["the cat"], batch_size=0)


@pytest.mark.slow
@pytest.mark.optimised
def test_devices_that_share_a_model_write_and_score_the_same(workdir):
    """Four copies, each split over two devices, and eight whole ones, against one device: texts, counts, scores."""
    split, copies = (load_run(str(workdir), devices_per_model=number) for number in (2, 1))
    one = mtpd_jax.Run(copies)
    device = make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    alone = dataclasses.replace(copies, mesh=device, parameters=jax.device_put(copies.parameters, jax.devices()[0]))
    runs = [mtpd_jax.Run(trained) for trained in (alone, split, copies)]
    assert dict(split.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "expert": 1}
    for name in ("embedding", "backbone"):
        whole, half = (jax.tree.leaves(trained.parameters[name])[0] for trained in (copies, split))
        assert whole.addressable_shards[0].data.size in (whole.size, 2 * half.addressable_shards[0].data.size)
    prompts = [one.tokenizer.encode(text)[: 3 + number] for number, text in enumerate(texts_of(one, 9))]
    for options in (Options(2, 12), Options(2, 12, Sampling(1.0), drafter="both")):
        found = [untimed(run.decoder.run(prompts, options, rows=8, seed=3)) for run in runs]
        assert found[0] == found[1] == found[2]
    scored = [run.score(texts_of(one), batch_size=8) for run in runs]
    for reference, *others in zip(*scored, strict=True):
        for other in others:
            np.testing.assert_allclose(other.ce, reference.ce, atol=1e-4)
            np.testing.assert_array_equal(other.supervised, reference.supervised)
    # What is decoded with lies where the parameters lie, caches too: half on each, and nothing but sums travels.
    programs = [next(iter(run.decoder._compiled.values())) for run in runs[1:]]
    memory = [program.memory_analysis() for program in programs]
    assert memory[0].argument_size_in_bytes < 0.65 * memory[1].argument_size_in_bytes
    assert memory[0].temp_size_in_bytes < 2 * 0.7 * memory[1].temp_size_in_bytes  # with twice the rows
    text = programs[0].as_text()
    assert "all-reduce(" in text and "all-to-all(" not in text and "all-gather(" not in text


def test_as_few_devices_share_a_model_as_it_fits_on(monkeypatch):
    config = tiny_config()
    costs = method_on(config).costs()
    needed = 8 * (costs.trained + costs.frozen)  # as it is stored, and as it is decoded with
    for memory, expected in ((needed, 1), (needed // 2 + 1, 2)):
        monkeypatch.setattr(feasibility, "device_memory", lambda device, per_host, memory=memory: memory)
        assert devices_per_copy(config, jax.devices()) == expected
    monkeypatch.setattr(feasibility, "device_memory", lambda *_: needed // 4 + 1)
    with pytest.raises(ValueError, match=r"cannot share config\.model\.kv_heads evenly"):  # there are two
        devices_per_copy(config, jax.devices())
    monkeypatch.setattr(feasibility, "device_memory", lambda *_: needed // 9)
    with pytest.raises(ValueError, match="reading the model on 8 devices needs more than"):
        devices_per_copy(config, jax.devices())


@pytest.mark.parametrize("number", [0, 3, 16, 4, True])
def test_devices_that_cannot_share_a_model_are_refused(workdir, number):
    with pytest.raises(ValueError, match=r"devices_per_model|kv_heads = 2 .*mesh tensor = 4"):
        load_run(str(workdir), devices_per_model=number)


@pytest.fixture(scope="module")
def averaged(text_file, tmp_path_factory):
    """A run with an average and frozen parameters, and the run that it extends."""
    folder = tmp_path_factory.mktemp("averaged")
    base = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=4, checkpoint__every_steps=4, mesh__data=1,
        training__batch_size=2, evaluation__every_steps=100, heads__num_heads=1,
    )  # fmt: skip
    train.run(base, str(folder / "base"))
    longer = replace(
        base, objective__mode="extension", objective__source=str(folder / "base"), heads__num_heads=2,
        optimizer__ema_decay=0.9,
    )  # fmt: skip
    train.run(longer, str(folder / "longer"))
    return folder / "longer"


def test_a_model_is_read_without_its_optimizer(averaged, tmp_path):
    """Parameters, their average, what is frozen and the optimizer's state lie apart; a reader needs two of them."""
    copy = shutil.copytree(averaged, tmp_path / "run")
    items = {path.name for path in (copy / "checkpoints" / "4").iterdir() if path.is_dir()}
    assert items == {"parameters", "average", "frozen", "optimizer", "progress"}
    expected = mtpd_jax.open_run(str(averaged)).parameters
    for item in ("optimizer", "parameters"):
        shutil.rmtree(copy / "checkpoints" / "4" / item)
        found = mtpd_jax.open_run(str(copy)).parameters
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    shutil.rmtree(copy / "checkpoints" / "4" / "average")
    with pytest.raises(ValueError, match="step 4: not readable"):
        mtpd_jax.open_run(str(copy))


@pytest.mark.slow
def test_a_checkpoint_of_one_item_is_read_and_gone_on_from(averaged, tmp_path):
    """As they were written before fields of a state were items of their own."""
    copy = shutil.copytree(averaged, tmp_path / "run")
    config = Config.stored(restored(averaged, mtpd_jax.open_run(str(averaged)).config)[1]["config"])
    state, _ = restored(averaged, config)
    folder = copy / "checkpoints" / "4"
    for item in ("parameters", "average", "frozen", "optimizer"):
        shutil.rmtree(folder / item)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(folder / "state", state)
    expected, found = (mtpd_jax.open_run(str(path)).parameters for path in (averaged, copy))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    longer = replace(config, training__steps=6)
    runs = [train.run(longer, str(path)) for path in (shutil.copytree(averaged, tmp_path / "new"), copy)]
    assert all(result.finished and result.step == 6 for result in runs)
    first, second = (restored(path, longer)[1]["digests"] for path in (tmp_path / "new", copy))
    assert first == second


def test_the_context_is_the_models(text_file, tmp_path):
    """Longer than what it was trained on, if the config says so."""
    config = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=3, mesh__data=1, training__batch_size=2,
        model__context=48,
    )  # fmt: skip
    train.run(config, str(tmp_path / "run"))
    run = mtpd_jax.open_run(str(tmp_path / "run"))
    assert len(run.generate(["the cat"], max_new_tokens=40)[0].tokens) == 40
    with pytest.raises(ValueError, match="more than the model's context of 48"):
        run.generate(["the cat"], max_new_tokens=50)
    with pytest.raises(ValueError, match=r"config\.model\.context = 16: expected at least training\.sequence_length"):
        tiny_config(model__context=16)
