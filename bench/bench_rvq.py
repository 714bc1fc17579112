"""Residual vector quantization: each op beside the reference, plain PyTorch and a peer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import inputs_rvq, peers, plain_rvq, timing
from bench.case import Call, Op, Table, backward, beside, call, captured, parameters, plain
from bench.inputs import GPU
from bench.inputs_rvq import HALF, LONG, MANY, Inputs, Shape
from sparsemoe import nn
from sparsemoe.ops import rvq as ops
from sparsemoe.reference import rvq as reference

SHAPES = [inputs_rvq.WIDE, inputs_rvq.DEEP, HALF, LONG, MANY] if GPU else inputs_rvq.CPU
DECAY = 0.9999  # so that the codes of the last call are nearly those of the first
PEER = "vector-quantize-pytorch"

ours = partial(beside, {"sparsemoe": ops, "reference": reference})


class Stateful:
    """A call that changes codebooks, cluster_size and embed_sum in place: its own. Returns what it
    returns, and them."""

    def __init__(self, build: Callable[[Inputs], Call], inputs: Inputs) -> None:
        self.before = inputs.state
        self.state = tuple(t.clone() for t in self.before)
        codebooks, cluster_size, embed_sum = self.state
        self.call = partial(
            build(inputs), codebooks=codebooks, cluster_size=cluster_size, embed_sum=embed_sum
        )

    def __call__(self) -> tuple[Any, Any]:
        return self.call(), self.state

    def reset(self) -> None:
        for now, before in zip(self.state, self.before, strict=True):
            now.copy_(before)


def stateful(table: Table) -> Table:
    return {name: partial(Stateful, build) for name, build in table.items()}


def with_tf32(build: Callable[[Inputs], Call]) -> Callable[[Inputs], Call]:
    def run(call: Call) -> Any:
        with plain_rvq.tf32():
            return call()

    return lambda inputs: partial(run, build(inputs))


def gradient_to_x(outputs: list[Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    return torch.autograd.grad(outputs, x, [gradient, None])[0]


def step(module: Any, codebooks, cluster_size, embed_sum, x, gradient) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        codes, quantized, errors = module.encode(x, codebooks)
        x_gradient = gradient_to_x([quantized, errors.sum() / x.numel()], x, gradient)
    module.ema_update(codebooks, cluster_size, embed_sum, x, codes, decay=DECAY)
    return codes, x_gradient


def module_step(model: Any, x: Tensor, gradient: Tensor) -> Any:
    with torch.enable_grad():
        out = model(x)
        x_gradient = gradient_to_x([out.quantized, out.loss], x, gradient)
    return (out.codes, x_gradient), (model.codebooks, model.cluster_size)


def our_module(inputs: Inputs) -> nn.ResidualVQ:
    s = inputs.shape
    options = {"kmeans_init": False, "dead_code_threshold": 0, "commitment_weight": 1.0}
    model = nn.ResidualVQ(s.dim, s.stages, s.codes, decay=DECAY, **options).to(timing.DEVICE)
    names = "codebooks", "cluster_size", "embed_sum"
    model.load_state_dict(dict(zip(names, inputs.state, strict=True)), strict=False)
    return model


def peer(function: str, names: str, train: bool = False, **options: Any) -> Table:
    def build(inputs: Inputs) -> Call:
        model = peers.residual_vq(*inputs.state, decay=DECAY, **options).train(train)
        return call(partial(getattr(peers, function), model), names)(inputs)

    return {PEER: build}


ENCODE = "x codebooks"
BEAM = "beam_x codebooks"
DECODE = "long_codes codebooks"
BACK = "y_gradient long_codes codebooks"
EMA = "x=x codes=long_codes"
STEP = "x=x gradient=x_gradient"

addmm = plain(plain_rvq.encode, ENCODE)
encode = {
    "sparsemoe": call(ops.encode, ENCODE),
    "reference": lambda inputs: lambda: inputs.encoded,
    "torch, addmm": addmm["torch"],
    "torch, cdist": call(plain_rvq.encode, ENCODE, nearest=plain_rvq.nearest_cdist),
    "torch-compiled": addmm["torch-compiled"],
    **peer("residual_vq_encode", "x"),
}
inexact = {
    "sparsemoe": call(ops.encode, ENCODE, exact=False),
    "reference": encode["reference"],
    "torch, tf32": with_tf32(encode["torch, addmm"]),
    "torch, bf16": call(plain_rvq.encode, ENCODE, nearest=plain_rvq.nearest_bf16),
    "torch-compiled": with_tf32(encode["torch-compiled"]),
}
beam_encode = {
    **ours("beam_encode", f"{BEAM} beam=beam"),
    **plain(plain_rvq.beam_encode, f"{BEAM} beam"),
    **peer("residual_vq_encode", "beam_x", beam_size=Inputs.beam),
}
decode = {
    **ours("decode", "codes codebooks"),
    **plain(plain_rvq.decode, DECODE),
    "torch, loop": call(plain_rvq.decode_loop, DECODE),
    "torch, embedding_bag": call(plain_rvq.decode_embedding_bag, DECODE),
    **peer("residual_vq_decode", "long_codes"),
}
decode_backward = {
    **backward(ours("decode", "codes codebooks"), "codebooks"),
    **plain(plain_rvq.decode_backward, BACK),
    "torch, one_hot": call(plain_rvq.decode_backward_one_hot, BACK),
    **backward({"torch, embedding_bag": call(plain_rvq.decode_embedding_bag, DECODE)}, "codebooks"),
}
ema_update = stateful(
    {
        **ours("ema_update", "x=x codes=codes", decay=DECAY),
        **plain(partial(plain_rvq.ema_update, decay=DECAY), EMA),
        "torch, one_hot": call(plain_rvq.ema_update, EMA, decay=DECAY, one_hot=True),
    }
)
training_step = stateful(
    {
        **ours(step, STEP),
        **plain(partial(plain_rvq.step, decay=DECAY), STEP),
        "torch, one_hot": call(plain_rvq.step, STEP, decay=DECAY, one_hot=True),
    }
)
training_module = {
    "sparsemoe": lambda inputs: call(partial(module_step, our_module(inputs)), STEP)(inputs),
    "reference": training_step["reference"],
    **peer("residual_vq_step", STEP, train=True),
}
replayed = {
    **captured({name: training_step[name] for name in ("sparsemoe", "torch")}),
    "reference": training_step["reference"],
}


def real_bytes(inputs: Inputs, moves_of_x: int, codebook_moves: int) -> float:
    """Of x or what has its size, of the codes, and of float32 of the codebooks' size."""
    s = inputs.shape
    codebook = 4 * s.stages * s.codes * s.dim
    codes = 4 * s.vectors * s.stages
    return moves_of_x * s.vectors * s.dim * s.dtype.itemsize + codes + codebook_moves * codebook


