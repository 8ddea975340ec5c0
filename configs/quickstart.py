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
        vocabulary_size=2048, width=192, layers=6, query_heads=3, kv_heads=1, head_size=64, mlp_width=512
    )
    # Not to save memory: on a CPU, writing activations out and reading them back takes longer than computing them.
    config.model.remat = True
    config.objective.top_n = 512
    config.optimizer.update(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05)
    config.training.update(steps=950, batch_size=2, sequence_length=256)
    config.mesh.data = 1  # two sequences have no use for more devices
    config.checkpoint.every_steps = 200
    config.logging.every_steps = 50
    config.evaluation.update(every_steps=475, documents=4)
    return config
