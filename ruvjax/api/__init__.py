"""The documented interfaces, thin handles over the functions of the other packages: `ruvjax.api.ruvdllm`."""
