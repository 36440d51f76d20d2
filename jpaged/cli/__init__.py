"""The ``jpaged`` command: one module a command."""
