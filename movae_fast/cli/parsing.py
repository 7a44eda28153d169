"""Make flags from dataclasses, report errors in one line, and accept other systems' names for the same
flags."""

from __future__ import annotations

import copy
import functools
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from movae_fast.names import nearest
from movae_fast.training.config_files import RECIPES as RECIPES
from movae_fast.training.config_files import collection_root, flag_types
from movae_fast.training.config_files import find_yaml as find_yaml
from movae_fast.training.config_files import listed as listed
from movae_fast.training.config_files import read_config as read_config
from movae_fast.training.config_files import recipe_names as recipe_names
from movae_fast.training.config_files import typed as typed
from movae_fast.training.config_files import with_its_regularizer as with_its_regularizer
from movae_fast.training.yaml_file import BeyondBoundsError, check_shape

# Other systems' spellings: flag -> ours.
ALIASES = {
    "batchsize": "batch_size",
    "train.batch_size": "batch_size",
    "latent_dims": "latent_dim",
    "z_dim": "latent_dim",
    "learning_rate": "lr",
    "train.optim.params.lr": "lr",
    "num_epochs": "epochs",
    "n_steps": "steps",
    "train.n_steps": "steps",
    "data_path": "data_dir",
    "wd": "weight_decay",
    "aggregator": "agg",
    "optim": "optimizer",
    "compile_mode": "compile",
    "normalize_inputs": "normalize",
    "num_vis_samples": "num_samples",
    "train.n_samples": "num_samples",
    "train.print_freq": "log_every",
    "train.save_freq": "checkpoint_every",
    "coef_alpha": "mmd_alpha",
    "train.coef_alpha": "mmd_alpha",
    "coef_lambda": "mmd_lambda",
    "train.coef_lambda": "mmd_lambda",
    "train.coef_kl": "coef_kl",
    "train.resume": "resume",
    "dataloader.num_workers": "num_workers",
    "output_dir": "save_path",
    "data.params.root": "data_dir",
    "data.params.img_size": "image_size",
    **{f"{part}.params.z_dim": "latent_dim" for part in ("encoder", "decoder")},
    **{f"{part}.params.{name}": name for part in ("encoder", "decoder") for name in ("dim", "with_bn")},
    "encoder.params.dim_mults": "dim_mults",
    "n_images": "max_images",
    "num_latent_scales": "num_scales",
    "num_groups_per_scale": "groups_per_scale",
    "num_latent_per_group": "latents_per_group",
    **dict.fromkeys(("num_channels_enc", "num_channels_dec"), "channels"),
    **dict.fromkeys(("num_preprocess_blocks", "num_postprocess_blocks"), "outer_blocks"),
    **dict.fromkeys(("num_preprocess_cells", "num_postprocess_cells"), "outer_cells"),
    **dict.fromkeys(("num_cell_per_cond_enc", "num_cell_per_cond_dec"), "cells_per_group"),
    "num_nf": "num_flows",
    "kl_anneal_portion": "kl_warmup",
    "kl_const_portion": "kl_constant",
    "kl_const_coeff": "kl_least",
    "weight_decay_norm": "norm_penalty",
    "weight_decay_norm_init": "norm_penalty_init",
}
SHORT = {"-c": "--config", "-e": "--exp_dir", "-r": "--resume"}
# Other systems' names of values: (our flag, theirs) -> ours.
VALUES = {
    ("mode", "traverse"): "visualize",
    ("dataset", "mpi3d"): "mpi3d_toy",
    ("dataset", "oxford-flower-102"): "flowers102",
}
# MO-VAE calls the reconstruction's likelihood by its loss today.
RECONS_OBJECTIVE = {"mse": "gaussian", "bce": "bernoulli", "l1": "laplacian"}

# What stands between a command and its flags, for its help; what is in brackets may be left out.
OPERANDS = {
    **dict.fromkeys(("evaluate", "sample", "serve", "prior", "export"), "RUN"),
    **dict.fromkeys(("curve", "compare", "report"), "RUN …"),
    "encode": "RUN [FOLDER]",
    "runs": "[FOLDER]",
    "init": "[FILE]",
    **dict.fromkeys(("data verify", "data prepare"), "NAME|FOLDER"),
    "data synthetic_jpeg": "FOLDER",
}

Flags = typing.TypeVar("Flags")


