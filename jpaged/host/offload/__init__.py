"""KV in host memory: predicted times, and how to divide the work between the link and the device."""
