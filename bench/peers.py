"""Other packages with the same operations, called as their documentation says.

Only those that are installed are measured. Imports are inside the functions, since a package may
fail to import where it does not run.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing

KNOWN = {  # name here -> the modules that it needs
    "moe-ops": ("moe_ops", "triton"),
    "liger": ("liger_kernel", "triton"),
    "scattermoe": ("scattermoe", "triton"),
    "sonic-moe": ("sonicmoe", "triton"),
    "vector-quantize-pytorch": ("vector_quantize_pytorch", "einx"),
}
INSTALLED = [name for name, modules in KNOWN.items() if all(map(importlib.util.find_spec, modules))]
COMPILED = [name for name in INSTALLED if "triton" in KNOWN[name]]  # on first use


def gate(logits: Tensor, top_k: int) -> Any:
    import moe_ops

    return moe_ops.fused_topk_softmax(logits, top_k)


def dispatch(x: Tensor, experts: Tensor, num_experts: int) -> Any:
    """Returns rows, the row of each pair ([k * T], choice by choice) and the offsets. The order of
    rows within an expert differs from run to run."""
    import moe_ops

    return moe_ops.permute(x, experts, E=num_experts)


def dispatch_backward(grad_rows: Tensor, pair_rows: Tensor, n_tokens: int, top_k: int) -> Tensor:
    import moe_ops

    return moe_ops.permute_backward(grad_rows, pair_rows, n_tokens, top_k)


def combine(rows: Tensor, pair_rows: Tensor, weights: Tensor) -> Tensor:
    import moe_ops

    return moe_ops.unpermute(rows, pair_rows, weights, *weights.shape)


def combine_backward(grad_y: Tensor, rows: Tensor, pair_rows: Tensor, weights: Tensor) -> Any:
    import moe_ops

    return moe_ops.unpermute_backward(grad_y, rows, pair_rows, weights, *weights.shape)


def moe_ops_layer(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    import moe_ops

    rows, pair_rows, offsets = moe_ops.permute(x, experts, E=len(gate_up_proj))
    gate_rows, up_rows = moe_ops.grouped_gemm(rows, gate_up_proj, offsets).chunk(2, dim=-1)
    rows = moe_ops.grouped_gemm(F.silu(gate_rows) * up_rows, down_proj, offsets)
    return moe_ops.unpermute(rows, pair_rows, weights, *weights.shape)


def liger_layer(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    from liger_kernel.ops import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, gate_up_proj, down_proj, experts, weights)


def scattermoe_layer(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, experts: Tensor, weights: Tensor
) -> Tensor:
    """Its GLUMLP, but for the order of the gate's rows."""
    from scattermoe import flatten_sort_count, parallel_linear

    order = flatten_sort_count(experts, num_experts=len(gate_up_proj))
    top_k = experts.shape[1]
    hidden = parallel_linear(x, gate_up_proj.mT, top_k, *order, grouped_out=True)
    gate_rows, up_rows = hidden.chunk(2, dim=-1)
    hidden = F.silu(gate_rows) * up_rows
    weights = weights.to(x.dtype)
    return parallel_linear(hidden, down_proj.mT, 1, *order, grouped_in=True, gates=weights)


def sonic_routed(
    x: Tensor, router: Tensor, interleaved_proj: Tensor, down_proj: Tensor, top_k: int
) -> Tensor:
    """Its logits are of x's dtype. Tuned for each size on first use."""
    from sonicmoe import moe_TC_softmax_topk_layer

    projections = _sonic_projections(interleaved_proj, down_proj)
    y, *_ = moe_TC_softmax_topk_layer(x, router, *projections, top_k, **_sonic_options())
    return y


def sonic_layer(
    x: Tensor,
    interleaved_proj: Tensor,
    down_proj: Tensor,
    pair_tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
) -> Tensor:
    """The same where experts are chosen already."""
    from sonicmoe import moe_general_routing_inputs

    pairs = weights.flatten(), pair_tokens, experts.flatten()
    projections = _sonic_projections(interleaved_proj, down_proj)
    y, _ = moe_general_routing_inputs(x, *pairs, *projections, len(down_proj), **_sonic_options())
    return y


