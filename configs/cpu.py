"""The experiments' model at ``--scale=cpu``: four minutes on one CPU core, on the standard library's source."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the config, a diff from ``configs/base.py``."""
    config = base.get_config()
    config.data.update(packages=False, validation_fraction=0.1, shuffle_window=512)
    config.model.update(
        vocabulary_size=1024, width=128, layers=4, query_heads=2, kv_heads=1, head_size=64, mlp_width=384
    )
    # Not to save memory: on a CPU, writing activations out and reading them back takes longer than computing them.
    config.model.remat = True
    config.model.attention = "dense"
    config.objective.top_n = 256
    config.optimizer.update(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05)
    config.training.update(steps=600, batch_size=4, sequence_length=256)
    config.mesh.data = 1
    config.checkpoint.update(every_steps=100, keep=1)
    config.logging.update(every_steps=50, tensorboard=False)
    config.evaluation.update(every_steps=150, documents=3)
    return config
