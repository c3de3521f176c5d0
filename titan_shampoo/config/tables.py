"""The tables and keys that this project adds to torchtitan's, and the defaults that it changes.

``JobConfig`` has the form that torchtitan merges into its own: a key that both have is ours. The
text under a key is what ``--help`` prints. None means: not set.
"""

from dataclasses import dataclass, field
from typing import Literal

Method = Literal[
    "Shampoo", "SOAP", "KLShampoo", "Eva", "EvaF", "EvaS", "FOOF", "KFAC", "AdamW", "SGD"
]


@dataclass
class Blocks:
    """Keys of every method for blocks; the library decides what is set neither here nor above."""

    lr: float | None = None
    """Learning rate; not set: optimizer.lr"""

    betas: list[float] | None = None
    """Averaging of [gradient, factors]; not set: [optimizer.beta1, optimizer.beta2]"""

    weight_decay: float | None = None
    """Weight decay; not set: optimizer.weight_decay"""

    weight_decay_type: Literal["l2", "decoupled", "corrected", "independent"] | None = None
    """How weight decay enters; not set: decoupled"""

    momentum: float | None = None
    """Heavy-ball momentum of the preconditioned direction; not set: 0"""

    dampening: float | None = None
    """Dampening of the momentum; not set: 0"""

    nesterov: bool | None = None
    """Nesterov form of the momentum; not set: false"""

    block_size: int | list[int] | None = None
    """Largest edge of a block, or [rows, columns]; not set: 1024"""

    merge: Literal["matrix", "paper", "none"] | None = None
    """How the dims of a tensor become those of a matrix; not set: matrix"""

    block_alignment: Literal["global", "shard"] | None = None
    """
    Blocks with edges of their own, the same on every mesh, or also cut at the edges of shards so
    that no gradient travels; not set: global
    """

    precondition_frequency: int | None = None
    """Steps between two refreshes of a block; not set: 10"""

    start_step: int | None = None
    """First step that refreshes; not set: 1"""

    refresh: Literal["staggered", "together"] | None = None
    """Spread the refreshes over the period, or do all in one step; not set: staggered"""

    max_failures: int | None = None
    """Refreshes of one block that may fail in a row before the run ends; not set: 3"""

    max_skipped: int | None = None
    """Steps in a row that may have gradients that are not finite; not set: 20"""

    factor_frequency: int | None = None
    """Steps between two gradients that a block's factors take; not set: 1"""

    factor_dtype: Literal["float32", "float64"] | None = None
    """
    Precision of the arithmetic and the factors; not set: float32, or the parameter's if that is
    float64
    """

    state_dtype: Literal["float32", "float64", "bfloat16"] | None = None
    """Precision of the stored moments; not set: factor_dtype"""

    communication_dtype: Literal["float32", "float64", "bfloat16"] | None = None
    """Precision in which gradients and directions travel between ranks; not set: factor_dtype"""

    compile: bool | None = None
    """Compile the arithmetic of a step; not set: false"""


@dataclass
class GraftedBlocks(Blocks):
    """Keys of the methods that take their step length from another one."""

    beta3: float | None = None
    """Averaging of the gradient in the step itself; not set: betas[0]"""

    grafting: Literal["none", "sgd", "adagrad", "rmsprop", "adam"] | None = None
    """Method whose step length each block takes; not set: adam"""

    grafting_beta2: float | None = None
    """Averaging of the grafting second moment; not set: betas[1]"""

    grafting_eps: float | None = None
    """Epsilon of the grafting method, and of AdamW for other parameters; not set: optimizer.eps"""

    match_rms: float | None = None
    """
    Root mean square that each block's direction is scaled to, with grafting = "none"; 0.2 is about
    Adam's
    """

    root_dtype: Literal["float32", "float64", "bfloat16"] | None = None
    """Precision of the roots and of the products with them; not set: factor_dtype"""

    bias_correction: bool | None = None
    """Correct the averages for their start at zero; not set: true"""


@dataclass
class Shampoo(GraftedBlocks):
    """Keys of ``[optimizer.shampoo]``."""

    start_step: int | None = None
    """First step that refreshes; not set: precondition_frequency"""

    eps: float | None = None
    """Damping added to the factors; not set: 1e-12"""

    eps_relative: float | None = None
    """Damping relative to the largest eigenvalue of each factor, instead of eps"""

    exponent: float | list[float] | None = None
    """
    Exponent of the inverse roots, one or one for each dim (0 switches a dim off); not set: 1/4 for
    a matrix, 1/2 for a vector
    """

    root_method: Literal["auto", "eigh", "newton", "newton_schulz", "qr"] | None = None
    """How inverse roots are computed; not set: auto"""


