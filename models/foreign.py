"""A causal language model of transformers behind the protocol, so that everything here takes it as it is.

The only file that may import transformers, and only where a function needs it. No list of names says what an
architecture can do: what its code does with packed rows, padding, a cache and its output head is tried once, on a few
tokens, before anything relies on it; where it falls short, texts are run by themselves, which is right for all.
"""

import copy
import difflib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import EnvironmentProblem, InputError, shown
from ..files import read_json
from ..kernels.spans import Spans, segments, span_positions
from ..lora.active import adapters_off, checkpointed
from ..lora.merge import merged_state
from .families import FAMILIES
from .protocol import Cache, CausalLM, evaluating
from .recompute import AGAIN, Checkpointing, keeps


def is_transformers(model: object) -> bool:
    """Whether it is a model of transformers (which then is imported already)."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def as_causal_lm(model: object) -> Any:
    """A model of transformers as a `CausalLM` on the same modules, InputError if it is none; anything else as it is."""
    return TransformersLM(model) if is_transformers(model) else model


def settings_of(whole: Any) -> dict[str, Any]:
    """What config.json says of a model of transformers: not in which form its weights once were, and its class now."""
    said, stale = json.loads(whole.config.to_json_string()), ("dtype", "quantization_config")
    return {key: said[key] for key in said if key not in stale} | {"architectures": [type(whole).__name__]}


def empty(data: Mapping[str, Any], where: str, source: str) -> Any:
    """The causal language model of transformers that a `config.json` means, with weights on meta. Nothing in it names
    code that is run: the class is one of those installed. Raises InputError, which begins with `where`, for a config
    that means none, EnvironmentProblem without transformers."""
    kind = str(data.get("model_type"))
    near = difflib.get_close_matches(kind, FAMILIES, 1, cutoff=0)[0]
    what = f"{where}: model_type {shown(kind)} is not built in (the nearest that is: {near})"
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError as error:
        way = "pip install 'fourbit[transformers]', or write the family (docs/add-a-model.md)"
        raise EnvironmentProblem(f"{what}, and transformers, which may know it, is missing ({error}): {way}") from None
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or "text_config" in data:
        code = f"; its own code ({shown(data['auto_map'])}) is never run" if "auto_map" in data else ""
        why = "it is more than a language model: take its text model alone" if known else f"nor in transformers{code}"
        raise InputError(f"{what}, {why}")
    counts = [key for key in data if re.search("layer|experts$", key) and "size" not in key]
    most = {key: 1 << (14 if key.endswith("experts") else 10) for key in counts}
    if many := [key for key in counts if isinstance(data[key], int) and data[key] > most[key]]:
        raise InputError(f"{where}: {many[0]} must be at most {most[many[0]]}, got {data[many[0]]}")
    form = r"_|(auto_map|quantization_config|(torch_)?dtype|(attn|experts)_implementation)$"  # and code: not read here
    read = {key: value for key, value in data.items() if not re.match(form, key)}
    try:
        config = CONFIG_MAPPING[kind].from_dict(CONFIG_MAPPING[kind]._decode_special_floats(read))
        with torch.device("meta"):
            whole = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config)
        whole.name_or_path = source
        _fill_buffers(whole)
    except Exception as error:  # whatever a stranger's values make of code that trusts them
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"{where}: transformers makes no {kind} of it ({why})") from None
    return whole


def reopened(model: CausalLM, folder: str, adapter: bool) -> Any:
    """What transformers makes of a folder that was written of `model`, a whole model, with an adapter beside 4 bits or
    without; or the adapter on its base as that is decoded. ImportError without these packages, and for DoRA and VeRA,
    whose tensors transformers drops or refuses, where peft by itself reads them."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.import_utils import is_peft_available

    file = Path(folder, "adapter_config.json")
    said = read_json(file, 8 << 20) if file.is_file() else {"peft_type": "LORA"}
    plain = said["peft_type"] in ("LORA", "IA3") and not said.get("use_dora")
    if not plain or (file.is_file() and not is_peft_available()):  # then transformers passes over the adapter
        raise ImportError("peft, which alone reads DoRA and VeRA")
    if not adapter:
        return cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)).to(model.device).eval()
    whole = empty(model.settings(), folder, "")
    with adapters_off(model):
        whole.load_state_dict({name: value.cpu() for name, value in merged_state(model).items()}, assign=True)
    whole.tie_weights()
    whole.load_adapter(folder)
    return whole.to(model.device).eval()


