"""The checker finds what is gone or changed, in sources made for it and in the installed SGLang."""

from __future__ import annotations

import ast
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_star import SGLANG_RELEASES, SGLANG_VERSION, launch
from sglang_star.engine import compat, hooked, installed, signature, source
from sglang_star.engine.check import Finding, Kind, check
from sglang_star.engine.contract.row import (
    Attribute,
    Class,
    Field,
    Function,
    Module,
    Name,
    Row,
)
from sglang_star.engine.hooked import Hooked
from sglang_star.engine.names import Names
from sglang_star.engine.signature import Parameter, Signature
from sglang_star.errors import ConfigError, ContractError, HookError, SetupError
from sglang_star.hooks import HOOKS, Hook, Scope

TREE = {
    "sglang/__init__.py": "from sglang.version import __version__\nEngine = lazy('x', 'Engine')\n",
    "sglang/version.py": "try:\n    from x import y\nexcept ImportError:\n    __version__ = '1'\n",
    # Without __init__.py, as most of SGLang's folders are.
    "sglang/srt/batch.py": (
        "from sglang.srt.mixin import BatchMixin\n"
        "class Batch(BatchMixin):\n"
        "    LIMIT = 'seven'\n"
        "    reqs: list\n"
        "    def __init__(self, reqs, pool, *, device='cpu'):\n"
        "        self.full, (self.last, *self.rest) = False, reqs\n"
        "        if pool:\n"
        "            self.pool: object = pool\n"
        "    @classmethod\n"
        "    def init_new(cls, reqs, pool, overlap=False): ...\n"
        "    @staticmethod\n"
        "    def of(reqs): ...\n"
        "    def filter(self, keep=None, *, exclude=None): ...\n"
        "    def merge(self, other): self._merged = True\n"
        "    async def wait(self): ...\n"
        "    @property\n"
        "    def size(self): ...\n"
    ),
    "sglang/srt/mixin.py": (
        "import sglang.srt.deep as deep\n"
        "class BatchMixin(deep.Deepest):\n"
        "    def prebuilt(self, queue): self.mode = 'prebuilt'\n"
    ),
    "sglang/srt/deep.py": "class Deepest:\n    def deepest(self): ...\n",
    "sglang/srt/messages.py": (
        "class Base:\n    rid: str = ''\n"
        "class Abort(Base):\n"
        "    message: str\n"
        "    def __post_init__(self): self.rid = self.rid or 'x'\n"
    ),
    "sglang/srt/front.py": "from .batch import Batch as Renamed\nfrom sglang.srt import deep\n",
    "sglang/srt/reader.py": "def f(req):\n    return getattr(req, 'by_string', req.by_name)\n",
    "sglang/srt/server_args.py": (
        "from sglang.srt.fields import Model\n"
        "class ServerArgs:\n    def resolve(self): ...\n"
        "_INPUT_NAMESPACES = [Model]\n"
    ),
    "sglang/srt/fields.py": "class Model:\n    model_path: str\n    seed: int = 0\n",
}
BATCH = "sglang.srt.batch.Batch"


def found(row: Row, tree: dict[str, str], folder: Path) -> list[Finding]:
    for name, text in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(check([row], source.opened(folder)).findings)


GOOD = [
    Module("sglang", "", ""),
    Module("sglang.srt.batch", "", ""),
    Name("sglang.__version__", "", "", value="1"),
    Name("sglang.Engine", "", ""),
    Class("sglang.srt.front.Renamed", "", ""),
    Class("sglang.srt.front.deep.Deepest", "", ""),
    Function(BATCH, "", "", takes="reqs, pool"),
    Function(BATCH, "", "", takes="reqs, *, pool, device"),
    Function(BATCH + ".init_new", "", "", takes="reqs, pool"),
    Function(BATCH + ".of", "", "", takes="reqs"),
    Function(BATCH + ".filter", "", "", takes="*, exclude"),
    Function(BATCH + ".wait", "", "", awaited=True),
    Function(BATCH + ".prebuilt", "", "", takes="queue"),
    Function(BATCH + ".deepest", "", ""),
    Function("sglang.srt.front.Renamed.merge", "", "", takes="other"),
    Attribute(BATCH + ".LIMIT", "", "", value="seven"),
    *(Attribute(f"{BATCH}.{name}", "", "") for name in ("full", "last", "rest", "pool", "mode")),
    *(Attribute(f"{BATCH}.{name}", "", "") for name in ("reqs", "size", "_merged")),
    Attribute(BATCH + ".by_name", "", "", read_in="sglang.srt.reader"),
    Attribute(BATCH + ".by_string", "", "", read_in="sglang.srt.reader"),
    Field(BATCH + ".reqs", "", ""),
    Field("sglang.srt.messages.Abort.rid", "", ""),
    Function("sglang.srt.messages.Abort", "", "", takes="*, rid, message"),
    Field("sglang.srt.server_args.ServerArgs.model_path", "", ""),
    Function("sglang.srt.server_args.ServerArgs", "", "", takes="*, model_path"),
]


