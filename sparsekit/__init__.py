"""Kernels for sparse neural networks: fast to make sparse, never slower to run.

Imported as ``sk``. A name that ends in ``_`` changes what it is given, in place::

    report = sk.prune_(model, sk.Wanda("2:4"), batches)
    with sk.keep_masks(model, optimizer):
        train(model, optimizer)
    sk.compress_(model.eval(), batches)
    sk.save(model, "model.sparsekit")

Prune a model
    prune_                       Prunes the layers of a model and stores their masks.
    Magnitude                    The method that keeps the largest weights; it needs no batches.
    Wanda                        The method that keeps the largest products of weight and input norm.
    RIA                          The method that keeps the largest weights relative to their row and column.
    SparseGPT                    The method that drops weights column by column and updates the others.
    ADMM                         The method that finds masks and weights together.
    Scores                       The method that keeps the largest of the scores that it is given.
    taylor_scores                Scores of how much the loss would change, from its gradients.
    diff_pruning_scores          The same for diffusion models, of the timesteps with a large loss.
    Swaps                        A refinement of any method: swaps kept weights for dropped ones.
    LeastSquares                 A refinement of any method: solves for the kept weights.
    Calibration                  Options: how the model is run on its calibration batches.
    PruneReport                  What ``prune_`` did to each layer.
    MaskPro                      Learns masks from losses alone, without gradients.
    reestimate_batchnorm_        Gives BatchNorm layers the statistics of the pruned model.

Train a sparse model
    keep_masks                   Keeps dropped weights at zero while an optimizer trains the others.
    sparse_training_             Makes linear layers train with 2:4 weights whose masks still move.
    SparseTraining               The training that ``sparse_training_`` began: its layers, and how it ends.

Make a model smaller
    find_units                   Finds the neurons, heads and stages that can be removed as a whole.
    mask_units_                  Writes zeros in their places, for ``keep_masks``.
    slim_                        Removes them: the model computes the same as with zeros, and is smaller.
    unslim_                      Brings the shapes of the model back, with zeros.
    SlimPlan                     What stays of a model; it can be stored as JSON.

Learn from a larger model
    distill_loss                 The loss against a teacher's logits and the labels.
    hidden_loss                  The difference between hidden states of student and teacher.
    DistillSchedule              Temperature and the share of the teacher, linear in the progress.

Look at gradients
    GradProbe                    Records the gradients of activations while a model trains.
    param_grad_norms             Returns the norm of the gradient of every parameter.

Run it faster
    compress_                    Swaps each layer for the fastest form that was measured, never a slower one.
    decompress_                  Undoes ``compress_``.
    reach_                       Prunes to a measured speed: each layer's form, at the least total error.
    ReachReport                  What ``reach_`` made of each layer, and what it predicted and measured.
    quantize_                    Quantizes layers to nf4, or 2:4 layers to 8 or 4 bits, without measuring.
    Measure                      Options: how ``compress_`` measures.
    CompressReport               What ``compress_`` did to each layer, and what it measured.

Store it
    save                         Writes a model with its masks and packed weights to a safetensors file.
    load                         Reads such a file into a model.

Masks and scores, as functions on tensors
    nm_mask                      Marks the n largest magnitudes of every m.
    nm_mask_bits                 The same mask, with one bit for each entry.
    nm_prune                     Returns a weight with all but the n best of every m set to zero, and the mask.
    nm_prune_                    The same on the weight itself; returns the mask.
    nm_sample                    Draws n of every m at random, from logits.
    nm_policy_step_              Makes such a mask less or more likely, and draws the next one.
    transposable_mask24          Marks the best 2:4 mask that is 2:4 along rows and along columns.
    block_scores                 Sums magnitudes, or magnitudes times a scale, over blocks.
    block_topk_mask              Marks the k largest magnitudes of every block.
    tier_scores                  Sums what each block would keep of its score as dense, 2:4 and top-k.
    tier_prune                   Prunes each block by its tier.

Packed weights and their products
    pack24                       Packs a 2:4 weight.
    prune_pack24                 Prunes a weight to 2:4 and packs it.
    Packed24                     A packed 2:4 weight.
    linear24                     Multiplies by a packed 2:4 weight, with gradients.
    pack_conv24                  Packs a convolution's weight that is 2:4 along its input channels.
    PackedConv24                 A packed 2:4 weight of a convolution.
    conv2d24                     Convolves with a packed 2:4 weight, with gradients.
    quantize24                   Quantizes a packed 2:4 weight to 8 or 4 bits.
    QuantizedWeight24            A quantized 2:4 weight.
    linear24q                    Multiplies by a quantized 2:4 weight.
    tile24                       Rearranges a quantized 2:4 weight for ``linear24q_int8``.
    TiledWeight24                A quantized 2:4 weight in that order.
    linear24q_int8               Multiplies by it with inputs rounded to 8 bits: the fastest.
    pack_tiered                  Packs a weight whose blocks are dense, 2:4 or top-k.
    TieredWeight                 A packed weight of such blocks.
    linear_tiered                Multiplies by a packed weight of such blocks, with gradients.
    to_sparse_semi_structured    Converts a packed 2:4 weight to a 2:4 tensor of ``torch.sparse``.
    from_sparse_semi_structured  Converts a 2:4 tensor of ``torch.sparse`` to a packed 2:4 weight.

Packages
    ops                          All functions on tensors, and which kernel runs each of them.
    nn                           The modules that ``compress_`` puts into a model.
    tiers                        Progressive pruning in which each block is dense, 2:4 or top-k.
    prune                        What a pruning method of your own is made of: ``Method`` and the statistics.
    compress                     The entries of a ``CompressReport``.
    quant                        The report of ``quantize_``, and which layers bitsandbytes computes rightly.
    reach                        The entries of a ``ReachReport``.
    train                        The entries of a ``SparseTraining``.
    diffusion                    Diffusion of images, Gaussian, and of tokens, absorbing: noise, losses, sampling.
    evaluate                     Accuracy, FID and KID; FLOPs, latency, bytes on disk and memory.
    slim                         What ``find_units`` finds.
    probes                       Draws the gradients that were recorded.
    runs                         A folder for a training run, which goes on exactly where it was killed.

About this installation
    show_config                  Prints versions, which kernel runs each op, and what is missing.
    __version__                  The version, a string.

``sparsekit.integrations.transformers`` and ``sparsekit.integrations.peft`` are imported only when asked for,
and so is ``sparsekit.models``, which has RADD, a transformer of masked tokens.
``from_pretrained`` of transformers and diffusers loads what ``save`` writes once sparsekit is imported, before or after
them.
"""

