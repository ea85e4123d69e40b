"""The comparison of generation: what it counts, and the figures that it makes of what its sides say."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import compared, generate_cpu, generate_sides

SECONDS = {"ours": 1.0, "packed": 4.0, "peer": 2.0, "dense": 2.5}


class Double:
    """A side that answers at once: 30 tokens for each prompt, the first time slowly."""

    peak = loaded = 10**9

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        assert command[3].startswith(f"{name}:float32") and threads == 1
        self.name, self.seconds, self.losses = name, list[float](), list[float]()

    def step(self, batch: int) -> None:
        self.seconds.append(SECONDS[self.name] * (9 if len(self.seconds) < 4 else (0.25, 1)[batch % 2]))
        self.losses.append(1.0 * (1, 30, 8, 240)[batch])

    def close(self) -> None:
        pass


def test_figures_are_of_the_timed_rounds_and_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate_cpu, "Side", Double)
    options = argparse.Namespace(sides=generate_cpu.NAMES, dtype="float32", threads=1, rounds=3)
    found = generate_cpu.measure(options, tmp_path, tmp_path, [1, 8])
    assert [found[f"{name}_rows_8"] for name in SECONDS] == [240, 60, 120, 96]
    assert found["rows_8_first_peer"] == 0.5 and "tokens/s (seconds" in capsys.readouterr().out
    assert found["ours_over_peer_rows_1"] == 2 and found["packed_over_dense_rows_8"] == 0.625
    (tmp_path / "generate_cpu.json").write_text(json.dumps(found))
    rows = compared.table(compared.read([tmp_path / "generate_cpu.json"])).splitlines()[2:]
    assert rows[1].startswith("| generate_cpu, 8 rows: ours | 240 tokens/s | peer: 120 | 2.00x | 1.00x |")


def test_both_sides_make_the_tokens_that_their_rows_say() -> None:
    """Of one tiny model, which is asked for lengths and not for what ends a text."""
    transformers = pytest.importorskip("transformers")
    from tests.models.conftest import tiny_llama

    model, prompts = tiny_llama().double(), [[5, 6, 7], [11], [3, 1, 4, 1, 5]]
    model.generation_config.eos_token_id = [*range(50)]
    rows = [{"ids": prompt, "new": new} for prompt, new in zip(prompts, (3, 9, 1), strict=True)]
    assert transformers and generate_sides.theirs(model)(rows) == 13
    assert generate_sides.own(model, "off")(rows) == generate_sides.own(model, "auto")(rows) == 13
