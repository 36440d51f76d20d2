"""The dashboard: one page over a feed of the pool, the running requests and the latencies."""
