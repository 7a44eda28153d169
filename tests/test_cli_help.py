"""Help by task, the commented settings file, and completion in a shell."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import yaml

from movae_fast.cli import COMMANDS, TASKS, flag_texts, main, parsing, train_help, usage
from movae_fast.cli.flags import train
from movae_fast.cli.flags.data import DataCommand
from movae_fast.cli.flags.evaluate import EvaluateConfig
from movae_fast.cli.flags.prior import PriorRunConfig
from movae_fast.cli.flags.sample import SampleConfig
from movae_fast.cli.parsing import OPERANDS
from movae_fast.models import MODELS
from movae_fast.priors.config import PriorConfig
from movae_fast.training.config import SECTIONS, TrainConfig


def test_every_command_stands_under_one_task() -> None:
    listed = [name for names in TASKS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(COMMANDS)
    shown = [line.split()[0] for line in usage().splitlines() if line.startswith("  ")]
    assert sorted(shown) == sorted(COMMANDS)


def test_the_short_help_is_short_and_has_the_names(capsys) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 90
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert all(name in shown for name in ("upgrad", "fashion_mnist", "--help-all", *MODELS))
    flags = [name for names in train_help.TASKS.values() for name in names]
    assert len(flags) == len(set(flags))
    assert "(vae\n" not in shown  # a remark is left out whole


@pytest.mark.parametrize("command", OPERANDS)
def test_the_help_says_what_stands_before_the_flags(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert capsys.readouterr().out.startswith(f"usage: movae {command} {OPERANDS[command]} [--config")


def test_every_flag_has_a_text() -> None:
    texts = flag_texts.flag_texts(list(SECTIONS.values()))
    assert set(texts) == {f.name for section in SECTIONS.values() for f in dataclasses.fields(section)}
    assert texts["limit_test"] == "Use this many evenly spaced test images; 0 means all."


@pytest.mark.parametrize("recipe", [None, "demo", "provlae/mpi3d_toy"])
def test_the_settings_file_is_the_configuration(recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    """What is read back of it, by the parser of `movae train`, is what it was written from."""
    monkeypatch.chdir(tmp_path)
    if recipe is not None and recipe != "demo":
        from movae_fast.training.config_files import recipe_names

        recipe = next(name for name in recipe_names() if name.startswith("provlae/"))
    assert main(["init", "my.yaml", *(["--recipe", recipe] if recipe else [])]) == 0
    read = train.parse(["--config", "my.yaml"])
    expected = train.parse(["--config", recipe] if recipe else [])
    assert read.config.flat() == expected.config.flat()
    text = Path("my.yaml").read_text()
    assert "# Learning rate.\nlr: " in text
    assert "\n# latent_dim: null\n" in text or recipe is not None
    assert set(yaml.safe_load(text)) <= set(TrainConfig().flat())
    assert main(["init", "my.yaml"]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert Path("my.yaml").read_text() == text
    assert main(["init", "other.yaml", "--recipe", "demoo"]) == 2
    assert "--recipe demoo: no such file or recipe" in capsys.readouterr().err


def test_completion_in_bash(tmp_path: Path, capsys) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "movae.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        line = " ".join(f'"{w}"' for w in words)
        code = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_movae; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
        return set(done.stdout.split())

    assert completed("movae", "ev") == {"evaluate"}
    assert "--latent_dim" in completed("movae", "train", "--lat")
    assert completed("movae", "train", "--agg", "upg") == {"upgrad"}
    assert "onnx" in completed("movae", "export", "--format", "on")
    for shell in ("zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        assert "upgrad" in capsys.readouterr().out


WORDS = {
    "train": ["--lr=1e-5", "--hidden_dims=[8, 8]", "--dataset=digits", "--beta=null", "--normalize=true"],
    "data": ["--image_size=32"],
    "evaluate": ["--weights=runs/a", "--samples=30"],
    "prior": ["--weights=runs/a", "--kind=gmm", "--components=3"],
    "sample": ["--weights=runs/a", "--seed=4"],
}
FLAGS = {
    "train": list(SECTIONS.values()),
    "data": [DataCommand],
    "evaluate": [EvaluateConfig],
    "prior": [PriorConfig, PriorRunConfig],
    "sample": [SampleConfig],
}


@pytest.mark.parametrize("command", FLAGS)
def test_a_parse_of_the_given_flags_alone_is_the_whole_parse(command: str) -> None:
    """Where no word needs the defaults to be applied and checked they are not: the values are the same."""
    parser = parsing.new_parser(command, FLAGS[command], "")
    for words in ([], WORDS[command]) if command == "train" else (WORDS[command],):
        quick, whole = parsing.parse(parser, words, {}), parser.parse_args(words).as_dict()
        assert list(quick.items()) == list(whole.items())
        assert [type(value) for value in quick.values()] == [type(value) for value in whole.values()]
        assert bool(words) == (quick != parsing.defaults_of(parser))


def test_a_word_that_changes_a_part_of_a_default_needs_the_whole_parse() -> None:
    parser = parsing.new_parser("train", list(SECTIONS.values()), "")
    assert parsing.parse(parser, ["--agg_args.c=0.4"], {})["agg_args"] == {"c": 0.4}
    assert parsing.parse(parser, ["--lr=0.1"], {"agg_args": {"c": 1}, "lr": 2.0})["agg_args"] == {"c": 1}
    with pytest.raises(ValueError, match="--lr x: expected"):
        parsing.parse(parser, ["--lr=x"], {})
    with pytest.raises(ValueError, match="required: weights"):
        parsing.parse(parsing.new_parser("sample", [SampleConfig], ""), ["--seed=4"], {})
