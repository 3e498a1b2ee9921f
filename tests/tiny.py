"""Models small enough to make in a second, real enough for every library here to load them."""

from pathlib import Path
from typing import Any

import torch

from training.sample import byte_level_tokenizer

WORDS = (
    "the cat sat on a mat and the dog ran to the river while seven small birds sang over green hills near an old stone house "
    "what is two plus two four why does it rain because clouds are heavy with water hello there good morning thank you"
)


def make_tokenizer(folder: Path, *, chat_template: str | None = None) -> Any:
    """A byte-level BPE tokenizer that can encode any text, trained on a sentence."""
    fast = byte_level_tokenizer(
        [WORDS],
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return fast


def make_llama(
    folder: Path, *, seed: int = 0, hidden_size: int = 32, max_position_embeddings: int = 256, num_hidden_layers: int = 2
) -> Path:
    """A random Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_decoder(folder: Path, kind: str, **settings: Any) -> Path:
    """A random two-layer decoder of some architecture, with grouped-query attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
        **settings,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_bert(folder: Path, *, seed: int = 0) -> Path:
    """A random two-layer BERT encoder without a head."""
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config)
    model.config.architectures = ["BertModel"]
    model.save_pretrained(folder)
    return folder


def make_bart(folder: Path, *, seed: int = 0) -> Path:
    """A random encoder-decoder of two layers each."""
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        init_std=0.2,
        dropout=0.0,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_t5(folder: Path, *, seed: int = 0) -> Path:
    """A random encoder-decoder of two layers each."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dropout_rate=0.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def make_vit(folder: Path, *, seed: int = 0) -> Path:
    """A random two-layer vision transformer of 32 by 32 pixels, without a head."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_ast(folder: Path, *, seed: int = 0) -> Path:
    """A random two-layer audio spectrogram transformer of half a second, without a head."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(seed)
    config = ASTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_length=48,
        num_mel_bins=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ASTModel(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=48, num_mel_bins=32).save_pretrained(folder)
    return folder


MAKERS = {"llama": make_llama, "bert": make_bert, "bart": make_bart, "vit": make_vit, "ast": make_ast}
BASE_OF = {
    "chat": "llama",
    "completion": "llama",
    "preference": "llama",
    "text-classification": "bert",
    "token-classification": "bert",
    "seq2seq": "bart",
    "image-classification": "vit",
    "audio-classification": "ast",
}
"""Which of them a task is tried on."""
