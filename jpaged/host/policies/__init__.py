"""Scheduling policies: one small pure function each."""
