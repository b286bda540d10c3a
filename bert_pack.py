"""Packing: make a student (`bert.packed`) of a teacher, and prune its heads.

The student's weights are fitted to the teacher's hidden states. Training then finds its least
important heads, which are removed. `import bert_pack` also lets the library's Auto classes load
packed models and embedding models.

    pack(teacher, cfg, sample) -> student    training -> prune_heads -> training -> merge
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertForQuestionAnswering,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertLayer

from bert.attention import bert_layers
from bert.embedding import BertForEmbedding, PackedBertForEmbedding
from bert.packed import (
    PackedBertConfig,
    PackedBertForQuestionAnswering,
    PackedBertModel,
    PackedBertPreTrainedModel,
    PackedLayer,
)
from cli import UserError, key_values, number, one_of

# ------------------------------------------------------------------------------------------------
# The configuration


@dataclass(frozen=True)
class PackCfg:
    """The values of --pack_cfg; `check_pack_cfg` checks them against a teacher.

    Attributes:
        num_hidden_layers: n; layer i is made of the teacher's layer N (i + 1) / n - 1.
        ff_iter_num: number of h x h layers that replace the feed-forward, with the activation
            between them; 0 keeps the teacher's two layers and the width between them.
        num_attention_heads: heads per layer, of the teacher's head size.
        hidden_size: h.
        pack_emb: 1 maps each embedding table to h, and merging makes h-wide tables; 0 keeps the
            tables H wide, and one map feeds the encoder.
        hidden_act: "orig" for the teacher's, or an activation of the Transformers library.
    """

    num_hidden_layers: int = 12
    ff_iter_num: int = 4
    num_attention_heads: int = 8
    hidden_size: int = 512
    pack_emb: int = 1
    hidden_act: str = "orig"


def activation(text: str) -> str:
    """A kind for `key_values`: the name of an activation."""
    if text != "orig" and text not in ACT2FN:
        close = difflib.get_close_matches(text, ACT2FN, n=3, cutoff=0.4) or sorted(ACT2FN)
        raise ValueError(f"an activation: orig (the teacher's) or one of {', '.join(close)}")
    return text


PACK_KINDS: dict[str, Callable[[str], Any]] = {
    "num_hidden_layers": number(int, 1, 999_999),
    "ff_iter_num": number(int, 0, 64),
    "num_attention_heads": number(int, 1, 999_999),
    "hidden_size": number(int, 2, 999_999),
    "pack_emb": one_of(0, 1),
    "hidden_act": activation,
}


def parse_pack_cfg(text: str) -> PackCfg:
    """Parse --pack_cfg; an omitted key keeps its default.

    Raises:
        UserError: as `cli.key_values`; or the heads do not divide the hidden size.
    """
    cfg = PackCfg(**key_values(text, "--pack_cfg", PACK_KINDS))
    heads, size = cfg.num_attention_heads, cfg.hidden_size
    if size % heads:
        near = sorted({max(1, size // heads) * heads, -(-size // heads) * heads})
        raise UserError(
            f"--pack_cfg: hidden_size:{size} is not divisible by num_attention_heads:{heads}; the"
            f" nearest that are: {' and '.join(map(str, near))}"
        )
    return cfg


def check_pack_cfg(cfg: PackCfg, teacher: PreTrainedConfig) -> None:
    """Check that a BERT with the configuration `teacher` can be packed by `cfg`.

    Raises:
        UserError: `cfg` asks for more layers, more heads or a larger hidden size than it has.
    """
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if getattr(cfg, key) > getattr(teacher, key):
            raise UserError(
                f"--pack_cfg: {key}:{getattr(cfg, key)} is over the {getattr(teacher, key)} of the"
                " model to pack; 1 to that many are possible"
            )


def packed_config(teacher: PreTrainedConfig, cfg: PackCfg) -> PackedBertConfig:
    """The configuration of a student of `teacher`, packed by `cfg`, with all of its heads."""
    return PackedBertConfig(
        vocab_size=teacher.vocab_size,
        max_position_embeddings=teacher.max_position_embeddings,
        type_vocab_size=teacher.type_vocab_size,
        hidden_size=cfg.hidden_size,
        state_size=teacher.hidden_size,
        head_size=teacher.hidden_size // teacher.num_attention_heads,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=teacher.num_attention_heads,
        ff_iter_num=cfg.ff_iter_num,
        intermediate_size=teacher.intermediate_size,
        pack_emb=bool(cfg.pack_emb),
        hidden_act=teacher.hidden_act if cfg.hidden_act == "orig" else cfg.hidden_act,
        layer_norm_eps=teacher.layer_norm_eps,
        pad_token_id=teacher.pad_token_id,
        pooling=getattr(teacher, "pooling", "cls"),
        pack_cfg=vars(cfg).copy(),
    )


# ------------------------------------------------------------------------------------------------
# Packing

FIT_STEPS = 500  # steps of a short regression
FIT_TOKENS = 1024  # tokens of the sample per step
FIT_RATE = 2e-3  # its learning rate at the first step
RIDGE = 1e-4  # ridge of least squares, times the mean variance of the inputs

# From each BERT that can be packed to its packed model.
PACKED: dict[type[PreTrainedModel], type[PackedBertPreTrainedModel]] = {
    BertForQuestionAnswering: PackedBertForQuestionAnswering,
    BertForEmbedding: PackedBertForEmbedding,
}

Batch = dict[str, Tensor]
Report = Callable[[int, int], None]


def pack(
    teacher: PreTrainedModel,
    cfg: PackCfg,
    batches: Iterable[Batch] = (),
    report: Report = lambda layer, count: None,
    *,
    start: str = "teacher",
    bf16: bool = False,
) -> PreTrainedModel:
    """Make a student of `teacher` with all of the teacher's attention heads, in eval mode.

    The student copies the teacher's tables and output head. `start` sets all other weights.

    Args:
        teacher: a fine-tuned BERT in FP32.
        batches: the sample to fit to, inputs [B, L] on the teacher's device.
        report: called with a layer's number and the number of layers, before the layer is fitted.
        start: a name in STARTS.
        bf16: let models compute in bfloat16; sums over the sample stay in FP32.
    """
    student = PACKED[type(teacher)](packed_config(teacher.config, cfg))
    # mypy cannot call the library's own `to`.
    student = nn.Module.to(student, teacher.device).eval()
    student.copy_head(teacher)
    embeddings = cast(PackedBertModel, student.base_model).embeddings
    originals = cast(BertModel, teacher.base_model).embeddings
    names = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    for name in names if cfg.pack_emb else [*names, "LayerNorm"]:
        getattr(embeddings, name).load_state_dict(getattr(originals, name).state_dict())
    STARTS[start](student, teacher, batches, report, bf16)
    return student


@torch.no_grad()
def fit_to_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    report: Report,
    bf16: bool,
) -> None:
    """Fit weights and maps to the teacher's hidden states on a sample; arguments as in `pack`.

    Layers are fitted from the embeddings up, each to the real outputs of the packed layers below:

    - Maps start as projections onto principal directions of the teacher's states, P [H, h]. Packed
      weights start as the teacher's weights between such projections.
    - Least squares then compensate for the directions that P lacks, and for skipped layers.
    - Stacked feed-forward layers have no counterpart in the teacher. A short regression on the
      sample's tokens trains them; another one refines the maps of the embeddings.

    At full width P is the identity. If the student also keeps the teacher's feed-forward
    (ff_iter_num 0) and all layers, its states equal the teacher's.
    """
    bert = cast(BertModel, teacher.base_model)
    packed = cast(PackedBertModel, student.base_model)
    autocast = functools.partial(
        torch.autocast, teacher.device.type, dtype=torch.bfloat16, enabled=bf16
    )
    sample = Sample(list(batches), autocast)
    directions = principal_directions(bert, sample, packed.config.hidden_size)
    target = sample.embed(bert.embeddings)
    fit = Fit(sample, directions, Regression(autocast))
    state = _fit_embeddings(packed, fit, target)
    originals, n = bert_layers(bert), packed.config.num_hidden_layers
    for i, layer in enumerate(packed.packed_layers):
        report(i + 1, n)
        skipped, last = len(originals) * i // n, len(originals) * (i + 1) // n - 1
        for original in originals[skipped:last]:
            target = sample.attend(original, target)
        state_map = _state_map(packed, i + 1)
        state, target = _fit_layer(layer, state_map, originals[last], fit, state, target)


Start = Callable[[PreTrainedModel, PreTrainedModel, Iterable[Batch], Report, bool], None]
STARTS: dict[str, Start] = {
    "teacher": fit_to_teacher,
    "random": lambda *_: None,  # the library's initial weights: normal, deviation 0.02
}


class Sample:
    """The T tokens of some batches in a row, without padding."""

    def __init__(self, batches: Sequence[Batch], autocast: Callable[[], Any]) -> None:
        self.autocast = autocast
        self.masks = [batch["attention_mask"].bool() for batch in batches]
        self.inputs = {
            name: torch.cat([b[name][mask] for b, mask in zip(batches, self.masks, strict=True)])
            for name in ("input_ids", "token_type_ids", "position_ids")
        }

    def embed(self, embeddings: nn.Module) -> Tensor:
        """The outputs [T, width] of a model's embeddings."""
        return embeddings(**{name: ids[None] for name, ids in self.inputs.items()})[0]

    def attend(self, layer: Callable[[Tensor, Tensor], Any], tokens: Tensor) -> Tensor:
        """Run `layer(states [B, L, width], mask)` on the states `tokens`, [T, width]."""
        results, begin = [], 0
        for mask in self.masks:
            states = tokens.new_zeros(*mask.shape, tokens.shape[1])
            count = int(mask.sum())
            states[mask] = tokens[begin : begin + count]
            begin += count
            with self.autocast():
                result = layer(states, mask[:, None, None, :])
            result = result[0] if isinstance(result, tuple) else result
            results.append(result[mask].to(tokens.dtype))
        return torch.cat(results)


