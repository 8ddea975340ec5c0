"""What a run takes over from the model that it starts from, and how it names that."""

import dataclasses

from mtpd_jax.config import Config, ModelConfig, ObjectiveConfig
from mtpd_jax.fields import Constraint, defaults_of, field, given, require

_CHECKPOINT = Constraint(lambda value: value in ("newest", "best") or value.isdigit(), "newest, best, or a step")
# What is said of how a model is run, and changes no more than the rounding of a state: the new run's own.
FREE = {"remat", "dtype", "attention", "context"}


@dataclasses.dataclass(frozen=True)
class SourceConfig(ObjectiveConfig):
    """The part of a method's section that says what a run starts from."""

    source: str = field("", given("a workdir, or a folder of a Hugging Face model"))  # to start from
    source_checkpoint: str | None = field(None, _CHECKPOINT, as_before=None)  # None: the one that it is opened with

    @property
    def source_run(self) -> str:
        return self.source

    @property
    def source_choice(self) -> str | None:
        return self.source_checkpoint


def with_model_of(config: Config, source: Config) -> Config:
    """A config with the model of another run, and the token that ends its texts.

    Raises:
      ValueError: the config says something else of the model, or wants longer texts than it was made for.
    """
    where = config.objective.source_run
    # A field that says something else is a mistake, a default says nothing.
    defaults, own, theirs = (
        values for values in (defaults_of(ModelConfig), *map(dataclasses.asdict, (config.model, source.model)))
    )
    for name in own.keys() - FREE:
        if own[name] not in (defaults[name], theirs[name]):
            raise ValueError(f"config.model.{name} = {own[name]!r}: {where} has {theirs[name]!r}; leave it out")
    length, most = config.training.sequence_length, source.context
    expected = f"at most {most}, the length of texts that {where} was made for"
    require(length <= most, "training.sequence_length", length, expected)
    if own["context"] is not None:
        require(own["context"] <= most, "model.context", own["context"], expected)
    free = {name: own[name] for name in FREE}
    model = dataclasses.replace(source.model, **{**free, "context": own["context"] or most})
    tokenizer = dataclasses.replace(config.tokenizer, end_token=source.tokenizer.end_token)
    return dataclasses.replace(config, model=model, tokenizer=tokenizer)
