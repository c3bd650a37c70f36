"""`python -m onebase_server` is the `onebase` command, also where its script is not on the path."""

from onebase_server.cli import app

app()
