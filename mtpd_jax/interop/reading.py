"""A folder of somebody's pretrained model, read strictly: every tensor is used, and none is missing.

``look`` says all that can be said without reading a weight; ``read_parameters`` then reads one tensor at a time.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  or NumPy would not know bfloat16
import numpy as np
from etils import epath

from mtpd_jax.config import Config
from mtpd_jax.data.chat import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER_CONFIG, read_chat_template
from mtpd_jax.data.files import read_json
from mtpd_jax.data.sources import UnknownData
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.interop.families import FAMILIES
from mtpd_jax.interop.layout import Assembly, Place, places_of
from mtpd_jax.interop.names import EMBEDDING, UNEMBEDDING
from mtpd_jax.interop.settings import Described, check_described, describe
from mtpd_jax.interop.tensors import TensorFolder

# What old versions of libraries stored, and what follows from the config.
_FOLLOWS = re.compile(r".*\.rotary_emb\.inv_freq")
# The dtypes that are kept, by safetensors' names.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Files of a tokenizer, of which the first is what it does, and the others how it is used.
TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
BESIDE_TOKENIZER = (TOKENIZER_CONFIG, CHAT_TEMPLATE, SPECIAL_TOKENS, GENERATION)


@dataclasses.dataclass(frozen=True)
class Found:
    """A folder of a pretrained model that was looked at, and fits.

    Attributes:
      path: of the folder.
      config: that an imported run has.
      title: of the family.
      places: of all its arrays.
      folder: of the tensors.
      tensors: that are read.
      bytes: that the parameters take, in memory and on disk.
      notes: what has to be said, such as what is ignored, and why.
    """

    path: pathlib.Path
    config: Config
    title: str
    places: tuple[Place, ...]
    folder: TensorFolder
    tensors: int
    bytes: int
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the tensors of the model."""
        model = self.config.model
        shapes = {name: shape for place in self.places if place.path for name, shape in place.shapes(model).items()}
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())

    def identity(self) -> dict[str, Any]:
        """What an imported run records instead of the documents that it was trained on: which weights these are."""
        whole = hashlib.sha256()
        for file in sorted({tensor.file for tensor in self.folder.tensors.values()}):
            with file.open("rb") as opened:
                whole.update(hashlib.file_digest(opened, "sha256").digest())
        return {"documents": 0, "digest": whole.hexdigest(), "imported": self.title}


def look(path: pathlib.Path, tie: bool = False) -> Found:
    """Looks at a folder with config.json, safetensors and tokenizer.json.

    Args:
      path: of the folder.
      tie: where the unembedding is missing, and the config says that it is a matrix of its own: the embedding is it.

    Raises:
      ValueError: something is missing, damaged, or not known here; naming it.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder with config.json, safetensors and tokenizer.json")
    settings = read_json(path / "config.json")
    try:
        described = describe(settings)
        folder = TensorFolder(path)
        tied, embedding, spare = _tied(described, folder, tie)
        model = {**described.model, "tied_unembedding": tied}
        tokens, notes = _tokens_of(path, settings)
        config = _config(described, model, tokens, {})
        layers = config.model.layers + config.heads.num_heads
        if layers > len(folder.tensors):  # and all their names are written out below
            raise ValueError(f"config.json describes {layers} layers, and there are {len(folder.tensors)} tensors")
        check_described(settings, described, config)
        places = _places(config, described, embedding)
        notes = [*described.notes, *notes, *_check_tensors(places, config, folder, spare), *_template_note(path)]
        weights, more = _weights(places, folder)
        config = _config(described, model, tokens, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    names = {name for place in places for name in place.names}
    found = Found(path, config, described.family.title, places, folder, len(names), 0, (*notes, *more))
    return dataclasses.replace(found, bytes=found.parameters * np.dtype(config.model.weights).itemsize)


def _config(
    described: Described, model: Mapping[str, Any], tokens: Mapping[str, Any], weights: Mapping[str, str]
) -> Config:
    """The config of the imported run. Its text is not known, and it is not trained further by itself."""
    heads = dict(described.heads)
    return Config.build(
        {
            "data": {"source": UnknownData.case, **described.data},
            "tokenizer": tokens,
            "model": {**model, "weights": weights.get("model", "float32")},
            "heads": {**heads, "weights": weights.get("heads", "float32")},
            "training": described.training,
        }
    )


def _places(config: Config, described: Described, embedding: str) -> tuple[Place, ...]:
    places = places_of(config.model, config.heads, FAMILIES[described.kind])
    # A tied matrix may lie under the name of either.
    renamed = {EMBEDDING: embedding} if config.model.tied_unembedding and not config.model.scale_embedding else {}
    return tuple(
        dataclasses.replace(place, names=tuple(renamed.get(name, name) for name in place.names)) for place in places
    )


def _tied(described: Described, folder: TensorFolder, tie: bool) -> tuple[bool, str, str | None]:
    """Whether embedding and unembedding are one matrix, the name of it, and that of a second copy of it.

    A config that calls them tied may come with either matrix, or with two, which count if they differ.
    """
    there = [name for name in (EMBEDDING, UNEMBEDDING) if name in folder.tensors]
    if described.model["scale_embedding"]:
        return described.tied, EMBEDDING, None  # as this project wrote it
    if len(there) == 2:
        same = described.tied and np.array_equal(folder.read(EMBEDDING), folder.read(UNEMBEDDING))
        return same, EMBEDDING, UNEMBEDDING if same else None
    if not there or not (described.tied or tie):
        absent = UNEMBEDDING if EMBEDDING in there else EMBEDDING
        hint = "; --tie takes the embedding for it" if there == [EMBEDDING] else ""
        raise ValueError(f"{absent} is missing, and tie_word_embeddings = {described.tied}{hint}")
    return True, there[0], None


def _check_tensors(places: tuple[Place, ...], config: Config, folder: TensorFolder, spare: str | None) -> list[str]:
    """Checks that the folder holds the tensors of a model, in their shapes, and nothing else; says what is not used."""
    wanted = {name: shape for place in places for name, shape in place.shapes(config.model).items()}
    missing = sorted(wanted.keys() - folder.tensors.keys())
    if missing:
        raise ValueError(f"{missing[0]} is missing ({len(missing)} of {len(wanted)} tensors are)")
    for name, shape in wanted.items():
        if folder.tensors[name].shape != shape:
            raise ValueError(f"{name} has the shape {folder.tensors[name].shape}: expected {shape} by config.json")
    unused = [name for name in folder.tensors if name not in wanted]
    follow = [name for name in unused if _FOLLOWS.fullmatch(name)]
    unknown = [name for name in unused if name not in follow and name != spare]
    if unknown:
        more = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{unknown[0]}{more}: no such tensor is in this model")
    notes = [f"ignored: {follow[0]} ({len(follow)} of such), which follow from the config"] if follow else []
    return notes + ([f"ignored: {spare}, which equals {EMBEDDING}, to which it is tied"] if spare else [])


def _template_note(path: pathlib.Path) -> list[str]:
    try:
        read_chat_template(epath.Path(path))
    except ValueError as error:
        return [f"its chat template cannot be used: {error}"]
    return []


def _weights(places: tuple[Place, ...], folder: TensorFolder) -> tuple[dict[str, str], list[str]]:
    """The dtypes that the model and its heads are kept in: the tensors' own, or float32 where they differ."""
    found: dict[str, set[str]] = {"model": set(), "heads": set()}
    for place in places:
        if place.path:
            section = found["heads" if place.of_heads else "model"]
            section |= {folder.tensors[name].dtype for name in place.names}
            for name in place.names:
                if folder.tensors[name].dtype not in _DTYPES:
                    raise ValueError(
                        f"{name} is of {folder.tensors[name].dtype}: expected {', '.join(_DTYPES)}; "
                        "quantized weights are not here"
                    )
    kept = {name: _DTYPES[min(dtypes)] if len(dtypes) == 1 else "float32" for name, dtypes in found.items()}
    mixed = sorted({dtype for dtypes in found.values() if len(dtypes) > 1 for dtype in dtypes})
    return kept, [f"tensors of {' and '.join(mixed)} are kept in float32"] if mixed else []


