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


def test_each_reason_is_told() -> None:
    ps = {name: nn.Parameter(torch.ones(3)) for name in ("moved", "frozen", "cut", "dead", "small", "left_out")}
    ps["empty"] = nn.Parameter(torch.ones(0))
    before = {name: checksum(p) for name, p in ps.items()}
    for name in ("moved", "frozen", "small"):
        ps[name].grad = torch.ones(3)
    ps["dead"].grad = torch.zeros(3)
    ps["moved"].data[1] += 1e-6
    ps["unlucky"] = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ps["unlucky"].grad = torch.ones(3, dtype=torch.bfloat16)
    before["unlucky"] = checksum(ps["unlucky"])
    learning = [p for name, p in ps.items() if name not in ("frozen", "left_out")]
    groups = [{"params": learning}, {"params": [ps["frozen"]], "lr": 0.0}]
    assert unmoved(ps, before, AdamW(groups, rounding="nearest"))["unlucky"] == "rounding"
    found = unmoved(ps, before, AdamW(groups))
    assert found == {
        "frozen": "rate",
        "cut": "no gradient",
        "dead": "zero gradient",
        "small": "rounding",
        "left_out": "rate",
    }
    told = notice(found, len(ps), 7)
    assert told.startswith("note: 5 of 8 trained tensors did not move in 7 steps: ")
    for part in ("learning rate is 0 (frozen, left_out)", "reached them", "gradient is 0 (dead)", "higher lr (small)"):
        assert part in told
    many = notice({f"p{i}": "rounding" for i in range(9)}, 9, 50)
    assert "(p0, p1, p2 and 6 more)" in many
