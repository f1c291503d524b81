"""Bytes that ranks move and hold, as formulas in sizes, and the rule that chooses between pages and merged attention.

Two ways to attend to frames that other ranks keep (see ``docs/scaling.md``, which works numbers out):

- ``pages``: the pages of frames that are new in the window travel, once a block, to every rank.
- ``merge``: nothing is fetched. Each rank attends to its own frames, and in every layer of every forward the parts are
  joined (`merged_attention`).

Everything here is exact for one block and one rank, in bytes that the rank receives; it sends as many on average. Sizes
come as a `PageFormat`: that of one rank, so with ``kv_heads`` of the rank where heads are split.
"""

from __future__ import annotations

from typing import Literal

from ..bank.page_format import PageFormat
from ..config import WindowConfig, check_int
from ..reference import lse_dtype

Transfer = Literal["pages", "merge"]

FORWARDS = 5
"""Forwards of a block where nobody says how many: LongLive's four denoising steps and the clean one."""

FRAME_NUMBER = 8
"""Bytes of a frame number, int64."""

PARTS_HELD = 5
"""Parts of attention that a rank holds at most while they are joined: its own, that one packed, as much as two in what
comes, the joined one."""


def frame_bytes(form: PageFormat) -> int:
    """Bytes of one frame on its way, all layers and samples: pages as they are stored.

    A plain page is keys and values alone, ``2 * T * H * D * w``. A quantised one travels as the bytes of a slot,
    padding included.
    """
    return form.layers * form.samples * (form.page_bytes if form.quantised else form.used_bytes)


def pages_received(form: PageFormat, arrivals: int, own: int = 0) -> int:
    """What ``pages`` brings to one rank in a block: ``(arrivals - own) * frame_bytes``.

    Args:
        form: of one rank's pages.
        arrivals: frames that are new in the window, counted once however many samples chose them: all pages of a
            frame go together.
        own: those among them that this rank keeps itself. Of frames dealt evenly to N ranks it is ``arrivals / N`` on
            average, and so a rank receives ``(N-1)/N * arrivals`` frames.
    """
    return (check_int("arrivals", arrivals, 0) - check_int("own", own, 0, arrivals)) * frame_bytes(form)


def part_row_bytes(form: PageFormat, q_heads: int | None = None) -> int:
    """Bytes of one query token's part, all samples and query heads: an output and a log-sum-exp, ``D * w + 4`` each.

    Float64 attention keeps its log-sum-exp in float64: 8 bytes.

    Args:
        form: of one rank's pages, whose dtype the output has.
        q_heads: query heads of the rank; ``kv_heads`` when not given.
    """
    heads = form.kv_heads if q_heads is None else check_int("q_heads", q_heads, 1)
    return form.samples * heads * (form.head_dim * form.dtype.itemsize + lse_dtype(form.dtype).itemsize)


