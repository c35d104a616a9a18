"""The model to prune: one that transformers loads, or a small Llama that is trained here and whose tokens are bytes."""

import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging


def quiet() -> None:
    """Silences transformers, except for errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(model: str | Path, accelerator: Accelerator) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads a causal LM in float32 and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {model} could not be loaded: {str(error).splitlines()[0]}") from error
    lm.config.use_cache = False
    return lm.to(accelerator.device).eval(), tokenizer


def save(lm: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a folder that ``load`` reads, with dense weights, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def train_builtin(text: Text, updates: int, seed: int) -> nn.Module:
    """Trains a Llama of 0.2 million weights, which learns to write English words in half a minute."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=text.train.shape[1],
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    lm, rate = LlamaForCausalLM(shape).train(), 4e-3
    optimizer = torch.optim.AdamW(lm.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates, pct_start=0.05)
    for _ in tqdm(range(updates), "train the built-in model", leave=False, disable=None):
        batch = text.train[torch.randint(len(text.train), (16,))]
        lm(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
    return lm.eval()
