"""The folder of a BERT, packed or not: find, check, load and save it."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any, Protocol, cast

import huggingface_hub
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from bert.attention import fuse_attention
from bert.packed import PackedBertConfig
from cli import UserError, first_line, in_one_line, is_main_process, warn
from deploy.cpu import this_cpu
from int8 import quantizers
from int8.weight_range import WeightRange
from squad_utils import SpecialIds

MODEL_TYPES = ("bert", PackedBertConfig.model_type)  # the model_type of models that scripts take
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
STATE_MAPS = "state_maps.safetensors"  # beside a merged model: the maps that losses need
UNMERGED = "unmerged"  # inside a packed model's folder: the folder of the unmerged model
HUB_TIMEOUT = 5.0  # seconds for the hub to answer; its own client retries for half a minute

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()  # for reading weights; downloads keep theirs
huggingface_hub.utils.enable_progress_bars()


class AutoClass(Protocol):
    """One of the library's Auto classes, e.g. AutoModelForQuestionAnswering, or one of ours."""

    def from_config(self, config: PretrainedConfig) -> PreTrainedModel:
        """Make a model with random weights."""

    def from_pretrained(self, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """Load a model; with output_loading_info, return a dict too."""


# ------------------------------------------------------------------------------------------------
# Find and check


@dataclass(frozen=True)
class OpenedModel:
    """A model that is found and checked, but whose weights are not loaded yet.

    Attributes:
        name: a folder or a hub name, the value of `flag`.
        folder: the folder to load: `name`, or in it the folder of the unmerged model.
        local: whether the files are here, so that the hub is not asked.
        quantized: whether it has quantizers.
        state_maps: for a merged model, maps from its states to its teacher's hidden size, which
            only losses need; None if the folder has none.
    """

    name: str
    flag: str
    folder: str
    local: bool
    quantized: bool
    config: PretrainedConfig
    state_maps: nn.ModuleList | None

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its fast tokenizer, loaded at the first use.

        Raises:
            UserError: there is none; it lacks [CLS], [SEP] or [PAD]; or it has more tokens than
                the model.
        """
        where, size = f"{self.flag}: the tokenizer of {self.folder}", self.config.vocab_size
        with in_one_line(f"{where} does not load"):
            found = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=self.local, use_fast=True
            )
        tokenizer = cast(PreTrainedTokenizerFast, found)  # checked below
        # Without files the library makes up a tokenizer that has only special tokens.
        made_up = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
        ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        if made_up or not tokenizer.is_fast or None in ids:
            raise UserError(
                f"{self.flag}: {self.folder} has no fast BERT tokenizer (tokenizer.json or"
                " vocab.txt)"
            )
        if len(tokenizer) > size:
            raise UserError(f"{where} has {len(tokenizer)} tokens, its model only {size}")
        return tokenizer

    @property
    def architecture(self) -> str:
        """The class of the model, or "" if its configuration names none."""
        return (self.config.architectures or [""])[0]

    @property
    def packed(self) -> bool:
        return isinstance(self.config, PackedBertConfig)

    @property
    def merged(self) -> bool:
        """Whether it is a packed model without the maps that its hidden states need."""
        return self.packed and self.config.merged


def open_model(
    name: str, flag: str, length: int | None = None, *, before_merging: bool = False
) -> OpenedModel:
    """Find a BERT, packed or not, and check everything except its weights.

    Args:
        length: the tokens that it must take (--max_seq_length_c). None: it will read no texts, and
            its tokenizer is not checked.
        before_merging: open the unmerged model if the folder has one and is not quantized.

    Raises:
        UserError: it is neither a folder nor on the hub; a file is missing or damaged; it is no
            BERT; it takes fewer tokens.
    """
    folder, inner = name, os.path.join(name, UNMERGED)
    quantized = os.path.isfile(os.path.join(name, quantizers.QUANTIZERS))
    before_merging = before_merging and not quantized
    if before_merging and os.path.isfile(os.path.join(inner, "config.json")):
        folder = inner
    local = _find(folder, flag)
    with in_one_line(f"{flag}: the configuration of {folder} does not load"):
        config = AutoConfig.from_pretrained(folder, local_files_only=local)
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{flag}: {folder} is a {config.model_type} model; BERT is needed"
            f" (model_type {' or '.join(MODEL_TYPES)})"
        )
    if config.type_vocab_size < 2:
        raise UserError(f"{flag}: {folder} has one token type; question and context need two")
    if length is not None and length > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length_c={length} is over the {config.max_position_embeddings} positions"
            f" of {folder}"
        )
    state_maps = None
    if getattr(config, "merged", False) and not before_merging:
        state_maps = _load_state_maps(folder, flag, config)
    opened = OpenedModel(name, flag, folder, local, quantized, config, state_maps)
    if length is not None:
        _ = opened.tokenizer  # load it now: a bad one is an error
    return opened


def _find(name: str, flag: str) -> bool:
    """Check that a model exists: as a local folder with weights, or on the hub.

    Returns:
        whether its files are here: in the folder, or cached, if the hub does not answer.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"{flag}: the folder {name} holds no model: config.json is missing")
        if not any(os.path.isfile(os.path.join(name, file)) for file in WEIGHT_FILES):
            raise UserError(
                f"{flag}: the folder {name} holds no weights: model.safetensors is missing"
            )
        return True
    if os.path.exists(name):
        raise UserError(f"{flag}: {name} is a file; a model's folder or hub name is needed")
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
        return False
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        with contextlib.suppress(huggingface_hub.errors.HFValidationError):
            if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
                return True
        raise UserError(
            f"{flag}: {name} is neither a folder here nor a model that the hub gives"
            f" ({first_line(error)})"
        ) from None


