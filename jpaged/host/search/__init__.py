"""Search over sequences."""
