"""The dense engine's attention: which back end serves a call, and that each is given and gives what it should."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from tolerance import assert_close_enough
from torch._subclasses.fake_tensor import FakeTensorMode

from longlive_rag_ops import dense_attention, dense_backends, paged_attention, reference
from longlive_rag_ops.dense_backends import BACK_ENDS, CPU, CUDNN, FLASH, FLASH_ATTN_3, MATH, BackEnd, Facts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H100 = Facts("cuda", 90, torch.bfloat16, head_dim=128, keys=18720)
SHAPES = {  # samples, queries, keys, query heads, key-value heads, head dim
    "plain": (2, 37, 70, 4, 4, 32),
    "grouped": (2, 21, 50, 6, 2, 128),
    "narrow": (1, 5, 7, 2, 2, 8),
}


def operands(shape: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """q ``(B, S, Hq, D)``, keys and values ``(B, N, Hkv, D)``."""
    samples, length, tokens, heads, kv_heads, head_dim = SHAPES[shape]
    rng = cases.generator(4)
    sizes = ((samples, length, heads, head_dim), *2 * ((samples, tokens, kv_heads, head_dim),))
    return [torch.randn(*size, generator=rng).to(DEVICE, dtype) for size in sizes]


def exact_and_plain(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None) -> list[Any]:
    """Output and log-sum-exp by the oracle, and by plain PyTorch in the operands' dtype (float32 softmax)."""
    results = []
    for dtype in (torch.float64, q.dtype):
        wide = reference.lse_dtype(dtype)
        group = q.shape[2] // keys.shape[2]
        many = [x.to(dtype).repeat_interleave(group, 2) for x in (keys, values)]
        factor = q.shape[3] ** -0.5 if scale is None else scale
        logits = torch.einsum("bshd,bthd->bhst", q.to(dtype), many[0]).to(wide) * factor
        out = torch.einsum("bhst,bthd->bshd", logits.softmax(-1).to(dtype), many[1])
        results.append((out, logits.logsumexp(-1)))
    return results


def assert_right(back_end: BackEnd, shape: str, dtype: torch.dtype, scale: float | None, return_lse: bool) -> None:
    q, keys, values = operands(shape, dtype)
    out, lse = dense_attention.attend(q, keys, values, scale, return_lse, back_end)
    exact, plain = exact_and_plain(q, keys, values, scale)
    assert out.dtype == dtype and out.is_contiguous()
    assert lse.dtype == reference.lse_dtype(dtype)
    assert lse.shape == ((q.shape[0], q.shape[2], q.shape[1]) if return_lse else (0,))
    for got, other, want in zip((out, lse) if return_lse else (out,), plain, exact, strict=False):
        if dtype == torch.float64:  # there is nothing more exact to compare with
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        else:
            assert_close_enough(got, other, want)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_plain_products_in_pieces(
    dtype: torch.dtype, shape: str, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_backends, "SCORES", 2_000)  # a few queries at a time, the last piece shorter
    assert_right(MATH, shape, dtype, scale, return_lse=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's kernel")
@pytest.mark.parametrize("return_lse", [True, False])
@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_for_cpus(shape: str, scale: float | None, return_lse: bool) -> None:
    assert_right(CPU, shape, torch.float32, scale, return_lse)


@pytest.mark.gpu
@pytest.mark.parametrize("return_lse", [True, False])
@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=lambda back_end: back_end.name)
def test_every_back_end_of_this_machine(
    back_end: BackEnd, dtype: torch.dtype, shape: str, scale: float | None, return_lse: bool
) -> None:
    q, keys, values = operands(shape, dtype)
    facts = dense_backends.facts(*(x.transpose(1, 2) for x in (q, keys, values)))
    reason = dense_backends.why_not(back_end, facts)
    if reason is not None:
        pytest.skip(reason)
    assert_right(back_end, shape, dtype, scale, return_lse)


