"""The tokenizer of a run: that of the run that it starts from, a given one, or one trained on its own documents."""

from mtpd_jax.config import Config
from mtpd_jax.data.sources import Source, split
from mtpd_jax.data.tokenizer import Tokenizer
from mtpd_jax.runs.choice import latest_step
from mtpd_jax.runs.origin import source_of
from mtpd_jax.runs.workdir import Workdir


def given_tokenizer(config: Config, folder: Workdir, source: Source) -> Tokenizer | None:
    """The tokenizer of the run to start from, or of the config's file; None: there is one, or one is to be trained.

    Raises:
      ValueError: it does not fit the model; or the data are token ids, and of another tokenizer than the run's.
    """
    there, given = folder.tokenizer_file.exists(), None
    if not there and latest_step(folder) is not None:
        given = folder.read_tokenizer(config)  # which says that it is missing
    elif not there and config.objective.source_run is not None:
        given = fitting(source_of(config).tokenizer(config), config)
    elif not there and config.tokenizer.path:
        given = fitting(Tokenizer.load(config.tokenizer.path, config.tokenizer), config)
    # Token ids have to be those of the run's: of that one, or of the one that is there.
    tokenizer = folder.read_tokenizer(config) if there else given
    if source.tokenizer_digest and (tokenizer is None or tokenizer.digest != source.tokenizer_digest):
        raise ValueError(
            "config.data.path: its token ids are of another tokenizer than the run's; have them written by a run that "
            "has the same, such as the backbone"
        )
    return given


def train_tokenizer(config: Config, source: Source) -> Tokenizer:
    """Trains a tokenizer, on training documents only."""
    wanted = config.tokenizer
    documents = split(source, config.data.validation_fraction, validation=False)
    return Tokenizer.train(
        (document for document in documents if isinstance(document, str)),
        config.model.vocabulary_size,
        wanted.end_token,
        wanted.train_bytes,
        wanted.more_end_tokens,
        wanted.begin_token,
    )


def fitting(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """The tokenizer, whose every id has to have a row in the embedding.

    Raises:
      ValueError: the vocabulary is too small for it.
    """
    if tokenizer.size > config.model.vocabulary_size:
        raise ValueError(
            f"config.model.vocabulary_size = {config.model.vocabulary_size}: expected at least {tokenizer.size}, "
            f"for the tokenizer's largest id is {tokenizer.size - 1}"
        )
    return tokenizer
