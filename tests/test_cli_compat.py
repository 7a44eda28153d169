"""Every command of the three systems' documentation, as written there, on tiny data in the original formats.

What a test adds to end quickly is put in after the command line is parsed and recorded: two images a step, one
step. The command line itself stays as it is.
"""

import copy
import itertools
import shlex

import imageio.v3 as iio
import pytest
import yaml

from movae_fast.cli import main, parsing, train
from movae_fast.cli.flags.train import build_parser
from movae_fast.training.checkpoint import load
from tests import datafiles


@pytest.fixture(scope="module")
def original_files(tmp_path_factory):
    """All data sets below one folder."""
    root = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        datafiles.write_all(root, patch)
        yield root


@pytest.fixture
def place(tmp_path, monkeypatch, original_files):
    """A working directory with data/, and a home with ~/data as the collection's configurations want it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("data", "home/data/CelebA", "home/data/MNIST"):
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).symlink_to(original_files)
    return tmp_path


@pytest.fixture
def parsed(monkeypatch):
    """Configurations that reached training, as parsed; training itself is cut to a step of two images."""
    seen = []
    setup = train.setup

    def short(config):
        seen.append(copy.deepcopy(config))
        config.run.steps, config.run.num_samples = 1, 2
        config.data.batch_size, config.data.num_workers = 2, 0
        return setup(config)

    monkeypatch.setattr(train, "setup", short)
    return seen


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(train, "draw_run", lambda run, tag: None)


def movae(command):
    return main(shlex.split(command))


# ---- MO-VAE

COMMON = "--epochs 100 --agg {agg} --optimizer adamw"
MO_VAE = {
    "vae": "--dataset {dataset} --arch vae " + COMMON + " --lr 0.001 --save_freq 10 --latent_dim 128 "
    "--hidden_dims 32 64 128 256 512 --recons_dist bernoulli --recons_reduction mean "
    '--loss_weights 1.0 0.00025 --use_wandb --wandb_name "VAE {label} {agg}"',
    "betatc_vae": "--dataset {dataset} --arch betatc_vae " + COMMON + " --lr 0.001 --save_freq 10 "
    "--latent_dim 128 --recons_dist bernoulli --recons_reduction mean "
    '--loss_weights 1.0 1.0 1.0 1.0 --use_wandb --wandb_name "BetaTCVAE {label} {agg}"',
    "vq_vae": "--dataset {dataset} --arch vq_vae " + COMMON + " --lr 3e-4 --save_freq 10 "
    "--embedding_dim 64 --num_embeddings 512 --recons_dist bernoulli --recons_reduction mean "
    '--loss_weights 1.0 1.0 0.25 --use_wandb --wandb_name "VQ-VAE {label} {agg}"',
}
# What the commands ask for, written down again by hand.
ASKED = {
    "vae": {
        "lr": 0.001,
        "latent_dim": 128,
        "hidden_dims": [32, 64, 128, 256, 512],
        "loss_weights": [1.0, 0.00025],
        "wandb_name": "VAE {label} {agg}",
    },
    "betatc_vae": {
        "lr": 0.001,
        "latent_dim": 128,
        "loss_weights": [1.0] * 4,
        "wandb_name": "BetaTCVAE {label} {agg}",
    },
    "vq_vae": {
        "lr": 0.0003,
        "embedding_dim": 64,
        "num_embeddings": 512,
        "loss_weights": [1.0, 1.0, 0.25],
        "wandb_name": "VQ-VAE {label} {agg}",
    },
}
TWELVE = [
    (arch, dataset, agg)
    for arch in MO_VAE
    for dataset in ("cifar100", "celeba")
    for agg in ("jd_sum", "upgrad")
]


def mo_vae_command(arch, dataset, agg):
    return MO_VAE[arch].format(
        dataset=dataset, agg=agg, label={"cifar100": "CIFAR100", "celeba": "CelebA"}[dataset]
    )


# Half of the twelve, in which each pair of architecture, dataset and aggregator occurs; the rest are slow.
HALF = [
    (arch, dataset, ("jd_sum", "upgrad")[(i + j) % 2])
    for i, arch in enumerate(MO_VAE)
    for j, dataset in enumerate(("cifar100", "celeba"))
]


@pytest.mark.parametrize(
    ("arch", "dataset", "agg"),
    [pytest.param(*case, marks=() if case in HALF else pytest.mark.slow) for case in TWELVE],
)
def test_mo_vae(place, parsed, undrawn, monkeypatch, arch, dataset, agg):
    pytest.importorskip("wandb")
    # "disabled" is wandb without its service process; one test below runs it offline in earnest.
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert movae("train " + mo_vae_command(arch, dataset, agg)) == 0
    flat = parsed[0].flat()
    label = {"cifar100": "CIFAR100", "celeba": "CelebA"}[dataset]
    asked = ASKED[arch] | {"wandb_name": ASKED[arch]["wandb_name"].format(label=label, agg=agg)}
    asked |= {"arch": arch, "dataset": dataset, "agg": agg, "epochs": 100, "steps": 0, "optimizer": "adamw"}
    asked |= {"save_freq": 10, "recons_dist": "bernoulli", "recons_reduction": "mean", "use_wandb": True}
    asked |= {"batch_size": 128, "image_size": 32 if dataset == "cifar100" else 64, "data_dir": "data"}
    assert {k: flat[k] for k in asked} == asked
    (run,) = (place / "runs" / dataset / arch / agg).iterdir()
    assert (run / "checkpoints" / "last.pt").is_file()
    assert (run / "metrics.jsonl").read_text().count("test/reconstruction") == 1


def test_wandb_offline_needs_no_network(place, parsed, undrawn, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its environment once a process
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # whoever asks there gets no answer
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert movae("train " + mo_vae_command("vae", "cifar100", "upgrad")) == 0
    (run,) = (place / "runs" / "cifar100" / "vae" / "upgrad").iterdir()
    run_id = (run / "wandb_id").read_text()
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert (offline / f"run-{run_id}.wandb").stat().st_size > 0
    wandb.teardown()


def test_wandb_missing_is_said_before_anything_else(place, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert movae("train " + mo_vae_command("vae", "cifar100", "upgrad")) == 2
    assert capsys.readouterr().err.strip() == (
        "movae train: --use_wandb needs the extra: pip install 'movae-fast[wandb]'"
    )
    assert not (place / "runs").exists()


@pytest.fixture
def parse_only(monkeypatch):
    """The configuration that a command line means; nothing is trained."""

    class Parsed(BaseException):
        pass

    def stop(config):
        raise Parsed(config)

    monkeypatch.setattr(train, "setup", stop)

    def parse(command):
        with pytest.raises(Parsed) as caught:
            movae("train " + command)
        return caught.value.args[0].flat()

    return parse


@pytest.mark.parametrize(("arch", "dataset", "agg"), TWELVE)
def test_recipes_are_the_commands(parse_only, arch, dataset, agg):
    command = parse_only(mo_vae_command(arch, dataset, agg))
    recipe = parse_only(f"--config mo_vae/{dataset}-{arch}-{agg}")
    differ = {k for k in command if command[k] != recipe[k]}
    # The recipe is what was published, with TorchJD's regularizer; the command alone is strict.
    torchjd = {"upgrad_regularizer", "upgrad_norm_eps", "upgrad_reg_eps"} if agg == "upgrad" else set()
    assert differ == {"use_wandb", "wandb_name"} | torchjd


LATER = [(dataset, agg) for dataset in ("cifar100", "celeba") for agg in ("sum", "upgrad")]


def test_there_are_twelve_recipes_of_mo_vae_and_its_later_settings():
    names = [n for n in parsing.recipe_names() if n.startswith("mo_vae/")]
    published = [f"mo_vae/{dataset}-{arch}-{agg}" for arch, dataset, agg in TWELVE]
    assert sorted(names) == sorted(published + [f"mo_vae/{d}-vae-{a}-b256" for d, a in LATER])
    for name in names:  # each says which of MO-VAE's commits it is
        header = (parsing.RECIPES / f"{name}.yaml").read_text().splitlines()[0]
        assert ("(commit 9611bf8)" in header) == (name in published), name
        assert ("(commit 0311e30)" in header) == (name not in published), name


@pytest.mark.parametrize(("dataset", "agg"), LATER)
def test_mo_vaes_later_setting(parse_only, dataset, agg):
    flat = parse_only(f"--config mo_vae/{dataset}-vae-{agg}-b256")
    asked = {"optimizer": "adam", "lr": 1e-4, "batch_size": 256, "epochs": 200, "weight_decay": 0.0}
    asked |= {"scheduler": "cosine", "scheduler_per": "epoch", "scheduler_lr_min": 1e-6}
    assert {k: flat[k] for k in asked} == asked
    images = {"cifar100": 50_000, "celeba": 162_770}[dataset]
    assert flat["loss_weights"] == [1.0, pytest.approx(256 / images, rel=1e-4)]


def test_mo_vaes_other_flags(place, parsed, undrawn):
    """Those of its documentation besides the twelve commands, and those of today's version."""
    (place / "path" / "to").mkdir(parents=True)
    (place / "path" / "to" / "data").symlink_to(place / "data")
    command = (
        f"train --dataset cifar100 --arch vae --data_dir {place}/path/to/data --device cpu --save_path out "
        "--seed 7 --num_workers 4 --layer_norm layer --wd 0.01 --max_grad_norm 1.0 --momentum 0.8 "
        "--scheduler cosine --scheduler_lr_min 1e-5 --scheduler_gamma 0.5 --scheduler_milestones 30 60 "
        "--anneal_steps 100 --eval_freq 5 --num_samples 8 --max_fid_samples 1000"
    )
    assert movae(command + " --recons_objective bce --recons_activation sigmoid --agg sum") == 0
    assert movae(command + " --normalize --optimizer sgd --agg upgrad") == 0
    assert movae(command + " --normalize_inputs --num_vis_samples 9") == 0
    first, second, third = (config.flat() for config in parsed)
    asked = {"data_dir": f"{place}/path/to/data", "device": "cpu", "save_path": "out", "seed": 7}
    asked |= {"num_workers": 4, "layer_norm": "layer", "weight_decay": 0.01, "max_grad_norm": 1.0}
    asked |= {"momentum": 0.8, "scheduler": "cosine", "scheduler_lr_min": 1e-5, "scheduler_gamma": 0.5}
    asked |= {"scheduler_milestones": [30, 60], "anneal_steps": 100, "eval_freq": 5, "max_fid_samples": 1000}
    assert {k: first[k] for k in asked} == asked
    assert (first["recons_dist"], first["recons_activation"], first["agg"]) == ("bernoulli", "sigmoid", "sum")
    assert (second["normalize"], second["optimizer"], second["num_samples"]) == (True, "sgd", 8)
    assert (third["normalize"], third["num_samples"]) == (True, 9)