@pytest.mark.parametrize("row", GOOD, ids=lambda row: f"{type(row).__name__} {row.path}")
def test_what_is_there_is_found(row: Row, tmp_path: Path) -> None:
    assert found(row, TREE, tmp_path) == []


@pytest.mark.parametrize(
    ("row", "file", "old", "new", "kind", "said"),
    [
        # A removed method, its own and a parent's.
        (
            Function(BATCH + ".merge", "", "", takes="other"),
            "batch",
            "merge",
            "join",
            "missing",
            "",
        ),
        (Function(BATCH + ".deepest", "", ""), "deep", "deepest", "deep", "missing", ""),
        # A renamed parameter, by position and by name.
        (
            Function(BATCH + ".merge", "", "", takes="other"),
            *("batch", "merge(self, other)", "merge(self, batch)"),
            *("changed", "argument 1 is batch, not other"),
        ),
        (
            Function(BATCH + ".filter", "", "", takes="*, exclude"),
            *("batch", "exclude", "without", "changed", "there is no parameter exclude"),
        ),
        # A new required parameter: before those we pass, after them, by name only.
        (
            Function(BATCH + ".init_new", "", "", takes="reqs, pool"),
            *("batch", "cls, reqs", "cls, mode, reqs", "changed", "argument 1 is mode, not reqs"),
        ),
        (
            Function(BATCH + ".init_new", "", "", takes="reqs, pool"),
            *("batch", "pool, overlap=False", "pool, overlap", "changed", "overlap must be given"),
        ),
        (
            Function(BATCH, "", "", takes="reqs, pool"),
            *("batch", "device='cpu'", "device", "changed", "device must be given"),
        ),
        (
            Function("sglang.srt.messages.Abort", "", "", takes="*, message"),
            *("messages", "rid: str = ''", "rid: str", "changed", "rid must be given"),
        ),
        # A removed attribute, parameter, field; a class that moved; a module that is gone.
        (Attribute(BATCH + ".full", "", ""), "batch", "self.full", "full", "missing", ""),
        (Attribute(BATCH + ".mode", "", ""), "mixin", "self.mode", "self.how", "missing", ""),
        (
            Field("sglang.srt.messages.Abort.rid", "", ""),
            *("messages", "rid: str = ''", "pass", "changed", "an attribute of instances"),
        ),
        (
            Field("sglang.srt.server_args.ServerArgs.seed", "", ""),
            *("fields", "seed", "random_seed", "missing", ""),
        ),
        (Class(BATCH, "", ""), "batch", "class Batch(", "class Other(", "missing", ""),
        (
            Class("sglang.srt.gone.Batch", "", ""),
            *("batch", "", "", "missing", "there is no module sglang.srt.gone"),
        ),
        (
            Function("sglang.srt.batch.Gone.merge", "", ""),
            *("batch", "", "", "missing", "there is no sglang.srt.batch.Gone"),
        ),
        # One kind of thing in another's place.
        (
            Attribute(BATCH + ".size", "", ""),
            "batch",
            "@property\n",
            "@cached\n",
            "changed",
            "function",
        ),
        (Function(BATCH + ".size", "", ""), "batch", "", "", "changed", "it is a property"),
        (Function(BATCH + ".wait", "", ""), "batch", "", "", "changed", "has to be awaited"),
        (Function(BATCH + ".of", "", "", awaited=True), "batch", "", "", "changed", "no coroutine"),
        (
            Attribute(BATCH + ".LIMIT", "", "", value="seven"),
            *("batch", "'seven'", "'eight'", "changed", "its value is 'eight', not 'seven'"),
        ),
        (
            Attribute(BATCH + ".by_name", "", "", read_in="sglang.srt.reader"),
            *("reader", "by_name", "name", "missing", "does not look at it"),
        ),
    ],
)
def test_what_is_gone_or_changed_is_named(
    row: Row, file: str, old: str, new: str, kind: str, said: str, tmp_path: Path
) -> None:
    name = f"sglang/srt/{file}.py"
    assert old in TREE[name]
    tree = TREE | {name: TREE[name].replace(old, new)}
    (finding,) = found(row, tree, tmp_path)
    assert finding.kind is Kind(kind)
    assert said in finding.found
    assert row.path in str(finding)