@dataclass
class SOAP(Blocks):
    """Keys of ``[optimizer.soap]``."""

    betas: list[float] | None = None
    """
    Averaging of [first moment, second moment and factors]; not set: [optimizer.beta1,
    optimizer.beta2]
    """

    eps: float | None = None
    """Added to the root of the second moments; not set: optimizer.eps"""

    basis_method: Literal["qr", "eigh"] | None = None
    """Turn the eigenbasis by one step of orthogonal iteration, or find it anew; not set: qr"""

    degenerate_basis: Literal["previous", "arbitrary"] | None = None
    """
    Where eigenvalues are zero or equal, keep the basis next to the one before, which rounding does
    not decide, or take what the decomposition returns, as the published code; not set: previous
    """

    basis_dtype: Literal["float32", "float64", "bfloat16"] | None = None
    """Precision of the bases and of the products with them; not set: factor_dtype"""


@dataclass
class KLShampoo(GraftedBlocks):
    """Keys of ``[optimizer.kl_shampoo]``."""


@dataclass
class Layers:
    """Keys of every method for layers; the library decides what is set neither here nor above."""

    lr: float | None = None
    """Learning rate; not set: optimizer.lr"""

    weight_decay: float | None = None
    """Weight decay; not set: optimizer.weight_decay"""

    weight_decay_type: Literal["l2", "decoupled", "corrected", "independent"] | None = None
    """How weight decay enters; not set: decoupled"""

    damping: float | None = None
    """Added to the curvature; not set: 0.3"""

    damping_mode: Literal["absolute", "relative"] | None = None
    """Damping as it is, or times the running mean of the curvature; not set: absolute"""

    statistics_decay: float | None = None
    """Weight of the old value in running averages; not set: 0.05"""

    scaling: Literal["kl_clip", "norm", "kl_norm", "none"] | None = None
    """
    One factor for all layers: by kl_clip, to the length of the gradient, by the change of the
    predictions, or none; not set: kl_clip
    """

    kl_clip: float | None = None
    """Largest change of the predictions by one step, for scaling = "kl_clip"; not set: 1e-3"""

    momentum: float | None = None
    """Heavy-ball momentum of the preconditioned direction; not set: 0.9"""

    dampening: float | None = None
    """Dampening of the momentum; not set: 0"""

    nesterov: bool | None = None
    """Nesterov form of the momentum; not set: false"""

    fallback: Literal["adamw", "sgd"] | None = None
    """What steps all other parameters of this method; not set: adamw"""

    fallback_lr: float | None = None
    """Learning rate of the fallback where lr has its peak; not set: 1e-3"""

    betas: list[float] | None = None
    """Averaging of the AdamW fallback; not set: [optimizer.beta1, optimizer.beta2]"""

    eps: float | None = None
    """Epsilon of the AdamW fallback; not set: optimizer.eps"""

    max_skipped: int | None = None
    """Steps in a row that may have gradients that are not finite; not set: 20"""


@dataclass
class TappedLayers(Layers):
    """Keys of the methods that look into layers."""

    bias: Literal["joint", "separate"] | None = None
    """Biases together with their weights, or with the fallback; not set: joint"""


@dataclass
class Eva(TappedLayers):
    """Keys of ``[optimizer.eva]``."""

    kv_scale: Literal["per_token", "batch_mean"] | None = None
    """
    Output gradients as they are summed, or divided by kv_batch_size as in published code; not set:
    per_token
    """

    kv_batch_size: float | None = None
    """The batch size that the damping was tuned for; only with batch_mean"""


@dataclass
class EvaF(TappedLayers):
    """Keys of ``[optimizer.eva_f]``."""


@dataclass
class EvaS(Layers):
    """Keys of ``[optimizer.eva_s]``."""

    damping_mode: Literal["absolute", "relative"] | None = None
    """Damping as it is, or times the running mean of the curvature; not set: relative"""

    scaling: Literal["kl_clip", "norm", "kl_norm", "none"] | None = None
    """One factor for all layers, beside each one's own; not set: none"""

    merge: Literal["matrix", "none"] | None = None
    """One mean for rows and one for columns, or one for each dim; not set: matrix"""


@dataclass
class FOOF(TappedLayers):
    """Keys of ``[optimizer.foof]``."""

    damping_mode: Literal["absolute", "relative"] | None = None
    """Damping as it is, or times the mean eigenvalue of the curvature; not set: absolute"""

    scaling: Literal["kl_clip", "norm", "none"] | None = None
    """
    One factor for all layers: by kl_clip, to the length of the gradient, or none; not set: kl_clip
    """

    factor_frequency: int | None = None
    """Steps between two batches of which second moments of a layer are formed; not set: 1"""

    precondition_frequency: int | None = None
    """Steps between two inversions of a block; not set: 10"""

    refresh: Literal["staggered", "together"] | None = None
    """
    Spread inversions and moments over their periods, or do all in one step; not set: staggered
    """

    max_failures: int | None = None
    """Inversions of one block in a row that may fail; not set: 3"""

    max_factor_dim: int | None = None
    """Size of the diagonal blocks that factors are cut into; not set: whole factors"""


