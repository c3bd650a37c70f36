"""The server: an HTTP API, an engine that batches requests of many adapters, and the model it runs."""

__version__ = "0.1.0"
