"""Alignment, weights, and a whole step of plain MTP against one written independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpd_jax.losses.align import align, supervision_mask
from mtpd_jax.model.backbone import HiddenStates
from tests.builders import (
    assert_trees_close,
    gradients,
    method_on,
    model_and_parameters,
    packed_batch,
    replace,
    step_context,
    tiny_config,
)


def test_rows_are_aligned_by_target():
    """Numbered states: row k at j is head k's state at j-k; its target is token j+1; documents are not crossed."""
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    tokens = np.arange(10, 18)[None]
    states = np.arange(3)[:, None, None, None] * 100 + np.arange(8)[None, None, :, None] + 0.0
    hidden = HiddenStates(
        jnp.asarray(states[0], jnp.float32), jnp.asarray(states[1:], jnp.float32), jnp.zeros((1, 8, 1))
    )
    rows = align(hidden, jnp.asarray(tokens), jnp.asarray(segment_ids), (1, 2))
    # With the first head left out, the others' rows are the same.
    later = align(hidden.replace(heads=hidden.heads[1:]), jnp.asarray(tokens), jnp.asarray(segment_ids), (2,))
    for name in ("hidden", "mask"):
        np.testing.assert_array_equal(getattr(later, name), np.delete(getattr(rows, name), 1, axis=0))
    for j in range(8):
        for k in range(3):
            inside = j - k >= 0 and j + 1 < 8
            supervised = inside and segment_ids[0, j - k] == segment_ids[0, j] == segment_ids[0, j + 1] != 0
            assert bool(rows.mask[k, 0, j]) == supervised, (j, k)
            if supervised:
                assert rows.hidden[k, 0, j, 0] == 100 * k + j - k
                assert rows.targets[0, j] == tokens[0, j + 1]


def test_weights_count_supervised_tokens(config):
    batch = packed_batch(config)
    weights = method_on(config).count(jax.tree.map(lambda part: part[0], batch), step_context())
    # A document of n tokens has n-1-k targets for head k.
    expected = [8 * sum(max(0, n - 1 - k) for n in (11, 4, 9, 1)) for k in range(3)]
    assert weights.tolist() == expected
    assert supervision_mask(jnp.zeros((2, 8), int), (1, 2)).sum() == 0


def independent_ce_step(model, parameters, batch, alpha):
    """Mean CE per head from full logits, head by head and document by document, without ``shift`` or ``align``."""

    tokens, segment_ids = np.asarray(batch.tokens[0]), np.asarray(batch.segment_ids[0])

    def loss(parameters):
        hidden = model.apply({"params": parameters}, batch.tokens[0], batch.segment_ids[0], batch.positions[0])
        total = 0.0
        for k, states in enumerate([hidden.main, *hidden.heads]):
            places = [
                (b, i)
                for b in range(tokens.shape[0])
                for i in range(tokens.shape[1] - k - 1)
                if segment_ids[b, i] == segment_ids[b, i + k + 1] != 0
            ]
            rows, columns = (np.array(part) for part in zip(*places, strict=True))
            logits = states[rows, columns] @ parameters["embedding"].T
            picked = jax.nn.log_softmax(logits)[np.arange(len(rows)), tokens[rows, columns + k + 1]]
            total += (1.0, *alpha)[k] * -jnp.mean(picked)
        return total

    return jax.jit(jax.value_and_grad(loss))(parameters)


@pytest.mark.parametrize("num_heads", [0, 2])
def test_plain_mtp_and_next_token_equal_an_independent_step(num_heads):
    config = tiny_config(heads__num_heads=num_heads, objective__beta=0.0)
    model, parameters = model_and_parameters(config)
    batch, method = packed_batch(config), method_on(config)
    assert method.objective.distillation is None
    loss, _, _, found = jax.jit(lambda p: gradients(method, p, batch))(parameters)
    expected, reference = independent_ce_step(model, parameters, batch, method.objective.alpha)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert_trees_close(found, reference, 1e-6)


def test_default_coefficients(config):
    assert config.objective.coefficients(4) == ((0.075,) * 4, (0.5,) * 4)
    assert config.objective.coefficients(1) == ((0.3,), (1.0,))
    assert replace(config, objective__alpha=(0.1, 0.2)).objective.coefficients(2)[0] == (0.1, 0.2)


def test_detached_trunk_trains_as_if_there_were_no_heads():
    config = tiny_config(objective__detach_trunk=True)
    _, parameters = model_and_parameters(config)
    batch = packed_batch(config)

    def of_step(config, parameters):
        return jax.jit(lambda p: gradients(method_on(config), p, batch)[3])(parameters)

    trunk = {name: value for name, value in parameters.items() if name != "heads"}
    alone = of_step(replace(config, heads__num_heads=0, objective__detach_trunk=False), trunk)
    detached, joint = (
        of_step(config, parameters),
        of_step(replace(config, objective__detach_trunk=False), parameters),
    )
    assert_trees_close({name: detached[name] for name in trunk}, alone, 1e-5)
    with pytest.raises(AssertionError):
        assert_trees_close({name: joint[name] for name in trunk}, alone, 1e-2)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(detached["heads"]))
