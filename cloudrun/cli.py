"""The command line: options, messages, exit codes. The only module that knows Click."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

import click

from cloudrun import __version__
from cloudrun.errors import FAILED, CloudrunError, Interrupted, UsageError

EPILOG = """\b
Examples:
  cloudrun main.py                      run it, follow it, bring the results home
  cloudrun -e EPOCHS=20 main.py --fast  what follows SCRIPT belongs to the program
  cloudrun --max-hours 2 main.py        ended after two hours, whatever happens
  id=$(cloudrun --detach main.py)       go on without me …
  cloudrun wait $id && cloudrun pull $id
  cloudrun ./ps                         a script that is called like a command

\b
RUN is the id of a run or a part of it; without it, the latest run started from this directory.
The exit code is the program's own, or 2 usage, 121 outcome unknown, 122 a machine may still be billed,
124 a limit was reached, 125 the program was not started, 129, 130 or 143 ended by you.
"""


class Cli(click.Group):
    """The first argument that is no option is a command or, if there is none of that name, a script."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name) or Script(name)

    def format_usage(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("cloudrun", "[OPTIONS] SCRIPT [ARGS]...")
        formatter.write_usage("cloudrun", "COMMAND [OPTIONS] [RUN]", prefix="   or: ")

    def shell_complete(self, context: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file"), *super().shell_complete(context, incomplete)]


class Script(click.Command):
    """Everything after the script's name is the program's: options, --help and -- alike."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.obj = args
        return []

    def invoke(self, context: click.Context) -> int:
        assert context.parent and self.name
        from cloudrun.launch import run_script

        gc.set_threshold(100_000)  # 100,000 files make as many tuples and no cycles; counting costs a third
        return run_script(self.name, context.obj, **context.parent.params)


class Command(click.Command):
    """A command is the function of its name in cloudrun.commands, called with a client and its options."""

    def invoke(self, context: click.Context) -> int:
        from cloudrun import commands
        from cloudrun.config import from_env
        from cloudrun.launch import open_client, open_report

        assert self.name
        options = self.options_before(context)
        settings = from_env(os.environ, os.getcwd(), backend=options["backend"])
        options["quiet"] |= context.params.pop("quiet")
        with open_client(settings, open_report(**options)) as client:
            code: int = getattr(commands, self.name)(client, settings, **context.params)
            return code

    def options_before(self, context: click.Context) -> dict[str, Any]:
        """What stands before the command. Raises UsageError for an option that only a run obeys."""
        assert context.parent
        for name in set(context.parent.params) - {"backend", "quiet", "verbose"}:
            if context.parent.get_parameter_source(name) != click.core.ParameterSource.DEFAULT:
                option = name.replace("json_file", "json").replace("_", "-")
                raise UsageError(f"--{option} before {self.name}: only starting a run takes this option")
        return dict(context.parent.params)


class Doctor(Command):
    """Wrong settings are among its findings, so it is given none."""

    def invoke(self, context: click.Context) -> int:
        from cloudrun.doctor import doctor

        options = self.options_before(context)
        quiet = context.params["quiet"] or options["quiet"]
        return doctor(options["backend"], as_json=context.params["as_json"], quiet=quiet)


class Drill(Command):
    """It starts clients of its own, and has settings of its own."""

    def invoke(self, context: click.Context) -> int:
        from cloudrun.drill import drill
        from cloudrun.launch import open_report

        options = self.options_before(context)
        options["quiet"] |= context.params["quiet"]
        return drill(open_report(**options), os.environ, options["backend"], yes=context.params["yes"])


def flag(*names: str, help: str) -> click.Option:
    return click.Option(names, is_flag=True, help=help)


def option(*names: str, help: str, **more: Any) -> click.Option:
    return click.Option(names, help=help, **more)


OPTIONS = [
    option("--backend", metavar="NAME", help="Where to run: gcp, vast or local."),
    option("-e", "--env", metavar="KEY[=VALUE]", multiple=True, help="For the program. Without VALUE: ours."),
    option("-o", "--output", metavar="DIR", multiple=True, help="Comes back like model/ and checkpoint/."),
    option("--max-hours", metavar="HOURS", help="End the run after so long."),
    option("--max-cost", metavar="USD", help="End the run before it costs more."),
    flag("--detach", help="Return when the machine works; print the run's id."),
    option(
        "--if-client-lost",
        type=click.Choice(["finish", "stop"]),
        default="finish",
        show_default=True,
        help="What the machine does when this command is gone.",
    ),
    flag("--wait", help="Queue if another run has the VM."),
    flag("--dry-run", help="Say what would be sent, done and spent; do nothing."),
    option("--json", "json_file", metavar="FILE", help="Write what is known of the run to FILE at its end."),
    flag("-q", "--quiet", help="Say only what is wrong."),
    flag("-v", "--verbose", help="Say more."),
]
HELP = """Run SCRIPT of the project in this directory on a machine rented for exactly as long as it takes.

data/, model/, checkpoint/ and the code go up, the program's output appears here as it is printed, model/
and checkpoint/ come back, the machine is ended and seen ended, and the exit code is the program's own.
"""
NAMES = {"help_option_names": ["-h", "--help"]}
cli = Cli(params=list(OPTIONS), help=HELP, epilog=EPILOG, context_settings=NAMES, no_args_is_help=True)
click.version_option(__version__, prog_name="cloudrun")(cli)

QUIET = flag("-q", "--quiet", help="Say only what is wrong.")
AS_JSON = flag("--json", "as_json", help="Print JSON; see the README for the fields.")
COMMANDS: dict[str, tuple[str, list[click.Parameter]]] = {
    "offers": (
        "Show what could be rented now, best first.",
        [
            option(
                "--hours",
                type=click.FloatRange(0, min_open=True),
                default=1.0,
                show_default=True,
                help="For so long the expected cost is.",
            ),
            AS_JSON,
        ],
    ),
    "ps": (
        "Show the runs whose bill is open, and the machines, of every backend.",
        [flag("-a", "--all", "history", help="Runs that have ended, too."), AS_JSON],
    ),
    "logs": ("Print the program's output so far.", [flag("-f", "--follow", help="Go on until its end.")]),
    "wait": ("Wait for a run's end; exit with its exit code.", [AS_JSON]),
    "stop": (
        "End a run, save its outputs, see its machine ended.",
        [
            flag("--now", help="End the machine at once; what was saved so far stays."),
            flag("-a", "--all", "every", help="All runs whose bill is open."),
        ],
    ),
    "gc": (
        "End what is overdue, close what is over; silent if there is nothing to do, for cron.",
        [flag("-n", "--dry-run", "dry_run", help="Say what there is to do, and do nothing.")],
    ),
    "pull": ("Bring a run's outputs, or its last save, home.", []),
}
for name, (words, params) in COMMANDS.items():
    run = [] if name in ("ps", "gc", "offers") else [click.Argument(["run"], required=False)]
    cli.add_command(Command(name, params=[*run, *params, QUIET], help=words, short_help=words))
cli.add_command(
    Doctor(
        "doctor",
        params=[AS_JSON, QUIET],
        help="Look at everything that a run needs, and say what to type to mend what is wrong.",
        short_help="Look at everything that a run needs.",
    )
)
cli.add_command(
    Drill(
        "drill",
        params=[flag("-y", "--yes", help="Do not ask whether its price is all right."), QUIET],
        help="Play faults on the cheapest machine, until its provider shows that nothing is billed.",
        short_help="Play faults for real, and see the bill stop.",
    )
)


@cli.command("completion", short_help="Print what makes your shell complete cloudrun's words.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print what makes SHELL complete commands and options: eval "$(cloudrun completion bash)"."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found
    click.echo(found(cli, {}, "cloudrun", "_CLOUDRUN_COMPLETE").source())
    return 0


def open_descriptors() -> None:
    """Stand-ins for closed standard streams: else the next file that we open would get its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def say_error(text: str) -> None:
    from cloudrun.report import Report

    Report(quiet=False, verbose=False, environ=os.environ).error(text)


def main() -> None:
    """The error boundary: every end of cloudrun is a sentence and an exit code."""
    open_descriptors()
    try:
        code = cli.main(prog_name="cloudrun", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BrokenPipeError:  # nobody reads what we print
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except (Interrupted, CloudrunError, OSError) as error:
        say_error(str(error))
        code = getattr(error, "exit_code", FAILED)
    except (click.exceptions.Abort, KeyboardInterrupt, EOFError):  # Click turns these into exit code 1
        code = 130
    except Exception:
        import traceback

        say_error(f"this is a bug of cloudrun {__version__}:\n{traceback.format_exc()}")
        code = FAILED
    sys.exit(code)