# ---- torch-vae

WEIGHTS = "vae_filters_0128_dims_0064.pth"
TORCH_VAE = {
    "mnist": (
        f"reconstruct --model=models/mnist/{WEIGHTS}  --dataset=mnist  --latent_dims=64 "
        "--outdir=reconstructions/mnist",
        f"generate --model=models/mnist/{WEIGHTS}  --latent_dims=64 --outdir=./samples/mnist "
        "--nimg_channels=1 --nsamples=64",
    ),
    "fashion-mnist": (
        f"reconstruct --model=models/fashion-mnist/{WEIGHTS}  --dataset=fashion-mnist  --latent_dims=64 "
        "--outdir=reconstructions/fashion-mnist",
        f"generate --model=models/fashion-mnist/{WEIGHTS} --latent_dims=64 --outdir=./samples/fashion-mnist "
        "--nimg_channels=1 --nsamples=64",
    ),
    "celeb-a": (
        f"reconstruct --model=models/celeb-a/{WEIGHTS}  --dataset=celeb-a --latent_dims=64 "
        "--outdir=reconstructions/celeb-a",
        f"generate --model=models/celeb-a/{WEIGHTS}  --latent_dims=64 --outdir=./samples/celeb-a/ "
        "--nimg_channels=3 --nsamples=64",
    ),
}


