"""The families that are read, by `model_type`; a new one is a module with `read` and `write`, and a line here."""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from . import llama
from .config import Settings
from .spec import Spec

FAMILIES = {"llama": llama}


def read_spec(data: Mapping[str, Any]) -> Spec:
    """What a `config.json` says a decoder shall compute; InputError names the key and value that we do not take."""
    if not isinstance(data, Mapping):
        raise InputError(f"config: must be a JSON object, got {type(data).__name__}.")
    keys = Settings(data, "config")
    return _family(keys).read(keys)


def write_spec(spec: Spec) -> dict[str, Any]:
    """The `config.json` of this Spec in its family's words; InputError where these cannot say it."""
    data = _family(Settings({"model_type": spec.model_type}, "config")).write(spec)
    if read_spec(data) != spec:
        raise InputError(f"config: no {spec.model_type} model can be described as {spec}")
    return data


def _family(keys: Settings) -> Any:
    known = ", ".join(map(repr, FAMILIES))
    return FAMILIES[keys.one_of("model_type", tuple(FAMILIES), f"{known}, which is all that is read so far")]
