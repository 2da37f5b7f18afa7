"""Training that is interrupted, terminated or killed: once resumed, it gives the same result."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from patchsvdd_fast import PatchSVDD
from patchsvdd_fast.detector.encoder_file import load_encoder
from patchsvdd_fast.files import store
from patchsvdd_fast.training.defect_check import DefectCheck
from patchsvdd_fast.training.interrupts import Terminated
from patchsvdd_fast.training.record import Quality

MODES = {
    "faithful": {"batch_size": 3, "initialization": "kaiming"},
    "dense": {"batch_size": 2, "check_every": 2},
}


class _StopError(Exception):
    pass


def _images():
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(4, 3, 17, 17, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(136, 136), mode="bicubic") * 255
    return images.clamp(0, 255).byte()


def _detector(mode, **parameters):
    options = {"mode": mode, "image_size": None, "steps": 5, "embedding_dim": 8}
    return PatchSVDD(**options | MODES[mode] | parameters)


def _stop_after(steps, action):
    def on_step(step):
        if step.step == steps:
            action()

    return on_step


def _raise_stop():
    raise _StopError


def _same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_training_is_that_of_an_uninterrupted_run(mode, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    whole = _detector(mode).fit(_images())
    for steps in (2, 3):  # interrupted twice, once right after a check
        with pytest.raises(_StopError):
            _detector(mode).fit(
                _images(),
                on_step=_stop_after(steps, _raise_stop),
                checkpoint=checkpoint,
                resume=True,
            )
        assert store.load(checkpoint)[1]["steps"] == steps
    seen = []
    resumed = _detector(mode).fit(
        _images(), on_step=seen.append, checkpoint=checkpoint, resume=True
    )
    assert [step.step for step in seen] == [4, 5]
    assert _same_weights(resumed.encoder_, whole.encoder_)
    assert resumed.threshold_ == whole.threshold_
    assert resumed.record_.steps == 5
    assert resumed.record_.qualities == whole.record_.qualities
    assert resumed.record_.best_step == whole.record_.best_step


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    done = _detector("dense").fit(_images(), checkpoint=checkpoint)
    again = _detector("dense").fit(
        _images(), on_step=lambda step: _raise_stop(), checkpoint=checkpoint, resume=True
    )
    assert _same_weights(again.encoder_, done.encoder_)


def test_a_checkpoint_gives_the_best_encoder_so_far(monkeypatch, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    weights = {}

    def keep(self, encoder):
        quality = Quality(50, [50, 60, 55, 52][len(weights)])
        weights[quality.segmentation] = copy.deepcopy(encoder)
        return quality

    monkeypatch.setattr(DefectCheck, "__call__", keep)
    detector = _detector("dense", check_every=1)
    with pytest.raises(_StopError):
        detector.fit(_images(), on_step=_stop_after(3, _raise_stop), checkpoint=checkpoint)
    _, header = store.load(checkpoint)
    assert header["training"]["record"]["best_step"] == 1
    assert _same_weights(load_encoder(checkpoint), weights[60])
    assert not _same_weights(load_encoder(checkpoint), weights[52])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.5}, "other settings: learning_rate 0.0001 instead of 0.5"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"steps": 9}, "steps 5 instead of 9"),
        ({"embedding_dim": 16}, "embedding_dim or levels differ"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changed, message, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    _detector("faithful").fit(_images(), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=rf"^{checkpoint} cannot be resumed: .*{message}"):
        _detector("faithful", **changed).fit(_images(), checkpoint=checkpoint, resume=True)
    with pytest.raises(ValueError, match="another mean was subtracted"):
        _detector("faithful", mean="channel").fit(_images(), checkpoint=checkpoint, resume=True)
    with pytest.raises(ValueError, match="other images"):
        _detector("faithful").fit(_images()[:3], checkpoint=checkpoint, resume=True)


def test_minutes_are_fitted_after_an_early_interruption_too(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    options = {"steps": 14, "minutes": 60, "batch_size": 1}
    for steps in (3, 5):
        with pytest.raises(_StopError):
            _detector("faithful", **options).fit(
                _images(),
                on_step=_stop_after(steps, _raise_stop),
                checkpoint=checkpoint,
                resume=True,
            )
    seen = []
    _detector("faithful", **options).fit(
        _images(), on_step=seen.append, checkpoint=checkpoint, resume=True
    )
    assert [step.step for step in seen] == list(range(6, 15))  # steps limit it, not minutes
    short = _detector("faithful", minutes=1e-6, steps=None, batch_size=1).fit(_images())
    assert short.record_.steps == 10


def test_divergence_leaves_the_last_good_checkpoint(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        _detector("faithful", learning_rate=1e30, steps=20).fit(
            _images(), checkpoint=checkpoint, checkpoint_minutes=0
        )
    weights = load_encoder(checkpoint).state_dict().values()
    assert all(torch.isfinite(value).all() for value in weights)


def test_a_model_is_no_checkpoint(tmp_path):
    detector = _detector("faithful", steps=1).fit(_images())
    detector.save(tmp_path / "model")
    with pytest.raises(ValueError, match="not a checkpoint"):
        _detector("faithful", steps=1).fit(_images(), checkpoint=tmp_path / "model", resume=True)


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        _detector("faithful").fit(
            _images(),
            on_step=_stop_after(2, lambda: os.kill(os.getpid(), signal.SIGTERM)),
            checkpoint=checkpoint,
        )
    assert store.load(checkpoint)[1]["steps"] in (2, 3)
    assert signal.getsignal(signal.SIGTERM) is before


def _train(folder, output, *options, **popen):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "patchsvdd_fast", "train", folder, "-o", output),
            *("--mode", "faithful", "--resize", "96", "--batch-size", "4", "--steps", "15"),
            *("--checkpoint-minutes", "0", *options),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def _wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def test_killed_training_goes_on_to_the_same_weights(category_folder, tmp_path):
    """kill -9 loses what came after the last checkpoint, and --resume makes up for it."""
    killed, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    log = tmp_path / "killed.jsonl"
    checkpoint = tmp_path / "killed.safetensors.checkpoint"
    process = _train(category_folder, killed, "--log", log)
    _wait_for(checkpoint, process)
    process.kill()
    process.communicate(timeout=60)
    assert not killed.exists()
    assert 1 <= store.load(checkpoint)[1]["steps"] < 15
    for output, options in ((killed, ("--resume", "--log", log)), (whole, ())):
        process = _train(category_folder, output, *options)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert not checkpoint.exists()
    assert _same_weights(load_encoder(killed), load_encoder(whole))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 16))


def test_terminated_training_says_so(category_folder, tmp_path):
    output = tmp_path / "model.safetensors"
    checkpoint = tmp_path / "model.safetensors.checkpoint"
    process = _train(category_folder, output)
    _wait_for(checkpoint, process)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "terminated" in stderr
    again = _train(category_folder, output)
    _, refused = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "--resume goes on" in refused
    assert "--resume" in stderr
    assert "Traceback" not in stderr
