"""What comes with the library: the quickstart, and configs that can be run."""

import dataclasses
import json

from ml_collections import config_dict

from configs import base, cpu, gpu, mtpd_2b, posthoc, quickstart, standalone, stories
from experiments import quickstart as quickstart_module
from mtpd_jax import evaluate
from mtpd_jax.config import Config, MeshConfig
from mtpd_jax.methods.method import method_of
from mtpd_jax.model.backbone import count_parameters
from mtpd_jax.sharding import make_mesh
from mtpd_jax.training.state import abstract_parameters
from tests.builders import tiny_config
from tests.commands import ROOT


def test_the_quickstart_writes_its_summary(text_file, tmp_path, monkeypatch):
    """The whole of it on a tiny model; the names are those that other tools read."""
    tiny = tiny_config(data__source="text", data__paths=(text_file,), training__steps=6, heads__num_heads=2)
    monkeypatch.setattr(quickstart_module.quickstart, "get_config", lambda: config_dict.ConfigDict(tiny.to_dict()))
    monkeypatch.setattr(quickstart_module, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(quickstart_module, "NEW_TOKENS", 6)
    quickstart_module.run(str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) == {"train_seconds", "parameters", "main", "heads", "decoding"}
    flat = {"prompts", "tokens_per_pass", "acceptance", "plain_tokens_per_second", "speculative_tokens_per_second",
            "speedup", "identical", "distinct_4grams", "best_heads", "best_speedup", "by_heads"}  # fmt: skip
    assert set(summary["decoding"]) == flat | {"sampled"} and set(summary["decoding"]["sampled"]) == flat
    assert summary["decoding"]["identical"] is True and summary["decoding"]["sampled"]["identical"] is None
    assert list(summary["decoding"]["by_heads"]) == ["1", "2"]
    assert len(summary["heads"]) == 2 and set(summary["heads"][0]) == {"ce", "kl", "agreement"}
    everything = evaluate.run(str(tmp_path / "run"), split_name="validation", batch_size=4).text["validation"]
    assert summary["main"] == dataclasses.asdict(everything.main)  # of all held-out documents


def test_shipped_configs_are_valid():
    for module in (base, cpu, gpu, mtpd_2b, quickstart, stories):
        Config.build(module.get_config().to_dict())
    for module in (posthoc, standalone):  # which leave open what model they begin with, and on what text
        named = module.get_config()
        named.objective.source, named.data.paths = "model", ("text.txt",)
        Config.build(named.to_dict())


def test_models_are_as_large_as_is_said():
    """In millions of parameters, heads included."""
    for module, said in ((base, "131M"), (quickstart, "7.8M")):
        config = Config.build(module.get_config().to_dict())
        config = dataclasses.replace(config, mesh=MeshConfig())
        trained, _ = abstract_parameters(method_of(config, make_mesh(config.mesh)))
        millions = count_parameters(trained) / 1e6
        assert said in (f"{millions:.0f}M", f"{millions:.1f}M")
        assert any(said in (ROOT / page).read_text() for page in ("README.md", "configs/base.py"))
