"""Certificates, the proxy's configuration, and an operator's folder."""

from __future__ import annotations

import ipaddress
import ssl
import stat

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from conclave.base.errors import BadInputError
from conclave.clients.folder.node_key import create_node_key
from conclave.deployment.host.certificates import Authority, days_left
from conclave.deployment.operator.profile import find_operator
from conclave.deployment.server.config import read_server_config
from conclave.deployment.server.directory import ServerDirectory
from conclave.deployment.server.loopback import LOOPBACK, make_certificate
from conclave.deployment.server.proxy import check_proxy, nginx_config, nginx_program


@pytest.fixture
def server(tmp_path):
    return ServerDirectory.create(tmp_path / "fed", ["fed.example.org", "10.0.0.7"], port=9443, days=30)


def certificate(path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_servers_certificate_is_for_its_hosts_and_loopback_and_signed_by_the_ca(server):
    ca, found = certificate(server.tls / "ca.pem"), certificate(server.tls / "server.pem")
    found.verify_directly_issued_by(ca)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(a) for a in ("10.0.0.7", "127.0.0.1")]
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert 29.9 < days_left(server.tls / "server.pem") < 30.1
    assert days_left(server.tls / "ca.pem") > 3649  # a new one would have to go to every node


def test_a_renewed_certificate_is_for_the_hosts_that_are_configured_now(server):
    before = certificate(server.tls / "server.pem")
    path = server.path / "server.toml"
    path.write_text(path.read_text().replace('"fed.example.org"', '"new.example.org"'))
    ServerDirectory(server.path).renew(days=100)
    after = certificate(server.tls / "server.pem")
    after.verify_directly_issued_by(certificate(server.tls / "ca.pem"))
    names = after.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "new.example.org" in names.get_values_for_type(x509.DNSName)
    assert after.serial_number != before.serial_number
    assert 99.9 < days_left(server.tls / "server.pem") < 100.1
    key = serialization.load_pem_private_key((server.tls / "server.key").read_bytes(), password=None)
    assert key.public_key() == after.public_key() != before.public_key()
    assert stat.S_IMODE((server.tls / "server.key").stat().st_mode) == 0o600


def test_nothing_outlives_its_ca(server):
    server.renew(days=7300)
    ends = {certificate(server.tls / name).not_valid_after_utc for name in ("server.pem", "ca.pem")}
    assert len(ends) == 1


def test_without_the_cas_key_nothing_is_signed(server, tmp_path):
    (server.tls / "ca.key").rename(tmp_path / "ca.key")
    for ask in (
        lambda: server.renew(days=1),
        lambda: server.add_operator("ann", tmp_path / "ann", days=1),
        lambda: server.revoke_operator("operator"),
    ):
        with pytest.raises(BadInputError, match=r"must have ca\.pem and ca\.key"):
            ask()
    assert not (tmp_path / "ann").exists()
    assert (server.tls / "operators" / "operator.pem").exists()


def test_exactly_the_revoked_operators_are_on_the_list(server, tmp_path):
    for name in ("ann", "bob"):
        server.add_operator(name, tmp_path / name, days=30)
    server.revoke_operator("ann")
    server.add_operator("ann", tmp_path / "ann again", days=30)
    server.revoke_operator("operator")
    listed = x509.load_pem_x509_crl((server.tls / "revoked.pem").read_bytes())
    assert listed.is_signature_valid(certificate(server.tls / "ca.pem").public_key())
    expected = {certificate(folder / "operator.pem").serial_number for folder in (tmp_path / "ann", server.operator)}
    assert {entry.serial_number for entry in listed} == expected
    assert listed.next_update_utc == certificate(server.tls / "ca.pem").not_valid_after_utc  # or it would refuse all


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-a", "x" * 65, "operator"])
def test_an_operators_name_is_plain_and_new(server, tmp_path, name):
    with pytest.raises(BadInputError, match="operator"):
        server.add_operator(name, tmp_path / "out", days=30)
    with pytest.raises(BadInputError, match="must be one of: operator"):
        server.revoke_operator("nobody")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BadInputError, match="is not empty"):
        server.add_operator("ann", tmp_path / "full", days=30)


def test_the_earliest_end_of_a_bundle_counts(server, tmp_path):
    """A node behind a proxy that looks into TLS trusts the company's CA too, in the same file."""
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes((server.tls / "ca.pem").read_bytes() + (server.tls / "server.pem").read_bytes())
    assert 29.9 < days_left(bundle) < 30.1


