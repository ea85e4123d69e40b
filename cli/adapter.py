"""`fourbit adapter`: what the files of adapters hold, and other adapters made of files. No base is loaded."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..data.template import FILE as TEMPLATE
from ..errors import InputError
from ..lora.inspect import difference, extract, read_files, resize, show
from ..lora.peft_files import trained_base
from ..models.load import read_model
from ..outputs import lock_folder
from ..settings import REQUIRED, setting
from .load import check_adapter
from .options import ResultOptions
from .parse import Sources
from .show import pairs, result


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    """Look at adapters through their files, or make smaller ones, or those of two models.

      fourbit adapter show DIR       kind, base, and of each layer norm, ranks, energy
      fourbit adapter diff A B       how far two adapters of one base are apart
      fourbit adapter resize DIR --rank 8 --out NEW     the nearest of less rank
      fourbit adapter extract BASE TUNED --rank 32 --out NEW   of two dense models

    energy: share of the squared norm of all; effective_rank: exp(entropy) of singular
    values; rank_99: how many hold 99% of a layer's energy; dead: 1 for no change;
    left_out: the share by which what is no linear layer differs, and is not in it.
    """

    title: ClassVar[str] = "adapter"
    positional: ClassVar[str] = "what"
    what: tuple[str, ...] = setting(REQUIRED, "show, diff, resize or extract, and its folders", metavar="WORD")
    rank: int | None = setting(None, "rank of what resize and extract write", least=1)
    out: str | None = setting(None, "its folder", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        verb, writes = self.what[0], self.what[0] in ("resize", "extract")
        if len(self.what) != {"show": 2, "diff": 3, "resize": 2, "extract": 3}.get(verb):
            raise InputError(f"what must be show DIR, diff A B, resize DIR or extract BASE TUNED, got {self.what}")
        if (self.rank is not None, self.out is not None) != (writes, writes):
            raise InputError(f"{verb} {'takes' if writes else 'writes nothing: leave out'} --rank and --out")


def run(options: Options, sources: Sources) -> int:
    """Read, measure, write, print."""
    (verb, *read), values, out = options.what, dict[str, Any](), Path(options.out or "")
    if verb == "show":
        (kind, name, layers), base = show(read[0]), trained_base(Path(read[0]))
        values |= {"kind": kind, "base": name, "base_form": base and base.quant}
        values |= {"dead": [path for path, layer in layers.items() if layer.get("dead")]}
        values |= {"norm": sum(layer.get("norm", 0) ** 2 for layer in layers.values()) ** 0.5}
    elif verb == "diff":
        layers = difference(*(read_files(folder)[1] for folder in read))
    elif verb == "extract":
        dense, tuned = (read_model(Path(folder)) for folder in read)
        if dense[2] or tuned[2]:
            raise InputError(f"extract takes dense models, and {read[0 if dense[2] else 1]} is in 4 bits")
        with lock_folder(str(out), read):
            layers = extract(dense[0], dict(dense[3]), tuned[3], options.rank or 0, out, read[0])
    else:
        check_adapter(read[0])
        with lock_folder(str(out), read):
            layers = resize(read[0], options.rank or 0, out)
            if (Path(read[0]) / TEMPLATE).is_file():  # it goes with an adapter
                shutil.copyfile(Path(read[0]) / TEMPLATE, out / TEMPLATE)
    rows = [(name, str(value)) for name, value in values.items() if value not in (None, [], {})]
    rows += [(path, "  ".join(f"{of} {value:.4g}" for of, value in layer.items())) for path, layer in layers.items()]
    result(values | {"layers": layers}, pairs(rows), as_json=options.json)
    return 0
