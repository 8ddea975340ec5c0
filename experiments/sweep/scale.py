"""How large the experiments are: the same variants, as diffs from the base config of a scale."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from configs import cpu, gpu, mtpd_2b
from mtpd_jax.config import Config
from mtpd_jax.decoding.sampling import GREEDY, Sampling
from mtpd_jax.editing import change

# How everything is decoded.
MODES = {"greedy": GREEDY, "sampled": Sampling(temperature=1.0)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of experiment.

    Attributes:
      name: as ``--scale`` takes it.
      base: makes the config tree that variants are diffs from.
      loop_steps: optimizer steps of one looped extension.
      texts: held-out texts that every run is scored and prompted with.
      prompt_tokens: tokens of a text that are its prompt.
      new_tokens: tokens decoded after it.
      turns: times that everything is decoded: the same tokens, and the median of the times.
      held_out: a file of stories whose beginnings are the held-out texts; empty: the middle of what runs hold out.
      inputs: digests of what runs read that no config tells, by name.
    """

    name: str
    base: Callable[[], Any]
    loop_steps: int
    texts: int = 40
    prompt_tokens: int = 64
    new_tokens: int = 128
    turns: int = 3
    held_out: str = ""
    inputs: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> Config:
        """The base config."""
        return self.changed({})

    def changed(self, diff: Mapping[str, Any]) -> Config:
        """The base config with other values: ``section.field`` -> value.

        Raises:
          ValueError: a diff names no field, or its value is out of range.
        """
        tree = self.base()
        change(tree, diff)
        return Config.build(tree.to_dict())


SCALES = {
    "cpu": Scale("cpu", cpu.get_config, loop_steps=150),
    "gpu": Scale("gpu", gpu.get_config, loop_steps=375, texts=128),
    # 350B tokens in joint training, 70B in looped extension from 4 to 16 heads (MTP-D §4).
    "paper": Scale("paper", mtpd_2b.get_config, loop_steps=8_350, texts=512),
}
