"""Read flags from YAML files: recipes by name, files of flags, and configurations of the VAE/beta-VAE/MMD-VAE
collection. Torch is not imported."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from movae_fast.aggregation.catalog import CONES
from movae_fast.names import nearest
from movae_fast.training.config import FILLED_IN
from movae_fast.training.yaml_file import read_yaml

RECIPES = Path(__file__).parent.parent / "recipes"


def flag_types(sections: Sequence[type]) -> dict[str, Any]:
    """Return flag -> type for all fields of the given dataclasses."""
    types: dict[str, Any] = {}
    for section in sections:
        hints = typing.get_type_hints(section)
        types |= {f.name: hints[f.name] for f in dataclasses.fields(section)}
    return types


def recipe_names() -> list[str]:
    """Return the sorted names of the recipes that --config accepts."""
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))


def read_config(name: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return flag -> value from the recipe or YAML file `name`.

    kinds: flag -> type, to which the values are converted. Raises ValueError for an unknown recipe, a file that
    does not parse, or a name in it that is not a flag.
    """
    path = find_yaml(name, RECIPES, "recipe")
    values = read_yaml(path, "--config")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {path} must hold flags by name, as `movae train --print_config` prints them"
        )
    if isinstance(values.get("encoder"), dict) and isinstance(values.get("train"), dict):
        values = from_collection(values)
    values = {key: value for key, value in values.items() if key not in FILLED_IN}  # of a run's config.yaml
    for key in values:
        if key not in kinds:
            raise ValueError(f"--config {path}: {key} is no flag{nearest(str(key), kinds)}")
    if values.get("resume") is not None:
        raise ValueError(f"--config {path}: resume is no setting of a file; give --resume {values['resume']}")
    return with_its_regularizer({k: typed(k, v, kinds[k]) for k, v in values.items()})


def find_yaml(name: str, folder: Path, what: str) -> Path:
    """Return the path of the YAML file that --config names, or else of the file NAME.yaml in `folder`.

    what: "recipe" or "sweep", for the message. Raises ValueError if there is neither.
    """
    path, own = Path(name).expanduser(), folder / f"{name}.yaml"
    for candidate in (path, own):
        with contextlib.suppress(OSError, ValueError):  # such as a name that is too long
            if candidate.is_file():
                return candidate
    names = sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))
    close = nearest(name, names) or f"; {what}s: {listed(names)}"
    raise ValueError(f"--config {name}: no such file or {what}{close}")


def listed(names: Sequence[str], most: int = 300) -> str:
    """Return names joined by commas, cut to about `most` characters and then with the number of those left
    out."""
    kept = list(names)
    while kept and len(", ".join(kept)) > most:
        kept.pop()
    left = len(names) - len(kept)
    return ", ".join(kept) + (f", … ({left} more)" if left else "")


BOOLEANS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def typed(name: str, value: Any, kind: Any) -> Any:
    """Convert a flag's value from a YAML file to the flag's type `kind`, which may be a union.

    Text that holds a number, or yes or no, is converted too. Raises ValueError with the flag's name if no type
    fits.
    """
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    options = typing.get_args(kind) if union else (kind,)
    for option in options:
        with contextlib.suppress(UnfitError):
            return as_type(value, option)
    words = [w for option in options for w in type_words(option)]
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "…"
    close = nearest(value, words) if isinstance(value, str) and len(words) > 1 else ""
    raise ValueError(f"--{name} {shown}: expected {' or '.join(words)}{close}")


class UnfitError(Exception):
    """Report that a value cannot be converted to a type."""


