"""An emulated remaining-length predictor with a given error, always labelled as emulated.

For a request with ``R`` tokens left at progress ``p`` (share of its output already produced) the
emulated predictor sees ``log R + s(p) * z``, ``z`` standard normal, ``s`` the error curve. ``z``
drifts smoothly while the request runs: successive estimates of one request err together. The
quantiles it then reports are those of the exact posterior under the trace's own distribution of
remaining length given the tokens so far, so they are calibrated by construction; with ``s = 0``
they are the truth, and with ``s`` infinite they are what age alone says (a useless predictor).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sglang_star.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
NORMAL_QUANTILES = np.array([-1.2815516, -0.6744898, 0.0, 0.6744898, 1.2815516])
"""Of the standard normal at ``QUANTILE_LEVELS``."""
SHIPPED_CURVE = Path(__file__).with_name("error_curve.json")
_SAMPLE = 20_000


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """Standard deviation of the log of remaining length against progress.

    Attributes:
        label: where it comes from; measured: whether it was measured.
        progress: ascending in [0, 1]; log_error_std: same length.
        turns: quarter turns the error of one request makes over its life: 0 is one error for
            life, 1 means its first and last estimates err independently.
    """

    label: str
    measured: bool
    progress: FloatArray
    log_error_std: FloatArray
    turns: float

    @classmethod
    def read(cls, path: Path = SHIPPED_CURVE) -> ErrorCurve:
        """Load a curve.

        Raises:
            ConfigError: not a curve file.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            curve = cls(
                label=str(raw["label"]),
                measured=bool(raw["measured"]),
                progress=np.asarray(raw["progress"], dtype=np.float64),
                log_error_std=np.asarray(raw["log_error_std"], dtype=np.float64),
                turns=float(raw.get("turns", 1.0)),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not an error curve: {error!r}") from error
        p, s = curve.progress, curve.log_error_std
        if p.ndim != 1 or p.shape != s.shape or p.size < 2 or (np.diff(p) <= 0).any():
            raise ConfigError(f"{path}: progress must ascend and match log_error_std in length")
        if not (np.isfinite(s).all() and (s >= 0).all()):
            raise ConfigError(f"{path}: log_error_std must be finite and not negative")
        return curve


class EmulatedPredictor:
    """Reports quantiles of remaining length for many requests at once.

    They are calibrated, unless a head trained on other traffic is emulated.

    Args:
        lengths: of the trace's outputs; scale: times the curve.
        bias: factor on every quantile; band: on the width of the band, as a logarithm.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        curve: ErrorCurve,
        scale: float,
        *,
        bias: float = 1.0,
        band: float = 1.0,
    ) -> None:
        if not (bias > 0 and band > 0):
            raise ConfigError(f"bias and band of an estimate must be positive, not {bias}, {band}")
        self._log_bias = math.log(bias)
        self._levels = band * NORMAL_QUANTILES
        if not scale >= 0:
            raise ConfigError(f"error scale must be at least 0, not {scale}")
        self.curve = curve
        self.scale = scale
        step = max(lengths.size // _SAMPLE, 1)
        ordered = np.sort(lengths)[::step].astype(np.float64)
        self._ages = np.concatenate([[0.0], np.geomspace(1.0, max(ordered[-1], 2.0), 48)])
        self._mean = np.zeros(self._ages.size)
        self._var = np.zeros(self._ages.size)
        for k, age in enumerate(self._ages):
            left = ordered[np.searchsorted(ordered, age, side="right") :] - age
            if left.size < 8:
                self._mean[k], self._var[k] = self._mean[k - 1], self._var[k - 1]
                continue
            logs = np.log(left)
            self._mean[k], self._var[k] = logs.mean(), max(logs.var(), 1e-6)

    def quantiles(self, output: FloatArray, length: FloatArray, noise: FloatArray) -> FloatArray:
        """Remaining tokens at ``QUANTILE_LEVELS``.

        Args:
            output: tokens so far, ``[R]``; length: true output length, ``[R]``.
            noise: two independent standard normals per request, ``[R, 2]``.
        """
        left = np.maximum(length - output, 1.0)
        progress = np.clip(output / np.maximum(length, 1.0), 0.0, 1.0)
        mean = np.interp(output, self._ages, self._mean)
        var = np.interp(output, self._ages, self._var)
        if math.isinf(self.scale):
            weight, centre = np.zeros(left.size), mean
        else:
            spread = self.scale * np.interp(progress, self.curve.progress, self.curve.log_error_std)
            angle = progress * (self.curve.turns * math.pi / 2.0)
            seen = np.log(left) + spread * (
                np.cos(angle) * noise[:, 0] + np.sin(angle) * noise[:, 1]
            )
            weight = var / (var + spread * spread)
            centre = mean + weight * (seen - mean)
        sigma = np.sqrt(var * (1.0 - weight))
        quantiles: FloatArray = np.exp(
            self._log_bias + centre[:, None] + sigma[:, None] * self._levels
        )
        return quantiles
