"""A model, or a LoRA adapter, as a GGUF file: names, numbers and order of rows from the tables that reading goes by.

The metadata is read back first: what llama.cpp's architecture does not compute shows as another Spec. Weights are made
one at a time, then read by our reader and by the `gguf` package's, and compared; a file that fails does not appear.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import mode
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, NumericError, shown
from ..files import check_finite, disk_errors, write_whole
from ..kernels.rope import frequencies, llama3_frequencies
from ..lora.adapter import Adapter
from ..lora.lora import LoRAEmbedding
from .decoder import Decoder
from .gguf import GGUFFile, TensorInfo, package
from .gguf_model import FAMILIES, IN_LAYER, INTERLEAVED, OBEYED, OWN_NAMES, ROPE_FACTORS, WHOLE, decimal, read_spec
from .load import EMBEDDING, HEAD
from .spec import Spec

# How far a stored value may be off: a share of the largest of its block (of 32, or itself), and so much besides.
ROUNDING = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}
ROUNDING |= {"Q8_0": (1 / 220, 2.0**-18), "Q4_0": (1 / 7.9, 2.0**-18), "Q4_1": (1 / 14, 2.0**-18)}
BIASED = "llama", "qwen2", "granite"  # architectures whose layers may have biases in llama.cpp
Entry = tuple[TensorInfo, Callable[[], Tensor]]  # a tensor to be written, and what makes its values


def write_model(file: Path, model: Decoder, state: Mapping[str, Tensor], tokens: dict[str, Any], kind: str) -> None:
    """Write weights, by the decoder's names, and a tokenizer's metadata, in a kind of `ROUNDING`; vectors, routers are
    F32, embeddings and head of Q4 Q8_0, broken blocks F16. Raises InputError for what llama.cpp's architecture does not
    compute, NumericError for weights that come back otherwise than the kind rounds, DiskError when the disk refuses."""
    spec, gguf = replace(model.spec, tie_word_embeddings=state[HEAD] is state[EMBEDDING]), package()
    keys = {"general.type": "model", "general.quantization_version": gguf.GGML_QUANT_VERSION} | _numbers(spec) | tokens
    keys["general.file_type"] = int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    entries, how = list[Entry](), spec.rope
    factors = [torch.tensor(of, dtype=torch.float32, device="cpu") for of in ((), how.short_factor, how.long_factor)]
    if how.kind == "llama3":  # of which llama.cpp knows what each frequency is divided by
        plain, band = frequencies(how.dim or spec.head_dim, how.theta), (how.low_freq_factor, how.high_freq_factor)
        factors[0] = plain / llama3_frequencies(plain, how.factor, *band, how.original_max_position_embeddings)
    entries += [_entry(name, "F32", made) for name, made in zip(ROPE_FACTORS, factors, strict=True) if len(made)]
    for name, value in state.items():
        for own, of in () if name == HEAD and spec.tie_word_embeddings else pieces(spec, name):
            like = of(torch.empty(value.shape, device="meta"))
            few = "Q8_0" if kind[:2] == "Q4" and own in ("token_embd.weight", "output.weight") else kind
            few = "F16" if few[0] == "Q" and like.shape[-1] % 32 else few
            few = "F32" if like.ndim < 2 or "gate_inp" in own else few
            made = partial(lambda of, value: of(value.detach().float().cpu()).contiguous(), of, value)
            entries.append(_entry(own, few, like, made))
    _check_spec(spec, keys, dict(entries))
    _write(file, keys, entries)


def write_lora(file: Path, model: Decoder, parts: Mapping[str, Adapter]) -> None:
    """Write an adapter, its parts by their layers' paths, as a LoRA of llama.cpp's in fp32: A and B of each weight and
    one alpha, of which each takes alpha / its own rank, so B is multiplied where rsLoRA or patterns say another scale.
    InputError for what it does not hold: other changes, copies, a tied embedding's; otherwise as `write_model`."""
    made, spec, entries = dict[str, tuple[Tensor, Tensor, float]](), model.spec, list[Entry]()
    for path, part in ((path, part.plain()) for path, part in parts.items()):
        update, term = None if part.of_base else part.low_rank(), part.term() or ()
        if part.copies is None and not (spec.tie_word_embeddings and f"{path}.weight" in (HEAD, EMBEDDING)):
            if type(part) is LoRAEmbedding:
                made[path] = part.lora_A.T, part.lora_B, part.scale
            elif update is not None or term:
                made[path] = update[:3] if update is not None else (*term[::-1], 1.0)
        if path not in made:
            what = f"'{path}' is tied, or its {type(part).__name__} changes what llama.cpp's LoRA files cannot say"
            raise InputError(f"{what}: export the model merged, as gguf")
    alpha = float(mode(scale * B.shape[-1] for _, B, scale in made.values()))
    for path, (A, B, scale) in made.items():
        for own, of in pieces(spec, path if ".experts." in path else f"{path}.weight", matrix=True):
            for end, value in (("a", A), ("b", of(B * (scale * B.shape[-1] / alpha)))):
                entries.append(_entry(f"{own}.lora_{end}", "F32", value.detach().float().cpu().contiguous()))
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
    _write(file, {"general.architecture": FAMILIES[spec.model_type][0]} | keys, entries)


