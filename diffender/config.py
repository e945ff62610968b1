"""The settings of the defence and of its backward pass, and the flags that the commands share.

Each setting of the method stands here once, with its help and its range; command lines are made from these classes.
"""

from dataclasses import dataclass
from typing import Any

from diffender.utils.errors import InputError
from diffender.utils.options import check_options, given, option, part

GRADIENT_MODES = ("bpda", "bpda-mask", "surrogate", "full", "full+loc", "evade", "auto")
STE = ("identity", "sigmoid", "none", "soft")


@dataclass(frozen=True)
class DIFFenderConfig:
    """The method (Sec. 3.2). The defaults are the paper's, or where it is silent those of the authors' demo.

    Raises InputError for values outside of their range.
    """

    noise_ratio: float = option(
        0.5, "Noise ratio t* of localisation (paper: 0.5).", low=0.02, high=1, group="the method"
    )
    draws: int = option(3, "Number of draws m in Eq. 2 (authors' demo: 3).", low=1)
    theta: float = option(2.0, "Threshold of the difference map in standard deviations (paper: 2).", low=0)
    grow: float = option(
        0.0,
        "Lower threshold of hysteresis: latents above it that are connected to one above theta are masked too. No "
        "effect at 0, or at theta and above (paper: 0).",
        low=0,
    )
    score: str = option(
        "z",
        "Score of the difference map: z (z-score), or mad (from the median and the median absolute deviation).",
        choices=("z", "mad"),
    )
    sigma: float = option(1.0, "Standard deviation of the mask's 3x3 blur, in latents. 0: no blur.", low=0)
    dilation: int = option(3, "Side of the square that dilates the mask, in latents. Odd; 1: no dilation.", low=1)
    steps: int = option(20, "Sampler steps of restoration (authors' demo: 20).", low=1, high=999)
    guidance: float = option(7.5, "Classifier-free guidance. 1: none (authors' demo: 7.5).", low=1)
    sampler: str = option(
        "ddim", "Sampler: ddim (paper), or dpmpp, which is DPM-Solver++(2M), for few steps.", choices=("ddim", "dpmpp")
    )
    eta: float = option(0.0, "Eta of DDIM. 0: deterministic, 1: the variance of DDPM.", low=0, high=1)
    restore: bool = option(True, "Inpaint the mask. --no-restore fills it with grey (the paper's NR).")
    composite: bool = option(True, "Keep the pixels outside the mask. --no-composite returns the whole decoded image.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.dilation % 2 == 0:
            raise InputError(f"dilation is {self.dilation}; it is an odd number of latents, 1 for none")
        if not (self.restore or self.composite):
            raise InputError("restore and composite are both off: no decoded image to return; leave out --no-composite")
        if self.sampler == "dpmpp" and self.eta > 0:
            raise InputError(f"eta is {self.eta}; DPM-Solver++(2M) is deterministic: use eta 0, or the ddim sampler")

    @property
    def evaluations(self) -> int:
        """UNet evaluations to restore one image: two in each step with guidance, else one; 0 without restoration."""
        each = 1 if self.guidance == 1 else 2
        return self.steps * each if self.restore else 0


PAPER = DIFFenderConfig()
EMBEDDED = DIFFenderConfig(noise_ratio=0.2, theta=2.0, steps=2, guidance=1.0, sampler="dpmpp")
"""The settings that suit the embedded model (docs/choices.md)."""


@dataclass(frozen=True)
class Backward:
    """The settings of the backward pass. They leave the output unchanged; only ste="soft" changes the mask.

    mode       bpda       the identity for the whole defence (Athalye et al. 2018)
               bpda-mask  restoration is a constant; the gradient reaches x directly and through the mask
               surrogate  exact through localisation; restoration as if it took `surrogate_steps` steps
               full       exact through localisation and restoration; thresholds pass straight through
               full+loc   full, and the attacker also lowers two terms of losses.py: `evasion` times the evasion and
                          `decoy` times the decoy
               evade      the attacker fools the classifier as if nothing were masked, and lowers the same two terms;
                          restoration takes no part
               auto       other defences: their own gradient where there is one; in DIFFender the same as full
    ste        backward pass of the map's threshold, see `ops.binarize`

    Raises InputError for values outside of their range.
    """

    mode: str = option("full", "Gradient mode.", choices=GRADIENT_MODES)
    ste: str = option("identity", "Backward pass of the threshold.", choices=STE)
    ste_k: float = option(5.0, "Slope of the sigmoid in --ste sigmoid.", low=0.01)
    surrogate_steps: int = option(5, "Sampler steps of the surrogate, at most those of the restoration.", low=1)
    evasion: float = option(
        3.0,
        "Weight of hiding from the localiser in full+loc and evade. For patches of 10 % and more try 30, too.",
        low=0,
    )
    hide: str = option(
        "mean",
        "What full+loc and evade hide: the mean over the patch of softplus(z - theta), or its highest latent (max).",
        choices=("mean", "max"),
    )
    decoy: float = option(0.0, "Weight of raising the localiser's threshold in full+loc and evade.", low=0)

    def __post_init__(self) -> None:
        check_options(self)


FULL = Backward()
THROUGH_MASK = ("bpda-mask", "surrogate", "full", "full+loc")  # modes whose gradient passes the threshold, by `ste`
THROUGH_RESTORATION = ("surrogate", "full", "full+loc")  # modes whose gradient passes the sampler's steps
WITH_PENALTY = ("full+loc", "evade")  # modes whose attacker also lowers `evasion` and `decoy`


@dataclass(frozen=True)
class TuningConfig:
    """Prompt tuning (Sec. 3.3)."""

    rounds: int = option(50, "Passes over the images (paper: 50).", low=1, group="tuning")
    batch_size: int = option(4, "Images in an optimizer step.", low=1)
    lr: float = option(0.01, "Learning rate of Adam. Falls to zero along a cosine.", low=0)
    adaptive: int = option(
        0,
        "Attack the images anew through the current prompts, after every so many rounds. Earlier attacks are kept. 0: "
        "never (paper).",
        low=0,
    )
    printed_eq4: bool = option(False, "Use Eq. 4 as printed, without its negative term.")
    without: str = option(
        "none", "Term of Eq. 7 to leave out, as in Table 2.", choices=("none", "mask", "l1", "feature")
    )
    seed: int = option(0, "Seed of every random choice.", low=0)


@dataclass(frozen=True)
class ModelOptions:
    """The diffusion model, its files and how it runs."""

    model: str = option(
        "auto", "Name of the model. auto: the embedded model tiny, or what --weights holds.", group="the model"
    )
    weights: str | None = option(
        None, "Checkpoint: a single file or a Hugging Face folder. random: random weights, to try a size."
    )
    ema: bool = option(False, "Use the EMA weights if the checkpoint has them.")
    vae: str | None = option(None, "Another VAE, from a file of its own or from a whole checkpoint.")
    locate_unet: str | None = option(None, "A separate 4-channel UNet for localisation, as in the authors' demo.")
    prediction: str = option(
        "auto", "What a UNet predicts if its file does not say (auto: epsilon).", choices=("auto", "epsilon", "v")
    )
    dtype: str = option(
        "auto",
        "Dtype of the UNet. auto: bfloat16 on a GPU, except for models trained by this package; otherwise float32. "
        "Text encoder and VAE stay in float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    micro_batch: int | None = option(
        None, "Largest number of latents or images in one forward pass of a network.", low=1
    )
    keep: bool | None = option(
        None,
        "Keep activations for the backward pass instead of recomputing them. Same gradients, more memory "
        "(default: if they take at most a quarter of the free memory).",
    )

    @property
    def embedded(self) -> bool:
        """Whether it is the embedded model, with its weights."""
        return self.weights is None and self.model in ("auto", "tiny")


@dataclass(frozen=True)
class RunOptions:
    """The flags of every command."""

    device: str = option("auto", "Device: auto, cpu, cuda, ...", group="the run")
    quiet: bool = option(False, "Print only results and errors.")
    seed: int = option(0, "Seed of every random choice.", low=0)


@dataclass(frozen=True)
class DefenseOptions:
    """The model, its prompts, and the method. `method` holds the settings that replace the model's own."""

    model: ModelOptions = part(ModelOptions())
    prompt: str | None = option(
        None,
        "Prompts of the defence (default: tuned for the embedded model or with --prompts, else manual).",
        choices=("tuned", "manual", "empty"),
        group="prompts",
    )
    prompts: str | None = option(None, "File of tuned prompts, written by train.py. Without it: the shipped ones.")
    method: dict[str, Any] = given(PAPER, embedded=EMBEDDED)

    @property
    def prompt_kind(self) -> str:
        """tuned, manual or empty."""
        return self.prompt or ("tuned" if self.prompts or self.model.embedded else "manual")


@dataclass(frozen=True)
class TargetOptions:
    """A classifier behind the defence, and the images."""

    defense: DefenseOptions = part(DefenseOptions())
    data: str = option(
        "samples",
        "Images: samples, a folder with a folder for each wnid, or a csv with the columns file and label.",
        group="classifier and images",
    )
    classifier: str = option("efficientnet_lite0", "Name in diffender.classifiers.imagenet, or timm:TAG.")
    fold: int = option(
        0,
        "For --classifier facenet and mobilefacenet: index of the image of each person that is the probe; the others "
        "form the gallery. --data is then a folder with one folder for each person, or a csv with file and identity.",
        low=0,
    )
    classifier_weights: str | None = option(
        None, "Safetensors file of the classifier, in timm's names. Without it: the embedded ones."
    )
    classes: int | None = option(
        None,
        "Number of classes of a classifier of your own. --data is then a folder with a folder for each class, which "
        "count in the order of their names, or a csv with labels from 0.",
        low=2,
    )
