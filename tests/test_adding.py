"""What docs/adding.md says can be added: its diffs, applied to a copy of the project, and run."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.builders import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
SECTIONS = dict(re.findall(r"^## (.*?)\n.*?```diff\n(.*?)```", (ROOT / "docs" / "adding.md").read_text(), re.M | re.S))
# The file that is new, the file that is changed, and how many lines are added to that.
FILES = {
    "A divergence": (None, "mtpd_jax/losses/divergences.py", 9),
    "A source of text": ("mtpd_jax/data/counting.py", "mtpd_jax/data/__init__.py", 1),
    "A kind of head": ("mtpd_jax/model/summed_head.py", "mtpd_jax/model/heads.py", 2),
    "A training method": ("mtpd_jax/methods/thinned.py", "mtpd_jax/methods/__init__.py", 1),
    "A drafter": ("mtpd_jax/decoding/drafters/stammer.py", "mtpd_jax/decoding/drafters/__init__.py", 1),
    "A decoding strategy": ("mtpd_jax/decoding/strategies/trusting.py", "mtpd_jax/decoding/strategies/__init__.py", 1),
    "A family of pretrained models": ("mtpd_jax/interop/fused.py", "mtpd_jax/interop/families.py", 2),
    "An experiment": ("experiments/depth.py", None, 0),
}
QUICK = ("A family of pretrained models",)
# Run in the copy; ``tree`` is a tiny config, ``run`` a trained run's folder.
PROGRAMS = {
    "A divergence": """
        from mtpd_jax.losses.divergences import DIVERGENCES
        from mtpd_jax.losses.terms import Distillation, chunk_loss
        import jax, jax.numpy as jnp
        logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
        arguments = jnp.arange(3), jnp.ones((2, 3), bool), jnp.zeros(2), jnp.ones(1)
        sums, found = chunk_loss(logits, logits[:1], *arguments, Distillation(7, 1.0, "hellinger", False))
        def reference(logits):
            p, q = jax.nn.softmax(logits)
            return jnp.sum(1 - jnp.sum(jnp.sqrt(p * q), -1))
        value, expected = jax.value_and_grad(reference)(logits)
        assert jnp.allclose(sums.kl[0], value, atol=1e-5) and jnp.allclose(found, expected, atol=1e-5)
        tree["objective"]["kl"] = "hellinger"
        assert train.run(tree, "whole").finished
        """,
    "A source of text": """
        tree["data"] = {"source": "counting", "documents": 40, "validation_fraction": 0.2, "shuffle_window": 8}
        assert train.run(tree, "whole").finished
        evaluate.run("whole", split_name="validation", batch_size=8)
        tree["data"]["documents"] = 41
        try:
            train.run(tree, "whole")
        except ValueError as error:
            assert "data.documents differs" in str(error), error
        """,
    "A kind of head": """
        tree["heads"]["kind"] = "summed"
        assert train.run(tree, "whole").finished
        opened = mtpd_jax.open_run("whole")
        assert "projection" not in opened.parameters["heads"]["head"]
        (found,) = opened.generate(["the cat"], max_new_tokens=12, heads=3, compare=True)
        assert found.identical
        longer = {**tree, "heads": {"num_heads": 3, "kind": "summed"}}
        longer["objective"] = {"mode": "extension", "source": "whole"}
        assert train.run(longer, "longer").finished
        """,
    "A training method": """
        tree["objective"] = {"mode": "thinned", "share": 0.5, "top_n": 20}
        assert train.run(tree, "whole").finished
        shutil.copytree("whole", "again")
        train.run(tree, "again", checkpoint=5)
        runs = [open(f"{name}/metrics.jsonl").read().splitlines() for name in ("whole", "again")]
        runs = [[{**json.loads(line), "tokens_per_second": 0} for line in lines] for lines in runs]
        assert runs[0] == runs[1]
        # Two of four rows of each half of a batch of full rows; which ones changes from step to step.
        supervised = [line["main/supervised"] for line in runs[0]]
        assert max(supervised) <= 4 * 31 and len(set(supervised)) > 1
        evaluate.run("whole", split_name="validation", batch_size=8)
        longer = {**tree, "heads": {"num_heads": 3}, "objective": {"mode": "extension", "source": "whole"}}
        assert train.run(longer, "longer").finished
        wrong = [{"mode": "thinned", "share": 0.1}, {"mode": "thinned", "source": "whole"}]
        answers = ["config.objective.share = 0.1: expected at least one row", "reads it; leave it out"]
        for objective, answer in zip(wrong, answers):
            try:
                Config.build({**tree, "objective": objective})
                raise SystemExit("taken silently")
            except ValueError as error:
                assert answer in str(error), error
        """,
    "A drafter": """
        opened = mtpd_jax.open_run(run)
        (found,) = opened.generate(["the cat"], max_new_tokens=12, heads=3, drafter="stammer", compare=True)
        assert found.identical and found.lossless and sum(found.acceptance.conditional[:1]) >= 0
        report = evaluate.run(run, prompts="prompts.jsonl", heads=[2], drafters=["heads", "stammer"], max_new_tokens=8)
        (score,) = [part.others["stammer"]["2"] for part in report.decoding.values()]
        assert score.identical and not score.agreement
        """,
    "A decoding strategy": """
        opened = mtpd_jax.open_run(run)
        (found,) = opened.generate(["the cat"], max_new_tokens=13, heads=3, strategy="trusting")
        assert not found.lossless and found.passes == 3 and found.proposers == (0, *(1, 2, 3, 0) * 3)
        report = evaluate.run(run, prompts="prompts.jsonl", heads=[3], strategy="trusting", max_new_tokens=8)
        for part in report.decoding.values():
            assert not part.heads["3"].identical and not part.heads["3"].lossless and not part.failed
        """,
    "A family of pretrained models": """
        import pathlib
        import jax, numpy as np, safetensors.numpy
        from mtpd_jax.convert import from_hf
        rng, sizes = np.random.default_rng(0), dict(D=32, F=48, V=320, N=4, G=2, H=8)
        D, F, V, N, G, H = sizes.values()
        settings = {
            "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "eos_token_id": 0,
            "num_attention_heads": N, "num_key_value_heads": G, "max_position_embeddings": 64,
        }
        shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
        parts = {
            "self_attn.qkv_proj": [(f"self_attn.{x}_proj", rows * H) for x, rows in (("q", N), ("k", G), ("v", G))],
            "mlp.gate_up_proj": [("mlp.gate_proj", F), ("mlp.up_proj", F)],
        }
        for layer in range(2):
            below = f"model.layers.{layer}."
            shapes |= {below + "input_layernorm.weight": (D,), below + "post_attention_layernorm.weight": (D,)}
            shapes |= {below + "self_attn.o_proj.weight": (D, N * H), below + "mlp.down_proj.weight": (D, F)}
            shapes |= {f"{below}{name}.weight": (rows, D) for own in parts.values() for name, rows in own}
        llama = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        fused = dict(llama)
        for layer in range(2):
            below = f"model.layers.{layer}."
            for name, own in parts.items():
                fused[f"{below}{name}.weight"] = np.concatenate([fused.pop(f"{below}{part}.weight") for part, _ in own])
        for kind, tensors in (("llama", llama), ("fused", fused)):
            folder = pathlib.Path(kind)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({**settings, "model_type": kind}))
            shutil.copy(f"{run}/tokenizer.json", folder)
            safetensors.numpy.save_file(tensors, folder / "model.safetensors")
            from_hf(kind, f"{kind}_run")
        one, two = (jax.tree.leaves(mtpd_jax.open_run(f"{kind}_run").parameters) for kind in ("llama", "fused"))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
        # The other way.
        from mtpd_jax.config import HeadsConfig
        from mtpd_jax.interop.families import FAMILIES
        from mtpd_jax.interop.layout import places_of
        opened = mtpd_jax.open_run("fused_run")
        model = opened.config.model
        for place in places_of(model, HeadsConfig(num_heads=0), FAMILIES["fused"]):
            for name, tensor in place.get(model, opened.parameters).items():
                assert np.array_equal(tensor, fused[name]), name
        """,
    "An experiment": """
        import pathlib
        from experiments import depth
        from experiments.sweep.experiment import run as run_experiment
        from experiments.sweep.runner import Code
        from experiments.sweep.scale import Scale
        class Tree(dict):
            to_dict = lambda self: self
        from configs import base
        from mtpd_jax.editing import change
        def tiny():
            config = base.get_config()
            change(config, {"data.source": "text"})
            for section, fields in tree.items():
                config[section].update(fields)
            return config
        scale = Scale("tiny", tiny, loop_steps=2, texts=2, prompt_tokens=8, new_tokens=4)
        folders = {"root": pathlib.Path("runs"), "results": pathlib.Path("results")}
        run_experiment(depth.EXPERIMENT, scale, seeds=[0], code=Code(lambda family: "a toy"), **folders)
        assert "layers_4" in pathlib.Path("results/tiny/depth.md").read_text()
        """,
}
PRELUDE = """
    import json, shutil, sys
    import mtpd_jax
    from mtpd_jax import evaluate, train
    from mtpd_jax.config import Config
    tree, run = json.loads(sys.argv[1])