@pytest.mark.parametrize("dataset", TORCH_VAE)
def test_torch_vae_trains_reconstructs_and_generates(place, parsed, undrawn, dataset):
    assert movae(f"train --batchsize=128 --epochs=100 --dataset={dataset} --latent_dims=64") == 0
    flat = parsed[0].flat()
    asked = {"arch": "torch_vae", "dataset": dataset.replace("-", "_").replace("celeb_a", "celeba")}
    asked |= {"batch_size": 128, "epochs": 100, "latent_dim": 64, "max_filters": 128, "image_size": 64}
    asked |= {"optimizer": "adamw", "weight_decay": 0.01}  # torch's default, which it does not touch
    assert {k: flat[k] for k in asked} == asked
    assert parsed[0].activation == "sigmoid"
    assert not parsed[0].data.normalize
    weights = place / "models" / dataset / WEIGHTS
    assert weights.is_file()
    before = weights.read_bytes()
    reconstruct, generate = TORCH_VAE[dataset]
    assert movae(reconstruct) == 0
    assert movae(f"{reconstruct}_test --cpu --rec_testdata --max_filters 128") == 0
    side = 64 + 4, 2 * 64 + 6, 3
    for folder, n in ((dataset, datafiles.N_TEST), (f"{dataset}_test", datafiles.N_TEST)):
        files = sorted((place / "reconstructions" / folder).rglob("*.png"))
        assert len(files) == n
        assert iio.imread(files[0]).shape == side
    assert movae(generate) == 0
    assert movae(f"{generate} --cpu --seed 3 --max_filters 128 --outdir=samples/again") == 0
    for folder in (dataset, "again"):
        files = {p.name for p in (place / "samples" / folder).iterdir()}
        assert files == {"all.png", *(f"img_{i:06d}.png" for i in range(64))}
    # The same command again trains again, and keeps the weights that are there.
    assert movae(f"train --batchsize=128 --epochs=100 --dataset={dataset} --latent_dims=64") == 0
    assert weights.read_bytes() == before


