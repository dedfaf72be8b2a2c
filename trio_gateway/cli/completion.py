"""``completion``: print the script by which a shell completes the commands."""

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash:  eval "$(trio-gateway completion bash)"      in ~/.bashrc
    zsh:   eval "$(trio-gateway completion zsh)"       in ~/.zshrc
    fish:  trio-gateway completion fish > ~/.config/fish/completions/trio-gateway.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    name = "trio-gateway"
    click.echo(found(ctx.find_root().command, {}, name, "_TRIO_GATEWAY_COMPLETE").source())