def decode_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    return 4 * (s.vectors * (s.dim + s.stages) + s.stages * s.codes * s.dim)


def encode_flops(inputs: Inputs) -> float:
    s = inputs.shape
    return 2 * s.vectors * s.dim * s.codes * s.stages


def beam_bytes(inputs: Inputs) -> float:
    return real_bytes(inputs, 2, 1) * inputs.shape.beam_vectors / inputs.shape.vectors


def beam_flops(inputs: Inputs) -> float:
    s = inputs.shape
    return 2 * s.beam_vectors * s.dim * s.codes * (1 + inputs.beam * (s.stages - 1))


def encoded_view(inputs: Inputs, result: Any) -> list[Tensor]:
    """Codes, and quantized where they agree."""
    codes, quantized, *_ = result
    agree = (codes == inputs.codes).all(-1, keepdim=True)
    return [codes, torch.where(agree, quantized, inputs.encoded.quantized)]


def errors_view(inputs: Inputs, result: Any) -> list[Tensor]:
    """How near the codes are, whichever they are."""
    codes = result[0]
    x = inputs.x if len(codes) == len(inputs.x) else inputs.beam_x
    return [inputs.errors(codes, x)]


def moves(inputs: Inputs, state: Any) -> list[Tensor]:
    """What a step added to codebooks, cluster_size and, where it is given, embed_sum."""
    return [torch.stack(list(t)) - before for t, before in zip(state, inputs.state, strict=False)]


