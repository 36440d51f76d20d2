"""One step: packed inputs, traced functions, compiled programs."""