@dataclass
class KFAC(FOOF):
    """Keys of ``[optimizer.kfac]``."""

    factored_damping: bool | None = None
    """Split the damping between the factors, or add it to their product; not set: true"""

    loss_normaliser: float | None = None
    """
    Samples of the global batch that the loss is the mean of; not set: the rows of each layer, right
    for text; images need their batch size
    """


@dataclass
class SGD:
    """Keys of ``[optimizer.sgd]``."""

    momentum: float = 0.0
    """Heavy-ball momentum"""

    nesterov: bool = False
    """Nesterov form of the momentum"""

    dampening: float = 0.0
    """Dampening of the momentum, from the first step on"""


@dataclass
class Group:
    """One ``[[optimizer.groups]]``; a parameter belongs to the first whose pattern it matches."""

    pattern: str
    """Regular expression, searched in the parameter's name"""

    optimizer: Method | None = None
    """Method for these parameters; not set: optimizer.name"""

    lr: float | None = None
    """Learning rate for these parameters; not set: the method's"""

    weight_decay: float | None = None
    """Weight decay for these parameters; not set: the method's"""

    precondition: bool | None = None
    """
    Whether the matrices among these parameters are preconditioned, whatever their names and modules
    are; not set: all but embeddings, output heads and routers
    """


@dataclass
class Optimizer:
    """Keys of ``[optimizer]`` beside torchtitan's."""

    name: Method = "Shampoo"
    """Method for every parameter that no group claims"""

    shampoo: Shampoo = field(default_factory=Shampoo)
    """Shampoo's own keys"""

    soap: SOAP = field(default_factory=SOAP)
    """SOAP's own keys"""

    kl_shampoo: KLShampoo = field(default_factory=KLShampoo)
    """KL-Shampoo's own keys"""

    eva: Eva = field(default_factory=Eva)
    """Eva's own keys"""

    eva_f: EvaF = field(default_factory=EvaF)
    """Eva-f's own keys"""

    eva_s: EvaS = field(default_factory=EvaS)
    """Eva-s's own keys"""

    foof: FOOF = field(default_factory=FOOF)
    """FOOF's own keys"""

    kfac: KFAC = field(default_factory=KFAC)
    """K-FAC's own keys"""

    sgd: SGD = field(default_factory=SGD)
    """SGD's own keys"""

    average_decay: float | None = None
    """
    Keep an exponential moving average of the weights with this decay, validate it too, and save it;
    not set: none is kept
    """

    groups: list[Group] = field(default_factory=list)
    """Parameters with a method, learning rate or weight decay of their own"""


@dataclass
class Model:
    """Keys of ``[model]`` that differ from torchtitan's."""

    name: Literal["llama3", "llama4", "resnet"] = "llama3"
    """Which model to train: a transformer, a mixture of experts, a residual network"""

    hf_assets_path: str = ""
    """Folder of a Hugging Face tokenizer; empty: one token per byte"""


@dataclass
class Training:
    """Keys of ``[training]`` that differ from torchtitan's."""

    dataset: str = "python_stdlib"
    """
    "python_stdlib" (the source text of this Python's standard library), a .txt or .jsonl file, a
    folder of text files, or a name for the datasets library; for images "digits", "digits_tuning"
    (without the test part, to choose settings on), a folder of folders per class (below train and
    val, or alone), or a name such as "ILSVRC/imagenet-1k"
    """

    epochs: float | None = None
    """Passes over the training data, instead of training.steps"""

    streaming: bool = False
    """
    Read text while training on it, instead of downloading and tokenising all of it first; for names
    of the datasets library and folders of parquet or JSON files
    """

    stream_lanes: int = 64
    """
    Parts that a stream is read in, of which each rank needs some: a power of two; the order of the
    samples depends on it, and not on the number of ranks
    """

    document_separators: bool = True
    """
    Begin each document with the tokenizer's bos_token and end it with its eos_token, one of them if
    they are the same (without a tokenizer, end it with a zero byte); false: add only what the
    tokenizer's files say
    """

    max_bad_fraction: float = 0.01
    """
    Share of the images, lines or rows that may be unreadable: they are skipped, counted and
    reported, and more of them end the run
    """


