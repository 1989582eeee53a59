"""`kapsl-scheduler completion`: what a shell has to know to complete commands, options and names.

What is not here: the names that a server has (`cli_names`), and what completes the rest, which is click's.
"""

from __future__ import annotations

from typing import Final

from kapsl_scheduler.cli_frame import click

__all__ = ["completion"]

_PROGRAM: Final = "kapsl-scheduler"
_VARIABLE: Final = "_KAPSL_SCHEDULER_COMPLETE"
_LINES: Final = {
    "bash": 'eval "$(kapsl-scheduler completion bash)"          # in ~/.bashrc',
    "zsh": 'eval "$(kapsl-scheduler completion zsh)"           # in ~/.zshrc, behind compinit',
    "fish": "kapsl-scheduler completion fish | source           # in ~/.config/fish/config.fish",
}
# bash breaks words at : and =, of which URLs and the jobs of packages have some. So the words are put together again,
# and of the answers what stands before the last : is left out, which bash does not replace.
_BASH: Final = """\
_kapsl_scheduler_completion() {
    local IFS=$'\\n' index answer kind value
    local -a words=()
    for ((index = 0; index <= COMP_CWORD; index++)); do
        if ((index > 1)) && [[ ${COMP_WORDS[index]} == [:=]* || ${COMP_WORDS[index - 1]} == *[:=] ]]; then
            words[${#words[@]} - 1]+=${COMP_WORDS[index]}
        else
            words+=("${COMP_WORDS[index]}")
        fi
    done
    local word=${words[${#words[@]} - 1]}
    COMPREPLY=()
    for answer in $(env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) _VARIABLE=bash_complete "$1"); do
        kind=${answer%%,*} value=${answer#*,}
        case $kind in
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
            plain)
                if [[ $word == *:* && $word != *=* ]]; then value=${value#"${word%:*}:"}; fi
                COMPREPLY+=("$value")
                ;;
        esac
    done
}
complete -o nosort -F _kapsl_scheduler_completion kapsl-scheduler 2>/dev/null ||
    complete -F _kapsl_scheduler_completion kapsl-scheduler
"""


@click.command(epilog="\b\n" + "\n".join(_LINES.values()))
@click.argument("shell", type=click.Choice(list(_LINES)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what SHELL evaluates to complete commands, options, models and jobs."""
    from click.shell_completion import get_completion_class

    if shell == "bash":
        click.echo(_BASH.replace("_VARIABLE", _VARIABLE), nl=False)
        return
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, _PROGRAM, _VARIABLE).source())
