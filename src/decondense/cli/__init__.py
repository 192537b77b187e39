"""The command line. Every verb imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import typer

import decondense
from decondense.cli import atlas, evaluate, evidence, measure, run
from decondense.cli.encoding import print_in_any_encoding
from decondense.privacy import without_credentials
from decondense.stopping import Stopped, stop_on_signals

app = typer.Typer(
    name="decondense",
    help="Is my model condensed, does dispersion loss cure it, and is the cure worth it?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"decondense {decondense.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    """Is my model condensed, does dispersion loss cure it, and is the cure worth it?"""


app.command("demo")(run.demo)
app.command("measure")(measure.measure_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("train")(run.train)
app.command("study")(run.study)
app.command("compare")(evidence.compare)
app.command("report")(evidence.report)
app.add_typer(atlas.app, name="atlas")
app.command("card")(atlas.card)
app.command("env")(evidence.env)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; user errors become one message on stderr and exit status 2.

    ``DECONDENSE_DEBUG=1`` shows the traceback instead.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    print_in_any_encoding()
    with stop_on_signals(save_first=False):  # a run that has something to save takes SIGUSR1 over
        return _run(words)


def _run(words: list[str]) -> int:
    debug = os.environ.get("DECONDENSE_DEBUG", "") not in ("", "0")
    try:
        result = app(args=words, standalone_mode=False)
        status = int(result) if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Stopped as stopped:
        _complain(f"{stopped.signal.name}: {_interrupted(words)}")
        return int(stopped.code or 0)
    except BrokenPipeError:  # `decondense ... | head`
        sys.stderr.close()
        return 0
    except SystemExit as ended:  # what click makes of it
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        return 0
    except Exception as error:
        # usage errors; typer carries its own copy of click in some releases, so they are known by what they can do
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        # tokenizers and safetensors, which are not Python, raise what the system refuses as types of their own
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number and not debug and not isinstance(error, ValueError):  # our own errors name the file
            error = OSError(int(number[1]), os.strerror(int(number[1])))
        if debug or not isinstance(error, (ValueError, OSError, RuntimeError)):
            raise
        _complain(_say(error))
        return 1 if isinstance(error, RuntimeError) else 2
    # of Ctrl-C some releases of typer make an exit status, others an exception
    if status == 130:
        _complain(_interrupted(words))
    return status


def _interrupted(arguments: Sequence[str]) -> str:
    """What an interrupted command leaves behind."""
    verb = next((word for word in arguments if not word.startswith("-")), "")
    kept = {
        "demo": "rows written so far are valid; the same command resumes from the last checkpoints.",
        "evaluate": "finished tasks are kept; the same command continues with the next one.",
        "measure": "models that were measured before are kept; the same command starts over.",
    }
    kept |= dict.fromkeys(("study", "train"), kept["demo"])
    return f"interrupted: {kept[verb]}" if verb in kept else "interrupted."


def _say(error: Exception) -> str:
    """What went wrong in one sentence and, for the operating system's refusals, what to do about it."""
    if isinstance(error, OSError) and error.errno is not None:
        import errno

        where = f"{error.filename}: " if error.filename else ""
        remedy = {
            **dict.fromkeys(
                (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
                " Rows written so far are valid: free some space and run the same command again.",
            ),
            **dict.fromkeys(
                (errno.EEXIST, errno.ENOTDIR),
                " A file is where a directory is needed: choose another directory with --out.",
            ),
            errno.EISDIR: " A directory is where a file is needed: remove it, or choose another one with --out.",
            errno.ENOTEMPTY: " A directory with files is in the way: remove it, or choose another one with --out.",
            errno.ENAMETOOLONG: " Choose a shorter name.",
            errno.EACCES: " Choose a directory you may write to (--out, DECONDENSE_CACHE).",
            errno.EROFS: " Choose a directory you may write to (--out, DECONDENSE_CACHE).",
        }.get(error.errno, "")
        return f"{where}{error.strerror}.{remedy}"
    return str(error)


def _complain(message: str) -> None:
    from decondense.cli.console import Console

    shown = _escape(without_credentials(message))  # a refused argument may hold some
    Console(stderr=True).print(f"[bold red]error:[/] {shown}", highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
