"""attention against a plain loop in float64: causal, grouped heads, spans, forks, masks, cached keys."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.kernels.attention import Scores, causal_attention, visible_keys
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.spans import Packed, segments, span_positions

Spans = list[tuple[int, ...]]


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float = 8**-0.5, cap: float = 0
) -> torch.Tensor:
    """One query at a time: q [B, T, H, D], k and v [B, S, K, D], visible [B, T, S] bool."""
    out = torch.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = visible[b, t].nonzero().squeeze(1)
        score = k[b, keys, h // group] @ q[b, t, h] * scale
        score = cap * (score / cap).tanh() if cap else score
        out[b, t, h] = score.softmax(0) @ v[b, keys, h // group]
    return out


def sample(b: int, t: int, s: int, heads: int, kv: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t * 100 + s)
    sizes = ((b, t, heads, 8), (b, s, kv, 8), (b, s, kv, 8))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def causal(t: int, s: int) -> torch.Tensor:
    return torch.arange(s) <= torch.arange(s - t, s)[:, None]


def spans_of(lengths: list[int]) -> Spans:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (4, 4), (4, 2), (4, 1), (9, 3)])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (7, 7), (1, 9), (3, 9)])
def test_causal_and_cached(heads: int, kv: int, t: int, s: int) -> None:
    q, k, v = sample(2, t, s, heads, kv)
    expected = plain(q, k, v, causal(t, s).expand(2, t, s))
    torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_fp32_within_a_rounding_bound() -> None:
    q, k, v = sample(1, 63, 63, 4, 2, torch.float32)
    exact = plain(q.double(), k.double(), v.double(), causal(63, 63)[None])
    assert (causal_attention(q, k, v).double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize(("t", "s"), [(6, 6), (1, 6), (2, 6)])
def test_mask_hides_left_padding(t: int, s: int) -> None:
    q, k, v = sample(2, t, s, 4, 2)
    mask = torch.tensor([[False, False, False, True, True, True], [True] * 6])
    visible = causal(t, s) & mask[:, None]
    own = torch.zeros(t, s, dtype=torch.bool)
    own[:, s - t :] = torch.eye(t, dtype=torch.bool)
    got = causal_attention(q, k, v, visible=visible_keys(t, s, mask, q.device))
    assert got.isfinite().all()  # padding queries see themselves: no 0/0
    torch.testing.assert_close(got, plain(q, k, v, visible | own), rtol=1e-12, atol=1e-12)


def test_spans_over_several_rows() -> None:
    q, k, v = sample(2, 6, 6, 4, 2)
    got = causal_attention(q, k, v, spans=[(0, 4), (4, 6), (6, 12)])
    torch.testing.assert_close(got[0, 4:], causal_attention(q[:1, 4:], k[:1, 4:], v[:1, 4:])[0])
    torch.testing.assert_close(got[1], causal_attention(q[1:], k[1:], v[1:])[0])


@pytest.mark.parametrize("lengths", [[1], [3, 1, 2], [2, 2]])
def test_gradients_in_float64(lengths: list[int]) -> None:
    q, k, v = (x.requires_grad_() for x in sample(1, sum(lengths), sum(lengths), 4, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, spans=spans_of(lengths)), (q, k, v))


PIECES = st.lists(st.tuples(st.integers(1, 6), st.integers(-2, 9)), min_size=1, max_size=7)  # tokens, which parent


def laid_out(pieces: list[tuple[int, int]]) -> Spans:
    """A forest of any depth: a new tree where the parent is below 0, else it is counted from the root, around."""
    spans: Spans = []
    root = place = 0
    for i, (length, up) in enumerate(pieces):
        root = i if up < 0 or not i else root
        spans.append((place, place + length) if root == i else (place, place + length, root + up % (i - root)))
        place += length
    return spans


def lines_of(spans: Spans) -> list[list[int]]:
    """Of each piece those that its tokens see, itself the last."""
    lines: list[list[int]] = []
    for i, span in enumerate(spans):
        lines.append([*lines[span[2]], i] if len(span) > 2 else [i])
    return lines


def fork_visible(spans: Spans) -> torch.Tensor:
    """Who sees whom, by definition: a token sees those before it in its own piece and in what that goes on from."""
    lines, owner = lines_of(spans), [i for i, (a, b, *_) in enumerate(spans) for _ in range(a, b)]
    sees = lambda i, j: j <= i and owner[j] in lines[owner[i]]
    return torch.tensor([[sees(i, j) for j in range(len(owner))] for i in range(len(owner))])


HOW = {"window": Scores(3), "cap": Scores(softcap=1.5), "all": Scores(4, 0.5, 2.0)}


def near(visible: torch.Tensor, window: int) -> torch.Tensor:
    """Of the keys that each query sees, the last so many: counted, not taken from their places."""
    after = visible.flip(-1).cumsum(-1).flip(-1)
    return visible & (after <= window) if window else visible


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("t", "s"), [(9, 9), (4, 9), (1, 9), (3, 3), (7, 8)])
def test_windows_scales_and_soft_caps(how: str, t: int, s: int) -> None:
    q, k, v = sample(2, t, s, 4, 2)
    scores = HOW[how]
    visible = near(causal(t, s).expand(2, t, s), scores.window)
    expected = plain(q, k, v, visible, scores.scale or 8**-0.5, scores.softcap)
    torch.testing.assert_close(causal_attention(q, k, v, scores=scores), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
@given(pieces=PIECES)
def test_windows_of_forks(how: str, pieces: list[tuple[int, int]]) -> None:
    spans, scores = laid_out(pieces), HOW[how]
    q, k, v = sample(1, spans[-1][1], spans[-1][1], 4, 2)
    expected = plain(q, k, v, near(fork_visible(spans)[None], scores.window), scores.scale or 8**-0.5, scores.softcap)
    got = causal_attention(q, k, v, spans=spans, scores=scores)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(hidden=st.lists(st.booleans(), min_size=9, max_size=9), window=st.integers(1, 9), t=st.integers(1, 9))
def test_what_a_mask_hides_takes_no_place_in_a_window(hidden: list[bool], window: int, t: int) -> None:
    """Wherever the hidden keys are, between a shared prefix and a padded row too."""
    mask = ~torch.tensor([hidden])
    got = visible_keys(t, 9, mask, mask.device, window)[0, 0]
    expected = near(causal(t, 9) & mask, window)
    shown = mask[0, 9 - t :]  # of the queries: those in padding see themselves, and nobody looks at them
    assert torch.equal(got[shown], expected[shown]) and got.any(1).all()


@pytest.mark.parametrize("how", HOW)
def test_gradients_of_windows_and_caps_in_float64(how: str) -> None:
    q, k, v = (x.requires_grad_() for x in sample(1, 10, 10, 4, 2))
    spans: Spans = [(0, 5), (5, 6), (6, 8, 1), (8, 9, 2), (9, 10, 1)]
    ours = lambda *x: causal_attention(*x, spans=spans, scores=HOW[how])
    assert torch.autograd.gradcheck(ours, (q, k, v), fast_mode=True)


def test_another_span_changes_nothing_to_the_bit() -> None:
    q, k, v = sample(1, 90, 90, 4, 2, torch.float32)
    spans = spans_of([31, 17, 42])
    before = causal_attention(q, k, v, spans=spans)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, 31:48] = torch.randn(1, 17, *x.shape[2:], generator=torch.Generator().manual_seed(1)) * 100
    after = causal_attention(q, k, v, spans=spans)
    assert torch.equal(before[:, :31], after[:, :31]) and torch.equal(before[:, 48:], after[:, 48:])
    assert not torch.equal(before[:, 31:48], after[:, 31:48])


@given(pieces=PIECES)
def test_forks_equal_the_definition(pieces: list[tuple[int, int]]) -> None:
    spans = laid_out(pieces)
    total = spans[-1][1]
    q, k, v = sample(1, total, total, 4, 2)
    got = causal_attention(q, k, v, spans=spans)
    torch.testing.assert_close(got, plain(q, k, v, fork_visible(spans)[None]), rtol=1e-12, atol=1e-12)
    before = [sum(spans[up][1] - spans[up][0] for up in line[:-1]) for line in lines_of(spans)]
    places = [n + i for n, (a, b, *_) in zip(before, spans, strict=True) for i in range(b - a)]
    assert span_positions(spans, q.device).tolist() == places
    laid = segments(spans, total)
    found = fork_visible(spans)[[end - 1 for _, end, _ in laid]]
    assert [keys.tolist() for *_, keys in laid] == [row.nonzero().flatten().tolist() for row in found]


def test_a_layout_in_depth_first_order_has_a_segment_for_each_leaf() -> None:
    tree: Spans = [(0, 5), (5, 9, 0), (9, 12, 1), (12, 15, 1), (15, 16, 0), (16, 20)]
    laid = segments(tree, 20)
    assert [one[:2] for one in laid] == [(0, 12), (12, 15), (15, 16), (16, 20)]
    assert [len(keys) for *_, keys in laid] == [12, 9 + 3, 5 + 1, 4]
    deep: Spans = [(0, 5), (5, 6, 0), (6, 9, 0), (9, 10, 2), (10, 12, 2)]
    for window, keys in ((0, [0, 1, 2, 3, 4, 6, 7, 8, 10, 11]), (5, [4, 6, 7, 8, 10, 11]), (1, [10, 11])):
        assert segments(deep, 12, window)[2][2].tolist() == keys


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (9, 3)])
@pytest.mark.parametrize(
    "pieces", [[(3, -1), (2, 0), (4, 0)], [(1, -1), (1, 0), (1, 0)], [(4, -1), (2, 0), (1, 1), (2, 1)]]
)
def test_gradients_of_forks_in_float64(pieces: list[tuple[int, int]], heads: tuple[int, int]) -> None:
    spans = laid_out(pieces)
    q, k, v = (x.requires_grad_() for x in sample(1, spans[-1][1], spans[-1][1], *heads))
    ours = lambda q, k, v: causal_attention(q, k, v, spans=spans)
    assert torch.autograd.gradcheck(ours, (q, k, v), fast_mode=True)


def test_another_branch_changes_nothing_to_the_bit() -> None:
    """Trunk 300, branches 71, 40 and 9, another example behind: outputs and gradients of all but the changed branch."""
    spans: Spans = [(0, 300), (300, 371, 0), (371, 411, 0), (411, 420, 0), (420, 450)]
    parts = {"trunk": (0, 300), "first": (300, 371), "second": (371, 411), "third": (411, 420), "behind": (420, 450)}
    for changed in ("first", "second", "third"):
        results = []
        for scale in (1.0, 100.0):
            q, k, v = sample(1, 450, 450, 4, 2, torch.float32)
            for x in (q, k, v):
                x[:, slice(*parts[changed])] *= scale
                x.requires_grad_()
            out = causal_attention(q, k, v, spans=spans)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for name, (start, end) in parts.items():
            same = [torch.equal(a[:, start:end], b[:, start:end]) for a, b in zip(*results, strict=True)]
            trunk = [True, True, False, False]  # the trunk's keys and values get every branch's gradient
            assert same == {changed: [False] * 4, "trunk": trunk}.get(name, [True] * 4), f"{changed} changed {name}"


def test_an_unforked_text_is_to_the_bit_what_it_was() -> None:
    q, k, v = sample(1, 60, 60, 4, 2, torch.float32)
    plain_spans = causal_attention(q, k, v, spans=[(0, 20), (20, 60)])
    alone = torch.cat([causal_attention(*(x[:, a:b] for x in (q, k, v))) for a, b in ((0, 20), (20, 60))], dim=1)
    torch.testing.assert_close(plain_spans, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(causal_attention(q, k, v, spans=[(0, 7), (7, 20, 0), (20, 60)]), plain_spans)


def test_the_comparison_catches_a_mask_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Packed._batches

    def off_by_one(row: Any, window: int, area: int, *how: Any) -> Any:
        """A planted fault: a branch's tokens are one place too far left, so each misses itself."""
        made = original(row, window, 1 << 30, *how)
        return made._replace(biases=[None if bias is None else bias.roll(-1, -1) for bias in made.biases])

    monkeypatch.setattr(Packed, "_batches", off_by_one)
    with pytest.raises(AssertionError):
        test_forks_equal_the_definition.hypothesis.inner_test([(3, -1), (2, 0), (2, 0)])  # type: ignore[attr-defined]


