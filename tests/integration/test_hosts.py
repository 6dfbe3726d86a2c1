"""No host is contacted that nobody named; the hub's answers, proxies and certificates are not taken on trust."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_contract import Watched
from fault_server import FaultServer
from running import Workplace
from small_hub import COMMIT, Answer, SmallHub, entry
from tiny import tiny_gemma

from gxr_batch.engines import create
from gxr_batch.errors import ModelUnavailable
from gxr_batch.job import Job
from gxr_batch.models import hub, network, offline
from gxr_batch.records import Completion, Encoded, Key, Messages, Prompt, Turn

# Run by Python at the start of each process: notes where a socket connects to or which name is looked up.
WATCH = """
import os, sys

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        to = f"{arguments[1][0]}:{arguments[1][1]}"
    elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
        to = f"{arguments[0]}:{arguments[1] if len(arguments) > 1 else ''}"
    else:
        return
    with open(os.environ["GXR_TEST_CONTACTS"], "a") as file:
        print(to, file=file)

sys.addaudithook(watch)
"""
FILES = {"config.json": b'{"a": 1}', "tokenizer.json": b"{}"}
WHERE = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch):
    """Proxies and certificates are those of the test."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in {"SSL_CERT_FILE", "SSL_CERT_DIR", *network._NOT_READ, "CI"}:
            monkeypatch.delenv(name)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def local_model(tmp_path_factory, gemma_tokenizer) -> Path:
    """A folder with a tiny random Gemma and the real tokenizer."""
    folder = tmp_path_factory.mktemp("local")
    tiny_gemma(vocab=len(gemma_tokenizer)).save_pretrained(folder)
    gemma_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch) -> Workplace:
    """A workplace whose commands note every host that they contact."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join(filter(None, (str(tmp_path / "watch"), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("GXR_TEST_CONTACTS", str(tmp_path / "contacts"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name, value in WHERE.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    place = Workplace(tmp_path / "here")
    place.table(2)
    return place


def contacts(work: Workplace) -> set[str]:
    path = work.folder.parent / "contacts"
    return set(path.read_text().split()) if path.exists() else set()


@pytest.fixture
def small_hub(monkeypatch) -> Iterator[SmallHub]:
    """A hub for commands that are started by the test."""
    with SmallHub({"nobody/tiny": FILES}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_what_contacts_a_host_is_noticed(work):
    """The others would pass without a working watch."""
    code = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n    pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "127.0.0.1:9" in contacts(work)


@pytest.mark.model
@pytest.mark.parametrize("kind", ["transformers", "generate"])
def test_a_model_folder_is_used_without_any_request(work, small_hub, local_model, kind):
    work.job(f"[engine]\nkind = '{kind}'\n[model]\npath = '{local_model}'\n[sampling]\nmax_new_tokens = 2\n")
    if kind == "transformers":
        work.gxr("check", "j.toml")
    work.run()
    assert small_hub.requests == []
    assert contacts(work) == set()
    assert not (work.folder.parent / "hf").exists()


@pytest.mark.model
def test_a_training_on_a_model_folder_sends_no_usage_data(work, small_hub, local_model):
    rows = [{"template": "basic", "findings": f"finding {n}", "answer": "Impression: seen."} for n in range(4)]
    (work.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work.job(
        f"[model]\npath = '{local_model}'\ndtype = 'float32'\nmax_seq_length = 128\n[sampling]\nmax_new_tokens = 2\n"
        "[finetune]\ndata = ['data.jsonl']\nmax_steps = 1\neval_steps = 1\nsample_rows = 1\nheld_out = 0.0\n"
    )
    work.gxr("finetune", "j.toml")
    assert small_hub.requests == []
    assert {to for to in contacts(work) if not to.startswith(("127.", "localhost"))} == set()
    assert not (work.folder.parent / "hf").exists()


def test_a_run_with_a_server_contacts_that_server_and_nothing_else(work, small_hub):
    with FaultServer() as server:
        work.job(f"[engine]\nkind = 'api'\n[api]\nmodel = 'm'\nbase_url = '{server.url}'\n")
        work.gxr("check", "j.toml")
        work.run()
        assert contacts(work) == {f"127.0.0.1:{server.port}"}
    assert small_hub.requests == []


def test_the_hub_is_asked_for_the_model_and_nothing_else(work, small_hub):
    work.job("[model]\npath = 'nobody/tiny'\n")
    work.gxr("check", "j.toml", expect=4)  # its files are no model
    about = ("/api/models/nobody/tiny/", "/nobody/tiny/resolve/")
    assert small_hub.requests
    assert [path for path in small_hub.requests if not path.startswith(about)] == []
    assert contacts(work) == {f"127.0.0.1:{small_hub.port}"}
    assert {path.name for path in (work.folder.parent / "hf").iterdir()} == {"hub"}


def test_the_users_switches_of_the_hubs_library_are_restored(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with offline.asked_only_by_fetch(), offline.asked_only_by_fetch():
        assert constants.HF_HUB_OFFLINE
        assert constants.HF_HUB_DISABLE_TELEMETRY
        assert not offline.is_offline()
    assert not constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_DISABLE_TELEMETRY
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with offline.asked_only_by_fetch():
        assert offline.is_offline()


def use_hub(monkeypatch, url: str) -> None:
    """As HF_ENDPOINT, which is read when the hub's library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextmanager
