"""Scheduling policies: small pure functions. Each one decides, and none changes anything."""
