"""A configuration is taken as it was meant, or refused with line, value and the nearest right one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import config
from config import Configuration, find_config_file, load
from config.agents import profile_names
from config.settings import Settings
from daemon.errors import AgentkeepError, AgentNotFound, ConfigError, UsageError
from daemon.model import StateSource
from daemon.schedule import Schedule

SECRET = "hunter2-hunter2"
Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "AGENTKEEP_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration; `@` in it is this test's directory. Gives its path."""

    def write_text(text: str) -> Path:
        path = tmp_path / "agentkeep.toml"
        if "state_dir" not in text:
            text = f'state_dir = "@/state"\n{text}'
        path.write_text(text.replace("@", str(tmp_path)))
        return path

    return write_text


def refused(path: Path) -> ConfigError:
    """The complaint about a configuration, which is about the line that ends in `# here`."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.exit_code == 78
    lines = [
        number for number, line in enumerate(path.read_text().splitlines(), 1) if line.endswith("# here")
    ]
    assert len(lines) == 1
    assert str(caught.value).startswith(f"{path}, line {lines[0]}: "), caught.value
    return caught.value


# --- what is meant --------------------------------------------------------------------------------


def test_five_lines_are_enough(write: Write, tmp_path: Path) -> None:
    configuration = load(
        write('[agents.ana]\nroot = "@/ana"\n[destinations.offsite]\nurl = "s3://backups/agents"\n')
    )
    spec = configuration.agent("ana")
    assert (spec.tenant, spec.agent_id, spec.root) == ("default", "ana", tmp_path / "ana")
    assert spec.include == ("**",)
    assert spec.walk_all
    assert ".env" in spec.secrets
    assert spec.memdir is None
    assert "memory" in spec.memdir_candidates
    assert configuration.destinations_of("ana") == ("offsite",)
    assert configuration.settings.agents["ana"].parsed_schedule() == Schedule(3600, None, 60)
    assert configuration.settings.encryption.recipients == ()


def test_sources_that_are_spelled_out_have_the_deepest_directory_that_holds_all_for_a_root(
    write: Write, tmp_path: Path
) -> None:
    text = """
        [agents.bob]
        memdir = "@/bob/memory"
        sqlite = ["@/bob/db/*.sqlite", "@/bob/db/extra/one.db"]
        files  = ["@/bob/sessions/**/*.jsonl", "@/bob/notes.md"]
        [agents.bob.state]
        cursor = { file = "@/bob/state/cursor.json" }
        run = { sqlite = "@/bob/db/registry.sqlite", query = "SELECT 1" }
    """
    spec = load(write(text)).agent("bob")
    root = tmp_path / "bob"
    assert spec.root == root
    assert spec.memdir == root / "memory"
    assert spec.sqlite == ("db/*.sqlite", "db/extra/one.db")
    assert set(spec.include) == {"db/*.sqlite", "db/extra/one.db", "sessions/**/*.jsonl", "notes.md"}
    assert set(spec.required) == {"memory", "db/extra/one.db", "notes.md", "sessions"}
    assert set(spec.named) == {"memory", "db/extra/one.db", "notes.md"}
    assert not spec.walk_all
    assert spec.states == (
        StateSource("cursor", file=root / "state" / "cursor.json"),
        StateSource("run", sqlite=root / "db" / "registry.sqlite", query="SELECT 1"),
    )


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ('sqlite = ["@/x/main.db"]', "x"),
        ('sqlite = ["@/x/**/*.db"]', "x"),
        ('sqlite = ["@/x/y/a.db", "@/x/z/b.db"]', "x"),
        ('files = ["@/x/*.log"]', "x"),
        ('memdir = "@/x/memory"', "x/memory"),
        ('memdir = "@/x"\nfiles = ["@/xy/a"]', "."),
    ],
)
def test_the_common_root_of_few_sources(source: str, root: str, write: Write, tmp_path: Path) -> None:
    assert load(write(f"[agents.bob]\n{source}\n")).agent("bob").root == tmp_path / root


def test_with_a_root_sources_may_be_relative_to_it(write: Write, tmp_path: Path) -> None:
    text = (
        '[agents.bob]\nroot = "@/bob"\nmemdir = "memory"\nsqlite = ["db/*.db"]\nfiles = ["@/bob/notes.md"]\n'
    )
    spec = load(write(text)).agent("bob")
    assert spec.memdir == tmp_path / "bob" / "memory"
    assert spec.include == ("notes.md", "db/*.db")
    assert spec.required == spec.named == ("notes.md", "memory")


def test_a_profile_and_sources_add_up(write: Write) -> None:
    sources = 'profile = "generic"\nsqlite = ["db/must.db"]\nexclude = ["scratch/**"]\n'
    spec = load(write('[agents.bob]\nroot = "@/bob"\n' + sources)).agent("bob")
    assert spec.include == ("**", "db/must.db")
    assert spec.sqlite == ("db/must.db",)
    assert spec.exclude[-1] == "scratch/**"
    assert "*.pid" in spec.exclude


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("1048576", 1 << 20),
        ("'1048576'", 1 << 20),
        ("'2 GiB'", 2 << 30),
        ("'2gib'", 2 << 30),
        ("'1.5 KiB'", 1536),
        ("'10 MB'", 10_000_000),
        ("' 3 kB '", 3000),
        ("'7 B'", 7),
        ("'1TiB'", 1 << 40),
    ],
)
def test_a_size_may_be_written_as_people_write_it(written: str, size_bytes: int, write: Write) -> None:
    spec = load(write(f"{ANA}max_file_bytes = {written}\nmax_agent_bytes = {written}\n")).agent("ana")
    assert (spec.max_file_bytes, spec.max_agent_bytes) == (size_bytes, size_bytes)


def test_how_an_agent_is_captured_reaches_capture(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    text = """
        [agents.ana]
        root = "@/ana"
        before = ["~/bin/freeze", "--now", "~"]
        after = ["thaw"]
        command_timeout_seconds = 1.5
        require_point_in_time = true
        [agents.ana.state]
        queue = { command = ["dump", "queue"], restore_command = ["/opt/fill"] }
    """
    spec = load(write(text)).agent("ana")
    assert (spec.before, spec.after) == (("/home/ana/bin/freeze", "--now", "~"), ("thaw",))
    assert (spec.command_timeout_seconds, spec.require_point_in_time) == (1.5, True)
    assert spec.states == (StateSource("queue", command=("dump", "queue"), restore_command=("/opt/fill",)),)


def test_nothing_of_that_is_asked_for_by_default(write: Write) -> None:
    spec = load(write(ANA)).agent("ana")
    assert (spec.before, spec.after, spec.require_point_in_time) == ((), (), False)
    assert (spec.max_file_bytes, spec.max_agent_bytes, spec.command_timeout_seconds) == (None, None, 60.0)


@pytest.mark.parametrize(
    "sources", ['root = "@/x"', 'files = ["@/x/*.md"]', 'root = "@/x"\nprofile = "openclaw"']
)
def test_secrets_and_caches_are_left_out_of_every_agent(sources: str, write: Write) -> None:
    spec = load(write(f"[agents.ana]\n{sources}\n")).agent("ana")
    assert {".env", "*credentials", "*.pem"} <= set(spec.secrets)
    assert {"node_modules", "*.sock", "__pycache__"} <= set(spec.exclude)


def test_secrets_are_kept_where_that_is_asked_for(write: Write) -> None:
    text = '[agents.ana]\nroot = "@/ana"\nprofile = "openclaw"\ninclude_secrets = true\n'
    spec = load(write(text)).agent("ana")
    assert (spec.secrets, spec.secret_tables) == ((), ())
    assert "node_modules" in spec.exclude


def test_a_profile_s_state_values_need_not_be_there_and_one_s_own_take_their_place(
    write: Write, tmp_path: Path
) -> None:
    text = """
        [agents.ana]
        root = "@/ana"
        profile = "nexo"
        [agents.ana.state]
        dream_run = { file = "run.json" }
        more = { file = "more.json" }
    """
    root = tmp_path / "ana"
    assert load(write(text)).agent("ana").states == (
        StateSource("extract_cursor", file=root / "state" / "extract_cursor.json", optional=True),
        StateSource("dream_run", file=root / "run.json"),
        StateSource("more", file=root / "more.json"),
    )


@pytest.mark.parametrize(("asked", "required"), [("", True), ("require_point_in_time = false\n", False)])
def test_what_a_profile_asks_for_may_be_waived(asked: str, required: bool, write: Write) -> None:
    text = f'[agents.ana]\nroot = "@/ana"\nprofile = "chroma"\n{asked}'
    assert load(write(text)).agent("ana").require_point_in_time is required


def test_a_state_value_of_a_command_overlaps_with_nobody(write: Write) -> None:
    state = '[agents.{0}.state]\nx = {{ command = ["date"] }}\n'
    text = "".join(f'[agents.{name}]\nroot = "@/{name}"\n{state.format(name)}' for name in ("ana", "bob"))
    assert len(load(write(text)).agents) == 2


def test_a_home_directory_may_be_written_as_a_tilde(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ana")
    text = 'state_dir = "~/state"\n[agents.ana]\nroot = "~/agent"\n[agents.bob]\nsqlite = ["~/bob/x.db"]\n'
    configuration = load(write(text))
    assert configuration.settings.state_dir == Path("/home/ana/state")
    assert configuration.agent("ana").root == Path("/home/ana/agent")
    assert configuration.agent("bob").root == Path("/home/ana/bob")


def test_an_agent_goes_to_all_destinations_unless_it_says_which(write: Write) -> None:
    text = """
        [agents.all]
        root = "@/all"
        [agents.one]
        root = "@/one"
        destinations = ["nas"]
        [agents.none]
        root = "@/none"
        destinations = []
        [destinations.offsite]
        url = "s3://b"
        [destinations.nas]
        url = "file:///mnt/nas"
    """
    configuration = load(write(text))
    assert configuration.destinations_of("all") == ("offsite", "nas")
    assert configuration.destinations_of("one") == ("nas",)
    assert configuration.destinations_of("none") == ()


def test_the_state_directory_is_the_unit_s_if_nobody_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agentkeep.toml"
    path.write_text("")
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/of-the-unit:{tmp_path}/another")
    assert load(path).settings.state_dir == tmp_path / "of-the-unit"


def test_a_thousand_agents_are_read(write: Write, tmp_path: Path) -> None:
    configuration = load(
        write("".join(f'[agents.agent-{number}]\nroot = "@/{number}"\n' for number in range(1000)))
    )
    assert len(configuration.agents) == 1000
    assert configuration.agent("agent-999").root == tmp_path / "999"


# --- the example ----------------------------------------------------------------------------------


def example() -> str:
    return Path(config.__file__).with_name("agentkeep.example.toml").read_text()


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind)


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "agentkeep.toml"
    path.write_text(example())
    assert load(path).agents


def test_the_example_shows_every_key_and_no_other() -> None:
    shown = set(re.findall(r"^#?([a-z_]+) = ", example(), re.MULTILINE))
    shown |= set(re.findall(r"^#?\[([a-z_]+)", example(), re.MULTILINE))
    in_a_line = r"\b(file|query|command|restore_command) = "
    shown |= set(re.findall(in_a_line, example()))
    shown |= set(re.findall(r"^#?\[agents\.[a-z]+\.([a-z]+)\]", example(), re.MULTILINE))
    assert shown - {"extract_cursor", "dream_run", "queue"} == set(keys_of(Settings))


def test_the_example_uncommented_is_a_configuration_too(tmp_path: Path) -> None:
    """Every key of an agent, with the value that it is shown with."""
    section = example().split("[agents.ana]")[1].split("[agents.bob]")[0]
    path = tmp_path / "agentkeep.toml"
    path.write_text(
        "[agents.ana]\n" + re.sub(r"^#(?=[a-z_]+ = )", "", section, flags=re.MULTILINE) + f"{OFFSITE}"
    )
    spec = load(path).agent("ana")
    assert spec.max_file_bytes == 2 << 30
    assert spec.after == ("systemctl", "--user", "start", "agent-ana")


def test_the_example_names_profiles_that_there_are() -> None:
    named = re.search(r"lays out its files: ([^.]*)\.", example().replace("\n# ", " "))
    assert named is not None
    assert set(re.split(r", | or ", named[1])) <= set(profile_names())


def test_the_defaults_that_the_example_names_are_the_defaults() -> None:
    """A commented key shows its default, but where the comment above it says that it is an example."""
    settings = Settings()
    named = tomllib.loads("\n".join(re.findall(r"^#((?:lock|upload|concurrency)\S* = .*)", example(), re.M)))
    assert len(named) == 3
    assert {key: getattr(settings, key) for key in named} == named


# --- unknown keys ---------------------------------------------------------------------------------

ANA = '[agents.ana]\nroot = "@/ana"\n'
UNKNOWN_KEYS = {
    "at the top": ('stat_dir = "/x"  # here\n', "'stat_dir'", "'state_dir'"),
    "a section": (ANA + '[destination.offsite]  # here\nurl = "s3://b"\n', "'destination'", "'destinations'"),
    "of an agent": ("[agents.ana]\nrot = '/x'  # here\nroot = '@/ana'\n", "'agents.ana.rot'", "'root'"),
    "of a destination": (
        '[destinations.offsite]\nurl = "s3://b"\nendpoint = "https://x"  # here\n',
        "'destinations.offsite.endpoint'",
        "'endpoint_url'",
    ),
    "of encryption": ("[encryption]\nrecipient = []  # here\n", "'encryption.recipient'", "'recipients'"),
    "of a bundle": (
        "[bundle]\n\ncompresion_level = 3  # here\n",
        "'bundle.compresion_level'",
        "'compression_level'",
    ),
    "of a state value": (
        ANA + "[agents.ana.state]\nx = { fil = '/x' }  # here\n",
        "'agents.ana.state.x.fil'",
        "'file'",
    ),
    "dotted": (
        "agents.ana.root = '@/ana'\nagents.ana.tenannt = 'x'  # here\n",
        "'agents.ana.tenannt'",
        "'tenant'",
    ),
    "quoted": (
        '[agents."ana"]\nroot = \'@/ana\'\n"exclud" = []  # here\n',
        "'agents.ana.exclud'",
        "'exclude'",
    ),
    "in a table with a comment": (
        "[agents.ana] # our first\n# rot\nroot = '@/a'\nrot = 1  # here\n",
        "rot'",
        "'root'",
    ),
    "that settings would take for their own": ("_env_file = '/x'  # here\n", "'_env_file'", ""),
}


@pytest.mark.parametrize(("text", "key", "near"), UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS.keys())
def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_one(
    text: str, key: str, near: str, write: Write
) -> None:
    message = str(refused(write(text)))
    assert "unknown key" in message
    assert key in message
    assert not near or message.endswith(f"; did you mean {near}?")


def test_a_key_like_no_other_is_refused_without_a_guess(write: Write) -> None:
    message = str(refused(write("[bundle]\nzzzzzz = 1  # here\n")))
    assert message.endswith("unknown key 'bundle.zzzzzz'")


def test_all_that_is_wrong_is_said_at_once(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write('concurrency = 0\n[agents.Ana]\nroot = "@/ana"\nrot = 1\n'))
    assert [re.findall(r"line (\d+): ", line) for line in str(caught.value).splitlines()] == [
        ["2"],
        ["3"],
        ["5"],
    ]


# --- bad values -----------------------------------------------------------------------------------

BAD_NAMES = {
    "capitals": ('[agents.Ana]  # here\nroot = "@/x"\n', "'Ana'", "'ana'"),
    "a space": ('[agents."ana maria"]  # here\nroot = "@/x"\n', "'ana maria'", "'ana-maria'"),
    "a dot": ('[agents."ana.2"]  # here\nroot = "@/x"\n', "'ana.2'", "'ana-2'"),
    "a dash at the end": ('[agents.ana-]  # here\nroot = "@/x"\n', "'ana-'", "'ana'"),
    "65 characters": (f'[agents.{"a" * 65}]  # here\nroot = "@/x"\n', f"'{'a' * 65}'", f"'{'a' * 64}'"),
    "a path": ('[agents."../x"]  # here\nroot = "@/x"\n', "'../x'", "'x'"),
    "a tenant": ('[agents.ana]\nroot = "@/x"\ntenant = "Our Team"  # here\n', "'Our Team'", "'our-team'"),
    "a destination": ('[destinations.Off_Site]  # here\nurl = "s3://b"\n', "'Off_Site'", "'off_site'"),
    "a state value": (
        ANA + "[agents.ana.state]\nMyCursor = { file = '/x' }  # here\n",
        "'MyCursor'",
        "'mycursor'",
    ),
}


@pytest.mark.parametrize(("text", "value", "near"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_a_bad_id_is_refused_with_its_line_and_the_nearest_good_one(
    text: str, value: str, near: str, write: Write
) -> None:
    message = str(refused(write(text)))
    assert f"not a valid name: {value}" in message
    assert "1 to 64 characters" in message
    assert message.endswith(f"; did you mean {near}?")


def test_an_id_that_no_good_one_is_near_to_is_refused_without_a_guess(write: Write) -> None:
    message = str(refused(write("[agents.\"агент\"]  # here\nroot = '@/x'\n")))
    assert "'агент'" in message
    assert "did you mean" not in message


BAD_VALUES = {
    "text for a number": ("concurrency = 'many'  # here\n", "concurrency", "'many'"),
    "too small": ("concurrency = 0  # here\n", "concurrency", "greater than or equal to 1, not 0"),
    "too large": ("[bundle]\ncompression_level = 23  # here\n", "bundle.compression_level", "19, not 23"),
    "below zero": (ANA + "jitter_seconds = -5  # here\n", "agents.ana.jitter_seconds", "not -5"),
    "no list": (ANA + "exclude = '*.log'  # here\n", "agents.ana.exclude", "should be a list, not '*.log'"),
    "a number in a list": (ANA + "exclude = [7]  # here\n", "agents.ana.exclude.0", "not 7"),
    "no table": ("agents = 3  # here\n", "agents", "should be a table, not 3"),
    "an agent that is no table": (
        "[agents]\nana = 'x'  # here\n",
        "agents.ana",
        "should be a table, not 'x'",
    ),
    "a schedule": (
        ANA + "schedule = 'hourly'  # here\n",
        "agents.ana.schedule",
        "'hourly'; write 'every 1h'",
    ),
    "a cron expression": (ANA + "schedule = '61 * * * *'  # here\n", "agents.ana.schedule", "'61 * * * *'"),
    "a relative root": (
        "[agents.ana]\nroot = 'ana'  # here\n",
        "agents.ana.root",
        "absolute path, not 'ana'",
    ),
    "a relative state_dir": ("state_dir = 'state'  # here\n", "state_dir", "absolute path, not 'state'"),
    "a recipient": ("[encryption]\nrecipients = ['age1x']  # here\n", "encryption.recipients", "age1x"),
    "a destination without url": (
        "[destinations.x]  # here\nregion = 'auto'\n",
        "destinations.x.url",
        "missing",
    ),
    "an agent of nothing": (
        "[agents.ana]  # here\ntenant = 'x'\n",
        "agents.ana",
        "needs a `root`, or sources",
    ),
    "an agent of state only": (
        "[agents.ana.state]  # here\nx = { file = '/x' }\n",
        "agents.ana",
        "needs a `root`, or sources",
    ),
    "a profile without root": (
        "[agents.ana]  # here\nprofile = 'generic'\nmemdir = '/x'\n",
        "agents.ana",
        "needs a `root`",
    ),
    "a state value of nothing": (
        ANA + "[agents.ana.state]\nx = {}  # here\n",
        "agents.ana.state.x",
        "either `file`",
    ),
    "a query without database": (
        ANA + "[agents.ana.state]\nx = { file = '/x', query = 'q' }  # here\n",
        "agents.ana.state.x",
        "go together",
    ),
    "a command of a state value that is text": (
        ANA + "[agents.ana.state]\nx = { command = 'date +%s' }  # here\n",
        "agents.ana.state.x.command",
        "should be a list, not 'date +%s'",
    ),
    "a state value of two kinds": (
        ANA + "[agents.ana.state]\nx = { file = '/x', command = ['date'] }  # here\n",
        "agents.ana.state.x",
        "either `file`, or `sqlite` with `query`, or `command`",
    ),
    "a way back without a way there": (
        ANA + "[agents.ana.state]\nx = { file = '/x', restore_command = ['tee'] }  # here\n",
        "agents.ana.state.x",
        "`restore_command` goes with `command`",
    ),
    "a command that is text": (ANA + "before = 'sync'  # here\n", "agents.ana.before", "list, not 'sync'"),
    "a command of nothing": (ANA + "after = []  # here\n", "agents.ana.after", "its program, then"),
    "a command without a program": (ANA + "after = ['', 'x']  # here\n", "agents.ana.after", "its program"),
    "a command of no certain place": (
        ANA + "before = ['bin/freeze']  # here\n",
        "agents.ana.before",
        "absolute path, not 'bin/freeze'",
    ),
    "no time at all": (
        ANA + "command_timeout_seconds = 0  # here\n",
        "agents.ana.command_timeout_seconds",
        "than 0",
    ),
    "endless time": (
        ANA + "command_timeout_seconds = inf  # here\n",
        "agents.ana.command_timeout_seconds",
        "not inf",
    ),
    "a size in words": (
        ANA + "max_file_bytes = 'much'  # here\n",
        "agents.ana.max_file_bytes",
        "not a size: 'much'",
    ),
    "a size in no unit": (
        ANA + "max_agent_bytes = '2 Gi'  # here\n",
        "agents.ana.max_agent_bytes",
        "did you mean '2 GiB'?",
    ),
    "a size of nothing": (
        ANA + "max_file_bytes = '0 GiB'  # here\n",
        "agents.ana.max_file_bytes",
        "greater than 0",
    ),
    "a size that is none": (
        ANA + "max_file_bytes = true  # here\n",
        "agents.ana.max_file_bytes",
        "valid integer",
    ),
    "a fraction of a byte": (
        ANA + "max_file_bytes = 1.5  # here\n",
        "agents.ana.max_file_bytes",
        "valid integer",
    ),
    "sources of nowhere": ("[agents.ana]\nsqlite = ['x.db']  # here\n", "sqlite", "'x.db' is relative"),
    "a memdir of nowhere": ("[agents.ana]\nmemdir = 'memory'  # here\n", "memdir", "'memory' is relative"),
    "sqlite outside of the root": (
        ANA + "sqlite = ['/elsewhere/x.db']  # here\n",
        "sqlite",
        "/elsewhere/x.db lies outside",
    ),
    "files above the root": (ANA + "files = ['../x']  # here\n", "files", "../x leads out"),
    "files above it in the middle": (ANA + "files = ['@/ana/../x']  # here\n", "files", "leads out"),
    "a memdir outside of the root": (
        ANA + "memdir = '/elsewhere'  # here\n",
        "memdir",
        "/elsewhere lies outside",
    ),
    "a memdir above the root": (ANA + "memdir = '../bob'  # here\n", "memdir", "lies outside"),
}


@pytest.mark.parametrize(("text", "key", "fragment"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_is_refused_with_its_line_its_key_and_what_was_wanted(
    text: str, key: str, fragment: str, write: Write
) -> None:
    message = str(refused(write(text)))
    assert f": {key}" in message
    assert fragment in message


BAD_TOML = {
    "a missing quote": ('x = "y\n', r"line 2"),
    "a key twice": ("concurrency = 1\nconcurrency = 2\n", r"line 3"),
    "an agent twice": (ANA + ANA, r"line 4"),
}


@pytest.mark.parametrize(("text", "fragment"), BAD_TOML.values(), ids=BAD_TOML.keys())
def test_what_is_no_toml_is_refused_with_its_line(text: str, fragment: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=fragment) as caught:
        load(write(text))
    assert "agentkeep.toml is not valid TOML" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"x = '\xe9'\n")
    for path, problem in (
        (tmp_path / "missing.toml", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin.toml", "not valid TOML"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            load(path)
        assert str(path) in str(caught.value)


# --- destinations, profiles, agents ---------------------------------------------------------------

SCHEMES = {
    "one letter off": ("s4://backups", "'s4'", "'s3'"),
    "capitals": ("S3://backups", "'S3'", "'s3'"),
    "another word": ("files:///mnt/nas", "'files'", "'file'"),
    "one like no other": ("https://example.net/bucket", "'https'", ""),
    "none": ("backups/agents", "'backups/agents'", ""),
}


@pytest.mark.parametrize(("url", "value", "near"), SCHEMES.values(), ids=SCHEMES.keys())
def test_a_wrong_scheme_is_refused_with_its_line_and_the_nearest_known_one(
    url: str, value: str, near: str, write: Write
) -> None:
    error = refused(write(f'[destinations.offsite]\nregion = "auto"\nurl = "{url}"  # here\n'))
    assert f"no storage backend for {value}" in str(error)
    assert str(error).endswith(f"; did you mean {near}?" if near else value)
    assert all(f"{scheme}://" in error.hint for scheme in ("s3", "file"))


def test_an_agent_s_unknown_destination_is_refused_with_the_known_ones(write: Write) -> None:
    text = ANA + 'destinations = ["offsit"]  # here\n[destinations.offsite]\nurl = "s3://b"\n'
    error = refused(write(text))
    assert "no destination 'offsit'; did you mean 'offsite'?" in str(error)
    assert error.hint == "known destinations: offsite"


def test_an_unknown_profile_is_refused_with_the_known_ones(write: Write) -> None:
    error = refused(write(ANA + "profile = 'genric'  # here\n"))
    assert str(error).endswith("no profile 'genric'; did you mean 'generic'?")
    assert error.hint.startswith("known profiles: ")
    assert "generic" in error.hint


@pytest.fixture
def two_agents(write: Write) -> Configuration:
    return load(write('[agents.ana]\nroot = "@/ana"\n[agents.bob]\nroot = "@/bob"\n'))


def test_an_unknown_agent_lists_the_known_ones(two_agents: Configuration) -> None:
    with pytest.raises(AgentNotFound) as caught:
        two_agents.agent("anna")
    assert str(caught.value) == f"no agent 'anna' in {two_agents.path}; did you mean 'ana'?"
    assert caught.value.hint == "known agents: ana, bob"
    assert caught.value.exit_code == 66


def test_an_agent_has_to_be_named_unless_there_is_only_one(two_agents: Configuration, write: Write) -> None:
    with pytest.raises(UsageError) as caught:
        two_agents.agent(None)
    assert "ana, bob" in caught.value.hint
    assert load(write(ANA)).agent(None).agent_id == "ana"
    with pytest.raises(UsageError, match="which agent"):
        load(write("")).agent(None)


# --- overlaps -------------------------------------------------------------------------------------

OVERLAPS = {
    "the same root": ('[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nroot = "@/x"\n', "@/x and @/x"),
    "a root in a root": (
        '[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nroot = "@/x/y"\n',
        "@/x and @/x/y",
    ),
    "a root around a root": (
        '[agents.ana]  # here\nroot = "@/x/y"\n[agents.bob]\nroot = "@/x"\n',
        "@/x and @/x/y",
    ),
    "a root by another name": (
        '[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nroot = "@/z/../x/y"\n',
        "@/x and @/x/y",
    ),
    "a memdir in a root": (
        '[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nmemdir = "@/x/memory"\n',
        "@/x and @/x/memory",
    ),
    "a file in a root": (
        '[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nsqlite = ["@/x/db/main.db"]\n',
        "@/x and @/x/db/main.db",
    ),
    "the same file": (
        '[agents.ana]\nsqlite = ["@/x/a.db"]\n[agents.bob]  # here\nfiles = ["@/x/a.db"]\n',
        "@/x/a.db and @/x/a.db",
    ),
    "the same pattern": (
        '[agents.ana]\nsqlite = ["@/x/*.db"]\n[agents.bob]  # here\nsqlite = ["@/x/*.db"]\n',
        "@/x/*.db and @/x/*.db",
    ),
    "a file that a pattern matches": (
        '[agents.ana]\nsqlite = ["@/x/*.db"]\n[agents.bob]  # here\nsqlite = ["@/x/b.db"]\n',
        "@/x/*.db and @/x/b.db",
    ),
    "a pattern that matches a file": (
        '[agents.ana]  # here\nsqlite = ["@/x/b.db"]\n[agents.bob]\nsqlite = ["@/x/*.db"]\n',
        "@/x/*.db and @/x/b.db",
    ),
    "a pattern within a pattern": (
        '[agents.ana]\nsqlite = ["@/x/*.db"]\n[agents.bob]  # here\nsqlite = ["@/x/b*.db"]\n',
        "@/x/*.db and @/x/b*.db",
    ),
    "a state value in a root": (
        '[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nroot = "@/y"\n'
        '[agents.bob.state]\ncursor = { file = "@/x/cursor.json" }\n',
        "@/x and @/x/cursor.json",
    ),
    "a state value that is another's database": (
        '[agents.ana]\nsqlite = ["@/x/*.db"]\n[agents.bob]  # here\nroot = "@/y"\n'
        '[agents.bob.state]\nrun = { sqlite = "@/x/main.db", query = "SELECT 1" }\n',
        "@/x/*.db and @/x/main.db",
    ),
    "a deep pattern around a file": (
        '[agents.ana]\nfiles = ["@/x/**/*.md"]\n[agents.bob]  # here\nfiles = ["@/x/y/z/notes.md"]\n',
        "@/x and @/x/y/z/notes.md",
    ),
}


@pytest.mark.parametrize(("text", "places"), OVERLAPS.values(), ids=OVERLAPS.keys())
def test_agents_that_overlap_are_refused_with_a_line_and_both_places(
    text: str, places: str, write: Write, tmp_path: Path
) -> None:
    message = str(refused(write(text)))
    assert "agents 'ana' and 'bob' overlap" in message or "agents 'bob' and 'ana' overlap" in message
    assert places.replace("@", str(tmp_path)) in message


def test_a_link_does_not_hide_an_overlap(write: Write, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("x")
    refused(write('[agents.ana]\nroot = "@/x"\n[agents.bob]  # here\nroot = "@/link/y"\n'))


@pytest.mark.parametrize(
    "text",
    [
        '[agents.ana]\nroot = "@/ana"\n[agents.bob]\nroot = "@/ana2"\n',
        '[agents.ana]\nsqlite = ["@/x/ana-*.db"]\n[agents.bob]\nsqlite = ["@/x/bob-*.db"]\n',
        '[agents.ana]\nsqlite = ["@/x/*.db"]\n[agents.bob]\nfiles = ["@/x/*.md", "@/x/y/z.db"]\n',
        '[agents.ana]\nroot = "@/ana"\nmemdir = "memory"\nsqlite = ["memory/index.db"]\n',
        '[agents.ana]\nroot = "@/ana"\n[agents.ana.state]\nx = { file = "@/ana/x" }\ny = { file = "@/y" }\n',
        '[agents.ana]\nroot = "@/ana"\n[destinations.nas]\nurl = "file://@/backups"\n',
        '[agents.ana]\nroot = "@/mnt/ana"\n[destinations.nas]\nurl = "file://@/mnt"\n',
    ],
    ids=[
        "names alike",
        "patterns apart",
        "other files",
        "one agent",
        "own states",
        "a share beside",
        "one above",
    ],
)
def test_what_only_looks_like_an_overlap_is_none(text: str, write: Write) -> None:
    assert load(write(text)).agents


WRITTEN = {
    "state_dir in an agent": (
        'state_dir = "@/ana/state"\n[agents.ana]  # here\nroot = "@/ana"\n',
        "state_dir",
    ),
    "state_dir is the agent": ('state_dir = "@/ana"\n[agents.ana]  # here\nroot = "@/ana"\n', "state_dir"),
    "an agent in state_dir": ('state_dir = "@/s"\n[agents.ana]  # here\nroot = "@/s/ana"\n', "state_dir"),
    "a source in state_dir": ('state_dir = "@/s"\n[agents.ana]  # here\nfiles = ["@/s/x"]\n', "state_dir"),
    "a destination in an agent": (
        '[agents.ana]  # here\nroot = "@/an a"\n[destinations.nas]\nurl = "file://@/an%20a/backups"\n',
        "destination 'nas'",
    ),
}


@pytest.mark.parametrize(("text", "what"), WRITTEN.values(), ids=WRITTEN.keys())
def test_what_agentkeep_writes_lies_in_no_agent(text: str, what: str, write: Write, tmp_path: Path) -> None:
    message = str(refused(write(text)))
    assert f"agent 'ana' and {what} overlap: " in message
    assert str(tmp_path) in message


# --- paths that are not there ---------------------------------------------------------------------


def missing(path: Path, agent_id: str = "ana") -> list[str]:
    return load(path).missing_paths(agent_id)


def test_a_missing_root_is_named_with_its_line_and_the_nearest_name(write: Write, tmp_path: Path) -> None:
    (tmp_path / "agents" / "ana").mkdir(parents=True)
    path = write('\n[agents.ana]\nschedule = "every 1h"\nroot = "@/agents/anna"\n')
    assert missing(path) == [
        f"{path}, line 5: no such path: {tmp_path}/agents/anna; did you mean '{tmp_path}/agents/ana'?"
    ]


def test_a_path_that_goes_wrong_early_is_put_right_as_far_as_it_goes(write: Write, tmp_path: Path) -> None:
    (tmp_path / "agents" / "ana").mkdir(parents=True)
    [complaint] = missing(write('[agents.ana]\nroot = "@/agent/ana"\n'))
    assert complaint.endswith(f"; did you mean '{tmp_path}/agents/ana'?")
    [complaint] = missing(write('[agents.ana]\nroot = "@/agent/nobody"\n'))
    assert complaint.endswith(f"; did you mean '{tmp_path}/agents'?")


def test_a_path_with_nothing_like_it_is_named_with_what_is_there(write: Write, tmp_path: Path) -> None:
    [complaint] = missing(write('[agents.ana]\nroot = "@/zzz/ana"\n'))
    assert complaint.endswith(f"no such path: {tmp_path}/zzz/ana; {tmp_path} is there")


def test_every_plain_source_that_is_missing_is_named_with_its_own_line(write: Write, tmp_path: Path) -> None:
    (tmp_path / "bob" / "db").mkdir(parents=True)
    (tmp_path / "bob" / "db" / "main.db").touch()
    path = write(
        '[agents.ana]\nroot = "@/bob"\n'
        'memdir = "memory"\n'
        'files = ["notes.md", "logs/*.jsonl"]\n'
        'sqlite = [\n  "db/main.db",\n  "db/mian.db",\n  "nothing/*.db",\n]\n'
    )
    root = tmp_path / "bob"
    assert sorted(missing(path)) == [
        f"{path}, line 4: no such path: {root}/memory",
        f"{path}, line 5: no such path: {root}/logs",
        f"{path}, line 5: no such path: {root}/notes.md",
        f"{path}, line 6: no such path: {root}/db/mian.db; did you mean '{root}/db/main.db'?",
    ]


def test_an_agent_that_is_all_there_gets_no_complaint(write: Write, tmp_path: Path) -> None:
    (tmp_path / "ana").mkdir()
    assert missing(write(ANA)) == []


# --- environment and credentials ------------------------------------------------------------------


def test_the_environment_comes_before_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTKEEP_STATE_DIR", "/from/the/environment")
    monkeypatch.setenv("AGENTKEEP_CONCURRENCY", "7")
    settings = load(write("concurrency = 3\n")).settings
    assert settings.state_dir == Path("/from/the/environment")
    assert settings.concurrency == 7


def test_every_level_can_be_reached_from_the_environment(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AGENTKEEP_AGENTS__ANA__SCHEDULE": "daily 03:00",
        "AGENTKEEP_AGENTS__ANA__EXCLUDE": '["*.log"]',
        "AGENTKEEP_AGENTS__ANA__BEFORE": '["freeze", "--now"]',
        "AGENTKEEP_AGENTS__ANA__MAX_FILE_BYTES": "2 GiB",
        "AGENTKEEP_AGENTS__ANA__INCLUDE_SECRETS": "true",
        "AGENTKEEP_AGENTS__BOB__ROOT": str(tmp_path / "bob"),
        "AGENTKEEP_BUNDLE__COMPRESSION_LEVEL": "9",
        "AGENTKEEP_DESTINATIONS__OFFSITE__URL": "s3://other",
        "AGENTKEEP_DESTINATIONS__OFFSITE__SECRET_ACCESS_KEY": SECRET,
        "AGENTKEEP_DESTINATIONS__OFFSITE__OPTIONS": '{"checksums": "off"}',
    }.items():
        monkeypatch.setenv(name, value)
    configuration = load(write(ANA + '[destinations.offsite]\nurl = "s3://b"\nregion = "auto"\n'))
    assert configuration.settings.agents["ana"].parsed_schedule().cron == "0 3 * * *"
    assert configuration.agent("ana").root == tmp_path / "ana"
    assert configuration.agent("ana").exclude[-1] == "*.log"
    assert configuration.agent("ana").before == ("freeze", "--now")
    assert configuration.agent("ana").max_file_bytes == 2 << 30
    assert configuration.agent("ana").secrets == ()
    assert configuration.agent("bob").root == tmp_path / "bob"
    assert configuration.settings.bundle.compression_level == 9
    offsite = configuration.settings.destinations["offsite"]
    assert offsite.url == "s3://other"
    assert offsite.backend_options() == {"region": "auto", "secret_access_key": SECRET, "checksums": "off"}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "AGENTKEEP_STAT_DIR",
            "/x",
            "variable AGENTKEEP_STAT_DIR means nothing; did you mean 'AGENTKEEP_STATE_DIR'?",
        ),
        (
            "AGENTKEEP_AGENTS__ANA__ROT",
            "/x",
            "AGENTKEEP_AGENTS__ANA__ROT: unknown key 'agents.ana.rot'; did you mean 'root'?",
        ),
        ("AGENTKEEP_CONCURRENCY", "many", "environment AGENTKEEP_CONCURRENCY: concurrency: input should be"),
        (
            "AGENTKEEP_AGENTS__ANA__ROOT",
            "ana",
            "environment AGENTKEEP_AGENTS__ANA__ROOT: agents.ana.root: it has to be",
        ),
        (
            "AGENTKEEP_ENCRYPTION__RECIPIENTS",
            "age1x",
            "AGENTKEEP_ENCRYPTION__RECIPIENTS is not what it should be",
        ),
        (
            "AGENTKEEP_STATE_DIR",
            "",
            "environment AGENTKEEP_STATE_DIR: state_dir: it has to be an absolute path",
        ),
    ],
)
def test_what_is_wrong_in_the_environment_is_named_by_its_variable(
    variable: str, value: str, message: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load(write(ANA))
    assert message in str(caught.value)


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "credentials"
    directory.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    return directory


OFFSITE = '[destinations.offsite]\nurl = "s3://b"\n'
SECRET_NAME = "AGENTKEEP_DESTINATIONS__OFFSITE__SECRET_ACCESS_KEY"


def test_a_credential_comes_before_the_file_and_after_the_environment(
    write: Write, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(OFFSITE + 'secret_access_key = "of the file"\n')
    (credentials / SECRET_NAME).write_text("of systemd\n")
    assert load(path).settings.destinations["offsite"].backend_options()["secret_access_key"] == "of systemd"
    monkeypatch.setenv(SECRET_NAME, "of the environment")
    options = load(path).settings.destinations["offsite"].backend_options()
    assert options["secret_access_key"] == "of the environment"


def test_credentials_of_others_are_no_business_of_ours(write: Write, credentials: Path) -> None:
    for name in ("database-password", "other__nested", "AGENT"):
        (credentials / name).write_text(SECRET)
    assert load(write(ANA)).agents


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AGENTKEEP_DESTINATION__OFFSITE__SECRET_ACCESS_KEY", "the credential {} means nothing"),
        (
            "AGENTKEEP_DESTINATIONS__OFFSITE__SECRET",
            "credential {}: unknown key 'destinations.offsite.secret'",
        ),
    ],
)
def test_a_credential_with_a_name_that_means_nothing_is_refused(
    name: str, message: str, write: Write, credentials: Path
) -> None:
    (credentials / name).write_text(SECRET)
    with pytest.raises(ConfigError) as caught:
        load(write(OFFSITE))
    assert message.format(name) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_credentials_directory_that_is_not_there_is_none(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "missing"))
    assert load(write(ANA)).agents


# --- secrets --------------------------------------------------------------------------------------


def everything_said(error: BaseException) -> str:
    said = ""
    current: BaseException | None = error
    while current is not None:
        said += f"{current} {current!r} {getattr(current, 'hint', '')}"
        current = current.__cause__ or current.__context__
    return said


@pytest.mark.parametrize(
    "text",
    [
        f'secret_acces_key = "{SECRET}"',
        f'secret_access_key = ["{SECRET}"]',
        f'session_token = {{ x = "{SECRET}" }}',
        f'access_key_id = ["{SECRET}"]',
        f'options = "{SECRET}"',
        f'options = {{ password = ["{SECRET}"] }}',
        f'secret_access_key = "{SECRET}"\nrejion = "auto"',
    ],
)
def test_no_complaint_quotes_a_secret(text: str, write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(f"{OFFSITE}{text}\n"))
    assert SECRET not in everything_said(caught.value)


@pytest.mark.parametrize("key", ["secret_access_key", "session_token", "access_key_id", "options.password"])
def test_no_complaint_quotes_a_secret_that_is_a_number(key: str, write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(f"{OFFSITE}{key} = 5318008\n"))
    assert "5318008" not in everything_said(caught.value)


def test_no_complaint_about_the_environment_quotes_a_secret(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("AGENTKEEP_DESTINATIONS", "AGENTKEEP_DESTINATIONS__OFFSITE", "AGENTKEEP_SECRET"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, f"{{{SECRET}")
            with pytest.raises(ConfigError) as caught:
                load(write(OFFSITE))
        assert SECRET not in f"{caught.value} {caught.value.hint}"


def test_a_configuration_can_be_shown_without_showing_its_secrets(write: Write) -> None:
    configuration = load(
        write(
            f'{OFFSITE}secret_access_key = "{SECRET}"\nsession_token = "{SECRET}"\n'
            f'options = {{ password = "{SECRET}" }}\n'
        )
    )
    options = configuration.settings.destinations["offsite"].backend_options()
    assert list(options.values()).count(SECRET) == 3
    for shown in (configuration, configuration.settings, configuration.settings.destinations):
        assert SECRET not in f"{shown!r} {shown!s}"


# --- finding it -----------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = {
        "given": tmp_path / "given.toml",
        "named": tmp_path / "named.toml",
        "user": tmp_path / "config" / "agentkeep" / "agentkeep.toml",
    }
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return found


def test_the_option_comes_before_the_variable_and_the_variable_before_the_user_s(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_config_file(None) == places["user"]
    monkeypatch.setenv("AGENTKEEP_CONFIG", str(places["named"]))
    assert find_config_file(None) == places["named"]
    assert find_config_file(places["given"]) == places["given"]


def test_a_file_that_is_named_and_not_there_is_not_replaced_by_another(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (places["given"], places["named"]):
        path.unlink()
    monkeypatch.setenv("AGENTKEEP_CONFIG", str(places["named"]))
    for given, expected in ((places["given"], "given.toml"), (None, "named.toml")):
        with pytest.raises(ConfigError, match=f"{expected} is not there"):
            find_config_file(given)


def test_where_it_was_looked_for_is_said(places: dict[str, Path]) -> None:
    places["user"].unlink()
    with pytest.raises(ConfigError) as caught:
        find_config_file(None)
    assert "/etc/agentkeep/agentkeep.toml" in str(caught.value)
    assert str(places["user"]) in str(caught.value)
    assert "--config" in caught.value.hint


def test_a_complaint_is_an_error_of_the_one_tree(write: Write) -> None:
    """So that the command line exits with 78 and a fix, and never with a traceback."""
    texts: list[Any] = [
        text for text, *_ in (*UNKNOWN_KEYS.values(), *BAD_VALUES.values(), *BAD_NAMES.values())
    ]
    for text in texts:
        with pytest.raises(AgentkeepError) as caught:
            load(write(text))
        assert caught.value.exit_code == 78