class OneLineParser(ArgumentParser):
    """Parse flags, and raise ValueError with a single line that names the flag if one is invalid."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise ValueError(tidy(message))


def tidy(message: str) -> str:
    """Return an error message of jsonargparse as one line: the flag, the given value, and the expected ones."""
    if (about_config := of_config(message)) is not None:
        return about_config
    message = re.sub(r"NestedArg\(key='(\w+)', val='?(.*?)'?\)", r"\1 \2", message)
    key = re.search(r'Parser key "([\w.]+)"', message) or re.search(r'key "([\w.]+)"', message)
    if key is None:
        return " ".join(message.split())
    choices = re.search(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", message)
    given = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    value = f" {given.group(1).strip()}" if given else ""
    if choices:
        names = [c.strip().strip("'\"") for c in choices.group(1).split(",")]
        return f"--{key.group(1)}{value}: unknown{nearest(value.strip(), names)}; valid: {', '.join(names)}"
    expected = re.findall(r"Expected (?:a|an) <class '(\w+)'>", message) or re.findall(
        r"Expected a ([\w.\[\], ]+)", message
    )
    kinds = [k for k in dict.fromkeys(expected) if k != "NoneType"]
    return f"--{key.group(1)}{value}: expected {' or '.join(kinds) if kinds else 'another kind of value'}"


def of_config(message: str) -> str | None:
    """Return what jsonargparse says of the file of --config, as one line; None for another message."""
    if path := re.search(r"""Parser key "config": .*: '(.*)'""", message):
        return f"--config {path[1]}: no such file; give a YAML file of this command's flags"
    if broken := re.match(r"(?s)Problems parsing config: (.*)", message):
        return f"--config is not YAML: {' '.join(broken[1].split())}"
    if unknown := re.fullmatch(r"Option '(.*)' is not accepted", message.strip()):
        return f"--config has {unknown[1]}, which is no flag of this command; `--help` lists them all"
    return None


def is_bool(kind: Any) -> bool:
    return kind is bool or bool in typing.get_args(kind)


def is_list(kind: Any) -> bool:
    options = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    return any(typing.get_origin(o) is list for o in options)


def normalise(argv: Sequence[str], kinds: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """Rewrite an argument list in any supported spelling to words `--flag=value`, which `parse` takes.

    Other systems' flags get our names, `--hidden_dims 32 64` becomes a list, and a switch without a value true.
    kinds: flag -> type; extra: further flags to let through. Raises ValueError for an unknown flag, and names
    similar ones.
    """
    known = [*kinds, "config", "print_config", "help", *extra]
    words = [SHORT.get(w, w) for w in argv]
    out: list[str] = []
    spelt: dict[str, tuple[str, list[str]]] = {}  # our flag -> another system's name of it, and its values
    at = 0
    while at < len(words):
        word = "--help" if words[at] == "-h" else words[at]
        at += 1
        if not word.startswith("--") or word == "--":
            raise ValueError(f"unexpected argument {word!r}: every setting is a flag, --name value")
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        if not equals:
            while at < len(words) and not is_flag(words[at]):
                values.append(words[at])
                at += 1
        if name == "cpu":
            name, values = "device", ["cpu"]
        if name == "recons_objective":
            if not values or values[0] not in RECONS_OBJECTIVE:
                raise ValueError(f"--recons_objective {' '.join(values)}: valid: {', '.join(RECONS_OBJECTIVE)}")
            name, values = "recons_dist", [RECONS_OBJECTIVE[values[0]]]
        if name == "data.params.root":
            values = [collection_root(v) for v in values]
        name = our_name(name, values, spelt)
        own = typing.get_args(kinds.get(name))  # a value that this command knows itself is no other system's
        values = [v if v in own else VALUES.get((name, v.lower()), v) for v in values]
        base = name.split(".")[0]
        if base not in known and base.replace("-", "_") in known:
            name = name.replace("-", "_")
            base = name.split(".")[0]
        if base not in known:
            raise ValueError(f"--{name}: no such flag{nearest(name, known)}; `--help` lists them all")
        kind = kinds.get(base)
        if is_list(kind) and "" in values:
            raise ValueError(f"--{name}: one of its {len(values)} values is empty")
        check_words(name, values)
        if base in ("help", "print_config"):
            out.append(f"--{base}")
        elif name == base and is_list(kind) and not (len(values) == 1 and is_yaml(values[0])):
            out.append(f"--{name}=[{', '.join(quoted(v, kind) for v in values)}]")
        elif is_bool(kind) and not values:
            out.append(f"--{name}=true")
        elif len(values) != 1:
            got = "no value" if not values else f"{len(values)} values: {' '.join(values)}"
            raise ValueError(f"--{name} takes one value, got {got}")
        else:
            if is_bool(kind):
                values = [
                    {"1": "true", "0": "false", "yes": "true", "no": "false"}.get(v, v.lower()) for v in values
                ]
            out.append(f"--{name}={values[0]}")
    return out


def our_name(name: str, values: list[str], spelt: dict[str, tuple[str, list[str]]]) -> str:
    """Return our name for another system's flag, or `name` itself if it is not one.

    spelt: our flag -> the name and values by which it was given so far; updated in place. Raises ValueError if
    two names of the same flag are given with different values.
    """
    ours = ALIASES.get(name, ALIASES.get(name.replace("-", "_"), name))
    if ours != name:
        before, had = spelt.setdefault(ours, (name, values))
        if before != name and had != values:
            raise ValueError(
                f"--{before} {' '.join(had)} and --{name} {' '.join(values)}: here both are --{ours}; give one "
                "value"
            )
    return ours


def check_words(name: str, values: Sequence[str]) -> None:
    """Raise ValueError for a value that YAML would read as a list that is too deep, too large, or contains
    itself."""
    for value in values:
        if not value.startswith(("[", "{", "&", "*", "!")):
            continue
        try:
            check_shape(value)
        except BeyondBoundsError as error:
            raise ValueError(f"--{name} {value:.40}: {error}") from None
        except yaml.YAMLError:
            continue  # a name with such a beginning


def is_yaml(value: str) -> bool:
    """Return whether one value stands for a whole list: written as YAML, or null."""
    return value[:1] in ("[", "{") or value.lower() in ("null", "none", "~")


def quoted(value: str, kind: Any) -> str:
    return json.dumps(value) if "str" in str(kind) else value


def is_flag(word: str) -> bool:
    """Return whether a word begins a flag; negative numbers such as -0.5 and -1e3 are values."""
    return word.startswith("-") and not re.fullmatch(r"-(\d|\.\d|inf|nan).*", word)


def build_parser(command: str, sections: Sequence[type], description: str) -> OneLineParser:
    """Return a command's parser: --config and one group of flags per dataclass."""
    return _built(command, tuple(sections), description, True)


