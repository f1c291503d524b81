"""How exact an engine must be: no hand-picked numbers, plain PyTorch in the same precision is the measure."""

from __future__ import annotations

import torch

RELATIVE_RMS = 0.005  # of the error to the result, for unquantised pages


def assert_close_enough(
    out: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    rms: float | None = RELATIVE_RMS,
    largest: float = 0.0,
) -> None:
    """Error at most twice that of plain PyTorch in the same precision against float64, plus the result's rounding.

    Args:
        out: result under test.
        plain: the same computed by plain PyTorch in the precision of the inputs.
        exact: the same in float64.
        rms: most root mean square of the error, relative to that of ``exact``; None checks no such bound.
        largest: magnitude of what is summed, when that is more than the result's: sums may cancel.

    The rule is FlashAttention's. NaN or infinity in ``out`` must be where it is in ``exact``.
    """
    assert out.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    out, plain, exact = (x.detach().cpu() for x in (out, plain, exact))
    special = ~exact.isfinite()
    assert torch.equal(out[special].double(), exact[special].double()), "infinities differ"
    assert out[~special].isfinite().all(), f"{int((~out[~special].isfinite()).sum())} results are not finite"
    if special.all():
        return
    got, other, want = (x[~special].double() for x in (out, plain, exact))
    rounding = (want.to(out.dtype).double() - want).abs().max()
    error, allowed = (got - want).abs().max(), 2 * (other - want).abs().max() + 2 * rounding
    # Plain PyTorch may by chance be all but exact on a handful of numbers: then a few roundings of the largest number
    # are allowed, because an exponent of size x is off by x / 2 of them before anything is summed.
    allowed = torch.maximum(allowed, 4 * torch.finfo(out.dtype).eps * want.abs().max().clamp(min=largest))
    assert error <= allowed, f"largest error {error:.3e}, allowed {allowed:.3e}"
    if rms is not None and want.square().mean() > 0:
        relative = ((got - want).square().mean() / want.square().mean()).sqrt()
        assert relative < rms, f"relative root mean square error {relative:.3e}, allowed {rms}"
