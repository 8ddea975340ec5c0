"""Writing a model as a folder that other programs read: tensors in shards, settings, and a tokenizer."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  or NumPy would not know bfloat16
import numpy as np
from etils import epath
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mtpd_jax.config import Config
from mtpd_jax.data.chat import CHAT_TEMPLATE, TOKENIZER_CONFIG, read_tokenizer_settings
from mtpd_jax.data.files import read_json
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.interop.families import FAMILIES
from mtpd_jax.interop.formats import FORMATS, written_as
from mtpd_jax.interop.layout import Place, places_of
from mtpd_jax.interop.names import scaling_is_exact
from mtpd_jax.interop.reading import GENERATION, TOKENIZER
from mtpd_jax.interop.settings import settings_of
from mtpd_jax.interop.tensors import INDEX, TensorFolder

# Bytes of a shard, at most: as much is copied beside the model when it is written. Our choice.
_SHARD_BYTES = 2 << 30
# What of an imported model's tokenizer_config.json goes on: the rest is how other classes do what tokenizer.json says.
_KEPT = (
    "bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "chat_template",
    "model_max_length", "clean_up_tokenization_spaces",
)  # fmt: skip
_CODE = '''"""{title} with heads that draft further tokens behind its last layer, for ``generate(use_mtp=True)``."""

from transformers import {architecture}


class Mtpd{architecture}({architecture}):
    """Leaves the heads' tensors to transformers' own class for them, instead of reporting them."""

    def __init__(self, config):
        super().__init__(config)
        first = config.num_hidden_layers
        heads = range(first, first + config.num_mtp_layers)
        self._keys_to_ignore_on_load_unexpected = {{rf"model\\.layers\\.{{layer}}\\." for layer in heads}}
'''


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run's model is written as.

    Attributes:
      format: its name.
      kind: the ``model_type``.
      config: of what is written: without heads where they are left out.
      places: of all tensors.
      shards: names of the tensors, by file.
      bytes: of all tensors.
      notes: what has to be said.
    """

    format: str
    kind: str
    config: Config
    places: tuple[Place, ...]
    shards: Mapping[str, list[str]]
    bytes: int
    notes: tuple[str, ...]

    @property
    def tensors(self) -> int:
        """How many there are."""
        return sum(map(len, self.shards.values()))


def plan(config: Config, format: str) -> Plan:
    """Plans what is written, without any weight at hand.

    Raises:
      ValueError: the format cannot hold the model; saying why.
    """
    kind, written = written_as(config, format)
    places = tuple(places_of(written.model, written.heads, FAMILIES[kind]))
    sizes = {
        name: int(np.prod(shape, dtype=np.int64)) * _dtype_of(place, written).itemsize
        for place in places
        for name, shape in place.shapes(written.model).items()
    }
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES,
    )
    return Plan(format, kind, written, places, split.filename_to_tensors, sum(sizes.values()), _notes(config, written))


def _notes(config: Config, written: Config) -> tuple[str, ...]:
    notes, model = [], config.model
    if model.scale_embedding:
        notes.append("the embedding is written multiplied by sqrt(width), for no such family scales it by itself")
        if not model.tied_unembedding and not scaling_is_exact(model):
            notes.append(
                f"read back, it stays multiplied (scale_embedding = False): sqrt({model.width}) is no power of two, by "
                "which it could be divided again bit for bit"
            )
    if config.heads.kind == "recurrent" and written.heads.num_heads > 1:
        notes.append(f"the shared head is written {written.heads.num_heads} times, once for each depth")
    if config.heads.num_heads and not written.heads.num_heads:
        notes.append(f"{config.heads.num_heads} heads are left out")
    if model.mask_embedding:
        notes.append("the mask embedding is left out: others read the model as it writes one token at a time")
    return tuple(notes)


def _dtype_of(place: Place, config: Config) -> np.dtype:
    return np.dtype(config.heads.weights if place.of_heads else config.model.weights)


def write_tensors(planned: Plan, tree: Any, folder: pathlib.Path, on_shard: Callable[[], None]) -> None:
    """Writes the tensors beside the settings, a shard at a time, and reads each back.

    Args:
      planned: of the run's config.
      tree: the run's parameters.
      folder: to write into.
      on_shard: called after each.

    Raises:
      OSError: a file cannot be written, or does not hold what was written.
    """
    place_of = {name: place for place in planned.places for name in place.names}
    file_of = {}
    for file, names in planned.shards.items():
        # Contiguous, whatever they were: the library writes others as garbage, without a word (safetensors #825).
        tensors, wanted = {}, set(names)
        for place in dict.fromkeys(place_of[name] for name in names):
            for name, tensor in place.get(planned.config.model, tree).items():
                if name in wanted:
                    tensors[name] = np.ascontiguousarray(tensor, _dtype_of(place, planned.config))
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: cannot be written ({error})") from error
        shutil.copymode(folder / "config.json", folder / file)  # the library's own is for its writer alone
        file_of |= dict.fromkeys(tensors, file)
        on_shard()
        _check_written(folder, file, tensors)
    if len(planned.shards) > 1:
        index = {"metadata": {"total_size": planned.bytes}, "weight_map": file_of}
        write_json(folder / INDEX, index)


def _check_written(folder: pathlib.Path, file: str, tensors: Mapping[str, np.ndarray]) -> None:
    found = TensorFolder(folder, files=[file])
    for name, tensor in tensors.items():
        if found.read(name).tobytes() != tensor.tobytes():
            raise OSError(f"{folder / file}: {name} is not what was written")


def write_settings(
    planned: Plan, config: Config, tokenizer: Tokenizer, origin: epath.Path, folder: pathlib.Path
) -> None:
    """Writes everything but tensors and model card.

    Args:
      planned: of the run's config.
      config, tokenizer: of the run.
      origin: the folder that holds its tokenizer.
      folder: to write into.
    """
    written, chosen = planned.config, FORMATS[planned.format]
    settings = settings_of(written, planned.kind, tokenizer.end_ids)
    begin = tokenizer.begin_ids[0] if tokenizer.begin_ids else None
    settings["bos_token_id"] = begin
    if chosen.remote_code and written.heads.num_heads:
        family = FAMILIES[planned.kind]
        code = _CODE.format(title=family.title, architecture=family.architecture)
        (folder / "modeling_mtpd.py").write_text(code, encoding="utf-8")
        settings["auto_map"] = {"AutoModelForCausalLM": f"modeling_mtpd.Mtpd{family.architecture}"}
    write_json(folder / "config.json", settings)
    # How an imported model wants to be sampled goes on.
    ends, there = list(tokenizer.end_ids), origin / GENERATION
    generation = read_json(there) if there.exists() else {"bos_token_id": begin, "pad_token_id": None}
    write_json(folder / GENERATION, {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]})
    # How the run was trained, as this project says it.
    write_json(folder / "mtpd_config.json", config.to_dict())
    # The tokenizer as it is, under the one class that does what its file says.
    (folder / TOKENIZER).write_bytes((origin / TOKENIZER).read_bytes())
    kept = {name: value for name, value in read_tokenizer_settings(origin).items() if name in _KEPT}
    ours = {"eos_token": config.tokenizer.end_token, "model_max_length": config.context}
    ours |= {"bos_token": config.tokenizer.begin_token} if begin is not None else {}
    settings = {**ours, "clean_up_tokenization_spaces": False, **kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / TOKENIZER_CONFIG, settings)
    if (origin / CHAT_TEMPLATE).exists():
        (folder / CHAT_TEMPLATE).write_bytes((origin / CHAT_TEMPLATE).read_bytes())


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
