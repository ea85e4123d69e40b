"""What has not moved is found from checksums alone, and each reason is told."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fourbit.optim import AdamW
from fourbit.optim.unmoved import PIECE, checksum, notice, unmoved

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 300))
def test_whatever_moves_changes_the_checksum(data: st.DataObject, dtype: torch.dtype, size: int) -> None:
    """One value by its last bit, or several, up and down: sums of which plain sums would be the same."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    y = x.clone()
    for i in data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=6)):
        y[i] = torch.nextafter(x[i], torch.tensor(data.draw(st.sampled_from([-9.0, 9.0])), dtype=dtype))
    assert (checksum(x) == checksum(y)).item() == torch.equal(x, y)
    assert checksum(x) == checksum(x.clone())


def test_places_pieces_and_layouts_count() -> None:
    x = torch.arange(PIECE + 3, dtype=torch.float32)
    assert checksum(x) != checksum(x.flip(0))
    y = x.clone()
    y[[0, PIECE]] = y[[PIECE, 0]]  # the same place of two pieces
    assert checksum(x) != checksum(y)
    assert checksum(x[:6].view(2, 3).T) == checksum(x[:6].view(2, 3).T.contiguous())


def test_what_did_not_move_is_told() -> None:
    ps = {name: nn.Parameter(torch.ones(3)) for name in ("moved", "frozen", "cut", "dead", "small", "left_out")}
    ps["empty"] = nn.Parameter(torch.ones(0))
    before = {name: checksum(p) for name, p in ps.items()}
    for name in ("moved", "frozen", "small"):
        ps[name].grad = torch.ones(3)
    ps["dead"].grad = torch.zeros(3)
    ps["moved"].data[1] += 1e-6
    for name in ("unlucky", "dull"):
        ps[name] = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        ps[name].grad = torch.full((3,), float(name == "unlucky"), dtype=torch.bfloat16)
        before[name] = checksum(ps[name])
    learning = [p for name, p in ps.items() if name not in ("frozen", "left_out")]
    groups = [{"params": learning}, {"params": [ps["frozen"]], "lr": 0.0}]
    same = ["frozen", "cut", "dead", "small", "left_out", "unlucky", "dull"]
    assert unmoved(ps, before, AdamW(groups, rounding="nearest")) == same
    found = unmoved(ps, before, AdamW(groups))
    assert found == [name for name in same if name != "unlucky"]
    told = notice(found, len(ps), 7)
    assert told.startswith("note: 6 of 9 trained tensors did not move in 7 steps: frozen, cut, dead and 3 more; their ")
    assert "p0, p1, p2; " in notice(["p0", "p1", "p2"], 9, 50)
