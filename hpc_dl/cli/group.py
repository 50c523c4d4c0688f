"""The top of the command line, and how its errors look."""

import importlib
from typing import Any

import click

from hpc_dl import __version__
from hpc_dl.errors import HpcDlError, OptionError

#: Sub-command -> (module, what --help says). A module is imported when its command is used.
_COMMANDS = {
    "compress": ("hpc_dl.cli.compress", "Show the gradient compressors that there are."),
    "doctor": ("hpc_dl.cli.doctor", "Show what is installed, what works, and what to repair."),
    "horovod": ("hpc_dl.cli.horovod", "Build Horovod for this environment, or show its state."),
    "launch": ("hpc_dl.cli.launch", "Run a Python script on several ranks of this machine."),
    "plan": ("hpc_dl.cli.plan", "Predict what compression would gain on some cluster."),
}


class LazyGroup(click.Group):
    """A group that imports a sub-command only when it is run, so that it starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(_COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of this package is one message, not a traceback."""
        try:
            return super().invoke(ctx)
        except HpcDlError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            ctx.exit(2 if isinstance(error, OptionError) else 1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpc-dl")
def main() -> None:
    """Distributed deep learning on supercomputers.

    \b
    Examples:
      hpc-dl doctor                      is everything there, and does it work?
      hpc-dl launch -n 2 train.py        run a script on two ranks
      hpc-dl horovod build               compile Horovod for this environment
      hpc-dl compress list               how gradients can be compressed
    """
