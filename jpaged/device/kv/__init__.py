"""KV on the device and in host memory."""