def fetching(tmp_path: Path, monkeypatch, change) -> Iterator[SmallHub]:
    """A hub for `hub.fetch` in this process, with its cache in a folder of the test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "a" / "b" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with SmallHub({"nobody/tiny": FILES}, change) as server:
        use_hub(monkeypatch, server.url)
        yield server


def fetched() -> Path:
    return hub.fetch("nobody/tiny", "", ["*.json"], where="model.path")


def outside(tmp_path: Path) -> list[Path]:
    """Return what was written outside of the hub's cache."""
    cache = tmp_path / "a" / "b" / "hub"
    found = [path for path in tmp_path.rglob("*") if not path.is_relative_to(cache)]
    return [path for path in found if not cache.is_relative_to(path)]


UP = "../../../../escaped"
PAGE = Answer(200, b"<html>Log in</html>", {"Content-Type": "text/html"})


def of_the_repository(body: object):
    return lambda path, right: Answer(200, body) if "/revision/" in path else right


def of_the_list(body: object, **headers: str):
    return lambda path, right: Answer(200, body, headers) if "/tree/" in path else right


def of_the_files(**headers: str):
    def change(path: str, right: Answer) -> Answer:
        return right._replace(headers={**right.headers, **headers}) if "/resolve/" in path else right

    return change


def gone(path: str, right: Answer) -> Answer:
    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": UP}
    return Answer(404, b"", headers) if "/resolve/" in path else right


