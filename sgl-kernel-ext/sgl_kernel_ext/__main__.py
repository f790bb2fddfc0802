"""``python -m sgl_kernel_ext`` compiles ahead of time what this machine can use, so that no engine
has to. With ``--arch`` it compiles for GPUs of other machines, as an image for them needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sgl_kernel_ext.build import BuildError, build, cuda, host, of_this_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Compile ahead of time; 0 if all is there now."""
    parser = argparse.ArgumentParser(prog="python -m sgl_kernel_ext", description=__doc__)
    parser.add_argument("--arch", nargs="+", metavar="CC", help="CUDA for these, such as 90 120")
    args = parser.parse_args(argv)
    targets = [host(), cuda(args.arch)] if args.arch else of_this_machine()
    failed = 0
    for target in targets:
        try:
            print(f"{target.name}: {build(target)}", flush=True)
        except BuildError as error:
            print(f"{target.name}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
