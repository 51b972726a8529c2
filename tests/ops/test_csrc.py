"""The C++ by itself: its helpers' unit tests, and builds by other compilers and for other processors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parents[2] / "nat_models" / "ops" / "csrc"
SKIPPED = 77  # the CPU lacks the instruction set


def _needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def _build(folder, *options, targets=()):
    """Configures and builds; returns all that the compiler said."""
    configure = ["cmake", "-S", SOURCE, "-B", folder, *options]
    build = ["cmake", "--build", folder, *(argument for target in targets for argument in ("--target", target))]
    said = ""
    for command in (configure, build):
        run = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
        said += run.stdout + run.stderr
    return said


def _run(*command):
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if run.returncode == SKIPPED:
        pytest.skip(f"{Path(command[0]).name}: beyond this CPU")
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    _build(folder, "-DNAT_TESTS=ON")
    return folder


@_needs("cmake", "c++")
def test_helpers_pass_their_unit_tests(tmp_path):
    _build(tmp_path, "-DNAT_TESTS=ON", targets=["test_simd"])
    programs = sorted(tmp_path.glob("test_simd_*"))
    assert [program.name for program in programs if program.name.endswith("baseline")]
    results = {program.name: subprocess.run([program], capture_output=True, text=True) for program in programs}
    assert {name: run.stdout for name, run in results.items() if run.returncode not in (0, SKIPPED)} == {}


@pytest.mark.slow  # to build it; through Python, test_native.py runs every instruction set
@_needs("cmake", "c++")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_the_grid_without_python_agrees_with_a_plain_loop(isa, built):
    if not (built / f"test_simd_{isa}").exists():
        pytest.skip("of another processor")
    assert f"{isa}: 52 cases, 0 failures" in _run(built / "test_grid", isa)


@pytest.mark.slow
@_needs("cmake", "clang++")
def test_clang_builds_the_kernel_without_a_warning_and_it_passes_the_grid(tmp_path):
    said = _build(tmp_path, "-DCMAKE_CXX_COMPILER=clang++", "-DNAT_TESTS=ON")
    assert "warning:" not in said, said
    results = {program.name: subprocess.run([program]).returncode for program in tmp_path.glob("test_simd_*")}
    assert results["test_simd_baseline"] == 0 and set(results.values()) <= {0, SKIPPED}, results
    code = (
        "import sys, pathlib, pytest, nat_models.ops.backends.native as native\n"
        "native.library_path = lambda: pathlib.Path(sys.argv[1])\n"
        "assert native.available()[1].startswith(sys.argv[2] + ',') or sys.exit(77), native.available()\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[3:]]))"
    )
    grid = f"{Path(__file__).parent / 'test_native.py'}::test_kernel_is_the_reference"
    passed = []
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16"):
        environment = {**os.environ, "NAT_MODELS_CPU_ISA": isa}
        command = [sys.executable, "-c", code, tmp_path / "nat_cpu.so", isa, grid]
        run = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)
        assert run.returncode in (0, SKIPPED), (run.stdout + run.stderr)[-5000:]
        passed += [isa] * (" passed" in run.stdout)
    assert "baseline" in passed


@pytest.mark.slow
@_needs("cmake", "c++", "aarch64-linux-gnu-g++", "qemu-aarch64")
def test_aarch64_passes_unit_tests_and_has_this_machines_results(built, tmp_path):
    options = ["-DNAT_TESTS=ON", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    options += ["-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    assert "warning:" not in _build(tmp_path / "build", *options, targets=("test_simd_baseline", "test_grid"))
    assert " 0 failures" in _run("qemu-aarch64", tmp_path / "build" / "test_simd_baseline", 10)
    results = []
    for name, program in (("here", [built / "test_grid"]), ("aarch64", ["qemu-aarch64", tmp_path / "build/test_grid"])):
        assert "52 cases, 0 failures" in _run(*program, "baseline", tmp_path / name)
        results.append(np.fromfile(tmp_path / name))
    here, aarch64 = results
    assert len(here) > 10**6
    # Low precision may round to the other neighbour: at most 2**-8 of the value.
    np.testing.assert_allclose(aarch64, here, rtol=2**-7, atol=1e-5)
