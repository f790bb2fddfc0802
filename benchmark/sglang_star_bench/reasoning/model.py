"""The model and its tokenizer, both as a plain Hugging Face folder that SGLang serves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglang_star.model import reasoning_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS: Final = reasoning_model()
"""The trained model that comes with the package."""

END, USER, ANSWER, UNKNOWN = "<end>", "<user>", "<answer>", "<unk>"
SPECIAL: Final = (END, USER, ANSWER, UNKNOWN)
VOCABULARY: Final = 256
CONTEXT: Final = 8192
TRAINED_CONTEXT: Final = 4096 + 128
SAMPLING: Final = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}

# Words become one token only with a space or a capital before them, so that runs of letters in
# traces and lists stay apart; so do digits.
_PIECES: Final = r" [a-z]{2,}|[A-Z][a-z]{2,}|[\s\S]"

_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{ANSWER}{{{{ message['content'] }}}}{END}"
    f"{{% else %}}{USER}{{{{ message['content'] }}}}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ANSWER}{{% endif %}}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the common words of ``texts``; any other ASCII text falls back to characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=["\n", *map(chr, range(32, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, prompt: str, trace: str = "") -> list[int]:
    """Token ids of a prompt as the chat template renders it, and of the trace if there is one."""
    text = f"{USER}{prompt}{ANSWER}{trace}{END if trace else ''}"
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _attention(
    module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any
) -> tuple[Any, None]:
    """Causal attention in float32: backward on a CPU takes a third of what it does in bfloat16."""
    import torch

    with torch.autocast("cpu", enabled=False):
        groups = module.num_key_value_groups
        query, key, value = query.float(), key.float(), value.float()
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        )
    return out.transpose(1, 2), None


def new_model(width: int, layers: int, seed: int) -> Any:
    """Make an untrained model: heads of 32, three query heads to a key head, tied embeddings."""
    import torch
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("causal_float32", _attention)
    heads = width // 32
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else 1,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=SPECIAL.index(USER),
            eos_token_id=SPECIAL.index(END),
            pad_token_id=SPECIAL.index(END),
            attn_implementation="causal_float32",
        )
    )


def export(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights in bfloat16, configuration, tokenizer and chat template to ``folder``."""
    import copy

    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    saved = copy.deepcopy(model).to(torch.bfloat16)
    ends = {name: getattr(model.config, name) for name in ("eos_token_id", "pad_token_id")}
    saved.generation_config = GenerationConfig(**SAMPLING, **ends)
    saved.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
