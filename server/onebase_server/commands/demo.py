"""`onebase demo`."""

import typer


def demo() -> None:
    """Fetch and convert the demo base and publish the demo adapters, unless all that is done already."""
    from onebase_server.demo import prepare_demo  # here, so that the other commands start without numpy and SQLAlchemy

    paths = prepare_demo()
    typer.echo(f"The demo base is in {paths.base}, its adapters are in {paths.store}.")
