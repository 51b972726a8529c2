"""`nat-models train` that tells its rank and its losses; run by torch.distributed.run in the tests.

    program.py FOLDER [--fsdp] [--slow] FLAGS...

FOLDER gets losses-RANK.txt, a line per step. --slow makes steps that one can be killed in.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from nat_models.cli import main
from nat_models.training import engine
from nat_models.training.tasks.classification import Classification
from nat_models.training.tasks.detection import Detection
from nat_models.training.tasks.segmentation import Segmentation

folder, flags = Path(sys.argv[1]), sys.argv[2:]
state = PartialState(cpu=True)
task = {"segment": Segmentation, "detect": Detection}.get((flags or [""])[-1], Classification)
losses, prepare = task.losses, engine.prepare

if "--fsdp" in flags:
    # accelerate shards where there are GPUs only; torch shards over gloo as well.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def told(*args):
    result = losses(*args)
    with open(folder / f"losses-{state.process_index}.txt", "a") as f:
        f.write(f"{float(sum(result.values()))!r}\n")
    if "--slow" in flags:
        time.sleep(0.05)
    return result


def prepared(*args, **kwargs):
    parts = prepare(*args, **kwargs)
    # One write each: lines of two processes do not mix.
    print(f"{args[2].distributed_type}, {type(next(parts.model.parameters())).__name__}\n", end="", flush=True)
    return parts


task.losses, engine.prepare = told, prepared
torch.set_num_threads(1)
code = main(["train", *(flag for flag in flags if flag not in ("--fsdp", "--slow"))])
print(f"rank {state.process_index} of {state.num_processes} over {state.backend}\n", end="")
sys.exit(code)