def principal_directions(bert: BertModel, sample: Sample, width: int) -> Tensor:
    """Orthonormal directions P [H, h] that keep most of the teacher's hidden states.

    They are the principal directions of all states together, with the second moments of each state
    scaled to trace 1. The states are not centred, because LayerNorm divides by a norm that contains
    the mean. LayerNorm also removes the direction (1, ..., 1). A reflection therefore turns the
    last principal direction, whose loss costs least, into this direction. At full width P is the
    identity.
    """
    full = bert.config.hidden_size
    device = sample.inputs["input_ids"].device
    if width == full:
        return torch.eye(full, dtype=torch.float64, device=device)
    moments = torch.zeros(full, full, dtype=torch.float64, device=device)
    state = sample.embed(bert.embeddings)
    for layer in (None, *bert_layers(bert)):
        state = sample.attend(layer, state) if layer else state
        squares = (state.T @ state).double()
        moments += squares / squares.trace()
    principal = torch.linalg.eigh(moments).eigenvectors[:, -width:].flip(1)
    reflected = torch.full((width,), width**-0.5, dtype=torch.float64, device=device)
    reflected[-1] -= 1.0
    reflected /= reflected.norm()
    return principal - 2 * torch.outer(principal @ reflected, reflected)


def least_squares(
    inputs: Tensor, outputs: Tensor, prior: Tensor, origin: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weight W and bias b of outputs ~ W inputs + b, by ridge regression towards `prior`.

    Args:
        inputs: [T, I].
        outputs: [T, O].
        prior: [O, I]; W equals it in directions without inputs, and exactly if it has no error.
        origin: [O], the prior's bias.
    """
    prior = prior.double()
    left = outputs - inputs @ prior.T.to(inputs.dtype) - origin
    mean = inputs.mean(dim=0)
    centred = inputs - mean
    moments = (centred.T @ centred).double() / len(inputs)
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    products = (centred.T @ left.to(inputs.dtype)).double() / len(inputs)
    change = torch.linalg.solve(moments, products).T
    return prior + change, origin + left.double().mean(dim=0) - change @ mean.double()


@torch.no_grad()
def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | float) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias if isinstance(bias, Tensor) else torch.full_like(linear.bias, bias))


@torch.no_grad()
def _fit_norm(norm: nn.LayerNorm, inputs: Tensor, outputs: Tensor) -> None:
    """Fit gain and bias by least squares, one coordinate at a time: [T, h] to [T, h]."""
    x = F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    mean, wanted = x.mean(dim=0), outputs.mean(dim=0)
    centred = x - mean
    gain = (centred * outputs).mean(dim=0) / centred.square().mean(dim=0).clamp_min(1e-12)
    norm.weight.copy_(gain)
    norm.bias.copy_(wanted - gain * mean)


class Regression:
    """Trains some modules for a short time on tokens of the sample."""

    def __init__(self, autocast: Callable[[], Any]) -> None:
        self.generator, self.autocast = torch.Generator().manual_seed(0), autocast

    @torch.enable_grad()
    def __call__(
        self, function: Callable[[Tensor], Tensor], modules: Sequence[nn.Module], targets: Tensor
    ) -> None:
        """Train `modules` so that function(indices of tokens) approaches targets[indices].

        Args:
            targets: [T, H].
        """
        trained = [p for module in modules for p in module.parameters()]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
        for step in range(FIT_STEPS):
            optimizer.param_groups[0]["lr"] = FIT_RATE * (1 - step / FIT_STEPS)
            chosen = torch.randint(len(targets), (FIT_TOKENS,), generator=self.generator)
            chosen = chosen.to(targets.device)
            with self.autocast():
                predicted = function(chosen)
            loss = (predicted - targets[chosen]).square().mean()
            gradients = torch.autograd.grad(loss, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        for parameter in trained:
            parameter.grad = None


@dataclass(frozen=True)
class Fit:
    """The sample, directions and regression with which all layers of a student are fitted.

    Attributes:
        directions: P, float64 [H, h].
    """

    sample: Sample
    directions: Tensor
    regress: Regression


def _state_map(packed: PackedBertModel, i: int) -> nn.Linear:
    """The map of state i of an unmerged student."""
    return cast(nn.Linear, cast(nn.ModuleList, packed.state_maps)[i])


def _fit_embeddings(packed: PackedBertModel, fit: Fit, target: Tensor) -> Tensor:
    """Fit the embeddings and the map of state 0 to the teacher's state 0, `target` [T, H].

    Returns:
        the packed state 0, [T, h].
    """
    sample, directions = fit.sample, fit.directions
    embeddings, state_map = packed.embeddings, _state_map(packed, 0)
    if embeddings.sum_map is not None:
        _set(embeddings.sum_map, directions.T, 0.0)
    else:
        maps = embeddings.maps()
        for each in maps:
            _set(each, directions.T, 0.0)
        wanted = target @ directions.to(target.dtype)
        _fit_norm(embeddings.LayerNorm, embeddings.summed(**sample.inputs), wanted)
    _set(state_map, *least_squares(sample.embed(embeddings), target, directions))
    if embeddings.sum_map is None and directions.shape[0] > directions.shape[1]:

        def states(chosen: Tensor) -> Tensor:
            ids = {name: ids[chosen] for name, ids in sample.inputs.items()}
            return state_map(embeddings(**ids))

        fit.regress(states, (*maps, embeddings.LayerNorm, state_map), target)
    return sample.embed(embeddings)


def _fit_layer(
    layer: PackedLayer,
    state_map: nn.Linear,
    original: BertLayer,
    fit: Fit,
    state: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fit a layer and the map after it to the teacher's layer `original`.

    Args:
        state: the packed state before the layer, [T, h].
        target: the teacher's state before `original`, [T, H].

    Returns:
        both states after the layer.
    """
    up, down = fit.directions, fit.directions.T  # h to H and H to h
    state, target_before = _fit_attention(layer, original, fit, state, target)
    target = original.output(original.intermediate(target_before), target_before)
    wanted = target @ up.to(target.dtype)
    if layer.stacked:
        _start_stacked(layer, state, wanted - state, fit.regress.generator)
    else:
        weight, bias = least_squares(state, target_before, up)
        first, second = original.intermediate.dense, original.output.dense
        packed_first, packed_second = layer.linears
        inner = first.weight.double()
        _set(packed_first, inner @ weight, inner @ bias + first.bias)
        _set(packed_second, down @ second.weight.double(), down @ second.bias.double())
    _fit_norm(layer.output_norm, state + layer.feed(state), wanted)
    _set(state_map, *least_squares(layer.after_attention(state), target, up))
    if layer.stacked:
        fit.regress(
            lambda chosen: state_map(layer.after_attention(state[chosen])),
            (layer.feed_forward, layer.output_norm, state_map),
            target,
        )
    return layer.after_attention(state), target


def _fit_attention(
    layer: PackedLayer, original: BertLayer, fit: Fit, state: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit a layer's attention; as `_fit_layer`, but it returns the states after attention."""
    up, down = fit.directions, fit.directions.T
    narrow, attention = up.to(state.dtype), original.attention
    # Query, key and value of the teacher's state, as least squares predict it from the packed one.
    weight, bias = least_squares(state, target, up)
    parts = (attention.self.query, attention.self.key, attention.self.value)
    qkv = torch.cat([part.weight for part in parts]).double()
    _set(layer.qkv, qkv @ weight, qkv @ bias + torch.cat([part.bias for part in parts]))
    # Attention should add the teacher's sum before LayerNorm, less the packed state.
    output = attention.output.dense
    target_sum = target + output(fit.sample.attend(attention.self, target))
    target = attention.output.LayerNorm(target_sum)
    context = fit.sample.attend(layer.context, state)
    prior = (down @ output.weight.double(), down @ output.bias.double())
    added = target_sum @ narrow - state
    _set(layer.attention_output, *least_squares(context, added, *prior))
    state = state + layer.attention_output(context)
    _fit_norm(layer.attention_norm, state, target @ narrow)
    return layer.attention_norm(state), target


def _start_stacked(
    layer: PackedLayer, state: Tensor, added: Tensor, generator: torch.Generator
) -> None:
    """Initialise stacked feed-forward layers: random (He et al., 2015), the last by least squares.

    Args:
        state: [T, h], the input.
        added: [T, h], the output that least squares approach.
    """
    *random, last = layer.linears
    inner = state
    for linear in random:
        scale = (2 / linear.in_features) ** 0.5
        weight = torch.randn(linear.weight.shape, generator=generator).to(state.device)
        _set(linear, scale * weight, 0.0)
        inner = layer.activation(linear(inner))
    _set(last, *least_squares(inner, added, torch.zeros_like(last.weight)))


# ------------------------------------------------------------------------------------------------
# Size


def size_of(
    make: Callable[[PreTrainedConfig], PreTrainedModel], config: PreTrainedConfig, length: int
) -> tuple[int, float]:
    """Number of parameters, and 1e9 operations (2 x multiply-adds) at 1 x `length` tokens.

    They are counted on the meta device, without weights or computation.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = make(config).eval()
        ids = torch.zeros(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, token_type_ids=ids, position_ids=ids)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 1e9


# ------------------------------------------------------------------------------------------------
# Heads


class HeadImportance:
    """Running mean of |d loss / d gate|, for a gate of 1 on the output of each head.

    Michel et al., 2019, "Are Sixteen Heads Really Better than One?", eq. 2, with the gradient of
    an optimisation step's mean loss. `insert` adds the gates to a model, `remove` removes them. The
    mean is saved and restored with a run's state.

    Attributes:
        mean: float64 [layers, heads].
        steps: the number of steps in the mean.
    """

    def __init__(self, student: PreTrainedModel, device: torch.device) -> None:
        shape = (student.config.num_hidden_layers, student.config.num_attention_heads)
        self.gates = torch.ones(shape, device=device, requires_grad=True)
        self.mean, self.steps = torch.zeros(shape, dtype=torch.float64, device=device), 0
        self._hooks: list[Any] = []

    def insert(self, student: PreTrainedModel) -> None:
        """Add the gates to the heads of a model."""
        self._hooks = [
            layer.attention_output.register_forward_pre_hook(functools.partial(self._gate, i))
            for i, layer in enumerate(cast(PackedBertModel, student.base_model).packed_layers)
        ]

    def remove(self) -> None:
        """Remove the gates from the model."""
        for hook in self._hooks:
            hook.remove()

    def _gate(self, i: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        context = inputs[0]  # [B, L, heads x head size]
        heads = context.unflatten(-1, (self.gates.shape[1], -1))
        return ((heads * self.gates[i, :, None].to(context.dtype)).flatten(-2),)

    def update(self, accelerator: Accelerator) -> None:
        """Add the gradient that a step's backward passes left in the gates to the mean."""
        own = self.gates.grad
        assert own is not None  # a backward pass has left it
        gradient = accelerator.reduce(own, reduction="sum").double().abs()
        if accelerator.scaler is not None:
            gradient = gradient / accelerator.scaler.scale(torch.ones_like(gradient))
        own.zero_()
        self.steps += 1
        # On the device, without a wait; a gradient that is not finite does not count.
        step = (gradient - self.mean) / self.steps
        self.mean += torch.where(gradient.isfinite().all(), step, torch.zeros_like(step))

    def most_important(self, count: int) -> Tensor:
        """The `count` most important heads of each layer, [layers, count], in their order."""
        return self.mean.topk(count, dim=1).indices.sort(dim=1).values

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.steps = state["mean"].to(self.gates.device), state["steps"]


@torch.no_grad()
def prune_heads(student: PreTrainedModel, kept: Tensor) -> PreTrainedModel:
    """The student with only some of its heads.

    Args:
        kept: indices of the heads that stay, [layers, new number of heads].
    """
    config = copy.deepcopy(student.config)
    config.num_attention_heads = kept.shape[1]
    pruned = nn.Module.to(type(student)(config), student.device).train(student.training)
    weights = student.state_dict()
    for i, heads in enumerate(kept.to(student.device)):
        name = f"{student.base_model_prefix}.layers.{i}"
        for part in ("weight", "bias"):
            qkv = weights[f"{name}.qkv.{part}"].unflatten(0, (3, -1, config.head_size))
            weights[f"{name}.qkv.{part}"] = qkv[:, heads].flatten(0, 2)
        output = weights[f"{name}.attention_output.weight"].unflatten(1, (-1, config.head_size))
        weights[f"{name}.attention_output.weight"] = output[:, heads].flatten(1)
    pruned.load_state_dict(weights)
    return pruned