@dataclass
class Images:
    """Keys of ``[images]``, for model.name = "resnet"."""

    num_classes: int | None = None
    """Number of classes; not set: that of the training data, which --plan must open then"""

    size: int | None = None
    """Edge of the images that the network sees, in pixels; not set: 224, or 32 for the digits"""

    resize: int | None = None
    """Shorter edge to which images are resized before the centre is evaluated, at least size; not
    set: 8/7 of size, which is 256 for 224
    """

    min_area: float = 0.08
    """Smallest area of the random crops to train on, relative to the image; 1 is the whole image"""

    flip: float = 0.5
    """Probability that a training image is mirrored"""

    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of red, green and blue, from 0 to 1, that is subtracted"""

    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of red, green and blue, by which images are divided"""

    rotate: float = 0.0
    """Training images are turned by up to so many degrees either way, their edges repeated"""

    stretch: float = 0.0
    """
    The axes of training images are stretched, shrunk and sheared by up to this share, their edges
    repeated
    """

    shift: int = 0
    """Training images are moved by up to so many pixels, their edges repeated"""

    random_erasing: float = 0.0
    """Probability that a random rectangle of a training image is blanked"""

    mixup: float = 0.0
    """
    Training images are mixed in pairs by weights from Beta(mixup, mixup); 0 mixes none; needs an
    even training.local_batch_size
    """

    label_smoothing: float = 0.0
    """Share of each training label that is spread over all classes"""

    channels_last: bool = False
    """Feed the network in the memory format that GPUs with tensor cores prefer"""

    sync_batch_norm: bool = False
    """Normalise by the statistics of all ranks' images instead of each rank's own"""


@dataclass
class LRScheduler:
    """Keys of ``[lr_scheduler]`` beside torchtitan's."""

    warmup_epochs: float | None = None
    """Passes over the training data to warm up in, instead of lr_scheduler.warmup_steps"""

    milestones: list[int] = field(default_factory=list)
    """
    Steps after which the learning rate is multiplied by lr_scheduler.factor, instead of a decay;
    warmup stays
    """

    milestone_epochs: list[float] = field(default_factory=list)
    """As lr_scheduler.milestones, in passes over the training data"""

    factor: float = 0.1
    """What each milestone multiplies the learning rate by"""


@dataclass
class Validation:
    """Keys of ``[validation]`` that differ from torchtitan's."""

    dataset: str = ""
    """
    As training.dataset, all of which is then trained on; empty: a part of the training dataset, 5%
    of its text or of a folder of classes alone, which is held out from training
    """

    seq_len: int | None = None
    """Sequence length for validation, at most training.seq_len; not set: training.seq_len"""

    steps: int = -1
    """
    Batches of each rank: of images spread evenly over all classes, of text the first; -1: all
    """


@dataclass
class Metrics:
    """Keys of ``[metrics]`` beside torchtitan's."""

    layers: bool = False
    """
    Report what a method for layers does to each of them (rho, cosine), not only the extremes
    """


@dataclass
class Checkpoint:
    """Keys of ``[checkpoint]`` that differ from torchtitan's."""

    last_save_model_only: bool = False
    """Save only the model at the end; the run can then not be resumed or extended"""

    fallback: bool = True
    """If the newest checkpoint is not good, resume from the newest one that is"""

    reblock: Literal["refuse", "approximate"] = "refuse"
    """
    What to do with a checkpoint of another block_size: refuse it, or approximate Shampoo's factors
    for the new blocks
    """

    data_position: Literal["refuse", "keep", "restart"] = "refuse"
    """
    What to do with a checkpoint whose position in the data is one in another order, because the
    seed, the data set or training.seq_len was another: refuse it; go on from the position, so that
    some samples are repeated and some missed; or read the data from their beginning
    """

    initial_load_path: str | None = None
    """
    Checkpoint to begin from where the run has none of its own yet: a step-N folder of
    another run, or a folder in the format of torch.distributed.checkpoint, of which only the model
    is read
    """

    initial_load_in_hf: bool = False
    """
    The checkpoint to begin from is Hugging Face's: safetensors under its names; without
    initial_load_path those in model.hf_assets_path; needs initial_load_model_only = true
    """

    last_save_in_hf: bool = False
    """
    Also write the model at the end as safetensors under Hugging Face's names, in hf-step-N
    beside the checkpoint; needs last_save_model_only = true
    """

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """
    Write checkpoints while training waits; or copy the state to host memory and write it in a
    thread while training goes on; or copy it into page-locked memory that is kept, which is faster
    from a GPU and training need not wait for
    """

    keep_latest_k: int = 10
    """How many checkpoints are kept, all of them verified; 0 keeps all"""


@dataclass
class Job:
    """Keys of ``[job]`` beside torchtitan's."""

    dry_run: bool = False
    """
    Build everything, take one step and validate one batch, and write nothing but the cache of
    tokens
    """


@dataclass
class JobConfig:
    """What torchtitan's ``JobConfig`` is merged with."""

    job: Job = field(default_factory=Job)
    optimizer: Optimizer = field(default_factory=Optimizer)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    images: Images = field(default_factory=Images)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)