def test_torch_vaes_other_flags(place, parsed, undrawn):
    assert (
        movae("train --batchsize=16 --max_filters 64 --epochs 2 --lr 0.01 --dataset cifar-100 --cpu --seed 5")
        == 0
    )
    flat = parsed[0].flat()
    asked = {"arch": "torch_vae", "dataset": "cifar100", "batch_size": 16, "max_filters": 64, "lr": 0.01}
    assert {k: flat[k] for k in asked} == asked
    assert (flat["seed"], flat["device"]) == (5, "cpu")
    assert (place / "models" / "cifar-100" / "vae_filters_0064_dims_0128.pth").is_file()


# ---- the collection of VAE, beta-VAE and MMD-VAE


def collection(dataset, loss):
    rgb = dataset == "celeba"
    z, channels, dim = (128, 3, 64) if rgb else (2, 1, 32)
    mults = [1, 2, 4, 8] if rgb else [1, 2, 4]
    return {
        "seed": 8888,
        "data": {
            "target": "datasets.celeba.CelebA" if rgb else "datasets.mnist.MNIST",
            "params": {
                "root": "~/data/CelebA/" if rgb else "~/data/MNIST/",
                "img_size": 64 if rgb else 32,
                "split": "train",
            },
        },
        "dataloader": {"num_workers": 4, "pin_memory": True, "prefetch_factor": 2},
        "encoder": {
            "target": "models.simple_cnn.Encoder",
            "params": {"z_dim": z, "in_dim": channels, "dim": dim, "dim_mults": mults, "with_bn": True},
        },
        "decoder": {
            "target": "models.simple_cnn.Decoder",
            "params": {
                "z_dim": z,
                "dim": dim,
                "dim_mults": mults[::-1],
                "out_dim": channels,
                "with_bn": True,
                "with_tanh": True,
            },
        },
        "train": {
            "n_steps": 150000 if rgb else 10000,
            "batch_size": 256,
            "resume": None,
            "print_freq": 100,
            "sample_freq": 1000,
            "save_freq": 10000,
            "n_samples": 64,
            **loss,
            "optim": {"target": "torch.optim.Adam", "params": {"lr": 0.02 if rgb else 0.001}},
        },
    }


CONFIGS = {
    "vae-celeba": collection("celeba", {"coef_kl": 1.0}),
    "vae-mnist": collection("mnist", {"coef_kl": 1.0}),
    "mmd-vae-mnist": collection("mnist", {"coef_lambda": 1.0, "coef_alpha": 1.0}),
}


