"""The command line: options, messages, exit codes. The only module that knows Click."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cloudrun import __version__
from cloudrun.errors import FAILED, CloudrunError, Interrupted, UsageError

if TYPE_CHECKING:
    from cloudrun.config import Settings
    from cloudrun.order import Order
    from cloudrun.run import Client

EPILOG = """\b
Examples:
  cloudrun main.py                      run it, follow it, bring the results home
  cloudrun -e EPOCHS=20 main.py --fast  what follows SCRIPT belongs to the program
  cloudrun --max-hours 2 main.py        ended after two hours, whatever happens
  id=$(cloudrun --detach main.py)       go on without me …
  cloudrun wait $id && cloudrun pull $id
  cloudrun ./ps                         a script that is called like a command
"""


class Cli(click.Group):
    """The first argument that is no option is a command or, if there is none of that name, a script."""

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return super().get_command(context, name) or script_command(name)

    def format_usage(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("cloudrun", "[OPTIONS] SCRIPT [ARGS]...\ncloudrun COMMAND [OPTIONS] [RUN]")


def script_command(name: str) -> click.Command:
    settings = {
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    }
    arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)

    @click.pass_context
    def callback(context: click.Context, arguments: tuple[str, ...]) -> int:
        assert context.parent
        return run_script(name, arguments, **context.parent.params)

    return click.Command(
        name,
        params=[arguments],
        callback=callback,
        context_settings=settings,
        add_help_option=False,
    )


@click.group(
    cls=Cli,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
@click.option("--backend", metavar="NAME", help="Where to run: gcp, vast or local.")
@click.option(
    "-e",
    "--env",
    multiple=True,
    metavar="KEY[=VALUE]",
    help="For the program; without a value it is taken from here. Repeatable.",
)
@click.option(
    "-o",
    "--output",
    multiple=True,
    metavar="DIR",
    help="Another directory that comes back, besides model/ and checkpoint/. Repeatable.",
)
@click.option("--max-hours", metavar="HOURS", help="End the run after so long.")
@click.option("--max-cost", metavar="USD", help="End the run before it costs more.")
@click.option("--detach", is_flag=True, help="Return when the machine works; print the run's id.")
@click.option(
    "--if-client-lost",
    type=click.Choice(["finish", "stop"]),
    default="finish",
    show_default=True,
    help="What the machine does when this command is gone.",
)
@click.option("--wait", is_flag=True, help="Queue if another run has the VM.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, done and spent; do nothing.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write what is known of the run to FILE at its end."
)
@click.option("-q", "--quiet", is_flag=True, help="Say only what is wrong.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.version_option(__version__, prog_name="cloudrun")
def cli(**options: Any) -> None:
    """Run SCRIPT of the project in this directory on a machine rented for exactly as long as it takes.

    data/, model/, checkpoint/ and the code go up, the program's output appears here as it is printed,
    model/ and checkpoint/ come back, the machine is ended and seen ended, and the exit code is the
    program's own.
    """


def run_script(name: str, arguments: tuple[str, ...], **options: Any) -> int:
    """The story of `cloudrun main.py`, from the user's side."""
    from cloudrun.config import from_env
    from cloudrun.project import check_project, returned
    from cloudrun.start import Wanted

    limits = {key: options[key] for key in ("backend", "max_hours", "max_cost")}
    script, environ = check_project(os.getcwd(), name), dict(os.environ)
    settings = from_env(environ, os.getcwd(), **limits)
    returned(options["output"])
    env = environment(options["env"], environ)
    wanted = Wanted([script, *arguments], env, options["output"], options["if_client_lost"])
    report = open_report(**options)
    if settings.chosen:
        report.say(f"backend {settings.backend}, because {settings.chosen}")
    if options["dry_run"]:
        return dry_run(settings, wanted)
    with open_client(settings, report) as client:
        return start_and_follow(client, settings, wanted, options)


def start_and_follow(client: Client, settings: Settings, wanted: Any, options: dict[str, Any]) -> int:
    from cloudrun.follow import say_price
    from cloudrun.run import check_time, execute
    from cloudrun.start import describe, prepare, store
    from cloudrun.sweep import sweep

    report = client.report
    sweep(client.backend, client.bucket, report)
    report.stage("scan")
    prepared = prepare(settings, client.bucket)
    report.say(describe(prepared))
    report.stage("offer")
    offer = client.backend.offers()[0]
    order = store(prepared, settings, wanted, offer.price, (client.bucket, report))
    try:
        check_time(order, offer)
        say_price(report, order, offer.what)
        done = execute(client, order, offer, detach=options["detach"])
    except BaseException:
        abandon(client, order)
        raise
    if done is None:
        click.echo(order.run)
        return 0
    return finish(client, order, done, options["json_file"])


def abandon(client: Client, order: Order) -> None:
    """A run that never asked for a machine leaves nothing open."""
    from cloudrun.bill import forget
    from cloudrun.runs import last_attempt

    if not last_attempt(client.bucket, order):
        forget(client.bucket, order.prefix, order.run)


