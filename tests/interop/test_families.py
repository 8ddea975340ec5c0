"""Models of transformers here: the same logits, whatever the family, and what is not here refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from mtpd_jax import open_run
from mtpd_jax.conversion import from_hf
from mtpd_jax.interop.reading import look, read_parameters
from tests.builders import model_of
from tests.interop.folders import retensor
from tests.interop.peers import logits_of, save_peer, small, torch
from tests.interop.test_formats import our_logits
from tests.interop.tokens import VOCABULARY, tokenizer_json

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "llama": small("Llama", tie_word_embeddings=False),
    "llama, tied, biased, explicit head size": small(
        "Llama", attention_bias=True, tie_word_embeddings=True, head_dim=12
    ),
    "llama 3.1": small("Llama", rope_parameters=LLAMA3),
    "llama, another base and epsilon": small("Llama", rope_parameters={"rope_theta": 777.0}, rms_norm_eps=1e-2),
    "mistral": small("Mistral", sliding_window=None, head_dim=16),
    "qwen2": small("Qwen2"),
    "qwen2, tied": small("Qwen2", tie_word_embeddings=True),
    "qwen3": small("Qwen3", head_dim=24),
    "qwen3, tied, biased": small("Qwen3", head_dim=8, tie_word_embeddings=True, attention_bias=True),
}
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 40))


def imported(folder):
    found = look(folder)
    return found, jax.tree.map(jnp.asarray, read_parameters(found, lambda: None))


@pytest.mark.parametrize(
    "name, dtype", [*((name, dtype) for name in FAMILIES for dtype in ("float32", "bfloat16")), ("llama", "float16")]
)
def test_logits_are_those_of_transformers(name, dtype, tmp_path):
    """Of files of any dtype, which is kept; both sides compute in float32. One file, or shards."""
    shards = {"max_shard_size": "20KB"} if dtype == "bfloat16" else {}
    save_peer(tmp_path, FAMILIES[name], dtype, **shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shards else 0)
    found, parameters = imported(tmp_path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(parameters)} == {dtype} == {found.config.model.weights}
    expected, computed = logits_of(tmp_path, IDS), our_logits(model_of(found.config), parameters, IDS)
    assert np.abs(computed - expected).max() <= 1e-4 * np.abs(expected).max()
    assert found.tensors == len(safetensors_names(tmp_path)) and not found.notes


def safetensors_names(folder):
    return {name for file in folder.glob("*.safetensors") for name in safetensors.numpy.load_file(file)}


def rewrite(folder, **settings):
    """Changes config.json; None takes a setting out."""
    path = folder / "config.json"
    changed = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))


def test_both_spellings_of_the_rotation(tmp_path):
    """The older one alone; and with both, the newer one counts, as in transformers."""
    save_peer(tmp_path, FAMILIES["llama 3.1"])
    expected = look(tmp_path).config.model
    older = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    rewrite(tmp_path, rope_parameters=..., rope_theta=5e5, rope_scaling=older)
    assert look(tmp_path).config.model == expected
    rewrite(tmp_path, rope_scaling={"type": "llama3", **{k: v for k, v in older.items() if k != "rope_type"}})
    assert look(tmp_path).config.model == expected
    rewrite(tmp_path, rope_parameters=LLAMA3)
    assert look(tmp_path).config.model == expected
    # Which of them counts depends on the version of transformers, if they differ.
    for newer in (
        {"rope_type": "default", "rope_theta": 5e5},
        {**LLAMA3, "rope_theta": 9.0},
        {**LLAMA3, "factor": 2.0},
    ):
        rewrite(tmp_path, rope_parameters=newer)
        with pytest.raises(ValueError, match="rope_parameters says .*: expected the same of both"):
            look(tmp_path)
    rewrite(tmp_path, rope_parameters={"rope_theta": 9.0}, rope_theta=..., rope_scaling=None)
    assert look(tmp_path).config.model.rope_theta == 9 and not look(tmp_path).config.model.rope_llama3
    rewrite(tmp_path, rope_parameters=...)
    assert look(tmp_path).config.model.rope_theta == 10_000


def test_windows_are_heeded(tmp_path):
    """Within a window there is no difference; beyond it there would be, and texts end there."""
    save_peer(tmp_path, small("Mistral", sliding_window=24))
    found, parameters = imported(tmp_path)
    assert found.config.context == 24 and any("last 24 tokens" in note for note in found.notes)
    expected, computed = logits_of(tmp_path, IDS), our_logits(model_of(found.config), parameters, IDS)
    apart = np.abs(computed - expected).max(axis=(0, 2)) / np.abs(expected).max()
    assert apart[:24].max() < 1e-4 < apart[24:].max()
    # What is left out means 4,096 with Mistral.
    rewrite(tmp_path, sliding_window=..., max_position_embeddings=10_000)
    assert look(tmp_path).config.context == 4096


def test_windows_that_are_not_used_are_none(tmp_path):
    save_peer(tmp_path, small("Qwen2", sliding_window=24))
    assert look(tmp_path).config.context == 128
    rewrite(tmp_path, use_sliding_window=True, max_window_layers=1, layer_types=..., sliding_window=24)
    assert look(tmp_path).config.context == 24
    rewrite(tmp_path, max_window_layers=3)
    assert look(tmp_path).config.context == 128
    rewrite(tmp_path, max_window_layers=..., sliding_window=...)  # from layer 28 on
    assert look(tmp_path).config.context == 128
    rewrite(
        tmp_path,
        use_sliding_window=False,
        sliding_window=24,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    assert look(tmp_path).config.context == 24


def test_head_size_that_is_left_out(tmp_path):
    """The width over the heads; with Qwen3, 128."""
    save_peer(tmp_path, small("Llama"))
    rewrite(tmp_path, head_dim=...)
    assert look(tmp_path).config.model.head_size == 8
    (tmp_path / "qwen").mkdir()
    save_peer(tmp_path / "qwen", small("Qwen3", head_dim=128))
    rewrite(tmp_path / "qwen", head_dim=...)
    assert look(tmp_path / "qwen").config.model.head_size == 128


EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


class TestTied:
    """The three ways in which ``tie_word_embeddings`` is not what it says."""

    @pytest.fixture
    def folder(self, tmp_path):
        save_peer(tmp_path, small("Llama", tie_word_embeddings=True))
        return tmp_path

    def check(self, folder, tied):
        found, parameters = imported(folder)
        assert found.config.model.tied_unembedding is tied and ("unembedding" in parameters) is not tied
        expected = logits_of(folder, IDS)
        computed = our_logits(model_of(found.config), parameters, IDS)
        assert np.abs(computed - expected).max() <= 1e-4 * np.abs(expected).max()
        return found

    def test_the_embedding_alone(self, folder):
        self.check(folder, tied=True)

    def test_the_unembedding_alone(self, folder):
        retensor(folder, lambda tensors: tensors.update({UNEMBEDDING: tensors.pop(EMBEDDING)}))
        self.check(folder, tied=True)

    def test_both_and_the_same(self, folder):
        retensor(folder, lambda tensors: tensors.update({UNEMBEDDING: tensors[EMBEDDING].copy()}))
        assert any(UNEMBEDDING in note for note in self.check(folder, tied=True).notes)

    def test_both_and_different(self, folder):
        retensor(folder, lambda tensors: tensors.update({UNEMBEDDING: tensors[EMBEDDING][::-1].copy()}))
        self.check(folder, tied=False)

    def test_not_tied_and_one_missing(self, folder):
        rewrite(folder, tie_word_embeddings=False)
        with pytest.raises(ValueError, match=r"lm_head.weight is missing, and tie_word_embeddings = False; --tie"):
            look(folder)
        assert look(folder, tie=True).config.model.tied_unembedding
        retensor(folder, lambda tensors: tensors.update({UNEMBEDDING: tensors.pop(EMBEDDING)}))
        with pytest.raises(ValueError, match=r"model.embed_tokens.weight is missing"):
            look(folder)


def test_several_end_tokens(tmp_path):
    """generation_config.json's count more than config.json's; the first one ends documents."""
    save_peer(tmp_path, small("Llama"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0]}')
    found = look(tmp_path)
    library = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert library[found.config.tokenizer.end_token] == 5
    assert found.config.tokenizer.more_end_tokens == ("<|endoftext|>",)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert look(tmp_path).config.tokenizer.end_token == "<|endoftext|>"
    rewrite(tmp_path, eos_token_id=5000)
    with pytest.raises(ValueError, match=r"eos_token_id = 5000: 5000 is no token"):
        look(tmp_path)
    rewrite(tmp_path, eos_token_id=2**40)
    with pytest.raises(ValueError, match=r"eos_token_id = 1099511627776: expected the id"):
        look(tmp_path)
    rewrite(tmp_path, eos_token_id=None)
    with pytest.raises(ValueError, match=r"eos_token_id = None: expected the id"):
        look(tmp_path)


def test_mixed_numbers_are_kept_in_float32(tmp_path):
    save_peer(tmp_path, small("Llama"), "bfloat16")

    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)

    retensor(tmp_path, widen)
    found, parameters = imported(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {np.dtype(np.float32)}
    assert any("BF16 and F32" in note for note in found.notes)


def test_what_follows_from_the_config_is_left_out(tmp_path):
    save_peer(tmp_path, small("Llama"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    retensor(tmp_path, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    rewrite(tmp_path, some_new_setting=3)
    notes = " ".join(look(tmp_path).notes)
    assert name in notes and "some_new_setting" in notes


REFUSED = {
    "an unknown family": ({"model_type": "gpt2"}, "model_type = 'gpt2': expected one of llama, mistral"),
    "Qwen3-MoE": ({"model_type": "qwen3_moe"}, "Qwen3-MoE has layers of experts"),
    "GLM-4.5-MoE as it is": ({"model_type": "glm4_moe", "first_k_dense_replace": 1, "n_routed_experts": 128,
                              "partial_rotary_factor": 0.5}, "GLM-4.5-MoE has layers of experts"),
    "attention both ways": ({"is_causal": False}, "is_causal = False"),
    "pairs side by side": ({"rope_interleaved": True}, "rope_interleaved = True"),
    "another norm of heads": ({"chain_hidden_post_norm": True}, "chain_hidden_post_norm"),
    "layers of their own": ({"per_layer_config": {"0": {}}}, "per_layer_config"),
    "a flag that is a text": ({"attention_bias": "false"}, "attention_bias = 'false': expected true or false"),
    "a scaled rotation": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
    "a rotation by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one kind of rotation"),
    "heads that turn in part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected 'silu'"),
    "biases elsewhere": ({"mlp_bias": True}, "mlp_bias = True"),
    "tensors in slices": ({"pretraining_tp": 2}, "pretraining_tp = 2"),
    "quantized weights": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "another order of heads": ({"mtp_hidden_states_first": True}, "mtp_hidden_states_first"),
    "no width": ({"hidden_size": None}, "hidden_size = None: expected a number"),
    "a width that is a text": ({"hidden_size": "wide"}, "hidden_size = 'wide': expected a number"),
    "no heads of attention": ({"num_attention_heads": 0, "head_dim": None}, "a setting is of another kind"),
    "layers without end": ({"num_hidden_layers": 10**9}, "describes 1000000000 layers, and there are 30 tensors"),
    "windows that are texts": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "all"}, "a setting is of another kind",
    ),
    "heads that are not there": ({"num_mtp_layers": 1}, r"is missing \(13 of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_refused_by_name(name, tmp_path):
    settings, message = REFUSED[name]
    save_peer(tmp_path, small("Llama"))
    rewrite(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        look(tmp_path)


def test_what_a_tokenizer_pads_is_not_what_begins_a_text(tmp_path):
    save_peer(tmp_path, small("Llama"))
    library = tokenizers.Tokenizer.from_str(tokenizer_json(begins=True))
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    assert look(tmp_path).config.tokenizer.begin_token == "<s>"
    begin = library.token_to_id("<s>")
    library.post_processor = tokenizers.processors.TemplateProcessing("<s> <s> $A", special_tokens=[("<s>", begin)])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="puts 2 tokens before a text"):
        look(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_said(tmp_path):
    """And tokens that the model has not are refused when they come."""
    save_peer(tmp_path, small("Llama", vocab_size=290))
    assert any("tokens up to 29" in note and "up to 289" in note for note in look(tmp_path).notes)
    from_hf(str(tmp_path), str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    assert len(run.encode("a b"))
    words = [run.tokenizer.decode([token]) for token in range(290, run.tokenizer.size)]
    beyond = next(word for word in words if word and run.tokenizer.encode(word).max() >= 290)
    with pytest.raises(ValueError, match="the prompt has the token .*, and the model 290"):
        run.encode(beyond)


def test_an_output_bias_that_does_something_is_refused(tmp_path):
    save_peer(tmp_path, small("Llama", attention_bias=True))

    def bias(tensors):
        tensors["model.layers.1.self_attn.o_proj.bias"][3] = 1e-6

    retensor(tmp_path, bias)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.o_proj.bias: expected zeros"):
        imported(tmp_path)


def test_nothing_needs_torch():
    """The library never imports what it is compared with."""
    assert torch is not None
    import subprocess
    import sys

    program = (
        "import sys, mtpd_jax.convert, mtpd_jax.generate; assert not {'torch', 'transformers'} & set(sys.modules), 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
