"""STAR's engine extension: everything that runs inside SGLang processes."""

__version__ = "0.1.0"
SGLANG_VERSION = "0.5.23"
"""The one SGLang release this package is built against; any other stops the launch."""
