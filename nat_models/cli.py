"""The command `nat-models`: which command is meant, and what becomes of its errors.

A command is a module of nat_models.commands, imported when it is called. Its docstring is its help; `add_flags(parser)`
declares its flags and `run(args)` runs it.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import __version__
from .errors import CheckpointError, Stopped, UserError, missing_extra, unknown

COMMANDS = {
    "train": "fine-tune or train a model on a folder of images",
    "check": "look at images with masks or boxes before training: what is wrong, classes, a sheet of pictures",
    "evaluate": "evaluate checkpoints on labelled images: figures, confusion matrix, worst mistakes",
    "predict": "name the classes of images, and sort them",
    "features": "write features of images: pooled, per level or dense, in a file or in shards",
    "knn": "classify by nearest neighbours among features",
    "probe": "train a linear probe on features",
    "search": "find the images nearest to an image",
    "picture": "draw features: principal components, or a map by class",
    "attention": "draw where a token of an image looks, per level and head",
    "convert": "convert a checkpoint between timm's, transformers' and the authors' form",
    "complexity": "count a network's parameters, FLOPs and MACs, as the papers do",
    "export": "write a model to one file that runs without this package",
    "push": "publish a model in a repository of the Hugging Face Hub, with a model card",
    "weights": "list published weights: size, top-1, licence, and what is cached",
    "info": "print versions, and what the attention runs on here and why (as without a command)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help)")


def parse(argv: Sequence[str]) -> tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """The function that runs a command, and its arguments.

    Raises:
        UserError: There is no such command or flag, or a value is wrong.
        SystemExit: It was asked for help or for the version, which is printed.
    """
    listed = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    top = _Parser(
        "nat-models",
        usage="nat-models [--help] [--version] COMMAND ...",
        description=f"Neighborhood Attention Transformers for timm.\n\ncommands (nat-models COMMAND --help):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"nat_models {__version__}")
    top.add_argument("command", metavar="COMMAND", nargs="?", default="info", help=argparse.SUPPRESS)
    name = top.parse_args(argv[:1]).command
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    command = importlib.import_module(f".commands.{name}", __package__)
    parser = _Parser(
        f"nat-models {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_flags(parser)
    args, rest = parser.parse_known_args(argv[1:])
    if rest:
        raise unknown("argument", rest[0].split("=")[0], parser._option_string_actions)
    return command.run, args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2 for an error that the caller can mend, 128 + N after signal N."""
    try:
        run, args = parse(sys.argv[1:] if argv is None else argv)
        run(args)
    except (UserError, CheckpointError) as e:
        error = e
    except Stopped as e:
        if e.message:  # of several processes one tells it
            print(e, file=sys.stderr)
        return 128 + e.signal
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as e:
        if (error := missing_extra(e)) is None:
            raise
    else:
        return 0
    print(f"error: {error}", file=sys.stderr)
    return 2