@pytest.fixture
def configs(place):
    (place / "configs").mkdir()
    for name, tree in CONFIGS.items():
        (place / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return place


@pytest.mark.parametrize("name", CONFIGS)
def test_collection_trains_by_its_configuration(configs, parsed, undrawn, name):
    assert movae(f"train -c ./configs/{name}.yaml") == 0
    flat, tree = parsed[0].flat(), CONFIGS[name]
    asked = {
        "arch": "mmd_vae" if name.startswith("mmd") else "cnn_vae",
        "dataset": "celeba" if "celeba" in name else "mnist",
        "seed": 8888,
        "image_size": tree["data"]["params"]["img_size"],
        "num_workers": 4,
        "latent_dim": tree["encoder"]["params"]["z_dim"],
        "dim": tree["encoder"]["params"]["dim"],
        "dim_mults": tree["encoder"]["params"]["dim_mults"],
        "with_bn": True,
        "steps": tree["train"]["n_steps"],
        "batch_size": 256,
        "log_every": 100,
        "checkpoint_every": 10000,
        "num_samples": 64,
        "optimizer": "adam",
        "lr": tree["train"]["optim"]["params"]["lr"],
        "normalize": True,
        "resize": "bilinear",
    }
    assert {k: flat[k] for k in asked} == asked
    pixels = 64 * 64 * 3 if "celeba" in name else 32 * 32
    # Its KL has no 1/2 and is divided by the number of values; MMD-VAE's KL weighs 1 - alpha = 0.
    expected = [1, 0, 1] if name.startswith("mmd") else [1, 2 / pixels]
    assert parsed[0].weights() == pytest.approx(expected)
    assert parsed[0].activation == "tanh"


def test_collection_overrides_stand_over_the_configuration(configs, parsed, undrawn):
    assert movae("train -c ./configs/vae-mnist.yaml -e exp --train.coef_kl 20") == 0
    assert (configs / "exp" / "checkpoints" / "last.pt").is_file()
    assert parsed[0].weights() == pytest.approx([1, 40 / 1024])
    overrides = {
        "--train.coef_kl 20": ("coef_kl", 20),
        "--train.n_steps 7": ("steps", 7),
        "--train.batch_size=9": ("batch_size", 9),
        "--train.print_freq 3": ("log_every", 3),
        "--train.save_freq 4": ("checkpoint_every", 4),
        "--train.n_samples 5": ("num_samples", 5),
        "--train.optim.params.lr 0.5": ("lr", 0.5),
        "--dataloader.num_workers 1": ("num_workers", 1),
        "--seed 11": ("seed", 11),
    }
    for words in ("", *overrides):
        assert movae(f"train -c ./configs/vae-mnist.yaml {words}") == 0
    base, *changed = (config.flat() for config in parsed[1:])
    for flat, (key, value) in zip(changed, overrides.values(), strict=True):
        assert {k for k in flat if flat[k] != base[k]} == {key}
        assert flat[key] == value
    # Order does not matter: an override may stand before the file.
    assert movae("train --train.coef_lambda 3 --train.coef_alpha 0.5 -c ./configs/mmd-vae-mnist.yaml") == 0
    assert (parsed[-1].objective.mmd_lambda, parsed[-1].objective.mmd_alpha) == (3, 0.5)


def test_collection_overrides_of_data_and_network(configs, parse_only):
    command = (
        "-c ./configs/vae-mnist.yaml --data.params.root=~/data/CelebA/ --data.params.img_size 16 "
        "--encoder.params.z_dim 3 --decoder.params.z_dim 3 --encoder.params.dim 8 --decoder.params.dim 8 "
        "--encoder.params.dim_mults 1 2 --encoder.params.with_bn False"
    )
    base, flat = parse_only("-c ./configs/vae-mnist.yaml"), parse_only(command)
    assert {k: flat[k] for k in flat if flat[k] != base[k]} == {
        "data_dir": str(configs / "home" / "data" / "CelebA"),
        "image_size": 16,
        "latent_dim": 3,
        "dim": 8,
        "dim_mults": [1, 2],
        "with_bn": False,
    }


def test_collection_samples_in_every_mode(configs, parsed, undrawn):
    assert movae("train -c configs/vae-mnist.yaml -e exp") == 0
    command = (
        "sample -c configs/vae-mnist.yaml --seed 8888 --mode {mode} --weights exp/checkpoints/last.pt "
        "--n_samples 3 --save_dir out/{mode} --batch_size 2 --n_interpolate 4 --n_traverse 5 "
        "--traverse_range 2 --traverse_dim 1"
    )
    made = {
        "sample": {"sample.png"},
        "interpolate": {"interpolate.png", "interpolate.gif"},
        "traverse": {"traverse.png", "traverse.gif"},
        "reconstruct": {"reconstruct.png"},
        "visualize_latent": {"latent.png"},
    }
    for mode, files in made.items():
        assert movae(command.format(mode=mode)) == 0
        assert {p.name for p in (configs / "out" / mode).iterdir()} == files
    assert (
        movae(
            "sample -c configs/vae-mnist.yaml --weights exp/checkpoints/last.pt --n_samples 2 "
            "--save_dir out/sample"
        )
        == 0
    )
    assert (configs / "out" / "sample" / "sample-2.png").is_file()


def test_collection_samples_celeba(configs, parsed, undrawn):
    assert movae("train -c ./configs/vae-celeba.yaml -e exp --train.coef_kl 20") == 0
    assert (
        movae(
            "sample -c ./configs/vae-celeba.yaml --weights exp/checkpoints/last.pt --mode reconstruct "
            "--n_samples 4 --save_dir out"
        )
        == 0
    )
    assert iio.imread(configs / "out" / "reconstruct.png").ndim == 3


def test_collection_files_may_lie_in_the_root_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    assert parsing.collection_root("~/data/MNIST/") == str(tmp_path / "data")
    assert parsing.collection_root("~/data/CelebA/") == str(tmp_path / "data" / "CelebA")


# ---- the PyTorch port of proVLAE

PORT_README = (
    "torchrun --nproc_per_node=2 --master_port=29501 src/train.py --distributed --mode seq_train "
    "--dataset shapes3d --optim adamw --num_ladders 3 --batch_size 128 --num_epochs 15 --learning_rate 5e-4 "
    "--beta 8 --z_dim 3 --coff 0.5 --pre_kl --hidden_dim 32 --fade_in_duration 5000 "
    "--output_dir ./output/shapes3d/ --data_path ./data"
)
PORT_FIRST_README = (
    "python train.py --dataset shapes3d --mode seq_train --batch_size 100 --num_epochs 15 --learning_rate 5e-4 "
    "--beta 15 --z_dim 3 --hidden_dim 64 --fade_in_duration 5000 --optim adamw --image_size 64 --chn_num 3 "
    "--output_dir ./output/shapes3d/",
    "torchrun --nproc_per_node=2 train_ddp.py --distributed True --mode seq_train --dataset ident3d "
    "--num_ladders 3 --batch_size 128 --num_epochs 30 --learning_rate 5e-4 --beta 1 --z_dim 3 --coff 0.5 "
    "--hidden_dim 64 --fade_in_duration 5000 --output_dir ./output/ident3d/ --optim adamw",
)
# scripts/run_*.sh: set, batch, epochs, beta, z_dim, what else, hidden_dim.
PORT_FIRST_SCRIPTS = [
    f"python train.py --mode seq_train --dataset {name} --num_ladders 3 --batch_size {batch} "
    f"--num_epochs {epochs} --learning_rate 5e-4 --beta {beta} --z_dim 3 {more} --hidden_dim {hidden} "
    f"--fade_in_duration 5000 --output_dir ./output/{name}/ --optim adamw"
    for name, batch, epochs, beta, more, hidden in (
        ("mnist", 16, 30, 3, "", 32),
        ("fashionmnist", 16, 30, 3, "", 32),
        ("dsprites", 64, 30, 3, "", 32),
        ("shapes3d", 256, 1, 20, "", 32),
        ("mpi3d", 128, 15, 3, "--coff 0.3", 32),
        ("ident3d", 128, 15, 3, "--coff 0.3", 32),
        ("flowers102", 32, 30, 3, "--coff 0.2", 32),
        ("dtd", 32, 30, 3, "--coff 0.2", 64),
    )
]
# src/scripts/run_*.sh.
PORT_SCRIPTS = [
    f"torchrun --nproc_per_node=2 --master_port={port} src/train.py --distributed --mode seq_train "
    f"--dataset {name} --optim adamw --num_ladders {rungs} --batch_size  {batch} --num_epochs {epochs} "
    f"--learning_rate 5e-4 --beta {beta} --z_dim {z} --coff {coff} --pre_kl --hidden_dim {hidden} "
    f"--fade_in_duration 5000 --output_dir ./output/{name}/ --data_path ./data/{name}/ {more}"
    for name, port, rungs, batch, epochs, beta, z, coff, hidden, more in (
        ("mnist", 29501, 3, 64, 5, 3, 2, 0.5, 64, "--use_wandb --wandb_project PRO-VLAE"),
        ("fashionmnist", 29501, 3, 64, 30, 3, 2, 0.5, 32, ""),
        ("dsprites", 29502, 3, 256, 30, 8, 2, 0.5, 64, ""),
        ("shapes3d", 29501, 3, 128, 15, 8, 3, 0.5, 64, ""),
        ("mpi3d", 29501, 3, 128, 30, 8, 3, 0.5, 64, ""),
        ("ident3d", 29501, 3, 128, 30, 8, 3, 0.5, 64, ""),
        ("flowers102", 29501, 3, 128, 30, 8, 3, 0.5, 64, ""),
        ("dtd", 29501, 3, 128, 30, 8, 3, 0.5, 64, ""),
        ("imagenet", 29501, 4, 128, 30, 1, 8, 0.1, 64, ""),
    )
]
PORT = [PORT_README, *PORT_FIRST_README, *PORT_FIRST_SCRIPTS, *PORT_SCRIPTS]
PORT_SIDES = {"mnist": 28, "fashionmnist": 28, "dsprites": 64, "shapes3d": 64, "mpi3d": 64}  # else 128


@pytest.mark.parametrize("command", PORT)
def test_the_ports_commands(parse_only, command):
    words = shlex.split(command)
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    flat = parse_only(shlex.join(words[at + 1 :]))
    given = {w.removeprefix("--"): v for w, v in itertools.pairwise(words[at + 1 :]) if w.startswith("--")}
    asked = {"arch": "provlae", "ladder_net": "port", "mode": "seq_train", "optimizer": given["optim"]}
    asked |= {"batch_size": int(given["batch_size"]), "epochs": int(given["num_epochs"]), "lr": 5e-4}
    asked |= {"latent_dim": int(given["z_dim"]), "hidden_dim": int(given["hidden_dim"])}
    asked |= {"beta": float(given["beta"]), "coff": float(given.get("coff", 0.5)), "pre_kl": True}
    asked |= {"recons_dist": "bernoulli", "recons_reduction": "mean", "save_path": given["output_dir"]}
    asked |= {"fade_in_duration": 5000, "data_dir": given.get("data_path", "data")}
    asked |= {"image_size": PORT_SIDES.get(given["dataset"], 128)}
    asked |= {"distributed": True if "--distributed" in words else None}
    assert {k: flat[k] for k in asked} == asked
    name = {"fashionmnist": "fashion_mnist", "mpi3d": "mpi3d_toy"}.get(given["dataset"], given["dataset"])
    assert flat["dataset"] == name


def test_the_port_trains_as_written(place, parsed, undrawn):
    """In one process --distributed says how several are started; --mode traverse draws."""
    command = next(c for c in PORT_SCRIPTS if "--dataset mnist" in c).partition("src/train.py ")[2]
    command = command.partition(" --use_wandb")[0].replace("./data/mnist/", "./data")
    assert movae(f"train {command}") == 0
    (run,) = (place / "output" / "mnist" / "mnist" / "provlae" / "sum").iterdir()
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {f"stage_{s}.pt" for s in (1, 2, 3)}
    assert movae(f"train --arch provlae --mode traverse --init_from {run}") == 0
    assert (run / "figures" / "traversal_stage_3.gif").is_file()


def test_distributed_false_refuses_torchruns_processes(parse_only, monkeypatch, capsys):
    assert parse_only("--distributed False")["distributed"] is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_only("--distributed True")["distributed"] is True
    assert movae("train --distributed False") == 2
    assert "--distributed false: torchrun started 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mnist", "celeba", "dsprites", "shapes3d"])
