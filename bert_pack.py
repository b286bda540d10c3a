"""Packing: a teacher becomes a student that `bert.packed` describes.

The student's weights are fitted to the teacher's hidden states, its least important heads are
pruned, and its sizes are counted. `import bert_pack` lets the library's Auto classes load packed
models and embedding models.

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
    """What --pack_cfg says, checked by itself; `check_pack_cfg` checks it against a teacher.

    Attributes:
        num_hidden_layers: n; layer i is packed from the teacher's layer N (i + 1) / n - 1.
        ff_iter_num: h x h layers in place of the feed-forward, with the activation between them;
            0 keeps the teacher's two layers and the width between them.
        num_attention_heads: heads of a layer, of the teacher's head size.
        hidden_size: h.
        pack_emb: 1: embedding tables are mapped to h each, and merge to h-wide tables; 0: they
            stay H wide, and one map feeds the encoder.
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
    """The value of --pack_cfg; a key that is left out keeps its default.

    Raises:
        UserError: as `cli.key_values`; a hidden size that the heads do not divide.
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
    """Check that a BERT of configuration `teacher` can be packed so.

    Raises:
        UserError: more layers or heads, or a larger hidden size, than the teacher has.
    """
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if getattr(cfg, key) > getattr(teacher, key):
            raise UserError(
                f"--pack_cfg: {key}:{getattr(cfg, key)} is over the {getattr(teacher, key)} of the"
                " model to pack; 1 to that many are possible"
            )


def packed_config(teacher: PreTrainedConfig, cfg: PackCfg) -> PackedBertConfig:
    """The configuration of a student of `teacher` packed by `cfg`, all heads still there."""
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

FIT_STEPS = 500  # of a short regression, ...
FIT_TOKENS = 1024  # ... each of so many tokens of the sample
FIT_RATE = 2e-3
RIDGE = 1e-4  # of least squares, times the mean variance of what is mapped

# The packed model of each BERT that can be packed.
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
    """A student of `teacher`, with all of the teacher's heads, in eval mode.

    Tables and head are the teacher's; the packed weights and the maps are what `start` makes them.

    Args:
        teacher: a fine-tuned BERT in FP32.
        batches: a sample to fit to, inputs [B, L] on the teacher's device.
        report: called with a layer's number and how many there are, before it is fitted.
        start: a name in STARTS.
        bf16: let models compute in bfloat16; sums over the sample stay in FP32.
    """
    student = PACKED[type(teacher)](packed_config(teacher.config, cfg))
    # The library's own `to` is not typed so that it can be called.
    student = nn.Module.to(student, teacher.device).eval()
    student.copy_head(teacher)
    embeddings = cast(PackedBertModel, student.base_model).embeddings
    originals = cast(BertModel, teacher.base_model).embeddings
    names = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    for name in names if cfg.pack_emb else [*names, "LayerNorm"]:
        getattr(embeddings, name).load_state_dict(getattr(originals, name).state_dict())
    STARTS[start](student, teacher, batches, report, bf16)
    return student


def fit_to_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Batch],
    report: Report,
    bf16: bool,
) -> None:
    """Fit weights and maps to the teacher's hidden states on a sample; arguments as `pack`'s.

    From the embeddings up, each layer is fitted on what the packed layers below it really give:

    - The maps begin as projections onto principal directions of the teacher's states, P [H, h],
      and the packed weights as the teacher's between such projections.
    - Least squares then make up for what P leaves out and for the layers that are skipped.
    - Stacked feed-forward layers are like nothing in the teacher. A short regression on the
      sample's tokens finds them, and another refines the maps of the embeddings.

    At full width P is the identity, and with the teacher's feed-forward (ff_iter_num 0) and all
    its layers the student's states are the teacher's.
    """
    bert = cast(BertModel, teacher.base_model)
    packed = cast(PackedBertModel, student.base_model)
    autocast = functools.partial(
        torch.autocast, teacher.device.type, dtype=torch.bfloat16, enabled=bf16
    )
    sample = Sample(list(batches), autocast)
    with torch.no_grad():
        directions = principal_directions(bert, sample, packed.config.hidden_size)
        target = sample.embed(bert.embeddings)
    fit = Fit(sample, directions, Regression(autocast))
    state = _fit_embeddings(packed, fit, target)
    originals, n = bert_layers(bert), packed.config.num_hidden_layers
    for i, layer in enumerate(packed.packed_layers):
        report(i + 1, n)
        skipped, last = len(originals) * i // n, len(originals) * (i + 1) // n - 1
        with torch.no_grad():
            for original in originals[skipped:last]:
                target = sample.attend(original, target)
        state_map = _state_map(packed, i + 1)
        state, target = _fit_layer(layer, state_map, originals[last], fit, state, target)


Start = Callable[[PreTrainedModel, PreTrainedModel, Iterable[Batch], Report, bool], None]
STARTS: dict[str, Start] = {
    "teacher": fit_to_teacher,
    "random": lambda *_: None,  # as the student was made: normal, of deviation 0.02
}


class Sample:
    """The tokens of some batches side by side, [T, ...], padding left out."""

    def __init__(self, batches: Sequence[Batch], autocast: Callable[[], Any]) -> None:
        self.autocast = autocast
        self.masks = [batch["attention_mask"].bool() for batch in batches]
        self.inputs = {
            name: torch.cat([b[name][mask] for b, mask in zip(batches, self.masks, strict=True)])
            for name in ("input_ids", "token_type_ids", "position_ids")
        }

    def embed(self, embeddings: nn.Module) -> Tensor:
        """[T, width]: what a model's embeddings give."""
        return embeddings(**{name: ids[None] for name, ids in self.inputs.items()})[0]

    def attend(self, layer: Callable[[Tensor, Tensor], Any], tokens: Tensor) -> Tensor:
        """What `layer(states [B, L, width], mask)` gives for the states `tokens`, [T, ...]."""
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

    The principal directions of all its states together, each state's second moments scaled to
    trace 1. Not centred: LayerNorm divides by a norm that the mean is a part of. A LayerNorm also
    takes away the direction (1, ..., 1); a reflection gives it the place of the last of the
    principal directions, so that this costs least. At full width P is the identity.
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
    """Weight W and bias b of outputs ~ W inputs + b, ridge regression towards `prior`.

    Args:
        inputs: [T, I].
        outputs: [T, O].
        prior: [O, I], which W is where the inputs tell nothing, and exactly where it leaves no
            error.
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
    """A short training of some modules on tokens of the sample, the same for each call."""

    def __init__(self, autocast: Callable[[], Any]) -> None:
        self.generator, self.autocast = torch.Generator().manual_seed(0), autocast

    def __call__(
        self, function: Callable[[Tensor], Tensor], modules: Sequence[nn.Module], targets: Tensor
    ) -> None:
        """Train `modules` so that function(indices of tokens) is near their targets [T, H]."""
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
    """What a student is fitted with.

    Attributes:
        directions: P, float64 [H, h].
    """

    sample: Sample
    directions: Tensor
    regress: Regression


def _state_map(packed: PackedBertModel, i: int) -> nn.Linear:
    """The map of state i of a student that is not merged."""
    return cast(nn.Linear, cast(nn.ModuleList, packed.state_maps)[i])


def _fit_embeddings(packed: PackedBertModel, fit: Fit, target: Tensor) -> Tensor:
    """Fit the embeddings and the map of state 0 to the teacher's, `target` [T, H].

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
        with torch.no_grad():
            _fit_norm(
                embeddings.LayerNorm,
                embeddings.summed(**sample.inputs),
                target @ directions.to(target.dtype),
            )
    with torch.no_grad():
        state = sample.embed(embeddings)
        _set(state_map, *least_squares(state, target, directions))
    if embeddings.sum_map is None and directions.shape[0] > directions.shape[1]:

        def states(chosen: Tensor) -> Tensor:
            ids = {name: ids[chosen] for name, ids in sample.inputs.items()}
            return state_map(embeddings(**ids))

        fit.regress(states, (*maps, embeddings.LayerNorm, state_map), target)
    with torch.no_grad():
        return sample.embed(embeddings)


