"""The HTTP side: routes, schemas, streaming and keys. It knows the engine only through its client, and no torch."""
