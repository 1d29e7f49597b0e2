"""Who has a key is let in, everybody else is told to bring one; keys come and go while the server runs."""

import os
import stat

import pytest

from serve_app.config import parse_config
from serve_app.errors import ConfigError
from serve_app.ingress.guard import Protection
from serve_app.ingress.keys import LOOK_S, MAX_KEYS, Keys, check_keys, hash_of, make_key, read_keys
from tests.ingress.conftest import open_world
from tests.test_cli import assert_refused, octavo

OPEN = ("/livez", "/readyz", "/health", "/metrics")
CLOSED = ("/v1/models", "/openapi.json", "/admin/placement", "/nowhere", "//livez", "/livez/")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.toml"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


class Hours:
    """A clock that a test moves on."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_key_is_found_and_nothing_like_it(file):
    secret = make_key(file, "alice", "user")
    admin = make_key(file, "root", "admin")
    keys = Keys(file)
    assert (keys.find(secret).name, keys.find(secret).role) == ("alice", "user")
    assert (keys.find(admin).name, keys.find(admin).role) == ("root", "admin")
    for other in ("", secret[:-1], secret + "x", secret.upper(), hash_of(secret), "\ud800", "x" * 100_000):
        assert keys.find(other) is None


def test_the_file_holds_no_key_and_only_its_owner_may_read_it(file):
    secret = make_key(file, "alice", "user")
    assert secret not in file.read_text()
    assert secret.removeprefix("octavo-") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len({make_key(file, f"k{i}", "user") for i in range(20)}) == 20


def test_a_key_is_added_to_a_file_whose_last_line_has_no_end(file):
    first = make_key(file, "alice", "user")
    file.write_text(file.read_text().rstrip())
    second = make_key(file, "bob", "user")
    assert [Keys(file).find(secret).name for secret in (first, second)] == ["alice", "bob"]


def test_a_key_that_was_added_counts_and_one_that_was_taken_out_does_not(file):
    clock = Hours()
    first = make_key(file, "alice", "user")
    keys = Keys(file, clock)
    second = make_key(file, "bob", "user")
    assert keys.find(second) is None, "the file was looked at less than a second ago"
    clock.now_s += LOOK_S
    assert keys.find(second).name == "bob"
    file.write_text("".join(block for block in file.read_text().split("[[key]]")[2:]).join(["[[key]]", ""]))
    clock.now_s += LOOK_S
    assert keys.find(first) is None
    assert keys.find(second).name == "bob"


@pytest.mark.parametrize("content", [b"[[key", b"\xff", b'[[key]]\nname = "a"\nhash = "md5:0"\n', None])
def test_a_file_that_breaks_or_goes_changes_nothing_but_the_log(file, caplog, content):
    clock = Hours()
    secret = make_key(file, "alice", "user")
    keys = Keys(file, clock)
    file.unlink() if content is None else file.write_bytes(content)
    for _ in range(3):
        clock.now_s += LOOK_S
        assert keys.find(secret).name == "alice"
    said = [record.getMessage() for record in caplog.records if "stay as they were" in record.getMessage()]
    assert len(said) == 1, "once for each change"


HASH = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[[key", "is broken"),
        ("a = 1", "unknown field `a`"),
        (f'[[key]]\nname = "a"\nrole = "king"\nhash = "{HASH}"', "king"),
        (f'[[key]]\nname = "a b"\nhash = "{HASH}"', "a key with the name 'a b'"),
        ('[[key]]\nname = "a"\nhash = "secret"', "no SHA-256 hash for a"),
        (f'[[key]]\nname = "a"\nhash = "{HASH}"\n' * 2, "two keys of one name"),
        (f'[[key]]\nname = "a"\nhash = "{HASH}"\n[[key]]\nname = "b"\nhash = "{HASH}"', "two keys of one hash"),
        ("[[key]]\nname = 'a'\nhash = 'b'\n" * (MAX_KEYS + 1), f"the limit is {MAX_KEYS}"),
        ("#" * (2 << 20), "larger than"),
        ("a = " + "[" * 100_000, "is broken"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(file, content, words):
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_keys(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_whose_keys_are_not_there_is_refused_before_anything_starts(file):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        check_keys(str(file))
    with pytest.raises(ConfigError, match="must be an absolute path"):
        check_keys("keys.toml")
    check_keys(None)
    make_key(file, "alice", "user")
    check_keys(str(file))
    config = parse_config({"security": {"keys_file": str(file)}, "limits": {"max_connections": 7}})
    assert (Protection.of(config).keys_file, Protection.of(config).max_connections) == (file, 7)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_key_that_the_file_knows(file):
    status, printed, complaint = octavo("key", "new", "alice", "--file", file, "--admin")
    assert (status, complaint) == (0, "")
    assert Keys(file).find(printed.strip()).role == "admin"
    assert_refused("has a key of the name alice already", "key", "new", "alice", "--file", file)
    assert_refused("no name for a key", "key", "new", "a b", "--file", file)
    assert_refused("cannot be written", "key", "new", "bob", "--file", file.parent / "no" / "keys.toml")


# -- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_without_a_file_of_keys_everything_is_open(world):
    for path in (*OPEN, "/v1/models", "/admin/placement", "/admin/operations"):
        assert (await world.client.get(path)).status_code == 200
    assert (await world.client.post("/admin/operations", json={"kind": "drain"})).status_code == 202


@pytest.mark.anyio
async def test_with_one_a_stranger_sees_the_server_s_health_and_nothing_else(tokenizer, file):
    secret = make_key(file, "alice", "user")
    async with open_world(tokenizer, protection=Protection(keys_file=file)) as world:
        for path in OPEN:
            assert (await world.client.get(path)).status_code == 200
        for headers, challenge in (
            ({}, "Bearer"),
            (bearer("octavo-wrong"), 'Bearer error="invalid_token"'),
            ({"authorization": secret}, "Bearer"),
            ({"authorization": f"Basic {secret}"}, "Bearer"),
            ({"x-api-key": secret}, "Bearer"),
        ):
            for path in CLOSED:
                answer = await world.client.get(path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, challenge), path
            assert (await world.post({"text": "Rome"}, **headers)).status_code == 401
        assert world.engine.requests == {}
        assert (await world.post({"text": "Rome"}, **bearer(secret))).status_code == 200
        assert (await world.client.get("/v1/models", headers={"authorization": f"bearer  {secret}"})).is_success


@pytest.mark.anyio
async def test_a_refusal_has_the_shape_of_its_dialect(tokenizer, file):
    make_key(file, "alice", "user")
    async with open_world(tokenizer, protection=Protection(keys_file=file)) as world:
        openai = (await world.client.get("/v1/models")).json()["error"]
        assert (openai["type"], openai["code"], openai["param"]) == ("invalid_request_error", "invalid_api_key", None)
        sglang = (await world.post({"text": "Rome"})).json()["error"]
        assert (sglang["type"], sglang["code"]) == ("Unauthorized", 401)


@pytest.mark.anyio
async def test_admin_endpoints_need_an_admin_s_key(tokenizer, file):
    user, admin = make_key(file, "alice", "user"), make_key(file, "root", "admin")
    async with open_world(tokenizer, protection=Protection(keys_file=file)) as world:
        for path in ("/admin/placement", "/admin/events", "/admin/pace", "/admin/processes", "/admin/operations"):
            assert (await world.client.get(path, headers=bearer(user))).status_code == 403
            assert (await world.client.get(path, headers=bearer(admin))).status_code == 200
        order = {"kind": "drain"}
        assert (await world.client.post("/admin/operations", json=order, headers=bearer(user))).status_code == 403
        assert await world.engine.operations() == []
        assert (await world.client.post("/admin/operations", json=order, headers=bearer(admin))).status_code == 202


@pytest.mark.anyio
async def test_a_key_made_while_the_server_runs_is_let_in(tokenizer, file, monkeypatch):
    monkeypatch.setattr("serve_app.ingress.keys.LOOK_S", 0.0)
    make_key(file, "alice", "user")
    async with open_world(tokenizer, protection=Protection(keys_file=file)) as world:
        late = make_key(file, "bob", "user")
        assert (await world.client.get("/v1/models", headers=bearer(late))).status_code == 200
        os.truncate(file, 0)
        assert (await world.client.get("/v1/models", headers=bearer(late))).status_code == 401
