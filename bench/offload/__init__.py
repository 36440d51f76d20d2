"""KV in host memory: restores of preempted requests, and decodes that stream KV (``python -m bench offload``)."""
