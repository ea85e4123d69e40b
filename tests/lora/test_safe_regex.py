"""backtracks_little lets honest patterns through and stops those that could run without end."""

import re
import time

import pytest

from fourbit.lora.safe_regex import backtracks_little

NAME = "model.layers.11.self_attn.q_proj.model.layers.11.self_attn.q_proj"

HONEST = [
    "q_proj",
    "^model.layers.0.self_attn.q_proj$",
    r"model\.layers\.(0|1|2)\.(self_attn|mlp)\.(q|k|v|o|up|down)_proj",
    r"^(?!.*(?:visual)).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r".*\.layers\.\d+\.self_attn\.[qk]_proj",
    r"(model\.)?layers\.[0-9]+\.mlp\.up_proj",
    "|".join(re.escape(f"model.layers.{i}.self_attn.{leaf}") for i in range(60) for leaf in ("q_proj", "k_proj")),
    r"a\)*b\+",
    r"[(*+?{|)]+_proj[]*+?|]",
    "",
]

HOSTILE = [
    "(a+)+$",
    "(a|a)*!",
    "([a-z.]*)*!",
    r"(\w+\.?){2,}!",
    "(?:a|b|ab)+!",
    "(?x)(a+) # a comment\n +!",
    "(a+)(?#what)+!",
    "(?#a comment)q_proj",
    "(.*)(.*)(.*)(.*)(.*)(.*)!",
    "a?" * 40 + "a" * 40,
    "(a|a)" * 40 + "!",
    "(?:.?){1,40}!",
    ".*" * 100,
]


@pytest.mark.parametrize("pattern", HONEST)
def test_honest_patterns_pass(pattern: str) -> None:
    assert backtracks_little(pattern)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_could_run_without_end_do_not(pattern: str) -> None:
    re.compile(pattern)
    assert not backtracks_little(pattern)


@pytest.mark.parametrize(
    "pattern", [".*.*.*!", "[a-z]*[a-z]*.*!", "a?" * 20 + "!", "(.|a)" * 20 + "!", "(a|.|a)(.|a)?.*.*!"]
)
def test_the_worst_that_passes_is_quick(pattern: str) -> None:
    assert backtracks_little(pattern)
    start = time.monotonic()
    assert re.fullmatch(pattern, "a" * 64) is None
    assert re.fullmatch(pattern, NAME) is None
    assert time.monotonic() - start < 5
