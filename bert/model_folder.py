"""The folder of a BERT, packed or not: found, checked, loaded, saved."""

from __future__ import annotations

import functools
import os
from typing import Any, Protocol, cast

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from bert import (
    embedding,  # noqa: F401 - registers all models with the Auto classes
    packed,
)
from bert.attention import fuse_attention
from cli import UserError, first_line, in_one_line, is_main_process, warn
from deploy.cpu import this_cpu
from int8 import quantizers
from int8.quantizers import is_quantized
from int8.weight_range import WeightRange
from squad_utils import SpecialIds

MODEL_TYPES = (
    "bert",
    packed.PackedBertConfig.model_type,
)  # config.json's model_type of what these scripts train


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


STATE_MAPS = "state_maps.safetensors"  # in the folder of a merged one: maps that losses need
UNMERGED = "unmerged"  # the folder, in that of a packed model, of the model before merging
HUB_TIMEOUT = 5.0  # seconds that the hub has to answer; its own client retries for half a minute


transformers_logging.set_verbosity_error()


transformers_logging.disable_progress_bar()  # of reading weights; a download still shows its own


huggingface_hub.utils.enable_progress_bars()


class AutoClass(Protocol):
    """One of the library's Auto classes, or ours: AutoModelForQuestionAnswering itself, say."""

    def from_config(self, config: PretrainedConfig) -> PreTrainedModel:
        """A model with random weights."""

    def from_pretrained(self, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """A model, or with output_loading_info the model and a dict."""


@functools.lru_cache
def find_model(name: str, flag: str) -> dict[str, Any]:
    """Check that a model is there: a local folder with weights, or a name that the hub knows.

    Returns:
        the arguments of `from_pretrained` that say where it is.

    Raises:
        UserError: neither a folder nor on the hub; a folder that lacks config.json or weights.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"{flag}: the folder {name} holds no model: config.json is missing")
        if not any(os.path.isfile(os.path.join(name, file)) for file in WEIGHT_FILES):
            raise UserError(
                f"{flag}: the folder {name} holds no weights: model.safetensors is missing"
            )
        return {"pretrained_model_name_or_path": name, "local_files_only": True}
    if os.path.exists(name):
        raise UserError(f"{flag}: {name} is a file; a model's folder or hub name is needed")
    problem = None
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        problem = first_line(error)
    try:
        cached = isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str)
    except huggingface_hub.errors.HFValidationError:
        cached = False
    if problem and not cached:
        raise UserError(
            f"{flag}: {name} is neither a folder here nor a model that the hub gives ({problem})"
        )
    return {"pretrained_model_name_or_path": name, "local_files_only": problem is not None}


def load_config(name: str, flag: str) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: as `find_model`; an unreadable configuration; a model that is not BERT.
    """
    where = find_model(name, flag)
    with in_one_line(f"{flag}: the configuration of {name} does not load"):
        config = AutoConfig.from_pretrained(**where)
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"{flag}: {name} is a {config.model_type} model; BERT is needed"
            f" (model_type {' or '.join(MODEL_TYPES)})"
        )
    if config.type_vocab_size < 2:
        raise UserError(f"{flag}: {name} has one token type; question and context need two")
    return config


def check_model(name: str, flag: str, max_seq_length_c: int) -> PretrainedConfig:
    """The configuration of a model that takes max_seq_length_c tokens.

    Raises:
        UserError: as `load_config`, or it has too few positions.
    """
    config = load_config(name, flag)
    if max_seq_length_c > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_length_c={max_seq_length_c} is over the"
            f" {config.max_position_embeddings} positions of {name}"
        )
    return config


def check_teacher(
    name: str,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    has_state_maps: bool = False,
) -> None:
    """Check that --model_teacher, of name `name`, can teach --model_student.

    Args:
        student, tokenizer: of --model_student.
        has_state_maps: whether the student, if merged, still has the maps to its teacher's states.

    Raises:
        UserError: their hidden states differ in size, or their vocabularies differ.
    """
    sizes = []
    for flag, config in (("--model_teacher", teacher), ("--model_student", student)):
        if getattr(config, "merged", False) and not (config is student and has_state_maps):
            raise UserError(
                f"{flag} is packed and merged: its hidden states cannot be compared with another"
                " model's; the folder before merging can"
            )
        sizes.append(getattr(config, "state_size", config.hidden_size))
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--model_teacher has hidden size {sizes[0]}, --model_student {sizes[1]}: hidden"
            " states of one size are needed to compare them"
        )
    vocabulary = load_tokenizer(name, "--model_teacher", teacher).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise UserError("--model_teacher has another vocabulary than --model_student")