SHORT = [[(0, 3)], [(0, 3), (4, 6)], [(3, 6), (0, 3)], [(0, 4), (3, 6)], [(0, 7)], []]
SHORT += [[(0, 2), (2, 6, 1)], [(0, 2), (2, 6, -1)], [(0, 2), (2, 4), (4, 6, 0)], [(0, 6, 0)], [(0, 2), (2, 6, 0, 0)]]
SHORT += [[(0, 2), (2, 2, 0), (2, 6)], [(0,), (0, 6)], [(), (0, 6)], [(0, 0), (0, 6)], [(0, -1, 6)]]


@pytest.mark.parametrize("spans", SHORT)
def test_spans_that_do_not_cover_the_tokens_are_refused(spans: Spans) -> None:
    rule = r"spans must cover the 6 tokens in order .* or \(start, end, parent\) .* of its tree .*, none empty, got \["
    with pytest.raises(ValueError, match=rule):
        causal_attention(*sample(1, 6, 6, 2, 2), spans=spans)


@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize(("rows", "keys"), [(1, 0), (0, 0), (1, 3)])
def test_no_tokens_give_none_and_zero_gradients(rows: int, keys: int, path: str) -> None:
    inputs = [x.requires_grad_() for x in sample(rows, 0, keys, 4, 2)]
    ways: list[dict[str, Any]] = [{}, {"scores": Scores(window=2, softcap=3.0)}] + [{"spans": []}] * (keys == 0)
    for how in ways:
        with force_path(path):
            y = causal_attention(*inputs, **how)
        assert y.shape == inputs[0].shape and not any(g.any() for g in torch.autograd.grad(y.sum(), inputs))
    with pytest.raises(ValueError, match="spans must cover the 0 tokens"):
        causal_attention(*sample(1, 0, 0, 4, 2), spans=[(0, 1)])


def test_spans_and_visible_keys_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        causal_attention(*sample(1, 6, 6, 2, 2), spans=[(0, 6)], visible=visible_keys(6, 6, None, torch.device("cpu")))
