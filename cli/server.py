"""``conclave server``: a server's certificates, its proxy and its nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conclave.cli.exit_status import to_be_started_again
from conclave.cli.options import LARGEST_ID, Json, ServiceUser, SuperLink
from conclave.cli.output import print_json

app = typer.Typer(help="Run a server: its certificates, its proxy, its nodes.", no_args_is_help=True)

ServerFolder = Annotated[Path, typer.Argument(metavar="SERVER", help="The server's folder, which holds server.toml.")]
Days = Annotated[int, typer.Option(min=1, max=7300, help="For how long the certificates are good.")]


@app.command("init")
def server_init(
    server: Annotated[Path, typer.Argument(metavar="SERVER", help="The server's new folder.")],
    host: Annotated[list[str], typer.Option(help="A name or address under which nodes reach it; may be repeated.")],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Where nodes and operators connect.")] = 9443,
    days: Days = 825,
    as_json: Json = False,
) -> None:
    """Create a server's folder: server.toml, a certificate authority, the server's certificate, an operator's."""
    from conclave.deployment.server.config import parse_server_config
    from conclave.deployment.server.directory import ServerDirectory

    parse_server_config({"hosts": host, "port": port}, where=str(server))  # before anything is written
    created = ServerDirectory.create(server, host, port=port, days=days)
    typer.echo(f"{server / 'server.toml'}: listens on port {port} as {', '.join(host)}")
    typer.echo(f"{server / 'operator'}: what an operator needs; keep it secret")
    typer.echo(f"{server / 'operator' / 'ca.pem'}: give this file to every node")
    if as_json:
        print_json({"server": str(server), "operator": str(created.operator), "ca": str(created.operator / "ca.pem")})


@app.command("start")
def server_start(server: ServerFolder) -> None:
    """Serve nodes and operators, until interrupted."""
    from conclave.deployment.host.logs import log_to_terminal
    from conclave.deployment.server.directory import ServerDirectory
    from conclave.deployment.server.process import start_server

    directory = ServerDirectory(server)
    log_to_terminal(directory.config.monitoring.log_format)
    with to_be_started_again():
        start_server(directory)


@app.command("unit")
def server_unit(server: ServerFolder, user: ServiceUser = "conclave") -> None:
    """Print a unit for systemd, which starts the server with its machine."""
    from conclave.deployment import service_unit
    from conclave.deployment.server.directory import ServerDirectory

    typer.echo(service_unit.server_unit(ServerDirectory(server), user), nl=False)


@app.command("enrol")
def server_enrol(
    public_key: Annotated[Path, typer.Argument(help="The node's public key (.pub), as node init made it.")],
    superlink: SuperLink,
    as_json: Json = False,
) -> None:
    """Let a node connect."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        node_id = control.register(public_key)
    typer.echo(f"{public_key} may connect, as Flower's node {node_id}")
    if as_json:
        print_json({"node_id": str(node_id)})


@app.command("remove")
def server_remove(
    node_id: Annotated[
        int, typer.Argument(metavar="NODE", min=0, max=LARGEST_ID, help="Flower's id of the node, as in status.")
    ],
    superlink: SuperLink,
) -> None:
    """Let a node connect no more: its key was lost, or it has left."""
    from conclave.deployment.operator.flower_control import Control
    from conclave.deployment.operator.profile import find_operator

    with Control.of(find_operator(superlink)) as control:
        control.unregister(node_id)
    typer.echo(f"node {node_id} may connect no more")


@app.command("renew")
def server_renew(server: ServerFolder, days: Days = 825) -> None:
    """Replace the server's certificate, for the hosts in server.toml; a running server takes it at once."""
    from conclave.deployment.server.directory import ServerDirectory
    from conclave.deployment.server.proxy import reload_proxy

    directory = ServerDirectory(server)
    directory.renew(days=days)
    when = "in use" if reload_proxy(directory.path) else "in use when the server starts"
    typer.echo(f"{directory.tls / 'server.pem'}: good for {days} days, {when}")


@app.command("operator")
def server_operator(
    server: ServerFolder,
    name: Annotated[str, typer.Argument(help="The operator's name.")],
    out: Annotated[Path, typer.Argument(help="The new folder to write; give it to the operator over a safe way.")],
    days: Days = 825,
) -> None:
    """Let one more operator register nodes and start runs."""
    from conclave.deployment.server.directory import ServerDirectory

    ServerDirectory(server).add_operator(name, out, days=days)
    typer.echo(f"{out}: what operator {name} needs; keep it secret")


@app.command("revoke")
def server_revoke(
    server: ServerFolder, name: Annotated[str, typer.Argument(help="The operator's name; the first is 'operator'.")]
) -> None:
    """Refuse an operator's certificate from now on; a running server does so at once."""
    from conclave.deployment.server.directory import ServerDirectory
    from conclave.deployment.server.proxy import reload_proxy

    directory = ServerDirectory(server)
    directory.revoke_operator(name)
    when = "now" if reload_proxy(directory.path) else "when the server starts"
    typer.echo(f"operator {name}: refused, {when}")