def _load_state_maps(folder: str, flag: str, config: PretrainedConfig) -> nn.ModuleList | None:
    """`OpenedModel.state_maps`, from their own file or from the unmerged model."""
    path, prefix = os.path.join(folder, STATE_MAPS), ""
    if not os.path.isfile(path):
        inner = os.path.join(folder, UNMERGED)
        if not os.path.isfile(os.path.join(inner, "config.json")):
            return None
        path, prefix = os.path.join(inner, "model.safetensors"), "bert.state_maps."
    maps = nn.ModuleList(
        nn.Linear(config.hidden_size, config.state_size)
        for _ in range(config.num_hidden_layers + 1)
    )
    with in_one_line(f"{flag}: {path} does not load"), safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        maps.load_state_dict({n.removeprefix(prefix): file.get_tensor(n) for n in names})
    return maps.requires_grad_(False)


def check_teacher(teacher: OpenedModel, student: OpenedModel) -> None:
    """Check that the student can learn the teacher's hidden states.

    Raises:
        UserError: their hidden sizes or vocabularies differ, or one is merged and has no maps.
    """
    for model in (teacher, student):
        if model.merged and (model is teacher or student.state_maps is None):
            raise UserError(
                f"{model.flag} is packed and merged: its hidden states cannot be compared with"
                " another model's; the folder before merging can"
            )
    configs = (teacher.config, student.config)
    taught, learned = (getattr(each, "state_size", each.hidden_size) for each in configs)
    if taught != learned:
        raise UserError(
            f"{teacher.flag} has hidden size {taught}, {student.flag} {learned}: hidden states of"
            " one size are needed to compare them"
        )
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise UserError(f"{teacher.flag} has another vocabulary than {student.flag}")


# ------------------------------------------------------------------------------------------------
# Load


def load_model(model: OpenedModel, auto_class: AutoClass, quiet: bool = False) -> PreTrainedModel:
    """Load a model in FP32 on the CPU, with its quantizers if it has any.

    Args:
        auto_class: e.g. transformers.AutoModelForQuestionAnswering.
        quiet: else print the number of weights and the names of those that start anew.

    Raises:
        UserError: the weights cannot be read.
    """
    folder, flag = model.folder, model.flag
    with in_one_line(f"{flag}: the weights of {folder} do not load"):
        loaded, info = auto_class.from_pretrained(
            folder, local_files_only=model.local, dtype=torch.float32, output_loading_info=True
        )
    if model.quantized:
        loaded = fuse_attention(loaded, separate_products=True)
        loaded = quantizers.load_quantizers(loaded, folder, flag)
        if not quiet:
            warn_of_overflow(loaded, f"{flag} {folder}")
    if is_main_process() and not quiet:
        count = sum(p.numel() for p in loaded.parameters())
        anew = sorted(info["missing_keys"])
        print(
            f"{flag} {folder}: {count / 1e6:.2f} M parameters"
            + (f"; starting anew: {', '.join(anew)}" if anew else "")
        )
    return loaded


def warn_of_overflow(model: nn.Module, name: str) -> None:
    """Warn if integer kernels of this CPU overflow with the weights of the model `name`."""
    cpu = this_cpu()
    if model.weight_range == WeightRange.FULL and not cpu.sums_exactly:
        here = f"this one, {cpu.name}" if cpu.features else "this one may be"
        warn(
            f"{name}: its INT8 weights use the full range: integer kernels overflow on CPUs without"
            f" VNNI, such as {here}. Train it on with --nncf_config and weight_range: pairs"
        )


def load_for_export(folder: str, auto_class: AutoClass) -> tuple[PreTrainedModel, bool]:
    """Load a saved checkpoint for its export to ONNX; return whether it has quantizers, too."""
    opened = open_model(folder, "--output_dir")
    model = load_model(opened, auto_class, quiet=True)
    if opened.quantized:
        quantizers.make_exportable(model)
    elif not opened.packed:
        model.set_attn_implementation("eager")  # OpenVINO fuses its pattern
    return model, opened.quantized


def load_teacher(
    model: OpenedModel, auto_class: AutoClass, device: torch.device
) -> PreTrainedModel:
    """Load a teacher with fast attention, in eval mode, without gradients.

    Raises:
        UserError: as `load_model`.
    """
    teacher = fuse_attention(load_model(model, auto_class))
    return teacher.eval().requires_grad_(False).to(device)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The ids of the special tokens in BERT's input format."""
    return SpecialIds(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)


# ------------------------------------------------------------------------------------------------
# Save


def save_state_maps(maps: nn.ModuleList, folder: str) -> None:
    """Save the maps beside a merged model, where `open_model` finds them."""
    save_file(maps.cpu().state_dict(), os.path.join(folder, STATE_MAPS))


def count_parameters(model: nn.Module) -> int:
    """The number of a model's weights, without those of quantizers."""
    return sum(p.numel() for name, p in model.named_parameters() if "__nncf_hooks" not in name)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Save a model on the CPU with its tokenizer; quantizers get files of their own."""
    if hasattr(model, "__nncf_hooks"):
        quantizers.save_quantized(model, folder)
    else:
        model.save_pretrained(folder)
    save_vocabulary(tokenizer, folder)


def save_vocabulary(tokenizer: PreTrainedTokenizerFast, output_dir: str) -> None:
    """Save the tokenizer's files, and vocab.txt (one token per line, by id) for other programs."""
    tokenizer.save_pretrained(output_dir)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    with open(os.path.join(output_dir, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{token}\n" for token, _ in by_id)