def test_an_operators_certificate_is_no_servers(server):
    found = certificate(server.operator / "operator.pem")
    found.verify_directly_issued_by(certificate(server.tls / "ca.pem"))
    assert list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    ssl.create_default_context(cafile=server.operator / "ca.pem").load_cert_chain(
        server.operator / "operator.pem", server.operator / "operator.key"
    )


def test_keys_and_secrets_are_readable_by_their_owner_only(server, tmp_path):
    public = create_node_key(tmp_path / "node.key")
    for path in (server.tls / "ca.key", server.tls / "server.key", server.operator / "operator.key", server.secret,
                 tmp_path / "node.key"):  # fmt: skip
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (server.tls, server.state, server.operator):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    key = serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), password=None)
    assert isinstance(key.curve, ec.SECP384R1)
    assert serialization.load_ssh_public_key(public.read_bytes()) == key.public_key()
    with pytest.raises(FileExistsError):
        create_node_key(tmp_path / "node.key")


def test_a_servers_folder_is_made_once(server, tmp_path):
    with pytest.raises(BadInputError, match="is a server's already"):
        ServerDirectory.create(server.path, ["other"], port=9443, days=30)
    assert ServerDirectory(server.path).config.hosts == ("fed.example.org", "10.0.0.7")


@pytest.mark.parametrize("host", ["", "a b", "-a.org", "ü.example", "a..b", "x" * 300, "a_b", "https://a"])
def test_a_host_that_is_none_is_refused(tmp_path, host):
    with pytest.raises(BadInputError, match="must be a name like"):
        ServerDirectory.create(tmp_path / "fed", ["fed.example.org", host], port=9443, days=30)
    assert not (tmp_path / "fed").exists()


STEPS = (
    "host.certificates.Authority.revoke", "host.certificates.Authority.issue_server",
    "host.certificates.Authority.issue_operator",
    "server.directory.operator_text", "server.directory.default_text",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_server_whose_making_was_interrupted_is_completed_by_the_same_again(tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(f"conclave.deployment.{step}", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ServerDirectory.create(tmp_path / "fed", ["fed.example.org"], port=9443, days=30)
    with pytest.raises(BadInputError, match=r"server\.toml: cannot be read"):
        ServerDirectory(tmp_path / "fed")
    begun = (tmp_path / "fed" / "tls" / "ca.pem").read_bytes()
    server = ServerDirectory.create(tmp_path / "fed", ["fed.example.org"], port=9443, days=30)
    assert (server.tls / "ca.pem").read_bytes() == (server.operator / "ca.pem").read_bytes() == begun
    assert (server.tls / "revoked.pem").exists()
    assert find_operator(str(server.operator)).address == "fed.example.org:9443"
    server.revoke_operator("operator")


def test_a_certificate_authority_whose_certificate_was_not_written_is_made_anew(tmp_path):
    (tmp_path / "ca.key").write_text("half a key")
    Authority.create(tmp_path, days=30)
    made = [(tmp_path / name).read_bytes() for name in ("ca.key", "ca.pem", "revoked.pem")]
    Authority.create(tmp_path, days=30)
    assert [(tmp_path / name).read_bytes() for name in ("ca.key", "ca.pem", "revoked.pem")] == made
    (tmp_path / "ca.key").unlink()  # off the server, as it should be
    with pytest.raises(BadInputError, match=r"must have ca\.pem and ca\.key"):
        Authority.create(tmp_path, days=30)


def test_another_users_server_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: server.state.stat().st_uid + 1)
    with pytest.raises(BadInputError, match=f"{server.state}: belongs to user"):
        ServerDirectory(server.path)
    (server.path / "server.toml").unlink()
    with pytest.raises(BadInputError, match="belongs to user"):
        ServerDirectory.create(server.path, ["fed.example.org"], port=9443, days=30)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("port = 9443", "port = 0", "port"),
        ("port = 9443", "prt = 9443", "prt"),
        ("max_message_mb = 1024", "max_message_mb = 0", "max_message_mb"),
        ('    "fed.example.org",\n    "10.0.0.7",\n', "", "hosts"),
        ("port = 9443", "port = [", "not TOML"),
        ('"0.0.0.0"', '"[::1]"', r"bind is '\[::1\]', must be an IP address"),
        ('"0.0.0.0"', '"localhost"', "bind is 'localhost', must be an IP address"),
        ('"0.0.0.0"', '"fe80::1%eth0"', "bind is 'fe80::1%eth0', must be an IP address"),
        ('"0.0.0.0"', '"::1; root /"', "must be an IP address"),
        ("internal_port = 9091", "internal_port = 9443", "internal_port is 9443, must be another than port"),
        ("# metrics_port = 9464", "metrics_port = 9443", "metrics_port is 9443, must be another than port"),
        ("# metrics_port = 9464", "metrics_port = 9091", "metrics_port is 9091, must be another than internal_port"),
    ],
)
def test_a_configuration_that_cannot_be_names_the_key(server, old, new, named):
    path = server.path / "server.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadInputError, match=named):
        read_server_config(path)


