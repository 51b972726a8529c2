"""Where configs/ and weights/ are. They stand at the top of a checkout, and a wheel carries them into the package."""

from pathlib import Path

from .errors import UserError

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(folder: str) -> Path:
    """The folder `configs` or `weights`.

    Raises:
        UserError: Neither the package nor the checkout around it has the folder.
    """
    checkout = _PACKAGE.parent
    # Beside an installed package are other packages, whose folders are none of ours.
    roots = [_PACKAGE, *([checkout] if (checkout / "pyproject.toml").is_file() else [])]
    for root in roots:
        if (root / folder).is_dir():
            return root / folder
    raise UserError(f"There is no folder {folder} in {' or '.join(map(str, roots))}: install nat_models again.")


def resource(folder: str, name: str) -> Path:
    """A file of the folder `configs` or `weights`.

    Raises:
        UserError: There is no such file; the message lists those that there are.
    """
    path = resource_folder(folder) / name
    if not path.is_file():
        found = sorted(file.name for file in path.parent.iterdir())
        raise UserError(f"There is no {name} in {path.parent}, only {', '.join(found)}.")
    return path
