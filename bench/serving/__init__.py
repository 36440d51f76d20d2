"""The whole engine: throughput, latency and breakdown of a step, start-up, memory waste."""
