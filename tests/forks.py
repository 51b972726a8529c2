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
from collections.abc import Sequence
from pathlib import Path

_SHARED = ("torch", "timm", "torch._dynamo", "torch.onnx", "accelerate", "torchmetrics", "transformers")
# Without huggingface_hub, which reads at import where the hub is: it may be another one in each process.
BEFORE_THE_HUB = ("torch", "torchvision")


class Forks:
    """Starts the processes.

    Args:
        environment: Of all of them.
        folder: In which they run, and in which their output is kept.
        shared: What is imported already where they begin.
    """

    def __init__(self, environment: dict[str, str], folder: Path, shared: Sequence[str] = _SHARED):
        self.output = [folder / f"{stream}-{os.getpid()}.txt" for stream in ("stdout", "stderr")]
        command = [sys.executable, __file__, ",".join(shared), *self.output]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parent = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def run(
        self, *, code: str | None = None, command: list[str] | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """What a piece of Python, or the words after `nat-models`, came to.

        Args:
            code: The Python.
            command: The words.
            environment: Of this process, beside what all have.
        """
        print(json.dumps([code, command, environment or {}]), file=self.parent.stdin, flush=True)
        if not (answer := self.parent.stdout.readline()):
            return subprocess.CompletedProcess([], 1, "", "the parent has ended")
        return subprocess.CompletedProcess([], int(answer), *(f.read_text(errors="replace") for f in self.output))

    def close(self) -> None:
        # An empty line: the pipe's end would not do, where another child of this process holds the pipe open.
        print(file=self.parent.stdin, flush=True)
        self.parent.wait()
        self.parent.stdin.close()
        self.parent.stdout.close()


def _child(code: str | None, command: list[str] | None, environment: dict[str, str], output: list[str]) -> None:
    for path, stream in zip(output, (sys.stdout, sys.stderr), strict=True):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    sys.argv = ["-c" if command is None else "nat-models"]
    sys.modules["__main__"] = page = types.ModuleType("__main__")  # no name of this file is one of the page's
    if command is None:
        exec(compile(code, "<page>", "exec"), vars(page))
        return
    from nat_models.cli import main

    sys.exit(main(command))


def _serve(shared: str, *output: str) -> None:
    for name in shared.split(","):
        importlib.import_module(name)
    assert "nat_models" not in sys.modules
    while line := sys.stdin.readline().strip():
        if not (child := os.fork()):
            _child(*json.loads(line), output)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    _serve(*sys.argv[1:])