def test_the_ports_recipes_have_its_network(parse_only, name):
    flat = parse_only(f"--config provlae/{name}-port")
    assert (flat["ladder_net"], flat["image_size"]) == ("port", PORT_SIDES.get(name, 128))
    assert parse_only(f"--config provlae/{name}")["ladder_net"] is None


# ---- spellings


@pytest.mark.parametrize(
    ("spelt", "flag", "value"),
    [
        ("--batchsize 3", "batch_size", 3),
        ("--batch-size 3", "batch_size", 3),
        ("--learning_rate 0.5", "lr", 0.5),
        ("--learning-rate=5e-1", "lr", 0.5),
        ("--num_epochs 3", "epochs", 3),
        ("--data_path /x", "data_dir", "/x"),
        ("--output_dir /x", "save_path", "/x"),
        ("--wd 0.1", "weight_decay", 0.1),
        ("--weight_decay 0.1", "weight_decay", 0.1),
        ("--normalize", "normalize", True),
        ("--normalize True", "normalize", True),
        ("--normalize_inputs", "normalize", True),
        ("--normalize false", "normalize", False),
        ("--cpu", "device", "cpu"),
        ("-e here", "exp_dir", "here"),
        ("--aggregator upgrad", "agg", "upgrad"),
        ("--agg UPGrad", "agg", "upgrad"),
        ("--arch VQ-VAE", "arch", "vq_vae"),
        ("--arch vae --latent_dims 9", "latent_dim", 9),
        ("--loss_weights 1 2", "loss_weights", [1.0, 2.0]),
        ("--loss_weights.kl 4", "loss_weights", {"kl": 4.0}),
        ("--agg cagrad --agg_args.c 0.4", "agg_args", {"c": 0.4}),
        ("--recons_objective mse", "recons_dist", "gaussian"),
        ("--recons_objective l1", "recons_dist", "laplacian"),
        *(
            (f"--dataset {name}", "dataset", "cifar10")
            for name in ("cifar10", "cifar-10", "CIFAR10", "cifar_10")
        ),
        *((f"--dataset {name}", "dataset", "celeba") for name in ("celeba", "celeb-a", "CelebA")),
        *((f"--dataset {name}", "dataset", "fashion_mnist") for name in ("fashion_mnist", "fashion-mnist")),
        ("--dataset cifar-100", "dataset", "cifar100"),
        ("--dataset oxford-flower-102", "dataset", "flowers102"),
    ],
)
def test_spellings(parse_only, spelt, flag, value):
    assert parse_only(spelt)[flag] == value


