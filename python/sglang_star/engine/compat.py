"""``star compat``: does STAR fit a release of SGLang? Reads its source; nothing is installed."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_star import SGLANG_RELEASES, SGLANG_VERSION
from sglang_star.engine import check, source
from sglang_star.engine.check import Finding, Report
from sglang_star.engine.installed import everything
from sglang_star.engine.source import Source, release_of
from sglang_star.errors import ConfigError, SetupError

VERSION = re.compile(r"\d+(\.\w+)+")


def main(argv: Sequence[str] | None = None) -> int:
    """Check what is named; 0 if nothing is missing or changed, else 1.

    Raises:
        ConfigError: an argument is neither a wheel, a folder nor a version.
        SetupError: pip cannot fetch a version.
    """
    args = parser().parse_args(argv)
    reports: dict[str, Report] = {}
    for one in sources(args.releases):
        report = reports[one.label] = check.check(everything(one), one)
        print("\n".join(lines(one.label, report)), flush=True)
        if not report.findings and (found := release_of(one)) not in SGLANG_RELEASES:
            print(f"  STAR does not start in {found or 'it'} all the same: nobody has tried")
    if args.json:
        told = {label: to_json(report) for label, report in reports.items()}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    return int(any(report.findings for report in reports.values()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"STAR runs in SGLang {' and '.join(SGLANG_RELEASES)}. What a release does with the "
        "functions it has, no source text tells: that is what the tests are for.",
    )
    result.add_argument(
        "releases",
        nargs="*",
        metavar="WHEEL|VERSION|FOLDER",
        help="a wheel, a version that pip fetches, or a folder with sglang/ [the installed one]",
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    return result


def sources(releases: Sequence[str]) -> Iterator[Source]:
    """Open each release, fetching versions; what was fetched is gone with the next one.

    Raises:
        ConfigError, SetupError: as :func:`main`.
    """
    if not releases:
        yield source.installed()
    for release in releases:
        path = Path(release)
        if path.exists():
            yield source.opened(path)
        elif VERSION.fullmatch(release):
            with fetched(release) as wheel:
                yield source.opened(wheel)
        else:
            raise ConfigError(
                f"{release} is neither a file, a folder nor a version",
                hint=f"for example: star compat {SGLANG_VERSION}",
            )


@contextlib.contextmanager
def fetched(version: str) -> Iterator[Path]:
    """Download SGLang's wheel, and nothing it needs, from wherever pip is told to look.

    Raises:
        SetupError: pip has none of that version.
    """
    with tempfile.TemporaryDirectory(prefix="star-compat-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, f"sglang=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = next(iter(reversed(done.stderr.strip().splitlines())), "pip gave no wheel")
            raise SetupError(
                f"cannot fetch sglang=={version}: {said}",
                hint="pip index versions sglang lists what there is",
            )
        yield wheels[0]


def lines(label: str, report: Report) -> Iterator[str]:
    """A report for a person: findings by module."""
    found = len(report.findings)
    skipped = f", {report.skipped} on packages that are not there" if report.skipped else ""
    yield f"{label}: {found or 'nothing'} of {report.checked} missing or changed{skipped}"
    by_module: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.findings:
        by_module[split(finding.row.path)[0]].append(finding)
    for module, findings in sorted(by_module.items()):
        yield f"  {module}"
        for finding in findings:
            name = split(finding.row.path)[1] or "the module"
            instead = f": {finding.found}" if finding.found else ""
            yield f"    {name}: {finding.kind.value}{instead}"
            yield f"      {finding.row.why} ({', '.join(finding.row.users.split())})"


def split(path: str) -> tuple[str, str]:
    """A path's module and the rest, by the first word that is no module's name."""
    words = path.split(".")
    cut = next((i for i, word in enumerate(words) if word != word.lower()), len(words) - 1)
    return ".".join(words[:cut]), ".".join(words[cut:])


def to_json(report: Report) -> dict[str, object]:
    """A report for a program."""
    return {
        "checked": report.checked,
        "skipped": report.skipped,
        "findings": [
            {
                "path": finding.row.path,
                "kind": finding.kind.value,
                "found": finding.found,
                "why": finding.row.why,
                "users": finding.row.users.split(),
            }
            for finding in report.findings
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
