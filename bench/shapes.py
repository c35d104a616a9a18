"""Weights of real models, [out_features, in_features], the token counts that they meet, dtypes and tolerances."""

from collections.abc import Iterable

import torch

SQUARE = (4096, 4096)  # attention projections of a 7B decoder
UP = (11008, 4096)  # its feed-forward
BERT = (768, 768)  # attention projections of a BERT-base or GPT-2
BERT_UP, BERT_DOWN = (3072, 768), (768, 3072)
MODEL = ((2304, 768), BERT, BERT_UP, BERT_DOWN)  # the layers of one stage of such a model
WIDE, DEEP = (14336, 4096), (4096, 14336)  # the feed-forward of an 8B decoder

GROUPS = (8 * 2**20, 4)  # the maskable weights of a DDPM UNet for CIFAR-10, a group in each row
SPARSEGPT = ((1024, 1024), (1024, 2048))
LINEAR = (SQUARE, BERT, BERT_UP, BERT_DOWN, UP)
GOAL_SHAPES = (SQUARE, UP)  # those with a goal for few tokens
DECODE_TOKENS = (1, 4, 8, 16, 32)
PREFILL_TOKENS = (64, 128, 512, 1024)

# Model, images, output and input channels, height and width of the image, height and width of the kernel.
CONVOLUTIONS = (
    ("unet", 1, 128, 128, 32, 3),
    ("unet", 1, 256, 256, 16, 3),
    ("unet", 1, 256, 256, 8, 3),
    ("unet", 1, 512, 512, 8, 3),
    ("unet", 1, 512, 512, 4, 3),
    ("unet", 16, 128, 128, 32, 3),
    ("unet", 16, 256, 256, 16, 3),
    ("unet", 16, 256, 256, 8, 3),
    ("unet", 16, 512, 512, 4, 3),
    ("resnet", 1, 64, 64, 56, 3),
    ("resnet", 16, 64, 64, 8, 3),
    ("resnet", 1, 128, 128, 28, 3),
    ("resnet", 1, 256, 256, 14, 3),
    ("resnet", 1, 512, 512, 7, 3),
    ("resnet", 1, 256, 64, 56, 1),
    ("resnet", 1, 64, 256, 56, 1),
    ("resnet", 1, 512, 128, 28, 1),
)

GPU_LINEAR = (SQUARE, WIDE, DEEP, BERT_UP, BERT)
GPU_TOKENS = (1, 4, 8, 16, 32, 64, 256, 1024, 4096)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of a product, as a share of its largest entry


def by_name(listed: Iterable[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name(shape): shape for shape in listed}


def name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
