"""The window's single steps: writing without attention, parts of the window, pages replaced, the early search."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from simulator import rotate, softmax_attention
from torch import Tensor
from window_pair import TOLERANCE, Pair, error_of, one_thread, palette, rejected  # noqa: F401 (a fixture)

from longlive_rag_ops import BankConfig, MemoryWindow, WindowConfig
from longlive_rag_ops.config import POSITION_RULES
from longlive_rag_ops.history import least_history
from longlive_rag_ops.window_pieces import PARTS

GQA = {"layers": 2, "batch": 2, "grid": (1, 2), "heads": 4, "kv_heads": 2}
BANKS = {"resident": None, "bank": BankConfig(host_bytes="4MiB"), "int8": BankConfig(host_bytes="4MiB", storage="int8")}


class Halves(Pair):
    """A pair whose window attends in two steps."""

    def layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, check: bool = True) -> Tensor:
        rotated = self.window.write(layer, q, k, v, self.start, self.grid)
        out, lse = self.window.attend_written(layer, rotated, return_lse=True)
        expected, expected_lse = self.sim.attend(layer, q, k, v, self.grid)
        if check:
            n = q.shape[1] // self.tokens
            self.compare_choices(n)
            self.compare_pages(layer, n)
            assert error_of(out, expected) <= TOLERANCE[self.dtype]
            assert torch.allclose(lse.double(), expected_lse, rtol=TOLERANCE[self.dtype], atol=TOLERANCE[self.dtype])
            self.compare_parts(layer, q, rotated, out, lse)
        return out

    def compare_parts(self, layer: int, q: Tensor, rotated: Tensor, whole: Tensor, whole_lse: Tensor) -> None:
        n = q.shape[1] // self.tokens
        left_out = [0, self.start - 1, self.start, *range(1, self.start, 3)]
        for parts in [(), *((part,) for part in PARTS), ("memory", "sink")]:
            for exclude in ((), left_out):
                out, lse = self.window.attend_written(layer, rotated, parts=parts, exclude=exclude, return_lse=True)
                for sample in range(self.batch):
                    named = dict(zip(PARTS, self.sim.parts(sample, n), strict=True))
                    frames = [f for p in ("sink", "local") if p in parts for f in named[p] if f not in exclude]
                    where = [(f, self.rules.position(f, self.start, n)) for f in frames]
                    if "memory" in parts:
                        where += [(f, self.rules.memory_position(f, self.start, n)) for f in named["memory"]]
                    if not where:
                        assert not out[sample].any() and (lse[sample] == -torch.inf).all()
                        continue
                    pages = [(rotate(self.sim.pages[layer, sample, f][0], at, self.grid), f) for f, at in where]
                    values = torch.cat([self.sim.pages[layer, sample, f][1] for _, f in pages])
                    own = q[sample].double().split(self.tokens)
                    at = [self.rules.position(self.start + i, self.start, n) for i in range(n)]
                    queries = torch.cat([rotate(x, i, self.grid) for x, i in zip(own, at, strict=True)])
                    expected, _ = softmax_attention(queries, torch.cat([k for k, _ in pages]), values)
                    assert error_of(out[sample], expected) <= TOLERANCE[self.dtype]
        found = [self.window.attend_written(layer, rotated, parts=(part,), return_lse=True) for part in PARTS]
        out, lse = torch.ops.longlive.merge_attention(*(torch.stack(x) for x in zip(*found, strict=True)))
        assert error_of(out, whole) <= 2e-6 and torch.allclose(lse, whole_lse, atol=2e-6)


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("bank", ["resident", "bank"])
@pytest.mark.parametrize("sink", [0, 2])
def test_two_halves_are_the_whole(rule: str, bank: str, sink: int) -> None:
    pair = Halves(sink + 6, sink, 3, 0, 2, position_rule=rule, **GQA, bank=BANKS[bank])
    for n in (2, 1, 2, 2, 2, 1, 2, 2, 2, 2):
        pair.block(n=n, forwards=2)


@pytest.mark.parametrize("bank", BANKS)
def test_write_is_attend_bit_for_bit(bank: str) -> None:
    pairs = [Pair(7, 1, 3, 0, 2, **GQA, bank=BANKS[bank]) for _ in range(2)]
    for block in range(9):
        for forward, layer in itertools.product(range(2), range(2)):
            (q, k, v), _ = (pair.qkv() for pair in pairs)
            out = pairs[0].window.attend(layer, q, k, v, 2 * block, (1, 2))
            window = pairs[1].window
            # A forward may be of either kind.
            if forward == 0 or block % 2:
                again, _ = window.attend_written(layer, window.write(layer, q, k, v, 2 * block, (1, 2)))
            else:
                again = window.attend(layer, q, k, v, 2 * block, (1, 2))
            assert torch.equal(out, again)
        embeddings = [pair.embeddings() for pair in pairs]
        for pair in pairs:
            pair.window.finish(2 * block, embeddings[0])
    assert torch.equal(pairs[0].window.history_page(6), pairs[1].window.history_page(6))


@pytest.mark.parametrize("bank", ["resident", "bank"])
def test_canonical_keys_are_what_the_history_keeps(bank: str) -> None:
    still = torch.tensor([1.0, 0.0]).expand(64, 8, 2)
    pair = Pair(6, 1, 2, 0, 2, position_rule="absolute", **GQA, rope=still, bank=BANKS[bank])
    window, kept = pair.window, []
    for start in range(0, 16, 2):
        for layer in range(2):
            q, k, v = pair.qkv()
            canonical = torch.randn_like(k, requires_grad=True)
            with rejected("canonical"):
                window.write(layer, q, k, v, start, (1, 2), canonical=canonical[:, :, :1])
            rotated = window.write(layer, q, k, v, start, (1, 2), canonical=canonical)
            assert torch.equal(rotated, q)
            kept.append((start, layer, canonical.detach(), v))
            frames = window.window_frames[0]
            slot = frames.index(start + 1)
            assert torch.equal(window.pool[layer, 0, :, slot], k[:, 2:])
            for frame in window.selected[0]:  # memory is of the history
                at = next(c for s, i, c, _ in kept if i == layer and s <= frame < s + 2)[0].unflatten(0, (2, -1))
                assert torch.equal(window.pool[layer, 0, 0, frames.index(frame, 3)], at[frame % 2])
        window.finish(start, pair.embeddings())
    assert not window.pool.requires_grad and not window._staging.requires_grad
    for start, layer, canonical, v in kept[2:]:
        pages = torch.stack([window.history_page(start), window.history_page(start + 1)], 3)[layer].flatten(2, 3)
        assert torch.equal(pages[0], canonical) and torch.equal(pages[1], v)


def rewrite(pair: Pair, layer: int, frames: range) -> None:
    _, k, v = pair.qkv(len(frames))
    pair.window.rewrite(layer, k, v, frames.start, pair.grid)
    for i, sample in itertools.product(range(len(frames)), range(pair.batch)):
        rows = slice(i * pair.tokens, (i + 1) * pair.tokens)
        pair.sim.pages[layer, sample, frames[i]] = k[sample, rows].double(), v[sample, rows].double()


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("bank", ["resident", "bank"])
def test_rewritten_pages_are_what_later_blocks_see(rule: str, bank: str) -> None:
    pair = Pair(9, 1, 3, 0, 2, position_rule=rule, **GQA, bank=BANKS[bank])
    generations: dict[int, int] = {}
    for block in range(14):
        kind = block % 5
        old = list(range(max(1, pair.start - 3), pair.start))  # local to the next block
        ranges: list[range] = []
        if kind == 1 and old:  # in an open block, in two runs, one layer's after the other's
            pair.forward()
            ranges = [range(old[0], old[0] + 1), range(old[-1], old[-1] + 1)] if len(old) > 1 else [range(1, 2)]
        elif kind in (2, 3) and old:
            ranges = [range(old[0], pair.start)]
            if kind == 3:  # twice: the last pages count
                for layer in range(2):
                    rewrite(pair, layer, ranges[0])
        for layer, frames in itertools.product(range(2), ranges):
            rewrite(pair, layer, frames)
        pair.block()
        pair.compare_history()
        for frame in {f for frames in ranges for f in frames}:
            generations[frame] = generations.get(frame, 0) + 1
    for frame in range(1, pair.start):
        k, v = (torch.stack([pair.sim.pages[1, s, frame][i] for s in range(2)]) for i in range(2))
        page = pair.window.history_page(frame)[1]
        assert torch.equal(page[1].double(), v)
        assert error_of(page[0], torch.stack([rotate(x, 0, pair.grid) for x in k])) < 1e-5
        if pair.window.bank is not None:
            assert pair.window.bank.generation(frame) == generations.get(frame, 0)


@pytest.mark.parametrize("bank", ["resident", "bank"])
def test_rewritten_sink_frames(bank: str) -> None:
    pair = Pair(11, 3, 2, 0, 2, **GQA, bank=BANKS[bank])
    for _ in range(3):
        pair.block()
    for layer in range(2):
        rewrite(pair, layer, range(6))
    for _ in range(7):
        pair.block()
    for layer in range(2):  # rows of the staging buffer belong to local frames by now
        rewrite(pair, layer, range(1, 3))
    for _ in range(4):
        pair.block()


@pytest.mark.parametrize("bank", ["resident", "bank"])
def test_rewrite_needs_all_layers(bank: str) -> None:
    pair = Pair(9, 1, 3, 0, 2, **GQA, bank=BANKS[bank])
    for _ in range(4):
        pair.block()
    pair.forward()
    rewrite(pair, 1, range(6, 8))
    with pytest.raises(RuntimeError, match=r"rewrite.*\[0\]"):
        pair.window.finish(pair.start, pair.embeddings())
    rewrite(pair, 0, range(6, 8))
    for _ in range(9):
        pair.block()


def test_rewrite_waits_for_copies_of_what_it_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(9, 1, 3, 0, 2, **GQA, bank=BANKS["bank"])
    pair.block()
    bank, waited = pair.window.bank, []
    assert bank is not None
    monkeypatch.setattr(bank, "wait", waited.append)
    rewrite(pair, 1, range(1, 2))
    pair.layer(0, *pair.qkv())
    rewrite(pair, 0, range(1, 2))  # the block has waited
    assert waited == [1, 0]


def test_errors_leave_no_trace() -> None:
    pair = Pair(9, 1, 3, 0, 3, **GQA)
    window = pair.window
    for n in (3, 3, 2):
        pair.block(n=n)
    q, k, v = pair.qkv(2)
    with rejected("write", "0"):
        window.attend_written(0, q)
    with rejected("start_frame", "8", "9"):
        window.write(0, q, k, v, 9, pair.grid)
    # The window is not full yet; with three frames it would be, and frames would move.
    long = pair.qkv(3)
    with rejected("k"):
        window.write(0, long[0], long[1][:, :4], long[2], 8, pair.grid)
    with rejected("k"):
        window.write(0, long[0], long[1].double(), long[2], 8, pair.grid)
    with rejected("canonical"):
        window.write(0, *long, 8, pair.grid, canonical=long[1].double())
    pair.block(n=1)
    for frames in (range(3, 5), range(8, 10), range(1, 1 + 5)):
        with rejected("start_frame", str(list(frames)[-1])):
            rewrite(pair, 0, frames)
    _, k, v = pair.qkv(1)
    with rejected("layer", "2"):
        window.rewrite(2, k, v, 8, pair.grid)
    with rejected("grid", "2"):
        window.rewrite(0, k, v, 8, (2, 1))
    with rejected("v"):
        window.rewrite(0, k, v[:, :1], 8, pair.grid)
    pair.forward()
    with rejected("parts", "far"):
        window.attend_written(0, pair.qkv()[0], parts=("sink", "far"))
    with rejected("start_frame"):  # not finished
        rewrite(pair, 0, range(9, 10))
    with rejected("forget", "finish"):
        window.forget(2)
    pair.finish()
    with rejected("before", "-1"):
        window.forget(-1)
    for _ in range(5):
        pair.block()


ODD = [torch.zeros(5), torch.full((5,), float("nan")), torch.tensor([1.0, -float("inf"), 0, 0, 0])]
DTYPES = {
    "float32": (torch.float32,),
    "float64": (torch.float64,),
    "wide first": (torch.float64, torch.float16, torch.float32),
    "wide later": (torch.float32, torch.float64, torch.bfloat16),
}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("options", [{}, {"min_score": 0.2}, {"diversity": 0.4}, {"min_score": -0.3, "diversity": 0.9}])
@pytest.mark.parametrize("bank", ["resident", "bank"])
def test_an_early_search_finds_the_same(dtypes: str, options: dict[str, Any], bank: str) -> None:
    config = WindowConfig(6, 1, 3, 1, 2, **options)
    sizes = {"layers": 1, "batch": 2, "tokens_per_frame": 1, "kv_heads": 1, "head_dim": 16, "bank": BANKS[bank]}
    early, late = (MemoryWindow(config, **sizes) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([*palette(generator, 5, 5), *ODD])  # few, so that there are ties
    found = 0
    for block, start in enumerate(range(0, 80, 2)):
        q = torch.randn(2, 2, 1, 16, generator=generator)
        outs = [window.attend(0, q, q, q, start, (1, 1)) for window in (early, late)]
        assert torch.equal(*outs)
        embeddings = rows[torch.randint(5 if block % 4 else 8, (2, 2), generator=generator)]
        embeddings = embeddings.to(DTYPES[dtypes][block % len(DTYPES[dtypes])])
        assert not early.searched and early.block_is_whole
        if block % 3 == 0:  # a search that another one follows counts for nothing
            early.retrieve(start, torch.randn(2, 2, 5, generator=generator).to(embeddings.dtype))
        given = embeddings.clone()
        early.retrieve(start, given)
        assert early.searched and not late.searched
        given.zero_()
        early.attend(0, q, q, q, start, (1, 1))
        early.finish(start)
        late.finish(start, embeddings)
        assert not early.block_is_whole and not early.searched
        assert early.selected == late.selected and early.selected_scores == late.selected_scores
        found += sum(map(len, early.selected))
    assert found > 40
    counts = [{k: n for k, n in window.stats().items() if k not in ("seconds", "bytes")} for window in (early, late)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("spare", [0, 1, 5])
@pytest.mark.parametrize("sizes", [(6, 1, 2, 0, 2), (12, 1, 6, 5, 3), (5, 2, 2, 1, 1), (7, 0, 3, 4, 3)])
def test_a_bounded_history_keeps_what_was_found(spare: int, sizes: tuple[int, ...]) -> None:
    batch = 2
    slots = least_history(WindowConfig(*sizes), batch) + spare
    pair = Pair(*sizes, batch=batch, history_slots=slots, on_full="forget")
    oldest = 0
    for block in range(60):
        pair.forward(check=block % 4 == 3)
        embeddings = pair.embeddings()
        if block % 5 == 4:
            pair.finish(embeddings)
        else:
            pair.window.retrieve(pair.start, embeddings)
            pair.forward(check=False)
            pair.window.finish(pair.start)
            pair.sim.finish(sizes[4], embeddings)
        for row in pair.window.selected:
            oldest += sum(frame < pair.start - slots for frame in row)
            assert all(pair.window.history_slot(frame) >= 0 for frame in row)
        gone = {f for f in range(sizes[1], pair.start) if pair.window.history_slot(f) < 0}
        pair.sim.forgotten = gone
        assert all(f < pair.start - sizes[0] for f in gone)
    assert gone and pair.window.stats()["forgotten_frames"] == len(gone)
    assert oldest > 0, "nothing that was found would have gone otherwise"
    pair.compare_history()


def test_an_early_search_and_a_full_history() -> None:
    slots = least_history(WindowConfig(6, 1, 2, 0, 2), 1)
    pair = Pair(6, 1, 2, 0, 2, history_slots=slots)
    while pair.window.stats()["history_frames"] + 2 <= slots:
        pair.block()
    pair.forward()
    embeddings, selected = pair.embeddings(), pair.window.selected
    pair.window.retrieve(pair.start, embeddings)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="used up"):
            pair.window.finish(pair.start)
        assert pair.window.selected == selected
    pair.forward()
