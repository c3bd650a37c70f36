"""The subcommands of `onebase`. Each module keeps heavy imports inside its function, so that `--help` is instant."""
