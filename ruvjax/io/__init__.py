"""Models on disk: `ruvjax.io.huggingface` reads and writes safetensors folders."""
