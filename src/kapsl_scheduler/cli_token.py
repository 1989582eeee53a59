"""`kapsl-scheduler token`: tokens for those who may ask a server.

What is not here: what a token may do (`server.access`).
"""

from __future__ import annotations

from pathlib import Path

from kapsl_scheduler.cli_frame import click, json_option, print_json
from kapsl_scheduler.server.access import Role, made_token

__all__ = ["token"]


@click.group()
def token() -> None:
    """Make tokens for those who may ask a server."""


@token.command("new")
@click.option("--name", required=True, help="Whose it is: for logs and limits.")
@click.option(
    "--role",
    type=click.Choice([role.name.lower() for role in Role]),
    default="reader",
    show_default=True,
    help="Readers ask models and look, writers change jobs, admins load models and read the figures.",
)
@click.option("--file", type=click.Path(path_type=Path, dir_okay=False), help="File to add its line to.")
@json_option
def new(name: str, role: str, file: Path | None, as_json: bool) -> None:
    """Make a token, shown this once, and the line for the server's --tokens file."""
    try:
        text, line = made_token(name, Role[role.upper()])
    except ValueError as error:
        raise click.UsageError(f"--{error}") from None
    if file is not None:
        try:
            file.touch(mode=0o600, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
        except OSError as error:
            raise click.UsageError(f"--file: {file}: {error.strerror}") from None
    if as_json:
        print_json({"token": text, "line": line})
    elif file is None:
        click.echo(f"token (KAPSL_TOKEN): {text}")
        click.echo(f"line for the server's tokens: {line}")
    else:
        click.echo(text)