from . import _installed as _installed  # refuses to run beside another project that is called sparsekit
from . import compress, diffusion, evaluate, nn, ops, probes, prune, quant, reach, runs, slim, tiers, train
from ._config import show_config
from ._plug_in import register_plug_ins as _register_plug_ins
from ._version import VERSION as __version__
from .checkpoint import load, save
from .compress import CompressReport, Measure, compress_, decompress_
from .distill import DistillSchedule, distill_loss, hidden_loss
from .ops import (
    Packed24,
    PackedConv24,
    QuantizedWeight24,
    TieredWeight,
    TiledWeight24,
    block_scores,
    block_topk_mask,
    conv2d24,
    linear24,
    linear24q,
    linear24q_int8,
    linear_tiered,
    nm_mask,
    nm_mask_bits,
    nm_policy_step_,
    nm_prune,
    nm_prune_,
    nm_sample,
    pack24,
    pack_conv24,
    pack_tiered,
    prune_pack24,
    quantize24,
    tier_prune,
    tier_scores,
    tile24,
    transposable_mask24,
)
from .probes import GradProbe, param_grad_norms
from .prune import (
    ADMM,
    RIA,
    Calibration,
    LeastSquares,
    Magnitude,
    MaskPro,
    PruneReport,
    Scores,
    SparseGPT,
    Swaps,
    Wanda,
    diff_pruning_scores,
    keep_masks,
    prune_,
    reestimate_batchnorm_,
    taylor_scores,
)
from .quant import quantize_
from .reach import ReachReport, reach_
from .semi_structured import from_sparse_semi_structured, to_sparse_semi_structured
from .slim import SlimPlan, find_units, mask_units_, slim_, unslim_
from .train import SparseTraining, sparse_training_

__all__ = [
    "ADMM",
    "RIA",
    "Calibration",
    "CompressReport",
    "DistillSchedule",
    "GradProbe",
    "LeastSquares",
    "Magnitude",
    "MaskPro",
    "Measure",
    "Packed24",
    "PackedConv24",
    "PruneReport",
    "QuantizedWeight24",
    "ReachReport",
    "Scores",
    "SlimPlan",
    "SparseGPT",
    "SparseTraining",
    "Swaps",
    "TieredWeight",
    "TiledWeight24",
    "Wanda",
    "__version__",
    "block_scores",
    "block_topk_mask",
    "compress",
    "compress_",
    "conv2d24",
    "decompress_",
    "diff_pruning_scores",
    "diffusion",
    "distill_loss",
    "evaluate",
    "find_units",
    "from_sparse_semi_structured",
    "hidden_loss",
    "keep_masks",
    "linear24",
    "linear24q",
    "linear24q_int8",
    "linear_tiered",
    "load",
    "mask_units_",
    "nm_mask",
    "nm_mask_bits",
    "nm_policy_step_",
    "nm_prune",
    "nm_prune_",
    "nm_sample",
    "nn",
    "ops",
    "pack24",
    "pack_conv24",
    "pack_tiered",
    "param_grad_norms",
    "probes",
    "prune",
    "prune_",
    "prune_pack24",
    "quant",
    "quantize24",
    "quantize_",
    "reach",
    "reach_",
    "reestimate_batchnorm_",
    "runs",
    "save",
    "show_config",
    "slim",
    "slim_",
    "sparse_training_",
    "taylor_scores",
    "tier_prune",
    "tier_scores",
    "tiers",
    "tile24",
    "to_sparse_semi_structured",
    "train",
    "transposable_mask24",
    "unslim_",
]

_register_plug_ins()
