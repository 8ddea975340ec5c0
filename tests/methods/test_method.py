"""What a training method is: one file and a line that names it; the step's key; what is random in a step."""

import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np

from mtpd_jax.data.pipeline import put_on_devices
from mtpd_jax.sharding import batch_sharding
from mtpd_jax.training.optimizer import make_optimizer
from mtpd_jax.training.state import abstract_state, initial_state, state_shardings
from mtpd_jax.training.step import make_step
from tests.builders import method_on, packed_batch, step_context, tiny_config, with_micro_batches

ROOT = pathlib.Path(__file__).parents[2]
PATCH = pathlib.Path(__file__).with_name("toy.patch")


def test_a_new_method_is_a_file_and_a_line(text_file, tmp_path):
    """The patch, applied to a copy: the toy trains, resumes to the same bits, is checked, scored and extended."""
    changed = [line for line in PATCH.read_text().splitlines() if line.startswith("+++ ")]
    added = PATCH.read_text().split("--- /dev/null")[0].count("\n+") - 1
    assert changed == ["+++ b/mtpd_jax/methods/__init__.py", "+++ b/mtpd_jax/methods/thinned.py"] and added == 1
    for folder in ("mtpd_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["patch", "-p1", "--fuzz=0", f"--input={PATCH}"], cwd=tmp_path, check=True, capture_output=True)
    program = """
        import json, shutil, sys
        from mtpd_jax import evaluate, train
        from mtpd_jax.config import Config
        tree = json.loads(sys.argv[1])
        tree["objective"] = {"mode": "thinned", "share": 0.5, "top_n": 20}
        assert train.run(tree, "whole").finished
        shutil.copytree("whole", "again")
        train.run(tree, "again", checkpoint=5)
        runs = [open(f"{name}/metrics.jsonl").read().splitlines() for name in ("whole", "again")]
        runs = [[{**json.loads(line), "tokens_per_second": 0} for line in lines] for lines in runs]
        assert runs[0] == runs[1]
        print(json.dumps(runs[0]))
        evaluate.run("whole", split_name="validation", batch_size=8)
        longer = {**tree, "heads": {"num_heads": 3}, "objective": {"mode": "extension", "source": "whole"}}
        assert train.run(longer, "longer").finished
        for objective in ({"mode": "thinned", "share": 0.1}, {"mode": "thinned", "source": "whole"}):
            try:
                Config.build({**tree, "objective": objective})
            except ValueError as error:
                print(error)
    """
    tree = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=10, training__micro_batches=2, mesh__data=1,
        checkpoint__every_steps=5, training__batch_size=8, logging__every_steps=1,
    ).to_dict()  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), json.dumps(tree)], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    metrics, too_little, foreign = found.stdout.splitlines()
    # Two of four rows of each half of a batch of full rows; which ones changes from step to step.
    supervised = [line["main/supervised"] for line in json.loads(metrics)]
    assert max(supervised) <= 4 * 31 and len(set(supervised)) > 1
    assert too_little.startswith("config.objective.share = 0.1: expected at least one row")
    assert "objective.source" in foreign and "only 'extension' reads it" in foreign


def steps_seen(config, number=3):
    """The keys that counts and losses of a method's steps are given, and for which rows."""
    method, optimizer, seen = method_on(config), make_optimizer(config), {"count": [], "loss": []}

    def spy(name):
        real = getattr(method, name)

        def wrapped(*arguments):
            rows = next(one for one in arguments if hasattr(one, "segment_ids"))
            context = arguments[-1]
            told = context.step, *(jax.random.key_data(key) for key in (context.key, context.rows_key))
            jax.debug.callback(
                lambda step, key, own, token: seen[name].append((int(step), *key.tolist(), *own.tolist(), int(token))),
                *told, rows.tokens[0, 0],
            )  # fmt: skip
            return real(*arguments)

        return wrapped

    method.count, method.loss = spy("count"), spy("loss")
    step = make_step(method, optimizer, state_shardings(abstract_state(method, optimizer)))
    state = initial_state(method, optimizer)
    batch = put_on_devices(with_micro_batches(packed_batch(config), 2), batch_sharding(method.mesh))
    for _ in range(number):
        state, result = step(state, batch)
    jax.block_until_ready((state, result))
    jax.effects_barrier()
    return seen


def test_a_step_has_a_key_of_its_own_and_so_have_its_parts():
    """Of the seed, the step and the micro-batch; a count and a loss of the same rows are given the same one."""
    config = tiny_config(training__micro_batches=2, heads__num_heads=0)
    seen = steps_seen(config)
    assert sorted(seen["count"]) == sorted(seen["loss"]) and len(set(seen["count"])) == 6
    expected = set()
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(config.training.seed), step)
        own = [jax.random.fold_in(key, part) for part in range(2)]
        expected |= {(step, *(word for k in (key, one) for word in jax.random.key_data(k).tolist())) for one in own}
    assert {told[:-1] for told in seen["loss"]} == expected
    other = steps_seen(tiny_config(training__micro_batches=2, heads__num_heads=0, training__seed=1), number=1)
    assert not {told[1:-1] for told in other["loss"]} & {told[1:-1] for told in seen["loss"]}


def test_weights_are_sums_of_what_the_parts_count():
    config = tiny_config(training__micro_batches=2)
    method, batch = method_on(config), with_micro_batches(packed_batch(config), 2)
    parts = [method.count(jax.tree.map(lambda array, i=i: array[i], batch), step_context()) for i in range(2)]
    whole = method.count(jax.tree.map(lambda array: array.reshape(-1, 32), batch), step_context())
    np.testing.assert_array_equal(jnp.stack(parts).sum(0), whole)
