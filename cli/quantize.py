"""`fourbit quantize`: a model as a folder in 4 bits: all alike, by a plan, or under a byte budget."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..lora.quantize import Form
from ..models.hf import weight_files
from ..models.plan import quantize_checkpoint, read_plan
from ..outputs import lock_folder
from ..settings import REQUIRED, setting
from ..trainer.config import size_in_bytes
from .load import choose_device
from .options import ResultOptions
from .parse import Sources
from .show import pairs, result, working


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    """Write a model as a folder in 4 bits, which fourbit opens, and transformers with
    bitsandbytes where embeddings and fused experts stay dense (--skip); each layer's
    form and error go into quantization.json there.

      fourbit quantize --model M --out FOLDER --budget 4.0GiB
    """

    title: ClassVar[str] = "model"
    model: str = setting(REQUIRED, "Hugging Face folder or .gguf file", metavar="PATH")
    out: str = setting(REQUIRED, "folder for the result", metavar="FOLDER")
    quant: Literal["nf4", "nf4-nodq", "fp4", "fp4-nodq"] = setting("nf4", "4-bit form; -nodq: scales in 32 bits")
    blocksize: int = setting(64, "values that share a scale: 32, 64, ... 4096")
    skip: tuple[str, ...] = setting((), "layer to leave dense, by the end of its path; repeat it", metavar="NAME")
    head: bool = setting(False, "the output head in 4 bits too; where it is the embedding, both")
    embedding: bool = setting(False, "the embedding in 4 bits too, which transformers does not read")
    plan: str | None = setting(None, "JSON of layers and their forms, or an earlier quantization.json", metavar="FILE")
    budget: str | None = setting(None, "choose forms by error, for weights of so many bytes: 4.0GiB", metavar="SIZE")
    dtype: Literal["bfloat16", "float16", "float32"] = setting("bfloat16", "of what stays dense")
    device: str = setting("auto", "where weights are quantised: auto, cpu, cuda, ...", metavar="NAME")


def run(options: Options, sources: Sources) -> int:
    """Measure, choose, write; prints each layer's form, bytes and error."""
    if options.budget is not None and not size_in_bytes(options.budget):
        raise InputError(f"--budget must be a size above 0 with a unit, such as 4.0GiB, got {options.budget!r}")
    kind, _, nodq = options.quant.partition("-")
    form = Form(kind, options.blocksize, not nodq)
    asked = {"lm_head": form} if options.head else {}
    asked |= {"embed_tokens": form} if options.embedding else {}
    by_hand = read_plan(options.plan) if options.plan else {}
    names = [*options.skip, *asked, *by_hand]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice!r} is named twice, of --skip, --head, --embedding and --plan: say it once")
    plan = dict.fromkeys(options.skip) | asked | by_hand
    how: dict[str, Any] = {"device": choose_device(options.device), "dtype": options.dtype, "plan": plan}
    how["budget"] = size_in_bytes(options.budget or "")
    read = [options.model, *([options.plan] if options.plan else [])]
    with lock_folder(options.out, read), working(f"quantising {options.model}") as progress:
        chosen = quantize_checkpoint(options.model, options.out, form, progress=progress, **how)
    size = sum((Path(options.out) / name).stat().st_size for name in weight_files(Path(options.out)))
    lines = (f"{one.said:<13} {one.bytes:>14,} bytes, error {one.relative_error:.4f}" for one in chosen.values())
    rows = list(zip(chosen, lines, strict=True))
    values = {"out": options.out, "bytes": size, "layers": {path: asdict(choice) for path, choice in chosen.items()}}
    text = f"{pairs(rows)}\nweights: {size:,} bytes ({size / 2**30:.2f} GiB) in {options.out}"
    result(values, text, as_json=options.json)
    return 0
