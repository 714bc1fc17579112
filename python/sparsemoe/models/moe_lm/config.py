"""The shape of a byte-level mixture-of-experts language model, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

NUM_BYTES = 256
START = 256  # the input token before the first byte of a document; never predicted
VOCAB_SIZE = NUM_BYTES + 1


@dataclass
class MoELMConfig:
    """Sizes and options of :class:`~sparsemoe.models.moe_lm.MoELM`.

    Raises ``ValueError`` naming the field where a size is impossible.
    """

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 64
    context: int = 256  # longest sequence, in bytes
    rope_theta: float = 10000.0
    qk_norm: bool = True  # RMS-normalise each query and key
    norm_eps: float = 1e-6

    # Feed-forward: every layer is a mixture of experts unless named in dense_layers.
    num_experts: int = 8  # 0: every layer is dense
    top_k: int = 2  # experts a token
    expert_size: int = 256  # width of one expert
    num_shared_experts: int = 0  # experts that see every token
    dense_layers: list[int] = field(default_factory=list)  # layers with one wide SwiGLU
    dense_size: int = 512  # width of a dense feed-forward

    # Routing: see sparsemoe.nn.MoE.
    router: str = "topk"  # topk, sinkhorn, or expert_choice (by causal thresholds)
    scoring: str = "softmax"  # softmax, softmax_after_topk or sigmoid
    renormalize: bool = True  # weights of a token's experts sum to one
    scale: float = 1.0
    capacity_factor: float | None = None  # null: no token is dropped
    drop_policy: str = "order"  # order or weight
    jitter: float = 0.0
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.001
    expert_bias_rate: float = 0.0  # above 0: loss-free balancing by a bias on each expert
    # With router sinkhorn: see sparsemoe.nn.SinkhornRouter.
    sinkhorn_iters: int = 8
    sinkhorn_temperature: float = 1.0
    sinkhorn_per_sequence: bool = False  # balance each sequence by itself, instead of the batch
    sinkhorn_inference: str = "topk"  # topk, or bias: as training chose on average
    sinkhorn_weights: str = "scores"  # scores, or plan

    def __post_init__(self) -> None:
        at_least = {"num_experts": 0, "num_shared_experts": 0, "top_k": 1, "num_layers": 1}
        at_least |= {"hidden_size": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 1}
        at_least |= {"context": 1, "expert_size": 1, "dense_size": 1, "sinkhorn_iters": 1}
        for name, least in at_least.items():
            _require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even, for rotary positions")
        divides = self.num_heads % self.num_kv_heads == 0
        of = f"a divisor of num_heads ({self.num_heads})"
        _require(divides, "num_kv_heads", self.num_kv_heads, of)
        fits = self.num_experts == 0 or self.top_k <= self.num_experts
        _require(fits, "top_k", self.top_k, f"at most num_experts ({self.num_experts})")
        known = all(0 <= layer < self.num_layers for layer in self.dense_layers)
        layers = f"a list of layers from 0 to {self.num_layers - 1}"
        _require(known, "dense_layers", self.dense_layers, layers)
        _one_of("router", self.router, ("topk", "sinkhorn", "expert_choice"))
        _one_of("scoring", self.scoring, ("softmax", "softmax_after_topk", "sigmoid"))
        _one_of("drop_policy", self.drop_policy, ("order", "weight"))
        if self.capacity_factor is not None:
            positive = self.capacity_factor > 0
            _require(positive, "capacity_factor", self.capacity_factor, "above 0 or null")
        _require(0 <= self.jitter < 1, "jitter", self.jitter, "from 0 to below 1")
        warm = self.sinkhorn_temperature > 0
        _require(warm, "sinkhorn_temperature", self.sinkhorn_temperature, "above 0")
        _one_of("sinkhorn_inference", self.sinkhorn_inference, ("topk", "bias"))
        _one_of("sinkhorn_weights", self.sinkhorn_weights, ("scores", "plan"))
        if self.router == "sinkhorn" and self.sinkhorn_weights == "plan":
            softmax = self.scoring == "softmax"
            _require(softmax, "scoring", repr(self.scoring), "softmax with sinkhorn_weights plan")
        # A router's balance is its own, and so is the capacity of expert choice.
        unused = {"expert_bias_rate": 0} if self.router != "topk" else {}
        if self.router == "expert_choice":
            unused |= {"capacity_factor": None, "jitter": 0}
        for name, left_out in unused.items():
            value = getattr(self, name)
            _require(value == left_out, name, value, f"left out with router {self.router}")

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    def _linear_params(self, experts_a_token: int) -> int:
        """Weights of the layers' matrices, with this many routed experts counted in each."""
        heads = self.num_heads + 2 * self.num_kv_heads
        attention = (heads + self.num_heads) * self.head_dim * self.hidden_size
        expert = 3 * self.hidden_size * self.expert_size
        moe = (experts_a_token + self.num_shared_experts) * expert
        router = self.hidden_size * self.num_experts
        dense = 3 * self.hidden_size * self.dense_size
        n = self.num_moe_layers
        return self.num_layers * attention + n * (moe + router) + (self.num_layers - n) * dense

    def _other_params(self) -> int:
        """The embedding, which is also the output matrix, and the norms' gains."""
        return self.hidden_size * (VOCAB_SIZE + 2 * self.num_layers + 1)

    def num_params(self) -> int:
        """Number of parameters of the model."""
        return self._linear_params(self.num_experts) + self._other_params()

    def active_params(self) -> int:
        """Number of parameters that take part in one token's forward pass."""
        return self._linear_params(self.top_k) + self._other_params()

    def flops_per_token(self, length: int | None = None, training: bool = False) -> float:
        """Matrix operations a token: 2 for each active weight, and causal attention's.

        ``length`` is the sequence length (default: ``context``), over which the mean of
        attended positions is (length + 1) / 2. A multiply-add counts as 2. Training is
        three times the forward pass.
        """
        length = self.context if length is None else length
        forward = 2 * (self._linear_params(self.top_k) + NUM_BYTES * self.hidden_size)
        attended = (length + 1) / 2
        forward += self.num_layers * 4 * attended * self.num_heads * self.head_dim
        return forward * (3 if training else 1)

    def dense_equivalent(self) -> MoELMConfig:
        """The same model with every feed-forward dense, of the same FLOPs per token.

        Its width is that of the experts that one token takes, plus the router's share; the
        two agree to half a unit of width.
        """
        width = (self.top_k + self.num_shared_experts) * self.expert_size + self.num_experts / 3
        total = self.num_moe_layers * width + (self.num_layers - self.num_moe_layers) * (
            self.dense_size
        )
        return replace(
            self,
            num_experts=0,
            num_shared_experts=0,
            dense_layers=[],
            dense_size=round(total / self.num_layers),
            expert_bias_rate=0.0,
        )


def _require(condition: bool, name: str, value: object, must_be: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {must_be}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, repr(value), "one of " + ", ".join(choices))
