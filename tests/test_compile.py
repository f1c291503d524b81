"""``longlive-rag compile``: every kernel as shipped, for every architecture, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longlive_rag_ops import cli
from longlive_rag_ops.cli import compile as command
from longlive_rag_ops.triton_kernels.configs import CONFIGS, Config, family

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="compiles with triton, which is not installed"
)
ARCHITECTURES = (80, 90, 100, 120)
RECORDED_WITH = "3.7.1"


def environment(**changes: str) -> dict[str, str]:
    """Without the interpreter, which the tests of one process cannot be in and out of."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes


def start(*words: str, **changes: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], env=environment(**changes), **pipes)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One kernel a row and architecture; for sm_90 also the variants of the paper's shape."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def compiling(*words: str) -> subprocess.Popen[str]:
        # The variable makes no difference to the command: it leaves the interpreter.
        command = ("-m", "longlive_rag_ops", "compile", "--json", *words)
        return start(*command, TRITON_CACHE_DIR=cache, TRITON_INTERPRET="1")

    running = [compiling("--quick", "--arch", "80,120"), compiling("--quick", "--arch", "90,100")]
    running.append(compiling("--arch", "90", "--kernel", "16, D 128"))
    kernels: list[dict[str, Any]] = []
    version = ""
    for process in running:
        out, err = process.communicate()
        assert process.returncode in (0, 1), err
        report = json.loads(out)
        assert process.returncode == any(kernel["problems"] for kernel in report["kernels"])
        kernels, version = kernels + report["kernels"], report["triton"]
    return {"triton": version, "kernels": kernels}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("row", CONFIGS, ids=lambda row: f"{row.kernel}/{row.shape}/{row.families[0]}")
def test_each_row_compiles_to_what_it_is_there_for(reports: dict[str, Any], row: Config, architecture: int) -> None:
    if family(architecture) not in row.families:
        pytest.skip(f"not a row for sm_{architecture}")
    kernels = [
        kernel
        for kernel in reports["kernels"]
        if kernel["architecture"] == architecture and kernel["row"] == f"{row.kernel}/{row.shape}"
    ]
    assert kernels, "no case of compile_cases.py meets this row"
    for kernel in kernels:
        assert kernel["spilled"] == 0 or reports["triton"] != RECORDED_WITH, kernel
        assert 0 < kernel["registers"] <= 255, kernel
        assert kernel["shared"] <= kernel["shared_limit"], kernel
        assert kernel["num_warps"] == row.num_warps, kernel
        assert kernel["problems"] == [] or reports["triton"] != RECORDED_WITH, kernel
    # Tiles that the tensor memory accelerator reads, of as many queries as wgmma takes.
    if architecture == 90 and row.shape.endswith("descriptors") and row.constants["BLOCK_M"] >= 64:
        assert row.warpgroup is not None  # which problems() holds against what was compiled
        for kernel in kernels:
            assert set(kernel["matrix"]) & {"HGMMA", "IGMMA"}, kernel
            assert "UTMALDG" in kernel["copies"], kernel


@pytest.mark.slow
def test_no_case_fails(reports: dict[str, Any]) -> None:
    """Kernels without a row as well."""
    problems = [(kernel["cases"], kernel["problems"]) for kernel in reports["kernels"] if kernel["problems"]]
    assert problems == [] or reports["triton"] != RECORDED_WITH


SPILLING = """
import sys
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from longlive_rag_ops import cli
from longlive_rag_ops.triton_kernels import compile_cases, configs, launch

configs.CONFIGS += (configs.Config("greedy", configs.EVERY, "fake", {"BLOCK": 16384}, num_warps=1),)


@triton.jit
def greedy_kernel(x, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b = tl.load(x + o)
    tl.store(x + o, b / tl.sum(b, 0))


def run():
    x = torch.empty(16384, device="meta")
    row = configs.config("greedy", launch.device_of(x).architecture, "fake")
    launch.launch(greedy_kernel, (1,), x, **row.constants, num_warps=row.num_warps)


def fail():
    raise ValueError("the reason")


compile_cases.CASES = (
    SimpleNamespace(op="greedy", name="fake case", run=run),
    SimpleNamespace(op="broken", name="other case", run=fail),
)
sys.exit(cli.main(["compile", "--arch", "90", *sys.argv[1:]]))
"""


