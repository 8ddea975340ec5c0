"""Conversations as prompts: rendered once by the model's own template, with no token that it did not ask for."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import numpy as np
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtpd_jax.data.files import check_text
from mtpd_jax.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
# A text that is continued; or messages, the answer to which is written.
Prompt = str | Sequence[Message]
# Tokens that templates write by these names.
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class _Generation(jinja2.ext.Extension):
    """The tag around what a model writes itself, which templates may have: here it writes what is in it."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja template as transformers runs it: sandboxed, with the same functions and the same handling of lines.

    Args:
      template: its text.
      tokens: of the tokenizer, by the names that templates have for them (``bos_token``, …).

    Raises:
      ValueError: it is no template.
    """

    def __init__(self, template: str, tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template, line {getattr(error, 'lineno', '?')}: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Raises:
          ValueError: the template refuses it, as some refuse a system message, or roles that do not take turns.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own would escape what HTML would read otherwise."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def read_chat_template(folder: epath.Path) -> ChatTemplate | None:
    """The template of a model's folder: a file of its own, or a field of tokenizer_config.json; None without any.

    Raises:
      ValueError: there is one that cannot be used.
    """
    own, beside = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = {}
    try:
        settings = json.loads(beside.read_bytes()) if beside.exists() else {}
        found = own.read_bytes().decode("utf-8") if own.exists() else settings.get("chat_template")
        # Several, by name: the one that is for nothing in particular.
        if isinstance(found, list):
            found = next((one["template"] for one in found if one["name"] == "default"), None)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{beside}: not readable ({error})") from error
    if not found:
        return None
    named = {name: settings.get(name) for name in _NAMED}
    texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in named.items()}
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
      ValueError: there is no template, it refuses the messages, or a message holds the name of a special token.
    """
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    if template is None:
        raise ValueError("the model has no chat template, and so no way to read messages; give it a text to continue")
    for number, message in enumerate(prompt, 1):
        held = next((name for name in tokenizer.special_tokens if name in message["content"]), None)
        if held is not None:
            raise ValueError(f"message {number}: holds {held!r}, which would be read as that token, and not as text")
    return tokenizer.encode_rendered(template.render(prompt))


def messages_of(text: str, system: str | None) -> list[Message]:
    """A conversation that begins: perhaps a system message, and the user's first."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]
