"""Corpora, tokenizers, packing and the batch stream."""