@pytest.mark.gpu
def test_a_run_is_attended_to_without_waiting_for_the_device() -> None:
    pool = torch.randn(2, 2, 6, 96, 4, 64, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, 96, 8, 64, device="cuda", dtype=torch.bfloat16)
    dense_attention.window_attend(q, pool, run=5, return_lse=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dense_attention.window_attend(q, pool, run=4)
        dense_attention.window_attend(q, pool, run=4, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_is_attended_to_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in cases.attend(table="run").items()}
    seen: list[torch.Tensor] = []
    choose = dense_backends.select

    def spy(wanted: Facts) -> BackEnd:
        chosen = choose(wanted)
        return replace(chosen, attend=lambda *args: (seen.extend(args[1:3]), chosen.attend(*args))[1])

    monkeypatch.setattr(dense_backends, "select", spy)
    for slots, calls, in_place in (
        (None, 1, True),
        ([[4, 5, 6, -1], [4, 5, 6, -1]], 1, True),
        ([[4, -1, 5, -1], [0, 1, -1, -1]], 2, True),
        ([[4, 0, 6, -1], [4, 0, 6, -1]], 1, False),
    ):
        seen.clear()
        table = {"slots": torch.tensor(slots, device=DEVICE), "run": None} if slots else {}
        out = dense_attention.window_attend(**case | table)
        want = reference.window_attend(**case | table)
        assert len(seen) == 2 * calls
        shared = case["pool_layer"].untyped_storage().data_ptr()
        assert all((x.untyped_storage().data_ptr() == shared) == in_place for x in seen)
        for got, exact in zip(out, want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def present(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes the machine have these back ends, ``math`` and no others."""
    for attribute, back_end in vars(dense_backends).copy().items():
        if isinstance(back_end, BackEnd) and back_end is not MATH:
            reason = None if back_end.name in names else "not here"
            monkeypatch.setattr(dense_backends, attribute, replace(back_end, missing=lambda reason=reason: reason))


@pytest.mark.parametrize(
    ("machine", "call", "expected"),
    [
        ("cudnn flash flash_attn_2 flash_attn_3", {}, "cudnn"),
        ("flash flash_attn_2 flash_attn_3 flash_attn_4", {}, "flash_attn_3"),
        ("flash flash_attn_3 flash_attn_4", {"architecture": 100}, "flash_attn_4"),
        ("cudnn flash flash_attn_2", {"architecture": 80}, "flash"),
        ("cudnn flash flash_attn_2 flash_attn_3", {"architecture": 120}, "flash"),
        ("cudnn", {"architecture": 89}, "cudnn"),
        ("cudnn flash", {"keys": 1}, "flash"),
        ("cudnn flash", {"reach": 2**31}, "flash"),
        ("cudnn flash", {"head_dim": 192}, "flash"),
        ("cudnn flash flash_attn_2", {"head_dim": 20}, "math"),
        ("cudnn flash flash_attn_2", {"head_dim": 264}, "math"),
        ("cudnn flash flash_attn_2", {"dtype": torch.float32}, "math"),
        ("cudnn flash flash_attn_2", {"dtype": torch.float64}, "math"),
        ("cudnn flash flash_attn_2", {"architecture": 75}, "math"),
        ("cpu cudnn", {"device": "cpu", "architecture": 0}, "cpu"),
        ("", {}, "math"),
    ],
)
def test_selection(machine: str, call: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, *machine.split())
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    assert dense_backends.select(replace(H100, **call)).name == expected


def test_selection_heeds_what_the_process_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, "cudnn", "flash")
    torch.use_deterministic_algorithms(True)
    try:
        assert dense_backends.select(H100).name == "flash"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert dense_backends.select(H100).name == "flash"
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert dense_backends.select(H100).name == "math"


@pytest.mark.parametrize(("version", "usable"), [(91002, False), (91500, False), (91501, True), (91900, True)])
def test_a_cudnn_that_errs_is_not_used(version: int, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    reason = CUDNN.missing()
    assert (reason is None) == usable
    assert usable or "9.15.1" in str(reason)


def test_obstacles_name_what_was_given() -> None:
    for call, message in (
        ({"dtype": torch.float32}, "takes float16 and bfloat16 only, got torch.float32"),
        ({"head_dim": 257}, "multiple of 8 and at most 256, got 257"),
        ({"architecture": 75}, "8.0 or newer, got 7.5"),
        ({"device": "cpu", "architecture": 0}, "CUDA devices only, the tensors are on cpu"),
    ):
        assert message in str(FLASH.obstacle(replace(H100, **call)))
    assert "compute capability 9.x, got 10.0" in str(FLASH_ATTN_3.obstacle(replace(H100, architecture=100)))
    assert FLASH_ATTN_3.obstacle(H100) is None


def test_report_has_every_back_end() -> None:
    rows = dense_backends.report()
    assert [row["name"] for row in rows] == [back_end.name for back_end in BACK_ENDS]
    assert all(row["available"] == (row["reason"] is None) and row["summary"] for row in rows)


def test_operands_are_copied_only_where_kernels_could_not_load_them() -> None:
    x = torch.zeros(2, 3, 4, 16, dtype=torch.bfloat16)
    for view in (x, x.transpose(1, 2), x[1:], x[:, :, ::2], x[:, :, :, :8]):
        assert dense_backends.aligned(view) is view
    for view in (x[..., ::2], x[..., 4:12], torch.zeros(2, 3, 4, 18, dtype=torch.bfloat16)[..., :16], x.mT):
        copy = dense_backends.aligned(view)
        assert copy is not view and copy.is_contiguous() and torch.equal(copy, view)


# --- TF32 -------------------------------------------------------------------------------------------------------------


def precision() -> tuple[str, ...]:
    """What the process chose, under the old name ("mixed" where torch refuses to say) and under the new ones."""
    backends: Any = torch.backends
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "mixed"
    return (
        old,
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.fp32_precision,
    )


@pytest.fixture
def restored() -> Iterator[None]:
    before = precision()
    yield
    backends: Any = torch.backends
    backends.fp32_precision = before[3]
    torch.set_float32_matmul_precision(before[0])
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = before[1:3]
    assert precision() == before


@pytest.mark.parametrize("chosen", ["default", "highest", "high", "medium", "old flag", "new", "everywhere"])
def test_float32_stays_ieee_and_the_choice_of_the_process_too(chosen: str, restored: None) -> None:
    backends: Any = torch.backends
    if chosen in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(chosen)
    elif chosen == "old flag":
        backends.cuda.matmul.allow_tf32 = True
    elif chosen == "new":
        backends.cuda.matmul.fp32_precision = "tf32"
    elif chosen == "everywhere":
        backends.fp32_precision = "tf32"
    before = precision()
    with dense_backends.ieee_products():
        assert precision()[1] in ("ieee", "none") and not backends.cuda.matmul.allow_tf32  # the latter raises if mixed
        assert precision()[1] == "ieee" or precision()[3] != "tf32"
    assert precision() == before


# --- packages, with stand-ins -----------------------------------------------------------------------------------------


def plain_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Any:
    """``flash_attn_func``'s layout: tensors ``(B, S, H, D)``, log-sum-exp ``(B, H, S)``."""
    assert scale is not None and scale >= 0  # these kernels take the largest product for the largest logit
    return exact_and_plain(q, k, v, scale)[1]


def with_flag(q: Any, k: Any, v: Any, softmax_scale: Any = None, num_splits: int = 0, return_lse: bool = False) -> Any:
    assert num_splits == 1
    out, lse = plain_flash(q, k, v, softmax_scale)
    return (out, lse) if return_lse else out


def version_2(q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, return_attn_probs: Any = 0):
    assert dropout_p == 0.0
    out, lse = plain_flash(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def always_both(q: Any, k: Any, v: Any, softmax_scale: Any = None) -> Any:
    return tuple(plain_flash(q, k, v, softmax_scale))


@pytest.mark.parametrize("function", [with_flag, version_2, always_both])
@pytest.mark.parametrize("scale", [0.4, -0.4])
@pytest.mark.parametrize("return_lse", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_packages_are_called_by_what_their_version_takes(
    shape: str, return_lse: bool, scale: float, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    dense_backends._package.cache_clear()
    try:
        assert FLASH_ATTN_3.missing() is None
        assert_right(FLASH_ATTN_3, shape, torch.float32, scale, return_lse)
    finally:
        dense_backends._package.cache_clear()


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), None])
def test_a_package_that_cannot_be_imported_says_why(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None if error is None else ModuleType("no function"))
    dense_backends._package.cache_clear()
    try:
        assert "flash_attn_interface" in str(FLASH_ATTN_3.missing())
    finally:
        dense_backends._package.cache_clear()


# --- what torch declares of its kernels, without a GPU ----------------------------------------------------------------


@pytest.mark.parametrize("return_lse", [True, False])
@pytest.mark.parametrize("back_end", [CUDNN, FLASH, MATH], ids=lambda back_end: back_end.name)
def test_shapes_of_kernels_on_cuda(back_end: BackEnd, return_lse: bool) -> None:
    samples, length, tokens, heads, kv_heads, head_dim = SHAPES["grouped"]
    q = torch.empty(samples, length, heads, head_dim, device="meta", dtype=torch.bfloat16)
    pool = torch.empty(2, samples, 5, tokens, kv_heads, head_dim, device="meta", dtype=torch.bfloat16)
    keys, values = dense_attention._pages(pool, (1, 2, 3))
    out, lse = dense_attention.attend(q, keys, values, 0.3, return_lse, back_end)
    assert out.shape == q.shape and out.is_contiguous() and out.dtype == q.dtype
    assert lse.shape == ((samples, heads, length) if return_lse else (0,)) and lse.dtype == torch.float32


# --- paged attention --------------------------------------------------------------------------------------------------


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any,
    scale: float | None,
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `torch.nn.attention.varlen.varlen_attn` documents, with garbage where a sample has no keys."""
    assert return_aux.lse and num_splits == 1 and enable_gqa == (query.shape[1] != key.shape[2])
    assert {x.dtype for x in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert scale is not None and scale >= 0 and bool((block_table >= 0).all())
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    for b in range(len(seqused_k)):
        rows, used = slice(int(cu_seq_q[b]), int(cu_seq_q[b + 1])), int(seqused_k[b])
        assert rows.stop - rows.start <= max_q and used <= max_k == int(cu_seq_k[b + 1] - cu_seq_k[b])
        pages = block_table[b].long()
        keys, values = (x[pages].flatten(0, 1)[None, :used] for x in (key, value))
        if used == 0:
            out[rows], lse[:, rows] = torch.nan, torch.inf
            continue
        one = exact_and_plain(query[None, rows], keys, values, scale)[1]
        out[rows], lse[:, rows] = one[0][0], one[1][0]
    return out, lse


@pytest.mark.parametrize("table", ["slots", "empty"])
@pytest.mark.parametrize("scale", [0.4, -0.4])
def test_paged_attention_packs_the_table(table: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(paged_attention, "PAGE", 2)  # three pages a frame
    case = cases.attend(table=table) | {"scale": scale}
    out, lse = paged_attention.attend(case["q"], case["pool_layer"], case["slots"], scale)
    want = reference.window_attend(**case)
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)


def test_paged_attention_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.attend()
    assert "CUDA devices only" in str(paged_attention.obstacle(case["q"], case["pool_layer"]))
    present(monkeypatch, "flash")
    monkeypatch.setattr(paged_attention, "missing", lambda: None)
    monkeypatch.setattr(dense_backends, "architecture_of", lambda device: 90)
    with FakeTensorMode():
        for tokens, dtype, slots, message in (
            (512, torch.bfloat16, 6, None),
            (1560, torch.bfloat16, 6, "tokens_per_frame must be a multiple of 256, got 1560"),
            (512, torch.bfloat16, 5, "must be contiguous"),
            (512, torch.float32, 6, "float16 and bfloat16 only"),
        ):
            q = torch.empty(2, 1024, 8, 128, device="cuda", dtype=dtype)
            pool = torch.empty(2, 2, 6, tokens, 8, 128, device="cuda", dtype=dtype).narrow(2, 0, slots)
            reason = paged_attention.obstacle(q, pool)
            assert reason is None if message is None else message in str(reason)


def test_paged_attention_fits_torchs_declaration() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        pytest.skip(f"torch {torch.__version__} takes no table of pages")
    q = torch.empty(2, 48, 8, 128, device="meta", dtype=torch.bfloat16)
    pool = torch.empty(2, 2, 6, 512, 4, 128, device="meta", dtype=torch.bfloat16)
    slots = torch.empty(2, 5, device="meta", dtype=torch.int64)
    out, lse = paged_attention.attend(q, pool, slots, None)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (2, 8, 48) and lse.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_tables_on_a_gpu(dtype: torch.dtype, scale: float | None) -> None:
    rng = cases.generator(6)
    q = torch.randn(3, 100, 4, 64, generator=rng).to("cuda", dtype)
    pool = torch.randn(2, 3, 6, 256, 2, 64, generator=rng).to("cuda", dtype)
    slots = torch.tensor([[5, -1, 0, 3], [-1, -1, -1, -1], [1, 2, 3, -1]], device="cuda")
    for table in (slots, slots[[0, 0, 0]]):
        exact = reference.window_attend(q.double(), pool.double(), table, None, scale, True)
        out, lse = dense_attention.window_attend(q, pool, table, None, scale, True)
        torch.testing.assert_close(out.double(), exact[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), exact[1], rtol=1e-3, atol=1e-3)
    if paged_attention.obstacle(q, pool) is None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            dense_attention.window_attend(q, pool, slots, None, scale, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", ["shifts", "int8"])
def test_placed_pages_on_a_gpu(table: str, dtype: torch.dtype) -> None:
    case = cases.attend(dtype, table)
    there = {name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    for got, want in zip(dense_attention.window_attend(**there), reference.window_attend(**there), strict=True):
        few = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(got, want, rtol=few, atol=few)


@pytest.mark.gpu
@pytest.mark.parametrize("gap", [1, 2], ids=["shifted by 6 bytes", "every second channel"])
@pytest.mark.parametrize("return_lse", [True, False])
def test_odd_strides_on_a_gpu(gap: int, return_lse: bool) -> None:
    case = cases.attend(torch.bfloat16, "run", head_dim=64) | {"return_lse": return_lse}
    case |= {name: case[name].to("cuda") for name in ("q", "pool_layer")}
    odd = dict(case)
    for name in ("q", "pool_layer"):
        wide = torch.zeros(*case[name].shape[:-1], gap * 64 + 3, device="cuda", dtype=torch.bfloat16)
        odd[name] = wide[..., 3::gap][..., :64].copy_(case[name])
    for got, want in zip(dense_attention.window_attend(**odd), dense_attention.window_attend(**case), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
