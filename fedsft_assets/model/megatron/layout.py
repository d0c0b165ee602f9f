"""The mapping of names and shapes between Megatron-GPT, in both of its layouts, and Hugging Face's GPT-2.

Works in both directions, tensor by tensor, without file access. For the equivalence of the computations, see
Megatron's `ParallelTransformerLayer` (legacy) and `TransformerLayer` (Megatron-core).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Layout = Literal["legacy", "megatron-core"]
Kind = Literal["same", "linear", "qkv weight", "qkv bias"]

LEGACY: Layout = "legacy"
CORE: Layout = "megatron-core"

# NeMo's prefixes of the names below.
PREFIX: dict[Layout, str] = {LEGACY: "model.language_model.", CORE: "model."}


@dataclass(frozen=True)
class GPTShape:
    """The sizes of a GPT-2 model: `ffn` is the MLP's hidden width, `positions` and `vocabulary` are table rows."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    positions: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Number of parameters; the output layer is tied to the token table."""
        layer = 4 * self.hidden**2 + 2 * self.hidden * self.ffn + 9 * self.hidden + self.ffn
        return (self.vocabulary + self.positions + 2) * self.hidden + self.layers * layer


@dataclass(frozen=True)
class Weight:
    """One tensor, with its name in each layout.

    `core` is the name in Megatron-core with separate layer norms; `fused` is the name with layer norms fused into
    the following linear layer, as in Transformer Engine and NeMo 2, None if it is the same. `shape` is Megatron's.
    """

    hf: str
    legacy: str
    core: str
    fused: str | None
    kind: Kind
    shape: tuple[int, ...]
    layer: int | None = None

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in GPT-2, whose linear weights are transposed (`Conv1D`)."""
        return self.shape[::-1] if self.kind in ("linear", "qkv weight") else self.shape

    def names(self, layout: Layout) -> tuple[str, ...]:
        """Its possible names in a layout, without the prefix; NeMo 2.4.1 writes the first one."""
        if layout == LEGACY:
            return (self.legacy,)
        return (self.core,) if self.fused is None else (self.fused, self.core)

    def stacked_names(self, layout: Layout) -> tuple[str, ...]:
        """Its possible names in Megatron-core checkpoints that stack all layers along the first dimension; empty
        for weights outside of layers."""
        if layout == LEGACY or self.layer is None:
            return ()
        return tuple(name.replace(f".layers.{self.layer}.", ".layers.") for name in self.names(layout))


def weights(shape: GPTShape) -> Iterator[Weight]:
    """Yield all distinct weights of a model, in GPT-2's order; `lm_head.weight` is tied to `transformer.wte.weight`."""
    d, f = shape.hidden, shape.ffn
    word, position = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
    yield Weight("transformer.wte.weight", word, word, None, "same", (shape.vocabulary, d))
    yield Weight("transformer.wpe.weight", position, position, None, "same", (shape.positions, d))
    in_layer = [
        *_norm("ln_1", "input_layernorm", "input_layernorm", "self_attention.linear_qkv", d),
        *_linear("attn.c_attn", "self_attention.query_key_value", "self_attention.linear_qkv", 3 * d, d, "qkv "),
        *_linear("attn.c_proj", "self_attention.dense", "self_attention.linear_proj", d, d),
        *_norm("ln_2", "post_attention_layernorm", "pre_mlp_layernorm", "mlp.linear_fc1", d),
        *_linear("mlp.c_fc", "mlp.dense_h_to_4h", "mlp.linear_fc1", f, d),
        *_linear("mlp.c_proj", "mlp.dense_4h_to_h", "mlp.linear_fc2", d, f),
    ]
    for layer in range(shape.layers):
        for weight in in_layer:
            yield replace(
                weight,
                hf=f"transformer.h.{layer}.{weight.hf}",
                legacy=f"encoder.layers.{layer}.{weight.legacy}",
                core=f"decoder.layers.{layer}.{weight.core}",
                fused=weight.fused and f"decoder.layers.{layer}.{weight.fused}",
                layer=layer,
            )
    for part in ("weight", "bias"):
        norm = f"final_layernorm.{part}"
        yield Weight(f"transformer.ln_f.{part}", f"encoder.{norm}", f"decoder.{norm}", None, "same", (d,))


def to_hf(weight: Weight, tensor: Tensor, heads: int) -> Tensor:
    """Convert Megatron's tensor to GPT-2's layout, contiguous; values are preserved bit for bit.

    Megatron orders queries, keys and values by head ([heads, 3, head width, hidden]); GPT-2 has all queries first
    ([3, heads, head width, hidden]), and linear and QKV weights transposed.
    """
    if weight.kind == "linear":
        return tensor.t().contiguous()
    if weight.kind == "qkv weight":
        rows, hidden = tensor.shape
        return tensor.view(heads, 3, rows // (3 * heads), hidden).permute(3, 1, 0, 2).reshape(hidden, rows)
    if weight.kind == "qkv bias":
        return tensor.view(heads, 3, -1).transpose(0, 1).reshape(-1)
    return tensor


def to_megatron(weight: Weight, tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_hf`."""
    if weight.kind == "linear":
        return tensor.t().contiguous()
    if weight.kind == "qkv weight":
        hidden, rows = tensor.shape
        return tensor.view(hidden, 3, heads, rows // (3 * heads)).permute(2, 1, 3, 0).reshape(rows, hidden)
    if weight.kind == "qkv bias":
        return tensor.view(3, heads, -1).transpose(0, 1).reshape(-1)
    return tensor


def _norm(hf: str, legacy: str, core: str, fused_into: str, size: int) -> Iterator[Weight]:
    for part in ("weight", "bias"):
        fused = f"{fused_into}.layer_norm_{part}"
        yield Weight(f"{hf}.{part}", f"{legacy}.{part}", f"{core}.{part}", fused, "same", (size,))


def _linear(hf: str, legacy: str, core: str, rows: int, columns: int, qkv: str = "") -> Iterator[Weight]:
    weight, bias = f"{qkv}weight" if qkv else "linear", f"{qkv}bias" if qkv else "same"
    yield Weight(f"{hf}.weight", f"{legacy}.weight", f"{core}.weight", None, weight, (rows, columns))  # type: ignore[arg-type]
    yield Weight(f"{hf}.bias", f"{legacy}.bias", f"{core}.bias", None, bias, (rows,))  # type: ignore[arg-type]
