"""What storing pages costs in accuracy: the attention's output with memory frames as a bank stores them.

Run from the repository root: ``python -m benchmarks.storage_error [--out FILE] [--only WORDS]``. It prints the tables
of docs/storage.md.

Everything is float64 but the retrieved frames, whose canonical pages are rounded to the compute dtype, encoded and
decoded, as a bank does; what they differ by is the storage's error alone. The same attention with those pages in
float64, unquantised, is exact. Two kinds of cases: the recorded traces (every forward of every block that retrieves;
their windows are checked against the recorded outputs first), and random pages of the paper's frame, 6 of 12 retrieved.

Errors are relative to the root mean square of the exact output: that of all entries (``rms``), and the largest
(``largest``). Nothing is timed, so the device does not matter; the bytes are the same on any.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longlive_rag_ops import reference
from longlive_rag_ops.bank.page_format import PageFormat
from longlive_rag_ops.config import local_frames, temporal_position
from longlive_rag_ops.rotary import default_split, rotary_table
from longlive_rag_ops.traces import Trace, load_trace

ROOT = Path(__file__).parents[1]
TRACES = ROOT / "tests" / "data" / "traces"
RECORDED = 2e-5  # largest difference from a trace's outputs, relative to their root mean square; they are float32
STORED = [(storage, dtype) for storage in ("plain", "int8", "fp8") for dtype in (torch.bfloat16, torch.float16)]
SHAPE = {"tokens_per_frame": 1560, "kv_heads": 4, "head_dim": 128}  # the paper's frame; heads do not see one another
QUERIES = 64


@dataclass(frozen=True)
class Attention:
    """One attention in float64, its window split in two.

    Attributes:
        q: ``(S, H, D)``, rotated.
        keys, values: of the frames that are not retrieved, ``(frames, T, H, D)``, keys placed.
        memory_keys, memory_values: of those that are, canonical.
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    memory_keys: torch.Tensor
    memory_values: torch.Tensor

    def output(self, storage: str | None = None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """``(S, H, D)`` with memory frames stored so; None stores nothing."""
        keys, values = self.memory_keys, self.memory_values
        if storage is not None:
            frames, tokens, heads, head_dim = keys.shape
            pages = PageFormat(storage, 1, frames, tokens, heads, head_dim, dtype)
            stored = pages.decode(pages.encode(keys[None].to(dtype), values[None].to(dtype)))
            keys, values = (x[0].double() for x in stored)
        pool = torch.stack([torch.cat([self.keys, keys]), torch.cat([self.values, values])])[:, None]
        return reference.window_attend(self.q[None], pool, run=pool.shape[2])[0][0]


def trace_attentions(trace: Trace) -> Iterator[tuple[Attention, torch.Tensor]]:
    """Every forward and sample of a trace that retrieves, with the recorded output ``(S, H, D)``."""
    sizes = trace.config
    window, sink = sizes["window_frames"], sizes["sink_frames"]
    top_k, count, tokens = sizes["top_k"], sizes["frames_per_block"], sizes["tokens_per_frame"]
    rope_options: dict[str, Any] = sizes["rope"]
    split = rope_options.get("split") or default_split(sizes["head_dim"])
    rope = rotary_table(sizes["head_dim"], 1024, rope_options.get("theta", 10000.0), split, torch.float64)

    def page(name: str, block: int, forward: int, sample: int, frame: int, position: int) -> torch.Tensor:
        home = frame // count
        forward = forward if home == block else sizes["forwards_per_block"] - 1  # the clean one of earlier blocks
        x = trace.block(home, forward, name)[sample].double().unflatten(0, (count, tokens))[frame - home * count]
        return x if name == "v" else placed(x, position)

    def placed(x: torch.Tensor, position: int) -> torch.Tensor:
        return reference.rotate(x[None], rope, split, sizes["grid"], torch.tensor([position]))[0]

    for block, entry in enumerate(trace.log):
        start = entry["start_frame"]
        if not entry["memory_frames"]:
            continue
        for forward in range(sizes["forwards_per_block"]):
            for sample, memory in enumerate(entry["memory_frames"]):
                own = range(start, start + count)
                frames = [*range(sink), *local_frames(start, count, sink, window - sink - top_k)]
                where = {frame: temporal_position(frame, start, count, window, sink, top_k, "slot") for frame in frames}
                here = (block, forward, sample)
                attention = Attention(
                    torch.cat([page("q", *here, frame, where[frame]) for frame in own]),
                    *(torch.stack([page(name, *here, frame, where[frame]) for frame in frames]) for name in "kv"),
                    *(torch.stack([page(name, *here, frame, 0) for frame in memory]) for name in "kv"),
                )
                yield attention, trace.block(block, forward, "out")[sample].double()


def random_attention(outliers: float, peak: float) -> Attention:
    """Normal pages of the paper's frame; 4 of 128 key channels ``outliers`` times as large, queries ``peak`` times."""
    generator = torch.Generator().manual_seed(4)
    tokens, heads, head_dim = SHAPE.values()

    def pages() -> torch.Tensor:
        return torch.randn(6, tokens, heads, head_dim, generator=generator).double()

    keys, values, memory_keys, memory_values = (pages() for _ in range(4))
    channels = torch.ones(head_dim, dtype=torch.float64)
    channels[5::32] = outliers
    q = torch.randn(QUERIES, heads, head_dim, generator=generator).double() * peak
    return Attention(q, keys * channels, values, memory_keys * channels, memory_values)


RANDOM = {
    "random, normal": (1.0, 1.0),
    "random, peaked attention": (1.0, 4.0),
    "random, keys with outlier channels": (10.0, 1.0),
}


def errors(attentions: list[Attention]) -> list[dict[str, Any]]:
    """A row for each storage and dtype, over all outputs together."""
    exact = torch.cat([attention.output().flatten() for attention in attentions])
    size = exact.square().mean().sqrt()
    rows = []
    for storage, dtype in STORED:
        off = torch.cat([attention.output(storage, dtype).flatten() for attention in attentions]) - exact
        rms, largest = float(off.square().mean().sqrt() / size), float(off.abs().max() / size)
        rows.append({"storage": storage, "dtype": str(dtype).removeprefix("torch."), "rms": rms, "largest": largest})
    return rows


def measure(only: str = "") -> list[dict[str, Any]]:
    """A row for each case, storage and dtype; of the cases whose name contains ``only``.

    Raises:
        ValueError: a trace's window is not what was recorded.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(TRACES.glob("*.safetensors")):
        if only not in path.stem:
            continue
        attentions = []
        for attention, recorded in trace_attentions(load_trace(path)):
            off = (attention.output() - recorded).abs().max() / recorded.square().mean().sqrt()
            if not off <= RECORDED:
                raise ValueError(f"{path.stem}: the window rebuilt differs from the recorded output by {off:.2e}")
            attentions.append(attention)
        rows += [{"case": path.stem, "outputs": len(attentions), **row} for row in errors(attentions)]
    for name, options in RANDOM.items():
        if only in name:
            rows += [{"case": name, "outputs": 1, **row} for row in errors([random_attention(*options)])]
    return rows


def ratios() -> dict[str, float]:
    """Bytes of a plain bfloat16 page of the paper's frame over those of a stored one, padding included."""
    plain, *stored = (
        PageFormat(storage, 30, 1, 1560, 12, 128, torch.bfloat16).page_bytes for storage in ("plain", "int8", "fp8")
    )
    return dict(zip(("int8", "fp8"), (plain / size for size in stored), strict=True))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/storage.md: relative root mean square, then largest error, in percent."""
    columns = [(storage, str(dtype).removeprefix("torch.")) for storage, dtype in STORED]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["case"], row["storage"], row["dtype"]): row for row in rows}
    lines = []
    for what, title in (("rms", "root mean square"), ("largest", "largest")):
        lines += ["| " + " | ".join([title, *(f"{storage} {dtype}" for storage, dtype in columns)]) + " |"]
        lines += ["| --- |" + " ---: |" * len(columns)]
        for case in cases:
            figures = [f"{100 * found[(case, *column)][what]:.3g} %" for column in columns]
            lines += ["| " + " | ".join([case, *figures]) + " |"]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    """Measures, writes the file, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    rows = measure(options.only)
    if options.out is not None:
        result = {
            "what": "error of the attention's output, relative to its root mean square, when retrieved frames alone "
            "have passed the bank's storage; against float64 with unquantised pages",
            "torch": torch.__version__,
            "random": f"12 frames of {SHAPE['tokens_per_frame']} tokens, 6 retrieved; {SHAPE['kv_heads']} heads x "
            f"{SHAPE['head_dim']}, {QUERIES} queries",
            "bytes_of_plain_over_stored": ratios(),
            "rows": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
