"""The sides of benchmarks.generate_cpu: each answers one list of prompts greedily, every prompt with as many tokens as
its row says, and returns how many those are.

Ours answers from bitsandbytes' 4-bit weights as it does by default (`ours`) and without dense ones (`packed`); the peer
is transformers with those weights (`peer`), and with the dense ones (`dense`), a batch padded on the left.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .sides import DENSE, PACKED, Row, Step, load_peer, main, take_packed


def ours(folder: Path, model_path: str, dtype: str, keep_dense: Any = "auto") -> Step:
    import fourbit

    model, _ = fourbit.load(model_path, quant_type="nf4", dtype=dtype)
    take_packed(model, folder / PACKED)
    return own(model, keep_dense)


def own(model: Any, keep_dense: Any) -> Step:
    """Greedy generation of ours."""
    import fourbit

    def step(rows: Sequence[Row]) -> float:
        asked, lengths = [row["ids"] for row in rows], [row["new"] for row in rows]
        answers = fourbit.generate(model, asked, max_new_tokens=lengths, keep_dense=keep_dense, batch_size=len(rows))
        return sum(map(len, answers))

    return step


def packed(folder: Path, model_path: str, dtype: str) -> Step:
    return ours(folder, model_path, dtype, "off")


def peer(folder: Path, model_path: str, dtype: str) -> Step:
    return theirs(load_peer(folder, dtype))


def dense(folder: Path, model_path: str, dtype: str) -> Step:
    import torch
    from transformers import AutoModelForCausalLM

    return theirs(AutoModelForCausalLM.from_pretrained(folder / DENSE, dtype=getattr(torch, dtype)))


def theirs(model: Any) -> Step:
    """Greedy generation of transformers; rows that ended go on until the last one has, uncounted."""
    import torch

    model.eval()

    @torch.inference_mode()
    def step(rows: Sequence[Row]) -> float:
        width, most = max(len(row["ids"]) for row in rows), max(row["new"] for row in rows)
        ids = torch.tensor([[0] * (width - len(row["ids"])) + row["ids"] for row in rows])
        seen = torch.tensor([[0] * (width - len(row["ids"])) + [1] * len(row["ids"]) for row in rows])
        how = {"max_new_tokens": most, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=seen, use_cache=True, **how)
        assert made.shape[1] == width + most
        return sum(row["new"] for row in rows)

    return step


if __name__ == "__main__":
    main({"ours": ours, "packed": packed, "peer": peer, "dense": dense})