def as_type(value: Any, kind: Any) -> Any:
    """Return the value converted to `kind`, a type that is not a union. Raises UnfitError if the value does not
    fit."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (kind is types.NoneType and value is None):
        return value
    if origin is typing.Literal and type(value) in (str, int) and value in parts:
        return value
    if kind is bool and isinstance(value, str) and value.lower() in BOOLEANS:
        return BOOLEANS[value.lower()]
    if kind in (bool, str) and type(value) is kind:
        return value
    if kind in (int, float):
        if isinstance(value, str) and NUMBER.fullmatch(value):
            value = int(value) if re.fullmatch(r"[-+]?\d+", value) else float(value)
        if type(value) is kind or (kind is float and type(value) is int and abs(value) < 1e300):
            return kind(value)
    if origin is list and isinstance(value, list):
        return [as_type(v, parts[0]) for v in value]
    if origin is dict and isinstance(value, dict):
        return {as_type(k, parts[0]): as_type(v, parts[1]) for k, v in value.items()}
    raise UnfitError


def type_words(kind: Any) -> list[str]:
    """Return how an error message lists a type: its choices, or a phrase such as "a whole number"; [] for
    None."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(a) for a in typing.get_args(kind)]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if kind in names:
        return [names[kind]]
    if typing.get_origin(kind) is list:
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        return [f"a list of {plural.get(typing.get_args(kind)[0], 'values')}"]
    return ["values by name"] if typing.get_origin(kind) is dict else []


def with_its_regularizer(values: dict[str, Any]) -> dict[str, Any]:
    """Return a saved run's flags, with upgrad_regularizer "trace" if the run is older than that flag."""
    recorded = {"upgrad_norm_eps", "upgrad_reg_eps"} <= values.keys()
    if recorded and "upgrad_regularizer" not in values and values.get("agg") in CONES:
        return values | {"upgrad_regularizer": "trace"}
    return values


def from_collection(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a configuration of another program, the VAE/beta-VAE/MMD-VAE collection, to this trainer's
    settings.

    tree: its YAML file as a dictionary, with the sections encoder, data and train.
    """
    data, encoder, train = (within(tree, part) for part in ("data", "encoder", "train"))
    root, network = within(data, "params"), within(encoder, "params")
    if not isinstance(root.get("root", ""), str):
        raise ValueError(f"--config: data.params.root {root['root']!r} is no path")
    is_mmd = "coef_lambda" in train or "coef_alpha" in train
    name = str(data.get("target", "")).split(".")[-1]
    flags: dict[str, Any] = {
        "arch": "mmd_vae" if is_mmd else "cnn_vae",
        "normalize": True,
        "optimizer": "adam",
        "eval_freq": 0,
        "seed": tree.get("seed"),
        "dataset": name.lower() or None,
        "data_dir": collection_root(root["root"]) if "root" in root else None,
        "image_size": root.get("img_size"),
        "resize": "bilinear",
        "num_workers": within(tree, "dataloader").get("num_workers"),
        "latent_dim": network.get("z_dim"),
        "dim": network.get("dim"),
        "dim_mults": network.get("dim_mults"),
        "with_bn": network.get("with_bn"),
        "steps": train.get("n_steps"),
        "batch_size": train.get("batch_size"),
        "log_every": train.get("print_freq"),
        "checkpoint_every": train.get("save_freq"),
        "num_samples": train.get("n_samples"),
        "coef_kl": train.get("coef_kl"),
        "mmd_alpha": train.get("coef_alpha"),
        "mmd_lambda": train.get("coef_lambda"),
        "lr": within(within(train, "optim"), "params").get("lr"),
    }
    if name.lower() == "celeba":
        flags["crop"] = "stylegan"
    return {k: v for k, v in flags.items() if v is not None}


def within(tree: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """Return the section `part` of a configuration; {} if it is missing. Raises ValueError if it is not a
    mapping."""
    value = tree.get(part)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"--config: {part} holds settings by name, not {value!r:.80}")
    return value


def collection_root(given: str) -> str:
    """Return the data_dir that corresponds to the data folder of the VAE/beta-VAE/MMD-VAE collection.

    That folder is laid out as in torchvision (~/data with MNIST/raw in it). If it is the dataset's own folder
    (~/data/MNIST), the folder above is returned.
    """
    root = Path(given).expanduser()
    own = any((root / name).is_dir() for name in ("raw", "img_align_celeba"))
    return str(root.parent if own else root)
