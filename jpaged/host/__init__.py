"""The host half: it decides, and never imports jax."""
