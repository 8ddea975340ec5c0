"""An exported model in transformers, beside the same model here: its text, and what its heads drafted.

transformers and PyTorch are needed for this alone: ``pip install -r tests/requirements.txt torch``.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtpd_jax.decoding.network import Network
from mtpd_jax.decoding.options import Options
from mtpd_jax.decoding.strategies.speculative import Speculative
from mtpd_jax.evaluation.parity import rounds
from mtpd_jax.interop.families import FAMILIES
from mtpd_jax.model.backbone import LanguageModel
from mtpd_jax.platform import platform_of
from mtpd_jax.shapes import Parameters


class Peer:
    """A folder that ``mtpd_jax.convert to_hf`` wrote, as transformers runs it: one prompt at a time, greedily.

    Attributes:
      model: transformers' own.
      drafts: of every round since they were last cleared, the first round's first.
    """

    def __init__(self, folder: str | pathlib.Path, remote_code: bool = False):
        """Loads backbone and heads, once.

        Args:
          folder: of any format.
          remote_code: take the class that the folder brings, instead of the line that its model card gives.
        """
        import transformers  # pyright: ignore[reportMissingImports]
        from transformers import modeling_layers  # pyright: ignore[reportMissingImports]
        from transformers.generation import candidate_generator  # pyright: ignore[reportMissingImports]

        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=remote_code, dtype="float32"
        )
        self._ends = self.model.generation_config.eos_token_id
        self._generator, self.drafts = candidate_generator.MTPCandidateGenerator, list[list[int]]()
        settings = json.loads((pathlib.Path(folder) / "config.json").read_text())
        heads, first = settings.get("num_mtp_layers", 0), settings["num_hidden_layers"]
        if heads and not remote_code and not FAMILIES[settings["model_type"]].declares_heads:
            self.model._keys_to_ignore_on_load_unexpected = {
                rf"model\.layers\.{layer}\." for layer in range(first, first + heads)
            }
        self._owner, self._heads = modeling_layers.MtpModel, dict[int, Any]()

    def generate(self, prompt: Sequence[int], new_tokens: int, heads: int, ends: bool = False) -> list[int]:
        """Continues token ids.

        Args:
          prompt: at least as many as heads, or transformers fails.
          new_tokens: at most.
          heads: that draft, the first so many; 0: plain decoding.
          ends: end after a token that ends a text.
        """
        import torch  # pyright: ignore[reportMissingImports]

        ids = torch.tensor([list(map(int, prompt))])
        self.model.generation_config.eos_token_id = self._ends if ends else None
        call = functools.partial(
            self.model.generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        with torch.no_grad():
            written = self._drafting(call, heads) if heads else call()
        return written[0, ids.shape[1] :].tolist()

    def _drafting(self, call: Any, heads: int) -> Any:
        """Runs ``generate`` with so many heads, and notes what they draft."""
        generator, owner = self._generator, self._owner
        # generate() reads the heads from disk at every call; here, each number of them once.
        self.model.config.num_mtp_layers = heads
        if heads not in self._heads:
            self._heads[heads] = owner.from_pretrained(self.model, device_map={"": "cpu"})
        candidates, reader = generator.get_candidates, owner.__dict__["from_pretrained"]

        def noted(this: Any, input_ids: Any, *arguments: Any, **options: Any) -> Any:
            ids, logits = candidates(this, input_ids, *arguments, **options)
            if ids.shape[1] > input_ids.shape[1]:
                self.drafts.append(ids[0, input_ids.shape[1] :].tolist())
            return ids, logits

        generator.get_candidates = noted
        owner.from_pretrained = classmethod(lambda *_, **__: self._heads[heads])
        try:
            return call(use_mtp=True)
        finally:
            generator.get_candidates = candidates
            owner.from_pretrained = reader


def accepted(drafts: Sequence[Sequence[int]], text: Sequence[int]) -> list[tuple[int, int]]:
    """How many drafts of each round were tried, and how many of them stand in the text that was written.

    Args:
      drafts: of one text, round by round.
      text: what was written, its first token before the first round.
    """
    found, at = [], 1
    for drafted in drafts:
        room = len(text) - at
        tried = list(drafted[:room])
        stood = next((k for k, draft in enumerate(tried) if text[at + k] != draft), len(tried))
        found.append((min(stood + 1, len(tried)), stood))
        at += stood + 1
    return found


def our_rounds(
    model: LanguageModel, parameters: Parameters, prompt: Sequence[int], new_tokens: int, heads: int
) -> tuple[list[int], list[list[int]]]:
    """Our own greedy text, without an end, and the drafts of every round."""
    network = Network(model, platform_of(jax.devices()[0]))
    strategy = Speculative(network, Options(heads, new_tokens))
    played = list(rounds(strategy, jax.jit(network.parameters)(parameters), [np.asarray(prompt)]))
    tokens = played[-1][3].tokens[0]
    return tokens[len(prompt) : len(prompt) + new_tokens].tolist(), [
        drafts.tokens[0].tolist() for _, drafts, _, _ in played
    ]


def same_rounds(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> bool:
    """Whether all drafts of all rounds are the same; transformers cuts the last ones where the text has to end."""
    if len(ours) != len(theirs):
        return False
    return all(others == list(own[: len(others)]) and others for own, others in zip(ours, theirs, strict=True))