def new_parser(command: str, sections: Sequence[type], description: str) -> OneLineParser:
    """Return a command's parser with one group of flags per dataclass and without --config."""
    return _built(command, tuple(sections), description, False)


@functools.cache
def _built(command: str, sections: tuple[type, ...], description: str, recipes: bool) -> OneLineParser:
    """Build a command's parser, or return the one built before in this process.

    The parser of `movae train` takes a tenth of a second, and a sweep or a resumed run needs it again.
    """
    words = " ".join(filter(None, (command, OPERANDS.get(command), "[--config RECIPE] [--flag value …]")))
    usage = f"movae {words}" if recipes else None
    parser = OneLineParser(prog=f"movae {command}", description=description, exit_on_error=False, usage=usage)
    for section in sections:
        parser.add_class_arguments(section, as_group=True)
    if recipes:
        parser.add_argument("--config", action="config", help="Recipe by name, or a YAML file of flags.")
    return parser


@functools.cache
def plain_flags(parser: OneLineParser) -> set[str]:
    """Return the flags, with dashes, that set one value each: all but --config, --print_config and --help."""
    return {f"--{name}" for name in defaults_of(parser)} - {"--config"}


@functools.cache
def defaults_of(parser: OneLineParser) -> dict[str, Any]:
    """Return flag -> its default, for all flags of a parser; it is not to be changed."""
    return dict(parser.get_defaults(skip_validation=True).as_dict())


def parse(parser: OneLineParser, words: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return flag -> value for the words that `normalise` returns; flags that they leave out have the
    `defaults`.

    defaults: values from a recipe or a saved run; those of the dataclasses count for the rest. Raises
    ValueError.
    """
    kept, own = dict(parser._defaults), [(action, action.default) for action in parser._actions]
    # jsonargparse compares every flag with every other to apply and check defaults, most of a tiny run's time.
    # Those of the dataclasses are right by themselves, unless a word changes a part of one (--agg_args.c).
    plain = not defaults and {word.partition("=")[0] for word in words} <= plain_flags(parser)
    try:
        parser.set_defaults(dict(defaults))
        parsed = parser.parse_args(list(words), defaults=not plain).as_dict()
    except ArgumentError as error:
        raise ValueError(tidy(str(error))) from None
    except (TypeError, KeyError) as error:
        raise ValueError(tidy(str(error))) from None
    finally:  # the parser is everybody's
        parser._defaults = kept
        for action, default in own:
            action.default = default
    if plain:
        parsed = {**defaults_of(parser), **parsed}
    values = copy.deepcopy(parsed)  # a list that is a flag's default is the parser's
    values.pop("config", None)
    return values


def read_flags(
    kind: type[Flags],
    command: str,
    description: str,
    argv: Sequence[str],
    needed: str = "",
    question: str = "",
) -> Flags:
    """Read the flags of a command into its dataclass `kind`, from `argv` in any supported spelling.

    needed: a flag that must be given; if it is not, ValueError is raised with `question` as its message.
    ValueError is also raised for an invalid flag.
    """
    words = normalise(argv, flag_types([kind]))
    if needed and not any(w.startswith((f"--{needed}=", "--help", "--print_config")) for w in words):
        raise ValueError(question)
    return kind(**parse(build_parser(command, [kind], description), words, {}))


def first_word_as(flag: str, argv: Sequence[str]) -> list[str]:
    """Return the arguments, in which a first word that is not a flag has become the value of `flag`."""
    return [f"--{flag}={argv[0]}", *argv[1:]] if argv and not argv[0].startswith("-") else list(argv)


def first_words_as(flag: str, argv: Sequence[str]) -> list[str]:
    """Return the arguments, in which all words before the first flag have become the values of `flag`."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [*([f"--{flag}", *argv[:count]] if count else []), *argv[count:]]


def take(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Remove the flag from words `--flag=value`: return its last value, or None, and the other words."""
    prefix = f"--{flag}="
    values = [w[len(prefix) :] for w in words if w.startswith(prefix)]
    return (values[-1] if values else None), [w for w in words if not w.startswith(prefix)]
