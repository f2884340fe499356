from pathlib import Path

import pytest

from kvmhv.errors import HostError
from kvmhv.lab import state as states
from kvmhv.lab import tree
from kvmhv.lab.plan import make_plan
from kvmhv.lab.steps import silent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tree, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(states, "RUN_DIR", tmp_path / "run")
    monkeypatch.setattr(states, "DATA_DIR", tmp_path / "data")
    return tmp_path


def test_a_tree_is_another_one_when_what_it_is_made_of_changes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {tree.tree_path("trixie"), tree.tree_path("bookworm")}
    monkeypatch.setattr(tree, "PACKAGES", (*tree.PACKAGES, "tcpdump"))
    paths.add(tree.tree_path("trixie"))
    monkeypatch.setattr(tree, "pinned_requirements", lambda: ["click==1"])
    paths.add(tree.tree_path("trixie"))
    assert len(paths) == 4
    assert tree.tree_path("trixie") == tree.tree_path("trixie")


def test_the_requirements_are_those_of_the_checkout() -> None:
    requirements = tree.pinned_requirements()
    assert any(requirement.startswith("qemu.qmp==") for requirement in requirements)
    assert all("==" in requirement for requirement in requirements)


def test_pips_settings_become_variables_and_the_environment_wins() -> None:
    listing = """\
:env:.cert='/env.pem'
global.cert='/global.pem'
global.extra-index-url='file:///mirror/a/simple file:///mirror/b/simple'
global.trusted-host='\\none.example\\ntwo.example'
install.no-deps='false'
freeze.all='true'
nonsense
"""
    assert tree.parse_pip_config(listing) == {
        "PIP_CERT": "/env.pem",
        "PIP_EXTRA_INDEX_URL": "file:///mirror/a/simple file:///mirror/b/simple",
        "PIP_TRUSTED_HOST": "one.example two.example",
        "PIP_NO_DEPS": "false",
    }
    assert tree.parse_pip_config("") == {}


def test_what_pip_finds_on_the_machines_disk_is_shown_to_the_tree() -> None:
    settings = {
        "PIP_EXTRA_INDEX_URL": "file:///mirror/a/simple https://example.org/simple",
        "PIP_FIND_LINKS": "/wheels",
        "PIP_TIMEOUT": "5",
    }
    assert tree.local_paths(settings) == ["/mirror/a", "/wheels"]
    assert tree.local_paths({"PIP_CERT": "/", "PIP_FIND_LINKS": "file:///simple /etc"}) == []


def _build_of(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | None) -> None:
    def install(_suite: str, _packages: object, part: Path, _log: Path, _progress: object) -> None:
        for directory in ("usr/local/bin", "etc", "opt"):
            (part / directory).mkdir(parents=True)

    def install_python(_suite: str, _part: Path, _log: Path, _progress: object) -> None:
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(tree, "_install_packages", install)
    monkeypatch.setattr(tree, "_install_python", install_python)
    monkeypatch.setattr(tree, "run_step", lambda *_args, **_kwargs: None)


@pytest.mark.parametrize("outcome", [HostError("lab-step", "no network"), KeyboardInterrupt()])
def test_a_failed_build_leaves_no_tree(cache: Path, monkeypatch: pytest.MonkeyPatch, outcome: BaseException) -> None:
    _build_of(monkeypatch, outcome)
    with pytest.raises(type(outcome)):
        tree.ensure_trees(["trixie"], silent)
    assert list((cache / "trees").iterdir()) == []


def test_a_new_tree_removes_the_old_ones_that_no_lab_uses(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _build_of(monkeypatch, None)
    trees = cache / "trees"
    for name in ("trixie-unused", "trixie-used", "bookworm-other", ".trixie-killed.part"):
        (trees / name).mkdir(parents=True)
    states.write_state(states.LabState(make_plan("old"), {"trixie": str(trees / "trixie-used")}, "boot"))
    made = tree.ensure_trees(["trixie"], silent)["trixie"]
    assert {entry.name for entry in trees.iterdir()} == {made.name, "trixie-used", "bookworm-other"}
    assert (made / "usr/local/bin/kvmhv").stat().st_mode & 0o777 == 0o755


def test_a_tree_that_is_there_is_used_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _build_of(monkeypatch, AssertionError("built again"))
    tree.tree_path("trixie").mkdir(parents=True)
    assert tree.ensure_trees(["trixie"], silent) == {"trixie": tree.tree_path("trixie")}
