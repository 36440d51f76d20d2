"""Workloads replayed through the real scheduler and block manager, on a modelled device."""
