"""`fourbit export`: a model, or its adapter, as other tools open it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ..errors import InputError, NumericError
from ..files import read_json, write_text
from ..lora.layer import adapters_of
from ..lora.linear4bit import Module4bit
from ..lora.merge import merged_state, requantize_
from ..lora.peft_files import CONFIG, LARGEST_CONFIG, save_adapter
from ..models.decoder import Decoder
from ..models.foreign import reopened
from ..models.gguf_tokenizer import PROBES, tokenizer_metadata
from ..models.gguf_write import write_lora, write_model
from ..models.load import load
from ..models.save import save_model
from ..outputs import new_place
from ..settings import REQUIRED, setting
from .load import load_adapted
from .merge import total_of
from .options import AdaptedModelOptions, ResultOptions, inputs_of
from .parse import Sources
from .show import note, pairs, result

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank (vllm/config/lora.py)
# What vLLM does not read of PEFT's file, or refuses, unless it is one of these values (vllm/lora/peft_helper.py)
UNREAD = "peft_type", "rank_pattern", "alpha_pattern", "use_dora", "bias", "modules_to_save", "target_parameters"
PLAIN: tuple[object, ...] = (None, False, "none", "LORA", {}, [])
NEAR = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # two readers' logits, of the largest


@dataclass(frozen=True, kw_only=True)
class Options(AdaptedModelOptions, ResultOptions):
    """Write a model with its adapter merged, or the adapter alone, for transformers, PEFT
    and vLLM, llama.cpp or Ollama. A second reader reads it back, and what it finds is compared.

    fourbit export --model M --adapter RUN --to gguf --type q8_0 --out model.gguf
    """

    title: ClassVar[str] = "export"
    to: Literal["hf", "peft", "bnb-4bit", "gguf", "gguf-lora", "ollama"] = setting(REQUIRED, "what is to open it")
    out: str = setting(REQUIRED, "a new folder; for gguf and gguf-lora a new file, *.gguf", metavar="PATH")
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] = setting("f16", "of the model's weights in GGUF")


def run(options: Options, sources: Sources) -> int:
    """Load, write, read back; prints how near that is to the model, and how it is used."""
    out, to = options.out, options.to
    if to in ("peft", "gguf-lora") and options.adapter is None:
        raise InputError(f"--to {to} writes an adapter: say which with --adapter")
    if (file := to in ("gguf", "gguf-lora")) and not out.endswith(".gguf"):
        raise InputError(f"--to {to} writes a file, --out NAME.gguf, got {out}")
    with new_place(out, f"--out {out}", inputs_of(options, sources), folder=not file):
        said = _write(options, Path(out))
    result(said, pairs([*said.items()]), as_json=options.json)
    return 0


def _again(out: Path, read: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Logits of another reader of what is written; None, and a note, where none can run: what is written stays."""
    try:
        return read().float()
    except (ImportError, MemoryError, torch.OutOfMemoryError) as error:
        note(f"note: no second reader has read {out}: {str(error) or type(error).__name__}")
        return None


@torch.no_grad()
def _write(options: Options, out: Path) -> dict[str, str]:
    """Load, write and read back; what is said of it."""
    to, form = options.to, options.quant or (None if options.adapter or options.to == "bnb-4bit" else "none")
    model, tokenizer, template = load_adapted(replace(options, quant=form))
    if to not in ("hf", "peft", "bnb-4bit") and not isinstance(model, Decoder):
        raise InputError(f"--model {options.model} is no built-in family's, and GGUF is written of those alone")
    if to == "bnb-4bit" and not any(isinstance(module, Module4bit) for module in model.modules()):
        raise InputError("--to bnb-4bit: the model is dense here, as its adapter was trained: --quant nf4 packs it")
    ids = torch.tensor([tokenizer.encode("".join(PROBES))[: min(96, model.max_positions or 96)]], device=model.device)
    before = wanted = model(ids).float()
    after, use, said = None, f"llama-server -m {out}", {"written": options.out}
    if isinstance(model, Decoder) and to == "gguf-lora":
        write_lora(out, model, adapters_of(model))
        use = f"llama-server -m BASE.gguf --lora {out}"
    elif isinstance(model, Decoder) and to in ("gguf", "ollama"):
        file = out / "model.gguf" if to == "ollama" else out
        keys = tokenizer_metadata(tokenizer, model.vocab_size, template.portable())
        write_model(file, model, merged_state(model, torch.float32), keys, options.type.upper())
        after = _again(file, lambda: load(file, dtype=model.dtype, device=model.device)[0](ids))
        named = [keys.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
        left = [str(tokenizer.backend.id_to_token(stop)) for stop in tokenizer.stop_ids if stop not in named]
        if left and to == "gguf":
            note(f'note: GGUF names three tokens that end an answer; "stop" of each request: {", ".join(left)}')
    else:
        if to == "peft":
            save_adapter(model, out, base_model=options.model)
            rank = max(getattr(part, "rank", 0) for part in adapters_of(model).values())
            limit = next((f" --max-lora-rank {most}" for most in RANKS if most >= rank), ", which takes no such rank")
            use = f"vllm serve {options.model} --enable-lora --lora-modules NAME={out}{limit}"
            config = read_json(out / CONFIG, LARGEST_CONFIG)
            if unread := [key for key in UNREAD if config.get(key) not in PLAIN]:
                note(f"note: vLLM does not go by its {', '.join(unread)}: for vLLM export the model merged, --to hf")
                use = f"PeftModel.from_pretrained(model, {options.out!r})"
        else:
            if to == "bnb-4bit" and options.adapter:
                way = "take --to hf, which keeps all, or fourbit merge --into nf4 with more --residual-bits"
                said["kept"], wanted = str(total_of(requantize_(model), to, way)), model(ids).float()
            save_model(model, out, tokenizer, template=template.portable(), merge=to == "hf")
            use = f"vllm serve {out}"
            if to == "bnb-4bit":
                use = f"AutoModelForCausalLM.from_pretrained({options.out!r}), with bitsandbytes"
                use += " and peft" * (out / CONFIG).is_file()
        after = _again(out, lambda: reopened(model, options.out, to == "peft")(ids).logits)
    said["run"] = use
    if after is not None:
        near = (after - wanted).abs().max() <= NEAR[model.dtype] * wanted.abs().max()
        if to in ("hf", "peft", "bnb-4bit") and not near:
            raise NumericError(f"transformers reads another model from {out}: its logits are others than ours")
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        same, kl = (p.argmax(-1) == q.argmax(-1)).double().mean(), (p.exp() * (p - q)).sum(-1).mean()
        said["read back"] = f"{same:.0%} of {ids.numel()} next tokens as before, KL {kl:.2g}"
    if to == "ollama":
        stated = ["FROM ./model.gguf", "# Ollama has a TEMPLATE of its own where it knows the model's; else add one."]
        stated += [f"# The adapter {options.adapter} is merged into it: no ADAPTER."] if options.adapter else []
        stops = [f'PARAMETER stop "{tokenizer.backend.id_to_token(stop)}"' for stop in tokenizer.stop_ids]
        write_text(out / "Modelfile", "\n".join([*stated, *stops, ""]))
        said["run"] = f"ollama create NAME -f {out}/Modelfile"
    return said
