"""An index of any length whose best rows are known: planted, with ties, and with better ones that may not be chosen."""

from __future__ import annotations

import torch

from benchmarks.gpu_contenders import RECENT_EXCLUDE, SINK, Tensors

TIED = 3  # equal rows that compete for the last place
DRAWN = 1 << 16  # rows that are drawn at random; longer indexes repeat them
CHUNK = 1 << 14  # rows taken to float64 at a time
EXACT = 1e-5  # of a cosine: float32 sums of a few thousand products


class PlantedIndex:
    """Unit rows, one a frame, and a query.

    The ``k - 1`` best rows differ, and ``TIED`` equal ones follow, of which the oldest frame's wins. Its row is not the
    first of them: two of them have each other's ids, as rows that are used again may. A sink frame and the newest one
    are more similar still, and are no candidates.

    Args:
        rows: of the index, at least 40.
        embedding: numbers in a row.
        k: rows to find, 2 to 16.
        device, seed: of the tensors.

    Attributes:
        rows: ``(1, N, E)`` float32 of unit length.
        query: ``(1, E)`` float32.
        ids: ``(1, N)`` int64.
        wanted: the frames to find, most similar first.
    """

    def __init__(self, rows: int, embedding: int, k: int, device: str, seed: int = 0) -> None:
        rng = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=rng, device=device)

        self.k = k
        drawn = normal(min(rows, DRAWN), embedding)
        drawn /= drawn.norm(dim=-1, keepdim=True)
        self.rows = drawn.repeat(-(-rows // len(drawn)), 1)[:rows][None]
        self.query = normal(1, embedding)
        self.ids = torch.arange(rows, device=device)[None]
        planted = torch.linspace(SINK, rows - RECENT_EXCLUDE - 1, k - 1 + TIED).long().tolist()
        places = [planted[(5 * i + 2) % len(planted)] for i in range(len(planted))] if len(planted) % 5 else planted
        best, tied = places[: k - 1], sorted(places[k - 1 :])
        for rank, frame in enumerate([0, rows - 1, *best]):
            self._plant([frame], 0.95 - 0.4 * rank / (k + 1), normal(embedding))
        self._plant(tied, 0.5, normal(embedding))
        self.ids[0, [tied[0], tied[-1]]] = self.ids[0, [tied[-1], tied[0]]]
        self.wanted = [*best, tied[0]]

    def _plant(self, frames: list[int], cosine: float, other: torch.Tensor) -> None:
        unit = self.query[0] / self.query[0].norm()
        aside = other - (other @ unit) * unit
        self.rows[0, frames] = cosine * unit + (1 - cosine**2) ** 0.5 * aside / aside.norm()

    def case(self, dtype: torch.dtype) -> Tensors:
        """`topk_retrieve`'s arguments with rows stored so; int8 has a float32 factor for each row."""
        stored = self.rows
        case: Tensors = {}
        if dtype == torch.int8:
            scale = stored.abs().amax(-1) / 127
            case["index_scale"] = scale
            stored = torch.empty_like(self.rows, dtype=dtype)
            for to, rows, factors in zip(*(x[0].split(CHUNK) for x in (stored, self.rows, scale)), strict=True):
                to.copy_((rows / factors[:, None]).round_())
        count = torch.tensor([stored.shape[1]], device=stored.device)
        return case | {
            "query": self.query.to(dtype if dtype.is_floating_point else torch.float32),
            "index": stored.to(dtype),
            "index_ids": self.ids,
            "index_length": count,
            "end_frame": count.clone(),
            "k": self.k,
            "first_frame": SINK,
            "recent_exclude": RECENT_EXCLUDE,
            "normalized": True,
        }


class ExactChoice:
    """The frames to choose by float64 cosines of a case's rows as stored, the older of equals first.

    Attributes:
        frames: most similar first.
        cosines: theirs, ``(k,)`` float64.
    """

    def __init__(self, case: Tensors) -> None:
        self.case = case
        cosines, ids = self._cosines(case["index"][0], case.get("index_scale")), case["index_ids"][0]
        end = int(case["end_frame"]) - case["recent_exclude"]
        allowed = (ids >= case["first_frame"]) & (ids < end)
        best = torch.where(allowed, cosines, -2.0).topk(case["k"] + TIED).indices
        # Sums of equal rows may differ in float64's last places, too.
        ranked = sorted((-round(float(cosines[row]), 12), int(ids[row]), int(row)) for row in best)[: case["k"]]
        self.frames = [frame for _, frame, _ in ranked]
        self.cosines = cosines[[row for _, _, row in ranked]]

    def _cosines(self, rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        query = self.case["query"][0].double()
        query = query / query.norm()
        cosines = torch.cat([part.double() @ query for part in rows.split(CHUNK)])
        return cosines if scale is None else cosines * scale[0].double()

    def wrong(self, frames: torch.Tensor, scores: torch.Tensor) -> str:
        """What is wrong with the op's frames ``(1, k)`` and scores: empty when nothing is."""
        if frames[0].tolist() != self.frames:
            return f"WRONG frames {frames[0].tolist()}, expected {self.frames}"
        error = float((scores[0].double() - self.cosines).abs().max())
        return "" if error < EXACT else f"WRONG scores by {error:.1e}; allowed {EXACT:g}"

    def wrong_rows(self, rows: torch.Tensor) -> str:
        """What is wrong with rows ``(1, k)`` that a peer chose, which knows no ids: they must be as similar.

        The case's rows are not int8.
        """
        index = self.case["index"][0]
        got = self._cosines(index[rows[0].to(index.device)], None).sort(descending=True).values
        # A peer that computes in bfloat16 has cosines in steps of 2**-8 between 0.5 and 1.
        allowed = EXACT if index.dtype == torch.float32 else 2**-7
        error = float((got - self.cosines).abs().max())
        return "" if error <= allowed else f"WRONG rows, their cosines are off by {error:.1e}; allowed {allowed:g}"
