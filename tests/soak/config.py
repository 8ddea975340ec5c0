"""The soak's model: 45,000 parameters that train in a second; where its data lie is given on the command line."""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns twenty steps with a checkpoint, an evaluation and a logged line every few of them."""
    config = base.get_config()
    config.data.update(source="text", shuffle_window=8, validation_fraction=0.2)
    config.model.update(
        vocabulary_size=300, width=32, layers=2, query_heads=4, kv_heads=2, head_size=8, mlp_width=48, dtype="float32"
    )
    config.heads.num_heads = 2
    config.objective.top_n = 20
    config.optimizer.update(warmup_steps=2, learning_rate=3e-3)
    config.training.update(steps=20, batch_size=4, sequence_length=32)
    config.mesh.data = 1
    config.checkpoint.every_steps = 5
    config.logging.every_steps = 4
    config.evaluation.update(every_steps=10, documents=2)
    return config
