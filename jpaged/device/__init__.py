"""The device half: it executes plans and knows no requests."""
