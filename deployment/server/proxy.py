"""The proxy in front of a server: TLS, and only what nodes and operators need."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from conclave.base.errors import BadInputError
from conclave.deployment.server.config import ServerConfig
from conclave.deployment.server.loopback import LOOPBACK

_LONG_S = 3600
_NOT_IN_NGINX = "\"'\\$"


def nginx_program() -> str:
    """Return where nginx is.

    Raises:
        BadInputError: it is not installed.
    """
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BadInputError("nginx: not found, must be installed (Debian: apt install nginx-light)")
    return found


def reload_proxy(folder: Path) -> bool:
    """Have the proxy of a running server read its certificates again; return whether one runs.

    Args:
        folder: absolute, the server's.
    """
    try:
        pid = int((folder / "state" / "nginx.pid").read_text())
        # A process that has taken a dead proxy's number is no concern of ours.
        if str(folder / "state" / "nginx.conf") not in Path(f"/proc/{pid}/cmdline").read_bytes().decode():
            return False
        os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError):
        return False
    return True


def check_proxy(state: Path) -> None:
    """Have nginx read its configuration, ``nginx.conf`` in a server's state.

    Raises:
        BadInputError: it does not accept it.
    """
    command = [*proxy_command(state), "-t", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (our own command)
    if done.returncode:
        raise BadInputError(f"{state / 'nginx.conf'}: not accepted: {done.stderr.strip().splitlines()[0]}")


def proxy_command(state: Path) -> list[str]:
    """Return what runs nginx with a server's state."""
    return [nginx_program(), "-c", str(state / "nginx.conf"), "-p", str(state), "-e", "stderr"]


def nginx_config(config: ServerConfig, folder: Path) -> str:
    """Return the configuration of nginx.

    Nodes reach Flower's Fleet API, which asks each request for a signature with an enrolled key. Operators, who show a
    client certificate of the server's CA, reach the Control API. Nothing else is reachable, including the Runtime API,
    which hands work out. Paths are matched after nginx has decoded and normalised them.

    Args:
        folder: absolute, the server's; certificates lie in it, and state.

    Raises:
        BadInputError: the folder's name cannot be written in such a configuration.
    """
    if any(character in _NOT_IN_NGINX or not character.isprintable() for character in str(folder)):
        raise BadInputError(f"{str(folder)!r}: the server's folder must have no quotes, backslashes or '$' in its path")
    tls, state = folder / "tls", folder / "state"
    upstream = f"https://127.0.0.1:{config.internal_port}"
    return f"""daemon off;
pid "{state}/nginx.pid";
error_log stderr warn;
worker_processes auto;
events {{ worker_connections 1024; }}
http {{
  server_tokens off;
  access_log off;
  client_body_temp_path "{state}/nginx-body";
  proxy_temp_path "{state}/nginx-proxy";
  fastcgi_temp_path "{state}/nginx-unused";
  uwsgi_temp_path "{state}/nginx-unused";
  scgi_temp_path "{state}/nginx-unused";
  map $ssl_client_verify $is_operator {{ default 0; SUCCESS 1; }}
  server {{
    listen {config.listens_on} ssl;
    ssl_certificate "{tls}/server.pem";
    ssl_certificate_key "{tls}/server.key";
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_client_certificate "{tls}/ca.pem";
    ssl_crl "{tls}/revoked.pem";
    ssl_verify_client optional;
    client_max_body_size {config.max_message_mb}m;
    client_body_timeout 60s;
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_read_timeout {_LONG_S}s;
    proxy_ssl_trusted_certificate "{state}/{LOOPBACK}/ca.pem";
    proxy_ssl_verify on;
    proxy_ssl_name localhost;
    proxy_http_version 1.1;
    location /v1/fleet/ {{ proxy_pass {upstream}; }}
    location /v1/control/ {{
      if ($is_operator = 0) {{ return 403; }}
      proxy_pass {upstream};
    }}
    location / {{ return 404; }}
    error_page 495 = @denied;  # a certificate that is not accepted
    location @denied {{ return 403; }}
  }}
}}
"""