def test_a_wheel_reads_like_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "sglang-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in TREE.items():
            wheel.writestr(name, text)
    opened = source.opened(path)
    assert opened.label == "sglang-1.2.3"
    gone = Function(BATCH + ".gone", "", "")
    elsewhere = Module("nixl._api", "", "")
    report = check([*GOOD, gone, elsewhere], opened)
    assert [finding.row for finding in report.findings] == [gone]
    assert (report.checked, report.skipped) == (len(GOOD) + 1, 1)


# --------------------------------------------------------------------------- hooks

TARGET = Signature((Parameter("self", True), Parameter("req", True), Parameter("late", False)))


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ("def f(scheduler, req, late=False): ...", ""),
        ("def f(scheduler, req, *args, **kwargs): ...", ""),
        ("def f(scheduler, _req, **rest): ...", ""),
        ("def f(scheduler, req): ...", "it also takes late"),
        ("def f(scheduler, request, *args, **kwargs): ...", "parameter 1 is req, not request"),
        ("def f(scheduler, req, late): ...", "late may be left out"),
        ("def f(scheduler, req, late=0, more=0): ...", "there is no parameter more"),
        ("def f(scheduler, req, *args, gone=0, **kwargs): ...", "there is no parameter gone"),
    ],
)
def test_a_hook_takes_what_its_target_takes(ours: str, said: str) -> None:
    (node,) = ast.parse(ours).body
    assert isinstance(node, ast.FunctionDef)
    assert signature.misfits(signature.of(node), TARGET) == said


def test_the_hook_table_becomes_rows() -> None:
    rows = {row.path.rpartition(".")[2]: row for row in hooked.rows()}
    around = rows["_add_request_to_queue"]
    assert [one.name for one in around.signature.positional] == ["scheduler", "req", "is_retracted"]
    assert rows["nixlAgentConfig"].replaces
    gone = Hook(Scope.SCHEDULER, "sglang.srt.gone.f", "after", "sglang_star.scheduler:init", "w")
    assert [type(row) for row in hooked.rows((gone,))] == [Hooked]


# --------------------------------------------------------------------------- installed


@pytest.fixture
def sglang_is_here() -> None:
    if "sglang" not in source.installed().packages:
        pytest.skip("SGLang is not installed")


@pytest.mark.usefixtures("sglang_is_here")
def test_the_installed_release_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.main([]) == 0
    assert "installed: nothing of" in capsys.readouterr().out


@pytest.mark.usefixtures("sglang_is_here")
def test_one_changed_file_of_the_installed_release_is_noticed(tmp_path: Path) -> None:
    real = source.installed()
    texts: dict[str, Callable[[str], str]] = {
        "sglang.srt.managers.schedule_batch": lambda text: text.replace(
            "def prepare_for_", "def make_ready_for_"
        ).replace("reqs_to_exclude", "without"),
    }

    class Patched:
        label, packages = "patched", real.packages

        def text(self, module: str) -> tuple[str, bool] | None:
            got = real.text(module)
            return (texts.get(module, str)(got[0]), got[1]) if got else None

    (finding,) = check(installed.everything(real), Patched()).findings
    assert finding.row.path.endswith("ScheduleBatch.filter_batch")


