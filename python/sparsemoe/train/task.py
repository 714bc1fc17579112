"""What the trainer must know of a kind of model: how to make it, its loss and its figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemoe.data import BatchSampler, Corpus
from sparsemoe.evaluate.bits import bits_per_byte
from sparsemoe.evaluate.codec import evaluate_codec
from sparsemoe.models.moe_lm import MoELM
from sparsemoe.models.vyra import Codec, CodecConfig
from sparsemoe.nn import CodeUsage
from sparsemoe.train.config import RunConfig
from sparsemoe.train.device import not_compiled

VECTORS_PER_CODE = 16  # at least so many for a codec's first codebooks
LOOK_EVERY = 20  # steps between two looks whether to set them

Aux = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Aux]]


class Task(ABC):
    """One kind of model. ``config`` is that of the run."""

    kind: str

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The model with its first weights."""

    @abstractmethod
    def compiled(self, model: nn.Module) -> Loss:
        """The model's forward pass under torch.compile."""

    @abstractmethod
    def loss(
        self, forward: Loss, sampler: BatchSampler, device: torch.device, step: int
    ) -> tuple[Tensor, Aux]:
        """Draws a batch: its loss, and device tensors to be summed over a logging interval, of
        which ``cross_entropy`` is the mean over the batch's bytes in nats."""

    def after_step(self, model: nn.Module, batches: Sequence[Aux]) -> None:
        """What follows the optimizer's step, from the aux of its batches; by itself nothing."""
        return None

    @abstractmethod
    def figures(self, sums: Aux, batches: int) -> dict[str, Any]:
        """What an interval's record holds beside bits_per_byte, as plain numbers."""

    @abstractmethod
    def validate(self, model: nn.Module, held_out: Corpus, precision: str) -> dict[str, Any]:
        """Figures on train.validation_bytes of the held-out corpus; ``validation_bits_per_byte``
        is one. Empty where there is nothing to measure yet."""


class LanguageModelTask(Task):
    kind = "language model"

    def make_model(self) -> MoELM:
        return MoELM(self.config.model)

    def compiled(self, model: nn.Module) -> Loss:
        return torch.compile(model)

    def loss(
        self, forward: Loss, sampler: BatchSampler, device: torch.device, step: int
    ) -> tuple[Tensor, Aux]:
        return forward(*sampler.next_batch(device))

    def after_step(self, model: nn.Module, batches: Sequence[Aux]) -> None:
        if self.config.model.expert_bias_rate and "counts" in batches[0]:
            model.update_expert_bias(sum(aux["counts"] for aux in batches))

    def figures(self, sums: Aux, batches: int) -> dict[str, Any]:
        """Router losses; ``load``, each expert's share of its layer's pairs [layers][E]; and
        ``dropped``, the share of pairs without a place."""
        if "counts" not in sums:
            return {}
        counts = sums["counts"].double()
        return {
            "load_balance_loss": sums["load_balance_loss"].item() / batches,
            "router_z_loss": sums["router_z_loss"].item() / batches,
            "dropped": 1 - sums["num_kept"].item() / max(counts.sum().item(), 1.0),
            "load": (counts / counts.sum(1, keepdim=True).clamp(min=1)).tolist(),
        }

    def validate(self, model: nn.Module, held_out: Corpus, precision: str) -> dict[str, Any]:
        result = bits_per_byte(
            model,
            held_out,
            overlap=0,
            max_bytes=self.config.train.validation_bytes,
            precision=precision,
        )
        return {"validation_bits_per_byte": result.bits_per_byte}


class CodecTask(Task):
    """Bits per byte are of the reconstruction given the codes; code_bits come on top."""

    kind = "codec"

    def make_model(self) -> Codec:
        return Codec(self.config.model)

    def compiled(self, model: nn.Module) -> Loss:
        """The blocks one by one: they share their code, which is compiled once, and the quantizer,
        whose work is in operators already, stays as it is."""
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile()
        model.encoder.patches.compile()
        model.decoder.bytes.compile()
        return model

    def loss(
        self, forward: Codec, sampler: BatchSampler, device: torch.device, step: int
    ) -> tuple[Tensor, Aux]:
        if not forward.quantizing and step >= self.config.model.unquantized_steps:
            self._quantize_if_ready(forward, sampler, device, step)
        return forward(sampler.next_bytes(device), step)

    @torch.no_grad()
    def _quantize_if_ready(
        self, model: Codec, sampler: BatchSampler, device: torch.device, step: int
    ) -> None:
        """Looks at a batch of its own every few steps, for which it waits for the device."""
        config = self.config.model
        if (step - config.unquantized_steps) % LOOK_EVERY:
            return
        vectors = self.config.train.batch_size * config.patches
        batches = math.ceil(VECTORS_PER_CODE * config.codebook_size / vectors)
        with not_compiled():
            tokens = sampler.next_bytes(device)
            right = model(tokens)[1]["correct"].item() / tokens.numel()
            if right >= config.unquantized_accuracy:
                model.set_codebooks(sampler.next_bytes(device) for _ in range(batches))

    def figures(self, sums: Aux, batches: int) -> dict[str, Any]:
        """``byte_accuracy``; and once latents are quantized ``commitment_loss``, ``code_bits`` (a
        byte), and for each stage ``perplexity`` and ``code_usage``, the share of codes chosen."""
        settings, model = self.config.train, self.config.model
        num_bytes = batches * settings.batch_size * model.context
        record: dict[str, Any] = {"byte_accuracy": sums["correct"].item() / num_bytes}
        if "code_counts" in sums:
            usage = CodeUsage(sums["code_counts"])
            record["commitment_loss"] = sums["commitment_loss"].item() / batches
            record["code_bits"] = usage.entropy_bits().sum().item() / model.compression_ratio
            record["perplexity"] = usage.perplexity().tolist()
            record["code_usage"] = usage.used_share().tolist()
        return record

    def validate(self, model: nn.Module, held_out: Corpus, precision: str) -> dict[str, Any]:
        if not model.quantizing:
            return {}
        result = evaluate_codec(
            model,
            held_out,
            stages=[self.config.model.num_quantization_stages],
            max_bytes=self.config.train.validation_bytes,
            precision=precision,
        )
        whole = result.stages[-1]
        return {
            "validation_bits_per_byte": whole.reconstruction_bits,
            "validation_byte_accuracy": whole.byte_accuracy,
            "validation_code_bits": whole.code_bits,
        }


def task_of(config: RunConfig) -> Task:
    """The task of a run, by the type of its model's config."""
    return (CodecTask if isinstance(config.model, CodecConfig) else LanguageModelTask)(config)
