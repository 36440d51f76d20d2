"""The ``jpaged`` command."""