FILE = entry("config.json", FILES["config.json"])
WRONG = {
    "an empty object": (lambda path, right: Answer(200, {}), "did not describe a repository"),
    "a list": (of_the_repository([]), "did not describe a repository"),
    "null": (of_the_repository(None), "did not describe a repository"),
    "a page for a repository": (
        lambda path, right: PAGE,
        "sent no JSON where JSON was asked for (HTTP 200, text/html)",
    ),
    "a page for the list": (lambda path, right: PAGE if "/tree/" in path else right, "sent no JSON"),
    "a page for a file": (lambda path, right: PAGE if "/resolve/" in path else right, "without the commit or the ETag"),
    "nesting": (of_the_repository(b"[" * 200_000), "sent no JSON"),
    "no commit": (of_the_repository({"id": "nobody/tiny"}), "did not name a commit"),
    "a commit above": (of_the_repository({"id": "nobody/tiny", "sha": UP}), f"did not name a commit: sha = {UP}"),
    "a number as commit": (of_the_repository({"id": "nobody/tiny", "sha": 7}), "did not name a commit"),
    "another date": (of_the_repository({"id": "a/b", "sha": COMMIT, "lastModified": "?"}), "sent what its library"),
    "no list": (of_the_list({}), "did not send a list of files"),
    "an empty list": (of_the_list([]), "lists no file"),
    "a list of names": (of_the_list(["config.json"]), "did not send a list of files"),
    "a file above": (of_the_list([FILE | {"path": f"{UP}.json"}]), f"outside of its repository: {UP}.json"),
    "a file below and above": (of_the_list([FILE | {"path": "a/../../b.json"}]), "outside of its repository"),
    "an absolute file": (of_the_list([FILE | {"path": "/x.json"}]), "outside of its repository: /x.json"),
    "a file of Windows": (of_the_list([FILE | {"path": "..\\x.json"}]), "outside of its repository"),
    "a terminal code": (of_the_list([FILE | {"path": "\x1b[2J.json"}]), r"outside of its repository: \x1b[2J.json"),
    "a size of no file": (of_the_list([FILE | {"size": 10**30}]), "did not send a list of files"),
    "a large file": (of_the_list([FILE | {"lfs": 3}]), "sent what its library cannot read"),
    "an ETag above": (of_the_files(ETag=f'"{UP}"'), "sent an ETag that cannot be used"),
    "a linked ETag above": (of_the_files(**{"X-Linked-Etag": f'"{UP}"'}), "sent an ETag that cannot be used"),
    "a file's commit above": (of_the_files(**{"X-Repo-Commit": UP}), f"named a commit that is none: {UP}"),
    "an absolute commit": (of_the_files(**{"X-Repo-Commit": "/tmp"}), "named a commit that is none: /tmp"),
    "a missing file's commit above": (gone, f"named a commit that is none: {UP}"),
    "more on another host": (
        of_the_list([FILE], Link='<http://other.invalid/api/models/nobody/tiny/tree/x>; rel="next"'),
        "continues its list of files on another host",
    ),
    "compression": (of_the_list([FILE], **{"Content-Encoding": "gzip"}), "compressed what was asked for plain"),
    "far too much": (of_the_repository(b" " * (65 * 2**20)), "sent more than 64 MiB"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_of_the_hub_is_one_message_and_nothing_is_written_elsewhere(tmp_path, monkeypatch, wrong):
    change, said = WRONG[wrong]
    with fetching(tmp_path, monkeypatch, change) as server, pytest.raises(ModelUnavailable) as caught:
        fetched()
    assert f"The hub 127.0.0.1:{server.port} " in caught.value.what
    assert said in caught.value.what
    assert caught.value.where == "model.path = nobody/tiny"
    assert "HF_ENDPOINT" in caught.value.next_step
    assert outside(tmp_path) == []


def test_a_list_of_files_without_an_end_is_one_message(tmp_path, monkeypatch):
    def change(path: str, right: Answer) -> Answer:
        link = f'<{server.url}/api/models/nobody/tiny/tree/{COMMIT}?page=2>; rel="next"'
        return Answer(200, [FILE], {"Link": link}) if "/tree/" in path else right

    monkeypatch.setattr("gxr_batch.models.hub_client._MOST_PAGES", 5)
    with fetching(tmp_path, monkeypatch, change) as server, pytest.raises(ModelUnavailable, match="endless list"):
        fetched()


def test_a_hub_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("gxr_batch.models.hub_client._SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, fetching(tmp_path, monkeypatch, lambda path, right: right):
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ModelUnavailable, match="cannot be reached"):
            fetched()


def test_a_file_of_another_size_than_announced_is_one_message(tmp_path, monkeypatch):
    asked = set()

    def change(path: str, right: Answer) -> Answer:
        if "/resolve/" not in path:
            return right
        first, _ = path not in asked, asked.add(path)
        return right if first else right._replace(body=b"<html>Log in</html>")

    with fetching(tmp_path, monkeypatch, change), pytest.raises(ModelUnavailable, match="of another size"):
        fetched()


def test_a_broken_cache_is_not_blamed_on_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with fetching(tmp_path, monkeypatch, lambda path, right: right):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        newest = Path(constants.HF_HUB_CACHE) / "models--nobody--tiny" / "refs" / "main"
        newest.parent.mkdir(parents=True)
        newest.write_bytes(b"\xff")
        with pytest.raises(ModelUnavailable, match="cache on this machine cannot be used") as caught:
            fetched()
    assert constants.HF_HUB_CACHE in caught.value.next_step


def test_right_answers_are_taken_and_the_hubs_library_gets_its_own_client_back(tmp_path, monkeypatch):
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    with fetching(tmp_path, monkeypatch, lambda path, right: right):
        folder = fetched()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert folder.name == COMMIT
    assert before is _http._GLOBAL_CLIENT_FACTORY
    assert outside(tmp_path) == []


@pytest.mark.parametrize("body", [b"{}", b"<html>Log in</html>"])
def test_the_command_ends_with_exit_code_4_if_the_hub_answers_wrongly(work, small_hub, body):
    small_hub.change = lambda path, right: Answer(200, body)
    work.job("[model]\npath = 'nobody/tiny'\n")
    done = work.gxr("check", "j.toml", expect=4)
    assert done.stderr.startswith(f"Error: The hub 127.0.0.1:{small_hub.port} ")
    assert "Traceback" not in done.stderr
    assert not (work.folder.parent / "hf" / ".agent_harnesses.json").exists()


@pytest.mark.parametrize("address", ["http://[", "nonsense", "ftp://h"])
def test_an_address_that_is_no_hubs_is_one_message(work, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    work.job("[model]\npath = 'nobody/tiny'\n")
    done = work.gxr("check", "j.toml", expect=4)
    assert done.stderr.startswith("Error: HF_ENDPOINT is not the address of a hub.")


def api(url: str, **keys: object) -> Job:
    settings = {"model": "m", "base_url": url, "first_wait": "0.01s", "longest_wait": "0.05s", "give_up_after": "5s"}
    return Job.model_validate(
        {"name": "j", "input": {"path": "f.csv"}, "engine": {"kind": "api"}, "api": settings | keys}
    )


def one(url: str) -> Completion:
    turns = (Turn("user", "Clear lungs."),)
    asked = Prompt(Key("C1", 1), Messages(turns, "t"), Encoded(None, None), 1, 8)
    with create(api(url), lambda _: None).open() as session:
        return Watched().watch(session, [asked]).completions[0]


def refused(url: str) -> ModelUnavailable:
    with pytest.raises(ModelUnavailable) as caught, create(api(url), lambda _: None).open():
        pass
    return caught.value


BAD_PROXIES = ["http://[", "socks://127.0.0.1:9", "ftp://user:geheim@h", "http://", "http://h:port", "socks4://h:1"]


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", *BAD_PROXIES])
def test_no_proxy_is_used_or_looked_at_for_this_machine_and_for_hosts_in_no_proxy(monkeypatch, value):
    for name in ("ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, value)
    with FaultServer() as server:
        assert one(server.url).error is None
    monkeypatch.setenv("NO_PROXY", "elsewhere.invalid, 10.0.0.0/8")
    assert network.proxy_of("http://10.1.2.3:8000/v1") is None


@pytest.mark.parametrize("value", BAD_PROXIES)
def test_a_bad_proxy_is_named_for_a_server_and_for_the_hub(tmp_path, monkeypatch, value):
    monkeypatch.setenv("ALL_PROXY", value)
    use_hub(monkeypatch, "http://hub.invalid")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for error, host in ((refused("http://server.invalid/v1"), "server.invalid"), (_refused_hub(), "hub.invalid")):
        assert error.what == "ALL_PROXY is not the address of a proxy that can be used."
        assert host in error.where
        assert "unset ALL_PROXY" in error.next_step
        assert "geheim" not in str(error)


def _refused_hub() -> ModelUnavailable:
    with pytest.raises(ModelUnavailable) as caught:
        fetched()
    return caught.value


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", "http://server.site.org/v1", False),
        ("", "http://localhost:8000/v1", True),
        ("", "http://[::1]:8000/v1", True),
        ("", "http://127.9.9.9/v1", True),
        ("*", "http://server.site.org/v1", True),
        ("site.org", "http://server.site.org/v1", True),
        (".site.org", "http://server.site.org/v1", True),
        ("*.site.org", "http://server.site.org/v1", True),
        ("site.org", "http://othersite.org/v1", False),
        ("a.org, server.site.org:8000", "http://server.site.org:8000/v1", True),
        ("server.site.org:8000", "http://server.site.org:9000/v1", False),
        ("10.1.2.3", "http://10.1.2.3:8000/v1", True),
        ("10.0.0.0/8", "http://10.1.2.3:8000/v1", True),
        ("10.0.0.0/8", "http://11.1.2.3:8000/v1", False),
        ("fd00::/8", "http://[fd00::1]:8000/v1", True),
    ],
)
def test_no_proxy_is_respected(monkeypatch, no_proxy, url, direct):
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert network.proxy_of(url) == (None if direct else "http://proxy.invalid:3128")


def test_a_proxy_for_one_kind_of_address_comes_before_all_proxy(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://not.used:1")  # as GNOME sets it
    monkeypatch.setenv("HTTPS_PROXY", "proxy.invalid:3128")
    assert network.proxy_of("https://server.invalid/v1") == "http://proxy.invalid:3128"


@contextmanager
def socks_server(to: int, reply: bytes | None = None) -> Iterator[tuple[str, list[str]]]:
    """A SOCKS5 proxy on loopback that connects everything to the port `to`; yields its URL and the hosts asked for."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            target.close()

    def serve(client: socket.socket) -> None:
        client.recv(2 + client.recv(2)[1]) if reply is None else client.recv(99)
        if reply is not None:
            client.sendall(reply)
            client.close()
            return
        client.sendall(b"\x05\x00")
        head = client.recv(5)
        assert head[3] == 3  # a name: the proxy looks it up
        asked.append(client.recv(head[4]).decode())
        client.recv(2)
        server = socket.create_connection(("127.0.0.1", to))
        client.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
        threading.Thread(target=copy, args=(server, client), daemon=True).start()
        copy(client, server)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"socks5://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_a_server_and_the_hub_are_reached_through_a_socks_proxy(tmp_path, monkeypatch):
    with FaultServer() as server, socks_server(server.port) as (proxy, asked):
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert one("http://server.invalid/v1").error is None
        assert set(asked) == {"server.invalid"}
    with fetching(tmp_path, monkeypatch, lambda path, right: right) as server, socks_server(server.port) as found:
        monkeypatch.setenv("ALL_PROXY", found[0])
        use_hub(monkeypatch, "http://hub.invalid")
        assert fetched().name == COMMIT
        assert set(found[1]) == {"hub.invalid"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad\r\n\r\n", b"\x05\xff", b""])
def test_a_socks_proxy_that_is_none_is_one_message(tmp_path, monkeypatch, reply):
    with fetching(tmp_path, monkeypatch, lambda path, right: right), socks_server(0, reply) as (proxy, _):
        monkeypatch.setenv("ALL_PROXY", proxy)
        use_hub(monkeypatch, "http://hub.invalid")
        assert _refused_hub().what.startswith("The hub hub.invalid cannot be reached through the proxy in ALL_PROXY")
        gc.collect()  # httpx2 leaves the socket to the collector, which would warn in a later test


def test_the_command_with_a_socks_proxy_and_a_server_on_this_machine(work, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with FaultServer() as server:
        work.job(f"[engine]\nkind = 'api'\n[api]\nmodel = 'm'\nbase_url = '{server.url}'\n")
        work.run()
        assert contacts(work) == {f"127.0.0.1:{server.port}"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A file with a new private authority's certificate for 127.0.0.1, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs the command openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout key.pem -out cert.pem"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return folder / "both.pem"


def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_private_authority_is_trusted_through_ssl_cert_file(certificate, monkeypatch):
    with FaultServer(tls=tls(certificate)) as server:
        assert "for a private certificate authority set SSL_CERT_FILE" in refused(server.url).next_step
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        error = refused(server.url)
        assert "a certificate that this machine does not trust" in error.what
        assert 'REQUESTS_CA_BUNDLE is not read: export SSL_CERT_FILE="$REQUESTS_CA_BUNDLE"' in error.next_step
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert.pem")))
        assert one(server.url).error is None


def test_a_hub_whose_certificate_is_not_trusted_is_one_message(certificate, tmp_path, monkeypatch):
    with FaultServer(tls=tls(certificate)) as server, fetching(tmp_path, monkeypatch, lambda path, right: right):
        use_hub(monkeypatch, f"https://127.0.0.1:{server.port}")
        error = _refused_hub()
        assert error.what == f"The hub 127.0.0.1:{server.port} presents a certificate that this machine does not trust."
        assert "SSL_CERT_FILE" in error.next_step


def _bad(folder: Path, name: str) -> tuple[str, Path]:
    variable, _, kind = name.partition(" ")
    path = folder / kind
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no certificate")
    elif kind == "folder":
        path.mkdir()
    return variable, path


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("SSL_CERT_FILE missing", "does not exist"),
        ("SSL_CERT_FILE empty", "holds no certificate in PEM format"),
        ("SSL_CERT_FILE text", "holds no certificate in PEM format"),
        ("SSL_CERT_FILE folder", "is not a file"),
        ("SSL_CERT_DIR missing", "is not a folder"),
        ("SSL_CERT_DIR empty", "is not a folder"),
        ("SSL_CERT_DIR folder", "holds no certificate under its hash"),
    ],
)
def test_bad_certificates_are_named_with_variable_and_file(tmp_path, monkeypatch, name, wrong):
    variable, path = _bad(tmp_path, name)
    monkeypatch.setenv(variable, str(path))
    use_hub(monkeypatch, "https://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for error in (refused("https://127.0.0.1:9/v1"), _refused_hub()):
        assert error.what.startswith(f"{variable} {wrong}")
        assert error.where == f"{variable} = {path}"
        assert f"unset {variable}" in error.next_step
    with FaultServer() as server:  # without TLS they do not matter
        assert one(server.url).error is None


def test_the_command_with_a_missing_file_of_certificates(work, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "missing.pem")
    work.job("[engine]\nkind = 'api'\n[api]\nmodel = 'm'\nbase_url = 'https://127.0.0.1:9/v1'\n")
    done = work.run(expect=4)
    assert "Error: SSL_CERT_FILE does not exist" in done.stderr
    assert "where: SSL_CERT_FILE = missing.pem" in done.stderr