def _fill_buffers(whole: Any) -> None:
    """Values on the CPU for buffers that no file has: the model's `_init_weights` makes them, and nothing else."""
    if (size := sum(buffer.nbytes for buffer in whole.buffers())) > 1 << 30:
        raise ValueError(f"buffers of {size:,} bytes that are in no file")
    for module in whole.modules():
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            tensor._is_hf_initialized = True
        for name in module._non_persistent_buffers_set:
            if (like := module._buffers[name]) is not None:
                module._buffers[name] = torch.full_like(like, like.is_floating_point() and torch.nan, device="cpu")
    for module in whole.modules():
        (module if is_transformers(module) else whole)._init_weights(module)
    if left := [name for name, buffer in whole.named_buffers() if not buffer.is_meta and buffer.isnan().any()]:
        raise ValueError(f"{left[0]} has no value")


def converted(whole: Any, own: Collection[str], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors under the model's `own` names, one at a time: renamed, and put together (one expert's
    matrix with the others') as transformers does it. What the model says is to be ignored is left out. Raises
    InputError for parts that do not fit together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    steps, parts = get_model_conversion_mapping(whole), dict[str, list[Any]]()
    makers = [step for step in steps if isinstance(step, WeightConverter)]
    how: Any = [step for step in steps if step not in makers], makers, whole.base_model_prefix, dict.fromkeys(own, True)
    ignored = [r"rotary_emb\.inv_freq$", *(whole._keys_to_ignore_on_load_unexpected or ())]
    for name, tensor in tensors:
        target, pattern = (name, None) if name in own else rename_source_key(name, *how)
        if pattern is not None:
            parts.setdefault(target, []).append((dot_natural_key(name), pattern, name, tensor))
        elif target in own or not any(re.search(part, name) for part in ignored):
            yield target, tensor
    for target, pieces in parts.items():
        maker = copy.deepcopy(next(maker for maker in makers if pieces[0][1] in maker.source_patterns))
        for _, pattern, name, tensor in sorted(pieces, key=lambda piece: piece[0]):
            maker.add_tensor(target, name, pattern, tensor)
        try:
            made = maker.convert(target, model=whole, config=whole.config)
        except Exception as error:
            raise InputError(f"{target} cannot be put together from {len(pieces)} tensors: {error}") from None
        yield from ((name, value[0] if isinstance(value, list) else value) for name, value in made.items())


class TransformersLM(CausalLM):
    """`whole`, a model of transformers with a head, as a `CausalLM`. Its modules are this one's own, under their own
    names, and stay the other's: adapters that are put on either are on both, and their files open in PEFT. What is not
    asked for here (`config`, ...) is answered by `whole`."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        body, head, config = _body(whole), whole.get_output_embeddings(), whole.config.get_text_config()
        if head is None or body is whole or config.is_encoder_decoder:
            raise InputError(f"{type(whole).__name__} is no causal language model: it has no body with a head on it")
        # It is no child of this module: its children are.
        vars(self).update(whole=whole, **{name: vars(whole)[name] for name in ("_modules", "_parameters", "_buffers")})
        self.vocab_size, self.hidden_size = head.weight.shape
        self.max_positions = getattr(config, "max_position_embeddings", None)
        self.source, self.training = str(whole.name_or_path or ""), whole.training
        self._takes = {*inspect.signature(body.forward).parameters}
        self._found: dict[str, Any] = {}
        self.forks_up_to = 0  # nothing would be saved

    def __getattr__(self, name: str) -> Any:
        if "whole" not in vars(self) or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole, name)  # its modules and parameters too

    @property
    def lm_head(self) -> nn.Module:  # type: ignore[override]  # read-only here
        return cast(nn.Module, self.whole.get_output_embeddings())

    @property
    def logit_softcap(self) -> float:  # type: ignore[override]  # read-only here
        return float(self._tried(self._logits)[1])

    @property
    def packs(self) -> bool:  # type: ignore[override]  # read-only here
        return bool(self._tried(self._keeps_apart))

    @property
    def checkpointing(self) -> Checkpointing:
        """transformers knows on and off alone: on where any layer is to run again, and then all do."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @checkpointing.setter
    def checkpointing(self, keep: Checkpointing) -> None:
        if {*keeps(keep)} & {*AGAIN} and self.whole.supports_gradient_checkpointing:
            self.whole.activation_checkpointing_enable({"use_reentrant": False})
            for module in self.whole.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = partial(checkpointed, module)
        elif self.checkpointing:
            self.whole.activation_checkpointing_disable()

    def settings(self) -> dict[str, Any]:
        return settings_of(self.whole)

    def new_cache(self) -> Cache:
        return States(self, bool(self._tried(self._continues)))

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As `CausalLM` says. Texts that cannot share a row, or have forks, are run whole in rows of their own."""
        if isinstance(cache, States) and spans is None:
            return cache.read(input_ids, mask)
        if cache is not None or (spans is not None and mask is not None):
            raise ValueError("a cache is one that new_cache() made; spans (packed rows) take neither cache nor mask")
        places = torch.arange(input_ids.numel(), device=input_ids.device)
        if mask is not None:
            return self._each([row[seen] for row, seen in zip(places.view_as(input_ids), mask, strict=True)], input_ids)
        if spans is None:
            return self.run(input_ids, position_ids)
        laid = segments(spans, len(places))
        if self.packs and all(len(span) == 2 for span in spans):
            return self._packed(input_ids.view(1, -1), spans).view(*input_ids.shape, -1)
        return self._each([places[torch.from_numpy(keys)] for *_, keys in laid], input_ids)

    def run(self, ids: Tensor, positions: Tensor | None = None, *, scaled: bool = True, **more: Any) -> Tensor:
        """What the output layer takes [B, T, D] of ids [B, T]: the body's last hidden states, by logits' scale."""
        given = {"position_ids": positions, "use_cache": False, "return_dict": True} | more
        taken = {name: value for name, value in given.items() if value is not None and name in self._takes}
        states: Tensor = _body(self.whole)(input_ids=ids, **taken).last_hidden_state
        scale = self._tried(self._logits)[0] if scaled else 1.0
        return states if scale == 1 else states * scale

    def _packed(self, ids: Tensor, spans: Spans) -> Tensor:
        """Hidden states of texts in one row [1, T], with the masks that transformers makes of where positions begin."""
        from transformers.masking_utils import create_masks_for_generate as masks

        positions = span_positions(spans, ids.device)[None]
        like = torch.empty(*ids.shape, 1, dtype=self.dtype, device=ids.device)
        return self.run(ids, positions, attention_mask=masks(self.config, like, None, None, positions))

    def _each(self, texts: Sequence[Tensor], ids: Tensor) -> Tensor:
        """Hidden states at the places of `ids` [B, T] when each text (its places, flattened) has a row of its own,
        padded on the right by itself. A place in several has the first one's; one in none, what means nothing."""
        where, width = torch.zeros_like(ids).flatten(), max(map(len, texts))
        for row, text in reversed([*enumerate(texts)]):
            where[text] = torch.arange(row * width, row * width + len(text), device=ids.device)
        rows = torch.stack([torch.cat([text, text[:1].expand(width - len(text))]) for text in texts])
        return self.run(ids.flatten()[rows]).flatten(0, 1)[where].view(*ids.shape, -1)

    def _tried(self, what: Callable[[Tensor], Any]) -> Any:
        """What is found on twelve tokens, once; False where the model's code raises. On meta, where nothing is found,
        what is so of most."""
        if self.device.type == "meta":
            self._found.setdefault(what.__name__, (1.0, 0.0) if what == self._logits else False)
        if what.__name__ not in self._found:
            name, way = type(self.whole).__name__, "give Run a loss of your own"
            found: Any = what == self._logits and InputError(f"{name} makes its logits in an unknown way: {way}")
            try:
                with evaluating(self), adapters_off(self):
                    found = what(torch.arange(1, 13, device=self.device) % self.vocab_size) or found
            except Exception as error:
                found = found and InputError(f"{name} cannot read 12 tokens ({type(error).__name__}: {error}): {way}")
            self._found[what.__name__] = found
        if isinstance(refused := self._found[what.__name__], InputError):
            raise refused
        return self._found[what.__name__]

    def _logits(self, ids: Tensor) -> tuple[float, float] | InputError | None:
        """The scale of hidden states and the soft cap with which the output layer gives the model's logits, both among
        its settings; an error for a model that is not causal, and None for one that makes them otherwise."""
        states = self.run(ids[None], scaled=False)
        if not _alike(self.run(ids[None, [0, 1, 2, 3, 4, 5, 0, 1]], scaled=False)[:, :6], states[:, :6]):
            return InputError(f"{type(self.whole).__name__} lets tokens see what follows them: it is no causal model")
        logits, made = self.whole(input_ids=ids[None], use_cache=False).logits.double(), self.lm_head(states).double()
        settings = [abs(v) for v in self.config.to_dict().values() if isinstance(v, int | float) and v]
        for cap in (float(getattr(self.config, "final_logit_softcapping", None) or 0.0), 0.0):
            wanted = cap * torch.atanh(logits / cap) if cap else logits
            scale = float((made * wanted).sum() / made.square().sum())
            scale = min([1.0, *settings, *(1 / v for v in settings)], key=lambda v: abs(v - scale))
            if _alike(cap * torch.tanh(made * scale / cap) if cap else made * scale, logits, states.dtype):
                return scale, cap
        return None

    def _keeps_apart(self, ids: Tensor) -> bool:
        """Two texts in a row: the second is what it is alone, and does not change with the first."""
        rows = [torch.cat([first, ids[5:]])[None] for first in (ids[:5], ids[:5].flip(0))]
        one, other = (self._packed(row, ((0, 5), (5, 12)))[:, 5:] for row in rows)
        return "position_ids" in self._takes and _alike(one, other, part=8) and _alike(one, self.run(ids[None, 5:]))

    def _continues(self, ids: Tensor) -> bool:
        """Two texts padded on the left, put in another order with one twice, and continued by a token."""
        cache, order = States(self, True), torch.tensor([1, 0, 1], device=ids.device)
        mask = torch.arange(6, device=ids.device) >= torch.tensor([[3], [0]], device=ids.device)
        before = cache.read(ids[:6].repeat(2, 1), mask)[order, -1]
        cache.select(order)
        after = cache.read(ids[9:, None], torch.cat([mask[order], mask.new_ones(3, 1)], dim=1))[:, 0]
        texts = [torch.cat([ids[start:6], end[None]]) for start, end in zip((0, 3, 0), ids[9:], strict=True)]
        alone = [self.run(text[None])[0, -2:] for text in texts]
        return _alike(torch.stack([before, after], dim=1), torch.stack(alone))


def _body(whole: Any) -> Any:
    """The model without its head, whatever it is called; itself where it has none."""
    found = whole.base_model
    return found if found is not whole else next((child for child in whole.children() if is_transformers(child)), whole)


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, part: int = 1) -> bool:
    """Whether rows of [..., D] differ by no more than rounding does on two ways to one result (a `part` of that)."""
    most, a, b = max(1e-3, 24 * torch.finfo(dtype or b.dtype).eps) / part, a.double(), b.double()
    return bool(((a - b).norm(dim=-1) <= most * b.norm(dim=-1)).all())