@pytest.mark.parametrize("release", SGLANG_RELEASES)
def test_each_release_is_held_against_its_own_hooks(release: str, tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text("")
    (tmp_path / "sglang/_version.py").write_text(
        f"__version__: str\n__version__ = version = '{release}'\n"
    )
    there = source.opened(tmp_path)
    assert source.release_of(there) == release
    hooked_rows = {row.path for row in installed.everything(there) if isinstance(row, Hooked)}
    assert hooked_rows == {hook.target for hook in HOOKS if hook.is_for(release)}


def test_a_release_that_nobody_knows_is_held_against_the_newest(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text("")
    there = source.opened(tmp_path)
    assert source.release_of(there) == ""
    newest = {hook.target for hook in HOOKS if hook.is_for(SGLANG_VERSION)}
    assert {r.path for r in installed.everything(there) if isinstance(r, Hooked)} == newest


def test_what_differs_between_releases_is_for_releases_that_are_supported() -> None:
    for hook in HOOKS:
        assert set(hook.releases) <= set(SGLANG_RELEASES), hook.target
        assert set(hook.releases) != set(SGLANG_RELEASES), f"{hook.target}: say nothing for all"


def test_a_check_that_passed_is_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    memory = tmp_path / "cache/contract.json"
    row = Function(BATCH + ".merge", "lets a request join", "migration.batch", takes="other")

    def look(*rows: Row) -> tuple[tuple[Finding, ...], bool]:
        folders = source.Folders("made", {"sglang": tmp_path / "sglang"})
        return installed.checked(folders, rows, memory), bool(folders.read)

    assert look(row) == ((), True)
    assert look(row) == ((), False)
    assert look(row, GOOD[0]) == ((), True)  # another table
    assert look(row, GOOD[0]) == ((), False)
    file = tmp_path / "sglang/srt/batch.py"
    file.write_text(file.read_text().replace("def merge", "def join"))
    findings, read = look(row, GOOD[0])
    assert read
    assert [finding.row for finding in findings] == [row]
    assert look(row, GOOD[0])[1]  # what failed is not remembered
    memory.write_text("not json")
    assert look(GOOD[0]) == ((), True)


def test_a_finding_stops_the_launch_and_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Function(BATCH + ".merge", "lets a request join", "migration.batch")
    findings = (Finding(row, Kind.MISSING, ""), Finding(row, Kind.CHANGED, "other"))
    monkeypatch.setattr(installed, "known_findings", lambda: findings)
    monkeypatch.setattr(launch.hooks, "verify_version", lambda: None)
    with pytest.raises(ContractError) as stopped:
        launch.enable(object())
    assert isinstance(stopped.value, HookError)
    said = "sglang.srt.batch.Batch.merge is missing, and 1 more; STAR needs it: lets a request join"
    assert stopped.value.message == said
    assert "star compat" in stopped.value.hint


# --------------------------------------------------------------------------- the command


def test_the_command_tells_by_module_and_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in TREE.items():
        (tmp_path / "python" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "python" / name).write_text(text)
    out = tmp_path / "out.json"
    assert compat.main([str(tmp_path), "--json", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "missing or changed" in lines[0]
    at = lines.index("  sglang.srt.managers.schedule_batch")
    assert any("Req.output_ids: missing: there is no module" in line for line in lines[at:])
    (told,) = json.loads(out.read_text()).values()
    paths = {finding["path"]: finding for finding in told["findings"]}
    assert paths["sglang.srt.managers.schedule_batch.Req.kv"]["users"]
    assert told["checked"] > len(told["findings"])  # sglang.__version__ is there


@pytest.mark.parametrize("release", ["no-such-thing", "0.5.x y"])
def test_an_argument_that_is_nothing_is_refused(release: str) -> None:
    with pytest.raises(ConfigError, match="neither a file, a folder nor a version"):
        compat.main([release])


def test_a_file_or_folder_without_sglang_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no package sglang"):
        compat.main([str(tmp_path)])
    (tmp_path / "x.whl").write_text("no wheel")
    with pytest.raises(ConfigError, match="is no wheel"):
        compat.main([str(tmp_path / "x.whl")])


def test_a_version_comes_from_where_pip_is_told_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "sglang-9.8.7-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sglang/__init__.py", "")
        wheel.writestr("sglang-9.8.7.dist-info/METADATA", "Name: sglang\nVersion: 9.8.7\n")
        wheel.writestr("sglang-9.8.7.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("sglang-9.8.7.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert compat.main(["9.8.7"]) == 1
    assert capsys.readouterr().out.startswith("sglang-9.8.7: ")
    with pytest.raises(SetupError, match=r"cannot fetch sglang==9\.8\.6"):
        compat.main(["9.8.6"])


def test_a_text_that_this_python_cannot_read_is_named(tmp_path: Path) -> None:
    tree = TREE | {"sglang/srt/batch.py": "class Batch[\n"}
    with pytest.raises(ConfigError, match=r"cannot read sglang\.srt\.batch"):
        found(Class(BATCH, "", ""), tree, tmp_path)


def test_classes_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").write_text(
        "from sglang import again\nclass A(B): ...\nclass B(A): ...\n"
    )
    names = Names(source.opened(tmp_path))
    assert names.find("sglang.A.nothing") is None
    assert names.find("sglang.again") is None
