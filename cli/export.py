"""`fourbit export`: a model, or its adapter, as llama.cpp and Ollama open it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ..errors import InputError
from ..files import write_text
from ..lora.adapter import adapters_of
from ..lora.merge import merged_state
from ..models.decoder import Decoder
from ..models.gguf_tokenizer import PROBES, tokenizer_metadata
from ..models.gguf_write import write_lora, write_model
from ..models.load import load
from ..outputs import check_apart
from ..settings import REQUIRED, setting
from .load import load_adapted
from .options import AdaptedModelOptions, ResultOptions, inputs_of
from .parse import Sources
from .show import pairs, result


@dataclass(frozen=True, kw_only=True)
class Options(AdaptedModelOptions, ResultOptions):
    """Write a model with its adapter merged, or the adapter alone, for llama.cpp or Ollama.

    fourbit export --model M --adapter RUN --to gguf --type q8_0 --out model.gguf
    """

    title: ClassVar[str] = "export"
    to: Literal["gguf", "gguf-lora", "ollama"] = setting(REQUIRED, "a model, an adapter, or a folder with a Modelfile")
    out: str = setting(REQUIRED, "the file; for ollama the folder", metavar="PATH")
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] = setting("f16", "of the model's weights in GGUF")


@torch.no_grad()
def run(options: Options, sources: Sources) -> int:
    """Load, write, read back; prints how near that is to the model, and how it is used."""
    out, folder, quant = Path(options.out), options.to == "ollama", options.quant
    if options.to == "gguf-lora" and options.adapter is None:
        raise InputError("--to gguf-lora writes an adapter: say which with --adapter")
    check_apart(out, f"--out {out}", inputs_of(options, sources), folder=folder)
    model, tokenizer, template = load_adapted(replace(options, quant=quant if options.adapter else quant or "none"))
    if not isinstance(model, Decoder):
        raise InputError(f"--model {options.model} is no built-in family's, and GGUF is written of those alone")
    if options.to == "gguf-lora":
        write_lora(out, model, adapters_of(model))
        said = {"written": options.out, "run": f"llama-server -m BASE.gguf --lora {out}"}
    else:
        file, tokens = out / "model.gguf" if folder else out, tokenizer.encode("".join(PROBES))
        keys = tokenizer_metadata(tokenizer, model.vocab_size, template.portable())
        write_model(file, model, merged_state(model, torch.float32), keys, options.type.upper())
        read = load(file, dtype=model.dtype, device=model.device)[0]
        ids = torch.tensor([tokens[: min(96, model.spec.max_position_embeddings)]], device=model.device)
        before, after = (one(ids).float().log_softmax(-1) for one in (model, read))
        same, kl = (before.argmax(-1) == after.argmax(-1)).double().mean(), (before.exp() * (before - after)).sum(-1)
        near = f"{same:.0%} of {ids.numel()} next tokens as before, KL {kl.mean():.2g}"
        said = {"written": options.out, "read back": near, "run": f"llama-server -m {out}"}
    if folder:
        stated = ["FROM ./model.gguf", "# Ollama has a TEMPLATE of its own where it knows the model's; else add one."]
        stops = [f'PARAMETER stop "{tokenizer.backend.id_to_token(stop)}"' for stop in tokenizer.stop_ids]
        write_text(out / "Modelfile", "\n".join([*stated, *stops, ""]))
        said["run"] = f"ollama create NAME -f {out}/Modelfile"
    result(said, pairs([*said.items()]), as_json=options.json)
    return 0
