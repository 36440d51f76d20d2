"""Physical blocks: who holds them, what they cache, where they move."""