def _sonic_projections(interleaved_proj: Tensor, down_proj: Tensor) -> tuple[Any, ...]:
    """Each with its bias."""
    gate_up = interleaved_proj.flatten(1, 2).permute(1, 2, 0)
    return gate_up, None, down_proj.permute(1, 2, 0), None


def _sonic_options() -> dict[str, Any]:
    from sonicmoe.enums import ActivationType

    return {
        "stream_id": torch.cuda.current_stream().cuda_stream,
        "activation_type": ActivationType("swiglu"),
        "is_inference_mode_enabled": not torch.is_grad_enabled(),
    }


def residual_vq(
    codebooks: Tensor, cluster_size: Tensor, embed_sum: Tensor, **options: Any
) -> torch.nn.Module:
    """A ResidualVQ of vector-quantize-pytorch with that state, straight-through as ours."""
    from vector_quantize_pytorch import ResidualVQ

    n_stages, n_codes, width = codebooks.shape
    model = ResidualVQ(
        dim=width,
        num_quantizers=n_stages,
        codebook_size=n_codes,
        rotation_trick=False,
        **options,
    ).to(codebooks.device)
    for q, layer in enumerate(model.layers):
        book = layer._codebook
        book.embed.data.copy_(codebooks[q])
        book.cluster_size.copy_(cluster_size[q])
        book.embed_avg.copy_(embed_sum[q])
    return model


def residual_vq_encode(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and quantized, by beam search where the model has a beam. In float32: its residuals
    would be of x's dtype."""
    quantized, codes, _ = model(x.float()[None])
    return codes[0], quantized[0].to(x.dtype)


def residual_vq_decode(model: torch.nn.Module, codes: Tensor) -> Tensor:
    return model.get_output_from_indices(codes[None])[0]


def residual_vq_step(model: torch.nn.Module, x: Tensor, gradient: Tensor) -> Any:
    """A training step: codes and the gradient to x, then codebooks and cluster sizes by stage."""
    with torch.enable_grad():
        quantized, codes, losses = model(x.float()[None])
        # each stage passes a gradient of its own straight through
        gradient = gradient.float()[None] / len(model.layers)
        (x_gradient,) = torch.autograd.grad([quantized, losses.sum()], x, [gradient, None])
    books = [layer._codebook for layer in model.layers]
    state = [book.embed[0] for book in books], [book.cluster_size[0] for book in books]
    return (codes[0], x_gradient), state


def shorten_autotuning(index: int = 0, count: int = 1) -> None:
    """Makes Triton's autotuners time each candidate for 25 ms, or once if it takes more than 5.
    Where count > 1, they and those of sonic-moe try only every count-th candidate: several
    processes fill the caches of compiled kernels side by side."""

    def brief(call: Any, quantiles: tuple[float, ...]) -> list[float]:
        call()
        start = timing.synchronized_clock()
        call()
        ms = 1e3 * (timing.synchronized_clock() - start)
        if ms > 5:
            return [ms] * len(quantiles)
        return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)

    try:
        import triton.runtime.autotuner
    except ImportError:  # then they take longer
        return
    triton.runtime.autotuner.Autotuner.do_bench = staticmethod(brief)
    for module in ("triton.runtime.autotuner", "quack.autotuner"):
        if importlib.util.find_spec(module.partition(".")[0]):
            share_candidates(importlib.import_module(module).Autotuner, index, count)


def share_candidates(autotuner: Any, index: int, count: int) -> None:
    """Only those that suit the tensors count, so that no process is left without one."""
    suitable = autotuner.prune_configs

    def share(self: Any, *args: Any) -> list[Any]:
        candidates = suitable(self, *args)
        return candidates[index::count] or candidates[:1]

    autotuner.prune_configs = share
