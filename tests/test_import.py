"""The promise of an import: models are registered and nothing else happens."""

import subprocess
import sys

# Installs an audit hook after timm is in, so that what is seen is this package's own doing.
_AUDIT = """
import re, sys, timm, timm.models, timm.layers, timm.data, torch.utils.flop_counter
seen = []
def hook(event, args):
    if event == "open" and not re.search(r"\\.pyc?(\\.\\d+)?$", str(args[0])):  # .pyc.N: one being written
        seen.append((event, args[0]))
    elif event.startswith("socket.") or event in ("ctypes.dlopen", "subprocess.Popen", "os.system"):
        seen.append((event, str(args)))
    elif event == "import" and str(args[1] or "").endswith(".so"):
        seen.append((event, str(args[1])))
sys.addaudithook(hook)
import nat_models
print(seen)
"""


def test_import_opens_only_python_modules_no_socket_and_no_library():
    run = subprocess.run([sys.executable, "-c", _AUDIT], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_import_needs_none_of_the_optional_packages():
    optional = ["natten", "accelerate", "matplotlib", "transformers", "onnx", "onnxruntime", "sklearn", "typer"]
    code = f"""
import sys
for name in {optional!r}:
    sys.modules[name] = None  # an import of it raises ImportError
import timm, nat_models
print(len(timm.list_models("nat_*")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 4