def pieces(spec: Spec, name: str, matrix: bool = False) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """What a file has of one of the decoder's weights: each tensor's name, and what it is of the values [.., out, in];
    matrix: of others with those rows, as LoRA's B [.., out, rank]."""
    arch, (layer, part) = FAMILIES[spec.model_type][0], re.findall(r"^(?:model\.layers\.(\d+)\.)?(.+)", name)[0]
    names = {hf: own for own, hf in (IN_LAYER | OWN_NAMES.get(arch, {}) if layer else WHOLE).items()}
    start = f"blk.{layer}." if layer else ""
    if part.startswith("mlp.experts."):
        each = ("gate", "up") if "gate_up" in part else ("down",)
        places = [f"{start}{names[f'mlp.experts.*.{one}_proj']}.weight" for one in each]
        return [(own, partial(lambda i, x: x.chunk(len(each), -2)[i], i)) for i, own in enumerate(places)]
    module, _, end = part.rpartition(".")
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}.get(module.split(".")[-1])
    of: Callable[[Tensor], Tensor] = Tensor.contiguous
    if heads and arch in INTERLEAVED:  # rows of each head's two halves side by side
        of = lambda x: x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # noqa: E731  # typed
    elif spec.norm_plus_one and module.endswith("norm") and not matrix:
        of = partial(torch.add, other=1)
    return [(f"{start}{names[module]}.{end}", of)]


