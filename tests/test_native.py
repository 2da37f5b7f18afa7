"""The tests in C++: every bound against true distances, searches under sanitizers."""

import subprocess

import pytest

from conftest import build_native


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_search(sanitizers, request):
    rounds = 40 if sanitizers else 400  # millions of pairs
    rounds *= 50 if request.config.getoption("--slow") else 1
    build = build_native(
        f"native-{sanitizers or 'plain'}",
        "search_test",
        "-DPATCHSVDD_NATIVE_TESTS=ON",
        f"-DPATCHSVDD_SANITIZE={sanitizers}",
    )
    done = subprocess.run(
        [build / "search_test", str(rounds)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks, failures = (int(word) for word in done.stdout.split()[0:3:2])
    assert failures == 0
    assert checks > 10_000