def step_view(inputs: Inputs, result: Any) -> list[Tensor]:
    (codes, x_gradient, *_), (codebooks, cluster_size, *_) = result
    return [codes, x_gradient, *moves(inputs, (codebooks, cluster_size))]


def changed_codes(inputs: Inputs, result: Any) -> dict[str, float]:
    return {"other codes, %": 100 * (result[0] != inputs.codes).double().mean().item()}


PRODUCT = "2 N D K Q operations (bfloat16; float32 on a CPU)"
ENCODE_COUNTS = f"{PRODUCT}; reads x and codebooks, writes quantized and codes"
STEP_COUNTS = (
    f"{PRODUCT}; reads x twice and the gradient of quantized once, writes quantized, codes and the "
    "gradient of x, reads and writes codebooks and embed_sum"
)
# where two codes are equally near but for rounding, all later codes of the vector differ
TIES = 5e-3

OPS = [
    Op(
        "encode",
        encode,
        ENCODE_COUNTS,
        lambda inputs: real_bytes(inputs, 2, 1),
        encode_flops,
        view=encoded_view,
        facts=changed_codes,
        ties=TIES,
    ),
    Op(
        "encode, inexact",
        inexact,
        "as encode",
        lambda inputs: real_bytes(inputs, 2, 1),
        encode_flops,
        view=errors_view,
        facts=changed_codes,
        tolerance=1e-2,
    ),
    Op(
        "beam_encode, 5 beams",
        beam_encode,
        "as encode, of fewer vectors, with 2 N D K (1 + 5 (Q - 1)) operations",
        beam_bytes,
        beam_flops,
        view=errors_view,
        tolerance=1e-4,
        rough={PEER: 0.1},  # it keeps those with the least sum of the errors of all stages
    ),
    Op(
        "decode",
        decode,
        "reads codes and, once, codebooks, writes vectors",
        decode_bytes,
        tolerance=1e-5,
    ),
    Op(
        "decode, backward",
        decode_backward,
        "reads the gradient and codes once, writes the gradient of codebooks",
        decode_bytes,
    ),
    Op(
        "ema_update",
        ema_update,
        "reads x and codes once, reads and writes codebooks and embed_sum",
        lambda inputs: real_bytes(inputs, 1, 4),
        view=lambda inputs, result: moves(inputs, result[1]),
        tolerance=1e-2,  # of small differences
    ),
    *(
        Op(
            name,
            calls,
            counts,
            lambda inputs: real_bytes(inputs, 5, 4),
            encode_flops,
            view=step_view,
            ties=TIES,
            tolerance=0.1,  # of few other codes
        )
        for name, calls, counts in [
            ("training step", training_step, STEP_COUNTS),
            ("training step, nn.ResidualVQ", training_module, "as training step"),
            ("training step, CUDA graph", replayed, "as training step"),
        ]
    ),
]


def wanted(shape: Shape, op: Op, name: str) -> bool:
    """The reference is there to be compared with. x in bfloat16 changes a few ops only, and long
    vectors and many codes have other kernels for encode only. Compiled expressions on the first
    shape, since each compilation takes seconds, and there. On a CPU one-hot matrices and compiled
    sums are slow, and exact makes no difference."""
    if name == "reference":
        return False
    if shape in (LONG, MANY):
        return op.name in ("encode", "encode, inexact")
    if name == "torch-compiled" and shape is not SHAPES[0]:
        return False
    if shape is HALF:
        return op.name.startswith(("encode", "training step"))
    sums = name == "torch-compiled" and op.name in ("decode, backward", "ema_update")
    return GPU or not (sums or "one_hot" in name or "inexact" in op.name or "graph" in op.name)


CASES = [(shape, op, name) for shape in SHAPES for op in OPS for name in op.calls]


@pytest.mark.benchmark(timer=timing.synchronized_clock)
@pytest.mark.parametrize(
    ("shape", "op", "name"), parameters(case for case in CASES if wanted(*case))
)
def test_rvq(measure: Any, shape: Shape, op: Op, name: str) -> None:
    measure(Inputs, shape, op, name)
