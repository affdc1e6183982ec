"""The documented errors of RuvLLM, as far as its parts are there. Each is one of `ruvjax.errors` as well.

The variants are classes that hang on `RuvLLMError`: `except RuvLLMError.Config` catches one, `except RuvLLMError` all.
"""

from typing import ClassVar

from ruvjax import errors


class RuvLLMError(errors.RuvjaxError):
    """Whatever this interface raises on purpose. Variants: Config, InvalidOperation, KvCache, PagedAttention."""

    Config: ClassVar[type["RuvLLMError"]]
    InvalidOperation: ClassVar[type["RuvLLMError"]]
    KvCache: ClassVar[type["RuvLLMError"]]
    PagedAttention: ClassVar[type["RuvLLMError"]]


class _Config(RuvLLMError, errors.ConfigError):
    """A configuration with a value that cannot be used."""


class _InvalidOperation(RuvLLMError, errors.InputError):
    """Arrays whose shapes or dtypes do not fit each other or the configuration."""


class _KvCache(RuvLLMError, errors.InputError):
    """A cache that cannot hold what it was given."""


class _PagedAttention(RuvLLMError, errors.InputError):
    """A block table that does not describe a sequence of the cache."""


for _name, _variant in (
    ("Config", _Config),
    ("InvalidOperation", _InvalidOperation),
    ("KvCache", _KvCache),
    ("PagedAttention", _PagedAttention),
):
    _variant.__name__, _variant.__qualname__ = _name, f"RuvLLMError.{_name}"
    setattr(RuvLLMError, _name, _variant)
