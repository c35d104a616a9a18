"""The UNet, from diffusers, and the average of its weights."""

from pathlib import Path

from config import Config
from data import Images
from diffusers import UNet2DModel
from torch import Tensor, nn

GROUPS = 32  # of GroupNorm, as published, where the channels allow it


def new_unet(config: Config, images: Images) -> UNet2DModel:
    """Returns a UNet of the sizes in the settings; the levels that ``attn`` names have attention, down and up."""
    channels = tuple(config.channel * each for each in config.channel_mult)
    levels = range(len(channels))
    attention = ["Attn" if level in config.attn else "" for level in levels]
    return UNet2DModel(
        sample_size=config.img_size,
        in_channels=images.channels,
        out_channels=images.channels,
        block_out_channels=channels,
        layers_per_block=config.num_res_blocks,
        down_block_types=tuple(f"{each}DownBlock2D" for each in attention),
        up_block_types=tuple(f"{each}UpBlock2D" for each in reversed(attention)),
        add_attention=bool(config.attn),  # in the middle
        attention_head_dim=None,  # one head, as published
        dropout=config.dropout,
        norm_num_groups=min(GROUPS, config.channel // 2),
        num_class_embeds=len(images.classes) + 1 if config.conditional else None,
        time_embedding_type="positional",
    )


class Eps(nn.Module):
    """A UNet as the model of the noise that ``sparsekit.diffusion`` takes."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.unet(x, t, class_labels=labels, return_dict=False)[0]


def load_unet(folder: Path) -> UNet2DModel:
    """Loads what ``save_pretrained`` wrote."""
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} has no model: train.py writes it at the end, and --test-load-weight names another")
    return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