@pytest.mark.parametrize(
    ("bind", "shown"),
    [("0.0.0.0", "0.0.0.0:9443"), ("::1", "[::1]:9443"), ("::", "[::]:9443")],
)
def test_it_listens_where_it_is_told(server, bind, shown):
    path = server.path / "server.toml"
    path.write_text(path.read_text().replace('"0.0.0.0"', f'"{bind}"'))
    server = ServerDirectory(server.path)
    assert server.config.listens_on == shown
    assert f"listen {shown} ssl;" in nginx_config(server.config, server.path)


@pytest.fixture
def nginx():
    try:
        nginx_program()
    except BadInputError as error:
        pytest.skip(str(error))


def test_nginx_accepts_the_configuration_also_in_a_folder_of_any_name(tmp_path, nginx):
    created = ServerDirectory.create(tmp_path / "my föd; {1}", ["localhost"], port=9443, days=30)
    make_certificate(created.state)
    (created.state / "nginx.conf").write_text(nginx_config(created.config, created.path))
    check_proxy(created.state)
    text = (created.state / "nginx.conf").read_text()
    assert text.count("proxy_pass") == 2  # fleet and control; nothing else goes through
    assert "/v1/runtime" not in text


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\\b", "a$b", "a\nb"])
def test_a_folder_that_nginx_cannot_name_is_refused(server, tmp_path, name):
    with pytest.raises(BadInputError, match="must have no quotes, backslashes or"):
        nginx_config(server.config, tmp_path / name)


def test_a_configuration_that_nginx_refuses_is_one_sentence(server, nginx):
    make_certificate(server.state)
    (server.state / "nginx.conf").write_text(nginx_config(server.config, server.path).replace("listen ", "listne "))
    with pytest.raises(BadInputError, match=r'not accepted: .*unknown directive "listne"'):
        check_proxy(server.state)


def test_loopback_has_a_certificate_that_no_other_ca_signed_and_no_renewal_touches(server):
    make_certificate(server.state)
    folder = server.state / LOOPBACK
    assert sorted(path.name for path in folder.iterdir()) == ["ca.pem", "revoked.pem", "server.key", "server.pem"]
    assert stat.S_IMODE((folder / "server.key").stat().st_mode) == 0o600
    first = (folder / "server.pem").read_bytes()
    server.renew(days=30)
    assert (folder / "server.pem").read_bytes() == first
    assert days_left(folder / "server.pem") > 3600
    loaded = x509.load_pem_x509_certificate(first)
    loaded.verify_directly_issued_by(x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()))
    with pytest.raises(InvalidSignature):
        loaded.verify_directly_issued_by(x509.load_pem_x509_certificate((server.tls / "ca.pem").read_bytes()))
    make_certificate(server.state)  # at the next start
    assert (folder / "server.pem").read_bytes() != first


@pytest.mark.parametrize("address", ['"a..b:1"', '"[::::]:1"', '"fed"', '"fed:\u0661"', "9443", '"fed:70000"'])
def test_an_operators_address_is_checked_where_it_is_read(server, address):
    (server.operator / "superlink.toml").write_text(f"address = {address}\n")
    with pytest.raises(BadInputError, match=r"superlink\.toml: address is .*, must be host:port"):
        find_operator(str(server.operator))


def test_an_operator_is_found_by_folder_or_by_name(server, tmp_path, monkeypatch):
    assert find_operator(str(server.operator)).address == "fed.example.org:9443"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "conclave").mkdir()
    server.operator.rename(tmp_path / "conclave" / "fed")
    assert find_operator("fed").key == tmp_path / "conclave" / "fed" / "operator.key"
    (tmp_path / ".config").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    assert find_operator("fed").key == tmp_path / ".config" / "conclave" / "fed" / "operator.key"
    (tmp_path / "conclave" / "fed" / "operator.key").unlink()
    with pytest.raises(BadInputError, match=r"operator\.key: missing"):
        find_operator("fed")
    with pytest.raises(BadInputError, match="must be an operator's folder"):
        find_operator("elsewhere")