def _entry(name: str, kind: str, like: Tensor, make: Callable[[], Tensor] | None = None) -> Entry:
    block, size = package().GGML_QUANT_SIZES[package().GGMLQuantizationType[kind]]
    return TensorInfo(name, tuple(like.shape), kind, 0, like.numel() // block * size), make or like.clone


def _numbers(spec: Spec) -> dict[str, Any]:
    """A Spec's numbers, those that say something, under the reader's keys; llama.cpp has Phi's window switched off."""
    (arch, own), rope, windows = FAMILIES[spec.model_type], spec.rope, [seen for seen in spec.windows if seen]
    kind = rope.kind if rope.kind in ("linear", "yarn", "longrope") else ""  # Llama 3's is a tensor alone
    names = [field.name for field in fields(spec)] + [field.name for field in fields(rope) if kind]
    longest = [spec.max_position_embeddings, *([] if "sliding_window" in own.values() and arch != "phi3" else windows)]
    said = {name: getattr(spec if hasattr(spec, name) else rope, name) for name in names} | {
        "max_position_embeddings": min(longest),
        "sliding_window": min(windows, default=0),
        "sliding_window_pattern": spec.windows.index(0) + 1 if 0 in spec.windows else 0,
        "rope_theta": rope.theta,
        "rope_local_base_freq": spec.local_rope and spec.local_rope.theta,
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logit_softcap,
        "embedding_multiplier": spec.embedding_scale,
        "residual_multiplier": spec.residual_scale,
        "attention_multiplier": spec.attention_scale,
        "logits_scaling": spec.logit_divisor,
        "num_local_experts": spec.num_experts,
        "moe_intermediate_size": spec.intermediate_size,
        **{"turned": rope.dim or spec.head_dim, "kind": kind},
    }
    keys = OBEYED | own | {"rope.dimension_count": "turned", "rope.scaling.type": "kind"}
    return {"general.architecture": arch} | {f"{arch}.{key}": x for key, name in keys.items() if (x := said.get(name))}


def _check_spec(spec: Spec, keys: Mapping[str, Any], of: Mapping[TensorInfo, Callable[[], Tensor]]) -> None:
    """InputError unless the reader makes of a file with this metadata what the Spec says, in texts of its length."""
    infos = {info.name: info for info in of}
    file: Any = SimpleNamespace(path="GGUF", metadata=keys, tensors=infos, tensor=lambda name: of[infos[name]]())
    read = read_spec(file)

    def said(spec: Spec) -> dict[str, Any]:
        windows = (spec.window(layer) for layer in range(spec.num_hidden_layers))
        plain = asdict(replace(spec, model_type="", config={}, max_position_embeddings=0))
        plain["windows"] = [seen if seen < read.max_position_embeddings else 0 for seen in windows]
        return dict(json.loads(json.dumps(plain), parse_float=lambda x: decimal(float(x))))

    biases = () if keys["general.architecture"] in BIASED else ("attention_bias", "output_bias", "mlp_bias")
    found, wanted = said(read) | dict.fromkeys(biases, False), said(spec)
    if wrong := [name for name in wanted if found[name] != wanted[name]]:
        what = f"its {wrong[0]} is {shown(found[wrong[0]])}, the model's {shown(wanted[wrong[0]])}"
        raise InputError(f"llama.cpp's {keys['general.architecture']} is another: {what}. Keep a folder: save_model")


def _write(file: Path, keys: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """A file of these tensors, whole or not at all, and read back."""

    def fill(part: Path) -> None:
        gguf = package()
        writer, types = gguf.GGUFWriter(part, keys["general.architecture"]), gguf.GGUFValueType
        for key in [key for key in keys if key != "general.architecture"]:
            value = keys[key].tolist() if isinstance(keys[key], np.ndarray) else keys[key]
            writer.add_key_value(key, value, types.UINT32 if type(value) is int else types.get_type(value))
        for info, _ in entries:
            kind = gguf.GGMLQuantizationType[info.format]
            writer.add_tensor_info(info.name, info.shape, np.dtype("<f4"), info.nbytes, raw_dtype=kind)
        try:
            writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_ti_data_to_file()
            for info, make in entries:
                writer.write_tensor_data(gguf.quants.quantize(make().numpy(), gguf.GGMLQuantizationType[info.format]))
        finally:
            writer.close()
        _read_back(part, keys, entries)

    with disk_errors("the GGUF file", file.parent, sum(info.nbytes for info, _ in entries)):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, fill)


def _read_back(file: Path, keys: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """NumericError unless both readers find what was to be written, and weights as far as they may be rounded."""
    ours, theirs = GGUFFile(file), package().GGUFReader(file)
    others = {x.name: (x.tensor_type.name, x.data_offset, *x.shape.tolist()[::-1]) for x in theirs.tensors}
    for key, value in keys.items():
        read_as: Any = np.float32 if isinstance(value, float) else np.asarray
        for found in (ours.metadata[key], theirs.fields[key].contents()):
            if not np.array_equal(read_as(found), read_as(value)):
                raise NumericError(f"{file}: {key} was written as {shown(value)} and reads as {shown(found)}")
    for info, make in entries:
        wanted, read = make(), ours.tensors[info.name]
        check_finite(info.name, wanted)
        (share, least), block = ROUNDING[info.format], 32 if info.format[0] == "Q" else 1
        largest, off = (x.abs().reshape(-1, block) for x in (wanted, ours.tensor(read).float() - wanted))
        near = (off <= largest.amax(1, keepdim=True) * share + least).all()
        if not near or others[info.name] != (info.format, read.start, *info.shape) or read.shape != info.shape:
            why = f"values of up to {largest.max():.3g} may be too large for it: BF16 holds them"
            raise NumericError(f"{info.name} comes back from {info.format} as another weight; {why}")