def test_cifar_100_is_not_cifar_10(place, parsed, undrawn):
    """torch-vae's own cifar-100 loads CIFAR-10."""
    assert movae("train --dataset cifar-100 --latent_dims 2 --max_filters 8") == 0
    (run,) = (place / "runs" / "cifar100" / "torch_vae" / "sum").iterdir()
    assert load(run / "checkpoints" / "last.pt")["config"]["dataset"] == "cifar100"


def test_a_parser_forgets_the_line_before():
    """It is built once per process."""
    first = parsing.parse(build_parser(), [], {})
    line = ["--lr=0.5", "--hidden_dims=[1,2]", "--loss_weights.kl=3"]
    other = parsing.parse(build_parser(), line, {"epochs": 3, "betas": [0.5, 0.6], "arch": "vq_vae"})
    assert (other["lr"], other["epochs"], other["betas"], other["arch"]) == (0.5, 3, [0.5, 0.6], "vq_vae")
    for value in [*first.values(), *other.values()]:
        if isinstance(value, list):
            value.append("changed by whoever got it")
    with pytest.raises(ValueError, match="--epochs"):
        parsing.parse(build_parser(), ["--epochs=x"], {"lr": 7.0})
    again = parsing.parse(build_parser(), [], {})
    assert again == parsing.parse(rebuilt(), [], {})
    assert again["lr"] != 0.5


def rebuilt():
    parsing._built.cache_clear()
    return build_parser()
