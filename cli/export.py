"""`fourbit export`: a model, or its adapter, as other tools open it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ..errors import InputError, NumericError
from ..files import write_text
from ..lora.adapter import adapters_of
from ..lora.merge import merged_state
from ..lora.peft_files import save_adapter
from ..models.decoder import Decoder
from ..models.foreign import reopened
from ..models.gguf_tokenizer import PROBES, tokenizer_metadata
from ..models.gguf_write import write_lora, write_model
from ..models.load import load
from ..models.save import save_model
from ..outputs import check_apart
from ..settings import REQUIRED, setting
from .load import load_adapted
from .options import AdaptedModelOptions, ResultOptions, inputs_of
from .parse import Sources
from .show import note, pairs, result

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank (vllm/config/lora.py)
NEAR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # two readers' logits, of the largest


@dataclass(frozen=True, kw_only=True)
class Options(AdaptedModelOptions, ResultOptions):
    """Write a model with its adapter merged, or the adapter alone, for transformers, PEFT
    and vLLM, llama.cpp or Ollama. A second reader reads it back, and what it finds is compared.

    fourbit export --model M --adapter RUN --to gguf --type q8_0 --out model.gguf
    """

    title: ClassVar[str] = "export"
    to: Literal["hf", "peft", "gguf", "gguf-lora", "ollama"] = setting(REQUIRED, "what is to open it")
    out: str = setting(REQUIRED, "a folder; for gguf and gguf-lora a file", metavar="PATH")
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] = setting("f16", "of the model's weights in GGUF")


@torch.no_grad()
def run(options: Options, sources: Sources) -> int:
    """Load, write, read back; prints how near that is to the model, and how it is used."""
    out, to, quant = Path(options.out), options.to, options.quant
    if to in ("peft", "gguf-lora") and options.adapter is None:
        raise InputError(f"--to {to} writes an adapter: say which with --adapter")
    check_apart(out, f"--out {out}", inputs_of(options, sources), folder=to in ("hf", "peft", "ollama"))
    model, tokenizer, template = load_adapted(replace(options, quant=quant if options.adapter else quant or "none"))
    if to not in ("hf", "peft") and not isinstance(model, Decoder):
        raise InputError(f"--model {options.model} is no built-in family's, and GGUF is written of those alone")
    ids = torch.tensor([tokenizer.encode("".join(PROBES))[: min(96, model.max_positions or 96)]], device=model.device)
    before, after, use = model(ids).float(), None, f"llama-server -m {out}"
    if isinstance(model, Decoder) and to == "gguf-lora":
        write_lora(out, model, adapters_of(model))
        use = f"llama-server -m BASE.gguf --lora {out}"
    elif isinstance(model, Decoder) and to in ("gguf", "ollama"):
        file = out / "model.gguf" if to == "ollama" else out
        keys = tokenizer_metadata(tokenizer, model.vocab_size, template.portable())
        write_model(file, model, merged_state(model, torch.float32), keys, options.type.upper())
        after = load(file, dtype=model.dtype, device=model.device)[0](ids).float()
    else:
        if to == "hf":
            save_model(model, out, tokenizer, template=template.portable(), merge=True)
            use = f"vllm serve {out}"
        else:
            save_adapter(model, out, base_model=options.model)
            rank = max(getattr(part, "rank", 0) for part in adapters_of(model).values())
            limit = next((f" --max-lora-rank {most}" for most in RANKS if most >= rank), ", which takes no such rank")
            use = f"vllm serve {options.model} --enable-lora --lora-modules NAME={out}{limit}"
        try:
            after = reopened(model, options.out, to == "peft")(ids).logits.float()
        except ImportError as error:
            note(f"note: no second reader has read {out}, as one is not installed: {error}")
    said = {"written": options.out, "run": use}
    if after is not None:
        if to in ("hf", "peft") and not (after - before).abs().max() <= NEAR[model.dtype] * before.abs().max():
            raise NumericError(f"transformers reads another model from {out}: its logits are others than ours")
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        same, kl = (p.argmax(-1) == q.argmax(-1)).double().mean(), (p.exp() * (p - q)).sum(-1).mean()
        said["read back"] = f"{same:.0%} of {ids.numel()} next tokens as before, KL {kl:.2g}"
    if to == "ollama":
        stated = ["FROM ./model.gguf", "# Ollama has a TEMPLATE of its own where it knows the model's; else add one."]
        stops = [f'PARAMETER stop "{tokenizer.backend.id_to_token(stop)}"' for stop in tokenizer.stop_ids]
        write_text(out / "Modelfile", "\n".join([*stated, *stops, ""]))
        said["run"] = f"ollama create NAME -f {out}/Modelfile"
    result(said, pairs([*said.items()]), as_json=options.json)
    return 0
