"""`octavo key`: make the keys that `security.keys_file` lists."""

from pathlib import Path
from typing import Annotated

import typer

from serve_app.ingress.keys import make_key

key_app = typer.Typer(no_args_is_help=True, help="Make API keys for a server with `security.keys_file`.")


@key_app.callback()
def key() -> None:
    """Make API keys for a server with `security.keys_file`."""


@key_app.command()
def new(
    name: Annotated[str, typer.Argument(help="whose it is: the tenant, as logs and fair shares know it")],
    file: Annotated[Path, typer.Option(help="the file of hashed keys; made if it is not there")] = Path("keys.toml"),
    admin: Annotated[bool, typer.Option("--admin", help="may also ask for /admin")] = False,
) -> None:
    """Print a new key, once, and append its hash to the file.

    A running server knows the key a second later. To revoke one, take its
    entry out of the file.
    """
    print(make_key(file, name, "admin" if admin else "user"))