def part_rows_received(tokens: int, ranks: int) -> int:
    """Rows, of `part_row_bytes`, that joining the parts of ``tokens`` queries brings to one rank.

    Two ranks exchange their parts: ``tokens``. More of them join a slice of ``ceil(tokens / N)`` queries each: first
    come the other ranks' parts of the own slice, then the other ranks' joined slices, so ``2 * (N-1) *
    ceil(tokens / N)``, which stays below ``2 * tokens + 2 * N``; gathering whole parts would be ``(N-1) * tokens``.
    """
    check_int("tokens", tokens, 0)
    if check_int("ranks", ranks, 1) <= 2:
        return (ranks - 1) * tokens
    return 2 * (ranks - 1) * -(-tokens // ranks)


def merge_received(form: PageFormat, frames: int, forwards: int, ranks: int, q_heads: int | None = None) -> int:
    """What ``merge`` brings to one rank in a block: ``forwards * layers * part_rows_received * part_row_bytes``.

    Args:
        form: of one rank's pages.
        frames: of the block, ``n``; it has ``n * T`` query tokens.
        forwards: of the block, the clean one included, ``F``.
        ranks: between which the frames are dealt, ``N``.
        q_heads: as in `part_row_bytes`.
    """
    rows = part_rows_received(check_int("frames", frames, 0) * form.tokens_per_frame, ranks)
    return check_int("forwards", forwards, 0) * form.layers * rows * part_row_bytes(form, q_heads)


def search_received(
    form: PageFormat, top_k: int, ranks: int, score_bytes: int = 4, embedding_dim: int | None = None
) -> int:
    """What the search brings to one rank in a block: ``top_k`` candidates from every other rank, a frame number and a
    score each, in every sample. The size is fixed: a rank that has fewer sends -1.

    Args:
        form: of one rank's pages.
        top_k: frames that are chosen.
        ranks: between which the frames are dealt.
        score_bytes: of a score: 4, or 8 where embeddings are float64.
        embedding_dim: for a choice with diversity, which asks each rank for one candidate in each of ``top_k`` rounds,
            with its embedding of so many channels and two numbers more.
    """
    check_int("score_bytes", score_bytes, 1)
    numbers = 1 if embedding_dim is None else check_int("embedding_dim", embedding_dim, 1) + 2
    candidate = FRAME_NUMBER + numbers * score_bytes
    return (check_int("ranks", ranks, 1) - 1) * form.samples * check_int("top_k", top_k, 0) * candidate


def choose_transfer(
    form: PageFormat,
    *,
    arrivals: int,
    frames: int,
    ranks: int,
    forwards: int = FORWARDS,
    q_heads: int | None = None,
) -> Transfer:
    """The rule: ``merge`` if all ranks together receive fewer bytes by it, else ``pages``.

    Together, because what one rank receives of the pages depends on who keeps the frames, and all ranks must decide
    alike: ``pages`` moves ``(N-1) * arrivals * frame_bytes``, ``merge`` ``N * merge_received``. Without padding, and
    with ``Hq`` query heads on ``H`` heads of keys and values, all of it but a few terms cancels, the number of ranks
    too: pages travel as long as ::

        arrivals <= forwards * frames * (Hq / H) * (1 + 4 / (D * w))

    whose last factor is 1.016 for 128 channels in 16 bits. Pages that are stored in eight bits may be twice as many.

    Args:
        form: of one rank's pages.
        arrivals: frames that come new into the window in a block, as many as may be or as are expected.
        frames, forwards, ranks, q_heads: as in `merge_received`.
    """
    pages = (check_int("ranks", ranks, 1) - 1) * pages_received(form, arrivals)
    return "merge" if ranks * merge_received(form, frames, forwards, ranks, q_heads) < pages else "pages"


def window_transfer(
    form: PageFormat, config: WindowConfig, ranks: int, forwards: int = FORWARDS, q_heads: int | None = None
) -> Transfer:
    """`choose_transfer` for a window of which no more is known than its sizes: every block is full, and everything it
    has chosen is new (``samples * top_k`` frames).

    That is the most that pages can cost. Most blocks choose again what the last one had, so where this says ``merge``
    by a small margin, ``pages`` may still move less; where it says ``pages``, pages it is.
    """
    arrivals = form.samples * config.top_k
    return choose_transfer(
        form, arrivals=arrivals, frames=config.frames_per_block, ranks=ranks, forwards=forwards, q_heads=q_heads
    )


def frames_kept(history: int, ranks: int) -> int:
    """Most frames that one of N ranks keeps when ``history`` frames are dealt in turn: ``ceil(history / N)``."""
    return -(-check_int("history", history, 0) // check_int("ranks", ranks, 1))


def memory_held(
    form: PageFormat,
    config: WindowConfig,
    *,
    history: int,
    embedding_dim: int,
    frame_ranks: int = 1,
    head_ranks: int = 1,
    transfer: Transfer = "pages",
    q_heads: int | None = None,
) -> dict[str, int]:
    """Bytes one rank holds, by what they are for, when ``history`` frames are finished.

    Args:
        form: of the whole model, all heads: this function splits them.
        config: of the window.
        history: finished frames that can be retrieved.
        embedding_dim: channels of an embedding, kept in float32 (float64 for a float64 window).
        frame_ranks, head_ranks: ranks that frames are dealt to, and that heads are split over.
        transfer: how ranks attend to each other's frames.
        q_heads: of the whole model; ``kv_heads`` when not given.

    Returns:
        ``window``: placed pages of ``W`` frames, on every rank. ``staging``: canonical keys of the local part and one
        block. ``slots``: of the bank on the device, as many as a window makes by itself: of ``samples * top_k`` frames
        where pages are sent on at once (``pages``), else twice as many. ``arrivals`` (``pages``): two slots for each of
        ``samples * top_k`` frames, because pages may come while earlier ones are placed. ``parts`` (``merge``):
        `PARTS_HELD` parts of one layer, which all layers share. ``history``: pages of the rank's share of the frames,
        in the bank's tiers. ``index``: embeddings and frame numbers of that share.

    Raises:
        ValueError: ``head_ranks`` does not divide the heads.
    """
    heads = form.kv_heads if q_heads is None else check_int("q_heads", q_heads, 1)
    if form.kv_heads % check_int("head_ranks", head_ranks, 1) or heads % head_ranks:
        raise ValueError(f"head_ranks must divide kv_heads {form.kv_heads} and q_heads {heads}, got {head_ranks}")
    own = PageFormat(**{**form.to_dict(), "kv_heads": form.kv_heads // head_ranks, "dtype": form.dtype})  # type: ignore[arg-type]
    key = own.tokens_per_frame * own.kv_heads * own.head_dim * own.dtype.itemsize
    planes = own.layers * own.samples * key  # keys of a frame in the compute dtype, as the window has them
    rows = config.frames_per_block * own.tokens_per_frame
    split = transfer == "merge" and frame_ranks > 1
    part = part_row_bytes(own, heads // head_ranks) * (-(-rows // frame_ranks) * frame_ranks)
    kept = frames_kept(history, frame_ranks)
    embedding = embedding_dim * lse_dtype(own.dtype).itemsize + FRAME_NUMBER
    return {
        "window": 2 * config.window * planes,
        "staging": config.staging_rows * planes,
        "slots": (1 if frame_ranks > 1 and not split else 2) * own.samples * config.top_k * frame_bytes(own),
        "arrivals": 2 * own.samples * config.top_k * frame_bytes(own) if frame_ranks > 1 and not split else 0,
        "parts": PARTS_HELD * part if split else 0,
        "history": kept * own.record_bytes,
        "index": kept * own.samples * embedding,
    }