def load_model(name: str, flag: str, auto_class: AutoClass, quiet: bool = False) -> PreTrainedModel:
    """The model in FP32 on the CPU, with its quantizers if it has any; says which of its weights
    start anew, unless quiet.

    Args:
        auto_class: e.g. transformers.AutoModelForQuestionAnswering.

    Raises:
        UserError: as `load_config`; weights that cannot be read.
    """
    load_config(name, flag)
    with in_one_line(f"{flag}: the weights of {name} do not load"):
        model, info = auto_class.from_pretrained(
            **find_model(name, flag), dtype=torch.float32, output_loading_info=True
        )
    if is_quantized(name):
        model = quantizers.load_quantizers(
            fuse_attention(model, separate_products=True), name, flag
        )
        if not quiet:
            warn_of_overflow(model, f"{flag} {name}")
    if is_main_process() and not quiet:
        count = sum(p.numel() for p in model.parameters())
        anew = sorted(info["missing_keys"])
        print(
            f"{flag} {name}: {count / 1e6:.2f} M parameters"
            + (f"; starting anew: {', '.join(anew)}" if anew else "")
        )
    return model


def warn_of_overflow(model: nn.Module, what: str) -> None:
    """Say that integer kernels of this CPU overflow with a model's weights, where that is so."""
    cpu = this_cpu()
    if model.weight_range == WeightRange.FULL and not cpu.sums_exactly:
        here = f"this one, {cpu.name}" if cpu.features else "this one may be"
        warn(
            f"{what}: its INT8 weights use the full range: integer kernels overflow on CPUs without"
            f" VNNI, such as {here}. Train it on with --nncf_config and weight_range: pairs"
        )


def load_for_export(folder: str, auto_class: AutoClass) -> tuple[PreTrainedModel, bool]:
    """A saved checkpoint as it is exported to ONNX, and whether it has quantizers."""
    model, quantized = load_model(folder, "--output_dir", auto_class, quiet=True), False
    if is_quantized(folder):
        quantizers.make_exportable(model)
        quantized = True
    elif model.config.model_type == "bert":
        model.set_attn_implementation("eager")  # whose pattern OpenVINO fuses
    return model, quantized


def load_teacher(name: str, auto_class: AutoClass, device: torch.device) -> PreTrainedModel:
    """--model_teacher as it is needed: with fast attention, in eval mode, not training.

    Raises:
        UserError: as `load_model`.
    """
    teacher = fuse_attention(load_model(name, "--model_teacher", auto_class))
    return teacher.eval().requires_grad_(False).to(device)


def load_tokenizer(name: str, flag: str, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer.

    Raises:
        UserError: there is none, it lacks one of [CLS], [SEP], [PAD], or it has more tokens than
            the model of configuration `config`.
    """
    with in_one_line(f"{flag}: the tokenizer of {name} does not load"):
        found = AutoTokenizer.from_pretrained(**find_model(name, flag), use_fast=True)
        tokenizer = cast(PreTrainedTokenizerFast, found)  # if not, an error below
    # Without files the library makes up a tokenizer that knows its special tokens alone.
    made_up = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    if made_up or not tokenizer.is_fast or None in ids:
        raise UserError(f"{flag}: {name} has no fast BERT tokenizer (tokenizer.json or vocab.txt)")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{flag}: the tokenizer of {name} has {len(tokenizer)} tokens, its model only"
            f" {config.vocab_size}"
        )
    return tokenizer


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """Ids of the special tokens of BERT's input format."""
    return SpecialIds(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)


def load_state_maps(name: str, config: PretrainedConfig) -> nn.ModuleList | None:
    """The maps from the states of a merged model to its teacher's hidden size, which only losses
    need; None where the folder does not have them.

    Raises:
        UserError: the file that has them is damaged.
    """
    maps = nn.ModuleList(
        nn.Linear(config.hidden_size, config.state_size)
        for _ in range(config.num_hidden_layers + 1)
    )
    path, prefix = os.path.join(name, STATE_MAPS), ""
    if not os.path.isfile(path):
        if unmerged_folder(name) == name:
            return None
        path, prefix = os.path.join(unmerged_folder(name), "model.safetensors"), "bert.state_maps."
    with in_one_line(f"--model_student: {path} does not load"):
        weights = load_file(path)
        maps.load_state_dict(
            {key.removeprefix(prefix): value for key, value in weights.items() if prefix in key}
        )
    return maps.requires_grad_(False)


def save_state_maps(maps: nn.ModuleList, folder: str) -> None:
    """Keep the maps beside a merged model, for `load_state_maps`."""
    save_file(maps.cpu().state_dict(), os.path.join(folder, STATE_MAPS))


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, without the quantizers'."""
    return sum(p.numel() for name, p in model.named_parameters() if "__nncf_hooks" not in name)


def unmerged_folder(name: str) -> str:
    """Where a packed model still has the maps that its hidden states need: `name`/unmerged if
    there is such a folder, else `name` itself."""
    folder = os.path.join(name, UNMERGED)
    return folder if os.path.isfile(os.path.join(folder, "config.json")) else name


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str) -> None:
    """Save a model on the CPU with its tokenizer; of a quantized one, the quantizers in files of
    their own."""
    if hasattr(model, "__nncf_hooks"):
        quantizers.save_quantized(model, folder)
    else:
        model.save_pretrained(folder)
    save_vocabulary(tokenizer, folder)


def save_vocabulary(tokenizer: PreTrainedTokenizerFast, output_dir: str) -> None:
    """Save the tokenizer's files, and vocab.txt (a token a line, by id) for other programs."""
    tokenizer.save_pretrained(output_dir)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    with open(os.path.join(output_dir, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(f"{token}\n" for token, _ in by_id)
