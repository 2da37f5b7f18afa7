"""Runs the C++ tests: every bound against true distances, and all kernels under sanitizers."""

import subprocess

import pytest

from conftest import build_native

SANITIZERS = ["", "address,undefined", "thread"]


def build_test(name, sanitizers):
    folder = build_native(
        f"native-{sanitizers or 'plain'}",
        name,
        "-DPATCHSVDD_NATIVE_TESTS=ON",
        f"-DPATCHSVDD_SANITIZE={sanitizers}",
    )
    return folder / name


def run(*command):
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("sanitizers", SANITIZERS)
@pytest.mark.parametrize(
    ("name", "plain_rounds", "sanitized_rounds", "fewest_checks"),
    [("search_test", 150, 12, 10_000), ("cuda_test", 15, 4, 100)],
)
def test_everything(name, plain_rounds, sanitized_rounds, fewest_checks, sanitizers, request):
    rounds = sanitized_rounds if sanitizers else plain_rounds
    rounds *= 50 if request.config.getoption("--slow") else 1
    done = run(build_test(name, sanitizers), rounds)
    assert done.returncode == 0, done.stdout + done.stderr
    checks, failures = (int(word) for word in done.stdout.split()[0:3:2])
    assert failures == 0
    assert checks >= fewest_checks


@pytest.mark.parametrize(
    ("kernel", "sanitizers", "complaint"),
    [
        ("race", "thread", "data race"),
        ("race", "", "depends on the schedule"),
        ("race-in-global", "thread", "data race"),
        ("early-read", "thread", "data race"),
        ("early-read", "", "depends on the schedule"),
        ("beyond-shared", "address,undefined", "heap-buffer-overflow"),
        ("beyond-global", "address,undefined", "heap-buffer-overflow"),
        ("no-such-barrier", "", "63 of 64 threads wait for others that never come"),
        ("too-much-shared", "", "broken: invalid argument"),
        ("shared-not-asked-for", "", "50176 bytes of shared memory that were not asked for"),
    ],
)
def test_the_harness_notices_a_kernel_that_is_wrong(kernel, sanitizers, complaint):
    done = run(build_test("cuda_test", sanitizers), "broken", kernel)
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr


@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_the_harness_is_content_with_a_kernel_that_is_right(sanitizers):
    done = run(build_test("cuda_test", sanitizers), "broken", "no-race")
    assert done.returncode == 0, done.stdout + done.stderr