def _tokens_of(path: pathlib.Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The section ``tokenizer`` of a config: the tokens that begin and end a text; and what has to be said of them.

    generation_config.json's end tokens count more than config.json's. What goes before a text is what the tokenizer
    itself puts there.
    """
    if not (path / TOKENIZER).exists():
        raise ValueError(f"{TOKENIZER} is missing; transformers' save_pretrained writes it, also of a tokenizer.model")
    generation = path / GENERATION
    said = settings.get("eos_token_id")
    if generation.exists():
        said = read_json(generation).get("eos_token_id") or said
    ids: list[Any] = said if isinstance(said, list) else [said]
    if not ids or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f"eos_token_id = {said!r}: expected the id of the token that ends a text, or several")
    library = Tokenizer.open(path / TOKENIZER)
    added = library.get_added_tokens_decoder()

    def name_of(token: int) -> str:
        name = added[token].content if token in added else library.id_to_token(token)  # which may be normalised
        if name is None:
            raise ValueError(f"eos_token_id = {said!r}: {token} is no token of {TOKENIZER}")
        return name

    names = [name_of(token) for token in ids]
    # What it puts around a text.
    library.no_padding()
    library.no_truncation()
    plain, whole = (library.encode("a", add_special_tokens=special).ids for special in (False, True))
    begin = next((at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain), None)
    if begin is None:
        raise ValueError(f"{TOKENIZER}: writes 'a' as {plain}, and as {whole} with what belongs around it")
    before, after = whole[:begin], whole[begin + len(plain) :]
    if len(before) > 1:
        raise ValueError(f"{TOKENIZER}: puts {len(before)} tokens before a text; expected one, or none")
    notes = [f"{TOKENIZER} puts {len(after)} tokens after a text, which is left out: it is continued"] if after else []
    largest = max(library.get_vocab(with_added_tokens=True).values())
    if largest >= settings["vocab_size"]:
        notes.append(f"{TOKENIZER} has tokens up to {largest:,}, the model up to {settings['vocab_size'] - 1:,}")
    tokens = {"end_token": names[0], "more_end_tokens": tuple(names[1:])}
    return {**tokens, "begin_token": name_of(before[0]) if before else ""}, notes


def read_parameters(found: Found, on_place: Callable[[], None]) -> dict[str, Any]:
    """The parameters, as NumPy arrays in the dtypes that ``found.config`` says.

    One tensor at a time is read beside what has been put together.

    Raises:
      ValueError: a tensor is not what it has to be.
    """
    assembly, config = Assembly(), found.config
    for place in found.places:
        tensors = [found.folder.read(name) for name in place.names]
        weights = np.dtype(config.heads.weights if place.of_heads else config.model.weights)
        assembly.put(place, config.model, tensors, weights)
        on_place()
    return assembly.tree
