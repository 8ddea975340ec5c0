"""Conversations as prompts: rendered once by the model's own template, with no token that it did not ask for."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import numpy as np
from etils import epath
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtpd_jax.data.files import check_text, json_digest, read_json
from mtpd_jax.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
# A text that is continued; or messages, the answer to which is written.
Prompt = str | Sequence[Message]
# Files beside tokenizer.json that say how it is used.
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS = "special_tokens_map.json"
# The function that templates ask for the day.
_CLOCK = "strftime_now"


class _Generation(jinja2.ext.Extension):
    """The tag around what a model writes itself, which templates may have: here it writes what is in it."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # names that are set in it end with it


class ChatTemplate:
    """A Jinja template as transformers runs it: sandboxed, with the same functions and the same handling of lines.

    Args:
      template: its text.
      tokens: of the tokenizer, by the names that templates have for them (``bos_token``, …).

    Attributes:
      digest: a hash of both.
      reads_clock: whether what it writes depends on the day.

    Raises:
      ValueError: it is no template.
    """

    def __init__(self, template: str, tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        self.digest, self.reads_clock = json_digest([template, dict(tokens)]), _CLOCK in template
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, _CLOCK: self._written_now}
        self._tokens = dict(tokens)
        self._now: datetime.datetime | None = None
        try:
            self._template = environment.from_string(template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"chat template, line {getattr(error, 'lineno', '?')}: {error}") from error

    def stop_clock(self, now: datetime.datetime) -> None:
        """Has it write the day of a moment from here on, whatever the day is."""
        self._now = now

    def check_boundary(self) -> None:
        """Checks that an answer stands where the model is asked to write it: right behind the prompt.

        Raises:
          ValueError: it does not, and so there is no telling which tokens of a conversation the model writes.
        """
        asked, answer = [{"role": "user", "content": "a"}], "some_answer"
        prompt, without = self.render(asked), self.render(asked, answered=True)
        answered = self.render([*asked, {"role": "assistant", "content": answer}], answered=True)
        begun, found, _ = answered.removeprefix(prompt).partition(answer)
        # One that asks for an answer may begin it, as with a thought that is left out; one that does not ask leaves
        # what stands there to the model, which would have to write it.
        if not answered.startswith(prompt) or not found or (prompt == without and begun.strip()):
            raise ValueError(
                f"the model's chat template writes {prompt!r} to ask for an answer, and {answered!r} with one: the "
                "answer does not follow the prompt, so that it is not known what the model writes"
            )

    def _written_now(self, form: str) -> str:
        return (self._now or datetime.datetime.now()).strftime(form)

    def render(self, messages: Sequence[Message], answered: bool = False) -> str:
        """The text of a conversation, up to where the model's answer begins; or of one that is answered.

        Raises:
          ValueError: the template refuses it, as some refuse a system message, or roles that do not take turns.
        """
        try:
            beside = {"tools": None, "documents": None, "add_generation_prompt": not answered}
            return self._template.render(messages=messages, **beside, **self._tokens)
        except Exception as error:  # it is a stranger's program, and raises what it likes
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would escape what HTML would read otherwise."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_tokenizer_settings(folder: epath.Path) -> dict[str, Any]:
    """How a tokenizer is used: tokenizer_config.json, and what older folders say in special_tokens_map.json.

    Raises:
      ValueError: one of them is no JSON object.
    """
    paths = [folder / name for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS)]
    own, named = (read_json(path) if path.exists() else {} for path in paths)
    # As transformers has it.
    return own if "added_tokens_decoder" in own else {**own, **named}


def read_chat_template(folder: epath.Path) -> ChatTemplate | None:
    """The template of a model's folder: a file of its own, or a field of tokenizer_config.json; None without any.

    Raises:
      ValueError: there is one that cannot be used.
    """
    settings, own = read_tokenizer_settings(folder), folder / CHAT_TEMPLATE
    found = settings.get("chat_template")
    if own.exists():
        found = own.read_bytes().decode("utf-8", errors="replace")
    # Several, by name: the one that is for nothing in particular.
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        found = named.get("default")
    if found is None or found == "":
        return None
    if not isinstance(found, str):
        raise ValueError(f"{folder}: chat_template = {found!r:.80}: expected a text")
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in tokens.items()}
    return ChatTemplate(found, {name: text for name, text in texts.items() if isinstance(text, str)})


def check_prompt(prompt: Prompt, where: str) -> None:
    """Checks that a prompt is a text, or messages of texts.

    Raises:
      ValueError: naming what is neither.
    """
    if isinstance(prompt, str):
        check_text(prompt, where)
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(f"{where} = {prompt!r:.80}: expected a text, or a list of messages")
    for number, message in enumerate(prompt, 1):
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else []
        if not fields or not all(isinstance(value, str) for value in fields):
            raise ValueError(f"{where}, message {number} = {message!r:.80}: expected an object with role and content")
        for value in fields:
            check_text(str(value), f"{where}, message {number}")


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, template: ChatTemplate | None) -> np.ndarray:
    """Token ids of a prompt, [T] int32.

    A text begins as documents do. A conversation is what its template writes, beginning included, whose special tokens
    are tokens; a message cannot write such a token, with which it could end its turn.

    Raises:
      ValueError: there is no template, it refuses the messages, or a message holds the name of such a token.
    """
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    if template is None:
        raise ValueError("the model has no chat template, and so no way to read messages; give it a text to continue")
    said = [{name: value for name, value in message.items() if value is not None} for message in prompt]
    # Tokens that stand between messages, though not all are called special: those around nothing in particular.
    added, special = tokenizer.added_tokens, tokenizer.special_tokens
    plain = tokenizer.encode_rendered(template.render([{**message, "content": "a"} for message in said]))
    around = {*tokenizer.end_ids, *plain.tolist()}
    guarded = [name for name, id in added.items() if name in special or id in around]
    for number, message in enumerate(said, 1):
        held = next((name for text in _texts(message) for name in guarded if name in text), None)
        if held is not None:
            raise ValueError(f"message {number}: holds {held!r}, which would be read as that token, and not as text")
    ids = tokenizer.encode_rendered(template.render(said))
    # Nor by what the template makes of it: there are as many of them as around nothing in particular.
    guarded_ids = [added[name] for name in guarded]
    if np.isin(ids, guarded_ids).sum() != np.isin(plain, guarded_ids).sum():
        raise ValueError("the chat template turns a part of a message into a special token; say it otherwise")
    return ids


def _texts(value: Any) -> Iterator[str]:
    """All texts in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(name)
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def messages_of(text: str, system: str | None) -> list[Message]:
    """A conversation that begins: perhaps a system message, and the user's first."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]