def _fit_layer(
    layer: PackedLayer,
    state_map: nn.Linear,
    original: BertLayer,
    fit: Fit,
    state: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fit a layer and the map behind it to the teacher's layer `original`.

    Args:
        state: packed state before the layer, [T, h].
        target: the teacher's before `original`, [T, H].

    Returns:
        both after it.
    """
    up, down = fit.directions, fit.directions.T  # h to H and H to h
    with torch.no_grad():
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
    with torch.no_grad():
        return layer.after_attention(state), target


def _fit_attention(
    layer: PackedLayer, original: BertLayer, fit: Fit, state: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit the attention of a layer; arguments and results as `_fit_layer`'s, the latter as they
    are between attention and feed-forward."""
    up, down = fit.directions, fit.directions.T
    narrow, attention = up.to(state.dtype), original.attention
    # Query, key and value of the teacher's state as it can be told from the packed one.
    weight, bias = least_squares(state, target, up)
    parts = (attention.self.query, attention.self.key, attention.self.value)
    qkv = torch.cat([part.weight for part in parts]).double()
    _set(layer.qkv, qkv @ weight, qkv @ bias + torch.cat([part.bias for part in parts]))
    # What attention adds: the teacher's sum before LayerNorm, less the state it is added to.
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
    """Begin stacked feed-forward layers: random (He et al., 2015), the last by least squares."""
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
    """Parameters, and 1e9 operations (2 x multiply-adds) at 1 x `length` tokens.

    Counted on the meta device: no weights are made and nothing is computed.
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
    """Running mean of |d loss / d gate|, of a gate of 1 on each head's output.

    Michel et al., 2019, "Are Sixteen Heads Really Better than One?", eq. 2, with the gradient of
    an optimisation step's mean loss. `insert` puts the gates into the model, `remove` takes them
    out. Saved and restored with a run's state.

    Attributes:
        mean: float64 [layers, heads].
        steps: that the mean is over.
    """

    def __init__(self, student: PreTrainedModel, device: torch.device) -> None:
        shape = (student.config.num_hidden_layers, student.config.num_attention_heads)
        self.gates = torch.ones(shape, device=device, requires_grad=True)
        self.mean, self.steps = torch.zeros(shape, dtype=torch.float64, device=device), 0
        self._hooks: list[Any] = []

    def insert(self, student: PreTrainedModel) -> None:
        """Put the gates on the heads of a model."""
        self._hooks = [
            layer.attention_output.register_forward_pre_hook(functools.partial(self._gate, i))
            for i, layer in enumerate(cast(PackedBertModel, student.base_model).packed_layers)
        ]

    def remove(self) -> None:
        """Take the gates out of the model."""
        for hook in self._hooks:
            hook.remove()

    def _gate(self, i: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        context = inputs[0]  # [B, L, heads x head size]
        heads = context.unflatten(-1, (self.gates.shape[1], -1))
        return ((heads * self.gates[i, :, None].to(context.dtype)).flatten(-2),)

    def update(self, accelerator: Accelerator) -> None:
        """Count the gradient that a step's backward passes have left in the gates."""
        own = self.gates.grad
        assert own is not None  # a backward pass has left it
        gradient = accelerator.reduce(own, reduction="sum").double().abs()
        if accelerator.scaler is not None:
            gradient = gradient / accelerator.scaler.scale(torch.ones_like(gradient))
        own.zero_()
        self.steps += 1
        # On the device, without a wait; what is not finite does not count.
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
    """A student with only some of its heads.

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
