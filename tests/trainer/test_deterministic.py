"""deterministic: torch is in its mode for that during a run and at no other time; what a GPU needs and is told."""

from pathlib import Path

import pytest
import torch

import fourbit
from fourbit.errors import InputError
from fourbit.trainer.config import SFTConfig
from fourbit.trainer.resume import SavedState, as_json, check_resumed, layout, repeating
from fourbit.trainer.run import RunState

GPU = torch.device("cuda")
OFF, ON = (SFTConfig(out="o", deterministic=value) for value in (False, True))


class Looks(fourbit.Callback):
    def __init__(self, fails=False):
        self.fails, self.seen = fails, []

    def on_step(self, run, record):
        self.seen.append(torch.get_deterministic_debug_mode())
        if self.fails:
            raise KeyError("its own")


@pytest.mark.parametrize("before", ["default", "warn"])
def test_the_mode_lasts_for_the_run(before, make, tmp_path):
    """Whatever it was before, and also where the run fails; on a CPU the numbers are those without it."""
    torch.set_deterministic_debug_mode(before)
    mode = torch.get_deterministic_debug_mode()
    try:
        for name, wanted in (("a", False), ("b", True)):
            trainer = make("sft", tmp_path / name, steps=2, deterministic=wanted)
            trainer.callbacks = [looks := Looks()]
            trainer.train(display=None)
            assert looks.seen == [2 if wanted else mode] * 2
            assert torch.get_deterministic_debug_mode() == mode
        trainer = make("sft", tmp_path / "c", steps=2, deterministic=True)
        trainer.callbacks = [Looks(fails=True)]
        with pytest.raises(KeyError, match="its own"):
            trainer.train(display=None)
        assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode("default")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]


def test_a_gpu_needs_cublas_to_be_ready(monkeypatch):
    """Refused before anything is switched; what the message says to set is taken."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(InputError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 set from the start, not None") as refused:
        repeating(ON, GPU).__enter__()
    assert torch.get_deterministic_debug_mode() == 0
    with repeating(ON, torch.device("cpu")), repeating(OFF, GPU):
        pass
    name, value = next(word for word in str(refused.value).split() if "=" in word).split("=")
    monkeypatch.setenv(name, value)
    with repeating(ON, GPU):
        assert torch.get_deterministic_debug_mode() == 2


def resumed(before: bool, now: bool) -> list[str]:
    """What is told when a run on a GPU goes on."""
    configs = [SFTConfig(out="o", steps=9, deterministic=value) for value in (before, now)]
    states = [SavedState(RunState(done=3), as_json(c), "d", {}, layout(c, GPU), {}) for c in configs]
    return check_resumed(Path("step-000003"), *states, configs[1], 8)


def test_a_gpu_says_when_it_goes_on_with_other_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert resumed(True, True) == []
    (told,) = resumed(False, False)
    assert "only with deterministic on: goes on, not bit for bit the same" in told
    for before in (True, False):
        (told,) = resumed(before, not before)
        assert "another kernels" in told and "not bit for bit the same" in told
