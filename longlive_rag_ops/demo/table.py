"""The summary that is printed: plain text, made from ``report.json``'s object alone."""

from collections.abc import Sequence
from typing import Any

__all__ = ["summary_text"]

TIERS = ("device", "host", "disk")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left column left-aligned, others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "   ".join(cells).rstrip())
    return [lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]]


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _footages(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One run of each footage: what was retrieved does not depend on the weights."""
    first: dict[str, dict[str, Any]] = {}
    for run in report["runs"]:
        first.setdefault(run["footage"], run)
    return list(first.values())


def _retrieval(run: dict[str, Any]) -> list[str]:
    blocks = [block for block in run["blocks"] if block["retrieved"]]
    lines = [f"{run['footage']}: {run['title']} ({run['frames']} latent frames, {len(run['blocks'])} blocks)"]
    if run["note"]:
        lines.append(f"  note: {run['note']}")
    scenes = [scene["name"] for scene in run["scenes"]]
    if not scenes:
        ages = [block["query_frame"] - frame for block in blocks for frame in block["retrieved"]]
        best = [block["cosines"][0] for block in blocks]
        age, highest = sum(ages) / max(1, len(ages)), sum(best) / max(1, len(best))
        return [
            *lines,
            f"  {len(blocks)} blocks retrieved {len(ages)} frames, on average {age:.0f} latent frames before the "
            f"query; mean highest cosine {highest:.3f}.",
            "  The scenes of this video are not known, so nothing is said about which frames would be right.",
            "",
        ]
    origin, best_cosine = run["summary"]["retrieved_from"], run["summary"]["best_cosine"]
    rows = [
        [
            f"in {name}",
            str(origin[name]["retrieved_frames"]),
            *(_percent(origin[name].get(s)) for s in scenes),
            f"{best_cosine[name]:.3f}" if name in best_cosine else "-",
        ]
        for name in scenes
    ]
    lines += _table(["blocks", "retrieved", *(f"from {name}" for name in scenes), "best cosine"], rows)
    returned = run["summary"]["return"]
    if returned is None:
        return [*lines, "  no scene returns: there is nothing right to find", ""]
    lines += ["", f"  share of retrieved frames that come from {returned['earlier']}, in {returned['later']}:"]
    rows = [
        [text, _percent(row["similarity"]), _percent(row["random"]), _percent(row["newest_eligible"])]
        for text, row in (
            ("all blocks", returned["all_blocks"]),
            ("after the first block", returned["after_the_first_block"]),
        )
    ]
    lines += _table(["", "by similarity", "at random", "newest eligible"], rows)
    return [*lines, ""]


def _coverage(report: dict[str, Any]) -> list[str]:
    names = ("fixed", "sliding", "newest_eligible", "random", "retrieved", "best")
    header = ["footage, weights, blocks", "sink+local", "sliding", "newest old", "random", "retrieved", "best choice"]
    lines = ["share of full-history attention mass that the window holds (windows of equal size, but for sink+local):"]
    rows = []
    for run in report["runs"]:
        for positions, group, text in (
            ("coverage", "full_window_blocks", "all with a full window"),
            ("coverage", "later_scene_after_the_first_block", "returned scene"),
            ("coverage_sliding_positions", "later_scene_after_the_first_block", "returned scene (*)"),
        ):
            row = run["summary"][positions].get(group)
            if row:
                name = f"{run['footage']}, {run['weights']}, {text}"
                rows.append([name, *(_percent(row[key]) for key in names)])
    lines += _table(header, rows)
    if any("(*)" in row[0] for row in rows):
        lines.append(
            "  (*) the newest W - S frames weighed at the positions that a sliding window gives them, not at 0;"
        )
        lines.append("      'returned scene' leaves out its first block, which still searches for the scene before")
    return [*lines, ""]


def _times(report: dict[str, Any]) -> list[str]:
    device = report["device"]
    rows = []
    for run in report["runs"]:
        ms, held = run["summary"]["milliseconds"], run["summary"]["bytes_held"]
        cells = [f"{ms[name]:.1f}" for name in ("total", "retrieval", "attention", "rest")]
        rows.append([f"{run['footage']}, {run['weights']}", *cells, _bytes(held["history"]), _bytes(held["total"])])
    return [
        f"median milliseconds a block of 3 latent frames (5 forwards x {report['model']['layers']} layers), float32, "
        f"{device['cpu']}, threads: {device['threads']}, torch {device['torch']}, "
        f"load average {device['load_average']}:",
        *_table(["footage, weights", "total", "retrieval", "attention", "rest", "history", "bytes held"], rows),
        "",
    ]


def _bank(report: dict[str, Any]) -> list[str]:
    bank = report["bank"]
    if bank is None:
        return []
    limits, rows = bank["limits"], []
    for name, stats in bank["statistics"].items():
        tiers = [f"{stats[tier]['frames']} ({_bytes(stats[tier]['bytes'])})" for tier in TIERS]
        hits = [str(stats[f"hits_{tier}"]) for tier in TIERS]
        rows.append([name, *tiers, *hits, str(stats["misses"]), str(stats["forgotten_frames"])])
    disk = f", disk {_bytes(limits['disk_bytes'])}" if limits["disk_bytes"] else ""
    lines = [
        f"memory bank ({limits['storage']} pages; host {_bytes(limits['host_bytes'])}{disk}): frames held at the end, "
        "and where fetched frames were found:",
        *_table(
            ["footage, weights", *TIERS, *(f"from {tier}" for tier in TIERS), "missing", "forgotten"],
            rows,
        ),
    ]
    check = bank["bit_for_bit"]
    if check is not None:
        lines.append(
            f"  bfloat16, compared with {check['compared_with']}: {check['equal']} of {check['blocks']} blocks are "
            "equal bit for bit"
        )
    return [*lines, ""]


def _ranks(report: dict[str, Any]) -> list[str]:
    ranks = report["ranks"]
    if ranks is None:
        return []
    frames, heads, compared = ranks["frame_ranks"], ranks["head_ranks"], ranks["compared"]
    transfer = "" if ranks["transfer"] is None else f"; what others keep comes by {ranks['transfer']}"
    return [
        f"{frames * heads} ranks: frames over {frames}, heads over {heads}{transfer}. Beside one process: "
        f"{compared['same_selections']} of {compared['blocks']} blocks retrieved the same frames; largest error of an "
        f"attention output {compared['largest_error']:.1e} of their root mean square, "
        f"{compared['allowed_error']:.0e} is allowed.",
        "",
    ]


def summary_text(report: dict[str, Any]) -> str:
    """What the demo prints at its end, some forty lines."""
    lines = [f"frames are found by {report['embedder']['name']}: {report['embedding']}", ""]
    for run in _footages(report):
        lines += _retrieval(run)
    return "\n".join([*lines, *_coverage(report), *_bank(report), *_ranks(report), *_times(report)])