class States:
    """What transformers keeps of the tokens that were read; or these alone, and all of them are run again each time."""

    def __init__(self, model: TransformersLM, kept: bool) -> None:
        from transformers import DynamicCache

        self.model, self.length, self.ids = model, 0, torch.empty(0)
        self.states: Any = DynamicCache(config=model.config) if kept else None

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states of `ids` [B, T] after what was read: after the first, recurrent layers take one at a time."""
        if self.states is None:
            self.ids = torch.cat([self.ids, ids], dim=1) if self.ids.numel() else ids
            seen = torch.ones_like(self.ids, dtype=torch.bool) if mask is None else mask
            return self.model.hidden(self.ids, mask=seen)[:, -ids.shape[1] :]
        if self.length and ids.shape[1] > 1:
            steps = enumerate(ids.split(1, dim=1), self.length + 1)
            return torch.cat([self.read(one, None if mask is None else mask[:, :end]) for end, one in steps], dim=1)
        seen = mask if mask is not None else torch.ones(len(ids), self.length + ids.shape[1], device=ids.device)
        positions = (seen.cumsum(1) - 1).clamp_(min=0)[:, self.length :].long()
        self.length = seen.shape[1]
        kept: dict[str, Any] = {"past_key_values": self.states, "cache_params": self.states, "use_cache": True}
        return self.model.run(ids, positions, attention_mask=None if mask is None else mask.long(), **kept)

    def select(self, rows: Tensor) -> None:
        self.ids = self.ids[rows] if self.states is None else self.ids
        if self.states is not None:
            self.states.reorder_cache(rows)
