"""`onebase bench`: a load on any OpenAI-style server, and what it measured. It knows servers only over HTTP.

Below `kernels/` the ops are timed by themselves, in this process.
"""
