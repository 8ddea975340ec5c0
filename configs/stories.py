"""A deep, narrow MTP-D model on TinyStories: fifty minutes on two CPU cores.

The text is https://huggingface.co/datasets/roneneldan/TinyStories (stories end with ``<|endoftext|>``); any part of it
of a few megabytes will do.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the config, a diff from ``configs/base.py``."""
    config = base.get_config()
    config.data.update(source="text", paths=("data/tinystories/train.txt",), shuffle_window=512)
    config.model.update(
        vocabulary_size=2048, width=256, layers=24, query_heads=4, kv_heads=2, head_size=64, mlp_width=768
    )
    # Not to save memory: on a CPU, writing activations out and reading them back takes longer than computing them.
    config.model.remat = True
    config.objective.top_n = 512
    config.optimizer.update(learning_rate=2e-3, schedule="wsd", warmup_steps=100, final_fraction=0.05)
    config.training.update(steps=1600, batch_size=4, sequence_length=256)
    config.mesh.data = 1
    config.checkpoint.every_steps = 200
    config.logging.every_steps = 50
    config.evaluation.update(every_steps=500, documents=20)
    return config
