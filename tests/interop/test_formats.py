"""Models of ours in transformers: the same logits, the same text, and every draft of every round."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.peer import accepted, our_rounds, same_rounds
from mtpd_jax.interop.reading import look, read_parameters
from mtpd_jax.model.backbone import LanguageModel, unembedding_of
from mtpd_jax.model.layers import apply
from tests.decoding.models import small_vocabulary
from tests.interop.peers import export, logits_of, random_run, tiny, transformers_rounds
from tests.interop.tokens import VOCABULARY

PLAIN = {"model__qk_norm": False, "model__scale_embedding": False}
# What a model can be, and the formats that hold it.
MODELS = {
    "scaled_tied_qk_norm": ({"heads__num_heads": 4}, ("hf", "backbone", "glm4_moe", "exaone_moe")),
    "plain": ({**PLAIN, "heads__num_heads": 2}, ("hf", "glm4_moe")),
    "untied_biased": (
        {**PLAIN, "heads__num_heads": 1, "model__tied_unembedding": False, "model__qkv_bias": True},
        ("hf", "backbone", "glm4_moe"),
    ),
    "biased_qk_norm": ({"heads__num_heads": 2, "model__qkv_bias": True}, ("hf", "glm4_moe")),
    "one_head": ({"heads__num_heads": 1}, ("hf", "exaone_moe", "mellum")),
    "one_head_llama3": (
        {"heads__num_heads": 1, "model__rope_llama3": (8.0, 1.0, 4.0, 16.0), "model__rope_theta": 5e5},
        ("hf", "glm4_moe", "exaone_moe", "mellum"),
    ),
    "sixteen": ({"heads__num_heads": 16}, ("hf",)),
    "recurrent": ({"heads__num_heads": 3, "heads__kind": "recurrent"}, ("hf", "exaone_moe")),
    "odd_width": ({**PLAIN, "heads__num_heads": 2, "model__width": 34}, ("hf",)),
    "untied_scaled_by_a_power_of_two": (
        {"heads__num_heads": 1, "model__width": 64, "model__tied_unembedding": False}, ("hf",),
    ),
    "kept_before_the_norm": ({"heads__num_heads": 1, "heads__pass_normed": False}, ("hf", "mellum")),
    "short_numbers": (
        {"heads__num_heads": 2, "model__scale_embedding": False, "model__weights": "bfloat16"}, ("hf", "exaone_moe"),
    ),
}  # fmt: skip
CASES = [(name, format) for name, (_, formats) in MODELS.items() for format in formats]


@pytest.fixture(scope="module")
def runs():
    """Models by name, made when they are asked for."""

    @functools.cache
    def run(name):
        config = tiny(**MODELS[name][0])
        return config, *random_run(config)

    return run


PROMPTS, TOKENS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 24)), 20


@pytest.fixture(scope="module")
def played(runs):
    """What models write of the prompts here, and what they draft; whatever format they are written in."""

    @functools.cache
    def play(name):
        config, model, parameters = runs(name)
        return [our_rounds(model, parameters, prompt, TOKENS, config.heads.num_heads) for prompt in PROMPTS]

    return play


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, parameters, rows):
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden = apply(model, parameters, rows, jnp.ones_like(rows), positions)
    return hidden.main @ unembedding_of(parameters).astype(jnp.float32).T


def our_logits(model, parameters, ids):
    trunk = {name: part for name, part in parameters.items() if name != "heads"}
    model = LanguageModel(model.config, dataclasses.replace(model.heads_config, num_heads=0))
    return np.asarray(_logits(model, trunk, jnp.asarray(ids, jnp.int32)))


def same_tree(left, right):
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("name, format", CASES)
def test_what_is_written_computes_the_same(name, format, runs, tmp_path):
    """Logits; and read back, it is the model that was written, bit for bit."""
    config, model, parameters = runs(name)
    export(config, parameters, format, tmp_path / "out")
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (2, 40))
    expected, found = our_logits(model, parameters, ids), logits_of(tmp_path / "out", ids)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    # Back again.
    back = look(tmp_path / "out")
    tree = read_parameters(back, lambda: None)
    whole = dict(parameters) if format != "backbone" else {k: v for k, v in parameters.items() if k != "heads"}
    assert same_tree(tree, whole)
    heads = config.heads if format != "backbone" else None
    assert back.config.heads == heads or (heads is None and not back.config.heads.num_heads)
    assert back.config.model == config.model and back.config.context == config.context
    assert back.config.training.sequence_length == config.training.sequence_length
    assert back.config.tokenizer.end_token == config.tokenizer.end_token


# Short numbers are multiplied in another order, so that choices differ.
DRAFTING = [(name, format) for name, format in CASES if format != "backbone" and name != "short_numbers"]


@pytest.mark.parametrize(
    "name, format",
    [
        one
        if one[0] in ("odd_width", "one_head", "scaled_tied_qk_norm")
        else pytest.param(*one, marks=pytest.mark.slow)
        for one in DRAFTING
    ],
)
def test_every_draft_of_every_round_is_ours(name, format, runs, played, tmp_path):
    config, _, parameters = runs(name)
    export(config, parameters, format, tmp_path / "out")
    for prompt, (text, drafts) in zip(PROMPTS, played(name), strict=True):
        found, plain, theirs = transformers_rounds(tmp_path / "out", prompt, TOKENS, config.heads.num_heads)
        assert found == text == plain
        assert same_rounds(drafts, theirs)
        assert sum(map(len, theirs)) > 0.8 * sum(map(len, drafts))


@pytest.mark.parametrize("kind", ["cascade", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_drafts_that_are_accepted_go_on_alike(kind, tmp_path):
    """Of a model that was trained until its heads agree with it: caches are kept and cut back alike."""
    model, parameters = small_vocabulary(kind)
    trained = tiny(heads__num_heads=4, heads__kind=kind, model__context=4096)
    config = dataclasses.replace(trained, model=dataclasses.replace(trained.model, vocabulary_size=7))
    config = dataclasses.replace(config, heads=dataclasses.replace(config.heads, pass_normed=True))
    model = LanguageModel(model.config, config.heads)
    export(config, parameters, "hf", tmp_path / "out")
    prompt = [1, 2, 5, 4, 3, 2, 1, 6, 6, 2, 3, 1]
    text, drafts = our_rounds(model, parameters, prompt, 60, 4)
    found, plain, theirs = transformers_rounds(tmp_path / "out", prompt, 60, 4)
    assert found == text == plain and same_rounds(drafts, theirs)
    # Rounds of which some, all and none of the drafts stood.
    assert len({stood for _, stood in accepted(drafts, text)}) >= 3


def test_the_folder_serves_clients_that_trust_its_code(runs, played, tmp_path):
    config, _, parameters = runs("scaled_tied_qk_norm")
    export(config, parameters, "hf", tmp_path / "out")
    text, drafts = played("scaled_tied_qk_norm")[0]
    found, _, theirs = transformers_rounds(tmp_path / "out", PROMPTS[0], TOKENS, 4, remote_code=True)
    assert found == text and same_rounds(drafts, theirs)


def test_a_scaled_embedding_that_cannot_be_divided_says_so(tmp_path):
    config = tiny(heads__num_heads=1, model__tied_unembedding=False)
    model, parameters = random_run(config)
    planned = export(config, parameters, "hf", tmp_path / "out")
    assert any("stays multiplied" in note for note in planned.notes)
    back = look(tmp_path / "out")
    assert not back.config.model.scale_embedding
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (1, 40))
    expected = our_logits(model, parameters, ids)
    assert np.abs(logits_of(tmp_path / "out", ids) - expected).max() <= 1e-4 * np.abs(expected).max()
