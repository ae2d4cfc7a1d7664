"""A proxy of the environment that cannot be used is one sentence wherever something goes out."""

from __future__ import annotations

import os
import ssl

import httpx
import pytest
from test_deployment_node import edit, folder, problems  # noqa: F401  (a fixture)

from conclave.base.errors import BadInputError
from conclave.clients.folder.node_directory import NodeDirectory
from conclave.deployment.host.certificates import Authority
from conclave.deployment.host.outward_proxy import check_outward_proxy
from conclave.deployment.node.process import start_node
from conclave.deployment.operator.flower_control import Control
from conclave.deployment.operator.profile import find_operator
from conclave.deployment.server.directory import ServerDirectory
from conclave.deployment.server.process import start_server

SOCKS = "socks5://127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_proxy_yet(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        for spelled in (name, name.lower()):
            monkeypatch.setenv(spelled, "")  # so that it is put back, whatever is made of it
            monkeypatch.delenv(spelled)


@pytest.fixture
def connected(folder, tmp_path):  # noqa: F811
    Authority.create(tmp_path, days=30)
    edit(folder, "# [server]", f'[server]\naddress = "localhost:1"\nca = "{tmp_path / "ca.pem"}"\n#')
    return NodeDirectory(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", SOCKS),
        ("https_proxy", SOCKS),
        ("HTTPS_PROXY", "ftp://proxy.example.org:21"),
        ("HTTPS_PROXY", "http://"),
        ("HTTPS_PROXY", "http://a..b:3128"),
        ("HTTPS_PROXY", "http://[::::]:3128"),
        ("HTTP_PROXY", "http://proxy:port"),
    ],
)
def test_it_is_named_and_not_shown(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError) as caught:
        check_outward_proxy()
    sentence = f"{name.upper()} in the environment: cannot be used, must be http://host:port"
    assert str(caught.value) == sentence


def test_where_no_host_has_one_it_does_not_matter(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", SOCKS)
    monkeypatch.setenv("NO_PROXY", "a, *")
    check_outward_proxy()
    httpx.Client().close()


def test_hosts_without_a_proxy_that_cannot_be_are_named(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "[::1]")
    with pytest.raises(BadInputError, match=r"^NO_PROXY in the environment: cannot be used"):
        check_outward_proxy()


@pytest.mark.parametrize(
    "value", ["http://proxy_1:3128", "proxy:3128", "https://user:secret@10.0.0.7:1", "http://[::1]:1"]
)
def test_others_are_used_and_never_for_loopback(monkeypatch, value):
    monkeypatch.setenv("HTTPS_PROXY", value)
    monkeypatch.setenv("NO_PROXY", "intra.example.org")
    check_outward_proxy()
    with httpx.Client() as client:
        for url, direct in (
            ("https://127.0.0.1:1", True),
            ("https://[::1]:1", True),
            ("https://intra.example.org", True),
            ("https://fed:1", False),
        ):
            assert (client._transport_for_url(httpx.URL(url)) is client._transport) is direct, url


def test_whatever_goes_out_looks_before(connected, tmp_path, monkeypatch):
    server = ServerDirectory.create(tmp_path / "fed", ["fed.example.org"], port=9443, days=30)
    operator = find_operator(str(server.operator))
    with Control.of(operator):
        pass
    monkeypatch.setenv("ALL_PROXY", SOCKS)
    assert problems(connected.path)["server"].startswith("ALL_PROXY in the environment")
    umask = os.umask(0o077)
    try:
        for begin in (lambda: Control.of(operator), lambda: start_node(connected), lambda: start_server(server)):
            with pytest.raises(BadInputError, match=r"^ALL_PROXY in the environment"):
                begin()
    finally:
        os.umask(umask)


def test_a_name_that_no_address_can_belong_to_is_not_reachable(connected, monkeypatch):
    """Its form is right, but what it encodes is no text: found only where it is looked up."""
    edit(connected.path, "localhost:1", "xn--a:1")
    assert problems(connected.path)["server"].startswith("xn--a:1: not reachable")
    with Control("xn--a:1", ssl.create_default_context()) as control, pytest.raises(BadInputError, match="cannot list"):
        control.nodes()
