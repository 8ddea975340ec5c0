"""Heads for a pretrained model that stays as it is; the model is named on the command line.

``--config.objective.source=DIR`` is a workdir, or a folder of a Hugging Face model, and ``--config.data.paths=FILE``
the text to learn on; section ``model`` follows from the source.
"""

import ml_collections

from configs import base
from mtpd_jax.editing import change


def get_config() -> ml_collections.ConfigDict:
    """Returns the config, a diff from ``configs/base.py``."""
    config = base.get_config()
    change(config, {"objective.mode": "posthoc", "data.source": "text"})
    config.data.shuffle_window = 512
    config.heads.update(num_heads=3, kind="recurrent", cache="shared")
    config.objective.top_n = 512
    config.optimizer.update(learning_rate=2e-3, schedule="wsd", warmup_steps=50, final_fraction=0.05)
    config.training.update(steps=800, batch_size=8, sequence_length=256)
    config.mesh.data = 1
    config.checkpoint.every_steps = 200
    config.logging.every_steps = 50
    config.evaluation.update(every_steps=200, documents=20)
    return config
