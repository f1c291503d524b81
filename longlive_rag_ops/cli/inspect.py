"""``longlive-rag inspect``: what a saved bank holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bank.saved_reader import SavedBank

MOST_SHOWN = 20  # damaged pages in the text


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a saved memory bank holds, and check it",
        description="Shows format, frames, generations, index and files of a folder that MemoryBank.save has written. "
        "Checks its manifest, its index and the sizes of its files, with --verify every page. Exits 1 when something "
        "is damaged, 2 when there is no saved bank, or one of a newer version. Writes nothing.",
    )
    parser.add_argument("path", metavar="PATH", help="the folder")
    parser.add_argument("--verify", action="store_true", help="read every page and compare its checksum")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints; 1 when something is damaged."""
    from ..bank import NewerVersion, NoSavedBank, SavedBankError
    from ..bank.saved_reader import SavedBank

    try:
        with SavedBank(args.path) as saved:
            report = describe(saved, args.verify)
    except (NoSavedBank, NewerVersion):
        raise
    except SavedBankError as error:
        report = {"path": args.path, "whole": False, "problems": [str(error)]}
    print(json.dumps(report, indent=2) if args.json else format_text(report))
    return 0 if report["whole"] else 1


def describe(saved: SavedBank, verify: bool) -> dict[str, Any]:
    """What there is to say of an opened saved bank, as JSON has it; with ``verify``, after reading every page."""
    from ..bank.saved_manifest import VERSION

    manifest, contents = saved.manifest, saved.contents
    form, frames, index = manifest.format, list(manifest.frames), contents.index
    damaged = [page._asdict() for frame in frames for page in saved.verify(frame)] if verify else []
    generations = Counter(manifest.frames.values())
    report: dict[str, Any] = {
        "path": str(saved.path),
        "version": VERSION,
        "written_by": manifest.written_by,
        "format": form.to_dict(),
        "page_bytes": form.page_bytes,
        "frame_bytes": form.record_bytes,
        "sink": manifest.sink,
        "frames": runs(frames),
        "frame_count": len(frames),
        "generations": {str(generation): generations[generation] for generation in sorted(generations)},
        "index": {
            "frames": 0 if index is None else len(index.frames),
            "embedding_dim": manifest.index.embedding_dim,
            "dtype": manifest.index.dtype,
            "never_found": 0 if index is None else int(index.embeddings.isnan().all(-1).sum()),
        },
        "retrievals": sum(contents.retrievals.values()),
        "files": {entry.file: entry.bytes for entry in (manifest.pages, manifest.index)},
        "left_over": _left_over(saved),
        "verified_pages": len(frames) * form.layers * form.samples if verify else 0,
        "damaged_pages": damaged,
        "problems": saved.problems,
    }
    return {**report, "whole": not saved.problems and not damaged}


def runs(numbers: list[int]) -> str:
    """Ascending numbers for people: ``0-4, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def format_text(report: dict[str, Any]) -> str:
    """The report for people."""
    problems = [f"DAMAGED: {problem}" for problem in report["problems"]]
    if "version" not in report:
        return "\n".join([f"{report['path']}: a saved bank that cannot be opened", *problems])
    form, index, count = report["format"], report["index"], report["frame_count"]
    generations = ", ".join(f"{frames} of generation {number}" for number, frames in report["generations"].items())
    lines = [
        f"{report['path']}: saved bank, version {report['version']}, written by {report['written_by']}",
        f"format    {form['storage']}, {form['layers']} layers x {form['samples']} samples; pages of "
        f"{form['tokens_per_frame']} tokens x {form['kv_heads']} heads x {form['head_dim']}, {form['dtype']}, "
        f"{report['page_bytes']} bytes",
        f"frames    {count}: {report['frames'] or 'none'}; sink {report['sink']}; {report['frame_bytes']} bytes each",
        f"          {generations or 'no generations'}",
        f"index     {index['frames']} frames, embeddings of {index['embedding_dim']} {index['dtype']}, "
        f"{index['never_found']} not finite; found {report['retrievals']} times",
        *(f"file      {name}, {size} bytes" for name, size in report["files"].items()),
        *(f"left over {name}, {size} bytes (the next save removes it)" for name, size in report["left_over"].items()),
    ]
    damaged = report["damaged_pages"]
    for page in damaged[:MOST_SHOWN]:
        where = f"frame {page['frame']}, layer {page['layer']}, sample {page['sample']}"
        problems.append(f"DAMAGED: {where}: {page['reason']}")
    if len(damaged) > MOST_SHOWN:
        problems.append(f"DAMAGED: {len(damaged) - MOST_SHOWN} more pages")
    pages = f"{report['verified_pages']} pages" if report["verified_pages"] or not count else "pages not (--verify)"
    lost = len({page["frame"] for page in damaged})
    verdict = f"damaged pages {len(damaged)}, frames lost {lost}" if damaged else "whole" if not problems else "damaged"
    return "\n".join([*lines, *problems, f"checked   manifest, index, sizes, {pages}: {verdict}"])


def _left_over(saved: SavedBank) -> dict[str, int]:
    from ..bank.saved_manifest import DATA_NAME

    named = {saved.manifest.pages.file, saved.manifest.index.file}
    found = [path for path in Path(saved.path).iterdir() if DATA_NAME.fullmatch(path.name) and path.name not in named]
    return {path.name: path.lstat().st_size for path in sorted(found)}
