"""The documented errors of RuvLLM. Each is one of `ruvjax.errors` as well.

The variants are classes that hang on `RuvLLMError`: `except RuvLLMError.Config` catches one, `except RuvLLMError` all.
"""

from typing import ClassVar

from ruvjax import errors


class RuvLLMError(errors.RuvjaxError):
    """Whatever this interface raises on purpose. Storage and Session belong to parts that are not there yet: nothing
    raises them so far."""

    Storage: ClassVar[type["RuvLLMError"]]
    Session: ClassVar[type["RuvLLMError"]]
    KvCache: ClassVar[type["RuvLLMError"]]
    PagedAttention: ClassVar[type["RuvLLMError"]]
    Adapter: ClassVar[type["RuvLLMError"]]
    Sona: ClassVar[type["RuvLLMError"]]
    Config: ClassVar[type["RuvLLMError"]]
    OutOfMemory: ClassVar[type["RuvLLMError"]]
    InvalidOperation: ClassVar[type["RuvLLMError"]]
    NotFound: ClassVar[type["RuvLLMError"]]
    Backend: ClassVar[type["RuvLLMError"]]
    Model: ClassVar[type["RuvLLMError"]]
    Tokenization: ClassVar[type["RuvLLMError"]]
    Generation: ClassVar[type["RuvLLMError"]]
    Io: ClassVar[type["RuvLLMError"]]


_VARIANTS = {
    "Storage": (errors.RunError, "What is kept on disk cannot be read or written."),
    "Session": (errors.InputError, "A session that is not there, or has ended."),
    "KvCache": (errors.InputError, "A cache that cannot hold what it was given."),
    "PagedAttention": (errors.InputError, "A block table that does not describe a sequence of the cache."),
    "Adapter": (errors.InputError, "An adapter that does not fit the model."),
    "Sona": (errors.RunError, "Learning from interaction that cannot go on."),
    "Config": (errors.ConfigError, "A configuration with a value that cannot be used."),
    "OutOfMemory": (errors.RunError, "The device has no memory left for what was asked."),
    "InvalidOperation": (errors.InputError, "Arguments that do not fit each other, or the state of what they act on."),
    "NotFound": (errors.InputError, "No such model here or on the hub."),
    "Backend": (errors.BackendError, "A device that is not there or cannot run this."),
    "Model": (errors.InputError, "A model whose files are missing, damaged or of an unknown kind."),
    "Tokenization": (errors.InputError, "Text that cannot be encoded, or a tokenizer that does not fit the model."),
    "Generation": (errors.RunError, "Decoding that could not go on: logits that are not finite, a failing callback."),
    "Io": (errors.RunError, "The system refused to read or write."),
}
for _name, (_kind, _doc) in _VARIANTS.items():
    _fields = {"__doc__": _doc, "__qualname__": f"RuvLLMError.{_name}", "__module__": __name__}
    setattr(RuvLLMError, _name, type(_name, (RuvLLMError, _kind), _fields))
