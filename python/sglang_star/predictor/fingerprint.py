"""Which model a head belongs to, decided by what no quantisation or dtype changes."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import torch

from sglang_star.errors import HeadError


class ModelFingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a model and a hash of its normalisation weights.

    The norms are rounded to bfloat16 first: they are never quantised, every fine-tune moves
    them, and a checkpoint hashes alike whether served in float32, float16 or bfloat16.
    """

    architecture: str
    hidden_size: int
    layers: int
    vocab_size: int
    norms: str

    @property
    def text(self) -> str:
        """What it is, for people."""
        return f"this {self.architecture} (hidden size {self.hidden_size}, {self.layers} layers)"

    def require(self, other: ModelFingerprint, head: str) -> None:
        """Check that a head made for ``self`` may serve ``other``.

        Raises:
            HeadError: naming the first difference.
        """
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise HeadError(
                    f"{head} was trained for another model: its {name} is {mine}, "
                    f"this model's is {theirs}",
                    hint="launch with --star-predictor off, or make a head for this model with "
                    "`star predictor collect` and `star predictor train`",
                )


def fingerprint(model: torch.nn.Module, model_config: Any) -> ModelFingerprint:
    """Fingerprint a loaded model.

    Args:
        model: the module SGLang serves.
        model_config: SGLang's ``ModelConfig``.
    """
    architectures = getattr(model_config.hf_config, "architectures", None) or [""]
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if "norm" in name and weight.dim() == 1 and weight.is_floating_point():
            digest.update(weight.detach().to(torch.bfloat16).cpu().view(torch.int16).numpy())
    return ModelFingerprint(
        architecture=architectures[0],
        hidden_size=model_config.hidden_size,
        layers=model_config.num_hidden_layers,
        vocab_size=model_config.vocab_size,
        norms=digest.hexdigest()[:16],
    )
