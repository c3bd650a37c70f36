"""The engine: scheduling, paged KV memory, resident adapters, sampling, and the process that runs them."""
