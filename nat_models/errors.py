"""Errors that a caller can mend: the command line prints them without a traceback. All of them can be pickled."""

import difflib
import re
from collections.abc import Iterable
from importlib.metadata import version

# Optional packages, by the extra that brings them.
_EXTRAS = {
    **dict.fromkeys(
        ("accelerate", "faster_coco_eval", "matplotlib", "rich", "sklearn", "torchmetrics", "yaml"), "train"
    ),
    **dict.fromkeys(("datasets", "pyarrow"), "tables"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxruntime", "onnxscript"), "export"),
    "natten": "natten",
}


class UserError(Exception):
    """Something the caller can mend."""


class Unreadable(UserError):
    """A file that is damaged, or is not what its name says."""


class Stopped(Exception):
    """A program was told to stop and did so in good order.

    Args:
        message: How to go on.
        signal: The number of the signal; a shell's exit code for it is 128 more.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message, signal)
        self.message, self.signal = message, signal

    def __str__(self) -> str:
        return self.message


class CheckpointError(RuntimeError):
    """Weights could not be found, read or fitted to the model; the message says what was found and expected."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`; says which ones are near, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    return UserError(f"Unknown {what} {name!r}, " + (f"near to {', '.join(close)}." if close else f"known: {known}."))


def require(package: str, minimum: str, what: str) -> None:
    """Checks that an installed package is new enough for a part of this one.

    Raises:
        UserError: It is older than `minimum`, which `what` needs.
    """
    found = version(package)
    if version_numbers(found) < version_numbers(minimum):
        command = f"pip install --upgrade '{package}>={minimum}'"
        raise UserError(f"{what} needs {package} {minimum} or newer, found {found}: {command}")


def version_numbers(text: str) -> tuple[int, ...]:
    """The first three numbers of a version, to compare by: those of "0.21.5rc1+cu130" are (0, 21, 5)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """The error for an optional package that is not installed; None where no extra brings the package."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return UserError(f"The package {package} is not installed: pip install 'nat_models[{_EXTRAS[package]}]'")
