"""The adapter store: what an adapter is, how one is read from an upload, and which version is live."""