def finish(client: Client, order: Order, outcome: Any, json_file: str | None) -> int:
    """The machine is gone; bring the results home and say how it went."""
    from cloudrun.closing import bring_home, write_record

    code, pulled = bring_home(client, order, outcome)
    if json_file:
        write_record(json_file, client.bucket, order, pulled)
    return code


def dry_run(settings: Settings, wanted: Any) -> int:
    from cloudrun.backends import open_backend
    from cloudrun.closing import dry_run_lines
    from cloudrun.storage import open_bucket

    offer = open_backend(settings).offers()[0]
    for line in dry_run_lines(settings, wanted, open_bucket(settings.bucket), offer):
        click.echo(line)
    return 0


def environment(pairs: tuple[str, ...], environ: dict[str, str]) -> dict[str, str]:
    """The values of -e. Raises UsageError naming every one that is not set here."""
    found, missing = {}, []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or (not equals and name not in environ):
            missing.append(f"-e {pair}: not set here; give a value, -e {name or 'NAME'}=VALUE")
        else:
            found[name] = value if equals else environ[name]
    if missing:
        raise UsageError("\n".join(missing))
    return found


def open_report(quiet: bool = False, verbose: bool = False, **_: object) -> Any:
    from cloudrun.report import Report

    return Report(quiet=quiet, verbose=verbose, environ=os.environ)


def open_client(settings: Settings, report: Any) -> Any:
    """A Client as a context: within it signals are ours."""
    from contextlib import contextmanager

    from cloudrun.backends import open_backend
    from cloudrun.run import Client
    from cloudrun.signals import Signals
    from cloudrun.storage import open_bucket

    @contextmanager
    def opened() -> Any:
        with Signals() as signals:
            yield Client(open_bucket(settings.bucket), open_backend(settings), report, signals)

    return opened()


def command(
    name: str, help: str, *options: Callable[..., Any], run_argument: bool = True
) -> Callable[..., Any]:
    """A subcommand about one run, or about all."""

    def decorate(function: Callable[..., int]) -> click.Command:
        def callback(**values: Any) -> int:
            from cloudrun.config import from_env

            settings = from_env(os.environ, os.getcwd())
            with open_client(settings, open_report(**values)) as client:
                return function(client, settings, **values)

        callback.__doc__ = help
        for option in reversed(options):
            callback = option(callback)
        if run_argument:
            callback = click.argument("run", required=False)(callback)
        callback = click.option("-q", "--quiet", is_flag=True, help="Say only what is wrong.")(callback)
        return cli.command(name, help=help)(callback)

    return decorate


AS_JSON = click.option(
    "--json", "as_json", is_flag=True, help="On stdout, as JSON; see the README for the fields."
)


@command("ps", "Show the runs whose bill is still open.", AS_JSON, run_argument=False)
def ps(client: Client, settings: Settings, as_json: bool, **_: object) -> int:
    from cloudrun import commands

    for line in commands.ps(client, as_json=as_json):
        click.echo(line)
    return 0


@command(
    "logs",
    "Print the program's output so far: its stdout on stdout, its stderr on stderr.",
    click.option("-f", "--follow", is_flag=True, help="Go on until the run ends."),
)
def logs(client: Client, settings: Settings, run: str | None, follow: bool, **_: object) -> int:
    from cloudrun import commands

    return commands.logs(client, commands.which(client, settings, run), follow=follow)


@command("wait", "Wait for the end of a run; exit with the run's own exit code.", AS_JSON)
def wait(client: Client, settings: Settings, run: str | None, as_json: bool, **_: object) -> int:
    from cloudrun import commands

    order = commands.which(client, settings, run)
    code = commands.wait(client, order)
    if as_json:
        click.echo(commands.record_line(client, order))
    return code


@command(
    "stop",
    "End a run: the program is asked to end, its outputs are saved, the machine is seen ended.",
    click.option("--now", is_flag=True, help="End the machine at once; what was saved so far stays."),
)
def stop(client: Client, settings: Settings, run: str | None, now: bool, **_: object) -> int:
    from cloudrun import commands

    return commands.stop(client, commands.which(client, settings, run), now=now)


@command("pull", "Bring the outputs of a run home: of a running one, the last complete save.")
def pull(client: Client, settings: Settings, run: str | None, **_: object) -> int:
    from cloudrun import commands

    return commands.pull(client, commands.which(client, settings, run))


@cli.command("completion", help="Print what makes SHELL complete cloudrun's commands and options.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
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


def main() -> None:
    """The error boundary: every end of cloudrun is a sentence and an exit code."""
    open_descriptors()
    try:
        code = cli.main(prog_name="cloudrun", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Interrupted as error:
        code = error.exit_code
    except CloudrunError as error:
        open_report().error(str(error))
        code = error.exit_code
    except (
        click.exceptions.Abort,
        KeyboardInterrupt,
        EOFError,
    ):  # Click turns these into exit code 1
        code = 130
    except OSError as error:
        open_report().error(f"{error}")
        code = FAILED
    sys.exit(code)
