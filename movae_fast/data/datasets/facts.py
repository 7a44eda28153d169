"""State what is known of datasets without reading them: the names of their files, their factors, crops and
sizes.

This module imports no module that reads images, so that flags can be checked quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from movae_fast.data.fetch import Remote

# Sprites, which are rendered: their factors, the first of which is the shape (square, ellipse, heart).
SPRITES_NAMES = ("shape", "scale", "orientation", "pos_x", "pos_y")
SPRITES_SIZES = (3, 6, 40, 32, 32)

# Sets that torchvision reads.
IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
MNIST_FILES = f"MNIST/raw/{{{IDX_FILES}}}"
FASHION_MNIST_FILES = f"FashionMNIST/raw/{{{IDX_FILES}}}"
CIFAR10_FILES = "cifar-10-python.tar.gz or its folder cifar-10-batches-py"
CIFAR100_FILES = "cifar-100-python.tar.gz or its folder cifar-100-python"
SVHN_FILES = "train_32x32.mat, test_32x32.mat"
OMNIGLOT_105_FILES = (
    "omniglot-py/images_background.zip, omniglot-py/images_evaluation.zip, both also unpacked there"
)
FLOWERS102_FILES = "flowers-102/jpg/*.jpg, flowers-102/imagelabels.mat, flowers-102/setid.mat"
DTD_FILES = "dtd/dtd/images/*/*.jpg, dtd/dtd/labels/*.txt (dtd-r1.0.1.tar.gz unpacked in dtd)"

CELEBA_FILES = (
    "celeba/img_align_celeba.zip or celeba/img_align_celeba/*.jpg, celeba/list_eval_partition.txt, "
    "celeba/list_attr_celeba.txt, celeba/identity_CelebA.txt, celeba/list_bbox_celeba.txt, "
    "celeba/list_landmarks_align_celeba.txt"
)
# The systems' documented crops of the original: top, left, height and width in pixels.
CELEBA_CROPS: dict[str, tuple[int, int, int, int] | None] = {
    "center148": (35, 15, 148, 148),  # torchvision's CenterCrop(148), as in MO-VAE
    "center140": (39, 19, 140, 140),
    "stylegan": (57, 25, 128, 128),  # 128 around (x 89, y 121)
    "none": None,
}

FOLDER_FILES = (
    "your images (png, jpg, webp, bmp, tif, …) or tars of them, in train/ and test/, or anyhow and every tenth "
    "is for testing"
)
IMAGENET_FILES = "imagenet/train/CLASS/*.JPEG and imagenet/val/CLASS/*.JPEG, from https://image-net.org"

TORONTO = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
BINARY_MNIST = {
    "train": Remote(
        f"{TORONTO}binarized_mnist_train.amat",
        78_400_000,
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    ),
    "test": Remote(
        f"{TORONTO}binarized_mnist_test.amat",
        15_680_000,
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ),
}
BINARY_MNIST_FILES = (
    f"binary_mnist/binarized_mnist_train.amat, binary_mnist/binarized_mnist_test.amat, from {TORONTO}"
)
OMNIGLOT_FILES = "omniglot/chardata.mat from https://github.com/yburda/iwae (datasets/OMNIGLOT)"

IDENT3D_NAMES = (
    *("pos_x", "pos_y", "pos_z", "rotation_1", "rotation_2", "rotation_3"),
    *("hue_1", "hue_2", "spotlight_position", "hue_3"),
)
IDENT3D_FILES = (
    "3dident/train/raw_latents.npy, 3dident/train/images/*.png and the same in 3dident/test, "
    "from https://zenodo.org/records/4502485"
)

N_TEST = 10_000


@dataclass(frozen=True)
class Grid:
    """Describe a file with one image for every combination of ground-truth factors."""

    filename: str
    member: str  # the name of the array of images in the file
    image: tuple[int, ...]  # the shape of one image
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    home: str  # where the file is published
    scale: int = 1  # Stored values times this are grey levels.
    remote: Remote | None = None

    @property
    def size(self) -> int:
        """Return the number of images."""
        return math.prod(self.sizes)

    @property
    def shape_column(self) -> int:
        """Return the number of the factor that is the object's shape; its values serve as labels."""
        return next(i for i, name in enumerate(self.names) if name.endswith("shape"))

    @property
    def files(self) -> str:
        """Return, for an error, the name of the file that belongs into data_dir and its source."""
        return f"{self.filename} from {self.home}"


_MPI3D = {
    "member": "images",
    "image": (64, 64, 3),
    "names": ("object_color", "object_shape", "object_size", "camera_height", "background", "axis_1", "axis_2"),
    "sizes": (6, 6, 2, 3, 3, 40, 40),
    "home": "https://github.com/rr-learning/disentanglement_dataset",
}
GRIDS = {
    "dsprites": Grid(
        "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        "imgs",
        (64, 64),
        ("color", "shape", "scale", "orientation", "pos_x", "pos_y"),
        (1, 3, 6, 40, 32, 32),
        "https://github.com/google-deepmind/dsprites-dataset",
        scale=255,
    ),
    "shapes3d": Grid(
        "3dshapes.h5",
        "images",
        (64, 64, 3),
        ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation"),
        (10, 10, 10, 8, 4, 15),
        "https://storage.googleapis.com/3d-shapes/3dshapes.h5",
        remote=Remote(
            "https://storage.googleapis.com/3d-shapes/3dshapes.h5",
            267_573_662,
            "0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785",
        ),
    ),
    "mpi3d_toy": Grid("mpi3d_toy.npz", **_MPI3D),  # type: ignore[arg-type]
    "mpi3d_realistic": Grid("mpi3d_realistic.npz", **_MPI3D),  # type: ignore[arg-type]
    "mpi3d_real": Grid("mpi3d_real.npz", **_MPI3D),  # type: ignore[arg-type]
}
