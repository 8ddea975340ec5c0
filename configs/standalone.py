"""A pretrained model that learns to write several tokens per pass itself; it is named on the command line.

``--config.objective.source=DIR`` is a workdir, or a folder of a Hugging Face model, and ``--config.data.paths=FILE``
the text to learn on; section ``model`` follows from the source.
"""

import ml_collections

from configs import base
from mtpd_jax.editing import change


def get_config() -> ml_collections.ConfigDict:
    """Returns the config, a diff from ``configs/base.py``."""
    config = base.get_config()
    change(config, {"objective.mode": "standalone", "data.source": "text"})
    config.data.shuffle_window = 512
    config.heads.num_heads = 0
    # A fifth to a quarter of what a model of this size is pre-trained with; constant as in the paper, but for its tail.
    config.optimizer.update(learning_rate=5e-4, schedule="wsd", warmup_steps=50, decay_fraction=0.1)
    config.training.update(steps=1600, batch_size=4, sequence_length=256)
    config.mesh.data = 1
    config.checkpoint.every_steps = 200
    config.logging.every_steps = 50
    config.evaluation.update(every_steps=200, documents=20, prompts=16)
    return config
