"""What may stand for a server's address."""

from __future__ import annotations

import pytest

from conclave.clients.folder.server_address import check_address, is_host_name


@pytest.mark.parametrize(
    "text",
    ["fed.example.org:9443", "localhost:1", "10.0.0.7:65535", "[::1]:9443", "[2001:db8::7]:9443", "a-b.C9:1",
     f"{'a' * 63}.org:1", "xn--bcher-kva.example:1"],
)  # fmt: skip
def test_names_and_addresses_with_a_port(text):
    assert check_address(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "fed", "fed:", ":1", "fed:0", "fed:65536", "fed:x", "fed:\u0661", "a..b:1", ".:1", "fed.:1", "-a:1", "a-:1",
     "a_b:1", "[::::]:1", "[10.0.0.7]:1", "::1:9443", "[::1]", "999.1.1.1:1", "1.2.3:1", "[fe80::1%eth0]:1",
     "f\u00e9d:1", "fed:1\n", "https://fed:1", "user@fed:1", "fed:1/path", f"{'a' * 64}.org:1", f"{'a.' * 127}org:1"],
)  # fmt: skip
def test_anything_else_is_refused_before_somebody_looks_it_up(text):
    with pytest.raises(ValueError, match=r"must be host:port, like fed\.example\.org:9443"):
        check_address(text)


def test_what_ends_in_a_number_is_no_name():
    assert is_host_name("7.example.org")
    assert not is_host_name("10.0.0.256")
