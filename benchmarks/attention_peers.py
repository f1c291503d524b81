"""Attention of torch and of other libraries, in place of `window_attend` over a run of slots."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu_contenders import Tensors, dense_backends
from benchmarks.gpu_timer import Call
from benchmarks.harness import Absent, Bench, Entrant, compared
from benchmarks.peers import module, peer

PAGE = 256  # tokens: FlashAttention-2 takes tables of pages of a multiple of this
READY = "sdpa on a ready window"


def ready_window(case: Tensors) -> Call:
    """Dense attention whose keys and values stand in one contiguous piece ``(B, H, N, D)``, in the queries' dtype."""
    q, run = case["q"].transpose(1, 2).contiguous(), case["run"]
    pages = case["pool_layer"][:, :, :run]
    if "k_scale" in case:
        factors = torch.stack([case["k_scale"], case["v_scale"]])[:, :, :run]
        pages = (pages.float() * factors.float()[..., None]).to(q.dtype)
    keys, values = pages.flatten(2, 3).transpose(2, 3).contiguous()
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, keys, values).transpose(1, 2)


def flex_attention(case: Tensors, backend: str = "inductor") -> Call:
    """FlexAttention over the whole pool, with a mask that a table of slots in use decides, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, pool = case["q"].transpose(1, 2), case["pool_layer"]
    slots, tokens = pool.shape[2:4]
    used = torch.arange(slots, device=q.device) < case["run"]
    mask = create_block_mask(
        lambda b, h, query, key: used[key // tokens], None, None, q.shape[2], slots * tokens, device=str(q.device)
    )
    keys, values = pool.flatten(2, 3).transpose(2, 3)
    compiled = _compiled_flex(flex_attention, backend)
    return lambda: compiled(q, keys, values, block_mask=mask).transpose(1, 2)


@functools.cache
def _compiled_flex(function: Any, backend: str) -> Any:
    return torch.compile(function, backend=backend, dynamic=False)


def varlen_table(case: Tensors) -> Call:
    """`torch.nn.attention.varlen` over a table of pages, of one sample: pieces of 256 tokens, which FlashAttention-2
    takes, of the pool's slots in a row, whatever the tokens of a frame.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, pool, run = case["q"], case["pool_layer"], case["run"]
    if q.device.type != "cuda" or q.shape[0] != 1:
        raise Absent("one sample on a CUDA device only")
    keys, values = pool[:, 0].flatten(1, 2)
    used, whole = run * pool.shape[3], keys.shape[0] // PAGE * PAGE
    if whole < used:
        raise Absent(f"the pool's {keys.shape[0]} tokens hold no whole pages of {PAGE} for {used} keys")
    keys, values = (x[:whole].unflatten(0, (-1, PAGE)) for x in (keys, values))
    table = torch.arange(-(-used // PAGE), dtype=torch.int32, device=q.device)[None]
    ends = torch.tensor([0, q.shape[1]], dtype=torch.int32, device=q.device)
    lengths = torch.tensor([used], dtype=torch.int32, device=q.device)
    return lambda: varlen_attn(q[0], keys, values, ends, None, q.shape[1], used, seqused_k=lengths, block_table=table)[
        None
    ]


def flash_attention_4(case: Tensors) -> Call:
    """FlashAttention-4 over the run in place."""
    function = module("flash_attn.cute").flash_attn_func
    keys, values = case["pool_layer"][:, :, : case["run"]].flatten(2, 3)

    def call() -> Any:
        out = function(case["q"], keys, values)
        return out[0] if isinstance(out, tuple) else out

    return call


def flash_infer(case: Tensors) -> Call:
    """FlashInfer over a table of pages that are frames, of one sample, planned beforehand."""
    library = module("flashinfer")
    q, pool, run = case["q"], case["pool_layer"], case["run"]
    if q.device.type != "cuda" or q.shape[0] != 1:
        raise Absent("one sample on a CUDA device only")

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    tokens, heads, head_dim = pool.shape[3:]
    ends, last = ints(0, q.shape[1]), ints(tokens)
    wrapper.plan(
        ends, ints(0, run), ints(*range(run)), last, heads, heads, head_dim, tokens, causal=False, q_data_type=q.dtype
    )
    return lambda: wrapper.run(q[0], (pool[0, 0], pool[1, 0]))[None]


def attention_peers(
    bench: Bench, cases: Sequence[Tensors], exact: torch.Tensor, flops: int, prefix: str = "", every: bool = True
) -> list[Entrant]:
    """Dense attention on a ready window and, with ``every``, all other attention."""

    def right(out: Any) -> str:
        return compared((out, exact))

    entrants = [peer(prefix + READY, cases, ready_window, right, flops=flops)]
    if not every:
        return entrants
    for name, backend in dense_backends(cases[0]["q"]).items():
        if name == "SDPA":  # plain products on a CPU
            continue
        missing = backend if isinstance(backend, str) else ""
        if bench.device == "cpu" and name.startswith("SDPA"):
            missing = "needs a CUDA device" if missing else f"on a CPU it is what {READY} runs on"

        def in_place(case: Tensors, backend: Any = backend) -> Call:
            return functools.partial(backend, case["q"], case["pool_layer"], case["run"])

        entrants.append(peer(f"{prefix}{name}", cases, in_place, right, flops=flops, missing=missing))
    flex = functools.partial(flex_attention, backend="eager" if bench.dry else "inductor")
    for name, make in {
        "varlen, table of pages": varlen_table,
        "flash-attn 4": flash_attention_4,
        "FlashInfer, table of pages": flash_infer,
        "FlexAttention, mask over the pool": flex,
    }.items():
        entrants.append(peer(prefix + name, cases, make, right, flops=flops))
    return entrants
