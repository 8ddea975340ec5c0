"""The experiments' model at ``--scale=gpu``: 100M parameters on the installed packages' source, on one accelerator."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the config, a diff from ``configs/base.py``."""
    config = base.get_config()
    config.model.update(width=640, layers=12, query_heads=10, kv_heads=5, mlp_width=1792)
    config.objective.top_n = 4096
    config.optimizer.update(learning_rate=1.5e-3, warmup_steps=150, final_fraction=0.05)
    config.training.update(steps=1500, batch_size=64, sequence_length=512)
    config.checkpoint.update(every_steps=500, keep=1)
    config.logging.tensorboard = False
    config.evaluation.update(every_steps=750, documents=32)
    return config
