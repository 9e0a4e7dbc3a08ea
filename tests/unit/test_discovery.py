"""`init` finds what is there, bounded, and what it writes loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import discovery, load
from config.agents import load_profile, profile_names
from config.discovery import FoundAgent, configuration_for, find_agents
from daemon.errors import ConfigError, UsageError
from daemon.model import is_valid_name

OUT = Path("agentkeep.toml")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in {part for root in _all_roots() for part in root.split("/") if part.startswith("$")}:
        monkeypatch.delenv(variable[1:], raising=False)
    monkeypatch.delenv("AGENTKEEP_CONFIG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def _all_roots() -> Iterator[str]:
    for name in profile_names():
        yield from load_profile(name).roots


def make_llm(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in ("logs.db", "aliases.json"):
        (root / name).touch()
    return root


def make_codex(root: Path) -> Path:
    (root / "sessions/2026").mkdir(parents=True)
    (root / "config.toml").touch()
    return root


def make_generic(root: Path) -> Path:
    (root / "memory/.git").mkdir(parents=True)
    return root


def loaded(agents: tuple[FoundAgent, ...], tmp_path: Path, url: str | None = None) -> dict[str, Path]:
    """The agents of the configuration that is written for these."""
    path = tmp_path / "agentkeep.toml"
    path.write_text(configuration_for(agents, path=path, url=url))
    configuration = load(path)
    assert {name: agent.profile for name, agent in configuration.settings.agents.items()} == {
        agent.agent_id: agent.profile for agent in agents
    }
    return {name: spec.root for name, spec in configuration.agents.items()}


def test_an_agent_in_its_usual_place_is_found_under_its_profile_s_name(home: Path, tmp_path: Path) -> None:
    make_codex(home / ".codex")
    found = find_agents([])
    assert found.agents == (FoundAgent("codex", "codex", home / ".codex"),)
    assert loaded(found.agents, tmp_path) == {"codex": home / ".codex"}


def test_a_variable_names_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEX_HOME", str(make_codex(tmp_path / "elsewhere")))
    assert find_agents([]).agents == (FoundAgent("codex", "codex", tmp_path / "elsewhere"),)


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_a_variable_that_names_no_place_is_none(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEX_HOME", value)
    monkeypatch.chdir(tmp_path)
    make_codex(tmp_path / "relative/path")
    found = find_agents([])
    assert found.agents == ()
    assert all(place.startswith("/") for place in found.looked_at)


def test_agents_in_a_directory_are_found_some_levels_deep(tmp_path: Path) -> None:
    srv = tmp_path / "srv"
    make_llm(srv / "a/b/c")
    make_llm(srv / "a/b/d/too-deep")
    make_generic(srv / "Ana Maria")
    found = find_agents([srv])
    assert found.agents == (
        FoundAgent("ana-maria", "generic", srv / "Ana Maria"),
        FoundAgent("c", "llm", srv / "a/b/c"),
    )
    assert loaded(found.agents, tmp_path) == {"ana-maria": srv / "Ana Maria", "c": srv / "a/b/c"}
    assert found.looked_at[-1] == f"{srv} (3 levels deep)"


def test_a_directory_that_is_an_agent_itself_is_found(tmp_path: Path) -> None:
    assert [agent.profile for agent in find_agents([make_llm(tmp_path / "x")]).agents] == ["llm"]


def test_the_profile_that_asks_for_more_is_the_better_guess(tmp_path: Path) -> None:
    root = make_generic(make_llm(tmp_path / "x"))
    assert [agent.profile for agent in find_agents([root]).agents] == ["llm"]


def test_what_is_found_twice_is_one_agent(home: Path, tmp_path: Path) -> None:
    make_codex(home / ".codex")
    (tmp_path / "link").symlink_to(home)
    found = find_agents([home, home / ".codex", tmp_path / "link"])
    assert [agent.agent_id for agent in found.agents] == ["codex"]


def test_an_agent_within_another_is_part_of_it(tmp_path: Path) -> None:
    outer = make_llm(tmp_path / "outer")
    make_generic(outer / "inner")
    found = find_agents([outer / "inner", outer])
    assert [agent.root for agent in found.agents] == [outer]


def test_agents_of_one_name_get_ids_of_their_own(tmp_path: Path) -> None:
    for parent in "abc":
        make_llm(tmp_path / "srv" / parent / "ana")
    make_llm(tmp_path / "srv/агент")
    for number in range(2):
        make_llm(tmp_path / "srv" / str(number) / ("x" * 100))
    found = find_agents([tmp_path / "srv"]).agents
    ids = [agent.agent_id for agent in found]
    assert sorted(set(ids)) == sorted(ids)
    assert {"ana", "ana-2", "ana-3", "llm"} <= set(ids)
    assert all(map(is_valid_name, ids))
    assert len(loaded(found, tmp_path)) == 6


def test_links_are_not_followed_and_a_forest_is_not_searched(tmp_path: Path) -> None:
    make_llm(tmp_path / "elsewhere")
    srv = tmp_path / "srv"
    make_llm(srv / "node_modules/x")
    (srv / "link").symlink_to(tmp_path / "elsewhere")
    assert find_agents([srv]).agents == ()


def test_a_search_has_an_end_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_MOST_DIRECTORIES", 5)
    for number in range(10):
        (tmp_path / "srv" / str(number)).mkdir(parents=True)
    make_llm(tmp_path / "srv/9")
    found = find_agents([tmp_path / "srv"])
    assert found.agents == ()
    assert found.looked_at[-1] == f"{tmp_path / 'srv'} (its first 5 directories)"


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        find_agents([tmp_path / "nowhere"])


def test_a_path_that_toml_cannot_name_is_left_alone(tmp_path: Path) -> None:
    make_llm(tmp_path / "srv" / os.fsdecode(b"\xff"))
    assert find_agents([tmp_path / "srv"]).agents == ()


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\tb", "a\x7fb", "a'b", "café 🦀", "[x]#"])
def test_any_other_path_is_written_so_that_it_is_read(name: str, tmp_path: Path) -> None:
    root = make_llm(tmp_path / "srv" / name)
    assert list(loaded(find_agents([root]).agents, tmp_path).values()) == [root]


def test_a_destination_is_written(tmp_path: Path) -> None:
    agents = find_agents([make_llm(tmp_path / "x")]).agents
    text = configuration_for(agents, path=OUT, url="s3://backups/agents")
    assert '[destinations.offsite]\nurl = "s3://backups/agents"\n' in text
    loaded(agents, tmp_path, url="s3://backups/agents")


def test_without_a_destination_one_is_shown(tmp_path: Path) -> None:
    text = configuration_for(find_agents([make_llm(tmp_path / "x")]).agents, path=OUT, url=None)
    assert "#[destinations.offsite]" in text


def test_a_url_that_nobody_takes_is_refused(tmp_path: Path) -> None:
    agents = find_agents([make_llm(tmp_path / "x")]).agents
    with pytest.raises(ConfigError, match=r"agentkeep.toml, line \d+: no storage backend for 's4'"):
        configuration_for(agents, path=OUT, url="s4://backups")


def test_what_is_commented_can_be_uncommented(tmp_path: Path) -> None:
    text = configuration_for(find_agents([make_llm(tmp_path / "x")]).agents, path=OUT, url=None)
    keys = [
        line
        for line in text.splitlines()
        if line.startswith("#") and line[1:2] in "abcdefghijklmnopqrstuvwxyz["
    ]
    uncommented = "\n".join(
        line[1:] if line in keys and "age1" not in line else line for line in text.splitlines()
    )
    path = tmp_path / "agentkeep.toml"
    path.write_text(uncommented)
    assert load(path).settings.destinations.keys() == {"offsite"}


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_says_what_it_is_of(name: str, tmp_path: Path) -> None:
    text = configuration_for([FoundAgent("ana", name, tmp_path / "ana")], path=OUT, url=None)
    assert f"# {load_profile(name).summary}\n[agents.ana]\n" in text