def test_a_kernel_that_spills_or_does_not_compile_fails_the_command_and_is_named(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)  # Triton reads a kernel's source from its file
    process = start(str(script), "--dump", str(tmp_path / "dump"), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    out, err = process.communicate()
    assert process.returncode == 1, err
    problems = [line for line in out.splitlines() if line.startswith("PROBLEM")]
    assert len(problems) == 2
    assert problems[0].startswith("PROBLEM: sm_90 greedy_kernel (fake case, row greedy/fake) spills ")
    assert problems[1] == "PROBLEM: sm_90 broken (other case) does not compile: ValueError: the reason"
    assert out.rstrip().endswith("2 of 2 kernels have a problem")
    stem = "greedy_kernel-fake_case-sm_90"
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == [
        f"{stem}.{stage}" for stage in ("cubin", "ptx", "sass", "ttgir")
    ]
    assert "STL" in (tmp_path / "dump" / f"{stem}.sass").read_text()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", ["compile", "--arch", "80,85"]),
        ("sys.modules['triton'] = None;", ["compile"]),
        ("", ["compile", "--kernel", "no such kernel"]),
    ],
)
def test_wrong_input_is_named(code: str, words: list[str]) -> None:
    process = start("-c", f"import sys; {code} from longlive_rag_ops import cli; sys.exit(cli.main({words}))")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.strip().startswith(
        {
            "80,85": "error: --arch must name architectures among 80, 89, 90, 100, 120; got '85'",
            "compile": 'error: compile needs triton (pip install "longlive-rag-ops[gpu]"), which cannot be imported: ',
            "no such kernel": "error: --kernel must occur in a case, such as ",
        }[words[-1]]
    )


def test_a_process_in_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["compile"]) == 2
    assert "compile needs a process without TRITON_INTERPRET" in capsys.readouterr().err
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_the_table_shows_what_is_known() -> None:
    from longlive_rag_ops.triton_kernels.compile_report import Compiled

    attend = Compiled(
        90, "attend", ["first", "second"], "attend/any", {"BLOCK_M": 128, "T": 7}, 8, 3, 168, 0, 512, 1024
    )
    attend.matrix, attend.copies, attend.warpgroup = {"HGMMA": 8, "IGMMA": 4}, {"UTMALDG": 6}, 4
    unseen = Compiled(
        100, "attend", ["first"], None, {}, 8, 3, 99, 16, 512, 1024, problems=["spills 16 bytes a thread"]
    )
    lines = command.format_text("3.7.1", [90, 100], [attend, unseen]).splitlines()
    assert lines[0] == "sm_90, triton 3.7.1, 1 kernels"
    assert re.split(r" {2,}", lines[2].strip()) == [
        *("attend", "first (+1)", "BLOCK_M=128", "8", "3", "168", "0", "512/1024"),
        *("HGMMA 8 IGMMA 4", "UTMALDG 6", "4"),
    ]
    assert lines[6].split() == ["attend", "first", "-", "8", "3", "99", "16", "512/1024", "-", "-", "-"]
    assert lines[-2:] == [
        "PROBLEM: sm_100 attend (first) spills 16 bytes a thread",
        "1 of 2 kernels have a problem",
    ]


def test_what_counts_as_a_problem() -> None:
    from longlive_rag_ops.triton_kernels import compile_report

    def problems(expected: int | None = None, **fields: Any) -> list[str]:
        return compile_report.problems(compile_report.Compiled(90, "attend", shared_limit=1024, **fields), expected)

    assert problems(shared=1024, tensor_memory=512) == []
    assert problems(spilled=8) == ["spills 8 bytes a thread"]
    assert problems(shared=1025) == ["takes 1025 bytes of shared memory, a block may take 1024"]
    assert problems(tensor_memory=1024) == ["takes 1024 columns of tensor memory, there are 512"]
    recorded = compile_report.triton.__version__ == RECORDED_WITH
    assert problems(4, warpgroup=24) == ["has 24 WARPGROUP instructions, recorded are 4"] * recorded
    assert problems(4, warpgroup=4) == problems(4, warpgroup=None) == problems(None, warpgroup=24) == []
