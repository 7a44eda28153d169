"""Define the allowed words of settings that several modules share, as types and constants; this module imports
nothing heavy."""

from typing import Literal

# Models and what is drawn from them.
Activation = Literal["tanh", "sigmoid", "none"]
BetaPer = Literal["example", "batch"]
LadderNet = Literal["authors", "port"]
LatentKind = Literal["vector", "codebook", "hierarchy"]
Quantizer = Literal["vq", "ema", "fsq", "rvq", "grouped_rvq", "lfq", "bsq", "simvq"]
KLRows = Literal["scale", "group", "total"]
PresetName = Literal["mnist", "omniglot", "celeba64", "cifar10", "tiny"]  # of nvae
TextPreset = Literal["lagging", "texar", "multirate", "synthetic"]  # of lstm_vae
Preset = Literal[PresetName, TextPreset]
Gate = Literal["sqrt", "sigmoid"]
# Token ids that are not words: padding, begin and end of a sentence, a word that the vocabulary lacks.
PAD, BEGIN, END, UNKNOWN = range(4)
# Data.
TEXT_SETS = ("lstm_text", "python_topics", "text", "yahoo", "yelp", "ptb")  # datasets of sentences
DecodingMethod = Literal["greedy", "ancestral", "top_k", "nucleus", "beam"]
Order = Literal["halton", "confidence"]  # in which maskgit fills in the places of a map
TooLong = Literal["error", "cut", "skip"]
Binarization = Literal["none", "threshold", "static", "dynamic"]
# Objectives and their gradients.
Extra = Literal[
    "dip_i", "dip_ii", "factor", "l1", "lpips", "edges", "recursive_kl", "cycle", "gan"
]  # objectives that are added to a model's own
TrainedPrior = Literal["normal", "vamp"]  # of a vector of latents
MMDKernel = Literal["gaussian", "imq"]
ImportanceGradient = Literal["iwae", "dreg"]
ReconsDist = Literal["bernoulli", "gaussian", "laplacian", "gaussian_optimal", "logistic", "dmol"]
# Likelihoods of the discrete grey levels; the network's output has no activation.
DISCRETE = ("logistic", "dmol")
COMPONENTS = 10  # of the mixture dmol
ReconsReduction = Literal["mean", "sum", "scaled_sum"]
Regularizer = Literal["trace", "diagonal"]
StepMetric = Literal["identity", "optimizer"]
# reg_eps of the strict projection: small enough that no cosine falls below -1e-3, large enough for float64.
STRICT_REG_EPS = 1e-6
# The step.
CompileMode = Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]
PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
