"""Chat templates: the Jinja text that a checkpoint carries turns messages into the prompt it was trained on.

Templates come with downloaded files, so they run in Jinja's sandbox, where values cannot be changed and no attribute
that reaches into Python can be read. It bounds `range`, not time: a hostile template can still compute for long.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ruvjax.errors import InputError
from ruvjax.io.weights import read_json

_FAILURES = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError, MemoryError)
SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens it may name. `source` names where it came from, in errors."""

    template: str
    specials: Mapping[str, str] = field(default_factory=dict)
    source: str = "chat template"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, such as `[{"role": "user", "content": "Hello"}]`.

        The text holds the special tokens already: encode it without adding others. add_generation_prompt: end with the
        header of the assistant's answer. tools: JSON schemas of functions, for templates that know them. variables:
        further switches of a template, such as {"enable_thinking": False} of Qwen3's. Raises InputError where the
        template is malformed, or refuses the messages.
        """
        import jinja2

        given = {
            **self.specials,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            **(variables or {}),
        }
        try:
            return _compiled(self.template).render(given)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self.source}: malformed chat template, line {error.lineno}: {error.message}") from error
        except jinja2.TemplateError as error:
            raise InputError(f"{self.source}: the chat template refuses these messages: {error.message}") from error
        except (
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            MemoryError,
        ) as error:
            raise InputError(f"{self.source}: the chat template fails on these messages: {error}") from error


def read_chat_template(folder: str | os.PathLike[str], name: str = "default") -> ChatTemplate | None:
    """The chat template of a model folder, or None where it has none (a base model).

    It stands in chat_template.jinja, chat_template.json or tokenizer_config.json, the first of them that is there.
    name: which one, where tokenizer_config.json holds several ("default", "tool_use", "rag"). Raises InputError for
    files that cannot be read and for a name that is not there.
    """
    folder = Path(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = _optional(settings_file)
    specials = _optional(folder / "special_tokens_map.json") | settings
    own, other = folder / "chat_template.jinja", folder / "chat_template.json"
    if own.is_file():
        source, template = own, _text(own)
    elif other.is_file():
        source, template = other, _optional(other).get("chat_template")
    else:
        source, template = settings_file, settings.get("chat_template")
    if template is None:
        return None
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        if name not in named:
            raise InputError(f"{source}: has no chat template {name!r}", f"one of {', '.join(map(str, named))}")
        template = named[name]
    if not isinstance(template, str):
        raise InputError(f"{source}: chat_template must be a text, got {type(template).__name__}")
    return ChatTemplate(template, special_tokens(specials), str(source))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the special tokens that tokenizer_config.json names, either as text or as an object with one."""
    found = {name: settings.get(name) for name in SPECIALS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, "download the folder again") if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


@lru_cache(maxsize=32)
def _compiled(template: str):
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Blanks as in the library that the templates were written for.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(template)
    except RecursionError as error:
        raise jinja2.TemplateError("nested too deeply") from error


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """JSON for a prompt, not for HTML: Jinja's own filter escapes <, > and &."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
