"""Hugging Face checkpoints: configuration, weights, registry."""
