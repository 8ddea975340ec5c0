"""A small MTP-D model on the standard library's source: minutes on two CPU cores."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the quickstart's config, a diff from ``configs/base.py``."""
    config = base.get_config()
    config.data.packages = False
    config.data.validation_fraction = 0.07
    config.data.shuffle_window = 512
    config.model.update(
        vocabulary_size=2048, width=128, layers=12, query_heads=4, kv_heads=2, head_size=32, mlp_width=384
    )
    config.objective.top_n = 512
    config.optimizer.update(learning_rate=3e-3, warmup_steps=50, final_fraction=0.05)
    config.training.update(steps=1600, batch_size=4, sequence_length=256)
    config.checkpoint.every_steps = 200
    config.evaluation.update(every_steps=400, documents=8)
    return config
