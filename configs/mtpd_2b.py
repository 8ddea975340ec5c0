"""The scale of MTP-D's dense model (arXiv 2603.23911): 2B parameters, 350B tokens of FineWeb-Edu, K = 4.

Vocabulary, tokens and N are published; layers, widths, learning rate, batch and length are our choice.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """Returns the config, a diff from ``configs/base.py``.

    The data set has to be prepared for tensorflow-datasets first, with ``file_format="array_record"``.
    """
    config = base.get_config()
    config.data.update(source="tfds", name="fineweb_edu", validation_fraction=0.0005)
    config.model.update(
        vocabulary_size=122_880, width=2048, layers=32, query_heads=16, kv_heads=8, head_size=128, mlp_width=6144,
        remat=True,
    )  # fmt: skip
    config.optimizer.update(learning_rate=3e-4, warmup_steps=2000)
    config.training.update(steps=83_500, batch_size=1024, sequence_length=4096)  # 4.2M tokens per step
    config.mesh.update(data=1, fsdp=-1)
    config.checkpoint.every_steps = 1000
    config.evaluation.update(every_steps=5000, documents=1024)
    return config
