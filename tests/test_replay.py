"""Recorded traces through the public ops, by the command and by the op that selects for itself."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_rag_ops.assignment import empty_window_state
from longlive_rag_ops.cli import main
from longlive_rag_ops.config import window_slot
from longlive_rag_ops.replay import TOLERANCE, replay, trace_window
from longlive_rag_ops.traces import load_trace

TRACES = sorted((Path(__file__).parent / "data" / "traces").glob("trace_*.safetensors"))
names = {"ids": lambda value: value.stem if isinstance(value, Path) else str(value)}


def test_the_recorded_traces_are_here() -> None:
    assert [path.stem for path in TRACES] == ["trace_batch2_sink3", "trace_head_dim_128", "trace_paper_window"]


@pytest.mark.parametrize("engine", ["auto", "dense", "reference"])
@pytest.mark.parametrize("path", TRACES, **names)
def test_command_replays_the_trace(path: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(path), "--engine", engine]) == 0
    printed = capsys.readouterr().out
    trace = load_trace(path)
    for entry in trace.log:
        for frames in entry["memory_frames"] or []:
            assert " ".join(map(str, frames)) in printed
    assert "agrees with the recording" in printed


@pytest.mark.gpu
@pytest.mark.parametrize("path", TRACES, **names)
def test_command_replays_the_trace_on_cuda(path: Path) -> None:
    assert main(["replay", str(path), "--device", "cuda"]) == 0


@pytest.mark.parametrize("path", TRACES, **names)
def test_the_op_selects_for_itself(path: Path) -> None:
    """`select=True` on one call a block, with the caller keeping index and history: same frames, same outputs."""
    trace = load_trace(path)
    sizes = trace.config
    frames, window, sink, top_k = (sizes[n] for n in ("frames_per_block", "window_frames", "sink_frames", "top_k"))
    total, batch = sizes["blocks"] * frames, sizes["batch"]
    rows = window - sink - top_k + frames
    page = (sizes["tokens_per_frame"], sizes["heads"], sizes["head_dim"])
    pool, staging = torch.zeros(2, batch, window + total, *page), torch.zeros(batch, rows, *page)
    state: dict[str, Any] = {
        "pool_layer": pool,
        "staging": staging,
        "window_state": empty_window_state(batch, window),
        "index": torch.zeros(batch, total, sizes["embedding_dim"]),
        "index_ids": torch.arange(total).repeat(batch, 1),
        "frame_slot": torch.full((batch, total), -1),
        "rope": trace_window(trace).rope,
        "rope_split": sizes["rope"]["split"],
        "grid": sizes["grid"],
        "sink": sink,
        "top_k": top_k,
        "recent_exclude": sizes["recent_exclude"],
    }
    for block, entry in enumerate(trace.log):
        start = entry["start_frame"]
        for forward in range(sizes["forwards_per_block"]):
            q, k, v = (trace.block(block, forward, name) for name in "qkv")
            out, _ = torch.ops.longlive.retrieve_attend(
                q,
                k,
                v,
                **state,
                index_length=torch.tensor([start]),
                start_frame=torch.tensor([start]),
                select=forward == 0,
                place=forward == 0,
            )
            recorded = trace.block(block, forward, "out")
            assert (out - recorded).abs().max() <= TOLERANCE * recorded.square().mean().sqrt()
        memory = [sorted(f for f in row if f >= 0) for row in state["window_state"][:, 0, window - top_k :].tolist()]
        assert memory == [sorted(row) for row in entry["memory_frames"] or [[]] * batch]
        for offset in range(frames):
            frame = start + offset
            pool[0, :, window + frame] = staging[:, frame % rows]
            pool[1, :, window + frame] = pool[1, :, window_slot(frame, sink, window - sink - top_k)]
            state["frame_slot"][:, frame] = window + frame
            state["index"][:, frame] = trace.embedding(block)[:, offset]


def edited(source: Path, target: Path, edit: Any) -> Path:
    """A copy of a trace whose JSON header and data went through ``edit(header, data)``."""
    raw = bytearray(source.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    edit(header, data)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return target


def offset(header: dict[str, Any], name: str) -> int:
    return int(header[name]["data_offsets"][0])


def test_a_wrong_output_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        at = offset(header, "block03.forward2.out")
        (value,) = struct.unpack("<f", data[at : at + 4])
        data[at : at + 4] = struct.pack("<f", value + 1e-3)

    path = edited(TRACES[0], tmp_path / "wrong.safetensors", edit)
    assert [result.block for result in replay(load_trace(path)) if not result.passed] == [3]
    assert main(["replay", str(path)]) == 1
    assert "<- fails" in capsys.readouterr().out


def test_an_output_that_is_not_a_number_fails(tmp_path: Path) -> None:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        at = offset(header, "block00.forward0.out")
        data[at : at + 4] = struct.pack("<f", float("nan"))

    assert main(["replay", str(edited(TRACES[0], tmp_path / "nan.safetensors", edit))]) == 1


def test_a_different_selection_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        log = json.loads(header["__metadata__"]["log"])
        log[-1]["memory_frames"][0].reverse()
        header["__metadata__"]["log"] = json.dumps(log)

    assert main(["replay", str(edited(TRACES[0], tmp_path / "choice.safetensors", edit))]) == 1
    assert "DIFFERS, recorded" in capsys.readouterr().out


def _drop_config(header: dict[str, Any], data: bytearray) -> None:
    del header["__metadata__"]["config"]


def _drop_tensor(header: dict[str, Any], data: bytearray) -> None:
    del header["block02.forward1.k"]


def _wrong_shape(header: dict[str, Any], data: bytearray) -> None:
    header["block02.forward1.k"]["shape"].reverse()


def _wrong_offsets(header: dict[str, Any], data: bytearray) -> None:
    header["block02.forward1.k"]["data_offsets"][1] += 4


def _negative_size(header: dict[str, Any], data: bytearray) -> None:
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps(config | {"top_k": -1})


def _config(**changes: Any) -> Any:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        config = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps(config | changes)

    return edit


def _shape(shape: list[Any]) -> Any:
    def edit(header: dict[str, Any], data: bytearray) -> None:
        header["block02.forward1.k"]["shape"] = shape

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_config, "metadata must have JSON texts config and log"),
        (_drop_tensor, "tensor block02.forward1.k is missing"),
        (_wrong_shape, "tensor block02.forward1.k must have shape"),
        (_wrong_offsets, "tensor block02.forward1.k must have offsets that match its shape"),
        (_negative_size, "config top_k must be an int, at least 0, got -1"),
        (_config(blocks=0), "config blocks must be an int, at least 1, got 0"),
        (_config(rope=None), "config rope must be an object, got None"),
        (_config(grid=6), r"config grid must be [h, w], got 6"),
        (_shape([-1, 3]), "must have offsets that match its shape"),
        (_shape([0.5]), "must have offsets that match its shape"),
        (lambda header, data: header.update(__metadata__=[]), "__metadata__ must be an object, got []"),
        (lambda header, data: header["__metadata__"].update(config=3), "metadata must have JSON texts"),
        (lambda header, data: data.clear(), "is truncated: tensor"),
        (lambda header, data: data.__delitem__(slice(-1, None)), "is truncated: tensor"),
    ],
)
def test_a_damaged_trace_is_named(tmp_path: Path, edit: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(edited(TRACES[0], tmp_path / "bad.safetensors", edit))]) == 2
    error = capsys.readouterr().err
    assert message in error and "bad.safetensors" in error and "Traceback" not in error


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000])
def test_a_truncated_trace_is_named(tmp_path: Path, keep: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(TRACES[0].read_bytes()[:keep])
    assert main(["replay", str(path)]) == 2
    assert "truncated or no safetensors file" in capsys.readouterr().err


def test_files_that_are_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "absent.safetensors")]) == 2
    assert "absent.safetensors cannot be read: No such file" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2
    other = shutil.copy(__file__, tmp_path / "text.safetensors")
    assert main(["replay", str(other)]) == 2
    assert main(["replay", str(TRACES[0]), "--engine", "warp"]) == 2
    assert "engine must be one of auto, reference, dense, triton; got 'warp'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(TRACES[0]), "--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_reader_agrees_with_the_safetensors_package() -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="the safetensors package is not installed")
    for path in TRACES:
        theirs, ours = safetensors.load_file(path), load_trace(path).tensors
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
