"""Small models of transformers and of ours, as folders, and what transformers makes of them."""

import json

import pytest
from etils import epath

from experiments.bench.peer import Peer
from mtpd_jax.interop.writing import plan, write_settings, write_tensors
from mtpd_jax.runs.workdir import Workdir
from tests.builders import model_and_parameters, tiny_config
from tests.interop.tokens import END, VOCABULARY, tokenizer_json

torch = pytest.importorskip("torch", reason="no PyTorch for CPUs is installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch.set_grad_enabled(False)
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def small(kind, **settings):
    """A config of transformers for a model of a few thousand numbers."""
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": END,
        "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**{**shared, **settings})


def save_peer(folder, config, dtype="float32", **options):
    """Saves a random model of transformers with a tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, values in model.named_parameters():
        noise = torch.randn_like(values)
        of_output = name.endswith("o_proj.bias")  # which ours has not
        values.data = 1 + 0.1 * noise if "norm" in name else 0 * noise if of_output else 0.3 * noise
    model.to(getattr(torch, dtype)).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(tokenizer_json())


def logits_of(folder, ids, **options):
    """Transformers' logits, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model(torch.tensor(ids)).logits.numpy()


def tiny(**overrides):
    """A config of ours."""
    return tiny_config(
        **{"model__vocabulary_size": VOCABULARY, "model__context": 160, "model__dtype": "auto", **overrides}
    )


def random_run(config, seed=0):
    """Model and parameters; projections of heads that make some drafts agree."""
    return model_and_parameters(config, seed=seed, scale=0.7)


def export(config, parameters, format, folder, tokenizer=None, beside=None):
    """Writes a model without a run on disk."""
    origin = folder.with_name(f"{folder.name}_origin")
    origin.mkdir()
    folder.mkdir()
    (origin / "tokenizer.json").write_text(tokenizer or tokenizer_json())
    for name, text in (beside or {}).items():
        (origin / name).write_text(text if isinstance(text, str) else json.dumps(text))
    planned = plan(config, format)
    loaded = Workdir(epath.Path(origin)).read_tokenizer(config)
    write_settings(planned, config, loaded, origin, folder)
    write_tensors(planned, parameters, folder, lambda: None)
    return planned


def transformers_rounds(folder, prompt, new_tokens, heads, remote_code=False):
    """Greedy text of ``generate(use_mtp=True)``, that of plain ``generate``, and the drafts of every round."""
    peer = Peer(folder, remote_code)
    text = peer.generate(prompt, new_tokens, heads)
    return text, peer.generate(prompt, new_tokens, 0), peer.drafts
