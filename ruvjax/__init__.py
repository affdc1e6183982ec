"""ruvjax: functional JAX research on language models that do more than decode left to right."""

__version__ = "0.1.0"
