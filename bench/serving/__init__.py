"""The whole engine measured: throughput, latency of a step and what it is made of, start-up, memory waste."""
