"""STAR's engine extension: everything that runs inside SGLang processes."""

__version__ = "0.1.0"
SGLANG_VERSION = "0.5.23"
"""The SGLang release this package is built against, and installed with."""
SGLANG_RELEASES = ("0.5.22", SGLANG_VERSION)
"""Those it runs in; any other stops the launch. Rows of ``hooks.HOOKS`` say where they differ."""
