"""A company's proxy as a node meets it: it opens tunnels (HTTP CONNECT), and it alone knows the server's name."""

from __future__ import annotations

import contextlib
import socket
import threading


class Tunnel:
    """Connects to this machine whatever host is asked for. asked: host:port of each tunnel."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._open, args=(self._listening.accept()[0],), daemon=True).start()

    def _open(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += client.recv(1)
            method, target, _ = request.split(b"\r\n")[0].decode().split()
            self.asked.append(target)
            if method != "CONNECT":
                client.sendall(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", int(target.rpartition(":")[2]))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=_pass_on, args=(server, client), daemon=True)
                back.start()
                _pass_on(client, server)
                back.join()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while received := source.recv(1 << 16):
            target.sendall(received)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
