"""The documented errors of RuvDLLM. Each is one of `ruvjax.errors` as well, so exit codes and hints hold.

The variants are classes that hang on their error: `except ModelError.LoadError` catches one, `except ModelError` all.
"""

from typing import ClassVar

from ruvjax import errors


class RuvDLLMError(errors.RuvjaxError):
    """Whatever the high-level interface raises on purpose, NotYetError apart."""


class ModelError(RuvDLLMError, errors.InputError):
    """A model that cannot be loaded or used. Variants: LoadError, ConfigError, QuantizationError."""

    LoadError: ClassVar[type["ModelError"]]
    ConfigError: ClassVar[type["ModelError"]]
    QuantizationError: ClassVar[type["ModelError"]]


class ConfigError(RuvDLLMError, errors.ConfigError):
    """A configuration with a value that cannot be used, or a configuration file that cannot be read."""


class BackendError(RuvDLLMError, errors.BackendError):
    """A compute backend that was asked for and cannot run here."""


class TALoRAError(RuvDLLMError, errors.InputError):
    """An adapter, a query, an id or a file of banks that cannot be used."""


class GenerationError(RuvDLLMError, errors.InputError):
    """Text that cannot be generated. Variants: TokenizationError, ContextLengthExceeded, Interrupted."""

    TokenizationError: ClassVar[type["GenerationError"]]
    ContextLengthExceeded: ClassVar[type["GenerationError"]]
    Interrupted: ClassVar[type["GenerationError"]]


class _LoadError(ModelError):
    """The files of a model are missing, damaged, or do not fit each other."""


class _ModelConfigError(ModelError):
    """A model whose configuration does not allow what was asked of it."""


class _QuantizationError(ModelError):
    """Quantized weights that cannot be read."""


class _TokenizationError(GenerationError):
    """A text that the tokenizer cannot hold, or a model without a tokenizer."""


class _ContextLengthExceeded(GenerationError):
    """More tokens than the model has positions for."""


class _Interrupted(GenerationError):
    """Generation was interrupted (SIGINT) before it was done."""

    exit_code = 130


for _owner, _name, _variant in (
    (ModelError, "LoadError", _LoadError),
    (ModelError, "ConfigError", _ModelConfigError),
    (ModelError, "QuantizationError", _QuantizationError),
    (GenerationError, "TokenizationError", _TokenizationError),
    (GenerationError, "ContextLengthExceeded", _ContextLengthExceeded),
    (GenerationError, "Interrupted", _Interrupted),
):
    _variant.__name__, _variant.__qualname__ = _name, f"{_owner.__name__}.{_name}"
    setattr(_owner, _name, _variant)
