"""Training checkpoints that are complete and verified, or ignored.

A checkpoint is a folder `step-000123/`: one `<group>.safetensors` for each group of tensors the trainer hands in
(weights, optimizer, random generators, ...), `state.json` for its numbers, and `manifest.json`, which lists every file
with its size and SHA-256 and its own SHA-256 too. Nothing here knows a model, and nothing is ever unpickled: only files
that the manifest names are opened, and their names come from a fixed pattern.

Saving goes by one protocol, in this order: write all files into a temporary folder and fsync each, the manifest last;
fsync the folder; rename it; fsync the parent; point `latest` (a text file for people and scripts) at it; only then
prune. So at every moment, a kill or a full disk included, each `step-*` folder whose manifest verifies is a whole
checkpoint, and the newest of them is the one to resume from. A serial number orders them, not the clock and not the
step: a run resumed from an older checkpoint writes lower steps that are newer. Equal inputs give equal bytes.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..errors import InputError, NumericError, shown

MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
FORMAT = "fourbit checkpoint 5"
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,31}")
_FILE = re.compile(_GROUP.pattern + r"\.safetensors|state\.json")
_FOLDER = re.compile(r"step-(?P<step>[0-9]{6,18})(?:\.[0-9]{1,6})?")
_MANIFEST_LIMIT = 1 << 20  # bytes; ours have about 150 a file
_BROKEN = OSError, SafetensorError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError
Groups = Mapping[str, Mapping[str, Tensor]]
Listed = dict[str, tuple[int, str]]  # file name -> bytes, SHA-256 in hex


class OtherFormat(InputError):
    """A whole checkpoint, of another version of fourbit."""


def save_checkpoint(folder: Path | str, step: int, tensors: Groups, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write `folder/step-<step>/` and return it; then remove our older ones but the newest `keep`.

    `tensors` maps group (a lower-case word) -> name -> dense tensor of any device and shape. `state` is plain JSON that
    reads back equal: string keys, lists and no tuples, finite numbers. A folder that already has this step's name (an
    earlier branch of the run) is kept under a free name beside it. The caller holds the run's folder (`lock_folder`),
    since what lies half-written in `folder` is removed.

    Raises `NumericError` for a tensor with NaN or infinity (before anything is written), `DiskError` when the disk
    refuses, TypeError or ValueError for what cannot be stored."""
    if step < 0 or keep < 1:
        raise ValueError(f"step must be 0 or more and keep 1 or more; got step={step}, keep={keep}")
    folder = Path(folder)
    text = json.dumps(state, sort_keys=True, allow_nan=False, indent=1).encode() + b"\n"
    needed = len(text) + 200 * (len(tensors) + 2)  # headers and the manifest are reckoned
    needed += sum(tensor.nbytes + 100 + len(name) for own in tensors.values() for name, tensor in own.items())
    if bad := _nonfinite(tensors):
        raise NumericError(
            f"{bad} holds NaN or infinity, so no checkpoint was written; earlier ones are untouched. Lower the "
            "learning rate, or look at the batch of this step."
        )
    with files.disk_errors(f"the checkpoint of step {step}", folder, needed):
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_stale(folder)
        temporary, target = folder / files.temporary_name(f"{step:06d}"), folder / f"step-{step:06d}"
        try:
            os.mkdir(temporary)
            serial = 1 + max((serial for _, serial, _ in _by_age(folder)), default=0)
            _write(temporary, step, serial, tensors, text)
            if os.path.lexists(target):  # of an earlier branch of the run: it steps aside
                asides = (target.with_name(f"{target.name}.{number}") for number in count(1))
                os.rename(target, next(aside for aside in asides if not os.path.lexists(aside)))
            os.rename(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove_flat(temporary)
            raise
        files.sync(folder)
        files.write_text(folder / LATEST, target.name + "\n")
        _prune(folder, keep)
    return target


def _write(folder: Path, step: int, serial: int, tensors: Groups, text: bytes) -> None:
    """Every file of a checkpoint, each forced to the disk, the manifest last."""
    listed = {}
    for group in sorted(tensors):
        own, held = dict[str, Tensor](), set[int]()
        for name, tensor in sorted(tensors[group].items()):
            here = tensor.detach().cpu().contiguous()
            key = here.untyped_storage().data_ptr()
            own[name] = here.clone() if key in held else here  # safetensors takes no two of one storage
            held.add(key)
        save_file(own, folder / f"{group}.safetensors")
        listed[f"{group}.safetensors"] = _synced(folder / f"{group}.safetensors")
    (folder / STATE).write_bytes(text)
    listed[STATE] = _synced(folder / STATE)
    (folder / MANIFEST).write_bytes(_dump_manifest(FORMAT, step, serial, listed))
    files.sync(folder / MANIFEST)
    files.sync(folder)


def _synced(file: Path) -> tuple[int, str]:
    files.sync(file)
    return files.size_and_sha256(file)


def load_checkpoint(path: Path | str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Verify the checkpoint folder `path` and return its tensors (group -> name -> CPU tensor) and its state.
    Raises InputError that says which file breaks which rule, or which tensor holds NaN or infinity. Files the manifest
    does not name are never opened."""
    path, tensors = Path(path), dict[str, dict[str, Tensor]]()
    names = verify_checkpoint(path)
    with _reading(path):
        for name in sorted(names - {STATE}):
            with safe_open(path / name, framework="pt") as file:
                # Cloned: else the tensor is a view of the mapped file, which pruning may remove under it.
                members = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
            tensors[name.partition(".")[0]] = members
        state = json.loads((path / STATE).read_bytes())
    if not isinstance(state, dict):
        raise InputError(f"{path / STATE}: must hold a JSON object, holds a {type(state).__name__}")
    if bad := _nonfinite(tensors):
        raise InputError(f"{path}: {shown(bad)} holds NaN or infinity, which no checkpoint may")
    return tensors, state


def checkpoint_to_resume(out: Path, resume: str | None, notes: list[str]) -> Path | None:
    """The checkpoint that `resume` names ("auto" or a path), None for a fresh start (`lock_folder` saw that it is one).
    Adds to `notes` why it passes over damaged ones."""
    folder = out / "checkpoints"
    if folder.is_dir():
        files.remove_stale(folder)  # what a killed run left half-written; it may have been killed after its last save
    if resume not in (None, "auto"):
        path = Path(str(resume))
        if not path.is_dir() or not _FOLDER.fullmatch(path.name):
            raise InputError(f"resume must be auto or a checkpoint folder such as {folder / 'step-000100'}, got {path}")
        return path
    newest, problems = newest_checkpoint(folder)
    notes += problems
    return newest


@contextlib.contextmanager
def resuming(path: Path, notes: list[str]) -> Iterator[None]:
    """Around taking up the checkpoint: what it lacks is an InputError, and that tells the notes so far too."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, InputError) as error:
        why = f"{path / STATE}: not as fourbit writes it ({type(error).__name__}: {error}); resume with its version"
        raise InputError("\n".join([str(error) if isinstance(error, InputError) else why, *notes])) from error
    notes.append(f"resumed from {path}")


def newest_checkpoint(folder: Path | str) -> tuple[Path | None, list[str]]:
    """The checkpoint in `folder` that was written last and verifies, and why each one tried before it was passed over.
    `(None, reasons)` when there is none. Never raises for a damaged checkpoint; OtherFormat for another version's."""
    reasons = []
    for path, _, _ in reversed(_by_age(Path(folder))):
        try:
            verify_checkpoint(path)
        except OtherFormat:
            raise
        except InputError as error:
            reasons.append(str(error))
        else:
            return path, reasons
    return None, reasons


def verify_checkpoint(path: Path) -> set[str]:
    """The names of a checkpoint's files, each checked against the size and SHA-256 that the manifest of `path` says.
    InputError on the first fault."""
    _, listed = _read_manifest(path)
    for name, (size, digest) in listed.items():
        file = files.regular_file(path, name)
        with _reading(file):
            found, found_digest = files.size_and_sha256(file)
        if found != size:
            raise InputError(f"{file}: holds {found:,} bytes, the checkpoint's manifest says {size:,}: torn or changed")
        if found_digest != digest:
            raise InputError(f"{file}: its SHA-256 is not the one in the checkpoint's manifest: torn or changed")
    return set(listed)


def _nonfinite(tensors: Groups) -> str:
    """The first tensor that holds NaN or infinity, as group/name; "" for none."""
    named = ((f"{group}/{name}", own[name]) for group, own in tensors.items() for name in own)
    return next((name for name, x in named if x.is_floating_point() and not bool(x.isfinite().all())), "")


def packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """State of any shape (an optimizer's, a scheduler's) as JSON, its tensors taken out into `tensors` by their place.
    InputError for what is neither."""
    if isinstance(value, Tensor):
        tensors[place] = value if value.ndim else value.clone()  # one rate may stand at several places
        return {"tensor": place}
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"  # torch's schedulers count milestones
        return {kind: [[packed(k, place, tensors), packed(v, f"{place}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [packed(each, f"{place}.{i}", tensors) for i, each in enumerate(value)]}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InputError(
        f"{place} of the state holds {shown(value)} ({type(value).__name__}), and a checkpoint holds tensors, finite "
        "numbers, texts, and lists and dicts of them, no code: an optimizer or scheduler of this kind cannot be saved"
    )


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `packed` took apart."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind in ("dict", "counter"):
        made = {unpacked(k, tensors): unpacked(v, tensors) for k, v in inner}
        return made if kind == "dict" else Counter(made)
    return (list if kind == "list" else tuple)(unpacked(each, tensors) for each in inner)


def _dump_manifest(form: str, step: int, serial: int, listed: Listed) -> bytes:
    """The one spelling of a manifest, with a SHA-256 over its other fields, so that any changed byte shows."""
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in listed.items()}
    body: dict[str, Any] = {"format": form, "step": step, "serial": serial, "files": entries}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def _read_manifest(path: Path) -> tuple[int, Listed]:
    """The serial number and the files in `path/manifest.json`, which is checked (not the files it names)."""
    raw = files.read_bytes(file := files.regular_file(path, MANIFEST), _MANIFEST_LIMIT)
    with _reading(file):
        body = json.loads(raw)
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        form, step, serial = str(body["format"]), int(body["step"]), int(body["serial"])
    if _dump_manifest(form, step, serial, listed) != raw:
        raise InputError(f"{file}: torn or changed: its own SHA-256 does not fit")
    if form != FORMAT:
        raise OtherFormat(
            f"{file}: of format {form!r}, written by another version of fourbit; this one reads {FORMAT!r}. Go on "
            "with that version, or begin a new run in another folder (out)"
        )
    if STATE not in listed or not all(_FILE.fullmatch(name) for name in listed):
        raise InputError(f"{file}: may name only <group>.safetensors and must name {STATE}; it names {sorted(listed)}")
    return serial, listed


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever a torn, hostile or unreadable file makes the parsers raise becomes one kind of error."""
    try:
        yield
    except _BROKEN as error:
        raise InputError(f"{path}: torn, or not from a checkpoint ({type(error).__name__}: {error})") from error


def _by_age(folder: Path) -> list[tuple[Path, int, Listed]]:
    """Real folders named like a checkpoint, oldest first, with the serial number and the files of their manifests.
    Those without an intact one (0 and {}) come last, by step: nothing says that they are old."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (named := _FOLDER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            serial, listed = 0, Listed()
            with contextlib.suppress(InputError):
                serial, listed = _read_manifest(path)
            found.append((not listed, serial or int(named["step"]), path.name, path, serial, listed))
    return [(path, serial, listed) for *_, path, serial, listed in sorted(found, key=lambda each: each[:3])]


def _prune(folder: Path, keep: int) -> None:
    """Remove our older checkpoints. A folder with a file that we did not write in it stays."""
    ours = [(path, listed) for path, _, listed in _by_age(folder) if listed]
    for path, listed in ours[:-keep]:
        if {entry.name for entry in path.iterdir()} == {*listed, MANIFEST}:
            doomed = folder / files.temporary_name("old")  # else a half-removed one would look like one of ours
            os.rename(path, doomed)
            files.remove_flat(doomed)