"""


def test_the_page_has_what_is_tested():
    assert list(SECTIONS) == list(FILES) == list(PROGRAMS)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_toy_still_fits_the_files_that_it_changes(title):
    found = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--dry-run"], input=SECTIONS[title], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "title", [title if title in QUICK else pytest.param(title, marks=pytest.mark.slow) for title in FILES]
)
def test_a_toy_is_added(title, workdir, text_file, tmp_path):
    """The files that it takes are those that the page says; and it works."""
    diff, (new, changed, added) = SECTIONS[title], FILES[title]
    assert re.findall(r"^\+\+\+ b/(.*)$", diff, re.M) == sorted(filter(None, (new, changed)))
    own = re.split(r"^--- .*$", diff, flags=re.M)[1:]
    assert sum(part.count("\n+") - 1 for part in own if changed and f"b/{changed}" in part) == added
    assert "\n-" not in diff.replace("\n--- ", "\n")  # nothing that is there is changed
    for folder in ("mtpd_jax", "configs", "experiments"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "*.png")
        )
    subprocess.run(["patch", "-p1", "--fuzz=0"], input=diff, cwd=tmp_path, check=True, capture_output=True, text=True)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    tree = tiny_config(
        data__source="text", data__paths=(text_file,), training__steps=10, training__micro_batches=2, mesh__data=1,
        checkpoint__every_steps=5, training__batch_size=8, logging__every_steps=1, data__validation_fraction=0.4,
    ).to_dict()  # fmt: skip
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(PROGRAMS[title])
    found = subprocess.run(
        [sys.executable, "-c", program, json.dumps([tree, str(workdir)])], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
