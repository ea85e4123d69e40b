"""What the commands that train on preference rows share: the adapter they may go on from, and how rows are read."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import InputError
from ..trainer.preference_config import PreferenceConfig
from .load import load_weights, run_settings
from .options import option
from .parse import DEFAULT, Parsed
from .show import note
from .train import ADAPTER_ONLY, TrainOptions, attach_adapter, check, check_resumed


@dataclass(frozen=True, kw_only=True)
class StartOptions(TrainOptions):
    """The options of a training that may go on from an adapter."""

    title: ClassVar[str] = "adapter"
    adapter: str | None = option(
        "folder of a LoRA adapter to go on from; without one a fresh one is made", None, metavar="DIR"
    )


def checked_start(parsed: Parsed[Any]) -> Any:
    """The options with `quant` settled. Raises InputError for what cannot go together, before anything is read."""
    options = parsed.options
    given = [name for name in ADAPTER_ONLY if parsed.sources[name] != DEFAULT]
    if options.adapter is not None and given:
        raise InputError(f"the adapter {options.adapter} brings its own {', '.join(given)}: leave them out")
    options.lora_config()
    check(options)
    quant = options.quant or (run_settings(options.adapter).get("quant") if options.adapter else None) or "nf4"
    options = dataclasses.replace(options, quant=quant)
    check_resumed(options, ("model", "adapter", "quant", *(ADAPTER_ONLY if options.adapter is None else ())))
    return options


def load_start(options: Any, tokenizer: Any) -> Any:
    """The model with the adapter that training starts from."""
    from ..lora.files import load_adapter

    model = load_weights(options, tokenizer, options.quant)
    if options.adapter is None:
        attach_adapter(model, options)
    else:
        names = load_adapter(model, options.adapter)
        note(f"adapter: goes on from {options.adapter}, on {len(names)} layers")
    return model


def reader(options: PreferenceConfig, tokenizer: Any, *, judged: bool = False) -> Callable[[Sequence[str]], Any]:
    """A reader of data files with the options' settings."""
    from ..data.pairs import load_judged, load_preferences

    def read(paths: Sequence[str]) -> Any:
        return (load_judged if judged else load_preferences)(
            paths,
            tokenizer,
            template=options.template,
            max_length=options.max_length,
            truncation=options.truncation,
            on_bad_row=options.on_bad_row,
        )

    return read
