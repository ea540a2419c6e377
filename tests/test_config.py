"""Configuration: environment over file over defaults, and errors that name what was meant."""

from pathlib import Path

import pytest

from meshgpu.config import Config, host_of, load_config, with_port
from meshgpu.errors import MeshgpuError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_no_file_means_defaults(tmp_path: Path) -> None:
    assert load_config(tmp_path / "config.toml", {}) == Config()


def test_file_is_read_and_environment_wins(tmp_path: Path) -> None:
    path = written(tmp_path, 'seeds = ["rig7", "10.0.0.5:7500"]\nlink_port = 8000\ntrust = ["alice"]\n')
    config = load_config(path, {"MESHGPU_LINK_PORT": "0", "MESHGPU_LOOPBACK": "yes", "MESHGPU_TRUST": "bob, carol"})
    assert config.seed_addresses == ("rig7:7443", "10.0.0.5:7500")
    assert (config.link_port, config.loopback, config.owner_policy.trusted) == (0, True, ("bob", "carol"))


def test_unknown_key_names_the_nearest_valid_one(tmp_path: Path) -> None:
    with pytest.raises(MeshgpuError, match="no setting 'advertize'") as caught:
        load_config(written(tmp_path, 'advertize = "off"\n'), {})
    assert caught.value.hint == "did you mean advertise?"
    with pytest.raises(MeshgpuError) as caught:
        load_config(written(tmp_path, "zzz = 1\n"), {})
    assert str(caught.value.hint).startswith("the settings are seeds, advertise, ")


@pytest.mark.parametrize(
    "text",
    [
        "link_port = 99999",
        "link_port = -1",
        'link_port = "7443"',
        "link_port = true",
        'advertise = "everything"',
        'fence = "bwrap"',
        'seeds = "rig7"',
        "seeds = [1]",
        "loopback = 1",
        'keep_free_gb = "much"',
        "keep_free_gb = -1",
        "keep_free_gb = nan",
        "this is not toml",
    ],
)
def test_wrong_value_is_an_error_that_says_what_was_expected(tmp_path: Path, text: str) -> None:
    with pytest.raises(MeshgpuError) as caught:
        load_config(written(tmp_path, text + "\n"), {})
    assert caught.value.code == "bad-config"


@pytest.mark.parametrize("name", ["MESHGPU_LINK_PORT", "MESHGPU_LOOPBACK", "MESHGPU_KEEP_FREE_GB"])
def test_wrong_environment_names_the_variable(tmp_path: Path, name: str) -> None:
    with pytest.raises(MeshgpuError, match=name):
        load_config(tmp_path / "config.toml", {name: "nonsense"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("rig7", "rig7:7443"),
        ("rig7:80", "rig7:80"),
        ("10.0.0.5", "10.0.0.5:7443"),
        ("[fe80::1]", "[fe80::1]:7443"),
        ("[fe80::1]:80", "[fe80::1]:80"),
    ],
)
def test_address_without_a_port_gets_the_usual_one(given: str, expected: str) -> None:
    assert with_port(given, 7443) == expected
    assert host_of(expected) == given.removesuffix(":80")
