"""Code and commands that run each in a process of its own, which begins where other people's packages are imported.

    python forks.py

That import, and nothing of ours, is what the processes share; it takes most of the time of a short one.
"""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

_SHARED = ("torch", "timm", "torch._dynamo", "torch.onnx", "accelerate", "torchmetrics", "transformers")


class Forks:
    """Starts the processes.

    Args:
        environment: Of all of them.
        folder: In which they run, and in which their output is kept.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        self.output = folder / f"output-{os.getpid()}.txt"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parent = subprocess.Popen([sys.executable, __file__, self.output], cwd=folder, env=environment, **pipes)

    def run(self, *, code: str | None = None, command: list[str] | None = None) -> tuple[int, str]:
        """The exit code and the output of a piece of Python, or of the words after `nat-models`."""
        print(json.dumps([code, command]), file=self.parent.stdin, flush=True)
        answer = self.parent.stdout.readline()
        return int(answer or 1), self.output.read_text(errors="replace") if answer else "the parent has ended"

    def close(self) -> None:
        self.parent.stdin.close()
        self.parent.wait()
        self.parent.stdout.close()


def _child(code: str | None, command: list[str] | None, output: str) -> None:
    with open(output, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["-c" if command is None else "nat-models"]
    sys.modules["__main__"] = page = types.ModuleType("__main__")  # no name of this file is one of the page's
    if command is None:
        exec(compile(code, "<page>", "exec"), vars(page))
        return
    from nat_models.cli import main

    sys.exit(main(command))


def _serve(output: str) -> None:
    for name in _SHARED:
        importlib.import_module(name)
    assert "nat_models" not in sys.modules
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            _child(*json.loads(line), output)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    _serve(sys.argv[1])
