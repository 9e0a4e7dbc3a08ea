"""The agentkeep configuration for a sample agent: what a user would write, written for them."""

from __future__ import annotations

from pathlib import Path

from demo.bucket import Destination
from tests.harness.sample_agent import DREAM_RUN_QUERY

_TEXT = """\
state_dir = "{home}/state"

[agents.{agent_id}]
root = "{root}"
memdir = "memory"
schedule = "{schedule}"
[agents.{agent_id}.state]
extract_cursor = {{ file = "state/cursor.json" }}
dream_run = {{ sqlite = "db/registry.sqlite", query = "{query}" }}

[destinations.offsite]
url = "{url}"
"""


def write_configuration(
    home: Path, destination: Destination, *, agent_id: str, root: Path, schedule: str
) -> Path:
    """Writes agentkeep.toml in `home`. No credential is in it: those are in the environment."""
    text = _TEXT.format(
        home=home, agent_id=agent_id, root=root, schedule=schedule, query=DREAM_RUN_QUERY, url=destination.url
    )
    if destination.endpoint_url is not None:
        text += f'endpoint_url = "{destination.endpoint_url}"\n'
    path = home / "agentkeep.toml"
    path.write_text(text)
    return path
