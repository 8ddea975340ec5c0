"""What importing takes of the host's memory."""

import json
import pathlib
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

ROOT = pathlib.Path(__file__).parents[2]
LAYERS, WIDTH, MLP, VOCABULARY, QUERY, KEY = 28, 2560, 6912, 32_000, 2560, 512
# Prints the bytes that the process holds at most beside files, above those before, and the bytes of the model.
PROGRAM = """
    import math, os, pathlib, sys, threading, time
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from mtpd_jax.interop.reading import look
    from mtpd_jax.runs.imported import import_model

    def held():
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    jax.devices()
    before, most = held(), 0
    def watch():
        global most
        while True:
            most = max(most, held())
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    found = look(pathlib.Path(sys.argv[1]))
    import_model(found, pathlib.Path(sys.argv[2]))
    print(most - before, found.bytes, 2 * max(math.prod(tensor.shape) for tensor in found.folder.tensors.values()))
"""


def write_large(folder, tokenizer):
    """A sharded folder of four gigabytes of bfloat16."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(ml_dtypes.bfloat16)

    def random(*shape):
        return np.resize(noise, shape)

    shards = [{
        "model.embed_tokens.weight": random(VOCABULARY, WIDTH), "lm_head.weight": random(VOCABULARY, WIDTH),
        "model.norm.weight": random(WIDTH),
    }]  # fmt: skip
    shapes = {
        "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,), "self_attn.q_proj": (QUERY, WIDTH),
        "self_attn.k_proj": (KEY, WIDTH), "self_attn.v_proj": (KEY, WIDTH), "self_attn.o_proj": (WIDTH, QUERY),
        "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP),
    }  # fmt: skip
    named = {}
    for number in range(LAYERS // 4 + 1):
        file = f"model-{number}.safetensors"
        if number:
            layers = range(4 * (number - 1), 4 * number)
            shards = [
                {
                    f"model.layers.{layer}.{name}.weight": random(*shape)
                    for layer in layers
                    for name, shape in shapes.items()
                }
            ]
        safetensors.numpy.save_file(shards[0], folder / file)
        named |= dict.fromkeys(shards[0], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    settings = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 2048, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


@pytest.mark.slow
def test_an_import_takes_little_more_than_the_model(workdir, tmp_path):
    """The largest tensor and 300 MB, of four gigabytes in short numbers."""
    (tmp_path / "large").mkdir()
    write_large(tmp_path / "large", workdir / "tokenizer.json")
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "large"), str(tmp_path / "run")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, model, largest = map(int, done.stdout.split())
    assert model > 4e9
    assert held <= model + largest + 300e6, (held, model, largest)
