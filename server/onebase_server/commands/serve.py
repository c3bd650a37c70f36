"""`onebase serve`."""

from typing import Annotated, Any

import typer

from onebase_server.commands.settings_flags import read_settings, with_settings_flags


@with_settings_flags
def serve(
    demo: Annotated[bool, typer.Option("--demo", help="Serve the demo base and its adapters.")] = False, **flags: Any
) -> None:
    """Serve a base and its adapters over HTTP.

    Every flag may also be set in the environment, as ONEBASE_BASE and so on, or in onebase.toml; the keys
    ONEBASE_API_KEY and ONEBASE_ADMIN_KEY only there.
    """
    # here, so that the other commands start without the server's libraries
    from onebase_server.demo import prepare_demo, with_demo_defaults
    from onebase_server.serving import run_server

    if demo:
        paths = prepare_demo(flags["cache_dir"])
        flags["base"] = flags["base"] or str(paths.base)
        flags["store"] = flags["store"] or paths.store
    settings = read_settings(flags)
    run_server(with_demo_defaults(settings) if demo else settings)
