"""What the URL of a PostgreSQL says, and what is said about a wrong one."""

from pathlib import Path

import pytest

from relay.errors import ConfigError
from relay.store.hosts import read_url


def test_a_plain_url_has_the_defaults_and_a_name_without_credentials():
    address = read_url("postgresql://relay:s%40cret@db.example:5433/relay%20one")
    assert address.urls == ["postgresql://relay:s%40cret@db.example:5433/relay%20one?application_name=relay"]
    assert address.name == "db.example:5433/relay one"
    assert (address.pool_size, address.statement_cache_size, address.command_timeout) == (8, 300, 10_000)


def test_relays_own_parameters_are_taken_out_and_all_others_are_left():
    address = read_url(
        "postgres://h/d?pool_size=20&sslmode=require&statement_cache_size=0&command_timeout=2.5s&search_path=a"
    )
    assert address.urls == ["postgresql://h/d?sslmode=require&search_path=a&application_name=relay"]
    assert (address.pool_size, address.statement_cache_size, address.command_timeout) == (20, 0, 2_500)


def test_seconds_need_no_unit_and_a_name_of_ones_own_is_kept():
    address = read_url("postgresql://h/d?command_timeout=3&application_name=relay-7")
    assert address.command_timeout == 3_000
    assert address.urls == ["postgresql://h/d?application_name=relay-7"]


def test_each_of_several_hosts_has_a_url_and_they_are_asked_whether_they_take_writes():
    address = read_url("postgresql://u:p@a:1,[::1]:2,c/d?sslmode=disable")
    query = "sslmode=disable&target_session_attrs=read-write&application_name=relay"
    assert address.urls == [f"postgresql://u:p@{host}/d?{query}" for host in ("a:1", "[::1]:2", "c")]
    assert address.name == "a:1,[::1]:2,c/d"
    chosen = read_url("postgresql://a,b/d?target_session_attrs=any").urls[0]
    assert "target_session_attrs=any&" in chosen


def test_a_socket_has_a_name_too():
    assert read_url("postgresql:///relay?host=/run/postgresql").name == "/run/postgresql/relay"


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("pool_size=many", "pool_size is 'many': write a whole number from 2 to 1000"),
        ("pool_size=1", "pool_size is '1'"),
        ("pool_size=", "pool_size is ''"),
        ("statement_cache_size=-1", "statement_cache_size is '-1': write a whole number from 0"),
        ("command_timeout=soon", "command_timeout: 'soon' is not a duration"),
        ("command_timeout=0", "command_timeout is '0': write a duration from 100ms to 10m"),
        ("command_timeout=1h", "command_timeout is '1h'"),
        ("sslmode=", "sslmode in this URL is empty"),
        ("target_session_attrs=standby", "target_session_attrs is 'standby': Relay writes"),
        ("sslmode", "this URL cannot be read"),
        ("sslrootcert=/nowhere/ca.pem", "sslrootcert: /nowhere/ca.pem cannot be read: No such file"),
    ],
)
def test_a_wrong_parameter_is_named(query: str, says: str):
    with pytest.raises(ConfigError) as refusal:
        read_url(f"postgresql://relay:secret@h/d?{query}")
    assert str(refusal.value).startswith("database: ")
    assert says in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://relay:sec{special}ret@host/d" for special in "@/?#[]"),
        "postgresql://relay:12#ret@host/d",
        "postgresql://relay:12/ret@host/d",
        "postgresql://relay:12?a=ret@host/d",
        "postgresql://relay:secret",
        "postgresql://relay:pass@host:secret/d",
        "postgresql://relay:pass@host:99999999/d",
        "postgresql://relay:secret@a,,b/d",
        "postgresql://relay:secret@[::1/d",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_a_part_of_the_password(url: str):
    with pytest.raises(ConfigError) as refusal:
        read_url(url)
    assert str(refusal.value).startswith("database: ")
    for part in ("sec", "ret", "12", "pass@", "9999"):
        assert part not in str(refusal.value)


def test_a_certificate_that_can_be_read_is_left_to_tls(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("not looked at here")
    address = read_url(f"postgresql://h/d?sslrootcert={tmp_path}/ca.pem")
    assert "sslrootcert=" in address.urls[0]
